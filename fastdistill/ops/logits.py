"""Divergences between the student's and the teacher's softmax over the classes, one loss a row.

Of each side x = z - max z, e = exp(x / T), Z = sum e, p = e / Z; m = beta p_t + (1 - beta) p_s; E_s and E_t are means
under p_s and p_t:

    kind                loss                                         gradient in the student's logits z
    soft_cross_entropy  log Z_s - E_t[x_s] / T                       (p_s - p_t) / T
    kl_div              E_t[x_t - x_s] / T - log(Z_t / Z_s)          (p_s - p_t) / T
    reverse_kl          E_s[c] / T - log(Z_s / Z_t)                  p_s (c - E_s[c]) / T^2           c = x_s - x_t
    jsd                 beta E_t[log(p_t / m)] + (1 - beta) E_s[c]   (1 - beta) p_s (c - E_s[c]) / T  c = log(p_s / m)
    tvd                 sum |p_s - p_t| / 2                          p_s (c - E_s[c]) / 2T            c = sgn(p_s - p_t)

The gradient is the only tensor of the logits' size. Differences are taken class by class before they are summed, and a
row's largest e is exactly 1: a student close to its teacher, or sure of its class, keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _common
from fastdistill.ops._rows import (
    RowLoss,
    Target,
    checked_labels,
    differentiable,
    exponents_,
    gradient_in_forward,
    power,
    row_losses,
    row_max,
    weigh_,
)


class Divergence(NamedTuple):
    kind: str
    temperature: float
    beta: float

    def __call__(
        self,
        student: Tensor,  # (n, V)
        student_max: Tensor,  # (n, 1)
        target: Target,  # the teacher's logits (n, V)
        weight: float,
        out: Tensor | None,  # (n, V)
        work: Sequence[Tensor],
    ) -> Tensor:  # (n, 1)
        (teacher,) = target
        a, b, c, d = work
        # x is overwritten by e where it is not needed again.
        student_x = torch.sub(student, student_max, out=a)
        unit = exponents_(student_x, self.temperature)  # x / T = unit * student_x
        student_e = power(student_x, a if self.kind in ("jsd", "tvd") else b)
        student_sum = student_e.sum(-1, keepdim=True)
        teacher_x = torch.sub(teacher, row_max(teacher), out=c)
        exponents_(teacher_x, self.temperature)
        teacher_e = power(teacher_x, d if self.kind in ("kl_div", "reverse_kl") else c)
        teacher_sum = teacher_e.sum(-1, keepdim=True)
        slope = weight / self.temperature
        if self.kind == "soft_cross_entropy":
            loss = student_sum.log() - weigh_(student_x, teacher_e) * (unit / teacher_sum)
            if out is not None:
                _difference(student_e, student_sum, teacher_e, teacher_sum, slope, out)
        elif self.kind == "kl_div":
            mean = weigh_(teacher_x.sub_(student_x), teacher_e) / teacher_sum
            loss = mean * unit - _log_ratio(teacher_e, teacher_sum, student_e, student_sum, scratch=a)
            if out is not None:
                _difference(student_e, student_sum, teacher_e, teacher_sum, slope, out)
        elif self.kind == "reverse_kl":
            mean = weigh_(student_x.sub_(teacher_x), student_e) / student_sum
            loss = mean * unit - _log_ratio(student_e, student_sum, teacher_e, teacher_sum, scratch=c)
            if out is not None:
                _centred(student_x, student_e, mean, slope * unit / student_sum, out)
        elif self.kind == "jsd":
            student_p = student_e.mul_(1 / student_sum)
            # The smallest normal number more: ratios of the two are finite, and 1 where both probabilities are 0.
            tiny = torch.finfo(student_p.dtype).tiny
            student_q = torch.add(student_p, tiny, out=b)
            teacher_q = teacher_e.mul_(1 / teacher_sum).add_(tiny)
            difference = torch.sub(teacher_q, student_q, out=d)
            # log(m / p_s) = log1p(beta (p_t - p_s) / p_s)
            student_log = torch.div(difference, student_q, out=b).mul_(self.beta).log1p_()
            teacher_log = difference.div_(teacher_q).mul_(self.beta - 1).log1p_()
            mean = student_log.mul_(student_p).sum(-1, keepdim=True)
            loss = (self.beta - 1) * mean - self.beta * teacher_log.mul_(teacher_q).sum(-1, keepdim=True)
            if out is not None:
                _centred(student_log, student_p, mean, slope * (self.beta - 1), out)
        else:
            # The gradient's factor goes into p, which is then not multiplied by it once more.
            factor = slope / 2
            student_p = student_e.mul_(factor / student_sum)
            difference = torch.sub(student_p, teacher_e.mul_(factor / teacher_sum), out=b)  # exactly 0 where equal
            loss = torch.abs(difference, out=c).sum(-1, keepdim=True) / (2 * factor)
            if out is not None:
                value = torch.mul(difference.sign_(), student_p, out=c)
                torch.addcmul(value, student_p, value.sum(-1, keepdim=True) / factor, value=-1, out=out)
        return loss.clamp_(min=0).mul_(weight)  # rounding may leave -1e-8 of a loss that is 0


def _difference(
    student_e: Tensor, student_sum: Tensor, teacher_e: Tensor, teacher_sum: Tensor, factor: float, out: Tensor
) -> None:
    """out = factor (p_s - p_t)."""
    torch.mul(student_e, factor / student_sum, out=out)
    out.addcmul_(teacher_e, factor / teacher_sum, value=-1)


def _centred(value: Tensor, p: Tensor, mean: Tensor, factor: float | Tensor, out: Tensor) -> None:
    """out = factor (value - p mean), value being p c with sum `mean`: the gradient of a mean under the softmax p."""
    torch.addcmul(value, p, mean, value=-1, out=out).mul_(factor)


def _log_ratio(e: Tensor, e_sum: Tensor, other: Tensor, other_sum: Tensor, scratch: Tensor) -> Tensor:
    """log(e_sum / other_sum), to the last digit where they are close: their difference is summed class by class."""
    excess = torch.sub(e, other, out=scratch).sum(-1, keepdim=True).div_(other_sum)
    return torch.where(excess.abs() < 0.5, excess.log1p(), (e_sum / other_sum).log())


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
    row_gradient: Tensor | None,  # (), what each row's loss is expected to be weighed by
    backend: str,
) -> Tensor:  # (*)
    loss, _ = _divergence(
        student if student.dim() > 1 else student.unsqueeze(0),
        teacher if teacher.dim() > 1 else teacher.unsqueeze(0),
        labels.reshape(-1) if labels is not None and hard_weight else None,
        None if counted is None else counted.reshape(-1),
        *gradient_in_forward(student, row_gradient, backend),
        kind,
        temperature,
        beta,
        soft_weight,
        hard_weight,
        student.shape[-1] if vocab_size is None else vocab_size,
        student_softcap,
        teacher_softcap,
        backend,
    )
    return loss if student.dim() == 2 else loss.view(student.shape[:-1])


def _forward(
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # (*, >= V)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    weight: Tensor | None,  # (N), of each row's gradient; None: 1
    needs_gradient: bool,
    kind: str,
    temperature: float,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
    teacher_softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # loss (N), its gradient as student, or empty
    if backend in ("triton", "cuda"):
        loss, d_student = _fake(student, teacher, labels, counted, weight, needs_gradient)
        _launch(
            loss, d_student if needs_gradient else None, None, student, teacher, labels, counted, weight, kind,
            temperature, beta, soft_weight, hard_weight, classes, student_softcap, teacher_softcap, backend,
        )  # fmt: skip
        return loss, d_student
    return row_losses(
        RowLoss(Divergence(kind, temperature, beta), soft_weight, hard_weight, student_softcap),
        student, teacher if soft_weight else None, (), labels, counted, weight, needs_gradient, classes,
        teacher_softcap, _common.compute_dtype(student, teacher),
    )  # fmt: skip


def _update(gradient: Tensor, expected: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> None:
    loss, _ = _fake(student, teacher, None, None, None, False)
    _launch(loss, gradient, expected, student, teacher, *rest)


def _launch(
    loss: Tensor,  # (N)
    gradient: Tensor | None,  # as student
    expected: Tensor | None,  # (N), the weights it has
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    counted: Tensor | None,
    weight: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,
    student_softcap: float | None,
    teacher_softcap: float | None,
    backend: str,
) -> None:
    kernels: Any
    if backend == "cuda":
        from fastdistill import cuda as kernels
    else:
        from fastdistill.kernels import logits as kernels  # type: ignore[no-redef]

    labels = checked_labels(labels, counted, classes)
    # A mask like m[:, :1] and the gradient of a sum have strides of their own.
    labels, counted, weight, expected = (
        None if x is None else x.contiguous() for x in (labels, counted, weight, expected)
    )
    kernels.rows(
        student, teacher if soft_weight else None, labels, counted, kind, classes=classes, temperature=temperature,
        beta=beta, soft_weight=soft_weight, hard_weight=hard_weight, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, loss=loss, gradient=gradient, weight=weight, expected=expected,
    )  # fmt: skip


def _fake(student, teacher, labels, counted, weight, needs_gradient, *_):  # type: ignore[no-untyped-def]
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=_common.compute_dtype(student, teacher))
    return loss, student.new_empty(student.shape if needs_gradient else 0)


_divergence = differentiable("divergence", _forward, _update, _fake, tensors=4)
