"""Reads the files that users bring. A file that cannot be read is a ValueError or an OSError with its name.

Libraries raise errors of many kinds for a damaged file, often without its name: SafetensorError, UnpicklingError,
KeyError, pyarrow's own. `reading` goes around the call that reads, and around nothing else: a bug of ours should stay a
traceback. No code in a file runs.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json",
           "generation_config.json")  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "vocab.txt", "merges.txt", "*.jinja")  # fmt: skip

UNKNOWN = "\U00013000"  # a hieroglyph: a vocabulary without a token for unknown text fails with it, before any work


@contextmanager
def reading(path: str | Path, *patterns: str) -> Iterator[None]:
    """Turns an error in the block into a ValueError, or an OSError where it was one, that names the file.

    Args:
        path: what the block reads: a file; a folder; or a name on the hub, whose OSErrors say enough.
        patterns: other files in that folder, or beside that file, that the block reads. The first damaged one is named;
            `path`, where these are whole.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not Path(path).exists():
            raise
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        found = ((file, fault(file)) for pattern in patterns for file in sorted(folder.glob(pattern)))
        file, why = next((x for x in found if x[1] is not None), (path, describe(error)))
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{file}: cannot be read ({why})") from error


def is_full(error: BaseException) -> bool:
    """Returns whether an error is that of a full disk, a quota, or a limit on the size of files."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe(error: BaseException) -> str:
    """Returns an error's message on one line; with its kind, where the message may say too little."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}".rstrip(": ")


def fault(path: Path) -> str | None:
    """Returns why a file of a checkpoint cannot be read; None if it can."""
    try:
        if path.name == "tokenizer.json":
            Tokenizer.from_file(str(path))
        elif path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".bin", ".pt", ".pth"):
            read_pickle(path)
        elif path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file:
                pa.ipc.open_stream(file).read_all().validate(full=True)
        else:
            path.read_text(encoding="utf-8")
    except Exception as error:
        return describe(error).removeprefix(f"{path}: ")
    return None


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ValueError naming the file if it holds anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def read_pickle(path: str | Path) -> Any:
    """Returns what `torch.save` wrote: tensors and plain values on the CPU. Raises ValueError naming the file."""
    try:
        with safe_globals():  # NumPy's arrays, which the states of random generators hold
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a damaged file raises many kinds of error, OSErrors without its name too
        raise ValueError(f"{path}: damaged, or holds more than tensors, which is not read") from error


def check_finite(path: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError naming the first weights that hold NaN or infinity, as those of a damaged file may."""
    for name, x in weights:
        if x.is_meta or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            continue
        if not x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite():
            raise ValueError(f"{path}: {name} holds NaN, infinity or huge numbers; copy the checkpoint again")
