"""Runs the whole method on text that comes with every Python (`fastdistill demo`), without network or GPU, in minutes.

The text is the docstrings of the standard library and `pydoc_data.topics`; the label of a passage is the part of the
library that it documents. Few passages have a label. Three small BERTs learn from those as teachers. A student is
distilled in TinyBERT's stages on all passages, where the teachers' mean prediction stands in for the missing labels. It
is compared with the same student trained on the labels alone for as many steps. `Demo.run` is the pipeline.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import math
import platform
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, TrainerCallback

import fastdistill
from fastdistill.recipes.glue import Task, compute_metrics
from fastdistill.recipes.report import Cells, markdown, mean_and_spread, print_table, web_page
from fastdistill.train.data import PaddingCollator, add_teacher_logits, pack_corpus
from fastdistill.train.finetune import finetune
from fastdistill.train.outputs import whole_output, write_whole, writing
from fastdistill.train.stages import GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.students import count_parameters, init_from_teacher, measure_seconds, save_projections

# Parts of the standard library by their modules and packages. Those that this Python lacks are skipped.
PARTS: dict[str, str] = {
    "code": "abc ast code codeop collections _collections_abc contextlib copy ctypes dataclasses dis enum functools "
    "importlib inspect modulefinder opcode operator pickle pickletools pkgutil pydoc runpy symtable tokenize types "
    "typing weakref _weakrefset zipimport",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading _threading_local",
    "files": "bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath os pathlib posixpath "
    "_pyio shelve shutil stat tarfile tempfile wave zipfile",
    "mail": "email imaplib mailbox mimetypes netrc poplib quopri smtplib",
    "numbers": "bisect calendar colorsys datetime _pydatetime _pydecimal fractions heapq numbers random statistics "
    "_strptime",
    "testing": "bdb cProfile doctest faulthandler pdb profile pstats timeit trace traceback tracemalloc unittest",
    "text": "argparse cmd codecs configparser csv difflib encodings getopt gettext json locale logging optparse pprint "
    "re reprlib shlex string textwrap tomllib xml",
    "web": "ftplib html http ipaddress socket socketserver ssl urllib uuid webbrowser wsgiref xmlrpc",
}
LANGUAGE = "language"  # pydoc_data.topics


@dataclass(frozen=True)
class Size:
    """Sizes of the data, the models and the training. The defaults are those of `fastdistill demo`."""

    train_rows: int = 60  # with a label, of each part
    test_rows: int = 130
    words: int = 36  # longest passage
    max_length: int = 48  # tokens
    vocabulary: int = 6000
    teacher: tuple[int, int] = (4, 128)  # layers, width
    student: tuple[int, int] = (2, 64)
    heads: int = 4
    teachers: int = 3  # their mean prediction is better than that of each
    teacher_epochs: float = 12
    general_epochs: float = 1
    intermediate_epochs: float = 1
    prediction_epochs: float = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    scratch_seeds: tuple[int, ...] = (0,)  # its distance from the others is far above the spread of seeds


def run(
    output: str | Path = "demo-output", *, overwrite: bool = False, open: bool = False, size: Size | None = None
) -> dict[str, Any]:
    """Runs the demo and writes `report.md`, `report.html`, `results.json`, the plots and the folder `student`.

    `output` appears whole or not at all. `open` shows the report in a browser. Returns the content of results.json.
    Raises FileExistsError if `output` is not empty and `overwrite` is not set, FileNotFoundError if this Python comes
    without the source of its library.
    """
    start = time.perf_counter()
    console = Console(file=sys.stdout)  # taken before `quiet` redirects it
    columns = (TextColumn("{task.description:<44}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with whole_output(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as work:
        with Progress(*columns, console=console) as progress, quiet():
            results = Demo(size or Size(), progress, Path(work)).run(folder)
        results["seconds"]["all"] = time.perf_counter() - start
        write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_whole(folder / "report.md", text := report(results))
        write_whole(folder / "report.html", web_page(text))
    print_table(*table(results))
    console.print(f"{results['seconds']['all'] / 60:.1f} minutes; wrote {Path(output) / 'report.md'} and report.html")
    if open:
        show(Path(output) / "report.html")
    return results


def show(page: Path) -> None:
    """Shows a page in the browser, or prints its address where there is none."""
    address = page.resolve().as_uri()
    if not webbrowser.open(address):
        print(f"no browser was found; the report is at {address}")


STUDENTS = {"distilled": "distilled", "folded": "same start, labels", "labels": "from scratch, labels"}  # by key
MODELS = {"teachers": "teachers together", "teacher": "one teacher", **STUDENTS}
COLORS = {
    "teachers": "black",
    "teacher": "tab:gray",
    "distilled": "tab:blue",
    "folded": "tab:green",
    "labels": "tab:orange",
}
# For transformers.TrainingArguments.
OPTIONS: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "logging_steps": 10, "logging_first_step": True}
POINTS = 8  # on a curve of test accuracies


class Demo:
    """Runs the steps of the pipeline, which share a text, its tokenizer and a folder for intermediate results."""

    def __init__(self, size: Size, progress: Progress, work: Path) -> None:
        self.size, self.progress, self.work = size, progress, work
        self.seconds: dict[str, float] = {}
        self.begin = time.perf_counter()
        self.curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in STUDENTS}
        with self.timed("text and tokenizer"):
            text = self.text = read_text(size)
            self.tokenizer = BertTokenizer().train_new_from_iterator(text.corpus, size.vocabulary, show_progress=False)
            self.tokenizer.model_max_length = size.max_length
            self.task = Task("demo", columns=("sentence1", "label"), texts=("sentence1",), labels=tuple(text.labels))
            self.train, self.test = (self.task.tokenize(rows, self.tokenizer) for rows in (text.train, text.test))
            self.unlabelled = Dataset.from_dict(dict(self.tokenizer(text.corpus, truncation=True)))
            self.blocks = pack_corpus(Dataset.from_dict({"text": text.corpus}), self.tokenizer, size.max_length)

    def run(self, folder: Path) -> dict[str, Any]:
        """Trains all models, writes the first distilled student to `folder`, and returns the results."""
        with self.timed("teachers"):
            teachers = self.train_teachers()
        self.say(f"teachers together: {self.accuracy(*teachers):.1%} of {len(self.test)} test passages right")
        with self.timed("distillation"):
            start = self.start(teachers[0])
            students = self.distil(start, teachers)
        steps = self.curves["distilled"][0][-1][0]  # of all stages
        epochs = steps / math.ceil(len(self.train) / 32)
        seeds = {"folded": self.size.seeds, "labels": self.size.scratch_seeds}
        for name, rate in {"folded": 1e-3, "labels": 2e-3}.items():  # from the distilled one's start, and from scratch
            with self.timed(STUDENTS[name]):
                for seed in seeds[name]:
                    torch.manual_seed(seed)
                    model = copy.deepcopy(start) if name == "folded" else self.new_model(*self.size.student)
                    schedule = {"epochs": epochs, "learning_rate": rate, "seed": seed}
                    self.curves[name].append(self.finetune(model, f"{STUDENTS[name]}, seed {seed}", **schedule))
                    self.say_last(name, seed)
        with writing(folder / "student"):
            students[0].save_pretrained(folder / "student")
            self.tokenizer.save_pretrained(folder / "student")
        results = self.results(teachers, students[0], steps)
        plot_accuracy(results, folder / "accuracy.png")
        plot_models(results, folder / "models.png")
        return results

    def results(self, teachers: Sequence[Any], student: Any, steps: int) -> dict[str, Any]:
        """Returns the content of results.json. All students have one size and speed."""
        models = {"teacher": teachers[0], "student": student}
        rows = sorted(self.test.remove_columns("labels"), key=lambda row: len(row["input_ids"]))[len(self.test) // 2 :]
        seconds = measure_seconds(models, PaddingCollator(self.tokenizer)(rows[:64]))
        accuracies = {"teachers": [self.accuracy(*teachers)], "teacher": [self.accuracy(model) for model in teachers]}
        accuracies |= {name: [points[-1][1] for points in runs] for name, runs in self.curves.items()}
        return {
            "size": asdict(self.size),
            "labels": self.text.labels,
            "rows": {"labelled": len(self.train), "test": len(self.test), "corpus": len(self.text.corpus)},
            "steps": steps,
            "parameters": {name: count_parameters(model) for name, model in models.items()},
            "speed_up": seconds["teacher"] / seconds["student"],
            "accuracy": accuracies,
            "curves": self.curves,
            "seconds": self.seconds,
        }

    def train_teachers(self) -> list[BertForSequenceClassification]:
        """Trains the teachers on the labels, starting from vectors of the corpus' words; their seeds differ."""
        torch.manual_seed(0)
        vectors = word_vectors(self.blocks["input_ids"], len(self.tokenizer), self.size.teacher[1])
        teachers, schedule = [], {"epochs": self.size.teacher_epochs, "learning_rate": 5e-4}
        for seed in range(self.size.teachers):
            torch.manual_seed(seed)
            teachers.append(self.new_model(*self.size.teacher))
            teachers[-1].bert.embeddings.word_embeddings.weight.data.copy_(vectors)
            self.finetune(teachers[-1], f"teacher {seed}: labels", **schedule, seed=seed)
        return teachers

    def start(self, teacher: BertForSequenceClassification) -> BertForSequenceClassification:
        """Returns a student that starts from the teacher's weights; its projections are in the working folder."""
        torch.manual_seed(0)
        student = self.new_model(*self.size.student)
        rows = self.blocks.select(range(min(len(self.blocks), 256))).select_columns(["input_ids"])
        projection = init_from_teacher(student, teacher, calibration=PaddingCollator(self.tokenizer)(list(rows)))
        save_projections(student, teacher, projection, self.work)
        return student

    def distil(self, start: Any, teachers: Sequence[Any]) -> list[Any]:
        """Runs TinyBERT's stages. Returns the students, one for each seed.

        All stages read the passages without labels: the inner ones imitate the first teacher, the last one the mean
        prediction of all. One student serves all seeds of the last stage, as in published results.
        """
        size, student, projections, rows = self.size, copy.deepcopy(start), self.work, self.unlabelled
        inner = {
            "general": GeneralStage(corpus=self.blocks, epochs=size.general_epochs, batch_size=32, learning_rate=2e-3),
            "intermediate": IntermediateStage(dataset=rows, epochs=size.intermediate_epochs, learning_rate=1e-3),
        }
        steps = 0
        for name, stage in inner.items():
            watch = Watch(self, f"student: {name} stage")
            stage = replace(stage, projections=projections, arguments=OPTIONS)
            projections = self.work / name
            stage.run(student, teachers[0], self.tokenizer, projections, callbacks=[watch])
            steps += watch.state.global_step

        rows, students = rows.add_column("teacher_logits", self.predict(rows, *teachers).tolist()), []
        for seed in size.seeds:
            watch, output = Watch(self, f"student: prediction stage, seed {seed}", True), self.work / f"seed-{seed}"
            last = PredictionStage(
                dataset=rows, epochs=size.prediction_epochs, learning_rate=1e-3, seed=seed, arguments=OPTIONS
            )
            students += [last.run(copy.deepcopy(student), teachers[0], self.tokenizer, output, callbacks=[watch])]
            self.curves["distilled"].append([(steps + step, value) for step, value in watch.accuracies])
            self.say_last("distilled", seed)
        return students

    def finetune(self, model: Any, name: str, **schedule: Any) -> list[tuple[int, float]]:
        """Trains a model on the labels, and returns its accuracies on the test set by step."""
        watch, folder = Watch(self, name, measures=True), self.work / re.sub(r"\W+", "-", name)
        finetune(model, self.train, self.tokenizer, folder, **schedule, arguments=OPTIONS, callbacks=[watch])
        return watch.accuracies

    def new_model(self, layers: int, width: int) -> BertForSequenceClassification:
        options = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
        options |= {"num_attention_heads": self.size.heads, "max_position_embeddings": self.size.max_length}
        config = BertConfig(vocab_size=len(self.tokenizer), **options, **self.task.model_options())
        return BertForSequenceClassification(config)

    def predict(self, rows: Dataset, *models: Any) -> torch.Tensor:
        """Returns the log of the models' mean probability of each class, (rows, classes)."""
        found = (
            add_teacher_logits(rows, model, self.tokenizer, batch_size=64)["teacher_logits"][:] for model in models
        )
        return torch.stack([torch.tensor(logits).log_softmax(-1) for logits in found]).logsumexp(0) - math.log(
            len(models)
        )

    def accuracy(self, *models: Any) -> float:
        return compute_metrics(self.task, self.predict(self.test, *models).numpy(), self.test["labels"][:])["accuracy"]

    def say_last(self, name: str, seed: int) -> None:
        self.say(f"{STUDENTS[name]}, seed {seed}: {self.curves[name][-1][-1][1]:.1%}")

    def say(self, text: str) -> None:
        """Prints a result as soon as it is known."""
        self.progress.console.print(f"{time.perf_counter() - self.begin:4.0f} s  {text}", highlight=False)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Watch(TrainerCallback):
    """Shows the progress of one training, and measures the accuracy on the test set `POINTS` times if it `measures`."""

    def __init__(self, demo: Demo, name: str, measures: bool = False) -> None:
        self.demo, self.name, self.measures = demo, name, measures
        self.accuracies: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = state
        self.bar = self.demo.progress.add_task(self.name, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.demo.progress.advance(self.bar)
        step, every = state.global_step, math.ceil(state.max_steps / POINTS)
        if self.measures and (step % every == 0 or step == state.max_steps):
            student = getattr(model, "student", model)  # the distillation trainer's model holds the student
            self.accuracies.append((step, self.demo.accuracy(student)))
            model.train()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and messages of the libraries below; the demo shows its own."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)


@torch.no_grad()
def word_vectors(blocks: Sequence[Sequence[int]], vocabulary: int, width: int, window: int = 8) -> torch.Tensor:
    """Returns vectors (vocabulary, width) that factorise the positive pointwise mutual information of tokens.

    It is that of tokens at most `window` apart (Levy and Goldberg, 2014). This takes seconds, and here helps far more
    than minutes of masked language modelling.
    """
    counts = torch.zeros(vocabulary, vocabulary)
    for block in blocks:
        tokens = torch.tensor(block)
        for distance in range(1, min(window, len(tokens) - 1) + 1):
            counts.index_put_((tokens[:-distance], tokens[distance:]), torch.tensor(1.0), accumulate=True)
    counts += counts.T.clone()
    total = counts.sum(1)
    context = total**0.75
    information = (counts * context.sum() / (total[:, None] * context).clamp_min(1e-9)).clamp_min(1).log()
    u, s, _ = torch.svd_lowrank(information, q=width + 16, niter=4)
    vectors = u[:, :width] * s[:width].sqrt()
    return vectors * (0.05 / vectors.std())


@dataclass
class Text:
    train: Dataset  # sentence1, label
    test: Dataset
    corpus: list[str]  # everything but the test set, without labels
    labels: list[str]


def read_text(size: Size, seed: int = 0) -> Text:
    """Reads passages of the standard library's documentation, labelled with the part of the library.

    Train and test passages come from different docstrings. Repeated passages are dropped, and so are test passages more
    than half of whose four-word runs occur in the training text. Module names are removed from every passage.

    `Size` was chosen by scores on passages of the last fifth of each part, with labels of the first `size.train_rows`
    passages of the rest. Test passages are neither, so that they took no part in the choice.
    """
    rng, seen = random.Random(seed), set[str]()
    texts = read_docstrings(Path(sysconfig.get_paths()["stdlib"]))
    corpus = [passage for text in texts.pop("") for passage in passages(text, size.words, seen)]
    train, test = list[dict[str, Any]](), list[dict[str, Any]]()
    for label, (_, part) in enumerate(sorted(texts.items())):
        rng.shuffle(part)
        cut = len(part) * 4 // 5
        for share, tested in ((part[:cut], cut // 4), (part[cut:], 0)):
            found = [(i < tested, text) for i, whole in enumerate(share) for text in passages(whole, size.words, seen)]
            corpus += [text for is_test, text in found if not is_test]
            rng.shuffle(found)
            if tested:
                labelled = [text for is_test, text in found if not is_test][: size.train_rows]
                unseen = [text for is_test, text in found[size.train_rows :] if is_test][: size.test_rows]
                train += [{"sentence1": text, "label": label} for text in labelled]
                test += [{"sentence1": text, "label": label} for text in unseen]
    known = set().union(*map(word_runs, corpus))
    test = [row for row in test if len((runs := word_runs(row["sentence1"])) & known) * 2 <= len(runs)]
    rng.shuffle(corpus)
    return Text(Dataset.from_list(train), Dataset.from_list(test), corpus, sorted(texts))


def read_docstrings(library: Path) -> dict[str, list[str]]:
    """Returns the texts of each part, and under "" those of modules that are in no part."""
    part_of = {module: part for part, modules in PARTS.items() for module in modules.split()}
    texts: dict[str, list[str]] = {part: [] for part in (*PARTS, "")}
    for path in sorted(library.rglob("*.py")):
        top = path.relative_to(library).parts[0].removesuffix(".py")
        if top not in ("site-packages", "test") and not {"test", "tests"} & set(path.parts):
            texts[part_of.get(top, "")] += docstrings(path)
    if not all(texts[part] for part in PARTS):
        raise FileNotFoundError(f"{library}: no source of the standard library, whose documentation the demo reads")
    from pydoc_data.topics import topics

    return {**texts, LANGUAGE: list(topics.values())}


def docstrings(path: Path) -> list[str]:
    """Returns the docstrings of a source file, which is parsed and not imported."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # the library has files that show syntax errors
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, documented) and (text := ast.get_docstring(node))]


MODULES = "|".join(module.lstrip("_") for module in " ".join(PARTS.values()).split())
MODULE_NAME = re.compile(rf"\b_?({MODULES})\b", re.I)


def passages(text: str, words: int, seen: set[str]) -> Iterator[str]:
    """Yields the paragraphs of a text in pieces of 8 to `words` words, without those in `seen`, which it adds to.

    Interactive sessions and rulers are left out.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r"^\s*(>>>|\.\.\. )", paragraph, re.M):
            continue
        pieces = MODULE_NAME.sub(" ", re.sub(r"[-=*~^_#+.]{3,}", " ", paragraph)).split()
        for i in range(0, len(pieces), words):
            passage = " ".join(pieces[i : i + words])
            letters = re.findall(r"[a-z]+", passage.lower())
            key = " ".join(letters)
            if len(letters) >= 8 and key not in seen:
                seen.add(key)
                yield passage


def word_runs(passage: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", passage.lower())
    return {tuple(words[i : i + 4]) for i in range(len(words) - 3)}


def table(results: dict[str, Any]) -> Cells:
    """Returns a table with a row for each model, narrow enough for a phone."""
    rows = []
    teachers, count = statistics.mean(results["accuracy"]["teachers"]), results["size"]["teachers"]
    for name, label in MODELS.items():
        values, kind = results["accuracy"][name], "student" if name in STUDENTS else "teacher"
        models = count if name == "teachers" else 1
        kept, size = statistics.mean(values) / teachers, models * results["parameters"][kind]["total"] / 1e6
        speed = results["speed_up"] if kind == "student" else 1 / models
        rows.append([label, mean_and_spread(values, 1), f"{kept:.1%}", f"{size:.2f}M", f"{speed:.1f}x"])
    return ["model", "% right", "kept", "size", "speed"], rows


def report(results: dict[str, Any]) -> str:
    """Returns the report as Markdown, for readers who know neither distillation nor BERT."""
    rows, size, seconds = results["rows"], results["size"], results["seconds"]
    parts = "; ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "all")
    big, small = (results["parameters"][name]["encoder"] for name in ("teacher", "student"))
    return f"""# Why distil? A small model learns from big ones

The task: from which of {len(results["labels"])} parts of Python's documentation ({", ".join(results["labels"])}) is a
passage? The teachers, {size["teachers"]} big models, have learned it from {rows["labelled"]:,} passages with labels,
which are the right answers. A student, whose layers are {big / small:.0f} times smaller than a teacher's, can learn
from the same labels. Or it is distilled: it imitates what the teachers answer together. That needs no labels, so it
learns from all {rows["corpus"]:,} passages, most of which have none.

## What came out

{verdict(results)}

![share of test passages that each model gets right](models.png)

A bar is the mean, a dot is one training. Guessing gets {100 / len(results["labels"]):.0f}% right.

- **teachers together**: the mean answer of {size["teachers"]} teachers, which takes all their time.
- **one teacher**: learned from the {rows["labelled"]:,} passages with labels.
- **distilled**: a student that starts from a teacher's weights and imitates the teachers; it sees no label.
- **same start, labels**: the same student from the same weights, which learns from the labels alone.
- **from scratch, labels**: the same student from random weights, which learns from the labels alone.

{markdown(*table(results))}

± is the standard deviation: how far trainings lie from their mean that differ in their random numbers alone
({len(size["seeds"])} of each of the first two students). Kept: what is right, as a share of what the teachers get right
together. Size: the numbers that a model consists of, in millions. Speed: how many times as fast as one teacher it
answers, on {torch.get_num_threads()} threads.

## Which passages were tested

The {rows["test"]:,} test passages come from other docstrings (pieces of documentation) than all that the models learned
from, and module names are removed from all. How many labels, which models and how long a training: that was chosen
by scores on other passages, which are among those without labels here. The test passages took no part in that choice
on Python 3.11. On other versions, whose documentation differs, some may have. With other passages, labelled or tested,
all figures may differ by more than ± says.

## How the students learned

![test passages that the students get right over the steps of the training](accuracy.png)

A line is one training. A step is one correction of the model, after 32 passages. All students take
{results["steps"]:,} steps. The distilled student first learns to imitate the first teacher's inner layers; only after
that does it learn to answer, and there its line begins.

## For specialists

A teacher has {size["teacher"][0]} layers, {size["teacher"][1]} wide, and starts from vectors of the words in all
passages (factorised mutual information). The student has {size["student"][0]} layers, {size["student"][1]} wide. It
goes through TinyBERT's general, intermediate and prediction stages; its seeds differ in the last. Both have
{size["heads"]} heads. The student is in `student/`, for `AutoModelForSequenceClassification.from_pretrained`.

{seconds["all"] / 60:.1f} minutes in all ({parts}), Python {platform.python_version()}, torch {torch.__version__},
transformers {transformers.__version__}, fastdistill {fastdistill.__version__}, {torch.get_num_threads()} threads.
"""


def verdict(results: dict[str, Any]) -> str:
    """Returns a paragraph on whether the distilled student is clearly better than the one that learned from labels."""
    distilled, labels = (results["accuracy"][name] for name in ("distilled", "folded"))
    gain = 100 * (statistics.mean(distilled) - statistics.mean(labels))
    spread = 100 * max(statistics.stdev(values) if len(values) > 1 else 0 for values in (distilled, labels))
    teacher = 100 * statistics.mean(results["accuracy"]["teachers"])
    found = f"""The distilled student gets {mean_and_spread(distilled, 1)} per cent of the test passages right. The same
student from the same start gets {mean_and_spread(labels, 1)} from the labels alone,
the teachers together {teacher:.1f}."""
    if gain > 2 * spread:
        return f"""{found} **Distillation is worth {gain:.1f} points here**, more than two standard deviations of
{spread:.1f} points: the teachers' opinion of passages without labels teaches what the few labels cannot."""
    return f"""{found} **The difference is {gain:.1f} points and no more than two standard deviations** of {spread:.1f}
points, so this run does not show that distillation helps: the labels teach the student as much as the teachers can."""


def plot_models(results: dict[str, Any], file: Path) -> None:
    """Plots the share of test passages that each model gets right: a bar for the mean, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.6), layout="constrained", dpi=200)  # few inches: a phone's text stays large
    axes = figure.subplots()
    for place, name in enumerate(MODELS):
        values = [100 * value for value in results["accuracy"][name]]
        axes.barh(place, statistics.mean(values), color=COLORS[name], height=0.6)
        axes.plot(values, [place] * len(values), "o", color="black", markeredgecolor="white", markersize=5)
        axes.text(1, place, f"{statistics.mean(values):.1f}%", color="white", va="center", weight="bold")
    axes.set(
        xlabel="test passages right, in per cent", xlim=(0, 100), yticks=range(len(MODELS)), yticklabels=MODELS.values()
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def plot_accuracy(results: dict[str, Any], file: Path) -> None:
    """Plots the accuracies on the test set over the steps."""
    from matplotlib.figure import Figure

    accuracy = Figure(figsize=(4.8, 3.4), layout="constrained", dpi=200)
    axes = accuracy.subplots()
    for name, runs in results["curves"].items():
        for i, points in enumerate(runs):
            steps, values = zip(*points, strict=True)
            label = STUDENTS[name] if i == 0 else None
            axes.plot(steps, [100 * value for value in values], color=COLORS[name], label=label)
    teachers = 100 * results["accuracy"]["teachers"][0]
    axes.axhline(teachers, color=COLORS["teachers"], linestyle="--", label=MODELS["teachers"])
    axes.set(xlabel="steps of training, all stages counted", ylabel="test passages right, in per cent")
    axes.legend()
    accuracy.savefig(file)
