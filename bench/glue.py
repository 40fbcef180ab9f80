"""`python -m bench.glue --model BERT --masked MLM --data DIR --corpus FILE --glove FILE --out DIR`: reruns TinyBERT's
table.

For five tasks of GLUE it trains and evaluates the teacher; the distilled student; the same student fine-tuned on the
labels; and the student without one part of the method at a time. Every leg is a `fastdistill` command, printed before
it runs. A finished leg is not run again, so an interrupted command may be repeated. `--tables` runs nothing: it prints
Markdown tables of the finished legs and writes DIR/results.json and DIR/losses.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fastdistill.recipes.glue import get_task


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
STUDENTS = {
    DISTILLED: Student(),
    "no general stage": Student(general=None),
    "no augmentation": Student(augmentation=False),
    "no attention loss": Student("general-embedding-hidden", terms=("embedding", "hidden")),
    "no hidden loss": Student("general-embedding-attention", terms=("embedding", "attention")),
    NARROW: Student(general=None, config="narrow.json"),
}


@dataclass(frozen=True)
class Leg:
    output: str  # in the working folder
    command: list[str]  # of fastdistill, without --output
    after: str = ""  # the leg whose evaluation it belongs to


class Plan:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out

    def legs(self) -> Iterator[Leg]:
        """Yields the legs, the most valuable first."""
        done: set[str] = set()
        for name, student in STUDENTS.items():
            if student.general is not None and student.general not in done:
                done.add(student.general)
                yield self.general(student.general, student)
            for task in self.arguments.tasks:
                if name == DISTILLED:
                    yield self.teacher(task)
                    yield self.augment(task)
                yield self.student(task, name)
                if name == DISTILLED:
                    yield self.fine_tuned(task)

    def general(self, output: str, student: Student) -> Leg:
        command = [
            "general", "--teacher", self.arguments.model, "--student", student.config,
            "--corpus", *map(str, self.arguments.corpus), "--terms", *student.terms,
            "--epochs", "1", "--batch-size", "32", "--learning-rate", "5e-4", "--bf16",
        ]  # fmt: skip
        return Leg(output, command)

    def data(self, task: str) -> list[str]:
        return ["--task", task, "--data", str(self.arguments.data / task)]

    def teacher(self, task: str) -> Leg:
        epochs = str(TASKS[task].teacher_epochs)
        rest = ["--epochs", epochs, "--learning-rates", "5e-5", "--bf16", "--seeds", "1"]
        return Leg(f"{task}/teacher", ["finetune", "--model", self.arguments.model, *self.data(task), *rest])

    def augment(self, task: str) -> Leg:
        rest = ["--glove", str(self.arguments.glove), "--copies", str(TASKS[task].copies), "--bf16"]
        return Leg(f"{task}/augmented.arrow", ["augment", "--teacher", self.arguments.masked, *self.data(task), *rest])

    def student(self, task: str, name: str) -> Leg:
        student = STUDENTS[name]
        budget = TASKS[task]
        # Without copies, more epochs make up for them, so that every student takes the same number of steps.
        more = 1 if student.augmentation else 1 + budget.copies * len(get_task(task).texts)
        prediction = 1 if task == "STS-B" else more  # its prediction stage learns from the original rows only
        seeds = self.arguments.seeds if name in (DISTILLED, NARROW) else self.arguments.seeds[:1]
        command = [
            "task", "--teacher", f"{task}/teacher", "--student", student.general or student.config,
            *self.data(task), *(["--augmented", f"{task}/augmented.arrow"] if student.augmentation else []),
            "--terms", *student.terms, "--bf16", "--intermediate-epochs", str(budget.intermediate_epochs * more),
            "--intermediate-learning-rate", "7e-4",
            "--prediction-epochs", str(budget.prediction_epochs * prediction), "--learning-rates", "1e-4",
            "--seeds", *map(str, seeds),
        ]  # fmt: skip
        return Leg(f"{task}/{slug(name)}", command)

    def fine_tuned(self, task: str) -> Leg:
        budget = TASKS[task]
        command = [
            "finetune", "--model", "student.json", "--teacher", self.arguments.model, "--init", "teacher",
            *self.data(task), "--bf16", "--epochs", str(budget.finetune_epochs), "--learning-rates", "1e-4",
            "--seeds", *map(str, self.arguments.seeds),
        ]  # fmt: skip
        return Leg(f"{task}/{slug(FINE_TUNED)}", command)

    def run(self, leg: Leg) -> None:
        """Runs a leg in the working folder, so that the printed commands can be typed there."""
        if (self.out / leg.output).exists():
            return
        command = ["fastdistill", *leg.command, "--output", leg.output]
        print(shlex.join(command), flush=True)
        (self.out / leg.output).parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastdistill.cli", *command[1:], "--resume"], cwd=self.out, check=True)
        seconds_path = self.out / "seconds.json"
        seconds = json.loads(seconds_path.read_text()) if seconds_path.exists() else {}
        seconds[leg.output] = seconds.get(leg.output, 0) + time.perf_counter() - start
        seconds_path.write_text(json.dumps(seconds, indent=1) + "\n")


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


# -- results -----------------------------------------------------------------------------------------------


def results(out: Path, tasks: list[str]) -> dict[str, dict[str, list[float]]]:
    """Returns model -> task -> the dev score of each seed in per cent: GLUE's metric, or the mean of its two."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("teacher", DISTILLED, FINE_TUNED, *list(STUDENTS)[1:]):
        for task in tasks:
            path = out / task / slug(name) / "results.json"
            if path.exists():
                best = max(json.loads(path.read_text())["combinations"], key=lambda combination: combination["mean"])
                found.setdefault(name, {})[task] = [100 * run["score"] for run in best["seeds"].values()]
    return found


def table(found: dict[str, dict[str, list[float]]], tasks: list[str]) -> str:
    """Returns means and deviations over seeds, averages of complete rows, and their share of the teacher's."""
    lines = [
        "| model | " + " | ".join(tasks) + " | average | kept |",
        "| --- |" + " ---: |" * (len(tasks) + 2),
    ]
    averages: dict[str, float] = {}
    for name, scores in found.items():
        cells = [spread(scores[task]) if task in scores else "" for task in tasks]
        if set(tasks) <= set(scores):
            averages[name] = mean(mean(scores[task]) for task in tasks)
        average = averages.get(name)
        kept = average / averages["teacher"] if average and "teacher" in averages else None
        cells += [f"{average:.1f}" if average else "", f"{kept:.1%}" if kept else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(scores: list[float]) -> str:
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
    parser = argparse.ArgumentParser(prog="python -m bench.glue", description=__doc__.split(":")[1])
    parser.add_argument("--model", required=True, help="a BERT with weights: folder or hub name")
    parser.add_argument("--masked", required=True, help="a masked language model for augmentation (bench.mlm_teacher)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of tsv files for each task")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="FILE", help="general text")
    parser.add_argument("--glove", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all five")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3; ablations take the first only"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing, print the tables of finished legs")
    arguments = parser.parse_args()

    if not arguments.tables:
        folders = [arguments.data / task for task in arguments.tasks]
        for option, paths in {"data": folders, "glove": [arguments.glove], "corpus": arguments.corpus}.items():
            for path in paths:
                if not path.exists():
                    parser.error(f"argument --{option}: {path}: no such file or folder")

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("data", "glove"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.corpus = [path.resolve() for path in arguments.corpus]
    for name in ("model", "masked"):
        if Path(getattr(arguments, name)).is_dir():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    for name, config in CONFIGS.items():
        (arguments.out / name).write_text(json.dumps(config) + "\n")
    if not arguments.tables:
        plan = Plan(arguments)
        for leg in plan.legs():
            try:
                plan.run(leg)
            except subprocess.CalledProcessError as error:  # the command has printed the reason
                sys.exit(error.returncode)
    found = results(arguments.out, arguments.tasks)
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(arguments.out, arguments.tasks)
    print(table(found, arguments.tasks))


if __name__ == "__main__":
    main()
