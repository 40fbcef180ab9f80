"""Runs the README's language-model example and the advice of the DTensor error in two real processes.

torchrun starts this file twice, on the CPU with gloo. The expected values come from full logits in float64.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial  # the advice names Partial

import fastdistill

ROOT = Path(__file__).parent.parent
ALPHA, TEMPERATURE, CLASSES, RATE = 0.5, 2.0, 61, 1.0


def example(names: dict[str, Any]) -> None:
    """Runs the README's example of a Trainer on the models, arguments and rows in `names`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "CausalLMDistillationMixin" in block]
    exec(code, names)


def language_model(width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=CLASSES, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, initializer_range=0.3, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def chats(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Returns rows of one length. Their prompts have different lengths and the label -100."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, CLASSES, (12,), generator=generator).tolist()
        prompt = 2 + i % 7
        rows.append({"input_ids": ids, "attention_mask": [1] * 12, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def expected_sum(student: Any, teacher: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the loss from full logits summed over the counted positions, and the number of these."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    z_s = student(**inputs).logits[:, :-1][counted]
    z_t = teacher(**inputs).logits[:, :-1][counted].detach()
    log_s, log_t = (z_s / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
    soft = (log_t.exp() * (log_t - log_s)).sum() * TEMPERATURE**2
    hard = nn.functional.cross_entropy(z_s, labels[counted], reduction="sum")
    return ALPHA * soft + (1 - ALPHA) * hard, counted.sum()


def relative_error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


# -- functions that the two processes run ---------------------------------------------------------------------


def readme(folder: str) -> None:
    """Compares one SGD step of the example, 2 processes x 2 micro-batches, with the same step in float64."""
    from transformers import TrainingArguments

    student, teacher = language_model(16, 2, seed=1), language_model(24, 3, seed=2).eval()
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, weight_decay=0, use_cpu=True,
        ddp_backend="gloo", report_to=[], save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    rows = chats(8, seed=3)
    example({"student": student, "teacher": teacher, "args": arguments, "rows": rows})
    assert dist.get_world_size() == 2

    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    total, count = expected_sum(right, right_teacher, batch)
    (total / count).backward()
    for name, parameter in right.named_parameters():
        step = (before[name].double() - dict(student.named_parameters())[name].detach().double()) / RATE
        assert relative_error(step, parameter.grad) < 1e-4, name
    mine = torch.cat([p.detach().flatten() for p in student.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def advice(folder: str) -> None:
    """Follows the error's advice under FSDP2 and compares the gradients with float64."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    student, teacher = language_model(16, 2, seed=1), language_model(24, 3, seed=2).eval()
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    mesh = init_device_mesh("cpu", (2,))
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student.lm_head, mesh=mesh)  # in a group of its own, so that its weight is sharded after the forward
    fully_shard(student, mesh=mesh)

    rows = chats(4, seed=10 + dist.get_rank())
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = teacher.model(**inputs).last_hidden_state
    hidden = student(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]

    def loss_of(weight: Tensor) -> Tensor:
        return fastdistill.linear_kl_div(
            hidden[:, :-1], weight, target[:, :-1], teacher.lm_head.weight.detach(), labels=batch["labels"][:, 1:],
            alpha=ALPHA, temperature=TEMPERATURE, t_squared=True,
        )  # fmt: skip

    student_weight = student.lm_head.weight
    assert isinstance(student_weight, DTensor)
    with pytest.raises(TypeError, match="student_weight is a DTensor") as refused:
        loss_of(student_weight)
    (advised,) = re.findall(r"pass (student_weight\.full_tensor\(.*?\]\))", str(refused.value))
    loss_of(eval(advised, {"student_weight": student_weight, "Partial": Partial})).backward()

    total, count = expected_sum(right, right_teacher, batch)
    (total / count).backward()
    for (name, parameter), reference in zip(student.named_parameters(), right.parameters(), strict=True):
        dist.all_reduce(reference.grad)  # FSDP averages the processes' gradients
        assert relative_error(parameter.grad.full_tensor(), reference.grad / 2) < 1e-4, name


@pytest.mark.parametrize("what", ["readme", "advice"])
def test_two_processes(what: str, tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, what, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    {"readme": readme, "advice": advice}[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way ("terminate called")
