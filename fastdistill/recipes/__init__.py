"""TinyBERT on tasks: GLUE and tasks on tokens, augmentation, search, the demo.

Each command of the command line is one function here, which takes that command's options from
`fastdistill.recipes.options`:

    distil_task(TaskOptions(teacher="teacher", student="general", task="SST-2", output=Path("student")))

A function is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.recipes.distil import distil_cached, distil_general, distil_task, finetune_task
    from fastdistill.recipes.evaluate import evaluate_task
    from fastdistill.recipes.prepare import augment_task, cache_teacher, run_demo

__all__ = [
    "augment_task",
    "cache_teacher",
    "distil_cached",
    "distil_general",
    "distil_task",
    "evaluate_task",
    "finetune_task",
    "run_demo",
]
_HOME = {"evaluate_task": "evaluate", "augment_task": "prepare", "cache_teacher": "prepare", "run_demo": "prepare"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'distil')}"), name)
