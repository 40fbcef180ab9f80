"""`python -m bench.goals RESULT.json`: shows which of the library's goals for a GPU are met, with the figures.

A goal whose shape has no figure in the file is shown as open.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
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
