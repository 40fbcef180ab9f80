"""The whole method on text that every Python carries: `fastdistill demo`. No network, no GPU, minutes on 2 cores.

Text: the docstrings of the standard library and `pydoc_data.topics`. Label: the part of the library a passage is
from. A small BERT trained on it on the spot is the teacher; its student is distilled in TinyBERT's stages and compared
with the same student trained on the labels alone for as many steps.
"""

from __future__ import annotations

import ast
import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import fastdistill
from fastdistill.train.data import PaddingCollator, add_teacher_logits, pack_corpus
from fastdistill.train.finetune import finetune
from fastdistill.train.outputs import whole_output
from fastdistill.train.stages import GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.students import count_parameters, init_from_teacher, measure_seconds, save_projections

# Parts of the standard library: modules and packages, of which those that this Python has are read.
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
    """How much of everything. The defaults are what `fastdistill demo` runs."""

    train_rows: int = 520  # of each part
    dev_rows: int = 130
    words: int = 36  # longest passage
    max_length: int = 48  # tokens
    vocabulary: int = 6000
    teacher: tuple[int, int] = (4, 128)  # layers, width
    student: tuple[int, int] = (2, 64)
    heads: int = 4
    teacher_epochs: float = 5
    general_epochs: float = 1
    intermediate_epochs: float = 4
    prediction_epochs: float = 4
    seeds: tuple[int, ...] = (0, 1, 2)


def run(output: str | Path = "demo-output", *, overwrite: bool = False, size: Size | None = None) -> dict[str, Any]:
    """Run the demo and write `report.md`, `losses.png`, `accuracy.png`, `results.json` and the folder `student`.

    `output` appears whole or not at all. Returns what results.json holds.
    Raises FileExistsError where `output` is not empty and `overwrite` is not set, FileNotFoundError where this Python
    carries no library source.
    """
    start = time.perf_counter()
    console = Console(file=sys.stdout)  # as it is now: `quiet` redirects it
    columns = (TextColumn("{task.description:<44}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with whole_output(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as work:
        with Progress(*columns, console=console) as progress, quiet():
            demo = Demo(size or Size(), progress, Path(work))
            results = demo.run(folder)
        results["seconds"]["all"] = time.perf_counter() - start
        plot(demo.losses, results, folder)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(report(results), encoding="utf-8")
    table = Table(box=SIMPLE)  # narrow enough for 80 columns
    for head in TABLE_HEAD:
        table.add_column(head, no_wrap=True)
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"{results['seconds']['all'] / 60:.1f} minutes; wrote {Path(output) / 'report.md'}")
    return results


# -- text --------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    train: Dataset  # sentence1, label
    dev: Dataset
    corpus: list[str]  # everything but the dev set, without labels
    labels: list[str]


def read_text(size: Size, seed: int = 0) -> Text:
    """Passages of the standard library's documentation, labelled with the part of the library they are from.

    Train and dev passages come from different docstrings; a passage that repeats another is dropped, and so is a dev
    passage half of whose four-word runs stand in the training text. Module names are struck out of every passage.
    """
    rng = random.Random(seed)
    library = Path(sysconfig.get_paths()["stdlib"])
    part_of = {module: part for part, modules in PARTS.items() for module in modules.split()}
    texts: dict[str, list[str]] = {part: [] for part in (*PARTS, "")}
    for path in sorted(library.rglob("*.py")):
        top = path.relative_to(library).parts[0].removesuffix(".py")
        if top not in ("site-packages", "test") and not {"test", "tests"} & set(path.parts):
            texts[part_of.get(top, "")] += docstrings(path)
    if not all(texts[part] for part in PARTS):
        raise FileNotFoundError(f"{library}: no source of the standard library, whose documentation the demo reads")
    from pydoc_data.topics import topics

    texts[LANGUAGE] = list(topics.values())

    seen: set[str] = set()
    corpus = [passage for text in texts.pop("") for passage in passages(text, size.words, seen)]
    labels = sorted(texts)
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "dev": []}
    for label, part in enumerate(labels):
        rng.shuffle(texts[part])
        cut = len(texts[part]) * 4 // 5
        for split, count, share in (
            ("train", size.train_rows, texts[part][:cut]),
            ("dev", size.dev_rows, texts[part][cut:]),
        ):
            found = [passage for text in share for passage in passages(text, size.words, seen)]
            if split == "train":
                corpus += found
            rng.shuffle(found)
            rows[split] += [(passage, label) for passage in found[:count]]
    known = set().union(*map(word_runs, corpus))
    rows["dev"] = [row for row in rows["dev"] if len(word_runs(row[0]) & known) * 2 <= len(word_runs(row[0]))]
    rng.shuffle(corpus)

    def dataset(split: str) -> Dataset:
        sentences, classes = zip(*rows[split], strict=True)
        return Dataset.from_dict({"sentence1": list(sentences), "label": list(classes)})

    return Text(dataset("train"), dataset("dev"), corpus, labels)


def docstrings(path: Path) -> list[str]:
    """Of a source file, which is parsed and not imported."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # files that show what does not parse
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return [text for text in found if text]


MODULE_NAME = re.compile(
    rf"\b_?({'|'.join(module.lstrip('_') for modules in PARTS.values() for module in modules.split())})\b", re.I
)


def passages(text: str, words: int, seen: set[str]) -> Iterator[str]:
    """Paragraphs without sessions and rulers, in pieces of 8 to `words` words, none like one in `seen`."""
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


def train_tokenizer(corpus: Sequence[str], size: Size) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=size.vocabulary, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=size.max_length,
        **{f"{name.strip('[]').lower()}_token": name for name in special},
    )


# -- training ----------------------------------------------------------------------------------------------------


STUDENTS = {
    "distilled": "distilled",
    "folded": "same start, labels",
    "labels": "from scratch, labels",
}
# Of transformers.TrainingArguments.
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "logging_first_step": True,
}
POINTS = 8  # on a curve of dev accuracies


class Watch(TrainerCallback):
    """A progress bar for one training, what it logs, and now and then the accuracy on the dev set."""

    def __init__(self, progress: Progress, name: str, accuracy: Callable[[Any], float] | None = None) -> None:
        self.progress, self.name, self.accuracy = progress, name, accuracy
        self.losses: list[dict[str, float]] = []
        self.accuracies: list[tuple[int, float]] = []
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.max_steps
        self.task = self.progress.add_task(self.name, total=self.steps)
        self.every = math.ceil(self.steps / POINTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)
        if self.accuracy and (state.global_step % self.every == 0 or state.global_step == self.steps):
            model = kwargs["model"]
            student = getattr(model, "student", model)  # the distillation trainer's model holds the student
            self.accuracies.append((state.global_step, self.accuracy(student)))
            model.train()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append({"step": state.global_step, **logs})


@torch.no_grad()
def word_vectors(blocks: Sequence[Sequence[int]], vocabulary: int, width: int, window: int = 8) -> torch.Tensor:
    """(vocabulary, width): the positive pointwise mutual information of tokens that stand at most `window` apart,
    factorised (Levy and Goldberg, 2014). Seconds, and worth far more here than minutes of masked words.
    """
    counts = torch.zeros(vocabulary, vocabulary)
    for block in blocks:
        tokens = torch.tensor(block)
        for distance in range(1, min(window, len(tokens) - 1) + 1):
            pair = (tokens[:-distance], tokens[distance:])
            counts.index_put_(pair, torch.ones(len(tokens) - distance), accumulate=True)
    counts += counts.T.clone()
    total = counts.sum(1)
    context = total**0.75
    information = (counts * context.sum() / (total[:, None] * context).clamp_min(1e-9)).clamp_min(1).log()
    u, s, _ = torch.svd_lowrank(information, q=width + 16, niter=4)
    vectors = u[:, :width] * s[:width].sqrt()
    return vectors * (0.05 / vectors.std())


class Demo:
    """The legs of the demo, over one text, one tokenizer and one folder for the work in between."""

    def __init__(self, size: Size, progress: Progress, work: Path) -> None:
        self.size, self.progress, self.work = size, progress, work
        self.seconds: dict[str, float] = {}
        self.losses: dict[str, list[dict[str, float]]] = {}
        with self.leg("text and tokenizer"):
            self.text = read_text(size)
            self.tokenizer = train_tokenizer(self.text.corpus, size)
            self.train, self.dev = (self.tokenize(rows) for rows in (self.text.train, self.text.dev))
            self.blocks = pack_corpus(Dataset.from_dict({"text": self.text.corpus}), self.tokenizer, size.max_length)
            collate, order = PaddingCollator(self.tokenizer), sorted(self.dev, key=lambda row: len(row["input_ids"]))
            self.dev_batches = [collate(order[i : i + 64]) for i in range(0, len(order), 64)]

    def tokenize(self, rows: Dataset) -> Dataset:
        options = {"truncation": True, "max_length": self.size.max_length, "return_token_type_ids": False}
        found = self.tokenizer(rows["sentence1"][:], **options)
        return Dataset.from_dict({**found, "labels": rows["label"][:]})

    @contextlib.contextmanager
    def leg(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def config(self, layers: int, width: int) -> BertConfig:
        labels = self.text.labels
        return BertConfig(
            vocab_size=len(self.tokenizer),
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=self.size.heads,
            max_position_embeddings=self.size.max_length,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        model.eval()
        right = rows = 0
        for batch in self.dev_batches:
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            right += int((model(**inputs).logits.argmax(1) == batch["labels"]).sum())
            rows += len(batch["labels"])
        return right / rows

    def train_teacher(self) -> BertForSequenceClassification:
        """On the labels, from vectors of the corpus' words."""
        torch.manual_seed(0)
        teacher = BertForSequenceClassification(self.config(*self.size.teacher))
        with self.leg("teacher"):
            embeddings = teacher.bert.embeddings.word_embeddings.weight
            embeddings.data.copy_(word_vectors(self.blocks["input_ids"], *embeddings.shape))
            self.finetune(teacher, self.size.teacher_epochs, 5e-4, 0, "teacher: labels")
        return teacher

    def finetune(self, model: Any, epochs: float, learning_rate: float, seed: int, name: str) -> Watch:
        watch = Watch(self.progress, name, self.accuracy)
        finetune(
            model,
            self.train,
            self.tokenizer,
            self.work / f"{name} {seed}".replace(" ", "-"),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            arguments=OPTIONS,
            callbacks=[watch],
        )
        return watch

    def run(self, folder: Path) -> dict[str, Any]:
        size = self.size
        teacher = self.train_teacher()
        config = self.config(*size.student)
        curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in STUDENTS}

        # One student for all seeds up to the last stage, as published results are reported.
        torch.manual_seed(0)
        student = BertForSequenceClassification(config)
        with self.leg("distillation"):
            rows = self.blocks.select(range(min(len(self.blocks), 256)))
            calibration = PaddingCollator(self.tokenizer)(list(rows.select_columns(["input_ids"])))
            projection = init_from_teacher(student, teacher, calibration=calibration)
            save_projections(student, teacher, projection, self.work)
            folded = {name: x.clone() for name, x in student.state_dict().items()}
            stages = {
                "general": GeneralStage(
                    corpus=self.blocks,
                    epochs=size.general_epochs,
                    batch_size=32,
                    learning_rate=2e-3,
                    projections=self.work,
                    arguments=OPTIONS,
                ),
                "intermediate": IntermediateStage(
                    dataset=self.train,
                    epochs=size.intermediate_epochs,
                    learning_rate=1e-3,
                    projections=self.work / "general",
                    arguments=OPTIONS,
                ),
            }
            steps = 0
            for name, stage in stages.items():
                watch = Watch(self.progress, f"student: {name} stage")
                stage.run(student, teacher, self.tokenizer, self.work / name, callbacks=[watch])
                self.losses[name] = watch.losses
                steps += watch.steps
            rows = add_teacher_logits(self.train, teacher, self.tokenizer)
            start = {name: x.clone() for name, x in student.state_dict().items()}
            first: dict[str, torch.Tensor] = {}
            for seed in size.seeds:
                student.load_state_dict(start)
                watch = Watch(self.progress, f"student: prediction stage, seed {seed}", self.accuracy)
                PredictionStage(
                    dataset=rows,
                    epochs=size.prediction_epochs,
                    learning_rate=1e-3,
                    seed=seed,
                    arguments=OPTIONS,
                ).run(student, teacher, self.tokenizer, self.work / f"prediction-{seed}", callbacks=[watch])
                curves["distilled"].append([(steps + step, value) for step, value in watch.accuracies])
                first = first or {name: x.clone() for name, x in student.state_dict().items()}
        steps += watch.steps

        epochs = steps / math.ceil(len(self.train) / 32)
        for name in list(STUDENTS)[1:]:
            with self.leg(name):
                for seed in size.seeds:
                    torch.manual_seed(seed)
                    model = BertForSequenceClassification(config)
                    learning_rate = 2e-3
                    if name == "folded":
                        model.load_state_dict(folded)
                        learning_rate = 1e-3
                    watch = self.finetune(model, epochs, learning_rate, seed, f"{STUDENTS[name]}, seed {seed}")
                    curves[name].append(watch.accuracies)

        # Every seed gives the same sizes and the same speed.
        models = {"teacher": teacher, "student": student}
        seconds = measure_seconds(models, self.dev_batches[len(self.dev_batches) // 2])
        student.load_state_dict(first)
        student.save_pretrained(folder / "student")
        self.tokenizer.save_pretrained(folder / "student")
        return {
            "size": asdict(size),
            "labels": self.text.labels,
            "rows": {"train": len(self.train), "dev": len(self.dev), "corpus": len(self.text.corpus)},
            "steps": steps,
            "parameters": {name: count_parameters(model) for name, model in models.items()},
            "speed_up": seconds["teacher"] / seconds["student"],
            "accuracy": {
                "teacher": [self.accuracy(teacher)],
                **{name: [points[-1][1] for points in runs] for name, runs in curves.items()},
            },
            "curves": curves,
            "seconds": self.seconds,
        }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The progress bars and messages of the libraries underneath give way to the demo's own."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)


# -- report ------------------------------------------------------------------------------------------------------

TABLE_HEAD = ("model", "parameters", "encoder", "speed-up", "accuracy", "kept")


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    teacher = statistics.mean(results["accuracy"]["teacher"])
    for name, label in {"teacher": "teacher", **STUDENTS}.items():
        values, kind = results["accuracy"][name], "teacher" if name == "teacher" else "student"
        mean, parameters = statistics.mean(values), results["parameters"][kind]
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        rows.append(
            (
                label,
                f"{parameters['total'] / 1e6:.2f}M",
                f"{parameters['encoder'] / 1e6:.2f}M",
                f"{results['speed_up'] if kind == 'student' else 1:.1f}x",
                f"{100 * mean:.1f}{spread}",
                f"{100 * mean / teacher:.1f}%",
            )
        )
    return rows


def report(results: dict[str, Any]) -> str:
    rows, size, seconds = results["rows"], results["size"], results["seconds"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (TABLE_HEAD, ["---"] * len(TABLE_HEAD), *table_rows(results))]
    legs = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "all")
    return f"""# fastdistill demo

{chr(10).join(lines)}

Accuracy on the dev set in per cent, mean and standard deviation over {len(size["seeds"])} seeds of the last training;
kept: the share of the teacher's. Speed-up: one batch, {torch.get_num_threads()} threads. All students have one
architecture and took {results["steps"]} steps. "Same start" begins with the teacher's weights as the distilled one does
and learns from the labels alone; "from scratch" never saw the teacher.

**Task.** Which of {len(results["labels"])} parts of Python's documentation ({", ".join(results["labels"])}) a passage
is from: {rows["train"]} passages to train on, {rows["dev"]} from other docstrings to test on, module names struck out.
{rows["corpus"]} passages without labels are the corpus of the general stage.

**Teacher.** {size["teacher"][0]} layers, {size["teacher"][1]} wide, {size["heads"]} heads, trained on the labels,
from vectors of the corpus' words (factorised mutual information).

**Student.** {size["student"][0]} layers, {size["student"][1]} wide, {size["heads"]} heads, started from the teacher's
weights; then TinyBERT's general, intermediate and prediction stages.

![losses](losses.png)

![accuracy](accuracy.png)

The student is in `student/`: `AutoModelForSequenceClassification.from_pretrained("student")`.

{seconds["all"] / 60:.1f} minutes in all ({legs}), Python {platform.python_version()}, torch {torch.__version__},
transformers {transformers.__version__}, fastdistill {fastdistill.__version__}, {torch.get_num_threads()} threads.
"""


def plot(losses: dict[str, list[dict[str, float]]], results: dict[str, Any], folder: Path) -> None:
    """`losses.png`: the inner losses of the two stages that learn them. `accuracy.png`: dev accuracy over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("general", "intermediate"), strict=True):
        for term in ("embedding", "hidden", "attention"):
            points = [(log["step"], log[term]) for log in losses[name] if term in log]
            axes.plot(*zip(*points, strict=True), label=term)
        axes.set(title=f"{name} stage", xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
    figure.savefig(folder / "losses.png", dpi=120)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(results["curves"].items(), ("tab:blue", "tab:green", "tab:orange"), strict=True):
        for i, points in enumerate(runs):
            axes.plot(*zip(*points, strict=True), color=color, label=STUDENTS[name] if i == 0 else None)
    axes.axhline(results["accuracy"]["teacher"][0], color="gray", linestyle="--", label="teacher")
    axes.set(xlabel="step, all stages counted", ylabel="dev accuracy")
    axes.legend()
    figure.savefig(folder / "accuracy.png", dpi=120)
