"""TinyBERT on tasks: GLUE and tasks on tokens, augmentation, search, the demo.

Each command of the command line is one function here, which takes that command's options from
`fastdistill.recipes.options`:

    distil_task(TaskOptions(teacher="teacher", student="general", task="SST-2", output=Path("student")))
"""

from importlib import import_module
from typing import Any

# The module of each function, which is imported when the function is asked for.
_MODULES = {
    "augment_task": "prepare", "cache_teacher": "prepare", "run_demo": "prepare", "evaluate_task": "evaluate",
    "distil_lm": "lm", "print_held_out": "lm",
    "distil_cached": "distil", "distil_general": "distil", "distil_task": "distil", "finetune_task": "distil",
    "print_figures": "evaluate", "print_results": "search",
    "compare_runs": "report", "print_comparison": "report",
}  # fmt: skip
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
