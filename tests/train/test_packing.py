"""Tests the general stage with packing: a batch is one row without padding, and learns what its sequences teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from datasets import Dataset
from test_packed_capture import model, packed
from transformers import PreTrainedModel, TrainingArguments

from fastdistill.train.data import flatten, pack_corpus
from fastdistill.train.objective import Objective
from fastdistill.train.stages import GeneralStage
from fastdistill.train.trainer import DistillationTrainer

QUICK: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}


def stage(rows: int = 12, **options: Any) -> GeneralStage:
    corpus = Dataset.from_dict({"text": _tiny.texts(rows)})
    return GeneralStage(
        **{"corpus": corpus, "max_length": 12, "packing": True, "epochs": 1, "batch_size": 6, "arguments": QUICK}
        | options
    )


def losses(folder: Path) -> list[dict[str, float]]:
    return [
        entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


def test_lines_stay_apart() -> None:
    tokenizer, lines = _tiny.tokenizer(), ["w1 w2 w3 w4", " ", "w5 w6", "w7"]
    found = pack_corpus(Dataset.from_dict({"text": lines}), tokenizer, 5, apart=True)
    assert [len(row) for row in found["input_ids"]] == found["length"][:] == [5, 3, 4, 3]
    assert found["input_ids"][0] == tokenizer("w1 w2 w3")["input_ids"]
    assert found["input_ids"][2] == tokenizer("w5 w6")["input_ids"]


def test_a_batch_is_one_row() -> None:
    batch = flatten([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}, {"input_ids": [9, 10]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert flatten([{"input_ids": [5, 6]}]).keys() == {"input_ids"}


@pytest.mark.parametrize(
    ("family", "terms"),
    [
        ("bert", ("embedding", "hidden")),
        *((family, ("embedding", "hidden", "attention")) for family in ("bert", "modernbert", "mistral")),
    ],
)
def test_a_step_is_that_of_the_padded_rows(tmp_path: Path, family: str, terms: tuple[str, ...]) -> None:
    """The other run pads the same rows: the losses of a step, and the weights after it, are equal to rounding."""
    rows, students = pack_corpus(stage().corpus, _tiny.tokenizer(), 12, apart=True).select(range(6)), []
    assert len(set(rows["length"])) > 2
    for packing in (True, False):
        student, teacher = quiet(family), quiet(family, seed=1)
        run = stage(corpus=rows, packing=packing, terms=terms, learning_rate=1e-3, warmup=0.0, layer_map="bottom")
        students.append(run.run(student, teacher, _tiny.tokenizer(), tmp_path / str(packing)))
    packed, padded = (losses(tmp_path / str(packing))[0] for packing in (True, False))
    for term in terms:
        assert packed[term] == pytest.approx(padded[term], rel=2e-4)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=2e-4)


def quiet(family: str, seed: int = 0) -> PreTrainedModel:
    """Returns a model without dropout, whose random numbers would fall on other tokens."""
    made = model(family, seed=seed)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return made


def test_models_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    def run(family: str, **options: Any) -> None:
        stage(**options).run(model(family), model(family, seed=1), _tiny.tokenizer(), tmp_path / "out", overwrite=True)

    with pytest.raises(
        ValueError, match=r"^packing is True; DebertaV2Model does not compute.*as one: leave packing out"
    ):
        run("deberta", terms=("hidden",))
    with pytest.raises(ValueError, match=r"RobertaModel.*does not count the positions of a sequence from 0"):
        run("roberta", terms=("hidden",))
    with pytest.raises(ValueError, match="parity is 'official', which counts padding"):
        run("bert", parity="official")
    with pytest.raises(ValueError, match="BertForSequenceClassification predicts once a row"):
        stage(terms=("hidden", "prediction")).run(
            _tiny.classifier(), _tiny.classifier(seed=1), _tiny.tokenizer(), tmp_path / "out", overwrite=True
        )


def test_a_stream_is_packed_as_well(tmp_path: Path) -> None:
    run = stage(streaming=True, arguments={**QUICK, "max_steps": 2})
    run.run(model("bert"), model("bert", seed=1), _tiny.tokenizer(), tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens"])
def test_packed_rows_of_a_model_that_reads_them_as_one_are_refused(tmp_path: Path, kind: str) -> None:
    student, teacher = model("bert"), model("bert", seed=1)
    run = DistillationTrainer(
        student, teacher, Objective(student.config, teacher.config, terms=("hidden",)),
        TrainingArguments(str(tmp_path), max_steps=1, **QUICK), processing_class=_tiny.tokenizer(),
        data_collator=lambda features: packed(kind), train_dataset=stage().prepare(_tiny.tokenizer()),
    )  # fmt: skip
    with pytest.raises(ValueError, match="BertModel, which is bidirectional, reads the sequences of a row as one"):
        run.train()
