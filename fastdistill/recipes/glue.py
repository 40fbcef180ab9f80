"""The nine GLUE tasks (Wang et al., arXiv 1804.07461): columns, labels, metrics, readers, TinyBERT's recipe.

Every reader returns the same columns, whatever the source: `sentence1`, `sentence2` if the task compares two texts, and
`label` (the index of a class, or a float score for STS-B).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastdistill.recipes.tasks import Recipe, are_placeholders, label_names, label_options, read_lines
from fastdistill.recipes.token_tasks import TOKEN_TASKS, SpanTask, TaggingTask

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SENTENCES = ("sentence1", "sentence2")


@dataclass(frozen=True, kw_only=True)
class Task(Recipe):
    """One GLUE task.

    Attributes:
        columns: columns of train.tsv, in order.
        has_header: whether the tsv files start with a line of column names.
        texts: the text columns of the tsv files, one or two.
        hub_texts: the text columns of nyu-mll/glue if they have other names there.
        label_column: the column of the label in the tsv files.
        labels: class names by index; none for a regression.
        tsv_labels: how the tsv files write each class.
        metrics: keys of `compute_metrics`.
        evaluations: names of the tsv files to evaluate on, each on its own.
        skip_short_lines: whether lines that are cut short are dropped.
    """

    columns: tuple[str, ...]
    has_header: bool = True
    texts: tuple[str, ...] = SENTENCES
    hub_texts: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...]
    tsv_labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[str, ...] = ("dev",)
    skip_short_lines: bool = False
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
        """Returns this task after `check_labels`."""
        check_labels(self, config, argument)
        return self

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        return load_split(self, split, data_dir)

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(self, rows, tokenizer)

    def encode(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(self, rows, tokenizer)

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """Returns `compute_metrics` of a model on rows from `load_split`."""
        from fastdistill.train.data import add_teacher_logits

        rows = tokenize(self, rows, tokenizer)
        logits = add_teacher_logits(rows, model, tokenizer)["teacher_logits"]
        return compute_metrics(self, np.array(logits), np.array(rows["labels"]))


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


def get_task(name: str) -> Task | SpanTask | TaggingTask:
    """Returns the task of that name, which is one of GLUE's or of `fastdistill.recipes.token_tasks`.

    Case and hyphens do not matter (`SST-2`, `sst2`). Raises ValueError for an unknown name.
    """
    for task in (*TASKS, *TOKEN_TASKS):
        if short_name(name) == short_name(task.name):
            return task
    known = ", ".join(task.name for task in (*TASKS, *TOKEN_TASKS))
    raise ValueError(f"task is {name!r}; it should be one of {known}")


def short_name(name: str) -> str:
    return name.replace("-", "").lower()


def read_tsv(task: Task, path: str | Path) -> Dataset:
    """Reads one of GLUE's tsv files: tab-separated, no quoting, UTF-8 with or without a byte-order mark.

    Returns a datasets.Dataset with the columns `sentence1`, (`sentence2`), `label`.
    Raises FileNotFoundError, and ValueError naming file and line for a line that does not fit the task.
    """
    from datasets import Dataset

    lines = read_lines(path, f"{task.name} needs it as one of GLUE's own tsv files")
    if not lines and task.has_header:
        raise ValueError(f"{path}: empty; {task.name} files start with a header line")
    header = lines[0].split("\t") if task.has_header else list(task.columns)
    wanted = (*task.texts, task.label_column)
    if missing := [column for column in wanted if column not in header]:
        columns = ", ".join(map(repr, missing))
        raise ValueError(f"{path}:1: no column {columns} in the header {header}; is it {task.name}?")
    rows = [line.split("\t") for line in lines]
    numbered = [*enumerate(rows, 1)][1 if task.has_header else 0 :]
    if task.skip_short_lines:
        whole = [(number, row) for number, row in numbered if len(row) >= len(header)]
        if len(whole) < len(numbered):
            logger.warning("%s: skipped %d lines that are cut short", path, len(numbered) - len(whole))
        numbered = whole
    if not numbered:
        raise ValueError(f"{path}: no rows")
    places = [header.index(column) for column in wanted]
    found = [_parse_row(task, row, len(header), places, f"{path}:{number}") for number, row in numbered]
    return Dataset.from_dict(dict(zip(task.row_columns, map(list, zip(*found, strict=True)), strict=True)))


def _parse_row(task: Task, row: list[str], width: int, places: list[int], where: str) -> tuple[Any, ...]:
    """Returns the texts and the label of one line, which are in the columns `places`."""
    if len(row) != width:
        raise ValueError(f"{where}: {len(row)} columns; a line of {task.name} has {width} separated by tabs")
    *texts, label = (row[place] for place in places)
    return *texts, parse_label(task, label, where)


def parse_label(task: Task, text: str, where: str) -> int | float:
    """Returns the label that a tsv field stands for. Raises ValueError starting with `where` for any other text."""
    if not task.is_regression:
        if text in task.tsv_labels:
            return task.tsv_labels.index(text)
        raise ValueError(f"{where}: label {text!r}; {task.name} has {', '.join(task.tsv_labels)}")
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:  # NaN fails this too
        raise ValueError(f"{where}: score {text!r}; {task.name} has numbers from 0 to 5")
    return score


def load_split(task: Task, split: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads one split of a task: `train`, or one of `task.evaluations`.

    Reads `data_dir/<split>.tsv`, or without `data_dir` nyu-mll/glue through the datasets library.
    """
    if split != "train" and split not in task.evaluations:
        raise ValueError(f"split is {split!r}; {task.name} has train, {', '.join(task.evaluations)}")
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f"{data_dir}: no such folder; it should hold {task.name}'s tsv files")
        return read_tsv(task, Path(data_dir) / task.file(split))
    from datasets import load_dataset

    dataset = load_dataset("nyu-mll/glue", task.hub_name, split=split.replace("dev", "validation"))
    columns = [*(task.hub_texts or task.texts), "label"]
    names = dict(zip(columns, task.row_columns, strict=True))
    return dataset.select_columns(columns).rename_columns(names)


def tokenize(task: Task, dataset: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """Turns texts into token ids, cut to `max_length` (default: the task's, or the tokenizer's if less), not padded.

    Returns the tokenizer's columns and `labels` (int64, or float32 for a regression).
    """
    from datasets import Value

    names = task.row_columns[:-1]
    most = max_length or min(task.max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(*(batch[name] for name in names), truncation=True, max_length=most)

    dataset = dataset.map(encode, batched=True, remove_columns=names, desc=f"Tokenizing {task.name}")
    dataset = dataset.rename_column("label", "labels")
    return dataset.cast_column("labels", Value("float32" if task.is_regression else "int64"))


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes GLUE's metrics of `logits` (N, classes), or of scores (N,) or (N, 1), against `labels` (N,).

    Values are fractions, not percentages. A correlation is 0 if the predictions are constant, or hold NaN because the
    training diverged. `score` is the mean of the task's metrics, by which GLUE ranks a task that has two (arXiv
    1804.07461, section 3).
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predictions, labels = _predictions(task, np.asarray(logits, dtype=np.float64)), np.asarray(labels)
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


def _predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    if task.is_regression:
        return logits.reshape(-1)
    if logits.ndim != 2 or logits.shape[1] != len(task.labels):
        raise ValueError(f"logits have shape {logits.shape}; {task.name} needs (rows, {len(task.labels)})")
    return logits.argmax(axis=1)


def mean_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the mean of `score` over a task's evaluation sets (MNLI has two)."""
    return float(np.mean([values["score"] for values in metrics.values()]))


def check_labels(task: Task, config: Any, argument: str = "teacher") -> None:
    """Refuses a classifier whose outputs are not this task's classes in this task's order.

    The order cannot be checked if the classes have transformers' placeholder names (`LABEL_0`); a warning says so.
    Raises ValueError naming both orders.
    """
    count = max(len(task.labels), 1)
    if config.num_labels != count:
        raise ValueError(f"{argument} has {config.num_labels} outputs; {task.name} needs {count}")
    if task.is_regression:
        return
    found = label_names(config)
    if are_placeholders(found):
        logger.warning("%s does not name its classes: cannot check their order", argument)
    elif [normalize(label) for label in found] != [normalize(label) for label in task.labels]:
        raise ValueError(
            f"{argument} orders its classes {list(found)}; {task.name} here has {list(task.labels)}. "
            "Fine-tune it with this order, or permute its classifier rows and id2label"
        )


def normalize(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
