"""The files of a cache: shards in Arrow's stream format, a file that describes each, and the manifest.

While a cache is written, a shard is whole once `<number>.json` exists. At the end the manifest takes these over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdistill.train.outputs import write_arrow, write_whole
from fastdistill.train.reading import read_json
from fastdistill.train.topk_codec import TopkIndices, TopkLogprobs

FORMAT = 2  # of the files; a reader refuses any other
MANIFEST = "manifest.json"
TOPK = ("topk_logprobs", "topk_indices")
SHARD_BYTES = 1 << 28  # 256 MB: the work an interruption can cost, and the memory a writer needs


def check_storage(logprobs_bits: int, shard_bytes: int) -> None:
    if logprobs_bits not in (8, 16):
        raise ValueError(f"logprobs_bits is {logprobs_bits}; it should be 8 or 16")
    if not 1 <= shard_bytes <= 1 << 31:  # Arrow counts a file's numbers in int32
        raise ValueError(f"shard_bytes is {shard_bytes}; it should be 1 to {1 << 31}")


def topk_features(top_k: int, classes: int, bits: int) -> dict[str, Any]:
    """Returns the features of the two columns of log-probabilities. Raises ValueError for another k than 1 to V."""
    if not 1 <= top_k <= classes:
        raise ValueError(f"top_k is {top_k}; it should be 1 to {classes}, the teacher's classes")
    return {"topk_logprobs": TopkLogprobs(top_k, bits), "topk_indices": TopkIndices(top_k, classes)}


def begin(work: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a new run. Raises ValueError if `work` holds an interrupted run of something else."""
    path = work / MANIFEST
    if not path.exists():
        write_whole(path, json.dumps(manifest, indent=2) + "\n")
    found = read_json(path)
    if different := [name for name, value in manifest.items() if found.get(name) != value]:
        raise ValueError(
            f"{work} holds an interrupted run with another {', '.join(different)}; pass overwrite=True to drop it"
        )


def write_shard(work: Path, number: int, batch: Any) -> None:
    """Writes a shard (pyarrow.RecordBatch), and then the file that describes it."""
    path = work / f"{number:05}.arrow"
    write_arrow(path, batch.schema, [batch])
    write_whole(entry(work, number), json.dumps({**file_identity(path), "rows": batch.num_rows}))


def finish(work: Path, manifest: Mapping[str, Any], shards: int) -> None:
    """Writes the manifest with the descriptions of all shards."""
    paths = [entry(work, number) for number in range(shards)]
    entries = [read_json(path) for path in paths]
    write_whole(work / MANIFEST, json.dumps({**manifest, "shards": entries}, indent=2) + "\n")


def entry(work: Path, number: int) -> Path:
    """Returns the path of the file that describes a shard. It exists once the shard is whole."""
    return work / f"{number:05}.json"


def drop_entries(output: Path, shards: int) -> None:
    """Deletes the files that describe shards: the manifest of a whole cache has their content."""
    for number in range(shards):
        entry(output, number).unlink()


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Returns where each row begins among all tokens, and last where the last row ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def file_identity(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def token_ids(tokenizer: Any) -> int:
    """Returns the number of token ids: the highest in the vocabulary, plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    tokens = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return {"tokens": len(tokens), "sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()}
