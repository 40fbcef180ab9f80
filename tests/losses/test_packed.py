"""Tests packed sequences and windows of attention_mse and attention_kl against dense masks, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from _cases import ATTENTION_KL, ATTENTION_MSE, ATTENTION_OPS, Op, attention
from _oracle import assert_accurate, assert_same, cast, evaluate, in_float64
from test_contract import registered_calls
from test_losses import MODULES
from test_memory import peak
from torch import Tensor

import fastdistill
from fastdistill.ops import _attention
from fastdistill.ops import attention_mse as mse

every_op = pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
both_ops = pytest.mark.parametrize("op", [ATTENTION_MSE, ATTENTION_KL], ids=str)
every_backend = pytest.mark.parametrize("chosen", ["reference", "torch"])

Window = tuple[int | None, int | None] | None
WINDOWS: list[Window] = [None, (3, None), (None, 2), (6, 1), (0, 0), (40, 70)]
# Empty sequences of queries, of keys and of both, one token, neighbours of one length, and two long ones: the narrow
# heads below take those by Gram matrices.
LENGTHS = [0, 5, 5, 0, 1, 3, 90, 12, 70]
KEY_LENGTHS = [4, 5, 5, 0, 2, 0, 90, 7, 95]


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def pairs(lengths: list[int], key_lengths: list[int], window: Window, is_causal: bool = False) -> Tensor:
    """Returns the dense mask (L, S) of packed sequences with a window, pair by pair."""
    left, right = window or (None, None)
    allowed = torch.zeros(sum(lengths), sum(key_lengths), dtype=torch.bool)
    for start, key_start, length, key_length in zip(
        ends(lengths)[:-1].tolist(), ends(key_lengths)[:-1].tolist(), lengths, key_lengths, strict=True
    ):
        for i in range(length):
            for j in range(key_length):
                distance = (j - key_length) - (i - length)
                too_far = (left is not None and distance < -left) or (right is not None and distance > right)
                allowed[start + i, key_start + j] = not too_far and not (is_causal and distance > 0)
    return allowed


def narrow(lengths: list[int] = LENGTHS, key_lengths: list[int] = KEY_LENGTHS) -> dict[str, Any]:
    """Returns narrow heads with grouped queries, of packed sequences."""
    return attention(1, 4, sum(lengths), sum(key_lengths), 3, 4, student_kv=2, teacher_kv=1)


def packing(lengths: list[int] = LENGTHS, key_lengths: list[int] = KEY_LENGTHS) -> dict[str, Tensor]:
    return {"cu_seqlens": ends(lengths), "cu_seqlens_key": ends(key_lengths)}


def assert_equals_the_dense_mask(op: Op, inputs: dict[str, Any], dense: Tensor, backend: str, **options: Any) -> None:
    """Checks a call with `options` against the textbook formula under a dense mask, which holds causality as well."""
    masked = {"attn_mask": dense, "is_causal": False}
    truth = op.truth(inputs, **masked)
    if backend == "reference":
        assert_same(op.truth(inputs, **options), truth)
    else:
        outcome = evaluate(op, inputs, op.learned, backend=backend, **options)
        assert_accurate(outcome, truth, evaluate(op.textbook, inputs, op.learned, **masked))


@every_op
@every_backend
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_sequences(op: Op, chosen: str, window: Window, padded: bool, dtype: torch.dtype) -> None:
    inputs = cast(narrow(), dtype)
    inputs |= op.some_masked(inputs) if padded else {}
    bounds = dict(zip(("window_left", "window_right"), window or (None, None), strict=True))
    options = packing() | (bounds if chosen == "reference" else {"window": window})
    dense = pairs(LENGTHS, KEY_LENGTHS, window, "is_causal" in op.options)
    assert_equals_the_dense_mask(op, inputs, dense, chosen, **options)


@every_op
@pytest.mark.parametrize("window", WINDOWS[1:], ids=str)
@pytest.mark.parametrize("size", [(150, 150), (90, 130), (130, 90), (1, 1)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_windows(op: Op, window: Window, size: tuple[int, int], padded: bool) -> None:
    length, keys = size
    inputs = attention(2, 4, length, keys, 6, 10, student_kv=2, teacher_kv=4)
    inputs |= op.some_masked(inputs) if padded else {}
    dense = pairs([length], [keys], window, "is_causal" in op.options)
    if op.name == "attention_kl" and keys == 1:  # one key has probability 1
        assert evaluate(op, inputs, op.learned, backend="torch", window=window)["value"].abs() < 1e-6
        return
    assert_equals_the_dense_mask(op, inputs, dense, "torch", window=window)


@both_ops
def test_a_window_beside_a_dense_mask(op: Op) -> None:
    inputs, other = attention(2, 4, 70, 90), torch.rand(2, 4, 70, 90) > 0.3
    dense = pairs([70], [90], (9, 4)) & other
    assert_equals_the_dense_mask(op, inputs, dense, "torch", window=(9, 4), attn_mask=other)


@every_op
@pytest.mark.parametrize("window", [None, (20, None)], ids=str)
def test_packed_sequences_equal_them_one_by_one(op: Op, window: Window) -> None:
    lengths = [7, 130, 1, 64]
    inputs = attention(1, 4, sum(lengths), sum(lengths), 26, 64, student_kv=4, teacher_kv=2)
    keywords = {"reduction": "sum", "backend": "torch", "window": window}
    packed = evaluate(op, inputs, op.learned, cu_seqlens=ends(lengths), **keywords)
    cuts = [slice(a, b) for a, b in pairwise(ends(lengths).tolist())]
    single = [evaluate(op, {n: x[:, :, cut] for n, x in inputs.items()}, op.learned, **keywords) for cut in cuts]
    assert packed["value"] == pytest.approx(sum(x["value"].item() for x in single), rel=1e-5)
    for name in op.learned:
        torch.testing.assert_close(packed[name], torch.cat([x[name] for x in single], 2), rtol=1e-4, atol=1e-5)


@every_op
@pytest.mark.parametrize("reduction,num_items", [("sum", None), ("mean", 11), ("mean", None)], ids=str)
def test_the_same_bits_and_one_loss_however_it_is_divided(op: Op, reduction: str, num_items: int | None) -> None:
    inputs, options = narrow(), {**packing(), "window": (5, 3), "backend": "torch"}
    once, again = (
        evaluate(op, inputs, op.learned, reduction=reduction, num_items=num_items, **options) for _ in range(2)
    )
    assert_same(again, once)
    dense = pairs(LENGTHS, KEY_LENGTHS, (5, 3), "is_causal" in op.options)
    counted = 4 * (dense.any(1).sum() if op.name == "attention_kl" else dense.sum()).item()
    total = evaluate(op, inputs, op.learned, reduction="sum", **options)["value"]
    divisor = 1 if reduction == "sum" else num_items or counted
    torch.testing.assert_close(once["value"], total / divisor)


@both_ops
def test_masked_rows_may_hold_nan(op: Op) -> None:
    inputs = narrow()
    inputs |= op.some_masked(inputs)
    options = {**packing(), "window": (30, 2), "backend": "torch"}
    expected = evaluate(op, inputs, op.learned, **options)
    spoilt = dict(inputs)
    for name in ("student_query", "student_key", "teacher_query", "teacher_key"):
        mask = inputs["query_mask" if name.endswith("query") else "key_mask"]
        spoilt[name] = inputs[name].masked_fill(~mask[:, None, :, None], torch.nan)
    assert_same(evaluate(op, spoilt, op.learned, **options), expected)


@every_op
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradcheck(op: Op, padded: bool) -> None:
    """Compares the gradients of the op itself with finite differences, over tiles and Gram matrices."""
    lengths, key_lengths = [0, 3, 3, 50, 2], [2, 3, 3, 60, 0]
    inputs = in_float64(narrow(lengths, key_lengths))
    masks = op.some_masked(inputs) if padded else {}
    learned = {name: inputs.pop(name).requires_grad_() for name in op.learned}
    for window in (None, (7, 2)):
        options = inputs | masks | packing(lengths, key_lengths) | {"window": window, "backend": "torch"}

        def call(*values: Tensor, options: dict[str, Any] = options) -> Tensor:
            return op(**dict(zip(learned, values, strict=True)), **options)

        assert torch.autograd.gradcheck(call, tuple(learned.values()), fast_mode=True)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_nothing(op: Op, dtype: torch.dtype) -> None:
    inputs, options = cast(narrow(), dtype), {**packing(), "window": (30, 2), "backend": "torch"}
    with torch.autocast("cpu", torch.bfloat16):
        inside = evaluate(op, inputs, op.learned, **options)
    assert inside["value"].dtype == torch.float32
    assert_same(inside, evaluate(op, inputs, op.learned, **options))


@every_op
def test_a_module_takes_the_window_and_its_forward_the_packing(op: Op) -> None:
    inputs = narrow() | packing()
    module = getattr(fastdistill, MODULES[op.name])(**op.options, window=(5, 3), backend="torch")
    expected = evaluate(op, inputs, op.learned, window=(5, 3), backend="torch")
    assert_same(evaluate(module, inputs, op.learned), expected)
    assert_same(evaluate(torch.compile(module, backend="aot_eager"), inputs, op.learned), expected, within=1e-6)


@both_ops
def test_nothing_is_packed(op: Op) -> None:
    inputs = attention(1, 2, 0, 0, student_kv=2, teacher_kv=2)
    for cu_seqlens in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        assert evaluate(op, inputs, op.learned, cu_seqlens=cu_seqlens, backend="torch")["value"] == 0


def test_long_packed_sequences_take_gram_matrices_and_short_ones_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"linear": [], "tiles": []}
    linear, tiles = mse._linear_loss, _attention.tile_blocks

    def spy(kind: str, function: Any) -> Any:
        return lambda call, *rest: (seen[kind].append(call.lengths()[0]), function(call, *rest))[1]

    monkeypatch.setattr(mse, "_linear_loss", spy("linear", linear))
    monkeypatch.setattr(_attention, "tile_blocks", spy("tiles", tiles))
    fastdistill.attention_mse(**narrow(), **packing(), backend="torch")
    assert seen == {"linear": [90, 70], "tiles": [5, 1, 12]}


# -- what it costs ---------------------------------------------------------------------------------------------


def computed(monkeypatch: pytest.MonkeyPatch, op: Op, inputs: dict[str, Any], **options: Any) -> int:
    """Returns how many scores of a side are computed, each of a head once."""
    areas: list[int] = []
    tiles = _attention.TileBlock.tiles

    def spy(block: _attention.TileBlock) -> Any:
        batch, heads = block.call.student_query.shape[:2]
        for rows, keys in tiles(block):
            areas.append(batch * heads * (rows.stop - rows.start) * (keys.stop - keys.start))
            yield rows, keys

    with monkeypatch.context() as patch:
        patch.setattr(_attention.TileBlock, "tiles", spy)
        op(**inputs, backend="torch", **options)
    return sum(areas)


@every_op
@pytest.mark.parametrize("left,right", [(100, 27), (0, 127), (127, 0)])
def test_only_tiles_of_the_band_are_computed(op: Op, left: int, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of r rows is r - 1 keys wider than the window, and has no more rows than the window has keys."""
    length, keys = 1000, 1200
    inputs = attention(1, 2, length, keys, student_kv=2, teacher_kv=2)
    width = left + (0 if op.options else right) + 1
    bound = 2 * length * (width + max(_attention.LEAST_ROWS, width))
    assert 0 < computed(monkeypatch, op, inputs, window=(left, right)) <= bound
    # Packed sequences of the same rows have as many tiles at most.
    halves = {"cu_seqlens": ends([500, 500]), "cu_seqlens_key": ends([600, 600])}
    assert 0 < computed(monkeypatch, op, inputs, window=(left, right), **halves) <= bound


def test_only_pairs_of_one_sequence_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = 4 * sum(a * b for a, b in zip(LENGTHS, KEY_LENGTHS, strict=True))
    assert computed(monkeypatch, ATTENTION_KL, narrow(), **packing()) == scores


@every_op
@pytest.mark.parametrize("window", [None, (100, 20)], ids=str)
def test_memory_is_linear_in_the_tokens(op: Op, window: Window) -> None:
    """Sequences of one length and of many, or a long one with a window."""
    peaks = []
    for tokens in (1024, 4096):
        lengths = [tokens] if window else [64] * (tokens // 128) + [31, 33, 100, 92] * (tokens // 512)
        inputs = attention(1, 2, tokens, tokens, 26, 64, student_kv=2, teacher_kv=2)
        peaks.append(peak(op, inputs, op.learned, cu_seqlens=ends(lengths), window=window, backend="torch"))
    assert peaks[1] <= 4.2 * peaks[0]
    assert peaks[1] - peaks[0] < 0.1 * 2 * 4 * 4096**2


# -- errors ----------------------------------------------------------------------------------------------------

INT = torch.int32
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "cu_seqlens_key is given without", {"cu_seqlens_key": torch.tensor([0, 9])}),
    (ValueError, "attn_mask is given with", {"cu_seqlens": ends([9]), "attn_mask": torch.ones(9, 9).bool()}),
    (TypeError, "cu_seqlens is torch.float32", {"cu_seqlens": torch.tensor([0.0, 9.0])}),
    (ValueError, r"shape \(\)", {"cu_seqlens": torch.tensor(9)}),
    (ValueError, r"\[0, 8\].*from 0 to the length, 9", {"cu_seqlens": torch.tensor([0, 8])}),
    (ValueError, r"\[1, 9\]", {"cu_seqlens": torch.tensor([1, 9])}),
    (ValueError, r"\[0, 7, 5, 9\]", {"cu_seqlens": torch.tensor([0, 7, 5, 9], dtype=INT)}),
    (ValueError, r"cu_seqlens_key is \[0, 8\]", {"cu_seqlens": ends([9]), "cu_seqlens_key": ends([8])}),
    (ValueError, r"should be \(3,\)", {"cu_seqlens": ends([5, 4]), "cu_seqlens_key": ends([9])}),
    (ValueError, "cu_seqlens is on meta.*should be on cpu", {"cu_seqlens": ends([9]).to("meta")}),
    (TypeError, "cu_seqlens_key is torch.bool", {"cu_seqlens": ends([9]), "cu_seqlens_key": ends([9]).bool()}),
    (TypeError, "window is 3", {"window": 3}),
    (TypeError, "window is", {"window": (1, 2, 3)}),
    (TypeError, "window's bound is float", {"window": (1.0, 2)}),
    (ValueError, r"window is \(-1, 2\)", {"window": (-1, 2)}),
]


@both_ops
@pytest.mark.parametrize("kind,message,options", REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_does_not_fit_is_refused(op: Op, kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(kind, match=message):
        op(**attention(1, 2, 9, 9, student_kv=2, teacher_kv=2), **options)


@both_ops
def test_packed_sequences_are_one_row(op: Op) -> None:
    with pytest.raises(ValueError, match="batch size is 2"):
        op(**attention(2, 2, 9, 9, student_kv=2, teacher_kv=2), cu_seqlens=ends([4, 5]))


@both_ops
def test_the_advice_for_a_list_works(op: Op) -> None:
    inputs, cu_seqlens = attention(1, 2, 9, 9, student_kv=2, teacher_kv=2), [0, 4, 9]
    with pytest.raises(TypeError, match=r"is a list; .* pass torch\.tensor\(cu_seqlens\)"):
        op(**inputs, cu_seqlens=cu_seqlens)
    assert op(**inputs, cu_seqlens=torch.tensor(cu_seqlens)).isfinite()


@both_ops
def test_compiles_without_a_break(op: Op) -> None:
    """The lengths may change from call to call: the compiled code asks for them inside the op."""
    inputs, options = narrow(), {"window": (5, 3), "backend": "torch"}
    compiled = torch.compile(lambda **x: op(**x, **options), backend="aot_eager", fullgraph=True)
    for key_lengths in (KEY_LENGTHS, KEY_LENGTHS[::-1]):
        given = inputs | packing(LENGTHS, key_lengths)
        expected = evaluate(op, given, op.learned, **options)
        assert_same(evaluate(compiled, given, op.learned), expected, within=1e-6)


@every_op
@pytest.mark.parametrize("window", [None, (5, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_opcheck(op: Op, window: Window, padded: bool) -> None:
    """Checks schema, fake implementation, autograd registration and AOT tracing of the packed op."""
    inputs = narrow() | packing()
    inputs |= op.some_masked(inputs) if padded else {}
    calls = registered_calls(replace(op, options=op.options | {"window": window}), inputs, "torch", "mean")
    assert any(isinstance(x, Tensor) and x.dtype == torch.int32 for _, args, _ in calls for x in args)
    for function, args, keywords in calls:
        torch.library.opcheck(function, args, keywords)
