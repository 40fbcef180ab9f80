"""Writes `report.md` with its plots beside a student (`write_report`), and puts runs side by side (`compare_runs`).

Every table is a list of heads and a list of rows of cells, for Markdown (`markdown`) or the terminal (`print_table`).
"""

from __future__ import annotations

import html
import json
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.recipes.glue import mean_score
from fastdistill.recipes.options import CompareOptions
from fastdistill.train.outputs import write_whole, writing
from fastdistill.train.reading import read_json, reading

__all__ = ["compare_runs", "print_comparison"]

Cells = tuple[list[str], list[list[str]]]  # heads and rows
Log = Sequence[Mapping[str, Any]]  # the log_history of a trainer_state.json

TERMS = ("embedding", "hidden", "attention", "value_relation", "query_relation", "key_relation", "prediction")
NOT_PER_CENT = ("loss", "perplexity")  # metrics
FIGURES = "report.json"  # the figures of the models, as `evaluate --json` writes them
STATE, RESULTS = "trainer_state.json", "results.json"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *escaped))


STYLE = """body { font: 17px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.7em; line-height: 1.2 } table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .3em min(.8em, 1.3vw); text-align: left } tr { border-bottom: 1px solid #ccc }
img { max-width: min(100%, 36em); height: auto } code { background: #eee; overflow-wrap: anywhere }"""
SPANS = {
    r"!\[([^]]*)\]\(([^)]*)\)": r'<img src="\2" alt="\1">',
    r"\*\*(.+?)\*\*": r"<b>\1</b>", r"`(.+?)`": r"<code>\1</code>",
}  # fmt: skip


def web_page(text: str) -> str:
    """Returns a report as HTML. Of Markdown it knows what reports use: headings, tables, lists, images, bold and code.

    Images stay files beside the page.
    """
    parts = html.escape(text.strip()).split("\n\n")
    title = parts[0].lstrip("# ")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(map(html_of, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def html_of(part: str) -> str:
    """Returns a paragraph, heading, table or list of escaped Markdown as HTML."""
    for pattern, tags in SPANS.items():
        part = re.sub(pattern, tags, part, flags=re.DOTALL)
    if found := re.fullmatch(r"(#+) (.*)", part):
        return f"<h{len(found[1])}>{found[2]}</h{len(found[1])}>"
    if part.startswith("- "):
        return "<ul>" + "".join(f"<li>{item}</li>" for item in part[2:].split("\n- ")) + "</ul>"
    if not part.startswith("| "):
        return f"<p>{part}</p>"
    heads, _, *rows = [line[2:-2].split(" | ") for line in part.split("\n")]
    lines = ["".join(f"<th>{cell}</th>" for cell in heads)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines).replace("\\|", "|") + "</table>"


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], bold: Collection[int] = ()) -> None:
    """Prints a table with rich, where it is installed, and the rows `bold` in bold; else as Markdown."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table
    except ModuleNotFoundError:
        print(markdown(heads, rows))
        return
    table = Table(*(Column(head, overflow="fold") for head in heads))
    for i, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if i in bold else None)
    Console().print(table)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean ± the standard deviation of shares, in per cent; the value, where there is one."""
    mean = f"{100 * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> Cells:
    """Returns a row for each model: its size, its metrics, its speed-up and the share of the score that it kept."""
    shown = {f"{split} {name}": (split, name) for row in figures.values() for split, metrics in row["metrics"].items()
             for name in metrics if name != "score"}  # fmt: skip
    rows = []
    for model, row in figures.items():
        found = ((row["metrics"].get(split, {}).get(name), name in NOT_PER_CENT) for split, name in shown.values())
        metrics = ["" if x is None else f"{x:.4f}" if is_plain else f"{100 * x:.2f}" for x, is_plain in found]
        speed_up, kept = row.get("speed_up"), row.get("kept")
        shares = [f"{speed_up:.2f}x" if speed_up else "", f"{kept:.1%}" if kept else ""]
        rows.append([model, f"{row['parameters']['total'] / 1e6:.2f}M", *metrics, *shares])
    return ["model", "parameters", *shown, "speed-up", "kept"], rows


def losses(log: Log) -> dict[str, list[tuple[int, float]]]:
    """Returns the points (step, loss) of each term; of the whole loss, where no term is; and of held-out rows."""
    terms = [term for term in TERMS if any(term in entry for entry in log)] or ["loss"]
    found = {term: [(entry["step"], entry[term]) for entry in log if term in entry] for term in (*terms, "eval_loss")}
    return {term.replace("eval_loss", "held-out loss"): points for term, points in found.items() if points}


def plot_losses(logs: Mapping[str, Log], file: Path) -> None:
    """Plots the losses of each training, by term, over its steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(4.5 * len(logs), 3.5), layout="constrained", dpi=120)
    for axes, (title, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        for term, points in losses(log).items():
            axes.plot(*zip(*points, strict=True), marker=".", label=term)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
    figure.savefig(file, format="png")


def plot_scores(combinations: Sequence[Mapping[str, Any]], teacher: float, file: Path) -> None:
    """Plots the score of each seed, a column for each learning rate and batch size, and the teacher's as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5, 1.5 * len(combinations)), 3.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for place, combination in enumerate(combinations):
        scores = [100 * run["score"] for run in combination["seeds"].values()]
        axes.plot([place] * len(scores), scores, "o", color="tab:blue", label="a seed" if place == 0 else None)
        axes.plot(place, statistics.mean(scores), "_", color="black", ms=20, label="mean" if place == 0 else None)
    axes.axhline(100 * teacher, color="gray", linestyle="--", label="teacher")
    labels = [f"rate {x['learning_rate']}\nbatch {x['batch_size']}" for x in combinations]
    axes.set(xticks=range(len(labels)), xticklabels=labels, ylabel="score in per cent", xmargin=0.3)
    axes.legend()
    figure.savefig(file, format="png")


def where() -> str:
    """Returns the device that a speed is measured on, in words."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return f"the CPU with {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def write_report(
    folder: Path,
    title: str,
    figures: Mapping[str, Mapping[str, Any]],
    trainings: Mapping[str, Path],
    notes: str,
    results: tuple[Mapping[str, Any], Cells, str] | None = None,
) -> None:
    """Writes `report.md`, its plots and the figures (`report.json`) to `folder`.

    Args:
        figures: those of each model, as `evaluate --json` writes them.
        trainings: the folder of each training, by its title; one that has not taken place is left out.
        notes: says how the figures were measured.
        results: what `results.json` holds, its table, and a sentence on the best run.
    """
    files = {name: path / STATE for name, path in trainings.items() if (path / STATE).is_file()}
    parts = [f"# {title}", markdown(*figures_table(figures)), notes]
    with writing(folder):
        if results is not None:
            found, table, best = results
            parts += ["## Scores by seed", markdown(*table), f"In per cent, mean ± standard deviation; {best}."]
            combinations = found["combinations"]
            if sum(len(combination["seeds"]) for combination in combinations) > 1:
                plot_scores(combinations, mean_score(figures["teacher"]["metrics"]), folder / "scores.png")
                parts.append("![scores by seed](scores.png)")
        logs = {name: read_json(file)["log_history"] for name, file in files.items()}
        if logs := {name: log for name, log in logs.items() if losses(log)}:  # a short run logs none
            plot_losses(logs, folder / "losses.png")
            parts += ["## Losses", "![losses by term](losses.png)"]
        write_whole(folder / FIGURES, json.dumps(figures, indent=2) + "\n")
        write_whole(folder / "report.md", "\n\n".join(parts) + "\n")


def compare_runs(options: CompareOptions) -> Cells:
    """Returns a table with a row for each run, and writes it to `options.output` as Markdown.

    Raises FileNotFoundError for a folder that no training wrote.
    """
    if options.output and options.output.exists() and not options.overwrite:
        raise FileExistsError(f"{options.output} exists; pass overwrite=True to replace it")
    found = {str(run): cells_of(run) for run in options.runs}
    heads = list(dict.fromkeys(head for cells in found.values() for head in cells))
    rows = [[run, *(cells.get(head, "") for head in heads)] for run, cells in found.items()]
    heads.insert(0, "run")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.output, markdown(heads, rows) + "\n")
    return heads, rows


def cells_of(run: Path) -> dict[str, str]:
    """Returns what is known of a run, by the head of its column."""
    if not (run / STATE).is_file():
        raise FileNotFoundError(f"{run}: no run of fastdistill: it has no {STATE}")
    cells: dict[str, str] = {}
    if (run / RESULTS).is_file():
        results = read_json(run / RESULTS)
        with reading(run / RESULTS):
            best = max(results["combinations"], key=lambda combination: combination["mean"])
            scores = [seed["score"] for seed in best["seeds"].values()]
            cells |= {"task": results["task"], "seeds": str(len(scores)), "score": mean_and_spread(scores, 2)}
    if (run / FIGURES).is_file():
        figures = read_json(run / FIGURES)
        with reading(run / FIGURES):
            heads, rows = figures_table({"student": figures["student"]})
            pairs = list(zip(heads, rows[0], strict=True))[1:]  # the score stands for the metrics of the dev sets
            cells |= {head: cell for head, cell in pairs if cell and not head.startswith("dev")}
    state = read_json(run / STATE)
    with reading(run / STATE):
        cells["steps"] = str(state["global_step"])
        cells |= {f"last {name}": f"{points[-1][1]:.4g}" for name, points in losses(state["log_history"]).items()}
    return cells


def print_comparison(table: Cells) -> None:
    print_table(*table)
