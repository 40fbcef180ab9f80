"""The losses of TRL's trainers by causal_lm_loss: the values and gradients of TRL's own, on one process and on two.

torchrun starts this file twice for the cases of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastdistill.integrations.trl import DistillationMixin, GKDMixin

pytest.importorskip("trl")
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

CHAT = (
    "{% for message in messages %}{{ message['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


class LeanDistillationTrainer(DistillationMixin, DistillationTrainer):
    pass


class LeanGKDTrainer(GKDMixin, GKDTrainer):
    pass


def language_model(layers: int = 2, width: int = 16, seed: int = 1, family: str = "llama") -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(_tiny.config(family, layers, width, tie_word_embeddings=False))


def tokenizer() -> Any:
    found = _tiny.tokenizer()
    found.eos_token, found.padding_side, found.chat_template = "[SEP]", "left", CHAT
    return found


def arguments(folder: Any, **options: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1,
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0, "weight_decay": 0,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    if "RANK" in os.environ:
        common["ddp_backend"] = "gloo"
    return common | options


def on_policy(trainer: type, folder: Any, **options: Any) -> Any:
    prompts = Dataset.from_dict({"prompt": _tiny.texts(8)})
    config = DistillationConfig(**arguments(folder, max_completion_length=6, temperature=1.3, **options))
    return trainer(
        language_model(), language_model(3, 24, seed=2), config, train_dataset=prompts, processing_class=tokenizer()
    )


def gkd(trainer: type, folder: Any, **options: Any) -> Any:
    texts = _tiny.texts(16)
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(texts[:8], texts[8:], strict=True)
    ]
    config = GKDConfig(**arguments(folder, max_new_tokens=6, temperature=0.7, max_length=64, **options))
    return trainer(
        language_model(), language_model(3, 24, seed=2), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip


KINDS: dict[str, tuple[Any, type, type]] = {
    "distillation": (on_policy, DistillationTrainer, LeanDistillationTrainer),
    "gkd": (gkd, GKDTrainer, LeanGKDTrainer),
}


def assert_near(found: Tensor, right: Tensor, bound: float, name: str = "") -> None:
    error = (found.double() - right.double()).norm() / right.double().norm()
    assert error < bound, f"{name}: {error}"


# -- one batch ---------------------------------------------------------------------------------------------------


def batches(kind: str) -> dict[str, Tensor]:
    """What each trainer hands to its loss: prompts padded on the left, completions on the right."""
    generator = torch.Generator().manual_seed(4)
    prompt, completion = (torch.randint(4, _tiny.VOCABULARY, (3, n), generator=generator) for n in (5, 6))
    prompt_mask = (torch.arange(5) >= torch.tensor([[0], [2], [3]])).long()
    completion_mask = (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()
    if kind == "distillation":
        return {"prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion,
                "completion_mask": completion_mask}  # fmt: skip
    labels = torch.cat([torch.full_like(prompt, -100), completion.masked_fill(completion_mask == 0, -100)], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    return {"input_ids": torch.cat([prompt, completion], 1), "attention_mask": mask, "labels": labels}


def right_sum(student: Any, teacher: Any, beta: float, temperature: float) -> Tensor:
    """The sum of the generalised JSD over the completion's tokens, in float64."""
    batch = batches("gkd")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    log_s, log_t = (
        (model(**inputs).logits[:, :-1][counted] / temperature).log_softmax(-1)
        for model in (student.double(), teacher.double())
    )
    p_s, p_t = log_s.exp(), log_t.detach().exp()
    if beta == 0:
        return (p_t * (p_t.log() - log_s)).sum()
    if beta == 1:
        return (p_s * (log_s - p_t.log())).sum()
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    return (beta * p_t * (p_t.log() - log_m) + (1 - beta) * p_s * (log_s - log_m)).sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_loss_and_gradients_of_trl_and_of_the_formula(kind: str, beta: float, tmp_path: Path) -> None:
    """Also with `num_items_in_batch`, with masked tool output, and with a batch that has nothing to learn."""
    make, trl_class, lean_class = KINDS[kind]
    trainer = make(lean_class, tmp_path, beta=beta)
    student = trainer.model.eval()  # TRL's DistillationTrainer then takes the num_items_in_batch of its caller
    batch = batches(kind)
    for num_items in (None, torch.tensor(20)):
        found: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for compute, grads in ((lean_class.compute_loss, found), (trl_class.compute_loss, right)):
            student.zero_grad()
            loss = compute(trainer, student, dict(batch), num_items_in_batch=num_items)
            loss.backward()
            grads |= {"loss": loss.detach()} | {name: p.grad for name, p in student.named_parameters()}
        exact = language_model()
        total = right_sum(exact, language_model(3, 24, seed=2), beta, 1.3 if kind == "distillation" else 1.0)
        (total / (11 if num_items is None else 20)).backward()
        assert_near(found["loss"], right["loss"], 1e-6)
        for name, p in exact.named_parameters():
            assert_near(found[name], p.grad, 1e-5, name)
            assert_near(found[name], right[name], 1e-5, name)
    if kind == "distillation":
        student.zero_grad()
        batch["tool_mask"] = torch.tensor([1, 0, 1, 1, 1, 0]).expand(3, 6)
        assert_near(*(cls.compute_loss(trainer, student, dict(batch)) for cls in (lean_class, trl_class)), 1e-6)
    for name in ("completion_mask", "labels"):
        if name in batch:
            batch[name] = torch.full_like(batch[name], 0 if name == "completion_mask" else -100)
    assert lean_class.compute_loss(trainer, student, batch).item() == 0


# -- whole steps -------------------------------------------------------------------------------------------------


def step(kind: str, trainer_class: int, folder: Any, **options: Any) -> dict[str, Tensor]:
    """Trains one step of two micro-batches with SGD; returns what it took from the weights, and the loss it logged."""
    trainer = KINDS[kind][0](KINDS[kind][1 + trainer_class], folder, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": torch.tensor(logged)} | {
        name: before[name] - p.detach() for name, p in trainer.model.named_parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_trl(kind: str, tmp_path: Path) -> None:
    """On sampled completions: both trainers draw the same."""
    options = {"beta": 0.5} | ({"lmbda": 1.0} if kind == "gkd" else {})
    right, found = (step(kind, i, tmp_path, **options) for i in (0, 1))
    for name, x in right.items():
        assert_near(found[name], x, 1e-4, name)


def test_a_teacher_on_a_server_is_refused(tmp_path: Path) -> None:
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    class Lean(DistillationMixin, ServerDistillationTrainer):
        pass

    config = ServerDistillationConfig(**arguments(tmp_path), teacher_model_server_url="http://localhost:1")
    with pytest.raises(ValueError, match=r"^args\.teacher_model_server_url is 'http://localhost:1'; .* loss_top_k"):
        Lean(language_model(), args=config)


def test_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher_model is None; it should be a model"):
        LeanDistillationTrainer(
            language_model(), None, DistillationConfig(**arguments(tmp_path)), processing_class=tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": ["w1"]}),
        )  # fmt: skip


# -- two processes -----------------------------------------------------------------------------------------------


def steps_under_ddp(folder: str) -> None:
    for kind in KINDS:
        options = {"lmbda": 0.5} if kind == "gkd" else {}
        right, found = (step(kind, i, folder, **options) for i in (0, 1))
        assert dist.get_world_size() == 2
        for name, x in right.items():
            assert_near(found[name], x, 1e-4, f"{kind} {name}")
        flat = nn.utils.parameters_to_vector([x for name, x in found.items() if name != "loss"])
        other = flat.clone()
        dist.broadcast(other, 0)
        assert torch.equal(flat, other)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes(tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    steps_under_ddp(sys.argv[1])
