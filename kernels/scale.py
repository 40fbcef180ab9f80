"""Multiplies the gradients that a forward computed by the one that arrives in the backward.

The forward knows the gradient that a mean or a sum will get if nothing but a backward follows: 1. So it computes final
gradients, and one launch over all of them reads the factor and returns, unless it is another one or a result has
another dtype. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device_of

# Programs loop over the numbers, so that the launch is short where there is nothing to do.
PROGRAMS, BLOCK = 1024, 4096


@triton.jit
def _part(ptr, out_ptr, size, scale, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    if not IN_PLACE or scale != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            here = start + tl.arange(0, BLOCK)
            x = tl.load(ptr + here, mask=here < size).to(scale.dtype)
            tl.store(out_ptr + here, (x * scale).to(out_ptr.dtype.element_ty), mask=here < size)


@triton.jit
def _scale(
    scale_ptr,  # ()
    a_ptr, a_out_ptr, a_size,  # None: not wanted
    b_ptr, b_out_ptr, b_size,
    c_ptr, c_out_ptr, c_size,
    A_IN_PLACE: tl.constexpr, B_IN_PLACE: tl.constexpr, C_IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    if a_ptr is not None:
        _part(a_ptr, a_out_ptr, a_size, scale, A_IN_PLACE, BLOCK)
    if b_ptr is not None:
        _part(b_ptr, b_out_ptr, b_size, scale, B_IN_PLACE, BLOCK)
    if c_ptr is not None:
        _part(c_ptr, c_out_ptr, c_size, scale, C_IN_PLACE, BLOCK)


def scale_gradients(
    gradients: Sequence[Tensor],  # three, contiguous
    scale: Tensor,  # (), in the dtype of the computation
    dtypes: Sequence[torch.dtype | None],  # of the results; None: not wanted
    in_place: bool,
) -> list[Tensor | None]:
    """Returns each gradient * scale, rounded once; itself if it has the result's dtype and `in_place` allows it."""
    results: list[Tensor | None] = []
    arguments: list[Tensor | int | None] = []
    same: list[bool] = []
    largest = 0
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        size, out = gradient.numel(), None
        same.append(in_place and gradient.dtype == dtype)
        if dtype is not None:
            out = gradient if same[-1] else torch.empty_like(gradient, dtype=dtype)
        results.append(out)
        empty = out is None or size == 0
        arguments += (None, None, 0) if empty else (gradient, out, size)
        largest = largest if empty else max(largest, size)
    if largest:
        with on_device_of(scale):
            _scale[(min(-(-largest // BLOCK), PROGRAMS),)](scale, *arguments, *same, BLOCK=BLOCK, num_warps=8)
    return results
