"""Losses over classes from logits, against a teacher's logits or its k most likely classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _checks as check
from .. import reference
from .._checks import Backend, Reduction, Tail
from ..ops._common import compute_dtype, no_autocast
from ..ops._few import are_few, loss_of_few
from ..ops._rows import weigh
from ..ops.logits import loss_over_classes
from . import _rows
from ._dispatch import pick_backend
from ._docs import documented
from ._rows import Keywords

__all__ = ["jsd", "kl_div", "soft_cross_entropy", "topk_soft_cross_entropy", "tvd"]


@documented
def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the cross-entropy of the student under the teacher's distribution: `-sum p_t log p_s`.

    With `p = softmax(z / temperature)` of each side, summed over the classes; the item is a row. This is the
    prediction loss of TinyBERT (arXiv 1909.10351, equation 10) and Hinton's distillation (arXiv 1503.02531). It equals
    `kl_div` plus the teacher's entropy, so both have the same gradient.

    Args:
        {logits}
        {class_options}

    A class with teacher mass and student probability 0 gives inf, as the formula does.

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    return _against_logits("soft_cross_entropy", reference.soft_cross_entropy, student_logits, teacher_logits, given)


@documented
def kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *,
    reverse: bool = False, skew: float = 0.0,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the Kullback-Leibler divergence between teacher and student: `sum p_t (log p_t - log p_s)`.

    This is `KL(p_t || p_s)` with `p = softmax(z / temperature)`, or `KL(p_s || p_t)` with `reverse` (arXiv 2306.08543).
    With `skew` the second side is mixed with the first (DistiLLM, arXiv 2402.03898). The item is a row.

    Args:
        {logits}
        reverse: KL(p_s || p_t), which seeks the teacher's modes, in place of KL(p_t || p_s).
        {skew}
        {class_options}

    A class with mass on the first side of the divergence and none on the second gives inf, as the formula does; with a
    skew it does not.

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    kind = _rows.kl_kind(reverse, skew)
    return _against_logits(kind, reference.kl_div, student_logits, teacher_logits, given, reverse=reverse, skew=skew)


@documented
def jsd(
    student_logits: Tensor, teacher_logits: Tensor, *,
    beta: float = 0.5,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the generalised Jensen-Shannon divergence: `beta KL(p_t || m) + (1 - beta) KL(p_s || m)`.

    With `m = beta p_t + (1 - beta) p_s` and `p = softmax(z / temperature)` (GKD, arXiv 2306.13649, equation 1); beta 0
    is `KL(p_t || p_s)` and beta 1 `KL(p_s || p_t)`. The item is a row. At beta 0.5 it is symmetric and at most log 2.

    Args:
        {logits}
        beta: weight of the teacher in the mixture, 0 to 1.
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    return _against_logits(_rows.jsd_kind(beta), reference.jsd, student_logits, teacher_logits, given, beta=beta)


@documented
def tvd(
    student_logits: Tensor, teacher_logits: Tensor, *,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the total variation distance between teacher and student: `0.5 sum |p_t - p_s|`, between 0 and 1.

    With `p = softmax(z / temperature)`; the item is a row (f-distillation, arXiv 2307.15190). Where the two are equal
    the subgradient is 0.

    Args:
        {logits}
        {class_options}

    Raises:
        {class_raises}
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     teacher_softcap, student_logit_scale, teacher_logit_scale, item_weights, reduction,
                     num_items, backend)  # fmt: skip
    return _against_logits("tvd", reference.tvd, student_logits, teacher_logits, given)


@documented
def topk_soft_cross_entropy(
    student_logits: Tensor, topk_logprobs: Tensor, topk_indices: Tensor, *,
    tail: Tail = "renormalize", reverse: bool = False,
    temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None,
    student_softcap: float | None = None, student_logit_scale: float = 1.0,
    item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the soft cross-entropy against the k most likely classes of an offline teacher.

    With `tail="renormalize"` the k classes are the teacher's whole distribution: their log-probabilities are divided
    by the temperature and normalised again. With `tail="bucket"` (temperature 1) the teacher's remaining mass is one
    more class, compared with the student's remaining mass. The item is a row.

    With `reverse` it computes `KL(p_s || p_t)` over the listed classes, among which the student is normalised again
    too, or over the listed classes and the bucket. These are the two forms of TRL 1.16 (ServerDistillationTrainer with
    beta=1). As there, the teacher's bucket holds at least 1e-7: float32 log-probabilities resolve no less.

    Args:
        student_logits: `(*, V)`.
        {topk}
        {topk_options}

    Raises:
        {class_raises}
        IndexError: on the CPU, an index outside the classes.
    """
    given = Keywords(temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
                     None, student_logit_scale, 1.0, item_weights, reduction, num_items, backend)  # fmt: skip
    check.floating(student_logits=student_logits, topk_logprobs=topk_logprobs)
    rows, classes = _shape(student_logits)
    _rows.check_keywords(given, rows, classes, student_logits.device)
    _rows.check_topk(topk_logprobs, topk_indices, rows, tail, reverse, temperature)
    return _loss(
        _rows.topk_kind(reverse), reference.topk_soft_cross_entropy, student_logits, topk_logprobs, topk_indices, given,
        tail=tail, reverse=reverse,
    )  # fmt: skip


def _shape(student_logits: Tensor) -> tuple[tuple[int, ...], int]:
    if student_logits.dim() < 1:
        raise ValueError("student_logits is a scalar; it should be (*, V)")
    *rows, classes = student_logits.shape
    return tuple(rows), classes


def _against_logits(
    kind: str, definition: Callable[..., Tensor], student_logits: Tensor, teacher_logits: Tensor, given: Keywords,
    **own: Any,
) -> Tensor:  # fmt: skip
    check.floating(student_logits=student_logits, teacher_logits=teacher_logits)
    check.frozen(teacher_logits=teacher_logits)
    rows, classes = _shape(student_logits)
    check.shape("teacher_logits", teacher_logits, (*rows, *teacher_logits.shape[-1:]), "(*, V) with the student's *")
    if given.vocab_size is None:
        _rows.check_same_vocabulary("student_logits", classes, "teacher_logits", teacher_logits.shape[-1])
    _rows.check_keywords(given, rows, min(classes, teacher_logits.shape[-1]), student_logits.device)
    return _loss(kind, definition, student_logits, teacher_logits, None, given, **own)


def _loss(
    kind: str, definition: Callable[..., Tensor],
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # logits (*, >= V), or with `indices` log-probabilities (*, k)
    indices: Tensor | None,  # (*, k)
    given: Keywords, **own: Any,  # the keywords of this loss alone
) -> Tensor:  # fmt: skip
    """Picks the backend, runs the op and reduces its losses; the arguments are checked."""
    dtypes = (student.dtype, teacher.dtype) if indices is None else ()
    backend = pick_backend(given.backend, student.device, dtypes, kind)
    with no_autocast(student):
        if backend == "reference":
            tensors = (teacher,) if indices is None else (teacher, indices)
            return definition(student, *tensors, **_rows.for_reference(given, own))
        counted = _rows.counted_rows(given, None if indices is None else teacher)
        rows = math.prod(student.shape[:-1])
        count = _rows.divisor(given, counted, rows)
        weights = given.item_weights
        if weights is not None:
            weights, counted = weigh(weights, counted, compute_dtype(student, teacher))
        options = _rows.row_options(kind, given, student.shape[-1], backend, **own)
        arguments = student, teacher, indices, given.labels, counted, weights, given.reduction, count, options
        if are_few(options, rows, student.shape[-1], teacher.shape[-1], student.device):
            loss = loss_of_few(*arguments)
            if loss is not None:
                return loss
        return loss_over_classes(*arguments)
