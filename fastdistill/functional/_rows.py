"""The keywords of the losses over classes as one value, their checks, and how losses per row are reduced."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._checks import Backend, Reduction
from ..ops._common import mean, traced
from ..ops._rows import RowOptions, may_be_infinite


class Keywords(NamedTuple):
    """The keywords that all losses over classes take, as the caller gave them."""

    temperature: float
    t_squared: bool
    labels: Tensor | None  # (*)
    alpha: float
    ignore_index: int
    mask: Tensor | None  # (*)
    vocab_size: int | None
    student_softcap: float | None
    teacher_softcap: float | None
    student_logit_scale: float
    teacher_logit_scale: float
    item_weights: Tensor | None  # (*)
    reduction: Reduction
    num_items: int | float | Tensor | None
    backend: Backend


def check_keywords(given: Keywords, rows: tuple[int, ...], classes: int, device: torch.device) -> None:
    check.reduction(given.reduction, given.num_items)
    check.positive("temperature", given.temperature)
    check.fraction("alpha", given.alpha)
    check.boolean("t_squared", given.t_squared)
    if classes == 0:
        raise ValueError("the logits have 0 classes; they should have at least 1")
    if given.vocab_size is not None:
        check.integer("vocab_size", given.vocab_size)
        if not 1 <= given.vocab_size <= classes:
            raise ValueError(
                f"vocab_size is {given.vocab_size}; it should be between 1 and the {classes} classes of the logits"
            )
    check.integer("ignore_index", given.ignore_index)
    check.mask("mask", given.mask, rows, "one entry a row", device)
    if given.labels is not None:
        check.integers("labels", given.labels, rows, "one entry a row", device)
    elif given.alpha < 1:
        raise ValueError(f"alpha is {given.alpha} but labels is None; pass labels, or leave alpha at 1.0")
    for name, softcap in (("student_softcap", given.student_softcap), ("teacher_softcap", given.teacher_softcap)):
        if softcap is not None:
            check.positive(name, softcap)
    check.positive("student_logit_scale", given.student_logit_scale)
    check.positive("teacher_logit_scale", given.teacher_logit_scale)
    check.item_weights(given.item_weights, rows, "one entry a row", device)


def check_topk(
    topk_logprobs: Tensor, topk_indices: Tensor, rows: tuple[int, ...], tail: str, reverse: bool, temperature: float
) -> None:
    check.boolean("reverse", reverse)
    check.frozen(topk_logprobs=topk_logprobs)
    k = topk_logprobs.shape[-1] if topk_logprobs.dim() else 0
    check.shape("topk_logprobs", topk_logprobs, (*rows, k), "(*, k) with the student's leading dimensions")
    check.integers("topk_indices", topk_indices, (*rows, k), "the shape of topk_logprobs", topk_logprobs.device)
    if k == 0:
        raise ValueError("topk_logprobs has k = 0; it should hold at least one class a row")
    if tail not in ("renormalize", "bucket"):
        raise ValueError(f"tail is {tail!r}; it should be 'renormalize' or 'bucket'")
    if tail == "bucket" and temperature != 1:
        raise ValueError(
            f"temperature is {temperature} with tail='bucket'; the bucket's mass is known at temperature 1 alone: use "
            "temperature=1.0 or tail='renormalize'"
        )


def check_same_vocabulary(student: str, student_classes: int, teacher: str, teacher_classes: int) -> None:
    """For calls without vocab_size."""
    if teacher_classes != student_classes:
        raise ValueError(
            f"{teacher} has {teacher_classes} classes and {student} {student_classes}; pass vocab_size, the number of "
            "classes that both share, if the rest is padding"
        )


def for_reference(given: Keywords, own: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of the definition in reference.py; `own` are those of this loss alone."""
    return {name: value for name, value in given._asdict().items() if name != "backend"} | own


def row_options(
    kind: str, given: Keywords, classes: int, backend: str, *,
    tail: str = "", beta: float = 0.5, reverse: bool = False, skew: float = 0.0,
) -> RowOptions:  # fmt: skip
    """Packs what the ops take. `classes` are the student's; `beta`, or `reverse` and `skew`, choose a "jsd"."""
    soft_weight = 1.0 if given.labels is None else given.alpha
    teacher_kl, student_kl = beta, 1 - beta
    if skew:
        beta, teacher_kl, student_kl = (1 - skew, 0.0, 1.0) if reverse else (skew, 1.0, 0.0)
    return RowOptions(
        kind=kind, tail=tail, classes=classes if given.vocab_size is None else given.vocab_size,
        temperature=given.temperature, beta=beta, teacher_kl=teacher_kl, student_kl=student_kl,
        soft_weight=soft_weight * given.temperature**2 if given.t_squared else soft_weight,
        hard_weight=0.0 if given.labels is None else 1 - given.alpha,
        student_softcap=given.student_softcap, teacher_softcap=given.teacher_softcap,
        student_scale=given.student_logit_scale, teacher_scale=given.teacher_logit_scale, backend=backend,
    )  # fmt: skip


def counted_rows(given: Keywords, topk_logprobs: Tensor | None = None) -> Tensor | None:
    """Returns which rows count, `(*)`, or None if all do. A row whose listed classes are all impossible does not."""
    counted = given.mask
    if given.labels is not None:
        labelled = given.labels.long() != given.ignore_index  # as uint8 -100 would be class 156
        counted = labelled if counted is None else labelled & counted
    if topk_logprobs is not None and (traced() or may_be_infinite(topk_logprobs)):
        possible = (topk_logprobs != -math.inf).any(-1)  # also of NaN, which reaches the loss
        counted = possible if counted is None else possible & counted
    return counted


def divisor(given: Keywords, counted: Tensor | None, rows: int) -> int | float | Tensor | None:
    """Returns what the mean divides by; None if the reduction is no mean."""
    if given.reduction != "mean":
        return None
    if given.num_items is not None:
        return given.num_items
    return rows if counted is None else counted.sum()


def reduced(loss: Tensor, count: int | float | Tensor | None) -> Tensor:
    return loss if count is None else mean(loss, count)


def jsd_kind(beta: float) -> str:
    check.fraction("beta", beta)
    return "kl_div" if beta == 0 else "reverse_kl" if beta == 1 else "jsd"


def topk_kind(reverse: bool) -> str:
    return "reverse_kl" if reverse else "soft_cross_entropy"


def kl_kind(reverse: bool, skew: float) -> str:
    check.boolean("reverse", reverse)
    check.fraction("skew", skew)
    if skew == 1:
        raise ValueError(
            "skew is 1: the divergence of a distribution from itself is 0; it should be at least 0 and below 1"
        )
    return "jsd" if skew else "reverse_kl" if reverse else "kl_div"
