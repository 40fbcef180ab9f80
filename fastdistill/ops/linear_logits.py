"""The losses over classes straight from hidden states and vocabulary weights: z = x W^T + b, never stored whole.

The logits of one chunk of tokens are all that exists of either side. The row loss (logits.py, topk.py) takes them block
by block and leaves the gradient G in the student's place, from which

    dX = G W        dW += G^T X        db += sum G

so four products in all, the minimum. For a reduced loss every token has the same weight: gradients are computed in the
forward and scaled in the backward. Losses of each token wait for their weights: the backward runs the chunks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _common, _rows
from fastdistill.ops._rows import (
    BUFFERS,
    RowLoss,
    Target,
    at,
    capped,
    checked_indices,
    checked_labels,
    row_blocks,
    rows_of_a_block,
    weigh_rows_,
)
from fastdistill.ops.logits import Divergence
from fastdistill.ops.topk import TopK, listed, sorted_list

# Tokens of a chunk: enough that the products run at full speed, within a bound on the bytes of each side's logits.
CHUNK = 1024
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 1 << 26, 3 << 27

# Elements of a block of vocabulary rows that the CPU, which has no product of 16-bit operands, casts at a time.
CAST_BLOCK = 1 << 22


def linear_divergence(
    student: Tensor,  # (N, d_s)
    student_weight: Tensor,  # (>= V, d_s)
    teacher: Tensor,  # (N, d_t)
    teacher_weight: Tensor,  # (>= V, d_t)
    student_bias: Tensor | None,  # (>= V)
    teacher_bias: Tensor | None,  # (>= V)
    kind: str,
    *,
    counted: Tensor | None,  # (N)
    labels: Tensor | None,  # (N)
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    beta: float,
    vocab_size: int | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    per_row: bool,
    backend: str,
) -> Tensor:  # (N) or ()
    return _linear_divergence(
        student, student_weight, student_bias, labels if hard_weight else None, counted, None,
        teacher, teacher_weight, teacher_bias,
        *_needs(per_row, student, student_weight, student_bias), per_row,
        student_weight.shape[0] if vocab_size is None else vocab_size,
        soft_weight, hard_weight, student_softcap, temperature, kind, beta, teacher_softcap,
        backend,
    )[0]  # fmt: skip


def linear_topk_divergence(
    student: Tensor,  # (N, d_s)
    student_weight: Tensor,  # (>= V, d_s)
    student_bias: Tensor | None,  # (>= V)
    logprobs: Tensor,  # (N, k)
    indices: Tensor,  # (N, k)
    tail: str,
    *,
    counted: Tensor | None,  # (N)
    labels: Tensor | None,  # (N)
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    vocab_size: int | None,
    student_softcap: float | None,
    per_row: bool,
    backend: str,
) -> Tensor:  # (N) or ()
    return _linear_topk_divergence(
        student, student_weight, student_bias, labels if hard_weight else None, counted, None,
        logprobs, indices,
        *_needs(per_row, student, student_weight, student_bias), per_row,
        student_weight.shape[0] if vocab_size is None else vocab_size,
        soft_weight, hard_weight, student_softcap, temperature, tail, backend,
    )[0]  # fmt: skip


def _needs(per_row: bool, *learned: Tensor | None) -> list[bool]:
    """Which gradients the forward computes: none of those of per-row losses, which wait for their weights."""
    return [not per_row and torch.is_grad_enabled() and x is not None and x.requires_grad for x in learned]


# Loss (N) or (), dX (N, d_s), dW (>= V, d_s), db (>= V); empty where not needed.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fastdistill::linear_divergence", mutates_args=())
def _linear_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,  # (N); None: 1
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    needs_student: bool,
    needs_weight: bool,
    needs_bias: bool,
    per_row: bool,
    classes: int,
    soft_weight: float,
    hard_weight: float,
    student_softcap: float | None,
    temperature: float,
    kind: str,
    beta: float,
    teacher_softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _common.compute_dtype(student, teacher)
    size = _chunk_size(student, classes, dtype)
    needs = (needs_student, needs_weight, needs_bias)
    unit = _unit(student, soft_weight, hard_weight, temperature, kind)
    teacher_weight = teacher_weight[:classes]
    buffer = student.new_empty(size if soft_weight else 0, classes, dtype=dtype)
    if backend == "triton":
        from fastdistill.kernels import logits as kernels

        labels = checked_labels(labels, counted, classes)
        row_weight = _with_unit(row_weight, unit, student, dtype)
        labels, counted, row_weight, student_bias, teacher_bias = (
            None if x is None else x.contiguous() for x in (labels, counted, row_weight, student_bias, teacher_bias)
        )

        def launch(chunk: slice, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> None:
            kernels.rows(
                logits, _logits(teacher[chunk], teacher_weight, None, buffer) if soft_weight else None,
                at(labels, chunk), at(counted, chunk), kind, classes=classes, temperature=temperature, beta=beta,
                soft_weight=soft_weight, hard_weight=hard_weight, student_softcap=student_softcap,
                teacher_softcap=teacher_softcap, loss=loss, gradient=gradient, weight=at(row_weight, chunk),
                student_bias=student_bias, teacher_bias=teacher_bias,
            )  # fmt: skip

        rows = _in_one_launch(launch, student, student_weight[:classes], size, dtype)
    else:
        row_loss = RowLoss(Divergence(kind, temperature, beta), soft_weight, hard_weight, student_softcap)

        def target_of(chunk: slice) -> Target:
            if soft_weight == 0:
                return ()
            logits = _logits(_clean(teacher, chunk, counted), teacher_weight, teacher_bias, buffer)
            return (capped(logits, teacher_softcap, logits),)

        rows = _in_blocks(
            row_loss, target_of, size, dtype, student, student_weight[:classes], student_bias, labels, counted,
            row_weight, unit,
        )  # fmt: skip
    return _chunks(rows, size, dtype, student, student_weight, counted, needs, per_row, classes, unit)


@torch.library.custom_op("fastdistill::linear_topk_divergence", mutates_args=())
def _linear_topk_divergence(
    student: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,  # (N); None: 1
    logprobs: Tensor,
    indices: Tensor,
    needs_student: bool,
    needs_weight: bool,
    needs_bias: bool,
    per_row: bool,
    classes: int,
    soft_weight: float,
    hard_weight: float,
    student_softcap: float | None,
    temperature: float,
    tail: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _common.compute_dtype(student, logprobs)
    size = _chunk_size(student, classes, dtype)
    needs = (needs_student, needs_weight, needs_bias)
    unit = _unit(student, soft_weight, hard_weight, temperature, "soft_cross_entropy")
    if backend == "triton":
        from fastdistill.kernels import topk as kernels

        p, indices, rest = sorted_list(logprobs, indices, counted, classes, dtype, tail, temperature)
        labels = checked_labels(labels, counted, classes)
        row_weight = _with_unit(row_weight, unit, student, dtype)
        labels, counted, row_weight, student_bias = (
            None if x is None else x.contiguous() for x in (labels, counted, row_weight, student_bias)
        )

        def launch(chunk: slice, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> None:
            kernels.rows(
                logits, (p[chunk], indices[chunk], at(rest, chunk)) if soft_weight else None, at(labels, chunk),
                at(counted, chunk), classes=classes, temperature=temperature, soft_weight=soft_weight,
                hard_weight=hard_weight, softcap=student_softcap, loss=loss, gradient=gradient,
                weight=at(row_weight, chunk), bias=student_bias,
            )  # fmt: skip

        rows = _in_one_launch(launch, student, student_weight[:classes], size, dtype)
    else:
        logprobs, indices = listed(logprobs, indices, counted, classes, dtype)
        row_loss = RowLoss(TopK(tail, temperature), soft_weight, hard_weight, student_softcap)

        def target_of(chunk: slice) -> Target:
            return (logprobs[chunk], indices[chunk]) if soft_weight else ()

        rows = _in_blocks(
            row_loss, target_of, size, dtype, student, student_weight[:classes], student_bias, labels, counted,
            row_weight, unit,
        )  # fmt: skip
    return _chunks(rows, size, dtype, student, student_weight, counted, needs, per_row, classes, unit)


# -- a chunk's rows ------------------------------------------------------------------------------------------
#
# Of a chunk of tokens, with hidden states x (C, d_s): writes their losses (C), and returns G (C, V), times the rows'
# weights and `unit`, as the products take it, or None where it is not wanted.
Rows = Callable[[slice, Tensor, Tensor, bool], Tensor | None]


def _in_blocks(
    row_loss: RowLoss,
    target_of: Callable[[slice], Target],
    size: int,  # tokens of a chunk
    dtype: torch.dtype,
    student: Tensor,
    weight: Tensor,  # (V, d_s)
    bias: Tensor | None,
    labels: Tensor | None,
    counted: Tensor | None,
    row_weight: Tensor | None,
    unit: float,
) -> Rows:
    classes = weight.shape[0]
    if labels is not None:
        labels = checked_indices("labels", labels.unsqueeze(-1), counted, classes)
    weights = _rows.row_weight(row_weight, counted, dtype)
    buffer = student.new_empty(size, classes, dtype=dtype)
    block_rows = rows_of_a_block(size, classes, BUFFERS + 1, buffer)
    work = buffer.new_empty(BUFFERS + 1, block_rows, classes)

    def rows(chunk: slice, x: Tensor, loss: Tensor, wanted: bool) -> Tensor | None:
        logits = _logits(x, weight, bias, buffer)  # G when the rows are done
        target = target_of(chunk)
        for _, block in row_blocks(logits.shape[:1], block_rows):
            here = slice(chunk.start + block.start, chunk.start + block.stop)
            *buffers, gradient = work[:, : block.stop - block.start].unbind()
            z = logits[block]
            capped(z, row_loss.softcap, z)
            out = gradient if wanted else None
            loss[block] = row_loss(z, tuple(t[block] for t in target), at(labels, here), out, buffers)
            if out is not None:
                if weights is not None:
                    weigh_rows_(out, weights[here], at(counted, here))
                torch.mul(out, unit, out=z)
        if counted is not None:
            loss.masked_fill_(~counted[chunk], 0)
        if not wanted:
            return None
        # A GPU multiplies 16-bit operands, so G goes back to 16 bits there; products still come out in float32.
        return logits.to(x.dtype) if x.is_cuda and _common.narrow(x) else logits

    return rows


def _in_one_launch(
    launch: Callable[[slice, Tensor, Tensor, Tensor | None], None],  # chunk, logits less the bias, losses, G
    student: Tensor,
    weight: Tensor,  # (V, d_s)
    size: int,  # tokens of a chunk
    dtype: torch.dtype,
) -> Rows:
    """G of 16-bit operands is rounded where it is computed; else it takes the place of the logits."""
    buffer = student.new_empty(size, weight.shape[0], dtype=dtype)
    narrow = torch.empty_like(buffer, dtype=student.dtype) if _common.narrow(student) else None

    def rows(chunk: slice, x: Tensor, loss: Tensor, wanted: bool) -> Tensor | None:
        logits = _logits(x, weight, None, buffer)
        gradient = None
        if wanted:
            gradient = logits if narrow is None else narrow[: x.shape[0]]
        launch(chunk, logits, loss, gradient)
        return gradient

    return rows


# -- chunks --------------------------------------------------------------------------------------------------


def _chunks(
    rows: Rows,
    size: int,  # tokens of a chunk
    dtype: torch.dtype,
    student: Tensor,
    weight: Tensor,
    counted: Tensor | None,
    needs: Sequence[bool],
    per_row: bool,
    classes: int,
    unit: float,  # what G is a multiple of
) -> Outputs:
    loss, d_student, d_weight, d_bias = _outputs(student, weight, needs, dtype)
    needs_student, needs_weight, needs_bias = needs
    with _common.no_autocast(student):
        for start in range(0, student.shape[0], size):
            chunk = slice(start, min(start + size, student.shape[0]))
            x = _clean(student, chunk, counted)
            gradient = rows(chunk, x, loss[chunk], any(needs))
            if gradient is None:
                continue
            if needs_bias:
                d_bias[:classes] += gradient.sum(0, dtype=dtype)
            if needs_weight:
                _common.add_mm_(d_weight[:classes], gradient.mT, x)
            if needs_student:
                d_student[chunk] = _times_weight(gradient, weight[:classes], dtype)
    if unit != 1:
        for x in (d_student, d_weight, d_bias):
            x *= 1 / unit
    return loss if per_row else loss.sum(), d_student, d_weight, d_bias


def _outputs(student: Tensor, weight: Tensor, needs: Sequence[bool], dtype: torch.dtype) -> Outputs:
    """Where the chunks add up, wide: the backward rounds once, when it scales."""
    needs_student, needs_weight, needs_bias = needs
    loss = student.new_empty(student.shape[0], dtype=dtype)
    d_student = loss.new_empty(student.shape if needs_student else 0)
    d_weight = loss.new_zeros(weight.shape if needs_weight else 0)
    d_bias = loss.new_zeros(weight.shape[0] if needs_bias else 0)
    return loss, d_student, d_weight, d_bias


def _unit(student: Tensor, soft_weight: float, hard_weight: float, temperature: float, kind: str) -> float:
    """What G is multiplied by. In float16, whose numbers end at 65504 and lose digits below 6e-5, probabilities keep
    theirs down to 1e-7 if the largest entries that are to be expected are 1024 to 2048."""
    if student.dtype != torch.float16:
        return 1.0
    slope = soft_weight / (temperature**2 if kind == "reverse_kl" else temperature)
    return 2.0 ** (11 - math.ceil(math.log2(max(slope + hard_weight, 1e-30))))


def _with_unit(row_weight: Tensor | None, unit: float, student: Tensor, dtype: torch.dtype) -> Tensor | None:
    if unit == 1:
        return row_weight
    return student.new_full(student.shape[:1], unit, dtype=dtype) if row_weight is None else row_weight * unit


def _chunk_size(student: Tensor, classes: int, dtype: torch.dtype) -> int:
    tokens = student.shape[0]
    limit = CPU_CHUNK_BYTES if student.device.type == "cpu" else GPU_CHUNK_BYTES
    limit = max(min(CHUNK, limit // (classes * dtype.itemsize)), 1)
    chunks = max(-(-tokens // limit), 1)
    return max(-(-tokens // chunks), 1)  # even chunks


def _clean(x: Tensor, chunk: slice, counted: Tensor | None) -> Tensor:
    """Tokens of a chunk. One that does not count may hold NaN, which even times 0 would reach dW: it becomes 0."""
    return x[chunk] if counted is None else x[chunk].masked_fill(~counted[chunk].unsqueeze(-1), 0)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """x W^T + b, wide, in the buffer's first rows."""
    out = buffer[: x.shape[0]]
    for classes, block in _operand_blocks(weight, out.dtype):
        _common.wide_mm(x, block.mT, out.dtype, out=out[:, classes])
    return out if bias is None else out.add_(bias[: weight.shape[0]])


def _times_weight(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G W, wide."""
    total = None
    for classes, block in _operand_blocks(weight, dtype):
        part = _common.wide_mm(gradient[:, classes], block, dtype)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _operand_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight, whole where products take it as it is, else in blocks of classes cast to the wide dtype."""
    if weight.dtype == dtype or (weight.is_cuda and _common.narrow(weight)):
        yield slice(None), weight
        return
    step = max(CAST_BLOCK // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], step):
        classes = slice(start, start + step)
        yield classes, weight[classes].to(dtype)


def _make_differentiable(op: Any, name: str, tensors: int) -> None:
    """Fake implementation and gradient of either op, whose first `tensors` arguments are tensors, with the student's
    side in front and what the target is made of from position 6 on, and the next four needs and per_row."""

    def fake(*inputs):  # type: ignore[no-untyped-def]
        student, weight, target, per_row = inputs[0], inputs[1], inputs[6], inputs[tensors + 3]
        dtype = _common.compute_dtype(student, target)
        loss, *gradients = _outputs(student, weight, inputs[tensors : tensors + 3], dtype)
        return loss if per_row else loss.new_empty(()), *gradients

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *ctx.in_forward, ctx.per_row = inputs[tensors : tensors + 4]
        ctx.options = inputs[tensors + 4 :]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        gradients = output[1:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[:tensors] if ctx.per_row else gradients))

    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward(name)
        nothing = (None,) * (tensors + 4 + len(ctx.options))
        if grad_loss is None:
            return nothing
        if ctx.per_row:
            needs = ctx.needs_input_grad[:3]
            saved = ctx.saved_tensors  # once: a checkpoint computes them again, and only once
            before, after = saved[:5], saved[6:]
            # G may be float16: the rows' weights are taken out of it as far as they are small, and put back here.
            weights = grad_loss if before[4] is None else grad_loss.masked_fill(~before[4], 0)
            weights, unit = _common.unit(weights)
            _, *gradients = op(*before, weights, *after, *needs, True, *ctx.options)
            learned = [
                _common.scaled(g, unit, t) if need else None
                for g, need, t in zip(gradients, needs, ctx.dtypes, strict=True)
            ]
        else:
            learned = [
                _common.scaled(g, grad_loss, t) if need else None
                for g, need, t in zip(ctx.saved_tensors, ctx.in_forward, ctx.dtypes, strict=True)
            ]
        return *learned, *nothing[3:]

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)


_make_differentiable(_linear_divergence, "the linear loss", tensors=9)
_make_differentiable(_linear_topk_divergence, "linear_topk_soft_cross_entropy", tensors=8)
