"""Tests the stages: data, the recipe's defaults, complete outputs, resuming, and precomputed teacher logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.utils import logging as hf_logging

from fastdistill.train.data import add_teacher_logits, pack_corpus
from fastdistill.train.objective import Objective
from fastdistill.train.resumable import EpochSampler, training_arguments
from fastdistill.train.stages import GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.trainer import DistillationTrainer

QUICK = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 2}


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives each test an empty cache, since data sets read from files are cached by their content."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


def write_corpus(folder: Path, rows: int = 60) -> Path:
    path = folder / "corpus.txt"
    path.write_text("\n\n".join(_tiny.texts(rows)) + "\n")
    return path


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def prediction_stage(**options: Any) -> PredictionStage:
    return PredictionStage(**{"dataset": _tiny.dataset(), "epochs": 2, "batch_size": 8, "arguments": QUICK, **options})


class StopAt(TrainerCallback):
    """Interrupts training after `step` steps, as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# -- data ----------------------------------------------------------------------------------------------------


def test_a_corpus_is_packed_into_full_blocks_in_order(tmp_path: Path) -> None:
    tokenizer = _tiny.tokenizer()
    blocks = pack_corpus([write_corpus(tmp_path)], tokenizer, max_length=16)
    stream = [token for text in _tiny.texts(60) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert [row[0] for row in blocks["input_ids"]] == [2] * len(blocks)
    assert [row[-1] for row in blocks["input_ids"]] == [3] * len(blocks)
    assert [token for row in blocks["input_ids"] for token in row[1:-1]] == stream
    assert blocks["length"] == [16] * (len(stream) // 14) + [len(stream) % 14 + 2]
    again = pack_corpus(Dataset.from_dict({"text": [*_tiny.texts(60), "", " "]}), tokenizer, max_length=16)
    assert again["input_ids"] == blocks["input_ids"]
    assert pack_corpus(blocks, tokenizer)["input_ids"] == blocks["input_ids"]


def test_bad_corpora_are_refused(tmp_path: Path) -> None:
    tokenizer = _tiny.tokenizer()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file"):
        pack_corpus(["nowhere.txt"], tokenizer)
    with pytest.raises(FileNotFoundError, match="a folder; the corpus is made of text files"):
        pack_corpus([tmp_path], tokenizer)
    with pytest.raises(ValueError, match="should be a non-empty list of text files"):
        pack_corpus([], tokenizer)
    with pytest.raises(ValueError, match=r"corpus is 'a\.txt'"):
        pack_corpus("a.txt", tokenizer)
    with pytest.raises(ValueError, match="leave no room for text"):
        pack_corpus([write_corpus(tmp_path)], tokenizer, max_length=2)
    with pytest.raises(ValueError, match="corpus holds no text"):
        pack_corpus(Dataset.from_dict({"text": ["", "  "]}), tokenizer)


def test_each_row_gets_its_own_teacher_logits() -> None:
    rows, teacher = _tiny.dataset(20), _tiny.classifier(4, 24).train()
    cached = add_teacher_logits(rows, teacher, _tiny.tokenizer(), batch_size=6)
    assert not teacher.training
    assert cached["input_ids"] == rows["input_ids"]
    for row, logits in zip(rows, cached["teacher_logits"], strict=True):
        with torch.no_grad():
            assert error(torch.tensor(logits), teacher(torch.tensor([row["input_ids"]])).logits[0]) < 1e-5
    assert add_teacher_logits(cached, teacher, _tiny.tokenizer()).column_names == cached.column_names
    autocast = add_teacher_logits(rows, teacher, _tiny.tokenizer(), bf16=True)
    exact, rounded = (torch.tensor(dataset["teacher_logits"][:]) for dataset in (cached, autocast))
    assert 1e-5 < error(rounded, exact) < 0.02  # a few roundings to bfloat16's 8 bits
    with pytest.raises(ValueError, match="needs a sequence classifier"):
        add_teacher_logits(rows, _tiny.model(), _tiny.tokenizer())


# -- defaults ------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_recipe() -> None:
    rows = _tiny.dataset(2)
    stages = (GeneralStage(corpus=rows), IntermediateStage(dataset=rows), PredictionStage(dataset=rows))
    found = [(s.epochs, s.batch_size, s.learning_rate, s.warmup, s.scheduler, s.weight_decay) for s in stages]
    assert found == [
        (3, 256, 5e-5, 0.1, "linear", 0.01),
        (20, 32, 5e-5, 0.0, "constant", 0.01),
        (3, 32, 3e-5, 0.1, "linear", 0.01),
    ]
    assert [s.terms for s in stages] == [None, None, ("prediction",)]  # None: all inner terms
    assert stages[0].max_length == 128


def test_arguments_override_attributes(tmp_path: Path) -> None:
    stage = prediction_stage(learning_rate=1.0, arguments={**QUICK, "learning_rate": 2e-3, "max_steps": 1})
    stage.run(_tiny.classifier(), _tiny.classifier(4, 24), _tiny.tokenizer(), tmp_path / "out")
    assert history(tmp_path / "out")[-1]["step"] == 1
    assert training_arguments(tmp_path, stage).learning_rate == 2e-3
    with pytest.raises(ValueError, match=r"^warmup is 10; it should be a share of the steps.*warmup_steps"):
        training_arguments(tmp_path, prediction_stage(warmup=10))


def trainer_of(stage: PredictionStage, folder: Path) -> DistillationTrainer:
    return DistillationTrainer(
        _tiny.classifier(),
        None,
        Objective(_tiny.config(layers=2), terms=("prediction",)),
        training_arguments(folder, stage),
        processing_class=_tiny.tokenizer(),
        train_dataset=stage.prepare(_tiny.tokenizer()),
    )


def share_of_padding(stage: PredictionStage, folder: Path) -> float:
    batches = trainer_of(stage, folder).get_train_dataloader()
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    return sum(int((1 - mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_rows_of_similar_length_share_a_batch(tmp_path: Path) -> None:
    rows = _tiny.dataset(600)
    mixed = prediction_stage(dataset=rows, arguments={**QUICK, "train_sampling_strategy": "random"})
    assert share_of_padding(mixed, tmp_path) > 0.2
    assert share_of_padding(prediction_stage(dataset=rows), tmp_path) < 0.04


def test_lengths_are_read_once_an_epoch_not_row_by_row(tmp_path: Path) -> None:
    """A column of a data set is lazy: each lookup decodes a row of Arrow, which takes 25 us or more."""
    sampler = trainer_of(prediction_stage(dataset=_tiny.dataset(600)), tmp_path)._get_train_sampler()
    assert isinstance(sampler, EpochSampler)
    assert type(sampler.sampler.lengths) is list
    assert {type(length) for length in sampler.sampler.lengths} == {int}


# -- runs ----------------------------------------------------------------------------------------------------


def test_three_stages_in_a_row_learn_and_write_complete_outputs(tmp_path: Path) -> None:
    tokenizer, rows = _tiny.tokenizer(), _tiny.dataset()
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24, seed=1)
    general = GeneralStage(
        corpus=[write_corpus(tmp_path)], max_length=16, batch_size=8, learning_rate=5e-3, arguments=QUICK
    )
    assert general.run(student, teacher, tokenizer, tmp_path / "general") is student
    log = [entry for entry in history(tmp_path / "general") if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert {"embedding", "hidden", "attention", "learning_rate"} <= log[0].keys()
    assert sorted(path.name for path in (tmp_path / "general").iterdir()) == [
        "config.json",
        "model.safetensors",
        "objective.json",
        "projections.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    ]
    assert not (tmp_path / "general.partial").exists()
    assert_equal(student.bert, AutoModel.from_pretrained(tmp_path / "general", add_pooling_layer=True))

    intermediate = IntermediateStage(
        dataset=rows, epochs=1, batch_size=8, learning_rate=5e-3, projections=tmp_path / "general", arguments=QUICK
    )
    intermediate.run(student, teacher, tokenizer, tmp_path / "intermediate")
    assert history(tmp_path / "intermediate")[0]["loss"] < log[0]["loss"]

    last = prediction_stage(learning_rate=5e-3, epochs=8)
    last.run(student, teacher, tokenizer, tmp_path / "student", eval_dataset=rows)
    assert not student.training
    assert not (tmp_path / "student" / "projections.safetensors").exists()
    assert_equal(student, AutoModelForSequenceClassification.from_pretrained(tmp_path / "student"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == 60
    log = [entry["prediction"] for entry in history(tmp_path / "student") if "prediction" in entry]
    assert log[-1] < log[0]


def test_a_stage_starts_from_the_projections_of_the_earlier_one(tmp_path: Path) -> None:
    student, teacher, tokenizer = _tiny.classifier(), _tiny.classifier(4, 24), _tiny.tokenizer()
    options = {"dataset": _tiny.dataset(), "epochs": 1, "batch_size": 16, "arguments": QUICK}
    IntermediateStage(**options).run(student, teacher, tokenizer, tmp_path / "first")
    still = {**options, "learning_rate": 0.0}
    IntermediateStage(**still, projections=tmp_path / "first").run(student, teacher, tokenizer, tmp_path / "second")
    first, second = (Objective(student.config, teacher.config) for _ in range(2))
    first.load_projections(tmp_path / "first")
    second.load_projections(tmp_path / "second")
    assert_equal(first, second)


def test_precomputed_teacher_logits_replace_the_teacher(tmp_path: Path) -> None:
    teacher, tokenizer = _tiny.classifier(4, 24), _tiny.tokenizer()
    options = {"learning_rate": 5e-3, "epochs": 4}
    prediction_stage(**options).run(_tiny.classifier(), teacher, tokenizer, tmp_path / "live")
    cached = add_teacher_logits(_tiny.dataset(), teacher, tokenizer)
    prediction_stage(**options, dataset=cached).run(_tiny.classifier(), None, tokenizer, tmp_path / "cached")
    live, read = ([e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("live", "cached"))
    assert live[-1] < 0.95 * live[0]
    assert read == pytest.approx(live, rel=1e-4)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    student, teacher, tokenizer = _tiny.classifier(), _tiny.classifier(4, 24), _tiny.tokenizer()
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty; pass overwrite=True"):
        prediction_stage().run(student, teacher, tokenizer, output)
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="resume and overwrite are both set"):
        prediction_stage().run(student, teacher, tokenizer, output, resume=True, overwrite=True)
    prediction_stage().run(student, teacher, tokenizer, output, overwrite=True)
    assert not (output / "notes.txt").exists()
    assert (output / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_run_that_fails_leaves_no_output(tmp_path: Path) -> None:
    student, tokenizer = _tiny.classifier(), _tiny.tokenizer()
    wrong = _tiny.classifier(4, 24, num_labels=3)
    with pytest.raises(ValueError, match="the student has 2 classes, the teacher 3"):
        prediction_stage().run(student, wrong, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prediction_stage().run(student, _tiny.classifier(4, 24), tokenizer, tmp_path / "out")  # nothing was left behind


def test_a_refused_run_keeps_an_interrupted_one(tmp_path: Path) -> None:
    student, teacher, tokenizer = _tiny.classifier(), _tiny.classifier(4, 24), _tiny.tokenizer()
    checkpoint = tmp_path / "out.partial" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    stage = IntermediateStage(dataset=_tiny.dataset(), arguments=QUICK, layer_map=[0, 5, 4])
    with pytest.raises(ValueError, match=r"layer_map\[1\] is 5"):
        stage.run(student, teacher, tokenizer, tmp_path / "out", overwrite=True)
    stage = IntermediateStage(dataset=_tiny.dataset(), arguments=QUICK, projections=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="safetensors: no such file"):
        stage.run(student, teacher, tokenizer, tmp_path / "out", overwrite=True)
    with pytest.raises(FileNotFoundError, match="safetensors: no such file"):
        stage.run(student, teacher, tokenizer, tmp_path / "other")
    assert checkpoint.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("terms", ["inner", "prediction"])
def test_an_interrupted_stage_resumes_to_the_same_student(tmp_path: Path, terms: str) -> None:
    tokenizer, teacher = _tiny.tokenizer(), _tiny.classifier(4, 24, seed=1)
    options = {
        "dataset": _tiny.dataset(),
        "epochs": 2,
        "batch_size": 8,
        "arguments": {**QUICK, "logging_steps": 3, "save_strategy": "steps", "save_steps": 3},
    }
    stage = IntermediateStage(**options) if terms == "inner" else PredictionStage(**options)
    whole = stage.run(_tiny.classifier(), teacher, tokenizer, tmp_path / "whole")

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stage.run(_tiny.classifier(), teacher, tokenizer, output, callbacks=[StopAt(5)])
    assert not output.exists()
    shutil.copytree(tmp_path / "out.partial", tmp_path / "killed.partial")
    (tmp_path / "out.partial" / "checkpoint-4").mkdir()  # a save that was cut short
    with pytest.raises(FileExistsError, match="holds an interrupted run; pass resume=True"):
        stage.run(_tiny.classifier(), teacher, tokenizer, output)
    student: PreTrainedModel = _tiny.classifier(seed=3)
    stage.run(student, teacher, tokenizer, output, resume=True)
    assert_equal(whole, student)
    assert [entry.get("loss") for entry in history(output)] == [
        entry.get("loss") for entry in history(tmp_path / "whole")
    ]
    assert not (tmp_path / "out.partial").exists()

    asked = type(stage)(**options, parity="official", temperature=2.0)
    for folder in (output, tmp_path / "killed"):  # a finished run and an interrupted one
        with pytest.raises(
            ValueError, match=r"trained with parity 'masked' instead of 'official', temperature 1.0 inst"
        ):
            asked.run(_tiny.classifier(), teacher, tokenizer, folder, resume=True)
    other = stage.run(_tiny.classifier(seed=4), teacher, tokenizer, output, resume=True)  # a finished run is only read
    assert_equal(whole, other)


def test_resume_without_an_earlier_run_starts_a_new_one(tmp_path: Path) -> None:
    stage, teacher, tokenizer = prediction_stage(), _tiny.classifier(4, 24), _tiny.tokenizer()
    first = stage.run(_tiny.classifier(), teacher, tokenizer, tmp_path / "a", resume=True)
    second = stage.run(_tiny.classifier(), teacher, tokenizer, tmp_path / "b")
    assert_equal(first, second)


def test_a_seed_determines_the_student(tmp_path: Path) -> None:
    teacher, tokenizer, ends = _tiny.classifier(4, 24), _tiny.tokenizer(), []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(i)
        stage = IntermediateStage(dataset=_tiny.dataset(), epochs=1, batch_size=8, seed=seed, arguments=QUICK)
        ends.append(weights(stage.run(_tiny.classifier(), teacher, tokenizer, tmp_path / str(i))))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])
