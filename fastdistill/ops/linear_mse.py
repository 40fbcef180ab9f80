"""Projection + mean squared error: `mean_d (student @ weight.T + bias - teacher)^2` per token.

Only the residual R = X W^T + b - T (chunk, d_t) of one chunk of tokens is ever stored. With r the weight of a token's
loss,

    dX = (2 / d_t) r R W        dW = (2 / d_t) (r R)^T X        db = (2 / d_t) sum r R

so a chunk that is still in the cache yields loss and gradients in three products, the minimum. The forward of a reduced
loss knows r up to the gradient that the loss will get, and computes the gradients as if that were 1: r is the item's
weight divided by the count. The backward hands them over, scaled if it was not 1. For per-token losses r arrives with
the backward, which runs the same chunks again. float16 has no range for r R / 1000: there the count, a common factor of
the weights, and 2 / d_t come last.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from . import _common

# R of a chunk is 3 MiB at d_t = 768 in float32: larger than what the products need to run at full speed, small enough
# to stay in the last-level cache between them.
CHUNK = 1024

FEW = 4096  # residuals; with more, chunks are as fast


class _Call(NamedTuple):
    """The arguments of the op, or a chunk of them."""

    student: Tensor  # (N, d_s)
    weight: Tensor | None  # (d_t, d_s)
    teacher: Tensor  # (N, d_t)
    bias: Tensor | None  # (d_t)
    mask: Tensor | None  # (N)
    token_weight: Tensor | None  # (N), multiplies the gradients, and the reduced loss; None: 1
    divisor: Tensor | None  # (), on the tokens' device, divides the reduced loss; None: 1
    scale: float  # multiplies the loss
    per_token: bool
    needs_student: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation and of the loss."""
        return _common.compute_dtype(self.student, self.weight, self.teacher, self.bias)

    @property
    def differentiates(self) -> bool:
        return self.needs_student or self.needs_weight or self.needs_bias

    @property
    def wants_loss(self) -> bool:
        """Whether the loss is wanted: the backward of per-token losses runs for the gradients alone."""
        return not (self.per_token and self.differentiates)

    def part(self, chunk: slice) -> _Call:
        if chunk == slice(0, len(self.student)):
            return self
        mask, token_weight = (None if x is None else x[chunk] for x in (self.mask, self.token_weight))
        student, teacher = self.student[chunk], self.teacher[chunk]
        return self._replace(student=student, teacher=teacher, mask=mask, token_weight=token_weight)


def linear_mse(
    student: Tensor, weight: Tensor | None, teacher: Tensor, bias: Tensor | None, mask: Tensor | None,  # as in `_Call`
    *, item_weights: Tensor | None,  # (N), factors of the tokens' losses
    divisor: int | float | Tensor | None,  # divides the reduced loss where `_common.divides` says so
    per_token: bool, backend: str,
) -> Tensor:  # (N) or () # fmt: skip
    # The gradients of per-token losses are known in the backward only, which computes the residual again.
    learned = (student, weight, bias)
    needs = [not per_token and torch.is_grad_enabled() and x is not None and x.requires_grad for x in learned]
    factor, divisor = _common.host_factor(divisor)
    unit = token_weight = None
    if item_weights is not None:
        weights = item_weights.to(_common.compute_dtype(student, weight, teacher, bias))
        weights = weights if mask is None else weights.where(mask, 0)
        mask = weights != 0
        if per_token:
            unit = weights
        elif student.dtype == torch.float16:
            token_weight, unit = _common.unit(weights)
        else:
            token_weight = weights
    scale = factor / teacher.shape[1]
    call = _Call(student, weight, teacher, bias, mask, token_weight, divisor, scale, per_token, *needs)
    if _common.traced():
        loss = _op(*call, backend)[0]
    else:
        loss = _Eager.apply(student, weight, bias, call, backend)
    return loss if unit is None else loss * unit


# Loss (N) or (), dX (N, d_s), dW (d_t, d_s), db (d_t); gradients are empty where not needed.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _run(call: _Call, backend: str) -> Outputs:
    if call.student.shape[0] == 0:
        loss, d_student, d_weight, d_bias = _loss(call), *_gradients(call)
        return loss.zero_(), d_student, d_weight.zero_(), d_bias.zero_()
    # float16 gradients come without the factor, which the backward knows as well.
    slope = 1.0 if call.student.dtype == torch.float16 else 2 * call.scale
    if backend == "triton":
        return _with_kernel(call, slope)
    return _of_few(call, slope) if _are_few(call) else _in_chunks(call, slope)


def _are_few(call: _Call) -> bool:
    """Returns whether to call the operations of a CPU takes all the time."""
    student, teacher = call.student, call.teacher
    return (
        teacher.numel() <= FEW
        and student.device.type == "cpu"
        and student.dtype == teacher.dtype in (torch.float32, torch.float64)
        and call.weight is not None
        and call.mask is call.token_weight is call.divisor is None
        and not call.per_token
    )


def _of_few(call: _Call, slope: float) -> Outputs:
    """As `_in_chunks`, in few operations."""
    x, weight, teacher, bias, *_ = call
    assert weight is not None
    residual = torch.mm(x, weight.mT) if bias is None else torch.addmm(bias, x, weight.mT)
    residual.sub_(teacher)
    flat = residual.view(-1)
    loss = torch.dot(flat, flat).mul_(call.scale)
    if not call.differentiates:
        return loss, *_gradients(call)
    residual.mul_(slope)
    none = flat[:0]
    return (
        loss, torch.mm(residual, weight) if call.needs_student else none,
        torch.mm(residual.mT, x) if call.needs_weight else none, residual.sum(0) if call.needs_bias else none,
    )  # fmt: skip


def _in_chunks(call: _Call, slope: float) -> Outputs:
    d_student, d_weight, d_bias = _gradients(call)
    dtype, tokens, token_weight = call.dtype, call.student.shape[0], call.token_weight
    if call.divisor is not None:
        inverse = _common.inverse(call.divisor, dtype)
        token_weight = inverse.expand(tokens) if token_weight is None else token_weight * inverse
        call = call._replace(token_weight=token_weight)
    losses = []
    for start in range(0, tokens, CHUNK):
        chunk = slice(start, min(start + CHUNK, tokens))
        x, weight, teacher, bias, mask, weights, *_ = call.part(chunk)  # x (C, d_s)
        residual = teacher.to(dtype, copy=bias is None)  # (C, d_t), first T - b
        if bias is not None:
            residual = residual - bias
        if weight is None:
            torch.sub(x.to(dtype), residual, out=residual)
        else:
            _common.add_mm_(residual, x, weight.mT, beta=-1)
        if mask is not None:  # a masked token may hold NaN: overwrite, do not multiply
            residual.masked_fill_(~mask[:, None], 0)
        if call.wants_loss:
            losses.append(torch.linalg.vector_norm(residual, dim=1).square_())
        if not call.differentiates:
            continue
        if weights is not None:
            residual *= weights[:, None]
        if call.needs_bias:
            torch.mul(residual.sum(0), slope, out=d_bias) if start == 0 else d_bias.add_(residual.sum(0), alpha=slope)
        operand = residual.to(x.dtype) if x.is_cuda else residual  # a GPU multiplies 16-bit operands
        if call.needs_weight:
            clean = x if mask is None else x.masked_fill(~mask[:, None], 0)
            _common.add_mm_(d_weight, operand.mT, clean, beta=int(start > 0), alpha=slope)
        if call.needs_student:
            dx = d_student if tokens <= CHUNK else d_student[chunk]
            if weight is None:
                torch.mul(residual, slope, out=dx)
            else:
                _common.mm_(dx, operand, weight, alpha=slope)
    if not call.wants_loss:
        return _loss(call), d_student, d_weight, d_bias
    loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    if not call.per_token:
        loss = (loss if token_weight is None else loss * token_weight).sum()
    return loss.mul_(call.scale), d_student, d_weight, d_bias


def _with_kernel(call: _Call, slope: float) -> Outputs:
    from ..kernels import linear_mse as kernels

    d_student, d_weight, d_bias = _gradients(call)
    tokens, width = call.teacher.shape
    if any(x is not None and not x.is_contiguous() for x in call[3:6]):
        bias, mask, token_weight = (None if x is None else x.contiguous() for x in call[3:6])
        call = call._replace(bias=bias, mask=mask, token_weight=token_weight)
    wide = call.dtype
    dtype = call.student.dtype if _common.narrow(call.student) else wide  # of R
    products = call.needs_weight or (call.needs_student and call.weight is not None)
    size = max(kernels.CHUNK_BYTES // (width * dtype.itemsize), 1024) if products else tokens
    residual = call.student.new_empty(min(size, tokens), width, dtype=dtype) if products else None
    clean = None
    if call.needs_weight and call.mask is not None:
        clean = torch.empty_like(call.student[:size], memory_format=torch.contiguous_format)
    losses: list[Tensor] = []
    for start in range(0, tokens, size):
        part, dx, r, x = call, d_student, residual, clean
        if tokens > size:
            chunk = slice(start, min(start + size, tokens))
            part, dx = call.part(chunk), d_student[chunk]
            r, x = (None if y is None else y[: chunk.stop - start] for y in (residual, clean))
        if call.weight is None and call.needs_student and r is None:
            r = dx  # R is dX
        squares, sums = kernels.residual(
            *part[:7], scale=call.scale, slope=slope, dtype=wide, weighs_loss=not call.per_token,
            wants_loss=call.wants_loss, wants_bias=call.needs_bias, out=r, clean=x,
        )  # fmt: skip
        if squares is not None:
            losses.append(squares.sum(0) if call.per_token else squares.sum())
        if sums is not None:
            torch.sum(sums, 0, out=d_bias) if start == 0 else d_bias.add_(sums.sum(0))
        if residual is None or r is None:
            continue
        if call.needs_weight:
            _common.add_mm_(d_weight, r.mT, part.student if x is None else x, beta=int(start > 0))
        if call.needs_student and call.weight is not None:
            _common.mm_(dx, r, call.weight)
        elif call.needs_student:
            dx.copy_(r)
    if not losses:
        loss = _loss(call)
    elif call.per_token:
        loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    else:
        loss = reduce(Tensor.add_, losses)
    return loss, d_student, d_weight, d_bias


def _loss(call: _Call) -> Tensor:
    tokens = call.student.shape[0] if call.wants_loss else 0
    return call.student.new_empty(tokens if call.per_token else (), dtype=call.dtype)


def _gradients(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates what the chunks write. dW and db are sums over tokens and stay wide. dX has the student's dtype unless
    that is float16, where the small values that a loss scale will multiply would lose their digits."""
    student, width, dtype = call.student, call.teacher.shape[1], call.dtype
    keep = dtype if student.dtype == torch.float16 else student.dtype
    d_student = student.new_empty(student.shape if call.needs_student else 0, dtype=keep)
    d_weight = student.new_empty((width, student.shape[1]) if call.needs_weight else 0, dtype=dtype)
    d_bias = student.new_empty(width if call.needs_bias else 0, dtype=dtype)
    return d_student, d_weight, d_bias


# -- autograd ------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """The op in eager calls. What has no gradient comes as one value: autograd looks at each argument."""

    @staticmethod
    def forward(ctx, student, weight, bias, call, backend):  # type: ignore[no-untyped-def]
        loss, *gradients = _run(call, backend)
        _keep(ctx, call, gradients, backend)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        return *_learned(ctx, grad_loss, ctx.needs_input_grad[:3]), None, None


def _keep(ctx, call, gradients, backend):  # type: ignore[no-untyped-def]
    """Keeps what the backward needs."""
    ctx.scale, ctx.per_token, *ctx.in_forward = call[7:]
    ctx.backend, ctx.dtypes = backend, [None if x is None else x.dtype for x in (call.student, call.weight, call.bias)]
    ctx.save_for_backward(*(call[:5] if call.per_token else gradients))


def _learned(ctx, grad_loss, needs):  # type: ignore[no-untyped-def]
    """Returns the gradients of student, weight and bias."""
    _common.refuse_double_backward("linear_mse")
    gradients, scale = ctx.saved_tensors, grad_loss
    late = ctx.dtypes[0] == torch.float16  # the factors of R
    if ctx.per_token:
        scale = None
        *tensors, mask = gradients
        weights = grad_loss if mask is None else grad_loss.masked_fill(~mask, 0)
        if late:
            weights, scale = _common.unit(weights)
        _, *gradients = _op(*tensors, mask, weights, None, ctx.scale, True, *needs, ctx.backend)
    else:
        needs = ctx.in_forward
    if late:
        scale = scale * (2 * ctx.scale)
    dtypes = [dtype if need else None for need, dtype in zip(needs, ctx.dtypes, strict=True)]
    return _common.finished(gradients, scale, dtypes, ctx.backend)


def _forward(*inputs):  # type: ignore[no-untyped-def]
    with _common.no_autocast(inputs[0]):  # the backward may run under the caller's
        return _run(_Call(*inputs[:-1]), inputs[-1])


def _fake(*inputs):  # type: ignore[no-untyped-def]
    call = _Call(*inputs[:-1])
    return _loss(call), *_gradients(call)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _keep(ctx, _Call(*inputs[:-1]), output[1:], inputs[-1])


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    if grad_loss is None:
        return (None,) * 13
    d_student, d_weight, d_bias = _learned(ctx, grad_loss, [ctx.needs_input_grad[i] for i in (0, 1, 3)])
    return d_student, d_weight, None, d_bias, *(None,) * 9


_op = _common.registered(
    "linear_mse",
    f"({_common.schema(_Call)}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip
