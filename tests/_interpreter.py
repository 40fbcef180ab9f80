"""Triton's interpreter keeps bfloat16 as the bits of an integer, and its products take them for one (3.6 to 3.9)."""

from __future__ import annotations

from typing import Any

import numpy as np


def mend_bfloat16() -> None:
    """Products of bfloat16 tiles, as a GPU makes them: exact, summed in float32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    broken = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return broken(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot
