"""`python -m bench.glue --model BERT --masked MLM --data DIR --corpus FILE --glove FILE --out DIR`: reruns TinyBERT's
table.

For five tasks of GLUE it trains and evaluates the teacher; the distilled student; the same student fine-tuned on the
labels; and the student without one part of the method at a time. Every leg is a `fastdistill` command, printed before
it runs. A finished leg is not run again, so an interrupted command may be repeated. `--tables` runs nothing: it prints
Markdown tables of the finished legs and writes DIR/results.json and DIR/losses.png.

A third of each dev set is held out before the first leg. No leg reads it: learning rates, seeds and budgets are chosen
on the other two thirds, which are called dev here. At the end every model is scored on both parts, and a bootstrap over
rows gives an interval for the share of the teacher's score that a student keeps.

`--smallest` runs the smallest row instead, in 15 minutes on 2 cores, and needs only --model, --data and --out: on MRPC
the narrow student, without general stage and without copies, and the same student from the same start fine-tuned on the
labels.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from bench.bootstrap import hold_out, interval, resampled, resamples
from fastdistill.recipes.glue import Task, compute_metrics, get_task
from fastdistill.recipes.search import RUN
from fastdistill.train.checkpoints import load_model


@dataclass(frozen=True)
class Budget:
    """The training of one task: what two cores do in a quarter of an hour per student."""

    teacher_epochs: int
    copies: int  # of each row that augmentation makes
    intermediate_epochs: int  # over rows and copies
    prediction_epochs: int  # over rows and copies; for STS-B over the rows only, as its copies have no score
    finetune_epochs: int  # of a student on the labels alone


TASKS = {
    "SST-2": Budget(teacher_epochs=1, copies=1, intermediate_epochs=1, prediction_epochs=1, finetune_epochs=3),
    "CoLA": Budget(teacher_epochs=4, copies=10, intermediate_epochs=2, prediction_epochs=1, finetune_epochs=10),
    "MRPC": Budget(teacher_epochs=5, copies=4, intermediate_epochs=2, prediction_epochs=1, finetune_epochs=10),
    "RTE": Budget(teacher_epochs=6, copies=10, intermediate_epochs=2, prediction_epochs=1, finetune_epochs=10),
    "STS-B": Budget(teacher_epochs=4, copies=4, intermediate_epochs=2, prediction_epochs=10, finetune_epochs=10),
}
SMALLEST = {
    "MRPC": Budget(teacher_epochs=2, copies=0, intermediate_epochs=2, prediction_epochs=1, finetune_epochs=3),
}
PARTS = {"dev": "data", "held out": "held-out"}  # of each dev set, and the folder that holds it
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Half the teacher's depth, less than half its width, and its 12 heads. The narrow one is for speed.
CONFIGS = {
    "student.json": {
        "num_hidden_layers": 3, "hidden_size": 156, "intermediate_size": 600, "num_attention_heads": 12, **NO_DROPOUT,
    },
    "narrow.json": {
        "num_hidden_layers": 3, "hidden_size": 144, "intermediate_size": 432, "num_attention_heads": 12, **NO_DROPOUT,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Student:
    general: str | None = "general"  # the folder of its general stage; None: it skips that stage
    terms: tuple[str, ...] = ("embedding", "hidden", "attention")
    augmentation: bool = True
    config: str = "student.json"


DISTILLED = "distilled"
FINE_TUNED = "fine-tuned"
NARROW = "no general stage, narrow"
SMALL, SMALL_FINE_TUNED = "distilled, narrow, no copies", "fine-tuned, narrow"
STUDENTS = {
    DISTILLED: Student(),
    "no augmentation": Student(augmentation=False),
    "no attention loss": Student("general-embedding-hidden", terms=("embedding", "hidden")),
    "no general stage": Student(general=None),
    "no hidden loss": Student("general-embedding-attention", terms=("embedding", "attention")),
    NARROW: Student(general=None, config="narrow.json"),
}


@dataclass(frozen=True)
class Leg:
    output: str  # in the working folder
    command: list[str]  # of fastdistill, without --output
    task: str = ""  # the task whose rows its models are scored on, if any


class Plan:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.budgets = SMALLEST if arguments.smallest else TASKS

    def legs(self) -> Iterator[Leg]:
        """Yields the legs, the most valuable first."""
        if self.arguments.smallest:
            for task in SMALLEST:
                yield self.teacher(task)
                yield self.student(task, SMALL, Student(general=None, augmentation=False, config="narrow.json"))
                yield self.fine_tuned(task, SMALL_FINE_TUNED, "narrow.json", f"{task}/teacher")
            return
        done: set[str] = set()
        for name, student in STUDENTS.items():
            if student.general is not None and student.general not in done:
                done.add(student.general)
                yield self.general(student.general, student)
            for task in self.arguments.tasks:
                if name == DISTILLED:
                    yield self.teacher(task)
                    yield self.augment(task)
                yield self.student(task, name, student)
                if name == DISTILLED:
                    yield self.fine_tuned(task, FINE_TUNED, student.config, self.arguments.model)

    def general(self, output: str, student: Student) -> Leg:
        command = [
            "general", "--teacher", self.arguments.model, "--student", student.config,
            "--corpus", *map(str, self.arguments.corpus), "--terms", *student.terms,
            "--epochs", "1", "--batch-size", "32", "--learning-rate", "5e-4", "--bf16",
        ]  # fmt: skip
        return Leg(output, command)

    def data(self, task: str) -> list[str]:
        return ["--task", task, "--data", f"{PARTS['dev']}/{task}"]

    def teacher(self, task: str) -> Leg:
        epochs = str(self.budgets[task].teacher_epochs)
        rest = ["--epochs", epochs, "--learning-rates", "5e-5", "--bf16", "--seeds", "1"]
        return Leg(f"{task}/teacher", ["finetune", "--model", self.arguments.model, *self.data(task), *rest], task)

    def augment(self, task: str) -> Leg:
        rest = ["--glove", str(self.arguments.glove), "--copies", str(self.budgets[task].copies), "--bf16"]
        return Leg(f"{task}/augmented.arrow", ["augment", "--teacher", self.arguments.masked, *self.data(task), *rest])

    def student(self, task: str, name: str, student: Student) -> Leg:
        budget = self.budgets[task]
        # Without copies, more epochs make up for them, so that every student takes the same number of steps.
        more = 1 if student.augmentation else 1 + budget.copies * len(glue_task(task).texts)
        prediction = 1 if task == "STS-B" else more  # its prediction stage learns from the original rows only
        command = [
            "task", "--teacher", f"{task}/teacher", "--student", student.general or student.config,
            *self.data(task), *(["--augmented", f"{task}/augmented.arrow"] if student.augmentation else []),
            "--terms", *student.terms, "--bf16", "--intermediate-epochs", str(budget.intermediate_epochs * more),
            "--intermediate-learning-rate", "7e-4",
            "--prediction-epochs", str(budget.prediction_epochs * prediction), "--learning-rates", "1e-4",
            "--seeds", *map(str, self.arguments.seeds),
        ]  # fmt: skip
        return Leg(f"{task}/{slug(name)}", command, task)

    def fine_tuned(self, task: str, name: str, config: str, teacher: str) -> Leg:
        command = [
            "finetune", "--model", config, "--teacher", teacher, "--init", "teacher",
            *self.data(task), "--bf16", "--epochs", str(self.budgets[task].finetune_epochs),
            "--learning-rates", "1e-4", "--seeds", *map(str, self.arguments.seeds),
        ]  # fmt: skip
        return Leg(f"{task}/{slug(name)}", command, task)

    def run(self, leg: Leg) -> None:
        """Runs a leg in the working folder, so that the printed commands can be typed there."""
        if (self.out / leg.output).exists():
            return
        command = ["fastdistill", *leg.command, "--output", leg.output]
        print(shlex.join(command), flush=True)
        (self.out / leg.output).parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter(), processor_seconds()
        subprocess.run([sys.executable, "-m", "fastdistill.cli", *command[1:], "--resume"], cwd=self.out, check=True)
        seconds_path = self.out / "seconds.json"
        seconds = json.loads(seconds_path.read_text()) if seconds_path.exists() else {}
        spent = seconds.setdefault(leg.output, {"wall": 0.0, "processor": 0.0})
        spent["wall"] += time.perf_counter() - start[0]
        spent["processor"] += processor_seconds() - start[1]
        seconds_path.write_text(json.dumps(seconds, indent=1) + "\n")


def processor_seconds() -> float:
    """Returns the time that all cores together spent on the commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def glue_task(name: str) -> Task:
    task = get_task(name)
    assert isinstance(task, Task)
    return task


# -- results -----------------------------------------------------------------------------------------------


def predict(out: Path, leg: Leg) -> None:
    """Writes the logits of a leg's models, one for each seed, on both parts of the dev set, beside the labels."""
    path = predictions_path(out, leg.task, leg.output)
    if path.exists():
        return
    task = glue_task(leg.task)
    (best,) = json.loads((out / leg.output / "results.json").read_text())["combinations"]
    found: dict[str, Any] = {part: {"logits": {}} for part in PARTS}
    for seed in best["seeds"]:
        folder = out / leg.output / RUN.format(**best | {"seed": seed})
        model, tokenizer = load_model(str(folder if folder.exists() else out / leg.output), task.auto_class)
        for part, name in PARTS.items():
            rows = task.load_split("dev", out / name / task.name)
            found[part]["labels"] = rows["label"][:]
            found[part]["logits"][seed] = task.predict(rows, model, tokenizer).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")


def predictions_path(out: Path, task: str, output: str) -> Path:
    return out / "predictions" / task / f"{Path(output).name}.json"


@dataclass(frozen=True)
class Scores:
    """The scores of a model on one part of a task's dev set: GLUE's metric, or the mean of its two."""

    seeds: list[float]
    resampled: np.ndarray  # their mean on each resample of the rows

    @property
    def mean(self) -> float:
        return mean(self.seeds)


Found = dict[str, dict[str, Scores]]  # model -> task -> scores


def results(out: Path, tasks: list[str], part: str) -> Found:
    """Scores the predictions that are there. Every model of a task meets the same resamples."""
    found: Found = {}
    for name in ("teacher", DISTILLED, FINE_TUNED, *list(STUDENTS)[1:], SMALL, SMALL_FINE_TUNED):
        for task in map(glue_task, tasks):
            path = predictions_path(out, task.name, slug(name))
            if path.exists():
                rows = json.loads(path.read_text())[part]
                labels, logits = np.array(rows["labels"]), np.array(list(rows["logits"].values()))
                seeds = [compute_metrics(task, seed, labels)["score"] for seed in logits]
                chosen = resamples(task, len(labels))
                found.setdefault(name, {})[task.name] = Scores(seeds, resampled(task, logits, labels, chosen))
    return found


def tables(found: Found, tasks: list[str]) -> str:
    """Returns a table of means and deviations over seeds, and one of the shares of the teacher's scores."""
    tasks = [task for task in tasks if any(task in scores for scores in found.values())]
    heads = f"| model | {' | '.join(tasks)} | average |\n| --- |{' ---: |' * (len(tasks) + 1)}"
    scores, shares = [heads], [heads.replace("model", "kept", 1)]
    for name, models in found.items():
        if set(tasks) <= set(models):
            over = [models[task] for task in tasks]
            models = models | {"average": Scores([x.mean for x in over], np.mean([x.resampled for x in over], axis=0))}
        cells = [spread(models[task].seeds) if task in models else "" for task in tasks]
        cells.append(f"{100 * models['average'].mean:.1f}" if "average" in models else "")
        scores.append(f"| {name} | {' | '.join(cells)} |")
        found = found | {name: models}
        if name != "teacher":
            cells = [share(models.get(task), found["teacher"].get(task)) for task in (*tasks, "average")]
            shares.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(scores) + "\n\n" + "\n".join(shares)


def share(student: Scores | None, teacher: Scores | None) -> str:
    """Returns what a student keeps of its teacher's score, with the interval of the resamples.

    There is no interval where the teacher's score is not above 0 on each of them, as a share of it then means nothing.
    """
    if student is None or teacher is None or teacher.mean <= 0:
        return ""
    if (teacher.resampled <= 0).any():
        return f"{student.mean / teacher.mean:.1%}"
    low, high = interval(student.resampled / teacher.resampled)
    return f"{student.mean / teacher.mean:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def spread(scores: list[float]) -> str:
    """Returns the mean ± the standard deviation over seeds, in per cent."""
    scores = [100 * score for score in scores]
    if len(scores) == 1:
        return f"{scores[0]:.1f}"
    deviation = (sum((x - mean(scores)) ** 2 for x in scores) / (len(scores) - 1)) ** 0.5
    return f"{mean(scores):.1f} ± {deviation:.1f}"


def plot(out: Path, tasks: list[str]) -> None:
    """Plots the intermediate stage's hidden and attention losses over its steps, one column per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(tasks), 5), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for row, term in zip(panels, ("hidden", "attention"), strict=True):
        for axes, task in zip(row, tasks, strict=True):
            for colour, name in enumerate(STUDENTS):
                path = out / task / slug(name) / "intermediate" / "trainer_state.json"
                if not path.exists():
                    continue
                history: list[dict[str, Any]] = json.loads(path.read_text())["log_history"]
                points = [(log["step"], log[term]) for log in history if term in log]
                if points:
                    axes.plot(*zip(*points, strict=True), color=f"C{colour}", label=name)
        row[0].set_ylabel(f"{term} loss")
    for top, bottom, task in zip(*panels, tasks, strict=True):
        top.set_title(task)
        bottom.set_xlabel("step of the intermediate stage")
    labelled = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=len(STUDENTS), fontsize="small")
    figure.savefig(out / "losses.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.glue", description=__doc__.split(":", 1)[1])
    parser.add_argument("--model", required=True, help="a BERT with weights: folder or hub name")
    parser.add_argument("--masked", help="a masked language model for augmentation (bench.mlm_teacher)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of tsv files for each task")
    parser.add_argument("--corpus", type=Path, nargs="+", metavar="FILE", help="general text")
    parser.add_argument("--glove", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all five")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of each last training; default: 1 2 3")
    parser.add_argument("--smallest", action="store_true", help="the smallest row alone, on MRPC, in 15 minutes")
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of finished legs")
    arguments = parser.parse_args()

    if arguments.smallest:
        arguments.tasks = list(SMALLEST)
    elif missing := [name for name in ("masked", "corpus", "glove") if getattr(arguments, name) is None]:
        parser.error(f"the following arguments are required without --smallest: {', '.join(f'--{x}' for x in missing)}")
    prepare(parser, arguments)
    if not arguments.tables:
        plan = Plan(arguments)
        for leg in plan.legs():
            try:
                plan.run(leg)
            except subprocess.CalledProcessError as error:  # the command has printed the reason
                sys.exit(error.returncode)
            if leg.task:
                predict(arguments.out, leg)
    scores: dict[str, Any] = {}
    for part in PARTS:
        found = results(arguments.out, arguments.tasks, part)
        scores[part] = {name: {task: x.seeds for task, x in models.items()} for name, models in found.items()}
        print(f"\n{part}:\n\n{tables(found, arguments.tasks)}")
    (arguments.out / "results.json").write_text(json.dumps(scores, indent=1) + "\n")
    if not arguments.smallest:
        plot(arguments.out, arguments.tasks)


def prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Makes paths absolute, and splits each dev set before anything is trained on its task."""
    paths = {"data": [arguments.data / task for task in arguments.tasks]}
    if not arguments.smallest:
        paths |= {"glove": [arguments.glove], "corpus": arguments.corpus}
        arguments.glove = arguments.glove.resolve()
        arguments.corpus = [path.resolve() for path in arguments.corpus]
    for option, needed in paths.items():
        for path in needed:
            if not path.exists() and not arguments.tables:
                parser.error(f"argument --{option}: {path}: no such file or folder")
    for name in ("model", "masked"):
        if getattr(arguments, name) and Path(getattr(arguments, name)).is_dir():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name, config in CONFIGS.items():
        (out / name).write_text(json.dumps(config) + "\n")
    if arguments.tables:
        return
    budgets = {task: asdict(budget) for task, budget in (SMALLEST if arguments.smallest else TASKS).items()}
    path = out / "budgets.json"
    if path.exists() and json.loads(path.read_text()) != budgets:
        parser.error(f"argument --out: {out}: its models were trained with other budgets; take a new folder")
    for task in arguments.tasks:
        dev, held_out = (out / folder / task for folder in PARTS.values())
        if (out / task).exists() and not dev.exists():
            parser.error(f"argument --out: {out / task}: its models have seen the rows to hold out; take a new folder")
        if not dev.exists():
            hold_out(glue_task(task), arguments.data / task, dev, held_out)
    path.write_text(json.dumps(budgets, indent=1) + "\n")


if __name__ == "__main__":
    main()
