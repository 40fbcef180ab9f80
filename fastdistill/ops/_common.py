"""What every op shares: the dtype it computes in, products that stay wide, and the way gradients are scaled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def widest_dtype(x: Tensor) -> torch.dtype:
    """What sums that cancel are kept in: float64 wherever the device of x has it."""
    if x.device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(x.device).has_fp64 else torch.float32
    return torch.float32 if x.device.type == "mps" else torch.float64


def narrow(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b, float32 or wider out of the accumulator even where the operands are 16-bit."""
    if a.is_cuda and dtype == torch.float32 and narrow(a) and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype out of the accumulator."""
    if total.is_cuda and total.dtype == torch.float32 and narrow(a) and a.dtype == b.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def no_autocast(x: Tensor) -> torch.autocast:
    """Backward may be called under the caller's autocast, which would round our products."""
    return torch.autocast(x.device.type, enabled=False)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale (0-d) rounded once to `dtype`, out of place: backward may run again on the same tensors."""
    # A 0-d factor would be rounded to the gradient's dtype first; as a 1-d tensor it keeps its own.
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale.reshape((1,) * max(gradient.dim(), 1)), out=out)


def unit(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(weights / u, u), u () a power of 2 that makes the largest about 1: float16 has no room for 1e-6 of anything."""
    if weights.numel() == 0:
        return weights, weights.new_ones(())
    _, exponent = torch.frexp(weights.abs().amax())
    u = torch.ldexp(weights.new_ones(()), exponent.clamp(-100, 100))
    return weights / u, u


def refuse_double_backward(op: str) -> None:
    """Called by every backward: with create_graph=True autograd runs it with gradients enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} cannot be differentiated twice: call backward without create_graph=True, or use backend='reference'"
        )


def traced() -> bool:
    """Whether torch.compile or a dispatch mode (fake tensors, a profiler of operations) sees each operation."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
