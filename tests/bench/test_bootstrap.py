"""The held-out third of GLUE's dev sets, and the bootstrap intervals around what a student keeps of its teacher."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from bench import glue
from bench.bootstrap import held_out_rows, hold_out, interval, resampled, resamples
from fastdistill.recipes.glue import compute_metrics

HEADERS = {"CoLA": "", "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"}
LINES = {"CoLA": "gj04\t{label}\t\tsentence {row}", "MRPC": "{label}\t1\t2\tsentence {row}\tother {row}"}


@pytest.mark.parametrize("name", ["CoLA", "MRPC"])  # without and with a header
def test_the_split_covers_the_dev_set_once(tmp_path: Path, name: str) -> None:
    task, data = glue.glue_task(name), tmp_path / "data"
    data.mkdir()
    lines = [LINES[name].format(label=row % 2, row=row) for row in range(31)]
    lines[7] += "\u2028 this does not end a line"
    for split, mark in (("train", ""), ("dev", "\ufeff")):  # MRPC's dev.tsv starts with a byte-order mark
        (data / f"{split}.tsv").write_text(mark + HEADERS[name] + "\n".join(lines) + "\n", "utf-8")
    whole = [tuple(row.values()) for row in task.load_split("dev", data)]
    for time in ("once", "again"):
        hold_out(task, data, tmp_path / time / "dev", tmp_path / time / "held-out")
    dev, held = ([tuple(row.values()) for row in task.load_split("dev", tmp_path / "once" / x)]
                 for x in ("dev", "held-out"))  # fmt: skip
    assert (len(dev), len(held)) == (21, 10)
    assert set(dev) | set(held) == set(whole)  # 31 different rows, so none is in both
    for part in ("dev", "held-out"):
        assert len({(tmp_path / time / part / "dev.tsv").read_bytes() for time in ("once", "again")}) == 1
    assert len(task.load_split("train", tmp_path / "once" / "dev")) == 31


def test_the_split_is_always_the_same() -> None:
    """Another split would mix rows that were chosen on with rows that were not."""
    assert held_out_rows(12).tolist() == [1, 6, 8, 9]


def predictions(name: str, seeds: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits (seeds, rows, classes) that are often right, and labels."""
    random = np.random.default_rng(0)
    if name == "STS-B":
        labels = random.integers(0, 11, rows) / 2  # with ties, as in the task
        return labels[:, None] + random.normal(size=(seeds, rows, 1)), labels
    labels = random.integers(0, 2, rows)
    return np.eye(2)[labels] + random.normal(size=(seeds, rows, 2)), labels


@pytest.mark.parametrize("name", glue.TASKS)
def test_resampled_scores_are_those_of_compute_metrics(name: str) -> None:
    task = glue.glue_task(name)
    logits, labels = predictions(name, seeds=2)
    chosen = np.vstack([resamples(task, len(labels))[:20], np.full((1, len(labels)), 3)])  # the last has one row only
    with np.errstate(all="ignore"):
        expected = [np.mean([compute_metrics(task, x[rows], labels[rows])["score"] for x in logits]) for rows in chosen]
    np.testing.assert_allclose(resampled(task, logits, labels, chosen), expected, rtol=0, atol=1e-12)


def test_the_interval_of_what_is_kept_is_scipys_paired_one() -> None:
    task = glue.glue_task("SST-2")
    logits, labels = predictions("SST-2", seeds=2, rows=300)
    student, teacher = (x.argmax(axis=-1) == labels for x in logits)
    theirs = bootstrap(
        (student, teacher), lambda x, y, axis: x.mean(axis) / y.mean(axis), paired=True, vectorized=True,
        n_resamples=10_000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    chosen = resamples(task, len(labels))
    ours = interval(resampled(task, logits[:1], labels, chosen) / resampled(task, logits[1:], labels, chosen))
    assert ours == pytest.approx(tuple(theirs), abs=0.02 * (theirs.high - theirs.low) + 0.005)


def test_the_tables_pair_rows_and_average_tasks(tmp_path: Path) -> None:
    """A student that answers as its teacher keeps all of it, whatever the rows; the means are by hand."""

    def write(task: str, model: str, right: list[int]) -> None:
        logits = {str(seed): np.eye(2)[[int(row < count) for row in range(100)]].tolist()
                  for seed, count in enumerate(right, 1)}  # fmt: skip
        path = glue.predictions_path(tmp_path, task, glue.slug(model))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({part: {"labels": [1] * 100, "logits": logits} for part in glue.PARTS}))

    for task, right in (("SST-2", 80), ("RTE", 60)):
        write(task, "teacher", [right])
        write(task, glue.DISTILLED, [right, right])
    write("SST-2", glue.FINE_TUNED, [30, 50])
    found = glue.results(tmp_path, list(glue.TASKS), "held out")
    *lines, last = glue.tables(found, list(glue.TASKS)).splitlines()
    assert lines == [
        "| model | SST-2 | RTE | average |",
        "| --- | ---: | ---: | ---: |",
        "| teacher | 80.0 | 60.0 | 70.0 |",
        "| distilled | 80.0 ± 0.0 | 60.0 ± 0.0 | 70.0 |",
        "| fine-tuned | 40.0 ± 14.1 |  |  |",
        "",
        "| kept | SST-2 | RTE | average |",
        "| --- | ---: | ---: | ---: |",
        "| distilled | 100.0% (100.0 to 100.0) | 100.0% (100.0 to 100.0) | 100.0% (100.0 to 100.0) |",
    ]
    assert last.startswith("| fine-tuned | 50.0% (")


def test_models_that_saw_the_held_out_rows_are_refused(tmp_path: Path, capsys: Any) -> None:
    """A folder of an earlier version has models of a task, and no split of its dev set."""
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)
    (tmp_path / "out" / "MRPC" / "teacher").mkdir(parents=True)
    arguments = argparse.Namespace(
        model="bert", masked=None, data=tmp_path / "glue", out=tmp_path / "out", tasks=["MRPC"], smallest=True,
        tables=False,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        glue.prepare(argparse.ArgumentParser(), arguments)
    assert "its models have seen the rows to hold out; take a new folder" in capsys.readouterr().err


def test_models_of_other_budgets_are_refused(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest row and the whole table name their teachers alike, and train them for other numbers of epochs."""
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)
    monkeypatch.setattr(glue, "hold_out", lambda task, source, dev, held_out: dev.mkdir(parents=True))
    arguments = argparse.Namespace(
        model="bert", masked=None, data=tmp_path / "glue", out=tmp_path / "out", tasks=["MRPC"], smallest=True,
        tables=False, glove=tmp_path / "glue", corpus=[tmp_path / "glue"],
    )  # fmt: skip
    glue.prepare(argparse.ArgumentParser(), arguments)
    glue.prepare(argparse.ArgumentParser(), arguments)
    arguments.smallest = False
    with pytest.raises(SystemExit):
        glue.prepare(argparse.ArgumentParser(), arguments)
    assert "its models were trained with other budgets; take a new folder" in capsys.readouterr().err
