"""The trainer: stages, objective, data and caches of a distillation. Each name is imported at its first use."""

# ruff: noqa: F401

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.train.cache import read_cache, write_cache
    from fastdistill.train.cache_from import write_cache_from
    from fastdistill.train.data import PaddingCollator, add_teacher_logits, pack_corpus, read_corpus
    from fastdistill.train.external import rows_from_openai, rows_from_vllm
    from fastdistill.train.model import DistillationModel
    from fastdistill.train.objective import Objective
    from fastdistill.train.options import ObjectiveOptions, Schedule
    from fastdistill.train.resumable import Terminated
    from fastdistill.train.stages import CachedStage, GeneralStage, IntermediateStage, PredictionStage
    from fastdistill.train.students import build_student, init_from_teacher
    from fastdistill.train.trainer import DistillationTrainer

# `capture` and `finetune` are functions of the modules of these names: import them from there.
_NAMES = {
    "cache": ("read_cache", "write_cache"),
    "cache_from": ("write_cache_from",),
    "data": ("PaddingCollator", "add_teacher_logits", "pack_corpus", "read_corpus"),
    "external": ("rows_from_openai", "rows_from_vllm"),
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
