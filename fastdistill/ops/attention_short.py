"""attention_mse of short sequences on a GPU: one kernel writes the loss and both gradients.

The forward leaves the gradients for a loss that will get the gradient 1, in the dtype of the inputs. The first backward
launches the same kernel, which returns at once if that came true, and else computes the gradients again, each rounded
once. A second backward of the same graph computes them again: it gives the bits of the first. For inputs of N bytes and
gradients of G, forward and backward move N + G bytes if the gradient is 1, else 2 (N + G). Gradients in float32 that
wait for their factor would take N + 5 G: at 26 / 64 heads 43 MB, where these take 23 or 46.

Whoever traces sees one registered op that computes no gradient, and another for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _common
from ._attention import SCHEMA, Attention


def takes_short(call: Attention) -> bool:
    """Returns whether one program holds all scores of a head: then nothing moves fewer bytes than this kernel."""
    from ..kernels import attention_short as kernels

    return kernels.fits(call)


def attention_short(call: Attention, number: float | None, num_items: Tensor | None) -> Tensor:
    """Returns the sum of squares () divided by `number`, by `num_items` (), or by the number of allowed pairs."""
    return _short(*call, number, num_items, call.differentiable() and not _common.traced())[0]


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    """Returns the loss (), its divisor () float64, dQ and dK (empty if not wanted)."""
    from ..kernels import attention_short as kernels

    *fields, number, num_items, differentiable = inputs
    call = Attention(*fields)
    _, _, d_query, d_key = _outputs(call, differentiable)
    gradients = (d_query, d_key) if differentiable else (None, None)
    return *kernels.loss(call, number, num_items, *gradients), d_query, d_key


def _outputs(call: Attention, differentiable: bool) -> tuple[Tensor, ...]:
    student = call.tensors()[:2]
    gradients = [torch.empty_like(x) if differentiable else x.new_empty(0) for x in student]
    return student[0].new_empty((), dtype=call.dtype), student[0].new_empty((), dtype=torch.float64), *gradients


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *fields, _, _, differentiable = inputs
    return _outputs(Attention(*fields), differentiable)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *fields, _, _, differentiable = inputs
    call, (_, divisor, *gradients) = Attention(*fields), output
    ctx.gradients = gradients if differentiable else None
    ctx.save_for_backward(*call.tensors(), call.key_mask, call.query_mask, divisor)
    ctx.scales, ctx.is_causal = (call.student_scale, call.teacher_scale), call.is_causal


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    _common.refuse_double_backward("attention_mse")
    gradients, ctx.gradients = ctx.gradients, None
    nothing = (None,) * (len(Attention._fields) + 1)
    if grad_loss is None:
        return None, None, *nothing
    sq, sk, tq, tk, key_mask, query_mask, divisor = ctx.saved_tensors
    call = Attention(sq, sk, tq, tk, ctx.scales[0], ctx.scales[1], key_mask, query_mask, ctx.is_causal, None)
    if gradients is None:
        compute = _gradients_op if _common.traced() else _gradients
        return *compute(grad_loss, *call, divisor), *nothing
    d_query, d_key = gradients
    _launch(grad_loss, call, divisor, d_query, d_key, 1.0)
    return d_query, d_key, *nothing


def _gradients(grad_loss: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *fields, divisor = inputs
    call = Attention(*fields)
    d_query, d_key = (torch.empty_like(x) for x in call.tensors()[:2])
    _launch(grad_loss, call, divisor, d_query, d_key, math.nan)
    return d_query, d_key


def _launch(
    grad_loss: Tensor, call: Attention, divisor: Tensor, d_query: Tensor, d_key: Tensor, expected: float
) -> None:
    from ..kernels import attention_short as kernels

    kernels.gradients(grad_loss, call, divisor, d_query, d_key, expected)


_gradients_op: Any = torch.library.custom_op(
    f"{_common.NAMESPACE}::attention_mse_short_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor grad_loss, {SCHEMA}, Tensor divisor) -> (Tensor, Tensor)",
)


@_gradients_op.register_fake
def _(grad_loss, student_query, student_key, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student_query), torch.empty_like(student_key)


_short = _common.registered(
    "attention_mse_short",
    f"({SCHEMA}, Scalar? number, Tensor? num_items, bool differentiable) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip
