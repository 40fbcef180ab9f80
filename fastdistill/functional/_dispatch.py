"""Which backend a call takes and why, autocast, and the mean over counted items."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor

from .._checks import Backend
from ..ops._common import mean as mean

BACKENDS = tuple(name for name in get_args(Backend) if name != "auto")

# find_spec of a top-level name imports nothing. Importing fastdistill must not import Triton.
_TRITON_INSTALLED = find_spec("triton") is not None
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")  # Triton's own


def pick_backend(
    backend: Backend, device: torch.device, logits: tuple[torch.dtype, ...] = (), kind: str = "kl_div"
) -> Backend:
    """Returns the backend a call takes: `backend` itself, or for "auto" the best that can run on `device`.

    Args:
        backend: what the caller asked for.
        device: where the student's tensors are.
        logits: the dtypes of both sides' logits, for a loss on logits; csrc/ has kernels for these alone.
        kind: the soft loss on these logits, `RowOptions.kind`.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    if backend == "auto":
        if logits and device.type == "cuda" and no_cuda(device, logits, kind, automatic=True) is None:
            return "cuda"
        return "triton" if device.type == "cuda" and no_triton(device) is None else "torch"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}; on {device.type} it should be 'auto', 'reference', 'torch', 'triton' or 'cuda'"
        )
    reason = no_triton(device) if backend == "triton" else None
    if backend == "cuda":
        reason = no_cuda(device, logits, kind)
    if reason is not None:
        raise ValueError(f"backend is {backend!r}, but {reason}; use backend='auto' or 'torch'")
    return backend


def no_cuda(
    device: torch.device, logits: tuple[torch.dtype, ...], kind: str = "kl_div", automatic: bool = False
) -> str | None:
    """Returns why the kernels of csrc/ cannot run on logits of these dtypes on `device`, or why "auto" does not take
    them. Returns None if they can run."""
    if not logits:
        return "csrc has kernels for the losses on logits only"

    from .. import cuda  # not at the top: `python -m fastdistill.cuda` would find itself imported already

    if kind not in cuda.KINDS:
        return f"csrc has no kernel for {kind}"
    if len(set(logits)) > 1 or logits[0] not in cuda.DTYPES:
        return f"its logits are float32, float16 or bfloat16, both alike, and not {' and '.join(map(str, logits))}"
    if automatic:
        return "no measurement has shown yet that it is faster than Triton's kernels"
    return cuda.unavailable(device)


# Dynamo cannot trace the file lookup. torch.compiler.assume_constant_result does the same but imports the compiler.
no_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_triton(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on `device`, or None if they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install 'fastdistill[triton]')"
    if device.type == "cpu":
        if _TRITON_INTERPRETS:
            return None
        return "on a CPU its kernels run only in Triton's interpreter (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda":
        return f"its kernels run on NVIDIA and AMD GPUs, not on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts the operands of a matrix product as autocast casts those of nn.Linear; no change without autocast."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
