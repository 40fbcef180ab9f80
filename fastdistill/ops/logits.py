"""The losses over classes from the student's logits, one loss a row: the op, its autograd, its portable implementation.

The teacher is its logits, or a list of its most likely classes. The gradient is the only tensor of the logits' size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _common, _rows
from ._divergence import divergence
from ._rows import BUFFERS, SHORT, RowOptions, Target, at, capped, checked_labels
from ._topk import kernel_list, listed, topk_divergence


class Inputs(NamedTuple):
    student: Tensor  # (*, >= V)
    teacher: Tensor  # logits (*, >= V), or with `indices` log-probabilities (N, k)
    indices: Tensor | None  # (N, k)
    labels: Tensor | None  # (N)
    counted: Tensor | None  # (N)
    weight: Tensor | None  # (N), of each row's gradient; None: 1


INPUTS = len(Inputs._fields)


def loss_over_classes(
    student: Tensor,  # (*, >= V)
    teacher: Tensor,  # logits (*, >= V), or with `indices` log-probabilities (*, k)
    indices: Tensor | None,  # (*, k)
    labels: Tensor | None,  # (*)
    counted: Tensor | None,  # (*)
    weights: Tensor | None,  # (*), factors of the rows' losses, 0 in rows that are masked out
    reduction: str,
    count: int | float | Tensor | None,  # what the mean divides by
    options: RowOptions,
) -> Tensor:  # (*) with reduction "none", else ()
    rows = student.shape[:-1]
    if len(rows) != 1:
        labels, counted, weights = (None if x is None else x.reshape(-1) for x in (labels, counted, weights))
        if indices is not None:
            teacher, indices = (x.reshape(-1, x.shape[-1]) for x in (teacher, indices))
        elif not rows:
            teacher = teacher.unsqueeze(0)
        student = student if rows else student.unsqueeze(0)
    inputs = Inputs(student, teacher, indices, labels if options.hard_weight else None, counted, None)
    per_row = reduction == "none"
    if _common.traced():
        loss, _ = _op(*inputs, False, *options)
        loss = loss if weights is None else loss * weights
        if not per_row:
            return loss.sum() if count is None else _common.mean(loss.sum(), count)
    else:
        # Plain torch scales the gradient; one of 16 bits would be rounded twice, so it waits for the backward. The
        # kernels recompute a row whose weight differs from the expected one, so they wait if no weight is known.
        waits = _common.narrow(student) if options.backend == "torch" else per_row
        in_forward = not waits and student.requires_grad and torch.is_grad_enabled()
        loss = _Loss.apply(student, (inputs, None if per_row else weights, per_row, count, in_forward, options))
        if not per_row:
            return loss
        loss = loss if weights is None else loss * weights
    return loss if len(rows) == 1 else loss.view(rows)


# -- portable ------------------------------------------------------------------------------------------------


def row_loss(
    options: RowOptions,
    student: Tensor,  # (n, V), wide, scaled and capped; overwritten where there is a softcap
    target: Target,
    labels: Tensor | None,  # (n, 1)
    out: Tensor | None,  # (n, V), for the gradient of each row's loss in its logits before scale and softcap
    work: Sequence[Tensor],  # BUFFERS of (n, V), scratch
    weight: Tensor | float = 1.0,  # (n, 1), multiplies the gradient
) -> Tensor:  # (n)
    student_max = _rows.row_max(student)
    if target:
        soft = topk_divergence if options.tail else divergence
        loss = soft(options, student, student_max, target, out, work, weight)
    else:
        loss = torch.zeros_like(student_max)
        if out is not None:
            out.zero_()
    if labels is not None:
        hard = _rows.exponential(torch.sub(student, student_max, out=work[0]), work[0])
        hard_sum = hard.sum(-1, keepdim=True)
        loss += (hard_sum.log() + (student_max - student.gather(1, labels))) * options.hard_weight
        if out is not None:
            slope = torch.ones_like(hard_sum).mul_(weight).mul_(options.hard_weight)
            out += hard.mul_(slope / hard_sum)
            out.scatter_add_(1, labels, -slope)
    if out is not None:
        # A student's class of probability 0 that the target or the label asks for: the loss is inf, its gradient 0.
        if _rows.may_be_infinite(loss):
            out.masked_fill_(student == -math.inf, 0)
        if options.student_softcap is not None:
            tanh_squared = student.div_(options.student_softcap).square_().clamp_(max=1)  # slope 0 where -inf was kept
            out *= tanh_squared.mul_(-options.student_scale).add_(options.student_scale)
        elif options.student_scale != 1:
            out *= options.student_scale
    return loss[:, 0]


def _in_blocks(options: RowOptions, inputs: Inputs, loss: Tensor, gradient: Tensor | None) -> None:
    """Writes the losses (N), and the gradient, which is like the student, if it is given."""
    student, teacher, indices, labels, counted, weight = inputs
    classes, dtype = options.classes, loss.dtype
    labels = checked_labels(labels, counted, classes)
    weight = _rows.row_weights(weight, counted, dtype)
    logits = [(student, options.student_softcap, options.student_scale)]
    whole_list: Target | None = None
    if options.soft_weight == 0:
        whole_list = ()
    elif indices is not None:
        whole_list = listed(options, teacher, indices, counted, dtype)
    else:
        logits.append((teacher, options.teacher_softcap, options.teacher_scale))
    # Short rows are stored by columns, which vectorises every step; like casts, scales and softcaps, that takes copies.
    short = classes < SHORT
    shaped = any(cap is not None or scale != 1 for _, cap, scale in logits)
    copies = short or shaped or any(x.dtype != dtype or x.stride(-1) != 1 for x, *_ in logits)
    count = BUFFERS + 3 * copies
    limit = _rows.rows_of_a_block(loss.numel(), classes, count, loss)
    memory = loss.new_empty(count, classes, limit).mT if short else loss.new_empty(count, limit, classes)
    whole = memory.unbind()
    d_rows = None if gradient is None else gradient.view(-1, student.shape[-1])
    student_buffer = teacher_buffer = wide = None
    for index, rows in _rows.row_blocks(student.shape[:-1], limit):
        size = rows.stop - rows.start
        work = whole if size == limit else [buffer[:size] for buffer in whole]
        if copies:
            *work, student_buffer, teacher_buffer, wide = work
        block = _rows.rows_at(student, index, classes)
        block = capped(block, options.student_softcap, student_buffer, options.student_scale)
        if whole_list is None:
            there = _rows.rows_at(teacher, index, classes)
            target: Target = (capped(there, options.teacher_softcap, teacher_buffer, options.teacher_scale),)
        else:
            target = tuple(x[rows] for x in whole_list)
        here = None if d_rows is None else _rows.rows_at(d_rows, (rows,), classes)
        out = here if wide is None or here is None else wide
        slope = 1.0 if weight is None else weight[rows]
        loss[rows] = row_loss(options, block, target, at(labels, rows), out, work, slope)
        if here is not None and out is not None:
            if counted is not None and _rows.may_be_infinite(out):
                out.masked_fill_(~counted[rows].unsqueeze(-1), 0)  # NaN * 0
            if out is not here:
                here.copy_(out)
    if counted is not None:
        loss.masked_fill_(~counted, 0)
    if d_rows is not None and classes < student.shape[-1]:
        d_rows[:, classes:] = 0


@functools.cache  # an import takes its time even if the module is there
def kernels_of(backend: str, tail: str) -> Any:
    """Returns the module whose `rows` launches the kernel."""
    if backend == "cuda":
        from .. import cuda

        return cuda
    from ..kernels import logits, topk

    return topk if tail else logits


def _launch(
    options: RowOptions, inputs: Inputs, loss: Tensor, gradient: Tensor | None, expected: Tensor | None = None
) -> None:
    """As `_in_blocks`. With `expected` (N), the weights that `gradient` was written with before, the kernel fixes the
    rows whose weight differs."""
    student, teacher, indices, labels, counted, weight = inputs
    target: Target = ()
    if options.soft_weight:
        target = (teacher,) if indices is None else kernel_list(options, teacher, indices, counted, expected is None)
    labels = checked_labels(labels, counted, options.classes)
    labels, counted, weight, expected = _rows.contiguous(labels, counted, weight, expected)
    kernels_of(options.backend, options.tail).rows(
        student, target, labels, counted, options, loss=loss, gradient=gradient, weight=weight, expected=expected
    )


# -- autograd ------------------------------------------------------------------------------------------------
#
# Whoever traces sees one registered op, one loss a row, and the same op again in the backward. Eager calls bypass
# torch.library, which costs tens of microseconds, and the second run: the forward leaves the gradient for the weights
# that the rows will have if the loss's own gradient is 1, and the first backward corrects it in place for the weights
# that arrive. Plain torch scales the gradient. Kernels fix the rows whose weight differs; the comparison runs in the
# kernel to avoid a host sync. For N rows of V 16-bit numbers, forward and backward read and write 6 N V bytes if the
# weights are right, 10 if they are off by a power of 2, else 12; computed in the backward alone, 10. A second backward
# of the same graph repeats both steps, since one step with the final weights rounds otherwise: it gives the bits of the
# first, for 6 N V bytes and the correction.


class _Loss(torch.autograd.Function):
    """The loss in eager calls, of each row or reduced. Autograd looks at each argument, so they come as one value."""

    @staticmethod
    def forward(ctx, student, call):  # type: ignore[no-untyped-def]
        inputs, weights, ctx.per_row, count, ctx.in_forward, ctx.options = call
        loss, has_weights = _new_loss(inputs), weights is not None
        if not ctx.per_row:
            factor, divisor = _common.host_factor(count)
            inverse = factor if divisor is None else _common.inverse(divisor, loss.dtype)
            if has_weights:
                weights = weights * inverse
            elif isinstance(inverse, Tensor):
                weights = inverse.expand(loss.shape).contiguous()
            elif factor != 1 or ctx.options.backend != "torch":
                weights = torch.full_like(loss, factor)
            inputs = inputs._replace(weight=weights)
        ctx.gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if ctx.in_forward else None
        _run(ctx.options, inputs, loss, ctx.gradient)
        *tensors, ctx.weight = inputs
        ctx.save_for_backward(*tensors)
        if ctx.per_row:
            return loss
        ctx.losses = loss
        if has_weights:
            return (loss * weights).sum()
        return loss.sum() if count is None else loss.sum().mul_(inverse)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward("the loss over classes")
        gradient, ctx.gradient = ctx.gradient, None
        options, expected = ctx.options, ctx.weight
        inputs = Inputs._make([*ctx.saved_tensors, expected])
        loss = _new_loss(inputs) if ctx.per_row else ctx.losses  # overwritten
        if ctx.per_row:
            weight = grad_loss
        else:
            weight = grad_loss.expand(loss.shape) if expected is None else expected * grad_loss
        if gradient is None:
            gradient = torch.empty_like(inputs.student, memory_format=torch.contiguous_format)
            _run(options, inputs if ctx.in_forward else inputs._replace(weight=weight), loss, gradient)
        if not ctx.in_forward:
            return gradient, None
        if options.backend != "torch":
            _launch(options, inputs._replace(weight=weight), loss, gradient, expected)
        elif ctx.per_row:
            gradient.view(-1, gradient.shape[-1]).mul_(_rows.row_weights(grad_loss, inputs.counted, grad_loss.dtype))
        elif grad_loss.device.type != "cpu" or grad_loss.item() != 1:
            gradient.mul_(grad_loss)
        return gradient, None


def _run(options: RowOptions, inputs: Inputs, loss: Tensor, gradient: Tensor | None) -> None:
    (_in_blocks if options.backend == "torch" else _launch)(options, inputs, loss, gradient)


def _new_loss(inputs: Inputs) -> Tensor:  # (N)
    student = inputs.student
    return student.new_empty(math.prod(student.shape[:-1]), dtype=_common.compute_dtype(student, inputs.teacher))


def _forward(*flat: Any) -> tuple[Tensor, Tensor]:  # loss (N), its gradient as student, or empty
    """Takes `Inputs`, whether the gradient is wanted, and `RowOptions`, field by field."""
    inputs, needs_gradient, options = Inputs(*flat[:INPUTS]), flat[INPUTS], RowOptions(*flat[INPUTS + 1 :])
    loss, gradient = _fake(*flat)
    _run(options, inputs, loss, gradient if needs_gradient else None)
    return loss, gradient


def _fake(*flat):  # type: ignore[no-untyped-def]
    inputs, needs_gradient = Inputs(*flat[:INPUTS]), flat[INPUTS]
    return _new_loss(inputs), inputs.student.new_empty(inputs.student.shape if needs_gradient else 0)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.options = inputs[INPUTS + 1 :]
    ctx.save_for_backward(*inputs[: INPUTS - 1])


def _backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("the loss over classes")
    gradient = None if grad_loss is None else _op(*ctx.saved_tensors, grad_loss, True, *ctx.options)[1]
    return gradient, *(None,) * (INPUTS + len(ctx.options))


_op = _common.registered(
    "row_losses",
    f"({_common.schema(Inputs)}, bool needs_gradient, {_common.schema(RowOptions)}) -> (Tensor, Tensor)",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip
