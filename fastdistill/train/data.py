"""The rows that models train on: reading, packing, measuring and padding them, and the teacher's logits for each."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedModel
from transformers.utils import logging

from fastdistill.train.capture import capture
from fastdistill.train.processes import processes

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["PaddingCollator", "add_length", "add_teacher_logits", "pack_corpus", "read_corpus"]


def read_corpus(
    corpus: Sequence[str | Path] | Dataset | IterableDataset, streaming: bool = False
) -> Dataset | IterableDataset:
    """Text files (UTF-8, one sentence or paragraph a line) as a data set with a `text` column; data sets as they are.

    Args:
        streaming: return an IterableDataset, of which nothing is read yet.

    Raises FileNotFoundError, and ValueError for anything else.
    """
    from datasets import Dataset, IterableDataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if isinstance(corpus, Dataset):
        return corpus.to_iterable_dataset() if streaming else corpus
    if isinstance(corpus, IterableDataset):
        return corpus
    if isinstance(corpus, (str, Path)) or not corpus:
        raise ValueError(f"corpus is {corpus!r}; it should be a non-empty list of text files, or a data set")
    for path in corpus:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; the corpus is made of text files")
    files = [str(path) for path in corpus if Path(path).stat().st_size]
    if not files:
        raise ValueError("corpus holds no text")
    try:
        return load_dataset("text", data_files=files, split="train", streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(
            f"corpus is {', '.join(files)}; it should be UTF-8 text ({error.__cause__ or error})"
        ) from error


def pack_corpus(
    corpus: Sequence[str | Path] | Dataset | IterableDataset,
    tokenizer: Any,
    max_length: int = 128,
    column: str = "text",
) -> Dataset | IterableDataset:
    """Tokenise text and pack it into blocks of `max_length` tokens, each with the tokenizer's special tokens.

    Blocks run on over line ends; the rest of every 10000 lines is a shorter block.

    Args:
        corpus: text files (UTF-8, one sentence or paragraph a line), or a data set with that text column. A data
            set with `input_ids` is taken as it is. An IterableDataset is packed while it is read.

    Returns `input_ids` (lists of at most `max_length` ints) and `length`, in a data set of the kind given.
    Raises FileNotFoundError, and ValueError where no text or no room for it is left.
    """
    from datasets import IterableDataset

    dataset = read_corpus(corpus)
    is_stream = isinstance(dataset, IterableDataset)
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them beforehand
    if "input_ids" in columns:
        return dataset if is_stream else add_length(dataset)
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(f"max_length is {max_length}; the tokenizer's special tokens leave no room for text")

    def pack(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        lines = [line for line in batch[column] if line and not line.isspace()]
        rows = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
        stream = [token for row in rows for token in row]
        blocks = [[*prefix, *stream[i : i + room], *suffix] for i in range(0, len(stream), room)]
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    options = {"batched": True, "batch_size": 10_000, "remove_columns": columns}
    if is_stream:
        return dataset.map(pack, **options)
    dataset = dataset.map(pack, **options, desc="Packing the corpus")
    if not len(dataset):
        raise ValueError("corpus holds no text")
    return dataset


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a single text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError(f"{type(tokenizer).__name__} changes a text when it adds special tokens; pass input_ids instead")


def add_length(dataset: Dataset) -> Dataset:
    """Add the `length` of each row's `input_ids`, by which batches are grouped."""
    if "length" in dataset.column_names:
        return dataset
    return dataset.map(
        lambda batch: {"length": [len(row) for row in batch["input_ids"]]}, batched=True, desc="Measuring rows"
    )


def add_teacher_logits(
    dataset: Dataset, teacher: PreTrainedModel, tokenizer: Any, batch_size: int = 128, bf16: bool = False
) -> Dataset:
    """Run the teacher once over a data set and keep its logits in the column `teacher_logits`, float32 (C) a row.

    A teacher in eval mode gives the same logits in every epoch and for every seed, so that the prediction stage need
    not run it again. `bf16`: bfloat16 autocast, as in a stage that trains so. Of many processes each runs its share of
    the batches and all return the same, so that all must call it, with the same rows. For sequence classifiers: raises
    ValueError where the logits are not (B, C).
    """
    teacher.eval()
    device = next(teacher.parameters()).device
    collate = PaddingCollator(tokenizer)
    columns = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    inputs = dataset.select_columns(columns)
    lengths = np.asarray(add_length(dataset)["length"][:])
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    state, found = processes(), []
    for rows in logging.tqdm(batches[state.process_index :: state.num_processes], desc="Teacher logits"):
        batch = {name: x.to(device) for name, x in collate([inputs[row] for row in rows]).items()}
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = capture(teacher, batch).logits  # (B, C)
        if logits is None or logits.dim() != 2:
            shape = None if logits is None else tuple(logits.shape)
            raise ValueError(
                f"the teacher's logits are {shape}; add_teacher_logits needs a sequence classifier, (B, C)"
            )
        found.append((rows, logits.float().cpu().numpy()))
    column: list[Any] = [None] * len(dataset)
    for rows, values in gather_object(found):
        for row, row_logits in zip(rows, values, strict=True):
            column[row] = row_logits
    if "teacher_logits" in dataset.column_names:
        dataset = dataset.remove_columns("teacher_logits")
    return dataset.add_column("teacher_logits", column)


# What fastdistill.train.cache adds to each token, (L, n) a row.
TOKEN_COLUMN = re.compile(r"topk_logprobs|topk_indices|hidden_\d+")


class PaddingCollator(DataCollatorWithPadding):
    """Pads a batch to its longest row, labels of tokens with -100; leaves out an `attention_mask` that masks nothing.

    Without one, attention takes its fastest path and nobody needs to read the mask back from the device.
    The columns of an offline teacher, (L, n) a row, are padded with zeros to (B, L, n). Their rows are padded on the
    right, as when the teacher saw them: on the left GPT-2 has other positions.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        cached = [name for name in features[0] if TOKEN_COLUMN.fullmatch(name)]
        plain = [{name: x for name, x in row.items() if name not in cached} for row in features] if cached else features
        are_tags = all(
            np.ndim(row.get("labels", 0)) == 1 and len(row["labels"]) == len(row["input_ids"]) for row in features
        )
        tokenizer = self.tokenizer
        if cached:
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "right"
        kind = DataCollatorForTokenClassification if are_tags else DataCollatorWithPadding
        batch = kind(tokenizer, self.padding, self.max_length, self.pad_to_multiple_of)(plain)
        for name in cached:
            dtype = np.int64 if name == "topk_indices" else np.float32
            rows = [np.asarray(row[name], dtype) for row in features]
            batch[name] = pad_rows(rows, batch["input_ids"].shape[1])
        if "attention_mask" in batch and bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        return batch


def pad_rows(rows: Sequence[np.ndarray], length: int | None = None, *, value: float = 0, side: str = "right") -> Tensor:
    """Rows (L_i, ...) as one tensor (B, length, ...) of their dtype, filled up with `value`; None: of the longest."""
    length = max(map(len, rows)) if length is None else length
    padded = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
    for into, row in zip(padded, rows, strict=True):
        into[slice(len(row)) if side == "right" else slice(length - len(row), None)] = row
    return torch.from_numpy(padded)


class OwnRows(TorchIterableDataset[Any]):
    """A datasets.IterableDataset pass after pass, in another order each; every process has rows of its own.

    Its length being unknown, a resumed run can only skip the rows it has seen: without an end there is one count of
    them, however often it went round.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            self.rows.set_epoch(turn)
            row = None
            for row in self.rows:
                yield row
            if row is None:
                return
