"""How `_gram` of attention_mse.py cuts the rows of a call into splits, and a matrix into blocks."""

from functools import lru_cache
from typing import NamedTuple

import torch

from ._common import power_of_2

# Most rows whose products are summed in float32. Tensor cores truncate: a sum loses half a unit of its last place, on
# average, with each step of 16 products, so a sum of n squares comes out too small by a factor of 1 - delta,
#     delta = n / 16 steps * 1/2 (sums grow from 0) * 1/2 * 0.72 * 2^-23 (mean unit of a mantissa) = n * 2^-29.5
# The loss is off by at most 2 delta / e^2 at a relative mismatch e: at e = 0.01 by 11% with 4096 rows, 2.7% with 1024.
# Sums of both sides lose alike, so in emulation (26 / 64, equal scores in a rotated basis) it was 0.2% and 0.05%; with
# 512 rows, rounding at random outweighs that. Wide heads sum 4 times as many: a split costs them more than its rows.
SUMMED = 1024


def blocks(width: int, block: int) -> int:
    return -(-width // block)


@lru_cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Plan(NamedTuple):
    """How `_gram` cuts a call."""

    rows: int  # of a tile
    block_s: int  # columns of a block
    block_t: int
    one_program: bool  # computes all three blocks of a matrix; otherwise each block is a launch
    splits: int
    options: dict[str, int]  # of the launch


@lru_cache(maxsize=1024)
def plan(
    arch: str, multiprocessors: int, wide: bool, matrices: int,  # B * groups
    tall: int,  # rows of a group's queries or keys, the larger number
    d_s: int, d_t: int,
) -> Plan:  # fmt: skip
    # sm_90's tensor cores multiply 64 rows at once: with fewer columns, warps repeat work and loads are not pipelined.
    has_long_tiles = arch.startswith(("sm_9", "sm_10")) and not wide
    rows, widest = (256, 512) if arch == "cpu" else (32, 64) if wide else (128 if has_long_tiles else 64, 128)
    block_s, block_t = (min(max(power_of_2(d), 64 if has_long_tiles else 16), widest) for d in (d_s, d_t))
    one_program = d_s <= block_s and d_t <= block_t and block_s + block_t <= 128
    # Each block of wide heads is a program: the launch with the fewest blocks should fill the card.
    programs = 2 * matrices
    if not one_program:
        programs *= min(blocks(d_s, block_s), blocks(d_t, block_t)) ** 2
    slots = 2 * multiprocessors  # programs that run at once
    tiles, size = blocks(tall, rows), 8 if wide else 4
    tile_bytes = rows * min(d_s + d_t, block_s + block_t) * size // 2
    partial_bytes = 2 * matrices * (d_s + d_t) ** 2 * size

    def cost(splits: int) -> int:  # in bytes: tiles, as if the last wave of programs were full, and the partial sums
        waves = blocks(programs * splits, slots)
        return waves * slots * blocks(tiles, splits) * tile_bytes + 2 * splits * partial_bytes  # written and read

    least = 1 if wide else blocks(tiles, (1 if one_program else 4) * SUMMED // rows)
    most = max(least, min(tiles // 4, blocks(4 * slots, programs)))
    options = {"num_warps": 4 if block_s + block_t <= 64 else 8, "num_stages": 2}
    if has_long_tiles and one_program:
        options["maxnreg"] = 128  # so that two programs run on a multiprocessor
    return Plan(rows, block_s, block_t, one_program, min(range(least, most + 1), key=cost), options)
