"""The nine GLUE tasks (Wang et al., arXiv 1804.07461): columns, labels, metrics, readers, TinyBERT's recipe.

Every reader gives the same columns, whatever the source: `sentence1`, `sentence2` where the task compares two
texts, and `label` (class index, or a float score for STS-B).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastdistill.recipes.token_tasks import TOKEN_TASKS, SpanTask, TaggingTask

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One GLUE task. The recipe's defaults are TinyBERT's (arXiv 1909.10351, section 4.2, and its code)."""

    name: str
    hub_name: str  # its configuration in nyu-mll/glue
    texts: tuple[str, ...]  # text columns of GLUE's tsv files, one or two
    hub_texts: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]  # class names by index; none for a regression
    tsv_labels: tuple[str, ...]  # what the tsv files write for each class
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None  # column names of files that carry no header line
    columns: tuple[str, ...] = ()  # of train.tsv, where it has others than the texts and the label
    evaluations: tuple[str, ...] = ("dev",)  # tsv stems, each evaluated on its own
    skip_short_lines: bool = False
    intermediate_epochs: int = 20
    prediction_epochs: int = 3
    batch_size: int = 32
    intermediate_learning_rate: float = 5e-5
    prediction_learning_rate: float = 3e-5
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def max_length(self) -> int:
        """Tokens a row is cut to: 64 for a single sentence, 128 for a pair."""
        return 64 * len(self.texts)

    def model_options(self, train: Dataset | None = None) -> dict[str, Any]:
        """Keyword arguments of a transformers config that make a sequence classifier one for this task.

        The training rows are not looked at; the tags of a tagging task come from them.
        """
        if self.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    # What the command line asks of every task, of those in `fastdistill.recipes.token_tasks` too.

    @property
    def caches_logits(self) -> bool:
        """Whether the prediction stage learns from one row of teacher logits for each text, which can be kept."""
        return not self.is_regression

    def file(self, split: str) -> str:
        return f"{split}.tsv"

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        return load_split(self, split, data_dir)

    def for_model(self, config: Any, argument: str = "teacher") -> Task:
        """This task, after `check_labels`."""
        check_labels(self, config, argument)
        return self

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(self, rows, tokenizer)

    def encode(self, rows: Dataset, tokenizer: Any) -> Dataset:
        return tokenize(self, rows, tokenizer)

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """`compute_metrics` of a model on rows as `load_split` returns them."""
        from fastdistill.train.data import add_teacher_logits

        rows = tokenize(self, rows, tokenizer)
        logits = add_teacher_logits(rows, model, tokenizer)["teacher_logits"]
        return compute_metrics(self, np.array(logits), np.array(rows["labels"]))


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
INDEXED = ("index", *SENTENCES, "label")

TASKS: tuple[Task, ...] = (
    Task(
        "CoLA",
        "cola",
        ("sentence",),
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        BINARY,
        metrics=("matthews",),
        header=("source", "label", "mark", "sentence"),
        intermediate_epochs=50,
    ),
    Task("SST-2", "sst2", ("sentence",), ("sentence",), "label", ("negative", "positive"), BINARY),
    Task(
        "MRPC",
        "mrpc",
        ("#1 String", "#2 String"),
        SENTENCES,
        "Quality",
        ("not_equivalent", "equivalent"),
        BINARY,
        metrics=("accuracy", "f1"),
        columns=("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    ),
    Task(
        "STS-B",
        "stsb",
        SENTENCES,
        SENTENCES,
        "score",
        (),
        (),
        metrics=("pearson", "spearman"),
        columns=("index", "genre", "filename", "year", "old_index", "source1", "source2", *SENTENCES, "score"),
    ),
    Task(
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        BINARY,
        metrics=("accuracy", "f1"),
        columns=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        # A few rows of the published train.tsv are cut short; GLUE's own loaders drop them as well.
        skip_short_lines=True,
        intermediate_epochs=10,
    ),
    Task(
        "MNLI",
        "mnli",
        SENTENCES,
        ("premise", "hypothesis"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("entailment", "neutral", "contradiction"),
        columns=(
            "index",
            "promptID",
            "pairID",
            "genre",
            *(f"{sentence}_{parse}" for parse in ("binary_parse", "parse") for sentence in SENTENCES),
            *SENTENCES,
            "label1",
            "gold_label",
        ),
        evaluations=("dev_matched", "dev_mismatched"),
        intermediate_epochs=10,
    ),
    Task(
        "QNLI",
        "qnli",
        ("question", "sentence"),
        ("question", "sentence"),
        "label",
        ENTAILMENT,
        ENTAILMENT,
        columns=("index", "question", "sentence", "label"),
        intermediate_epochs=10,
    ),
    Task("RTE", "rte", SENTENCES, SENTENCES, "label", ENTAILMENT, ENTAILMENT, columns=INDEXED),
    Task("WNLI", "wnli", SENTENCES, SENTENCES, "label", ("not_entailment", "entailment"), BINARY, columns=INDEXED),
)


def get_task(name: str) -> Task | SpanTask | TaggingTask:
    """The task of that name, in any case, with or without hyphen (`SST-2`, `sst2`): one of GLUE's, or one of
    `fastdistill.recipes.token_tasks`. Unknown: ValueError.
    """
    wanted = name.replace("-", "").lower()
    for task in (*TASKS, *TOKEN_TASKS):
        if wanted == task.name.replace("-", "").lower():
            return task
    known = ", ".join(task.name for task in (*TASKS, *TOKEN_TASKS))
    raise ValueError(f"task is {name!r}; it should be one of {known}")


def read_tsv(task: Task, path: str | Path) -> Dataset:
    """Read one of GLUE's tsv files: tab-separated, no quoting, UTF-8 with or without a byte-order mark.

    Returns a datasets.Dataset with the columns `sentence1`, (`sentence2`), `label`.
    Raises FileNotFoundError, and ValueError naming file and line for a line that does not fit the task.
    """
    from datasets import Dataset

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {task.name} needs it as one of GLUE's own tsv files")
    try:
        # Only "\n" ends a row: sentences hold other characters that str.splitlines would break at.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if lines[-1] == "":
        lines.pop()
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    first_line = 1
    header = list(task.header or ())
    if task.header is None:
        if not rows:
            raise ValueError(f"{path}: empty; {task.name} files start with a header line")
        header, rows, first_line = rows[0], rows[1:], 2
    wanted = (*task.texts, task.label_column)
    missing = [column for column in wanted if column not in header]
    if missing:
        raise ValueError(
            f"{path}:1: no column {', '.join(map(repr, missing))} in the header {header}; is it {task.name}?"
        )
    *texts, label = (header.index(column) for column in wanted)

    columns: dict[str, list[Any]] = {name: [] for name in (*SENTENCES[: len(texts)], "label")}
    skipped = 0
    for number, row in enumerate(rows, first_line):
        where = f"{path}:{number}"
        if len(row) != len(header):
            if task.skip_short_lines and len(row) < len(header):
                skipped += 1
                continue
            raise ValueError(f"{where}: {len(row)} columns; a line of {task.name} has {len(header)} separated by tabs")
        value = parse_label(task, row[label], where)
        for name, index in zip(SENTENCES, texts, strict=False):
            columns[name].append(row[index])
        columns["label"].append(value)
    if skipped:
        logger.warning("%s: skipped %d lines that are cut short", path, skipped)
    if not columns["label"]:
        raise ValueError(f"{path}: no rows")
    return Dataset.from_dict(columns)


def parse_label(task: Task, text: str, where: str) -> int | float:
    """The label a tsv field stands for; ValueError starting with `where` if it stands for none."""
    if not task.is_regression:
        if text in task.tsv_labels:
            return task.tsv_labels.index(text)
        raise ValueError(f"{where}: label {text!r}; {task.name} has {', '.join(task.tsv_labels)}")
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:  # also refuses nan
        raise ValueError(f"{where}: score {text!r}; {task.name} has numbers from 0 to 5")
    return score


def load_split(task: Task, split: str, data_dir: str | Path | None = None) -> Dataset:
    """One split of a task: `train`, or one of `task.evaluations`.

    Read from `data_dir/<split>.tsv`, or without `data_dir` from nyu-mll/glue through the datasets library.
    """
    if split != "train" and split not in task.evaluations:
        raise ValueError(f"split is {split!r}; {task.name} has train, {', '.join(task.evaluations)}")
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f"{data_dir}: no such folder; it should hold {task.name}'s tsv files")
        return read_tsv(task, Path(data_dir) / f"{split}.tsv")
    from datasets import load_dataset

    dataset = load_dataset("nyu-mll/glue", task.hub_name, split=split.replace("dev", "validation"))
    dataset = dataset.select_columns([*task.hub_texts, "label"])
    renames = {hub: ours for hub, ours in zip(task.hub_texts, SENTENCES, strict=False) if hub != ours}
    return dataset.rename_columns(renames) if renames else dataset


def tokenize(task: Task, dataset: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """Turn texts into token ids, cut to `max_length` (default: the task's, or the tokenizer's if less), not padded.

    Returns the columns the tokenizer makes and `labels` (int64, or float32 for a regression).
    """
    from datasets import Value

    names = SENTENCES[: len(task.texts)]
    most = max_length or min(task.max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(*(batch[name] for name in names), truncation=True, max_length=most)

    dataset = dataset.map(encode, batched=True, remove_columns=list(names), desc=f"Tokenizing {task.name}")
    dataset = dataset.rename_column("label", "labels")
    return dataset.cast_column("labels", Value("float32" if task.is_regression else "int64"))


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's metrics of `logits` (N, classes), or of scores (N,) or (N, 1), against `labels` (N,).

    Values are fractions, not percentages. A correlation with constant predictions, or with NaN (a training that
    diverged), is 0. `score` is the mean of the task's metrics, which is how GLUE ranks a task that has two (arXiv
    1804.07461, section 3).
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if task.is_regression:
        predictions = logits.reshape(-1)
    else:
        if logits.ndim != 2 or logits.shape[1] != len(task.labels):
            raise ValueError(f"logits have shape {logits.shape}; {task.name} needs (rows, {len(task.labels)})")
        predictions = logits.argmax(axis=1)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels have shape {labels.shape}; predictions have {predictions.shape}")

    def correlation(function: Callable[..., Any]) -> Callable[..., float]:
        varies = 0 < np.ptp(predictions) < np.inf and np.ptp(labels) > 0
        return lambda truth, guess: function(truth, guess).statistic if varies else 0.0

    functions: dict[str, Callable[..., float]] = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": correlation(pearsonr),
        "spearman": correlation(spearmanr),
    }
    values = {name: float(functions[name](labels, predictions)) for name in task.metrics}
    return {**values, "score": float(np.mean(list(values.values())))}


def mean_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """The mean of `score` over a task's evaluation sets, of which MNLI has two."""
    return float(np.mean([values["score"] for values in metrics.values()]))


def check_labels(task: Task, config: Any, argument: str = "teacher") -> None:
    """Refuse a classifier whose outputs are not this task's classes in this task's order.

    A model whose classes have transformers' placeholder names (`LABEL_0`) are not checked: a warning says so.
    Raises ValueError naming both orders.
    """
    count = max(len(task.labels), 1)
    if config.num_labels != count:
        raise ValueError(f"{argument} has {config.num_labels} outputs; {task.name} needs {count}")
    if task.is_regression:
        return
    found = [str(config.id2label[index]) for index in range(count)]
    if all(label == f"LABEL_{index}" for index, label in enumerate(found)):
        logger.warning("%s does not name its classes: cannot check their order", argument)
    elif [normalize(label) for label in found] != [normalize(label) for label in task.labels]:
        raise ValueError(
            f"{argument} orders its classes {found}; {task.name} here has {list(task.labels)}. "
            "Fine-tune it with this order, or permute its classifier rows and id2label"
        )


def normalize(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
