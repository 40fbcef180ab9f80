"""Invariances that need no oracle, over random shapes, masks, dtypes and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import ATTENTION_OPS, LINEAR_MSE, LOGITS_OPS, OPS, PER_ITEM_OPS, TOPK_OPS, Op
from _oracle import BACKENDS, assert_same, cast, error, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastdistill

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
DIVERGENCES = [op for op in LOGITS_OPS if "vocab_size" not in op.options]
EPS = torch.finfo(torch.float32).eps


@st.composite
def calls(draw: Callable[[Any], Any], op: Op) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of random sizes, masked or not; and keywords."""
    torch.manual_seed(draw(seeds))
    if op.per_item:
        rows = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        inputs = op.make(rows)
    else:
        student_kv, teacher_kv = draw(st.sampled_from([(1, 1), (2, 4), (4, 2), (4, 4)]))
        batch, length, keys = (draw(st.integers(1, n)) for n in (3, 20, 20))
        inputs = op.make(batch, 4, length, keys, student_kv=student_kv, teacher_kv=teacher_kv)
    dtype = draw(dtypes)
    inputs = cast(inputs, dtype)
    if draw(st.booleans()):
        inputs |= op.some_masked(inputs)
    taken = [name for name in BACKENDS if name != "cuda" or (op in LOGITS_OPS and dtype != torch.float64)]
    return inputs, {"backend": draw(st.sampled_from(taken))}


every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_divergence = pytest.mark.parametrize("op", DIVERGENCES, ids=str)


def close(a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Equal up to a few roundings of numbers of the size of `scale`."""
    return bool(((a - b).abs() <= 16 * EPS * max(scale, b.abs().max().item())).all())


# -- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in DIVERGENCES if op.name != "soft_cross_entropy"], ids=str)
@given(st.data())
def test_divergences_are_never_negative_and_bounded(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    value = op(**inputs, **keywords, reduction="none")
    assert (value >= 0).all()
    bound = {"tvd": 1.0, "jsd": math.log(2)}.get(op.name, math.inf)
    assert (value <= bound + 4 * EPS).all()


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
@given(st.data())
def test_attention_losses_are_never_negative(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    assert op(**inputs, **keywords) >= 0


@pytest.mark.parametrize("op", [op for op in DIVERGENCES if str(op) in ("jsd", "tvd")], ids=str)
@given(st.data())
def test_jsd_at_a_half_and_tvd_are_symmetric(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    mask = {"mask": inputs["mask"]} if "mask" in inputs else {}
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    there = op(student_logits=student, teacher_logits=teacher, **mask, **keywords, reduction="none")
    back = op(student_logits=teacher, teacher_logits=student, **mask, **keywords, reduction="none")
    assert close(there, back)


@given(st.data())
def test_soft_cross_entropy_minus_entropy_is_kl(data: st.DataObject) -> None:
    op = DIVERGENCES[0]
    inputs, keywords = data.draw(calls(op))
    itself = {**inputs, "student_logits": inputs["teacher_logits"]}
    cross, entropy = (evaluate(op, x, op.learned, **keywords) for x in (inputs, itself))
    kl = evaluate(fastdistill.kl_div, inputs, op.learned, **keywords)
    assert close(cross["value"] - entropy["value"], kl["value"], cross["value"].item())
    assert error(cross["student_logits"], kl["student_logits"]) < 1e-2 if kl["student_logits"].any() else True


@given(st.data())
def test_swapping_the_sides_swaps_the_direction(data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(DIVERGENCES[0]))
    mask = {"mask": inputs["mask"]} if "mask" in inputs else {}
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    there = fastdistill.kl_div(student, teacher, reverse=True, **mask, **keywords)
    assert close(there, fastdistill.kl_div(teacher, student, **mask, **keywords))
    beta = data.draw(st.floats(0.01, 0.99))
    there = fastdistill.jsd(student, teacher, beta=beta, **mask, **keywords)
    assert close(there, fastdistill.jsd(teacher, student, beta=1 - beta, **mask, **keywords))


@pytest.mark.parametrize("op", [*DIVERGENCES, *TOPK_OPS], ids=str)
@given(st.data(), st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(op: Op, data: st.DataObject, constant: float) -> None:
    inputs, keywords = data.draw(calls(op))
    inputs = cast(inputs, torch.float64)  # where adding it costs nothing
    before = evaluate(op, inputs, op.learned, **keywords)
    shifted = {name: x + constant if name.endswith("logits") else x for name, x in inputs.items()}
    after = evaluate(op, shifted, op.learned, **keywords)
    assert all(torch.allclose(after[name], before[name], rtol=1e-9, atol=1e-12) for name in before)


@pytest.mark.parametrize("op", [*DIVERGENCES, *TOPK_OPS], ids=str)
@given(st.data())
def test_gradients_of_a_row_of_logits_add_up_to_nothing(op: Op, data: st.DataObject) -> None:
    """Softmax does not feel a constant, so no gradient points that way."""
    inputs, keywords = data.draw(calls(op))
    gradient = evaluate(op, cast(inputs, torch.float64), op.learned, **keywords)["student_logits"]
    assert gradient.sum(-1).abs().max() < 1e-12


# -- permutations ----------------------------------------------------------------------------------------------


@every_divergence
@given(st.data())
def test_classes_may_be_permuted(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    order = torch.randperm(37)
    permuted = {name: x[..., order] if name.endswith("logits") else x for name, x in inputs.items()}
    before, after = (evaluate(op, x, op.learned, **keywords) for x in (inputs, permuted))
    assert close(after["value"], before["value"])
    assert torch.allclose(after["student_logits"].double(), before["student_logits"][..., order].double(), 1e-2, 1e-6)


@pytest.mark.parametrize("op", [op for op in PER_ITEM_OPS if "labels" not in op.make()], ids=str)
@given(st.data())
def test_tokens_may_be_permuted(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    in_rows = [*op.masks["mask"], *(name for name in ("topk_indices", "mask") if name in inputs)]
    order = torch.randperm(inputs[in_rows[0]].shape[0])
    permuted = inputs | {name: inputs[name][order] for name in in_rows}
    before, after = (op(**x, **keywords, reduction="none") for x in (inputs, permuted))
    assert close(after, before[order])


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
@given(st.data())
def test_heads_and_batches_may_be_permuted(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    for name in ("student_key", "teacher_key"):  # every head its own keys
        inputs[name] = inputs[name].repeat_interleave(4 // inputs[name].shape[1], 1)
    heads, batches = torch.randperm(4), torch.randperm(inputs["student_query"].shape[0])
    permuted = {name: x[batches][:, heads] if x.dim() == 4 else x[batches] for name, x in inputs.items()}
    before, after = (evaluate(op, x, op.learned, **keywords) for x in (inputs, permuted))
    assert close(after["value"], before["value"])
    for name in op.learned:
        expected = before[name][batches][:, heads].double()
        assert torch.allclose(after[name].double(), expected, 2e-2, 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("op", [op for op in ATTENTION_OPS if not op.options], ids=str)
@given(st.data())
def test_keys_and_queries_may_be_permuted(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    orders = {
        "query": torch.randperm(inputs["student_query"].shape[2]),
        "key": torch.randperm(inputs["student_key"].shape[2]),
    }
    permuted = {}
    for name, x in inputs.items():
        order = orders["query" if "query" in name else "key"]
        permuted[name] = x[:, :, order] if x.dim() == 4 else x[:, order]
    assert close(op(**permuted, **keywords), op(**inputs, **keywords))


# -- adding up -------------------------------------------------------------------------------------------------


@every_op
@given(st.data())
def test_a_batch_split_in_two_adds_up(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    batch = next(iter(inputs.values())).shape[0]
    cut = data.draw(st.integers(0, batch))
    split = {name for name in inputs if name.split("_")[-1] not in ("weight", "bias")}
    parts = [
        op(**{name: x[half] if name in split else x for name, x in inputs.items()}, **keywords, reduction="sum")
        for half in (slice(None, cut), slice(cut, None))
    ]
    assert close(sum(parts), op(**inputs, **keywords, reduction="sum"))


@pytest.mark.parametrize("op", PER_ITEM_OPS, ids=str)
@given(st.data())
def test_sum_and_mean_follow_from_the_items(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    items = op(**inputs, **keywords, reduction="none")
    counted = op.items(**{**op.options, **inputs})[1]
    assert (items[~counted] == 0).all()
    assert close(op(**inputs, **keywords, reduction="sum"), items.sum())
    assert close(op(**inputs, **keywords), items.sum() / max(counted.sum().item(), 1))


@every_op
@given(st.data())
def test_masked_items_might_as_well_be_absent(op: Op, data: st.DataObject) -> None:
    """Cutting masked keys, queries and tokens off the end: the same loss, the same gradients elsewhere."""
    inputs, keywords = data.draw(calls(op))
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
        whole = op(**{**inputs, name: mask}, **keywords)
        cut = {x: inputs[x].narrow(dim, 0, keep) for x in along}
        short = op(**{**inputs, **cut, name: mask[..., :keep]}, **keywords)
        assert close(short, whole)


@every_op
@given(st.data())
def test_what_masked_items_hold_changes_no_bit(op: Op, data: st.DataObject) -> None:
    inputs, keywords = data.draw(calls(op))
    masks = op.some_masked(inputs)
    poison = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    clean = evaluate(op, {**inputs, **masks}, op.learned, **keywords)
    poisoned = op.overwrite_masked({**inputs, **masks}, masks, poison)
    assert_same(evaluate(op, poisoned, op.learned, **keywords), clean)


# -- linear_mse ------------------------------------------------------------------------------------------------


@given(st.data(), st.floats(0.1, 10))
def test_linear_mse_is_homogeneous(data: st.DataObject, factor: float) -> None:
    inputs, keywords = data.draw(calls(LINEAR_MSE))
    inputs = cast(inputs, torch.float64)
    scaled = {name: factor * x if name in ("student", "teacher", "bias") else x for name, x in inputs.items()}
    before, after = LINEAR_MSE(**inputs, **keywords), LINEAR_MSE(**scaled, **keywords)
    assert after.item() == pytest.approx(factor**2 * before.item(), rel=1e-12)


@pytest.mark.parametrize("op", [op for op in ATTENTION_OPS if op.name == "attention_mse"], ids=str)
@given(st.data(), st.floats(0.1, 10))
def test_attention_mse_is_homogeneous_and_takes_scale_from_either_factor(
    op: Op, data: st.DataObject, factor: float
) -> None:
    inputs, keywords = data.draw(calls(op))
    inputs = cast(inputs, torch.float64)
    before = op(**inputs, **keywords)
    queries = {name: factor * x if name.endswith("query") else x for name, x in inputs.items()}
    assert op(**queries, **keywords).item() == pytest.approx(factor**2 * before.item(), rel=1e-10, abs=1e-300)
    scales = {"student_scale": factor * 6**-0.5, "teacher_scale": factor * 10**-0.5}
    assert op(**inputs, **scales, **keywords).item() == pytest.approx(factor**2 * before.item(), rel=1e-10, abs=1e-300)
