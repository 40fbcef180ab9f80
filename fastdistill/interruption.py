"""SIGTERM, which schedulers send before they take a machine away: finish the step, write a checkpoint, end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

__all__ = ["Terminated", "checkpoint_on_sigterm"]

logger = logging.get_logger(__name__)


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
