"""`python -m bench.goals RESULT.json`: shows which of the library's goals for a GPU are met, with the figures.

A goal whose shape has no figure in the file is shown as open. Goals that need no card (`STATIC`, of the machine code,
checked by `bench.static --check`; `HOST`, of the time that a call takes on the host, checked by `bench.host --check`)
have a bound beside the target: what the code reaches today. Worse figures than the bound fail in CI; whoever improves a
figure tightens its bound, until it is the target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bench.cost import CARDS
from bench.report import Record, good, read


class Goal(NamedTuple):
    op: str
    shape: str  # as the cost model spells it
    text: str
    least: bool  # whether the figure should be at least the limit, or at most
    limit: float
    figure: Callable[[Record, dict[str, Record]], float | None]  # from our record, and all records of the row by name


class Bound(NamedTuple):
    """A goal that needs no card."""

    what: str  # kernel, or op
    case: str
    text: str
    least: bool  # whether the figure should be at least the target, or at most
    target: float
    bound: float  # what fails in CI; the target, once it is met
    figure: Callable[..., float]
    arch: str = "sm_90"

    def is_about(self, what: str, case: str, arch: str) -> bool:
        return (self.what, self.case, self.arch) == (what, case, arch)

    def verdict(self, figure: float) -> str:
        """Returns "met", "open" (within the bound), or "worse" than the bound."""
        sign = -1 if self.least else 1
        if sign * figure <= sign * self.target * (1 + sign * 0.005):  # as many digits as the table shows
            return "met"
        return "open" if sign * figure <= sign * self.bound * (1 + sign * 0.005) else "**worse**"

    def faults(self, figure: float) -> list[str]:
        if self.verdict(figure) != "**worse**":
            return []
        return [f"{self.what}, {self.case}: {self.text} is {figure:.3g}, and the bound in goals.py is {self.bound:.3g}"]


def _instructions(unit: str, target: float, bound: float, what: str, case: str) -> Bound:
    return Bound(what, case, f"instructions a {unit}", False, target, bound, lambda kernel: kernel.instructions)


def _redundancy(what: str, case: str, target: float, bound: float) -> Bound:
    return Bound(what, case, "products issued / needed", False, target, bound, lambda kernel: kernel.redundancy)


_TILES, _NARROW = "attention_kl tiles 64 / 64 bf16", "attention_mse 26 / 64 bf16 unaligned"
STATIC = [
    _instructions("pair", 17.8, 17.8, "attention_tiles.d_query", _TILES),
    _instructions("pair", 21.0, 21.0, "attention_tiles.d_key", _TILES),
    _redundancy("attention_tiles.d_query", _TILES, 1.0, 1.0),
    _redundancy("attention_tiles.d_key", _TILES, 1.0, 1.0),
    _instructions("row of a head", 720, 720, "attention_mse.gram", _NARROW),
    _redundancy("attention_mse.gram", _NARROW, 1.2, 1.2),
    Bound("attention_mse.gram", _NARROW, "programs on a multiprocessor", True, 2, 2, lambda kernel: kernel.programs),
    Bound(
        "attention_mse.gram", _NARROW, "bits of the narrowest load of a row", True, 32, 32,
        lambda kernel: min(map(kernel.narrowest_load, ("a_query", "b_query"))),
    ),
    # In the time of a byte an H200 issues 6.8 instructions: rows that are read twice take 10 bytes a class, 68; a list
    # against a row in registers takes 4 bytes, 27.
    _instructions("class", 68, 68, "logits.rows", "logits kl_div V=131072 bf16"),
    _instructions("class", 130, 142, "logits.rows", "logits jsd V=131072 bf16"),
    _instructions("class", 27, 43, "topk.rows", "topk bucket V=8192 bf16"),
]  # fmt: skip


def _host(op: str, torch: float, triton: float) -> list[Bound]:
    """Bounds for the ratios of an op's host time to eager's; they leave a fifth for the noise of a busy machine."""
    return [
        Bound(op, "backend torch", "times eager's host time", False, 1.5, torch, lambda x: x.ratios["torch"], ""),
        Bound(op, "backend triton", "times eager's host time", False, 1.5, triton, lambda x: x.ratios["triton"], ""),
    ]


HOST = [
    *_host("attention_mse", 4.6, 2.7),
    *_host("attention_mse, causal", 3.5, 1.8),
    *_host("attention_mse, masks", 4.2, 2.0),
    *_host("attention_kl", 5.0, 2.0),
    *_host("attention_kl, causal", 4.3, 1.5),
    *_host("linear_mse", 2.2, 2.9),
    *_host("soft_cross_entropy", 1.8, 2.3),
    *_host("kl_div", 1.9, 2.4),
    *_host("jsd", 1.5, 1.5),
    *_host("tvd", 1.7, 1.9),
    *_host("topk_soft_cross_entropy", 1.9, 2.2),
    *_host("linear_kl_div", 2.0, 3.5),
    *_host("linear_jsd", 1.5, 1.5),
    Bound(
        "attention_mse, masks", "backend triton", "launches and kernels, forward", False, 4, 4,
        lambda x: x.launches[0] + x.kernels[0], "",
    ),
    Bound(
        "attention_mse, masks", "backend triton", "launches and kernels, backward", False, 3, 3,
        lambda x: x.launches[1] + x.kernels[1], "",
    ),
]  # fmt: skip


def _faster_than(name: str) -> Callable[[Record, dict[str, Record]], float | None]:
    return lambda ours, row: row[name]["seconds"] / ours["seconds"] if name in row else None


def _extra(ours: Record, row: dict[str, Record]) -> float:
    return ours["extra_bytes"]


def _of_floor(ours: Record, row: dict[str, Record]) -> float | None:
    return ours["floor_seconds"] / ours["seconds"] if ours["floor_seconds"] else None


def _of_bandwidth(card: str | None, name: str | None = None) -> Callable[[Record, dict[str, Record]], float | None]:
    """Returns the figure of our fastest implementation, or of the one called `name`."""

    def figure(ours: Record, row: dict[str, Record]) -> float | None:
        record = row.get(name) if name else ours
        return record["least_bytes"] / record["seconds"] / CARDS[card].memory if card and record else None

    return figure


def _of_products(card: str | None) -> Callable[[Record, dict[str, Record]], float | None]:
    """Returns the share of our time that the four products take at the card's speed."""
    if card is None:
        return lambda ours, row: None
    return lambda ours, row: ours["least_flops"] / CARDS[card].bits16 / ours["seconds"]


def goals(card: str | None) -> Iterator[Goal]:
    """Yields the goals, for 16-bit inputs, forward and backward."""
    for batch, length, times in ((32, 128, 4), (32, 512, 15), (4, 4096, 100)):
        shape = f"{batch} x 12 heads x {length}, d 26 / 64"
        yield Goal("attention_mse", shape, "times as fast as eager", True, times, _faster_than("eager"))
        if length == 512:
            scores = batch * 12 * length**2 * 2
            yield Goal("attention_mse", shape, "extra memory, bytes: 1% of the scores", False, 0.01 * scores, _extra)
    shape = "4 x 12 heads x 4096, d 26 / 64"
    yield Goal("attention_mse", shape, "of the card's bandwidth", True, 0.8, _of_bandwidth(card))
    shape = "12 heads x 16 sequences of 512, d 64 / 64"
    for op in ("attention_mse packed", "attention_kl packed"):
        yield Goal(op, shape, "times as fast as with a dense attn_mask", True, 10, _faster_than("dense attn_mask"))
        scores = 12 * (16 * 512) ** 2 * 2
        yield Goal(op, shape, "extra memory, bytes: 5% of the scores", False, 0.05 * scores, _extra)
    shape = "32768 tokens, 312 to 768"
    yield Goal("linear_mse", shape, "of the floor's rate", True, 0.7, _of_floor)
    yield Goal("linear_mse", shape, "times as fast as eager", True, 2, _faster_than("eager"))
    yield Goal("linear_mse", shape, "times as fast as torch.compile", True, 1.5, _faster_than("torch.compile"))
    yield Goal("linear_mse", shape, "extra memory, bytes", False, 64 * 2**20, _extra)
    for op in ("kl_div", "jsd"):
        for vocabulary in (8192, 16384, 32000, 131072):
            shape = f"8192 rows, V {vocabulary}"
            yield Goal(op, shape, "of the card's bandwidth at 3 passes", True, 0.55, _of_bandwidth(card))
            yield Goal(op, shape, "times as fast as torch.compile", True, 2, _faster_than("torch.compile"))
            yield Goal(op, shape, "times as fast as liger-kernel", True, 2, _faster_than(f"liger-kernel {op}"))
    for op in ("soft_cross_entropy", "kl_div", "jsd", "tvd"):
        for vocabulary in (8192, 16384, 32000, 131072, 262144):
            shape = f"8192 rows, V {vocabulary}"
            text = "of the card's bandwidth at 3 passes, csrc"
            yield Goal(op, shape, text, True, 0.85, _of_bandwidth(card, "fastdistill cuda"))
    for op in ("linear_kl_div", "linear_jsd"):
        shape = "8192 tokens, 2048 / 4096, V 128256"
        yield Goal(op, shape, "of the products' speed", True, 0.75, _of_products(card))
        yield Goal(op, shape, "extra memory, bytes", False, 2 * 2**30, _extra)


def bounds_table(figures: Iterable[tuple[Bound, float]]) -> str:
    lines = ["| | case | goal | target | bound | figure | |", "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for goal, figure in figures:
        target = ("at least " if goal.least else "at most ") + f"{goal.target:.3g}"
        lines.append(
            f"| {goal.what} | {goal.case} | {goal.text} | {target} | {goal.bound:.3g} | {figure:.3g} "
            f"| {goal.verdict(figure)} |"
        )
    return "\n".join(lines)


def table(result: dict) -> str:
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in result["records"]:
        if record["direction"] == "forward + backward" and record["dtype"] in ("bfloat16", "float16") and good(record):
            rows.setdefault((record["op"], record["shape"]), {})[record["implementation"]] = record
    lines = ["| op | shape | goal | limit | figure | |", "| --- | --- | --- | ---: | ---: | --- |"]
    for goal in goals(result["card"]):
        row = rows.get((goal.op, goal.shape), {})
        ours = [record for name, record in row.items() if name.startswith("fastdistill")]
        figure = goal.figure(min(ours, key=lambda record: record["seconds"]), row) if ours else None
        limit = ("at least " if goal.least else "at most ") + f"{goal.limit:.3g}"
        if figure is None:
            verdict = "open"
        else:
            verdict = "met" if (figure >= goal.limit if goal.least else figure <= goal.limit) else "**missed**"
        shown = "" if figure is None else f"{figure:.3g}"
        lines.append(f"| {goal.op} | {goal.shape} | {goal.text} | {limit} | {shown} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result")
    try:
        print(table(read(parser.parse_args().result)))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
