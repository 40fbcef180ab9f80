"""causal_lm_loss with wrapped models, against float64 on full logits: value and every gradient.

torchrun starts this file twice for the cases of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _causal import OPTIONS, WIDE, assert_right, chats, check, gradients, language_model, padded, right_sum
from torch import nn
from torch.distributed.tensor import DTensor

from fastdistill.integrations import causal_lm_loss

# -- wrappers ----------------------------------------------------------------------------------------------------


def test_activation_checkpointing() -> None:
    student = language_model()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    check(student, language_model(**WIDE).eval(), padded(chats()))


@pytest.mark.slow
def test_torch_compile() -> None:
    check(language_model(), language_model(**WIDE).eval(), padded(chats()), wrap=torch.compile)


@pytest.mark.parametrize("by", ["user", "accelerate"])
def test_autocast(by: str) -> None:
    """16-bit products: the error is within twice that of the same loss on eager logits under the same autocast."""
    from accelerate import Accelerator

    student, teacher, batch = language_model(), language_model(**WIDE).eval(), padded(chats())
    right, right_teacher, eager = (
        copy.deepcopy(student).double(),
        copy.deepcopy(teacher).double(),
        copy.deepcopy(student),
    )
    if by == "user":
        with torch.autocast("cpu", torch.bfloat16):
            causal_lm_loss(student, teacher, batch, **OPTIONS).backward()
    else:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(copy.deepcopy(student))
        causal_lm_loss(model, teacher, batch, **OPTIONS).backward()
        student = model
    total, count = right_sum(right, right_teacher, [batch])
    (total / count).backward()
    with torch.autocast("cpu", torch.bfloat16):
        total, count = right_sum(eager, teacher, [batch])
    (total / count).backward()

    def error(model: nn.Module) -> float:
        pairs = [(p.grad.double(), q.grad) for p, q in zip(model.parameters(), right.parameters(), strict=True)]
        flat, expected = (torch.cat([x[i].flatten() for x in pairs]) for i in (0, 1))
        return float((flat - expected).norm() / expected.norm())

    assert error(student) < 2 * error(eager)


# -- two processes -----------------------------------------------------------------------------------------------


def wrappers(folder: str) -> None:
    """DDP and FSDP2, the head in the root group, alone, and with the norm; teachers whole and sharded alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def ddp(model: Any) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def sharded(model: Any, *groups: Any) -> nn.Module:
        for group in (*model.model.layers, *groups, model):
            fully_shard(group, mesh=mesh)
        return model

    ways: dict[str, Callable[[Any], nn.Module]] = {
        "ddp": ddp,
        "root": sharded,
        "alone": lambda model: sharded(model, model.lm_head),
        "norm": lambda model: sharded(model, [model.model.norm, model.lm_head]),
    }
    batch = padded(chats(seed=10 + dist.get_rank()))
    for way, wrap in ways.items():
        for family, tied in (("Llama", False), ("Cohere", way in ("ddp", "root"))):
            for teacher_is_sharded in (False, True):
                student, teacher = (
                    language_model(family, tie_word_embeddings=tied),
                    language_model(family, **WIDE).eval(),
                )
                right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
                model = wrap(student)
                if teacher_is_sharded:
                    sharded(teacher, teacher.lm_head)
                total, number = right_sum(right, right_teacher, [batch])
                count = torch.tensor(number)
                dist.all_reduce(count)
                loss = causal_lm_loss(model, teacher, batch, num_items=count / 2, **OPTIONS)
                loss.backward()
                (total / count).backward()
                for p in right.parameters():
                    dist.all_reduce(p.grad)
                found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(student).items()}
                assert_right(loss, found, total / count * 2, gradients(right))
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)} if dist.get_rank() else batch
    student = language_model()
    causal_lm_loss(ddp(student), language_model(**WIDE).eval(), nothing).backward()  # no process waits for the other
    dist.barrier()
    leave()


def leave() -> None:
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


@pytest.mark.parametrize("what", ["wrappers"])
def test_two_processes(what: str, tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, what, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
