"""Offline teachers: what a teacher says of a data set, computed once, written to files, and trained from without it.

    write_cache(pack_corpus(["corpus.txt"], tokenizer), teacher, tokenizer, "cache", top_k=16, hidden=[0, 3, 6])
    rows = read_cache("cache")  # a datasets.Dataset, mapped into memory
    CachedStage(cache="cache").run(student, None, tokenizer, "student")  # of fastdistill.train.stages

The rows keep their order and columns. What is added to a row of L tokens:

| column | shape | stored as | |
| --- | --- | --- | --- |
| `topk_logprobs` | (L, k) | float16 | a language model's k largest log-probabilities at temperature 1, highest first |
| `topk_indices` | (L, k) | uint16; int32 beyond 65536 classes | their classes |
| `teacher_logits` | (C) | float32 | of a sequence classifier |
| `hidden_i` | (L, d) | float16 | hidden state i, 0 being the embedding output |

Why float16 and not bfloat16: it is eight times as exact, and Arrow has no bfloat16. Hidden states beyond its 65504 are
refused, never clipped. docs/cache.md has the error that rounding brings, and the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from fastdistill.train.capture import States, capture
from fastdistill.train.checks import check_classes
from fastdistill.train.data import pad_rows
from fastdistill.train.outputs import check, whole_output, write_arrow, write_whole
from fastdistill.train.processes import on_main, processes
from fastdistill.train.students import positions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_cache", "read_cache", "read_manifest", "write_cache"]

FORMAT = 1  # of the files; a reader refuses any other
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 28  # 256 MB: what an interruption can cost, and what a writer keeps in memory


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
    shard_bytes: int = SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Run a teacher over a data set and write the folder `output`, whole or not at all. `read_cache` reads it.

    Work goes on in `<output>.partial` beside it, which an interrupted run leaves behind. Processes that `torchrun` or
    `accelerate launch` starts share the shards. The teacher reads rows of like length together; the rows come out in
    the data's order.

    Args:
        dataset: tokenised rows with `input_ids`, such as `fastdistill.train.data.pack_corpus` makes.
        teacher: a transformers model, on the device to run on. A causal or masked language model for `top_k`; the
            logits of a sequence classifier are kept without being asked for.
        tokenizer: its own. Classes beyond its vocabulary, which pad the logits of some models, take no part.
        top_k: classes to keep of each token's distribution, 1 to V. Log-probabilities are those of a float32
            log-softmax over the whole vocabulary.
        hidden: hidden states to keep, from 0, the embedding output, to the number of layers.
        files: the text files that the rows were read from, for the manifest.
        batch_size: rows that the teacher reads at a time.
        bf16: bfloat16 autocast in the teacher.
        shard_bytes: of a file, about; at most 2 GB.
        resume: continue an interrupted run from its first missing shard; where `output` is whole, do nothing.
        overwrite: replace `output`, and drop an interrupted run.

    Raises:
        FileExistsError: `output` is not empty, or an interrupted run lies beside it, and neither flag is set.
        ValueError: nothing to keep, numbers out of range, rows longer than the teacher takes or without tokens, a
            tokenizer of another vocabulary, an interrupted run of something else, and, while writing, logits that
            are not numbers or hidden states that float16 cannot hold.
    """
    from datasets import Features, Value

    output, state = Path(output), processes()
    if resume and not overwrite and (output / MANIFEST).is_file():
        return
    on_main(lambda: check(output, resume=resume, overwrite=overwrite))
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
    if not 1 <= shard_bytes <= 1 << 31:  # Arrow counts a file's numbers in int32
        raise ValueError(f"shard_bytes is {shard_bytes}; it should be 1 to {1 << 31}")
    lengths, digest = measure(dataset, positions(teacher))
    columns = TeacherColumns(dataset, teacher, tokenizer, top_k, hidden, batch_size, bf16)
    manifest = {
        "format": FORMAT,
        "teacher": identity(teacher) if state.is_main_process else {},
        "tokenizer": vocabulary(tokenizer),
        "data": {"files": [file_identity(Path(path)) for path in files], "input_ids_sha256": digest},
        "top_k": top_k,
        "classes": columns.classes,
        "hidden": columns.hidden,
        "columns": {name: {"size": size, "dtype": dtype} for name, (size, dtype) in columns.sizes.items()},
        "bf16": bf16,
        "shard_bytes": shard_bytes,
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
    }
    schema = Features({**dataset.features, "length": Value("int64"), **columns.features()}).arrow_schema
    shards = cut(columns.row_bytes(lengths), shard_bytes)

    with whole_output(output, resume=resume, overwrite=overwrite) as work:
        on_main(lambda: begin(work, manifest))
        paths = [work / f"{number:05}.arrow" for number in range(len(shards))]
        mine = range(state.process_index, len(shards), state.num_processes)
        todo = [number for number in mine if not entry(paths[number]).exists()]
        options = {"desc": "Teacher", "unit": " rows", "disable": not state.is_main_process}
        with logging.tqdm(total=sum(len(shards[number]) for number in todo), **options) as bar:
            for number in todo:
                rows, path = shards[number], paths[number]
                some, tokens = dataset.select(rows), lengths[rows.start : rows.stop]
                found = columns.values(some, tokens, rows.start, bar)
                write_arrow(path, schema, [record_batch(some, tokens, found, schema)])
                write_whole(entry(path), json.dumps({**file_identity(path), "rows": len(rows)}))
        state.wait_for_everyone()
        if state.is_main_process:
            teacher.config.save_pretrained(work)
            tokenizer.save_pretrained(work)
            entries = [json.loads(entry(path).read_text(encoding="utf-8")) for path in paths]
            write_whole(work / MANIFEST, json.dumps({**manifest, "shards": entries}, indent=2) + "\n")
    if state.is_main_process:
        for path in paths:
            entry(output / path.name).unlink()


# -- what is kept ------------------------------------------------------------------------------------------------


class TeacherColumns:
    """What is kept of a teacher: columns, and their numbers for any rows. Arguments are `write_cache`'s.

    One row is run to see what the teacher returns.

    Attributes:
        sizes: numbers a token (of `teacher_logits`, a row) and their dtype, by column.
        classes: V, of the distribution that the k classes are of; None without.
    """

    def __init__(
        self,
        dataset: Dataset,
        teacher: PreTrainedModel,
        tokenizer: Any,
        top_k: int | None,
        hidden: Sequence[int],
        batch_size: int,
        bf16: bool,
    ) -> None:
        tokens = max(tokenizer.get_vocab().values()) + 1
        if tokens > teacher.config.vocab_size:
            raise ValueError(
                f"tokenizer has token ids up to {tokens - 1}, the teacher {teacher.config.vocab_size} of them; they "
                "should be of one checkpoint"
            )
        self.model, self.batch_size, self.bf16 = teacher.eval(), batch_size, bf16
        self.top_k, self.hidden = top_k, sorted(set(hidden))
        self.classes: int | None = None
        self.pad_id = tokenizer.pad_token_id or 0
        self.inputs = [name for name in tokenizer.model_input_names if name in dataset.column_names]
        self.sizes: dict[str, tuple[int, str]] = {}

        states = self.states(dataset.with_format("numpy", columns=self.inputs)[:1])
        shape = () if states.logits is None else tuple(states.logits.shape)
        if top_k is not None:
            if len(shape) != 3:
                raise ValueError(
                    f"top_k is {top_k}, but {type(teacher).__name__} returns "
                    f"{f'logits {shape}' if shape else 'no logits'}; it should be a language model, whose are (B, L, V)"
                )
            self.classes = min(shape[2], tokens)
            if not 1 <= top_k <= self.classes:
                raise ValueError(f"top_k is {top_k}; it should be 1 to {self.classes}, the teacher's classes")
            self.sizes["topk_logprobs"] = top_k, "float16"
            self.sizes["topk_indices"] = top_k, index_dtype(self.classes)
        elif len(shape) == 2:
            self.sizes["teacher_logits"] = shape[1], "float32"
        else:
            self.model = teacher.base_model  # logits nobody keeps
        for i in self.hidden:
            self.sizes[f"hidden_{i}"] = states.hidden[i].shape[2], "float16"
        if not self.sizes:
            raise ValueError(
                f"top_k is None and hidden is empty, and {type(teacher).__name__} is no sequence classifier; give "
                "top_k for a language model, hidden, or both"
            )

    def features(self) -> dict[str, Any]:
        from datasets import Array2D, Sequence, Value

        return {
            name: Sequence(Value(dtype)) if name == "teacher_logits" else Array2D((None, size), dtype)
            for name, (size, dtype) in self.sizes.items()
        }

    def row_bytes(self, lengths: np.ndarray) -> np.ndarray:
        """About; an offset of 4 bytes for each token and column, and 8 for its id and whatever else the row has."""
        of_tokens = [kept for name, kept in self.sizes.items() if name != "teacher_logits"]
        return lengths * (8 + sum(4 + size * np.dtype(dtype).itemsize for size, dtype in of_tokens))

    def states(self, rows: Mapping[str, Any]) -> States:
        """Of rows given as columns of arrays (L). Padding is on the right whatever the tokenizer's side is: positions
        then count from the first token, and a causal model sees none of it."""
        batch = {
            name: pad_rows(list(rows[name]), value=self.pad_id if name == "input_ids" else 0) for name in self.inputs
        }
        if "attention_mask" not in batch:
            batch["attention_mask"] = pad_rows([np.ones_like(row) for row in rows["input_ids"]])
        if bool(batch["attention_mask"].all()):
            del batch["attention_mask"]
        device = next(self.model.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return capture(self.model, {name: x.to(device) for name, x in batch.items()}, hidden=self.hidden)

    def values(self, rows: Dataset, lengths: np.ndarray, first: int, bar: Any) -> dict[str, np.ndarray]:
        """Each column's numbers (tokens, n) for rows of `lengths` tokens, one row after the other; `teacher_logits`
        (rows, C). `first` is the first row's number, for messages; `bar` counts rows."""
        starts = offsets(lengths)
        found = {
            name: np.empty((len(lengths) if name == "teacher_logits" else starts[-1], size), dtype)
            for name, (size, dtype) in self.sizes.items()
        }
        rows = rows.with_format("numpy", columns=self.inputs)
        order = np.argsort(lengths, kind="stable")  # rows of like length need little padding
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size].tolist()
            states = self.states(rows[chosen])
            for place, row in enumerate(chosen):
                tokens, length = slice(starts[row], starts[row + 1]), lengths[row]
                if self.top_k is not None:
                    assert states.logits is not None
                    logits = states.logits[place, :length, : self.classes].float()
                    highest, indices = logits.topk(self.top_k)
                    found["topk_logprobs"][tokens] = (highest - logits.logsumexp(-1, keepdim=True)).half().cpu().numpy()
                    found["topk_indices"][tokens] = indices.cpu().numpy()
                elif "teacher_logits" in found:
                    assert states.logits is not None
                    found["teacher_logits"][row] = states.logits[place].float().cpu().numpy()
                for i in self.hidden:
                    found[f"hidden_{i}"][tokens] = states.hidden[i][place, :length].half().cpu().numpy()
            bar.update(len(chosen))
        check_numbers(found, starts, first)
        return found


def check_numbers(found: Mapping[str, np.ndarray], starts: np.ndarray, first: int) -> None:
    """ValueError naming row and column of what is no number, or none that its dtype holds."""
    for name, values in found.items():
        if name == "topk_indices":
            continue
        # A log-probability of -inf is a class that cannot be.
        wrong = np.isnan(values) if name == "topk_logprobs" else ~np.isfinite(values)
        if wrong.any():
            place = int(np.flatnonzero(wrong.any(1))[0])
            row = place if name == "teacher_logits" else int(np.searchsorted(starts, place, "right")) - 1
            hint = "; float16 holds numbers up to 65504" if name.startswith("hidden") else ""
            raise ValueError(f"row {first + row}: {name} of the teacher is {values[place][wrong[place]][0]}{hint}")


def index_dtype(classes: int) -> str:
    return "uint16" if classes <= 1 << 16 else "int32"


def measure(dataset: Dataset, most: int) -> tuple[np.ndarray, str]:
    """The tokens of each row, int64, and the SHA-256 of all token ids; ValueError for a row of none, or too many."""
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset has the columns {dataset.column_names}; it should have input_ids: tokenise it")
    if not len(dataset):
        raise ValueError("dataset has no rows")
    found, digest = [], hashlib.sha256()
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        ids = table["input_ids"].combine_chunks()
        found.append(ids.value_lengths().to_numpy().astype(np.int64))
        for numbers in (found[-1], ids.flatten().to_numpy().astype(np.int64)):
            digest.update(numbers)
    lengths = np.concatenate(found)
    if lengths.min() < 1:
        raise ValueError(f"row {int(lengths.argmin())} has no tokens; leave it out")
    if lengths.max() > most:
        row = int(lengths.argmax())
        raise ValueError(f"row {row} has {lengths[row]} tokens; the teacher takes {most}: cut the rows")
    return lengths, digest.hexdigest()


# -- files -------------------------------------------------------------------------------------------------------


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each row begins among the tokens, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def cut(row_bytes: np.ndarray, shard_bytes: int) -> list[range]:
    """The rows of each shard: a row is in the shard that its first byte falls into."""
    shard = (np.cumsum(row_bytes) - row_bytes) // shard_bytes
    starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(row_bytes)], strict=True)]


def entry(shard: Path) -> Path:
    """What the manifest will say of a shard; there once the shard is whole."""
    return shard.with_suffix(".json")


def record_batch(rows: Dataset, lengths: np.ndarray, found: Mapping[str, np.ndarray], schema: Any) -> Any:
    """The rows' own columns and the teacher's as one Arrow batch, without a copy of the numbers."""
    table, starts = rows.with_format("arrow")[:], offsets(lengths)

    def array(field: Any) -> Any:
        if field.name == "length":
            return pa.array(lengths)
        if field.name not in found:
            return table[field.name].combine_chunks()
        values = found[field.name]  # (tokens, n), or (rows, C)
        ends = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
        nested = pa.ListArray.from_arrays(pa.array(ends), pa.array(values.reshape(-1)))
        if field.name == "teacher_logits":
            return nested
        nested = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), nested)
        return pa.ExtensionArray.from_storage(field.type, nested)

    return pa.RecordBatch.from_arrays([array(field) for field in schema], schema=schema)


def begin(work: Path, manifest: Mapping[str, Any]) -> None:
    """Write down what this run is; ValueError where an interrupted one was something else."""
    path = work / MANIFEST
    if not path.exists():
        write_whole(path, json.dumps(manifest, indent=2) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in manifest.items() if found.get(name) != value]
    if different:
        raise ValueError(
            f"{work} holds an interrupted run with another {', '.join(different)}; pass overwrite=True to drop it"
        )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def identity(teacher: PreTrainedModel) -> dict[str, Any]:
    """Name, class, and what tells its config and weights from any other's."""
    config = teacher.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # say nothing of what it computes
        config.pop(name, None)
    weights = hashlib.sha256()
    for name, x in sorted(teacher.state_dict().items()):
        weights.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        weights.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "name": Path(teacher.name_or_path).name,
        "class": type(teacher).__name__,
        "revision": getattr(teacher.config, "_commit_hash", None),
        "vocab_size": teacher.config.vocab_size,
        "config_sha256": sha256(json.dumps(config, sort_keys=True, default=str).encode()),
        "weights_sha256": weights.hexdigest(),
    }


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return {"tokens": len(tokens), "sha256": sha256(json.dumps(tokens).encode())}


# -- reading -----------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `manifest.json` says: teacher, tokenizer, data, columns, rows, tokens, shards.

    Raises FileNotFoundError, and ValueError for files of another format or of a run that did not end.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} should be what `fastdistill cache` wrote")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}: write it anew")
    if "shards" not in manifest:
        raise ValueError(f"{folder} is what an interrupted run left; finish that run first")
    return manifest


def read_cache(folder: str | Path, *, verify: bool = False) -> Dataset:
    """The rows of a cache in numpy format, mapped into memory: nothing is read before it is asked for.

    Columns are those of the data, `length`, and the teacher's as in the table above. Floating numbers arrive as
    float32, integers as int64, (L, n) a row.

    Args:
        verify: read every file and compare its SHA-256; sizes are compared always.

    Raises:
        FileNotFoundError: `folder` is no cache, or lacks a file.
        ValueError: another format, a run that did not end, or a file that is not the one written; named.
    """
    from datasets import Dataset, concatenate_datasets

    shards = read_manifest(folder)["shards"]
    for shard in logging.tqdm(shards, desc="Verifying", disable=not verify):
        path = Path(folder) / shard["name"]
        mend = "copy it again, or write the cache anew"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {mend}")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path}: {path.stat().st_size} bytes; {shard['bytes']} were written: {mend}")
        if verify and file_identity(path)["sha256"] != shard["sha256"]:
            raise ValueError(f"{path}: its SHA-256 is not that of what was written: {mend}")
    parts = [Dataset.from_file(str(Path(folder) / shard["name"])) for shard in shards]
    return concatenate_datasets(parts).with_format("numpy")


def terms_served(folder: str | Path) -> list[str]:
    """The objective's terms for which a cache stands in for the teacher."""
    columns = read_manifest(folder)["columns"]
    states = [name for name in columns if name.startswith("hidden_")]
    served = {
        "embedding": "hidden_0" in states,
        "hidden": bool(set(states) - {"hidden_0"}),
        "prediction": "topk_logprobs" in columns or "teacher_logits" in columns,
    }
    return [term for term, is_served in served.items() if is_served]


def weightless_teacher(folder: str | Path) -> PreTrainedModel:
    """A model of the teacher's class and config without weights, on the device "meta": all that
    `fastdistill.train.students.build_student` needs of a teacher for a student that does not start from it.

    Raises ValueError where the class is not one of transformers' own.
    """
    name = read_manifest(folder)["teacher"]["class"]
    if not hasattr(transformers, name):
        raise ValueError(f"{folder}: the teacher is a {name}, which transformers does not have; load it yourself")
    with torch.device("meta"):
        return getattr(transformers, name)(teacher_config(folder))


def teacher_config(folder: str | Path) -> Any:
    """The transformers config of the teacher whose cache this is."""
    return AutoConfig.from_pretrained(folder)


def check_cache(folder: str | Path, *, student: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
    """Refuse a student or a tokenizer that a cache is not for.

    Raises ValueError naming both where the vocabularies differ, or the classes of a classifier or their order.
    """
    manifest = read_manifest(folder)
    if student is not None:
        teacher, size = manifest["teacher"], student.config.vocab_size
        if size != teacher["vocab_size"]:
            raise ValueError(
                f"the student's vocabulary has {size} tokens, that of {folder} ({teacher['class']} {teacher['name']}) "
                f"{teacher['vocab_size']}; both read the same token ids, so give the student that vocab_size"
            )
        if "teacher_logits" in manifest["columns"]:
            check_classes(student.config, teacher_config(folder))
    if tokenizer is not None:
        ours, theirs = vocabulary(tokenizer), manifest["tokenizer"]
        if ours != theirs:
            raise ValueError(
                f"the tokenizer's vocabulary ({ours['tokens']} tokens, SHA-256 {ours['sha256'][:12]}) is not that of "
                f"{folder} ({theirs['tokens']} tokens, SHA-256 {theirs['sha256'][:12]}); use the tokenizer saved there"
            )
