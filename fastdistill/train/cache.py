"""Offline teachers: runs a teacher over a data set once, writes its outputs to files, and reads them for training.

    write_cache(pack_corpus(["corpus.txt"], tokenizer), teacher, tokenizer, "cache", top_k=16, hidden=[0, 3, 6])
    rows = read_cache("cache")  # a datasets.Dataset, mapped into memory
    CachedStage(cache="cache").run(student, None, tokenizer, "student")  # of fastdistill.train.stages

Rows keep their order and their columns. Those of the teacher are added, for a row of L tokens: `topk_logprobs` and
`topk_indices` (L, k), `hidden_i` (L, d), and `teacher_logits` (C) of a sequence classifier. docs/cache.md describes the
columns, how they are stored, the files, and the error that rounding brings. `fastdistill.train.external` writes caches
from log-probabilities that were made elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import transformers
from datasets import Array2D, Dataset, Features, Value
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils import logging

from fastdistill.train.cache_files import (
    FORMAT,
    MANIFEST,
    SHARD_BYTES,
    TOPK,
    begin,
    check_storage,
    drop_entries,
    entry,
    file_identity,
    finish,
    offsets,
    token_ids,
    topk_features,
    vocabulary,
    write_shard,
)
from fastdistill.train.capture import States
from fastdistill.train.checkpoints import load_config
from fastdistill.train.checks import check_classes, check_vocabularies, reads_text
from fastdistill.train.data import batches_by_length, predict
from fastdistill.train.heads import body
from fastdistill.train.inputs import refuse_encoder_decoder, text_columns
from fastdistill.train.outputs import check, whole_output, writing
from fastdistill.train.processes import on_main, processes
from fastdistill.train.reading import read_json, reading
from fastdistill.train.students import positions

__all__ = ["check_cache", "read_cache", "read_manifest", "write_cache"]

logger = logging.get_logger(__name__)

LOGITS = "teacher_logits"  # the only column with one entry a row; the others have one for each token


def write_cache(
    dataset: Dataset,
    teacher: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    *,
    top_k: int | None = None,
    hidden: Sequence[int] = (),
    files: Sequence[str | Path] = (),
    batch_size: int = 16,
    bf16: bool = False,
    logprobs_bits: int = 16,
    shard_bytes: int = SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Runs a teacher over a data set and writes the folder `output`, whole or not at all. `read_cache` reads it.

    Files are written to `<output>.partial`, which stays if the run is interrupted. Processes started by `torchrun` or
    `accelerate launch` share the shards. Each batch holds rows of similar length; the output keeps the data's order.

    Args:
        dataset: tokenised rows with `input_ids`, such as `fastdistill.train.data.pack_corpus` returns. Where rows
            pack documents, `position_ids` start from 0 in each, and the teacher reads each by itself.
        teacher: a transformers model, on the device to run on. `top_k` needs a causal or masked language model. The
            logits of a sequence classifier are always kept.
        tokenizer: the teacher's. Logits beyond its vocabulary, which some models add as padding, are left out.
        top_k: classes to keep of each token's distribution, 1 to V. The log-probabilities come from a float32
            log-softmax over the whole vocabulary.
        hidden: hidden states to keep, from 0, the embedding output, to the number of layers.
        files: the text files that the rows were read from, for the manifest.
        batch_size: rows in a batch of the teacher; documents, where rows are packed.
        bf16: run the teacher under bfloat16 autocast.
        logprobs_bits: of each log-probability in the files, 16 or 8. docs/cache.md has the error of both.
        shard_bytes: the approximate size of a file, at most 2 GB.
        resume: continue an interrupted run at its first missing shard; do nothing if `output` is whole.
        overwrite: replace `output`, and drop an interrupted run.

    Raises FileExistsError if neither flag is set and `output` or `<output>.partial` is not empty, and ValueError for
    an argument, a row or a value of the teacher that does not fit.
    """
    output = Path(output)
    if resume and not overwrite and (output / MANIFEST).is_file():
        return
    refuse_encoder_decoder(teacher=teacher)
    on_main(lambda: check(output, resume=resume, overwrite=overwrite))
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
    check_storage(logprobs_bits, shard_bytes)
    if not reads_text(teacher):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}, which reads {teacher.main_input_name}; a cache holds rows of "
            "input_ids: use add_teacher_logits, or train with a live teacher"
        )
    lengths, digest = measure(dataset, positions(teacher))
    states = sorted(set(hidden))
    columns = TeacherColumns(dataset, lengths, teacher, tokenizer, top_k, states, batch_size, bf16, logprobs_bits)
    manifest = columns.manifest([file_identity(Path(path)) for path in files], digest, shard_bytes)
    shards = columns.shards(shard_bytes)
    with whole_output(output, resume=resume, overwrite=overwrite) as work:
        on_main(lambda: begin(work, manifest))
        write_shards(work, columns, shards)
        processes().wait_for_everyone()
        on_main(lambda: columns.save(work))
        on_main(lambda: finish(work, manifest, len(shards)))
    on_main(lambda: drop_entries(output, len(shards)))


def write_shards(work: Path, columns: TeacherColumns, shards: Sequence[range]) -> None:
    """Writes this process's shards that are not there yet, each with a JSON file that describes it."""
    state, schema = processes(), columns.schema()
    mine = range(state.process_index, len(shards), state.num_processes)
    todo = [number for number in mine if not entry(work, number).exists()]
    tokens = {number: int(columns.lengths[shards[number]].sum()) for number in todo}
    options = {"desc": "Teacher", "unit": " tokens", "unit_scale": True, "disable": not state.is_main_process}
    with logging.tqdm(total=sum(tokens.values()), **options) as bar:
        for number in todo:
            write_shard(work, number, columns.record_batch(shards[number], schema, bar))


@dataclass
class TeacherColumns:
    """The columns that are kept of a teacher, and their values for any rows. Its arguments are those of `write_cache`.

    The constructor runs one document to see what the teacher returns.
    """

    dataset: Dataset
    lengths: np.ndarray  # the tokens of each row
    teacher: PreTrainedModel
    tokenizer: Any
    top_k: int | None
    hidden: list[int]
    batch_size: int
    bf16: bool
    logprobs_bits: int
    classes: int | None = None  # V, the number of classes that the k are chosen from; None without `top_k`
    features: dict[str, Any] = field(default_factory=dict)  # of each column

    def __post_init__(self) -> None:
        teacher, top_k, name = self.teacher, self.top_k, type(self.teacher).__name__
        tokens = token_ids(self.tokenizer)
        if tokens > teacher.config.vocab_size:
            raise ValueError(
                f"tokenizer has token ids up to {tokens - 1}, the teacher {teacher.config.vocab_size} of them; they "
                "should be of one checkpoint"
            )
        # Padding on the right, whatever the tokenizer's side: positions count from the first token, and a causal model
        # never sees the padding.
        self.options: dict[str, Any] = {"hidden": self.hidden, "bf16": self.bf16, "padding_side": "right"}
        first, _ = self.documents(self.dataset.select([0]), self.lengths[:1])
        _, states, _ = next(predict(teacher, first, self.tokenizer, [[0]], **self.options))
        shape = () if states.logits is None else tuple(states.logits.shape)
        self.model = teacher
        if top_k is not None:
            if len(shape) != 3:
                raise ValueError(
                    f"top_k is {top_k}, but {name} returns {f'logits {shape}' if shape else 'no logits'}; it should be "
                    "a language model, whose are (B, L, V)"
                )
            self.classes = min(shape[2], tokens)
            self.features = topk_features(top_k, self.classes, self.logprobs_bits)
        elif len(shape) == 2:
            self.features[LOGITS] = datasets.Sequence(Value("float32"))
        else:
            self.model = body(teacher)  # nobody needs the logits
        self.widths = {f"hidden_{i}": states.hidden[i].shape[2] for i in self.hidden}
        self.features |= {name: Array2D((None, width), "float16") for name, width in self.widths.items()}
        if not self.features:
            raise ValueError(
                f"top_k is None and hidden is empty, and {name} is no sequence classifier; give top_k for a language "
                "model, hidden, or both"
            )

    def manifest(self, files: Sequence[Mapping[str, Any]], digest: str, shard_bytes: int) -> dict[str, Any]:
        """Returns what the manifest says before the first shard. Only the main process hashes the teacher."""
        return {
            "format": FORMAT,
            "teacher": identity(self.teacher) if processes().is_main_process else {},
            "tokenizer": vocabulary(self.tokenizer),
            "data": {"files": files, "input_ids_sha256": digest},
            "top_k": self.top_k,
            "classes": self.classes,
            "hidden": self.hidden,
            "columns": json.loads(json.dumps(Features(self.features).to_dict())),  # tuples become lists
            "bf16": self.bf16,
            "shard_bytes": shard_bytes,
            "rows": len(self.lengths),
            "tokens": int(self.lengths.sum()),
        }

    def save(self, work: Path) -> None:
        """Saves the teacher's config and tokenizer."""
        with writing(work):
            self.teacher.config.save_pretrained(work)
            self.tokenizer.save_pretrained(work)

    def schema(self) -> Any:
        """Returns the Arrow schema of a shard."""
        return Features({**self.dataset.features, "length": Value("int64"), **self.features}).arrow_schema

    def shards(self, shard_bytes: int) -> list[range]:
        """Returns the rows of each shard. A row is in the shard that its first byte falls into."""
        of_topk = sum(feature.token_bytes for name, feature in self.features.items() if name in TOPK)
        of_hidden = sum(4 + 2 * width for width in self.widths.values())
        row_bytes = self.lengths * (8 + of_topk + of_hidden)  # the data's own columns take about 8 bytes a token
        shard = (np.cumsum(row_bytes) - row_bytes) // shard_bytes
        starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(shard)], strict=True)]

    def record_batch(self, shard: range, schema: Any, bar: Any) -> Any:
        """Returns the rows' own columns and the teacher's as one Arrow batch. `bar` counts the tokens."""
        rows, lengths = self.dataset.select(shard), self.lengths[shard.start : shard.stop]
        starts = offsets(lengths)
        table = rows.with_format("arrow")[:]
        arrays = {name: table[name].combine_chunks() for name in table.column_names} | {"length": pa.array(lengths)}
        for name, x in self.values(rows, lengths, shard.start, bar).items():  # (entries, n)
            if name in TOPK:
                arrays[name] = self.features[name].arrow(x, starts)
                continue
            ends = np.arange(0, x.size + 1, x.shape[1], dtype=np.int32)
            arrays[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(x.reshape(-1)))
            if name != LOGITS:
                nested = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), arrays[name])
                arrays[name] = pa.ExtensionArray.from_storage(schema.field(name).type, nested)
        return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def values(self, rows: Dataset, lengths: np.ndarray, first: int, bar: Any) -> dict[str, np.ndarray]:
        """Returns what is stored of each column (entries, n). `first` is the number of the first of `rows`."""
        documents, lengths_read = self.documents(rows, lengths)
        starts = offsets(lengths_read)
        found: dict[str, np.ndarray] = {}
        wrong: dict[int, str] = {}  # by token
        batches = batches_by_length(lengths_read, self.batch_size)
        for chosen, states, _ in predict(self.model, documents, self.tokenizer, batches, **self.options):
            for place, document in enumerate(chosen):
                start, stop = starts[document], starts[document + 1]
                for name, x in self.kept(states, place, lengths_read[document]).items():
                    if (message := fault(name, x)) is not None:
                        wrong[start] = message
                        continue
                    stored = self.features[name].encode(x) if name in TOPK else x
                    if name not in found:
                        entries = len(rows) if name == LOGITS else starts[-1]
                        found[name] = np.empty((entries, stored.shape[1]), stored.dtype)
                    found[name][document if name == LOGITS else slice(start, stop)] = stored
            bar.update(int(lengths_read[chosen].sum()))
        if wrong:
            token = min(wrong)
            row = first + int(np.searchsorted(offsets(lengths), token, "right")) - 1
            raise ValueError(f"row {row}: {wrong[token]}")
        return found

    def documents(self, rows: Dataset, lengths: np.ndarray) -> tuple[Dataset, np.ndarray]:
        """Returns rows of one document each for the teacher to read, and their lengths. All tokens keep their order."""
        if "position_ids" not in rows.column_names or LOGITS in self.features:
            return rows, lengths
        columns = text_columns(self.teacher, self.tokenizer, rows.column_names)
        table = rows.with_format("arrow")[:]
        lengths = document_lengths(table["position_ids"].combine_chunks(), lengths)
        ends = pa.array(offsets(lengths), pa.int32())
        flat = {name: table[name].combine_chunks().flatten() for name in columns if name != "position_ids"}
        return Dataset(pa.table({name: pa.ListArray.from_arrays(ends, x) for name, x in flat.items()})), lengths

    def kept(self, states: States, place: int, length: int) -> dict[str, np.ndarray]:
        """Returns the columns of one document, `length` tokens at `place` in the batch."""
        columns = {f"hidden_{i}": x[place, :length].half() for i, x in states.hidden.items()}  # (L, d)
        if states.logits is not None and self.top_k is not None:
            logits = states.logits[place, :length, : self.classes].float()  # (L, V)
            highest, indices = logits.topk(self.top_k)
            columns["topk_indices"], order = indices.sort(-1)
            columns["topk_logprobs"] = highest.gather(-1, order) - logits.logsumexp(-1, keepdim=True)
        elif states.logits is not None:
            columns[LOGITS] = states.logits[place : place + 1].float()  # (1, C)
        return {name: x.cpu().numpy() for name, x in columns.items()}


def fault(name: str, values: np.ndarray) -> str | None:
    """Returns what is wrong with values of the teacher. A log-probability may be -inf: the class is impossible."""
    wrong = np.isnan(values) if name in TOPK else ~np.isfinite(values)
    if not wrong.any():
        return None
    hint = "; float16 holds numbers up to 65504" if name.startswith("hidden") else ""
    return f"{name} of the teacher is {values[wrong][0]}{hint}"


def measure(dataset: Dataset, most: int) -> tuple[np.ndarray, str]:
    """Returns the number of tokens of each row, int64, and the SHA-256 of all that the teacher reads.

    A row, or each of its documents, has at most `most` tokens.
    """
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset has the columns {dataset.column_names}; it should have input_ids: tokenise it")
    if not len(dataset):
        raise ValueError("dataset has no rows")
    found, digest, before = [], hashlib.sha256(), 0
    columns = [name for name in ("input_ids", "position_ids") if name in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(10_000):
        ids = table["input_ids"].combine_chunks()
        lengths = read = ids.value_lengths().to_numpy().astype(np.int64)
        if not lengths.all():
            raise ValueError(f"row {before + int(lengths.argmin())} has no tokens; leave it out")
        digest.update(lengths)
        digest.update(ids.flatten().to_numpy().astype(np.int64))
        if "position_ids" in columns:
            positions = table["position_ids"].combine_chunks()
            read = document_lengths(positions, lengths, before)
            digest.update(positions.flatten().to_numpy().astype(np.int64))
        if read.max() > most:
            row = before + int(np.searchsorted(offsets(lengths), offsets(read)[read.argmax()], "right")) - 1
            raise ValueError(f"row {row} has {read.max()} tokens; the teacher takes {most}: cut the rows")
        found.append(lengths)
        before += len(lengths)
    return np.concatenate(found), digest.hexdigest()


def document_lengths(positions: Any, lengths: np.ndarray, first: int = 0) -> np.ndarray:
    """Returns the tokens of each document of packed rows, whose `positions` (Arrow lists) start from 0 in each.

    `first` is the number of the first row, for errors.
    """
    if (different := positions.value_lengths().to_numpy() != lengths).any():
        row = int(different.argmax())
        raise ValueError(f"row {first + row}: position_ids has not one entry for each of its {lengths[row]} input_ids")
    flat = positions.flatten().to_numpy()
    is_start = np.diff(flat, prepend=0) != 1
    is_start[offsets(lengths)[:-1]] = True
    starts = np.flatnonzero(is_start)
    if (late := flat[starts] != 0).any():
        token = starts[late.argmax()]
        row = int(np.searchsorted(offsets(lengths), token, "right")) - 1
        raise ValueError(
            f"row {first + row}: position_ids go on at {flat[token]}; they should count from 0 in each document"
        )
    return np.diff(starts, append=len(flat))


def identity(teacher: PreTrainedModel) -> dict[str, Any]:
    """Returns the teacher's name and class, and hashes that tell its config and weights from any other's."""
    config = teacher.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # these do not change its outputs
        config.pop(name, None)
    weights = hashlib.sha256()
    for name, x in sorted(teacher.state_dict().items()):
        weights.update(name.encode())
        for part in parts(x):
            weights.update(part)
    return {
        "name": Path(teacher.name_or_path).name,
        "class": type(teacher).__name__,
        "revision": getattr(teacher.config, "_commit_hash", None),
        "vocab_size": teacher.config.vocab_size,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def parts(x: Any) -> Iterator[Any]:
    """Yields what tells an entry of a state dict from any other: quantised layers keep tuples and dtypes in theirs."""
    if isinstance(x, tuple):
        for inner in x:
            yield from parts(inner)
    elif isinstance(x, torch.Tensor) and is_traceable_wrapper_subclass(x):  # torchao's quantised weights
        names, settings = x.__tensor_flatten__()
        yield repr(settings).encode()
        yield from parts(tuple(getattr(x, name) for name in names))
    elif isinstance(x, torch.Tensor) and x.is_quantized:
        per_channel = x.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scales: tuple[Any, ...] = (x.q_per_channel_scales(), x.q_per_channel_zero_points()) if per_channel else ()
        yield from parts((x.int_repr(), *(scales or (x.q_scale(), x.q_zero_point()))))
    elif isinstance(x, torch.Tensor):
        yield f" {x.dtype} {tuple(x.shape)}".encode()
        yield x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    else:
        yield repr(x).encode()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Returns the content of `manifest.json`: teacher, tokenizer, data, columns, rows, tokens, shards."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} should be what `fastdistill cache` wrote")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}: write the cache again"
        )
    if "shards" not in manifest:
        raise ValueError(f"{folder} is what an interrupted run left; finish that run first")
    check_manifest(path, manifest)
    return manifest


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where a manifest lacks an entry that readers need, or has one of another type."""
    shard: dict[str, Any] = {"name": str, "bytes": int, "sha256": str}
    kinds: dict[str, Any] = {"teacher": dict, "columns": dict, "shards": list}
    kinds |= {"tokenizer": (dict, type(None)), "classes": (int, type(None))}
    shards = manifest["shards"] if isinstance(manifest["shards"], list) else []
    entries: list[Any] = [("", kinds, manifest), *((f"shards[{i}].", shard, x) for i, x in enumerate(shards or [{}]))]
    for where, expected, found in entries:
        for name, kind in expected.items():
            if not isinstance(found, dict) or name not in found or not isinstance(found[name], kind):
                raise ValueError(f"{path}: damaged, {where}{name} is missing or of another type: write the cache again")


def read_cache(folder: str | Path, *, verify: bool = False) -> Dataset:
    """Returns the rows of a cache in numpy format, mapped into memory: nothing is read before it is used.

    The columns are the data's own, `length`, and the teacher's. Floating-point numbers arrive as float32, integers as
    int64, (L, n) a row; the k classes of a token ascend. `verify` reads every file and compares its SHA-256; sizes
    are always compared. Raises FileNotFoundError or ValueError for a file that is missing or is not what was written.
    """
    shards, parts = read_manifest(folder)["shards"], []
    mend = "copy it again, or write the cache again"
    for shard in logging.tqdm(shards, desc="Verifying", disable=not verify):
        path = Path(folder) / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {mend}")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path}: {path.stat().st_size} bytes; {shard['bytes']} were written: {mend}")
        if verify and file_identity(path)["sha256"] != shard["sha256"]:
            raise ValueError(f"{path}: its SHA-256 is not that of what was written: {mend}")
        with reading(path):
            rows = Dataset.from_file(str(path))
            rows.data.validate(full=True)  # Arrow trusts the offsets in a file
        parts.append(rows)
    return datasets.concatenate_datasets(parts).with_format("numpy")


def terms_served(folder: str | Path) -> list[str]:
    """Returns the terms of the objective that a cache can serve without the teacher."""
    columns = read_manifest(folder)["columns"]
    served = {
        "embedding": "hidden_0" in columns,
        "hidden": any(name.startswith("hidden_") and name != "hidden_0" for name in columns),
        "prediction": "topk_logprobs" in columns or LOGITS in columns,
    }
    return [term for term, is_served in served.items() if is_served]


def warn_of_lost_mass(folder: str | Path, alpha: float) -> None:
    """Warns where a student learns from the k classes alone, and they hold less than 90% of the teacher's probability.

    The loss takes the k for the whole distribution, so that the student unlearns all other classes.
    """
    manifest = read_manifest(folder)
    if alpha < 1 or not manifest.get("top_k"):
        return
    rows = read_cache(folder)["topk_logprobs"][:100]
    mass = float(np.concatenate([np.exp(row).sum(-1) for row in rows]).mean())
    if mass < 0.9:
        logger.warning(
            "%s keeps %d classes of each token, which hold %.0f%% of the teacher's probability on average. A student "
            "that learns from them alone takes all other classes for impossible: use alpha=0.5, so that the labels "
            "teach those, or write the cache with a larger top_k", folder, manifest["top_k"], 100 * mass
        )  # fmt: skip


def weightless_teacher(folder: str | Path) -> PreTrainedModel | None:
    """Returns a model of the teacher's class and config on the device "meta", without weights.

    `fastdistill.train.students.build_student` needs no more of a teacher for a student that does not start from it.
    None: the cache was made from log-probabilities alone.
    """
    name = read_manifest(folder)["teacher"].get("class")
    if name is None:
        return None
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"{folder}: the teacher is a {name}, which transformers does not have; load it yourself")
    config = teacher_config(folder)
    with torch.device("meta"), reading(Path(folder, "config.json")):
        return kind(config)


def teacher_config(folder: str | Path) -> Any:
    """Returns the transformers config of a cache's teacher; None if it was made from log-probabilities alone."""
    return load_config(folder) if "class" in read_manifest(folder)["teacher"] else None


def check_cache(folder: str | Path, *, student: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
    """Raises ValueError if a student or a tokenizer has another vocabulary than a cache, or a student other classes."""
    manifest = read_manifest(folder)
    theirs = manifest["tokenizer"]
    if tokenizer is not None and theirs is not None and (ours := vocabulary(tokenizer)) != theirs:
        raise ValueError(
            f"the tokenizer's vocabulary ({ours['tokens']} tokens, SHA-256 {ours['sha256'][:12]}) is not that of "
            f"{folder} ({theirs['tokens']} tokens, SHA-256 {theirs['sha256'][:12]}); use the tokenizer saved there"
        )
    teacher, config = manifest["teacher"], teacher_config(folder)
    if student is not None and config is not None:
        whose = f"that of {folder} ({teacher['class']} {teacher['name']})"
        check_vocabularies(student.config, config, tokenizer, whose=whose)
        if LOGITS in manifest["columns"]:
            check_classes(student.config, config)
    elif student is not None and student.config.vocab_size < manifest["classes"]:
        raise ValueError(
            f"the student's vocabulary has {student.config.vocab_size} tokens, that of {folder} {manifest['classes']}; "
            "both should be one vocabulary: give the student the teacher's tokenizer and vocab_size"
        )
