"""Holds what the tasks of `fastdistill.recipes.glue` and `fastdistill.recipes.token_tasks` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any


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
