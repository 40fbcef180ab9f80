"""Losses on hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._checks import Backend, Reduction
from ..ops._common import divides, mean, no_autocast
from ..ops.linear_mse import linear_mse as _linear_mse_op
from ._dispatch import autocast, pick_backend

__all__ = ["linear_mse"]


def linear_mse(
    student: Tensor, weight: Tensor | None, teacher: Tensor, bias: Tensor | None = None, *,
    mask: Tensor | None = None, item_weights: Tensor | None = None,
    reduction: Reduction = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the mean squared error between the projected student and the teacher, without storing the projection.

    The item is a token; its loss is the mean over d_t of `(student @ weight.T + bias - teacher)^2`. This is the
    hidden-state and the embedding loss of TinyBERT (arXiv 1909.10351, equations 8 and 9).

    Args:
        student: `(*, d_s)`.
        weight: `(d_t, d_s)` as in nn.Linear, or None where d_s == d_t.
        teacher: `(*, d_t)`; any floating dtype.
        bias: `(d_t)` or None.
        mask: `(*)` bool, True = counts.
        item_weights: `(*)` floating, at least 0, without gradient; multiplies each token's loss. A token of weight 0 is
            ignored, even if it holds NaN, but the mean still counts it. A negative weight is not
            refused, since the check would be a host sync: it changes the sign of the token's loss.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of tokens (int, float or 0-d tensor) to divide by in place of the number counted.
        backend: "auto", "reference", "torch" or "triton".

    Raises:
        ValueError: shapes that do not fit, a teacher that requires a gradient, an unknown reduction or backend.
        TypeError: tensors that are not floating, student, weight and bias of several dtypes outside autocast.
    """
    tokens, width = _check(student, weight, teacher, bias, mask)
    check.item_weights(item_weights, tokens, "the student's leading dimensions", student.device)
    check.reduction(reduction, num_items)
    backend = pick_backend(backend, student.device)
    if weight is not None:
        student, weight, bias = autocast(student, weight, bias)
    elif bias is not None and torch.is_autocast_enabled(student.device.type):
        bias = bias.to(student.dtype)  # autocast rounds nothing where there is no product
    check.same_dtype(student=student, weight=weight, bias=bias)
    with no_autocast(student):
        if backend == "reference":
            return reference.linear_mse(
                student, weight, teacher, bias, mask=mask, item_weights=item_weights, reduction=reduction,
                num_items=num_items,
            )  # fmt: skip
        divisor = None
        if reduction == "mean":
            divisor = num_items if num_items is not None else tokens.numel() if mask is None else mask.sum()
        divided = divides(student)
        loss = _linear_mse_op(
            student if student.dim() == 2 else student.reshape(-1, student.shape[-1]),
            weight,
            teacher if teacher.dim() == 2 else teacher.reshape(-1, width),
            bias,
            None if mask is None else mask.reshape(-1),
            item_weights=None if item_weights is None else item_weights.reshape(-1),
            divisor=divisor if divided else None, per_token=reduction == "none", backend=backend,
        )  # fmt: skip
        if reduction == "none":
            return loss.view(tokens)
        return loss if divided or divisor is None else mean(loss, divisor)


def _check(
    student: Tensor, weight: Tensor | None, teacher: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[torch.Size, int]:
    """Returns the shape of the tokens and d_t."""
    check.floating(student=student, teacher=teacher, **check.given(weight=weight, bias=bias))
    check.frozen(teacher=teacher)
    if student.dim() < 1:
        raise ValueError("student is a scalar; it should be (*, d_s)")
    tokens = student.shape[:-1]
    if weight is None:
        check.shape("teacher", teacher, student.shape, "the student's shape, as weight is None")
        width = student.shape[-1]
    else:
        if weight.dim() != 2 or weight.shape[1] != student.shape[-1]:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it should be (d_t, {student.shape[-1]}), as in "
                "nn.Linear(d_s, d_t).weight"
            )
        width = weight.shape[0]
        check.shape("teacher", teacher, (*tokens, width), "(*, d_t) with the student's leading dimensions")
    if width == 0:
        raise ValueError("teacher has width 0; the mean over d_t needs at least one feature")
    if bias is not None:
        check.shape("bias", bias, (width,), "(d_t)")
    check.mask("mask", mask, tokens, "the student's leading dimensions", student.device)
    return tokens, width
