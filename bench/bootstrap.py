"""Holds a third of a dev set back from every choice, and puts intervals around what is measured on it.

`hold_out` splits the rows before anything is trained. `resampled` scores one model on many resamples of its rows;
models that share the resamples are compared in pairs, and `interval` gives the middle 95% of what they show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdistill.recipes.glue import Task

SPLIT_SEED = 2023
RESAMPLES = 10_000
CHUNK = 1_000  # resamples at a time, so that a chunk takes tens of megabytes


def held_out_rows(rows: int) -> np.ndarray:
    """Returns the third of the row numbers that is held out, in order: always the same one for that many rows."""
    return np.sort(np.random.default_rng(SPLIT_SEED).permutation(rows)[: rows // 3])


def hold_out(task: Task, data: Path, dev: Path, held_out: Path) -> None:
    """Splits `data`/dev.tsv into `dev`/dev.tsv, two thirds, and `held_out`/dev.tsv, one third; `dev` gets train.tsv."""
    header, *lines = (data / "dev.tsv").read_bytes().removesuffix(b"\n").split(b"\n")
    if not task.has_header:
        header, lines = b"", [header, *lines]
    held = set(held_out_rows(len(lines)).tolist())
    for folder, is_held in ((held_out, True), (dev, False)):
        folder.mkdir(parents=True, exist_ok=True)
        part = [line for row, line in enumerate(lines) if (row in held) == is_held]
        (folder / "dev.tsv").write_bytes(b"".join(line + b"\n" for line in ([header] if header else []) + part))
    if not (dev / "train.tsv").exists():
        (dev / "train.tsv").symlink_to((data / "train.tsv").resolve())


def resamples(task: Task, rows: int) -> np.ndarray:
    """Returns row numbers (RESAMPLES, rows), drawn with replacement: always the same ones for a task."""
    return np.random.default_rng([SPLIT_SEED, *task.name.encode()]).integers(rows, size=(RESAMPLES, rows))


def resampled(task: Task, logits: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns the score on each resample, averaged over seeds.

    The score is `compute_metrics`' (fastdistill/recipes/glue.py), for two classes or a regression.

    Args:
        logits: (seeds, rows, classes), or (seeds, rows, 1) for a regression.
        labels: (rows,).
        chosen: row numbers (resamples, rows).
    """
    guesses = logits[..., 0] if task.is_regression else logits.argmax(axis=-1)  # (seeds, rows)
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    found = [np.concatenate([score(task, guess[rows], labels[rows]) for rows in chunks]) for guess in guesses]
    return np.mean(found, axis=0)


def score(task: Task, guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns the mean of the task's metrics of each row of `guess` against that of `truth`, both (resamples, rows)."""
    from scipy.stats import rankdata

    functions = {
        "accuracy": lambda: (guess == truth).mean(axis=1),
        "f1": lambda: divide(2.0 * (guess & truth).sum(axis=1), guess.sum(axis=1) + truth.sum(axis=1)),
        "matthews": lambda: correlation(guess, truth),  # Matthews' is Pearson's of two classes
        "pearson": lambda: correlation(guess, truth),
        "spearman": lambda: correlation(rankdata(guess, axis=1), rankdata(truth, axis=1)),
    }
    return np.mean([functions[name]() for name in task.metrics], axis=0)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation of each row of `a` with that of `b`; 0 where one is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return divide((a * b).sum(axis=1), np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the percentiles between which 95% of the resampled values lie."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
