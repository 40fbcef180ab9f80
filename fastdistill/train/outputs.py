"""Writes outputs whole or not at all: in `<output>.partial`, which is renamed at the end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from fastdistill.train.processes import on_main, processes
from fastdistill.train.reading import describe

WHOLE = "whole"  # the empty file that is written last to a checkpoint
# What `resume` needs of a working folder: checkpoints, files of caches and augmented rows, students of earlier stages.
RESUMABLE = (f"**/checkpoint-*/{WHOLE}", "[0-9]*.arrow", "*/config.json", "runs/*/config.json")
# Parts of the messages of errors in writing: of Rust (safetensors, tokenizers) and of torch.save.
WRITING = re.compile(r"os error \d+|PytorchStreamWriter|inline_container")


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
def claimed(output: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Calls `claim` on the main process. If the block fails, the folder keeps only what `resume` needs.

    The folder of an earlier run stays in any case: the block may refuse to continue it.
    """
    earlier = on_main(lambda: resume and working_folder(output).exists())
    work = on_main(lambda: claim(output, resume=resume, overwrite=overwrite))
    try:
        yield work
    except Exception:  # Ctrl-C and SIGTERM leave the folder as it is
        if processes().is_main_process:
            drop_unfinished(work, keep=earlier)
        raise


def drop_unfinished(work: Path, *, keep: bool) -> None:
    """Deletes checkpoints that are not whole, and, unless `keep`, a folder that holds nothing for `resume`."""
    for checkpoint in work.glob("**/checkpoint-*"):
        if not (checkpoint / WHOLE).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)
    if not keep and not any(next(work.glob(pattern), None) for pattern in RESUMABLE):
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def whole_output(output: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Does as `claimed` and, unless the block raises, calls `replace` after it."""
    with claimed(output, resume=resume, overwrite=overwrite) as work:
        yield work
        processes().wait_for_everyone()
        on_main(lambda: replace(work, Path(output)))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error in writing, of a full disk for example, into an OSError that names `path`.

    Libraries raise errors of many kinds there, and operating systems do not say which file is meant.
    """
    try:
        yield
    except Exception as error:
        is_named = "cannot be written" in str(error)  # by a block inside this one
        if is_named or not (isinstance(error, OSError) or WRITING.search(str(error))):
            raise
        what = describe(error) if isinstance(error, OSError) else f"the disk may be full: {error}"
        raise OSError(f"{getattr(error, 'filename', None) or path}: cannot be written ({what})") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write a file, which is moved to `path` if the block succeeds, and deleted if it fails."""
    work = working_folder(path)
    try:
        with writing(path):
            yield work
            work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8")


def write_arrow(path: Path, schema: Any, batches: Iterable[Any]) -> None:
    """Writes `batches` (pyarrow.RecordBatch) of one `schema` to an Arrow stream that appears whole or not at all."""
    with whole_file(path) as work, pa.ipc.new_stream(work, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


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
