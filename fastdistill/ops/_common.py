"""Shared parts of all ops: the dtype of the computation, products with wide results, and the scaling of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# torch.library keeps one op of a name in a process, so a copy under another name (a hub kernel) has names of its own.
NAMESPACE = __name__.removesuffix(".ops._common").replace(".", "_")

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", int | None: "SymInt?",
    float: "float", float | None: "float?", str: "str",
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


def add_mm_(total: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """Computes total = beta * total + alpha * a @ b; the product comes out of the accumulator in total's dtype."""
    if total.is_cuda and total.dtype == torch.float32 and narrow(a) and a.dtype == b.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
    elif total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b, beta=beta, alpha=alpha)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha)


def mm_(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> None:
    """Computes out = alpha * a @ b, rounded once."""
    if narrow(out) and not (out.is_cuda and out.dtype == a.dtype == b.dtype):
        torch.mul(wide_mm(a, b, torch.float32), alpha, out=out)
    else:
        add_mm_(out, a, b, beta=0, alpha=alpha)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast where it is on: backward may run under the caller's, which would round our products."""
    kind = x.device.type  # to enter torch.autocast takes as long as two small operations
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns gradient * scale (0-d), rounded once to `dtype`. Backward may run again, so it is not done in place."""
    if out is None:
        out = torch.empty_like(gradient, dtype=dtype)
    # A 0-d factor would be rounded to the gradient's dtype first; as a 1-d tensor it keeps its own.
    return torch.mul(gradient, scale.reshape((1,) * max(gradient.dim(), 1)), out=out)


def last_backward() -> bool:
    """Returns whether autograd frees the graph after the backward that is running: what it saved may be overwritten."""
    return not (traced() or torch._C._autograd._get_current_graph_task_keep_graph())


def finished(
    gradients: Sequence[Tensor],  # computed in the forward, for a loss whose own gradient is expected to be 1
    scale: Tensor | None,  # (), the loss's gradient; None: 1
    dtypes: Sequence[torch.dtype | None],  # of the results; None: not wanted
    backend: str,
) -> list[Tensor | None]:
    """Returns each gradient * scale, rounded once.

    The last backward of a graph hands over the gradients themselves. It writes them only if `scale` is not 1, and only
    the kernel knows that of a GPU's: to look would be a host sync. Any earlier backward copies, to the same bits.
    """
    if scale is None:  # the gradients are fresh
        pairs = zip(gradients, dtypes, strict=True)
        return [None if dtype is None else gradient.to(dtype) for gradient, dtype in pairs]
    last = last_backward()
    if backend == "triton" and not traced():
        from ..kernels.scale import scale_gradients

        return scale_gradients(gradients, scale, dtypes, in_place=last)
    known = scale.item() if last and scale.device.type == "cpu" else None
    results: list[Tensor | None] = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if dtype is None:
            results.append(None)
            continue
        same = last and gradient.dtype == dtype
        done = same and known == 1
        results.append(gradient if done else scaled(gradient, scale, dtype, gradient if same else None))
    return results


def divides(student: Tensor) -> bool:
    """Returns whether an op with its gradients in the forward divides by the count of the mean as well.

    float16 gradients would lose digits, and a compiler should see the division, since it can fuse it.
    """
    return student.dtype != torch.float16 and not traced()


def host_factor(count: int | float | Tensor | None) -> tuple[float, Tensor | None]:
    """Splits 1 / count into a factor that the host knows, and a count that it would have to wait for. 0 counts as 1."""
    if isinstance(count, Tensor):
        if count.device.type != "cpu":
            return 1.0, count
        count = count.item()
    return 1 / (count or 1) if count is not None else 1.0, None


def inverse(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1 / count, () on its device, with 0 counted as 1."""
    count = count + (count == 0) if count.is_floating_point() else count.clamp(min=1)
    return count.to(dtype).reciprocal_()


def mean(total: Tensor, count: int | float | Tensor) -> Tensor:
    """Returns total / count. A count of 0 divides by 1, so that an empty sum stays 0."""
    if isinstance(count, Tensor):
        if count.device.type != "cpu" or traced():
            count = count.to(device=total.device, dtype=total.dtype)
            return total / (count + (count == 0))
        count = count.item()  # the host knows it: no copy to the device
    if isinstance(count, (float, torch.SymFloat)):
        return total / (count or 1.0)
    return total / max(count, 1)


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

    def keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.mark_non_differentiable(*output[1:])  # counts, and what the backward will need
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=keep)

    def run(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = forward(*inputs)
        keep(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs):  # type: ignore[no-untyped-def]
        return (op if traced() else function.apply)(*inputs)

    return call
