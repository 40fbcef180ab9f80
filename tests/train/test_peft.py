"""Tests students with adapters of PEFT in the trainer and the stages: from the first step to the exported files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _processes
import _tiny
import pytest
import torch
from _processes import two_processes
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BertForSequenceClassification, LlamaForCausalLM, TrainingArguments

from fastdistill.train.checkpoints import load_model
from fastdistill.train.objective import Objective
from fastdistill.train.resumable import load_student
from fastdistill.train.stages import IntermediateStage, PredictionStage
from fastdistill.train.students import build_student
from fastdistill.train.trainer import DistillationTrainer

QUICK = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}
ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"]),
    "two": lambda: LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"]),
    "ia3": lambda: IA3Config(target_modules=["key", "value"], feedforward_modules=[], modules_to_save=["classifier"]),
}


def classifier(layers: int, width: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = _tiny.config("bert", layers, width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).eval()


def student(adapter: str = "lora") -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(classifier(2, 16, 1), ADAPTERS[adapter]())
    if adapter == "two":
        model.add_adapter("second", LoraConfig(target_modules=["key"]))
        model.set_adapter("second")
    return model


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


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["query", "key"], 8, r"key\.lora_A\.weight is missing there and \(8, 16\) in the student.*adapter_config"),
        (["query", "value"], 2, r"query\.lora_A\.weight is \(8, 16\) there and \(2, 16\) in the student"),
    ],
)
def test_another_adapter_is_not_read(tmp_path: Path, targets: list[str], rank: int, message: str) -> None:
    """PEFT's own loading skips what one side lacks, so that a resumed student would be half untrained."""
    student().save_pretrained(tmp_path)
    other = get_peft_model(
        classifier(2, 16, 1), LoraConfig(r=rank, target_modules=targets, modules_to_save=["classifier"])
    )
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        load_student(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_adapters_and_whole_models_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "adapter")
    classifier(2, 16, 1).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="the adapter of a PEFT model, and the student is a BertForSequence"):
        load_student(classifier(2, 16, 1), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no adapter_config\.json, and the student is a PEFT model"):
        load_student(student(), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"no adapter_config\.json, and the student is a PEFT model"):
        load_student(student("two"), tmp_path / "adapter")


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    model = student()
    model.get_base_model().bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"pooler\.dense\.weight trains, and PEFT saves adapters alone.*modules_to_save"
    ):
        trainer(model, tmp_path).train()
    model.get_base_model().bert.pooler.dense.weight.requires_grad_(False)
    trainer(model, tmp_path, max_steps=1).train()
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["query"], bias="lora_only")  # saves the biases of the queries alone
    model = get_peft_model(classifier(2, 16, 1), config)
    model.get_base_model().bert.pooler.dense.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"pooler\.dense\.bias trains"):
        trainer(model, tmp_path).train()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_as_such(tmp_path: Path, kind: Any) -> None:
    model = get_peft_model(classifier(2, 16, 1), kind(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer(model, tmp_path).train()


@pytest.mark.slow
def test_a_stage_under_fsdp_returns_a_whole_student(tmp_path: Path) -> None:
    two_processes("fsdp_adapter", tmp_path)
    found = [torch.load(tmp_path / f"student{rank}.pt") for rank in (0, 1)]
    exported = PeftModel.from_pretrained(_processes.adapted().get_base_model(), tmp_path / "whole").state_dict()
    for name, x in exported.items():
        for whole, resumed in found:
            assert torch.equal(whole[name], x), name
            assert torch.equal(resumed[name], x), name


def test_where_a_whole_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher is a PeftModel.*merge_and_unload"):
        build_student("tinybert-4l-312", student())
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    student().save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"an adapter of PEFT; it should be a whole model.*merge_and_unload"):
        load_model(str(adapter))
    PeftModel.from_pretrained(classifier(2, 16, 1), adapter).merge_and_unload().save_pretrained(merged)
    _tiny.tokenizer().save_pretrained(merged)
    assert load_model(str(merged), "AutoModelForSequenceClassification")[0].num_labels == 2
