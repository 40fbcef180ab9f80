"""Projection + mean squared error: `mean_d (student @ weight.T + bias - teacher)^2` per token.

The residual R = X W^T + b - T (chunk, d_t) of one chunk of tokens is all that is ever stored. With r the weight of a
token's loss,

    dX = (2 / d_t) r R W        dW = (2 / d_t) (r R)^T X        db = (2 / d_t) sum r R

so a chunk that is still in the cache yields loss and gradients in three products, the minimum. For a reduced loss r is
the same for every token: the products are computed in the forward, with r = 1, and scaled in the backward. For
per-token losses r arrives with the backward, which runs the same chunks again. The factor 2 / d_t always comes last:
R itself fits the range of float16 where a thousandth of it would not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import _common

# R of a chunk is 3 MiB at d_t = 768 in float32: larger than what the products need to run at full speed, small enough
# to stay in the last-level cache between them.
CHUNK = 1024


def linear_mse(
    student: Tensor,  # (N, d_s)
    weight: Tensor | None,  # (d_t, d_s)
    teacher: Tensor,  # (N, d_t)
    bias: Tensor | None,  # (d_t)
    mask: Tensor | None,  # (N)
    per_token: bool,
    backend: str,
) -> Tensor:  # (N) or ()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, weight, bias)]
    # Per-token losses wait for their weights: the backward recomputes.
    in_forward = [need and not per_token for need in needs]
    return _linear_mse(student, weight, teacher, bias, mask, None, per_token, *in_forward, backend)[0]


@torch.library.custom_op("fastdistill::linear_mse", mutates_args=())
def _linear_mse(
    student: Tensor,
    weight: Tensor | None,
    teacher: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    token_weight: Tensor | None,  # (N), r; None: 1
    per_token: bool,
    needs_student: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N) or (); r R W (N, d_s), (r R)^T X (d_t, d_s), sum r R (d_t), empty where not needed."""
    dtype = _common.compute_dtype(student, weight, teacher, bias)
    loss, d_student, d_weight, d_bias = _outputs(student, teacher, needs_student, needs_weight, needs_bias, dtype)
    tokens, width = teacher.shape
    with _common.no_autocast(student):
        if backend == "triton":
            _with_kernel(student, weight, teacher, bias, mask, token_weight, loss, d_student, d_weight, d_bias)
            loss /= width
            return loss if per_token else loss.sum(), d_student, d_weight, d_bias
        for start in range(0, tokens, CHUNK):
            chunk = slice(start, start + CHUNK)
            x = student[chunk]  # (C, d_s)
            if weight is None:
                residual = x.to(dtype, copy=True)  # (C, d_t)
            else:
                residual = _common.wide_mm(x, weight.mT, dtype)
            residual -= teacher[chunk]
            if bias is not None:
                residual += bias
            if mask is not None:  # a masked token may hold anything: overwrite, do not multiply
                residual.masked_fill_(~mask[chunk, None], 0)
            loss[chunk] = torch.linalg.vector_norm(residual, dim=1).square_()
            if not (needs_student or needs_weight or needs_bias):
                continue
            if token_weight is not None:
                residual *= token_weight[chunk, None]
            if needs_bias:
                d_bias += residual.sum(0)
            if needs_weight:
                clean = x if mask is None else x.masked_fill(~mask[chunk, None], 0)
                # The residual of 16-bit operands goes back to 16 bits where the product takes them (GPU).
                operand = residual.to(x.dtype) if x.is_cuda else residual
                _common.add_mm_(d_weight, operand.mT, clean)
            if needs_student:
                if weight is None:
                    d_student[chunk] = residual
                else:
                    operand = residual.to(weight.dtype) if x.is_cuda else residual
                    d_student[chunk] = _common.wide_mm(operand, weight, dtype)
        loss /= width
    return loss if per_token else loss.sum(), d_student, d_weight, d_bias


def _with_kernel(
    student: Tensor,
    weight: Tensor | None,
    teacher: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    token_weight: Tensor | None,
    loss: Tensor,  # (N), and the rest as _outputs makes them, to be written
    d_student: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    from fastdistill.kernels import linear_mse as kernels

    tokens, width = teacher.shape
    needs_student, needs_weight, needs_bias = (x.numel() > 0 for x in (d_student, d_weight, d_bias))
    bias, mask, token_weight = (None if x is None else x.contiguous() for x in (bias, mask, token_weight))
    dtype = student.dtype if _common.narrow(student) else loss.dtype  # of R
    products = needs_weight or (needs_student and weight is not None)
    size = max(kernels.CHUNK_BYTES // (width * dtype.itemsize), 1024) if products else max(tokens, 1)
    residual = clean = None
    if products:
        residual = torch.empty(min(size, tokens), width, dtype=dtype, device=student.device)
    if needs_weight and mask is not None:
        clean = torch.empty(min(size, tokens), student.shape[1], dtype=student.dtype, device=student.device)
    for start in range(0, tokens, size):
        chunk = slice(start, min(start + size, tokens))
        count = chunk.stop - start
        r = None if residual is None else residual[:count]
        if weight is None and needs_student and r is None:
            r = d_student[chunk]  # R is dX
        x = student[chunk] if clean is None else clean[:count]
        kernels.residual(
            student[chunk], weight, teacher[chunk], bias, _at(mask, chunk), _at(token_weight, chunk),
            loss=loss[chunk], out=r, clean=None if clean is None else x, d_bias=d_bias if needs_bias else None,
        )  # fmt: skip
        if residual is None or r is None:
            continue
        if needs_weight:
            _common.add_mm_(d_weight, r.mT, x)
        if needs_student and weight is not None:
            if r.is_cuda and r.dtype == weight.dtype == d_student.dtype:
                torch.mm(r, weight, out=d_student[chunk])  # rounded once, out of the accumulator
            else:
                d_student[chunk] = _common.wide_mm(r, weight, loss.dtype)
        elif needs_student:
            d_student[chunk] = r


def _at(x: Tensor | None, chunk: slice) -> Tensor | None:
    return None if x is None else x[chunk]


def _outputs(
    student: Tensor, teacher: Tensor, needs_student: bool, needs_weight: bool, needs_bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the chunks add up. dW and db are sums over tokens and stay wide. dX has the student's dtype, but where
    that is float16: what is small before a loss scale multiplies it would be left with few digits."""
    width = teacher.shape[1]
    loss = student.new_empty(student.shape[0], dtype=dtype)
    keep = dtype if student.dtype == torch.float16 else student.dtype
    d_student = student.new_empty(student.shape if needs_student else 0, dtype=keep)
    d_weight = student.new_zeros((width, student.shape[1]) if needs_weight else 0, dtype=dtype)
    d_bias = student.new_zeros(width if needs_bias else 0, dtype=dtype)
    return loss, d_student, d_weight, d_bias


@_linear_mse.register_fake
def _(student, weight, teacher, bias, mask, token_weight, per_token, needs_student, needs_weight, needs_bias, _):  # type: ignore[no-untyped-def]
    dtype = _common.compute_dtype(student, weight, teacher, bias)
    loss, *gradients = _outputs(student, teacher, needs_student, needs_weight, needs_bias, dtype)
    return loss if per_token else loss.new_empty(()), *gradients


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, weight, teacher, bias, mask, _, ctx.per_token, *ctx.in_forward, ctx.backend = inputs
    _, d_student, d_weight, d_bias = output
    ctx.mark_non_differentiable(d_student, d_weight, d_bias)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
    ctx.width = teacher.shape[1]
    if ctx.per_token:
        ctx.save_for_backward(student, weight, teacher, bias, mask)
    else:
        ctx.save_for_backward(d_student, d_weight, d_bias)


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("linear_mse")
    nothing = (None,) * 11
    if grad_loss is None:
        return nothing
    if ctx.per_token:
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        student, weight, teacher, bias, mask = ctx.saved_tensors
        weights = grad_loss if mask is None else grad_loss.masked_fill(~mask, 0)
        weights, scale = _common.unit(weights)
        _, *gradients = _linear_mse(student, weight, teacher, bias, mask, weights, True, *needs, ctx.backend)
    else:
        needs, gradients, scale = ctx.in_forward, ctx.saved_tensors, grad_loss
    scale = scale * (2 / ctx.width)
    d_student, d_weight, d_bias = (
        _common.scaled(g, scale, dtype) if need else None
        for g, need, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
    )
    return d_student, d_weight, None, d_bias, *nothing[4:]


_linear_mse.register_autograd(_backward, setup_context=_setup_context)
