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
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _common, _rows
from fastdistill.ops._rows import RowLoss, Target, TargetOf, exponential, exponential_, row_max


class TopK(NamedTuple):
    tail: str
    temperature: float

    @property
    def statistics(self) -> int:
        return 3  # Z, and max and sum exp of the classes not listed

    def loss(
        self, student: Tensor, student_max: Tensor, target: Target, statistics: Sequence[Tensor], work: Tensor
    ) -> Tensor:
        logprobs, indices = target  # (n, k)
        student_sum, rest_max, rest_sum = statistics
        x, e, *_ = work.unbind()
        torch.sub(student, student_max, out=x)
        torch.sum(exponential(x, e, self.temperature), -1, keepdim=True, out=student_sum)
        log_sum = student_sum.log()
        student_logp = x.gather(1, indices) / self.temperature - log_sum  # (n, k)
        teacher_p, teacher_rest = self._teacher(logprobs, student.shape[1])
        loss = -_expectation(teacher_p, student_logp)
        if self.tail == "bucket":
            self._only_rest_(x, indices)
            row_max(x, rest_max)
            rest_max.clamp_(min=torch.finfo(x.dtype).min)  # -inf where every class is listed: no difference to it
            torch.sum(exponential_(torch.sub(x, rest_max, out=e), self.temperature), -1, keepdim=True, out=rest_sum)
            loss -= _expectation(teacher_rest, rest_max / self.temperature + rest_sum.log() - log_sum)
        return loss

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
        logprobs, indices = target  # (n, k)
        student_sum, rest_max, rest_sum = statistics
        weight = weight / self.temperature
        teacher_p, teacher_rest = self._teacher(logprobs, student.shape[1])
        rest = None
        if self.tail == "bucket":
            rest = torch.sub(student, student_max, out=work[0])
            self._only_rest_(rest, indices)
            possible = rest_sum > 0  # else every class is listed, or impossible
            teacher_rest = teacher_rest.where(possible, 0)
            share = weight * teacher_rest / rest_sum.where(possible, 1)
            exponential_(rest.sub_(rest_max), self.temperature).mul_(share)
        mass = teacher_p.sum(-1, keepdim=True) + teacher_rest
        exponential_(torch.sub(student, student_max, out=out), self.temperature).mul_(weight * mass / student_sum)
        out.scatter_add_(1, indices, -weight * teacher_p)
        if rest is not None:
            out -= rest

    def _teacher(self, logprobs: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Probabilities of the listed classes (n, k) and of the rest (n, 1)."""
        nothing = logprobs.new_zeros(logprobs.shape[0], 1)
        if self.tail == "renormalize":
            return torch.softmax(logprobs / self.temperature, -1), nothing
        if logprobs.shape[1] == classes:  # none remains: a difference from 1 is rounding
            return logprobs.exp(), nothing
        p = logprobs.to(_common.widest_dtype(logprobs)).exp()  # a remaining mass of 1e-6 is a difference of ones
        return p.to(logprobs.dtype), (1 - p.sum(-1, keepdim=True)).clamp(min=0).to(logprobs.dtype)

    @staticmethod
    def _only_rest_(x: Tensor, indices: Tensor) -> None:
        x.scatter_(1, indices, -math.inf)


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
) -> Tensor:  # (*)
    loss, _ = _topk_divergence(
        student if student.dim() > 1 else student.unsqueeze(0),
        logprobs.reshape(-1, logprobs.shape[-1]),
        indices.reshape(-1, indices.shape[-1]),
        labels.reshape(-1) if labels is not None and hard_weight else None,
        None if counted is None else counted.reshape(-1),
        tail,
        temperature,
        soft_weight,
        hard_weight,
        student.shape[-1] if vocab_size is None else vocab_size,
        student_softcap,
    )
    return loss.view(student.shape[:-1])


def _forward(
    student: Tensor,  # (*, >= V)
    logprobs: Tensor,  # (N, k)
    indices: Tensor,  # (N, k)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    tail: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
) -> tuple[Tensor, Tensor]:  # loss (N), statistics (., N)
    dtype = _common.compute_dtype(student, logprobs)
    row_loss = RowLoss(TopK(tail, temperature), soft_weight, hard_weight, student_softcap)
    target_of = _target_of(*listed(logprobs, indices, counted, classes, dtype), soft_weight)
    return _rows.forward(row_loss, student, target_of, labels, counted, classes, dtype)


def _gradient(
    grad_loss: Tensor,  # (N)
    loss: Tensor,  # (N)
    statistics: Tensor,  # (., N)
    student: Tensor,  # (*, >= V)
    logprobs: Tensor,  # (N, k)
    indices: Tensor,  # (N, k)
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    tail: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    classes: int,  # V
    student_softcap: float | None,
) -> Tensor:  # as student
    row_loss = RowLoss(TopK(tail, temperature), soft_weight, hard_weight, student_softcap)
    target_of = _target_of(*listed(logprobs, indices, counted, classes, loss.dtype), soft_weight)
    return _rows.backward(row_loss, grad_loss, loss, statistics, student, target_of, labels, counted, classes)


def listed(
    logprobs: Tensor, indices: Tensor, counted: Tensor | None, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The teacher's classes as the row loss takes them; rows that do not count may hold anything."""
    logprobs = logprobs.to(dtype)
    if counted is not None:
        logprobs = logprobs.where(counted.unsqueeze(-1), 0)
    return logprobs, _rows.checked_indices("topk_indices", indices, counted, classes)


def _target_of(logprobs: Tensor, indices: Tensor, soft_weight: float) -> TargetOf:
    def target_of(index: tuple[int | slice, ...], rows: slice, buffer: Tensor) -> Target:
        return (logprobs[rows], indices[rows]) if soft_weight else ()

    return target_of


def _fake_forward(student, logprobs, indices, labels, counted, tail, temperature, *_):  # type: ignore[no-untyped-def]
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=_common.compute_dtype(student, logprobs))
    return loss, loss.new_empty(RowLoss(TopK(tail, temperature), 1, 0, None).statistics, loss.shape[0])


def _fake_gradient(grad_loss, loss, statistics, student, *_):  # type: ignore[no-untyped-def]
    return student.new_empty(student.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.tail, ctx.temperature, ctx.soft_weight, ctx.hard_weight, ctx.classes, ctx.softcap = inputs
    loss, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(loss, statistics, *tensors)


def _backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("topk_soft_cross_entropy")
    options = (ctx.tail, ctx.temperature, ctx.soft_weight, ctx.hard_weight, ctx.classes, ctx.softcap)
    d_student = None if grad_loss is None else _topk_divergence_backward(grad_loss, *ctx.saved_tensors, *options)
    return d_student, *(None,) * 10


_topk_divergence_backward = _common.operator("topk_divergence_backward", _gradient, _fake_gradient)
_topk_divergence = _common.differentiable("topk_divergence", _forward, _fake_forward, _setup_context, _backward)
