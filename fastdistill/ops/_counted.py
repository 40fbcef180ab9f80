"""Leaves out the rows that do not count, before they are multiplied.

On the CPU the rows that count are gathered, chunk by chunk. A GPU's kernels learn their number on the device, since
waiting for it would be a host sync: rows that count are sorted to the front, and the products end with them
(kernels/counted_mm.py). The portable code on a GPU multiplies all rows, and so do the kernels where nearly all count:
cuBLAS is then faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Selection(NamedTuple):
    """The rows that are computed, in their order."""

    size: int  # n
    order: Tensor | None = None  # (n), the rows' numbers; None: all rows as they are
    counted: Tensor | None = None  # (n), which of them count; None: all
    number: Tensor | None = None  # (), how many: the first ones, for `products`
    products: Any = None  # the kernels of products that end with the rows that count; None: all rows are multiplied

    def take(self, x: Tensor, chunk: slice = slice(None)) -> Tensor:
        """Returns a chunk of the selected rows of x."""
        return x[chunk] if self.order is None else x.index_select(0, self.order[chunk])

    def put(self, out: Tensor, chunk: slice, values: Tensor) -> None:
        """Writes a chunk of the selected rows into `out`, which has all rows."""
        if self.order is None:
            out[chunk] = values
        else:
            out.index_copy_(0, self.order[chunk], values)


def select(rows: int, counted: Tensor | None, dense: bool, backend: str) -> Selection:
    """Returns the rows to compute, without a host sync on a device."""
    if counted is None:
        return Selection(rows)
    if backend != "torch" and not dense:
        from ..kernels import counted_mm

        order = counted.logical_not().byte().argsort(stable=True)
        return Selection(rows, order, counted[order], counted.sum(), counted_mm)
    if backend != "torch" or counted.device.type != "cpu":
        return Selection(rows, counted=counted)
    order = counted.nonzero()[:, 0]
    return Selection(rows) if len(order) == rows else Selection(len(order), order)
