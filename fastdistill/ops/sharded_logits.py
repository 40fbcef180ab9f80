"""The losses over classes from shards of the logits: the op and its autograd, over _shards.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _common, _rows
from ._rows import Index, RowOptions, capped
from ._shards import (
    BUFFERS,
    SUMS,
    Row,
    Rows,
    Shard,
    given_of,
    losses,
    receive,
    send,
    stored_for,
    write_gradient,
)


class Inputs(NamedTuple):
    student: Tensor  # (*, >= V_r)
    teacher: Tensor  # (*, >= V_r), or with `indices` log-probabilities (N, k)
    indices: Tensor | None  # (N, k)
    labels: Tensor | None  # (N)
    counted: Tensor | None  # (N)


INPUTS, SHARD = len(Inputs._fields), len(Shard._fields)


def row_losses(
    student: Tensor,  # (*, >= V_r)
    teacher: Tensor,  # logits (*, >= V_r), or with `indices` log-probabilities (*, k)
    indices: Tensor | None,  # (*, k)
    labels: Tensor | None,  # (*)
    counted: Tensor | None,  # (*)
    shard: Shard, options: RowOptions,
) -> Tensor:  # (*) # fmt: skip
    if indices is not None:
        teacher, indices = (x.reshape(-1, x.shape[-1]) for x in (teacher, indices))
    loss = _logits_op(
        student if student.dim() > 1 else student[None], teacher if teacher.dim() > 1 else teacher[None], indices,
        labels.reshape(-1) if labels is not None and options.hard_weight else None,
        None if counted is None else counted.reshape(-1), *shard, *options,
    )[0]  # fmt: skip
    return loss.view(student.shape[:-1])


def _of_logits(options: RowOptions, inputs: Inputs, shard: Shard) -> Rows:
    student, teacher, indices, labels, counted = inputs
    dtype, width = _common.compute_dtype(student, teacher), shard.width
    step = _rows.rows_of_a_block(
        math.prod(student.shape[:-1]), max(width, 1), BUFFERS, student.new_empty(0, dtype=dtype)
    )

    def wide(x: Tensor, index: Index, softcap: float | None, scale: float) -> Tensor:
        block = _rows.rows_at(x, index, width)
        return capped(block, softcap, block.new_empty(block.shape, dtype=dtype), scale)

    def read(index: Index, _: slice) -> tuple[Tensor, Tensor | None]:
        there = None
        if indices is None and options.soft_weight:
            there = wide(teacher, index, options.teacher_softcap, options.teacher_scale)
        return wide(student, index, options.student_softcap, options.student_scale), there

    given = given_of(options, teacher, indices, labels, counted, dtype)
    blocks, size = list(_rows.row_blocks(student.shape[:-1], step)), math.prod(student.shape[:-1])
    stored = stored_for(options, shard, student, teacher, (None, None), given)
    return Rows(blocks, read, given, size, dtype, stored)


def _logits_forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses (N), `Row` (SUMS, N, 1), and what the second collective added (N, .)."""
    inputs, shard, options = Inputs(*flat[:INPUTS]), Shard(*flat[INPUTS:][:SHARD]), RowOptions(*flat[INPUTS + SHARD :])
    loss, known, more = _logits_fake(*flat)
    if len(loss):
        rows = _of_logits(options, inputs, shard)
        row, added = receive(options, shard, rows, send(options, shard, rows))
        loss = losses(options, row, added, rows.given)
        known, more = torch.stack(row), more if added is None else added
    return loss if inputs.counted is None else loss.masked_fill(~inputs.counted, 0), known, more


def _logits_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, options = Inputs(*flat[:INPUTS]), RowOptions(*flat[INPUTS + SHARD :])
    loss = inputs.student.new_empty(
        math.prod(inputs.student.shape[:-1]), dtype=_common.compute_dtype(inputs.student, inputs.teacher)
    )
    more = 0
    if options.soft_weight:
        more = inputs.indices.shape[1] if inputs.indices is not None else 2 * (options.kind in ("jsd", "tvd"))
    return loss, loss.new_empty(SUMS, len(loss), 1), loss.new_empty(len(loss), more)


def _logits_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:INPUTS], *output[1:])
    ctx.rest = inputs[INPUTS:]


def _logits_backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("the loss over classes")
    nothing = (None,) * (INPUTS - 1 + len(ctx.rest))
    if grad_loss is None:
        return None, *nothing
    compute = _gradient_op if _common.traced() else _logits_gradient
    return compute(grad_loss, *ctx.saved_tensors, *ctx.rest), *nothing


def _logits_gradient(grad_loss, *flat):  # type: ignore[no-untyped-def]
    inputs, (known, more, *rest) = Inputs(*flat[:INPUTS]), flat[INPUTS:]
    shard, options = Shard(*rest[:SHARD]), RowOptions(*rest[SHARD:])
    out = torch.zeros_like(inputs.student, memory_format=torch.contiguous_format)
    d_rows = out.view(-1, out.shape[-1])
    if shard.width and len(d_rows):
        weight = _rows.row_weights(grad_loss, inputs.counted, known.dtype)
        rows, added = _of_logits(options, inputs, shard), more if more.shape[1] else None
        write_gradient(options, shard, rows, Row(*known), added, weight, d_rows)
    return out


_gradient_op: Any = torch.library.custom_op(
    f"{_common.NAMESPACE}::sharded_row_losses_backward",
    _logits_gradient,
    mutates_args=(),
    schema=f"(Tensor grad_loss, {_common.schema(Inputs)}, Tensor known, Tensor more, {_common.schema(Shard)}, "
    f"{_common.schema(RowOptions)}) -> Tensor",
)


@_gradient_op.register_fake
def _(grad_loss, student, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student, memory_format=torch.contiguous_format)


_logits_op = _common.registered(
    "sharded_row_losses",
    f"({_common.schema(Inputs)}, {_common.schema(Shard)}, {_common.schema(RowOptions)}) -> (Tensor, Tensor, Tensor)",
    _logits_forward, _logits_fake, _logits_context, _logits_backward,
)  # fmt: skip
