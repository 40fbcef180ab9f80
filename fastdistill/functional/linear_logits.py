"""Losses over classes from hidden states and the weights of the vocabulary head, without logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _checks as check
from .. import reference
from .._checks import Backend, Reduction, Tail
from ..ops._common import divides, no_autocast
from ..ops._few import are_few, loss_of_few
from ..ops._rows import RowOptions
from ..ops.linear_logits import linear_row_losses
from . import _rows
from ._dispatch import autocast, pick_backend
from ._docs import documented
from ._rows import Keywords

__all__ = [
    "linear_jsd", "linear_kl_div", "linear_soft_cross_entropy", "linear_topk_soft_cross_entropy", "linear_tvd",
]  # fmt: skip

Head = tuple[Tensor, Any, Tensor | None]  # hidden states (*, d), weight (V, d), bias (V)


@documented
def linear_soft_cross_entropy(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes `soft_cross_entropy` of each side's float32 logits `x @ W.T + b` without storing either `(*, V)` tensor.

    Args:
        {heads}
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    student_head, teacher_head = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _against_head("soft_cross_entropy", reference.linear_soft_cross_entropy, student_head, teacher_head, given)


@documented
def linear_kl_div(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    reverse: bool = False, skew: float = 0.0,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes `kl_div` of each side's float32 logits `x @ W.T + b` without storing either `(*, V)` tensor.

    Args:
        {heads}
        reverse: KL(p_s || p_t), which seeks the teacher's modes, in place of KL(p_t || p_s).
        {skew}
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    student_head, teacher_head = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    kind = _rows.kl_kind(reverse, skew)
    return _against_head(kind, reference.linear_kl_div, student_head, teacher_head, given, reverse=reverse, skew=skew)


@documented
def linear_jsd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes `jsd` of each side's float32 logits `x @ W.T + b` without storing either `(*, V)` tensor.

    Args:
        {heads}
        beta: weight of the teacher in the mixture, 0 to 1.
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    student_head, teacher_head = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _against_head(_rows.jsd_kind(beta), reference.linear_jsd, student_head, teacher_head, given, beta=beta)


@documented
def linear_tvd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes `tvd` of each side's float32 logits `x @ W.T + b` without storing either `(*, V)` tensor.

    Args:
        {heads}
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    student_head, teacher_head = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _against_head("tvd", reference.linear_tvd, student_head, teacher_head, given)


@documented
def linear_topk_soft_cross_entropy(
    student: Tensor, student_weight: Tensor, topk_logprobs: Tensor, topk_indices: Tensor, *,
    student_bias: Tensor | None = None,
    tail: Tail = "renormalize", reverse: bool = False,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, student_logit_scale: float = 1.0,
    item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes `topk_soft_cross_entropy` of the logits `x @ W.T + b` without storing the `(*, V)` tensor.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        {topk}
        student_bias: `(V)` or None.
        {topk_options}

    Raises:
        {class_raises}
        IndexError: on the CPU, an index outside the classes.
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     None, student_logit_scale, 1.0, item_weights, reduction, num_items, backend)  # fmt: skip
    head = (student, student_weight, student_bias)
    check.floating(
        student=student, student_weight=student_weight, topk_logprobs=topk_logprobs,
        **check.given(student_bias=student_bias),
    )  # fmt: skip
    rows, classes = _check_head("student", head)
    _rows.check_keywords(given, rows, classes, student.device)
    _rows.check_topk(topk_logprobs, topk_indices, rows, tail, reverse, temperature)
    return _loss(
        _rows.topk_kind(reverse), reference.linear_topk_soft_cross_entropy, head, (topk_logprobs, None, None),
        topk_indices, given, tail=tail, reverse=reverse,
    )  # fmt: skip


def _check_head(side: str, head: Head) -> tuple[tuple[int, ...], int]:
    """Returns the shape of the rows and the number of classes."""
    hidden, weight, bias = head
    if hidden.dim() < 1:
        raise ValueError(f"{side} is a scalar; it should be (*, d)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight has shape {tuple(weight.shape)}; it should be (V, {hidden.shape[-1]}), as in "
            "nn.Linear(d, V).weight"
        )
    if bias is not None:
        check.shape(f"{side}_bias", bias, (weight.shape[0],), "(V)")
    return tuple(hidden.shape[:-1]), weight.shape[0]


def _against_head(
    kind: str, definition: Callable[..., Tensor], student: Head, teacher: Head, given: Keywords, **own: Any
) -> Tensor:
    check.floating(
        student=student[0], student_weight=student[1], teacher=teacher[0], teacher_weight=teacher[1],
        **check.given(student_bias=student[2], teacher_bias=teacher[2]),
    )  # fmt: skip
    check.frozen(teacher=teacher[0], teacher_weight=teacher[1], teacher_bias=teacher[2])
    rows, classes = _check_head("student", student)
    _, teacher_classes = _check_head("teacher", teacher)
    expected = (*rows, teacher[0].shape[-1])
    check.shape("teacher", teacher[0], expected, "(*, d_t) with the student's leading dimensions")
    if given.vocab_size is None:
        _rows.check_same_vocabulary("student_weight", classes, "teacher_weight", teacher_classes)
    _rows.check_keywords(given, rows, min(classes, teacher_classes), student[0].device)
    return _loss(kind, definition, student, teacher, None, given, **own)


def _loss(
    kind: str, definition: Callable[..., Tensor], student: Head,
    teacher: Head,  # with `indices` log-probabilities (*, k), None and None
    indices: Tensor | None,  # (*, k)
    given: Keywords, **own: Any,  # the keywords of this loss alone
) -> Tensor:  # fmt: skip
    """Picks the backend, casts for autocast, runs the op and reduces its losses; the arguments are checked."""
    backend = pick_backend(given.backend, student[0].device, kind=kind)
    hidden, weight, bias = _operands("student", student)
    if indices is None:
        teacher = _operands("teacher", teacher)
    with no_autocast(hidden):
        if backend == "reference":
            others, biases = (teacher[0], indices), {"student_bias": bias}
            if indices is None:
                others, biases = teacher[:2], biases | {"teacher_bias": teacher[2]}
            return definition(hidden, weight, *others, **biases, **_rows.for_reference(given, own))
        rows = hidden.shape[:-1]
        counted = _rows.counted_rows(given, None if indices is None else teacher[0])
        options = _rows.row_options(kind, given, weight.shape[0], backend, **own)
        divisor = _rows.divisor(given, counted, rows.numel())
        if counted is given.item_weights is None:
            loss = _of_few(options, (hidden, weight, bias), teacher, indices, given.reduction, divisor)
            if loss is not None:
                return loss
        per_row, divided = given.reduction == "none", divides(hidden)
        loss = linear_row_losses(
            *_flat_rows((hidden, weight, bias), teacher, indices, given.labels, counted),
            item_weights=None if given.item_weights is None else given.item_weights.reshape(-1),
            divisor=divisor if divided else None, dense=given.mask is None and given.labels is None,
            per_row=per_row, options=options,
        )  # fmt: skip
        if per_row:
            return loss.view(rows)
        return loss if divided else _rows.reduced(loss, divisor)


def _of_few(
    options: RowOptions, student: Head, teacher: Head, indices: Tensor | None, reduction: str,
    count: int | float | Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Returns the loss of few logits on a CPU, which are then stored; None if they are many or it is not finite."""
    hidden, weight, _ = student
    classes = weight.shape[0]
    teacher_classes = teacher[0].shape[-1] if indices is not None else teacher[1].shape[0]
    alike = hidden.dtype == teacher[0].dtype in (torch.float32, torch.float64)
    if not alike or torch.is_autocast_enabled("cpu"):  # autocast would round the products of the backward
        return None
    if not are_few(options, hidden.shape[:-1].numel(), classes, teacher_classes, hidden.device):
        return None
    target = teacher[0] if indices is not None else linear(*teacher)
    return loss_of_few(linear(*student), target, indices, None, None, None, reduction, count, options)


def _operands(side: str, head: Head) -> Head:
    hidden, weight, bias = autocast(*head)
    if not hidden.dtype == weight.dtype == (weight if bias is None else bias).dtype:
        check.same_dtype(**{side: hidden, f"{side}_weight": weight, f"{side}_bias": bias})
    return hidden, weight, bias


def _flat_rows(
    student: Head, teacher: Head, indices: Tensor | None, labels: Tensor | None, counted: Tensor | None
) -> tuple[Any, ...]:
    """Returns the tensors as the ops take them: rows (N, .), classes and masks (N)."""
    (hidden, *head), (teacher_hidden, *teacher_head) = student, teacher
    indices = None if indices is None else _flat(indices)
    classes = (None if x is None else x.reshape(-1) for x in (labels, counted))
    return _flat(hidden), *head, _flat(teacher_hidden), *teacher_head, indices, *classes


def _flat(x: Tensor) -> Tensor:  # (*, d) -> (N, d)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
