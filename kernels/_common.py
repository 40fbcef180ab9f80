"""Shared by the kernels: launching on a tensor's own device, rows of any layout, accurate log1p and tanh."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton 3.6 compiles no product of float64 one of whose factors depends on a load of fewer than 32 bits: the narrowest
# load decides the product's layout. 3.9 compiles all of them; those between were not tried.
WIDENS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Makes the tensor's device current: Triton launches on the current device."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


def arch_of(x: Tensor) -> str:
    """Returns the architecture that launchers choose tiles for: "sm_90", "gfx942"; "cpu" in the interpreter."""
    return _arch(x.get_device()) if x.is_cuda else "cpu"


@functools.cache  # to ask for a device's properties takes longer than the rest of a launcher
def _arch(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def warp_size(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Returns (x, inner, outer stride, inner stride): row i of x[..., :] starts at
    i // inner * outer stride + i % inner * inner stride.

    No single stride leads from each row of logits like y[:, :-1] to the next; two strides reach them without a copy.
    """
    if x.is_contiguous():  # nearly always, and the rest takes as long as a launch
        return x, max(x.shape[:-1].numel(), 1), 0, x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    sizes, strides = [], []  # of the leading dimensions; adjacent ones are merged where one stride covers both
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return rows_of(x.contiguous())
    if len(sizes) == 2:
        return x, sizes[1], strides[0], strides[1]
    return x, max(x.shape[:-1].numel(), 1), 0, strides[0] if strides else 0


def flags(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask for products in `dtype`: of 32 bits where Triton needs them."""
    return mask.int() if WIDENS and mask is not None and dtype == torch.float64 else mask


def heads_of(x: Tensor, dtype: torch.dtype) -> Tensor:  # (B, H, L, D)
    """Returns x for products in `dtype`: a copy where its columns are not adjacent, where its rows are too far apart
    for 32-bit offsets in a tile, or where Triton needs wider numbers."""
    if WIDENS and dtype == torch.float64 and x.itemsize == 2:
        x = x.float()
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < 2**23 else x.contiguous()


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Returns where a row of `rows_of` starts, in 64 bits: a tensor may hold more than 2^31 elements."""
    row = tl.cast(row, tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def log1p(u):
    """Computes log(1 + u) to the last digit for small u (Kahan): divides out the rounding of 1 + u."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@triton.jit
def tanh(x):
    """Computes tanh, which Triton lacks; by a series for small x, where 1 - exp(-2x) would lose digits."""
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    y = x * x
    if x.dtype == tl.float64:
        # The two forms agree to 1e-16 at |x| = 0.05.
        near = x * (1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835 - y * (1382 / 155925))))))
        return tl.where(tl.abs(x) < 0.05, near, tl.where(x < 0, -far, far))
    near = x * (1 - y * (1 / 3 - y * (2 / 15 - y * (17 / 315 - y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))
