"""Soft cross-entropy against the k most likely classes of a teacher, given by their log-probabilities.

With x = z - max z, Z = sum exp(x / T) and q_j the teacher's probability of listed class j,

    loss = sum_j q_j (log Z - x_j / T)          gradient = (p sum_j q_j - [v = j] q_j) / T

and with tail="bucket" one more class, r: all that are not listed, whose logit is their log-sum-exp and whose q_r is the
teacher's remaining mass. The log-sum-exp is taken over the remaining classes by themselves: log(1 - sum_j p_j) would
lose the mass of a student that is sure of the listed classes.
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
    checked_indices,
    checked_labels,
    differentiable,
    exponential,
    exponential_,
    gradient_in_forward,
    row_losses,
    row_max,
)


class TopK(NamedTuple):
    tail: str
    temperature: float

    def __call__(
        self,
        student: Tensor,  # (n, V)
        student_max: Tensor,  # (n, 1)
        target: Target,  # log-probabilities (n, k) and indices (n, k)
        weight: float,
        out: Tensor | None,  # (n, V)
        work: Sequence[Tensor],
    ) -> Tensor:  # (n, 1)
        logprobs, indices = target
        a, b, *_ = work
        teacher_p, teacher_rest = self.teacher(logprobs, student.shape[1])
        x = torch.sub(student, student_max, out=a)
        e = exponential(x, b, self.temperature)
        e_sum = e.sum(-1, keepdim=True)
        log_sum = e_sum.log()
        loss = -_expectation(teacher_p, x.gather(1, indices) / self.temperature - log_sum)
        slope = weight / self.temperature
        if self.tail == "bucket":
            x.scatter_(1, indices, -math.inf)
            rest_max = row_max(x).clamp_(min=torch.finfo(x.dtype).min)  # no class remains: a number to subtract
            rest_e = exponential_(x.sub_(rest_max), self.temperature)
            rest_sum = rest_e.sum(-1, keepdim=True)
            loss -= _expectation(teacher_rest, rest_max / self.temperature + rest_sum.log() - log_sum)
            teacher_rest = teacher_rest.where(rest_sum > 0, 0)  # a class that cannot be has no gradient
        if out is not None:
            mass = teacher_p.sum(-1, keepdim=True) + teacher_rest
            torch.mul(e, slope * mass / e_sum, out=out)
            out.scatter_add_(1, indices, teacher_p * -slope)
            if self.tail == "bucket":
                out -= rest_e.mul_(slope * teacher_rest / rest_sum.where(rest_sum > 0, 1))
        return loss.mul_(weight)

    def teacher(self, logprobs: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Probabilities of the listed classes (n, k) and of the rest (n, 1)."""
        nothing = logprobs.new_zeros(logprobs.shape[0], 1)
        if self.tail == "renormalize":
            return torch.softmax(logprobs / self.temperature, -1), nothing
        if logprobs.shape[1] == classes:  # none remains: a difference from 1 is rounding
            return logprobs.exp(), nothing
        p = logprobs.to(_common.widest_dtype(logprobs)).exp()  # a remaining mass of 1e-6 is a difference of ones
        return p.to(logprobs.dtype), (1 - p.sum(-1, keepdim=True)).clamp(min=0).to(logprobs.dtype)


def _expectation(p: Tensor, value: Tensor) -> Tensor:  # (n, k), (n, k) -> (n, 1)
    """sum p * value, 0 times anything being 0."""
    return (p * value).masked_fill_(p == 0, 0).sum(-1, keepdim=True)


def topk_divergence(
    student: Tensor,  # (*, >= V)
    logprobs: Tensor,  # (*, k)
    indices: Tensor,  # (*, k)
    tail: str,
    *,
    counted: Tensor | None,  # (*)
    labels: Tensor | None,  # (*)
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    vocab_size: int | None,
    student_softcap: float | None,
    row_gradient: Tensor | None,  # (), what each row's loss is expected to be weighed by
    backend: str,
) -> Tensor:  # (*)
    loss, _ = _topk_divergence(
        student if student.dim() > 1 else student.unsqueeze(0),
        logprobs.reshape(-1, logprobs.shape[-1]),
        indices.reshape(-1, indices.shape[-1]),
        labels.reshape(-1) if labels is not None and hard_weight else None,
        None if counted is None else counted.reshape(-1),
        *gradient_in_forward(student, row_gradient, backend),
        tail,
        temperature,
        soft_weight,
        hard_weight,
        student.shape[-1] if vocab_size is None else vocab_size,
        student_softcap,
        backend,
    )
    return loss if student.dim() == 2 else loss.view(student.shape[:-1])


def _forward(
    student: Tensor,  # (*, >= V)
    logprobs: Tensor,  # (N, k)
    indices: Tensor,  # (N, k)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    weight: Tensor | None,  # (N), of each row's gradient; None: 1
    needs_gradient: bool,
    tail: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # loss (N), its gradient as student, or empty
    dtype = _common.compute_dtype(student, logprobs)
    if backend == "triton":
        loss, d_student = _fake(student, logprobs, indices, labels, counted, weight, needs_gradient)
        _launch(
            loss, d_student if needs_gradient else None, None, student, logprobs, indices, labels, counted, weight,
            tail, temperature, soft_weight, hard_weight, classes, student_softcap,
        )  # fmt: skip
        return loss, d_student
    return row_losses(
        RowLoss(TopK(tail, temperature), soft_weight, hard_weight, student_softcap),
        student, None, listed(logprobs, indices, counted, classes, dtype) if soft_weight else (), labels, counted,
        weight, needs_gradient, classes, None, dtype,
    )  # fmt: skip


def _update(gradient: Tensor, expected: Tensor, student: Tensor, logprobs: Tensor, *rest: Any) -> None:
    loss, _ = _fake(student, logprobs, None, None, None, None, False)
    _launch(loss, gradient, expected, student, logprobs, *rest[:-1])


def _launch(
    loss: Tensor,  # (N)
    gradient: Tensor | None,  # as student
    expected: Tensor | None,  # (N), the weights it has
    student: Tensor,
    logprobs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    counted: Tensor | None,
    weight: Tensor | None,
    tail: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,
    student_softcap: float | None,
) -> None:
    from fastdistill.kernels import topk as kernels

    target = sorted_list(logprobs, indices, counted, classes, loss.dtype, tail, temperature) if soft_weight else None
    labels = checked_labels(labels, counted, classes)
    # A mask like m[:, :1] and the gradient of a sum have strides of their own.
    labels, counted, weight, expected = (
        None if x is None else x.contiguous() for x in (labels, counted, weight, expected)
    )
    kernels.rows(
        student, target, labels, counted, classes=classes, temperature=temperature, soft_weight=soft_weight,
        hard_weight=hard_weight, softcap=student_softcap, loss=loss, gradient=gradient, weight=weight,
        expected=expected,
    )  # fmt: skip


def listed(
    logprobs: Tensor, indices: Tensor, counted: Tensor | None, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The teacher's classes as the row loss takes them; rows that do not count may hold anything."""
    logprobs = logprobs.to(dtype)
    if counted is not None:
        logprobs = logprobs.where(counted.unsqueeze(-1), 0)
    return logprobs, checked_indices("topk_indices", indices, counted, classes)


def sorted_list(
    logprobs: Tensor,
    indices: Tensor,
    counted: Tensor | None,
    classes: int,
    dtype: torch.dtype,
    tail: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The teacher's classes as the kernel takes them: probabilities and classes in ascending order (N, k), and the
    probability of the rest (N) where the tail is a class."""
    logprobs, indices = listed(logprobs, indices, counted, classes, dtype)
    p, rest = TopK(tail, temperature).teacher(logprobs, classes)
    indices, order = indices.sort(-1)
    return p.gather(-1, order), indices, rest[:, 0].contiguous() if tail == "bucket" else None


def _fake(student, logprobs, indices, labels, counted, weight, needs_gradient, *_):  # type: ignore[no-untyped-def]
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=_common.compute_dtype(student, logprobs))
    return loss, student.new_empty(student.shape if needs_gradient else 0)


_topk_divergence = differentiable("topk_divergence", _forward, _update, _fake, tensors=5)
