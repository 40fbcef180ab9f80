"""`python -m bench.cost [--card NAME]`: counts what each op moves and computes, and the least time it takes on a card.

This is the only place where bytes and operations are counted. An op is a list of consecutive steps, each a kernel or a
library's matrix product. A step takes as long as the slowest of four parts: its bytes at the memory's speed, its
products at the speed of the units for their precision, its exponentials, and the instructions that its kernel issues
(`INSTRUCTIONS`, counted by `bench.static`). The sum over steps is the floor of the algorithm as shipped. The predicted
time of a call is its floor, or the host's time for it where that is longer (`HOST`, measured by `bench.host`; a CUDA
graph takes it away). `least` is the floor of the op itself: each input is read once in the forward and, if the
algorithm needs the forward's sums first, once in the backward; each gradient is written once; no product is computed
twice, and instructions are free. All counts are for a forward and a backward with mean reduction. Memory that stays in
the L2 cache (chunks, statistics) is free; the partial sums of attention_mse are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, lcm
from typing import Any

import torch

from fastdistill.ops.linear_logits import CHUNK, GPU_CHUNK_BYTES


@dataclass(frozen=True)
class Card:
    """A card's bytes and operations per second. A multiply-add counts as two operations."""

    name: str
    source: str
    memory: float
    bits16: float  # products of 16-bit operands on tensor cores, sums in float32
    float32: float  # products in full float32: without tensor cores on NVIDIA
    float64: float  # products on tensor cores
    exponentials: float
    cache: float  # bytes of L2
    multiprocessors: int = 0  # 0: instructions are free
    clock: float = 0
    lanes: int = 128  # threads of a multiprocessor that an instruction is issued for in each clock

    @property
    def issue(self) -> float:
        """Thread instructions per second."""
        return self.multiprocessors * self.lanes * self.clock or inf


CARDS = {
    card.name: card
    for card in (
        Card(
            "H200",
            "memory and 16 bits measured, else published",
            4.3e12,
            790e12,
            60e12,
            60e12,
            3.7e12,
            50e6,
            132,
            1.755e9,
        ),
        Card("H100", "published", 3.35e12, 989e12, 67e12, 67e12, 3.7e12, 50e6, 132, 1.755e9),
        Card("A100", "published", 2.0e12, 312e12, 19.5e12, 19.5e12, 2.4e12, 40e6, 108, 1.41e9),
        Card("B200", "published", 8.0e12, 2250e12, 75e12, 37e12, 4.6e12, 126e6, 148, 1.85e9),
        Card("MI300X", "published", 5.3e12, 1307e12, 163e12, 163e12, 2.5e12, 256e6, 304, 2.1e9, 64),
    )
}


@dataclass(frozen=True)
class Step:
    name: str
    memory: float = 0  # bytes
    flops: float = 0
    precision: str = "bits16"  # the field of Card with the speed of the products
    exponentials: float = 0
    instructions: float = 0  # of all threads

    def parts(self, card: Card) -> dict[str, float]:
        return {
            "memory": self.memory / card.memory,
            "products": self.flops / getattr(card, self.precision),
            "exponentials": self.exponentials / card.exponentials,
            "instructions": self.instructions / card.issue,
        }

    def seconds(self, card: Card) -> float:
        return max(self.parts(card).values())


@dataclass(frozen=True)
class Cost:
    op: str
    shape: str
    least: Step
    steps: Sequence[Step]
    host: float = 0  # seconds

    def predicted(self, card: Card) -> float:
        """Returns the seconds of a call outside a CUDA graph."""
        return max(self.floor(card), self.host)

    def floor(self, card: Card) -> float:
        """Returns the least seconds that the algorithm as shipped can take."""
        return sum(step.seconds(card) for step in self.steps)


# Thread instructions for each class, pair, row of a head, or 1024 products, as `bench.static` counts them for sm_90 in
# bfloat16; `R`: rows in registers, `S`: rows that are read in blocks. Whoever changes a kernel changes its figure here;
# those that goals.py names are checked in CI.
INSTRUCTIONS: dict[str, Any] = {
    "soft_cross_entropy": {"R": 57, "S": 39}, "kl_div": {"R": 58, "S": 42}, "reverse_kl": {"R": 58, "S": 49},
    "jsd": {"R": 110, "S": 141}, "tvd": {"R": 54, "S": 63}, "topk": {"R": 28, "S": 34},
    "short": 17, "gram": 700, "gradient": 970, "statistics": 24, "d_query": 17.6, "d_key": 19.5, "residual": 20,
    "kl in ranges": {"statistics": 35.8, "d_query": 25.6, "d_key": 22.3},
    "mse in ranges": {"d_query": 17.5, "d_key": 12.8},
}  # fmt: skip
EPILOGUE = 13  # instructions for each number of linear_mse's residual, after the products

# Seconds of host time of a forward and a backward with stubbed launches, and the launches of Triton kernels, each of
# which takes about `LAUNCH` on top. From `python -m bench.host` on a server's core.
HOST = {
    "attention_mse": (106e-6, 5), "attention_kl": (125e-6, 3), "linear_mse": (78e-6, 2), "logits": (58e-6, 2),
    "topk": (65e-6, 2), "linear_logits": (125e-6, 2),
}  # fmt: skip
LAUNCH = 5e-6
SCAN_CHUNK = 256  # rows of a chunk of the causal scan
MULTIPROCESSORS = 132  # the splits of attention_mse's rows depend on them


def _host(op: str) -> float:
    seconds, launches = HOST[op]
    return seconds + launches * LAUNCH


def _precision(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.float64: "float64"}.get(dtype, "bits16")


def splits(groups: int, rows: int, student_dim: int, teacher_dim: int) -> int:
    """Returns into how many shares kernels/attention_mse.py cuts a group's rows: the fewest bytes, in whole waves."""
    tiles, width, slots = -(-rows // 128), student_dim + teacher_dim, 2 * MULTIPROCESSORS
    least = -(-tiles // 8)  # SUMMED rows
    most = max(least, min(tiles // 4, -(-2 * slots // groups)))

    def nbytes(n: int) -> int:
        waves = -(-2 * groups * n // slots)
        return waves * slots * -(-tiles // n) * 128 * width * 2 + 2 * n * 2 * groups * width**2 * 4

    return min(range(least, most + 1), key=nbytes)


def attention_mse(
    batch: int,
    heads: int,
    length: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    student_kv: int | None = None,
    teacher_kv: int | None = None,
) -> Cost:
    """Counts as many keys as queries, no dense mask, and an incoming gradient of 1.

    Short sequences take one program a head, all others Gram matrices.
    """
    student_kv, teacher_kv = student_kv or heads, teacher_kv or heads
    size = dtype.itemsize
    student = batch * length * (heads + student_kv) * student_dim * size
    teacher = batch * length * (heads + teacher_kv) * teacher_dim * size
    rows = batch * length * (heads + lcm(student_kv, teacher_kv))
    gram = 2 * rows * (student_dim**2 + student_dim * teacher_dim + teacher_dim**2)
    products = 2 * rows * (student_dim + teacher_dim) * student_dim
    # The terms of the loss cancel: products of 16-bit inputs are exact, float32 inputs are multiplied in float64, and
    # the backward's matrix has two 16-bit terms.
    narrow = dtype.itemsize == 2
    precision = "bits16" if narrow else "float64"
    shape = f"{batch} x {heads} heads x {length}, d {student_dim} / {teacher_dim}"
    least = Step("", 2 * (student + teacher) + student, gram + products, precision)
    if narrow and length <= 128 and max(student_dim, teacher_dim) <= 64:
        pairs = batch * heads * length * length
        step = Step(
            "scores and gradients", student + teacher + student, 2 * pairs * (3 * student_dim + teacher_dim), precision,
            0, pairs * INSTRUCTIONS["short"],
        )  # fmt: skip
        return Cost("attention_mse", shape, replace(step, name=""), [step], _host("attention_mse"))
    groups = batch * lcm(student_kv, teacher_kv)
    partial = splits(groups, heads // lcm(student_kv, teacher_kv) * length, student_dim, teacher_dim)
    partial *= 2 * groups * (student_dim + teacher_dim) ** 2 * 4
    issued = {name: rows * INSTRUCTIONS[name] for name in ("gram", "gradient")} if narrow else {}
    return Cost(
        "attention_mse", shape, least,
        [
            Step("Gram matrices", student + teacher + partial, gram, precision, 0, issued.get("gram", 0)),
            Step("sums of partial matrices", partial),
            Step(
                "gradients", student + teacher + student, products * (2 if narrow else 1), precision, 0,
                issued.get("gradient", 0),
            ),
        ],
        _host("attention_mse"),
    )  # fmt: skip


def attention_kl(
    batch: int, heads: int, length: int, student_dim: int, teacher_dim: int, dtype: torch.dtype, *, causal: bool = False
) -> Cost:
    rows = batch * heads * length
    return _tiles(
        "attention_kl" + (" causal" if causal else ""), f"{batch} x {heads} heads x {length}", rows,
        rows * length * (0.5 if causal else 1), student_dim, teacher_dim, dtype, INSTRUCTIONS,
    )  # fmt: skip


def attention_packed(
    op: str, sequences: int, heads: int, length: int, student_dim: int, teacher_dim: int, dtype: torch.dtype, *,
    causal: bool = False,
) -> Cost:  # fmt: skip
    """Counts sequences of one length in one row, long enough that attention_mse takes Gram matrices."""
    rows = sequences * heads * length
    shape = f"{heads} heads x {sequences} sequences of {length}"
    if op == "attention_mse" and causal:
        return _packed_scan(shape, sequences, heads, length, student_dim, teacher_dim, dtype)
    if op == "attention_mse":
        same = attention_mse(sequences, heads, length, student_dim, teacher_dim, dtype)
        shape = f"{shape}, d {student_dim} / {teacher_dim}"
        return replace(same, op=f"{op} packed", shape=shape, host=_host("attention_kl"))  # it counts rows as tiles do
    instructions, pairs = INSTRUCTIONS[f"{op.removeprefix('attention_')} in ranges"], rows * length * (1 - causal / 2)
    return _tiles(
        f"{op} packed" + " causal" * causal, shape, rows, pairs, student_dim, teacher_dim, dtype, instructions
    )


def _packed_scan(
    shape: str, sequences: int, heads: int, length: int, student_dim: int, teacher_dim: int, dtype: torch.dtype
) -> Cost:
    """Counts what Gram matrices cost without causality, two matrices more for each chunk, and the pairs within chunks:
    in the forward their loss, in the backward their gradients, which wait in float32."""
    same = attention_mse(sequences, heads, length, student_dim, teacher_dim, dtype)
    gram, _, gradients = same.steps
    width, rows, chunks = student_dim + teacher_dim, sequences * heads * length, sequences * (length // SCAN_CHUNK + 2)
    partial, matrices = (2 * chunks * heads * width * d * 4 for d in (width, student_dim))  # of queries and of keys
    pairs, near = rows * (SCAN_CHUNK + 1) / 2, 2 * rows * student_dim * 4
    both = 2 * rows * width * dtype.itemsize
    gram = replace(gram, memory=both + partial)
    gradients = replace(gradients, memory=both + matrices + near + 2 * rows * student_dim * dtype.itemsize)
    issued = INSTRUCTIONS["mse in ranges"]
    scores, product, precision = 2 * pairs * width, 2 * pairs * student_dim, gram.precision
    steps = [
        Step("loss within chunks", both, scores, precision, 0, pairs * issued["d_query"]),
        gram,
        Step("sums of partial matrices", partial + matrices),
        Step("d query within chunks", both + near / 2, scores + product, precision, 0, pairs * issued["d_query"]),
        Step("d key within chunks", both + near / 2, scores + product, precision, 0, pairs * issued["d_key"]),
        gradients,
    ]
    host = HOST["attention_kl"][0] + 11 * LAUNCH  # bounds and rows are counted as for tiles
    return Cost("attention_mse packed causal", f"{shape}, d {student_dim} / {teacher_dim}", same.least, steps, host)


def attention_window(
    op: str, heads: int, length: int, width: int, student_dim: int, teacher_dim: int, dtype: torch.dtype
) -> Cost:
    shape, pairs = f"{heads} heads x {length}, window {width}", heads * window_pairs(length, width)
    instructions = INSTRUCTIONS[f"{op.removeprefix('attention_')} in ranges"]
    return _tiles(f"{op} windowed", shape, heads * length, pairs, student_dim, teacher_dim, dtype, instructions)


def window_pairs(length: int, width: int) -> int:
    """Returns the pairs of a head where each query meets its own key and those before it, `width` at most."""
    return length * width - width * (width - 1) // 2


def _tiles(
    op: str, shape: str, rows: int, pairs: float, student_dim: int, teacher_dim: int, dtype: torch.dtype,
    instructions: dict[str, Any],
) -> Cost:  # fmt: skip
    """Counts tiles of scores, for as many keys as queries: `rows` of all heads. MSE has no statistics."""
    student, teacher = 2 * rows * student_dim * dtype.itemsize, 2 * rows * teacher_dim * dtype.itemsize
    scores, product = 2 * pairs * (student_dim + teacher_dim), 2 * pairs * student_dim
    is_kl, precision, both = op.startswith("attention_kl"), _precision(dtype), student + teacher
    exponentials = 2 * pairs if is_kl else 0
    steps = [
        Step(name, both + student / 2, scores + product, precision, exponentials, pairs * instructions[kind])
        for name, kind in (("d query", "d_query"), ("d key", "d_key"))
    ]
    if is_kl:
        issued = pairs * instructions["statistics"]
        steps.insert(0, Step("statistics", both, scores, precision, exponentials, issued))
    passes = 2 if is_kl else 1  # MSE can compute its loss and gradients at once
    least = Step("", passes * both + student, passes * scores + 2 * product, precision, passes * exponentials)
    return Cost(op, f"{shape}, d {student_dim} / {teacher_dim}", least, steps, _host("attention_kl"))


def linear_mse(tokens: int, student_dim: int, teacher_dim: int, dtype: torch.dtype) -> Cost:
    size, precision = dtype.itemsize, _precision(dtype)
    product = 2 * tokens * student_dim * teacher_dim
    x, t = tokens * student_dim * size, tokens * teacher_dim * size
    weights = student_dim * teacher_dim * size
    return Cost(
        "linear_mse",
        f"{tokens} tokens, {student_dim} to {teacher_dim}",
        Step("", 2 * x + t + 2 * weights, 3 * product, precision),
        [
            Step(
                "residual and loss", x + t + weights, product, precision, 0,
                product / 2048 * INSTRUCTIONS["residual"] + tokens * teacher_dim * EPILOGUE,
            ),
            Step("d student", x + weights, product, precision),
            Step("d weight", x + weights, product, precision),
        ],
        _host("linear_mse"),
    )  # fmt: skip


RESIDENT = 8192  # classes of a row that the row kernel holds in registers
CENTRED = ("jsd", "tvd")  # their gradient needs a mean over the row that is known after the second reading only


def _row_instructions(kind: str, rows: int, classes: int) -> float:
    return rows * classes * INSTRUCTIONS[kind]["R" if classes <= RESIDENT else "S"]


def _row_passes(kind: str, classes: int) -> int:
    """Returns how often the row kernel reads both rows; it writes one gradient."""
    if classes <= RESIDENT:
        return 1
    return 3 if kind in CENTRED else 2


def logits(kind: str, rows: int, classes: int, dtype: torch.dtype) -> Cost:
    one = rows * classes * dtype.itemsize
    passes = _row_passes(kind, classes)
    return Cost(
        kind,
        f"{rows} rows, V {classes}",
        Step("", 3 * one, exponentials=2 * rows * classes),
        [
            Step(
                "rows", (2 * passes + 1) * one, exponentials=2 * passes * rows * classes,
                instructions=_row_instructions(kind, rows, classes),
            )
        ],
        _host("logits"),
    )  # fmt: skip


def topk(rows: int, classes: int, k: int, dtype: torch.dtype) -> Cost:
    one, listed = rows * classes * dtype.itemsize, rows * k * (4 + 8)
    passes = 1 if classes <= RESIDENT else 2
    return Cost(
        "topk_soft_cross_entropy",
        f"{rows} rows, V {classes}, k {k}",
        Step("", 2 * one + listed, exponentials=rows * classes),
        [
            Step(
                "rows", (passes + 1) * one + listed, exponentials=passes * rows * classes,
                instructions=_row_instructions("topk", rows, classes),
            )
        ],
        _host("topk"),
    )  # fmt: skip


def linear_logits(kind: str, tokens: int, student_dim: int, teacher_dim: int, classes: int, dtype: torch.dtype) -> Cost:
    """Counts float32 logits of both sides as written and read: their chunks do not stay in the cache."""
    size, precision = dtype.itemsize, _precision(dtype)
    chunks = -(-tokens // max(min(CHUNK, GPU_CHUNK_BYTES // (classes * 4)), 1))
    student_weight, teacher_weight = (classes * dim * size for dim in (student_dim, teacher_dim))
    x, t = tokens * student_dim * size, tokens * teacher_dim * size
    scores = tokens * classes * 4  # bytes of one side's logits
    gradient = tokens * classes * min(size, 4)
    flops = [2 * tokens * classes * dim for dim in (student_dim, teacher_dim)]
    passes = _row_passes(kind, classes)
    return Cost(
        f"linear_{kind}",
        f"{tokens} tokens, {student_dim} / {teacher_dim}, V {classes}",
        Step("", 2 * x + t + 2 * student_weight + teacher_weight, 3 * flops[0] + flops[1], precision),
        [
            Step("student logits", x + chunks * student_weight + scores, flops[0], precision),
            Step("teacher logits", t + chunks * teacher_weight + scores, flops[1], precision),
            Step(
                "rows", 2 * passes * scores + gradient, exponentials=2 * passes * tokens * classes,
                instructions=_row_instructions(kind, tokens, classes),
            ),
            Step("d student", gradient + chunks * student_weight + x, flops[0], precision),
            # The float32 accumulator is read and written once per chunk.
            Step("d weight", gradient + x + chunks * 2 * classes * student_dim * 4, flops[0], precision),
        ],
        _host("linear_logits"),
    )  # fmt: skip


def examples() -> list[Cost]:
    """Returns the costs of the shapes that have goals."""
    bf16 = torch.bfloat16
    return [
        attention_mse(32, 12, 128, 26, 64, bf16),
        attention_mse(32, 12, 512, 26, 64, bf16),
        attention_mse(4, 12, 4096, 26, 64, bf16),
        attention_mse(4, 12, 4096, 26, 64, torch.float32),
        attention_kl(4, 12, 4096, 64, 64, bf16),
        attention_kl(4, 12, 4096, 64, 64, bf16, causal=True),
        attention_packed("attention_mse", 16, 12, 512, 64, 64, bf16),
        attention_packed("attention_mse", 4, 12, 4096, 64, 64, bf16, causal=True),
        attention_packed("attention_kl", 16, 12, 512, 64, 64, bf16),
        linear_mse(32768, 312, 768, bf16),
        linear_mse(32768, 768, 1024, bf16),
        logits("kl_div", 8192, 8192, bf16),
        logits("kl_div", 8192, 131072, bf16),
        logits("jsd", 8192, 131072, bf16),
        topk(8192, 131072, 64, bf16),
        linear_logits("kl_div", 8192, 2048, 4096, 128256, bf16),
    ]


def table(card: Card, costs: Sequence[Cost]) -> str:
    lines = [
        f"{card.name} ({card.source}): {card.memory / 1e12:.2f} TB/s, {card.bits16 / 1e12:.0f} TFLOP/s in 16 bits.",
        "",
        "| op | shape | step | MB | GFLOP | G exp | G instructions | bound by | floor |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for cost in costs:
        for step in cost.steps:
            parts = step.parts(card)
            lines.append(
                f"| {cost.op} | {cost.shape} | {step.name} | {step.memory / 1e6:.4g} | {step.flops / 1e9:.4g} "
                f"| {step.exponentials / 1e9:.3g} | {step.instructions / 1e9:.3g} "
                f"| {max(parts, key=parts.__getitem__)} | {_micro(step.seconds(card))} |"
            )
        floor, least = cost.floor(card), cost.least.seconds(card)
        lines.append(
            f"| | | **all** | | | | | {least / floor:.0%} of it is the op's own least | **{_micro(floor)}** |\n"
            f"| | | **predicted** | | | | | the host takes {_micro(cost.host)} | **{_micro(cost.predicted(card))}** |"
        )
    return "\n".join(lines)


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", default="H200", choices=list(CARDS))
    print(table(CARDS[parser.parse_args().card], examples()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
