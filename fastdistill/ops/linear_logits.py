"""The losses over classes from hidden states and vocabulary weights: z = x W^T + b, never stored whole.

Only the logits of one chunk of tokens exist, on either side. The row loss (logits.py) takes them block by block and
leaves the gradient G in the place of the student's logits, from which

    dX = G W        dW += G^T X        db += sum G

That makes four products in all, the minimum. The forward of a reduced loss knows each token's weight up to the gradient
that the loss will get. It computes the gradients as if that were 1, and the backward hands them over, scaled if it was
not. Losses per token wait for their weights: the backward runs the chunks again. Tokens that do not count are left out
before the products (_counted.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _common, _rows
from ._counted import Selection, select
from ._rows import BUFFERS, RowOptions, Target, at, capped, checked_labels
from ._topk import kernel_list, listed
from .logits import kernels_of, row_loss

# Tokens of a chunk: enough for products at full speed, within a bound on the bytes of each side's logits.
CHUNK = 1024
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 1 << 27, 3 << 27

# Elements of a block of vocabulary rows that the CPU, which has no product of 16-bit operands, casts at a time.
CAST_BLOCK = 1 << 22


class Inputs(NamedTuple):
    student: Tensor  # (N, d_s)
    student_weight: Tensor  # (>= V, d_s)
    student_bias: Tensor | None  # (>= V)
    teacher: Tensor  # (N, d_t), or with `indices` log-probabilities (N, k)
    teacher_weight: Tensor | None  # (>= V, d_t)
    teacher_bias: Tensor | None  # (>= V)
    indices: Tensor | None  # (N, k)
    labels: Tensor | None  # (N), or (N, 1) once they are checked
    counted: Tensor | None  # (N)
    row_weight: Tensor | None  # (N), multiplies each row's gradient, and the reduced loss; None: 1
    divisor: Tensor | None  # (), on the rows' device, divides the reduced loss; None: 1
    scale: float  # multiplies the reduced loss
    dense: bool  # whether nearly all rows are expected to count
    needs_student: bool
    needs_weight: bool
    needs_bias: bool
    per_row: bool


INPUTS = len(Inputs._fields)


def linear_row_losses(
    student: Tensor,
    *tensors: Tensor | None,  # of `Inputs`, up to `counted`
    item_weights: Tensor | None = None,  # (N), factors of the rows' losses; rows of weight 0 do not count
    divisor: int | float | Tensor | None = None,  # of the reduced loss, where `_common.divides` says so
    dense: bool = False,  # whether nearly all rows are expected to count: a GPU then multiplies all of them
    per_row: bool,
    options: RowOptions,
) -> Tensor:  # (N) or ()
    *others, labels, counted = student, *tensors
    labels = labels if options.hard_weight else None
    # Losses per row wait for their weights.
    needs = [
        not per_row and torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, *tensors[:2])
    ]
    weights, unit = None, None
    if item_weights is not None:
        weights, counted = _rows.weigh(item_weights, counted, _common.compute_dtype(student, tensors[2]))
        if per_row:
            weights, unit = None, weights
        elif student.dtype == torch.float16:  # as is the gradient of the logits, which has their factor
            weights, unit = _common.unit(weights)
    factor, divisor = _common.host_factor(divisor)
    dense = dense and item_weights is None
    inputs = Inputs._make([*others, labels, counted, weights, divisor, factor, dense, *needs, per_row])
    if _common.traced():
        loss = _op(*inputs, *options)[0]
    else:
        loss = _Eager.apply(*others[:3], inputs, options)
    return loss if unit is None else loss * unit


# Loss (N) or (), dX (N, d_s), dW (>= V, d_s), db (>= V); empty where not needed.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _run(inputs: Inputs, options: RowOptions) -> Outputs:
    student, classes = inputs.student, options.classes
    chosen = select(student.shape[0], inputs.counted, inputs.dense, options.backend)
    losses, d_student, d_weight, d_bias = outputs = _outputs(inputs)
    _clear(outputs, chosen, classes)
    inputs = _selected(inputs, chosen, classes)
    loss = losses.new_empty(chosen.size)
    size = _chunk_size(chosen.size, student, classes, loss.dtype)
    wanted = inputs.needs_student or inputs.needs_weight or inputs.needs_bias
    make_rows = _in_blocks if options.backend == "torch" else _in_one_launch
    rows = make_rows(options, inputs, chosen, size, inputs.scale * _unit(student.dtype, options), loss)
    with _common.no_autocast(student):
        for start in range(0, chosen.size, size):
            chunk = slice(start, min(start + size, chosen.size))
            x = _clean(student, chunk, chosen)
            gradient = rows(chunk, x, wanted)
            if gradient is None:
                continue
            if inputs.needs_bias:
                _add_d_bias(d_bias[:classes], gradient[:, :classes], chunk)
            if inputs.needs_weight:
                _add_d_weight(d_weight[:classes], gradient, x, chosen, chunk)
            if inputs.needs_student:
                _put_d_student(d_student, gradient, inputs.student_weight, chosen, chunk)
    if inputs.per_row:
        chosen.put(losses, slice(None), loss)
        return outputs
    if inputs.row_weight is not None:
        loss *= inputs.row_weight
    return loss.sum().mul_(inputs.scale), d_student, d_weight, d_bias


def _selected(inputs: Inputs, chosen: Selection, classes: int) -> Inputs:
    """Returns the inputs with the classes in use, and all but the hidden states with the chosen rows alone."""
    labels, row_weight, indices = (
        None if x is None else chosen.take(x) for x in (inputs.labels, inputs.row_weight, inputs.indices)
    )
    if inputs.divisor is not None:
        inverse = _common.inverse(inputs.divisor, _common.compute_dtype(inputs.student, inputs.teacher))
        row_weight = inverse.expand(chosen.size) if row_weight is None else row_weight * inverse
    return inputs._replace(
        student_weight=inputs.student_weight[:classes],
        teacher=inputs.teacher if indices is None else chosen.take(inputs.teacher), indices=indices,
        labels=checked_labels(labels, chosen.counted, classes), counted=chosen.counted, row_weight=row_weight,
    )  # fmt: skip


def _outputs(inputs: Inputs) -> Outputs:
    """Allocates the losses and the sums over chunks in the wide dtype: the backward rounds once."""
    student, weight = inputs.student, inputs.student_weight
    loss = student.new_empty(
        student.shape[0] if inputs.per_row else (), dtype=_common.compute_dtype(student, inputs.teacher)
    )
    d_student = loss.new_empty(student.shape if inputs.needs_student else 0)
    d_weight = loss.new_empty(weight.shape if inputs.needs_weight else 0)
    d_bias = loss.new_empty(weight.shape[0] if inputs.needs_bias else 0)
    return loss, d_student, d_weight, d_bias


def _clear(outputs: Outputs, chosen: Selection, classes: int) -> None:
    """Writes zeros where no chunk will write."""
    losses, d_student, d_weight, d_bias = outputs
    if (chosen.order is not None and chosen.counted is None) or chosen.size == 0:  # the other rows are left out
        losses.zero_()
        d_student.zero_()
    if chosen.products is not None or chosen.size == 0:  # these products add to what is there
        classes = 0
    for total in (d_weight, d_bias):
        if classes < total.shape[0]:
            total[classes:].zero_()


# -- the rows of a chunk -------------------------------------------------------------------------------------
#
# Takes a chunk of tokens, their hidden states x (C, d_s), and whether a gradient is wanted. Writes their losses and
# returns G (C, V), times the rows' weights and `factor`, as the products take it.
Rows = Callable[[slice, Tensor, bool], Tensor | None]


def _teacher(
    options: RowOptions, inputs: Inputs, chosen: Selection, size: int, dtype: torch.dtype
) -> Callable[[slice], Target]:
    """Returns the function from a chunk to what its student is compared with. Kernels add bias and softcap."""
    teacher, counted = inputs.teacher, inputs.counted
    on_torch = options.backend == "torch"
    if options.soft_weight == 0:
        return lambda chunk: ()
    if inputs.indices is not None:
        given = options, teacher, inputs.indices, counted
        whole = listed(*given, dtype) if on_torch else kernel_list(*given)
        return lambda chunk: tuple(x[chunk] for x in whole)
    assert inputs.teacher_weight is not None
    head = inputs.teacher_weight[: options.classes]
    buffer = teacher.new_empty(size, _row_length(options, chosen), dtype=dtype)

    def logits(chunk: slice) -> Target:
        if not on_torch:  # the row kernels skip rows that are masked out
            return (_logits(chosen.take(teacher, chunk), head, None, buffer, chosen, chunk),)
        z = _logits(_clean(teacher, chunk, chosen), head, inputs.teacher_bias, buffer, chosen, chunk)
        return (capped(z, options.teacher_softcap, z, options.teacher_scale),)

    return logits


def _in_blocks(options: RowOptions, inputs: Inputs, chosen: Selection, size: int, factor: float, loss: Tensor) -> Rows:
    classes, labels, counted = options.classes, inputs.labels, inputs.counted
    teacher_of = _teacher(options, inputs, chosen, size, loss.dtype)
    weights = _rows.row_weights(inputs.row_weight, counted, loss.dtype)
    buffer = loss.new_empty(size, classes)
    block_rows = _rows.rows_of_a_block(size, classes, BUFFERS + 1, buffer)
    work = buffer.new_empty(BUFFERS + 1, block_rows, classes)

    def rows(chunk: slice, x: Tensor, wanted: bool) -> Tensor | None:
        # Overwritten with G.
        logits = _logits(x, inputs.student_weight, inputs.student_bias, buffer, chosen, chunk)
        target = teacher_of(chunk)
        for _, block in _rows.row_blocks(logits.shape[:1], block_rows):
            here = slice(chunk.start + block.start, chunk.start + block.stop)
            *buffers, gradient = work[:, : block.stop - block.start].unbind()
            z = logits[block]
            capped(z, options.student_softcap, z, options.student_scale)
            out = gradient if wanted else None
            loss[here] = row_loss(options, z, tuple(t[block] for t in target), at(labels, here), out, buffers)
            if out is not None:
                if weights is not None:
                    _rows.weigh_rows_(out, weights[here], at(counted, here))
                torch.mul(out, factor, out=z)
        if counted is not None:
            loss[chunk].masked_fill_(~counted[chunk], 0)
        if not wanted:
            return None
        # A GPU multiplies 16-bit operands, so G goes back to 16 bits there; products still come out in float32.
        return logits.to(x.dtype) if x.is_cuda and _common.narrow(x) else logits

    return rows


def _in_one_launch(
    options: RowOptions, inputs: Inputs, chosen: Selection, size: int, factor: float, loss: Tensor
) -> Rows:
    """As `_in_blocks`. The kernel rounds G of 16-bit operands as it writes it; else G takes the place of the logits."""
    weight, row_weight = inputs.student_weight, inputs.row_weight
    if factor != 1:
        row_weight = torch.full_like(loss, factor) if row_weight is None else row_weight * factor
    labels, counted, row_weight = _rows.contiguous(inputs.labels, inputs.counted, row_weight)
    student_bias, teacher_bias = _rows.contiguous(inputs.student_bias, inputs.teacher_bias)
    teacher_of = _teacher(options, inputs, chosen, size, loss.dtype)
    buffer = loss.new_empty(size, _row_length(options, chosen))
    narrow = torch.empty_like(buffer, dtype=weight.dtype) if _common.narrow(weight) else None

    def rows(chunk: slice, x: Tensor, wanted: bool) -> Tensor | None:
        logits = _logits(x, weight, None, buffer, chosen, chunk)
        gradient = None
        if wanted:
            gradient = logits if narrow is None else narrow[: x.shape[0]]
        kernels_of(options.backend, options.tail).rows(
            logits, teacher_of(chunk), at(labels, chunk), at(counted, chunk), options, loss=loss[chunk],
            gradient=gradient, weight=at(row_weight, chunk), student_bias=student_bias, teacher_bias=teacher_bias,
        )  # fmt: skip
        return gradient

    return rows


def _unit(dtype: torch.dtype, options: RowOptions) -> float:
    """Returns the factor of G. float16 ends at 65504 and loses digits below 6e-5: with the largest expected entries at
    1024 to 2048, probabilities keep their digits down to 1e-7."""
    if dtype != torch.float16:
        return 1.0
    slope = options.soft_weight / options.temperature ** (2 if options.kind == "reverse_kl" else 1)
    largest = options.student_scale * (slope + options.hard_weight)
    return 2.0 ** (11 - math.ceil(math.log2(max(largest, 1e-30))))


def _chunk_size(tokens: int, student: Tensor, classes: int, dtype: torch.dtype) -> int:
    limit = CPU_CHUNK_BYTES if student.device.type == "cpu" else GPU_CHUNK_BYTES
    limit = max(min(CHUNK, limit // (classes * dtype.itemsize)), 1)
    chunks = max(-(-tokens // limit), 1)
    return max(-(-tokens // chunks), 1)  # even chunks


def _row_length(options: RowOptions, chosen: Selection) -> int:
    """Returns the length of a row of logits and of G."""
    return chosen.products.padded(options.classes) if chosen.products else options.classes


def _clean(x: Tensor, chunk: slice, chosen: Selection) -> Tensor:
    """Returns the tokens of a chunk, with 0 for masked-out ones that are multiplied: NaN times 0 would reach dW."""
    x = chosen.take(x, chunk)
    if chosen.counted is None or chosen.products:
        return x
    return x.masked_fill(~chosen.counted[chunk].unsqueeze(-1), 0)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor, chosen: Selection, chunk: slice) -> Tensor:
    """Computes x W^T + b in the wide dtype, in the buffer's first rows. Row kernels add b themselves."""
    out = buffer[: x.shape[0]]
    if chosen.products:
        chosen.products.logits(x, weight, chosen.number, chunk.start, out)
        return out
    for classes, block in _operand_blocks(weight, out.dtype):
        _common.wide_mm(x, block.mT, out.dtype, out=out[:, classes])
    return out if bias is None else out.add_(bias[: weight.shape[0]])


def _put_d_student(total: Tensor, gradient: Tensor, weight: Tensor, chosen: Selection, chunk: slice) -> None:
    """Writes G W into the chunk's rows of total."""
    if chosen.products:
        assert chosen.counted is not None
        product = chosen.products.d_hidden(gradient, weight, chosen.number, chunk.start, total.dtype)
        chosen.put(total, chunk, product.masked_fill_(~chosen.counted[chunk].unsqueeze(-1), 0))
        return
    product = total[chunk] if chosen.order is None else total.new_empty(gradient.shape[0], total.shape[1])
    for classes, block in _operand_blocks(weight, total.dtype):
        _common.add_mm_(product, gradient[:, classes], block, beta=int(classes.start > 0))
    if chosen.order is not None:
        chosen.put(total, chunk, product)


def _add_d_weight(total: Tensor, gradient: Tensor, x: Tensor, chosen: Selection, chunk: slice) -> None:
    """Adds G^T X to total, which the first chunk overwrites."""
    if chosen.products:
        chosen.products.add_d_weight(gradient, x, chosen.number, chunk.start, total)
    else:
        _common.add_mm_(total, gradient.mT, x, beta=int(chunk.start > 0))


def _add_d_bias(total: Tensor, gradient: Tensor, chunk: slice) -> None:
    """Adds the sums of G's columns to total, which the first chunk overwrites."""
    if chunk.start == 0:
        torch.sum(gradient, 0, dtype=total.dtype, out=total)
    else:
        total += gradient.sum(0, dtype=total.dtype)


def _operand_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields the weight whole where products take it as it is, else blocks of classes cast to the wide dtype."""
    if weight.dtype == dtype or (weight.is_cuda and _common.narrow(weight)):
        yield slice(0, weight.shape[0]), weight
        return
    step = max(CAST_BLOCK // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], step):
        classes = slice(start, start + step)
        yield classes, weight[classes].to(dtype)


# -- autograd ------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """The op in eager calls. What has no gradient comes as one value: autograd looks at each argument."""

    @staticmethod
    def forward(ctx, student, weight, bias, inputs, options):  # type: ignore[no-untyped-def]
        loss, *gradients = _run(inputs, options)
        _keep(ctx, inputs, options, gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        return *_learned(ctx, grad_loss), None, None


def _keep(ctx, inputs, options, gradients):  # type: ignore[no-untyped-def]
    """Keeps what the backward needs."""
    ctx.options, ctx.dense, ctx.per_row = options, inputs.dense, inputs.per_row
    ctx.in_forward = inputs.needs_student, inputs.needs_weight, inputs.needs_bias
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*(inputs[: Inputs._fields.index("row_weight")] if ctx.per_row else gradients))


def _learned(ctx, grad_loss):  # type: ignore[no-untyped-def]
    """Returns the gradients of the student's hidden states, weight and bias."""
    _common.refuse_double_backward("the linear loss over classes")
    options, dtype = ctx.options, ctx.dtypes[0]
    needs, scale = ctx.in_forward, grad_loss
    gradients = saved = ctx.saved_tensors  # read once: under activation checkpointing a second read recomputes
    if ctx.per_row:
        needs, counted, scale = ctx.needs_input_grad[:3], saved[-1], None
        weights = grad_loss if counted is None else grad_loss.masked_fill(~counted, 0)
        if dtype == torch.float16:  # as is G, which has the weights' factor
            weights, scale = _common.unit(weights)
        _, *gradients = _op(*saved, weights, None, 1.0, ctx.dense, *needs, True, *options)
    if dtype == torch.float16:
        scale = scale / _unit(dtype, options)
    dtypes = [dtype if need else None for need, dtype in zip(needs, ctx.dtypes, strict=True)]
    return _common.finished(gradients, scale, dtypes, options.backend)


def _forward(*flat: Any) -> Outputs:
    """Takes `Inputs` and `RowOptions`, field by field."""
    return _run(Inputs(*flat[:INPUTS]), RowOptions(*flat[INPUTS:]))


def _fake(*flat):  # type: ignore[no-untyped-def]
    return _outputs(Inputs(*flat[:INPUTS]))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _keep(ctx, Inputs(*inputs[:INPUTS]), RowOptions(*inputs[INPUTS:]), output[1:])


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    learned = (None,) * 3 if grad_loss is None else _learned(ctx, grad_loss)
    return *learned, *(None,) * (INPUTS + len(ctx.options) - 3)


_op = _common.registered(
    "linear_row_losses",
    f"({_common.schema(Inputs)}, {_common.schema(RowOptions)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip
