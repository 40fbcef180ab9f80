"""Defines tasks on tokens: answers that are spans of a text (SQuAD), and tags of words (named entities, for example).

docs/token_tasks.md shows how they are used. A text that is longer than the model's input becomes several windows. The
offsets of fast tokenizers tell where a token is in its text; slow tokenizers are refused.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets import Dataset
from transformers.utils import logging as hf_logging

from fastdistill.train.data import batches_by_length, predict

logger = logging.getLogger(__name__)

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Recipe:
    """The name of a task, and how TinyBERT trains on it (arXiv 1909.10351, section 4.2, and its code)."""

    name: str
    _: KW_ONLY
    intermediate_epochs: int = 20
    prediction_epochs: int = 3
    batch_size: int = 32
    intermediate_learning_rate: float = 5e-5
    prediction_learning_rate: float = 3e-5


def read_lines(path: str | Path, expected: str) -> list[str]:
    """Reads the lines of a UTF-8 file, with or without a byte-order mark, without their line ends.

    Only a line feed ends a line: sentences contain other characters at which str.splitlines would break.

    Raises FileNotFoundError, which says what was `expected`, and ValueError for a file that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {expected}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the keyword arguments with which a transformers config has these classes in this order."""
    indices = {label: index for index, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": indices}


def label_names(config: Any) -> tuple[str, ...] | None:
    """Returns the names of a model's classes by index; None if they are transformers' placeholders, `LABEL_0` etc."""
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


@dataclass(frozen=True, kw_only=True)
class _TokenTask(Recipe):
    """A task whose rows are cut into windows of at most `max_length` tokens."""

    max_length: int
    evaluations: ClassVar[tuple[str, ...]] = ("dev",)
    is_regression: ClassVar[bool] = False
    caches_logits: ClassVar[bool] = False  # there is a row of logits for each token: the teacher runs along instead
    text: ClassVar[int]  # which of the tokenizer's sequences is the text to predict on
    # For a batch of rows: the tokenizer's arguments; where the tokens of each window stand in the text; its labels.
    _inputs: ClassVar[Callable[..., dict[str, Any]]]
    _places: ClassVar[Callable[..., Columns]]
    _labels: ClassVar[Callable[..., Columns]]

    def check_length(self, config: Any, argument: str) -> None:
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < self.max_length:
            raise ValueError(f"{argument} reads {positions} tokens at most; {self.name} needs {self.max_length}")

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Cuts rows into windows to train on: the tokenizer's columns and the labels."""
        return self._cut(rows, tokenizer, has_labels=True)

    def encode(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Cuts rows into windows to predict on: the tokenizer's columns, the index of the `row`, the tokens' places."""
        return self._cut(rows, tokenizer, has_labels=False)

    def _cut(self, rows: Dataset, tokenizer: Any, has_labels: bool) -> Dataset:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, a slow one, which does not tell where its tokens "
                "stand in the text; use a checkpoint with a tokenizer.json"
            )

        def cut(batch: Columns, indices: list[int]) -> Columns:
            options = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
            columns = tokenizer(**self._inputs(tokenizer, batch), max_length=self.max_length, **options)
            sources = columns.pop("overflow_to_sample_mapping")  # each window's row in the batch
            offsets = []  # (L, 2) of each window: the characters [start, end) of each token, -1 outside the text
            for window, spans in enumerate(columns.pop("offset_mapping")):
                is_text = np.array(columns.sequence_ids(window)) == self.text
                offsets.append(np.where(is_text[:, None], np.reshape(spans, (-1, 2)), -1))
            places = self._places(batch, sources, offsets)
            if has_labels:
                return {**columns, **self._labels(tokenizer, batch, columns["input_ids"], sources, places)}
            return {**columns, "row": [indices[source] for source in sources], **places}

        options = {"batched": True, "with_indices": True, "remove_columns": rows.column_names}
        return rows.map(cut, desc=f"Tokenizing for {self.name}", **options)


PAIR_TOKENS = 4  # most special tokens around a question and a text: RoBERTa's


@dataclass(frozen=True, kw_only=True)
class SpanTask(_TokenTask):
    """Questions that a span of a text answers: SQuAD 1.1 (arXiv 1606.05250) and 2.0 (arXiv 1806.03822)."""

    hub_name: str
    version: str  # part of the names of SQuAD's own files: `train-v1.1.json`
    has_unanswerable: bool = False  # whether a text may leave its question open, as in 2.0
    max_length: int = 384  # tokens of a window, question included
    stride: int = 128  # tokens that neighbouring windows share
    max_question: int = 64  # tokens that a question is cut to
    max_answer: int = 30  # tokens of the longest answer that is considered
    intermediate_epochs: int = 10  # as for the larger GLUE tasks
    text: ClassVar[int] = 1
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"

    def __post_init__(self) -> None:
        needed = self.max_question + PAIR_TOKENS + self.stride + 1
        if self.max_length < needed:
            raise ValueError(
                f"max_length is {self.max_length}; a question (max_question {self.max_question}), {PAIR_TOKENS} "
                f"special tokens, a stride of {self.stride} and one token more need {needed}"
            )

    def model_options(self, train: Dataset | None = None) -> dict[str, Any]:
        """Returns the keyword arguments of a transformers config: two outputs a token, whatever the checkpoint had."""
        return {"num_labels": 2}

    def for_model(self, config: Any, argument: str = "teacher") -> SpanTask:
        """Returns this task. Raises ValueError unless the model has a start and an end output and enough positions."""
        if config.num_labels != 2:
            raise ValueError(f"{argument} has {config.num_labels} outputs; {self.name} needs 2, a span's start and end")
        self.check_length(config, argument)
        return self

    def file(self, split: str) -> str:
        return f"{split}-{self.version}.json"

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """Loads `train` or `dev` from SQuAD's own file in `data_dir`, or else from the hub, like `read_squad`."""
        if data_dir is not None:
            return read_squad(Path(data_dir) / self.file(split), has_unanswerable=self.has_unanswerable)
        rows = datasets.load_dataset(self.hub_name, split=split.replace("dev", "validation")).flatten()
        rows = rows.rename_columns({"answers.text": "answers", "answers.answer_start": "starts"})
        return rows.select_columns(["id", "question", "context", "answers", "starts"])

    def _labels(self, tokenizer: Any, batch: Columns, ids: list[Any], sources: list[int], places: Columns) -> Columns:
        """Returns `start_positions` and `end_positions`, those of the first answer's first and last token.

        Both are that of the first token ([CLS]) if the window does not hold the whole answer, or there is none.
        """
        found = []
        for source, tokens, *offsets in zip(sources, ids, *places.values(), strict=True):
            answer = None
            if batch["answers"][source]:
                text, start = batch["answers"][source][0], batch["starts"][source][0]
                start += len(text) - len(text.lstrip())
                answer = answer_tokens(np.stack(offsets, 1), start, start + len(text.strip()))
            found.append(answer or (null_position(tokens, tokenizer),) * 2)
        return {"start_positions": [first for first, _ in found], "end_positions": [last for _, last in found]}

    def _inputs(self, tokenizer: Any, batch: Columns) -> dict[str, Any]:
        questions = [question.strip() for question in batch["question"]]
        tokens = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        questions = [
            question if len(offsets) <= self.max_question else question[: offsets[self.max_question - 1][1]]
            for question, offsets in zip(questions, tokens, strict=True)
        ]
        texts = {"text": questions, "text_pair": batch["context"]}
        return {**texts, "truncation": "only_second", "stride": self.stride}

    def _places(self, batch: Columns, sources: list[int], offsets: list[np.ndarray]) -> Columns:
        """Returns the characters of each token in the context: `token_starts` to `token_ends` (exclusive), else -1."""
        return {"token_starts": [x[:, 0] for x in offsets], "token_ends": [x[:, 1] for x in offsets]}

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """Returns `squad_metrics` of a model's answers to rows from `load_split`."""
        answers = self.answer(rows, model, tokenizer)
        return squad_metrics(answers, rows["answers"][:], has_unanswerable=self.has_unanswerable)

    def answer(self, rows: Dataset, model: Any, tokenizer: Any) -> list[str]:
        """Returns a model's answer to each row: the span with the highest start logit + end logit over all windows.

        With `has_unanswerable` it is "" if that sum is less than [CLS]'s in every window: Devlin et al. (arXiv
        1810.04805, section 4.3) with threshold 0.
        """
        contexts = rows["context"][:]
        answers = [""] * len(contexts)
        best = np.full(len(contexts), -np.inf)
        null = np.full(len(contexts), np.inf)
        windows = self.encode(rows, tokenizer)
        for window, logits in zip(windows, window_logits(model, windows, tokenizer, "spans"), strict=True):
            start, end = logits.T.astype(np.float64)
            row, starts, ends = window["row"], window["token_starts"], window["token_ends"]
            score, i, j = best_span(start, end, np.array(starts) >= 0, self.max_answer)
            if score > best[row]:
                best[row] = score
                answers[row] = contexts[row][starts[i] : ends[j]].strip()  # SentencePiece's tokens begin with a space
            position = null_position(window["input_ids"], tokenizer)
            null[row] = min(null[row], start[position] + end[position])
        has_null = self.has_unanswerable
        return ["" if has_null and null[row] > best[row] else answer for row, answer in enumerate(answers)]


def read_squad(path: str | Path, *, has_unanswerable: bool = False) -> Dataset:
    """Reads one of SQuAD's own JSON files.

    Returns a datasets.Dataset with the columns `id`, `question`, `context`, `answers` (list of str: one in the training
    set, none for an unanswerable question) and `starts` (list of int: the character at which each answer starts).
    Raises FileNotFoundError, and ValueError for a file with another layout, or naming the question if an answer is not
    where it should be, or if there is none without `has_unanswerable`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be one of SQuAD's own")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None
    try:
        rows = list(_squad_rows(content, path, has_unanswerable))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not laid out as SQuAD's own files, data, paragraphs, qas ({error!r})") from None
    if not rows:
        raise ValueError(f"{path}: no questions")
    return Dataset.from_list(rows)


def _squad_rows(content: Any, path: Path, has_unanswerable: bool) -> Iterator[dict[str, Any]]:
    for paragraph in (paragraph for article in content["data"] for paragraph in article["paragraphs"]):
        for question in paragraph["qas"]:
            where = f"{path}: question {question['id']}"
            answers = [] if question.get("is_impossible") else question["answers"]
            if not answers and not has_unanswerable:
                raise ValueError(f"{where} has no answer; unanswerable questions are of the task SQuAD2")
            texts, starts = ([answer[key] for answer in answers] for key in ("text", "answer_start"))
            for text, start in zip(texts, starts, strict=True):
                found = paragraph["context"][start : start + len(text)] if start >= 0 else ""
                if not text.strip() or found != text:
                    raise ValueError(
                        f"{where}: the answer {text!r} should start at character {start} (answer_start, from 0) of its "
                        f"context, where {found!r} stands"
                    )
            row = {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
            yield {**row, "answers": texts, "starts": starts}


def null_position(ids: Sequence[int], tokenizer: Any) -> int:
    """Returns the position of the token that stands for no answer: [CLS] if the tokenizer has it, else the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def answer_tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """Returns the first and last token of the characters `start` to `end` (exclusive), or None if some are outside.

    `offsets` (L, 2) are the characters of each token, -1 if it is not in the context.
    """
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    starts, ends = offsets[tokens].T
    if not len(tokens) or starts[0] > start or ends[-1] < end:
        return None
    first = np.searchsorted(starts, start, side="right") - 1
    last = np.searchsorted(ends, end, side="left")
    return int(tokens[first]), int(tokens[last])


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray, max_answer: int) -> tuple[float, int, int]:
    """Returns the best score `start[i] + end[j]` with i <= j < i + max_answer over allowed tokens, and its i and j.

    The arguments are (L). The score is -inf if no token is allowed.
    """
    start, end = (np.where(allowed, logits, -np.inf) for logits in (start, end))
    end = np.pad(end, (0, max_answer - 1), constant_values=-np.inf)
    scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(end, max_answer)  # (L, max_answer), j - i
    i, length = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, length]), int(i), int(i + length)


def squad_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], *, has_unanswerable: bool = False
) -> dict[str, float]:
    """Computes SQuAD's `exact_match` and `f1` as fractions, comparing a prediction with its best gold answer.

    Texts are compared as SQuAD's scripts do: in lower case, without punctuation, articles and extra spaces; F1 is that
    of their words as multisets, and also the `score`. With `has_unanswerable` the gold answer is "" if no gold answer
    has a word. If neither side has a word, F1 is 1 with `has_unanswerable` and 0 without, as in the two scripts.
    """
    exact, f1 = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        ours, texts = answer_words(prediction), [answer_words(gold) for gold in golds]
        if has_unanswerable:
            texts = [words for words in texts if words] or [[]]
        exact.append(max(ours == words for words in texts))
        f1.append(max(word_f1(ours, words, has_unanswerable) for words in texts))
    values = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    return {**values, "score": values["f1"]}


def answer_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(ours: list[str], golds: list[str], has_unanswerable: bool) -> float:
    if not ours or not golds:
        return float(has_unanswerable and ours == golds)
    return 2 * (Counter(ours) & Counter(golds)).total() / (len(ours) + len(golds))


ENTITY_PREFIXES = ("B-", "I-", "E-", "S-")  # IOB1, IOB2, IOBES


@dataclass(frozen=True, kw_only=True)
class TaggingTask(_TokenTask):
    """A tag for each word: named entities, parts of speech. A word's tag is read at its first token."""

    max_length: int = 128  # tokens of a window; a longer sentence continues in the next one without overlap
    labels: tuple[str, ...] = ()  # tags by index: the model's, see `for_model`
    text: ClassVar[int] = 0
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def model_options(self, train: Dataset) -> dict[str, Any]:
        """Returns the keyword arguments of a transformers config with the tags of these rows as its classes."""
        labels = sorted(distinct(train["tags"]))
        if len(labels) < 2:
            raise ValueError(f"the training rows have the tags {labels}; there should be two or more to tell apart")
        return label_options(labels)

    def for_model(self, config: Any, argument: str = "teacher") -> TaggingTask:
        """Returns this task with the model's labels. Raises ValueError if its config does not name them."""
        labels = label_names(config)
        if labels is None:
            raise ValueError(
                f"{argument} does not name its tags (id2label holds {', '.join(config.id2label.values())}); train one "
                "that does with `fastdistill finetune --task tagging`, or write their names into its config.json"
            )
        self.check_length(config, argument)
        return replace(self, labels=labels)

    def file(self, split: str) -> str:
        return f"{split}.txt"

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """Loads `train` or `dev` from `data_dir` with `read_conll`."""
        if data_dir is None:
            raise ValueError("tagging has no data on the hub; data_dir (--data) should hold train.txt and dev.txt")
        return read_conll(Path(data_dir) / self.file(split))

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Cuts rows into windows to train on. Raises ValueError for tags not in `labels`."""
        if unknown := sorted(distinct(rows["tags"]) - set(self.labels)):
            raise ValueError(f"the training rows have the tags {unknown}; the model's are {list(self.labels)}")
        return super().tokenize(rows, tokenizer)

    def _labels(self, tokenizer: Any, batch: Columns, ids: list[Any], sources: list[int], places: Columns) -> Columns:
        """Returns `labels`, -100 at all tokens but the first of each word."""
        index = {label: index for index, label in enumerate(self.labels)}
        tags = (batch["tags"][source] for source in sources)
        pairs = zip(tags, places["word"], strict=True)
        return {"labels": [[-100 if word < 0 else index[tag[word]] for word in window] for tag, window in pairs]}

    def _inputs(self, tokenizer: Any, batch: Columns) -> dict[str, Any]:
        # Sentences are joined with spaces, so that byte-level vocabularies too see them as running text.
        return {"text": [" ".join(words) for words in batch["words"]], "truncation": True}

    def _places(self, batch: Columns, sources: list[int], offsets: list[np.ndarray]) -> Columns:
        """Returns the `word` of which each token is the first one, else -1."""
        starts = [np.cumsum([0, *(len(word) + 1 for word in words[:-1])]) for words in batch["words"]]
        last = [-1] * len(starts)  # the last word of each row whose first token is in a window so far
        windows = []
        for source, tokens in zip(sources, offsets, strict=True):
            words = np.searchsorted(starts[source], tokens[:, 1] - 1, side="right") - 1  # (L), -1 outside the text
            known = np.maximum.accumulate([last[source], *words])
            windows.append(np.where(words > known[:-1], words, -1))
            last[source] = known[-1]
        return {"word": windows}

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """Returns `tag_metrics` of a model on rows from `load_split`. Tags that the model does not have are misses."""
        golds = rows["tags"][:]
        if unknown := sorted(distinct(golds) - set(model.config.id2label.values())):
            logger.warning("the model never predicts the tags %s, which the data has", ", ".join(unknown))
        return tag_metrics(self.tag(rows, model, tokenizer), golds)

    def tag(self, rows: Dataset, model: Any, tokenizer: Any) -> list[list[str]]:
        """Returns a model's tag of each word. A word for which the tokenizer has no token is "O"."""
        found = [["O"] * len(words) for words in rows["words"]]
        windows = self.encode(rows, tokenizer)
        for window, logits in zip(windows, window_logits(model, windows, tokenizer, "tags"), strict=True):
            for word, index in zip(window["word"], logits.argmax(1), strict=True):
                if word >= 0:
                    found[window["row"]][word] = model.config.id2label[int(index)]
        return found


def distinct(tags: Sequence[Sequence[str]]) -> set[str]:
    return {tag for sentence in tags for tag in sentence}


def read_conll(path: str | Path) -> Dataset:
    """Reads a file with one word a line: the first of its columns is the word, the last its tag.

    Spaces or tabs separate columns. A blank line ends a sentence, and so does a `-DOCSTART-` line, which is dropped.

    Returns a datasets.Dataset with a row for each sentence: `words` and `tags`, lists of str of the same length.
    Raises FileNotFoundError, and ValueError naming file and line for a line with another number of columns than the
    first.
    """
    sentences: list[list[list[str]]] = [[]]
    columns = 0
    for number, line in enumerate(read_lines(path, "it should hold a word and its tag a line"), 1):
        fields = re.split("[ \t]+", line.strip(" \t\r"))
        if fields == [""] or fields[0].startswith("-DOCSTART-"):
            sentences.append([])
            continue
        columns = columns or max(len(fields), 2)
        if len(fields) != columns:
            raise ValueError(
                f"{path}:{number}: {len(fields)} columns; a line has {columns} between spaces or tabs, the first a "
                "word and the last its tag"
            )
        sentences[-1].append(fields)
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError(f"{path}: no words")
    words, tags = ([[fields[place] for fields in sentence] for sentence in sentences] for place in (0, -1))
    return Dataset.from_dict({"words": words, "tags": tags})


def tag_metrics(predictions: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes metrics of predicted tags as fractions; both sides are lists of sentences of tags.

    If every gold tag but "O" is an entity's (B-, I-, E-, S-): `precision`, `recall` and `f1` of whole entities as
    CoNLL's script counts them; `score` is F1. Otherwise `accuracy` over all words, which is also the `score`.
    """
    tags = distinct(golds) - {"O"}
    if not tags or not all(tag.startswith(ENTITY_PREFIXES) for tag in tags):
        right = [p == g for pair in zip(predictions, golds, strict=True) for p, g in zip(*pair, strict=True)]
        accuracy = sum(right) / len(right)
        return {"accuracy": accuracy, "score": accuracy}
    ours, theirs = (
        {(row, *entity) for row, sentence in enumerate(side) for entity in entities(sentence)}
        for side in (predictions, golds)
    )
    common = len(ours & theirs)
    f1 = 2 * common / (len(ours) + len(theirs))
    return {"precision": common / max(len(ours), 1), "recall": common / len(theirs), "f1": f1, "score": f1}


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Returns a sentence's entities: first word, last word, kind. A tag starts one unless it `continues` the last."""
    found, first = set(), 0
    for i, (before, tag, after) in enumerate(zip(["O", *tags], tags, [*tags[1:], "O"], strict=False)):
        if not continues(before, tag):
            first = i
        if tag.startswith(ENTITY_PREFIXES) and not continues(tag, after):
            found.add((first, i, tag[2:]))
    return found


def continues(before: str, tag: str) -> bool:
    return before[:2] in ("B-", "I-") and tag[:2] in ("I-", "E-") and before[2:] == tag[2:]


def window_logits(model: Any, windows: Dataset, tokenizer: Any, head: str, batch_size: int = 64) -> list[np.ndarray]:
    """Returns the logits of each window's tokens, (L, 2) of "spans" or (L, C) of "tags", float32, without padding."""
    batches = batches_by_length([len(ids) for ids in windows["input_ids"]], batch_size)
    found: list[Any] = [None] * len(windows)
    for rows, states, mask in predict(model, windows, tokenizer, hf_logging.tqdm(batches, desc="Predicting")):
        if states.logits is None or states.head != head:
            raise ValueError(f"the model is a {type(model).__name__}, which predicts no {head}")
        logits = (states.logits.mT if head == "spans" else states.logits).float().cpu()  # (B, L, C)
        for row, values, counted in zip(rows, logits, mask, strict=True):
            found[row] = values[counted].numpy()
    return found


TokenTask = SpanTask | TaggingTask
TOKEN_TASKS: tuple[TokenTask, ...] = (
    SpanTask(name="SQuAD", hub_name="rajpurkar/squad", version="v1.1"),
    SpanTask(name="SQuAD2", hub_name="rajpurkar/squad_v2", version="v2.0", has_unanswerable=True),
    TaggingTask(name="tagging"),
)
