"""Runs csrc's kernels on the host, where each thread of a cluster is a coroutine (csrc/simulate.cpp).

`install` replaces the binary by the simulation, so that `backend="cuda"` runs on CPU tensors. `pytest --backend cuda`
then runs the contract's tests on it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdistill import cuda

POSSIBLE = cuda.nvcc() is not None and shutil.which("g++") is not None
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Rows(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("inner", "outer_stride", "inner_stride")]


class Call(ctypes.Structure):  # as in launch.h
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "student", "teacher", "labels", "counted", "weight", "expected", "loss", "gradient",
        )),
        ("student_rows", Rows), ("teacher_rows", Rows),
        *((name, ctypes.c_int64) for name in ("count", "width", "classes")),
        *((name, ctypes.c_float) for name in (
            "temperature", "beta", "teacher_kl", "student_kl", "soft_weight", "hard_weight", "student_scale",
            "teacher_scale", "student_softcap", "teacher_softcap",
        )),
    ]  # fmt: skip


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """Makes a file that the workers of a test run share, in the first worker that needs it."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


def compile_simulation(path: Path, sources: Path = cuda.SOURCES) -> None:
    include = Path(str(cuda.nvcc())).resolve().parent.parent / "include"
    if not (include / "cuda_bf16.h").exists():
        include = next(Path("/usr/local").glob("cuda*/include"))
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    command = ["g++", *flags, "-fPIC", "-shared", "-isystem", include, sources / "simulate.cpp", "-o", path]
    subprocess.run(command, check=True)


@functools.cache
def simulator() -> ctypes.CDLL:
    texts = [path.read_bytes() for path in sorted(cuda.SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    name = f"fastdistill-simulation-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}.so"
    return ctypes.CDLL(str(once(Path(tempfile.gettempdir()) / name, compile_simulation)))


def strides_of(simulator: ctypes.CDLL, x: Tensor) -> Rows | None:
    def array(values: tuple[int, ...]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    out = array((0, 0, 0))
    return Rows(*out) if simulator.two_strides(array(x.shape), array(x.stride()), x.dim(), out) else None


def plan(simulator: ctypes.CDLL, classes: int, size: int, aligned: bool = True) -> tuple[int, int]:
    """Returns the blocks and the threads of a block that hold a row; no blocks where no cluster can."""
    out = (ctypes.c_int * 2)()
    simulator.plan_of(ctypes.c_int64(classes), size, int(aligned), out)
    return out[0], out[1]


def _rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    counted: Tensor | None,
    weight: Tensor | None,
    expected: Tensor | None,
    loss: Tensor,
    gradient: Tensor | None,
    kind: int,
    classes: int,
    *numbers: float,  # as the rest of Call
) -> None:
    """Stands in for `torch.ops.fastdistill_cuda.rows` and repeats binding.cpp's checks of the arguments."""
    count = loss.numel()
    if count == 0:
        return
    library = simulator()
    assert student.dtype == teacher.dtype
    assert loss.dtype == torch.float32
    for x, dtype in ((labels, torch.int64), (counted, torch.bool), (weight, torch.float32), (expected, torch.float32)):
        assert x is None or (x.dtype == dtype and x.is_contiguous() and x.numel() == count)
    assert gradient is None or (gradient.is_contiguous() and gradient.dtype == student.dtype)
    student, teacher = (x if strides_of(library, x) else x.contiguous() for x in (student, teacher))
    call = Call(
        *(None if x is None else x.data_ptr() for x in (
            student, teacher, labels, counted, weight, expected, loss, gradient,
        )),
        strides_of(library, student), strides_of(library, teacher), count,
        0 if gradient is None else gradient.shape[-1], classes, *numbers,
    )  # fmt: skip
    blocks, threads = plan(library, classes, student.element_size(), aligned=False)
    if blocks == 0:
        raise RuntimeError(f"the row of {classes} classes is too long")
    library.simulate(ctypes.byref(call), DTYPES[student.dtype], kind, blocks, threads, False)


def install() -> None:
    """Makes `backend="cuda"` accept CPU tensors from now on. "auto" still does not choose it for them."""
    cuda.unavailable = lambda device: None
    cuda.library = lambda device: SimpleNamespace(rows=_rows)
