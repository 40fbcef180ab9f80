"""Shared by both attention ops: a call as one value, its masks, blocks and tiles, and the op over tiles of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import groupby, pairwise
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _common

WIDEST_TILE = 256  # largest head dimension of the Triton kernels that compute scores
Divisor = int | float | Tensor | None  # what a sum is divided by; None: the number of items, still to be counted
LEAST_ROWS = 64  # query rows of a tile for each key head: dK is summed over tiles, which takes long with fewer rows


def tile_side(device: torch.device) -> int:
    """Returns the most queries a tile of scores may have."""
    return 256 if device.type == "cpu" else 1024


def tile_area(device: torch.device) -> int:
    """Returns the most numbers in a tile over all heads: a CPU's cache holds them; on a GPU they fill a launch.

    Tiles hold whole rows, so those of very long rows have more.
    """
    return 2**18 if device.type == "cpu" else 2**24


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


# -- a call, and its masks -----------------------------------------------------------------------------------


class Attention(NamedTuple):
    """One call of an attention loss."""

    student_query: Tensor  # (B, H, L, D_s)
    student_key: Tensor  # (B, H_s, S, D_s), H_s divides H
    teacher_query: Tensor  # (B, H, L, D_t)
    teacher_key: Tensor  # (B, H_t, S, D_t), H_t divides H
    student_scale: float
    teacher_scale: float
    key_mask: Tensor | None  # (B|1, S)
    query_mask: Tensor | None  # (B|1, L)
    is_causal: bool
    attn_mask: Tensor | None  # (B|1, H|1, L|1, S|1)
    cu_seqlens: Tensor | None = None  # (n + 1) ends of packed sequences, from 0 to L: pairs of one sequence; B = 1
    cu_seqlens_key: Tensor | None = None  # (n + 1) the same of the keys, to S; None if and only if cu_seqlens is
    # Pairs where -left <= j - i - (S - L) <= right, with each sequence's own lengths if packed; None: no bound
    window_left: int | None = None
    window_right: int | None = None

    # Methods, where a property would do: Dynamo does not trace a NamedTuple's properties in all versions of torch.
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_query, self.student_key, self.teacher_query, self.teacher_key

    def lengths(self) -> tuple[int, int]:  # L, S
        return self.student_query.shape[2], self.student_key.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss."""
        return _common.compute_dtype(*self.tensors())

    def diagonals(self) -> tuple[int | None, int | None]:
        """Returns the least and the largest j - i that the window and causality allow; None: no bound."""
        query_length, key_length = self.lengths()
        offset, left, right = key_length - query_length, self.window_left, 0 if self.is_causal else self.window_right
        return None if left is None else offset - left, None if right is None else offset + right

    def pairs(self) -> int | None:
        """Returns the number of allowed pairs if shapes alone determine it; None with a mask."""
        if self.key_mask is not None or self.query_mask is not None or self.attn_mask is not None:
            return None
        if not self.is_dense():
            return None
        batch, heads, query_length, _ = self.student_query.shape
        key_length = self.student_key.shape[2]
        if not self.is_causal:
            return batch * heads * query_length * key_length
        seen, rows = max(key_length - query_length, 0), min(query_length, key_length)  # by all; that see any
        return batch * heads * (rows * seen + rows * (rows + 1) // 2)

    def is_dense(self) -> bool:
        """Returns whether there is neither a window nor more than one sequence in a row."""
        return self.cu_seqlens is None and self.window_left is None and self.window_right is None

    def differentiable(self) -> bool:
        return torch.is_grad_enabled() and (self.student_query.requires_grad or self.student_key.requires_grad)

    def folded(self) -> Attention:
        """Makes an attn_mask a key mask if it is the same for all heads and queries, or a query mask if it is the same
        for all heads and keys: both cost less. A window's bound that a causal mask or the lengths imply is left out."""
        mask, (query_length, key_length) = self.attn_mask, self.lengths()
        left, right = self.window_left, self.window_right
        left = None if left is not None and left >= key_length - 1 else left
        is_causal = self.is_causal or right == 0
        right = None if right is not None and (is_causal or right >= query_length - 1) else right
        if (left, right) != (self.window_left, self.window_right):
            return self._replace(is_causal=is_causal, window_left=left, window_right=right).folded()
        if mask is not None and mask.shape[1] == mask.shape[2] == 1:
            keys = mask[:, 0, 0].expand(-1, self.student_key.shape[2])
            return self._replace(key_mask=keys if self.key_mask is None else keys & self.key_mask, attn_mask=None)
        if mask is not None and mask.shape[1] == mask.shape[3] == 1:
            queries = mask[:, 0, :, 0].expand(-1, self.student_query.shape[2])
            query_mask = queries if self.query_mask is None else queries & self.query_mask
            return self._replace(query_mask=query_mask, attn_mask=None)
        return self


SCHEMA = _common.schema(Attention)


class Counted(NamedTuple):
    """The rows that are in an allowed pair. All other rows are read as zeros, so they may hold anything, even NaN."""

    keys_per_query: Tensor  # (B|1, H|1, L) int64: how many keys the query is allowed
    queries: Tensor | None  # (B|1, H|1, L) bool: queries that are allowed a key; None: all
    keys: Tensor | None  # (B|1, H|1, S) bool: keys that a query is allowed; None: all
    # For Triton's tiles: `ranges` of the queries and of the keys, int32; None: causality is the only bound, if any
    bounds: tuple[Tensor, Tensor] | None = None

    def pairs(self, call: Attention) -> Tensor:
        """Returns the number of allowed pairs, () int64."""
        return self.keys_per_query.expand(call.student_query.shape[:3]).sum()

    def as_masks(self, call: Attention) -> Attention:
        """Returns a call without attn_mask whose masks are these rows."""
        queries, keys = (None if x is None else x[:, 0] for x in (self.queries, self.keys))
        return call._replace(query_mask=queries, key_mask=keys)

    def of_heads(self, heads: int) -> Tensor | None:  # (B|1, heads|1, S)
        """Returns `keys` for key heads: a key counts if it counts for one of the query heads that share it."""
        if self.keys is None or self.keys.shape[1] == 1:
            return self.keys
        return self.keys.unflatten(1, (heads, -1)).any(2)


def count_rows(call: Attention, bounds: tuple[Tensor, Tensor] | None = None) -> Counted:
    """Finds the rows that count, in time linear in L and S without attn_mask; an attn_mask is read once, unexpanded.
    `bounds`: see Counted."""
    query_length, key_length = call.lengths()
    device, offset = call.student_query.device, key_length - query_length
    keys, queries = call.key_mask, call.query_mask
    if query_length == 0 or key_length == 0:
        none = torch.zeros(1, 1, query_length + key_length, dtype=torch.int64, device=device)
        return Counted(none[:, :, :query_length], none[:, :, :query_length] > 0, none[:, :, query_length:] > 0)
    unmasked = keys is None and queries is None and call.attn_mask is None and call.is_dense()
    if unmasked and (offset >= 0 or not call.is_causal):
        seen = torch.arange(offset + 1 if call.is_causal else key_length, key_length + 1, device=device)  # (L), or (1)
        return Counted(seen.expand(1, 1, query_length), None, None)
    is_whole = call.attn_mask is None and call.is_dense() and not call.is_causal
    if keys is not None and queries is None and is_whole:  # half the launches of the general way
        per_query = keys.sum(1).view(-1, 1, 1).expand(-1, 1, query_length)
        return Counted(per_query, per_query > 0, keys[:, None])
    if call.attn_mask is None and not is_whole:
        of_queries, of_keys = (ranges(call), ranges(call, of_keys=True)) if bounds is None else bounds
        per_query, reached = _count_within(keys, of_queries), _count_within(queries, of_keys) > 0
        per_query = (per_query if queries is None else per_query * queries)[:, None]
        reached = reached if keys is None else reached & keys
        return Counted(per_query, per_query > 0, reached[:, None], bounds)
    keys, queries = (
        torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask
        for mask, length in ((keys, key_length), (queries, query_length))
    )
    if call.attn_mask is not None:
        return _count_pairs(call._replace(key_mask=keys), keys, queries, call.attn_mask)._replace(bounds=bounds)
    per_query = keys.sum(1, keepdim=True) * queries
    keys = keys & queries.any(1, keepdim=True)
    per_query = per_query[:, None]
    return Counted(per_query, per_query > 0, keys[:, None])


def ranges(call: Attention, of_keys: bool = False) -> Tensor:
    """Returns the first key of each query that sequences, causality and the window allow, and the one after the last,
    (2, L) int64; `of_keys`: the same of the queries of each key, (2, S). A range may be empty."""
    lengths, ends = call.lengths(), (call.cu_seqlens, call.cu_seqlens_key)
    (left, right), total = (call.window_left, 0 if call.is_causal else call.window_right), sum(lengths)
    if of_keys:
        lengths, ends, left, right = lengths[::-1], ends[::-1], right, left
    position = torch.arange(lengths[0], device=call.student_query.device)
    if ends[0] is None or ends[1] is None:
        first, end = position.new_zeros(()), position.new_full((), lengths[1])
        opposite = position + lengths[1] - lengths[0]
    else:
        own, other = ends[0].long(), ends[1].long()
        sequence = torch.searchsorted(own[1:], position, right=True)
        first, end = other[sequence], other[sequence + 1]
        opposite = position + end - own[sequence + 1]
    first_allowed = opposite - (total if left is None else left)
    end_allowed = opposite + (total if right is None else right + 1)
    return torch.stack([first_allowed.clamp(first, end), end_allowed.clamp(first, end)])


def _count_within(mask: Tensor | None, ranges: Tensor) -> Tensor:  # (B|1, T), (2, N) -> (B|1, N)
    """Returns how many rows count in each range."""
    first, end = ranges.long()
    if mask is None:
        return (end - first)[None]
    before = F.pad(mask.cumsum(1), (1, 0))  # counted rows before each position
    return before[:, end] - before[:, first]


def _count_pairs(call: Attention, keys: Tensor, queries: Tensor, attn_mask: Tensor) -> Counted:
    query_length, key_length = call.lengths()
    (batch,) = torch.broadcast_shapes(keys.shape[:1], queries.shape[:1], attn_mask.shape[:1])
    heads, device = attn_mask.shape[1], attn_mask.device
    per_query = torch.empty(batch, heads, query_length, dtype=torch.int64, device=device)
    reached = torch.zeros(batch, heads, key_length, dtype=torch.bool, device=device)
    for rows in slices(0, query_length, max(1, tile_area(device) // max(1, batch * heads * key_length))):
        pairs = allowed_pairs(call, rows, slice(0, key_length))
        assert pairs is not None
        tile = pairs & queries[:, None, rows, None]
        per_query[:, :, rows] = tile.sum(-1)
        reached |= tile.any(-2)
    return Counted(per_query, per_query > 0, reached)


def allowed_pairs(call: Attention, queries: slice, keys: slice) -> Tensor | None:
    """Returns which pairs of a tile key_mask, causality, the window and attn_mask allow, broadcastable to
    (B, H, queries, keys); None: all of them."""
    masks, device = [], call.student_key.device
    if call.key_mask is not None:
        masks.append(call.key_mask[:, None, None, keys])
    if call.attn_mask is not None:
        rows = slice(None) if call.attn_mask.shape[2] == 1 else queries
        columns = slice(None) if call.attn_mask.shape[3] == 1 else keys
        masks.append(call.attn_mask[:, :, rows, columns])
    least, most = call.diagonals()
    between = partial(torch.arange, device=device)
    if most is not None and keys.stop - 1 > queries.start + most:
        masks.append(between(keys.start, keys.stop) <= between(queries.start, queries.stop)[:, None] + most)
    if least is not None and keys.start < queries.stop - 1 + least:
        masks.append(between(keys.start, keys.stop) >= between(queries.start, queries.stop)[:, None] + least)
    return reduce(torch.logical_and, masks) if masks else None


# -- blocks and tiles --------------------------------------------------------------------------------------


def blocks(batch: int, units: int, most: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Cuts (batch, heads) into blocks of at most `most` units: whole batch entries, or a part of one.

    A unit is heads / units consecutive heads of every tensor. Each block is a function that takes a tensor
    (B|1, heads|1, ...) to the view of it that belongs to the block.
    """
    if 0 < batch * units <= most:
        yield lambda x: x
        return
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
    """Query and key of the student or the teacher in a block; tiles read their rows through it."""

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
    take: Callable[[Tensor], Tensor]  # returns the block's view of a tensor
    call: Attention  # of the block's views
    student: Side
    teacher: Side
    rows: int  # queries of a tile
    scratch: Tensor  # (3, numbers of a tile): memory that all tiles use

    def product(self, scale: float, query: Tensor, key: Tensor, index: int) -> Tensor:
        """Returns scale * query @ key.mT, (B, M, N), in the scratch memory of this index. (B, M, D), (B, N, D)."""
        shape = (*query.shape[:2], key.shape[1])
        out = self.scratch[index, : math.prod(shape)].view(shape)
        return torch.baddbmm(out, query, key.mT, beta=0, alpha=scale, out=out)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Yields the queries of each tile, and the keys that one of them may be allowed."""
        (query_length, key_length), (least, most) = self.call.lengths(), self.call.diagonals()
        for rows in slices(0, query_length, self.rows):
            first = 0 if least is None else max(0, rows.start + least)
            end = key_length if most is None else min(key_length, rows.stop + most)
            if first < end:
                yield rows, slice(first, end)

    def allowed(self, queries: slice, keys: slice) -> tuple[slice, Tensor | None]:
        """Returns the columns of a tile that may hold a masked pair, and `allowed_pairs` of these columns."""
        first, call, (least, most) = keys.start, self.call, self.call.diagonals()
        if most is not None and least is None and call.attn_mask is None and call.key_mask is None:
            first = min(max(first, queries.start + most), keys.stop)  # all pairs before are allowed
        return slice(first - keys.start, None), allowed_pairs(call, queries, slice(first, keys.stop))


def tile_blocks(call: Attention, counted: Counted) -> Iterator[TileBlock]:
    """Cuts a call into blocks of batch entries and heads, whose tiles hold all allowed scores of their rows."""
    batch, heads, query_length, _ = call.student_query.shape
    device, key_length = call.student_query.device, call.student_key.shape[2]
    units = gcd(call.student_key.shape[1], call.teacher_key.shape[1])  # the fewest heads that share no key with others
    area, shared = tile_area(device), heads // units
    side, (least, most) = min(tile_side(device), query_length), call.diagonals()
    if least is not None and most is not None:  # a band: tiles of no more rows than its width hold mostly allowed pairs
        side = min(side, max(LEAST_ROWS, most - least + 1))
        key_length = min(key_length, most - least + side)
    across = max(1, shared * key_length)
    rows = max(1, min(side, max(-(-LEAST_ROWS // shared), area // across)))
    student_keys, teacher_keys = (counted.of_heads(key.shape[1]) for key in (call.student_key, call.teacher_key))
    together = min(max(1, area // (rows * across)), batch * units)
    # Memory that is allocated for each tile may go back to the system and come anew, at 4 times the cost of a tile.
    scratch = call.student_query.new_empty((3, together * rows * across), dtype=call.dtype)
    for take in blocks(batch, units, together):
        sq, sk, tq, tk = map(take, call.tensors())
        queries, s_keys, t_keys, attn_mask = (
            None if x is None else take(x) for x in (counted.queries, student_keys, teacher_keys, call.attn_mask)
        )
        key_mask = None if call.key_mask is None else take(call.key_mask[:, None])[:, 0]
        part = call._replace(
            student_query=sq, student_key=sk, teacher_query=tq, teacher_key=tk,
            key_mask=key_mask, query_mask=None, attn_mask=attn_mask,
        )  # fmt: skip
        student, teacher = Side(sq, sk, queries, s_keys, call.dtype), Side(tq, tk, queries, t_keys, call.dtype)
        yield TileBlock(take, part, student, teacher, rows, scratch)


def sequences(
    call: Attention, counted: Counted, d_query: Tensor | None, d_key: Tensor | None
) -> Iterator[tuple[Attention, Counted, Tensor | None, Tensor | None]]:
    """Cuts packed sequences apart: yields views of neighbours of one length as a batch. Skips those without a pair.

    The lengths are read on the host: on a device this waits for it.
    """
    if call.cu_seqlens is None or call.cu_seqlens_key is None:
        yield call, counted, d_query, d_key
        return
    ends = torch.stack([call.cu_seqlens.long(), call.cu_seqlens_key.long()], 1).tolist()
    start = key_start = 0
    for (length, key_length), run in groupby((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)):
        count = sum(1 for _ in run)
        queries = partial(_as_batch, start=start, count=count, length=length)
        keys = partial(_as_batch, start=key_start, count=count, length=key_length)
        start, key_start = start + count * length, key_start + count * key_length
        if length and key_length:
            sq, sk, tq, tk = call.tensors()
            key_mask = None if call.key_mask is None else keys(call.key_mask[:, None])[:, 0]
            # The query mask is part of `counted`.
            part = Attention(
                queries(sq), keys(sk), queries(tq), keys(tk), call.student_scale, call.teacher_scale, key_mask, None,
                call.is_causal, None, None, None, call.window_left, call.window_right,
            )  # fmt: skip
            per_query = queries(counted.keys_per_query)
            of_queries = (None if x is None else queries(x) for x in (counted.queries, d_query))
            of_keys = (None if x is None else keys(x) for x in (counted.keys, d_key))
            (counted_queries, dq), (counted_keys, dk) = of_queries, of_keys
            yield part.folded(), Counted(per_query, counted_queries, counted_keys), dq, dk


def _as_batch(x: Tensor, start: int, count: int, length: int) -> Tensor:  # (1, heads, T, ...) -> (count, heads, ...)
    return x[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


Add = Callable[[Attention, Counted, Tensor, Tensor | None, Tensor | None], None]


def add_tiles(
    add_block: Callable[[TileBlock, Tensor, Tensor | None, Tensor | None], None],
    call: Attention, counted: Counted, total: Tensor, d_query: Tensor | None, d_key: Tensor | None,
) -> None:  # fmt: skip
    """Adds the parts of all blocks; `add_block` adds a block's to the sum and, unless they are None, to dQ and dK."""
    for block in tile_blocks(call, counted):
        add_block(block, total, *(None if x is None else block.take(x) for x in (d_query, d_key)))


def tiled_op(name: str, is_kl: bool, add: Add) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Registers an attention loss that computes every score, tile by tile: quadratic time, linear memory.

    The op takes `Attention`'s fields, the backend, and whether gradients are wanted. It returns the sum, the count, and
    dQ and dK of the sum in its dtype (empty if not wanted): gradients are cheapest while a tile is in the cache. The
    backward scales them. `add` adds to the sum and, unless they are None, to dQ and dK; packed sequences reach it one
    length at a time.
    """

    def forward(*inputs):  # type: ignore[no-untyped-def]
        *fields, backend, differentiable = inputs
        call = Attention(*fields)
        counted = count_rows(call, bounds_of(call, backend))
        # The kernels write all of dQ and dK; the tiles of the other backends are added to zeros.
        allocate = torch.empty_like if backend == "triton" else torch.zeros_like
        total, d_query, d_key = _tiled_outputs(call, differentiable, allocate)
        gradients = (d_query, d_key) if differentiable else (None, None)
        if backend == "triton":
            from ..kernels import attention_tiles as kernels

            loss = kernels.loss(call, counted, is_kl=is_kl, dtype=total.dtype, d_query=gradients[0], d_key=gradients[1])
        else:
            if not is_kl:  # masked keys are read as zeros, and so are their scores
                call = call._replace(key_mask=None)
            loss = total.to(_common.widest_dtype(total), copy=True)
            with _common.no_autocast(call.student_query):
                for part, rows, *of_part in sequences(call, counted, *gradients):
                    add(part, rows, loss, *of_part)
        items = counted.keys_per_query > 0 if is_kl else counted.keys_per_query
        return loss.to(total.dtype), items.expand(call.student_query.shape[:3]).sum(), d_query, d_key

    def fake(*inputs):  # type: ignore[no-untyped-def]
        *fields, _, differentiable = inputs
        total, *gradients = _tiled_outputs(Attention(*fields), differentiable, torch.empty_like)
        return total, total.new_empty((), dtype=torch.int64), *gradients

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*output[2:])  # dQ, dK
        ctx.dtypes = inputs[0].dtype, inputs[1].dtype  # of student_query and student_key

    def backward(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
        _common.refuse_double_backward("attention_kl" if is_kl else "attention_mse")
        if grad_total is None:
            return (None,) * (len(Attention._fields) + 2)
        gradients = map(_common.scaled, ctx.saved_tensors, (grad_total, grad_total), ctx.dtypes)
        return *gradients, *(None,) * len(Attention._fields)

    schema = f"({SCHEMA}, str backend, bool differentiable) -> (Tensor, Tensor, Tensor, Tensor)"
    return _common.registered(name, schema, forward, fake, setup_context, backward)


def bounds_of(call: Attention, backend: str) -> tuple[Tensor, Tensor] | None:
    if backend != "triton" or call.is_dense() or not call.student_query.numel() or not call.student_key.numel():
        return None
    from ..kernels import attention_packed as kernels

    return kernels.bounds(call)


def _tiled_outputs(
    call: Attention, differentiable: bool, allocate: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the sum as zero, and dQ and dK, in the dtype of the loss, since dQ and dK are still to be scaled."""
    total = call.student_query.new_zeros((), dtype=call.dtype)
    if not differentiable:
        return total, total.new_empty(0), total.new_empty(0)
    d_query, d_key = (allocate(x, dtype=call.dtype) for x in call.tensors()[:2])
    return total, d_query, d_key


def add_gradients(
    d_scores: Tensor,  # (B * H_kv, H / H_kv * rows, keys)
    query: Tensor,  # (B * H_kv, H / H_kv * rows, D)
    key: Tensor,  # (B * H_kv, keys, D)
    weight: Tensor | float,  # of each row of d_scores, (B * H_kv, H / H_kv * rows, 1), or of all
    d_query: Tensor,  # (B, H, rows, D)
    d_key: Tensor,  # (B, H_kv, keys, D)
) -> None:
    """Writes and adds the gradients of query @ key.mT of a tile from its gradient weight * d_scores."""
    # Both products are computed transposed: those of narrow heads run faster with longer rows.
    dq = torch.bmm(key.mT, d_scores.mT).mT * weight
    d_query.copy_(dq.reshape(d_query.shape))
    d_key.add_(torch.bmm((query * weight).mT, d_scores).mT.unflatten(0, d_key.shape[:2]))
