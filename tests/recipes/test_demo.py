"""Tests the demo: its text (labels, no leaks), and the whole run at a tiny size."""

import copy
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastdistill import cli
from fastdistill.recipes import demo, report

TINY = demo.Size(
    train_rows=20,
    test_rows=10,
    vocabulary=400,
    teacher=(2, 16),
    student=(1, 8),
    heads=2,
    teachers=2,
    teacher_epochs=1,
    general_epochs=0.02,
    intermediate_epochs=0.1,
    prediction_epochs=0.2,
    seeds=(0, 1),
)


@pytest.fixture(scope="module")
def docstrings():
    return demo.read_docstrings(Path(demo.sysconfig.get_paths()["stdlib"]))


@pytest.fixture(scope="module")
def text(docstrings):
    with pytest.MonkeyPatch.context() as patch:  # to read them once
        patch.setattr(demo, "read_docstrings", lambda library: copy.deepcopy(docstrings))
        return demo.read_text(demo.Size())


class TestText:
    def test_rows_are_balanced_and_labelled(self, text):
        size = demo.Size()
        assert text.labels == sorted([*demo.PARTS, demo.LANGUAGE])
        for rows, count in ((text.train, size.train_rows), (text.test, size.test_rows)):
            counts = [rows["label"][:].count(label) for label in range(len(text.labels))]
            assert max(counts) <= count
            assert min(counts) > 0.6 * count
        assert len(text.corpus) > len(text.train)

    def test_no_test_passage_is_in_the_training_text(self, text):
        train = {re.sub("[^a-z]+", " ", passage.lower()) for passage in text.corpus}
        assert {re.sub("[^a-z]+", " ", row.lower()) for row in text.train["sentence1"]} <= train
        assert not {re.sub("[^a-z]+", " ", row.lower()) for row in text.test["sentence1"]} & train
        known = set().union(*map(demo.word_runs, text.corpus))
        shares = [len(demo.word_runs(row) & known) / len(demo.word_runs(row)) for row in text.test["sentence1"]]
        assert max(shares) <= 0.5

    def test_test_passages_took_no_part_in_the_choice_of_sizes(self, text, docstrings):
        """The split that `Size` was chosen on is made anew: its labelled passages and all that it could test."""
        size, rng, seen, took_part = demo.Size(), random.Random(0), set(), set()
        texts = copy.deepcopy(docstrings)
        for whole in texts.pop(""):
            list(demo.passages(whole, size.words, seen))  # adds to `seen`
        for _, part in sorted(texts.items()):
            rng.shuffle(part)
            cut = len(part) * 4 // 5
            for share, count in ((part[:cut], 60), (part[cut:], None)):
                found = [passage for whole in share for passage in demo.passages(whole, size.words, seen)]
                rng.shuffle(found)
                took_part.update(found[:count])
        tested = set(text.test["sentence1"])
        assert not tested & took_part
        assert len(tested) > 900
        assert len(took_part & set(text.corpus)) > 0.8 * len(took_part)

    def test_module_names_are_removed(self, text):
        names = {module.lstrip("_") for modules in demo.PARTS.values() for module in modules.split()}
        for passage in (*text.corpus, *text.test["sentence1"]):
            assert not names & set(re.findall(r"\w+", passage))

    def test_it_is_reproducible(self, monkeypatch, tmp_path):
        for module in ("abc", "queue", "glob", "smtplib", "random", "bdb", "textwrap", "socket", "turtle"):
            shutil.copy(Path(demo.sysconfig.get_paths()["stdlib"]) / f"{module}.py", tmp_path)
        monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        one, other = demo.read_text(TINY), demo.read_text(TINY)
        assert one.corpus == other.corpus
        assert one.train[:] == other.train[:]
        assert one.test[:] == other.test[:]

    def test_nothing_is_imported(self, text):
        assert "turtle" not in sys.modules
        assert "idlelib" not in sys.modules

    def test_docstrings_of_a_file_that_does_not_parse(self, tmp_path):
        (tmp_path / "bad.py").write_text("def f(:\n")
        (tmp_path / "good.py").write_text(
            '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
        )
        assert demo.docstrings(tmp_path / "bad.py") == []
        assert demo.docstrings(tmp_path / "good.py") == ["One.", "Two.", "Three."]

    def test_passages(self):
        text = "email: one two three four five six seven eight\n\n>>> code\n1\n\n" + "word " * 25 + "\n\ntoo short"
        found = list(demo.passages(text, 10, set()))
        assert found == [": one two three four five six seven eight", " ".join(["word"] * 10)]

    def test_no_library_source(self, monkeypatch, tmp_path):
        monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(FileNotFoundError, match="no source of the standard library"):
            demo.read_text(demo.Size())


@pytest.fixture(scope="module")
def done(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("demo") / "out"
    rows = Dataset.from_dict(text.train.shuffle(seed=0)[:180]), Dataset.from_dict(text.test.shuffle(seed=0)[:90])
    short = demo.Text(*rows, text.corpus[:2000], text.labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "read_text", lambda size: short)
        seen: list[str] = []
        patch.setattr(demo.webbrowser, "open", lambda page: seen.append(page) or True)
        trained: list[tuple[str, list[str], int]] = []  # by stage: its columns and rows
        for stage in (demo.IntermediateStage, demo.PredictionStage):
            prepare = stage.prepare

            def spy(self, tokenizer, prepare=prepare):
                trained.append((type(self).__name__, self.dataset.column_names, len(self.dataset)))
                return prepare(self, tokenizer)

            patch.setattr(stage, "prepare", spy)
        results = demo.run(folder, open=True, size=TINY)
        return folder, {**results, "seen": seen, "trained": trained}


class TestRun:
    def test_writes_everything(self, done):
        folder, results = done
        names = ["accuracy.png", "models.png", "report.html", "report.md", "results.json", "student"]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        assert json.loads((folder / "results.json").read_text())["accuracy"] == results["accuracy"]
        for name in ("accuracy.png", "models.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")

    def test_open_shows_the_written_page(self, done):
        folder, results = done
        assert results["seen"] == [(folder / "report.html").as_uri()]
        page = (folder / "report.html").read_text()
        for name in ("accuracy.png", "models.png"):
            assert f'<img src="{name}"' in page

    def test_the_stages_learn_from_all_passages_and_see_no_label(self, done):
        _, results = done
        assert [name for name, _, _ in results["trained"]] == ["IntermediateStage", *["PredictionStage"] * 2]
        for _, columns, rows in results["trained"]:
            assert "labels" not in columns
            assert rows == results["rows"]["corpus"] > results["rows"]["labelled"]

    def test_report_says_what_was_measured(self, done):
        folder, results = done
        text = (folder / "report.md").read_text()
        teacher = results["accuracy"]["teachers"][0]
        mean = sum(results["accuracy"]["distilled"]) / 2
        row = next(line for line in text.splitlines() if line.startswith("| distilled"))
        assert f"{100 * mean:.1f} ±" in row
        assert f"{100 * mean / teacher:.1f}%" in row
        assert f"{results['speed_up']:.1f}x" in row
        assert f"All students take\n{results['steps']:,} steps" in text
        assert f"The {results['rows']['test']} test passages" in text

    def test_all_students_take_the_same_number_of_steps(self, done):
        _, results = done
        assert [len(runs) for runs in results["curves"].values()] == [2, 2, 1]  # students, by their seeds
        for runs in results["curves"].values():
            assert {points[-1][0] for points in runs} == {results["steps"]}

    def test_the_student_loads(self, done):
        folder, results = done
        student = AutoModelForSequenceClassification.from_pretrained(folder / "student")
        tokenizer = AutoTokenizer.from_pretrained(folder / "student")
        assert student.config.hidden_size == 8
        logits = student(**tokenizer(["Return the sum of two integers."], return_tensors="pt")).logits
        assert logits.shape == (1, len(results["labels"]))

    def test_output_is_not_overwritten(self, done, capsys):
        folder, _ = done
        before = (folder / "report.md").read_bytes()
        assert cli.main(["demo", "--output", str(folder)]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert (folder / "report.md").read_bytes() == before

    def test_a_failure_leaves_no_output(self, tmp_path, monkeypatch):
        def fails(*arguments):
            raise RuntimeError("no teacher")

        monkeypatch.setattr(demo.Demo, "__init__", fails)
        with pytest.raises(RuntimeError, match="no teacher"):
            demo.run(tmp_path / "out", size=TINY)
        assert not (tmp_path / "out").exists()
        with demo.whole_output(tmp_path / "out") as folder:  # the next run can start
            assert list(folder.iterdir()) == []


def test_the_mean_prediction_is_that_of_probabilities(monkeypatch):
    logits = {"sure": [[4.0, 0.0]], "vague": [[0.0, 0.5]]}
    monkeypatch.setattr(demo, "add_teacher_logits", lambda rows, model, *_, **__: {"teacher_logits": logits[model]})
    this = demo.Demo.__new__(demo.Demo)
    this.tokenizer = None
    found = this.predict([None], "sure", "vague").exp()[0].tolist()
    first, other = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(0.5))
    assert found == pytest.approx([(first + other) / 2, 1 - (first + other) / 2], rel=1e-5)


class TestVerdict:
    @staticmethod
    def verdict(distilled, labels):
        return demo.verdict({"accuracy": {"teachers": [0.7], "distilled": distilled, "folded": labels}})

    def test_more_than_two_standard_deviations(self):
        text = self.verdict([0.67, 0.68, 0.69], [0.64, 0.645, 0.65])
        assert "worth 3.5 points" in text
        assert "more than two standard deviations of\n1.0 points" in text

    def test_no_more_than_two_standard_deviations(self):
        for distilled in ([0.665, 0.665, 0.665], [0.60, 0.60, 0.60]):  # a little better, and worse
            assert "does not show that distillation helps" in self.verdict(distilled, [0.64, 0.65, 0.66])


def test_web_page():
    text = "# A < B\n\n| x | y |\n| --- | --- |\n| a \\| b |  |\n\n- **one**\n- `two`\n\n![a plot](p.png)\n\nplain\n"
    page = report.web_page(text)
    assert "<title>A &lt; B</title>" in page
    body = page.split("<body>")[1]
    assert body.split("</body>")[0].strip().split("\n") == [
        "<h1>A &lt; B</h1>",
        "<table><tr><th>x</th><th>y</th></tr><tr><td>a | b</td><td></td></tr></table>",
        "<ul><li><b>one</b></li><li><code>two</code></li></ul>",
        '<p><img src="p.png" alt="a plot"></p>',
        "<p>plain</p>",
    ]


def test_no_browser(monkeypatch, tmp_path, capsys):
    """The page's address is printed where nothing can show it."""
    monkeypatch.setattr(demo.webbrowser, "open", lambda page: False)
    demo.show(tmp_path / "report.html")
    assert (tmp_path / "report.html").as_uri() in capsys.readouterr().out
