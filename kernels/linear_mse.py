"""Computes the residual of a projection, R = X W^T + b - T, and what needs a tile of it while it is in registers.

One program accumulates a tile of R in float32 (float64) and computes from the accumulator

    loss partials    scale times the squares of each token's part, summed    (column tiles, C), added up afterwards
    db partials      slope times the sums of the columns                     (row tiles, d_t), likewise
    R                times slope and its tokens' weights, in the dtype of the products: 16 bits for 16-bit inputs

so it reads X, W and T, and writes R. cuBLAS (or rocBLAS) computes the gradient products R W and R^T X. A token costs 2
d_s d_t operations here and 4 d_s d_t there; d_s + d_t numbers are read from memory, while R of a chunk of tokens stays
in the L2 cache. At 312 -> 768 in bfloat16 that is 1.44 MFLOP, 1.8 ns at 790 TFLOP/s, against 2.8 KB, 0.65 ns at 4.3
TB/s. L2 traffic is higher: tiles of 128 x 128 read X d_t / 128 times, and W once per 128 tokens, 3.7 KB a token each; T
and R are 1.5 KB each: 10.5 KB in all. The products read R once or twice more from L2. A chunk of 16384 tokens of 768
takes 4 launches (residual, sum of the loss partials, dW, dX), and two more for db.

The same program could compute dX, as in attention. But R W needs a whole row of R, 768 numbers a token; the float32
sums of 128 tokens (312 columns) and their tile of R would leave no registers for the pipeline. So there are three
products.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import on_device_of

# Bytes of R of a chunk. The gradient products read R again: with X and W it fits the L2 cache of an H100 (50 MB).
CHUNK_BYTES = 24 << 20


@triton.jit
def _residual(
    x_ptr,  # (C, d_s)
    w_ptr,  # (d_t, d_s); None: x itself is the projection
    t_ptr,  # (C, d_t)
    bias_ptr,  # (d_t); None: 0
    mask_ptr,  # (C); None: all tokens count
    token_weight_ptr,  # (C), multiplies R; None: 1
    divisor_ptr,  # (), divides the loss and R, 0 counts as 1; None: 1
    scale: tl.float64,  # multiplies the loss
    slope: tl.float64,  # multiplies R
    loss_ptr,  # (column tiles, C); None: not wanted
    d_bias_ptr,  # (row tiles, d_t); None: not wanted
    r_ptr,  # (C, d_t), contiguous; None: not wanted
    clean_ptr,  # (C, d_s), contiguous, X with zeros for masked tokens; None: not wanted
    tokens,  # C
    d_s, x_stride, w_stride, t_stride,  # width and strides of rows, in units of ALIGN numbers
    ALIGN: tl.constexpr,
    D_T: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHS_LOSS: tl.constexpr,  # whether the token's weight multiplies its loss
    OPERAND: tl.constexpr,  # dtype of the factors of the product
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,  # whether the teacher waits in registers for the end of the product
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share 8 tiles of rows, so their X and all of W stay in the cache.
    COLUMN_TILES: tl.constexpr = (D_T + BLOCK_N - 1) // BLOCK_N
    GROUP: tl.constexpr = 8
    program = tl.program_id(0)
    group = program // (GROUP * COLUMN_TILES)
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + program % (GROUP * COLUMN_TILES) % size
    column_tile = program % (GROUP * COLUMN_TILES) // size

    first = row_tile.to(tl.int64) * BLOCK_M  # 64 bits to where the tile starts, 32 within it
    rows = tl.arange(0, BLOCK_M)
    exists = rows < tokens - row_tile * BLOCK_M
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # d_s is no constant: loops over it would be unrolled and use the registers of a second program.
    d_s *= ALIGN
    x_stride *= ALIGN
    x_ptr += first * x_stride
    counted = exists
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + first + rows, mask=exists, other=0) != 0
    inside = counted[:, None] & (columns < D_T)[None, :]

    # Copy first, while nothing else holds registers.
    if clean_ptr is not None and column_tile == 0:
        for start in range(0, d_s, BLOCK_K):
            deep = start + tl.arange(0, BLOCK_K)
            source = x_ptr + rows[:, None] * x_stride + deep[None, :]
            copy = tl.load(source, mask=counted[:, None] & (deep < d_s)[None, :], other=0)
            copy_tile = clean_ptr + first * d_s + rows[:, None] * d_s + deep[None, :]
            tl.store(copy_tile, copy, mask=exists[:, None] & (deep < d_s)[None, :])

    # Asked for here, the teacher and the factors arrive while the product is computed.
    t_stride *= ALIGN
    t_tile = t_ptr + first * t_stride + rows[:, None] * t_stride + columns[None, :]
    if PREFETCH:
        t = tl.load(t_tile, mask=inside, other=0)
    token_weight = tl.full((BLOCK_M,), 1, WIDE)
    if token_weight_ptr is not None:
        token_weight = tl.load(token_weight_ptr + first + rows, mask=counted, other=0).to(WIDE)
    scale, slope = tl.full((), scale, WIDE), tl.full((), slope, WIDE)
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr).to(WIDE)
        divisor = tl.where(divisor == 0, 1, divisor)
        scale, slope = scale / divisor, slope / divisor

    if w_ptr is None:
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0)
        r = x.to(WIDE)
    else:
        r = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
        depth = tl.arange(0, BLOCK_K)
        # 32-bit offsets within the tile; those of W count from its first column.
        w_stride *= ALIGN
        w_ptr += (column_tile * BLOCK_N).to(tl.int64) * w_stride
        x_tile = rows[:, None] * x_stride + depth[None, :]
        w_tile = tl.arange(0, BLOCK_N)[None, :] * w_stride + depth[:, None]
        for start in range(0, d_s, BLOCK_K):
            x = tl.load(x_ptr + start + x_tile, mask=counted[:, None] & (depth < d_s - start)[None, :], other=0)
            w = tl.load(w_ptr + start + w_tile, mask=(columns < D_T)[None, :] & (depth < d_s - start)[:, None], other=0)
            r = tl.dot(x.to(OPERAND), w.to(OPERAND), r, input_precision=PRECISION, out_dtype=WIDE)
    if bias_ptr is not None:
        r += tl.load(bias_ptr + columns, mask=columns < D_T, other=0).to(WIDE)[None, :]
    if not PREFETCH:
        t = tl.load(t_tile, mask=inside, other=0)
    r -= t.to(WIDE)
    # where() also clears NaN and inf. Columns past the last exist only where the tiles do not divide d_t.
    r = tl.where(inside if D_T % BLOCK_N else counted[:, None], r, 0)

    if loss_ptr is not None:
        loss = tl.sum(r * r, 1) * scale
        if WEIGHS_LOSS:
            loss *= token_weight
        tl.store(loss_ptr + column_tile.to(tl.int64) * tokens + first + rows, loss, mask=exists)
    r *= (token_weight * slope)[:, None]
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + row_tile.to(tl.int64) * D_T + columns, tl.sum(r, 0), mask=columns < D_T)
    if r_ptr is not None:
        r_tile = r_ptr + first * D_T + rows[:, None] * D_T + columns[None, :]
        tl.store(r_tile, r.to(r_ptr.dtype.element_ty), mask=exists[:, None] & (columns < D_T)[None, :])


_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _tiles(arch: str, operand: torch.dtype, product: bool) -> dict[str, int]:
    if not product:
        return {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    if arch == "cpu":
        return {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 512, "num_warps": 4, "num_stages": 1}
    stages = 2 if arch.startswith("gfx") else 3
    if operand == torch.float64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": stages}
    if operand == torch.float32:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": stages}
    # On sm_90 a multiprocessor runs two programs: one multiplies while the other loads T and stores R, which takes
    # longer than the 5 steps of 312 columns. 128 x 256 would read 1.2 times fewer bytes from L2, but runs one program
    # at a time. On other cards two programs spill: they run one, on sm_100 with one more tile prefetched.
    warps, stages = (4, stages) if arch == "sm_90" else (8, stages + (arch == "sm_100"))
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}


def residual(
    x: Tensor,  # (C, d_s)
    weight: Tensor | None,  # (d_t, d_s); None: d_s = d_t, x itself is the projection
    teacher: Tensor,  # (C, d_t)
    bias: Tensor | None,  # (d_t)
    mask: Tensor | None,  # (C)
    token_weight: Tensor | None,  # (C), multiplies R
    divisor: Tensor | None,  # (), divides the loss and R
    *,
    scale: float,  # multiplies the loss
    slope: float,  # multiplies R
    dtype: torch.dtype,  # float32 or float64, of the computation
    weighs_loss: bool,  # whether the token's weight multiplies its loss
    wants_loss: bool,
    wants_bias: bool,
    out: Tensor | None,  # (C, d_t) contiguous, R
    clean: Tensor | None,  # (C, d_s) contiguous, X with zeros for masked tokens
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the loss (column tiles, C) and db (row tiles, d_t), both to be summed over the tiles."""
    (tokens, d_t), d_s = teacher.shape, x.shape[1]
    operand = dtype if dtype == torch.float64 else x.dtype
    arch = _common.arch_of(x)
    tiles = _tiles(arch, operand, weight is not None)
    # Offsets within a tile have 32 bits. Rows too far apart for them, such as the first tokens of long sequences, are
    # copied: the copy is small beside the tensor that it is taken from.
    far = 2**31 // max(tiles["BLOCK_M"], tiles["BLOCK_N"])
    x, weight, teacher = (
        None if y is None else y if y.stride(1) == 1 and y.stride(0) < far else y.contiguous()
        for y in (x, weight, teacher)
    )
    strides = [0 if y is None else y.stride(0) for y in (x, weight, teacher)]
    align = math.gcd(16, d_s, *strides)
    mask = _common.flags(mask, dtype)
    row_tiles, column_tiles = -(-tokens // tiles["BLOCK_M"]), -(-d_t // tiles["BLOCK_N"])
    loss = x.new_empty(column_tiles, tokens, dtype=dtype) if wants_loss else None
    d_bias = x.new_empty(row_tiles, d_t, dtype=dtype) if wants_bias else None
    with on_device_of(x):
        _residual[(row_tiles * column_tiles,)](
            x, weight, teacher, bias, mask, token_weight, divisor, scale, slope, loss, d_bias, out, clean, tokens,
            d_s // align, *(stride // align for stride in strides),
            ALIGN=align, D_T=d_t, WIDE=_TYPES[dtype], WEIGHS_LOSS=weighs_loss,
            OPERAND=_TYPES[operand],
            # Three products of two 10-bit terms on tensor cores are as accurate as one in float32; a single one is not.
            PRECISION="tf32x3" if arch.startswith("sm_") and operand == torch.float32 else "ieee",
            # Elsewhere a second program, which these registers would leave no room for, hides the teacher's latency.
            PREFETCH=arch.startswith("sm_") and operand.itemsize == 2,
            **tiles,
        )  # fmt: skip
    return loss, d_bias
