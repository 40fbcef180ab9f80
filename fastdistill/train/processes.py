"""Coordinates the processes that `torchrun` or `accelerate launch` started together.

Work that one process does for all (claiming an output) or before the others (filling a cache) goes through this file,
so that an error in one process is raised in all, and none waits for a process that gave up.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

Result = TypeVar("Result")


def processes() -> PartialState:
    """Returns the state of this process among those launched together, with or without an accelerator.

    Without one, PartialState must be told so, or each process would take itself for the only one.
    """
    has_accelerator = torch.accelerator.current_accelerator(check_available=True) is not None
    # All others wait while one process tokenises a corpus; by default NCCL gives up after 10 minutes.
    return PartialState(cpu=not has_accelerator, timeout=timedelta(hours=2))


def check_gpus() -> None:
    """Raises ValueError if one process sees several GPUs: transformers' Trainer would use DataParallel on them."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and processes().distributed_type is DistributedType.NO:
        raise ValueError(
            f"{gpus} GPUs in one process would use DataParallel, which cannot pass the teacher's states on and takes "
            f"the batch size {gpus} times; start one process for each with torchrun or accelerate launch, or let it "
            "see one alone with CUDA_VISIBLE_DEVICES=0"
        )


def on_main(function: Callable[[], Result]) -> Result:
    """Runs `function` on the main process, and returns its result or raises its error on every process."""
    result = _run_together(function, processes().is_main_process)
    return broadcast_object_list([result])[0]


def main_first(function: Callable[[], Result]) -> Result:
    """Runs `function` on every process. One process of each machine goes first and fills caches for the others.

    An error on any process is raised on all.
    """
    is_first = processes().is_local_main_process
    early, late = _run_together(function, is_first), _run_together(function, not is_first)
    return early if is_first else late


def _run_together(function: Callable[[], Any], is_mine: bool) -> Any:
    """Runs `function` where `is_mine` is set. An error is raised on every process: its own, or else the first other."""
    result, error, message = None, None, None
    try:
        result = function() if is_mine else None
    except Exception as caught:  # a known kind is sent, so that it can be pickled and bad input stays bad input
        known = (FileExistsError, FileNotFoundError, OSError, ValueError)
        kind = next((kind for kind in known if isinstance(caught, kind)), RuntimeError)
        error, message = caught, kind(str(caught))
    raised = [other for other in gather_object([message]) if other is not None]
    if raised:
        raise error or raised[0]
    return result
