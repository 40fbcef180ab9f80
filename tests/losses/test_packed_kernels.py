"""Tests the kernels of packed sequences and windows against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _cases import ATTENTION_KL, ATTENTION_MSE, Op, attention
from _oracle import Outcome, assert_accurate, assert_same, cast, evaluate
from test_contract import registered_calls
from test_memory import peak
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs the kernels")

from fastdistill.kernels import attention_mse, attention_packed

from fastdistill.ops import attention_mse as mse
from fastdistill.ops._attention import Attention, ranges

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Queries and keys of each sequence: empty ones, one token, some longer than a tile of 128 rows.
LENGTHS = ((0, 0), (5, 5), (1, 1), (150, 150), (3, 0), (0, 4), (130, 40), (7, 90), (0, 0))
Lengths = tuple[tuple[int, int], ...]
Window = tuple[int | None, int | None] | None
both = pytest.mark.parametrize("op", (ATTENTION_MSE, ATTENTION_KL), ids=lambda op: op.name)


def packed(lengths: Lengths = LENGTHS, heads: int = 2, **options: int) -> dict[str, Any]:
    starts = torch.tensor([(0, 0), *lengths]).cumsum(0).int()
    inputs = attention(1, heads, *starts[-1].tolist(), **{"student_kv": 1, "teacher_kv": 2, **options})
    inputs |= {"cu_seqlens": starts[:, 0].contiguous(), "cu_seqlens_key": starts[:, 1].contiguous()}
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def with_masks(inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds masks, and NaN in the rows that they leave out."""
    masked = dict(inputs)
    for side in ("query", "key"):
        mask = torch.rand(inputs[f"student_{side}"].shape[::2], device=DEVICE) > 0.2  # (B, T)
        masked[f"{side}_mask"] = mask
        for name in (f"student_{side}", f"teacher_{side}"):
            masked[name] = inputs[name].masked_fill(~mask[:, None, :, None], float("nan"))
    return masked


def allowed_pairs(lengths: Lengths, is_causal: bool, window: Window) -> Tensor:  # (L, S)
    """Builds the pairs sequence by sequence."""
    blocks = []
    for queries, keys in lengths:
        pairs = torch.ones(queries, keys, dtype=torch.bool)
        left, right = window or (None, None)
        if is_causal:
            pairs = pairs.tril(keys - queries)
        if left is not None:
            pairs = pairs.triu(keys - queries - left)
        if right is not None:
            pairs = pairs.tril(keys - queries + right)
        blocks.append(pairs)
    return torch.block_diag(*blocks).bool()


def check(op: Op, inputs: dict[str, Any], lengths: Lengths, **keywords: Any) -> Outcome:
    found = evaluate(op, inputs, op.learned, backend="triton", **keywords)
    dense = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in inputs.items() if "cu_seqlens" not in k}
    pairs = allowed_pairs(lengths, keywords.pop("is_causal", False), keywords.pop("window", None)).to(DEVICE)
    dense["attn_mask"] = pairs & dense.pop("attn_mask", torch.tensor(True, device=DEVICE))
    assert_accurate(found, op.truth(dense, **keywords), evaluate(op.textbook, dense, op.learned, **keywords))
    return found


@both
@pytest.mark.parametrize("is_causal,window", [(False, None), (True, None), (True, (40, None)), (False, (3, 50))])
def test_packed(op: Op, is_causal: bool, window: Window) -> None:
    inputs = with_masks(packed())
    first = check(op, inputs, LENGTHS, is_causal=is_causal, window=window)
    again = evaluate(op, inputs, op.learned, backend="triton", is_causal=is_causal, window=window)
    assert_same(again, first)


@pytest.fixture
def gram(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the Gram kernels take packed sequences of any size. Returns a list that grows with each call of them."""
    calls: list[str] = []

    def loss(*arguments: Any) -> Any:
        calls.append("gram")
        return original(*arguments)

    original = attention_mse.loss
    monkeypatch.setattr(attention_mse, "loss", loss)
    monkeypatch.setattr(mse, "PACKED_ROWS", 0)
    monkeypatch.setattr(mse, "SCAN_ROWS", 0)
    monkeypatch.setattr(mse, "takes_gram", lambda *tensors: True)
    return calls


# "long" has several slots of 256 rows a sequence, 4 heads in a group. "chunks" has whole chunks of 256 queries, more
# than a chunk of keys that all queries see, and more than one of queries that see no key.
CHUNKS = ((256, 256), (0, 0), (512, 512), (20, 620), (600, 20), (257, 257))
GRAM_CASES = {
    "short": (LENGTHS, {}, False),
    "short-causal": (LENGTHS, {}, True),
    "long": (((700, 300), (40, 50), (0, 3), (300, 520)), {"heads": 4, "teacher_kv": 1}, False),
    "chunks-causal": (CHUNKS, {"heads": 2, "teacher_kv": 1}, True),
}


@pytest.mark.parametrize("masked,dtype", [(False, torch.float32), (True, torch.float16)], ids=["full", "masked"])
@pytest.mark.parametrize("lengths,options,is_causal", GRAM_CASES.values(), ids=list(GRAM_CASES))
def test_gram_matrices_of_sequences(
    lengths: Lengths, options: dict[str, int], masked: bool, dtype: torch.dtype, is_causal: bool, gram: list[str]
) -> None:
    inputs = cast(packed(lengths, **options), dtype)
    inputs["cu_seqlens_key"] = inputs["cu_seqlens_key"].long()  # the two may differ in dtype
    inputs = with_masks(inputs) if masked else inputs
    first = check(ATTENTION_MSE, inputs, lengths, is_causal=is_causal)
    again = evaluate(ATTENTION_MSE, inputs, ATTENTION_MSE.learned, backend="triton", is_causal=is_causal)
    assert_same(again, first)
    assert gram == ["gram"] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="the profiler's allocations are those of the CPU")
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_memory_of_gram_matrices_is_linear_in_the_tokens(is_causal: bool, gram: list[str]) -> None:
    peaks = []
    for tokens in (512, 2048):
        inputs = cast(packed(((tokens // 2,) * 2,) * 2, heads=1, teacher_kv=1), torch.float16)
        peaks.append(peak(ATTENTION_MSE, inputs, ATTENTION_MSE.learned, is_causal=is_causal, backend="triton"))
    assert len(gram) >= 2
    assert peaks[1] <= 4.2 * peaks[0]
    assert peaks[1] < 0.1 * 4 * 1024**2  # the scores of a sequence


def test_gram_matrices_of_wide_heads(gram: list[str]) -> None:
    check(ATTENTION_MSE, packed(((30, 20), (5, 40)), d_s=80, d_t=136), ((30, 20), (5, 40)))
    assert gram


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_shapes_of_gram_matrices(is_causal: bool, gram: list[str]) -> None:
    op = replace(ATTENTION_MSE, options={"is_causal": is_causal})
    for function, *call in registered_calls(op, with_masks(packed(((30, 20), (5, 40)))), "triton", "mean"):
        torch.library.opcheck(function, *call, test_utils="test_faketensor")
    assert gram


@pytest.mark.parametrize("is_causal", [False, True])
def test_gram_matrices_compile(is_causal: bool, gram: list[str]) -> None:
    inputs, options = packed(((30, 20), (5, 40))), {"backend": "triton", "is_causal": is_causal}
    compiled = torch.compile(lambda **x: ATTENTION_MSE(**x, **options), backend="aot_eager", fullgraph=True)
    expected = evaluate(ATTENTION_MSE, inputs, ATTENTION_MSE.learned, **options)
    assert_same(evaluate(compiled, inputs, ATTENTION_MSE.learned), expected)
    assert gram


def test_the_mean_length_chooses_gram_matrices() -> None:
    def takes(*lengths: int, **options: Any) -> bool:
        inputs = packed(tuple((x, x) for x in lengths), d_s=26, d_t=64)
        masks = {"key_mask": None, "query_mask": None, "attn_mask": None, "is_causal": False}
        call = Attention(**inputs, student_scale=1.0, teacher_scale=1.0, **(masks | options))
        return mse._takes_linear(call, "triton")

    assert takes(500, 12)
    assert not takes(400, 12)
    assert takes(4090, 24, is_causal=True)
    assert not takes(4000, 24, is_causal=True)
    assert not takes(500, 500, window_left=3)


@both
@pytest.mark.parametrize("window", [(1, 0), (3, None), (None, 5), (40, 2)])
@pytest.mark.parametrize("length,keys", [(150, 150), (40, 170), (170, 40)])
def test_window(op: Op, window: Window, length: int, keys: int) -> None:
    inputs = attention(1, 2, length, keys, student_kv=1, teacher_kv=2)
    check(op, {name: x.to(DEVICE) for name, x in inputs.items()}, ((length, keys),), window=window)


@both
def test_windows_of_batches(op: Op) -> None:
    inputs = with_masks({name: x.to(DEVICE) for name, x in attention(2, 4, 20, 30).items()})
    inputs["attn_mask"] = torch.rand(2, 4, 20, 30, device=DEVICE) > 0.3
    check(op, inputs, ((20, 30),), window=(4, 3))


@both
def test_rows_outside_all_pairs_may_hold_nan(op: Op) -> None:
    inputs = packed()
    first = [0, 0]
    for sizes in LENGTHS:
        if 0 in sizes:
            for side, start, size in zip(("query", "key"), first, sizes, strict=True):
                for model in ("student", "teacher"):
                    inputs[f"{model}_{side}"][:, :, start : start + size] = float("nan")
        first = [a + b for a, b in zip(first, sizes, strict=True)]
    check(op, inputs, LENGTHS)


@both
def test_float16_and_int64_starts(op: Op) -> None:
    inputs = cast(packed(), torch.float16)
    check(op, {name: x.long() if "cu_seqlens" in name else x for name, x in inputs.items()}, LENGTHS, is_causal=True)


@both
@pytest.mark.parametrize("lengths", [(), ((0, 0), (0, 0)), ((3, 0), (0, 4))])
def test_nothing_to_compare(op: Op, lengths: Lengths) -> None:
    inputs = packed(lengths)
    found = evaluate(op, inputs, op.learned, backend="triton")
    assert all(not x.any() for x in found.values())


@pytest.mark.parametrize(
    "is_causal,left,right", [(False, None, None), (True, None, None), (True, 3, None), (False, 3, 5)]
)
def test_bounds_are_the_ranges(is_causal: bool, left: int | None, right: int | None) -> None:
    inputs = packed()
    call = Attention(**inputs, student_scale=1.0, teacher_scale=1.0, key_mask=None, query_mask=None, attn_mask=None,
                     is_causal=is_causal, window_left=left, window_right=right)  # fmt: skip
    for found, of_keys in zip(attention_packed.bounds(call), (False, True), strict=True):
        assert torch.equal(found, ranges(call, of_keys).int())


@pytest.mark.parametrize("chunk", [1, 16, 1024])
def test_bounds_within_chunks(chunk: int) -> None:
    inputs = packed()
    call = Attention(**inputs, student_scale=1.0, teacher_scale=1.0, key_mask=None, query_mask=None, attn_mask=None,
                     is_causal=True)  # fmt: skip
    blocks = []
    for queries, keys in LENGTHS:  # query i is beside key i + keys - queries
        i, j = torch.arange(queries)[:, None], torch.arange(keys) + queries - keys
        blocks.append((j <= i) & (j >= i // chunk * chunk))
    pairs, columns = torch.block_diag(*blocks).bool(), torch.arange(inputs["student_key"].shape[2])
    (first, end), (key_first, key_end) = attention_packed.bounds(call, chunk)
    assert torch.equal((columns >= first.cpu()[:, None]) & (columns < end.cpu()[:, None]), pairs)
    rows = torch.arange(len(pairs))[:, None]
    assert torch.equal((rows >= key_first.cpu()) & (rows < key_end.cpu()), pairs)


def test_tiles_meet_few_pairs_that_do_not_count() -> None:
    """Tiles of 64 queries read each key that one of their rows may meet: 16 sequences of 500, then a window of 256."""
    for lengths, left in ((((500, 500),) * 16, None), (((8192, 8192),), 256)):
        call = Attention(**packed(lengths, d_s=1, d_t=1), student_scale=1.0, teacher_scale=1.0, key_mask=None,
                         query_mask=None, attn_mask=None, is_causal=left is not None, window_left=left)  # fmt: skip
        for first, end in attention_packed.bounds(call):
            pairs = (end - first).sum().item()
            visited = sum(64 * (e.max() - f.min()).item() for f, e in zip(first.split(64), end.split(64), strict=True))
            assert pairs <= visited < 1.25 * pairs
