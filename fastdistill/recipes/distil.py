"""Runs the trainings behind the commands: on a corpus, on a task, from a cached teacher, on gold labels alone."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fastdistill.recipes.augment import read_augmented
from fastdistill.recipes.evaluate import evaluation_sets, kept, metrics, named_task, speed_up
from fastdistill.recipes.glue import Task, get_task
from fastdistill.recipes.options import CachedOptions, FinetuneOptions, GeneralOptions, TaskOptions, refuse
from fastdistill.recipes.report import where, write_report
from fastdistill.recipes.search import check_grid, report, search
from fastdistill.train import cache, objective
from fastdistill.train.checkpoints import load_model, load_tokenizer
from fastdistill.train.checks import check_tokens
from fastdistill.train.data import PaddingCollator, add_teacher_logits, named, pack_corpus, read_corpus, reading_text
from fastdistill.train.finetune import finetune
from fastdistill.train.options import ObjectiveOptions, Schedule
from fastdistill.train.outputs import check, drop_checkpoints, whole_output
from fastdistill.train.processes import check_gpus, main_first, on_main, processes
from fastdistill.train.reading import read_json, reading
from fastdistill.train.stages import CachedStage, GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.students import (
    build_student,
    count_parameters,
    init_from_teacher,
    is_config,
    positions,
    save_projections,
)

__all__ = ["distil_cached", "distil_general", "distil_task", "finetune_task"]

CALIBRATION_TOKENS = 20_000  # enough to fold a student from its teacher


def distil_general(options: GeneralOptions) -> None:
    """Distils a student on a corpus of plain text into `options.output`, as `GeneralStage` writes it."""
    objective_options(options)  # refuses what the method does not have
    if options.streaming and options.max_steps < 1:
        raise ValueError("--streaming needs --max-steps: a corpus that is not read beforehand has no length")
    if finished(options) is not None:
        return
    teacher, tokenizer = load_model(options.teacher, "AutoModel", trust_remote_code=options.trust_remote_code)
    length = options.max_length
    check_length(length, "teacher", teacher)
    corpus: Any = options.corpus
    if options.streaming:
        with reading_text(corpus):
            blocks = pack_corpus(read_corpus(corpus, streaming=True), tokenizer, length, apart=options.packing)
            rows = Dataset.from_list(list(itertools.islice(blocks, CALIBRATION_TOKENS // length + 1)))
        if not rows:
            raise ValueError(f"corpus holds no text ({named(corpus)})")
    else:
        corpus = rows = main_first(lambda: pack_corpus(options.corpus, tokenizer, length, apart=options.packing))
    stage = partial(
        GeneralStage, corpus=corpus, max_length=length, streaming=options.streaming, packing=options.packing
    )  # fmt: skip
    run_stage(options, stage, teacher, tokenizer, rows)


def distil_cached(options: CachedOptions) -> None:
    """Distils a student from what `cache_teacher` wrote into `options.output`, as `CachedStage` writes it."""
    if finished(options) is not None:
        return
    rows = cache.read_cache(options.cache, verify=options.verify)
    tokenizer = load_tokenizer(options.cache)
    options = replace(options, terms=options.terms or cache.terms_served(options.cache))
    is_live = "attention" in (options.terms or ())
    if options.teacher is not None:
        teacher = cached_teacher(options, options.teacher)
    elif is_live or options.init == "teacher":
        raise ValueError("the attention term and --init teacher need --teacher: a cache holds no scores and no weights")
    else:
        teacher = cache.weightless_teacher(options.cache)
        options = replace(options, init="random" if is_config(options.student) else options.init)
    run_stage(options, partial(CachedStage, cache=options.cache), teacher, tokenizer, rows, is_live=is_live)


def run_stage(options: Any, stage: Any, teacher: Any, tokenizer: Any, rows: Any, is_live: bool = True) -> None:
    """Makes the student and trains it. Where the teacher is not `is_live`, the rows hold its outputs."""
    with tempfile.TemporaryDirectory() as scratch:
        student = make_student(options, options.student, teacher, tokenizer, rows, options.seed, Path(scratch))
        if isinstance(options, GeneralOptions):
            check_length(options.max_length, "student", student)
        projections = projections_folder(options.student, scratch)
        settings = {f.name: getattr(options, f.name) for f in fields(Schedule)}
        settings.update(objective_options(options), arguments=trainer_arguments(options), projections=projections)
        stage(**settings).run(
            student, teacher if is_live else None, tokenizer, options.output,
            resume=options.resume, overwrite=options.overwrite,
        )  # fmt: skip
    finish(options.output)


def cached_teacher(options: CachedOptions, name: str) -> Any:
    """Returns the teacher `name`. Raises ValueError where another teacher wrote the cache.

    A bare encoder is not compared, because its pooler may be random.
    """
    theirs = cache.read_manifest(options.cache)["teacher"]
    if "class" not in theirs:
        raise ValueError(
            f"--teacher is {name}; cache {options.cache} was made elsewhere, without a teacher: leave it out"
        )
    teacher, _ = load_model(name, theirs["class"], trust_remote_code=options.trust_remote_code)
    if teacher.base_model is teacher:
        return teacher
    dtype = getattr(cache.teacher_config(options.cache), "dtype", None) or teacher.dtype
    cached = teacher if dtype == teacher.dtype else copy.deepcopy(teacher).to(dtype)
    if cache.identity(cached)["weights_sha256"] != theirs["weights_sha256"]:
        raise ValueError(
            f"--teacher {name} has other weights than {theirs['name']}, the teacher whose cache {options.cache} is"
        )
    return teacher


def distil_task(options: TaskOptions) -> dict[str, Any]:
    """Distils a student on a task: the intermediate stage, the prediction stage over a grid, the dev sets' metrics.

    Returns what `results.json` in `options.output` holds (see `fastdistill.recipes.search.search`).
    """
    task = named_task(options, "train")
    run = TaskRun(options, task)
    check_stages(options, task, run.objective["terms"])
    check_grid(**run.grid)
    if options.augmented and not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; --augmented holds rows of a GLUE task")
    if (results := finished(options)) is not None:
        return results
    with tempfile.TemporaryDirectory() as scratch:
        run.load(Path(scratch))
        return grid_search(options, run.grid, run.train_last, run.evaluate, run.prepare, run.report)


class TaskRun:
    """The trainings of `distil_task`, with the models and rows that `load` reads."""

    def __init__(self, options: TaskOptions, task: Any) -> None:
        self.learns_scores = task.is_regression and options.labels == "teacher"
        if self.learns_scores:
            options = replace(options, scores="teacher")
        self.options, self.task, self.objective = options, task, objective_options(options)
        self.needs_predictions = options.labels != "gold" and (self.learns_scores or task.caches_logits)
        self.has_prediction = options.prediction_epochs != 0
        names = ("parity", "temperature", "t_squared", "divergence", "alpha", "scores")
        self.prediction = {name: getattr(options, name) for name in names}
        epochs = options.intermediate_epochs
        self.intermediate = {
            "epochs": task.intermediate_epochs if epochs is None else epochs,
            "learning_rate": options.intermediate_learning_rate or task.intermediate_learning_rate,
            "batch_size": options.intermediate_batch_size or task.batch_size,
        }
        prediction = {"learning_rate": task.prediction_learning_rate, "batch_size": task.batch_size}
        last = prediction if self.has_prediction else self.intermediate
        self.grid: dict[str, Any] = {
            "learning_rates": options.learning_rates or [last["learning_rate"]],
            "batch_sizes": options.batch_sizes or [last["batch_size"]],
            "seeds": options.seeds,
        }

    def load(self, scratch: Path) -> None:
        """Reads models and rows. Raises the errors of the stages early, before `overwrite` drops a run."""
        options, trust = self.options, self.options.trust_remote_code
        self.teacher, self.tokenizer = load_model(
            options.teacher, self.task.auto_class, trust_remote_code=trust, needs_head=True
        )
        self.task = task = self.task.for_model(self.teacher.config)
        rows = read_augmented(task, options.augmented) if options.augmented else task.load_split("train", options.data)
        self.rows = rows = task.tokenize(rows, self.tokenizer)
        self.sets = sets = evaluation_sets(task, options.data)
        self.evaluate = partial(metrics, task, sets, self.tokenizer)
        evaluates_early = options.arguments.get("eval_strategy", "no") != "no"
        self.dev = task.tokenize(sets[task.evaluations[0]], self.tokenizer) if evaluates_early else None
        seed = options.seeds[0]
        self.student = make_student(options, options.student, self.teacher, self.tokenizer, rows, seed, scratch)
        check_rows(task, self.tokenizer, self.student)
        self.projections = projections_folder(options.student, scratch)
        if self.has_prediction and options.labels != "gold":
            checked = objective.Objective(self.student.config, terms=("prediction",), **self.prediction)
            checked.for_head(self.student)
        if self.intermediate["epochs"]:
            checked = objective.Objective(self.student.config, self.teacher.config, **self.objective)
            if self.projections is not None and len(checked.projections):
                checked.load_projections(self.projections)

    def prepare(self, work: Path) -> None:
        """Trains the intermediate stage, and gives the rows what the prediction stage needs."""
        options, task = self.options, self.task
        if self.intermediate["epochs"] and self.has_prediction:
            schedule = {**self.intermediate, "seed": options.seeds[0], "arguments": trainer_arguments(options)}
            self.student = self.distil(self.student, work / "intermediate", **schedule)
        if task.caches_logits or self.learns_scores:
            if self.has_prediction and self.needs_predictions:
                self.rows = add_teacher_logits(self.rows, self.teacher, self.tokenizer, bf16=options.bf16)
        elif options.augmented:  # changed words change the score, so the published recipe leaves these rows out
            self.rows = task.tokenize(task.load_split("train", options.data), self.tokenizer)

    def distil(self, model: Any, folder: Path, **schedule: Any) -> Any:
        """Trains a student through the intermediate stage."""
        stage = IntermediateStage(dataset=self.rows, projections=self.projections, **self.objective, **schedule)
        return stage.run(model, self.teacher, self.tokenizer, folder, eval_dataset=self.dev, resume=True)

    def train_last(self, folder: Path, **schedule: Any) -> Any:
        """Trains a copy of the student through the last stage, at one point of the grid."""
        options, model = self.options, copy.deepcopy(self.student)
        if not self.has_prediction:
            return self.distil(model, folder, epochs=self.intermediate["epochs"], **schedule)
        schedule["epochs"] = options.prediction_epochs or self.task.prediction_epochs
        if options.labels == "gold":
            return finetune(model, self.rows, self.tokenizer, folder, **schedule, resume=True)
        stage = PredictionStage(dataset=self.rows, **self.prediction, **schedule)
        return stage.run(model, self.teacher, self.tokenizer, folder, eval_dataset=self.dev, resume=True)

    def report(self, work: Path, results: dict[str, Any]) -> None:
        """Writes `report.md`. All processes evaluate the teacher."""
        best = results["best"]
        runs = {(x["learning_rate"], x["batch_size"]): x["seeds"] for x in results["combinations"]}
        theirs, run = self.evaluate(self.teacher), runs[best["learning_rate"], best["batch_size"]][str(best["seed"])]
        if not processes().is_main_process:
            return
        models = {"teacher": (self.teacher, theirs), "student": (self.student, run["metrics"])}
        figures: dict[str, dict[str, Any]] = {
            name: {"parameters": count_parameters(model), "metrics": found} for name, (model, found) in models.items()
        }
        rows = self.sets[self.task.evaluations[0]]
        figures["student"] |= {
            "speed_up": speed_up(self.task, rows, self.student, self.teacher, self.tokenizer),
            "kept": kept(run["metrics"], theirs),
        }
        last = "prediction stage" if self.has_prediction else "intermediate stage"
        trainings = {"intermediate stage": work / "intermediate", last: work}
        notes = (
            "Metrics are those of the dev sets, in per cent; kept is the share of the teacher's score. The speed-up is "
            f"that of one batch of the dev set on {where()}."
        )
        title = f"{self.task.name}: {self.options.student} from {self.options.teacher}"
        write_report(work, title, figures, trainings, notes, (results, *report(results)))


def check_stages(options: TaskOptions, task: Any, terms: Any) -> None:
    """Raises ValueError where no stage of `task` would train the head, or one would on labels that are not there."""
    if options.prediction_epochs == 0:
        if "prediction" not in terms or options.intermediate_epochs == 0:
            raise ValueError(
                "--prediction-epochs is 0, and nothing else trains the head of the student; add prediction to --terms, "
                "and leave --intermediate-epochs above 0"
            )
        if options.labels == "gold":
            raise ValueError("--labels gold is for the prediction stage, which --prediction-epochs 0 leaves out")
    if options.intermediate_epochs == 0 and not is_config(options.student):
        refuse(options, "layer_map", "without the intermediate stage no layers are compared: leave it out")
    if options.alpha < 1 and task.auto_class == "AutoModelForQuestionAnswering":
        raise ValueError(f"--alpha is {options.alpha}; the prediction of {task.name} takes no labels: leave it out")
    if options.labels == "gold":
        names = "alpha" if "prediction" in terms else "alpha temperature t_squared divergence"
        refuse(options, names, "--labels gold has no teacher's predictions: leave one out")
    if "prediction" in terms and task.is_regression and options.augmented and options.labels != "teacher":
        raise ValueError(
            f"--terms prediction learns the gold scores of {task.name}, which changed words change; leave out "
            "--augmented, or prediction"
        )


def finetune_task(options: FinetuneOptions) -> dict[str, Any]:
    """Trains a model on a task's gold labels over a grid. Returns what `results.json` holds, as `distil_task` does."""
    task = named_task(options, "train")
    grid: dict[str, Any] = {name: getattr(options, name) for name in ("learning_rates", "batch_sizes", "seeds")}
    check_grid(**grid)
    if (results := finished(options)) is not None:
        return results
    rows, trust = task.load_split("train", options.data), options.trust_remote_code
    labels = task.model_options(rows)
    own = {"headless": labels} if options.teacher else labels  # a student takes its teacher's labels, if any
    source, tokenizer = load_model(options.teacher or options.model, task.auto_class, trust_remote_code=trust, **own)
    task = task.for_model(source.config, "teacher" if options.teacher else "model")
    rows = task.tokenize(rows, tokenizer)
    evaluate = partial(metrics, task, evaluation_sets(task, options.data), tokenizer)
    if options.teacher:  # refuses a wrong --model before --overwrite drops a run
        check_rows(task, tokenizer, make_student(options, options.model, source))

    def train(folder: Path, **schedule: Any) -> Any:
        model = make_student(options, options.model, source, tokenizer, rows, schedule["seed"])
        return finetune(model, rows, tokenizer, folder, epochs=options.epochs, **schedule, resume=True)

    return grid_search(options, grid, train, evaluate)


def objective_options(options: Any) -> dict[str, Any]:
    """Returns the keywords of `Objective`. Raises ValueError for options that the method does not have."""
    found = {f.name: getattr(options, f.name) for f in fields(ObjectiveOptions)}
    is_mapped = options.method == "tinybert"  # else --layer-map only says which layers a new student starts from
    if not is_mapped and (options.init == "random" or not is_config(options.student)):
        refuse(
            options,
            "layer_map",
            f"method {options.method} compares last layers, and no layers are copied: leave it out",
        )
    found["layer_map"] = layer_map(options.layer_map) if is_mapped else None
    if options.projection is None:  # as the student's folder brings them
        projections = objective.read_projections(options.student)
        found["projection"] = objective.projection_kind(projections) if projections else "shared"
    objective.check_method_options(**found)
    found["terms"] = objective.resolve_terms(options.method, options.terms)
    return found


def layer_map(text: str) -> str | list[int | None]:
    """Returns a map's name, or the list that `text` spells."""
    if not text.startswith(tuple("-0123456789")):
        return text
    try:
        return [None if part == "-" else int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layer-map is {text!r}; a list looks like 0,3,6,-,12 with - for none") from None


def trainer_arguments(options: Any) -> dict[str, Any]:
    """Returns the TrainingArguments that are the same in every stage of a command."""
    found = {"bf16": options.bf16, "max_steps": options.max_steps, "report_to": "none"}
    found.update({"dataloader_num_workers": getattr(options, "workers", 0), **options.arguments})
    if found.get("push_to_hub"):
        found.setdefault("hub_model_id", options.output.name)  # else the working folder's name
    return found


def make_student(
    options: Any, spec: str, teacher: Any, tokenizer: Any = None, rows: Any = None, seed: int = 0, scratch: Any = None
) -> Any:
    """Returns the student. `rows` fold one from the teacher, which leaves its first projections in `scratch`."""
    torch.manual_seed(seed)  # seeds the weights that no checkpoint brings
    if teacher is None:  # of a cache that was made elsewhere
        if is_config(spec):
            raise ValueError(f"--student is {spec}; a cache made elsewhere has no teacher's config: pass a checkpoint")
        student, ours = load_model(spec, trust_remote_code=options.trust_remote_code)
        check_tokens(ours, tokenizer, f"the tokenizer of {spec}", "that of the cache")
        return student
    init = "random" if is_config(spec) else options.init
    student = build_student(
        spec, teacher, init=init, trust_remote_code=options.trust_remote_code, tokenizer=tokenizer
    )  # fmt: skip
    if not is_config(spec) or options.init == "random" or rows is None:
        return student
    rows = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    spread = list(rows.select(range(0, len(rows), max(len(rows) // 1000, 1))))
    before = itertools.accumulate((len(row["input_ids"]) for row in spread), initial=0)  # tokens before each row
    chosen = [row for row, tokens in zip(spread, before, strict=False) if tokens < CALIBRATION_TOKENS]
    calibration, places = PaddingCollator(tokenizer)(chosen), layer_map(options.layer_map)
    weight = init_from_teacher(student, teacher, layer_map=places, calibration=calibration)
    if scratch is not None:
        save_projections(student, teacher, weight, scratch, **objective_options(options))
    return student


def projections_folder(*folders: str | Path) -> Path | None:
    """Returns the first folder that brings projections: an earlier stage's student, or where a folded one left them."""
    return next((Path(folder) for folder in folders if objective.read_projections(folder)), None)


def check_rows(task: Any, tokenizer: Any, student: Any) -> None:
    """Raises ValueError where the student takes shorter rows than the task has."""
    longest = min(task.max_length, tokenizer.model_max_length)
    if positions(student) < longest:
        raise ValueError(
            f"the student takes {positions(student)} tokens at most; rows of {task.name} are cut to {longest}. Give it "
            f"max_position_embeddings {student.config.max_position_embeddings + longest - positions(student)} or more"
        )


def check_length(max_length: int, name: str, model: Any) -> None:
    """Raises ValueError where a model takes shorter blocks."""
    if max_length > positions(model):
        raise ValueError(f"--max-length is {max_length}; the {name} takes {positions(model)} tokens at most")


def finished(options: Any) -> dict[str, Any] | None:
    """Returns the results of a finished run that `resume` finds: empty without a results.json; None without a run."""
    check_gpus()
    output: Path = options.output

    def look() -> dict[str, Any] | None:
        if options.overwrite or not (options.resume and (output / "config.json").is_file()):
            check(output, resume=options.resume, overwrite=options.overwrite)
            return None
        drop_checkpoints(output)  # a run that was killed in its last moment leaves one
        file = output / "results.json"
        if not file.is_file():
            return {}
        results = read_json(file)
        with reading(file):
            report(results)  # what is printed of it is there
        return results

    results = on_main(look)
    if results is not None:
        finish(output, "finished before:")
        on_main(lambda: print("nothing was trained, whatever the options; --overwrite trains again"))
    return results


def grid_search(
    options: Any, grid: dict[str, Any], train: Any, evaluate: Any, prepare: Any = None, report: Any = None
) -> dict[str, Any]:
    """Prepares once, trains at each point of the grid, keeps the best run as the output itself, and reports on it."""

    def train_at(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
        point = {"learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        return train(folder, **point, arguments=trainer_arguments(options))

    with whole_output(options.output, resume=options.resume, overwrite=options.overwrite) as work:
        if prepare is not None:
            prepare(work)
        results = search(train_at, evaluate, work, name=get_task(options.task).name, **grid)
        if report is not None:
            report(work, results)
    finish(options.output)
    return results


def finish(output: Path, what: str = "wrote") -> None:
    """Drops the folder of runs if it holds one run only, the output itself, and prints the output's path."""
    if processes().is_main_process:
        runs = output / "runs"
        if runs.is_dir() and len(list(runs.iterdir())) == 1:
            shutil.rmtree(runs)
        print(f"{what} {output}")
