"""Runs the command line end to end on tiny models and files; bad input gives one clear line and exit code 2."""

import itertools
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import torch
from _tiny import classifier, config, texts, tokenizer
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

import fastdistill
from fastdistill import cli
from fastdistill.recipes import evaluate
from fastdistill.recipes.glue import get_task
from fastdistill.recipes.options import CacheOptions
from fastdistill.recipes.prepare import cache_teacher

STUDENT = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}


def save(folder, **options):
    model = classifier(**options)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a teacher of SST-2's classes, its data (label 1 if w0..w27 are the majority), a corpus and a config."""
    root = tmp_path_factory.mktemp("cli")
    save(root / "teacher", **get_task("SST-2").model_options())
    data = root / "SST-2"
    data.mkdir()
    for split, rows, seed in (("train", 96, 0), ("dev", 40, 1)):
        lines = ["sentence\tlabel"]
        for text in texts(rows, seed):
            low = [int(word[1:]) < 28 for word in text.split()]
            lines.append(f"{text}\t{int(2 * sum(low) > len(low))}")
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (root / "corpus.txt").write_text("\n".join(texts(200, 2)) + "\n")
    (root / "student.json").write_text(json.dumps(STUDENT))
    return root


def arguments(files, command, output, *more):
    parts = {
        "general": ["--student", files / "student.json", "--corpus", files / "corpus.txt", "--max-length", 24],
        "task": ["--student", files / "student.json", "--task", "sst-2", "--data", files / "SST-2"],
        "finetune": ["--task", "sst-2", "--data", files / "SST-2"],
    }[command]
    first = ["--model", files / "teacher"] if command == "finetune" else ["--teacher", files / "teacher"]
    return [str(part) for part in (command, *first, *parts, "--output", output, *more)]


def fails(capsys, argv, code=2):
    """Runs a command that should fail and returns its error line."""
    capsys.readouterr()
    try:
        found = cli.main([str(part) for part in argv])
    except SystemExit as end:  # argparse
        found = end.code
    error = capsys.readouterr().err
    assert found == code
    lines = [line for line in error.splitlines() if "error:" in line]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


class TestGeneral:
    def test_task_continues_from_the_student_of_general(self, files, tmp_path, capsys):
        options = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 1e-3)
        assert cli.main(arguments(files, "general", tmp_path / "general", *options)) == 0
        assert AutoModel.from_pretrained(tmp_path / "general").config.hidden_size == 8
        log = json.loads((tmp_path / "general" / "trainer_state.json").read_text())
        assert {"embedding", "hidden", "attention"} <= set(
            json.loads((tmp_path / "general/objective.json").read_text())["terms"]
        )
        assert log["global_step"] > 0

        argv = arguments(files, "task", tmp_path / "out", "--prediction-epochs", 1, "--intermediate-epochs", 1)
        argv[argv.index("--student") + 1] = str(tmp_path / "general")
        assert cli.main(argv) == 0
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert student.config.id2label == {0: "negative", 1: "positive"}
        assert student.config.hidden_size == 8

    def test_a_folded_student_starts_with_a_lower_loss(self, files, tmp_path):
        """Compares losses after one tiny step: that of the folded student is far below that of a random one."""
        losses = {}
        for init in ("random", "teacher"):
            options = ("--max-steps", 1, "--learning-rate", 1e-9, "--batch-size", 16, "--init", init)
            assert cli.main(arguments(files, "general", tmp_path / init, *options)) == 0
            state = json.loads((tmp_path / init / "trainer_state.json").read_text())
            losses[init] = state["log_history"][-1]["train_loss"]
        assert losses["teacher"] < 0.6 * losses["random"]

    @pytest.mark.parametrize("command", ["general", "task", "finetune"])
    def test_resuming_a_finished_run_does_nothing(self, files, tmp_path, capsys, command):
        """Chains of jobs resume finished runs; a run killed after its last rename leaves a checkpoint to remove."""
        save(tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").stat()
        (tmp_path / "out" / "checkpoint-5").mkdir()
        assert cli.main(arguments(files, command, tmp_path / "out", "--resume")) == 0
        printed = capsys.readouterr().out
        assert f"finished before: {tmp_path / 'out'}" in printed
        assert "nothing was trained, whatever the options; --overwrite trains again" in printed
        assert not (tmp_path / "out" / "checkpoint-5").exists()
        assert (tmp_path / "out" / "model.safetensors").stat() == before
        assert "is not empty; use --overwrite" in fails(capsys, arguments(files, command, tmp_path / "out"))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").touch()  # a folder without a student
        assert "is not empty" in fails(capsys, arguments(files, command, tmp_path / "mine", "--resume"))

    @pytest.mark.parametrize("command", ["general", "task", "finetune"])
    def test_several_gpus_in_one_process_are_refused_before_anything(
        self, files, tmp_path, capsys, monkeypatch, command
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        line = fails(capsys, arguments(files, command, tmp_path / "out"))
        assert "2 GPUs in one process" in line
        assert "CUDA_VISIBLE_DEVICES=0" in line
        assert not list(tmp_path.iterdir())

    def test_resume_continues_from_the_last_checkpoint(self, files, tmp_path, monkeypatch, capsys):
        from fastdistill.train.trainer import DistillationTrainer

        step = DistillationTrainer.training_step
        options = ("--epochs", 4, "--batch-size", 8, "--save_steps", 5)
        assert cli.main(arguments(files, "general", tmp_path / "whole", *options)) == 0
        argv = arguments(files, "general", tmp_path / "out", *options)
        steps = []

        def interrupted(self, *args, **kwargs):
            steps.append(self.state.global_step)
            if len(steps) == 13:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
        assert cli.main(argv) == 130
        assert "--resume" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        line = fails(capsys, argv)
        assert "--resume" in line
        assert "--overwrite" in line
        assert cli.main([*argv, "--resume"]) == 0
        assert steps[:15] == [*range(13), 10, 11]  # from the checkpoint of step 10
        one, other = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
        for name, x in one.items():
            assert torch.allclose(x, other[name], atol=1e-5), name


class TestTask:
    def test_every_seed_is_in_the_results_and_evaluate_agrees(self, files, tmp_path, capsys):
        options = ("--intermediate-epochs", 1, "--prediction-epochs", 2, "--seeds", 1, 2)
        assert cli.main(arguments(files, "task", tmp_path / "out", *options)) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        (combination,) = results["combinations"]
        assert (combination["learning_rate"], combination["batch_size"]) == (3e-5, 32)  # as published
        assert list(combination["seeds"]) == ["1", "2"]
        scores = [run["metrics"]["dev"]["accuracy"] for run in combination["seeds"].values()]
        assert combination["mean"] == pytest.approx(sum(scores) / 2)
        best = tmp_path / "out" / "runs" / f"rate3e-05-batch32-seed{results['best']['seed']}"
        for folder in (tmp_path / "out", best):
            code = cli.main(
                ["evaluate", "--model", str(folder), "--task", "SST-2", "--data", str(files / "SST-2")]
                + ["--against", str(files / "teacher"), "--json", str(folder / "figures.json")]
            )
            assert code == 0
        figures = json.loads((tmp_path / "out" / "figures.json").read_text())
        student, teacher = figures[str(tmp_path / "out")], figures[str(files / "teacher")]
        assert student["metrics"]["dev"]["accuracy"] == pytest.approx(max(scores))
        assert student["kept"] == pytest.approx(max(scores) / teacher["metrics"]["dev"]["accuracy"])
        assert student["parameters"]["total"] < teacher["parameters"]["total"]
        assert student["speed_up"] > 0

    def test_evaluates_on_the_dev_set_while_it_trains(self, files, tmp_path):
        options = ("--intermediate-epochs", 0, "--prediction-epochs", 1, "--eval_strategy", "steps", "--eval_steps", 2)
        assert cli.main(arguments(files, "task", tmp_path / "out", *options)) == 0
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 3]

    def test_the_python_function_returns_the_results(self, files, tmp_path):
        from fastdistill.recipes import distil_task
        from fastdistill.recipes.options import TaskOptions

        models = {"teacher": str(files / "teacher"), "student": str(files / "student.json")}
        options = TaskOptions(
            **models, task="SST-2", data=files / "SST-2", output=tmp_path / "out", max_steps=1, resume=True
        )
        results = distil_task(options)
        assert results == json.loads((tmp_path / "out" / "results.json").read_text())
        assert distil_task(options) == results  # the second call reads the finished run

    def test_augmented_rows_replace_the_training_set(self, files, tmp_path):
        rows = (files / "SST-2" / "train.tsv").read_text().splitlines()
        (tmp_path / "augmented.tsv").write_text("\n".join(rows[:17]) + "\n")
        options = ("--augmented", tmp_path / "augmented.tsv", "--batch-sizes", 16)
        options += ("--intermediate-epochs", 0, "--prediction-epochs", 3)
        assert cli.main(arguments(files, "task", tmp_path / "out", *options)) == 0
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["global_step"] == 3

    def test_a_killed_search_resumes_to_the_same_results(self, files, tmp_path, monkeypatch):
        from fastdistill.train.stages import IntermediateStage, PredictionStage
        from fastdistill.train.trainer import DistillationTrainer

        options = ("--learning-rates", 1e-3, 1e-2, "--batch-sizes", 16, 32, "--seeds", 1, "--prediction-epochs", 1)
        options += ("--intermediate-epochs", 1, "--intermediate-batch-size", 48)
        stages, step, steps = [], DistillationTrainer.training_step, []
        run = PredictionStage.run

        def noted(stage, *args, **kwargs):
            stages.append((type(stage), stage.learning_rate, stage.batch_size, stage.seed))
            return run(stage, *args, **kwargs)

        def counted(self, *args, **kwargs):
            steps.append(self.args.per_device_train_batch_size)
            if len(steps) == limit:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(IntermediateStage, "run", noted)
        monkeypatch.setattr(PredictionStage, "run", noted)
        monkeypatch.setattr(DistillationTrainer, "training_step", counted)
        limit = None
        assert cli.main(arguments(files, "task", tmp_path / "whole", *options)) == 0
        assert stages[0] == (IntermediateStage, 5e-5, 48, 1)
        grid = [(1e-3, 16), (1e-3, 32), (1e-2, 16), (1e-2, 32)]
        assert stages[1:] == [(PredictionStage, *pair, 1) for pair in grid]
        # 96 rows: 2 steps of 48 in the intermediate stage, 6 of 16, 3 of 32
        expected = [48] * 2 + ([16] * 6 + [32] * 3) * 2
        assert steps == expected

        steps, limit = [], 2 + 6 + 3 + 2  # in the third run
        argv = arguments(files, "task", tmp_path / "out", *options)
        assert cli.main(argv) == 130
        assert not (tmp_path / "out").exists()
        steps, limit = [], None
        assert cli.main([*argv, "--resume"]) == 0
        assert steps == expected[2 + 6 + 3 :]
        one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out"))
        assert one == other
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
        assert all(torch.equal(x, other[name]) for name, x in one.items())

    def test_another_label_order_is_refused(self, files, tmp_path, capsys):
        save(tmp_path / "teacher", num_labels=2, id2label={0: "positive", 1: "negative"})
        argv = arguments(files, "task", tmp_path / "out")
        argv[argv.index("--teacher") + 1] = str(tmp_path / "teacher")
        assert "orders its classes ['positive', 'negative']" in fails(capsys, argv)
        assert not (tmp_path / "out").exists()


class TestMethodsAndAblations:
    @pytest.mark.parametrize(
        ("method", "options"), [("minilm", ["--teacher-layer", 1]), ("minilmv2", ["--relation-heads", 4])]
    )
    def test_both_stages_take_the_method(self, files, tmp_path, method, options):
        options = ("--method", method, *options)
        general = ("--epochs", 1, "--batch-size", 16)
        assert cli.main(arguments(files, "general", tmp_path / "general", *general, *options)) == 0
        stages = ("--intermediate-epochs", 1, "--prediction-epochs", 1)
        argv = arguments(files, "task", tmp_path / "out", *stages, *options)
        argv[argv.index("--student") + 1] = str(tmp_path / "general")
        assert cli.main(argv) == 0
        for folder in (tmp_path / "general", tmp_path / "out" / "intermediate"):
            settings = json.loads((folder / "objective.json").read_text())
            assert settings["method"] == method
            assert settings[options[-2].strip("-").replace("-", "_")] == options[-1]
            assert not (folder / "projections.safetensors").exists()

    def test_stages_switch_from_attention_alone_to_all_terms_and_back(self, files, tmp_path):
        options = ("--max-steps", 2, "--batch-size", 8)
        assert cli.main(arguments(files, "general", tmp_path / "attention", "--terms", "attention", *options)) == 0
        for name, student, terms in (("all", "attention", []), ("again", "all", ["--terms", "attention"])):
            argv = arguments(files, "general", tmp_path / name, *terms, *options)
            argv[argv.index("--student") + 1] = str(tmp_path / student)
            assert cli.main(argv) == 0
            assert (tmp_path / name / "projections.safetensors").exists() == (name == "all")

    def test_the_options_of_the_prediction_reach_its_stage(self, files, tmp_path, capsys):
        options = ("--temperature", 2, "--t-squared", "--divergence", "jsd", "--alpha", 0.5)
        short = ("--intermediate-epochs", 0, "--prediction-epochs", 1, "--max-steps", 1)
        assert cli.main(arguments(files, "task", tmp_path / "out", *short, *options)) == 0
        found = json.loads((tmp_path / "out" / "objective.json").read_text())
        expected = {"temperature": 2.0, "t_squared": True, "divergence": "jsd", "alpha": 0.5}
        assert {name: found[name] for name in expected} == expected
        assert cli.main(arguments(files, "task", tmp_path / "gold", "--labels", "gold", "--alpha", 0.5)) == 2
        assert "--alpha is 0.5; --labels gold has no teacher's predictions" in capsys.readouterr().err
        for name, value in (("--temperature", "2.0"), ("--t-squared", "True"), ("--divergence", "kl")):
            argv = arguments(files, "task", tmp_path / "gold", "--labels", "gold", name, value)
            assert f"{name} is {value}; --labels gold has no teacher's predictions" in fails(capsys, argv)
        with pytest.raises(SystemExit):
            cli.main(arguments(files, "task", tmp_path / "wrong", "--alpha", 1.5))
        assert "--alpha is 1.5; it should be from 0 to 1" in capsys.readouterr().err

    def test_all_terms_in_one_stage(self, files, tmp_path):
        terms = ("embedding", "hidden", "attention", "prediction")
        options = ("--terms", *terms, "--intermediate-epochs", 4, "--prediction-epochs", 0, "--batch-sizes", 8)
        options += ("--intermediate-learning-rate", 3e-3, "--seeds", 1, 2)
        assert cli.main(arguments(files, "task", tmp_path / "out", *options)) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        (combination,) = results["combinations"]
        assert (combination["learning_rate"], list(combination["seeds"])) == (3e-3, ["1", "2"])
        assert not (tmp_path / "out" / "intermediate").exists()
        assert json.loads((tmp_path / "out" / "objective.json").read_text())["terms"] == list(terms)
        runs = sorted((tmp_path / "out" / "runs").iterdir())
        one, other = (AutoModelForSequenceClassification.from_pretrained(run) for run in runs)
        assert not torch.equal(one.classifier.weight, other.classifier.weight)  # the head is trained

    def test_gold_labels_train_as_finetune_does(self, files, tmp_path):
        options = ("--init", "random", "--batch-sizes", 16, "--learning-rates", 1e-3)
        task = ("--labels", "gold", "--intermediate-epochs", 0, "--prediction-epochs", 2)
        assert cli.main(arguments(files, "task", tmp_path / "gold", *task, *options)) == 0
        argv = arguments(files, "finetune", tmp_path / "plain", "--teacher", files / "teacher", *options)
        argv[argv.index("--model") + 1] = str(files / "student.json")
        assert cli.main([*argv, "--epochs", "2"]) == 0
        one, other = (
            AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
            for name in ("gold", "plain")
        )
        assert all(torch.equal(x, other[name]) for name, x in one.items())

    def test_bad_combinations_are_refused(self, files, tmp_path, capsys):
        def line(*options, command="task"):
            found = fails(capsys, arguments(files, command, tmp_path / "out", *options))
            assert list(tmp_path.iterdir()) == []
            return found

        assert "add prediction to --terms" in line("--prediction-epochs", 0)
        joint = ("--prediction-epochs", 0, "--terms", "attention", "prediction")
        assert "leave --intermediate-epochs above 0" in line(*joint, "--intermediate-epochs", 0)
        assert "--labels gold is for the prediction stage" in line(*joint, "--labels", "gold")
        for flag, value in (("--intermediate-learning-rate", 1e-3), ("--terms", "hidden"), ("--projection", "shared")):
            assert f"{flag} is " in (found := line("--intermediate-epochs", 0, flag, value))
            assert "which --intermediate-epochs 0 leaves out: leave one out" in found
        twice = ("--learning-rates", 1e-3, "--intermediate-learning-rate", 1e-3)
        assert "--learning-rates is for the same stage, the only one: leave one out" in line(*joint, *twice)
        assert "those of method 'minilm'" in line("--method", "minilm", "--terms", "hidden")
        unmapped = ("--method", "minilm", "--layer-map", "top", "--init", "random")
        assert "--layer-map is top; method minilm compares last layers" in line(*unmapped)
        assert "--relation-heads is 4" in line("--relation-heads", 4, command="general")
        assert "parity is 'official'" in line("--method", "minilm", "--parity", "official")
        assert "invalid choice: 'prediction'" in line("--terms", "prediction", command="general")
        (files / "wide.json").write_text(json.dumps({**STUDENT, "num_attention_heads": 2}))
        argv = arguments(files, "general", tmp_path / "out", "--init", "random")
        argv[argv.index("--student") + 1] = str(files / "wide.json")
        assert "use --method minilmv2" in fails(capsys, argv)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"task": "MRPC", "max_length": 9}, "max_length is 9; with --task that says how rows are read"),
        ({"task": "MRPC", "assistant_only": True}, "assistant_only is True; with --task that says"),
        ({"hidden": [0], "completion_only": False}, "completion_only is False; plain text has no prompts"),
    ],
)
def test_a_cache_refuses_what_its_rows_do_not_have(tmp_path, options, what):
    with pytest.raises(ValueError, match=what):
        cache_teacher(CacheOptions(teacher="none", data=[tmp_path / "x.txt"], output=tmp_path / "out", **options))


class TestFinetune:
    def test_finetune_trains_a_teacher_and_a_student(self, files, tmp_path):
        options = ("--epochs", 8, "--learning-rates", 3e-3, "--batch-sizes", 16)
        assert cli.main(arguments(files, "finetune", tmp_path / "teacher", *options)) == 0
        results = json.loads((tmp_path / "teacher" / "results.json").read_text())
        assert results["best"]["score"] > 0.6  # the word counts can be learnt

        argv = arguments(files, "finetune", tmp_path / "student", "--teacher", tmp_path / "teacher", "--init", "random")
        argv[argv.index("--model") + 1] = str(files / "student.json")
        assert cli.main([*argv, "--epochs", "1"]) == 0
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
        assert student.config.hidden_size == 8
        assert student.config.id2label == {0: "negative", 1: "positive"}

    def test_a_seed_determines_the_new_head(self, files, tmp_path):
        classifier().bert.save_pretrained(tmp_path / "bert")
        tokenizer().save_pretrained(tmp_path / "bert")
        heads = []
        for output in (tmp_path / "first", tmp_path / "second"):
            argv = arguments(files, "finetune", output, "--max-steps", 1, "--seeds", 1)
            argv[argv.index("--model") + 1] = str(tmp_path / "bert")
            assert cli.main(argv) == 0
            heads.append(load_file(output / "model.safetensors")["classifier.weight"])
        assert torch.equal(*heads)

    def test_finetune_runs_in_bf16(self, files, tmp_path):
        assert cli.main(arguments(files, "finetune", tmp_path / "out", "--max-steps", 2, "--bf16")) == 0


class TestBadInput:
    def test_output_is_not_overwritten(self, files, tmp_path, capsys):
        for command in ("general", "task", "finetune"):
            output = tmp_path / command
            output.mkdir()
            (output / "mine").write_text("kept")
            line = fails(capsys, arguments(files, command, output))
            assert line.startswith(f"fastdistill {command}: error: ")
            assert "--overwrite" in line
            assert (output / "mine").read_text() == "kept"
            assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(command)) == [command]

    @pytest.mark.parametrize(
        ("wrong", "what"),
        [
            (["--layer-map", "0,5"], "layer_map[1] is 5"),
            (["--student", "{}/narrow.json"], "head"),
            (["--student", "{}/none.json"], "none.json"),
            (["--temperature", "inf"], "--temperature is inf; it should be a number above 0"),
            (["--student", "{}/text.json"], "text.json"),
            (["--student", "{}/flat.json"], "flat.json: num_hidden_layers is 0; it should be 1 or more"),
            (
                ["--student", "{}/short.json"],
                "the student takes 20 tokens at most; rows of SST-2 are cut to 64. Give it",
            ),
        ],
    )
    def test_a_refused_task_keeps_an_interrupted_run(self, files, tmp_path, capsys, wrong, what):
        (tmp_path / "narrow.json").write_text(json.dumps({**STUDENT, "hidden_size": 9}))
        (tmp_path / "text.json").write_text(json.dumps({**STUDENT, "num_hidden_layers": "1"}))
        (tmp_path / "flat.json").write_text(json.dumps({**STUDENT, "num_hidden_layers": 0}))
        (tmp_path / "short.json").write_text(json.dumps({**STUDENT, "max_position_embeddings": 20}))
        (tmp_path / "out.partial" / "runs").mkdir(parents=True)
        wrong = [part.format(tmp_path) for part in wrong]
        assert what in fails(capsys, arguments(files, "task", tmp_path / "out", "--overwrite", *wrong))
        assert (tmp_path / "out.partial" / "runs").is_dir()

    def test_a_corpus_without_text_is_refused(self, files, tmp_path, capsys):
        (tmp_path / "empty.txt").touch()
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
        for name, what in (("empty.txt", "corpus holds no text"), ("latin.txt", "latin.txt; it should be UTF-8 text")):
            argv = arguments(files, "general", tmp_path / "out", "--corpus", tmp_path / name)
            assert what in fails(capsys, argv)

    def test_evaluate_writes_figures(self, files, tmp_path, capsys, monkeypatch):
        """A teacher that scores below zero has no share to keep; a folder for --json is refused before any work."""
        task = ["--task", "sst-2", "--data", str(files / "SST-2")]
        argv = ["evaluate", "--model", str(files / "teacher"), "--against", str(files / "teacher"), *task, "--json"]
        monkeypatch.setattr(evaluate, "metrics", lambda *_: {"dev": {"accuracy": -0.1, "score": -0.1}})
        assert cli.main([*argv, str(tmp_path / "new" / "figures.json")]) == 0
        assert json.loads((tmp_path / "new" / "figures.json").read_text())[str(files / "teacher")]["kept"] is None
        assert "--json is the folder" in fails(capsys, [*argv, str(tmp_path), "--overwrite"])

    def test_a_refused_finetune_keeps_an_interrupted_run(self, files, tmp_path, capsys):
        (tmp_path / "narrow.json").write_text(json.dumps({**STUDENT, "hidden_size": 9}))
        (tmp_path / "out.partial" / "runs").mkdir(parents=True)
        options = ["--teacher", files / "teacher", "--model", tmp_path / "narrow.json"]  # the last --model counts
        assert "head" in fails(capsys, arguments(files, "finetune", tmp_path / "out", "--overwrite", *options))
        assert (tmp_path / "out.partial" / "runs").is_dir()

    def test_an_unknown_task_is_refused(self, files, tmp_path, capsys):
        argv = ["evaluate", "--model", files / "teacher", "--task", "snli", "--data", files / "SST-2"]
        assert "task is 'snli'; it should be one of CoLA" in fails(capsys, argv)

    def test_blocks_longer_than_the_models_take_are_refused(self, files, tmp_path, capsys):
        argv = arguments(files, "general", tmp_path / "out", "--max-length", 1000)
        assert "--max-length is 1000; the teacher takes" in fails(capsys, argv)
        assert not (tmp_path / "out").exists()

    def test_missing_files_and_folders_are_named(self, files, tmp_path, capsys):
        evaluate = ["evaluate", "--task", "sst-2"]
        data = ["--data", files / "SST-2"]
        assert "no config.json" in fails(capsys, [*evaluate, "--model", files / "SST-2", *data])
        assert "no such folder" in fails(capsys, [*evaluate, "--model", tmp_path / "nowhere", *data])
        line = fails(capsys, [*evaluate, "--model", files / "teacher", "--data", tmp_path])
        assert "dev.tsv: no such file" in line
        argv = arguments(files, "general", tmp_path / "out")
        argv[argv.index("--corpus") + 1] = str(tmp_path / "nowhere.txt")
        assert "nowhere.txt: no such file" in fails(capsys, argv)
        assert list(tmp_path.iterdir()) == []

    def test_bad_layer_maps_are_refused_and_good_ones_saved(self, files, tmp_path, capsys):
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--layer-map", "0,x"))
        assert "--layer-map is '0,x'" in line
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--layer-map", "middle"))
        assert "--layer-map is 'middle'" in line
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--layer-map", "0,9"))
        assert "0..2" in line
        argv = arguments(files, "general", tmp_path / "out", "--max-steps", 1, "--layer-map=-,2", "--terms", "hidden")
        assert cli.main([*argv, "--batch-size", "8"]) == 0
        settings = json.loads((tmp_path / "out" / "objective.json").read_text())
        assert settings["layer_map"] == [None, 2]

    def test_a_malformed_line_is_named(self, files, tmp_path, capsys):
        for split in ("train", "dev"):
            (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\nbroken\n")
        argv = ["evaluate", "--model", files / "teacher", "--task", "sst-2", "--data", tmp_path]
        assert "dev.tsv:3: 1 columns" in fails(capsys, argv)

    def test_another_vocabulary_is_refused(self, files, tmp_path, capsys):
        (tmp_path / "student.json").write_text(json.dumps({**STUDENT, "vocab_size": 59}))
        argv = arguments(files, "general", tmp_path / "out")
        argv[argv.index("--student") + 1] = str(tmp_path / "student.json")
        assert "the student's vocabulary 59, the teacher's 60" in fails(capsys, argv)

    def test_an_unknown_student_is_refused(self, files, tmp_path, capsys, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("no network")

        monkeypatch.setattr("fastdistill.train.students.load_checkpoint", offline)
        argv = arguments(files, "general", tmp_path / "out", "--student", "tinybert-4l")
        line = fails(capsys, argv)
        assert "tinybert-4l: no preset (tinybert-4l-312, tinybert-6l-768), no file, and no checkpoint: no net" in line
        monkeypatch.setattr("fastdistill.train.checkpoints.load_checkpoint", offline)
        argv = ["evaluate", "--model", "studnet", "--task", "sst-2", "--data", files / "SST-2"]
        assert "studnet: no such folder, and not read from the hub: no network" in fails(capsys, argv)

    def test_errors_suggest_flags(self, files, tmp_path, capsys):
        (tmp_path / "student.json").write_text(json.dumps({**STUDENT, "num_attention_heads": 1}))
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--student", tmp_path / "student.json"))
        assert "for --init teacher it should be the teacher's 4. Change it, or use --init random" in line

    def test_argparse_errors_name_the_command(self, capsys):
        assert "required: --teacher" in fails(capsys, ["general"])
        assert "invalid choice: 'distil'" in fails(capsys, ["distil"])

    @pytest.mark.parametrize(
        ("command", "flag", "value", "what"),
        [
            ("general", "--batch-size", "0", "--batch-size is 0; it should be a positive integer"),
            ("general", "--batch-size", "-3", "--batch-size is -3; it should be a positive integer"),
            ("general", "--batch-size", "1.5", "argument --batch-size: invalid int value: '1.5'"),
            ("general", "--epochs", "0", "--epochs is 0.0; it should be a number above 0"),
            ("general", "--learning-rate", "nan", "--learning-rate is nan; it should be a number above 0"),
            ("general", "--warmup", "10", "--warmup is 10.0; it should be 0 or more, and less than 1"),
            ("general", "--max-length", "0", "--max-length is 0; it should be a positive integer"),
            ("finetune", "--epochs", "inf", "--epochs is inf; it should be a number above 0"),
            ("finetune", "--max-steps", "0", "--max-steps is 0; it should be a positive integer"),
            ("task", "--intermediate-learning-rate", "0", "--intermediate-learning-rate is 0.0; it should be a number"),
            ("task", "--intermediate-batch-size", "0", "--intermediate-batch-size is 0; it should be a positive"),
            ("task", "--intermediate-epochs", "-1", "--intermediate-epochs is -1.0; it should be 0 or more"),
            ("task", "--prediction-epochs", "few", "argument --prediction-epochs: invalid float value: 'few'"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, files, tmp_path, capsys, command, flag, value, what):
        line = fails(capsys, arguments(files, command, tmp_path / "out", flag, value))
        assert what in line
        assert list(tmp_path.iterdir()) == []

    def test_bad_grids_and_seeds_are_refused(self, files, tmp_path, capsys):
        line = fails(capsys, arguments(files, "task", tmp_path / "out", "--learning-rates", "1e-5", "0"))
        assert "--learning-rates is [1e-05, 0.0]; it should be a number above 0" in line
        line = fails(capsys, arguments(files, "finetune", tmp_path / "out", "--seeds", "1", "1"))
        assert "seeds is [1, 1]" in line
        for command, flag in (("task", "--seeds"), ("general", "--seed")):
            for wrong in ("-1", str(2**32)):
                line = fails(capsys, arguments(files, command, tmp_path / "out", f"{flag}={wrong}"))
                assert (
                    f"{flag} is {[int(wrong)] if flag == '--seeds' else wrong}; it should be from 0 to 2**32 - 1"
                    in line
                )
        assert list(tmp_path.iterdir()) == []

    def test_a_checkpoint_of_other_labels_gets_a_new_head(self, files, tmp_path):
        """Models of RTE, MRPC and STS-B often start from one of MNLI, which has three classes."""
        other = save(tmp_path / "other", num_labels=3)
        for command, flag in (("finetune", "--model"), ("task", "--student")):
            options = (flag, tmp_path / "other", "--max-steps", 1, "--learning-rates", 1e-9)
            assert cli.main(arguments(files, command, tmp_path / command, *options)) == 0
            found = AutoModelForSequenceClassification.from_pretrained(tmp_path / command)
            assert found.config.num_labels == 2
            if command == "finetune":
                weights = found.bert.state_dict()
                assert all(torch.allclose(x, weights[name]) for name, x in other.bert.state_dict().items())

    def test_a_student_of_a_teacher_without_labels_gets_those_of_the_task(self, files, tmp_path):
        """A plain BERT has no labels, so the student gets those of the task: here the one score of STS-B."""
        AutoModel.from_config(config("bert")).save_pretrained(tmp_path / "teacher")
        tokenizer().save_pretrained(tmp_path / "teacher")
        (tmp_path / "STS-B").mkdir()
        rows = "".join(f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(itertools.pairwise(texts(40, 3))))
        for split in ("train", "dev"):
            (tmp_path / "STS-B" / f"{split}.tsv").write_text("sentence1\tsentence2\tscore\n" + rows)
        argv = ["finetune", "--model", files / "student.json", "--teacher", tmp_path / "teacher", "--task", "STS-B"]
        argv += ["--data", tmp_path / "STS-B", "--max-steps", 1, "--output", tmp_path / "out"]
        assert cli.main([str(part) for part in argv]) == 0
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
        assert (found.num_labels, found.problem_type) == (1, "regression")

    def test_a_checkpoint_that_does_not_fit_its_config_is_refused(self, files, tmp_path, capsys):
        save(tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        line = fails(capsys, arguments(files, "finetune", tmp_path / "out", "--model", tmp_path / "other"))
        assert "bert.encoder.layer.0.intermediate.dense.bias is (32,), and by its config (40,)" in line
        save(tmp_path / "three", num_labels=3)
        text = (tmp_path / "three" / "config.json").read_text()
        (tmp_path / "three" / "config.json").write_text(json.dumps({**json.loads(text), "id2label": {0: "a", 1: "b"}}))
        line = fails(capsys, arguments(files, "task", tmp_path / "out", "--teacher", tmp_path / "three"))
        assert "classifier.bias is (3,), and by its config (2,)" in line  # no options ask for a new head

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            (("--init", "random"), "--init is random; it is what to take of a teacher's weights"),
            (("--layer-map", "top"), "--layer-map is top; it is what to take of a teacher's weights"),
            (("--teacher", "x", "--init", "random", "--layer-map", "top"), "--layer-map is top; --init random"),
        ],
    )
    def test_options_of_a_teacher_without_its_weights_are_refused(self, files, tmp_path, capsys, options, what):
        assert what in fails(capsys, arguments(files, "finetune", tmp_path / "out", *options))


# The flags of each command; ! marks the required ones.
FLAGS = {
    "demo": "output overwrite open",
    "general": (
        "teacher! student! init corpus! max-length streaming packing method layer-map projection parity terms "
        "teacher-layer relation-heads epochs batch-size learning-rate seed bf16 max-steps trust-remote-code "
        "output! overwrite resume"
    ),
    "augment": (
        "teacher! task! data glove! output! copies candidates probability legacy seed batch-size bf16 "
        "overwrite resume trust-remote-code"
    ),
    "task": (
        "teacher! student! init task! data augmented method layer-map projection parity terms teacher-layer "
        "relation-heads temperature t-squared divergence alpha labels "
        "intermediate-epochs intermediate-learning-rate intermediate-batch-size "
        "prediction-epochs learning-rates batch-sizes seeds bf16 max-steps trust-remote-code output! "
        "overwrite resume"
    ),
    "cache": (
        "teacher! data! task top-k hidden max-length completion-only assistant-only batch-size bf16 trust-remote-code "
        "output! overwrite resume"
    ),
    "lm": (
        "teacher student! init cache teacher-dtype dataset dataset-config split eval eval-split max-length "
        "completion-only assistant-only packing on-policy divergence temperature t-squared alpha beta reverse skew "
        "vocab-size lora lora-alpha lora-dropout lora-targets epochs batch-size learning-rate seed bf16 max-steps "
        "trust-remote-code output! overwrite resume"
    ),
    "train-cached": (
        "cache! student! teacher init terms layer-map projection temperature t-squared divergence alpha tail "
        "scores verify workers epochs batch-size learning-rate seed bf16 max-steps trust-remote-code output! overwrite "
        "resume"
    ),
    "finetune": (
        "model! teacher init layer-map task! data epochs learning-rates batch-sizes seeds bf16 max-steps "
        "trust-remote-code output! overwrite resume"
    ),
    "evaluate": "model! against task! data json overwrite trust-remote-code",
    "info": "",
}
# The defaults of the flags that have one.
DEFAULTS = {
    "demo": {"output": "demo-output"},
    "general": {
        "max_length": 128,
        "method": "tinybert",
        "layer_map": "uniform",
        "parity": "masked",
        "epochs": 3,
        "batch_size": 256,
        "learning_rate": 5e-05,
        "seed": 42,
    },
    "augment": {"candidates": 15, "probability": 0.4, "seed": 42, "batch_size": 64},
    "task": {
        "method": "tinybert",
        "layer_map": "uniform",
        "parity": "masked",
        "temperature": 1.0,
        "divergence": "soft_cross_entropy",
        "alpha": 1.0,
        "seeds": [42],
    },
    "cache": {"batch_size": 16},
    "lm": {
        "teacher_dtype": "auto",
        "split": "train",
        "divergence": "kl",
        "temperature": 1.0,
        "alpha": 1.0,
        "beta": 0.5,
        "skew": 0.0,
        "lora_dropout": 0.0,
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 2e-05,
        "seed": 42,
    },
    "train-cached": {
        "layer_map": "uniform",
        "temperature": 1.0,
        "divergence": "soft_cross_entropy",
        "alpha": 1.0,
        "tail": "renormalize",
        "scores": "gold",
        "epochs": 3,
        "batch_size": 256,
        "learning_rate": 5e-05,
        "seed": 42,
    },
    "finetune": {"layer_map": "uniform", "epochs": 3, "learning_rates": [3e-05], "batch_sizes": [32], "seeds": [42]},
}


class TestFlags:
    @pytest.mark.parametrize("command", list(FLAGS))
    def test_names_defaults_and_required_flags_are_those_listed(self, command):
        parser = cli.flags_of(command, kind := cli.COMMANDS[command][0])
        found = {action.dest: action.required for action in parser._actions if action.dest not in ("help", "config")}
        expected = {flag.rstrip("!").replace("-", "_"): flag.endswith("!") for flag in FLAGS[command].split()}
        schedule = {"warmup": False, "scheduler": False, "weight_decay": False}  # options of the Python API
        assert found == {**expected, **(schedule if command in ("general", "train-cached", "lm") else {})}
        for field in fields(kind):
            if expected.get(field.name) is False:
                default = field.default if field.default_factory is MISSING else field.default_factory()
                default = str(default) if isinstance(default, Path) else default
                given = DEFAULTS.get(command, {})
                assert default == given[field.name] if field.name in given else default in (None, False, -1, [])

    def test_both_spellings_and_booleans_are_accepted(self, files, tmp_path):
        for flags in (
            ("--batch-size", "8", "--streaming", "--max-steps", "3"),
            ("--batch_size=8", "--streaming", "true", "--max_steps", "3"),
            ("--per_device_train_batch_size", "8", "--streaming", "yes", "--max-steps", "3"),
        ):
            _, options = cli.parse(arguments(files, "general", tmp_path, *flags))
            assert (options.batch_size, options.streaming, options.max_steps) == (8, True, 3)
        with pytest.raises(SystemExit):
            cli.parse(arguments(files, "general", tmp_path, "--batch", "8"))  # abbreviations are refused

    def test_training_arguments_reach_the_trainer(self, files, tmp_path, monkeypatch):
        from fastdistill.train.trainer import DistillationTrainer

        seen, step = [], DistillationTrainer.training_step

        def noted(self, *args, **kwargs):
            seen.append(self.args)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "training_step", noted)
        flags = ("--gradient_accumulation_steps", 2, "--save-strategy", "no", "--no_dataloader_pin_memory")
        own = ("--max-steps", 1, "--batch-size", 8, "--lr_scheduler_type", "constant")
        assert cli.main(arguments(files, "general", tmp_path / "out", *flags, *own)) == 0
        assert len(seen) == 2  # one optimiser step
        assert (seen[0].gradient_accumulation_steps, seen[0].save_strategy) == (2, "no")
        assert (seen[0].lr_scheduler_type, seen[0].dataloader_pin_memory) == ("constant", False)

    def test_only_given_training_arguments_are_passed_on(self, files, tmp_path):
        flags = ("--report_to", "wandb", "--bf16", "--gradient_checkpointing", "--eval_steps", 5, "--push_to_hub")
        _, options = cli.parse(arguments(files, "task", tmp_path / "out", *flags))
        expected = {"report_to": "wandb", "gradient_checkpointing": True, "eval_steps": 5, "push_to_hub": True}
        assert options.arguments == expected
        assert options.bf16 is True
        from fastdistill.recipes.distil import trainer_arguments

        found = trainer_arguments(options)
        assert (found["report_to"], found["hub_model_id"]) == ("wandb", "out")  # not the working folder's name

    @pytest.mark.parametrize(
        ("command", "flags", "what"),
        [
            ("general", ("--output_dir", "x"), "this command sets --output_dir itself; use --output"),
            ("task", ("--learning_rate", "1e-5"), "sets --learning_rate itself; use --learning-rates"),
            ("task", ("--num-train-epochs", "1"), "use --intermediate-epochs and --prediction-epochs"),
            ("finetune", ("--seed", "1"), "this command sets --seed itself; use --seeds"),
            ("finetune", ("--learnin_rates", "1"), "unrecognized arguments: --learnin_rates 1"),
            ("general", ("--eval_delay", "x"), "argument --eval_delay/--eval-delay: invalid float value: 'x'"),
            ("finetune", ("--eval_strategy", "steps"), "--eval_strategy is for task and lm"),
            ("general", ("stray",), "unrecognized arguments: stray"),
        ],
    )
    def test_bad_values_are_refused(self, files, tmp_path, capsys, command, flags, what):
        assert what in fails(capsys, arguments(files, command, tmp_path / "out", *flags))
        assert not list(tmp_path.iterdir())

    def test_bf16_without_cpu_instructions_gives_a_warning(self, files, tmp_path, capsys, monkeypatch):
        (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f\n")
        monkeypatch.setattr(cli, "CPUINFO", tmp_path / "cpuinfo")
        options = cli.parse(arguments(files, "finetune", tmp_path / "out", "--bf16"))[1]
        for flags, warnings in (("avx2 avx512f", not torch.accelerator.is_available()), ("avx512_bf16", 0)):
            (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
            cli.warn_of_slow_bf16(options)
            assert capsys.readouterr().err.count("float32 is faster") == warnings

    def test_version_is_printed(self, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out.strip() == f"fastdistill {fastdistill.__version__}"


class TestConfig:
    def parse(self, files, tmp_path, text, *flags):
        (tmp_path / "run.yaml").write_text(text)
        return cli.parse(arguments(files, "general", tmp_path / "out", "--config", tmp_path / "run.yaml", *flags))[1]

    def test_flags_win_over_the_file_and_the_file_over_defaults(self, files, tmp_path):
        text = "batch-size: 8\nepochs: 2\nlearning_rate: 1e-3\nterms: [hidden, attention]\nstreaming: false\n"
        text += "layer_map: '-,2'\nseed:\ngradient_accumulation_steps: 4\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        options = self.parse(files, tmp_path, text, "--epochs", 5, "--terms", "embedding")
        assert (options.batch_size, options.epochs, options.learning_rate) == (8, 5, 1e-3)
        assert (options.terms, options.layer_map, options.seed) == (["embedding"], "-,2", 42)
        kwargs = options.arguments.pop("lr_scheduler_kwargs")
        assert (json.loads(kwargs), options.arguments) == ({"num_cycles": 2}, {"gradient_accumulation_steps": 4})
        options = self.parse(files, tmp_path, "num_train_epochs: 2\n", "--epochs", 5)
        assert options.epochs == 5

    def test_required_flags_may_come_from_the_file(self, files, tmp_path):
        values = {"teacher": "t", "student": "s", "corpus": ["a b.txt", "c.txt"], "output": "out", "overwrite": True}
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        _, options = cli.parse(["general", "--config", str(tmp_path / "run.yaml")])
        assert (options.corpus, options.output, options.overwrite) == (["a b.txt", "c.txt"], Path("out"), True)

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("learnin_rate: 1", "unrecognized arguments: --learnin_rate=1"),
            ("batch_size: 0", "--batch-size is 0; it should be a positive integer"),
            ("method: bert", "argument --method: invalid choice: 'bert'"),
            ("output_dir: x", "this command sets --output_dir itself; use --output"),
            ("- a", "run.yaml: it should hold options, such as `batch_size: 32`, a line each"),
            ("a: [", "run.yaml: not YAML"),
        ],
    )
    def test_bad_values_are_refused(self, files, tmp_path, capsys, text, what):
        (tmp_path / "run.yaml").write_text(text)
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--config", tmp_path / "run.yaml"))
        assert what in line

    def test_a_missing_file_is_refused(self, files, tmp_path, capsys):
        line = fails(capsys, arguments(files, "general", tmp_path / "out", "--config", tmp_path / "none.yaml"))
        assert "No such file or directory" in line
        assert "none.yaml" in line
        assert "--config" in fails(capsys, ["evaluate", "--model", "m", "--task", "t", "--config", "x"])


class TestHelpAndInfo:
    def test_info_runs_on_a_base_install_and_gives_each_reason_once(self):
        code = (
            "import sys\n"
            "for name in ('transformers', 'datasets', 'accelerate', 'rich', 'yaml'): sys.modules[name] = None\n"
            "from fastdistill import cli\n"
            "raise SystemExit(cli.main(['info']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "linear_kl_div" in done.stdout
        whys = [line for line in done.stdout.splitlines() if line.startswith("  backend ")]
        assert len(whys) == len(set(whys))

    @pytest.mark.parametrize("command", ["general", "task", "finetune", "evaluate", "info", "demo"])
    def test_help_names_the_command(self, command, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: fastdistill {command}" in capsys.readouterr().out

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys, contextlib\n"
            # transformers may be imported: its argument parser reads the flags, and it loads no torch
            "heavy = {'torch', 'datasets', 'accelerate', 'triton', 'rich'}\n"
            "from fastdistill import cli\n"
            "with contextlib.suppress(SystemExit): cli.main(['task', '--help'])\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_info_names_every_op_and_its_backend(self, capsys):
        from fastdistill import functional

        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        for op in functional.__all__:
            assert op in out
        assert "cpu" in out
        assert torch.__version__.split("+")[0] in out


@pytest.mark.slow
def test_two_processes_write_one_output(files, tmp_path):
    argv = arguments(files, "task", tmp_path / "out", "--intermediate-epochs", 1, "--prediction-epochs", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastdistill.cli"]
    done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.hidden_size == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Path(tmp_path / "out" / "results.json").is_file()
    assert done.stdout.count("best: learning rate 3e-05") == done.stdout.count("wrote ") == 1
