"""Explains which backends "auto" takes."""

from __future__ import annotations

import torch

from . import attention, hidden, linear_logits, logits
from ._dispatch import no_cuda, no_triton, pick_backend


def explain_backends(device: torch.device) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns what backend "auto" takes on `device`: (backend, why, ops), one entry a reason."""
    from .. import cuda

    groups: dict[tuple[str, str], list[str]] = {}
    for op in (*hidden.__all__, *attention.__all__, *logits.__all__, *linear_logits.__all__):
        dtypes = (torch.bfloat16, torch.bfloat16) if op in cuda.KINDS else ()
        backend = pick_backend("auto", device, dtypes)
        reason = no_triton(device)
        why = "the fused kernel" if reason is None else f"the portable implementation: {reason}"
        if backend == "cuda":
            why = "the fused kernel on a cluster of blocks, for logits of one 16- or 32-bit dtype"
        elif dtypes and device.type == "cuda":
            why += f"; not cuda: {no_cuda(device, dtypes, automatic=True)}"
        groups.setdefault((backend, why), []).append(op)
    return [(backend, why, tuple(ops)) for (backend, why), ops in groups.items()]
