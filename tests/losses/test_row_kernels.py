"""Tests the row kernels' logit scales, mixtures of the two KL divergences and reverse KL over listed classes against
float64 textbook formulas, in Triton's interpreter. test_csrc.py tests those of csrc."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _oracle import Outcome, assert_accurate, errors
from _textbook import listed_reverse_kl, mixture, outcome, shaped
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs the kernels")

from fastdistill.kernels import logits, topk

from fastdistill.ops._rows import RowOptions
from fastdistill.ops._topk import kernel_list

# beta, w_t and w_s: JSD, skewed KL, skewed reverse KL, and one that is neither
MIXTURES = {
    "jsd": (0.3, 0.3, 0.7), "skewed": (0.1, 1.0, 0.0), "skewed reverse": (0.9, 0.0, 1.0), "mixture": (0.4, 0.7, 0.9),
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CLASSES = (301, 8300)  # held in registers, and streamed
WEIGHT = torch.tensor([0.5, 1.0, 2.0])
EVERYTHING = {"scale": 0.6, "softcap": 2.5, "alpha": 0.7, "labels": torch.tensor([0, 299, 7])}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams rows of 8300 classes in several blocks."""
    monkeypatch.setattr(logits, "BLOCK", 4096)
    monkeypatch.setattr(topk, "BLOCK", 2048)


def options_of(kind: str, classes: int, *, weights: tuple[float, ...] = (0.5, 0.5, 0.5), **given: Any) -> RowOptions:
    alpha = given.get("alpha", 1.0)
    return RowOptions(
        kind, given.get("tail", ""), classes, given.get("temperature", 1.0), *weights, alpha, 1 - alpha,
        given.get("softcap"), given.get("teacher_softcap"), given.get("scale", 1.0), given.get("teacher_scale", 1.0),
        "triton",
    )  # fmt: skip


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(found: Outcome, truth: Outcome, usual: Outcome, dtype: torch.dtype) -> None:
    """The usual gradient is rounded to the logits' dtype, as the kernel's is."""
    assert_accurate(found, truth, {**usual, "student_logits": usual["student_logits"].to(dtype)})


def run_mixture(
    student: Tensor, teacher: Tensor, weights: tuple[float, float, float], **given: Any
) -> tuple[Outcome, Outcome, Outcome]:
    dtype, bias = wide(student.dtype), given.get("bias")
    loss, gradient = student.new_empty(3, dtype=dtype), torch.full_like(student, float("nan"))
    logits.rows(
        student, (teacher,), given.get("labels"), None,
        options_of("jsd", student.shape[-1], weights=weights, **given), loss=loss, gradient=gradient,
        weight=WEIGHT.to(dtype), student_bias=bias, teacher_bias=bias,
    )  # fmt: skip

    def textbook(dtype: torch.dtype) -> Outcome:
        z = teacher.to(dtype).clamp(min=-1e4) + (0 if bias is None else bias.to(dtype))
        z = shaped(z, given.get("teacher_scale", 1.0), given.get("teacher_softcap"))
        temperature = given.get("temperature", 1.0)
        return outcome(lambda x: mixture(x, z, weights, temperature), student, WEIGHT, dtype, **given)

    return {"value": loss, "student_logits": gradient}, textbook(torch.float64), textbook(dtype)


def pair(classes: int, dtype: torch.dtype = torch.float32, distance: float = 1.4) -> tuple[Tensor, Tensor]:
    teacher = 2 * torch.randn(3, classes)
    return (teacher + distance * torch.randn(3, classes)).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_with_scales(name: str, classes: int) -> None:
    for dtype in DTYPES:
        given: dict[str, Any] = {"scale": 1.7, "teacher_scale": 0.6, "temperature": 2.0}
        compare(*run_mixture(*pair(classes, dtype), MIXTURES[name], **given), dtype)
        given = EVERYTHING | {
            "teacher_scale": 1.5, "teacher_softcap": 3.0, "temperature": 2.0,
            "bias": torch.randn(classes, dtype=wide(dtype)),
        }  # fmt: skip
        compare(*run_mixture(*pair(classes, dtype), MIXTURES[name], **given), dtype)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_impossible_classes(name: str, classes: int) -> None:
    student, teacher = pair(classes)
    student[:, ::3] = float("-inf")
    teacher[:, ::2] = float("-inf")
    found, *others = run_mixture(student, teacher, MIXTURES[name], scale=0.5)
    assert_accurate(found, *others)
    assert (found["student_logits"][:, ::3] == 0).all()


@pytest.mark.parametrize("weights", [(1e-6, 1.0, 0.0), (1 - 1e-6, 0.0, 1.0)], ids=["skewed", "skewed reverse"])
def test_a_skew_that_is_almost_zero(weights: tuple[float, float, float]) -> None:
    """log(m / p) is about the logarithm of the skew where one side is nearly 0: 1 + (m - p) / p would round it away."""
    student, teacher = pair(301)
    student[:, :100] -= 40
    teacher[:, 200:] -= 40
    found, truth, _ = run_mixture(student, teacher, weights)
    assert errors(found, truth)["value"] < 1e-6
    assert errors(found, truth)["student_logits"] < 3e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_near_the_teacher_keep_their_digits(name: str) -> None:
    for classes in CLASSES:
        found, truth, _ = run_mixture(*pair(classes, distance=1e-3), MIXTURES[name])
        assert errors(found, truth)["value"] < 1e-3  # the textbook formula is off by a tenth and more
        assert errors(found, truth)["student_logits"] < 5e-4
        same, _, _ = run_mixture(*[pair(classes)[0]] * 2, MIXTURES[name])
        assert (same["value"].abs() < 1e-7).all()
        assert (same["student_logits"].abs() < 1e-7).all()


@pytest.mark.parametrize("kind", ["soft_cross_entropy", "kl_div", "reverse_kl", "tvd"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_scaled_logits_equal_logits_that_were_scaled_before(kind: str, softcap: float | None) -> None:
    """A scale of 2 is exact in every dtype, so only the place where the gradient is scaled differs."""
    for classes in CLASSES:
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            student, teacher = pair(classes, dtype)
            for scale, factor in ((2.0, 1.0), (1.0, 2.0)):
                loss, gradient = torch.empty(3), torch.empty_like(student)
                options = options_of(kind, classes, scale=scale, teacher_scale=scale, softcap=softcap, alpha=0.5)
                logits.rows(
                    factor * student, (factor * teacher,), torch.tensor([0, 5, 300]), None, options, loss=loss,
                    gradient=gradient, weight=WEIGHT * factor,
                )  # fmt: skip
                results.append({"value": loss, "gradient": gradient})
            found = errors(*results)
            assert found["value"] < 1e-6
            assert found["gradient"] < (2e-6 if dtype == torch.float32 else 0.01)


# -- Reverse KL over listed classes ----------------------------------------------------------------------------


def run_listed(
    student: Tensor, logprobs: Tensor, indices: Tensor, tail: str, **given: Any
) -> tuple[Outcome, Outcome, Outcome]:
    dtype = wide(student.dtype)
    options = options_of("reverse_kl", student.shape[-1], tail=tail, **given)
    loss, gradient = student.new_empty(3, dtype=dtype), torch.full_like(student, float("nan"))
    topk.rows(
        student, kernel_list(options, logprobs, indices, None), given.get("labels"), None, options,
        loss=loss, gradient=gradient, weight=WEIGHT.to(dtype), student_bias=given.get("bias"),
    )  # fmt: skip

    def textbook(dtype: torch.dtype) -> Outcome:
        def of(z: Tensor) -> Tensor:
            return listed_reverse_kl(z, logprobs.to(dtype), indices, tail, given.get("temperature", 1.0))

        return outcome(of, student, WEIGHT, dtype, **given)

    return {"value": loss, "student_logits": gradient}, textbook(torch.float64), textbook(dtype)


def a_list(
    classes: int, k: int, dtype: torch.dtype = torch.float32, distance: float = 1.4
) -> tuple[Tensor, Tensor, Tensor]:
    teacher = 2 * torch.randn(3, classes, dtype=torch.float64)
    logprobs, indices = teacher.log_softmax(-1).topk(k)
    order = torch.randperm(k)
    student = (teacher + distance * torch.randn(3, classes)).to(dtype)
    return student, logprobs.to(wide(dtype))[:, order], indices[:, order]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_reverse_kl_over_a_list(tail: str, classes: int) -> None:
    temperature = 2.0 if tail == "renormalize" else 1.0
    for dtype in DTYPES:
        found, *others = run_listed(*a_list(classes, 20, dtype), tail, temperature=temperature)
        compare(found, *others, dtype)
        bias = torch.randn(classes, dtype=wide(dtype))
        given = EVERYTHING | {"temperature": temperature, "bias": bias}
        compare(*run_listed(*a_list(classes, 20, dtype), tail, **given), dtype)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_entries_without_probability_are_not_listed(tail: str) -> None:
    """Short lists are padded with class 0 and log-probability -inf."""
    for classes in CLASSES:
        student, logprobs, indices = a_list(classes, 12)
        logprobs[1, 4:], indices[1, 4:] = float("-inf"), 0
        found, *others = run_listed(student, logprobs, indices, tail)
        assert_accurate(found, *others)
        if tail == "renormalize":
            listed = torch.zeros(3, classes, dtype=torch.bool).scatter(1, indices, True)
            listed[1] = False
            listed[1, indices[1, :4]] = True
            assert (found["student_logits"][~listed] == 0).all()


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_lists_of_any_length_and_impossible_classes(tail: str) -> None:
    for k in (1, 2, 300, 1100):  # the last is fetched in two pieces
        student, logprobs, indices = a_list(1201, k)
        student[:, ::5] = float("-inf")
        student.scatter_(1, indices[:, :1], 1.0)
        if tail == "renormalize" and k == 1:
            found, _, _ = run_listed(student, logprobs, indices, tail)
            assert all((x == 0).all() for x in found.values())
        else:
            assert_accurate(*run_listed(student, logprobs, indices, tail))


def test_a_list_of_all_classes_has_no_bucket() -> None:
    assert_accurate(*run_listed(*a_list(40, 40), "renormalize"))
    student, logprobs, indices = a_list(40, 40)
    options = options_of("reverse_kl", 40, tail="bucket")
    loss, gradient = torch.empty(3), torch.empty_like(student)
    topk.rows(student, kernel_list(options, logprobs, indices, None), None, None, options,
              loss=loss, gradient=gradient)  # fmt: skip
    found, truth, usual = run_listed(student, logprobs, indices, "renormalize")
    assert errors({"value": loss}, {"value": truth["value"]})["value"] < 1e-6
    assert errors({"x": gradient * WEIGHT[:, None]}, {"x": truth["student_logits"]})["x"] < 1e-6
    assert_accurate(found, truth, usual)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_reverse_kl_near_the_teacher_keeps_its_digits(tail: str) -> None:
    for classes in CLASSES:
        found, truth, _ = run_listed(*a_list(classes, 20, distance=1e-3), tail)
        assert errors(found, truth)["value"] < 1e-3
        assert errors(found, truth)["student_logits"] < 5e-4


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_a_bucket_that_a_student_hardly_uses_keeps_its_digits(tail: str) -> None:
    student, logprobs, indices = a_list(301, 20, torch.float64)
    student.scatter_add_(1, indices, torch.full_like(logprobs, 45.0))  # the bucket's mass is about 1e-19
    assert_accurate(*run_listed(student, logprobs, indices, tail))


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_rows_that_do_not_count_are_not_read(tail: str) -> None:
    """Rows of weight 0 are passed as not counted: whatever they hold, loss and gradient are exactly 0."""
    student, logprobs, indices = a_list(301, 5)
    student[1], logprobs[1], indices[1] = float("nan"), float("nan"), -7
    counted, weight = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 1.0])
    options, loss, gradient = options_of("reverse_kl", 301, tail=tail), torch.empty(3), torch.empty_like(student)
    target = kernel_list(options, logprobs, indices, counted)
    topk.rows(student, target, None, counted, options, loss=loss, gradient=gradient, weight=weight)
    assert loss[1] == 0
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()
    teacher = torch.full_like(student, float("nan"))
    teacher[[0, 2]] = torch.randn(2, 301)
    for weights in MIXTURES.values():
        loss, gradient = torch.empty(3), torch.empty_like(student)
        logits.rows(
            student, (teacher,), None, counted, options_of("jsd", 301, weights=weights), loss=loss, gradient=gradient,
            weight=weight,
        )  # fmt: skip
        assert loss[1] == 0
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()
