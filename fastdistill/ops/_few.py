"""Computes the losses on few logits on a CPU in few operations, since calling them takes all the time.

The kinds and gradients are those of _divergence.py, which also handles what is not finite. A divergence adds p_s - p_t,
whose sum is 0, to its terms: none of them is negative then, and the rounding of the two log-sum-exps cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _common, _rows
from ._rows import RowOptions, checked_indices

KINDS = ("soft_cross_entropy", "kl_div", "reverse_kl", "jsd", "tvd")
FEW = 4096  # logits of one side; with more, blocks in float32 are as fast


def are_few(options: RowOptions, rows: int, student_classes: int, teacher_classes: int, device: torch.device) -> bool:
    return (
        options.backend == "torch"
        and not _common.traced()
        and 0 < rows * student_classes <= FEW
        and device.type == "cpu"
        and student_classes == options.classes
        and (options.tail == "renormalize" or teacher_classes == options.classes)
        and (options.kind == "soft_cross_entropy" or not options.tail)
        and options.student_softcap is options.teacher_softcap is None
        and options.student_scale == options.teacher_scale == 1
    )


def loss_of_few(
    student: Tensor,  # (*, V)
    teacher: Tensor,  # logits (*, V), or with `indices` log-probabilities (*, k)
    indices: Tensor | None,  # (*, k)
    labels: Tensor | None,  # (*)
    counted: Tensor | None,  # (*)
    weights: Tensor | None,  # (*), 0 in rows that are masked out
    reduction: str,
    count: int | float | Tensor | None,  # what the mean divides by
    options: RowOptions,
) -> Tensor | None:  # (*) with reduction "none", else ()
    """Returns the loss, or None where it is not finite."""
    temperature, hard_weight = options.temperature, options.hard_weight
    needs_gradient = student.requires_grad and torch.is_grad_enabled()
    dtype = _common.compute_dtype(student, teacher)
    wide = torch.float64 if options.kind == "jsd" else dtype  # its terms cancel
    z, t = student.detach(), teacher
    if not z.dtype == t.dtype == wide:
        z, t = z.to(wide), t.to(wide)
    if counted is not None:
        z, t = z.where(counted.unsqueeze(-1), 0), t.where(counted.unsqueeze(-1), 0)
    if indices is not None and _rows.may_be_infinite(t):  # padding may name any class, or none
        return None
    x, t = (z, t) if temperature == 1 else (z / temperature, t / temperature)
    if indices is None:
        loss, gradient = _divergence(options, x, t, needs_gradient)
    else:
        indices = checked_indices("topk_indices", indices, counted, options.classes)
        loss, gradient = _listed(x, t, indices, needs_gradient)
    factor = options.soft_weight / temperature
    if options.soft_weight != 1:
        loss *= options.soft_weight
    if labels is not None and hard_weight:
        labels = checked_indices("labels", labels.unsqueeze(-1), counted, options.classes)
        logp = z.log_softmax(-1)
        loss = loss.sum(-1, keepdim=True) - logp.gather(-1, labels) * hard_weight
        if gradient is not None:
            hard = logp.exp().scatter_add_(-1, labels, torch.full_like(loss, -1))
            gradient, factor = gradient.mul_(factor).add_(hard, alpha=hard_weight), 1.0
    if counted is not None:
        weights = counted if weights is None else weights
    if weights is not None or reduction == "none":
        loss = loss.sum(-1).clamp_(min=0)
        if weights is not None:
            loss.mul_(weights)
            gradient = None if gradient is None else gradient.mul_(weights.unsqueeze(-1))
    total = loss.sum().item()
    if not math.isfinite(total):
        return None
    if reduction == "none":
        loss = loss.to(dtype)
    else:
        divisor = 1 if count is None else (count.item() if isinstance(count, Tensor) else count) or 1
        # Rounding may leave -1e-18 of a loss that is 0. Weights may be negative.
        total = total if weights is not None else max(total, 0.0)
        loss, factor = torch.full((), total / divisor, dtype=dtype), factor / divisor
    return loss if gradient is None else _Known.apply(student, (loss, gradient, factor, counted))


class _Known(torch.autograd.Function):
    """A loss whose gradient is `factor * gradient`."""

    @staticmethod
    def forward(ctx, student, known):  # type: ignore[no-untyped-def]
        ctx.dtype, (loss, *ctx.known) = student.dtype, known
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward("the loss over classes")
        gradient, factor, counted = ctx.known
        if grad_loss.dim():
            gradient = gradient * _rows.row_weights(grad_loss, counted, grad_loss.dtype)
        else:
            factor *= grad_loss.item()
        return (gradient * factor).to(ctx.dtype), None


def _divergence(
    options: RowOptions,
    student: Tensor,  # (*, V)
    teacher: Tensor,  # (*, V)
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # (*, V) each
    """Returns the classes' terms of the loss, and its gradient in `student`. Both sides are over the temperature."""
    kind = options.kind
    if kind == "tvd":
        student_p = student.softmax(-1)
        difference = student_p - teacher.softmax(-1)  # exactly 0 where the two are equal
        loss, c = difference.abs().mul_(0.5), difference.sign_().mul_(0.5)
        return loss, _centred(c, student_p) if needs_gradient else None
    student_logp = student.log_softmax(-1)
    student_p = student_logp.exp()
    if kind == "soft_cross_entropy":
        teacher_p = teacher.softmax(-1)
        return student_logp.neg_().mul_(teacher_p), student_p.sub_(teacher_p) if needs_gradient else None
    teacher_logp = teacher.log_softmax(-1)
    teacher_p = teacher_logp.exp()
    if kind == "kl_div":
        gradient = student_p.sub_(teacher_p)
        loss = torch.addcmul(gradient, teacher_logp.sub_(student_logp), teacher_p)
        return loss, gradient if needs_gradient else None
    if kind == "reverse_kl":
        c = student_logp.sub_(teacher_logp)
        loss = (teacher_p - student_p).addcmul_(student_p, c)
        return loss, _centred(c, student_p) if needs_gradient else None
    beta, teacher_kl, student_kl = options.beta, options.teacher_kl, options.student_kl
    m = torch.lerp(student_p, teacher_p, beta)
    log_m = m.log()
    c = student_logp.sub_(log_m).mul_(student_kl)
    loss = (student_p * c).add_(teacher_logp.sub_(log_m).mul_(teacher_p), alpha=teacher_kl)
    bend = (1 - beta) * teacher_kl - beta * student_kl
    if bend:
        c.addcdiv_(teacher_p - student_p, m, value=(beta - 1) * bend)
    return loss, _centred(c, student_p) if needs_gradient else None


def _centred(c: Tensor, p: Tensor) -> Tensor:  # (*, V) each
    """Returns p (c - E[c])."""
    return c.sub_((p * c).sum(-1, keepdim=True)).mul_(p)


def _listed(
    student: Tensor,  # (*, V)
    teacher: Tensor,  # (*, k)
    indices: Tensor,  # (*, k)
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # (*, k), (*, V)
    """As `_divergence`, against a list of the teacher's classes, whose probabilities are normalised again."""
    logp, teacher_p = student.log_softmax(-1), teacher.softmax(-1)
    loss = logp.gather(-1, indices).neg_().mul_(teacher_p)
    return loss, logp.exp_().scatter_add_(-1, indices, teacher_p.neg_()) if needs_gradient else None
