"""causal_lm_loss as trainers call it, against float64 on full logits: value and every gradient.

torchrun starts this file twice for the cases of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdistill.integrations import causal_lm_loss
from fastdistill.integrations.transformers import CausalLMDistillationMixin
from fastdistill.train.causal_lm import head_of

CLASSES, TEMPERATURE, ALPHA = 61, 2.0, 0.5
OPTIONS = {"alpha": ALPHA, "temperature": TEMPERATURE, "t_squared": True}
WIDE = {"layers": 3, "width": 24, "seed": 2}

# Family -> what its config needs beyond the common part.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "GPT2": {},
    "OPT": {},
}


def language_model(family: str = "Llama", layers: int = 2, width: int = 16, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    if family == "GPT2":
        own = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2,
               "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
    else:
        own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "pad_token_id": 0}
        own |= {"max_position_embeddings": 32}
        if family == "OPT":
            own |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "dropout": 0.0, "init_std": 0.3}
        else:
            own |= {"intermediate_size": 2 * width, "num_key_value_heads": 1}
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    common = {"vocab_size": CLASSES, "initializer_range": 0.3, "tie_word_embeddings": False}
    config = getattr(transformers, config_class)(**common | own | FAMILIES.get(family, {}) | options)
    return getattr(transformers, model_class)(config)


def chats(count: int = 4, seed: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
    """Rows of different lengths whose prompts have the label -100."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, CLASSES, (length - i % 4,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 5] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def padded(rows: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value, padding_side=side)
        for name, value in values.items()
    }


def one_by_one(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: x[None] for name, x in row.items()} for row in rows]


# -- the right value -------------------------------------------------------------------------------------------


def divergence(log_s: Tensor, log_t: Tensor, name: str, **options: Any) -> Tensor:  # (N, V) -> (N)
    p_s, p_t = log_s.exp(), log_t.exp()
    if name == "soft_cross_entropy":
        return -(p_t * log_s).sum(-1)
    if name == "kl":
        return (p_s * (log_s - log_t)).sum(-1) if options.get("reverse") else (p_t * (log_t - log_s)).sum(-1)
    if name == "tvd":
        return (p_t - p_s).abs().sum(-1) / 2
    beta = options.get("beta", 0.5)
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    return beta * (p_t * (log_t - log_m)).sum(-1) + (1 - beta) * (p_s * (log_s - log_m)).sum(-1)


def right_sum(
    student: Any, teacher: Any, batches: list[dict[str, Tensor]], name: str = "kl", **options: Any
) -> tuple[Tensor, int]:
    """The sum over counted positions, from full logits in float64, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        inputs = {key: x for key, x in batch.items() if key != "labels"}
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        z_s = student(**inputs).logits[:, :-1][counted].double()
        z_t = teacher(**inputs).logits[:, :-1][counted].detach().double()
        log_s, log_t = (z_s / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
        hard = nn.functional.cross_entropy(z_s, labels[counted], reduction="sum")
        soft = divergence(log_s, log_t, name, **options).sum() * TEMPERATURE**2
        total, count = total + ALPHA * soft + (1 - ALPHA) * hard, count + int(counted.sum())
    return total, count


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_right(
    loss: Tensor, found: Mapping[str, Tensor], right_loss: Tensor, right: Mapping[str, Tensor], bound: float = 1e-4
) -> None:
    assert abs(loss.double() - right_loss) <= bound * abs(right_loss)
    assert found.keys() == right.keys()
    scale = max(x.norm() for x in right.values())
    for name, x in right.items():
        difference = (found[name].double() - x).norm()
        if x.norm() < 1e-12 * scale:  # 0 in theory, as that of a bias of the keys
            assert difference < 1e-6 * scale, name
        else:
            assert difference < bound * x.norm(), f"{name}: {difference / x.norm()}"


def check(
    student: Any, teacher: Any, batch: dict[str, Tensor], batches: Any = None, wrap: Any = None, **options: Any
) -> None:
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    loss = causal_lm_loss(wrap(student) if wrap else student, teacher, batch, **OPTIONS, **options)
    loss.backward()
    how = {"name" if key == "divergence" else key: value for key, value in options.items()}
    total, count = right_sum(right, right_teacher, batches or [batch], **how)
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right))


# -- families, inputs, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_logits(family: str, tied: bool) -> None:
    student = language_model(family, tie_word_embeddings=tied)
    teacher = language_model(family, **WIDE).eval()
    assert head_of(student, {"input_ids": torch.ones(1, 2, dtype=torch.long)}).linear is not None
    check(student, teacher, padded(chats()), one_by_one(chats()))


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama"])
def test_left_padding(family: str) -> None:
    check(language_model(family), language_model(family, **WIDE).eval(), padded(chats(), "left"), one_by_one(chats()))


def test_left_padding_where_a_wrapper_replaced_the_forward() -> None:
    """accelerate gives the model a forward of its own, from whose signature no argument can be read."""
    student = language_model("GPT2")
    forward = student.forward
    student.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    loss = causal_lm_loss(student, language_model("GPT2", **WIDE).eval(), padded(chats(), "left"))
    right = causal_lm_loss(language_model("GPT2"), language_model("GPT2", **WIDE).eval(), padded(chats()))
    assert abs(loss - right) < 1e-5 * right


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "kl", "reverse": True},
        {"divergence": "jsd", "beta": 0.3},
        {"divergence": "tvd"},
        {"divergence": "soft_cross_entropy"},
    ],
    ids=str,
)
def test_divergences(options: dict[str, Any]) -> None:
    check(language_model(), language_model(**WIDE).eval(), padded(chats()), **options)


def test_a_mixture_of_experts_adds_its_balance() -> None:
    """The auxiliary loss of the model, with its coefficient, as the model adds it to a loss of its own."""
    options = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    student, teacher = (language_model("Mixtral", **options, **how) for how in ({}, WIDE))
    student.set_experts_implementation("eager")
    teacher.set_experts_implementation("eager")
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher.eval()).double()
    batch = padded(chats())
    loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [batch])
    balance = right(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    expected = total / count + 0.5 * balance
    expected.backward()
    assert_right(loss, gradients(student), expected, gradients(right))


def test_packed_rows() -> None:
    rows = chats()
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
    }
    check(language_model(), language_model(**WIDE).eval(), packed, one_by_one(rows))


def test_without_labels_every_token_with_a_successor_counts() -> None:
    student, teacher = language_model(), language_model(**WIDE).eval()
    batch = padded(chats())
    labelled = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    del batch["labels"]
    assert torch.equal(causal_lm_loss(student, teacher, batch), causal_lm_loss(student, teacher, labelled))
    packed = {"input_ids": torch.arange(3, 9)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    apart = [{"input_ids": torch.arange(3, 6)[None]}, {"input_ids": torch.arange(6, 9)[None]}]
    mean = sum(causal_lm_loss(student, teacher, row) for row in apart) / 2
    assert torch.allclose(causal_lm_loss(student, teacher, packed), mean, rtol=1e-5)


def test_nothing_counts() -> None:
    student, batch = language_model(), padded(chats())
    loss = causal_lm_loss(
        student, language_model(**WIDE).eval(), {**batch, "labels": torch.full_like(batch["labels"], -100)}
    )
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in student.parameters())


def test_vocabularies_padded_to_two_sizes() -> None:
    student, teacher = language_model(vocab_size=CLASSES + 7), language_model(vocab_size=CLASSES + 3, **WIDE).eval()
    batch = padded(chats())
    loss = causal_lm_loss(student, teacher, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    log_s, log_t = (
        model(**inputs).logits[:, :-1][counted].double()[:, : CLASSES + 3].log_softmax(-1)
        for model in (student, teacher)
    )
    assert abs(loss - divergence(log_s, log_t, "kl").mean()) < 1e-5 * loss


@pytest.mark.parametrize("divergence", ["kl", "soft_cross_entropy"])
@pytest.mark.parametrize("num_items", [None, 7])
def test_a_cached_teacher(divergence: str, num_items: int | None) -> None:
    student, teacher, batch = language_model(), language_model(**WIDE).eval(), padded(chats())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs, indices = teacher(**inputs).logits.detach().log_softmax(-1).topk(CLASSES)
    options = {**OPTIONS, "divergence": divergence, "num_items": num_items}
    cached = causal_lm_loss(student, None, {**batch, "topk_logprobs": logprobs, "topk_indices": indices}, **options)
    live = causal_lm_loss(student, teacher, batch, **options)
    assert abs(cached - live) < 1e-5 * live


@pytest.mark.parametrize("options", [{"divergence": "jsd"}, {"divergence": "tvd"}, {"reverse": True}], ids=str)
def test_a_cached_teacher_has_two_divergences(options: dict[str, Any]) -> None:
    batch = {**padded(chats()), "topk_logprobs": torch.zeros(4, 12, 1), "topk_indices": torch.zeros(4, 12, 1).long()}
    with pytest.raises(ValueError, match=r"^divergence is .*; a cached teacher has 'kl' and 'soft_cross_entropy'"):
        causal_lm_loss(language_model(), None, batch, **options)


def test_parts() -> None:
    student, teacher, batch = language_model(), language_model(**WIDE).eval(), padded(chats())
    parts = causal_lm_loss(student, teacher, batch, return_parts=True, **OPTIONS)
    assert torch.equal(parts.loss, causal_lm_loss(student, teacher, batch, **OPTIONS))
    mixed = ALPHA * TEMPERATURE**2 * parts.soft + (1 - ALPHA) * parts.hard
    assert abs(parts.loss - mixed) < 1e-5 * mixed
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_s = student(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
    assert abs(parts.entropy + (log_s.exp() * log_s).sum(-1).mean()) < 1e-5 * parts.entropy
    assert parts.loss.requires_grad
    assert not any(x.requires_grad for x in parts[1:])


# -- heads that are more than a product --------------------------------------------------------------------------


class OddHead(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.sin(x).sum(-1, keepdim=True) * torch.arange(CLASSES) / CLASSES


def odd(model: Any) -> Any:
    model.lm_head = OddHead(model.lm_head)
    return model


@pytest.mark.parametrize("odd_teacher", [False, True])
def test_an_unknown_head_takes_the_logits(odd_teacher: bool) -> None:
    teacher = language_model(**WIDE).eval()
    check(odd(language_model()), odd(teacher) if odd_teacher else teacher, padded(chats()))


def test_an_unknown_transform_of_the_logits_is_seen() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * torch.linspace(0.5, 1.5, output.logits.shape[-1])
            return output

    plain = language_model()
    student = Shifted(plain.config)
    student.load_state_dict(plain.state_dict())
    assert head_of(student, {"input_ids": torch.ones(1, 2, dtype=torch.long)}).linear is None
    check(student, language_model(**WIDE).eval(), padded(chats()))


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


LORA: dict[str, dict[str, Any]] = {
    "inside": {"target_modules": "all-linear"},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", LORA)
def test_lora(kind: str, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    if tied and kind == "head-saved":
        pytest.skip("a copy of the head is not tied to the embeddings")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **LORA[kind])
    student = peft.get_peft_model(language_model(tie_word_embeddings=tied), config)
    teacher = language_model(**WIDE).eval()
    right, right_teacher, batch = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), padded(chats())
    loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [batch])
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right))


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, r"^divergence is 'js'; it should be one of 'kl', 'jsd', 'tvd', 'soft_cross_entropy'"),
        ({"teacher": "student"}, r"^teacher is the student itself"),
        ({"teacher": "training"}, r"^teacher is in training mode.*teacher\.eval\(\)"),
        ({"teacher": None}, r"^teacher is None and batch has the columns.*topk_logprobs"),
        ({"student": nn.Linear(2, 2)}, r"^the model is a Linear; it should be a transformers model"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    student = change.pop("student", language_model())
    teachers = {
        "student": student,
        "training": language_model(**WIDE).train(),
        None: None,
        "": language_model(**WIDE).eval(),
    }
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(student, teachers[change.pop("teacher", "")], padded(chats()), **change)


def test_the_mixin_refuses_an_unknown_option_at_once() -> None:
    with pytest.raises(TypeError, match=r"^causal_lm_loss has no option temprature$"):
        CausalLMDistillationMixin(distillation={"temprature": 2.0})


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


def trainer(folder: str) -> None:
    """One SGD step of transformers' Trainer with the mixin, 2 processes x 2 micro-batches of different lengths."""
    from transformers import Trainer, TrainingArguments

    class Distiller(CausalLMDistillationMixin, Trainer):
        pass

    student, teacher = language_model(), language_model(**WIDE).eval()
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, learning_rate=1.0,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, weight_decay=0, use_cpu=True, ddp_backend="gloo",
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, ddp_find_unused_parameters=False,
    )  # fmt: skip
    rows = chats(8)
    running = Distiller(
        student, arguments, train_dataset=rows, data_collator=padded, teacher=teacher, distillation=OPTIONS
    )
    running.train()
    assert dist.get_world_size() == 2
    total, count = right_sum(right, right_teacher, one_by_one(rows))
    (total / count).backward()
    steps = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    logged = next(entry["loss"] for entry in running.state.log_history if "loss" in entry)
    assert_right(torch.tensor(logged), steps, total / count, gradients(right), bound=1e-3)
    leave()


def leave() -> None:
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


@pytest.mark.parametrize("what", ["wrappers", "trainer"])
def test_two_processes(what: str, tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, what, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    {"wrappers": wrappers, "trainer": trainer}[sys.argv[1]](sys.argv[2])
