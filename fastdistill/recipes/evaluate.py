"""Measures a model on a task, and compares it with its teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdistill.recipes.glue import get_task, mean_score
from fastdistill.recipes.options import EvaluateOptions
from fastdistill.recipes.report import figures_table, print_table
from fastdistill.train.checkpoints import load_model
from fastdistill.train.checks import check_tokens
from fastdistill.train.data import PaddingCollator
from fastdistill.train.outputs import write_whole
from fastdistill.train.students import count_parameters, measure_seconds

__all__ = ["evaluate_task", "print_figures"]


def evaluate_task(options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """Returns each model's parameters and metrics, and the student's speed-up and share kept `against` its teacher."""
    task = named_task(options)
    if options.json and options.json.is_dir():
        raise ValueError(f"--json is the folder {options.json}; it should be a file")
    if options.json and options.json.exists() and not options.overwrite:
        raise FileExistsError(f"{options.json} exists; pass overwrite=True to replace it")
    names = [options.model] + ([options.against] if options.against else [])
    trust = options.trust_remote_code
    models = [load_model(name, task.auto_class, trust_remote_code=trust, needs_head=True) for name in names]
    check_tokens(models[0][1], models[-1][1], f"the tokenizer of {names[0]}", f"that of {names[-1]}")
    sets = evaluation_sets(task, options.data)
    figures: dict[str, dict[str, Any]] = {}
    for name, (model, tokenizer) in zip(names, models, strict=True):
        task = task.for_model(model.config, argument=name)
        figures[name] = {"parameters": count_parameters(model), "metrics": metrics(task, sets, tokenizer, model)}
    if options.against:
        (student, tokenizer), (teacher, _) = models
        figures[options.model]["speed_up"] = speed_up(task, sets[task.evaluations[0]], student, teacher, tokenizer)
        figures[options.model]["kept"] = kept(*(figures[name]["metrics"] for name in names))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.json, json.dumps(figures, indent=2) + "\n")
    return figures


def named_task(options: Any, *splits: str) -> Any:
    """Returns the task. Raises FileNotFoundError where a file of its evaluation sets or of `splits` is missing."""
    task = get_task(options.task)
    if options.data is not None:
        for split in (*splits, *task.evaluations):
            file = options.data / task.file(split)
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; --data holds {task.name}'s own files")
    return task


def evaluation_sets(task: Any, data: Path | None) -> dict[str, Any]:
    """Reads the evaluation sets, so that a malformed line shows before the work."""
    return {split: task.load_split(split, data) for split in task.evaluations}


def metrics(task: Any, sets: Mapping[str, Any], tokenizer: Any, model: Any) -> dict[str, dict[str, float]]:
    """Returns the metrics of each evaluation set on its own (MNLI has two)."""
    return {split: task.evaluate(rows, model, tokenizer) for split, rows in sets.items()}


def kept(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> float | None:
    """Returns the share of a teacher's score that its student keeps; None where the teacher has none above 0."""
    score = mean_score(teacher)
    return mean_score(student) / score if score > 0 else None


def speed_up(task: Any, rows: Any, student: Any, teacher: Any, tokenizer: Any) -> float:
    """Returns teacher seconds / student seconds on the same batch of the dev set, in interleaved runs."""
    rows = task.encode(rows.select(range(min(len(rows), 32))), tokenizer)
    names = [name for name in tokenizer.model_input_names if name in rows.column_names]
    batch = PaddingCollator(tokenizer)(list(rows.select_columns(names)))
    seconds = measure_seconds({"student": student, "teacher": teacher}, batch)
    return seconds["teacher"] / seconds["student"]


def print_figures(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what `evaluate_task` returns, a row for each model."""
    print_table(*figures_table(figures))
