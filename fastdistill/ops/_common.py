"""Shared parts of all ops: the dtype of the computation, products with wide results, and the scaling of gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", float: "float", float | None: "float?",
    str: "str",
}  # fmt: skip


def schema(fields: type) -> str:
    """Returns a NamedTuple's fields in torch.library's language: registered ops take them one by one, in this order."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns float64 if any tensor is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def widest_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype for sums that cancel: float64 wherever the device of x supports it."""
    if x.device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(x.device).has_fp64 else torch.float32
    return torch.float32 if x.device.type == "mps" else torch.float64


def narrow(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Computes a @ b; the result comes out of the accumulator in `dtype`, even for 16-bit operands."""
    if a.is_cuda and dtype == torch.float32 and narrow(a) and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to total; the product comes out of the accumulator in total's dtype."""
    if total.is_cuda and total.dtype == torch.float32 and narrow(a) and a.dtype == b.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast where it is on: backward may run under the caller's, which would round our products."""
    kind = x.device.type  # to enter torch.autocast takes as long as two small operations
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * scale (0-d), rounded once to `dtype`. Backward may run again, so it is not done in place."""
    # A 0-d factor would be rounded to the gradient's dtype first; as a 1-d tensor it keeps its own.
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale.reshape((1,) * max(gradient.dim(), 1)), out=out)


def unit(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (weights / u, u) with u () a power of 2: the largest becomes about 1, so none underflows in float16."""
    if weights.numel() == 0:
        return weights, weights.new_ones(())
    _, exponent = torch.frexp(weights.abs().amax())
    u = torch.ldexp(weights.new_ones(()), exponent.clamp(-100, 100))
    return weights / u, u


def refuse_double_backward(op: str) -> None:
    """Raises in a backward with create_graph=True, which autograd runs with gradients enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} cannot be differentiated twice: call backward without create_graph=True, or use backend='reference'"
        )


def traced() -> bool:
    """Returns whether torch.compile or a dispatch mode (fake tensors, a profiler of operations) sees each operation."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def registered(
    name: str,
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Returns an op with a gradient: torch.library's for whoever traces it, else a plain autograd.Function.

    torch.library costs tens of microseconds a call, more than a small loss itself takes.
    """
    op = torch.library.custom_op(f"fastdistill::{name}", forward, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)

    def run(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs):  # type: ignore[no-untyped-def]
        return (op if traced() else function.apply)(*inputs)

    return call
