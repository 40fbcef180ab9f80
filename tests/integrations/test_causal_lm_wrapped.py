"""causal_lm_loss with wrapped models, against float64 on full logits: value and every gradient.

torchrun starts this file twice for the cases of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
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
from fastdistill.train.heads import head_of

# -- wrappers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    student = language_model()
    student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    student.train()
    check(student, language_model(**WIDE).eval(), padded(chats()))


@pytest.mark.slow
def test_torch_compile() -> None:
    check(language_model(), language_model(**WIDE).eval(), padded(chats()), wrap=torch.compile)


def test_a_compiled_student_is_compiled_once() -> None:
    """The forward that a call puts into the head is a new function, and must not make Dynamo trace again."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    student, teacher = torch.compile(language_model(), backend="eager"), language_model(**WIDE).eval()
    for seed in range(4):
        causal_lm_loss(student, teacher, padded(chats(seed=seed)), **OPTIONS).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


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


@pytest.mark.parametrize("way", ["offloaded", "dispatched"])
def test_a_teacher_that_accelerate_places(way: str) -> None:
    """accelerate loads or moves weights in a forward of its own, which the replaced forward must not skip."""
    from accelerate import cpu_offload, dispatch_model

    student, teacher = language_model(), language_model("Cohere", **WIDE).eval()
    right, right_teacher, batch = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), padded(chats())
    if way == "offloaded":
        cpu_offload(teacher, execution_device="cpu")
        assert teacher.lm_head.weight.is_meta
    else:
        dispatch_model(teacher, {"": "cpu"}, force_hooks=True)
    assert head_of(teacher, {"input_ids": batch["input_ids"]}).linear is teacher.lm_head
    loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [batch])
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right))


# -- quantised weights -------------------------------------------------------------------------------------------


def eight_bits(model: Any, names: list[str]) -> None:
    import bitsandbytes as bnb

    for name in names:
        old = model.get_submodule(name)
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, new.to("cpu"))


def four_bits(model: Any, names: list[str]) -> None:
    import bitsandbytes as bnb

    for name in names:
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
        model.set_submodule(name, new.to("cpu"))


def torchao(model: Any, names: list[str]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in names)


@pytest.mark.parametrize("head", [False, True], ids=["inside", "head too"])
@pytest.mark.parametrize("quantise", [eight_bits, four_bits, torchao])
def test_quantised(quantise: Any, head: bool) -> None:
    """Teachers, and students with a LoRA. The right loss comes from the logits of the quantised models themselves."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("torchao" if quantise is torchao else "bitsandbytes")
    student, teacher = language_model(width=64), language_model(width=64, layers=3, seed=2).eval()
    for model in (student, teacher):
        model.requires_grad_(False)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantise(model, [name for name in linear if head or name != "lm_head"])
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    student = peft.get_peft_model(student, config)
    batch = padded(chats())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    assert any("builds the whole logits" in str(x.message) for x in caught) == head
    loss.backward()
    found = {name: x.clone() for name, x in gradients(student).items()}
    assert found
    student.zero_grad()
    total, count = right_sum(student, teacher, [batch])
    (total / count).backward()
    assert_right(loss, found, total / count, gradients(student))


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
                total, count = everyones_loss(right, right_teacher, batch)
                loss = causal_lm_loss(model, teacher, batch, num_items=count / 2, **OPTIONS)
                loss.backward()
                found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(student).items()}
                assert_right(loss, found, total / count * 2, gradients(right))
                if dist.get_rank():  # nothing counts in this process, and no process waits for another
                    batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
                causal_lm_loss(model, teacher, batch, num_items=count / 2, **OPTIONS).backward()
                batch = padded(chats(seed=10 + dist.get_rank()))


def fsdp1(folder: str) -> None:
    """FSDP1 with parameters as views into flat ones or not, the head in the root's group or alone."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    dist.init_process_group("gloo")
    batch = padded(chats(seed=10 + dist.get_rank()))
    for use_orig_params in (False, True):
        for groups, tied in (({LlamaDecoderLayer}, True), ({LlamaDecoderLayer}, False), ({nn.Linear}, False)):
            for teacher_is_sharded in (False, True):
                student, teacher = language_model(tie_word_embeddings=tied), language_model(**WIDE).eval()
                right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
                total, count = everyones_loss(right, right_teacher, batch)

                def wrap(model: Any, groups: Any = groups, views: bool = use_orig_params) -> Any:
                    policy, cpu = ModuleWrapPolicy(groups), torch.device("cpu")
                    return FullyShardedDataParallel(
                        model, auto_wrap_policy=policy, use_orig_params=views, device_id=cpu
                    )

                model = wrap(student)
                teacher = wrap(teacher).eval() if teacher_is_sharded else teacher
                inputs = {"input_ids": batch["input_ids"]}
                assert head_of(model, inputs).linear is not None
                before = whole(model)
                loss = causal_lm_loss(model, teacher, batch, num_items=count / 2, **OPTIONS)
                loss.backward()
                torch.optim.SGD(model.parameters(), lr=1.0).step()
                found = {name: before[name] - x for name, x in whole(model).items()}
                assert_right(loss, found, total / count * 2, gradients(right))
                if dist.get_rank():
                    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
                causal_lm_loss(model, teacher, nothing if dist.get_rank() else batch, **OPTIONS).backward()


def whole(model: Any) -> dict[str, Any]:
    with model.summon_full_params(model):
        return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def everyones_loss(right: Any, right_teacher: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Returns this process' sum of the loss and everyone's count; leaves everyone's gradient in `right`."""
    total, number = right_sum(right, right_teacher, [batch])
    count = torch.tensor(number)
    dist.all_reduce(count)
    (total / count).backward()
    for p in right.parameters():
        dist.all_reduce(p.grad)
    return total.detach(), count


def zero(folder: str) -> None:
    """DeepSpeed's ZeRO-2 and 3: the whole weight of the head exists inside its forward alone."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    batch = padded(chats(seed=10 + dist.get_rank()))
    for stage, tied, teacher_is_sharded in ((2, False, False), (3, False, False), (3, True, True)):
        student, teacher = language_model(tie_word_embeddings=tied), language_model(**WIDE).eval()
        right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
        total, count = everyones_loss(right, right_teacher, batch)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        config = {
            "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        optimiser = torch.optim.SGD(student.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=student, optimizer=optimiser, config=config)
        if teacher_is_sharded:
            teacher, *_ = deepspeed.initialize(model=teacher, config=config)
            teacher.eval()
            assert teacher.module.lm_head.weight.numel() == 0
        loss = causal_lm_loss(engine, teacher, batch, num_items=count / 2, **OPTIONS)
        engine.backward(loss)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(student.parameters()), enabled=stage == 3):
            found = {name: before[name] - p.detach() for name, p in student.named_parameters()}
        assert_right(loss, found, total / count * 2, gradients(right))
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)} if dist.get_rank() else batch
        engine.backward(causal_lm_loss(engine, teacher, nothing, num_items=count / 2, **OPTIONS))


@pytest.mark.parametrize("what", [wrappers, fsdp1, zero])
def test_two_processes(what: Any, tmp_path: Path) -> None:
    import _processes

    if what is zero:
        pytest.importorskip("deepspeed")
    done = _processes.run([*_processes.TORCHRUN, __file__, what.__name__, tmp_path], tmp_path, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way
