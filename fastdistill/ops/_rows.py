"""What the losses over classes share: blocks of rows, the cross-entropy with labels, and the loops over blocks.

A row's loss is soft_weight * soft + hard_weight * hard. The soft part compares the student's softmax with a target
(logits.py: the teacher's logits; topk.py: its k most likely classes), the hard part is the cross-entropy with a label.
Both are computed on blocks of rows that stay in the cache, in the wide dtype, with numbers kept for each row by the
forward so that the backward need only run the elementwise half again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOG2E = math.log2(math.e)

# Elements of a block. On the CPU its buffers stay in the cache; on a GPU, launches weigh more than memory.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 24

BUFFERS = 4  # scratch of the soft losses, each of a block's size

Target = tuple[Tensor, ...]  # what the soft loss compares a block with, (n, .) each; () where it has no weight


class SoftLoss(Protocol):
    """A loss of rows of logits (n, V), as they are after the softcap, in the dtype of the computation."""

    @property
    def statistics(self) -> int:
        """How many numbers of each row the gradient needs from the loss."""

    def loss(
        self,
        student: Tensor,  # (n, V)
        student_max: Tensor,  # (n, 1)
        target: Target,
        statistics: Sequence[Tensor],  # (n, 1) each, written
        work: Tensor,  # (BUFFERS, n, V), scratch
    ) -> Tensor: ...  # (n, 1)

    def gradient(
        self,
        student: Tensor,  # (n, V)
        student_max: Tensor,  # (n, 1)
        target: Target,
        statistics: Sequence[Tensor],  # (n, 1) each, from `loss`
        weight: Tensor,  # (n, 1), factor of each row's loss
        out: Tensor,  # (n, V) of any layout, may be `student`
        work: Tensor,  # (BUFFERS - 1, n, V), scratch
    ) -> None: ...


class RowLoss(NamedTuple):
    soft: SoftLoss
    soft_weight: float
    hard_weight: float
    softcap: float | None  # the student's

    @property
    def statistics(self) -> int:
        return 2 + self.soft.statistics

    def loss(
        self,
        student: Tensor,  # (n, V)
        target: Target,
        labels: Tensor | None,  # (n, 1)
        statistics: Tensor,  # (statistics, n), written
        work: Tensor,  # (BUFFERS, n, V)
    ) -> Tensor:  # (n)
        student_max, hard_sum, *soft_statistics = statistics.unsqueeze(-1).unbind()
        row_max(student, student_max)
        loss = None
        if target:
            loss = self.soft.loss(student, student_max, target, soft_statistics, work) * self.soft_weight
        if labels is not None:
            hard_e = exponential_(torch.sub(student, student_max, out=work[0]))
            torch.sum(hard_e, -1, keepdim=True, out=hard_sum)
            hard = (hard_sum.log() + (student_max - student.gather(1, labels))) * self.hard_weight
            loss = hard if loss is None else loss + hard
        return torch.zeros_like(student_max[:, 0]) if loss is None else loss[:, 0]

    def gradient(
        self,
        student: Tensor,  # (n, V), overwritten where there is a softcap
        target: Target,
        labels: Tensor | None,  # (n, 1)
        counted: Tensor | None,  # (n)
        statistics: Tensor,  # (statistics, n), from `loss`
        weight: Tensor,  # (n, 1), factor of each row's loss, 0 where it does not count
        infinite: bool,  # whether a row's loss may be
        out: Tensor,  # (n, V) of any layout; may be `student` where there is no softcap
        work: Tensor,  # (BUFFERS, n, V)
    ) -> None:
        student_max, hard_sum, *soft_statistics = statistics.unsqueeze(-1).unbind()
        impossible = student == -math.inf if infinite else None
        hard = None
        if labels is not None:
            hard_weight = weight * self.hard_weight
            hard = exponential_(torch.sub(student, student_max, out=work[-1])).mul_(hard_weight / hard_sum)
            hard.scatter_add_(1, labels, -hard_weight)
        if target:
            soft_weight = weight * self.soft_weight
            self.soft.gradient(student, student_max, target, soft_statistics, soft_weight, out, work[:-1])
            if hard is not None:
                out += hard
        elif hard is not None:
            out.copy_(hard)
        else:
            out.zero_()
        if self.softcap is not None:
            uncap_(out, student, self.softcap)
        # A class of probability 0 that the target or the label asks for: the loss is infinite, its own gradient 0.
        if impossible is not None:
            out.masked_fill_(impossible, 0)
        if counted is not None and may_be_infinite(out):
            out.masked_fill_(~counted.unsqueeze(-1), 0)


def exponential(x: Tensor, out: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(x / T); `out` may be x."""
    if x.dtype == torch.float64:
        return torch.div(x, temperature, out=out).exp_()
    # ATen's exp2 is one vector loop, several times faster than its exp and softmax, and as accurate.
    return torch.mul(x, LOG2E / temperature, out=out).exp2_()


def exponential_(x: Tensor, temperature: float = 1.0) -> Tensor:
    return exponential(x, x, temperature)


def row_max(logits: Tensor, out: Tensor) -> None:  # (n, V) -> (n, 1)
    torch.amax(logits, -1, keepdim=True, out=out)


def weigh_(value: Tensor, weight: Tensor) -> Tensor:  # (n, V), (n, V) -> (n, 1)
    """value *= weight, 0 times anything being 0; returns the sums of the rows."""
    total = value.mul_(weight).sum(-1, keepdim=True)
    if may_be_infinite(total):
        total = value.masked_fill_(weight == 0, 0).sum(-1, keepdim=True)
    return total


def may_be_infinite(x: Tensor) -> bool:
    """Whether x may hold inf or NaN. A device is not waited for: there it always may."""
    return x.device.type != "cpu" or not math.isfinite(x.sum())


def capped(logits: Tensor, softcap: float | None, dtype: torch.dtype, buffer: Tensor) -> Tensor:
    """Logits as the losses see them: wide, softcapped, -inf kept. In `buffer`, or as they are where they are that."""
    if softcap is None:
        return logits if logits.dtype == dtype and logits.stride(-1) == 1 else buffer.copy_(logits)
    impossible = logits == -math.inf
    return buffer.copy_(logits).div_(softcap).tanh_().mul_(softcap).masked_fill_(impossible, -math.inf)


def uncap_(gradient: Tensor, logits: Tensor, softcap: float) -> None:
    """gradient *= 1 - tanh^2, of capped logits, which are overwritten."""
    tanh_squared = logits.div_(softcap).square_().clamp_(max=1)  # a logit kept at -inf has slope 0
    gradient.addcmul_(gradient, tanh_squared, value=-1)


def row_blocks(shape: Sequence[int], limit: int, first: int = 0) -> Iterator[tuple[tuple[int | slice, ...], slice]]:
    """Cuts rows that lie in dimensions of `shape` into blocks of at most about `limit` consecutive ones.

    Yields a block's index in those dimensions and the numbers of its rows. Logits like x[:, :-1] cannot be flattened
    without copying them all; a block of them can.
    """
    outer, inner = shape[0], math.prod(shape[1:])
    if inner > limit:
        for i in range(outer):
            for index, rows in row_blocks(shape[1:], limit, first + i * inner):
                yield (i, *index), rows
    elif outer and inner:
        step = -(-outer // -(-outer * inner // limit))
        for start in range(0, outer, step):
            stop = min(start + step, outer)
            yield (slice(start, stop),), slice(first + start * inner, first + stop * inner)


def rows_of_a_block(rows: int, classes: int, device: torch.device) -> int:
    if device.type != "cpu":
        limit = GPU_BLOCK // classes
    else:  # a row of its own for each thread at least
        threads = torch.get_num_threads()
        limit = max(max(CPU_BLOCK, CPU_BLOCK // 2 * threads) // classes, threads)
    return max(min(rows, limit), 1)


def checked_indices(name: str, indices: Tensor, counted: Tensor | None, classes: int) -> Tensor:
    """Class numbers (N, k) as the ops index with: long, 0 where the row does not count.

    Raises IndexError where they are outside the classes, if that can be known without waiting for a device.
    """
    indices = indices.long()
    if counted is not None:
        indices = indices.where(counted.unsqueeze(-1), 0)
    if indices.device.type == "cpu" and indices.numel():
        for extreme in indices.aminmax():
            if not 0 <= extreme < classes:
                raise IndexError(f"{name} holds {int(extreme)}; it should hold classes, 0 to {classes - 1}")
    return indices


def checked_labels(labels: Tensor | None, counted: Tensor | None, classes: int) -> Tensor | None:  # (N) -> (N, 1)
    return None if labels is None else checked_indices("labels", labels.unsqueeze(-1), counted, classes)


# -- loops over blocks ---------------------------------------------------------------------------------------

# Of a block, by its index in the leading dimensions and the numbers of its rows, with a buffer to build it in.
TargetOf = Callable[[tuple[int | slice, ...], slice, Tensor], Target]


def forward(
    row_loss: RowLoss,
    student: Tensor,  # (*, >= V)
    target_of: TargetOf,
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    classes: int,  # V
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # loss (N), statistics (statistics, N)
    shape = student.shape[:-1]
    labels = checked_labels(labels, counted, classes)
    loss = student.new_empty(math.prod(shape), dtype=dtype)
    statistics = loss.new_zeros(row_loss.statistics, loss.numel())
    limit = rows_of_a_block(loss.numel(), classes, student.device)
    work = loss.new_empty(BUFFERS + 2, limit, classes)
    for index, rows in row_blocks(shape, limit):
        student_buffer, target_buffer, *_ = buffers = work[:, : rows.stop - rows.start]
        block = capped(rows_at(student, index, classes), row_loss.softcap, dtype, student_buffer)
        target = target_of(index, rows, target_buffer)
        loss[rows] = row_loss.loss(block, target, at(labels, rows), statistics[:, rows], buffers[2:])
    if counted is not None:
        loss.masked_fill_(~counted, 0)
    return loss, statistics


def backward(
    row_loss: RowLoss,
    grad_loss: Tensor,  # (N)
    loss: Tensor,  # (N)
    statistics: Tensor,  # (statistics, N)
    student: Tensor,  # (*, >= V)
    target_of: TargetOf,
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    classes: int,  # V
) -> Tensor:  # as student
    shape, dtype = student.shape[:-1], loss.dtype
    labels = checked_labels(labels, counted, classes)
    d_student = student.new_empty(student.shape)
    d_rows = d_student.view(-1, student.shape[-1])
    weight = (grad_loss if counted is None else grad_loss.masked_fill(~counted, 0)).unsqueeze(-1)  # (N, 1)
    infinite = may_be_infinite(loss)
    limit = rows_of_a_block(loss.numel(), classes, student.device)
    work = loss.new_empty(BUFFERS + 3, limit, classes)
    for index, rows in row_blocks(shape, limit):
        student_buffer, target_buffer, wide_buffer, *_ = buffers = work[:, : rows.stop - rows.start]
        block = capped(rows_at(student, index, classes), row_loss.softcap, dtype, student_buffer)
        target = target_of(index, rows, target_buffer)
        gradient = d_rows[rows, :classes]
        wide = gradient if gradient.dtype == dtype else wide_buffer
        row_loss.gradient(
            block, target, at(labels, rows), at(counted, rows), statistics[:, rows], weight[rows], infinite, wide,
            buffers[3:],
        )  # fmt: skip
        if wide is not gradient:
            gradient.copy_(wide)
        d_rows[rows, classes:] = 0
    return d_student


def rows_at(logits: Tensor, index: tuple[int | slice, ...], classes: int) -> Tensor:  # (*, >= V) -> (n, V)
    return logits[index][..., :classes].reshape(-1, classes)


def at(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
