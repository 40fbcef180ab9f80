"""Builds and loads csrc/: ahead of time by `python -m fastdistill.cuda`, otherwise on first use.

A build ahead of time lies beside the sources. A build on first use goes to the user's cache, named by a hash of the
sources, the compiler and its flags: nothing is built twice, and a stale binary is never loaded. Importing this module
compiles and loads nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ops._rows import RowOptions

# Inside the package where it is installed, beside it in a checkout.
_INSIDE = Path(__file__).parent / "csrc"
SOURCES = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent / "csrc"
UNITS = ("rows.cu", "binding.cpp")
HEADERS = ("launch.h", "rows.h")

KINDS = ("soft_cross_entropy", "kl_div", "reverse_kl", "jsd", "tvd", "mixture")  # as in launch.h
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Architectures built ahead of time: machine code, and PTX (compute_90), which cards after Hopper compile on loading.
ARCHITECTURES = ("sm_90", "compute_90")

# The stable ABI of torch 2.10: one binary works with it and all later versions. -ftz flushes numbers below 1e-38 to 0.
FLAGS = (
    "-std=c++17", "-O3", "-ftz=true", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


@functools.cache  # every call of a loss asks; a failed build is not tried again
def unavailable(device: torch.device) -> str | None:
    """Returns why the kernels of csrc/ cannot run on `device`, or None. It builds and launches them to find out."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs, not on {'AMD' if device.type == 'cuda' else device.type}"
    if sys.platform != "linux":
        return f"its kernels are built for Linux, not for {sys.platform}"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"its kernels need compute capability 9.0, and {torch.cuda.get_device_name(device)} has less"
    if not prebuilt().exists() and nvcc() is None:
        return "it was not built ahead of time, and nvcc, which could build it, is neither in CUDA_HOME nor on the PATH"
    try:
        library(device)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        compiler = nvcc() or "nvcc"
        return f"it could not be built for {_architecture(device)} with {compiler}, or not be run: {_gist(error)}"
    return None


def rows(
    student: Tensor,  # (*, >= V)
    target: tuple[Tensor, ...],  # the teacher's logits (*, >= V); (): the soft loss has no weight
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    options: RowOptions,
    *,
    loss: Tensor,  # (N), float32
    gradient: Tensor | None = None,  # (*, >= V) contiguous; may be student itself
    weight: Tensor | None = None,  # (N), of each row's gradient; None: 1
    expected: Tensor | None = None,  # (N), the weights that `gradient` was written with before; None: it was not
) -> None:
    """Writes `loss`, and `gradient` if it is given. With `expected` it writes only the rows whose weight differs.

    Does what `fastdistill.kernels.logits.rows` does, without biases. Student and teacher have one dtype of `DTYPES`.
    """
    kind, soft_weight = options.kind, options.soft_weight
    if not target:  # KL of the student from itself: 0, and so is its gradient
        target, kind, soft_weight = (student,), "kl_div", 0.0
        options = options._replace(teacher_scale=options.student_scale, teacher_softcap=options.student_softcap)
    if kind == "jsd" and (1 - options.beta) * options.teacher_kl != options.beta * options.student_kl:
        kind = "mixture"
    library(student.device).rows(
        student, *target, None if labels is None else labels.long(), counted,
        None if weight is None else weight.float(), None if expected is None else expected.float(), loss, gradient,
        KINDS.index(kind), options.classes, options.temperature, options.beta, options.teacher_kl, options.student_kl,
        soft_weight, options.hard_weight, options.student_scale, options.teacher_scale,
        options.student_softcap or 0.0, options.teacher_softcap or 0.0,
    )  # fmt: skip


@functools.cache
def library(device: torch.device) -> Any:
    """Returns the ops of csrc/; builds them for the card at `device` if they are not built yet."""
    path = prebuilt()
    return _load(path if path.exists() else cached((_architecture(device),)), device)


def _load(path: Path, device: torch.device) -> Any:
    """Returns the ops of a binary. Raises RuntimeError where the driver is too old: only a launch shows it."""
    torch.ops.load_library(path)
    # Called through ctypes, the probe works while torch traces.
    probe = ctypes.CDLL(str(path)).fastdistill_probe
    probe.restype = ctypes.c_char_p
    with torch.cuda.device(device):  # unlike cudaSetDevice, it makes no context on the device that it returns to
        failure = probe()
    if failure:
        raise RuntimeError(f"a launch fails: {failure.decode()}")
    return getattr(torch.ops, path.stem)


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _gist(error: Exception) -> str:
    """Returns the line of a compiler's output that names the error."""
    first, *others = [line for line in map(str.strip, str(error).splitlines()) if line] or [type(error).__name__]
    telling = [line for line in others if "error" in line.lower() or "fatal" in line.lower()]
    return " ".join((telling or others or [first])[0].split())


@functools.cache
def prebuilt() -> Path:
    """Returns the path of a binary built ahead of time; the hash of the sources in its name rules out a stale one."""
    return SOURCES / f"fastdistill_cuda_{_digest()}.so"


def cached(architectures: Sequence[str]) -> Path:
    """Returns the binary for `architectures` in the user's cache; builds it if it is missing."""
    import fcntl  # absent on Windows, where the rest of this module works

    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistill"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f"others can write to {folder}, from which csrc's binary would be loaded; it should be yours, with mode "
            f"0700 (chmod 700 {folder}), or set XDG_CACHE_HOME to another folder"
        )
    path = folder / f"fastdistill_cuda_{_digest(version, *FLAGS, *architectures)}.so"
    if not path.exists():
        # A second process waits here and finds the binary built.
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                build(path, architectures)
    return path


# torch.utils.cpp_extension does not fit: it builds only with a torch that has CUDA, links libtorch_python and
# libtorch_cuda, which the stable ABI avoids, and a killed build leaves its lock behind, so later builds wait forever.
def build(path: Path, architectures: Sequence[str] = ARCHITECTURES, flags: Sequence[str] = ()) -> None:
    """Compiles csrc/ into `path` by an atomic rename: the file appears complete or not at all."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        built = Path(folder) / path.name
        command = [
            _compiler(), *FLAGS, *flags, f"-DLIBRARY={path.stem}",
            *(f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in architectures),
            "--threads", "0", f"-I{SOURCES}", "-isystem", str(torch_folder / "include"),
            *(str(SOURCES / unit) for unit in UNITS), "-shared", "-o", str(built), f"-L{torch_folder / 'lib'}",
            "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"csrc could not be built: {' '.join(command)}\n{run.stdout}{run.stderr}")
        os.replace(built, path)


def nvcc() -> str | None:
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    folders = os.pathsep.join(os.path.join(home, "bin") for home in homes)
    return shutil.which("nvcc", path=folders) or shutil.which("nvcc")


def _compiler() -> str:
    if found := nvcc():
        return found
    raise RuntimeError(
        "csrc cannot be built: nvcc is neither in CUDA_HOME nor on the PATH. Install the CUDA toolkit, or run "
        "`python -m fastdistill.cuda` on a machine that has it, or use backend='triton'"
    )


def _digest(*others: str) -> str:
    """Returns a hash of the sources, of `others` and of the machine type: a home folder may serve several."""
    texts = [(SOURCES / name).read_text() for name in (*UNITS, *HEADERS)]
    return hashlib.sha256("\0".join([*texts, *others, platform.machine()]).encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdistill.cuda", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="sm_90, sm_100, ...; compute_90 for PTX")
    arguments = parser.parse_args()
    try:
        build(prebuilt(), arguments.arch)
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(prebuilt())
    return 0


if __name__ == "__main__":
    sys.exit(main())
