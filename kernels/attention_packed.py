"""Packed sequences and windows: which keys each query may meet, and which queries each key.

With `cu_seqlens`, causality and a window, the keys of a query are a range, and so are the queries of a key. One launch
writes all ranges. A tile of attention_tiles.py loops from the first to the last row of its rows' ranges and compares
each pair with them: the time is linear in the number of pairs. A tile that holds the end of one sequence and the start
of the next meets the keys of both; tiles that each hold rows of one sequence would be as many.

    _bounds  (blocks of queries, then of keys): finds each row's sequence by bisection and writes its range

The Gram matrices of attention_mse.py cut each sequence into *slots* of at most R rows. Sequence n has the slots from
starts[n] // R + n to starts[n + 1] // R + n, which are enough; some are empty. So n sequences of T rows have T // R + n
slots, and the host knows how many without reading the starts. Where a sequence needs SPARE - 1 more slots than its rows
fill, `n` is SPARE n.

Sequence n has the queries a..b and the keys c..d. Both end together: query i stands beside key i - b + d.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device_of

if TYPE_CHECKING:
    from ..ops._attention import Attention


@triton.jit(do_not_specialize=["query_length", "key_length", "sequences"])
def _bounds(
    query_starts_ptr, key_starts_ptr,  # (sequences + 1), (sequences + 1); None: one sequence
    out_ptr,  # first and end of each query's keys, (2, L); then of each key's queries, (2, S)
    query_length, key_length, sequences,
    left, right,  # keys before and after the one beside a query; None: no bound
    CHUNK: tl.constexpr,  # only keys that are beside the query's chunk of its sequence; 0: all
    ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(query_length, ROWS)
    if tl.program_id(0) < blocks:
        _write_bounds(
            query_starts_ptr, key_starts_ptr, out_ptr, tl.program_id(0),
            query_length, key_length, sequences, left, right, CHUNK, False, ROWS,
        )  # fmt: skip
    else:
        _write_bounds(
            key_starts_ptr, query_starts_ptr, out_ptr + 2 * tl.cast(query_length, tl.int64), tl.program_id(0) - blocks,
            key_length, query_length, sequences, right, left, CHUNK, True, ROWS,
        )  # fmt: skip


@triton.jit
def _write_bounds(
    own_ptr, other_ptr, out_ptr, block, length, other_length, sequences, before, after,
    CHUNK: tl.constexpr, OF_KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = block * ROWS + tl.arange(0, ROWS)
    exists = rows < length
    own_start, own_end = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), length, tl.int32)
    first = tl.zeros((ROWS,), tl.int32)
    end = tl.full((ROWS,), other_length, tl.int32)
    if own_ptr is not None:
        low, high = tl.zeros((ROWS,), tl.int32), tl.full((ROWS,), sequences, tl.int32)  # starts[low] <= row < ...[high]
        width = sequences
        while width > 1:
            middle = (low + high) // 2
            is_after = tl.load(own_ptr + middle) <= rows
            low, high = tl.where(is_after, middle, low), tl.where(is_after, high, middle)
            width = (width + 1) // 2
        own_start, own_end = tl.load(own_ptr + low).to(tl.int32), tl.load(own_ptr + low + 1).to(tl.int32)
        first, end = tl.load(other_ptr + low).to(tl.int32), tl.load(other_ptr + low + 1).to(tl.int32)
    beside = (rows - own_end).to(tl.int64) + end  # a window may be as long as 2^31
    # An empty range must lie in its sequence, too, since a tile spans the ranges of all its rows.
    lower, upper = first, end
    if before is not None:
        lower = tl.minimum(tl.maximum(beside - before, first), end).to(tl.int32)
    if after is not None:
        upper = tl.maximum(tl.minimum(beside + after + 1, end), first).to(tl.int32)
    if CHUNK and OF_KEYS:  # no query after the chunk of the query beside; none at all before the sequence's first
        past = beside + CHUNK - (beside - first) % CHUNK
        upper = tl.where(beside < first, lower, tl.minimum(upper, past)).to(tl.int32)
    elif CHUNK:
        lower = tl.minimum(tl.maximum(lower, beside - (rows - own_start) % CHUNK), upper).to(tl.int32)
    tl.store(out_ptr + rows, lower, mask=exists)
    tl.store(out_ptr + tl.cast(length, tl.int64) + rows, upper, mask=exists)


@triton.jit
def slots_of(starts_ptr, sequence, ROWS: tl.constexpr, SPARE: tl.constexpr):
    """Returns the first slot of a sequence, and the one after its last."""
    first = tl.load(starts_ptr + sequence).to(tl.int32) // ROWS + SPARE * sequence
    return first, tl.load(starts_ptr + sequence + 1).to(tl.int32) // ROWS + SPARE * (sequence + 1)


@triton.jit
def sequence_of(starts_ptr, slot, sequences, ROWS: tl.constexpr, SPARE: tl.constexpr):
    """Returns the sequence of a slot, and which of its slots it is."""
    low, high = slot * 0, slot * 0 + sequences  # the first slot of `low` is not after this one, that of `high` is
    while high - low > 1:
        middle = (low + high) // 2
        is_after = tl.load(starts_ptr + middle).to(tl.int32) // ROWS + SPARE * middle > slot
        low, high = tl.where(is_after, low, middle), tl.where(is_after, middle, high)
    first, _ = slots_of(starts_ptr, low, ROWS, SPARE)
    return low, slot - first


@triton.jit
def rows_of(starts_ptr, sequence):
    """Returns the first row of a sequence, and the one after its last."""
    return tl.load(starts_ptr + sequence).to(tl.int32), tl.load(starts_ptr + sequence + 1).to(tl.int32)


@triton.jit
def slot_rows(starts_ptr, slot, sequences, ROWS: tl.constexpr):
    """Returns the sequence of a slot, its first row and the one after its last. An empty slot ends before it starts."""
    sequence, index = sequence_of(starts_ptr, slot, sequences, ROWS, 1)
    start, end = rows_of(starts_ptr, sequence)
    return sequence, start + index * ROWS, tl.minimum(start + (index + 1) * ROWS, end)


def bounds(call: "Attention", chunk: int = 0) -> tuple[Tensor, Tensor]:  # (2, L), (2, S) int32
    """Returns the first key that each query may meet and the one after the last, and the same of each key's queries.

    With `chunk`, only pairs of a chunk of a causal call: each sequence's queries are cut into chunks of so many, and
    the keys beside a chunk's queries belong to it.
    """
    query_length, key_length = call.lengths()
    starts, key_starts = call.cu_seqlens, call.cu_seqlens_key
    out = torch.empty(2 * (query_length + key_length), dtype=torch.int32, device=call.student_query.device)
    with on_device_of(out):
        _bounds[(-(-query_length // 256) + -(-key_length // 256),)](
            starts, key_starts, out, query_length, key_length, 1 if starts is None else len(starts) - 1,
            call.window_left, 0 if call.is_causal else call.window_right, CHUNK=chunk, ROWS=256,
        )  # fmt: skip
    return out[: 2 * query_length].view(2, -1), out[2 * query_length :].view(2, -1)
