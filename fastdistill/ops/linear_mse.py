"""Projection + mean squared error: `mean_d (student @ weight.T + bias - teacher)^2` per token.

Only the residual R = X W^T + b - T (chunk, d_t) of one chunk of tokens is ever stored. With r the weight of a token's
loss,

    dX = (2 / d_t) r R W        dW = (2 / d_t) (r R)^T X        db = (2 / d_t) sum r R

so a chunk that is still in the cache yields loss and gradients in three products, the minimum. For a reduced loss r is
known up to a common factor: the forward computes the products with r = 1, or with the item weights, and the backward
scales them. For per-token losses r arrives with the backward, which runs the same chunks again. The factor 2 / d_t
always comes last: R fits the range of float16, while R / 1000 would underflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _common

# R of a chunk is 3 MiB at d_t = 768 in float32: larger than what the products need to run at full speed, small enough
# to stay in the last-level cache between them.
CHUNK = 1024


class _Call(NamedTuple):
    """The arguments of the op, or a chunk of them."""

    student: Tensor  # (N, d_s)
    weight: Tensor | None  # (d_t, d_s)
    teacher: Tensor  # (N, d_t)
    bias: Tensor | None  # (d_t)
    mask: Tensor | None  # (N)
    token_weight: Tensor | None  # (N), r; None: 1
    per_token: bool
    needs_student: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation and of the loss."""
        return _common.compute_dtype(self.student, self.weight, self.teacher, self.bias)

    def part(self, chunk: slice) -> _Call:
        mask, token_weight = (None if x is None else x[chunk] for x in (self.mask, self.token_weight))
        student, teacher = self.student[chunk], self.teacher[chunk]
        return self._replace(student=student, teacher=teacher, mask=mask, token_weight=token_weight)


def linear_mse(
    student: Tensor, weight: Tensor | None, teacher: Tensor, bias: Tensor | None, mask: Tensor | None,  # as in `_Call`
    *, item_weights: Tensor | None, per_token: bool, backend: str,  # (N), factors of the tokens' losses
) -> Tensor:  # (N) or () # fmt: skip
    # The gradients of per-token losses are known in the backward only, which computes the residual again.
    learned = (student, weight, bias)
    needs = [not per_token and torch.is_grad_enabled() and x is not None and x.requires_grad for x in learned]
    if item_weights is None:
        return _linear_mse(student, weight, teacher, bias, mask, None, per_token, *needs, backend)[0]
    weights = item_weights.to(_common.compute_dtype(student, weight, teacher, bias))
    weights = weights if mask is None else weights.where(mask, 0)
    mask = weights != 0
    if per_token:
        return _linear_mse(student, weight, teacher, bias, mask, None, per_token, *needs, backend)[0] * weights
    weights, unit = _common.unit(weights)  # the residual times its weight may be float16
    return _linear_mse(student, weight, teacher, bias, mask, weights, per_token, *needs, backend)[0] * unit


def _forward(*inputs):  # type: ignore[no-untyped-def]
    """Returns the loss (N) or (); r R W (N, d_s), (r R)^T X (d_t, d_s), sum r R (d_t), empty where not needed."""
    *fields, backend = inputs
    call = _Call(*fields)
    loss, *gradients = _outputs(call)
    with _common.no_autocast(call.student):
        (_with_kernel if backend == "triton" else _in_chunks)(call, loss, *gradients)
    loss /= call.teacher.shape[1]
    if call.per_token:
        return loss, *gradients
    return loss.sum() if call.token_weight is None else (loss * call.token_weight).sum(), *gradients


def _in_chunks(call: _Call, loss: Tensor, d_student: Tensor, d_weight: Tensor, d_bias: Tensor) -> None:
    dtype = loss.dtype
    for start in range(0, len(call.student), CHUNK):
        chunk = slice(start, start + CHUNK)
        x, weight, teacher, bias, mask, token_weight, *_ = call.part(chunk)  # x (C, d_s)
        residual = x.to(dtype, copy=True) if weight is None else _common.wide_mm(x, weight.mT, dtype)  # (C, d_t)
        residual -= teacher
        if bias is not None:
            residual += bias
        if mask is not None:  # a masked token may hold NaN: overwrite, do not multiply
            residual.masked_fill_(~mask[:, None], 0)
        loss[chunk] = torch.linalg.vector_norm(residual, dim=1).square_()
        if not (call.needs_student or call.needs_weight or call.needs_bias):
            continue
        if token_weight is not None:
            residual *= token_weight[:, None]
        if call.needs_bias:
            d_bias += residual.sum(0)
        operand = residual.to(x.dtype) if x.is_cuda else residual  # a GPU multiplies 16-bit operands
        if call.needs_weight:
            clean = x if mask is None else x.masked_fill(~mask[:, None], 0)
            _common.add_mm_(d_weight, operand.mT, clean)
        if call.needs_student:
            d_student[chunk] = residual if weight is None else _common.wide_mm(operand, weight, dtype)


def _with_kernel(call: _Call, loss: Tensor, d_student: Tensor, d_weight: Tensor, d_bias: Tensor) -> None:
    from fastdistill.kernels import linear_mse as kernels

    tokens, width = call.teacher.shape
    bias, mask, token_weight = (None if x is None else x.contiguous() for x in call[3:6])
    call = call._replace(bias=bias, mask=mask, token_weight=token_weight)
    dtype = call.student.dtype if _common.narrow(call.student) else loss.dtype  # of R
    products = call.needs_weight or (call.needs_student and call.weight is not None)
    size = max(kernels.CHUNK_BYTES // (width * dtype.itemsize), 1024) if products else max(tokens, 1)
    residual = call.student.new_empty(min(size, tokens), width, dtype=dtype) if products else None
    clean = None
    if call.needs_weight and mask is not None:
        clean = torch.empty_like(call.student[:size], memory_format=torch.contiguous_format)
    for start in range(0, tokens, size):
        chunk = slice(start, min(start + size, tokens))
        part, dx = call.part(chunk), d_student[chunk]
        r, x = (None if y is None else y[: chunk.stop - start] for y in (residual, clean))
        if call.weight is None and call.needs_student and r is None:
            r = dx  # R is dX
        kernels.residual(*part[:6], loss=loss[chunk], out=r, clean=x, d_bias=d_bias if call.needs_bias else None)
        if residual is None or r is None:
            continue
        if call.needs_weight:
            _common.add_mm_(d_weight, r.mT, part.student if x is None else x)
        if call.needs_student and call.weight is not None:
            if r.is_cuda and r.dtype == call.weight.dtype == dx.dtype:
                torch.mm(r, call.weight, out=dx)  # rounded once, out of the accumulator
            else:
                dx.copy_(_common.wide_mm(r, call.weight, loss.dtype))
        elif call.needs_student:
            dx.copy_(r)


def _outputs(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates what the chunks add to. dW and db are sums over tokens and stay wide. dX has the student's dtype unless
    that is float16, where the small values that a loss scale will multiply would lose their digits."""
    student, width, dtype = call.student, call.teacher.shape[1], call.dtype
    loss = student.new_empty(student.shape[0], dtype=dtype)
    keep = dtype if student.dtype == torch.float16 else student.dtype
    d_student = student.new_empty(student.shape if call.needs_student else 0, dtype=keep)
    d_weight = student.new_zeros((width, student.shape[1]) if call.needs_weight else 0, dtype=dtype)
    d_bias = student.new_zeros(width if call.needs_bias else 0, dtype=dtype)
    return loss, d_student, d_weight, d_bias


def _fake(*inputs):  # type: ignore[no-untyped-def]
    call = _Call(*inputs[:-1])
    loss, *gradients = _outputs(call)
    return loss if call.per_token else loss.new_empty(()), *gradients


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, weight, teacher, bias, mask, _, ctx.per_token, *ctx.in_forward, ctx.backend = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
    ctx.width = teacher.shape[1]
    ctx.save_for_backward(*((student, weight, teacher, bias, mask) if ctx.per_token else gradients))


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("linear_mse")
    nothing = (None,) * 11
    if grad_loss is None:
        return nothing
    if ctx.per_token:
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        *tensors, mask = ctx.saved_tensors
        weights = grad_loss if mask is None else grad_loss.masked_fill(~mask, 0)
        weights, scale = _common.unit(weights)
        _, *gradients = _linear_mse(*tensors, mask, weights, True, *needs, ctx.backend)
    else:
        needs, gradients, scale = ctx.in_forward, ctx.saved_tensors, grad_loss
    scale = scale * (2 / ctx.width)
    d_student, d_weight, d_bias = (
        _common.scaled(g, scale, dtype) if need else None
        for g, need, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
    )
    return d_student, d_weight, None, d_bias, *nothing[4:]


_linear_mse = _common.registered(
    "linear_mse",
    f"({_common.schema(_Call)}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip
