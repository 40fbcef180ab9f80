"""A Trainer that may be stopped at any moment: by SIGTERM, which schedulers send before they take a machine away, or
harder. A resumed run sees the rows that the whole run would have seen.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import distributed, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from fastdistill.train.data import OwnRows
from fastdistill.train.outputs import WHOLE, last_checkpoint, whole_checkpoints
from fastdistill.train.processes import check_gpus

__all__ = ["ResumableTrainer", "Terminated", "checkpoint_on_sigterm"]

logger = logging.get_logger(__name__)


class EpochSampler(Sampler[int]):
    """The order of another sampler, drawn anew from the seed and the epoch's number alone.

    Samplers that draw from the global generator start a resumed epoch in another order than it began with. `epoch`
    is asked at each start: accelerate's `set_epoch` gets lost where batches are skipped and dealt out as well.
    """

    def __init__(self, sampler: Sampler[int], seed: int, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch())
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class ResumableTrainer(Trainer):
    """A Trainer that may be stopped at any moment, by SIGTERM or harder.

    A resumed run sees the rows that the whole run would have seen. A checkpoint is marked once all files of all
    processes are there, and only then older ones go. ValueError for several GPUs in one process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            check_gpus()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. On SIGTERM the step is finished, a checkpoint written, and `Terminated` raised."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint is True; {self.args.output_dir} holds no whole checkpoint")
        with checkpoint_on_sigterm(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if not isinstance(self.train_dataset, OwnRows):  # which Trainer would deal out once more
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Trainer's, but nothing after the last step: resumed from there, in the middle of an epoch, it would go on."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if sampler is None:
            return None
        if hasattr(sampler, "lengths"):  # a lazy column, of which each look-up reads Arrow
            sampler.lengths = np.asarray(sampler.lengths[:]).tolist()
        return EpochSampler(sampler, self.args.data_seed or self.args.seed, lambda: int(self.state.epoch or 0))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        work = Path(self._get_output_dir(trial=trial))
        checkpoint = work / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (checkpoint / WHOLE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / WHOLE).touch()
            kept = (checkpoint, Path(self.state.best_model_checkpoint or checkpoint))
            for older in whole_checkpoints(work)[:-limit] if limit else ():
                if older not in kept:
                    shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, which writes no model where FSDP keeps its state in shards."""
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)


class Terminated(SystemExit):
    """Training stopped on SIGTERM, after a checkpoint. Uncaught, it ends the process with exit code 143 (128 + 15)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


@contextmanager
def checkpoint_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """In this block SIGTERM makes `trainer` finish its step, write a checkpoint and raise `Terminated`.

    Where several processes train together, all stop after the same step, whichever of them got the signal. Handlers
    belong to the main thread: in another one nothing changes. transformers' own `enable_jit_checkpoint` waits for 3
    seconds, may save in the middle of a step, lets each process decide alone, and then ends as if training were done.
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
        self.received = False
        self.stops = False
        # The processes ask each other after every step from host to host: no device is waited for.
        self.group = distributed.new_group(backend="gloo") if processes > 1 else None

    def receive(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = torch.tensor(int(self.received), device="cpu")
        if self.group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self.group)
        self.stops = bool(received)
        if self.stops:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stops:
            message = f"stopped by SIGTERM after step {state.global_step}, whose checkpoint is written"
            if state.is_world_process_zero:
                logger.warning("%s; run again with resume=True (--resume) to go on from there", message)
            raise Terminated(message)
