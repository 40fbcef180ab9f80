"""What the two attention ops share: which rows count, and the blocks and tiles their work is cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import functional as F

from fastdistill.ops import _common

WIDEST_TILE = 256  # head dimension of the Triton kernels that compute scores
LEAST_ROWS = 64  # queries of a tile that is wider than high: with fewer, adding up the keys' gradients takes too long


def tile_side(device: torch.device) -> int:
    """Most queries of a tile of scores; and its keys, where it does not hold all of them."""
    return 256 if device.type == "cpu" else 1024


def tile_area(device: torch.device) -> int:
    """Most numbers in a tile, all heads together: what stays in a CPU's cache, what keeps a GPU busy for a launch."""
    return 2**18 if device.type == "cpu" else 2**24


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


# -- masks -------------------------------------------------------------------------------------------------


def fold_mask(
    attn_mask: Tensor | None,  # (B|1, H|1, L|1, S|1)
    key_mask: Tensor | None,  # (B, S)
    query_mask: Tensor | None,  # (B, L)
    query_length: int,
    key_length: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """An attn_mask that does not depend on head and query is a key mask, and as cheap as one; so with head and key."""
    if attn_mask is None or attn_mask.shape[1] > 1:
        return attn_mask, key_mask, query_mask
    if attn_mask.shape[2] == 1:
        keys = attn_mask[:, 0, 0].expand(-1, key_length)
        return None, keys if key_mask is None else keys & key_mask, query_mask
    if attn_mask.shape[3] == 1:
        queries = attn_mask[:, 0, :, 0].expand(-1, query_length)
        return None, key_mask, queries if query_mask is None else queries & query_mask
    return attn_mask, key_mask, query_mask


class Counted(NamedTuple):
    """Rows that are in no counted pair may hold anything, NaN too: they are read as zeros."""

    keys_per_query: Tensor  # (B|1, H|1, L) int64: how many keys the query is allowed
    queries: Tensor | None  # (B|1, H|1, L) bool: those that are allowed a key; None: all
    keys: Tensor | None  # (B|1, H|1, S) bool: those that a query is allowed; None: all

    def of_heads(self, heads: int) -> Tensor | None:  # (B|1, heads|1, S)
        """`keys` for key heads: a key that a group of query heads shares counts if it does for one of them."""
        if self.keys is None or self.keys.shape[1] == 1:
            return self.keys
        return self.keys.unflatten(1, (heads, -1)).any(2)


def count_rows(
    query_length: int,
    key_length: int,
    device: torch.device,
    key_mask: Tensor | None,  # (B|1, S)
    query_mask: Tensor | None,  # (B|1, L)
    is_causal: bool,
    attn_mask: Tensor | None,  # (B|1, H|1, L|1, S|1)
) -> Counted:
    """Linear in L and S without attn_mask; with one, it is read once, not expanded over batch and heads."""
    if query_length == 0 or key_length == 0:
        none = torch.zeros(1, 1, query_length + key_length, dtype=torch.int64, device=device)
        return Counted(none[:, :, :query_length], none[:, :, :query_length] > 0, none[:, :, query_length:] > 0)
    offset = key_length - query_length
    if key_mask is None and query_mask is None and attn_mask is None and (offset >= 0 or not is_causal):
        # Known without looking: one small launch, where the general way has six.
        seen = torch.arange(offset + 1 if is_causal else key_length, key_length + 1, device=device)  # (L), or (1)
        return Counted(seen.expand(1, 1, query_length), None, None)
    keys = torch.ones(1, key_length, dtype=torch.bool, device=device) if key_mask is None else key_mask
    queries = torch.ones(1, query_length, dtype=torch.bool, device=device) if query_mask is None else query_mask
    if attn_mask is not None:
        (batch,) = torch.broadcast_shapes(keys.shape[:1], queries.shape[:1], attn_mask.shape[:1])
        heads = attn_mask.shape[1]
        per_query = torch.empty(batch, heads, query_length, dtype=torch.int64, device=device)
        reached = torch.zeros(batch, heads, key_length, dtype=torch.bool, device=device)
        for rows in slices(0, query_length, max(1, tile_area(device) // max(1, batch * heads * key_length))):
            tile = allowed_pairs(rows, slice(0, key_length), offset if is_causal else None, attn_mask, keys, device)
            tile = queries[:, None, rows, None] if tile is None else tile & queries[:, None, rows, None]
            per_query[:, :, rows] = tile.sum(-1)
            reached |= tile.any(-2)
        return Counted(per_query, per_query > 0, reached)
    if is_causal:
        last = torch.arange(query_length, device=device) + offset  # (L) each query's last key; < 0: it has none
        before = F.pad(keys.cumsum(1), (1, 0))  # (B|1, S + 1) counted keys before each position
        per_query = before[:, (last + 1).clamp(min=0)] * queries
        furthest = torch.where(queries, last, -1).amax(1, keepdim=True)
        keys = keys & (torch.arange(key_length, device=device) <= furthest)
    else:
        per_query = keys.sum(1, keepdim=True) * queries
        keys = keys & queries.any(1, keepdim=True)
    per_query = per_query[:, None]
    return Counted(per_query, per_query > 0, keys[:, None])


def allowed_pairs(
    queries: slice,
    keys: slice,
    causal_offset: int | None,  # S - L; None: not causal
    attn_mask: Tensor | None,  # (B|1, H|1, L|1, S|1)
    key_mask: Tensor | None,  # (B|1, S)
    device: torch.device,
) -> Tensor | None:  # broadcasts to (B, H, queries, keys)
    """What the masks allow in a tile; None: all of it."""
    masks = []
    if key_mask is not None:
        masks.append(key_mask[:, None, None, keys])
    if attn_mask is not None:
        everything = slice(None)
        rows = everything if attn_mask.shape[2] == 1 else queries
        columns = everything if attn_mask.shape[3] == 1 else keys
        masks.append(attn_mask[:, :, rows, columns])
    if causal_offset is not None and keys.stop - 1 > queries.start + causal_offset:
        last = torch.arange(queries.start, queries.stop, device=device) + causal_offset
        masks.append(torch.arange(keys.start, keys.stop, device=device) <= last[:, None])
    return reduce(torch.logical_and, masks) if masks else None


# -- blocks and tiles --------------------------------------------------------------------------------------


def blocks(batch: int, units: int, most: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Cuts (batch, heads) into blocks of at most `most` units: whole batch entries, or a part of one.

    A unit is a share of the heads of every tensor: heads / units consecutive ones. Each block is a function that
    takes a tensor (B|1, heads|1, ...) to the view of it that belongs to the block.
    """
    if units <= most:
        for entries in slices(0, batch, most // units):
            yield partial(_part, entries=entries, part=slice(0, units), units=units)
        return
    even = -(-units // -(-units // max(most, 1)))  # 12 units, at most 11: 6 + 6
    for entry in range(batch):
        for part in slices(0, units, even):
            yield partial(_part, entries=slice(entry, entry + 1), part=part, units=units)


def _part(x: Tensor, entries: slice, part: slice, units: int) -> Tensor:
    x = x if x.shape[0] == 1 else x[entries]
    if x.shape[1] < units:  # broadcast over heads
        return x
    heads = x.shape[1] // units
    return x[:, part.start * heads : part.stop * heads]


class Side(NamedTuple):
    """Query and key of the student or the teacher in a block, and how tiles read them."""

    query: Tensor  # (B, H, L, D)
    key: Tensor  # (B, H_kv, S, D)
    counted_queries: Tensor | None  # (B|1, H|1, L)
    counted_keys: Tensor | None  # (B|1, H_kv|1, S)
    dtype: torch.dtype

    def queries(self, rows: slice) -> Tensor:  # (B * H_kv, H / H_kv * rows, D): those that share a key together
        query = _read(self.query, self.counted_queries, rows, self.dtype)
        return query.unflatten(1, (self.key.shape[1], -1)).flatten(2, 3).flatten(0, 1)

    def keys(self, rows: slice) -> Tensor:  # (B * H_kv, rows, D)
        return _read(self.key, self.counted_keys, rows, self.dtype).flatten(0, 1)


def _read(x: Tensor, counted: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    x = x[:, :, rows].to(dtype)
    return x if counted is None else x.masked_fill(~counted[:, :, rows, None], 0)


class TileBlock(NamedTuple):
    take: Callable[[Tensor], Tensor]  # the block's view of a tensor
    student: Side
    teacher: Side
    rows: int  # queries of a tile
    columns: int  # its keys

    def tiles(self, causal_offset: int | None) -> Iterator[tuple[slice, list[slice]]]:
        """The rows of queries, and for each the rows of keys that it meets."""
        key_length = self.student.key.shape[2]
        for rows in slices(0, self.student.query.shape[2], self.rows):
            end = key_length if causal_offset is None else min(key_length, rows.stop + causal_offset)
            yield rows, list(slices(0, end, self.columns))

    def masks(
        self, causal_offset: int | None, attn_mask: Tensor | None, key_mask: Tensor | None
    ) -> Callable[[slice, slice], tuple[slice, Tensor | None]]:
        """Of a tile's rows of queries and of keys: the tile's columns where a pair may not be allowed, and
        `allowed_pairs` of these."""
        allowed = partial(
            allowed_pairs,
            causal_offset=causal_offset,
            attn_mask=None if attn_mask is None else self.take(attn_mask),
            key_mask=None if key_mask is None else self.take(key_mask[:, None])[:, 0],
            device=self.student.key.device,
        )

        def of_tile(queries: slice, keys: slice) -> tuple[slice, Tensor | None]:
            first = keys.start
            if causal_offset is not None and attn_mask is None and key_mask is None:  # up to there all are allowed
                first = min(max(first, queries.start + causal_offset), keys.stop)
            return slice(first - keys.start, None), allowed(queries, slice(first, keys.stop))

        return of_tile


def tile_blocks(
    student_query: Tensor,  # (B, H, L, D_s)
    student_key: Tensor,  # (B, H_s, S, D_s)
    teacher_query: Tensor,  # (B, H, L, D_t)
    teacher_key: Tensor,  # (B, H_t, S, D_t)
    counted: Counted,
    dtype: torch.dtype,  # to compute in
) -> Iterator[TileBlock]:
    """The call in blocks of batch entries and heads. A tile holds whole rows of scores if `LEAST_ROWS` of them fit."""
    batch, heads, query_length, _ = student_query.shape
    side, area = tile_side(student_query.device), tile_area(student_query.device)
    units = gcd(student_key.shape[1], teacher_key.shape[1])  # the least heads that share no key with others
    shared, key_length = heads // units, student_key.shape[2]
    columns = max(1, key_length if shared * key_length * LEAST_ROWS <= area else min(side, key_length))
    across = shared * columns
    rows = max(1, min(side, query_length, max(16, area // across)))
    student_keys, teacher_keys = (counted.of_heads(key.shape[1]) for key in (student_key, teacher_key))
    for take in blocks(batch, units, area // (rows * across)):

        def part(x: Tensor | None, take: Callable[[Tensor], Tensor] = take) -> Tensor | None:
            return None if x is None else take(x)

        queries = part(counted.queries)
        yield TileBlock(
            take,
            Side(take(student_query), take(student_key), queries, part(student_keys), dtype),
            Side(take(teacher_query), take(teacher_key), queries, part(teacher_keys), dtype),
            rows,
            columns,
        )


# -- ops in tiles ------------------------------------------------------------------------------------------
#
# They take (student_query, student_key, teacher_query, teacher_key, student_scale, teacher_scale, key_mask, query_mask,
# is_causal, attn_mask, backend, differentiable) and return the sum, the count, and dQ and dK of the sum: gradients are
# cheapest while a tile is in the cache.


def differentiable(student_query: Tensor, student_key: Tensor) -> bool:
    return torch.is_grad_enabled() and (student_query.requires_grad or student_key.requires_grad)


def tiled_outputs(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the sum, dQ and dK (empty if not asked for), in the dtype of the loss: they are yet to be scaled."""
    dtype = _common.compute_dtype(student_query, student_key, teacher_query, teacher_key)
    total = student_query.new_zeros((), dtype=dtype)
    if not differentiable:
        return total, total.new_empty(0), total.new_empty(0)
    return total, torch.zeros_like(student_query, dtype=dtype), torch.zeros_like(student_key, dtype=dtype)


def add_gradients(
    d_scores: Tensor,  # (B * H_kv, H / H_kv * rows, keys)
    query: Tensor,  # (B * H_kv, H / H_kv * rows, D)
    key: Tensor,  # (B * H_kv, keys, D)
    d_query: Tensor,  # as query
    d_key: Tensor,  # (B, H_kv, keys, D)
    scale: float,
) -> None:
    """The gradients of scale * query @ key.mT of a tile."""
    d_query.baddbmm_(d_scores, key, alpha=scale)
    # Transposed twice: narrow heads make the product the faster the longer its rows are.
    d_key.add_(torch.bmm(query.mT, d_scores).mT.unflatten(0, d_key.shape[:2]), alpha=scale)


def register_tiled(op: CustomOpDef, name: str) -> None:
    """Shapes and autograd formula of an op in tiles; `name` is what errors call it."""

    def fake(student_query, student_key, teacher_query, teacher_key, *options):  # type: ignore[no-untyped-def]
        total, *gradients = tiled_outputs(student_query, student_key, teacher_query, teacher_key, options[-1])
        return total, total.new_empty((), dtype=torch.int64), *gradients

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        student_query, student_key, *_ = inputs
        _, count, d_query, d_key = output
        ctx.mark_non_differentiable(count, d_query, d_key)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_query, d_key)
        ctx.dtypes = student_query.dtype, student_key.dtype

    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward(name)
        if grad_total is None:
            return (None,) * 12
        gradients = map(_common.scaled, ctx.saved_tensors, (grad_total, grad_total), ctx.dtypes)
        return *gradients, *(None,) * 10

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
