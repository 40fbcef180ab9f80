"""Searches a task's last training over learning rates, batch sizes and seeds; keeps the best student on the dev sets.

TinyBERT's recipe (arXiv 1909.10351, section 4.2) searches the prediction stage over the learning rates 1e-5, 2e-5 and
3e-5 and batches of 16 and 32.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.recipes.glue import mean_score
from fastdistill.recipes.report import Cells, print_table
from fastdistill.train.outputs import write_whole
from fastdistill.train.processes import processes

RUN = "runs/rate{learning_rate}-batch{batch_size}-seed{seed}"
Metrics = dict[str, dict[str, float]]  # by evaluation set, as `fastdistill.recipes.glue.compute_metrics` returns them


def check_grid(*, learning_rates: Sequence[float], batch_sizes: Sequence[int], seeds: Sequence[int]) -> None:
    """Raises ValueError for an empty list, repeated values, rates and sizes not above 0, and seeds out of range."""
    for name, values in {"learning_rates": learning_rates, "batch_sizes": batch_sizes, "seeds": seeds}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} is {list(values)}; it should hold one value or more, each once")
        if name != "seeds" and not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name} is {list(values)}; its values should be above 0")
    if not all(0 <= value < 2**32 for value in seeds):
        raise ValueError(f"seeds is {list(seeds)}; they should be from 0 to 2**32 - 1")


def search(
    train: Callable[[float, int, int, Path], Any],
    evaluate: Callable[[Any], Metrics],
    folder: str | Path,
    *,
    name: str,
    learning_rates: Sequence[float],
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Trains for each learning rate, batch size and seed; copies the best combination's best seed into `folder`.

    The best combination has the highest score, averaged over its seeds and over the evaluation sets
    (`fastdistill.recipes.glue.mean_score`); the first one wins a tie.

    Args:
        train: `train(learning_rate, batch_size, seed, run)` writes a model to the folder `run` and returns it. It
            should resume: an interrupted search starts again, and models that are already there return at once.
        evaluate: returns the metrics of a model on each evaluation set.
        folder: receives each run's folder under `runs`, and in the end the best run's files and `results.json`. Only
            the main process writes.

    Returns the content of `results.json`, which docs/search.md shows. Raises ValueError as `check_grid` does.
    """
    check_grid(learning_rates=learning_rates, batch_sizes=batch_sizes, seeds=seeds)
    folder, is_main = Path(folder), processes().is_main_process
    combinations: list[dict[str, Any]] = []
    for learning_rate, batch_size in itertools.product(learning_rates, batch_sizes):
        combination = {"learning_rate": learning_rate, "batch_size": batch_size}
        runs: dict[str, Any] = {}
        for seed in seeds:
            metrics = evaluate(train(learning_rate, batch_size, seed, folder / RUN.format(**combination, seed=seed)))
            score = mean_score(metrics)
            runs[str(seed)] = {"metrics": metrics, "score": score}
            if is_main:
                print(f"{name}, learning rate {learning_rate}, batch size {batch_size}, seed {seed}: {100 * score:.2f}")
        scores = [run["score"] for run in runs.values()]
        combinations.append({**combination, "seeds": runs, "mean": statistics.mean(scores), "spread": spread(scores)})
    chosen = max(combinations, key=lambda combination: combination["mean"])
    seed, run = max(chosen["seeds"].items(), key=lambda item: item[1]["score"])
    best = {"learning_rate": chosen["learning_rate"], "batch_size": chosen["batch_size"], "seed": int(seed)}
    results = {"task": name, "combinations": combinations, "best": {**best, "score": run["score"]}}
    processes().wait_for_everyone()  # from here on no process reads a run
    if is_main:
        shutil.copytree(folder / RUN.format(**best), folder, dirs_exist_ok=True)
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def spread(values: Sequence[float]) -> float:
    """Returns the standard deviation over seeds, or 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def report(results: Mapping[str, Any]) -> tuple[Cells, str]:
    """Returns a table of every metric, in per cent, as mean ± standard deviation, a row a combination; and the best."""
    best, combinations = results["best"], results["combinations"]
    metrics = next(iter(combinations[0]["seeds"].values()))["metrics"]
    columns = [(split, metric) for split in metrics for metric in metrics[split] if metric != "score"]
    rows = []
    for combination in combinations:
        runs = combination["seeds"].values()
        values = [[run["metrics"][split][metric] for run in runs] for split, metric in columns]
        values.append([run["score"] for run in runs])
        cells = [f"{100 * statistics.mean(x):.2f} ± {100 * spread(x):.2f}" for x in values]
        rows.append([str(combination["learning_rate"]), str(combination["batch_size"]), *cells])
    heads = ["learning rate", "batch size", *(f"{split} {metric}" for split, metric in columns), "score"]
    return (heads, rows), (
        f"best: learning rate {best['learning_rate']}, batch size {best['batch_size']}; "
        f"of its seeds {best['seed']} with {100 * best['score']:.2f}"
    )


def print_results(results: Mapping[str, Any]) -> None:
    (heads, rows), best = report(results)
    pair = [str(results["best"][name]) for name in ("learning_rate", "batch_size")]
    print_table(heads, rows, bold=[i for i, row in enumerate(rows) if row[:2] == pair])
    print(best)
