"""torchtitan's Trainer with the losses, on its own tiny Llama: gradients against float64 on full logits.

torchrun starts this file in two processes, which run FSDP2 and tensor parallelism on the CPU with gloo.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import sys
import types
import unittest.mock
from pathlib import Path
from typing import Any

import _torchtitan_cpu  # noqa: F401 - before torchtitan
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer

from fastdistill.integrations.torchtitan import DistillationMixin, chosen_loss

CLASSES, LENGTH, TEMPERATURE, ALPHA = 63, 8, 2.0, 0.5  # two shards of the classes differ in size
SIZES = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": CLASSES, "max_seq_len": LENGTH}


def model(seed: int = 1, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    found = Transformer(TransformerModelArgs(**{**SIZES, **sizes}))
    with torch.no_grad():
        found.init_weights()
    for p in found.parameters():
        nn.init.normal_(p, std=0.3)
    return found


def teacher_model() -> Any:
    return model(2, dim=24, n_layers=3)


def batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    tokens = torch.randint(CLASSES, (2, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels[0, : seed % 5] = -100
    return {"input": tokens[:, :-1]}, labels


class Distiller(DistillationMixin, Trainer):
    distillation = {"alpha": ALPHA, "temperature": TEMPERATURE, "t_squared": True}  # noqa: RUF012

    def build_teacher(self) -> nn.Module:
        return teacher_model()


def right_sum(student: Any, teacher: Any, batches: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[Tensor, int]:
    """The sum over valid tokens, from full logits in float64, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for inputs, labels in batches:
        valid = labels != -100
        z_s, z_t = (net(inputs["input"])[valid].double() for net in (student, teacher))
        log_s, log_t = ((z / TEMPERATURE).log_softmax(-1) for z in (z_s, z_t.detach()))
        soft = (log_t.exp() * (log_t - log_s)).sum() * TEMPERATURE**2
        hard = nn.functional.cross_entropy(z_s, labels[valid], reduction="sum")
        total, count = total + ALPHA * soft + (1 - ALPHA) * hard, count + int(valid.sum())
    return total, count


def assert_right(found: nn.Module, right: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), right.parameters(), strict=True):
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        error = (gradient.double() - q.grad).norm() / q.grad.norm()
        assert error < 1e-4, f"{name}: {error}"


def bare_trainer(student: nn.Module, teacher: nn.Module) -> Any:
    """A Trainer as it is after its __init__, which needs torchrun."""
    trainer = object.__new__(Distiller)
    trainer.loss_of_rows = chosen_loss(**Distiller.distillation)
    trainer.model_parts, trainer.teacher = [student], teacher
    trainer.train_context, trainer.maybe_enable_amp = contextlib.nullcontext, contextlib.nullcontext()
    trainer.model_args, trainer.parallel_dims = types.SimpleNamespace(), types.SimpleNamespace(cp_enabled=False)
    return trainer


def test_a_micro_batch() -> None:
    student, teacher = model(), teacher_model()
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    inputs, labels = batch(3)
    trainer = bare_trainer(student, teacher)
    loss = trainer.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(40.0))
    total, _ = right_sum(right, right_teacher, [batch(3)])
    (total / 40).backward()
    assert abs(loss.double() - total / 40) < 1e-5 * loss
    assert_right(student, right)
    nothing = torch.full_like(labels, -100)
    student.zero_grad()
    loss = trainer.forward_backward_step(input_dict=inputs, labels=nothing, global_valid_tokens=torch.tensor(40.0))
    assert loss == 0
    assert all(not p.grad.any() for p in student.parameters())
    assert student(inputs["input"]).shape == (2, LENGTH, CLASSES)  # the head is as before


@pytest.mark.parametrize("kind", ["pipeline", "context"])
def test_parallelism_that_is_refused(kind: str) -> None:
    config = ConfigManager().parse_args([f"--parallelism.{kind}_parallel_degree", "2"])
    with pytest.raises(ValueError, match=rf"^parallelism\.{kind}_parallel_degree is 2; it should be 1"):
        Distiller(config)


def test_options_that_are_refused() -> None:
    class Unknown(Distiller):
        distillation = {"divergence": "js"}  # noqa: RUF012

    class Mistyped(Distiller):
        distillation = {"temprature": 2.0}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"^divergence is 'js'; it should be one of 'kl', "):
        Unknown(None)
    with pytest.raises(TypeError, match=r"^linear_kl_div has no option temprature$"):
        Mistyped(None)


def test_another_head_is_refused() -> None:
    student = model()
    student.output = nn.Sequential(student.output)
    with pytest.raises(ValueError, match=r"^the head of Transformer \(\.output\) is a Sequential; .* model converters"):
        bare_trainer(student, teacher_model()).forward_backward_step(
            input_dict=batch(0)[0], labels=batch(0)[1], global_valid_tokens=torch.tensor(1.0)
        )


# -- torchtitan's Trainer on two processes -------------------------------------------------------------------------


class Loader:
    """Two micro-batches a process."""

    def __init__(self, dp_rank: int, **_: Any) -> None:
        self.seeds = [10 + dp_rank, 20 + dp_rank]

    def __iter__(self) -> Any:
        return map(batch, self.seeds)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Sharded(Distiller):
    def build_teacher(self) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        teacher = teacher_model()
        for group in (*teacher.layers.values(), [teacher.norm, teacher.output], teacher):
            fully_shard(group)
        return teacher


class Parallel(Distiller):
    """Shards the teacher over the tensor-parallel mesh as torchtitan does the student."""

    def build_teacher(self) -> nn.Module:
        from torchtitan.models.llama3.infra.parallelize import apply_tp

        teacher = teacher_model()
        apply_tp(teacher, self.parallel_dims.get_mesh("tp"), loss_parallel=True, enable_float8_tensorwise_tp=False)
        return teacher


def a_step(kind: type[Distiller], folder: str, seeds: tuple[int, ...], **parallelism: Any) -> None:
    """Compares the gradients of a step, of two micro-batches a data-parallel process, with those of the formula."""
    options = {
        "job.dump_folder": folder, "model.name": "tiny", "model.flavor": "student", "training.seq_len": LENGTH,
        "training.local_batch_size": 2, "training.global_batch_size": 2 * len(seeds), "training.steps": 1,
        "training.max_norm": 1e9, "training.mixed_precision_param": "float32",
        **{f"parallelism.{name}": value for name, value in parallelism.items()},
    }  # fmt: skip
    flags = [
        str(x) for name in options for x in ([f"--{name}"] if options[name] is True else [f"--{name}", options[name]])
    ]
    trainer = kind(ConfigManager().parse_args(flags))
    (student,) = trainer.model_parts
    right = model()
    right.load_state_dict({name: x.full_tensor() for name, x in student.state_dict().items()})
    right.double()
    trainer.train()
    total, count = right_sum(right, teacher_model().double(), [batch(seed) for seed in seeds])
    (total / count).backward()
    assert_right(student, right)


def steps(folder: str) -> None:
    sizes = {"student": TransformerModelArgs(**SIZES)}
    changed = {"model_args": sizes, "build_tokenizer_fn": None, "build_dataloader_fn": Loader}
    register_train_spec("tiny", dataclasses.replace(get_train_spec("llama3"), **changed))
    a_step(Sharded, folder, (10, 11, 20, 21))
    assert dist.get_world_size() == 2
    with unittest.mock.patch("torch.distributed.init_process_group"):  # there is one already
        a_step(Parallel, folder, (10, 20), tensor_parallel_degree=2)
        a_step(Distiller, folder, (10, 20), tensor_parallel_degree=2, disable_loss_parallel=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes(tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    steps(sys.argv[1])
