"""The rows that models train on: reads, packs, measures and pads them, and runs models over them."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    default_data_collator,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.utils import logging

from fastdistill.train.capture import States, capture
from fastdistill.train.inputs import refuse_encoder_decoder, text_columns
from fastdistill.train.processes import processes
from fastdistill.train.reading import is_full

__all__ = ["PaddingCollator", "add_length", "add_teacher_logits", "pack_corpus", "read_corpus"]

# The columns that fastdistill.train.cache adds for each token, (L, n) a row.
TOKEN_COLUMN = re.compile(r"topk_logprobs|topk_indices|hidden_\d+")
Corpus: TypeAlias = Sequence[str | Path] | Dataset | IterableDataset


def read_corpus(corpus: Corpus, streaming: bool = False) -> Dataset | IterableDataset:
    """Returns text files (UTF-8, one sentence or paragraph a line) as a data set with the column `text`.

    A data set is returned as it is. With `streaming` the result is an IterableDataset, which reads nothing yet.
    """
    if isinstance(corpus, (Dataset, IterableDataset)):
        return corpus.to_iterable_dataset() if streaming and isinstance(corpus, Dataset) else corpus
    if isinstance(corpus, (str, Path)) or not corpus:
        raise ValueError(f"corpus is {corpus!r}; it should be a non-empty list of text files, or a data set")
    for path in corpus:
        if not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: {what}; the corpus is made of text files")
    if not (files := [str(path) for path in corpus if Path(path).stat().st_size]):
        raise ValueError(f"corpus holds no text ({named(corpus)})")
    with reading_text(corpus):
        return load_dataset("text", data_files=files, split="train", streaming=streaming)


def named(corpus: Corpus) -> str:
    """Returns how an error names a corpus: its files, if it is made of files."""
    return "a data set" if isinstance(corpus, (Dataset, IterableDataset)) else ", ".join(map(str, corpus))


@contextmanager
def reading_text(corpus: Corpus) -> Iterator[None]:
    """Turns an error of `datasets` in reading text files, or in decoding them, into a ValueError that names them."""
    try:
        yield
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        if isinstance(corpus, (Dataset, IterableDataset)):  # which may be made of files that the caller knows
            raise
        cause = error.__cause__ or error
        if is_full(cause):
            raise cause from None
        raise ValueError(f"corpus is {named(corpus)}; it should be UTF-8 text ({cause})") from error


def pack_corpus(
    corpus: Corpus, tokenizer: Any, max_length: int = 128, column: str = "text", apart: bool = False
) -> Dataset | IterableDataset:
    """Tokenises text and packs it into blocks of `max_length` tokens, each with the tokenizer's special tokens.

    A block may span several lines. The last block of every 10,000 lines may be shorter. With `apart` each line has
    blocks of its own, mostly one that is shorter.

    Args:
        corpus: text files (UTF-8, one sentence or paragraph a line), or a data set whose text is in `column`. A data
            set that has `input_ids` is not tokenised again. An IterableDataset is packed while it is read.

    Returns a data set of the kind given, with `input_ids` (lists of at most `max_length` ints) and `length`.
    """
    dataset = read_corpus(corpus)
    is_stream = isinstance(dataset, IterableDataset)
    with reading_text(corpus):
        columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its columns
    if "input_ids" in columns:
        return dataset if is_stream else add_length(dataset)
    if columns and column not in columns:
        raise ValueError(f"the corpus has the columns {columns}; it should have {column!r}, with text, or 'input_ids'")
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(f"max_length is {max_length}; the tokenizer's special tokens leave no room for text")

    def pack(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        lines = [line for line in batch[column] if line and not line.isspace()]
        rows = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
        streams = rows if apart else [[token for row in rows for token in row]]
        blocks = [[*prefix, *x[i : i + room], *suffix] for x in streams for i in range(0, len(x), room)]
        return {"input_ids": blocks, "length": [len(block) for block in blocks]}

    options = {} if is_stream else {"desc": "Packing the corpus"}
    dataset = dataset.map(pack, batched=True, batch_size=10_000, remove_columns=columns, **options)
    if not is_stream and not len(dataset):
        raise ValueError(f"corpus holds no text ({named(corpus)})")
    return dataset


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that a tokenizer puts before and after a single text."""
    bare, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError(f"{type(tokenizer).__name__} changes a text when it adds special tokens; pass input_ids instead")


def add_length(dataset: Dataset) -> Dataset:
    """Adds the column `length`, by which the sampler groups batches.

    It is the number of each row's `input_ids`, or the length of its sound; 1 for images, which need no padding.
    """
    if "length" in dataset.column_names:
        return dataset
    padded = ("input_ids", "input_values", "input_features")
    if (name := next((name for name in padded if name in dataset.column_names), None)) is None:
        return dataset.add_column("length", [1] * len(dataset))
    return dataset.map(lambda batch: {"length": [len(row) for row in batch[name]]}, batched=True, desc="Measuring rows")


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[list[int]]:
    """Returns the row numbers of each batch. Rows of similar length share a batch, so that little is padded."""
    order = np.argsort(lengths, kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: Any,
    batches: Iterable[list[int]],
    *,
    hidden: Sequence[int] = (),
    bf16: bool = False,
    padding_side: str | None = None,
) -> Iterator[tuple[list[int], States, Any]]:
    """Runs a model in eval mode, without gradients, over batches of tokenised rows.

    `tokenizer` may be the image processor or feature extractor of a model of images or sound.

    Yields, for each batch, its row numbers in `dataset` as given in `batches`, what `capture` returned for it (`hidden`
    are the hidden states to return beside the logits), and its mask (B, L), True at tokens (None without `input_ids`):
    entry b of every tensor belongs to row `rows[b]`. `bf16` runs the model under bfloat16 autocast. `padding_side` is
    "right", "left", or None for the tokenizer's own.
    """
    model.eval()
    device = next(model.parameters()).device
    columns = text_columns(model, tokenizer, dataset.column_names)
    if "input_ids" not in columns:
        columns = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    inputs = dataset.with_format("torch", columns=columns)
    for rows in batches:
        found = inputs[rows]
        if "input_ids" in found:
            batch, mask = pad_inputs(found, tokenizer, padding_side or tokenizer.padding_side)
        else:
            batch, mask = stacked_inputs(found, tokenizer), None
        batch = {name: x.to(device) for name, x in batch.items()}
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = capture(model, batch, hidden=hidden)
        yield rows, states, mask


def pad_inputs(rows: dict[str, Any], tokenizer: Any, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Pads a model's inputs, given as columns of tensors (L,), to (B, L). Returns them and the mask (B, L) of tokens.

    A tokenizer without a padding token will do: padding is masked, so that any id may stand there.
    """
    rows = {"attention_mask": [torch.ones_like(ids) for ids in rows["input_ids"]], **rows}
    fill = {"input_ids": tokenizer.pad_token_id or 0}
    batch = {
        name: pad_sequence(list(x), batch_first=True, padding_value=fill.get(name, 0), padding_side=side)  # (B, L)
        for name, x in rows.items()
    }
    mask = batch["attention_mask"].bool()
    return without_full_mask(batch), mask


def stacked_inputs(rows: dict[str, Any], processor: Any) -> Any:
    """Makes a batch of columns of images or sound. A feature extractor pads, and adds a mask if its models take one."""
    features = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if isinstance(processor, SequenceFeatureExtractor):
        return processor.pad(features, return_tensors="pt")
    return default_data_collator(features)


def without_full_mask(batch: Any) -> Any:
    """Drops an `attention_mask` that masks nothing, so that attention takes its fastest path without a host sync."""
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


def add_teacher_logits(
    dataset: Dataset, teacher: PreTrainedModel, tokenizer: Any, batch_size: int = 128, bf16: bool = False
) -> Dataset:
    """Runs a classifier of rows over a data set and adds its logits as the column `teacher_logits`, float32 (C) a row.

    Rows are text with its tokenizer, images (`pixel_values`) with their image processor, or sound (`input_values` or
    `input_features`) with its feature extractor. Sound is padded to the longest row of a batch.

    A teacher in eval mode returns the same logits in every epoch and for every seed, so the prediction stage need not
    run it again. Under several processes all must call this function with the same rows; each runs its share of the
    batches, and all return the same data set. `bf16` runs the teacher under bfloat16 autocast, as a stage that trains
    in bfloat16 does.
    """
    refuse_encoder_decoder(teacher=teacher)
    state = processes()
    found: list[tuple[int, np.ndarray]] = []
    batches = batches_by_length(add_length(dataset)["length"][:], batch_size)
    mine = logging.tqdm(batches[state.process_index :: state.num_processes], desc="Teacher logits")
    for rows, states, _ in predict(teacher, dataset, tokenizer, mine, bf16=bf16):
        shape = None if states.logits is None else tuple(states.logits.shape)
        if states.logits is None or states.logits.dim() != 2:
            raise ValueError(
                f"the teacher's logits are {shape}; add_teacher_logits needs a sequence classifier, (B, C)"
            )
        found.extend(zip(rows, states.logits.float().cpu().numpy(), strict=True))
    logits_by_row = dict(gather_object(found))
    if "teacher_logits" in dataset.column_names:
        dataset = dataset.remove_columns("teacher_logits")
    return dataset.add_column("teacher_logits", [logits_by_row[row] for row in range(len(dataset))])


def default_collator(processing_class: Any) -> PaddingCollator | None:
    """Returns the collator for what a student reads; None: Trainer's own, for images and sound.

    Raises ValueError for a processor of several kinds of input, such as Wav2Vec2Processor.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"data_collator is None and processing_class is a {type(processing_class).__name__}, which pads inputs "
            "and labels each in its own way; pass a data_collator that does so"
        )
    return PaddingCollator(processing_class) if isinstance(processing_class, PreTrainedTokenizerBase) else None


class PaddingCollator(DataCollatorWithPadding):
    """Pads a batch to its longest row, and labels of tokens with -100. Drops an `attention_mask` that masks nothing.

    `position_ids` are padded with 0, and the columns of an offline teacher, (L, n) a row, with zeros to (B, L, n).
    Rows with such columns are padded on the right, as they were when the teacher read them.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        cached = [name for name in features[0] if TOKEN_COLUMN.fullmatch(name) or name == "position_ids"]
        plain = [{name: x for name, x in row.items() if name not in cached} for row in features]
        are_tags = all(np.shape(row.get("labels", 0)) == np.shape(row["input_ids"]) for row in features)
        kind = DataCollatorForTokenClassification if are_tags else DataCollatorWithPadding
        tokenizer = copy.copy(self.tokenizer)
        if any(name != "position_ids" for name in cached):
            tokenizer.padding_side = "right"
        side = tokenizer.padding_side
        batch = kind(tokenizer, self.padding, self.max_length, self.pad_to_multiple_of)(plain)
        for name in cached:
            dtype = torch.int64 if name in ("topk_indices", "position_ids") else torch.float32
            given = [row[name] for row in features]
            lists = given if name == "position_ids" else of_one_width(name, given)
            rows = [torch.tensor(x, dtype=dtype) for x in lists]
            padded = pad_sequence(rows, batch_first=True, padding_side=side)  # (B, longest row) or (B, longest row, n)
            more = batch["input_ids"].shape[1] - padded.shape[1]
            of_length = (more, 0) if side == "left" else (0, more)
            batch[name] = F.pad(padded, (0, 0, *of_length) if padded.dim() == 3 else of_length)
        return without_full_mask(batch)


def flatten(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Makes a batch of one row of all sequences, without padding. `position_ids` start anew in each of them."""
    batch = {"input_ids": torch.tensor([[token for row in features for token in row["input_ids"]]])}  # (1, L)
    if len(features) > 1:
        batch["position_ids"] = torch.tensor([[i for row in features for i in range(len(row["input_ids"]))]])
    return batch


def of_one_width(name: str, rows: list[Any]) -> list[np.ndarray]:
    """Returns a column's rows as arrays (L, n). Shorter lists, and None, are filled: a free place has probability 0."""
    if name not in ("topk_logprobs", "topk_indices") or all(isinstance(row, np.ndarray) for row in rows):
        return [np.asarray(row) for row in rows]
    widest = max(1, *(0 if entries is None else len(entries) for row in rows for entries in row))
    fill = [-np.inf if name == "topk_logprobs" else 0]
    lists = [[[] if entries is None else list(entries) for entries in row] for row in rows]
    return [np.array([entries + fill * (widest - len(entries)) for entries in row]) for row in lists]


class OwnRows(TorchIterableDataset[Any]):
    """Repeats a datasets.IterableDataset without end, shuffled anew in each pass. Each process reads its own rows.

    The length of a stream is unknown, so a resumed run can only skip the rows that it has seen. Since the passes never
    end, one count of rows is enough for that.
    """

    def __init__(self, rows: Any, corpus: Corpus) -> None:
        self.rows, self.corpus = rows, corpus  # the rows are made of the corpus, which errors name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            self.rows.set_epoch(turn)
            row = None
            with reading_text(self.corpus):
                for row in self.rows:
                    yield row
            if row is None:
                return
