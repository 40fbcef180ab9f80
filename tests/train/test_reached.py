"""Tests what a run trains and what it must not: layers that are skipped at random, and weights of the teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _processes import two_processes
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

from fastdistill.train.checks import check_layerdrop, check_shared
from fastdistill.train.objective import Objective
from fastdistill.train.reached import layerdrop, reached
from fastdistill.train.trainer import DistillationTrainer

QUICK = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3}


def distil(student: Any, teacher: Any, folder: Path, **options: Any) -> DistillationTrainer:
    objective = Objective(student.config, teacher.config, terms=("prediction",))
    args = TrainingArguments(folder, **{**QUICK, "max_steps": 2, "learning_rate": 1e-2, **options})
    rows = _tiny.dataset(8)
    if not hasattr(student, "classifier"):
        rows = rows.remove_columns("labels")
    return DistillationTrainer(
        student, teacher, objective, args, train_dataset=rows, processing_class=_tiny.tokenizer()
    )


class Mixture(nn.Module):
    """An embedding, two experts of which all rows choose the first, a head, and what only training or nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.masked = nn.Parameter(torch.zeros(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.pooler = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + (self.masked if self.training else 0)
        x = self.layers[0](self.experts[0](x))
        self.layers[1](x)  # runs, and no loss reads it
        return x.sum()


def test_parameters_that_are_reached() -> None:
    model = Mixture()
    found = reached(model, PretrainedConfig(), lambda: model(torch.ones(1, 4)).backward())
    frozen = {f"{name}.{part}" for name in ("layers.1", "pooler") for part in ("weight", "bias")}
    assert found.frozen == frozen
    assert found.learned == {name for name, _ in model.named_parameters()} - frozen
    assert found.is_random
    assert all(p.grad is None for p in model.parameters())


def test_single_steps_leave_nothing_out_of_an_ordinary_student(tmp_path: Path) -> None:
    trainer = distil(_tiny.classifier(), _tiny.classifier(layers=4, width=24, seed=1), tmp_path)
    trainer.train()
    assert trainer.args.ddp_find_unused_parameters is False
    kept = distil(_tiny.classifier(), _tiny.classifier(seed=1), tmp_path, ddp_find_unused_parameters=True)
    kept.train()
    assert kept.args.ddp_find_unused_parameters is True


def test_every_layer_learns_though_steps_skip_some(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 6, "ffn_dim": 16}
    student, teacher = (OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, layerdrop=0.5)) for _ in range(2))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    torch.manual_seed(1)
    distil(student, teacher, tmp_path, max_steps=30).train()
    unchanged = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in unchanged if "k_proj.bias" not in name] == []  # it changes no probability


def test_two_processes_may_skip_other_layers(tmp_path: Path) -> None:
    two_processes("layerdrop", tmp_path)
    found = [torch.load(tmp_path / f"layerdrop{rank}.pt")["weights"] for rank in (0, 1)]
    before = torch.load(tmp_path / "before0.pt")
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
        assert "k_proj.bias" in name or not torch.equal(weight, before[name]), name


# -- weights of the teacher ------------------------------------------------------------------------------------


def tied() -> tuple[nn.Module, nn.Module]:
    student, teacher = _tiny.classifier(), _tiny.classifier(layers=4, seed=1)
    student.set_input_embeddings(teacher.get_input_embeddings())
    return student, teacher


def in_one_memory() -> tuple[nn.Module, nn.Module]:
    student, teacher = _tiny.classifier(), _tiny.classifier(layers=4, seed=1)
    student.bert.embeddings.word_embeddings.weight.data = teacher.bert.embeddings.word_embeddings.weight.data
    return student, teacher


def adapted() -> tuple[nn.Module, nn.Module]:
    base = _tiny.classifier()
    return get_peft_model(base, LoraConfig(target_modules=["query"])), base


def one() -> tuple[nn.Module, nn.Module]:
    model = _tiny.classifier()
    return model, model


def running_statistics() -> tuple[nn.Module, nn.Module]:
    """The shared part has no weight that trains, but training mode moves its running mean and variance."""
    student, teacher = (ResNetForImageClassification(ResNetConfig(**RESNET)) for _ in range(2))
    student.resnet.embedder.requires_grad_(False)
    teacher.resnet.embedder = student.resnet.embedder
    return student, teacher


@pytest.mark.parametrize("models", [one, tied, in_one_memory, adapted])
def test_a_teacher_that_training_would_change_is_refused(tmp_path: Path, models: Any) -> None:
    student, teacher = models()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"^teacher .*copy\.deepcopy"):
        distil(student, teacher, tmp_path).train()
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_running_statistics_are_no_part_of_both(tmp_path: Path) -> None:
    student, teacher = running_statistics()
    with pytest.raises(ValueError, match=r"^teacher shares .*running_mean.*copy\.deepcopy"):
        check_shared(student, teacher)
    check_shared(student, copy.deepcopy(teacher))


@pytest.mark.parametrize("name", ["layerdrop", "decoder_layerdrop"])
def test_where_a_config_says_that_layers_are_skipped(name: str) -> None:
    for config in (PretrainedConfig(**{name: 0.1}), PretrainedConfig(text_config={name: 0.1})):
        assert layerdrop(config.to_dict()) == {name: 0.1}
        with pytest.raises(ValueError, match=rf"^the student's {name} is 0\.1.*load the student with {name}=0\.0"):
            check_layerdrop(config, ("hidden",))
    check_layerdrop(PretrainedConfig(**{name: 0.0}), ("hidden",))


def test_the_advice_is_right_and_frozen_weights_may_be_shared(tmp_path: Path) -> None:
    base = _tiny.classifier()
    copied = copy.deepcopy(base)
    distil(get_peft_model(base, LoraConfig(target_modules=["query"])), copied, tmp_path).train()
    student, teacher = tied()
    student.get_input_embeddings().requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    distil(student, teacher, tmp_path).train()
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
