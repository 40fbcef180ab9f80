"""Tests the reports beside students, and the comparison of runs: every figure is one that the run wrote elsewhere."""

from __future__ import annotations

import builtins
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

import torch
from _tiny import classifier, texts, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastdistill import cli
from fastdistill.recipes import report
from fastdistill.recipes.glue import get_task

SIZE = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(text: str, first: str) -> list[dict[str, str]]:
    """Returns the rows of the Markdown table whose first head is `first`."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    assert set(lines[1]) == set("| -")
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a run over two seeds, `two`, and one without an intermediate stage, `one`."""
    root = tmp_path_factory.mktemp("report")
    classifier(**get_task("SST-2").model_options()).save_pretrained(root / "teacher")
    tokenizer().save_pretrained(root / "teacher")
    (root / "data").mkdir()
    for split, rows in (("train", 32), ("dev", 12)):
        lines = [f"{text}\t{i % 2}" for i, text in enumerate(texts(rows, rows))]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (root / "student.json").write_text(json.dumps(SIZE))
    argv = ["task", "--task", "SST-2", "--data", root / "data", "--teacher", root / "teacher"]
    argv += ["--student", root / "student.json", "--prediction-epochs", 1, "--logging_steps", 1]
    seeds = ["--intermediate-epochs", 1, "--seeds", 1, 2, "--output", root / "two"]
    for more in (seeds, ["--intermediate-epochs", 0, "--output", root / "one"]):
        assert cli.main([str(part) for part in (*argv, *more)]) == 0
    return root


class TestTask:
    def test_the_table_has_the_figures_of_the_models(self, runs: Path) -> None:
        text = (runs / "two" / "report.md").read_text()
        teacher, student = table(text, "model")
        results = json.loads((runs / "two" / "results.json").read_text())
        figures = json.loads((runs / "two" / "report.json").read_text())
        assert (teacher["model"], student["model"]) == ("teacher", "student")
        for row, name in ((teacher, "teacher"), (student, "two")):
            model = AutoModelForSequenceClassification.from_pretrained(runs / name)
            assert row["parameters"] == f"{model.num_parameters() / 1e6:.2f}M"
        assert student["dev accuracy"] == f"{100 * results['best']['score']:.2f}"
        share = results["best"]["score"] / figures["teacher"]["metrics"]["dev"]["accuracy"]
        assert student["kept"] == f"{share:.1%}"
        assert re.fullmatch(r"\d+\.\d\dx", student["speed-up"])
        assert teacher["speed-up"] == teacher["kept"] == ""

    def test_evaluate_agrees(self, runs: Path, tmp_path: Path) -> None:
        argv = ["evaluate", "--model", runs / "two", "--against", runs / "teacher", "--task", "SST-2"]
        assert cli.main([str(x) for x in (*argv, "--data", runs / "data", "--json", tmp_path / "figures.json")]) == 0
        theirs = json.loads((tmp_path / "figures.json").read_text())
        for name, ours in json.loads((runs / "two" / "report.json").read_text()).items():
            found = theirs[str(runs / {"student": "two"}.get(name, name))]
            assert {**found, "speed_up": 0} == {**ours, "speed_up": 0}

    def test_plots_and_scores_by_seed(self, runs: Path) -> None:
        text = (runs / "two" / "report.md").read_text()
        (row,) = table(text, "learning rate")
        assert "±" in row["score"]
        for name in re.findall(r"\]\((.*?)\)", text):
            assert is_png(runs / "two" / name)
        assert "scores.png" in text
        assert "scores.png" not in (runs / "one" / "report.md").read_text()
        assert not (runs / "one" / "scores.png").exists()

    def test_a_curve_for_each_term_of_each_stage(self, runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from matplotlib.figure import Figure

        logs = {
            name: json.loads((runs / "two" / part / "trainer_state.json").read_text())["log_history"]
            for name, part in {"intermediate stage": "intermediate", "prediction stage": ""}.items()
        }
        found = {}
        monkeypatch.setattr(
            Figure, "savefig", lambda self, file, **_: found.update({x.get_title(): x for x in self.axes})
        )
        report.plot_losses(logs, tmp_path / "losses.png")
        lines = {title: {line.get_label(): line for line in axes.lines} for title, axes in found.items()}
        assert {title: set(terms) for title, terms in lines.items()} == {
            "intermediate stage": {"embedding", "hidden", "attention"},
            "prediction stage": {"prediction"},
        }
        hidden = [entry["hidden"] for entry in logs["intermediate stage"] if "hidden" in entry]
        assert list(lines["intermediate stage"]["hidden"].get_ydata()) == hidden

    def test_a_run_that_fails_in_its_report_leaves_no_output(
        self, runs: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report, "losses", full)
        argv = ["task", "--task", "SST-2", "--data", runs / "data", "--teacher", runs / "teacher", "--max-steps", 1]
        argv += ["--student", runs / "student.json", "--intermediate-epochs", 0, "--output", tmp_path / "out"]
        assert cli.main([str(part) for part in argv]) == 2
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        assert cli.main([*map(str, argv), "--resume"]) == 0
        assert "losses.png" not in (tmp_path / "out" / "report.md").read_text()  # the run is too short to log a loss


class TestCompare:
    def test_a_row_for_each_run(self, runs: Path, tmp_path: Path, capsys: Any) -> None:
        file = tmp_path / "made" / "table.md"
        assert cli.main(["compare", str(runs / "two"), str(runs / "one"), "--output", str(file)]) == 0
        two, one = table(file.read_text(), "run")
        assert (two["run"], one["run"]) == (str(runs / "two"), str(runs / "one"))
        results = json.loads((runs / "two" / "results.json").read_text())["combinations"][0]
        assert two["score"] == f"{100 * results['mean']:.2f} ± {100 * results['spread']:.2f}"
        assert (two["seeds"], one["seeds"]) == ("2", "1")
        figures = json.loads((runs / "one" / "report.json").read_text())["student"]
        assert one["kept"] == f"{figures['kept']:.1%}"
        state = json.loads((runs / "one" / "trainer_state.json").read_text())
        assert one["steps"] == str(state["global_step"])
        last = [entry["prediction"] for entry in state["log_history"] if "prediction" in entry][-1]
        assert one["last prediction"] == f"{last:.4g}"
        assert "┃" in capsys.readouterr().out

    def test_a_stage_has_losses_alone(self, runs: Path, tmp_path: Path) -> None:
        argv = ["compare", str(runs / "two" / "intermediate"), str(runs / "one")]
        assert cli.main([*argv, "--output", str(tmp_path / "table.md")]) == 0
        stage, task = table((tmp_path / "table.md").read_text(), "run")
        assert float(stage["last hidden"]) > 0
        assert (stage["score"], task["last hidden"]) == ("", "")

    def test_without_rich(self, runs: Path, capsys: Any, monkeypatch: Any) -> None:
        found = builtins.__import__

        def without(name: str, *arguments: Any) -> Any:
            if name.startswith("rich"):
                raise ModuleNotFoundError(name)
            return found(name, *arguments)

        monkeypatch.setattr(builtins, "__import__", without)
        report.print_table(["run", "score"], [["a|b", "1"]])
        assert capsys.readouterr().out.splitlines() == ["| run | score |", "| --- | --- |", r"| a\|b | 1 |"]

    @pytest.mark.parametrize("name", ["trainer_state.json", "results.json", "report.json"])
    def test_a_damaged_file_is_named(self, runs: Path, tmp_path: Path, capsys: Any, name: str) -> None:
        shutil.copytree(runs / "one", tmp_path / "one")
        for text in ("{", "{}"):
            (tmp_path / "one" / name).write_text(text)
            assert cli.main(["compare", str(tmp_path / "one")]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert str(tmp_path / "one" / name) in line

    def test_a_folder_that_is_no_run(self, runs: Path, tmp_path: Path, capsys: Any) -> None:
        for folder in (tmp_path, tmp_path / "absent", runs / "teacher"):
            argv = ["compare", str(runs / "one"), str(folder), "--output", str(tmp_path / "table.md")]
            assert cli.main(argv) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{folder}: no run" in line
            assert not (tmp_path / "table.md").exists()
        with pytest.raises(SystemExit) as end:
            cli.main(["compare"])
        assert end.value.code == 2

    def test_a_file_is_not_overwritten(self, runs: Path, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "table.md").write_text("mine")
        argv = ["compare", str(runs / "one"), "--output", str(tmp_path / "table.md")]
        assert cli.main(argv) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert (tmp_path / "table.md").read_text() == "mine"
        assert cli.main([*argv, "--overwrite"]) == 0
        assert table((tmp_path / "table.md").read_text(), "run")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a student of a language model, `out`, one of the same rows by a LoRA, and one of the labels alone."""
    pytest.importorskip("trl")
    from test_lm import save, words, write_lines

    root, rng = tmp_path_factory.mktemp("chats"), random.Random(0)
    save(root / "teacher", 32, 3, 0)
    save(root / "student", 16, 2, 1)
    for name, count in (("train.txt", 8), ("held.txt", 5)):
        write_lines(root / name, [words(rng, 5) for _ in range(count)])
    argv = ["lm", "--student", root / "student", "--dataset", root / "train.txt", "--eval", root / "held.txt"]
    argv += ["--epochs", 1, "--batch-size", 2, "--logging_steps", 1, "--output"]
    teacher = ["--teacher", root / "teacher"]
    for more in (["out", *teacher], ["lora", *teacher, "--lora", 2], ["labels", "--alpha", 0]):
        assert cli.main([str(part) for part in (*argv, root / str(more[0]), *more[1:])]) == 0
    return root


class TestLanguageModels:
    def test_held_out_figures_are_those_of_all_labels(self, chats: Path) -> None:
        from test_lm import rows_of, token_losses

        text = (chats / "out" / "report.md").read_text()
        for row, name in zip(table(text, "model"), ("teacher", "out"), strict=True):
            model = AutoModelForCausalLM.from_pretrained(chats / name, dtype=torch.float64)
            with torch.no_grad():
                rows = rows_of(chats, "held.txt")
                losses = [x for row, mask in rows for x in token_losses(model, model, row, mask, 0.0)]
            assert float(row["held-out loss"]) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
            assert row["parameters"] == f"{model.num_parameters() / 1e6:.2f}M"
        assert is_png(chats / "out" / "losses.png")

    def test_a_lora_has_the_size_of_the_merged_model(self, chats: Path) -> None:
        whole, merged = (table((chats / name / "report.md").read_text(), "model")[1] for name in ("out", "lora"))
        assert whole["parameters"] == merged["parameters"]
        assert re.fullmatch(r"\d+\.\d\dx", merged["speed-up"])

    def test_without_a_teacher(self, chats: Path) -> None:
        (row,) = table((chats / "labels" / "report.md").read_text(), "model")
        assert (row["model"], row["speed-up"]) == ("student", "")

    def test_compare(self, chats: Path, tmp_path: Path) -> None:
        runs = [str(chats / name) for name in ("out", "labels")]
        assert cli.main(["compare", *runs, "--output", str(tmp_path / "table.md")]) == 0
        found = table((tmp_path / "table.md").read_text(), "run")
        for row, run in zip(found, runs, strict=True):
            log = json.loads((Path(run) / "trainer_state.json").read_text())["log_history"]
            last = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
            assert float(row["held-out loss"]) == pytest.approx(last, abs=1e-4)
            assert row["last loss"] == f"{[entry['loss'] for entry in log if 'loss' in entry][-1]:.4g}"
