"""The trainer: stages, objective, data and caches of a distillation. Each name is imported at its first use."""

# ruff: noqa: F401

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.train.cache import read_cache, write_cache
    from fastdistill.train.capture import capturable, capture
    from fastdistill.train.data import PaddingCollator, add_teacher_logits, pack_corpus, read_corpus
    from fastdistill.train.finetune import finetune
    from fastdistill.train.model import DistillationModel
    from fastdistill.train.objective import Objective
    from fastdistill.train.options import ObjectiveOptions, Schedule
    from fastdistill.train.resumable import Terminated
    from fastdistill.train.stages import CachedStage, GeneralStage, IntermediateStage, PredictionStage
    from fastdistill.train.students import build_student, init_from_teacher
    from fastdistill.train.trainer import DistillationTrainer

_NAMES = {
    "cache": ("read_cache", "write_cache"),
    "capture": ("capturable", "capture"),
    "data": ("PaddingCollator", "add_teacher_logits", "pack_corpus", "read_corpus"),
    "finetune": ("finetune",),
    "model": ("DistillationModel",),
    "objective": ("Objective",),
    "options": ("ObjectiveOptions", "Schedule"),
    "resumable": ("Terminated",),
    "stages": ("CachedStage", "GeneralStage", "IntermediateStage", "PredictionStage"),
    "students": ("build_student", "init_from_teacher"),
    "trainer": ("DistillationTrainer",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


class _Package(ModuleType):
    """Keeps `capture` and `finetune` functions, although Python sets their modules of the same names as attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
