"""The processes that `torchrun` or `accelerate launch` started together.

What one of them does for all (claiming an output) or before the others (filling a cache) goes through here, so that an
error of one is an error of all, and none waits for a process that gave up.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

Result = TypeVar("Result")


def processes() -> PartialState:
    """This process among those that were launched together, on machines without an accelerator as well.

    There PartialState must be told so, or every process takes itself for the only one.
    """
    has_accelerator = torch.accelerator.current_accelerator(check_available=True) is not None
    # The others wait while one tokenises a corpus; by default NCCL gives up after 10 minutes.
    return PartialState(cpu=not has_accelerator, timeout=timedelta(hours=2))


def check_gpus() -> None:
    """ValueError where one process sees several GPUs, which transformers' Trainer would train on with DataParallel."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and processes().distributed_type is DistributedType.NO:
        raise ValueError(
            f"{gpus} GPUs in one process would use DataParallel, which cannot pass the teacher's states on and takes "
            f"the batch size {gpus} times; start one process for each with torchrun or accelerate launch, or let it "
            "see one alone with CUDA_VISIBLE_DEVICES=0"
        )


def on_main(function: Callable[[], Result]) -> Result:
    """What `function` returns on the main process, on every process. What it raises there is raised everywhere."""
    result, error = _attempt(function) if processes().is_main_process else (None, None)
    _raise_together(error)
    return broadcast_object_list([result])[0]


def main_first(function: Callable[[], Result]) -> Result:
    """`function` on every process; one of each machine goes first, and the others find what it left in caches.

    What it raises on any is raised on all.
    """
    result: Result | None = None
    for first in (True, False):
        error = None
        if processes().is_local_main_process is first:
            result, error = _attempt(function)
        _raise_together(error)
    return result  # type: ignore[return-value]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _raise_together(error: Exception | None) -> None:
    """Raise on every process what any of them brings: its own error, or the first of the others' with its message."""
    message = None
    if error is not None:  # bad input stays bad input, and any exception can be sent
        known = (FileExistsError, FileNotFoundError, OSError, ValueError)
        kind = next((kind for kind in known if isinstance(error, kind)), RuntimeError)
        message = kind(str(error))
    messages = gather_object([message])
    if error is not None:
        raise error
    for other in messages:
        if other is not None:
            raise other
