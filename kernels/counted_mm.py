"""Products of a chunk of tokens of which only the first n count, where n is known to the device alone.

The linear losses over classes sort the tokens that count to the front (ops/_counted.py). With hidden states X (C, d),
the head's weight W (V, d) and the gradient G (C, V) of the logits, their three products are

    logits     X W^T           programs of rows from n on return at once
    d_hidden   G W             the same; the sum over V is cut into parts, which are added in a fixed order
    d_weight   dW += G^T X     the sum over tokens ends at n; nothing happens if n is 0

Rows from n on are not written, and what they hold never reaches a result. All sums are float32 (float64), as are the
results of 16-bit operands.

cuBLAS takes its sizes from the host, which would have to wait for n. `torch._grouped_mm` reads sizes on the device, but
rounds its results to the operands' 16 bits, which would change the loss by 4e-4 and gradients by 4%.

These kernels have no TMA loads and no specialised warps. If they run at 2/3 of cuBLAS's rate, they win where less than
2/3 of the tokens count, and lose half of the time at most where all do. Training on completions alone counts 10 to 60%.
So the ops take them where a mask, an ignored label or a weight of 0 may leave tokens out, and cuBLAS elsewhere. No card
has measured that rate yet.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import on_device_of

# Rows of logits and of G are a multiple of this long, so that a row of any number of classes is read in 16 bytes.
PADDING = 16

# d_hidden has few tiles of results. Its sum is cut into parts until there are about 4 programs a multiprocessor, but
# each part has at least LEAST_DEPTH classes.
PROGRAMS = 512
LEAST_DEPTH = 2048


@triton.jit
def _tile(ptr, stride, rows, columns, row_end, column_end, OPERAND: tl.constexpr):
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0).to(OPERAND)


@triton.jit
def _logits(
    x_ptr,  # (C, d), contiguous
    w_ptr,  # (V, d)
    out_ptr,  # (C, width), contiguous; 0 from V on
    count_ptr,  # ()
    start,  # of the chunk: its first `count - start` rows count
    tokens,  # C
    classes,  # V
    width,
    d, w_stride,  # in units of ALIGN numbers
    ALIGN: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbours have the same rows of W; X of a chunk stays in the L2 cache.
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) % row_tiles * BLOCK_M
    column = tl.program_id(0) // row_tiles * BLOCK_N
    counted = tl.minimum(tl.load(count_ptr) - start, tokens).to(tl.int32)
    if row >= counted:
        return
    d *= ALIGN
    w_stride *= ALIGN
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_ptr += row.to(tl.int64) * d
    w_ptr += column.to(tl.int64) * w_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for k in range(0, d, BLOCK_K):
        x = _tile(x_ptr + k, d, rows, depth, counted - row, d - k, OPERAND)
        w = _tile(w_ptr + k, w_stride, columns, depth, classes - column, d - k, OPERAND)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION, out_dtype=WIDE)
    inside = (rows < counted - row)[:, None] & (columns < width - column)[None, :]
    out_ptr += row.to(tl.int64) * width + column
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], total, mask=inside)


@triton.jit
def _d_hidden(
    g_ptr,  # (C, width), contiguous; 0 from V on
    w_ptr,  # (V, d)
    out_ptr,  # (parts, C, d), contiguous
    count_ptr,  # ()
    start, tokens, classes, width,
    part_depth,  # classes of a part of the sum
    d, w_stride,  # in units of ALIGN numbers
    ALIGN: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that run together have the same classes, so their columns of G and rows of W come from the L2 cache.
    d *= ALIGN
    w_stride *= ALIGN
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(d, BLOCK_N)
    row = tl.program_id(0) % row_tiles * BLOCK_M
    column = tl.program_id(0) // row_tiles % column_tiles * BLOCK_N
    part = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    counted = tl.minimum(tl.load(count_ptr) - start, tokens).to(tl.int32)
    if row >= counted:
        return
    first = part.to(tl.int32) * part_depth
    end = tl.minimum(part_depth, classes - first)
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    g_ptr += row.to(tl.int64) * width + first
    w_ptr += first.to(tl.int64) * w_stride + column
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for k in range(0, end, BLOCK_K):
        g = _tile(g_ptr + k, width, rows, depth, counted - row, width - first - k, OPERAND)
        w = _tile(w_ptr + tl.cast(k, tl.int64) * w_stride, w_stride, depth, columns, end - k, d - column, OPERAND)
        total = tl.dot(g, w, total, input_precision=PRECISION, out_dtype=WIDE)
    inside = (rows < counted - row)[:, None] & (columns < d - column)[None, :]
    out_ptr += (part * tokens + row) * d + column
    tl.store(out_ptr + rows[:, None] * d + columns[None, :], total, mask=inside)


@triton.jit
def _d_weight(
    g_ptr,  # (C, width), contiguous
    x_ptr,  # (C, d), contiguous
    out_ptr,  # (V, d), contiguous
    count_ptr,  # ()
    start, tokens, classes, width,
    d,  # in units of ALIGN numbers
    ALIGN: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbours have the same columns of G; X of a chunk stays in the L2 cache.
    d *= ALIGN
    column_tiles = tl.cdiv(d, BLOCK_N)
    row = tl.program_id(0) // column_tiles * BLOCK_M
    column = tl.program_id(0) % column_tiles * BLOCK_N
    counted = tl.minimum(tl.load(count_ptr) - start, tokens).to(tl.int32)
    if counted <= 0:
        return
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    g_ptr += row
    x_ptr += column
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for k in range(0, counted, BLOCK_K):
        g = _tile(g_ptr + tl.cast(k, tl.int64) * width, width, depth, rows, counted - k, width - row, OPERAND)
        x = _tile(x_ptr + tl.cast(k, tl.int64) * d, d, depth, columns, counted - k, d - column, OPERAND)
        total = tl.dot(tl.trans(g), x, total, input_precision=PRECISION, out_dtype=WIDE)
    # In halves: the sums so far of a whole tile would not fit beside the new ones.
    halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)).split()
    columns = tl.arange(0, BLOCK_N // 2)
    out_ptr += row.to(tl.int64) * d + column
    for i in tl.static_range(2):
        inside = (rows < classes - row)[:, None] & (columns < d - column - i * (BLOCK_N // 2))[None, :]
        out_tile = out_ptr + i * (BLOCK_N // 2) + rows[:, None] * d + columns[None, :]
        tl.store(out_tile, tl.load(out_tile, mask=inside, other=0) + halves[i], mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


def padded(classes: int) -> int:
    """Returns the length of the rows of logits and of G."""
    return _parts(classes, PADDING) * PADDING


def logits(
    x: Tensor,  # (C, d), contiguous
    weight: Tensor,  # (V, d)
    count: Tensor,  # () integer
    start: int,  # of the chunk: its first `count - start` rows count
    out: Tensor,  # (C, padded(V)), contiguous
) -> None:
    weight, align = _aligned(weight)
    (tokens, d), classes = x.shape, weight.shape[0]
    options, tiles = _options(x, out.dtype)
    grid = _parts(tokens, tiles["BLOCK_M"]) * _parts(classes, tiles["BLOCK_N"])
    with on_device_of(x):
        _logits[(grid,)](
            x, weight, out, count, start, tokens, classes, out.shape[1], d // align, weight.stride(0) // align,
            ALIGN=align, **options, **tiles,
        )  # fmt: skip


def d_hidden(
    gradient: Tensor,  # (C, padded(V)), contiguous; 0 from V on
    weight: Tensor,  # (V, d)
    count: Tensor,
    start: int,
    dtype: torch.dtype,
) -> Tensor:  # (C, d); undefined in rows that do not count
    weight, align = _aligned(weight)
    (tokens, width), (classes, d) = gradient.shape, weight.shape
    options, tiles = _options(gradient, dtype)
    grid = _parts(tokens, tiles["BLOCK_M"]) * _parts(d, tiles["BLOCK_N"])
    parts = max(min(PROGRAMS // max(grid, 1), width // max(d, LEAST_DEPTH)), 1)  # no larger than the logits
    part_depth = _parts(_parts(classes, parts), tiles["BLOCK_K"]) * tiles["BLOCK_K"]
    parts = _parts(classes, part_depth)
    out = gradient.new_empty(parts, tokens, d, dtype=dtype)
    with on_device_of(gradient):
        _d_hidden[(grid * parts,)](
            gradient, weight, out, count, start, tokens, classes, width, part_depth, d // align,
            weight.stride(0) // align, ALIGN=align, **options, **tiles,
        )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def add_d_weight(
    gradient: Tensor,  # (C, padded(V)), contiguous
    x: Tensor,  # (C, d), contiguous
    count: Tensor,
    start: int,
    out: Tensor,  # (V, d), contiguous, added to
) -> None:
    (tokens, width), (classes, d) = gradient.shape, out.shape
    options, tiles = _options(x, out.dtype)
    grid = _parts(classes, tiles["BLOCK_M"]) * _parts(d, tiles["BLOCK_N"])
    align = math.gcd(16, d)
    with on_device_of(x):
        _d_weight[(grid,)](
            gradient, x, out, count, start, tokens, classes, width, d // align, ALIGN=align, **options, **tiles
        )


def _aligned(weight: Tensor) -> tuple[Tensor, int]:
    """Returns the weight with contiguous rows, and a number that divides their length and stride."""
    # Offsets within a tile have 32 bits.
    if weight.stride(1) != 1 or weight.stride(0) >= 2**23:
        weight = weight.contiguous()
    return weight, math.gcd(16, weight.shape[1], weight.stride(0))


def _parts(size: int, length: int) -> int:  # triton.cdiv takes 70 times as long
    return -(-size // length)


_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _options(x: Tensor, wide: torch.dtype) -> tuple[dict[str, object], dict[str, int]]:
    operand, arch = wide if wide == torch.float64 else x.dtype, _common.arch_of(x)
    # Three products of two 10-bit terms on tensor cores are as accurate as one in float32; a single one is not.
    precision = "tf32x3" if arch.startswith("sm_") and operand == torch.float32 else "ieee"
    return {"WIDE": _TYPES[wide], "OPERAND": _TYPES[operand], "PRECISION": precision}, _tiles(arch, operand)


def _tiles(arch: str, operand: torch.dtype) -> dict[str, int]:
    if arch == "cpu":
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1}
    stages = 2 if arch.startswith("gfx") else 3
    if operand == torch.float64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": stages}
    if operand == torch.float32:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": stages}
    if arch.startswith("gfx"):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}
