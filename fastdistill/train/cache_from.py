"""Writes caches of log-probabilities that were made elsewhere: by vLLM, behind an API, or by any other program.

`fastdistill.train.external` makes the rows from the outputs of vLLM and of OpenAI-style APIs. `read_cache` and
`CachedStage` take these caches as they take those of `write_cache`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value
from transformers.utils import logging

from fastdistill.train.cache_files import (
    FORMAT,
    SHARD_BYTES,
    TOPK,
    check_storage,
    drop_entries,
    finish,
    offsets,
    token_ids,
    topk_features,
    vocabulary,
    write_shard,
)
from fastdistill.train.outputs import claim, replace, working_folder
from fastdistill.train.processes import on_main
from fastdistill.train.topk_codec import TopkIndices, ascending

__all__ = ["write_cache_from"]

logger = logging.get_logger(__name__)


def write_cache_from(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    output: str | Path,
    *,
    top_k: int,
    teacher: str = "",
    logprobs_bits: int = 16,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes log-probabilities made elsewhere to the folder `output`, whole or not at all. `read_cache` reads it.

    The rows may be more than memory holds: a file is written as soon as its rows are there. An interrupted run leaves
    nothing and cannot be resumed, since an iterable cannot. Of several processes the main one writes.

    Args:
        rows: each has `input_ids` (L), and for each of these tokens a list in `topk_logprobs` and in `topk_indices`:
            the log-probabilities (natural, at temperature 1) of the *next* token's classes, and these classes, in any
            order. A list may have any length; where it is None or empty, the position does not count. Other columns,
            such as `labels`, are kept.
        tokenizer: that of the teacher and the student, which is saved beside the rows; or the number of classes alone.
        top_k: classes to keep of a position: the most probable, where it has more.
        teacher: its name, for the manifest.
        logprobs_bits, shard_bytes: as in `write_cache`.
        overwrite: replace `output`.

    Raises FileExistsError if `output` is not empty and `overwrite` is not set, and ValueError for an argument or a row
    that does not fit.
    """
    check_storage(logprobs_bits, shard_bytes)
    classes = tokenizer if isinstance(tokenizer, int) else token_ids(tokenizer)
    writer = _Writer(topk_features(top_k, classes, logprobs_bits), shard_bytes)
    about = {
        "format": FORMAT,
        "teacher": {"name": teacher, "vocab_size": classes},
        "tokenizer": None if isinstance(tokenizer, int) else vocabulary(tokenizer),
        "top_k": top_k,
        "classes": classes,
        "hidden": [],
    }
    on_main(lambda: _write(rows, writer, Path(output), about, tokenizer, overwrite))


def _write(
    rows: Iterable[Mapping[str, Any]],
    writer: _Writer,
    output: Path,
    about: dict[str, Any],
    tokenizer: Any,
    overwrite: bool,
) -> None:
    work = working_folder(output)
    if work.is_dir() and any(work.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{work} holds an interrupted run, which an iterable cannot continue; pass overwrite=True to drop it"
        )
    claim(output, overwrite=overwrite)
    try:
        for row in logging.tqdm(rows, desc="Rows", unit=" rows"):
            writer.add(row, work)
        writer.flush(work)
        if not writer.rows:
            raise ValueError("rows is empty")
        if about["tokenizer"] is not None:
            tokenizer.save_pretrained(work)
        writer.warn()
        finish(work, {**about, **writer.manifest()}, writer.shards)
    except BaseException:
        shutil.rmtree(work)
        raise
    replace(work, output)
    drop_entries(output, writer.shards)


class _Writer:
    """Collects rows and writes each shard when it is full."""

    def __init__(self, features: dict[str, Any], shard_bytes: int) -> None:
        self.features, self.shard_bytes = features, shard_bytes
        self.own: Features | None = None  # of the rows' other columns
        self.rows = self.shards = self.tokens = 0
        self.counts = np.zeros(3, np.int64)  # positions with a class; that list their own token; that list the next
        self.digest = hashlib.sha256()
        self.clear()

    def clear(self) -> None:
        self.bytes, self.lengths = 0, []  # type: int, list[int]
        self.columns: dict[str, list[Any]] = {}
        self.codes: dict[str, list[np.ndarray]] = {name: [] for name in TOPK}

    def add(self, row: Mapping[str, Any], work: Path) -> None:
        """Adds a row; writes a shard if it is full. Raises ValueError, with the row's number, for one that is wrong."""
        try:
            columns, logprobs, indices = self.checked(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {self.rows}: {error}") from error
        for name, x in (("topk_logprobs", logprobs), ("topk_indices", indices)):
            self.codes[name].append(self.features[name].encode(x))
            self.bytes += self.codes[name][-1].size
        for name, x in columns.items():
            self.columns.setdefault(name, []).append(x)
        ids = np.asarray(columns["input_ids"], np.int64)
        self.bytes += 8 * ids.size
        self.digest.update(np.int64(ids.size).tobytes() + ids.tobytes())
        self.lengths.append(ids.size)
        self.rows, self.tokens = self.rows + 1, self.tokens + ids.size
        listed = [np.isfinite(logprobs), indices == ids[:, None], indices[:-1] == ids[1:, None]]
        self.counts += [int(x.any(1).sum()) for x in listed]
        if self.bytes >= self.shard_bytes:
            self.flush(work)

    def checked(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Returns the row's own columns as lists, and its log-probabilities and classes (L, k)."""
        if lacking := [name for name in ("input_ids", *TOPK) if name not in row]:
            raise ValueError(f"it has the columns {sorted(row)}; it should have {', '.join(lacking)}")
        columns = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in row.items() if name not in TOPK}
        columns.pop("length", None)
        before = self.columns or self.own or columns
        if columns.keys() != before.keys():
            raise ValueError(f"it has the columns {sorted(columns)}; the rows before have {sorted(before)}")
        length, classes = len(columns["input_ids"]), self.features["topk_indices"].classes
        for name in {*TOPK, "labels", "position_ids", "attention_mask"} & row.keys():
            if not np.isscalar(row[name]) and len(row[name]) != length:
                raise ValueError(f"{name} has {len(row[name])} entries; input_ids has {length}")
        if not length:
            raise ValueError("it has no tokens; leave it out")
        if not 0 <= min(columns["input_ids"]) <= max(columns["input_ids"]) < classes:
            raise ValueError(f"input_ids should be 0 to {classes - 1}")
        return columns, *most_probable(row["topk_logprobs"], row["topk_indices"], self.features["topk_indices"])

    def flush(self, work: Path) -> None:
        if not self.lengths:
            return
        first = self.rows - len(self.lengths)
        try:
            own = Dataset.from_dict(self.columns, features=self.own)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(f"rows {first} to {self.rows - 1}: their columns have different types: {error}") from error
        self.own = own.features
        arrays = {name: own.data.column(name).combine_chunks() for name in own.column_names}
        arrays["length"] = pa.array(self.lengths, pa.int64())
        for name, code in self.codes.items():
            arrays[name] = self.features[name].arrow(np.concatenate(code), offsets(np.array(self.lengths)))
        schema = Features({**own.features, "length": Value("int64"), **self.features}).arrow_schema
        arrays_in_order = [arrays[name] for name in schema.names]
        write_shard(work, self.shards, pa.RecordBatch.from_arrays(arrays_in_order, schema=schema))
        self.shards += 1
        self.clear()

    def manifest(self) -> dict[str, Any]:
        """Returns what the manifest says of the rows. `missing` counts the positions without any class."""
        return {
            "data": {"files": [], "input_ids_sha256": self.digest.hexdigest()},
            "columns": Features(self.features).to_dict(),
            "shard_bytes": self.shard_bytes,
            "rows": self.rows,
            "tokens": self.tokens,
            "missing": self.tokens - int(self.counts[0]),
        }

    def warn(self) -> None:
        """Warns if the log-probabilities seem to stand at the token itself, as vLLM gives them."""
        present, own, following = self.counts
        if own > 0.9 * present and following < 0.5 * present:
            logger.warning(
                "most positions list their own token in topk_indices, not the next one; position i should hold the "
                "distribution of token i + 1. Unless the teacher is a masked language model, move both columns by one"
            )


def most_probable(
    logprobs: Sequence[Any], indices: Sequence[Any], feature: TopkIndices
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ragged lists as two arrays (L, k): the most probable classes, ascending; free places hold -inf and V."""
    size, classes = feature.size, feature.classes
    counts, others = (
        np.fromiter((0 if x is None else len(x) for x in lists), np.int64) for lists in (logprobs, indices)
    )
    if (counts != others).any():
        at = int((counts != others).argmax())
        raise ValueError(f"position {at} has {counts[at]} topk_logprobs and {others[at]} topk_indices")
    shape = len(counts), max(size, int(counts.max()))
    values, chosen = np.full(shape, -np.inf), np.full(shape, classes, np.int64)
    if counts.any():
        is_used = np.arange(shape[1]) < counts[:, None]
        values[is_used] = np.concatenate([np.asarray(x, np.float64) for x in logprobs if x is not None])
        chosen[is_used] = np.concatenate([np.asarray(x, np.int64) for x in indices if x is not None])
        check_entries(values, chosen, is_used, classes)
    values, chosen = ascending(values, chosen)
    if (twice := (np.diff(chosen, axis=1) == 0) & (chosen[:, 1:] < classes)).any():
        at, place = np.argwhere(twice)[0]
        raise ValueError(f"position {at} has class {chosen[at, place]} twice")
    if shape[1] > size:
        best = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :size], axis=1)
        values, chosen = np.take_along_axis(values, best, 1), np.take_along_axis(chosen, best, 1)
    return values.astype(np.float32), chosen


def check_entries(values: np.ndarray, chosen: np.ndarray, is_used: np.ndarray, classes: int) -> None:  # (L, n) each
    """Raises ValueError for entries that are no log-probabilities of classes."""
    for x, wrong, message in (
        (values, ~(values <= 1e-3), "has the log-probability {}; it should be at most 0"),
        (
            chosen,
            is_used & ((chosen < 0) | (chosen >= classes)),
            f"has the class {{}}; it should be 0 to {classes - 1}",
        ),
    ):
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            raise ValueError(f"position {at[0]} {message.format(x[at])}")
    total = np.exp(values).sum(1)
    if total.max() > 1.05:
        raise ValueError(
            f"the probabilities of position {total.argmax()} sum to {total.max():.3g}; topk_logprobs should be natural "
            "logarithms of probabilities at temperature 1"
        )
