"""Tests every field of transformers.TrainingArguments in DistillationTrainer: it works, or it is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

from fastdistill.train.objective import Objective
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import working_folder
from fastdistill.train.resumable import training_arguments
from fastdistill.train.trainer import DistillationTrainer


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trainer(folder: Path, kind: Any = TrainingArguments, **arguments: Any) -> DistillationTrainer:
    options: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24, seed=1)
    return DistillationTrainer(
        student, teacher, Objective(student.config, teacher.config, terms=("hidden", "prediction")),
        kind(**{**options, **arguments}), processing_class=_tiny.tokenizer(), train_dataset=_tiny.dataset(),
        eval_dataset=_tiny.dataset(8), compute_metrics=lambda _, compute_result=True: {"score": 1.0},
    )  # fmt: skip


REFUSED: dict[str, Any] = {
    "label_smoothing_factor": 0.1, "use_liger_kernel": True, "use_cache": True, "enable_jit_checkpoint": True,
    "parallelism_config": ParallelismConfig(cp_size=2), "tf32": True, "debug": "underflow_overflow",
}  # fmt: skip
# Values other than the default, with which a run trains and evaluates.
WORKS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "num_train_epochs": 1.0, "max_steps": 1, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-6}, "warmup_steps": 1,
    "optim": "sgd", "optim_args": "momentum=0.5", "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
    "adam_epsilon": 1e-6, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False,
    "max_grad_norm": 0.1, "bf16": True, "fp16": True, "bf16_full_eval": True, "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False}, "torch_compile_backend": "eager",
    "neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 1, "auto_find_batch_size": True,
    "logging_strategy": "epoch", "logging_steps": 1, "logging_first_step": True, "log_on_each_node": False,
    "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "non_padding", "eval_strategy": "steps",
    "eval_steps": 1, "eval_delay": 1, "per_device_eval_batch_size": 2, "prediction_loss_only": True,
    "eval_on_start": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
    "eval_accumulation_steps": 1, "include_for_metrics": ["inputs", "loss"], "batch_eval_metrics": True,
    "save_only_model": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
    "full_determinism": False, "seed": 1, "data_seed": 2, "accelerator_config": {"split_batches": True},
    "dataloader_drop_last": True, "dataloader_pin_memory": False, "dataloader_in_order": False,
    "remove_unused_columns": False, "label_names": ["labels"], "train_sampling_strategy": "batch_rebalance",
    "length_column_name": "size", "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 13,
    "ddp_broadcast_buffers": True, "ddp_static_graph": True, "skip_memory_metrics": False,
    "metric_for_best_model": "loss", "greater_is_better": False, "ignore_data_skip": True,
    "dataloader_num_workers": 1,
}  # fmt: skip
# Trainer leaves these to callbacks, to scripts, to the hub, to launchers or to several processes.
ELSEWHERE = {
    "output_dir",
    "use_cpu",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "local_rank",
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    "save_on_each_node",
    "ddp_backend",
    "ddp_timeout",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "torch_compile",
    "torch_compile_mode",
    "liger_kernel_config",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "fp16_full_eval",
    "optim_target_modules",
    "load_best_model_at_end",
    "restore_callback_states_from_checkpoint",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
}


def test_the_table_holds_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - REFUSED.keys() - WORKS.keys() - ELSEWHERE == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_field_works(tmp_path: Path, name: str) -> None:
    more = {"lr_scheduler_type": "cosine_with_min_lr"} if name == "lr_scheduler_kwargs" else {}
    run = trainer(tmp_path, **{name: WORKS[name], **more})
    result = run.train()
    assert result.training_loss > 0
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=name):
        trainer(tmp_path, **{name: REFUSED[name]})
    if name == "use_cache":
        with pytest.raises(ValueError, match="predict_with_generate is True; it should be False"):
            trainer(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)


def test_neftune_adds_noise_to_the_students_embeddings_in_training_only(tmp_path: Path) -> None:
    run = trainer(tmp_path, neftune_noise_alpha=5.0, eval_strategy="steps", eval_steps=1)
    seen: list[tuple[bool, bool]] = []
    table = run.student.get_input_embeddings()

    def record(module: Any, inputs: Any, output: Any) -> None:
        seen.append((module.training, torch.equal(output, module.weight[inputs[0]])))

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            table.register_forward_hook(record)  # after the noise

    run.add_callback(Watch())
    run.train()
    assert set(seen) == {(True, False), (False, True)}


def test_a_stage_has_one_output_and_a_name_on_the_hub(tmp_path: Path) -> None:
    work = working_folder(tmp_path / "student")
    assert training_arguments(work, Schedule(arguments={"use_cpu": True})).hub_model_id == "student"
    named = Schedule(arguments={"use_cpu": True, "hub_model_id": "me/other"})
    assert training_arguments(work, named).hub_model_id == "me/other"
    with pytest.raises(ValueError, match=r"^arguments has output_dir 'elsewhere'.*leave it out"):
        training_arguments(work, Schedule(arguments={"output_dir": "elsewhere"}))
