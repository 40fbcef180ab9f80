"""Corrects Triton's interpreter (3.6 to 3.9) for bfloat16, and makes it faster.

The interpreter stores bfloat16 as integer bits. Its matrix products multiply these integers, and its conversions
truncate. On a GPU products are exact and conversions round to nearest; `mend_bfloat16` does the same here.

The interpreter also patches the language at each call of a device function, which takes most of its time.
`prepare_once` patches it once per launch.

It reads any address, such as the memory behind a tensor, where a GPU might fault. `check_addresses` refuses those that
lie in no tensor of the launch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch


def mend_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cut, cast, multiply = interpreter._convert_float, builder.cast_impl, builder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if target != tl.bfloat16 or source not in (tl.float32, tl.float64):
            return cut(data, source, target, mode)
        numbers = np.ascontiguousarray(data).view(np.float64 if source == tl.float64 else np.float32)
        bits = torch.from_numpy(numbers.copy()).to(torch.bfloat16).view(torch.int16).numpy()
        return bits.view(np.uint16).reshape(data.shape)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if {source.dtype.scalar, target.scalar} == {tl.bfloat16, tl.float64}:
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    interpreter._convert_float = rounded
    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def prepare_once() -> None:
    from triton import language
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    scopes: dict[tuple[bool, ...], Any] = {}  # of this launch, by the parts of the language that a module imports

    class Scope:
        """Undoes all patches of a launch. Only the launch calls `restore`; device functions never do."""

        def restore(self) -> None:
            for scope in reversed(scopes.values()):
                scope.restore()
            scopes.clear()

    def once(function: Any) -> Any:
        modules = modules_of(function)
        if modules not in scopes:
            scopes[modules] = prepare(function)
        return Scope()

    @cache
    def modules_of(function: Any) -> tuple[bool, ...]:
        seen = [x for x in function.__globals__.values() if x is language or x is language.core]
        return language in seen, language.core in seen

    interpreter._patch_lang = once


def check_addresses() -> None:
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, init = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    spans: list[tuple[int, int]] = []  # addresses of each tensor's memory in this launch

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = init(self, args, kwargs)
        tensors = [x for x in (*on_host[0], *on_host[1].values()) if isinstance(x, torch.Tensor)]
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        spans[:] = [(start, start + size) for start, size in memory.items()]
        return on_host

    def check(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = pointers.data.min(), pointers.data.max()
        if any(start <= first and last <= stop - size for start, stop in spans):  # most, without a look at the mask
            return
        addresses = pointers.data[mask.data.astype(bool)]
        inside = np.zeros(addresses.shape, bool)
        for start, stop in spans:
            inside |= (addresses >= start) & (addresses + size <= stop)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} addresses lie in no tensor of the launch")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = init_args
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
