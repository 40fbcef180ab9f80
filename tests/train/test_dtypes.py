"""Tests students and teachers of other dtypes and widths: bfloat16, quantised, OPT, heads with one label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, TrainingArguments

from fastdistill.recipes.distil import distil_task
from fastdistill.recipes.options import TaskOptions
from fastdistill.train import trainer as trainers
from fastdistill.train.cache import identity, read_cache, write_cache
from fastdistill.train.capture import States
from fastdistill.train.objective import Objective

INNER = ("embedding", "hidden", "attention")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trained(folder: Path, student: Any, teacher: Any, rows: Any = None, lr: float = 0.0, **options: Any) -> float:
    """Takes one step, and returns the loss of the first eight rows before it."""
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, max_steps=1, logging_steps=1, save_strategy="no",
        learning_rate=lr, train_sampling_strategy="sequential",
    )  # fmt: skip
    objective = Objective(student.config, None if teacher is None else teacher.config, **options)
    run = trainers.DistillationTrainer(
        student.train(False), teacher, objective, args, processing_class=_tiny.tokenizer(),
        train_dataset=_tiny.dataset() if rows is None else rows,
    )  # fmt: skip
    run.train()
    return float(next(entry["loss"] for entry in run.state.log_history if "loss" in entry))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


DTYPES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), DTYPES)
@pytest.mark.parametrize("terms", [INNER, ("prediction",)])
def test_other_dtypes_train_without_autocast(
    tmp_path: Path, terms: Any, student_dtype: str, teacher_dtype: str
) -> None:
    def pair() -> tuple[Any, Any]:
        return _tiny.classifier(**NO_DROPOUT), _tiny.classifier(4, 24, seed=1)

    torch.manual_seed(3)
    expected = trained(tmp_path, *pair(), terms=terms)
    student, teacher = pair()
    student, teacher = student.to(getattr(torch, student_dtype)), teacher.to(getattr(torch, teacher_dtype))
    before = student.bert.encoder.layer[0].output.dense.weight.clone()
    torch.manual_seed(3)
    assert trained(tmp_path, student, teacher, lr=1e-2, terms=terms) == pytest.approx(expected, rel=0.05)
    assert not torch.equal(before, student.bert.encoder.layer[0].output.dense.weight)


def opt(seed: int, width: int) -> OPTForCausalLM:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=_tiny.VOCABULARY, hidden_size=width, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def test_opt_with_another_width_of_its_embeddings(tmp_path: Path) -> None:
    rows = _tiny.dataset().remove_columns("labels")
    terms = (*INNER, "prediction")
    assert trained(tmp_path, opt(0, 24), opt(1, 32), rows, terms=terms, projection="per_layer") > 0
    with pytest.raises(ValueError, match="projection is 'shared'; it maps width 24 to 32, and hidden state 2"):
        Objective(opt(0, 24).config, opt(1, 32).config)


def test_a_language_model_with_one_label_is_no_regression(tmp_path: Path) -> None:
    def model(seed: int, labels: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(_tiny.config("llama", 2, 16, num_labels=labels)).eval()

    rows = _tiny.dataset().remove_columns("labels")
    options = {"terms": ("prediction",), "divergence": "kl", "alpha": 0.5}
    expected = trained(tmp_path, model(0, 2), model(1, 2), rows, **options)
    for labels in ((1, 1), (1, 2), (2, 1)):
        student, teacher = (model(seed, number) for seed, number in enumerate(labels))
        assert trained(tmp_path, student, teacher, rows, **options) == pytest.approx(expected, rel=1e-6)


def test_a_regression_learns_from_the_teachers_scores(tmp_path: Path) -> None:
    rows = _tiny.dataset(classes=1)
    student, teacher = _tiny.classifier(num_labels=1, **NO_DROPOUT), _tiny.classifier(4, 24, seed=1, num_labels=1)
    with torch.no_grad():
        scores = [[m.double()(torch.tensor([row["input_ids"]])).logits.item() for row in rows.select(range(8))]
                  for m in (student, teacher)]  # fmt: skip
    s, t = torch.tensor(scores, dtype=torch.float64)
    student, teacher = student.float(), teacher.float()
    options = {"terms": ("prediction",), "scores": "teacher"}
    assert trained(tmp_path, student, teacher, rows, **options) == pytest.approx(float(((s - t) ** 2).mean()), rel=1e-4)
    gold = torch.tensor(rows["labels"][:8], dtype=torch.float64)
    found = trained(tmp_path, student, None, rows, terms=("prediction",))
    assert found == pytest.approx(float(((s - gold) ** 2).mean()), rel=1e-4)
    write_cache(rows, teacher, _tiny.tokenizer(), tmp_path / "cache")
    cached = read_cache(tmp_path / "cache")
    assert trained(tmp_path, student, None, cached, **options) == pytest.approx(float(((s - t) ** 2).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="scores is 'teacher', which is for a regression"):
        trained(tmp_path, _tiny.classifier(), _tiny.classifier(seed=1), **options)
    with pytest.raises(ValueError, match=r"alpha is 0\.5; a regression"):
        Objective(student.config, terms=("prediction",), alpha=0.5)(States({}, {}, torch.ones(2, 1)))


def test_a_dynamically_quantised_teacher(tmp_path: Path) -> None:
    def quantised(seed: int) -> Any:
        teacher = _tiny.classifier(4, 24, seed=seed)
        return torch.ao.quantization.quantize_dynamic(teacher, {nn.Linear}, dtype=torch.qint8)

    teacher, rows = quantised(1), _tiny.dataset()
    hashes = [identity(model)["weights_sha256"] for model in (teacher, quantised(1), quantised(2))]
    assert hashes[0] == hashes[1] != hashes[2]
    other = quantised(1)
    bias = other.classifier.bias().clone()
    other.classifier.set_weight_bias(other.classifier.weight(), bias + 1)
    assert identity(other)["weights_sha256"] != hashes[0]
    write_cache(rows, teacher, _tiny.tokenizer(), tmp_path / "cache", hidden=[4], batch_size=1)  # ranges are a batch's
    cached, torch_rows = read_cache(tmp_path / "cache"), rows.select(range(1)).with_format("torch")
    expected = teacher(torch_rows["input_ids"][0][None]).logits[0]
    torch.testing.assert_close(torch.as_tensor(cached[0]["teacher_logits"]), expected.detach(), atol=1e-4, rtol=1e-4)
    assert trained(tmp_path, _tiny.classifier(), teacher, terms=(*INNER, "prediction"), lr=1e-3) > 0


def test_the_command_task_learns_a_regression_from_the_teachers_scores(tmp_path: Path) -> None:
    columns = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2")
    lines = ["\t".join((*columns, "score"))]
    lines += ["\t".join([*"0000000", text, text, f"{i % 6}"]) for i, text in enumerate(_tiny.texts(24))]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    options = {"num_labels": 1, "problem_type": "regression", "max_position_embeddings": 160}
    for name, model in (
        ("teacher", _tiny.classifier(4, 24, seed=1, **options)),
        ("student", _tiny.classifier(**options)),
    ):
        model.save_pretrained(tmp_path / name)
        _tiny.tokenizer().save_pretrained(tmp_path / name)
    for labels in (None, "teacher"):
        output = tmp_path / f"learns_{labels}"
        distil_task(
            TaskOptions(
                teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), task="STS-B", data=tmp_path,
                output=output, labels=labels, intermediate_epochs=0, max_steps=1,
            )
        )  # fmt: skip
        assert json.loads((output / "objective.json").read_text())["scores"] == (labels or "gold")
