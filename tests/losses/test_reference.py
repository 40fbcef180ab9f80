"""Tests the oracle against finite differences, values worked by hand, and formulas of other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from _cases import ATTENTION_OPS, LINEAR_LOGITS_OPS, LOGITS_OPS, OPS, Op
from _oracle import assert_same, evaluate, in_float64
from torch import Tensor
from torch.nn import functional as F

from fastdistill import reference

every_op = pytest.mark.parametrize("op", OPS, ids=str)
LOG2 = math.log(2)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- gradients against finite differences ----------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradcheck(op: Op, masked: bool) -> None:
    inputs = in_float64(op.make())
    masks = op.some_masked(inputs) if masked else {}
    function = getattr(reference, op.name)
    learned = {name: inputs.pop(name).requires_grad_() for name in op.learned}

    for reduction in op.reductions:

        def call(*values: Tensor, reduction: str = reduction) -> Tensor:
            named = dict(zip(learned, values, strict=True))
            return function(**named, **inputs, **masks, **op.options, reduction=reduction)

        assert torch.autograd.gradcheck(call, tuple(learned.values()), fast_mode=True)


@every_op
def test_computed_in_float32_or_wider(op: Op) -> None:
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in op.make().items()}
        assert getattr(reference, op.name)(**inputs, **op.options).dtype == wide


# -- hidden states ---------------------------------------------------------------------------------------------


def test_linear_mse_by_hand() -> None:
    # Projected: (1, 2, 3 + 1) and (0, 1, 1 + 1). Residuals (1, 2, 4) and (0, 0, 2). Losses 21/3 and 4/3.
    inputs = {
        "student": tensor([1, 2], [0, 1]),
        "weight": tensor([1, 0], [0, 1], [1, 1]),
        "teacher": tensor([0, 0, 0], [0, 1, 0]),
        "bias": tensor(0, 0, 1),
    }
    learned = ("student", "weight", "bias")
    assert reference.linear_mse(**inputs, reduction="none").tolist() == pytest.approx([7, 4 / 3])
    assert reference.linear_mse(**inputs, reduction="sum").item() == pytest.approx(25 / 3)
    # d/d residual = 2/3 residual / 2 tokens = (1/3, 2/3, 4/3) and (0, 0, 2/3).
    outcome = evaluate(reference.linear_mse, inputs, learned)
    assert outcome["value"].item() == pytest.approx(25 / 6)
    assert torch.allclose(outcome["bias"], tensor(1, 2, 6) / 3)
    assert torch.allclose(outcome["student"], tensor([5, 6], [2, 2]) / 3)
    assert torch.allclose(outcome["weight"], tensor([1, 2], [2, 4], [4, 10]) / 3)
    # If the second token is masked it is ignored, even if it is NaN.
    inputs["student"][1] = math.nan
    masked = evaluate(reference.linear_mse, inputs, learned, mask=torch.tensor([True, False]))
    assert masked["value"].item() == pytest.approx(7)
    assert torch.allclose(masked["student"], tensor([10, 12], [0, 0]) / 3)
    assert torch.allclose(masked["weight"], tensor([2, 4], [4, 8], [8, 16]) / 3)


def test_linear_mse_is_mse_loss_over_a_linear_layer() -> None:
    layer = torch.nn.Linear(6, 10).double()
    student, teacher = torch.randn(2, 4, 6).double(), torch.randn(2, 4, 10).double()
    expected = F.mse_loss(layer(student), teacher)
    assert torch.allclose(reference.linear_mse(student, layer.weight, teacher, layer.bias), expected)
    assert torch.allclose(reference.linear_mse(student, None, 2 * student), student.square().mean())


# -- attention -------------------------------------------------------------------------------------------------

# One head of width 1. Student scores ((3, 4), (6, 8)), teacher ((1, 2), (1, 2)): squared differences (4, 4), (25, 36).
BY_HAND = {
    "student_query": tensor(1, 2).view(1, 1, 2, 1),
    "student_key": tensor(3, 4).view(1, 1, 2, 1),
    "teacher_query": tensor(1, 1).view(1, 1, 2, 1),
    "teacher_key": tensor(1, 2).view(1, 1, 2, 1),
}
FIRST = torch.tensor([[True, False]])
PAIR = torch.tensor([[False, True], [True, False]])


@pytest.mark.parametrize(
    "masks,total,count",
    [
        ({}, 69, 4),
        ({"is_causal": True}, 65, 3),
        ({"key_mask": FIRST}, 29, 2),
        ({"query_mask": FIRST}, 8, 2),
        ({"query_mask": FIRST, "key_mask": FIRST}, 4, 1),
        ({"attn_mask": PAIR}, 29, 2),
        ({"attn_mask": PAIR, "is_causal": True}, 25, 1),
        ({"student_scale": 0.5}, 0.25 + 0 + 4 + 4, 4),  # ((1.5, 2), (3, 4)) - ((1, 2), (1, 2))
        ({"teacher_scale": 3.0}, 0 + 4 + 9 + 4, 4),  # ((3, 4), (6, 8)) - ((3, 6), (3, 6))
    ],
    ids=str,
)
def test_attention_mse_by_hand(masks: dict[str, Any], total: float, count: int) -> None:
    assert reference.attention_mse(**BY_HAND, **masks, reduction="sum").item() == pytest.approx(total)
    assert reference.attention_mse(**BY_HAND, **masks).item() == pytest.approx(total / count)
    assert reference.attention_mse(**BY_HAND, **masks, num_items=5).item() == pytest.approx(total / 5)


def test_attention_mse_gradient_by_hand() -> None:
    # d/d score = 2 x ((2, 2), (5, 6)); query gradient = that @ (3, 4), key gradient = (1, 2) @ that.
    outcome = evaluate(reference.attention_mse, BY_HAND, ("student_query", "student_key"), reduction="sum")
    assert outcome["student_query"].flatten().tolist() == [28, 78]
    assert outcome["student_key"].flatten().tolist() == [24, 28]


def test_attention_scale_defaults_to_the_head_width_of_its_side() -> None:
    student, teacher = torch.ones(1, 1, 1, 4).double(), torch.ones(1, 1, 1, 9).double()
    assert reference.attention_mse(student, student, teacher, teacher).item() == pytest.approx((4 / 2 - 9 / 3) ** 2)


def test_attention_kl_by_hand() -> None:
    # Student: (1/2, 1/2). Teacher: (3/4, 1/4).
    zero, query = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    key = tensor(math.log(3), 0).view(1, 1, 2, 1)
    student_key = zero.expand(1, 1, 2, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reference.attention_kl(query, student_key, query, key).item() == pytest.approx(expected)
    # With one key left both sides give it probability 1; with none the row does not count.
    assert reference.attention_kl(query, student_key, query, key, key_mask=FIRST).item() == 0
    assert reference.attention_kl(query, student_key, query, key, key_mask=FIRST & False).item() == 0
    # d/d score = p_s - p_t = (-1/4, 1/4).
    outcome = evaluate(
        reference.attention_kl,
        {"student_query": query, "student_key": student_key, "teacher_query": query, "teacher_key": key},
        ("student_query", "student_key"),
    )
    assert outcome["student_key"].flatten().tolist() == pytest.approx([-0.25, 0.25])
    assert outcome["student_query"].item() == 0


def test_causal_rows_without_a_key_do_not_count() -> None:
    """Query i sees keys j <= i + S - L: with 3 queries on 2 keys the first sees none, the last sees both."""
    inputs = {name: torch.randn(1, 1, 3 if "query" in name else 2, 4).double() for name in BY_HAND}
    later = {name: x[:, :, 1:] if "query" in name else x for name, x in inputs.items()}
    for function in (reference.attention_mse, reference.attention_kl):
        assert torch.allclose(function(**inputs, is_causal=True), function(**later, is_causal=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_kl_is_kl_div_of_scaled_dot_product_attention(is_causal: bool) -> None:
    """Torch's own attention with the identity as values returns its probabilities, for grouped queries too."""

    def probabilities(query: Tensor, key: Tensor) -> Tensor:
        values = torch.eye(7, dtype=query.dtype).expand(*key.shape[:2], 7, 7)
        return F.scaled_dot_product_attention(query, key, values, is_causal=is_causal, enable_gqa=True)

    student_query, student_key = torch.randn(2, 4, 7, 6).double(), torch.randn(2, 2, 7, 6).double()
    teacher_query, teacher_key = torch.randn(2, 4, 7, 10).double(), torch.randn(2, 1, 7, 10).double()
    student, teacher = probabilities(student_query, student_key), probabilities(teacher_query, teacher_key)
    expected = F.kl_div(student.clamp(min=1e-300).log(), teacher, reduction="sum") / (2 * 4 * 7)
    found = reference.attention_kl(student_query, student_key, teacher_query, teacher_key, is_causal=is_causal)
    assert torch.allclose(found, expected)


def test_attention_mse_of_hidden_states_is_token_similarity() -> None:
    student, teacher = torch.randn(2, 1, 5, 3).double(), torch.randn(2, 1, 5, 8).double()
    expected = F.mse_loss(student @ student.mT, teacher @ teacher.mT)
    found = reference.attention_mse(student, student, teacher, teacher, student_scale=1.0, teacher_scale=1.0)
    assert torch.allclose(found, expected)


# -- logits ----------------------------------------------------------------------------------------------------

# Student (1/2, 1/2), teacher (3/4, 1/4): mixture at beta 1/2 (5/8, 3/8), at beta 1/4 (9/16, 7/16).
UNIFORM, SKEWED = tensor([5, 5]), tensor([math.log(3), 0])
FORWARD_KL = 0.75 * math.log(1.5) - 0.25 * LOG2
REVERSE_KL = 0.5 * math.log(2 / 3) + 0.5 * LOG2


def jensen_shannon(beta: float, mixture: tuple[float, float]) -> float:
    teacher = 0.75 * math.log(0.75 / mixture[0]) + 0.25 * math.log(0.25 / mixture[1])
    student = 0.5 * math.log(0.5 / mixture[0]) + 0.5 * math.log(0.5 / mixture[1])
    return beta * teacher + (1 - beta) * student


@pytest.mark.parametrize(
    "function,options,expected",
    [
        (reference.soft_cross_entropy, {}, LOG2),
        (reference.kl_div, {}, FORWARD_KL),
        (reference.kl_div, {"reverse": True}, REVERSE_KL),
        (reference.kl_div, {"skew": 0.5}, 0.75 * math.log(0.75 / (5 / 8)) + 0.25 * math.log(0.25 / (3 / 8))),
        (
            reference.kl_div,
            {"skew": 0.75, "reverse": True},
            0.5 * math.log(0.5 / (9 / 16)) + 0.5 * math.log(0.5 / (7 / 16)),
        ),
        (reference.jsd, {}, jensen_shannon(0.5, (5 / 8, 3 / 8))),
        (reference.jsd, {"beta": 0.25}, jensen_shannon(0.25, (9 / 16, 7 / 16))),
        (reference.jsd, {"beta": 0}, FORWARD_KL),
        (reference.jsd, {"beta": 1}, REVERSE_KL),
        (reference.tvd, {}, 0.25),
    ],
    ids=["soft_ce", "kl", "reverse", "skewed", "skewed-reverse", "jsd", "jsd-0.25", "jsd-0", "jsd-1", "tvd"],
)
def test_divergences_by_hand(function: Callable[..., Tensor], options: dict[str, Any], expected: float) -> None:
    def value(student: Tensor, teacher: Tensor, **more: Any) -> float:
        return function(student, teacher, **options, **more).item()

    assert value(UNIFORM, SKEWED) == pytest.approx(expected)
    assert value(UNIFORM + 100, SKEWED - 100) == pytest.approx(expected)
    assert value(2 * UNIFORM, 2 * SKEWED, temperature=2.0) == pytest.approx(expected)
    assert value(2 * UNIFORM, 2 * SKEWED, temperature=2.0, t_squared=True) == pytest.approx(4 * expected)
    # The student's hard loss is log 2 for every label. It uses temperature 1 and no factor of temperature^2.
    labels = torch.tensor([1])
    assert value(UNIFORM, SKEWED, labels=labels, alpha=0.25) == pytest.approx(0.25 * expected + 0.75 * LOG2)
    hard = F.cross_entropy(SKEWED, labels).item()
    assert value(SKEWED, SKEWED, labels=labels, alpha=0.0, temperature=3.0, t_squared=True) == pytest.approx(hard)
    assert value(UNIFORM, SKEWED, labels=labels) == pytest.approx(expected)
    assert value(UNIFORM, SKEWED, labels=torch.tensor([-100]), alpha=0.25) == 0
    assert value(UNIFORM, SKEWED, labels=torch.tensor([7]), alpha=0.25, ignore_index=7) == 0
    # Padded classes are ignored, and -inf means probability 0.
    padded = torch.cat([UNIFORM, tensor([9, 9, 9])], -1), torch.cat([SKEWED, tensor([3])], -1)
    assert value(*padded, vocab_size=2) == pytest.approx(expected)
    never = tensor([-math.inf])
    assert value(torch.cat([UNIFORM, never], -1), torch.cat([SKEWED, never], -1)) == pytest.approx(expected)


def test_softcap_by_hand() -> None:
    # 2 tanh(z / 2) undoes z = 2 atanh(x / 2).
    capped = 2 * torch.atanh(SKEWED / 2)
    assert reference.kl_div(UNIFORM, capped, teacher_softcap=2.0).item() == pytest.approx(FORWARD_KL)
    assert reference.kl_div(capped, UNIFORM, student_softcap=2.0, reverse=True).item() == pytest.approx(FORWARD_KL)
    labels = torch.tensor([0])  # the hard loss is capped too
    found = reference.kl_div(capped, UNIFORM, student_softcap=2.0, labels=labels, alpha=0.0)
    assert found.item() == pytest.approx(-math.log(0.75))


def test_impossible_classes_by_hand() -> None:
    never = -math.inf
    one_sided = tensor([0, never])  # probabilities (1, 0)
    assert reference.kl_div(one_sided, SKEWED).item() == math.inf
    assert reference.soft_cross_entropy(one_sided, SKEWED).item() == math.inf
    assert reference.kl_div(one_sided, SKEWED, reverse=True).item() == pytest.approx(math.log(4 / 3))
    assert reference.kl_div(SKEWED, one_sided).item() == pytest.approx(math.log(4 / 3))
    assert reference.tvd(one_sided, SKEWED).item() == pytest.approx(0.25)
    # m = (7/8, 1/8): half of log(8/7) and half of 3/4 log(6/7) + 1/4 log 2.
    expected = 0.5 * math.log(8 / 7) + 0.5 * (0.75 * math.log(6 / 7) + 0.25 * LOG2)
    assert reference.jsd(one_sided, SKEWED).item() == pytest.approx(expected)
    assert reference.jsd(one_sided, one_sided.flip(-1)).item() == pytest.approx(LOG2)
    assert reference.tvd(one_sided, one_sided.flip(-1)).item() == 1


def test_topk_by_hand() -> None:
    # Teacher: class 2 has 0.6, class 0 has 0.2, 0.2 elsewhere. Student: 1/4 each.
    student, logprobs, indices = torch.zeros(1, 4).double(), tensor([0.6, 0.2]).log(), torch.tensor([[2, 0]])
    assert reference.topk_soft_cross_entropy(student, logprobs, indices).item() == pytest.approx(math.log(4))
    bucket = reference.topk_soft_cross_entropy(student, logprobs, indices, tail="bucket")
    assert bucket.item() == pytest.approx(0.8 * math.log(4) + 0.2 * LOG2)
    # Student (1/2, 1/4, 1/8, 1/8); teacher renormalised (1/4, 3/4) on classes 0 and 2.
    student = tensor([0.5, 0.25, 0.125, 0.125]).log()
    expected = 0.25 * LOG2 + 0.75 * 3 * LOG2
    assert reference.topk_soft_cross_entropy(student, logprobs, indices).item() == pytest.approx(expected)
    # At temperature 1/2 the teacher's odds are squared: (0.1, 0.9); the student's too: (32, 8, 2, 2) / 44.
    hot = reference.topk_soft_cross_entropy(student, logprobs, indices, temperature=0.5)
    assert hot.item() == pytest.approx(-0.1 * math.log(32 / 44) - 0.9 * math.log(2 / 44))
    # Rows with fewer classes are padded with -inf.
    padded = reference.topk_soft_cross_entropy(student, tensor([0.6, 0]).log(), torch.tensor([[2, 1]]))
    assert padded.item() == pytest.approx(3 * LOG2)


@pytest.mark.parametrize("tail,k", [("renormalize", 9), ("bucket", 8)])
def test_topk_of_every_class_is_soft_cross_entropy(tail: str, k: int) -> None:
    """With 8 of 9 classes listed, the bucket is the ninth."""
    student, teacher = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    logprobs, indices = teacher.log_softmax(-1).topk(k)
    found = reference.topk_soft_cross_entropy(student, logprobs, indices, tail=tail)
    assert torch.allclose(found, F.cross_entropy(student, teacher.softmax(-1)))


# -- other libraries' formulas ---------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(8, 50).double(), 3 * torch.randn(8, 50).double()


def test_against_torch(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    student_logp, teacher_logp = student.log_softmax(-1), teacher.log_softmax(-1)
    found = reference.soft_cross_entropy(student, teacher)
    assert torch.allclose(found, F.cross_entropy(student, teacher.softmax(-1)))
    batchmean = F.kl_div(student_logp, teacher_logp, reduction="batchmean", log_target=True)
    assert torch.allclose(reference.kl_div(student, teacher), batchmean)
    reverse = F.kl_div(teacher_logp, student_logp, reduction="batchmean", log_target=True)
    assert torch.allclose(reference.kl_div(student, teacher, reverse=True), reverse)


def test_against_scipy(pair: tuple[Tensor, Tensor]) -> None:
    special, distance = pytest.importorskip("scipy.special"), pytest.importorskip("scipy.spatial.distance")
    student, teacher = pair
    p_s, p_t = special.softmax(student.numpy(), -1), special.softmax(teacher.numpy(), -1)

    def rows(function: Callable[..., Tensor], **options: Any) -> np.ndarray:
        return function(student, teacher, reduction="none", **options).numpy()

    np.testing.assert_allclose(rows(reference.kl_div), special.rel_entr(p_t, p_s).sum(-1))
    np.testing.assert_allclose(rows(reference.kl_div, reverse=True), special.rel_entr(p_s, p_t).sum(-1))
    np.testing.assert_allclose(rows(reference.jsd), distance.jensenshannon(p_t, p_s, axis=-1) ** 2)
    np.testing.assert_allclose(
        rows(reference.tvd), [0.5 * distance.cityblock(a, b) for a, b in zip(p_t, p_s, strict=True)]
    )
    m = 0.1 * p_t + 0.9 * p_s
    expected = 0.1 * special.rel_entr(p_t, m).sum(-1) + 0.9 * special.rel_entr(p_s, m).sum(-1)
    np.testing.assert_allclose(rows(reference.jsd, beta=0.1), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_closed_form_gradients(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    """Gradients d/dz_s equal the published closed forms, which need only probabilities."""
    student, teacher = pair
    p_s, p_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    mixture = (p_s + p_t) / 2

    def through_softmax(d_p: Tensor) -> Tensor:  # the gradient with respect to p_s, taken to the logits
        return p_s * (d_p - (p_s * d_p).sum(-1, keepdim=True)) / temperature

    expected = {
        reference.soft_cross_entropy: (p_s - p_t) / temperature,
        reference.kl_div: (p_s - p_t) / temperature,
        reference.jsd: through_softmax(0.5 * (p_s / mixture).log()),
        reference.tvd: through_softmax(0.5 * (p_s - p_t).sign()),
    }
    for function, gradient in expected.items():
        inputs = {"student_logits": student, "teacher_logits": teacher}
        found = evaluate(function, inputs, ["student_logits"], reduction="sum", temperature=temperature)
        assert torch.allclose(found["student_logits"], gradient, atol=1e-12)


@pytest.mark.parametrize("op,logits_op", [*zip(LINEAR_LOGITS_OPS, LOGITS_OPS, strict=True)], ids=str)
def test_linear_is_the_logits_loss_after_a_linear_layer(op: Op, logits_op: Op) -> None:
    inputs = in_float64(op.make())
    logits = {
        f"{side}_logits": F.linear(inputs[side], inputs[f"{side}_weight"], inputs[f"{side}_bias"])
        for side in ("student", "teacher")
    }
    labels = {"labels": inputs["labels"]} if "labels" in inputs else {}
    found = getattr(reference, op.name)(**inputs, **op.options)
    assert torch.allclose(found, getattr(reference, logits_op.name)(**logits, **labels, **logits_op.options))


# -- the textbook formulas of the other tests, which set the bounds --------------------------------------------


@every_op
def test_textbook_formulas_agree_in_float64(op: Op) -> None:
    inputs = in_float64(op.make())
    inputs |= op.some_masked(inputs)
    assert_same(evaluate(op.textbook, inputs, op.learned), op.truth(inputs), within=1e-12)


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
def test_textbook_attention_agrees_with_a_dense_mask(op: Op) -> None:
    inputs = {**in_float64(op.make()), "attn_mask": torch.rand(2, 4, 7, 9) > 0.3}
    assert_same(evaluate(op.textbook, inputs, op.learned), op.truth(inputs), within=1e-12)
