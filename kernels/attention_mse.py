"""Attention-score MSE from Gram matrices: reads every input row once forward and once backward, computes no score.

With q' = [q_s, q_t], k' = [k_s, k_t] (D' = D_s + D_t), v = [s_s ..., -s_t ...] and V = diag(v),

    sum_ij (a_s - a_t)^2 = < V Gq, Gk V >        Gq = q'^T q', Gk = k'^T k', D' x D'
    dq_s = 2 s_s q' V Gk[:, :D_s]                dk_s = 2 s_s k' V Gq[:, :D_s]

    _gram      (splits of the rows, some batch x groups, queries | keys): the blocks SS, ST, TT of a Gram matrix
    _contract  (batch x groups, rows of the matrix): sums the splits in order, in float64, into the loss and the
               student's columns of both matrices
    _gradient  (tiles of rows, batch x heads): multiplies a row by the other side's matrix

A causal mask becomes a scan over chunks of rows: a chunk of queries uses the Gram matrix of all keys before it, a chunk
of keys that of all queries after it. `_contract` computes these prefix and suffix sums chunk by chunk. The tiles of
attention_tiles.py handle the remaining triangle, the pairs of a chunk of queries with the keys beside it.

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

from math import lcm
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastdistill.kernels import _common
from fastdistill.kernels._common import on_device_of, power_of_2
from torch import Tensor

if TYPE_CHECKING:
    from fastdistill.ops._attention import Attention, Counted

# Most rows whose products are summed in float32. Half as many would double the traffic of partial sums, which at 26 /
# 64 in bfloat16 is 9% of the rows' own (2 * 32 KiB a split, written and read, beside 720 KiB).
SUMMED = 4096


@triton.jit
def _load_rows(
    x_ptr, row_stride, rows, exists, columns, DIM: tl.constexpr
):  # (rows, columns) of one head, zero where a row is masked  # fmt: skip
    return tl.load(
        x_ptr + rows[:, None] * row_stride + columns[None, :], mask=exists[:, None] & (columns < DIM)[None, :], other=0
    )


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
def _gram(
    a_query_ptr, b_query_ptr,  # (B, H, L, D_a), (B, H, L, D_b)
    a_key_ptr, b_key_ptr,  # (B, H_a, S, D_a), (B, H_b, S, D_b)
    counted_queries_ptr, counted_keys_ptr,  # (B, L), (B, S) bool; None: all rows count
    out_ptr,  # (splits, 2, B * groups, D', D'), from where the block A^T B starts
    a_query_batch, a_query_head, a_query_row, b_query_batch, b_query_head, b_query_row,  # strides
    a_key_batch, a_key_head, a_key_row, b_key_batch, b_key_head, b_key_row,
    counted_queries_batch, counted_keys_batch,
    groups, query_length, key_length, heads_of_a_group,
    sharing_a, sharing_b,  # groups that share a key head
    splits,
    count, groups_of_a_program,  # B * groups, and how many of them one program loops over
    SEVERAL: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a chunk of the causal scan, each a split; 0: a split is any share of the rows
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    WIDTH: tl.constexpr,  # D'
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
    programs = tl.cdiv(count, groups_of_a_program)
    side, first_of = program // programs, program % programs * groups_of_a_program
    first_a, first_b = block // COLUMN_BLOCKS * BLOCK_A, block % COLUMN_BLOCKS * BLOCK_B
    columns_a, columns_b = first_a + tl.arange(0, BLOCK_A), first_b + tl.arange(0, BLOCK_B)
    inside_a, inside_b = columns_a < D_A, columns_b < D_B
    for nth in range(tl.minimum(groups_of_a_program, count - first_of) if SEVERAL else 1):
        of = first_of + nth
        batch, group = (of // groups).to(tl.int64), (of % groups).to(tl.int64)

        # Queries: all heads of the group. Keys: the one head that the group shares.
        length, heads = query_length, heads_of_a_group
        a_ptr = a_query_ptr + batch * a_query_batch + group * heads_of_a_group * a_query_head
        b_ptr = b_query_ptr + batch * b_query_batch + group * heads_of_a_group * b_query_head
        a_row, b_row, a_head, b_head = a_query_row, b_query_row, a_query_head, b_query_head
        if side == 1:
            length, heads = key_length, 1
            a_ptr = a_key_ptr + batch * a_key_batch + group // sharing_a * a_key_head
            b_ptr = b_key_ptr + batch * b_key_batch + group // sharing_b * b_key_head
            a_row, b_row, a_head, b_head = a_key_row, b_key_row, a_key_head, b_key_head

        ab = tl.zeros((BLOCK_A, BLOCK_B), WIDE)
        aa = tl.zeros((BLOCK_A, BLOCK_A), WIDE)
        bb = tl.zeros((BLOCK_B, BLOCK_B), WIDE)
        first = 0
        if CHUNK:
            first, length = _chunk(split, side, query_length, key_length, CHUNK)
        tiles = tl.maximum(tl.cdiv(length - first, ROWS), 0)  # of a head
        share = tiles * heads
        if not CHUNK:
            share = tl.cdiv(share, splits)
        from_tile = 0 if CHUNK else split * share
        for tile in range(from_tile, tl.minimum(from_tile + share, tiles * heads)):
            head = (tile // tiles).to(tl.int64)
            rows = (first + tile % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            exists = rows < length
            if side == 0:
                if counted_queries_ptr is not None:
                    exists &= (
                        tl.load(counted_queries_ptr + batch * counted_queries_batch + rows, mask=exists, other=0) != 0
                    )
            else:
                if counted_keys_ptr is not None:
                    exists &= tl.load(counted_keys_ptr + batch * counted_keys_batch + rows, mask=exists, other=0) != 0
            a = _load_rows(a_ptr + head * a_head, a_row, rows, exists, columns_a, D_A)
            b = _load_rows(b_ptr + head * b_head, b_row, rows, exists, columns_b, D_B)
            if a.dtype != b.dtype or tl.float64 == WIDE:
                a, b = a.to(WIDE), b.to(WIDE)
            ab = tl.dot(tl.trans(a), b, ab, input_precision="ieee", out_dtype=WIDE)
            if ALL:
                aa = tl.dot(tl.trans(a), a, aa, input_precision="ieee", out_dtype=WIDE)
                bb = tl.dot(tl.trans(b), b, bb, input_precision="ieee", out_dtype=WIDE)

        matrix_ptr = out_ptr + ((split * 2 + side).to(tl.int64) * count + of) * (WIDTH * WIDTH)
        tl.store(
            matrix_ptr + columns_a[:, None] * WIDTH + columns_b[None, :], ab, mask=inside_a[:, None] & inside_b[None, :]
        )
        if ALL:  # the block A^T B starts D_A columns into the matrix
            aa_ptr, bb_ptr = matrix_ptr - D_A, matrix_ptr + D_A * WIDTH
            tl.store(
                aa_ptr + columns_a[:, None] * WIDTH + columns_a[None, :], aa, mask=inside_a[:, None] & inside_a[None, :]
            )
            tl.store(
                bb_ptr + columns_b[:, None] * WIDTH + columns_b[None, :], bb, mask=inside_b[:, None] & inside_b[None, :]
            )


@triton.jit
def _contract(
    partial_ptr,  # (splits, 2, B * groups, D', D'), the student's columns first; the block TS is not written
    total_ptr,  # (B * groups, row blocks)
    # (B * groups, D', D_s); in the scan (splits, B * groups, D', D_s): of a chunk's queries and all later ones, of its
    # keys and all earlier ones.
    query_gram_ptr, key_gram_ptr,
    splits,
    student_scale: tl.float64, teacher_scale: tl.float64,
    D_S: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    of, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student_scale, teacher_scale = tl.full((), student_scale, tl.float64), tl.full((), teacher_scale, tl.float64)
    v_i = tl.where(i < D_S, student_scale, -teacher_scale)
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    for start in range(0, WIDTH, BLOCK):
        j = start + tl.arange(0, BLOCK)
        v_j = tl.where(j < D_S, student_scale, -teacher_scale)
        inside = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
        # A Gram matrix is symmetric: read the block TS from ST.
        where = tl.minimum(i[:, None], j[None, :]) * WIDTH + tl.maximum(i[:, None], j[None, :])
        query = tl.zeros((BLOCK, BLOCK), tl.float64)
        key = tl.zeros((BLOCK, BLOCK), tl.float64)
        columns = (i < WIDTH)[:, None] & (j < D_S)[None, :]
        out = of * (WIDTH * D_S) + i[:, None] * D_S + j[None, :]
        size = count * (WIDTH * D_S)
        for split in range(splits):
            at = partial_ptr + (split * 2 * count + of) * (WIDTH * WIDTH) + where
            part = tl.load(at, mask=inside, other=0).to(tl.float64)
            key += tl.load(at + count * (WIDTH * WIDTH), mask=inside, other=0).to(tl.float64)
            if IS_CAUSAL:
                total += part * key * (v_i[:, None] * v_j[None, :])
                tl.store(key_gram_ptr + split * size + out, key, mask=columns)
            else:
                query += part
        if IS_CAUSAL:
            for back in range(splits):
                split = splits - 1 - back
                at = partial_ptr + (split * 2 * count + of) * (WIDTH * WIDTH) + where
                query += tl.load(at, mask=inside, other=0).to(tl.float64)
                tl.store(query_gram_ptr + split * size + out, query, mask=columns)
        else:
            total += query * key * (v_i[:, None] * v_j[None, :])
            tl.store(query_gram_ptr + out, query, mask=columns)
            tl.store(key_gram_ptr + out, key, mask=columns)
    tl.store(total_ptr + of * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(total, 1), 0))


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
    counted_ptr,  # (B, T); None: all rows count
    gram_ptr,  # (B * groups, D', D_s) of the other side
    grad_total_ptr,  # ()
    near_ptr,  # as out, contiguous: unscaled gradients of the pairs within chunks; None: not causal
    out_ptr,  # (B, heads, T, D_s), as the student
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,  # strides
    counted_batch, out_batch, out_head, out_row, out_column,
    heads, length, groups,
    heads_of_a_group,  # query heads
    sharing, teacher_sharing,  # groups that share a key head
    student_scale: tl.float64, teacher_scale: tl.float64,
    offset,  # S - L
    QUERIES: tl.constexpr,  # the rows are queries, not keys
    CHUNK: tl.constexpr,  # rows of a chunk of the causal scan, each with a matrix of its own; 0: one matrix for all
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
    if CHUNK and not QUERIES:  # first the keys that all queries see, then the others, chunk by chunk
        first_tiles = tl.cdiv(tl.maximum(offset, 0), ROWS)
        tiles = first_tiles + tl.cdiv(length - offset, ROWS)
    program = tl.program_id(0) // COLUMN_BLOCKS
    tile, of = program % tiles, program // tiles
    head, batch = (of % heads).to(tl.int64), (of // heads).to(tl.int64)
    start, end = tile * ROWS, length
    if CHUNK:
        chunk = start // CHUNK
        if not QUERIES:
            chunk = tl.where(tile < first_tiles, 0, (tile - first_tiles) * ROWS // CHUNK + 1)
            end = tl.where(tile < first_tiles, offset, length)
            start = tl.where(tile < first_tiles, start, offset + (tile - first_tiles) * ROWS)
        count = tl.num_programs(0) // COLUMN_BLOCKS // tiles // heads * groups
        gram_ptr += chunk.to(tl.int64) * count * ((D_S + D_T) * D_S)
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows >= 0) & (rows < end)
    exists = inside
    if counted_ptr is not None:
        exists &= tl.load(counted_ptr + batch * counted_batch + rows, mask=exists, other=0) != 0

    grad = tl.load(grad_total_ptr).to(tl.float64)
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
        x_ptr = student_ptr + batch * student_batch + head * student_head
        for start in range(0, D_S, BLOCK_S):
            inner = start + tl.arange(0, BLOCK_S)
            x = _load_rows(x_ptr, student_row, rows, exists, inner, D_S)
            matrix = _load_rows(matrix_ptr, D_S, inner, inner < D_S, columns, D_S)
            acc = _times(x, matrix * student_factor, acc, PRECISION)
        x_ptr = teacher_ptr + batch * teacher_batch + teacher_head_index * teacher_head
        for start in range(0, D_T, BLOCK_T):
            inner = start + tl.arange(0, BLOCK_T)
            x = _load_rows(x_ptr, teacher_row, rows, exists, inner, D_T)
            matrix = _load_rows(matrix_ptr + D_S * D_S, D_S, inner, inner < D_T, columns, D_S)
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


def grams_of_a_scan(query_length: int) -> int:
    """Returns one more than the number of query chunks: the last chunk of keys has no queries after it."""
    return (query_length + CHUNK - 1) // CHUNK + 1


def gram_dtype(*inputs: Tensor) -> torch.dtype:
    """Returns the dtype of products and Gram matrices: float64; float32 for 16-bit inputs, where products are exact."""
    return torch.float64 if any(x.itemsize > 2 for x in inputs) else torch.float32


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _counted(counted: Tensor | None) -> tuple[Tensor | None, int]:  # (B|1, 1, T) bool
    """Returns a mask of rows, and its stride from one batch entry to the next."""
    if counted is None:
        return None, 0
    counted = counted[:, 0].contiguous()
    return counted, 0 if counted.shape[0] == 1 else counted.stride(0)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _block(width: int, widest: int) -> int:
    return min(max(power_of_2(width), 16), widest)


def loss(
    call: "Attention",  # attn_mask is None
    counted: "Counted",
) -> tuple[Tensor, Tensor, Tensor]:  # sum () float64; the student's columns of Gq and Gk (B, groups, D', D_s)
    """Under a causal mask the sum covers the pairs that lie in different chunks, and each chunk has its own matrices
    (see `grams_of_a_scan`): of the queries after it, and of the keys before it."""
    student_query, student_key, teacher_query, teacher_key = map(_rows, call.tensors())
    (counted_queries, queries_batch), (counted_keys, keys_batch) = map(_counted, (counted.queries, counted.keys))
    is_causal = call.is_causal
    batch, heads, query_length, d_s = student_query.shape
    key_length, d_t, width = student_key.shape[2], teacher_query.shape[3], d_s + teacher_query.shape[3]
    groups = lcm(student_key.shape[1], teacher_key.shape[1])
    chunks = [grams_of_a_scan(query_length)] if is_causal else []
    dtype = gram_dtype(*call.tensors())
    wide = dtype == torch.float64
    query_gram, key_gram = (student_query.new_empty(*chunks, batch, groups, width, d_s, dtype=dtype) for _ in range(2))
    if query_gram.numel() == 0 or query_length == 0 or key_length == 0:
        return query_gram.new_zeros((), dtype=torch.float64), query_gram.zero_(), key_gram.zero_()
    arch = _common.arch_of(student_query)
    rows, widest = (256, 512) if arch == "cpu" else (32, 64) if wide else (64 if arch.startswith("gfx") else 128, 128)
    block_s, block_t = _block(d_s, widest), _block(d_t, widest)
    one_program = d_s <= block_s and d_t <= block_t and block_s + block_t <= 128
    warps = 4 if block_s + block_t <= 64 else 8
    # Enough programs to fill a card twice, each with at least four tiles of rows and with no more than float32 may sum.
    per_card = 8  # without a card
    if student_query.is_cuda:
        per_card = 4 * torch.cuda.get_device_properties(student_query.device).multi_processor_count
    tiles = triton.cdiv(max(heads // groups * query_length, key_length), rows)
    # Each block of wide heads is a program: the launch with the fewest blocks should fill the card.
    blocks = 1 if one_program else min(triton.cdiv(d_s, block_s), triton.cdiv(d_t, block_t)) ** 2
    splits = max(min(triton.cdiv(per_card, 2 * batch * groups * blocks), tiles // 4), 1)
    if not wide:
        splits = max(splits, triton.cdiv(tiles, SUMMED // rows))
    if is_causal:
        splits = grams_of_a_scan(query_length)
    # With small heads, just enough programs to fill the card loop over several groups each. With larger heads the loop
    # would spill registers.
    several = one_program and block_s + block_t <= 64
    together = max(2 * splits * batch * groups // per_card, 1) if several else 1
    partial = query_gram.new_empty(splits, 2, batch * groups, width, width)

    def launch(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, everything: bool) -> None:
        (a_query, a_key), (b_query, b_key) = a, b
        d_a, d_b = a_query.shape[3], b_query.shape[3]
        block_a, block_b = _block(d_a, widest), _block(d_b, widest)
        blocks = triton.cdiv(d_a, block_a) * triton.cdiv(d_b, block_b)
        _gram[(blocks * splits * triton.cdiv(batch * groups, together) * 2,)](
            a_query, b_query, a_key, b_key, counted_queries, counted_keys, out,
            *_strides(a_query), *_strides(b_query), *_strides(a_key), *_strides(b_key), queries_batch, keys_batch,
            groups, query_length, key_length, heads // groups, groups // a_key.shape[1], groups // b_key.shape[1],
            splits, batch * groups, together,
            SEVERAL=several, CHUNK=CHUNK if is_causal else 0, D_A=d_a, D_B=d_b, WIDTH=width, ALL=everything,
            WIDE=tl.float64 if wide else tl.float32, BLOCK_A=block_a, BLOCK_B=block_b, ROWS=rows, num_warps=warps,
            num_stages=2,
        )  # fmt: skip

    student, teacher = (student_query, student_key), (teacher_query, teacher_key)
    with on_device_of(student_query):
        if one_program:
            launch(student, teacher, partial[..., d_s:], True)
        else:
            launch(student, student, partial, False)
            launch(student, teacher, partial[..., d_s:], False)
            launch(teacher, teacher, partial[..., d_s:, d_s:], False)
        block = min(_block(width, 64), 32 if arch != "cpu" else 64)
        totals = query_gram.new_empty(batch * groups, triton.cdiv(width, block), dtype=torch.float64)
        _contract[tuple(totals.shape)](
            partial, totals, query_gram, key_gram, splits, call.student_scale, call.teacher_scale,
            D_S=d_s, WIDTH=width, IS_CAUSAL=is_causal, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return totals.sum(), query_gram, key_gram


def gradients(
    grad_total: Tensor,  # ()
    call: "Attention",
    counted: "Counted",
    query_gram: Tensor,  # as `loss` returns them
    key_gram: Tensor,
    near: tuple[Tensor | None, Tensor | None],  # gradients (B, heads, T, D_s) of the pairs within chunks, if causal
    d_query: Tensor,  # to be written
    d_key: Tensor,
) -> None:
    batch, heads, query_length, d_s = call.student_query.shape
    d_t, groups, offset = call.teacher_query.shape[3], query_gram.shape[-3], call.student_key.shape[2] - query_length
    wide = gram_dtype(*call.tensors()) == torch.float64
    arch = _common.arch_of(call.student_query)
    few = arch == "sm_80" or call.student_query.dtype == torch.float16  # fewer rows: registers are short
    rows, widest, deepest = (256, 512, 512) if arch == "cpu" else (64, 32, 32) if wide else (64 if few else 128, 64, 32)

    def launch(
        student: Tensor, teacher: Tensor, flags: Tensor | None, gram: Tensor, near: Tensor | None, out: Tensor
    ) -> None:
        if out.numel() == 0:
            return
        student, teacher = _rows(student), _rows(teacher)
        own, length = student.shape[1:3]
        flags, flags_batch = _counted(flags)
        columns, block_s, block_t = _block(d_s, widest), _block(d_s, deepest), _block(d_t, deepest)
        tiles = triton.cdiv(length, rows)
        if call.is_causal and out is d_key:
            tiles = triton.cdiv(max(offset, 0), rows) + triton.cdiv(query_length, rows)
        _gradient[(triton.cdiv(d_s, columns) * tiles * own * batch,)](
            student, teacher, flags, gram, grad_total, near, out, *_strides(student), *_strides(teacher),
            flags_batch, *out.stride(), own, length, groups, heads // groups, groups // own,
            groups // teacher.shape[1], call.student_scale, call.teacher_scale, offset,
            QUERIES=out is d_query, CHUNK=CHUNK if call.is_causal else 0, D_S=d_s, D_T=d_t,
            WIDE=tl.float64 if wide else tl.float32, PRECISION="tf32x3" if arch.startswith("sm_") else "ieee",
            ROWS=rows, COLUMNS=columns, BLOCK_S=block_s, BLOCK_T=block_t, num_warps=8 if columns > 32 else 4,
            num_stages=2,
        )  # fmt: skip

    with on_device_of(call.student_query):
        launch(call.student_query, call.teacher_query, counted.queries, key_gram, near[0], d_query)
        launch(call.student_key, call.teacher_key, counted.keys, query_gram, near[1], d_key)
