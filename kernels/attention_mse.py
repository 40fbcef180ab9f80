"""Attention-score MSE from Gram matrices: reads every input row once forward and once backward, computes no score.

With q' = [q_s, q_t], k' = [k_s, k_t] (D' = D_s + D_t), v = [s_s ..., -s_t ...] and V = diag(v),

    sum_ij (a_s - a_t)^2 = < V Gq, Gk V >        Gq = q'^T q', Gk = k'^T k', D' x D'
    dq_s = 2 s_s q' V Gk[:, :D_s]                dk_s = 2 s_s k' V Gq[:, :D_s]

    _gram      (splits of the rows, batch x groups, queries | keys): the blocks SS, ST or TS, and TT of a Gram matrix
    _contract  (batch x groups, blocks of a triangle): sums the splits in order, in float64, into the loss and the
               student's columns of both matrices; counts the allowed pairs
    _finalise  (one program): adds up the loss and divides it
    _gradient  (tiles of rows, batch x heads): multiplies a row by the other side's matrix

A causal mask becomes a scan over chunks of rows: a chunk of queries uses the Gram matrix of all keys before it, a chunk
of keys that of all queries after it. `_contract` computes these prefix and suffix sums chunk by chunk. The tiles of
attention_tiles.py handle the remaining triangle, the pairs of a chunk of queries with the keys beside it.

Packed sequences have a matrix each. Slots, which each lie in one sequence (attention_packed.py), are the splits of
`_gram`, of which `_contract` sums those of a sequence, and the tiles of `_gradient`. In the scan of packed sequences
slots are chunks, of which each has its matrices, and sums end with a sequence.

Products of 16-bit inputs are exact in float32. A split sums at most SUMMED of them in float32 (in the scan: a chunk of
each head, and all keys that every query sees). All further sums are float64, because the terms of the loss cancel as
the student nears its teacher. For the same reason the matrix that multiplies bfloat16 rows is split into two bfloat16
terms, and float32 inputs are multiplied in float64, which tensor cores support.

Each row and head of queries or keys costs D_s + D_t numbers read in the forward and again in the backward, and D_s
written; 2 (D_s^2 + D_s D_t + D_t^2) operations forward and 2 D' D_s backward (twice that with two terms). At 26 / 64
that is 14 and 4.7 kFLOP, which in 16 bits take a fifth of the time of the bytes. Head dimensions are padded to powers
of 2 in registers only. Heads too wide for one program, such as hidden states used as queries and keys, are multiplied
block by block.
"""

from math import gcd, lcm
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import heads_of, on_device_of, power_of_2
from .attention_mse_plan import SUMMED, Plan, blocks, multiprocessors_of, plan
from .attention_packed import rows_of, sequence_of, slot_rows, slots_of

if TYPE_CHECKING:
    from ..ops._attention import Attention


@triton.jit
def _load_rows(x_ptr, row_stride, rows, exists, columns, DIM: tl.constexpr, UNIT: tl.constexpr):
    """Returns (rows, columns) of one head, zero where a row is masked; its stride counts units of UNIT numbers."""
    x_ptr += rows[:, None] * row_stride * UNIT + columns[None, :]
    return tl.load(x_ptr, mask=exists[:, None] & (columns < DIM)[None, :], other=0)


@triton.jit
def _chunk(chunk, side, query_length, key_length, CHUNK: tl.constexpr):
    """Returns the first row and the end of a chunk of queries, or of the keys that the query chunk before sees in part.

    Key chunk 0 holds the keys that every query sees; query chunk n sees the key chunks 0 to n.
    """
    offset = key_length - query_length
    first, end = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, query_length)
    if side == 1:
        first = tl.where(chunk == 0, 0, tl.maximum((chunk - 1) * CHUNK + offset, 0))
        end = tl.minimum(tl.maximum(chunk * CHUNK + offset, 0), key_length)
    return first, end


@triton.jit
def _packed_chunk(query_starts_ptr, key_starts_ptr, slot, side, sequences, CHUNK: tl.constexpr):
    """Returns the same of a slot of packed sequences, which each have one chunk of keys more than of queries."""
    sequence, chunk = sequence_of(query_starts_ptr, slot, sequences, CHUNK, 2)
    query_start, query_end = rows_of(query_starts_ptr, sequence)
    key_start, key_end = rows_of(key_starts_ptr, sequence)
    first, end = _chunk(chunk, side, query_end - query_start, key_end - key_start, CHUNK)
    start = tl.where(side == 1, key_start, query_start)
    return start + first, start + end


@triton.jit(do_not_specialize=["splits", "sequences"])
def _gram(
    a_query_ptr, b_query_ptr,  # (B, H, L, D_a), (B, H, L, D_b)
    a_key_ptr, b_key_ptr,  # (B, H_a, S, D_a), (B, H_b, S, D_b)
    query_mask_ptr, key_mask_ptr,  # (B, L), (B, S) bool
    query_starts_ptr, key_starts_ptr,  # (sequences + 1), (sequences + 1), if packed; B = 1
    out_ptr,  # (splits, 2, B * groups, D', D')
    a_query_batch, a_query_head, a_query_row, b_query_batch, b_query_head, b_query_row,  # strides / UNIT_A or UNIT_B
    a_key_batch, a_key_head, a_key_row, b_key_batch, b_key_head, b_key_row,
    query_mask_batch, key_mask_batch,
    count, groups, query_length, key_length, heads_of_a_group,  # count: B * groups
    sharing_a, sharing_b,  # groups that share a key head
    splits, sequences,
    MASKED: tl.constexpr,  # 1: queries, 2: keys, 3: both
    IS_CAUSAL: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a chunk of the causal scan or of a slot, each a split; 0: a split is any share
    UNIT_A: tl.constexpr,
    UNIT_B: tl.constexpr,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    WIDTH: tl.constexpr,  # D'
    FIRST_A: tl.constexpr,  # where A's columns begin in D'
    FIRST_B: tl.constexpr,
    ALL: tl.constexpr,  # compute A^T A and B^T B as well: both are one block wide
    WIDE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # CUDA allows only the x axis of a grid to be long, so all indices share it. Blocks vary fastest: they read the same
    # rows.
    COLUMN_BLOCKS: tl.constexpr = (D_B + BLOCK_B - 1) // BLOCK_B
    BLOCKS: tl.constexpr = (D_A + BLOCK_A - 1) // BLOCK_A * COLUMN_BLOCKS
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    split, program = program % splits, program // splits
    side, of = program // count, program % count
    batch, group = (of // groups).to(tl.int64), (of % groups).to(tl.int64)
    columns_a = block // COLUMN_BLOCKS * BLOCK_A + tl.arange(0, BLOCK_A)
    columns_b = block % COLUMN_BLOCKS * BLOCK_B + tl.arange(0, BLOCK_B)

    # Queries: all heads of the group. Keys: the one head that the group shares.
    length, heads = query_length, heads_of_a_group
    a_ptr = a_query_ptr + (batch * a_query_batch + group * heads_of_a_group * a_query_head) * UNIT_A
    b_ptr = b_query_ptr + (batch * b_query_batch + group * heads_of_a_group * b_query_head) * UNIT_B
    a_row, b_row, a_head, b_head, starts_ptr = a_query_row, b_query_row, a_query_head, b_query_head, query_starts_ptr
    if MASKED:
        mask_ptr = query_mask_ptr + batch * query_mask_batch
    if side == 1:
        length, heads = key_length, 1
        a_ptr = a_key_ptr + (batch * a_key_batch + group // sharing_a * a_key_head) * UNIT_A
        b_ptr = b_key_ptr + (batch * b_key_batch + group // sharing_b * b_key_head) * UNIT_B
        a_row, b_row, a_head, b_head, starts_ptr = a_key_row, b_key_row, a_key_head, b_key_head, key_starts_ptr
        if MASKED:
            mask_ptr = key_mask_ptr + batch * key_mask_batch

    ab = tl.zeros((BLOCK_A, BLOCK_B), WIDE)
    aa = tl.zeros((BLOCK_A, BLOCK_A), WIDE)
    bb = tl.zeros((BLOCK_B, BLOCK_B), WIDE)
    first = 0
    if query_starts_ptr is not None and IS_CAUSAL:
        first, length = _packed_chunk(query_starts_ptr, key_starts_ptr, split, side, sequences, CHUNK)
    elif query_starts_ptr is not None:
        _, first, length = slot_rows(starts_ptr, split, sequences, CHUNK)
    elif CHUNK:
        first, length = _chunk(split, side, query_length, key_length, CHUNK)
    if IS_CAUSAL:  # pointers to the first row take fewer registers than its number does
        a_ptr += tl.cast(first, tl.int64) * a_row * UNIT_A
        b_ptr += tl.cast(first, tl.int64) * b_row * UNIT_B
        if MASKED:
            mask_ptr += first
        first, length = 0, length - first
    tiles = tl.maximum(tl.cdiv(length - first, ROWS), 0)  # of a head
    share = tiles * heads
    if not CHUNK:
        share = tl.cdiv(share, splits)
    from_tile = 0 if CHUNK else split * share
    masked_rows = tl.where(((side + 1) & MASKED) != 0, length, 0)
    rows = tl.arange(0, ROWS)
    for tile in range(from_tile, tl.minimum(from_tile + share, tiles * heads)):
        head, start = (tile // tiles).to(tl.int64), first + tile % tiles * ROWS
        exists = rows < length - start
        if MASKED:
            exists &= tl.load(mask_ptr + start + rows, mask=rows < masked_rows - start, other=1) != 0
        start = start.to(tl.int64)
        a = _load_rows(a_ptr + (head * a_head + start * a_row) * UNIT_A, a_row, rows, exists, columns_a, D_A, UNIT_A)
        b = _load_rows(b_ptr + (head * b_head + start * b_row) * UNIT_B, b_row, rows, exists, columns_b, D_B, UNIT_B)
        if a.dtype != b.dtype or tl.float64 == WIDE:
            a, b = a.to(WIDE), b.to(WIDE)
        ab = tl.dot(tl.trans(a), b, ab, input_precision="ieee", out_dtype=WIDE)
        if ALL:
            aa = tl.dot(tl.trans(a), a, aa, input_precision="ieee", out_dtype=WIDE)
            bb = tl.dot(tl.trans(b), b, bb, input_precision="ieee", out_dtype=WIDE)

    out_ptr += ((split * 2 + side).to(tl.int64) * count + of) * (WIDTH * WIDTH)
    _store_block(out_ptr, ab, columns_a, columns_b, FIRST_A, FIRST_B, D_A, D_B, WIDTH)
    if ALL:
        _store_block(out_ptr, aa, columns_a, columns_a, FIRST_A, FIRST_A, D_A, D_A, WIDTH)
        _store_block(out_ptr, bb, columns_b, columns_b, FIRST_B, FIRST_B, D_B, D_B, WIDTH)


@triton.jit
def _store_block(
    matrix_ptr, block, i, j, FIRST_I: tl.constexpr, FIRST_J: tl.constexpr, D_I: tl.constexpr, D_J: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    where = (FIRST_I + i)[:, None] * WIDTH + (FIRST_J + j)[None, :]
    tl.store(matrix_ptr + where, block, mask=(i < D_I)[:, None] & (j < D_J)[None, :])


@triton.jit
def _counted(mask_ptr, start, length, BLOCK: tl.constexpr):
    """Returns how many rows count, int64."""
    if mask_ptr is None:
        return tl.cast(length, tl.int64)
    else:  # Triton would compile code after the branch as well, where there is no mask
        total = tl.zeros((BLOCK,), tl.int32)
        for block in range(0, length, BLOCK):
            at = block + tl.arange(0, BLOCK)
            total += tl.load(mask_ptr + start + at, mask=at < length, other=0).to(tl.int32)
        return tl.sum(total, 0).to(tl.int64)


@triton.jit(do_not_specialize=["splits", "sequences"])
def _contract(
    partial_ptr,  # (splits, 2, B * groups, D', D'), the student's columns first
    query_mask_ptr, key_mask_ptr,  # (B, L), (B, S) bool; None: all rows count
    query_starts_ptr, key_starts_ptr,  # as in `_gram`
    pairs_ptr,  # (B) int64: allowed pairs of a head; None: not wanted
    total_ptr,  # ([sequences,] B * groups, blocks of a triangle)
    # (B * groups, D', D_s); in the scan (splits, B * groups, D', D_s): of a chunk's queries and all later ones, of its
    # keys and all earlier ones; of packed sequences without a scan (sequences, groups, D', D_s).
    query_gram_ptr, key_gram_ptr,
    query_mask_batch, key_mask_batch,  # strides
    groups, query_length, key_length, splits, sequences,
    student_scale: tl.float64, teacher_scale: tl.float64,
    CHUNK: tl.constexpr,  # rows of a slot
    D_S: tl.constexpr,
    WIDTH: tl.constexpr,
    TS: tl.constexpr,  # the partials hold the block TS, not ST
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ROW_BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = ROW_BLOCKS * (ROW_BLOCKS + 1) // 2
    of, count = (tl.program_id(0) // BLOCKS).to(tl.int64), (tl.num_programs(0) // BLOCKS).to(tl.int64)
    # Gram matrices are symmetric: only blocks on or below the diagonal are computed, 0, 1, 2 ... row by row.
    block = tl.program_id(0) % BLOCKS
    row = ((tl.sqrt_rn(8.0 * block + 1) - 1) * 0.5).to(tl.int32)
    column = block - row * (row + 1) // 2
    i, j = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    larger, smaller = tl.maximum(i[:, None], j[None, :]), tl.minimum(i[:, None], j[None, :])
    if TS:
        where = larger * WIDTH + smaller
    else:
        where = smaller * WIDTH + larger
    width = tl.cast(WIDTH, tl.int32)
    if pairs_ptr is not None:
        # Without a pair, rows that count by their own mask alone may hold NaN: the matrices are zero.
        batch = of // groups
        queries = _counted(query_mask_ptr, batch * query_mask_batch, query_length, 1024)
        pairs = queries * _counted(key_mask_ptr, batch * key_mask_batch, key_length, 1024)
        width = tl.where(pairs > 0, width, 0)
        tl.store(pairs_ptr + batch, pairs, mask=(of % groups == 0) & (block == 0))
    read = (i < width)[:, None] & (j < width)[None, :]
    student_scale, teacher_scale = tl.full((), student_scale, tl.float64), tl.full((), teacher_scale, tl.float64)
    v_i, v_j = tl.where(i < D_S, student_scale, -teacher_scale), tl.where(j < D_S, student_scale, -teacher_scale)
    weight = v_i[:, None] * v_j[None, :] * tl.where(row == column, 1, 2)
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    query = tl.zeros((BLOCK, BLOCK), tl.float64)
    key = tl.zeros((BLOCK, BLOCK), tl.float64)
    partial = of
    if query_starts_ptr is not None:  # `of` counts the groups of all sequences
        sequence, partial, count = (of // groups).to(tl.int32), of % groups, tl.cast(groups, tl.int64)
    at, side, matrices = partial_ptr + partial * (WIDTH * WIDTH) + where, count * (WIDTH * WIDTH), count * (WIDTH * D_S)
    of *= WIDTH * D_S
    first, end = 0, splits
    if query_starts_ptr is not None and IS_CAUSAL:
        of = partial * (WIDTH * D_S)
        first, end = slots_of(query_starts_ptr, sequence, CHUNK, 2)
    elif query_starts_ptr is not None:
        first, end = slots_of(query_starts_ptr, sequence, CHUNK, 1)
        for split in range(first, end):
            query += tl.load(at + split * 2 * side, mask=read, other=0).to(tl.float64)
        first, end = slots_of(key_starts_ptr, sequence, CHUNK, 1)
        for split in range(first, end):
            key += tl.load(at + (split * 2 + 1) * side, mask=read, other=0).to(tl.float64)
        first, end = 0, 0
    for split in range(first, end):
        part = tl.load(at + split * 2 * side, mask=read, other=0).to(tl.float64)
        key += tl.load(at + (split * 2 + 1) * side, mask=read, other=0).to(tl.float64)
        if IS_CAUSAL:
            total += part * key * weight
            _store_twice(key_gram_ptr + split * matrices + of, key, i, j, D_S, WIDTH)
        else:
            query += part
    if IS_CAUSAL:
        for back in range(first, end):
            split = end - 1 - (back - first)
            query += tl.load(at + split * 2 * side, mask=read, other=0).to(tl.float64)
            _store_twice(query_gram_ptr + split * matrices + of, query, i, j, D_S, WIDTH)
    else:
        total += query * key * weight
        _store_twice(query_gram_ptr + of, query, i, j, D_S, WIDTH)
        _store_twice(key_gram_ptr + of, key, i, j, D_S, WIDTH)
    tl.store(total_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _store_twice(out_ptr, block, i, j, D_S: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a block of a symmetric matrix and its mirror image, as far as they lie in the first D_S columns."""
    inside = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
    tl.store(out_ptr + i[:, None] * D_S + j[None, :], block, mask=inside & (j < D_S)[None, :])
    tl.store(out_ptr + j[None, :] * D_S + i[:, None], block, mask=inside & (i < D_S)[:, None])


@triton.jit
def _finalise(
    total_ptr,  # (parts) float64
    near_ptr,  # () float64: the part of a causal loss within chunks; None: not causal
    pairs_ptr,  # (B) int64, of each head; None: the divisor is given
    num_items_ptr,  # (); None: the divisor is `number`, or the number of pairs
    loss_ptr, divisor_ptr,  # (), () float64
    parts, batch, heads,
    number: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the loss up and divides it by the number of items; a number of 0 divides by 1."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(total_ptr + at, mask=at < parts, other=0)
    loss = tl.sum(total, 0)
    if near_ptr is not None:
        loss += tl.load(near_ptr)
    divisor = tl.full((), number, tl.float64)
    if num_items_ptr is not None:
        divisor = tl.load(num_items_ptr).to(tl.float64)
    elif pairs_ptr is not None:
        pairs = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, batch, BLOCK):
            at = start + tl.arange(0, BLOCK)
            pairs += tl.load(pairs_ptr + at, mask=at < batch, other=0)
        divisor = (tl.sum(pairs, 0) * heads).to(tl.float64)
    divisor = tl.where(divisor == 0, 1, divisor)
    loss = tl.where(loss < 0, 0, loss)  # rounding must not make the sum of squares of equal scores negative
    tl.store(loss_ptr, (loss / divisor).to(loss_ptr.dtype.element_ty))
    tl.store(divisor_ptr, divisor)


@triton.jit
def _times(x, matrix, acc, PRECISION: tl.constexpr):
    """Returns acc + x @ matrix. bfloat16 takes two terms of the matrix: one would lose what cancellation leaves."""
    if acc.dtype == tl.float64:
        acc = tl.dot(x.to(tl.float64), matrix, acc, out_dtype=tl.float64)
    elif x.dtype == tl.bfloat16:
        high = matrix.to(tl.bfloat16)
        acc = tl.dot(x, (matrix - high.to(tl.float32)).to(tl.bfloat16), acc)
        acc = tl.dot(x, high, acc)
    else:
        acc = tl.dot(x.to(tl.float32), matrix, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _gradient(
    student_ptr, teacher_ptr,  # (B, heads, T, D_s), (B, heads of the teacher, T, D_t)
    mask_ptr,  # (B, T); None: all rows count
    starts_ptr, query_starts_ptr,  # (sequences + 1), (sequences + 1), if packed; B = 1
    pairs_ptr,  # (B): no row of a batch entry counts if this is 0; None: all do
    gram_ptr,  # ([chunks or sequences,] B * groups, D', D_s) of the other side
    grad_loss_ptr, divisor_ptr,  # (), ()
    near_ptr,  # as out, contiguous: unscaled gradients of the pairs within chunks; None: not causal
    out_ptr,  # (B, heads, T, D_s), as the student
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,  # strides, / UNIT_S, UNIT_T
    mask_batch, out_batch, out_head, out_row, out_column,
    heads, length, groups, sequences,
    heads_of_a_group,  # query heads
    sharing, teacher_sharing,  # groups that share a key head
    student_scale: tl.float64, teacher_scale: tl.float64,
    offset,  # S - L
    QUERIES: tl.constexpr,  # the rows are queries, not keys
    CHUNK: tl.constexpr,  # rows of a chunk of the causal scan, each with a matrix of its own; 0: no scan
    SPARE: tl.constexpr,  # slots of ROWS rows: see attention_packed.py
    UNIT_S: tl.constexpr,
    UNIT_T: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the gradient, in this program
    BLOCK_S: tl.constexpr,  # columns of q_s, k_s at a time
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    COLUMN_BLOCKS: tl.constexpr = (D_S + COLUMNS - 1) // COLUMNS
    # CUDA allows only the x axis of a grid to be long, so all indices share it: column blocks, tiles, heads, batch
    # entries, from fast to slow. Consecutive tiles of a head share its matrix.
    tiles, first_tiles = tl.cdiv(length, ROWS), 0
    if starts_ptr is not None:
        tiles = length // ROWS + SPARE * sequences  # slots, of which each lies in one sequence
    elif CHUNK and not QUERIES:  # first the keys that all queries see, then the others, chunk by chunk
        first_tiles = tl.cdiv(tl.maximum(offset, 0), ROWS)
        tiles = first_tiles + tl.cdiv(length - offset, ROWS)
    program = tl.program_id(0) // COLUMN_BLOCKS
    tile, of = program % tiles, program // tiles
    head, batch = (of % heads).to(tl.int64), (of // heads).to(tl.int64)
    first, start, end, chunk = 0, tile * ROWS, length, 0
    count = tl.num_programs(0) // COLUMN_BLOCKS // tiles // heads * groups
    if starts_ptr is not None:
        sequence, tile = sequence_of(starts_ptr, tile, sequences, ROWS, SPARE)
        first, end = rows_of(starts_ptr, sequence)
        start = first + tile * ROWS
        chunk = sequence
        if CHUNK:
            query_start, query_end = rows_of(query_starts_ptr, sequence)
            offset = (end - first) - (query_end - query_start)
            first_tiles = tl.cdiv(tl.maximum(offset, 0), ROWS)
            if not QUERIES:
                tile += tl.maximum(-offset, 0) // ROWS  # the first that holds a key
            chunk, past = slots_of(query_starts_ptr, sequence, CHUNK, 2)
    if CHUNK and QUERIES:
        chunk += tile * ROWS // CHUNK
    elif CHUNK:
        is_first = tile < first_tiles  # all queries see its keys
        chunk += tl.where(is_first, 0, (tile - first_tiles) * ROWS // CHUNK + 1)
        start = first + tl.where(is_first, tile * ROWS, offset + (tile - first_tiles) * ROWS)
        end = tl.where(is_first, first + offset, end)
        if starts_ptr is not None:
            chunk = tl.minimum(chunk, past - 1)  # a tile without a row may lie behind the last chunk
    gram_ptr += tl.cast(chunk, tl.int64) * count * ((D_S + D_T) * D_S)
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows >= first) & (rows < end)
    exists = inside
    if pairs_ptr is not None:
        exists &= rows < tl.where(tl.load(pairs_ptr + batch) > 0, end, 0)
    if mask_ptr is not None:
        exists &= tl.load(mask_ptr + batch * mask_batch + rows, mask=exists, other=0) != 0

    grad = tl.load(grad_loss_ptr).to(tl.float64) / tl.load(divisor_ptr)
    student_scale, teacher_scale = tl.full((), student_scale, tl.float64), tl.full((), teacher_scale, tl.float64)
    student_factor = (2 * student_scale * student_scale * grad).to(WIDE)
    teacher_factor = (-2 * student_scale * teacher_scale * grad).to(WIDE)
    acc = tl.zeros((ROWS, COLUMNS), WIDE)
    if QUERIES:
        sharing = 1
    for part in range(sharing):
        if QUERIES:
            group, teacher_head_index = head // heads_of_a_group, head
        else:
            group = head * sharing + part
            teacher_head_index = group // teacher_sharing
        matrix_ptr = gram_ptr + (batch * groups + group) * ((D_S + D_T) * D_S)
        x_ptr = student_ptr + (batch * student_batch + head * student_head) * UNIT_S
        for start in range(0, D_S, BLOCK_S):
            inner = start + tl.arange(0, BLOCK_S)
            x = _load_rows(x_ptr, student_row, rows, exists, inner, D_S, UNIT_S)
            matrix = _load_rows(matrix_ptr, D_S, inner, inner < D_S, columns, D_S, 1)
            acc = _times(x, matrix * student_factor, acc, PRECISION)
        x_ptr = teacher_ptr + (batch * teacher_batch + teacher_head_index * teacher_head) * UNIT_T
        for start in range(0, D_T, BLOCK_T):
            inner = start + tl.arange(0, BLOCK_T)
            x = _load_rows(x_ptr, teacher_row, rows, exists, inner, D_T, UNIT_T)
            matrix = _load_rows(matrix_ptr + D_S * D_S, D_S, inner, inner < D_T, columns, D_S, 1)
            acc = _times(x, matrix * teacher_factor, acc, PRECISION)
    out = out_ptr + batch * out_batch + head * out_head
    out += rows[:, None] * out_row + columns.to(tl.int64)[None, :] * out_column
    inside = inside[:, None] & (columns < D_S)[None, :]
    if near_ptr is not None:
        near = near_ptr + ((batch * heads + head) * length + rows[:, None]) * D_S + columns[None, :]
        acc += tl.load(near, mask=inside, other=0).to(WIDE) * grad.to(WIDE)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


# Rows of a chunk of the causal scan. A chunk has two matrices of D' D_s numbers, and each of its rows is compared with
# 128 keys, on average, one by one.
CHUNK = 256


def grams_of_a_scan(call: "Attention") -> int:
    """Returns one more than the number of query chunks: the last chunk of keys has no queries after it."""
    query_length = call.student_query.shape[2]
    if call.cu_seqlens is not None:
        return query_length // CHUNK + 2 * sequences_of(call)
    return blocks(query_length, CHUNK) + 1


def sequences_of(call: "Attention") -> int:
    return 0 if call.cu_seqlens is None else len(call.cu_seqlens) - 1


def gram_dtype(*inputs: Tensor) -> torch.dtype:
    """Returns the dtype of products and Gram matrices: float64; float32 for 16-bit inputs, where products are exact."""
    return torch.float64 if any(x.itemsize > 2 for x in inputs) else torch.float32


def _mask(mask: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, int]:  # (B|1, T)
    """Returns a mask of rows for products in `dtype`, and its stride from one batch entry to the next."""
    if mask is None:
        return None, 0
    return _common.flags(mask.contiguous(), dtype), 0 if mask.shape[0] == 1 else mask.shape[1]


def _unit(*tensors: Tensor) -> int:
    """Returns the largest power of 2, up to 8, that divides all strides from row to row.

    Triton knows of a stride only whether 16 divides it, and loads one number at a time if not. Kernels that multiply a
    stride by a constant unit load as many numbers at once: the rows of 26 numbers start at multiples of 2.
    """
    return gcd(8, *(stride for x in tensors for stride in x.stride()[:3]))


def _strides(unit: int, x: Tensor) -> tuple[int, int, int]:
    batch, head, row, _ = x.stride()
    return batch // unit, head // unit, row // unit


def _partial_grams(
    call: "Attention",  # of tensors that `heads_of` returned
    query_mask: tuple[Tensor | None, int], key_mask: tuple[Tensor | None, int],
    groups: int, plan: Plan,
    chunk: int,  # rows of a chunk of the scan, or of a slot of packed sequences; 0: any share of the rows is a split
    out: Tensor,  # (splits, 2, B * groups, D', D')
) -> None:  # fmt: skip
    sq, sk, tq, tk = call.tensors()
    heads, d_s, d_t = sq.shape[1], sq.shape[3], tq.shape[3]
    queries, keys = query_mask[0], key_mask[0]
    masks = keys if queries is None else queries, queries if keys is None else keys  # the other stands in, unread

    def launch(a: tuple, b: tuple, everything: bool) -> None:
        (a_query, a_key, block_a, first_a), (b_query, b_key, block_b, first_b) = a, b
        d_a, d_b, unit_a, unit_b = a_query.shape[3], b_query.shape[3], _unit(a_query, a_key), _unit(b_query, b_key)
        _gram[(blocks(d_a, block_a) * blocks(d_b, block_b) * out.shape[0] * 2 * out.shape[2],)](
            a_query, b_query, a_key, b_key, *masks, call.cu_seqlens, call.cu_seqlens_key, out,
            *_strides(unit_a, a_query), *_strides(unit_b, b_query), *_strides(unit_a, a_key), *_strides(unit_b, b_key),
            query_mask[1], key_mask[1], out.shape[2], groups, *call.lengths(), heads // groups,
            groups // a_key.shape[1], groups // b_key.shape[1], out.shape[0], sequences_of(call),
            MASKED=(queries is not None) + 2 * (keys is not None), IS_CAUSAL=call.is_causal, CHUNK=chunk,
            UNIT_A=unit_a, UNIT_B=unit_b, D_A=d_a, D_B=d_b, WIDTH=out.shape[3],
            FIRST_A=first_a, FIRST_B=first_b, ALL=everything, BLOCK_A=block_a, BLOCK_B=block_b, ROWS=plan.rows,
            WIDE=tl.float64 if out.dtype == torch.float64 else tl.float32, **plan.options,
        )  # fmt: skip

    # The wider side's columns become the rows of the product: tensor cores want many.
    wider, narrower = (tq, tk, plan.block_t, d_s), (sq, sk, plan.block_s, 0)
    if d_s > d_t:
        wider, narrower = narrower, wider
    if plan.one_program:
        launch(wider, narrower, True)
    else:
        launch(wider, wider, False)
        launch(wider, narrower, False)
        launch(narrower, narrower, False)


def loss(
    call: "Attention",  # attn_mask is None; a causal call's masks are True only for rows in an allowed pair
    number: float | None,  # divides the sum; None: num_items does, or else the allowed pairs (not of a causal call)
    num_items: Tensor | None,  # ()
    near: Tensor | None,  # () float64: the sum over pairs within chunks, if causal
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss (), its divisor () float64, the allowed pairs of a head of each batch entry (B; empty without a
    mask to count), and the student's columns of Gq and Gk (B, groups, D', D_s).

    Under a causal mask each chunk has its own matrices: of the queries after it, and of the keys before it. Without one
    each packed sequence has its own. In both cases the masks are True only for rows in an allowed pair, and num_items
    or number is given.
    """
    dtype, new = gram_dtype(*call.tensors()), call.student_query.new_empty
    call = call._replace(**{name: heads_of(getattr(call, name), dtype) for name in call._fields[:4]})
    if call.cu_seqlens is not None and call.cu_seqlens_key is not None:  # one program takes either
        call = call._replace(cu_seqlens_key=call.cu_seqlens_key.to(call.cu_seqlens.dtype))
    (batch, heads, query_length, d_s), is_causal = call.student_query.shape, call.is_causal
    key_length, d_t = call.student_key.shape[2], call.teacher_query.shape[3]
    groups, width = lcm(call.student_key.shape[1], call.teacher_key.shape[1]), d_s + d_t
    query_mask, key_mask = _mask(call.query_mask, dtype), _mask(call.key_mask, dtype)
    is_packed, sequences = call.cu_seqlens is not None, sequences_of(call)
    has_pairs = not (is_causal or is_packed) and (call.query_mask is not None or call.key_mask is not None)
    chunks = [grams_of_a_scan(call)] if is_causal else [sequences] if is_packed else []
    query_gram, key_gram = (new(*chunks, batch, groups, width, d_s, dtype=dtype) for _ in range(2))
    out, divisor = new((), dtype=call.dtype), new((), dtype=torch.float64)
    pairs = new(batch if has_pairs else 0, dtype=torch.int64)
    if query_gram.numel() == 0 or query_length == 0 or key_length == 0:
        return out.zero_(), divisor.fill_(1), pairs.zero_(), query_gram.zero_(), key_gram.zero_()
    arch, tall = _common.arch_of(out), max(heads // groups * query_length, key_length)
    cut = plan(arch, multiprocessors_of(out.device), dtype == torch.float64, batch * groups, tall, d_s, d_t)
    chunk, splits = (CHUNK, chunks[0]) if is_causal else (0, cut.splits)
    if is_packed and not is_causal:  # a slot of a group has as many rows as are summed in float32
        chunk = max(16, SUMMED // power_of_2(heads // groups))
        splits = max(query_length, key_length) // chunk + sequences
    partial = new(splits, 2, batch * groups, width, width, dtype=dtype)
    block = 64 if arch == "cpu" else 16 if width <= 16 else 32
    triangle = blocks(width, block) * (blocks(width, block) + 1) // 2
    totals = new(batch * groups * triangle * (sequences if is_packed else 1), dtype=torch.float64)
    counts = pairs if has_pairs and number is None and num_items is None else None
    with on_device_of(out):
        _partial_grams(call, query_mask, key_mask, groups, cut, chunk, partial)
        _contract[(len(totals),)](
            partial, query_mask[0], key_mask[0], call.cu_seqlens, call.cu_seqlens_key, pairs if has_pairs else None,
            totals, query_gram, key_gram, query_mask[1], key_mask[1], groups, query_length, key_length, splits,
            sequences, call.student_scale, call.teacher_scale, CHUNK=chunk if is_packed else 0, D_S=d_s, WIDTH=width,
            TS=d_t >= d_s, IS_CAUSAL=is_causal, BLOCK=block, num_warps=4,
            **({"maxnreg": 255} if arch == "sm_80" else {}),
        )  # fmt: skip
        _finalise[(1,)](
            totals, near, counts, num_items, out, divisor, len(totals), batch, heads,
            0.0 if number is None else float(number), BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out, divisor, pairs, query_gram, key_gram


def gradients(
    grad_loss: Tensor,  # ()
    call: "Attention",  # as in `loss`
    divisor: Tensor, pairs: Tensor, query_gram: Tensor, key_gram: Tensor,  # as `loss` returns them
    near: tuple[Tensor | None, Tensor | None],  # gradients (B, heads, T, D_s) of the pairs within chunks, if causal
    d_query: Tensor, d_key: Tensor,  # to be written
) -> None:  # fmt: skip
    batch, heads, query_length, d_s = call.student_query.shape
    d_t, groups, offset = call.teacher_query.shape[3], query_gram.shape[-3], call.student_key.shape[2] - query_length
    wide = query_gram.dtype == torch.float64
    arch = _common.arch_of(call.student_query)
    few = arch == "sm_80" or call.student_query.dtype == torch.float16  # fewer rows: registers are short
    rows, widest, deepest = (256, 512, 512) if arch == "cpu" else (64, 32, 32) if wide else (64 if few else 128, 64, 32)
    columns, block_s, block_t = (
        min(max(power_of_2(d), 16), x) for d, x in ((d_s, widest), (d_s, deepest), (d_t, deepest))
    )

    def launch(
        student: Tensor, teacher: Tensor, mask: Tensor | None, starts: Tensor | None, gram: Tensor, near: Tensor | None,
        out: Tensor,
    ) -> None:  # fmt: skip
        if out.numel() == 0:
            return
        student, teacher = heads_of(student, gram.dtype), heads_of(teacher, gram.dtype)
        own, length = student.shape[1:3]
        mask, mask_batch = _mask(mask, gram.dtype)
        unit_s, unit_t = _unit(student), _unit(teacher)
        tiles = blocks(length, rows)
        # ptxas would rather spill than give up a program a multiprocessor.
        spills = d_s > columns or (starts is not None and (wide or call.is_causal))
        registers = {"maxnreg": 255} if arch == "sm_80" and spills else {}
        spare = 2 if call.is_causal and out is d_key else 1  # keys that all queries see fill tiles of their own
        if starts is not None:
            tiles = length // rows + spare * sequences_of(call)
        elif spare == 2:
            tiles = blocks(max(offset, 0), rows) + blocks(query_length, rows)
        _gradient[(blocks(d_s, columns) * tiles * own * batch,)](
            student, teacher, mask, starts, call.cu_seqlens, pairs if len(pairs) else None, gram, grad_loss, divisor,
            near, out,
            *_strides(unit_s, student), *_strides(unit_t, teacher), mask_batch, *out.stride(), own, length, groups,
            sequences_of(call), heads // groups, groups // own, groups // teacher.shape[1], call.student_scale,
            call.teacher_scale, offset, QUERIES=out is d_query, CHUNK=CHUNK if call.is_causal else 0, SPARE=spare,
            UNIT_S=unit_s, UNIT_T=unit_t, D_S=d_s, D_T=d_t, WIDE=tl.float64 if wide else tl.float32,
            PRECISION="tf32x3" if arch.startswith("sm_") else "ieee", ROWS=rows, COLUMNS=columns,
            BLOCK_S=block_s, BLOCK_T=block_t, num_warps=8 if columns > 32 else 4, num_stages=2,
            **registers,
        )  # fmt: skip

    with on_device_of(call.student_query):
        launch(call.student_query, call.teacher_query, call.query_mask, call.cu_seqlens, key_gram, near[0], d_query)
        launch(call.student_key, call.teacher_key, call.key_mask, call.cu_seqlens_key, query_gram, near[1], d_key)
