"""Divergences between the student's and the teacher's softmax over the classes, one loss a row.

Of each side x = z - max z, e = exp(x / T), Z = sum e, p = e / Z; m = beta p_t + (1 - beta) p_s; E_s and E_t are means
under p_s and p_t:

    kind                loss                                            gradient in the student's logits z
    soft_cross_entropy  log Z_s - E_t[x_s] / T                          (p_s - p_t) / T
    kl_div              E_t[x_t - x_s] / T - log(Z_t / Z_s)             (p_s - p_t) / T
    reverse_kl          mu / T - log(Z_s / Z_t), mu = E_s[x_s - x_t]    p_s (x_s - x_t - mu) / T^2
    jsd                 beta E_t[log(p_t / m)] + (1 - beta) mu,         (1 - beta) p_s (log(p_s / m) - mu) / T
                        mu = E_s[log(p_s / m)]
    tvd                 sum |p_s - p_t| / 2                             p_s (c - E_s[c]) / 2T, c = sign(p_s - p_t)

The gradient is the only tensor of the logits' size. Differences are taken class by class before they are summed, and a
row's largest e is exactly 1: a student close to its teacher, or sure of its class, keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _common, _rows
from fastdistill.ops._rows import RowLoss, Target, TargetOf, capped, exponential, exponential_, row_max, rows_at, weigh_


class Divergence(NamedTuple):
    kind: str
    temperature: float
    beta: float

    @property
    def statistics(self) -> int:
        return 4  # Z_s, max z_t, Z_t, mu

    def loss(
        self, student: Tensor, student_max: Tensor, target: Target, statistics: Sequence[Tensor], work: Tensor
    ) -> Tensor:
        (teacher,) = target  # (n, V)
        student_sum, teacher_max, teacher_sum, mean = statistics
        a, b, c, d = work.unbind()
        row_max(teacher, teacher_max)
        student_x = torch.sub(student, student_max, out=a)
        student_e = exponential(student_x, b, self.temperature)
        torch.sum(student_e, -1, keepdim=True, out=student_sum)
        teacher_x = torch.sub(teacher, teacher_max, out=c)
        teacher_e = exponential(teacher_x, d, self.temperature)
        torch.sum(teacher_e, -1, keepdim=True, out=teacher_sum)
        if self.kind == "soft_cross_entropy":
            cross = weigh_(student_x, teacher_e) / teacher_sum
            return student_sum.log() - cross / self.temperature
        # Rounding may leave -1e-8 of a divergence that is 0.
        if self.kind == "kl_div":
            cross = weigh_(teacher_x.sub_(student_x), teacher_e) / teacher_sum
            return (cross / self.temperature - (teacher_sum / student_sum).log()).clamp_(min=0)
        if self.kind == "reverse_kl":
            torch.div(weigh_(student_x.sub_(teacher_x), student_e), student_sum, out=mean)
            return (mean / self.temperature - (student_sum / teacher_sum).log()).clamp_(min=0)
        if self.kind == "jsd":
            student_p = _positive_(student_e.div_(student_sum))
            teacher_p = _positive_(teacher_e.div_(teacher_sum))
            difference = torch.sub(teacher_p, student_p, out=a)
            teacher_log = torch.div(difference, teacher_p, out=c).mul_(self.beta - 1).log1p_()  # log(m / p_t)
            teacher_mean = teacher_log.mul_(teacher_p).sum(-1, keepdim=True)
            student_log = difference.div_(student_p).mul_(self.beta).log1p_()  # log(m / p_s)
            torch.sum(student_log.mul_(student_p), -1, keepdim=True, out=mean).neg_()
            return ((1 - self.beta) * mean - self.beta * teacher_mean).clamp_(min=0)
        difference = student_e.div_(student_sum).sub_(teacher_e.div_(teacher_sum))
        return difference.abs_().sum(-1, keepdim=True) / 2

    def gradient(
        self,
        student: Tensor,
        student_max: Tensor,
        target: Target,
        statistics: Sequence[Tensor],
        weight: Tensor,
        out: Tensor,
        work: Tensor,
    ) -> None:
        (teacher,) = target  # (n, V)
        student_sum, teacher_max, teacher_sum, mean = statistics
        a, b, c = work.unbind()
        weight = weight / self.temperature
        if self.kind in ("soft_cross_entropy", "kl_div"):
            exponential_(torch.sub(student, student_max, out=out), self.temperature).mul_(weight / student_sum)
            out -= exponential_(torch.sub(teacher, teacher_max, out=a), self.temperature).mul_(weight / teacher_sum)
        elif self.kind == "reverse_kl":
            student_x = torch.sub(student, student_max, out=a)
            student_e = exponential(student_x, b, self.temperature)
            difference = student_x.sub_(torch.sub(teacher, teacher_max, out=c)).sub_(mean)
            weigh_(difference, student_e)
            torch.mul(difference, weight / (self.temperature * student_sum), out=out)
        elif self.kind == "jsd":
            student_e = exponential_(torch.sub(student, student_max, out=a), self.temperature)
            student_p = _positive_(torch.div(student_e, student_sum, out=b))
            teacher_e = exponential_(torch.sub(teacher, teacher_max, out=c), self.temperature)
            difference = _positive_(teacher_e.div_(teacher_sum)).sub_(student_p)
            student_log = difference.div_(student_p).mul_(self.beta).log1p_()  # log(m / p_s)
            student_log.add_(mean).mul_(student_e)
            torch.mul(student_log, weight * (self.beta - 1) / student_sum, out=out)
        else:
            student_p = exponential_(torch.sub(student, student_max, out=a), self.temperature).div_(student_sum)
            teacher_p = exponential_(torch.sub(teacher, teacher_max, out=b), self.temperature).div_(teacher_sum)
            sign = torch.sub(student_p, teacher_p, out=b).sign_()
            sign -= torch.mul(sign, student_p, out=c).sum(-1, keepdim=True)
            torch.mul(sign.mul_(student_p), weight / 2, out=out)


def _positive_(p: Tensor) -> Tensor:
    """p plus the smallest normal number: ratios of two of them are finite, and 1 where both are 0."""
    return p.add_(torch.finfo(p.dtype).tiny)


def divergence(
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # (*, >= V)
    kind: str,
    *,
    counted: Tensor | None,  # (*)
    labels: Tensor | None,  # (*)
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    beta: float,
    vocab_size: int | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> Tensor:  # (*)
    loss, _ = _divergence(
        student if student.dim() > 1 else student.unsqueeze(0),
        teacher if teacher.dim() > 1 else teacher.unsqueeze(0),
        labels.reshape(-1) if labels is not None and hard_weight else None,
        None if counted is None else counted.reshape(-1),
        kind,
        temperature,
        beta,
        soft_weight,
        hard_weight,
        student.shape[-1] if vocab_size is None else vocab_size,
        student_softcap,
        teacher_softcap,
    )
    return loss.view(student.shape[:-1])


def _forward(
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # (*, >= V)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    kind: str,
    temperature: float,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:  # loss (N), statistics (., N)
    row_loss = RowLoss(Divergence(kind, temperature, beta), soft_weight, hard_weight, student_softcap)
    dtype = _common.compute_dtype(student, teacher)
    target_of = _target_of(teacher, soft_weight, classes, teacher_softcap, dtype)
    return _rows.forward(row_loss, student, target_of, labels, counted, classes, dtype)


def _gradient(
    grad_loss: Tensor,  # (N)
    loss: Tensor,  # (N)
    statistics: Tensor,  # (., N)
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # (*, >= V)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    kind: str,
    temperature: float,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> Tensor:  # as student
    row_loss = RowLoss(Divergence(kind, temperature, beta), soft_weight, hard_weight, student_softcap)
    target_of = _target_of(teacher, soft_weight, classes, teacher_softcap, loss.dtype)
    return _rows.backward(row_loss, grad_loss, loss, statistics, student, target_of, labels, counted, classes)


def _target_of(
    teacher: Tensor, soft_weight: float, classes: int, softcap: float | None, dtype: torch.dtype
) -> TargetOf:
    def target_of(index: tuple[int | slice, ...], rows: slice, buffer: Tensor) -> Target:
        if soft_weight == 0:
            return ()
        return (capped(rows_at(teacher, index, classes), softcap, dtype, buffer),)

    return target_of


def _fake_forward(student, teacher, labels, counted, kind, temperature, beta, *_):  # type: ignore[no-untyped-def]
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=_common.compute_dtype(student, teacher))
    return loss, loss.new_empty(RowLoss(Divergence(kind, temperature, beta), 1, 0, None).statistics, loss.shape[0])


def _fake_gradient(grad_loss, loss, statistics, student, *_):  # type: ignore[no-untyped-def]
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, teacher, labels, counted, *ctx.options = inputs
    loss, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(loss, statistics, student, teacher, labels, counted)


def _backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("the loss on logits")
    d_student = None if grad_loss is None else _divergence_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return d_student, *(None,) * 11


_divergence_backward = _common.operator("divergence_backward", _gradient, _fake_gradient)
_divergence = _common.differentiable("divergence", _forward, _fake_forward, _setup_context, _backward)
