"""A Trainer that may be stopped at any moment: by SIGTERM, which schedulers send before they take a machine away, or
by a kill. A resumed run sees the rows that the whole run would have seen.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import distributed, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    trainer_pt_utils,
)
from transformers.utils import logging

from fastdistill.train import outputs
from fastdistill.train.adapters import ADAPTER, load_adapters
from fastdistill.train.data import OwnRows
from fastdistill.train.heads import is_peft
from fastdistill.train.options import Schedule
from fastdistill.train.processes import check_gpus, on_main, processes
from fastdistill.train.reading import WEIGHTS, reading

# transformers before 5.2 has no such strategy.
BATCH_SAMPLERS = tuple(
    getattr(trainer_pt_utils, name) for name in ("BatchRebalanceSampler",) if hasattr(trainer_pt_utils, name)
)

__all__ = ["ResumableTrainer", "Terminated", "checkpoint_on_sigterm", "load_student", "training_arguments"]

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """Draws the order of another sampler from the seed and the epoch's number alone.

    A sampler that draws from the global generator would give a resumed epoch another order than it began with. `epoch`
    is called at each start, because accelerate's `set_epoch` gets lost where batches are skipped or dealt out.
    """

    sampler: Sampler[int]
    seed: int
    epoch: Callable[[], int]

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch())
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class ResumableTrainer(Trainer):
    """Trains as transformers' Trainer does, and may be stopped at any moment.

    It marks a checkpoint once all files of all processes are there, and only then deletes older ones. Several GPUs in
    one process are a ValueError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            check_gpus()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. On SIGTERM it finishes the step, writes a checkpoint and raises `Terminated`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = outputs.last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint is True; {self.args.output_dir} holds no whole checkpoint")
        if resume_from_checkpoint and Path(resume_from_checkpoint).is_dir():
            check_state(Path(resume_from_checkpoint))
        with checkpoint_on_sigterm(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def train_whole(self, student: PreTrainedModel, output: Path, checkpoint: str | None) -> PreTrainedModel:
        """Trains `student`, moves the working folder to `output`, and returns the student, in one piece under FSDP."""
        kind, dtype = type(student), student.dtype  # FSDP changes the class
        # PEFT's files lack the model below the adapters, which FSDP leaves in shards.
        whole = copy.deepcopy(student) if self.is_fsdp_enabled and is_peft(student) else None
        self.train(resume_from_checkpoint=checkpoint)
        with outputs.writing(outputs.working_folder(output)):
            self.save_model()
            self.save_state()
        self.accelerator.wait_for_everyone()
        on_main(lambda: outputs.replace(outputs.working_folder(output), output))
        on_main(lambda: outputs.drop_checkpoints(output))  # last, so that a killed run always has one
        if whole is not None:
            load_student(whole, output)
        elif self.is_fsdp_enabled:
            whole = read_student(kind, output, dtype)
        return (student if whole is None else whole.to(self.args.device)).eval()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(resume_from_checkpoint, *WEIGHTS):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or "", "optimizer.*", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or "", "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not isinstance(self.train_dataset, OwnRows):
            return super().get_train_dataloader()
        # Trainer's own would deal the rows out to the processes a second time.
        loader = DataLoader(
            self.train_dataset, self._train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Returns no batches after the last step: Trainer, resumed there in the middle of an epoch, would go on."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if sampler is None:
            return None
        if isinstance(sampler, BATCH_SAMPLERS):  # draws from its own seed and epoch; Trainer looks for its class
            return sampler
        if hasattr(sampler, "lengths"):  # a lazy column: each look-up would decode a row of Arrow
            sampler.lengths = np.asarray(sampler.lengths[:]).tolist()
        return EpochSampler(sampler, self.args.data_seed or self.args.seed, lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        work = Path(self._get_output_dir(trial=trial))
        checkpoint = work / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / outputs.WHOLE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with outputs.writing(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / outputs.WHOLE).touch()
            if limit:
                best = Path(self.state.best_model_checkpoint or checkpoint)
                outputs.drop_checkpoints(work, keep=(checkpoint, best, *outputs.whole_checkpoints(work)[-limit:]))
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model also where FSDP keeps its state in shards, as Trainer does not."""
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)


class Terminated(SystemExit):
    """Says that SIGTERM stopped the training after a checkpoint. Uncaught, it exits with code 143 (128 + 15)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


@contextmanager
def checkpoint_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """Makes SIGTERM in this block finish the step of `trainer`, write a checkpoint and raise `Terminated`.

    Processes that train together all stop after the same step, whichever of them got the signal. Signal handlers
    belong to the main thread, so the block does nothing in other threads. transformers' own `enable_jit_checkpoint`
    waits for 3 seconds, may save in the middle of a step, lets each process decide alone, and then ends as if training
    were done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = _Checkpoint(trainer.args.world_size)
    before = signal.signal(signal.SIGTERM, callback.receive)
    trainer.add_callback(callback)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        trainer.remove_callback(callback)
    if callback.received:  # after the last step
        signal.raise_signal(signal.SIGTERM)


class _Checkpoint(TrainerCallback):
    def __init__(self, processes: int) -> None:
        self.received = self.stops = False
        # gloo exchanges the flag between hosts after every step, without a host sync.
        self.group = distributed.new_group(backend="gloo") if processes > 1 else None

    def receive(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = torch.tensor(int(self.received), device="cpu")
        if self.group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self.group)
        self.stops = bool(received)
        control.should_save |= self.stops

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stops:
            message = f"stopped by SIGTERM after step {state.global_step}, whose checkpoint is written"
            if state.is_world_process_zero:
                logger.warning("%s; run again with resume=True (--resume) to go on from there", message)
            raise Terminated(message)


def training_arguments(
    work: Path, schedule: Schedule, kind: type[TrainingArguments] = TrainingArguments, **others: Any
) -> Any:
    """Returns the Trainer's arguments, of the class `kind`, for a schedule. `schedule.arguments` wins over `others`."""
    if "output_dir" in schedule.arguments:
        raise ValueError(
            f"arguments has output_dir {schedule.arguments['output_dir']!r}; the student is written to the output_dir "
            "of run: leave it out"
        )
    if not 0 <= schedule.warmup < 1:  # transformers would take it for a number of steps
        raise ValueError(
            f"warmup is {schedule.warmup}; it should be a share of the steps, 0 or more and below 1: a number of steps "
            'is arguments={"warmup_steps": N}'
        )
    options: dict[str, Any] = {
        "output_dir": str(work), "hub_model_id": work.name.removesuffix(".partial"),
        "save_total_limit": 1, "logging_steps": 50, "seed": schedule.seed,
        "num_train_epochs": schedule.epochs, "per_device_train_batch_size": schedule.batch_size,
        "per_device_eval_batch_size": max(schedule.batch_size, 64),
        "learning_rate": schedule.learning_rate, "weight_decay": schedule.weight_decay,
        "lr_scheduler_type": schedule.scheduler, "warmup_steps": schedule.warmup,  # below 1: a share of all steps
        # The filter reads every step's loss back from the device, and hides a NaN by repeating older losses.
        "logging_nan_inf_filter": False,
        # Without it Trainer refuses bf16 on a machine without an accelerator.
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
    }  # fmt: skip
    # Batches of similar length need little padding. transformers 5.0 has another name, and refuses it for streams.
    if hasattr(TrainingArguments, "train_sampling_strategy"):
        options["train_sampling_strategy"] = "group_by_length"
    else:
        options["group_by_length"] = not getattr(schedule, "streaming", False)
    processes()  # before TrainingArguments, whose shorter timeout would end a process that waits for long tokenising
    return kind(**{**options, **others, **schedule.arguments})


def check_state(checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint's trainer_state.json cannot be read, or holds no state of a run."""
    path = checkpoint / "trainer_state.json"
    with reading(path):
        state = TrainerState.load_from_json(str(path))
        wrong = [name for name in ("global_step", "max_steps") if not isinstance(getattr(state, name), int)]
        if wrong or not isinstance(state.log_history, list) or not isinstance(state.stateful_callbacks, dict):
            raise ValueError(f"{' and '.join(wrong) or 'log_history or stateful_callbacks'} of another type")


def load_student(student: PreTrainedModel, folder: str | Path) -> None:
    """Reads a student's weights back in place, whatever transformers did to write them (ties, shards, renames).

    Of a PEFT model these are the adapters; the model below them is as it was.

    Raises ValueError where the files are those of an adapter and the student has none, or another one.
    """
    if is_peft(student):
        load_adapters(student, Path(folder))
        return
    if Path(folder, ADAPTER).is_file() and not Path(folder, "config.json").is_file():
        raise ValueError(
            f"{folder}: the adapter of a PEFT model, and the student is a {type(student).__name__}; pass the PEFT "
            "model that the run trained"
        )
    weights = read_student(type(student), folder, student.dtype).state_dict()
    with reading(Path(folder, "config.json")):  # another number of layers, for example
        student.load_state_dict(weights)


def read_student(kind: type[PreTrainedModel], folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a student that a stage wrote, with its weights in every process."""
    disable_fsdp_ram_efficient_loading()
    with reading(Path(folder, "config.json"), *WEIGHTS):
        return kind.from_pretrained(str(folder), dtype=dtype)
