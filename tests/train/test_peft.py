"""Tests students with adapters of PEFT in the trainer and the stages: from the first step to the exported files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification, LlamaForCausalLM, TrainingArguments

from fastdistill.train.checkpoints import load_model
from fastdistill.train.objective import Objective
from fastdistill.train.stages import IntermediateStage, PredictionStage
from fastdistill.train.students import build_student
from fastdistill.train.trainer import DistillationTrainer

QUICK = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}
ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"]),
    "ia3": lambda: IA3Config(target_modules=["key", "value"], feedforward_modules=[], modules_to_save=["classifier"]),
}


def classifier(layers: int, width: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = _tiny.config("bert", layers, width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).eval()


def student(adapter: str = "lora") -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(classifier(2, 16, 1), ADAPTERS[adapter]())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer(model: Any, folder: Path, terms: Any = ("hidden", "attention", "prediction"), **options: Any) -> Any:
    teacher = classifier(4, 24, 0)
    rows = _tiny.dataset(8)
    args = TrainingArguments(
        folder, **{**QUICK, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 7, **options}
    )
    torch.manual_seed(5)
    objective = Objective(model.config, teacher.config, terms=terms)
    return DistillationTrainer(
        model, teacher, objective, args, processing_class=_tiny.tokenizer(), train_dataset=rows, eval_dataset=rows
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_is_the_whole_run(tmp_path: Path, adapter: str) -> None:
    whole = trainer(student(adapter), tmp_path / "whole", learning_rate=1e-2, save_steps=2)
    before = weights(whole.student)
    whole.train()
    changed = {name for name, p in whole.student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in whole.student.named_parameters() if p.requires_grad}
    resumed = trainer(student(adapter), tmp_path / "resumed", learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    losses = [[x["loss"] for x in run.state.log_history if "loss" in x] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    for name, p in resumed.student.named_parameters():
        assert torch.equal(p, whole.student.get_parameter(name)), name


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    """The learning rate is so high that the first evaluation is the best."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    run = trainer(student(), tmp_path, learning_rate=3.0, **options)
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    found = PeftModel.from_pretrained(classifier(2, 16, 1), best)
    for name, p in found.named_parameters():
        assert torch.equal(p, run.student.get_parameter(name)), name
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_stages_train_export_and_resume(tmp_path: Path) -> None:
    teacher, model, tokenizer = classifier(4, 24, 0), student(), _tiny.tokenizer()
    schedule = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "arguments": QUICK}
    IntermediateStage(dataset=_tiny.dataset(8), **schedule).run(model, teacher, tokenizer, tmp_path / "one")
    stage = PredictionStage(dataset=_tiny.dataset(8), **schedule)
    done = stage.run(model, teacher, tokenizer, tmp_path / "two")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        expected = done(**batch).logits
        merged = PeftModel.from_pretrained(classifier(2, 16, 1), tmp_path / "two").eval().merge_and_unload()
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-6)
        again = stage.run(student(), teacher, tokenizer, tmp_path / "two", resume=True)
        assert torch.equal(again(**batch).logits, expected)


def test_inner_terms_alone_run_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    models = [LlamaForCausalLM(_tiny.config("llama", layers, 24)) for layers in (2, 4)]
    model = get_peft_model(models[0], LoraConfig(target_modules=["q_proj"]))
    args = TrainingArguments(tmp_path, **QUICK, max_steps=2, learning_rate=1e-2)
    objective = Objective(model.config, models[1].config, terms=("hidden", "attention"))
    rows = _tiny.dataset(8).remove_columns("labels")
    run = DistillationTrainer(model, models[1], objective, args, train_dataset=rows, processing_class=_tiny.tokenizer())
    monkeypatch.setattr(models[0].lm_head, "forward", None)
    before = weights(model)
    run.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    model = student()
    model.get_base_model().bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"pooler\.dense\.weight trains, and PEFT saves adapters alone.*modules_to_save"
    ):
        trainer(model, tmp_path).train()
    model.get_base_model().bert.pooler.dense.weight.requires_grad_(False)
    trainer(model, tmp_path, max_steps=1).train()


def test_where_a_whole_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher is a PeftModel.*merge_and_unload"):
        build_student("tinybert-4l-312", student())
    student().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter of PEFT; merge it"):
        load_model(str(tmp_path))
