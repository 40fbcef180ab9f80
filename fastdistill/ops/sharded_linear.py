"""The losses over classes from hidden states and shards of the vocabulary weights, over _shards.py.

As in linear_logits.py, only the logits of one chunk of tokens exist, or of two: while the sums of a chunk travel, the
logits of the next one are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _common, _rows
from . import linear_logits as whole
from ._counted import Selection, select
from ._rows import RowOptions, at, capped
from ._shards import (
    BUFFERS,
    Given,
    Rows,
    Shard,
    by_kernels,
    given_of,
    losses,
    receive,
    send,
    stored_for,
    write_gradient,
)

SHARD = len(Shard._fields)


def linear_row_losses(
    *tensors: Tensor | None,  # of `linear_logits.Inputs`, up to `counted`; the weights are shards
    item_weights: Tensor | None = None,  # (N), factors of the rows' losses; rows of weight 0 do not count
    per_row: bool,
    shard: Shard, options: RowOptions,
) -> Tensor:  # (N) or () # fmt: skip
    *others, labels, counted = tensors
    labels = labels if options.hard_weight else None
    needs = [not per_row and torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:3]]
    weights, scale = None, None
    if item_weights is not None:
        weights, counted = _rows.weigh(item_weights, counted, _common.compute_dtype(tensors[0], tensors[3]))
        weights, scale = (None, weights) if per_row else _common.unit(weights)
    loss = _linear_op(*others, labels, counted, weights, None, 1.0, True, *needs, per_row, *shard, *options)[0]
    return loss if scale is None else loss * scale


def _linear_forward(*flat: Any) -> whole.Outputs:
    """Takes `linear_logits.Inputs`, `Shard` and `RowOptions`, field by field; `classes` are those of all ranks."""
    inputs, rest = whole.Inputs(*flat[: whole.INPUTS]), flat[whole.INPUTS :]
    shard, options = Shard(*rest[:SHARD]), RowOptions(*rest[SHARD:])
    losses_out, d_student, d_weight, d_bias = (x.zero_() for x in whole._outputs(inputs))
    chosen = select(inputs.student.shape[0], inputs.counted, True, "torch")
    labels, row_weight, indices = (
        None if x is None else chosen.take(x) for x in (inputs.labels, inputs.row_weight, inputs.indices)
    )
    teacher = inputs.teacher if indices is None else chosen.take(inputs.teacher)
    given = given_of(options, teacher, indices, labels, chosen.counted, losses_out.dtype)
    weights = _rows.row_weights(row_weight, chosen.counted, losses_out.dtype)
    inputs = inputs._replace(student_weight=inputs.student_weight[: shard.width], counted=chosen.counted)
    loss = losses_out.new_zeros(chosen.size)
    unit = whole._unit(inputs.student.dtype, options)
    size = whole._chunk_size(chosen.size, inputs.student, max(shard.width, 1), loss.dtype)
    wanted = inputs.needs_student or inputs.needs_weight or inputs.needs_bias

    def step(chunk: slice) -> Iterator[None]:
        """Sends the sums of a chunk; after the yield, receives them and adds the chunk's gradients."""
        x = whole._clean(inputs.student, chunk, chosen)
        rows = _of_chunk(options, shard, inputs, chosen, chunk, x, given.at(chunk), loss.dtype)
        sent = send(options, shard, rows)
        yield
        row, more = receive(options, shard, rows, sent)
        loss[chunk] = losses(options, row, more, rows.given)
        if wanted and shard.width:
            weight = None if weights is None else weights[chunk] * unit
            if weight is None and unit != 1:
                weight = loss.new_full((len(x), 1), unit)
            narrow = x.is_cuda and _common.narrow(x)  # a GPU multiplies 16-bit operands
            d = x.new_empty(len(x), shard.width, dtype=x.dtype if narrow else loss.dtype)  # G
            write_gradient(options, shard, rows, row, more, weight, d)
            if inputs.needs_bias:
                d_bias[: shard.width] += d.sum(0, dtype=loss.dtype)
            if inputs.needs_weight:
                _common.add_mm_(d_weight[: shard.width], d.mT, x)
            if inputs.needs_student:
                whole._put_d_student(d_student, d, inputs.student_weight, chosen, chunk)

    with _common.no_autocast(inputs.student):
        # The sums of a chunk travel while the logits of the next one are computed.
        before: Iterator[None] = iter(())
        for start in range(0, chosen.size, size):
            now = step(slice(start, min(start + size, chosen.size)))
            next(now)
            next(before, None)
            before = now
        next(before, None)
    if inputs.needs_student:
        dist.all_reduce(d_student, group=shard.processes())
    if unit != 1:
        for total in (d_student, d_weight, d_bias):
            total *= 1 / unit
    if chosen.counted is not None:
        loss.masked_fill_(~chosen.counted, 0)
    if inputs.per_row:
        chosen.put(losses_out, slice(None), loss)
    elif row_weight is not None:
        loss *= row_weight
    return losses_out if inputs.per_row else loss.sum(), d_student, d_weight, d_bias


def _of_chunk(
    options: RowOptions, shard: Shard, inputs: whole.Inputs, chosen: Selection, chunk: slice, x: Tensor, given: Given,
    dtype: torch.dtype,
) -> Rows:  # fmt: skip
    """Computes the own logits of both sides (C, V_r). Kernels add bias, scale and softcap as they read them."""
    width, in_kernel = shard.width, by_kernels(options, shard, given)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
        bias = None if in_kernel else bias
        z = whole._logits(x, weight[:width], bias, x.new_empty(len(x), width, dtype=dtype), chosen, chunk)
        return z if in_kernel or (softcap is None and scale == 1) else capped(z, softcap, z, scale)

    student = product(x, inputs.student_weight, inputs.student_bias, options.student_softcap, options.student_scale)
    teacher = None
    if inputs.teacher_weight is not None and options.soft_weight:
        there = whole._clean(inputs.teacher, chunk, chosen)
        softcap, scale = options.teacher_softcap, options.teacher_scale
        teacher = product(there, inputs.teacher_weight, inputs.teacher_bias, softcap, scale)
    step = _rows.rows_of_a_block(len(student), max(width, 1), BUFFERS, student)
    blocks = list(_rows.row_blocks(student.shape[:1], step))
    biases = inputs.student_bias, inputs.teacher_bias
    stored = stored_for(options, shard, student, teacher, biases, given)
    return Rows(blocks, lambda _, rows: (student[rows], at(teacher, rows)), given, len(student), dtype, stored)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    whole._keep(ctx, whole.Inputs(*inputs[: whole.INPUTS]), inputs[whole.INPUTS :], output[1:])


def _linear_backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("the linear loss over classes")
    nothing = (None,) * (whole.INPUTS + len(ctx.options))
    if grad_loss is None:
        return nothing
    needs, scale = ctx.in_forward, grad_loss
    gradients = saved = ctx.saved_tensors
    if ctx.per_row:
        needs, counted = ctx.needs_input_grad[:3], saved[-1]
        weights, scale = _common.unit(grad_loss if counted is None else grad_loss.masked_fill(~counted, 0))
        _, *gradients = _linear_op(*saved, weights, None, 1.0, ctx.dense, *needs, True, *ctx.options)
    dtypes = [dtype if need else None for need, dtype in zip(needs, ctx.dtypes, strict=True)]
    backend = RowOptions(*ctx.options[SHARD:]).backend
    return *_common.finished(gradients, scale, dtypes, backend), *nothing[3:]


_linear_op = _common.registered(
    "sharded_linear_row_losses",
    f"({_common.schema(whole.Inputs)}, {_common.schema(Shard)}, {_common.schema(RowOptions)}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _linear_forward, whole._fake, _setup_context, _linear_backward,
)  # fmt: skip
