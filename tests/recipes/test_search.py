"""Tests the search over learning rates, batch sizes and seeds: its runs, its choice, and how a killed one resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from fastdistill.recipes.search import print_results, search

Run = tuple[float, int, int]
# Score of each run on its two sets. (2e-5, 16) has the best mean, (1e-5, 32) the best single run, and (2e-5, 32) the
# best mean of the first set alone.
SCORES: dict[Run, tuple[float, float]] = {
    (1e-5, 16, 1): (0.5, 0.5),
    (1e-5, 16, 2): (0.6, 0.4),
    (1e-5, 32, 1): (0.9, 0.9),
    (1e-5, 32, 2): (0.3, 0.3),
    (2e-5, 16, 1): (0.6, 0.8),
    (2e-5, 16, 2): (0.7, 0.9),
    (2e-5, 32, 1): (0.9, 0.3),
    (2e-5, 32, 2): (0.9, 0.5),
}
GRID: dict[str, Any] = {"name": "MNLI", "learning_rates": [1e-5, 2e-5], "batch_sizes": [16, 32], "seeds": [1, 2]}


def evaluate(run: Run) -> dict[str, dict[str, float]]:
    names = ("dev_matched", "dev_mismatched")
    return {name: {"accuracy": x, "score": x} for name, x in zip(names, SCORES[run], strict=True)}


def trainer(done: list[Run], killed_at: int | None = None) -> Callable[..., Run]:
    """Returns a training that records its runs and, like the stages, returns at once if a model is already there."""

    def train(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Run:
        run = (learning_rate, batch_size, seed)
        if not (folder / "model").is_file():
            if len(done) == killed_at:
                raise KeyboardInterrupt
            folder.mkdir(parents=True)
            (folder / "model").write_text(str(run))
            done.append(run)
        return run

    return train


def test_the_best_mean_over_seeds_and_sets_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[Run] = []
    results = search(trainer(done), evaluate, tmp_path, **GRID)
    assert done == list(SCORES)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["best"] == {"learning_rate": 2e-5, "batch_size": 16, "seed": 2, "score": pytest.approx(0.8)}
    assert (tmp_path / "model").read_text() == "(2e-05, 16, 2)"
    assert len(list((tmp_path / "runs").iterdir())) == 8
    found = {(c["learning_rate"], c["batch_size"]): c for c in results["combinations"]}
    assert found[2e-5, 16]["mean"] == pytest.approx(0.75)
    assert found[2e-5, 16]["spread"] == pytest.approx(0.1 / math.sqrt(2))  # the scores are 0.7 and 0.8
    assert found[1e-5, 32]["spread"] == pytest.approx(0.6 / math.sqrt(2))
    assert found[1e-5, 16]["spread"] == 0
    assert found[2e-5, 32]["seeds"]["2"] == {"metrics": evaluate((2e-5, 32, 2)), "score": pytest.approx(0.7)}

    assert len(capsys.readouterr().out.splitlines()) == 8
    print_results(results)
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in table.splitlines() if "±" in row]
    assert rows[1:3] == [
        ["1e-05", "32", "60.00 ± 42.43", "60.00 ± 42.43", "60.00 ± 42.43"],
        ["2e-05", "16", "65.00 ± 7.07", "85.00 ± 7.07", "75.00 ± 7.07"],
    ]
    assert len(rows) == 4
    assert line == "best: learning rate 2e-05, batch size 16; of its seeds 2 with 80.00"


@pytest.mark.parametrize("killed_at", [0, 3, 7])
def test_a_killed_search_resumes(tmp_path: Path, killed_at: int) -> None:
    whole = search(trainer([]), evaluate, tmp_path / "whole", **GRID)
    done: list[Run] = []
    with pytest.raises(KeyboardInterrupt):
        search(trainer(done, killed_at), evaluate, tmp_path / "out", **GRID)
    assert len(done) == killed_at
    assert not (tmp_path / "out" / "results.json").exists()
    assert search(trainer(done), evaluate, tmp_path / "out", **GRID) == whole
    assert done == list(SCORES)  # each is trained once


def test_one_run(tmp_path: Path) -> None:
    """The run's folder stays so that a killed search can resume; the command removes it once the output is whole."""
    results = search(trainer([]), evaluate, tmp_path, name="MNLI", learning_rates=[2e-5], batch_sizes=[32], seeds=[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "results.json", "runs"]
    assert results["combinations"][0]["spread"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rates": []}, r"learning_rates is \[\]; it should hold one value or more, each once"),
        ({"learning_rates": [1e-5, 0.00001]}, r"learning_rates is \[1e-05, 1e-05\]"),
        ({"learning_rates": [1e-5, 0.0]}, "learning_rates is .* its values should be above 0"),
        ({"learning_rates": [math.nan]}, "its values should be above 0"),
        ({"batch_sizes": [16, -1]}, r"batch_sizes is \[16, -1\]; its values should be above 0"),
        ({"seeds": [1, 2, 1]}, r"seeds is \[1, 2, 1\]"),
    ],
)
def test_bad_grids(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    done: list[Run] = []
    with pytest.raises(ValueError, match=message):
        search(trainer(done), evaluate, tmp_path, **{**GRID, **wrong})
    assert done == []
