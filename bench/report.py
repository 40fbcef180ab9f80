"""Turns results of the benchmarks into pages of tables and plots, and compares two runs.

    python -m bench.report render RESULT.json [RESULT.json ...] --out docs
    python -m bench.report compare OLD.json NEW.json [--threshold 0.05]

A result file holds one run on one device; `read` checks its fields. A record whose error is above its limit is red: its
time is not shown, and it enters no ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.cost import CARDS

FORMAT = 1
BASELINES = ("eager", "usual")  # the same loss, or step, written the usual way

Record = dict[str, Any]
Row = tuple[str, str, str, str]

# ---------------------------------------------------------------------------------------------------------------------
# Result files

NUMBER = int | float
RUN_FIELDS = {
    "device": str,
    "card": str | None,
    "driver": str | None,
    "versions": dict,
    "commit": str,
    "modified": bool,
    "date": str,
    "preset": str,
    "threads": int,
    "command": str,
    "peers": dict,
    "records": list,
}
RECORD_FIELDS = {
    "op": str,
    "shape": str,
    "sizes": dict,
    "dtype": str,
    "direction": str,
    "implementation": str,
    "status": str,
}
MEASURED_FIELDS = {
    "seconds": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "rounds": int,
    "extra_bytes": NUMBER,
    "error": NUMBER | None,
    "error_limit": NUMBER | None,
    "least_bytes": NUMBER | None,
    "least_flops": NUMBER | None,
    "floor_seconds": NUMBER | None,
}


def read(path: str | Path) -> dict[str, Any]:
    """Reads the result file at `path`. Raises ValueError, which names the file and the fault, if it cannot be used."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = reprlib.repr(result.get("format") if isinstance(result, dict) else result)
        raise ValueError(f"{path}: format is {found}, expected {FORMAT}")
    _check(str(path), result, RUN_FIELDS)
    if result["card"] not in (None, *CARDS):
        raise ValueError(f"{path}: card is {result['card']!r}, expected null or one of {', '.join(CARDS)}")
    for name in ("versions", "peers"):
        _check(f"{path}: {name}", result[name], dict.fromkeys(result[name], str | None))
    seen: dict[tuple[str, ...], int] = {}
    for i, record in enumerate(result["records"]):
        where = f"{path}: record {i}"
        _check(where, record, RECORD_FIELDS)
        _check(f"{where}: sizes", record["sizes"], dict.fromkeys(record["sizes"], int))
        if record["status"] == "ok":
            _check(where, record, MEASURED_FIELDS)
            _check_times(where, record)
        if seen.setdefault(key(record), i) != i:
            raise ValueError(f"{where}: is the same measurement as record {seen[key(record)]}: {_title(key(record))}")
    return result


def _check(where: str, entry: Any, fields: dict[str, Any]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: is {reprlib.repr(entry)}, expected an object")
    for name, kind in fields.items():
        if name not in entry:
            raise ValueError(f"{where}: {name} is missing")
        value = entry[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, expected {expected}")


def _check_times(where: str, record: Record) -> None:
    for name in ("seconds", "low", "high"):
        if not 0 < record[name] < math.inf:
            raise ValueError(f"{where}: {name} is {record[name]}, expected a positive number")
    if record["low"] > record["high"]:
        raise ValueError(f"{where}: low is {record['low']}, expected at most high, {record['high']}")
    if not 0 <= record["extra_bytes"] < math.inf:
        raise ValueError(f"{where}: extra_bytes is {record['extra_bytes']}, expected 0 or more")


def key(record: Record) -> tuple[str, str, str, str, str]:
    """Returns what identifies a measurement: op, shape, dtype, direction and implementation."""
    return record["op"], record["shape"], record["dtype"], record["direction"], record["implementation"]


def _ours(record: Record) -> bool:
    return record["implementation"].startswith("fastdistill")


def _red(record: Record) -> bool:
    if record["status"] != "ok" or record["error"] is None or record["error_limit"] is None:
        return False
    return not record["error"] <= record["error_limit"]  # an error of NaN is red


def good(record: Record) -> bool:
    return record["status"] == "ok" and not _red(record)


def _rows(records: Iterable[Record]) -> dict[Row, list[Record]]:
    """Groups records by op, shape, dtype and direction, ours first."""
    rows: dict[Row, list[Record]] = {}
    for record in records:
        rows.setdefault(key(record)[:4], []).append(record)
    return {row: sorted(group, key=lambda record: not _ours(record)) for row, group in rows.items()}


def _best(group: Iterable[Record]) -> Record | None:
    """Returns the record of our fastest backend in a row, or None."""
    return min((r for r in group if _ours(r) and good(r)), key=lambda r: r["seconds"], default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Cells and columns


def _figure(value: float) -> str:
    """Writes a number with three digits, or with all digits before the point if there are more."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _seconds(value: float) -> str:
    unit, scale = next((u for u in (("s", 1), ("ms", 1e-3)) if value >= 0.9995 * u[1]), ("us", 1e-6))
    return f"{_figure(value / scale)} {unit}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def _time(record: Record) -> str:
    """Writes the time, or the reason why there is none."""
    if record["status"] != "ok":
        return _shorten(record["status"].split(":")[0], 20)
    return f"red (error {_error(record['error'])})" if _red(record) else _seconds(record["seconds"])


def _ratio_to_ours(record: Record, group: list[Record]) -> str:
    best = _best(group)
    return f"{_figure(record['seconds'] / best['seconds'])}x" if best and good(record) else ""


def _extra_mib(record: Record) -> str:
    return _figure(record["extra_bytes"] / 2**20) if record["status"] == "ok" else ""


def _title(row: Iterable[str]) -> str:
    return ", ".join(row)


def _columns(rows: list[list[str]], sides: str, gap: str = "  ") -> list[str]:
    """Aligns rows, one line each; `sides` has < (left) or > (right) for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    ]


def _blocks(header: list[str], blocks: dict[str, list[list[str]]], sides: str) -> list[str]:
    """Writes the rows of each block under its title, with columns aligned over all blocks."""
    aligned = iter(_columns([header, *(row for rows in blocks.values() for row in rows)], sides))
    lines = [f"  {next(aligned)}"]
    for title, rows in blocks.items():
        lines += [title, *(f"  {next(aligned)}" for _ in rows)]
    return [line.rstrip() for line in lines]


def summary(records: Iterable[Record]) -> str:
    """Writes a run as a plain-text table of at most 120 columns: one line per record, under the title of its row."""
    blocks = {
        _shorten(_title(row), 120): [
            [
                _shorten(record["implementation"], 30),
                _time(record) if record["status"] == "ok" else "",
                _ratio_to_ours(record, group),
                _extra_mib(record),
                _error(record["error"]) if record["status"] == "ok" else "",
                "red" if _red(record) else _shorten(record["status"], 34),
            ]
            for record in group
        ]
        for row, group in _rows(records).items()
    }
    header = ["implementation", "time", "of ours", "extra MiB", "error", "status"]
    return "\n".join(_blocks(header, blocks, "<>>>><")) if blocks else "nothing was measured"


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def render(paths: Iterable[str | Path], out: str | Path) -> list[Path]:
    """Writes a page for each device into `out`/benchmarks; records of later runs replace those of earlier ones."""
    runs: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path in paths:
        result = read(path)
        runs.setdefault(slug(result["device"]), []).append((Path(path).name, result))
    folder = Path(out) / "benchmarks"
    pages = []
    for device, results in runs.items():
        results.sort(key=lambda result: result[1]["date"])
        (folder / device).mkdir(parents=True, exist_ok=True)
        page = "\n".join(_page(results, folder / device)) + "\n"
        pages.append(folder / f"{device}.md")
        write_atomically(pages[-1], partial(Path.write_text, data=page, encoding="utf-8"))
    return pages


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file and then renames it: `path` is complete, or stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _page(results: list[tuple[str, dict[str, Any]]], plots: Path) -> list[str]:
    """Returns the lines of a page and writes its plots to the folder `plots` beside it."""
    shown: dict[tuple[str, ...], tuple[int, Record]] = {}  # with the index of its result file
    for i, (_, result) in enumerate(results):
        shown.update((key(record), (i, record)) for record in result["records"])
    records = [record for _, record in shown.values()]
    colours = _colours(record["implementation"] for record in sorted(records, key=lambda r: not _ours(r)))
    lines = [
        f"# Benchmarks: {results[-1][1]['device']}",
        "",
        "`python -m bench.report render` writes this page.",
        "",
        "- *time* is a median.",
        "- *of ours* is the time divided by that of our fastest backend in the same row.",
        "- *extra* is the peak of the memory beyond inputs and gradients, or for a training step beyond the models.",
        "- *red* means that the error is above its limit; such a time is not shown.",
        "- *GB/s* and *GFLOP/s* are the bytes and operations that the op cannot avoid (`bench/cost.py`, `least`)",
        "  divided by our time.",
        "- *of floor* is the least time that our algorithm could take on this card, divided by our time.",
        "- A dotted line in a plot joins points that also differ in sizes that are not on the axis.",
        "",
    ]
    for i, (name, result) in enumerate(results):
        lines += _run(name, result, sum(file == i for file, _ in shown.values()))
    sections: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        sections.setdefault((record["op"], record["dtype"], record["direction"]), []).append(record)
    for op in dict.fromkeys(record["op"] for record in records):
        lines += [f"## {op}", ""]
        for (name, dtype, direction), section in sections.items():
            if name == op:
                lines += [f"### {dtype}, {direction}", "", *_tables(section)]
                file = _plot(section, colours, plots)
                lines += [f"![{op}, {dtype}, {direction}]({plots.name}/{file})", ""] if file else []
    card = next((result["card"] for _, result in reversed(results) if result["card"]), None)
    lines += _roofline(records, card, plots)
    return lines[:-1]


def _run(name: str, result: dict[str, Any], shown: int) -> list[str]:
    count = len(result["records"])
    replaced = f", {count - shown} of them replaced by a later run" if shown < count else ""
    facts = {
        "device": result["device"] + (f", driver {result['driver']}" if result["driver"] else ""),
        "versions": _pairs(result["versions"]),
        "peers": _pairs(result["peers"]),
        "commit": result["commit"] + (" with changes" if result["modified"] else ""),
        "date": result["date"],
        "preset": result["preset"],
        "threads": result["threads"],
        "records": f"{count}{replaced}",
        "command": f"`{result['command']}`",
    }
    return [f"`{name}`:", "", *(f"- {fact}: {value}" for fact, value in facts.items()), ""]


def _pairs(values: dict[str, str | None]) -> str:
    return "; ".join(f"{name} {value or 'none'}" for name, value in values.items()) or "none"


def _tables(section: list[Record]) -> list[str]:
    """Writes one row per shape and implementation: columns for all implementations would be wider than a page."""
    steps = section[0]["direction"] == "training step"
    header = ["shape", "implementation", "time", "of ours", "extra MiB"] + ["tokens/s"] * steps
    compared, reached = [], []
    missing: dict[tuple[str, str], list[str]] = {}
    for group in _rows(section).values():
        shape = group[0]["shape"]  # shown in the first line of the row alone
        for record in group:
            cells = [shape, record["implementation"], _time(record), _ratio_to_ours(record, group), _extra_mib(record)]
            rate = _figure(record["sizes"]["tokens"] / record["seconds"]) if steps and good(record) else ""
            compared.append(cells + [rate] * steps)
            shape = ""
            if record["status"] != "ok":
                missing.setdefault((record["implementation"], record["status"]), []).append(record["shape"])
        shape = group[0]["shape"]
        for record in group:
            if _ours(record) and record["status"] == "ok":
                reached.append([shape, record["implementation"], *_rates(record)])
                shape = ""
    lines = _markdown(header, compared, "<<>>>" + ">" * steps)
    if missing:
        count = len(_rows(section))
        lines += ["Not measured:", ""]
        for (implementation, status), shapes in missing.items():
            reason = " ".join(status.split()).replace("`", "'")
            where = "; ".join(shapes) if len(shapes) < count else "every shape"
            lines.append(f"- {implementation}, {where}: `{reason}`")
        lines.append("")
    if any(any(cells[2:]) for cells in reached):
        lines += _markdown(["shape", "ours", "GB/s", "GFLOP/s", "of floor", "error"], reached, "<<>>>>")
    return lines


def _rates(record: Record) -> list[str]:
    """Returns the rates, the share of the floor and the error of one of our records; a red one has its error alone."""
    rates = [record["least_bytes"], record["least_flops"]]
    cells = [_figure(amount / record["seconds"] / 1e9) if amount and good(record) else "" for amount in rates]
    floor = f"{record['floor_seconds'] / record['seconds']:.0%}" if record["floor_seconds"] and good(record) else ""
    return [*cells, floor, _error(record["error"])]


def _markdown(header: list[str], rows: list[list[str]], sides: str) -> list[str]:
    """Writes a Markdown table without its empty columns."""
    filled = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
    rule = ["---" if side == "<" else "---:" for side in sides]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    chosen = [[row[i] for i in filled] for row in (header, rule, *escaped)]
    return [*(f"| {line} |" for line in _columns(chosen, "".join(sides[i] for i in filled), " | ")), ""]


# ---------------------------------------------------------------------------------------------------------------------
# Plots. The functions that draw import matplotlib, since `compare` and `summary` do not need it.

MARKERS = "osD^vP*Xhd"


def _colours(names: Iterable[str]) -> dict[str, Any]:
    from matplotlib import color_sequences

    palette = [*color_sequences["tab10"], *color_sequences["Dark2"]]
    return dict(zip(dict.fromkeys(names), cycle(palette), strict=False))


def _plot(section: list[Record], colours: dict[str, Any], folder: Path) -> str | None:
    """Plots time and memory over length or vocabulary; returns the file's name, or None for fewer than two sizes."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = section[0]
    steps = first["direction"] == "training step"
    along = "vocabulary" if "vocabulary" in first["sizes"] and not steps else "length"
    shown = [record for record in section if good(record) and along in record["sizes"]]
    ticks = sorted({record["sizes"][along] for record in shown})
    if len(ticks) < 2:
        return None

    # Each combination of the sizes that vary but are not on the axis gets a marker. A step's tokens follow from its
    # other sizes.
    names = [name for name in first["sizes"] if name != along and not (name == "tokens" and along == "length")]
    varying = [name for name in names if len({record["sizes"].get(name) for record in shown}) > 1]

    def others(record: Record) -> str:
        return "\n".join(f"{name.replace('_', ' ')} {record['sizes'].get(name)}" for name in varying)

    markers = dict(zip(dict.fromkeys(map(others, shown)), cycle(MARKERS), strict=False))
    implementations = [name for name in colours if any(record["implementation"] == name for record in shown)]
    panels: list[tuple[str, str, Callable[[Record], float]]] = [
        ("tokens a second", "linear", lambda r: r["sizes"]["tokens"] / r["seconds"])
        if steps
        else ("time, ms", "log", lambda r: r["seconds"] * 1e3),
        # A logarithmic axis has no zero: less than a KiB is drawn as a KiB.
        ("peak memory, MiB" if steps else "extra memory, MiB", "log", lambda r: max(r["extra_bytes"], 2**10) / 2**20),
    ]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    figure.suptitle(f"{first['op']}, {first['dtype']}, {first['direction']}")
    for axes, (label, scale, value) in zip(figure.subplots(1, 2), panels, strict=True):
        for implementation in reversed(implementations):  # ours are drawn over the others
            colour = colours[implementation]
            width = 2.2 if implementation.startswith("fastdistill") else 1.4
            points = [(r["sizes"][along], value(r), others(r)) for r in shown if r["implementation"] == implementation]
            points.sort()
            # Draw one line, or if a length has several points, one for each combination of the other sizes.
            single = len({x for x, _, _ in points}) == len(points)
            for line in [points] if single else [[p for p in points if p[2] == other] for other in markers]:
                for (x, y, of), (next_x, next_y, next_of) in pairwise(line):
                    axes.plot([x, next_x], [y, next_y], "-" if of == next_of else ":", color=colour, linewidth=width)
            for x, y, of in points:
                axes.plot(x, y, markers[of], color=colour, markersize=5)
        axes.set(xlabel=along, ylabel=label, xscale="log", yscale=scale)
        _place_ticks(axes, ticks)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        else:
            _label_ticks(axes, [value(r) for r in shown])
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colours[name], linewidth=2, label=name) for name in implementations]
    if varying:
        handles += [
            Line2D([], [], color="grey", marker=marker, linestyle="", label=other) for other, marker in markers.items()
        ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    file = slug(f"{first['op']} {first['dtype']} {first['direction']}") + ".png"
    write_atomically(folder / file, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    return file


def _place_ticks(axes: Any, values: list[int]) -> None:
    """Puts ticks where the points are, except where their labels would overlap."""
    chosen = values[-1:]
    for value in reversed(values):
        room = 0.02 * (len(str(chosen[-1])) + 1) * math.log(values[-1] / values[0])
        if math.log(chosen[-1] / value) > room:
            chosen.append(value)
    axes.set_xticks(chosen, [str(value) for value in chosen], fontsize="small")
    axes.set_xticks([], minor=True)


def _label_ticks(axes: Any, values: list[float]) -> None:
    """Labels ticks with plain numbers instead of powers of ten."""
    from matplotlib.ticker import LogLocator

    low, high = min(values) / 1.6, max(values) * 1.6  # wide enough to contain a 1, 2 or 5
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter("{x:.10g}")
    axes.set_yticks([], minor=True)


def _roofline(records: list[Record], card_name: str | None, folder: Path) -> list[str]:
    """Plots our fastest backend in every row, under the card's roof if the card is known."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    best = [record for group in _rows(records).values() if (record := _best(group))]
    points = [record for record in best if record["least_bytes"] and record["least_flops"]]
    if not points:
        return []
    ops, dtypes = (list(dict.fromkeys(record[name] for record in points)) for name in ("op", "dtype"))
    colours, markers = _colours(ops), dict(zip(dtypes, cycle(MARKERS), strict=False))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    intensity = [record["least_flops"] / record["least_bytes"] for record in points]
    reached = [record["least_flops"] / record["seconds"] / 1e9 for record in points]
    for record, x, y in zip(points, intensity, reached, strict=True):
        colour = colours[record["op"]]
        inside = "none" if record["direction"] == "forward" else colour
        axes.plot(x, y, markers[record["dtype"]], color=colour, markerfacecolor=inside, markersize=6)
    left, right = min(intensity) / 2, max(intensity) * 2
    axes.set(xlabel="FLOP a byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    if card_name:
        card = CARDS[card_name]
        peaks: dict[float, list[str]] = {}  # with the precisions that reach it
        for name, peak in (("16 bits", card.bits16), ("float32", card.float32), ("float64", card.float64)):
            peaks.setdefault(peak, []).append(name)
        ridge = max(peaks) / card.memory
        left, right = min(left, ridge / 4), max(right, ridge * 4)
        axes.plot([left, ridge], [left * card.memory / 1e9, max(peaks) / 1e9], color="black", linewidth=1)
        middle = math.sqrt(left * ridge)
        above: dict[str, Any] = {"textcoords": "offset points", "xytext": (-4, 4), "ha": "right"}
        axes.annotate(f"{card.memory / 1e12:g} TB/s", (middle, middle * card.memory / 1e9), **above)
        for peak, names in peaks.items():
            axes.plot([peak / card.memory, right], [peak / 1e9, peak / 1e9], color="black", linewidth=1)
            axes.annotate(f"{', '.join(names)}: {peak / 1e12:g} TFLOP/s", (right, peak / 1e9), **above)
        reached += [peak / 1e9 for peak in peaks]
        axes.set_title(f"{card.name} ({card.source})")
    axes.set_xlim(left, right)
    _label_ticks(axes, reached)
    axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=op) for op, colour in colours.items()]
    handles += [Line2D([], [], color="grey", marker=m, linestyle="", label=dtype) for dtype, m in markers.items()]
    if any(record["direction"] == "forward" for record in points):
        handles.append(
            Line2D([], [], color="grey", marker="o", markerfacecolor="none", linestyle="", label="forward alone")
        )
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    write_atomically(folder / "roofline.png", lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    roof = "" if card_name else "\nThe limits of this device are unknown, so no roof is drawn."
    return [
        "## Roofline",
        "",
        "The plot shows our fastest backend at every shape, with the FLOP and bytes that the op cannot avoid",
        f"(`bench/cost.py`, `least`). Ops without matrix products are left out: see their GB/s above.{roof}",
        "",
        f"![roofline]({folder.name}/roofline.png)",
        "",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float = 0.05) -> tuple[str, list[str]]:
    """Returns a table of the changes between two results, and our regressions, one line each."""
    before = {key(record): record for record in old["records"]}
    after = {key(record): record for record in new["records"]}
    both = {k: (r, after[k]) for k, r in before.items() if k in after and good(r) and good(after[k])}
    ratios = {k: b["seconds"] / a["seconds"] for k, (a, b) in both.items()}
    blocks: dict[str, list[list[str]]] = {}
    regressions = []
    for k, a in before.items():
        b = after.get(k)
        worse, noted = _changes(a, b, threshold)
        cells = [k[-1], _time(a), _time(b) if b else "absent", "", _extra_mib(a), _extra_mib(b) if b else "", "", ""]
        if k in both:
            cells[3] = _percent(ratios[k])
            cells[6] = _percent(_growth(both[k]))
            baseline = next((ratios[k[:4] + (name,)] for name in BASELINES if k[:4] + (name,) in ratios), None)
            cells[7] = _percent(ratios[k] / baseline) if baseline and _ours(a) else ""
        blocks.setdefault(_title(k[:4]), []).append([*cells, ", ".join(worse + noted)])
        if worse and _ours(a):
            changes = [f"{what} {cells[i]}" for what, i in (("time", 3), ("extra", 6)) if cells[i]]
            regressions.append(f"{_title(k)}: {_title(worse + changes)}")

    lines = []
    for name in ("driver", "versions", "peers", "preset", "threads"):
        if old[name] != new[name]:
            lines.append(f"{name}: {_setting(old[name])} -> {_setting(new[name])}")
    if lines:
        lines = ["the runs were set up differently:", *(f"  {line}" for line in lines), ""]
    header = ["implementation", "old", "new", "change", "old MiB", "new MiB", "change", "to baseline", ""]
    lines += [*(_blocks(header, blocks, "<>>>>>>><") if blocks else ["no records"]), ""]
    for who, chosen in (
        ("peers and baselines", [r for k, r in ratios.items() if not _ours(before[k])]),
        ("fastdistill", [r for k, r in ratios.items() if _ours(before[k])]),
    ):
        lines.append(f"{who}: {_spread(chosen)}")
    lines.append(
        "Changes of peers and baselines show the noise and drift of the machine; `to baseline` takes them out."
    )
    if added := len(after.keys() - before.keys()):
        lines.append(f"{added} records are new" if added > 1 else "1 record is new")
    lines.append(f"{len(regressions) or 'no'} regression{'s' * (len(regressions) != 1)} of fastdistill")
    return "\n".join(lines + [f"  {line}" for line in regressions]), regressions


def _changes(old: Record, new: Record | None, threshold: float) -> tuple[list[str], list[str]]:
    """Returns the regressions from one record to another, and other changes worth a mark."""
    if new is None:
        return (["VANISHED"], []) if good(old) else ([], [])
    if _red(new):
        return ([], ["still red"]) if _red(old) else (["NEWLY RED"], [])
    if not good(new):
        return (["NEWLY FAILING"], []) if old["status"] == "ok" else ([], [])
    if not good(old):
        return [], ["mended"]
    worse, noted = [], []
    time = new["seconds"] / old["seconds"]
    if time > 1 + threshold:
        if new["low"] > old["high"]:
            worse.append("SLOWER")
        else:
            noted.append("noise?")
    elif time < 1 / (1 + threshold) and new["high"] < old["low"]:
        noted.append("faster")
    memory = _growth((old, new))
    if memory > 1 + threshold:
        worse.append("MORE MEMORY")
    elif memory < 1 / (1 + threshold):
        noted.append("less memory")
    return worse, noted


def _growth(pair: tuple[Record, Record]) -> float:
    old, new = (record["extra_bytes"] for record in pair)
    return new / old if old else (math.inf if new else 1.0)


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _spread(ratios: list[float]) -> str:
    if not ratios:
        return "nothing to compare"
    text = f"median time x{median(ratios):.3f} over {len(ratios)} record{'s' * (len(ratios) != 1)}"
    if len(ratios) < 4:
        return text
    low, _, high = quantiles(ratios, n=4)
    return f"{text}, the middle half x{low:.3f} to x{high:.3f}"


def _setting(value: Any) -> str:
    return _pairs(value) if isinstance(value, dict) else str(value)


def _describe(path: str, result: dict[str, Any]) -> str:
    changes = " with changes" if result["modified"] else ""
    return f"{Path(path).name}: {result['device']}, commit {result['commit']}{changes}, {result['date']}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description="Writes pages of benchmark results and compares two runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    renders = commands.add_parser("render", help="write a page of tables and plots for every device")
    renders.add_argument("results", nargs="+", metavar="RESULT.json")
    renders.add_argument("--out", default="docs", help="folder that gets benchmarks/DEVICE.md (default: docs)")
    compares = commands.add_parser("compare", help="print changes between two runs; exit code 1 if ours got worse")
    compares.add_argument("old", metavar="OLD.json")
    compares.add_argument("new", metavar="NEW.json")
    compares.add_argument("--threshold", type=float, default=0.05, help="relative change that counts (default: 0.05)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "render":
            print(*render(options.results, options.out), sep="\n")
            return 0
        if not 0 <= options.threshold < math.inf:
            raise ValueError(f"--threshold: got {options.threshold}, expected 0 or more")
        old, new = read(options.old), read(options.new)
        if old["device"] != new["device"]:
            raise ValueError(
                f"{options.new}: device is {new['device']!r}, expected {old['device']!r} as in {options.old}: "
                "runs on different devices are not compared"
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    text, regressions = compare(old, new, options.threshold)
    print(f"old {_describe(options.old, old)}\nnew {_describe(options.new, new)}\n{text}")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
