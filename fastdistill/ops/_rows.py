"""What the losses over classes share: blocks of rows, the cross-entropy with labels, and the loop over blocks.

A row's loss is soft_weight * soft + hard_weight * hard. The soft part compares the student's softmax with a target
(logits.py: the teacher's logits; topk.py: its k most likely classes), the hard part is the cross-entropy with a label.
Both are computed on blocks of rows that stay in the cache, and with a row's loss comes its gradient, since all it needs
is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistill.ops import _common

LOG2E = math.log2(math.e)

# Bytes of a block's buffers. On the CPU they stay in the cache; on a GPU launches weigh more than memory.
CPU_BYTES, GPU_BYTES = 5 << 20, 1 << 28

BUFFERS = 4  # scratch of a block
SHORT = 32  # rows of fewer classes are short

Index = tuple[int | slice, ...]
Target = tuple[Tensor, ...]  # what the soft loss compares a block with, (n, .) each; () where it has no weight


class SoftLoss(Protocol):
    def __call__(
        self,
        student: Tensor,  # (n, V), logits as they are after the softcap, in the dtype of the computation
        student_max: Tensor,  # (n, 1)
        target: Target,
        weight: float,
        out: Tensor | None,  # (n, V), for the gradient of weight * loss in student; None: not wanted
        work: Sequence[Tensor],  # BUFFERS of (n, V), scratch
    ) -> Tensor:  # weight * loss, (n, 1)
        ...


class RowLoss(NamedTuple):
    soft: SoftLoss
    soft_weight: float
    hard_weight: float
    softcap: float | None  # the student's

    def __call__(
        self,
        student: Tensor,  # (n, V), capped; overwritten where there is a softcap
        target: Target,
        labels: Tensor | None,  # (n, 1)
        out: Tensor | None,  # (n, V), for the gradient of each row's loss in its logits before the softcap
        work: Sequence[Tensor],  # BUFFERS of (n, V), scratch
    ) -> Tensor:  # (n)
        student_max = row_max(student)
        if target:
            loss = self.soft(student, student_max, target, self.soft_weight, out, work)
        else:
            loss = torch.zeros_like(student_max)
            if out is not None:
                out.zero_()
        if labels is not None:
            hard = exponential_(torch.sub(student, student_max, out=work[0]))
            hard_sum = hard.sum(-1, keepdim=True)
            loss += (hard_sum.log() + (student_max - student.gather(1, labels))) * self.hard_weight
            if out is not None:
                out += hard.mul_(self.hard_weight / hard_sum)
                out.scatter_add_(1, labels, torch.full_like(hard_sum, -self.hard_weight))
        if out is not None:
            # A class of probability 0 that the target or the label asks for: the loss is infinite, its own gradient 0.
            if may_be_infinite(loss):
                out.masked_fill_(student == -math.inf, 0)
            if self.softcap is not None:
                tanh_squared = student.div_(self.softcap).square_().clamp_(max=1)  # slope 0 where -inf was kept
                out *= tanh_squared.neg_().add_(1)
        return loss[:, 0]


def exponential(x: Tensor, out: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(x / T); `out` may be x."""
    if x.dtype == torch.float64:
        return torch.div(x, temperature, out=out).exp_()
    # ATen's exp2 is one vector loop, several times faster than its exp and softmax, and as accurate.
    return torch.mul(x, LOG2E / temperature, out=out).exp2_()


def exponents_(x: Tensor, temperature: float) -> float:
    """x / T in place, in the units whose `power` is its exponential; returns what a unit is."""
    if x.dtype == torch.float64:
        x /= temperature
        return 1.0
    x *= LOG2E / temperature
    return 1 / LOG2E


def power(exponents: Tensor, out: Tensor) -> Tensor:
    return torch.exp(exponents, out=out) if out.dtype == torch.float64 else torch.exp2(exponents, out=out)


def exponential_(x: Tensor, temperature: float = 1.0) -> Tensor:
    return exponential(x, x, temperature)


def weigh_(value: Tensor, weight: Tensor) -> Tensor:  # (n, V), (n, V) -> (n, 1)
    """value *= weight, 0 times anything being 0; returns the sums of the rows."""
    total = value.mul_(weight).sum(-1, keepdim=True)
    if may_be_infinite(total):
        total = value.masked_fill_(weight == 0, 0).sum(-1, keepdim=True)
    return total


def may_be_infinite(x: Tensor) -> bool:
    """Whether x may hold inf or NaN. A device is not waited for: there it always may."""
    return x.device.type != "cpu" or not math.isfinite(x.sum())


def row_max(logits: Tensor) -> Tensor:  # (n, V) -> (n, 1)
    classes = logits.shape[1]
    whole = classes - classes % 32
    if whole == classes or not 32 < classes < 1024:
        return logits.amax(-1, keepdim=True)
    # On the CPU, amax takes what is left beyond a multiple of 32 one by one: of a short row, most of its time.
    return torch.maximum(logits[:, :whole].amax(-1, keepdim=True), logits[:, -32:].amax(-1, keepdim=True))


def capped(logits: Tensor, softcap: float | None, buffer: Tensor | None) -> Tensor:
    """Logits as the losses see them: wide, softcapped, -inf kept. In `buffer`; None: they are that already."""
    if buffer is None:
        return logits
    if softcap is None:
        return buffer.copy_(logits)
    impossible = logits == -math.inf
    return buffer.copy_(logits).div_(softcap).tanh_().mul_(softcap).masked_fill_(impossible, -math.inf)


def row_blocks(shape: Sequence[int], limit: int, first: int = 0) -> Iterator[tuple[Index, slice]]:
    """Cuts rows that lie in dimensions of `shape` into blocks of at most `limit` consecutive ones.

    Yields a block's index in those dimensions and the numbers of its rows. Logits like x[:, :-1] cannot be flattened
    without copying them all; a block of them can.
    """
    outer, inner = shape[0], math.prod(shape[1:])
    if inner > limit:
        for i in range(outer):
            for index, rows in row_blocks(shape[1:], limit, first + i * inner):
                yield (i, *index), rows
    elif outer and inner:
        blocks = -(-outer // (limit // inner))
        step = -(-outer // blocks)  # even blocks
        for start in range(0, outer, step):
            stop = min(start + step, outer)
            yield (slice(start, stop),), slice(first + start * inner, first + stop * inner)


def rows_of_a_block(rows: int, classes: int, buffers: int, like: Tensor) -> int:
    """As many as `buffers` buffers like `like` have room for, four and one for each thread at least."""
    limit, least = GPU_BYTES, 4
    if like.device.type == "cpu":
        threads = torch.get_num_threads()
        limit, least = CPU_BYTES * max(threads // 2, 1), max(threads, 4)
    return max(min(rows, max(limit // (buffers * classes * like.itemsize), least)), 1)


def rows_at(logits: Tensor, index: Index, classes: int) -> Tensor:  # (*, >= V) -> (n, V)
    block = logits[index]
    if block.shape[-1] != classes:
        block = block[..., :classes]
    return block if block.dim() == 2 else block.reshape(-1, classes)


def at(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


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


def checked_labels(labels: Tensor | None, counted: Tensor | None, classes: int) -> Tensor | None:  # (N)
    return None if labels is None else checked_indices("labels", labels.unsqueeze(-1), counted, classes)[:, 0]


def row_losses(
    row_loss: RowLoss,
    student: Tensor,  # (*, >= V)
    teacher: Tensor | None,  # (*, >= V), the target, or
    listed: Target,  # the target, (N, .) each
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    weight: Tensor | None,  # (N), of each row's gradient; None: 1
    needs_gradient: bool,
    classes: int,  # V
    teacher_softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # loss (N), gradient as student, or empty
    if labels is not None:
        labels = checked_indices("labels", labels.unsqueeze(-1), counted, classes)
    weight = row_weight(weight, counted, dtype)
    loss = student.new_empty(math.prod(student.shape[:-1]), dtype=dtype)
    d_student = student.new_empty(student.shape if needs_gradient else 0)
    d_rows = d_student.view(-1, student.shape[-1])
    # Short rows are worked on in columns, which vectorises every step; that, too, takes copies.
    short = classes < SHORT
    copies = short or any(
        x is not None and (softcap is not None or x.dtype != dtype or x.stride(-1) != 1)
        for x, softcap in ((student, row_loss.softcap), (teacher, teacher_softcap))
    )
    count = BUFFERS + 3 * copies
    limit = rows_of_a_block(loss.numel(), classes, count, loss)
    memory = loss.new_empty(count, classes, limit).mT if short else loss.new_empty(count, limit, classes)
    whole = memory.unbind()
    student_buffer = teacher_buffer = wide = None
    for index, rows in row_blocks(student.shape[:-1], limit):
        size = rows.stop - rows.start
        work = whole if size == limit else [buffer[:size] for buffer in whole]
        if copies:
            *work, student_buffer, teacher_buffer, wide = work
        block = capped(rows_at(student, index, classes), row_loss.softcap, student_buffer)
        if teacher is None:
            target = tuple(x[rows] for x in listed)
        else:
            target = (capped(rows_at(teacher, index, classes), teacher_softcap, teacher_buffer),)
        gradient = rows_at(d_rows, (rows,), classes) if needs_gradient else None
        out = gradient if wide is None or gradient is None else wide
        loss[rows] = row_loss(block, target, at(labels, rows), out, work)
        if gradient is not None and out is not None:
            if weight is not None:
                weigh_rows_(out, weight[rows], at(counted, rows))
            if out is not gradient:
                gradient.copy_(out)
    if counted is not None:
        loss.masked_fill_(~counted, 0)
    if needs_gradient and classes < student.shape[-1]:
        d_rows[:, classes:] = 0
    return loss, d_student


def row_weight(weight: Tensor | None, counted: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # (N) -> (N, 1)
    """What the gradients of rows are multiplied by: 0 where one does not count; None: all by 1."""
    if counted is None:
        return None if weight is None else weight.unsqueeze(-1)
    weight = counted.to(dtype) if weight is None else weight.masked_fill(~counted, 0)
    return weight.unsqueeze(-1)


def weigh_rows_(gradient: Tensor, weight: Tensor, counted: Tensor | None) -> None:  # (n, V), (n, 1), (n)
    """gradient *= weight, 0 where a row does not count, whatever it holds."""
    gradient *= weight
    if counted is not None and may_be_infinite(gradient):
        gradient.masked_fill_(~counted.unsqueeze(-1), 0)


# -- registration --------------------------------------------------------------------------------------------


def differentiable(
    name: str,
    function: Callable[..., tuple[Tensor, Tensor]],
    update: Callable[..., None],
    fake: Callable[..., Any],
    tensors: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`function` with its gradient in the first argument, the student's logits.

    Its arguments are `tensors` tensors, the last of them `counted`, then the weight of each row's gradient, whether the
    gradient is wanted, and options, the last of them the backend; it returns the losses and the gradient.

    Whoever traces sees one registered op, fastdistill::name, and the same op again in the backward. Everybody else is
    spared a registered op's tens of microseconds, and the second run: the forward leaves the gradient of the weights it
    was given, and the first backward corrects it in place to those that arrive. (A second backward of the same graph
    runs the function again.) Plain torch scales it. `update` is Triton's: it is given the gradient, the weights it has,
    and what `function` takes, and scales or computes again the rows whose weight is another, which on a device only a
    kernel can tell without waiting. Of N rows of V 16-bit numbers, forward and backward read and write 6 N V bytes if
    the weights are right, 10 if they are a power of 2 times as large, else 12; computed in the backward alone, 10.
    """

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, ctx.gradient = output
        if not inputs[tensors + 1]:
            ctx.gradient = None
        ctx.weight = inputs[tensors]
        ctx.options = inputs[tensors + 2 :]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])

    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward(name)
        nothing = (None,) * (tensors + 1 + len(ctx.options))
        gradient, ctx.gradient = ctx.gradient, None
        if grad_loss is None:
            return None, *nothing
        inputs = ctx.saved_tensors
        if gradient is None:
            run = op if _common.traced() else function
            _, gradient = run(*inputs, grad_loss, True, *ctx.options)
        elif ctx.options[-1] in ("triton", "cuda"):
            update(gradient, ctx.weight, *inputs, grad_loss, *ctx.options)
        elif ctx.weight is None or not torch.equal(grad_loss, ctx.weight):
            grad_loss = grad_loss if ctx.weight is None else grad_loss / ctx.weight
            gradient.view(-1, gradient.shape[-1]).mul_(row_weight(grad_loss, inputs[-1], grad_loss.dtype))
        return gradient, *nothing

    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    op = torch.library.custom_op(f"fastdistill::{name}", function, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    plain: Any = type(name, (torch.autograd.Function,), methods)
    return lambda *arguments: (op if _common.traced() else plain.apply)(*arguments)


def gradient_in_forward(student: Tensor, row_gradient: Tensor | None, backend: str) -> tuple[Tensor | None, bool]:
    """The weights (N) to compute the gradient with in the forward, None: all 1, and whether the forward leaves one.

    One of 16 bits that is scaled is rounded twice, so it waits for its weights. Triton's is not scaled but computed
    again where they were not expected, and waits only if nothing is known of them.
    """
    if _common.traced() or not (torch.is_grad_enabled() and student.requires_grad):
        return None, False
    if row_gradient is None if backend in ("triton", "cuda") else _common.narrow(student):
        return None, False
    return None if row_gradient is None else row_gradient.expand(student.shape[:-1].numel()), True
