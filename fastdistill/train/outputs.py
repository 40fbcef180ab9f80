"""Writes outputs whole or not at all: in `<output>.partial`, which is renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from fastdistill.train.processes import on_main, processes

WHOLE = "whole"  # the empty file that is written last to a checkpoint


def working_folder(output: str | Path) -> Path:
    output = Path(output)
    return output.with_name(output.name + ".partial")


def check(output: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raises FileExistsError if `output` or the folder of an interrupted run is not empty and neither flag is set."""
    output, work = Path(output), working_folder(output)
    if resume and overwrite:
        raise ValueError("resume and overwrite are both set; choose one")
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty; pass overwrite=True to replace it")
    if work.is_dir() and any(work.iterdir()) and not (resume or overwrite):
        raise FileExistsError(
            f"{work} holds an interrupted run; pass resume=True to continue it or overwrite=True to drop it"
        )


def claim(output: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Checks `output` and makes the folder to work in. With `resume` it keeps the one of an interrupted run."""
    check(output, resume=resume, overwrite=overwrite)
    work = working_folder(output)
    if work.exists() and not resume:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    return work


def replace(work: Path, output: Path) -> None:
    """Moves `work` to `output`, whose old content stays whole until then."""
    old = output.with_name(output.name + ".partial.old")  # a name that no user would choose
    if old.exists():
        shutil.rmtree(old)
    if output.exists():
        output.rename(old)
    work.rename(output)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()


@contextmanager
def whole_output(output: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Calls `claim` before the block and, unless it raises, `replace` after it, both on the main process."""
    on_main(lambda: claim(output, resume=resume, overwrite=overwrite))
    yield working_folder(output)
    processes().wait_for_everyone()
    on_main(lambda: replace(working_folder(output), Path(output)))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    work = working_folder(path)
    work.write_text(text, encoding="utf-8")
    work.replace(path)


def write_arrow(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Writes `batches` (pyarrow.RecordBatch) of one `schema` to an Arrow stream that appears whole or not at all."""
    partial = working_folder(path)
    with pa.ipc.new_stream(partial, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    partial.replace(path)


def last_checkpoint(work: Path) -> str | None:
    """Returns the newest checkpoint that is whole. A run may have been killed while it wrote a newer one."""
    return str(whole[-1]) if (whole := whole_checkpoints(work)) else None


def whole_checkpoints(work: Path) -> list[Path]:
    """Returns the whole checkpoints, oldest first."""
    whole = [path.parent for path in work.glob(f"checkpoint-*/{WHOLE}")]
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def drop_checkpoints(work: Path, keep: Collection[Path] = ()) -> None:
    for checkpoint in work.glob("checkpoint-*"):
        if checkpoint not in keep:
            shutil.rmtree(checkpoint)
