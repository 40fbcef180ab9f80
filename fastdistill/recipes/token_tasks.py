"""Tasks on tokens: spans of a text that answer a question (SQuAD), and tags of words (named entities, parts of speech).

They offer what `fastdistill.recipes.glue.Task` does, so that the stages and the command line go through them alike:

    task = get_task("SQuAD").for_model(teacher.config)
    train = task.tokenize(task.load_split("train", "squad"), tokenizer)
    student = PredictionStage(dataset=train).run(student, teacher, tokenizer, "out/student")
    task.evaluate(task.load_split("dev", "squad"), student, tokenizer)

A text longer than the model reads becomes several windows. Where a token stands in its text is told by the offsets of
fast tokenizers; slow ones are refused.
"""

from __future__ import annotations

import json
import logging
import re
import string
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TOKEN_TASKS", "SpanTask", "TaggingTask", "read_conll", "read_squad", "squad_metrics", "tag_metrics"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _TokenTask:
    """What both kinds share. The defaults of the recipe are those of the GLUE tasks."""

    name: str
    max_length: int  # tokens of a window
    intermediate_epochs: int = 20
    prediction_epochs: int = 3
    batch_size: int = 32
    intermediate_learning_rate: float = 5e-5
    prediction_learning_rate: float = 3e-5
    evaluations: ClassVar[tuple[str, ...]] = ("dev",)
    is_regression: ClassVar[bool] = False
    caches_logits: ClassVar[bool] = False  # one row for each token: the teacher runs along instead

    def check_length(self, config: Any, argument: str) -> None:
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and positions < self.max_length:
            raise ValueError(f"{argument} reads {positions} tokens at most; {self.name} needs {self.max_length}")


# -- spans ---------------------------------------------------------------------------------------------------------

PAIR_TOKENS = 4  # special tokens around a question and a text, at most: RoBERTa's


@dataclass(frozen=True, kw_only=True)
class SpanTask(_TokenTask):
    """Questions that a span of a text answers: SQuAD 1.1 (arXiv 1606.05250) and 2.0 (arXiv 1806.03822).

    Attributes:
        version: in the names of SQuAD's own files: `train-v1.1.json`.
        has_unanswerable: whether a text may leave its question open, as in 2.0.
        max_length, stride: tokens of a window, question included, and tokens that neighbouring windows share.
        max_question: tokens that a question is cut to.
        max_answer: tokens of the longest answer that is considered.
    """

    hub_name: str
    version: str
    has_unanswerable: bool = False
    max_length: int = 384
    stride: int = 128
    max_question: int = 64
    max_answer: int = 30
    intermediate_epochs: int = 10  # as of the larger GLUE tasks
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"

    def __post_init__(self) -> None:
        needed = self.max_question + PAIR_TOKENS + self.stride + 1
        if self.max_length < needed:
            raise ValueError(
                f"max_length is {self.max_length}; a question (max_question {self.max_question}), {PAIR_TOKENS} "
                f"special tokens, a stride of {self.stride} and one token more need {needed}"
            )

    def model_options(self, train: Dataset | None = None) -> dict[str, Any]:
        """Keyword arguments of a transformers config: two outputs a token, whatever the checkpoint had."""
        return {"num_labels": 2}

    def for_model(self, config: Any, argument: str = "teacher") -> SpanTask:
        """This task, if the model fits it: start and end as its outputs, positions for a window. Else ValueError."""
        if config.num_labels != 2:
            raise ValueError(f"{argument} has {config.num_labels} outputs; {self.name} needs 2, a span's start and end")
        self.check_length(config, argument)
        return self

    def file(self, split: str) -> str:
        return f"{split}-{self.version}.json"

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """`train` or `dev`, from SQuAD's own file in `data_dir` or else from the hub; columns as of `read_squad`."""
        if data_dir is not None:
            return read_squad(Path(data_dir) / self.file(split), has_unanswerable=self.has_unanswerable)
        from datasets import load_dataset

        rows = load_dataset(self.hub_name, split=split.replace("dev", "validation")).flatten()
        rows = rows.rename_columns({"answers.text": "answers", "answers.answer_start": "starts"})
        return rows.select_columns(["id", "question", "context", "answers", "starts"])

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Windows to train on: the tokenizer's columns, `start_positions` and `end_positions`.

        The positions are those of the first answer's first and last token. A window that does not hold the whole answer
        points to its first token ([CLS]) instead, as do unanswerable questions.
        """
        check_fast(tokenizer)

        def label(batch: dict[str, list[Any]]) -> dict[str, Any]:
            columns, sources, offsets = self._windows(tokenizer, batch)
            places = []
            for source, ids, window in zip(sources, columns["input_ids"], offsets, strict=True):
                null = null_position(ids, tokenizer)
                answer = None
                if batch["answers"][source]:
                    text, start = batch["answers"][source][0], batch["starts"][source][0]
                    start += len(text) - len(text.lstrip())
                    answer = answer_tokens(window, start, start + len(text.strip()))
                places.append((null, null) if answer is None else answer)
            columns["start_positions"] = [first for first, _ in places]
            columns["end_positions"] = [last for _, last in places]
            return columns

        return rows.map(label, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {self.name}")

    def encode(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Windows to predict on: the tokenizer's columns, the index of the `row` that a window is of, and for each
        token its characters of the context, `token_starts` to `token_ends` (exclusive), -1 if it is not of the context.
        """
        check_fast(tokenizer)

        def cut(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            columns, sources, offsets = self._windows(tokenizer, batch)
            columns["row"] = [indices[source] for source in sources]
            columns["token_starts"] = [window[:, 0].tolist() for window in offsets]
            columns["token_ends"] = [window[:, 1].tolist() for window in offsets]
            return columns

        options = {"batched": True, "with_indices": True, "remove_columns": rows.column_names}
        return rows.map(cut, desc=f"Tokenizing {self.name}", **options)

    def _windows(
        self, tokenizer: Any, batch: dict[str, list[Any]]
    ) -> tuple[dict[str, Any], list[int], list[np.ndarray]]:
        """The tokenizer's columns, of each window the place of its row in the batch, and its offsets (L, 2)."""
        questions = [question.strip() for question in batch["question"]]
        tokens = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        questions = [
            question if len(places) <= self.max_question else question[: places[self.max_question - 1][1]]
            for question, places in zip(questions, tokens, strict=True)
        ]
        found = tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = found.pop("overflow_to_sample_mapping")
        offsets = []
        for window, places in enumerate(found.pop("offset_mapping")):
            is_context = np.array([sequence == 1 for sequence in found.sequence_ids(window)])
            offsets.append(np.where(is_context[:, None], np.array(places), -1))
        return dict(found), sources, offsets

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """`squad_metrics` of a model's answers to rows as `load_split` returns them."""
        answers = self.answer(rows, model, tokenizer)
        return squad_metrics(answers, rows["answers"][:], has_unanswerable=self.has_unanswerable)

    def answer(self, rows: Dataset, model: Any, tokenizer: Any) -> list[str]:
        """A model's answer to each row: the text of the span with the highest start logit + end logit over all windows.

        With `has_unanswerable` it is "" where the first token ([CLS]), as start and end, has more than that in every
        window: Devlin et al. (arXiv 1810.04805, section 4.3) with threshold 0.
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
        if not self.has_unanswerable:
            return answers
        return ["" if null[row] > best[row] else answer for row, answer in enumerate(answers)]


def read_squad(path: str | Path, *, has_unanswerable: bool = False) -> Dataset:
    """Read one of SQuAD's own JSON files.

    Returns a datasets.Dataset with the columns `id`, `question`, `context`, `answers` (list of str: of the training set
    one, none for an unanswerable question) and `starts` (list of int: the character each starts at).
    Raises FileNotFoundError, and ValueError for a file that is not one of them, naming the question where an answer
    does not stand where it should, or where there is none without `has_unanswerable`.
    """
    from datasets import Dataset

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should be one of SQuAD's own")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # of UTF-8 as well
        raise ValueError(f"{path}: not JSON ({error})") from None
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "question", "context", "answers", "starts")}
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for question in paragraph["qas"]:
                    where = f"{path}: question {question['id']}"
                    answers = [] if question.get("is_impossible") else question["answers"]
                    if not answers and not has_unanswerable:
                        raise ValueError(f"{where} has no answer; unanswerable questions are of the task SQuAD2")
                    for answer in answers:
                        check_answer(context, answer["text"], answer["answer_start"], where)
                    columns["id"].append(question["id"])
                    columns["question"].append(question["question"])
                    columns["context"].append(context)
                    columns["answers"].append([answer["text"] for answer in answers])
                    columns["starts"].append([answer["answer_start"] for answer in answers])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not laid out as SQuAD's own files, data, paragraphs, qas ({error!r})") from None
    if not columns["id"]:
        raise ValueError(f"{path}: no questions")
    return Dataset.from_dict(columns)


def check_answer(context: str, text: str, start: int, where: str) -> None:
    found = context[start : start + len(text)] if start >= 0 else ""
    if not text.strip() or found != text:
        raise ValueError(
            f"{where}: the answer {text!r} should start at character {start} (answer_start, from 0) of its context, "
            f"where {found!r} stands"
        )


def null_position(ids: Sequence[int], tokenizer: Any) -> int:
    """The token that stands for no answer: [CLS] where the tokenizer has it, else the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def answer_tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the characters `start` to `end` (exclusive); None: not all are in the window.

    Args:
        offsets: (L, 2) int, the characters of each token, -1 where it is not of the context.
    """
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    starts, ends = offsets[tokens].T
    if not len(tokens) or starts[0] > start or ends[-1] < end:
        return None
    first = np.searchsorted(starts, start, side="right") - 1
    last = np.searchsorted(ends, end, side="left")
    return int(tokens[first]), int(tokens[last])


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray, max_answer: int) -> tuple[float, int, int]:
    """The score of the best span of allowed tokens, `start[i] + end[j]` with i <= j < i + max_answer, and its i and j.

    All (L) each. Where nothing is allowed the score is -inf.
    """
    start, end = (np.where(allowed, logits, -np.inf) for logits in (start, end))
    end = np.pad(end, (0, max_answer - 1), constant_values=-np.inf)
    scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(end, max_answer)  # (L, max_answer), j - i
    i, length = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, length]), int(i), int(i + length)


def squad_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], *, has_unanswerable: bool = False
) -> dict[str, float]:
    """SQuAD's `exact_match` and `f1` as fractions, each prediction held against its best gold answer; `score` is F1.

    Texts are compared as SQuAD's scripts do: in lower case, without punctuation, articles and further spaces; F1 is of
    their words as multisets. With `has_unanswerable` no gold answer, or none that leaves a word, is the answer "".
    Where neither side leaves a word, F1 is 1 with `has_unanswerable` and 0 without, as in either script.
    """
    exact, f1 = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        if has_unanswerable:
            golds = [gold for gold in golds if normalize_answer(gold)] or [""]
        exact.append(max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in golds))
        f1.append(max(word_f1(prediction, gold, has_unanswerable) for gold in golds))
    values = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    return {**values, "score": values["f1"]}


def normalize_answer(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(prediction: str, gold: str, has_unanswerable: bool) -> float:
    ours, golds = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not ours or not golds:
        return float(has_unanswerable and ours == golds)
    return 2 * (Counter(ours) & Counter(golds)).total() / (len(ours) + len(golds))


# -- tags ----------------------------------------------------------------------------------------------------------

ENTITY_PREFIXES = ("B-", "I-", "E-", "S-")  # IOB1, IOB2, IOBES


@dataclass(frozen=True, kw_only=True)
class TaggingTask(_TokenTask):
    """A tag for each word: named entities, parts of speech. A word's tag is read at its first token.

    Attributes:
        labels: tags by index. They are the model's, see `for_model`.
        max_length: tokens of a window. A longer sentence goes on in the next one, without overlap: no word
            is lost.
    """

    max_length: int = 128
    labels: tuple[str, ...] = ()
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def model_options(self, train: Dataset) -> dict[str, Any]:
        """Keyword arguments of a transformers config that make a token classifier one for the tags of these rows."""
        labels = sorted({tag for tags in train["tags"] for tag in tags})
        if len(labels) < 2:
            raise ValueError(f"the training rows have the tags {labels}; there should be two or more to tell apart")
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }

    def for_model(self, config: Any, argument: str = "teacher") -> TaggingTask:
        """This task with the model's labels, which its config must name. Else ValueError."""
        labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        if labels == tuple(f"LABEL_{index}" for index in range(len(labels))):
            raise ValueError(
                f"{argument} does not name its tags (id2label holds {', '.join(labels)}); train one that does with "
                "`fastdistill finetune --task tagging`, or write their names into its config.json"
            )
        self.check_length(config, argument)
        return replace(self, labels=labels)

    def file(self, split: str) -> str:
        return f"{split}.txt"

    def load_split(self, split: str, data_dir: str | Path | None = None) -> Dataset:
        """`train` or `dev`, from `data_dir`; columns as of `read_conll`."""
        if data_dir is None:
            raise ValueError("tagging has no data on the hub; data_dir (--data) should hold train.txt and dev.txt")
        return read_conll(Path(data_dir) / self.file(split))

    def tokenize(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Windows to train on: the tokenizer's columns and `labels`, -100 at all but the first token of a word.

        Raises ValueError for tags that `labels` lacks.
        """
        check_fast(tokenizer)
        ids = {label: index for index, label in enumerate(self.labels)}
        unknown = sorted({tag for tags in rows["tags"] for tag in tags} - ids.keys())
        if unknown:
            raise ValueError(f"the training rows have the tags {unknown}; the model's are {list(self.labels)}")

        def label(batch: dict[str, list[Any]]) -> dict[str, Any]:
            columns, sources, words = self._windows(tokenizer, batch)
            columns["labels"] = [
                [-100 if word < 0 else ids[batch["tags"][source][word]] for word in window]
                for source, window in zip(sources, words, strict=True)
            ]
            return columns

        return rows.map(label, batched=True, remove_columns=rows.column_names, desc="Tokenizing sentences")

    def encode(self, rows: Dataset, tokenizer: Any) -> Dataset:
        """Windows to predict on: the tokenizer's columns, the index of the `row` that a window is of, and for each
        token the `word` that it is the first token of (-1: none).
        """
        check_fast(tokenizer)

        def cut(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            columns, sources, words = self._windows(tokenizer, batch)
            return {**columns, "row": [indices[source] for source in sources], "word": words}

        options = {"batched": True, "with_indices": True, "remove_columns": rows.column_names}
        return rows.map(cut, desc="Tokenizing sentences", **options)

    def _windows(self, tokenizer: Any, batch: dict[str, list[Any]]) -> tuple[dict[str, Any], list[int], list[Any]]:
        """The tokenizer's columns, of each window the place of its row in the batch, and `word` as of `encode`."""
        # Joined by spaces, sentences are tokenised as running text is, by byte-level vocabularies too.
        found = tokenizer(
            [" ".join(words) for words in batch["words"]],
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        starts = [list(accumulate((len(word) + 1 for word in words[:-1]), initial=0)) for words in batch["words"]]
        sources = found.pop("overflow_to_sample_mapping")
        reached = [-1] * len(starts)  # of each row the last word that has had its first token, in any window
        windows = []
        for window, (source, offsets) in enumerate(zip(sources, found.pop("offset_mapping"), strict=True)):
            places = []
            for sequence, (_, end) in zip(found.sequence_ids(window), offsets, strict=True):
                word = -1 if sequence is None else bisect_right(starts[source], end - 1) - 1
                places.append(word if word > reached[source] else -1)
                reached[source] = max(reached[source], word)
            windows.append(places)
        return dict(found), sources, windows

    def evaluate(self, rows: Dataset, model: Any, tokenizer: Any) -> dict[str, float]:
        """`tag_metrics` of a model on rows as `load_split` returns them. Tags that it does not have count as missed."""
        golds = rows["tags"][:]
        unknown = sorted({tag for tags in golds for tag in tags} - set(model.config.id2label.values()))
        if unknown:
            logger.warning("the model never predicts the tags %s, which the data has", ", ".join(unknown))
        return tag_metrics(self.tag(rows, model, tokenizer), golds)

    def tag(self, rows: Dataset, model: Any, tokenizer: Any) -> list[list[str]]:
        """A model's tag of each word. A word that the tokenizer leaves nothing of is "O"."""
        found = [["O"] * len(words) for words in rows["words"]]
        windows = self.encode(rows, tokenizer)
        for window, logits in zip(windows, window_logits(model, windows, tokenizer, "tags"), strict=True):
            for word, index in zip(window["word"], logits.argmax(1), strict=True):
                if word >= 0:
                    found[window["row"]][word] = model.config.id2label[int(index)]
        return found


def read_conll(path: str | Path) -> Dataset:
    """Read a file with a word a line, its columns between spaces or tabs: the word is the first, its tag the last.

    A blank line ends a sentence, and so does a `-DOCSTART-` line, which is dropped.

    Returns a datasets.Dataset with the columns `words` and `tags`, lists of str of the same length, a row a sentence.
    Raises FileNotFoundError, and ValueError naming file and line where there are other columns than in the first line.
    """
    from datasets import Dataset

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should hold a word and its tag a line")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    sentences: list[list[tuple[str, str]]] = [[]]
    columns = 0
    for number, line in enumerate(lines, 1):
        line = line.strip(" \t\r")
        if not line or line.startswith("-DOCSTART-"):
            sentences.append([])
            continue
        fields = re.split("[ \t]+", line)
        columns = columns or max(len(fields), 2)
        if len(fields) != columns:
            raise ValueError(
                f"{path}:{number}: {len(fields)} columns; a line has {columns} between spaces or tabs, the first a "
                "word and the last its tag"
            )
        sentences[-1].append((fields[0], fields[-1]))
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError(f"{path}: no words")
    words, tags = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    return Dataset.from_dict({"words": words, "tags": tags})


def tag_metrics(predictions: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of predicted tags, as fractions; both sides are lists of sentences of tags.

    Where every gold tag but "O" is of an entity (B-, I-, E-, S-): `precision`, `recall` and `f1` of whole entities, as
    CoNLL's script counts them, and `score` is F1. Else `accuracy` over all words, and `score` is that.
    """
    tags = {tag for sentence in golds for tag in sentence} - {"O"}
    if not tags or not all(tag.startswith(ENTITY_PREFIXES) for tag in tags):
        right = [p == g for pair in zip(predictions, golds, strict=True) for p, g in zip(*pair, strict=True)]
        accuracy = sum(right) / len(right)
        return {"accuracy": accuracy, "score": accuracy}
    ours, theirs = (
        {(row, *entity) for row, sentence in enumerate(side) for entity in entities(sentence)}
        for side in (predictions, golds)
    )
    common = len(ours & theirs)
    values = {
        "precision": common / max(len(ours), 1),
        "recall": common / len(theirs),
        "f1": 2 * common / (len(ours) + len(theirs)),
    }
    return {**values, "score": values["f1"]}


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """A sentence's entities: first word, last word, kind. A tag begins one unless it `continues` the tag before."""
    found, first = set(), 0
    for i, (before, tag, after) in enumerate(zip(["O", *tags], tags, [*tags[1:], "O"], strict=False)):
        if not continues(before, tag):
            first = i
        if tag.startswith(ENTITY_PREFIXES) and not continues(tag, after):
            found.add((first, i, tag[2:]))
    return found


def continues(before: str, tag: str) -> bool:
    return before[:2] in ("B-", "I-") and tag[:2] in ("I-", "E-") and before[2:] == tag[2:]


# -- both ----------------------------------------------------------------------------------------------------------


def check_fast(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, a slow one, which does not tell where its tokens stand in "
            "the text; use a checkpoint with a tokenizer.json"
        )


def window_logits(model: Any, windows: Dataset, tokenizer: Any, head: str, batch_size: int = 64) -> list[np.ndarray]:
    """The logits of each window's tokens, (L, 2) of "spans" or (L, C) of "tags", float32, without padding."""
    import torch
    from transformers.utils import logging as hf_logging

    from fastdistill.train.capture import capture
    from fastdistill.train.data import PaddingCollator

    model.eval()
    device = next(model.parameters()).device
    collate = PaddingCollator(tokenizer)
    inputs = windows.select_columns([name for name in tokenizer.model_input_names if name in windows.column_names])
    lengths = [len(ids) for ids in windows["input_ids"]]
    order = sorted(range(len(windows)), key=lengths.__getitem__)
    found: list[Any] = [None] * len(windows)
    for start in hf_logging.tqdm(range(0, len(order), batch_size), desc="Predicting"):
        rows = order[start : start + batch_size]
        batch = collate([inputs[row] for row in rows])
        with torch.no_grad():
            states = capture(model, {name: x.to(device) for name, x in batch.items()})
        if states.logits is None or states.head != head:
            raise ValueError(f"the model is a {type(model).__name__}, which predicts no {head}")
        logits = (states.logits.mT if head == "spans" else states.logits).float().cpu()  # (B, L, C)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, values, counted in zip(rows, logits, mask, strict=True):
            found[row] = values[counted].numpy()
    return found


TOKEN_TASKS: tuple[SpanTask | TaggingTask, ...] = (
    SpanTask(name="SQuAD", hub_name="rajpurkar/squad", version="v1.1"),
    SpanTask(name="SQuAD2", hub_name="rajpurkar/squad_v2", version="v2.0", has_unanswerable=True),
    TaggingTask(name="tagging"),
)
