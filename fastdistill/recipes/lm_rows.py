"""Reads and tokenises the rows of a language model: chat, prompt and completion, or plain text.

Files and data sets are read by `datasets`. TRL's SFTTrainer tokenises them: chat templates, which tokens have a label,
the length of a row, packing.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fastdistill.train.processes import main_first
from fastdistill.train.reading import is_full, reading

__all__ = ["READERS", "count_labels", "read_rows", "tokenize_rows"]

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
CHAT = ("messages", "conversations")  # the second has the keys from and value, which TRL renames
TOKENIZED = ("input_ids", "labels", "seq_lengths")
BESIDE = ("tools", "chat_template_kwargs")  # columns that TRL hands to the chat template


def read_rows(
    names: Sequence[str], *, config: str | None = None, split: str = "train", text: str = "text", flag: str = "dataset"
) -> Dataset:
    """Returns the rows of files, or of one data set: the folder that `save_to_disk` wrote, or a name on the hub.

    The columns are `messages`; `prompt` and `completion`; the column `text`; or `input_ids` with any `labels`. Lines of
    .txt files that are blank are left out. Raises ValueError for a row of another kind, with its number, and
    FileNotFoundError.
    """
    paths = [Path(name) for name in names]
    are_files = [path.is_file() or path.suffix in READERS for path in paths]
    if len(names) > 1 and not all(are_files):
        other = names[are_files.index(False)]
        raise ValueError(f"--{flag} is {' '.join(names)}; several should all be files, and {other} is none")
    if not names:
        raise ValueError(f"--{flag} is empty; it should be files or a data set")
    if all(are_files):
        if config is not None:
            raise ValueError(f"dataset_config is {config}; files have none: leave it out")
        check_split(split, flag, "files have no splits")
        parts = [(str(path), read_file(path)) for path in paths]
    else:
        parts = [(f"{names[0]}, {split}", read_dataset(names[0], config, split, flag))]
    columns = row_kind(parts[0][0], parts[0][1], text)
    parts = [(name, rows.select_columns([c for c in rows.column_names if c in columns])) for name, rows in parts]
    for name, rows in parts:
        check_rows(name, rows, columns, text)
    return concatenate_datasets([rows for _, rows in parts])


def check_split(split: str, flag: str, found: str) -> None:
    """Raises ValueError for a split that was asked for where there is but one: held-out rows would be trained on."""
    option = "eval-split" if flag == "eval-split" else "split"
    if split != "train" or option == "eval-split":
        raise ValueError(f"--{option} is {split}; {found}: leave it out, and pass held-out rows as --eval")


def read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: its name should end with {', '.join(READERS)}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    try:
        rows = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # a damaged Parquet file raises errors of many kinds
        cause = error.__cause__ or error
        if is_full(cause):
            raise cause from None
        raise ValueError(f"{path}: not {READERS[path.suffix]} ({cause})") from error
    if path.suffix == ".txt":
        rows = rows.filter(lambda line: not line.isspace() and line != "", input_columns="text")
    if not len(rows):
        raise ValueError(f"{path}: the file holds no text")
    return rows


def read_dataset(name: str, config: str | None, split: str, flag: str) -> Dataset:
    if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        with reading(name, "*.json", "*/*.json", "*.arrow", "*/*.arrow"):
            rows = load_from_disk(name)
            for part in rows.values() if isinstance(rows, DatasetDict) else [rows]:
                part.data.validate(full=True)  # Arrow trusts the offsets in a file
        if config is not None:
            raise ValueError(f"dataset_config is {config}; {name} is a folder that datasets saved, and has none")
        if not isinstance(rows, DatasetDict):
            check_split(split, flag, f"{name} holds one split")
            return rows
        if split not in rows:
            raise ValueError(f"{name}: there is no split {split!r}; it has {', '.join(rows)}")
        return rows[split]
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such file or folder")
    return load_dataset(name, config, split=split)


def row_kind(name: str, rows: Dataset, text: str) -> tuple[str, ...]:
    """Returns the columns of the rows that are read. Raises ValueError for columns that are no kind of row."""
    kinds: tuple[tuple[str, ...], ...] = (
        ("input_ids",),
        *((chat,) for chat in CHAT),
        ("prompt", "completion"),
        (text,),
    )
    for kind in kinds:
        if set(kind) <= set(rows.column_names):
            return (*kind, "labels") if kind == ("input_ids",) else (*kind, *BESIDE)
    raise ValueError(
        f"{name}: rows have {', '.join(rows.column_names)}; they should have messages, or prompt and completion, or "
        f"{text}"
    )


def check_rows(name: str, rows: Dataset, columns: Sequence[str], text: str) -> None:
    """Raises ValueError for the first row that has not the kind of the others, or holds something else."""
    required = [column for column in columns if column not in (*BESIDE, "labels")]
    if missing := [column for column in required if column not in rows.column_names]:
        raise ValueError(f"{name}: rows have no {missing[0]}, which the first file has; all should be of one kind")
    if required == ["input_ids"]:
        return
    for number, row in enumerate(rows, 1):
        for column in required:
            if fault := row_fault(row[column], column, is_chat=column in CHAT, is_text=column == text):
                raise ValueError(f"{name}: row {number}: {fault}")
        if len({isinstance(row[column], str) for column in required}) > 1:
            raise ValueError(f"{name}: row {number}: prompt and completion should both be text or both be messages")


def row_fault(value: Any, column: str, *, is_chat: bool, is_text: bool) -> str | None:
    """Says what is wrong with one value of a row; None if it is right."""
    if value is None:
        return f"no {column}, which other rows have; all rows should be of one kind"
    if isinstance(value, str) and not is_chat:
        return None
    if is_text or not isinstance(value, list):
        return f"{column} is {value!r:.40}; it should be {'a list of messages' if is_chat else 'text'}"
    if not value:
        return f"{column} is empty; it should hold a message"
    keys = ("from", "value") if column == "conversations" else ("role",)
    for message in value:
        if not isinstance(message, dict) or any(message.get(key) is None for key in keys):
            return f"{column} has a message without {' or '.join(keys)}: {message!r:.60}"
    return None


def tokenize_rows(
    rows: Dataset, tokenizer: Any, args: SFTConfig, *, packing: bool = False, flag: str = "dataset"
) -> Dataset:
    """Returns the rows as `input_ids` and `labels` (-100: does not count), as SFTTrainer makes them from `args`.

    Packed rows have `seq_lengths` as well. Raises ValueError if the tokenizer lacks what the rows need, if a row does
    not fit the chat template, or if no token counts.
    """
    first = rows[0]
    is_chat = any(isinstance(first.get(column), list) for column in (*CHAT, "prompt"))
    check_tokenizer(tokenizer, args, is_chat, is_read="input_ids" in first)
    if args.assistant_only_loss and not is_chat:
        raise ValueError("--assistant-only is for chat; these rows hold text: leave it out, or use --completion-only")
    if args.completion_only_loss and "prompt" not in first:
        raise ValueError("--completion-only is for rows with a prompt and a completion; for chat use --assistant-only")
    # SFTTrainer prepares its data when it is made, for any model with this vocabulary.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, args = LlamaForCausalLM(config), copy.copy(args)
    args.packing, args.eval_strategy = packing, "no"
    try:
        with tempfile.TemporaryDirectory() as args.output_dir:  # a trainer makes the folder
            found = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train_dataset
    except (TemplateError, RuntimeError) as error:
        raise ValueError(f"--{flag}: {template_fault(rows, tokenizer) or error}") from error
    if not len(found) or not count_labels(found):
        raise ValueError(
            f"--{flag}: no token counts: prompts fill all {args.max_length} tokens of their rows, or rows have one "
            "token alone; use a larger --max-length"
        )
    return found.select_columns([name for name in found.column_names if name in TOKENIZED])


def check_tokenizer(tokenizer: Any, args: SFTConfig, is_chat: bool, is_read: bool) -> None:
    template = args.chat_template_path
    if template is not None and not Path(template).is_file():
        raise ValueError(f"--chat_template_path is {template}; it should be a file that ends with .jinja")
    if template is not None:
        with reading(template):
            Path(template).read_text(encoding="utf-8")
    if is_chat and template is None and not tokenizer.chat_template:
        raise ValueError(
            "the rows are messages, and the teacher's tokenizer has no chat template: pass --chat_template_path with a "
            "file that ends with .jinja"
        )
    if not is_chat and not is_read and args.eos_token is None and tokenizer.eos_token is None:
        raise ValueError("the teacher's tokenizer has no token for the end of a text: pass --eos_token")


def template_fault(rows: Dataset, tokenizer: Any) -> str | None:
    """Returns the first row that the chat template refuses, and what it says."""
    for number, row in enumerate(rows, 1):
        messages = row.get("messages") or (row.get("prompt") or []) + (row.get("completion") or [])
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise anything
            return f"row {number} does not fit the chat template ({error})"
    return None


def count_labels(rows: Dataset) -> int:
    """Counts the labels that are learned. The first token of a row has no predecessor that could predict it."""
    total = 0
    columns = [name for name in ("labels", "seq_lengths") if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks()
        counts = labels.flatten().to_numpy(zero_copy_only=False) != -100
        lengths = (
            batch["seq_lengths"].combine_chunks().flatten() if "seq_lengths" in columns else labels.value_lengths()
        )
        ends = np.cumsum(lengths.to_numpy(zero_copy_only=False))
        starts = np.concatenate([[0], ends[:-1]])
        total += int(counts.sum() - counts[starts[starts < ends]].sum())
    return total


def read_and_tokenize(
    names: Sequence[str] | None,
    tokenizer: Any,
    args: SFTConfig,
    *,
    packing: bool = False,
    flag: str = "dataset",
    **how: Any,
) -> Dataset:
    """Calls `read_rows` and `tokenize_rows`."""
    rows = main_first(lambda: read_rows(names or [], text=args.dataset_text_field, flag=flag, **how))
    return tokenize_rows(rows, tokenizer, args, packing=packing, flag=flag)
