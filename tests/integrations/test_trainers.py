"""The mixin in transformers' Trainer and TRL's SFTTrainer: one SGD step against float64 on full logits.

torchrun starts this file twice for the cases of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _causal import (
    CLASSES,
    OPTIONS,
    WIDE,
    assert_right,
    chats,
    gradients,
    language_model,
    one_by_one,
    padded,
    right_sum,
    tokenizer,
    words,
)
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fastdistill.integrations.transformers import CausalLMDistillationMixin, check_trainer_options

STEP = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "learning_rate": 1.0,
    "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0, "weight_decay": 0, "use_cpu": True,
    "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip
LONG = {"max_position_embeddings": 128}


class Recorded:
    """Keeps the batches that a Trainer trains on."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.__dict__.setdefault("batches", []).append(dict(inputs))
        return super().training_step(model, inputs, *args)  # type: ignore[misc]


class Distiller(CausalLMDistillationMixin, Recorded, Trainer):
    pass


def plain_copy(model: Any) -> Any:
    """Returns the model in float64, without the forward that a trainer has put into it."""
    right = copy.deepcopy(model).double()
    for module in right.modules():
        vars(module).pop("forward", None)
    return right


def step(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Trains one step with learning rate 1; returns the logged loss and the gradient."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return torch.tensor(logged), {name: before[name] - p.detach() for name, p in named.items()}


def assert_step(trainer: Any, rows: list[dict[str, Tensor]] | None = None, bound: float = 1e-3) -> None:
    """Compares a step with the mean over all labels of its micro-batches, document by document."""
    student, teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    loss, found = step(trainer)
    rows = rows or [document for batch in trainer.batches for document in documents(batch)]
    total, count = right_sum(student, teacher, rows)
    (total / count).backward()
    assert_right(loss, found, total / count, gradients(student), bound)


def documents(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Returns the sequences of a batch, each by itself, without padding."""
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            starts = (batch["position_ids"][i] == 0).nonzero().flatten().tolist()
            pieces = [slice(*ends) for ends in zip(starts, [*starts[1:], len(ids)], strict=True)]
        else:
            pieces = [slice(int(batch["attention_mask"][i].sum()))]
        found += [{"input_ids": ids[None, p], "labels": batch["labels"][i][None, p]} for p in pieces]
    return [row for row in found if row["input_ids"].shape[1] > 1]


# -- transformers' Trainer ---------------------------------------------------------------------------------------


def distiller(folder: Path, student: Any = None, kind: Any = Distiller, rows: Any = None, **options: Any) -> Any:
    arguments = TrainingArguments(output_dir=str(folder), **STEP | options)
    return kind(
        student or language_model(), arguments, train_dataset=rows or chats(4), eval_dataset=chats(2, seed=5),
        data_collator=padded, teacher=language_model(**WIDE), distillation=OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "reentrant", "checkpointing", "compile"],
)
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    assert_step(distiller(tmp_path, **options), one_by_one(chats(4)))


def test_bf16(tmp_path: Path) -> None:
    """The error of the step is within twice that of the same loss on eager logits."""

    class Eager(Distiller):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, num_items_in_batch: Any = None) -> Tensor:
            total, _ = right_sum(model, self.teacher, [inputs])
            return (total / num_items_in_batch).float()

    def error(kind: Any) -> float:
        trainer = distiller(tmp_path, kind=kind, bf16=True)
        right = plain_copy(trainer.model)
        _, found = step(trainer)
        total, count = right_sum(right, plain_copy(trainer.teacher), one_by_one(chats(4)))
        (total / count).backward()
        differences = [(found[name].double() - p.grad).norm() for name, p in right.named_parameters()]
        return float(torch.stack(differences).norm() / torch.stack([p.grad.norm() for p in right.parameters()]).norm())

    assert error(Distiller) < 2 * error(Eager)


def test_neftune_adds_noise_to_the_student_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import neftune

    assert neftune  # the hook draws its noise with uniform_; here it is the upper bound everywhere
    trainer = distiller(tmp_path, neftune_noise_alpha=5.0, gradient_accumulation_steps=1)
    right, right_teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    monkeypatch.setattr(Tensor, "uniform_", lambda x, low, high: x.fill_(float(high)))
    right.get_input_embeddings().register_forward_hook(lambda _m, _i, x: x + 5.0 / (x.shape[1] * x.shape[2]) ** 0.5)
    loss, found = step(trainer)
    total, count = right_sum(right, right_teacher, trainer.batches)
    (total / count).backward()
    assert_right(loss, found, total / count, gradients(right), 1e-3)


def test_evaluation(tmp_path: Path) -> None:
    """The loss alone comes without logits; metrics and predictions get the student's logits."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"rows": float(len(prediction.predictions))}

    trainer = distiller(tmp_path, per_device_eval_batch_size=2)
    right, right_teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    with torch.no_grad():
        total, count = right_sum(right, right_teacher, one_by_one(chats(2, seed=5)))
        batch = padded(chats(2, seed=5))
        mask = batch["attention_mask"]
        logits = right(input_ids=batch["input_ids"], attention_mask=mask).logits[mask.bool()]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    trainer.compute_metrics = metrics
    result = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    assert result["eval_rows"] == 2
    for found in (seen[0], trainer.predict(chats(2, seed=5)).predictions):
        assert torch.allclose(torch.tensor(found)[mask.bool()].double(), logits, atol=1e-4)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_cached_teacher_of_a_data_set(labelled: bool, tmp_path: Path) -> None:
    """Trainer removes the columns that a model does not take, but not those of the teacher."""
    from datasets import Dataset

    student, teacher = language_model(), language_model(**WIDE).eval()
    rows = [{name: x[:9] for name, x in row.items()} for row in chats(4)]
    right = copy.deepcopy(student).double()
    with torch.no_grad():
        for row in rows:
            logprobs, indices = teacher(input_ids=row["input_ids"][None]).logits.log_softmax(-1).topk(CLASSES)
            row |= {"topk_logprobs": logprobs[0], "topk_indices": indices[0], "unused": torch.zeros(1)}
            if not labelled:
                row["labels"] = row["input_ids"]
    stored = Dataset.from_list([{n: x.tolist() for n, x in row.items() if labelled or n != "labels"} for row in rows])
    arguments = TrainingArguments(output_dir=str(tmp_path), **STEP)
    options = OPTIONS if labelled else {**OPTIONS, "alpha": 1.0}
    trainer = Distiller(student, arguments, train_dataset=stored, distillation=options)
    loss, found = step(trainer)
    total, count = right_sum(right, copy.deepcopy(teacher).double(), one_by_one_of(rows), alpha=options["alpha"])
    (total / count).backward()
    assert_right(loss, found, total / count, gradients(right), 1e-3)


def one_by_one_of(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return one_by_one([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


# -- TRL's SFTTrainer --------------------------------------------------------------------------------------------

TEXTS = [{"text": words(6 + 3 * i, i)} for i in range(8)]
PAIRS = [{"prompt": words(4 + i, i), "completion": words(3 + 2 * i, 9 + i)} for i in range(4)]
DIALOGUES = [
    {
        "messages": [
            {"role": role, "content": words(3 + i, 10 * i + n)} for n, role in enumerate(["user", "assistant"] * 2)
        ]
    }
    for i in range(4)
]


def sft(folder: Path, rows: list[dict[str, Any]], student: Any = None, peft_config: Any = None, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class SFTDistiller(CausalLMDistillationMixin, Recorded, trl.SFTTrainer):
        pass

    options = {"bf16": False, "gradient_checkpointing": False, "dataset_num_proc": None} | options
    return SFTDistiller(
        student or language_model(**LONG), trl.SFTConfig(output_dir=str(folder), **STEP | options),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]), peft_config=peft_config,
        processing_class=tokenizer(), teacher=language_model(**WIDE, **LONG), distillation=OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True, "max_length": 40}),
        (TEXTS, {"padding_free": True, "max_length": None}),
        (PAIRS, {"gradient_checkpointing": True}),
        (PAIRS, {"packing": True, "max_length": 40}),
        (DIALOGUES, {"assistant_only_loss": True}),
    ],
    ids=["text", "packing", "padding-free", "completion", "packed completions", "assistant"],
)
def test_sft(rows: list[dict[str, Any]], options: dict[str, Any], tmp_path: Path) -> None:
    trainer = sft(tmp_path, rows, **options)
    assert_step(trainer)
    if "packing" in options:
        assert any((batch["position_ids"] == 0).sum() > 2 for batch in trainer.batches)  # rows were packed
    elif rows is not TEXTS:
        assert any((batch["labels"][:, 3] == -100).any() for batch in trainer.batches)  # prompts do not count


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_sft_with_peft(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "lora": peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    trainer = sft(tmp_path, PAIRS, peft_config=configs[kind])
    assert_step(trainer)


def test_sft_evaluates_during_training(tmp_path: Path) -> None:
    trainer = sft(tmp_path, PAIRS, eval_strategy="steps", eval_steps=1)
    trainer.train()
    right, right_teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(2)])
    total, count = right_sum(right, right_teacher, documents(batch))
    (logged,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == pytest.approx(float(total.detach() / count), rel=1e-4)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (2, batch["input_ids"].shape[1], CLASSES)


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"^label_smoothing_factor is 0\.1; it should be 0"),
        ({"loss_type": "dft"}, r"^loss_type is 'dft'; it should be 'nll'"),
        ({"use_liger_kernel": True}, r"^use_liger_kernel is True.*fused_linear_cross_entropy"),
    ],
    ids=str,
)
def test_options_that_ask_for_another_loss(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sft(tmp_path, PAIRS, **options)


def test_layer_kernels_of_liger_are_allowed() -> None:
    arguments = TrainingArguments(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False})
    check_trainer_options({}, [arguments], None)


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"temprature": 2.0}, r"^causal_lm_loss has no option temprature$"),
        ({"teacher": None}, r"^causal_lm_loss has no option teacher$"),
        ({"num_items": 3}, r"^distillation has num_items, which the trainer sets"),
    ],
    ids=str,
)
def test_the_mixin_refuses_options_at_once(distillation: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CausalLMDistillationMixin(distillation=distillation)


def test_another_loss_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^compute_loss_func is another loss; it should be None"):
        CausalLMDistillationMixin(compute_loss_func=print)


def test_sequences_split_over_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            split = SimpleNamespace(cp_enabled=True, sp_enabled=False)
            monkeypatch.setattr(type(self.accelerator), "parallelism_config", split)

    class SplitDistiller(CausalLMDistillationMixin, Split):
        pass

    with pytest.raises(ValueError, match=r"^the trainer splits sequences.*leave both sizes at 1"):
        distiller(tmp_path, kind=SplitDistiller)


def test_the_student_as_teacher_is_refused_before_training(tmp_path: Path) -> None:
    student = language_model()
    with pytest.raises(ValueError, match=r"^teacher is the student itself"):
        Distiller(student, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), teacher=student)


# -- two processes -----------------------------------------------------------------------------------------------


def everyones(rows: list[Any]) -> list[Any]:
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, rows)
    return [*gathered[0], *gathered[1]]


def average_over_tokens(folder: Path) -> None:
    """2 processes x 2 micro-batches of different lengths."""
    rows = chats(8)
    trainer = distiller(folder, rows=rows, ddp_backend="gloo", ddp_find_unused_parameters=False)
    assert_step(trainer, one_by_one(rows))
    assert dist.get_world_size() == 2


def average_over_processes(folder: Path) -> None:
    """With average_tokens_across_devices=False each process divides by its own labels, as in Trainer."""
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "average_tokens_across_devices": False}
    trainer = distiller(folder, rows=chats(8), **options)
    right, right_teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    loss, found = step(trainer)
    mine = [document for batch in trainer.batches for document in documents(batch)]
    total, count = right_sum(right, right_teacher, mine)
    (total / count).backward()
    mean = (total / count).detach()
    for x in (mean, *gradients(right).values()):
        dist.all_reduce(x)
        x /= 2
    assert_right(loss, found, mean, gradients(right), 1e-3)


def sft_packing(folder: Path) -> None:
    from peft import LoraConfig

    peft_config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "per_device_train_batch_size": 1}
    trainer = sft(folder, TEXTS, peft_config=peft_config, packing=True, max_length=32, **options)
    student, teacher = plain_copy(trainer.model), plain_copy(trainer.teacher)
    loss, found = step(trainer)
    rows = everyones([document for batch in trainer.batches for document in documents(batch)])
    total, count = right_sum(student, teacher, rows)
    (total / count).backward()
    assert_right(loss, found, total / count, gradients(student), 1e-3)


def test_two_processes(tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    for check in (average_over_tokens, average_over_processes, sft_packing):
        check(Path(sys.argv[1]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way
