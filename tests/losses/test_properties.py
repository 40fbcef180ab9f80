"""Tests invariances that need no oracle, over random shapes, masks, dtypes and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import ATTENTION_OPS, LINEAR_MSE, LOGITS_OPS, OPS, PER_ITEM_OPS, TOPK_OPS, Op
from _oracle import assert_same, cast, error, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdistill

seeds = st.integers(0, 2**31)
narrower = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
dtypes = st.just(torch.float64) | narrower
DIVERGENCES = [op for op in LOGITS_OPS if "vocab_size" not in op.options]
EPS = torch.finfo(torch.float32).eps


@st.composite
def calls(draw: Callable[[Any], Any], op: Op, backend: str) -> dict[str, Any]:
    """Draws inputs of random sizes and dtype, masked or not."""
    torch.manual_seed(draw(seeds))
    if op.per_item:
        largest = 6 if backend == "torch" else 3  # the interpreter runs a program a row, one after another
        rows = tuple(draw(st.lists(st.integers(1, largest), min_size=1, max_size=3)))
        inputs = op.make(rows)
    else:
        student_kv, teacher_kv = draw(st.sampled_from([(1, 1), (2, 4), (4, 2), (4, 4)]))
        batch, length, keys = (draw(st.integers(1, n)) for n in (2, 18, 18))
        inputs = op.make(batch, 4, length, keys, student_kv=student_kv, teacher_kv=teacher_kv)
    inputs = cast(inputs, draw(dtypes if backend != "cuda" else narrower))
    if draw(st.booleans()):
        inputs |= op.some_masked(inputs)
    return inputs


every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_divergence = pytest.mark.parametrize("op", DIVERGENCES, ids=str)


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Returns whether two tensors are equal up to a few roundings of numbers of the size of `scale`."""
    return bool(((a - b).abs() <= 16 * EPS * max(scale, b.abs().max().item())).all())


# -- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in DIVERGENCES if op.name != "soft_cross_entropy"], ids=str)
@given(st.data())
def test_divergences_are_never_negative_and_bounded(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    value = op(**inputs, backend=backend, reduction="none")
    assert (value >= 0).all()
    bound = {"tvd": 1.0, "jsd": math.log(2)}.get(op.name, math.inf)
    assert (value <= bound + 4 * EPS).all()


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
@given(st.data())
def test_attention_losses_are_never_negative(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    assert op(**inputs, backend=backend) >= 0


@pytest.mark.parametrize("op", [op for op in DIVERGENCES if str(op) in ("jsd", "tvd")], ids=str)
@given(st.data())
def test_jsd_at_a_half_and_tvd_are_symmetric(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    mask = {"mask": inputs["mask"]} if "mask" in inputs else {}
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    there = op(student_logits=student, teacher_logits=teacher, **mask, backend=backend, reduction="none")
    back = op(student_logits=teacher, teacher_logits=student, **mask, backend=backend, reduction="none")
    assert close(there, back)


@given(st.data())
def test_soft_cross_entropy_minus_entropy_is_kl(backend: str, data: st.DataObject) -> None:
    op = DIVERGENCES[0]
    inputs = data.draw(calls(op, backend))
    itself = {**inputs, "student_logits": inputs["teacher_logits"]}
    cross, entropy = (evaluate(op, x, op.learned, backend=backend) for x in (inputs, itself))
    kl = evaluate(fastdistill.kl_div, inputs, op.learned, backend=backend)
    assert close(cross["value"] - entropy["value"], kl["value"], cross["value"].item())
    assert error(cross["student_logits"], kl["student_logits"]) < 1e-2 if kl["student_logits"].any() else True


@given(st.data())
def test_swapping_student_and_teacher_reverses_the_divergence(backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(DIVERGENCES[0], backend))
    mask = {"mask": inputs["mask"]} if "mask" in inputs else {}
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    there = fastdistill.kl_div(student, teacher, reverse=True, **mask, backend=backend)
    assert close(there, fastdistill.kl_div(teacher, student, **mask, backend=backend))
    beta = data.draw(st.floats(0.01, 0.99))
    there = fastdistill.jsd(student, teacher, beta=beta, **mask, backend=backend)
    assert close(there, fastdistill.jsd(teacher, student, beta=1 - beta, **mask, backend=backend))


@pytest.mark.parametrize("op", [*DIVERGENCES, *TOPK_OPS], ids=str)
@given(st.data(), st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(op: Op, backend: str, data: st.DataObject, constant: float) -> None:
    inputs = data.draw(calls(op, backend))
    inputs = cast(inputs, torch.float64)  # in which adding the constant loses no digits
    before = evaluate(op, inputs, op.learned, backend=backend)
    shifted = {name: x + constant if name.endswith("logits") else x for name, x in inputs.items()}
    after = evaluate(op, shifted, op.learned, backend=backend)
    assert all(torch.allclose(after[name], before[name], rtol=1e-9, atol=1e-12) for name in before)


@pytest.mark.parametrize("op", [*DIVERGENCES, *TOPK_OPS], ids=str)
@given(st.data())
def test_gradients_of_a_row_of_logits_sum_to_zero(op: Op, backend: str, data: st.DataObject) -> None:
    """A constant added to a row leaves its softmax unchanged, so the gradient along it is zero."""
    inputs = data.draw(calls(op, backend))
    gradient = evaluate(op, cast(inputs, torch.float64), op.learned, backend=backend)["student_logits"]
    assert gradient.sum(-1).abs().max() < 1e-12


# -- permutations ----------------------------------------------------------------------------------------------


@every_divergence
@given(st.data())
def test_classes_may_be_permuted(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    order = torch.randperm(37)
    permuted = {name: x[..., order] if name.endswith("logits") else x for name, x in inputs.items()}
    before, after = (evaluate(op, x, op.learned, backend=backend) for x in (inputs, permuted))
    assert close(after["value"], before["value"])
    assert torch.allclose(after["student_logits"].double(), before["student_logits"][..., order].double(), 1e-2, 1e-6)


@pytest.mark.parametrize("op", [op for op in PER_ITEM_OPS if "labels" not in op.make()], ids=str)
@given(st.data())
def test_tokens_may_be_permuted(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    in_rows = [*op.masks["mask"], *(name for name in ("topk_indices", "mask") if name in inputs)]
    order = torch.randperm(inputs[in_rows[0]].shape[0])
    permuted = inputs | {name: inputs[name][order] for name in in_rows}
    before, after = (op(**x, backend=backend, reduction="none") for x in (inputs, permuted))
    assert close(after, before[order])


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
@given(st.data())
def test_heads_and_batches_may_be_permuted(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    for name in ("student_key", "teacher_key"):  # give every head its own keys
        inputs[name] = inputs[name].repeat_interleave(4 // inputs[name].shape[1], 1)
    heads, batches = torch.randperm(4), torch.randperm(inputs["student_query"].shape[0])
    permuted = {name: x[batches][:, heads] if x.dim() == 4 else x[batches] for name, x in inputs.items()}
    before, after = (evaluate(op, x, op.learned, backend=backend) for x in (inputs, permuted))
    assert close(after["value"], before["value"])
    for name in op.learned:
        expected = before[name][batches][:, heads].double()
        assert torch.allclose(after[name].double(), expected, 2e-2, 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("op", [op for op in ATTENTION_OPS if not op.options], ids=str)
@given(st.data())
def test_keys_and_queries_may_be_permuted(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    orders = {
        "query": torch.randperm(inputs["student_query"].shape[2]),
        "key": torch.randperm(inputs["student_key"].shape[2]),
    }
    permuted = {}
    for name, x in inputs.items():
        order = orders["query" if "query" in name else "key"]
        permuted[name] = x[:, :, order] if x.dim() == 4 else x[:, order]
    assert close(op(**permuted, backend=backend), op(**inputs, backend=backend))


# -- adding up -------------------------------------------------------------------------------------------------


@every_op
@given(st.data())
def test_a_batch_split_in_two_adds_up(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    batch = next(iter(inputs.values())).shape[0]
    cut = data.draw(st.integers(0, batch))
    split = {name for name in inputs if name.split("_")[-1] not in ("weight", "bias")}
    parts = [
        op(**{name: x[half] if name in split else x for name, x in inputs.items()}, backend=backend, reduction="sum")
        for half in (slice(None, cut), slice(cut, None))
    ]
    assert close(sum(parts), op(**inputs, backend=backend, reduction="sum"))


@pytest.mark.parametrize("op", PER_ITEM_OPS, ids=str)
@given(st.data())
def test_sum_and_mean_follow_from_the_items(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    items = op(**inputs, backend=backend, reduction="none")
    counted = op.items(**{**op.options, **inputs})[1]
    assert (items[~counted] == 0).all()
    assert close(op(**inputs, backend=backend, reduction="sum"), items.sum())
    assert close(op(**inputs, backend=backend), items.sum() / max(counted.sum().item(), 1))


@every_op
@given(st.data())
def test_masked_items_equal_absent_items(op: Op, backend: str, data: st.DataObject) -> None:
    """Masked keys, queries and tokens at the end can be cut off without changing the loss."""
    inputs = data.draw(calls(op, backend))
    for name, masked in op.masks.items():
        dim = 2 if not op.per_item else inputs[masked[0]].dim() - 2
        length = inputs[masked[0]].shape[dim]
        keep = data.draw(st.integers(1, length))
        along = [*masked, *(extra for extra in ("topk_indices", "labels") if extra in inputs)]
        masks = op.some_masked(inputs) | {k: x for k, x in inputs.items() if k in op.masks}
        mask = masks[name].clone()
        mask[..., keep:] = False
        if not op.per_item and op.options:  # causal: the offset S - L must stay
            continue
        whole = op(**{**inputs, name: mask}, backend=backend)
        cut = {x: inputs[x].narrow(dim, 0, keep) for x in along}
        short = op(**{**inputs, **cut, name: mask[..., :keep]}, backend=backend)
        assert close(short, whole)


@every_op
@given(st.data())
def test_masked_items_are_ignored(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = data.draw(calls(op, backend))
    masks = op.some_masked(inputs)
    poison = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    clean = evaluate(op, {**inputs, **masks}, op.learned, backend=backend)
    poisoned = op.overwrite_masked({**inputs, **masks}, masks, poison)
    assert_same(evaluate(op, poisoned, op.learned, backend=backend), clean)


# -- linear_mse ------------------------------------------------------------------------------------------------


@given(st.data(), st.floats(0.1, 10))
def test_linear_mse_is_homogeneous(backend: str, data: st.DataObject, factor: float) -> None:
    inputs = data.draw(calls(LINEAR_MSE, backend))
    inputs = cast(inputs, torch.float64)
    scaled = {name: factor * x if name in ("student", "teacher", "bias") else x for name, x in inputs.items()}
    before, after = LINEAR_MSE(**inputs, backend=backend), LINEAR_MSE(**scaled, backend=backend)
    assert after.item() == pytest.approx(factor**2 * before.item(), rel=1e-12)


@pytest.mark.parametrize("op", [op for op in ATTENTION_OPS if op.name == "attention_mse"], ids=str)
@given(st.data(), st.floats(0.1, 10))
def test_attention_mse_is_homogeneous_and_takes_scale_from_either_factor(
    op: Op, backend: str, data: st.DataObject, factor: float
) -> None:
    inputs = data.draw(calls(op, backend))
    inputs = cast(inputs, torch.float64)
    before = op(**inputs, backend=backend)
    queries = {name: factor * x if name.endswith("query") else x for name, x in inputs.items()}
    expected = pytest.approx(factor**2 * before.item(), rel=1e-10, abs=1e-300)
    assert op(**queries, backend=backend).item() == expected
    scales = {"student_scale": factor * 6**-0.5, "teacher_scale": factor * 10**-0.5}
    assert op(**inputs, **scales, backend=backend).item() == expected
