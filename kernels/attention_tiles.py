"""The attention losses that need every score, computed in tiles as in flash attention: KL, and MSE with an attn_mask.

    _statistics  KL only. Computes both maxima m and sums of exponentials l of each row, and the cross term
                 sum exp(x_t) (x_t - x_s) with x = score - m, all rescaled whenever a maximum grows:
                 KL = E_t[x_t - x_s] - log l_t + log l_s
    _d_query     per tile of queries, over the keys: dS, dQ = factor * dS K_s; for MSE the loss as well
    _d_key       per tile of keys, over the queries of all heads that share them: dK = factor * dS^T Q_s

with dS = p_s - p_t, p = exp(x) / l (KL), or a_s - a_t (MSE), 0 where a pair is not allowed, factor the student's scale
(KL) or twice that (MSE). Memory is linear in L and S; shared key heads are not copied.

The scales multiply the float32 scores; multiplied into the 16-bit operands, they would round them. Exponentials are
computed as powers of 2, with log2(e) multiplied in after the maximum is subtracted: before it, scores of 1000 would be
rounded by 1e-4. Each pass costs 2 (D_s + D_t) operations and 2 exponentials a pair, and 2 D_s more for a gradient. At
D = 64 on an H200 the exponentials bound the three passes; the products take half as long.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import heads_of, on_device_of, power_of_2

if TYPE_CHECKING:
    from ..ops._attention import Attention, Counted


@triton.jit
def _load(x_ptr, row_stride, first, exists, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Returns the rows from `first` on, (ROWS, PADDED). Within the tile 32-bit offsets save instructions."""
    columns = tl.arange(0, PADDED)
    x_ptr += tl.cast(first, tl.int64) * row_stride
    where = tl.arange(0, ROWS)[:, None] * row_stride + columns[None, :]
    return tl.load(x_ptr + where, mask=exists[:, None] & (columns < DIM)[None, :], other=0)


@triton.jit
def _flags(ptr, at, exists):
    """Returns which rows count: those flagged at `at`; all that exist if ptr is None."""
    if ptr is not None:
        exists &= tl.load(ptr + at, mask=exists, other=0) != 0
    return exists


@triton.jit
def _place(length, heads, BLOCK: tl.constexpr):
    """Returns the (tile, head, batch) of a program.

    CUDA allows only the x axis of a grid to be long, so all three share it. Consecutive tiles of a head read the same
    rows of the other side.
    """
    tiles = tl.cdiv(length, BLOCK)
    of = tl.program_id(0) // tiles
    return tl.program_id(0) - of * tiles, (of % heads).to(tl.int64), (of // heads).to(tl.int64)


@triton.jit
def _product(a, b, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # (M, K), (K, N)
    """Returns a @ b in float32 or wider. 16-bit operands of one dtype are multiplied unconverted."""
    if tl.float64 == WIDE or a.dtype != b.dtype:
        a, b = a.to(WIDE), b.to(WIDE)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def _weighted(
    weights, x, acc, IS_KL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # (M, K), (K, N), (M, N)
    """Returns acc + weights @ x. float16 loses digits below 6e-5: MSE weights, of any size, stay wide and widen x."""
    if tl.float32 == WIDE and (x.dtype == tl.bfloat16 or (x.dtype == tl.float16 and IS_KL)):
        weights = weights.to(x.dtype)
    else:
        x = x.to(WIDE)
    return tl.dot(weights, x, acc, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _allowed(
    allowed, rows, columns, mask_ptr, mask_row, mask_column, offset, IS_CAUSAL: tl.constexpr, CHUNK: tl.constexpr
):  # `allowed`: so far; rows and columns broadcast against each other
    if IS_CAUSAL:
        allowed &= columns <= rows + offset
    if CHUNK:
        allowed &= columns >= rows // CHUNK * CHUNK + offset
    if mask_ptr is not None:
        where = rows.to(tl.int64) * mask_row + columns.to(tl.int64) * mask_column
        allowed &= tl.load(mask_ptr + where, mask=allowed, other=0) != 0
    return allowed


@triton.jit
def _range(bounds_ptr, rows, length):
    """Returns the first row of the other side that each row may meet, and the one after the last."""
    rows = tl.minimum(rows, length - 1)  # so that those past the end extend no loop
    return tl.load(bounds_ptr + rows), tl.load(bounds_ptr + tl.cast(length, tl.int64) + rows)


@triton.jit
def _within(rows, rows_count, first, end, counted):  # the rows; the ranges of the other side, and which of these count
    """Returns which pairs lie in their range and count on both sides, in one subtraction and one comparison a pair."""
    rows, size = tl.where(rows_count, rows, -1), tl.where(counted, end - first, 0)
    return (rows - first).to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _statistics(
    sq_ptr, sk_ptr, tq_ptr, tk_ptr,  # (B, H, L, D_s), (B, H_s, S, D_s), (B, H, L, D_t), (B, H_t, S, D_t)
    queries_ptr, keys_ptr,  # (B|1, H|1, L), (B|1, H|1, S) bool, which rows count; None: all
    mask_ptr,  # (B|1, H|1, L|1, S|1) bool; None: all
    bounds_ptr,  # (2, L) int32: first and end of each query's keys, if packed or windowed; None: all keys
    stats_ptr,  # (5, B * H, L): m_s, m_t, 1024 / l_s, 1024 / l_t, KL
    sq_batch, sq_head, sq_row, sk_batch, sk_head, sk_row, tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row,
    queries_batch, queries_head, keys_batch, keys_head, mask_batch, mask_head, mask_row, mask_column,
    heads, student_sharing, teacher_sharing,  # H, H / H_s, H / H_t
    query_length, key_length,
    student_scale: tl.float64, teacher_scale: tl.float64,
    D_S: tl.constexpr, D_T: tl.constexpr, PADDED_S: tl.constexpr, PADDED_T: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _place(query_length, heads, BLOCK_M)
    student_scale, teacher_scale = tl.full((), student_scale, WIDE), tl.full((), teacher_scale, WIDE)
    sk_ptr += batch * sk_batch + head // student_sharing * sk_head
    tk_ptr += batch * tk_batch + head // teacher_sharing * tk_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    counted = _flags(queries_ptr, batch * queries_batch + head * queries_head + rows, rows < query_length)
    sq = _load(sq_ptr + batch * sq_batch + head * sq_head, sq_row, tile * BLOCK_M, counted, BLOCK_M, D_S, PADDED_S)
    tq = _load(tq_ptr + batch * tq_batch + head * tq_head, tq_row, tile * BLOCK_M, counted, BLOCK_M, D_T, PADDED_T)
    offset = key_length - query_length
    begin, end = 0, key_length
    if IS_CAUSAL:
        end = tl.minimum(key_length, (tile + 1) * BLOCK_M + offset)
    if bounds_ptr is not None:
        lower, upper = _range(bounds_ptr, rows, query_length)
        begin, end = tl.min(lower, 0), tl.max(upper, 0)

    lowest: tl.constexpr = -1e300 if tl.float64 == WIDE else -1e30  # finite: -inf - -inf is NaN
    s_max, t_max = tl.full((BLOCK_M,), lowest, WIDE), tl.full((BLOCK_M,), lowest, WIDE)
    s_sum, t_sum, cross = tl.zeros((BLOCK_M,), WIDE), tl.zeros((BLOCK_M,), WIDE), tl.zeros((BLOCK_M,), WIDE)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        keys = _flags(keys_ptr, batch * keys_batch + head * keys_head + columns, columns < key_length)
        sk = _load(sk_ptr, sk_row, start, keys, BLOCK_N, D_S, PADDED_S)
        tk = _load(tk_ptr, tk_row, start, keys, BLOCK_N, D_T, PADDED_T)
        if bounds_ptr is None:
            allowed = counted[:, None] & keys[None, :]
        else:
            allowed = _within(columns[None, :], keys[None, :], lower[:, None], upper[:, None], counted[:, None])
        allowed = _allowed(
            allowed, rows[:, None], columns[None, :], mask_ptr, mask_row, mask_column, offset, IS_CAUSAL, CHUNK
        )
        s = _product(sq, tl.trans(sk), WIDE, PRECISION) * student_scale
        t = _product(tq, tl.trans(tk), WIDE, PRECISION) * teacher_scale
        s, t = tl.where(allowed, s, -float("inf")), tl.where(allowed, t, -float("inf"))
        s_top, t_top = tl.maximum(s_max, tl.max(s, 1)), tl.maximum(t_max, tl.max(t, 1))
        s, t = s - s_top[:, None], t - t_top[:, None]
        t_e = _exp(t)
        shrunk = _exp(t_max - t_top)
        cross = (cross + t_sum * ((s_top - s_max) - (t_top - t_max))) * shrunk
        cross += tl.sum(tl.where(allowed, t_e * (t - s), 0), 1)
        t_sum = t_sum * shrunk + tl.sum(t_e, 1)
        s_sum = s_sum * _exp(s_max - s_top) + tl.sum(_exp(s), 1)
        s_max, t_max = s_top, t_top
    # A row without an allowed key has no loss.
    some = t_sum != 0
    s_sum, t_sum = tl.where(some, s_sum, 1), tl.where(some, t_sum, 1)
    kl = cross / t_sum + (tl.log(s_sum) - tl.log(t_sum))
    kl = tl.where(kl < 0, 0, kl)  # rounding must not make the KL of equal rows negative
    tiles = tl.cdiv(query_length, BLOCK_M)
    size = (tl.num_programs(0) // tiles).to(tl.int64) * query_length
    stats_ptr += (tl.program_id(0) // tiles).to(tl.int64) * query_length + rows
    exists = rows < query_length
    tl.store(stats_ptr, s_max, mask=exists)
    tl.store(stats_ptr + size, t_max, mask=exists)
    # dS is scaled by 1024, so that float16 keeps the digits of differences down to 6e-8.
    tl.store(stats_ptr + 2 * size, 1024 / s_sum, mask=exists)
    tl.store(stats_ptr + 3 * size, 1024 / t_sum, mask=exists)
    tl.store(stats_ptr + 4 * size, tl.where(some, kl, 0), mask=exists)


@triton.jit
def _difference(s, t, allowed, s_max, t_max, s_scale, t_scale, IS_KL: tl.constexpr):
    """Returns dS of a tile from its scores (for KL 1024 dS); the last four tensors broadcast against it."""
    if IS_KL:
        # Mask pairs before the exponential, which might overflow for them.
        s = _exp(tl.where(allowed, s - s_max, -float("inf"))) * s_scale
        t = _exp(tl.where(allowed, t - t_max, -float("inf"))) * t_scale
    return tl.where(allowed, s - t, 0)


@triton.jit
def _d_query(
    sq_ptr, sk_ptr, tq_ptr, tk_ptr, queries_ptr, keys_ptr, mask_ptr, bounds_ptr,
    stats_ptr,  # KL: as above; MSE: (B * H, L), to be written: the row's sum of squares
    d_query_ptr,  # (B, H, L, D_s); None: not wanted
    sq_batch, sq_head, sq_row, sk_batch, sk_head, sk_row, tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row,
    queries_batch, queries_head, keys_batch, keys_head, mask_batch, mask_head, mask_row, mask_column,
    d_query_batch, d_query_head, d_query_row, d_query_column,
    heads, student_sharing, teacher_sharing,
    query_length, key_length,
    student_scale: tl.float64, teacher_scale: tl.float64, factor: tl.float64,
    IS_KL: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, PADDED_S: tl.constexpr, PADDED_T: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head, batch = _place(query_length, heads, BLOCK_M)
    of = batch * heads + head
    student_scale, teacher_scale = tl.full((), student_scale, WIDE), tl.full((), teacher_scale, WIDE)
    factor = tl.full((), factor, WIDE)
    sk_ptr += batch * sk_batch + head // student_sharing * sk_head
    tk_ptr += batch * tk_batch + head // teacher_sharing * tk_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < query_length
    counted = _flags(queries_ptr, batch * queries_batch + head * queries_head + rows, exists)
    sq = _load(sq_ptr + batch * sq_batch + head * sq_head, sq_row, tile * BLOCK_M, counted, BLOCK_M, D_S, PADDED_S)
    tq = _load(tq_ptr + batch * tq_batch + head * tq_head, tq_row, tile * BLOCK_M, counted, BLOCK_M, D_T, PADDED_T)
    offset = key_length - query_length
    begin, end = 0, key_length
    if IS_CAUSAL:
        end = tl.minimum(key_length, (tile + 1) * BLOCK_M + offset)
    if CHUNK:
        begin = tl.maximum(tile * BLOCK_M // CHUNK * CHUNK + offset, 0)
    if bounds_ptr is not None:
        lower, upper = _range(bounds_ptr, rows, query_length)
        begin, end = tl.min(lower, 0), tl.max(upper, 0)
    stats_ptr += of * query_length + rows
    s_max = tl.zeros((BLOCK_M,), WIDE)
    t_max, s_inverse, t_inverse = s_max, s_max, s_max
    if IS_KL:
        size = (tl.num_programs(0) // tl.cdiv(query_length, BLOCK_M)).to(tl.int64) * query_length
        s_max, t_max = tl.load(stats_ptr, mask=exists), tl.load(stats_ptr + size, mask=exists)
        s_inverse = tl.load(stats_ptr + 2 * size, mask=exists)
        t_inverse = tl.load(stats_ptr + 3 * size, mask=exists)

    squares = tl.zeros((BLOCK_M,), WIDE)
    dq = tl.zeros((BLOCK_M, PADDED_S), WIDE)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        keys = _flags(keys_ptr, batch * keys_batch + head * keys_head + columns, columns < key_length)
        sk = _load(sk_ptr, sk_row, start, keys, BLOCK_N, D_S, PADDED_S)
        tk = _load(tk_ptr, tk_row, start, keys, BLOCK_N, D_T, PADDED_T)
        if bounds_ptr is None:
            allowed = counted[:, None] & keys[None, :]
        else:
            allowed = _within(columns[None, :], keys[None, :], lower[:, None], upper[:, None], counted[:, None])
        allowed = _allowed(
            allowed, rows[:, None], columns[None, :], mask_ptr, mask_row, mask_column, offset, IS_CAUSAL, CHUNK
        )
        s = _product(sq, tl.trans(sk), WIDE, PRECISION) * student_scale
        t = _product(tq, tl.trans(tk), WIDE, PRECISION) * teacher_scale
        ds = _difference(s, t, allowed, s_max[:, None], t_max[:, None], s_inverse[:, None], t_inverse[:, None], IS_KL)
        if not IS_KL:
            squares += tl.sum(ds * ds, 1)
        if d_query_ptr is not None:
            dq = _weighted(ds, sk, dq, IS_KL, WIDE, PRECISION)
    if not IS_KL:
        tl.store(stats_ptr, squares, mask=exists)
    if d_query_ptr is not None:
        columns = tl.arange(0, PADDED_S)
        d_query_ptr += batch * d_query_batch + head * d_query_head
        at = rows.to(tl.int64)[:, None] * d_query_row + columns.to(tl.int64)[None, :] * d_query_column
        tl.store(d_query_ptr + at, dq * factor, mask=exists[:, None] & (columns < D_S)[None, :])


@triton.jit
def _d_key(
    sq_ptr, sk_ptr, tq_ptr, tk_ptr, queries_ptr, keys_ptr, mask_ptr,
    bounds_ptr,  # (2, S) int32: first and end of each key's queries
    stats_ptr,  # KL: as above
    d_key_ptr,  # (B, H_s, S, D_s)
    sq_batch, sq_head, sq_row, sk_batch, sk_head, sk_row, tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row,
    queries_batch, queries_head, keys_batch, keys_head, mask_batch, mask_head, mask_row, mask_column,
    d_key_batch, d_key_head, d_key_row, d_key_column,
    heads, student_sharing, teacher_sharing,
    query_length, key_length, stats_size,  # B * H * L
    student_scale: tl.float64, teacher_scale: tl.float64, factor: tl.float64,
    IS_KL: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, PADDED_S: tl.constexpr, PADDED_T: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, student_head, batch = _place(key_length, heads // student_sharing, BLOCK_N)
    student_scale, teacher_scale = tl.full((), student_scale, WIDE), tl.full((), teacher_scale, WIDE)
    factor = tl.full((), factor, WIDE)
    sk_ptr += batch * sk_batch + student_head * sk_head
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # keys
    offset = key_length - query_length
    first = 0
    if IS_CAUSAL:  # the first query that sees one of them
        first = tl.maximum(tile * BLOCK_N - offset, 0) // BLOCK_M * BLOCK_M
    end = query_length
    if CHUNK:  # the last query of the last key's chunk; 0 where all queries see the keys
        last = (tile + 1) * BLOCK_N - 1 - offset
        end = tl.where(last < 0, 0, tl.minimum(query_length, (tl.maximum(last, 0) // CHUNK + 1) * CHUNK))
    if bounds_ptr is not None:
        lower, upper = _range(bounds_ptr, columns, key_length)
        first, end = tl.min(lower, 0), tl.max(upper, 0)

    dk = tl.zeros((BLOCK_N, PADDED_S), WIDE)
    for head in range(student_head * student_sharing, (student_head + 1) * student_sharing):
        keys = _flags(keys_ptr, batch * keys_batch + head * keys_head + columns, columns < key_length)
        sk = _load(sk_ptr, sk_row, tile * BLOCK_N, keys, BLOCK_N, D_S, PADDED_S)
        of_teacher = batch * tk_batch + head // teacher_sharing * tk_head
        tk = _load(tk_ptr + of_teacher, tk_row, tile * BLOCK_N, keys, BLOCK_N, D_T, PADDED_T)
        of_head = batch * heads + head
        head_mask_ptr = mask_ptr
        if mask_ptr is not None:
            head_mask_ptr = mask_ptr + batch * mask_batch + head * mask_head
        for start in range(first, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            exists = rows < query_length
            counted = _flags(queries_ptr, batch * queries_batch + head * queries_head + rows, exists)
            sq = _load(sq_ptr + batch * sq_batch + head * sq_head, sq_row, start, counted, BLOCK_M, D_S, PADDED_S)
            tq = _load(tq_ptr + batch * tq_batch + head * tq_head, tq_row, start, counted, BLOCK_M, D_T, PADDED_T)
            s_max = tl.zeros((BLOCK_M,), WIDE)
            t_max, s_inverse, t_inverse = s_max, s_max, s_max
            if IS_KL:
                at = stats_ptr + of_head * query_length + rows
                s_max, t_max = tl.load(at, mask=exists), tl.load(at + stats_size, mask=exists)
                s_inverse = tl.load(at + 2 * stats_size, mask=exists)
                t_inverse = tl.load(at + 3 * stats_size, mask=exists)
            if bounds_ptr is None:
                allowed = counted[:, None] & keys[None, :]
            else:
                allowed = _within(rows[:, None], counted[:, None], lower[None, :], upper[None, :], keys[None, :])
            allowed = _allowed(
                allowed, rows[:, None], columns[None, :], head_mask_ptr, mask_row, mask_column, offset, IS_CAUSAL, CHUNK
            )
            # The very products of the statistics: transposed they might be rounded otherwise, and a score of 1000 by
            # another 1e-4 than its row's maximum was.
            s = _product(sq, tl.trans(sk), WIDE, PRECISION) * student_scale
            t = _product(tq, tl.trans(tk), WIDE, PRECISION) * teacher_scale
            ds = _difference(
                s, t, allowed, s_max[:, None], t_max[:, None], s_inverse[:, None], t_inverse[:, None], IS_KL
            )
            dk = _weighted(tl.trans(ds), sq, dk, IS_KL, WIDE, PRECISION)
    width = tl.arange(0, PADDED_S)
    d_key_ptr += batch * d_key_batch + student_head * d_key_head
    at = columns.to(tl.int64)[:, None] * d_key_row + width.to(tl.int64)[None, :] * d_key_column
    tl.store(d_key_ptr + at, dk * factor, mask=(columns < key_length)[:, None] & (width < D_S)[None, :])


# For 16-bit inputs: queries and keys of a tile, warps, stages of the pipeline. A warp multiplies 16 rows (on AMD 32):
# with more than a warp for that many queries, several would compute the same scores. No tile here spills.
_UP_TO_64 = {"gfx": (128, 64, 4, 1), "sm_80": (64, 32, 4, 2), "sm_90": (64, 64, 4, 2), "sm_100": (128, 64, 8, 1)}
_UP_TO_128 = {"gfx": (128, 32, 4, 1), "sm_80": (64, 32, 4, 1), "sm_90": (64, 64, 4, 1), "sm_100": (64, 32, 4, 1)}


def _tiles(arch: str, itemsize: int, width: int, masked: bool, ranged: bool = False) -> dict[str, int]:
    """Chooses a tile for heads `width` wide after padding. `masked`: with a mask of pairs; `ranged`: with ranges."""
    on_amd = arch.startswith("gfx")
    family = "gfx" if on_amd else arch if arch in ("sm_90", "sm_100") else "sm_80"
    if arch == "cpu":
        tile = 128, 128, 4, 1
    elif itemsize > 2 and width > 64:
        tile = (32, 16, 4, 1) if on_amd else (32, 16, 8, 2)
    elif itemsize > 2:
        tile = (64, 16, 2, 1) if on_amd else (32, 32, 4, 1) if itemsize == 4 else (32, 16, 4, 2)
    elif width > 128:
        tile = (64, 16, 4, 1) if on_amd else (32, 16, 4, 1) if masked else (32, 32, 4, 2)
    elif ranged and width > 64 and not on_amd:  # the ranges take registers
        tile = (64, 16, 4, 1) if family == "sm_100" else (64, 32, 4, 1)
    else:
        tile = (_UP_TO_64 if width <= 64 else _UP_TO_128)[family]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))


def loss(
    call: "Attention",
    counted: "Counted",
    *,
    chunk: int = 0,  # queries of a chunk of a causal mask: only pairs within chunks count; 0: all
    is_kl: bool,
    dtype: torch.dtype,  # of the computation
    d_query: Tensor | None,  # (B, H, L, D_s), to be written in `dtype`; None: not wanted
    d_key: Tensor | None,  # (B, H_s, S, D_s)
) -> Tensor:  # (): sum of the rows' KL, or of the squares, float64
    batch, heads, query_length, d_s = call.student_query.shape
    student_heads, key_length, d_t = call.student_key.shape[1], call.student_key.shape[2], call.teacher_query.shape[3]
    rows = call.student_query.new_empty((5 if is_kl else 1) * batch * heads * query_length, dtype=dtype)
    if rows.numel() == 0 or key_length == 0:
        for gradient in (d_query, d_key):
            if gradient is not None:
                gradient.zero_()
        return rows.new_zeros((), dtype=torch.float64)
    tensors = [heads_of(x, dtype) for x in call.tensors()]
    flags = [None if x is None else _common.flags(x.contiguous(), dtype) for x in (counted.queries, counted.keys)]
    pairs = _common.flags(call.attn_mask, dtype)
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    for x, dimensions in ((flags[0], 2), (flags[1], 2), (pairs, 4)):  # 0 where a mask is broadcast
        strides += [0 if x is None or x.shape[i] == 1 else x.stride(i) for i in range(dimensions)]
    of_queries, of_keys = counted.bounds or (None, None)
    inputs = (*tensors, *flags, pairs)
    arch = _common.arch_of(call.student_query)
    padded_s, padded_t = (max(power_of_2(width), 16) for width in (d_s, d_t))
    itemsize = max(8 if dtype == torch.float64 else 2, *(x.itemsize for x in tensors))
    if not is_kl and call.student_query.dtype == torch.float16:
        itemsize = 4  # its gradient products take float32
    tiles = _tiles(arch, itemsize, max(padded_s, padded_t), call.attn_mask is not None, counted.bounds is not None)
    options = {
        "D_S": d_s, "D_T": d_t, "PADDED_S": padded_s, "PADDED_T": padded_t, "CHUNK": chunk,
        "IS_CAUSAL": call.is_causal and counted.bounds is None,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        # Three products of 10-bit terms on tensor cores are as accurate as one in float32.
        "PRECISION": "tf32x3" if arch.startswith("sm_") else "ieee",
        **tiles,
    }  # fmt: skip
    of_key_options = options
    if of_keys is not None:  # the ranges of the keys take the registers of a second stage
        of_key_options = {**options, "num_stages": 1, **({"maxnreg": 255} if arch.startswith("sm_") else {})}
    sizes = (heads, heads // student_heads, heads // call.teacher_key.shape[1], query_length, key_length)
    scales = (call.student_scale, call.teacher_scale)
    factor = call.student_scale / 1024 if is_kl else 2 * call.student_scale
    over_queries = (-(-query_length // tiles["BLOCK_M"]) * heads * batch,)
    over_keys = (-(-key_length // tiles["BLOCK_N"]) * student_heads * batch,)
    with on_device_of(call.student_query):
        if is_kl:
            _statistics[over_queries](*inputs, of_queries, rows, *strides, *sizes, *scales, **options)
        if d_query is not None or not is_kl:
            d_query_strides = (0,) * 4 if d_query is None else d_query.stride()
            _d_query[over_queries](
                *inputs, of_queries, rows, d_query, *strides, *d_query_strides, *sizes, *scales, factor, IS_KL=is_kl,
                **options,
            )  # fmt: skip
        if d_key is not None:
            _d_key[over_keys](
                *inputs, of_keys, rows, d_key, *strides, *d_key.stride(), *sizes, batch * heads * query_length, *scales,
                factor, IS_KL=is_kl, **of_key_options,
            )  # fmt: skip
    return rows[-batch * heads * query_length :].sum(dtype=torch.float64)
