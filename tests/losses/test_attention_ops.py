"""Tests attention_mse and attention_kl beyond the contract: shapes, masks, small differences, saturation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import ATTENTION_KL, ATTENTION_MSE, ATTENTION_MSE_CAUSAL, ATTENTION_OPS, Op, attention
from _oracle import assert_accurate, assert_same, cast, evaluate, in_float64
from test_contract import registered_calls
from torch import Tensor

import fastdistill
from fastdistill.ops import _attention
from fastdistill.ops import attention_mse as mse
from fastdistill.ops._attention import Attention, Counted

every_op = pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
both_ops = pytest.mark.parametrize("op", [ATTENTION_MSE, ATTENTION_KL], ids=str)
causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])


# -- shapes ----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("d_s,d_t", [(16, 16), (26, 64), (32, 64), (64, 26), (64, 80), (80, 128), (128, 32), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dimensions(op: Op, d_s: int, d_t: int, dtype: torch.dtype, backend: str) -> None:
    op.assert_accurate(cast(attention(length=24, keys=24, d_s=d_s, d_t=d_t), dtype), backend=backend)


@every_op
@pytest.mark.parametrize("student_kv,teacher_kv", [(1, 1), (1, 6), (2, 3), (3, 2), (6, 1), (6, 6)])
def test_grouped_queries(op: Op, student_kv: int, teacher_kv: int, backend: str) -> None:
    inputs = attention(heads=6, student_kv=student_kv, teacher_kv=teacher_kv)
    op.assert_accurate({**inputs, **op.some_masked(inputs)}, backend=backend)


LENGTHS = [(1, 1), (1, 50), (50, 1), (63, 64), (64, 65), (127, 129), (128, 128), (129, 127), (257, 256), (300, 513)]


@every_op
@pytest.mark.parametrize("size", LENGTHS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_lengths_around_tile_borders(op: Op, size: tuple[int, int], padded: bool, backend: str) -> None:
    """With fewer keys than queries some causal rows have no key; with more, the first row has several."""
    length, keys = size
    inputs = attention(batch=2, heads=2, length=length, keys=keys, student_kv=1, teacher_kv=2)
    if str(op).startswith("attention_kl") and keys == 1:  # one key has probability 1
        outcome = evaluate(op, inputs, op.learned, backend=backend)
        assert all(x.abs().max() < 1e-6 for x in outcome.values())
        return
    op.assert_accurate({**inputs, **(op.some_masked(inputs) if padded else {})}, backend=backend)


@every_op
@pytest.mark.parametrize("length,keys", [(64, 65), (129, 127), (100, 300)])
def test_rows_of_several_tiles(op: Op, length: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles stand for very long sequences, whose rows do not fit into one tile."""
    monkeypatch.setattr(_attention, "tile_side", lambda device: 32)
    monkeypatch.setattr(_attention, "tile_area", lambda device: 2**10)
    inputs = attention(batch=2, heads=2, length=length, keys=keys, student_kv=1, teacher_kv=2)
    op.assert_accurate(inputs, backend="torch")
    inputs |= op.some_masked(inputs)
    op.assert_accurate({**inputs, "student_scale": 2.0, "teacher_scale": 2.0}, backend="torch")
    op.assert_accurate({**inputs, "attn_mask": torch.rand(2, 2, length, keys) > 0.5}, backend="torch")


@pytest.mark.slow
@every_op
def test_a_long_sequence(op: Op, backend: str) -> None:
    inputs = attention(batch=1, heads=2, length=2000, keys=2000, d_s=26, d_t=64, student_kv=2, teacher_kv=2)
    op.assert_accurate({**inputs, **op.some_masked(inputs)}, backend=backend)


# -- masks -----------------------------------------------------------------------------------------------------

ATTN_MASKS = [(9,), (7, 1), (7, 9), (1, 7, 9), (4, 7, 9), (2, 1, 1, 9), (2, 1, 7, 9), (1, 4, 7, 1), (2, 4, 7, 9), (1,)]


@both_ops
@causal_or_not
@pytest.mark.parametrize("shape", ATTN_MASKS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_dense_masks_that_broadcast(
    op: Op, is_causal: bool, shape: tuple[int, ...], padded: bool, backend: str
) -> None:
    inputs = attention()
    attn_mask = torch.rand(shape) > 0.3
    attn_mask.view(-1)[0] = True
    inputs |= {"attn_mask": attn_mask, "is_causal": is_causal}
    op.assert_accurate({**inputs, **(op.some_masked(inputs) if padded else {})}, backend=backend)


@both_ops
@pytest.mark.parametrize("length,keys", [(129, 127), (150, 300)])
def test_a_dense_mask_across_tiles(op: Op, length: int, keys: int, backend: str) -> None:
    inputs = attention(heads=2, length=length, keys=keys, student_kv=1, teacher_kv=2)
    inputs |= op.some_masked(inputs)
    inputs["attn_mask"] = torch.rand(2, 2, length, keys) > 0.5
    inputs["attn_mask"][0, 0, 3] = False
    op.assert_accurate(inputs, backend=backend)


@both_ops
def test_separate_masks_equal_one_dense_mask(op: Op, backend: str) -> None:
    """Padding masks and is_causal give the same loss and gradients as one equivalent dense mask."""
    inputs = attention(length=9)
    masks = op.some_masked(inputs)
    dense = (masks["key_mask"][:, None, None] & masks["query_mask"][:, None, :, None]) & torch.ones(9, 9).tril().bool()
    separate = evaluate(op, {**inputs, **masks}, op.learned, is_causal=True, backend=backend)
    together = evaluate(op, {**inputs, "attn_mask": dense}, op.learned, backend=backend)
    assert_same(separate, together, within=2e-6)
    window = torch.ones(9, 9).bool().tril(1).triu(-2)  # a sliding window as a dense mask
    op.assert_accurate({**inputs, "attn_mask": window}, backend=backend)


@both_ops
def test_all_true_masks_equal_no_mask(op: Op, backend: str) -> None:
    inputs = attention()
    allow = {name: ~mask for name, mask in op.none_counted(inputs).items()}
    plain = evaluate(op, inputs, op.learned, backend=backend)
    assert_same(evaluate(op, {**inputs, **allow}, op.learned, backend=backend), plain, within=1e-6)
    allow["attn_mask"] = torch.ones(7, 9, dtype=torch.bool)
    assert_same(evaluate(op, {**inputs, **allow}, op.learned, backend=backend), plain, within=1e-6)


@both_ops
@pytest.mark.parametrize("blocked", ["a row", "a head", "a sample", "everything"])
def test_rows_without_any_key(op: Op, blocked: str, backend: str) -> None:
    attn_mask = torch.rand(2, 4, 7, 9) > 0.3
    where = {"a row": (0, 1, 3), "a head": (1, 2), "a sample": (0,), "everything": ()}[blocked]
    attn_mask[where] = False
    op.assert_accurate({**attention(), "attn_mask": attn_mask}, backend=backend)


@both_ops
@causal_or_not
def test_rows_that_count_only_by_their_own_mask_may_hold_nan(op: Op, is_causal: bool, backend: str) -> None:
    """Neither the keys of an entry without queries nor the queries of an entry without keys are in an allowed pair."""
    inputs = attention(batch=3)
    masks = {"key_mask": torch.ones(3, 9, dtype=torch.bool), "query_mask": torch.ones(3, 7, dtype=torch.bool)}
    masks["query_mask"][0], masks["key_mask"][1] = False, False
    expected = evaluate(op, {**inputs, **masks}, op.learned, is_causal=is_causal, backend="reference")
    for x in inputs.values():
        x[:2] = torch.nan
    assert_same(evaluate(op, {**inputs, **masks}, op.learned, is_causal=is_causal, backend=backend), expected, 1e-5)


# -- scales ----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("student_scale,teacher_scale", [(1.0, None), (None, 1.0), (0.3, 1.7), (-0.5, 0.25), (2, 1)])
def test_scales(op: Op, student_scale: float | None, teacher_scale: float | None, backend: str) -> None:
    op.assert_accurate({**attention(), "student_scale": student_scale, "teacher_scale": teacher_scale}, backend=backend)


@every_op
def test_a_scale_of_zero(op: Op, backend: str) -> None:
    """A scale of 0 means scores of 0, not the default scale, so the student's gradient is exactly 0."""
    inputs = attention()
    outcome = evaluate(op, inputs, op.learned, backend=backend, student_scale=0.0)
    silent = {**inputs, "student_query": torch.zeros_like(inputs["student_query"])}
    expected = op.truth(silent)["value"]
    assert outcome["value"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert all((outcome[name] == 0).all() for name in op.learned)


# -- small differences and saturation --------------------------------------------------------------------------


def close(mismatch: float, dtype: torch.dtype, length: int = 48) -> dict[str, Any]:
    """Returns inputs whose student scores differ from the teacher's by about `mismatch` of their size."""
    inputs = attention(length=length, keys=length, d_s=26, d_t=26, student_kv=4)
    for part in ("query", "key"):
        teacher = inputs[f"teacher_{part}"]
        inputs[f"student_{part}"] = teacher + mismatch * torch.randn_like(teacher)
    return cast(inputs, dtype)


@every_op
@pytest.mark.parametrize("mismatch", [1e-1, 1e-2, 1e-3])
def test_student_close_to_teacher(op: Op, mismatch: float, backend: str) -> None:
    """The loss is a small difference of large sums. Five batches are used, as one number may be right by luck."""
    op.assert_accurate_together([close(mismatch, torch.float32) for _ in range(5)], backend=backend)


@every_op
@pytest.mark.parametrize("mismatch", [1e-1, 1e-2])
def test_student_close_to_teacher_in_bfloat16(op: Op, mismatch: float, backend: str) -> None:
    batches = [close(mismatch, torch.bfloat16) for _ in range(5)]
    op.assert_accurate_together(batches, backend=backend, value_off=gram_rounding(op, mismatch, backend))


def gram_rounding(op: Op, mismatch: float, backend: str) -> float:
    """Returns the extra error of a loss whose Gram matrices tensor cores sum in float32.

    A rounding error u of the sums becomes u / mismatch^2 in the loss: 1% at a mismatch of 0.01, where scores in
    bfloat16 would cause 16%. Gradients are held to the usual bound.
    """
    return 16 * 2**-24 / mismatch**2 if backend == "triton" and str(op) == "attention_mse" else 0.0


@every_op
@pytest.mark.parametrize("length", [48, 160])
def test_scaled_losses_keep_small_float16_gradients(op: Op, length: int, backend: str) -> None:
    """Loss scaling must act before rounding: a gradient of 1e-6 rounded to float16 first has few digits left."""
    size = 0.1 if op.name == "attention_mse" else 1.0
    batches = []
    for _ in range(5):
        mismatch = 0.1 if op.name == "attention_kl" else 0.01
        inputs = close(mismatch, torch.float32, length)
        batches.append(cast({name: size * x for name, x in inputs.items()}, torch.float16))
    op.assert_accurate_together(
        batches, backend=backend, upstream=torch.tensor(2.0**12), value_off=gram_rounding(op, mismatch, backend)
    )


@every_op
@pytest.mark.parametrize("length", [48, 400])
def test_equal_student_and_teacher(op: Op, length: int, backend: str) -> None:
    """The loss is what cancellation leaves over: it must not be negative, and must be almost zero."""
    inputs = close(0.0, torch.float32, length)
    outcome = evaluate(op, inputs, op.learned, backend=backend)
    scores = (inputs["student_query"] @ inputs["student_key"].mT * 26**-0.5).square().mean()
    assert 0 <= outcome["value"] < 1e-12 * scores
    different = evaluate(op, {**inputs, "student_query": -inputs["student_query"]}, op.learned, backend=backend)
    assert all(outcome[name].norm() < 2e-6 * different[name].norm() for name in op.learned)


@every_op
@pytest.mark.parametrize("length", [20, 200])
def test_equal_scores_of_unequal_widths_never_give_a_negative_loss(op: Op, length: int, backend: str) -> None:
    """Equal scores are summed in another order, so that they differ by rounding errors of either sign."""
    for _ in range(10):
        query, key = torch.randn(2, 1, length, 9), torch.randn(2, 1, length, 9)
        order = torch.randperm(9)
        value = op(
            student_query=query[..., order],
            student_key=key[..., order],
            teacher_query=torch.nn.functional.pad(query, (0, 3)),
            teacher_key=torch.nn.functional.pad(key, (0, 3)),
            student_scale=1.0,
            teacher_scale=1.0,
            backend=backend,
        )
        assert 0 <= value < 1e-6


@pytest.mark.parametrize("size", [30.0, 1e4])
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saturated_attention(size: float, is_causal: bool, dtype: torch.dtype, backend: str) -> None:
    """The teacher's scores are +-size and the student's ordinary: rows saturate, and nothing overflows."""
    inputs = attention()
    inputs["teacher_query"] = inputs["teacher_query"].sign()
    inputs["teacher_key"] = inputs["teacher_key"].sign() * size
    ATTENTION_KL.assert_accurate(cast(inputs, dtype), backend=backend, teacher_scale=0.5, is_causal=is_causal)


@both_ops
@pytest.mark.parametrize("size", [0.03, 1e3])
def test_extreme_sizes(op: Op, size: float, backend: str) -> None:
    batches = [{name: x * size if "query" in name else x for name, x in attention().items()} for _ in range(5)]
    op.assert_accurate_together(batches, backend=backend)


@both_ops
@causal_or_not
def test_an_offset_shared_by_all_keys_costs_no_precision(op: Op, is_causal: bool, backend: str) -> None:
    """Keys have a large common part, as in trained models: scores are large, their differences between sides small."""
    batches = []
    for _ in range(3):
        inputs = attention(length=64, keys=64, d_s=26, d_t=26, student_kv=4)
        inputs["teacher_key"] += 20 * torch.randn(26)
        inputs["student_key"] = inputs["teacher_key"] + 0.1 * torch.randn_like(inputs["student_key"])
        inputs["student_query"] = inputs["teacher_query"] + 0.01 * torch.randn_like(inputs["teacher_query"])
        batches.append(inputs)
    op.assert_accurate_together(batches, backend=backend, is_causal=is_causal)


# -- the uses that the documentation names ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_similarity_between_hidden_states(dtype: torch.dtype, backend: str) -> None:
    """Hidden states as both query and key give || H_s H_s^T - H_t H_t^T ||^2."""
    student, teacher = torch.randn(3, 1, 11, 12, dtype=dtype), torch.randn(3, 1, 11, 20, dtype=dtype)

    def loss(student: Tensor) -> Tensor:
        return fastdistill.attention_mse(
            student, student, teacher, teacher, student_scale=1.0, teacher_scale=1.0, backend=backend
        )

    def textbook(student: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        h_s, h_t = student.to(dtype), teacher.to(dtype)
        return (h_s @ h_s.mT - h_t @ h_t.mT).square().mean()

    found, eager = (evaluate(f, {"student": student}, ["student"]) for f in (loss, textbook))
    truth = evaluate(textbook, in_float64({"student": student}), ["student"], dtype=torch.float64)
    assert_accurate(found, truth, eager)


@pytest.mark.parametrize("length", [64, 400])
def test_a_divergence_near_zero_is_not_biased(length: int) -> None:
    """Float32 sums over tiles would give the loss a floor of 3e-8, below which it could not fall."""
    torch.manual_seed(0)
    teacher = [torch.randn(2, 4, length, 32) for _ in range(2)]
    student = [teacher[0] + 1e-4 * torch.randn_like(teacher[0]), teacher[1]]
    truth = fastdistill.attention_kl(*(x.double() for x in (*student, *teacher)), backend="reference")
    assert 4e-9 < truth < 6e-9
    assert abs(fastdistill.attention_kl(*student, *teacher, backend="torch") / truth - 1) < 0.4


def test_value_relations(backend: str) -> None:
    """Values as query and key, re-split into heads, give MiniLM's KL between softmax(V V^T / sqrt(d)) of both sides."""
    student, teacher = torch.randn(2, 9, 24), torch.randn(2, 9, 40)

    def loss(student: Tensor) -> Tensor:
        v_s, v_t = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (student, teacher))
        return fastdistill.attention_kl(v_s, v_s, v_t, v_t, backend=backend)

    def textbook(student: Tensor) -> Tensor:
        relations = []
        for x in (student, teacher.to(student.dtype)):
            heads = x.reshape(2, 9, 4, -1)
            relations.append(torch.einsum("blhd,bshd->bhls", heads, heads) * heads.shape[-1] ** -0.5)
        p_t = relations[1].softmax(-1)
        return (p_t * (p_t.log() - relations[0].log_softmax(-1))).sum(-1).mean()

    found, eager = (evaluate(f, {"student": student}, ["student"]) for f in (loss, textbook))
    assert_accurate(found, evaluate(textbook, in_float64({"student": student}), ["student"]), eager)


# -- errors ----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"student_query": torch.ones(4, 7, 6)},
        ValueError,
        r"^student_query has shape \(4, 7, 6\); it should be \(batch, heads, length, head_dim\)",
    ),
    ({"teacher_key": torch.ones(9, 10)}, ValueError, r"^teacher_key has shape \(9, 10\); it should be \(batch, heads"),
    (
        {"teacher_query": torch.ones(2, 8, 7, 10)},
        ValueError,
        r"^teacher_query has 8 heads and student_query 4.*re-split.*relation heads \(MiniLMv2\)",
    ),
    (
        {"student_key": torch.ones(3, 2, 9, 6)},
        ValueError,
        r"^student_key has shape \(3, 2, 9, 6\); it should be \(2, 2",
    ),
    ({"student_key": torch.ones(2, 2, 9, 7)}, ValueError, r"^student_key has shape \(2, 2, 9, 7\).*\(2, 2, 9, 6\)"),
    ({"teacher_key": torch.ones(2, 4, 8, 10)}, ValueError, r"^teacher_key has shape \(2, 4, 8, 10\).*\(2, 4, 9, 10\)"),
    ({"teacher_query": torch.ones(2, 4, 6, 10)}, ValueError, r"^teacher_query has shape .*should be \(2, 4, 7, 10\)"),
    ({"teacher_query": torch.ones(1, 4, 7, 10)}, ValueError, r"^teacher_query has shape .*should be \(2, 4, 7, 10\)"),
    (
        {"student_key": torch.ones(2, 3, 9, 6)},
        ValueError,
        r"^student_key has 3 heads; the 4 query heads should be a multiple",
    ),
    ({"teacher_key": torch.ones(2, 0, 9, 10)}, ValueError, r"^teacher_key has 0 heads; the 4 query heads"),
    (
        {"student_query": torch.ones(2, 4, 7, 0), "student_key": torch.ones(2, 2, 9, 0)},
        ValueError,
        r"^student_query has head_dim 0; it should be at least 1",
    ),
    (
        {"student_key": torch.ones(2, 2, 9, 6).bfloat16()},
        TypeError,
        r"^student_query is torch\.float32 and student_key torch\.bfloat16; they should be the same",
    ),
    ({"student_scale": float("inf")}, ValueError, r"^student_scale is inf; it should be a finite number"),
    ({"teacher_scale": float("nan")}, ValueError, r"^teacher_scale is nan; it should be a finite number"),
    ({"student_scale": "0.5"}, TypeError, r"^student_scale is str; it should be a number"),
    ({"teacher_scale": torch.tensor(0.5)}, TypeError, r"^teacher_scale is Tensor; it should be a number"),
    ({"is_causal": 1}, TypeError, r"^is_causal is int; it should be a bool"),
    ({"attn_mask": torch.ones(7, 9)}, TypeError, r"^attn_mask is torch\.float32; it should be a bool tensor"),
    ({"attn_mask": [[True]]}, TypeError, r"^attn_mask is list; it should be a bool tensor"),
    (
        {"attn_mask": torch.ones(7, 8).bool()},
        ValueError,
        r"^attn_mask has shape \(7, 8\); it should broadcast to \(2, 4, 7, 9\), \(B, H, L, S\)",
    ),
    ({"attn_mask": torch.ones(2, 7, 9).bool()}, ValueError, r"^attn_mask has shape \(2, 7, 9\); it should broadcast"),
    ({"attn_mask": torch.ones(1, 2, 4, 7, 9).bool()}, ValueError, r"^attn_mask has shape \(1, 2, 4, 7, 9\)"),
    ({"attn_mask": torch.ones(7, 9, dtype=torch.bool, device="meta")}, ValueError, r"^attn_mask is on meta"),
    ({"reduction": "none"}, ValueError, r"^reduction is 'none'; it should be one of 'mean', 'sum'$"),
]


@both_ops
@pytest.mark.parametrize("wrong,kind,message", BAD)
def test_bad_arguments(op: Op, wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(kind, match=message):
        op(**{**attention(), **wrong}, backend=backend)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length,keys", [(1, 1), (257, 256), (600, 600), (600, 300), (300, 513), (512, 1030)])
def test_a_scan_over_several_chunks(
    length: int, keys: int, padded: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The causal scan covers several chunks of queries and of keys, one of which may begin before the other."""
    monkeypatch.setattr(mse, "SCAN_ROWS", 0)
    inputs = attention(batch=2, heads=2, length=length, keys=keys, d_s=5, d_t=9, student_kv=1, teacher_kv=2)
    inputs |= ATTENTION_MSE.some_masked(inputs) if padded else {}
    ATTENTION_MSE.assert_accurate(inputs, backend=backend, is_causal=True)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("keys", [5, 7, 9])
def test_the_shapes_of_a_scan(keys: int, padded: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code relies on the shapes of outputs. Which rows count is one of them, if the call does not say it."""
    monkeypatch.setattr(mse, "SCAN_ROWS", 0)
    inputs = attention(length=7, keys=keys)
    inputs |= ATTENTION_MSE_CAUSAL.some_masked(inputs) if padded else {}
    for function, *call in registered_calls(ATTENTION_MSE_CAUSAL, inputs, backend, "mean"):
        torch.library.opcheck(function, *call, test_utils="test_faketensor")


def test_heads_too_wide_for_tiles_of_scores(backend: str) -> None:
    """The Gram form takes heads of any width, such as hidden states; the kernels that compute scores do not."""
    inputs = attention(batch=1, heads=1, length=12, keys=12, d_s=260, d_t=300, student_kv=1, teacher_kv=1)
    ATTENTION_MSE.assert_accurate(inputs, backend=backend)
    if backend != "triton":
        return
    with pytest.raises(ValueError, match=r"^backend is 'triton', but heads are 300 wide.*up to 256.*'auto' or 'torch'"):
        fastdistill.attention_kl(**inputs, backend="triton")
    with pytest.raises(ValueError, match=r"^backend is 'triton', but heads are 300 wide"):
        fastdistill.attention_mse(**inputs, is_causal=True, backend="triton")


@pytest.mark.parametrize("d_s,d_t", [(64, 80), (80, 128), (128, 32), (256, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_matrices_of_heads_in_several_blocks(
    d_s: int, d_t: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences this short would use tiles of scores, so the test forces the Gram form."""
    monkeypatch.setattr(mse, "takes_gram", lambda *tensors: True)
    inputs = cast(attention(length=24, keys=24, d_s=d_s, d_t=d_t), dtype)
    ATTENTION_MSE.assert_accurate(inputs, backend=backend)


# -- which formulation and backend are chosen -------------------------------------------------------------------

BF16, FP32 = torch.bfloat16, torch.float32


def pair(
    heads: int, length: int, keys: int, d_s: int, d_t: int, dtype: torch.dtype, kv: int | None = None
) -> list[Tensor]:
    """Returns queries and keys of both sides on "meta", where they take no memory."""
    shapes = [(n, rows, d) for d in (d_s, d_t) for n, rows in ((heads, length), (kv or heads, keys))]
    return [torch.empty(2, *shape, dtype=dtype, device="meta") for shape in shapes]


@pytest.mark.parametrize("length,d_s,d_t,dtype,gram", [
    (32, 26, 64, BF16, True),  # one program per matrix
    (32, 64, 64, FP32, True),
    (128, 128, 128, BF16, False),  # 1.5 MiB of matrices, 64 KiB of rows
    (4096, 128, 128, BF16, True),
    (64, 256, 256, BF16, False),
    (512, 312, 768, BF16, False),  # hidden states
    (2048, 312, 768, BF16, True),
    (1024, 312, 768, FP32, False),  # multiplied in float64
    (4096, 312, 768, FP32, True),
    (512, 4096, 4096, BF16, False),  # 28 times the multiplications of the scores
    (4096, 4096, 4096, BF16, False),  # 0.8 GB of matrices for 134 MB of rows
    (16384, 4096, 4096, BF16, True),
])  # fmt: skip
def test_the_gram_form_is_taken_if_cheaper(length: int, d_s: int, d_t: int, dtype: torch.dtype, gram: bool) -> None:
    assert mse.takes_gram(*pair(1, length, length, d_s, d_t, dtype)) == gram
    assert mse.takes_gram(*pair(1, 2**17, 2**17, d_s, d_t, dtype))  # time stays linear
    # Query heads that share a key head count as more rows of it.
    assert mse.takes_gram(*pair(8, length // 8, length, d_s, d_t, dtype, kv=1)) == gram


@pytest.mark.parametrize("length,dtype,is_causal,linear", [
    (512, FP32, False, False),
    (2048, FP32, True, False),
    (8192, FP32, False, True),  # linear in the length, if slowly
    (512, BF16, False, True),  # multiplied in bfloat16
    (2048, BF16, True, True),
])  # fmt: skip
def test_cards_with_slow_float64_take_tiles_of_scores(
    length: int, dtype: torch.dtype, is_causal: bool, linear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Attention(*pair(4, length, length, 26, 64, dtype), 1.0, 1.0, None, None, is_causal, None)
    assert mse._prefers_gram(call, "triton")
    monkeypatch.setattr(mse, "_has_slow_float64", lambda device: True)
    assert mse._prefers_gram(call, "triton") == linear


@pytest.mark.parametrize("capability,slow", [((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False),
                                             ((10, 0), False), ((10, 3), True), ((12, 0), True)])  # fmt: skip
def test_cards_with_slow_float64(capability: tuple[int, int], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert mse._has_slow_float64(torch.device("cuda")) == slow
    assert not mse._has_slow_float64(torch.device("cpu"))


@pytest.mark.parametrize("shape,is_causal,chosen,linear", [
    ((4, 144, 144, 26, 64, BF16), False, "triton", True),
    ((4, 64, 64, 256, 256, BF16), False, "triton", False),
    ((4, 4096, 4096, 256, 256, BF16), False, "triton", True),
    ((4, 2048, 2048, 256, 256, BF16), True, "triton", True),
    ((4, 1024, 1024, 26, 64, BF16), True, "triton", False),  # sooner than the scan
    ((1, 64, 64, 312, 768, BF16), False, "triton", True),  # forced
    ((1, 64, 64, 312, 768, BF16), False, "torch", False),
    ((4, 16, 16, 26, 64, BF16), False, "torch", False),
])  # fmt: skip
def test_linear_or_tiled_form_is_chosen_by_shape(
    shape: Any, is_causal: bool, chosen: str, linear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for way in ("_linear", "_tiled"):
        monkeypatch.setattr(mse, way, lambda *arguments, way=way: taken.append(way) or (None, None))
    mse.attention_mse(Attention(*pair(*shape), 1.0, 1.0, None, None, is_causal, None), chosen, 1)
    assert taken == ["_linear" if linear else "_tiled"]


@pytest.mark.parametrize("length,chosen", [(64, "torch"), (2048, "triton")])
def test_short_hidden_states_use_torch_unless_triton_is_forced(
    length: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(
        fastdistill.functional.attention, "pick_backend", lambda name, *_: "triton" if name == "auto" else name
    )
    monkeypatch.setattr(
        fastdistill.functional.attention, "_attention_mse_op", lambda *x: taken.append(x[1]) or (torch.ones(()), 1)
    )
    states = [torch.empty_like(x, device="cpu") for x in pair(1, length, length, 312, 768, BF16)]
    fastdistill.attention_mse(*states)
    fastdistill.attention_mse(*states, backend="triton")
    assert taken == [chosen, "triton"]


@pytest.mark.parametrize(
    "length,keys,is_causal", [(5, 5, True), (5, 9, True), (5, 9, False), (9, 5, False), (1, 1, True)]
)
def test_unmasked_rows_are_counted_from_shapes_alone(length: int, keys: int, is_causal: bool) -> None:
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.made += 1
            return func(*args, **(kwargs or {}))

    call = Attention(*attention(length=length, keys=keys).values(), 1.0, 1.0, None, None, is_causal, None)
    with Calls() as calls:
        found = _attention.count_rows(call)
    assert calls.made <= 2  # one kernel launch and one view
    assert found.queries is None
    assert found.keys is None
    general = _attention.count_rows(call._replace(key_mask=torch.ones(1, keys).bool()))
    assert call.pairs() == general.pairs(call)
    assert torch.equal(found.keys_per_query, general.keys_per_query)
    assert found.keys_per_query.dtype == general.keys_per_query.dtype


def test_kernel_backward_skips_what_only_torch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastdistill.kernels.attention_mse", reason="needs triton")
    taken = []
    monkeypatch.setattr(mse, "_scales", lambda *arguments: taken.append("_scales"))
    monkeypatch.setattr(kernels, "gradients", lambda *arguments: taken.append("gradients"))
    monkeypatch.setattr(_attention, "count_rows", lambda *arguments: taken.append("count_rows"))
    call = (*attention().values(), 1.0, 1.0, torch.ones(2, 9).bool(), None, False, None)
    mse._gradients(torch.ones(()), *call, "triton", *(torch.ones(()) for _ in range(6)))
    assert taken == ["gradients"]


# -- kernel launches, recorded without a GPU -------------------------------------------------------------------

Launches = list[tuple[str, tuple[int, ...], tuple[Any, ...]]]  # kernel, grid, arguments


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Records kernel launches, configured as on an H100, instead of running them. Tensors may be on "meta"."""
    triton = pytest.importorskip("triton", reason="the launchers need it")
    from fastdistill.kernels import _common, attention_mse, attention_tiles

    found: Launches = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: found.append((self.name, grid, arguments))

    for module in (attention_mse, attention_tiles):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.jit.KernelInterface):
                monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setattr(_common, "arch_of", lambda x: "sm_90")
    return found


MANY = {
    "batch-times-heads": ((6000, 12, 32), 64, 64, torch.bfloat16),
    "batch-times-heads-one-at-a-time": ((6000, 12, 32), 128, 128, torch.bfloat16),
    "batch": ((70000, 1, 16), 32, 64, torch.bfloat16),
    "heads": ((1, 70000, 16), 32, 64, torch.bfloat16),
    "length": ((1, 1, 2**24), 32, 64, torch.bfloat16),
    "width": ((1, 1, 64), 8192, 12288, torch.float32),
}


@causal_or_not
@pytest.mark.parametrize("shape,d_s,d_t,dtype", MANY.values(), ids=list(MANY))
def test_grids_stay_within_the_limits_of_cuda(
    shape: tuple[int, int, int], d_s: int, d_t: int, dtype: torch.dtype, is_causal: bool, launches: Launches
) -> None:
    """CUDA allows 2^31 - 1 blocks in x, and 65535 in y and z."""
    from fastdistill.kernels import attention_mse, attention_tiles

    student, teacher = (torch.empty(*shape, width, dtype=dtype, device="meta") for width in (d_s, d_t))
    call = Attention(student, student, teacher, teacher, 1.0, 1.0, None, None, is_causal, None)
    inputs = call, Counted(torch.empty(0), None, None)
    loss, *saved = attention_mse.loss(call, 1.0, None, None)
    near = (student.float(), student.float()) if is_causal else (None, None)
    gradients = [torch.empty_like(student) for _ in range(2)]
    attention_mse.gradients(loss, call, *saved, near, *gradients)
    for is_kl in (False, True):
        d_query, d_key = (torch.empty_like(student, dtype=torch.float32) for _ in range(2))
        attention_tiles.loss(*inputs, is_kl=is_kl, dtype=torch.float32, d_query=d_query, d_key=d_key)
    names = {"_gram", "_contract", "_finalise", "_gradient", "_statistics", "_d_query", "_d_key"}
    assert {name for name, *_ in launches} == names
    for name, (x, *others), _ in launches:
        assert 0 < x < 2**31, name
        assert all(0 < n <= 65535 for n in others), f"{name}: {others}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_items", [None, 100, 7.5, torch.tensor(100)], ids=str)
def test_few_launches(masked: bool, num_items: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a small model waits for its launches: the kernels read raw masks, count pairs, sum and divide."""
    monkeypatch.setattr(fastdistill.functional.attention, "pick_backend", lambda name, *_: name)
    monkeypatch.setattr(mse, "takes_short", lambda call: False)  # longer sequences
    inputs = {name: x.bfloat16() for name, x in attention().items()}
    leaves = {name: inputs[name].requires_grad_() for name in ATTENTION_MSE.learned}
    inputs |= ATTENTION_MSE.some_masked(inputs) if masked else {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = fastdistill.attention_mse(**inputs, num_items=num_items, backend="triton")
        torch.autograd.grad(loss, list(leaves.values()))
    assert [name for name, *_ in launches] == ["_gram", "_contract", "_finalise", "_gradient", "_gradient"]
    # The names of what launches nothing.
    quiet = ("empty", "view", "detach", "item", "_local_scalar", "alias", "permute", "as_strided", "result_type")
    found = {event.name for event in profile.events() if event.name.startswith("aten::")}
    found -= {"aten::ones_like", "aten::fill_"}  # autograd's first gradient
    assert not [name for name in found if not any(word in name for word in quiet)]


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=str)
def test_gram_kernels_divide_by_1_where_nothing_counts(num_items: Any) -> None:
    pytest.importorskip("triton")
    inputs = attention()
    leaves = [inputs[name].requires_grad_() for name in ATTENTION_MSE.learned]
    masked = torch.zeros(inputs["student_key"].shape[0], inputs["student_key"].shape[2], dtype=torch.bool)
    call = Attention(*(inputs[name] for name in Attention._fields[:4]), 1.0, 1.0, masked, None, False, None)
    assert mse._prefers_gram(call, "triton")
    loss = fastdistill.attention_mse(**inputs, key_mask=masked, num_items=num_items, backend="triton")
    assert loss.item() == 0
    assert all(not x.any() for x in torch.autograd.grad(loss, leaves))


def test_rows_are_split_only_until_the_gpu_is_full(launches: Launches) -> None:
    """Each block of a wide head is a program already, and each further split costs D' x D' partial sums."""
    from fastdistill.kernels import attention_mse

    inputs = (x[:1] for x in pair(1, 4096, 4096, 384, 768, BF16))
    call = Attention(*inputs, 1.0, 1.0, None, None, False, None)
    attention_mse.loss(call, 1.0, None, None)
    partial = [arguments[8] for name, _, arguments in launches if name == "_gram"]
    assert [x.shape[0] for x in partial] == [1, 1, 1]  # without a GPU, 8 programs count as full; here are 18


# -- kernels that compute scores in tiles ------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_no_two_warps_compute_the_same_scores(arch: str, width: int, masked: bool) -> None:
    """A warp multiplies 16 rows at once, 32 with AMD's 64 threads; tiles of wide heads may split their keys as well."""
    kernels = pytest.importorskip("fastdistill.kernels.attention_tiles", reason="needs triton")
    tile = kernels._tiles(arch, 2, width, masked)
    rows = tile["BLOCK_M"] * (2 if width > 128 else 1)
    assert tile["num_warps"] * (32 if arch == "gfx942" else 16) <= rows


@pytest.mark.parametrize("is_kl", [False, True], ids=["mse", "kl"])
@pytest.mark.parametrize("length,keys", [(70, 50), (50, 70), (3, 0)])
def test_kernels_write_all_of_their_gradients(is_kl: bool, length: int, keys: int) -> None:
    kernels = pytest.importorskip("fastdistill.kernels.attention_tiles", reason="needs triton")
    sizes = ((length, 6), (keys, 6), (length, 10), (keys, 10))
    tensors = (torch.randn(2, 4, *size) for size in sizes)
    call = Attention(*tensors, 1.0, 1.0, torch.rand(2, keys) > 0.5, torch.rand(2, length) > 0.5, True, None)
    d_query, d_key = (torch.full_like(x, torch.nan) for x in call.tensors()[:2])
    counted = _attention.count_rows(call)
    kernels.loss(call, counted, is_kl=is_kl, dtype=torch.float32, d_query=d_query, d_key=d_key)
    assert d_query.isfinite().all()
    assert d_key.isfinite().all()
