"""Defines the nine GLUE tasks (Wang et al., arXiv 1804.07461): columns, labels, metrics, readers, TinyBERT's recipe.

Every reader returns the same columns, whatever the source: `sentence1`, `sentence2` if the task compares two texts, and
`label` (the index of a class, or a float score for STS-B).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets import Dataset

from fastdistill.recipes.token_tasks import TOKEN_TASKS, Recipe, TokenTask, label_names, label_options, read_lines
from fastdistill.train.data import add_teacher_logits

logger = logging.getLogger(__name__)

SENTENCES = ("sentence1", "sentence2")


@dataclass(frozen=True, kw_only=True)
class Task(Recipe):
    """One GLUE task."""

    columns: tuple[str, ...]  # of train.tsv, in order
    has_header: bool = True  # whether the tsv files start with a line of column names
    texts: tuple[str, ...] = SENTENCES  # the text columns of the tsv files, one or two
    hub_texts: tuple[str, ...] = ()  # the text columns of nyu-mll/glue if they have other names there
    label_column: str = "label"  # of the tsv files
    labels: tuple[str, ...]  # class names by index; none for a regression
    tsv_labels: tuple[str, ...] = ("0", "1")  # how the tsv files write each class
    metrics: tuple[str, ...] = ("accuracy",)  # keys of `compute_metrics`
    evaluations: tuple[str, ...] = ("dev",)  # names of the tsv files to evaluate on, each on its own
    skip_short_lines: bool = False  # whether lines that are cut short are dropped
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @property
    def hub_name(self) -> str:
        """The task's configuration in nyu-mll/glue."""
        return short_name(self.name)

    @property
    def row_columns(self) -> list[str]:
        """The columns that every reader returns."""
        return [*SENTENCES[: len(self.texts)], "label"]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def caches_logits(self) -> bool:
        """Whether the prediction stage learns from one row of teacher logits for each text, which can be kept."""
        return not self.is_regression

    @property
    def max_length(self) -> int:
        """Tokens that a row is cut to: 64 for a single sentence, 128 for a pair."""
        return 64 * len(self.texts)

    def file(self, split: str) -> str:
        return f"{split}.tsv"

    def model_options(self, train: Dataset | None = None) -> dict[str, Any]:
        """Returns the keyword arguments of a transformers config for this task; the training rows are not needed."""
        if self.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return {**label_options(self.labels), "problem_type": "single_label_classification"}

    def for_model(self, config: Any, argument: str = "teacher") -> Task:
        """Returns this task. Raises ValueError unless a classifier's outputs are its classes in its order.

        A warning says so if the order cannot be checked, because the classes have transformers' placeholder names.
        """
        count = max(len(self.labels), 1)
        if config.num_labels != count:
            raise ValueError(f"{argument} has {config.num_labels} outputs; {self.name} needs {count}")
        if self.is_regression:
            return self
        found = label_names(config)
        if found is None:
            logger.warning("%s does not name its classes: cannot check their order", argument)
        elif [normalize(label) for label in found] != [normalize(label) for label in self.labels]:
            raise ValueError(
                f"{argument} orders its classes {list(found)}; {self.name} here has {list(self.labels)}. "
                "Fine-tune it with this order, or permute its classifier rows and id2label"
            )
        return self

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """Loads one split: `train`, or one of `evaluations`.

        Reads `data_dir/<split>.tsv`, or without `data_dir` nyu-mll/glue through the datasets library.
        """
        if split != "train" and split not in self.evaluations:
            raise ValueError(f"split is {split!r}; {self.name} has train, {', '.join(self.evaluations)}")
        if data_dir is not None:
            if not Path(data_dir).is_dir():
                raise FileNotFoundError(f"{data_dir}: no such folder; it should hold {self.name}'s tsv files")
            return read_tsv(self, Path(data_dir) / self.file(split))
        rows = datasets.load_dataset("nyu-mll/glue", self.hub_name, split=split.replace("dev", "validation"))
        columns = [*(self.hub_texts or self.texts), "label"]
        return rows.select_columns(columns).rename_columns(dict(zip(columns, self.row_columns, strict=True)))

    def tokenize(self, rows: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
        """Turns texts into token ids, cut to `max_length` (default: the task's, or the tokenizer's if less).

        Returns the tokenizer's columns, not padded, and `labels` (int64, or float32 for a regression).
        """
        names = self.row_columns[:-1]
        most = max_length or min(self.max_length, tokenizer.model_max_length)

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return tokenizer(*(batch[name] for name in names), truncation=True, max_length=most)

        rows = rows.map(encode, batched=True, remove_columns=names, desc=f"Tokenizing {self.name}")
        dtype = datasets.Value("float32" if self.is_regression else "int64")
        return rows.rename_column("label", "labels").cast_column("labels", dtype)

    encode = tokenize  # rows to predict on are the same

    def predict(self, rows: Dataset, model: Any, tokenizer: Any) -> np.ndarray:
        """Returns a model's logits (rows, classes) for rows from `load_split`; a regression has one class."""
        return np.array(add_teacher_logits(self.tokenize(rows, tokenizer), model, tokenizer)["teacher_logits"])

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """Returns `compute_metrics` of a model on rows from `load_split`."""
        return compute_metrics(self, self.predict(rows, model, tokenizer), np.array(rows["label"]))


ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
PARSES = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")

# fmt: off
TASKS: tuple[Task, ...] = (
    Task("CoLA", columns=("source", "label", "mark", "sentence"), has_header=False, texts=("sentence",),
         labels=("unacceptable", "acceptable"), metrics=("matthews",), intermediate_epochs=50),
    Task("SST-2", columns=("sentence", "label"), texts=("sentence",), labels=("negative", "positive")),
    Task("MRPC", columns=("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), texts=("#1 String", "#2 String"),
         hub_texts=SENTENCES, label_column="Quality", labels=("not_equivalent", "equivalent"),
         metrics=("accuracy", "f1")),
    Task("STS-B", label_column="score", labels=(), tsv_labels=(), metrics=("pearson", "spearman"),
         columns=("index", "genre", "filename", "year", "old_index", "source1", "source2", *SENTENCES, "score")),
    Task("QQP", columns=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
         texts=("question1", "question2"), label_column="is_duplicate", labels=("not_duplicate", "duplicate"),
         # A few lines of the published train.tsv are cut short; GLUE's own loaders drop them as well.
         skip_short_lines=True, metrics=("accuracy", "f1"), intermediate_epochs=10),
    Task("MNLI", columns=("index", "promptID", "pairID", "genre", *PARSES, *SENTENCES, "label1", "gold_label"),
         hub_texts=("premise", "hypothesis"), label_column="gold_label", labels=NLI, tsv_labels=NLI,
         evaluations=("dev_matched", "dev_mismatched"), intermediate_epochs=10),
    Task("QNLI", columns=("index", "question", "sentence", "label"), texts=("question", "sentence"),
         labels=ENTAILMENT, tsv_labels=ENTAILMENT, intermediate_epochs=10),
    Task("RTE", columns=("index", *SENTENCES, "label"), labels=ENTAILMENT, tsv_labels=ENTAILMENT),
    Task("WNLI", columns=("index", *SENTENCES, "label"), labels=("not_entailment", "entailment")),
)
# fmt: on


# These methods as functions, which take the task first.
check_labels, load_split, tokenize = Task.for_model, Task.load_split, Task.tokenize


def get_task(name: str) -> Task | TokenTask:
    """Returns the task of that name, which is one of GLUE's or of `fastdistill.recipes.token_tasks`.

    Case and hyphens do not matter (`SST-2`, `sst2`). Raises ValueError for an unknown name.
    """
    tasks = {short_name(task.name): task for task in (*TASKS, *TOKEN_TASKS)}
    if short_name(name) not in tasks:
        known = ", ".join(task.name for task in tasks.values())
        raise ValueError(f"task is {name!r}; it should be one of {known}")
    return tasks[short_name(name)]


def short_name(name: str) -> str:
    return name.replace("-", "").lower()


def read_tsv(task: Task, path: str | Path) -> Dataset:
    """Reads one of GLUE's tsv files: tab-separated, no quoting, UTF-8 with or without a byte-order mark.

    Returns a datasets.Dataset with the columns `sentence1`, (`sentence2`), `label`.
    Raises FileNotFoundError, and ValueError naming file and line for a line that does not fit the task.
    """
    lines = read_lines(path, f"{task.name} needs it as one of GLUE's own tsv files")
    if not lines and task.has_header:
        raise ValueError(f"{path}: empty; {task.name} files start with a header line")
    header = lines[0].split("\t") if task.has_header else list(task.columns)
    wanted = (*task.texts, task.label_column)
    if missing := [column for column in wanted if column not in header]:
        columns = ", ".join(map(repr, missing))
        raise ValueError(f"{path}:1: no column {columns} in the header {header}; is it {task.name}?")
    numbered = [(number, line.split("\t")) for number, line in enumerate(lines, 1)][task.has_header :]
    rows = [x for x in numbered if len(x[1]) >= len(header)] if task.skip_short_lines else numbered
    if len(rows) < len(numbered):
        logger.warning("%s: skipped %d lines that are cut short", path, len(numbered) - len(rows))
    if not rows:
        raise ValueError(f"{path}: no rows")
    found = []
    for number, row in rows:
        where = f"{path}:{number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} columns; a line of {task.name} has {len(header)} separated by tabs")
        *texts, label = (row[header.index(column)] for column in wanted)
        found.append((*texts, parse_label(task, label, where)))
    return Dataset.from_dict(dict(zip(task.row_columns, map(list, zip(*found, strict=True)), strict=True)))


def parse_label(task: Task, text: str, where: str) -> int | float:
    """Returns the label that a tsv field stands for. Raises ValueError starting with `where` for any other text."""
    if not task.is_regression:
        if text in task.tsv_labels:
            return task.tsv_labels.index(text)
        raise ValueError(f"{where}: label {text!r}; {task.name} has {', '.join(task.tsv_labels)}")
    with suppress(ValueError):
        if 0 <= float(text) <= 5:  # NaN fails this too
            return float(text)
    raise ValueError(f"{where}: score {text!r}; {task.name} has numbers from 0 to 5")


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes GLUE's metrics of `logits` (N, classes), or of scores (N,) or (N, 1), against `labels` (N,).

    Values are fractions, not percentages. A correlation is 0 if the predictions are constant, or hold NaN because the
    training diverged. `score` is the mean of the task's metrics, by which GLUE ranks a task that has two (arXiv
    1804.07461, section 3).
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if not task.is_regression and (logits.ndim != 2 or logits.shape[1] != len(task.labels)):
        raise ValueError(f"logits have shape {logits.shape}; {task.name} needs (rows, {len(task.labels)})")
    predictions = logits.reshape(-1) if task.is_regression else logits.argmax(axis=1)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels have shape {labels.shape}; predictions have {predictions.shape}")
    varies = 0 < np.ptp(predictions) < np.inf and np.ptp(labels) > 0
    functions = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda truth, guess: pearsonr(truth, guess).statistic if varies else 0.0,
        "spearman": lambda truth, guess: spearmanr(truth, guess).statistic if varies else 0.0,
    }
    values = {name: float(functions[name](labels, predictions)) for name in task.metrics}
    return {**values, "score": float(np.mean(list(values.values())))}


def mean_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the mean of `score` over a task's evaluation sets (MNLI has two)."""
    return float(np.mean([values["score"] for values in metrics.values()]))


def normalize(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
