"""Shared parts of the losses over classes: their options, elementary operations, and the cutting of rows into blocks.

The loss of a row is `soft_weight * soft + hard_weight * hard`. The soft part compares the student's softmax with the
teacher's logits (_divergence.py) or with the teacher's k most likely classes (_topk.py). The hard part is the
cross-entropy with a label. Both work on blocks of rows that stay in the cache, and compute a row's gradient together
with its loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowOptions(NamedTuple):
    """The options of a loss over classes, as the ops and the kernels' launchers take them: one value."""

    kind: str  # the soft loss: "soft_cross_entropy", "kl_div", "reverse_kl", "jsd" or "tvd"
    tail: str  # "": the teacher gives logits; "renormalize" or "bucket": a list of its most likely classes
    classes: int  # V; later columns are padding
    temperature: float
    beta: float  # "jsd": the mixture is m = beta p_t + (1 - beta) p_s
    teacher_kl: float  # "jsd": weight of KL(p_t || m)
    student_kl: float  # "jsd": weight of KL(p_s || m)
    soft_weight: float
    hard_weight: float
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float  # multiplies the student's logits, before the softcap
    teacher_scale: float
    backend: str  # "torch", "triton" or "cuda"


Index = tuple[int | slice, ...]
Target = tuple[Tensor, ...]  # the teacher of a block of n rows, (n, .) each; () where the soft loss has no weight

BUFFERS = 4  # scratch buffers of a block
SHORT = 32  # rows of fewer classes are short

# Bytes of a block's buffers. On the CPU they stay in the cache; on a GPU the cost of launches weighs more than memory.
CPU_BYTES, GPU_BYTES = 5 << 20, 1 << 28

LOG2E = math.log2(math.e)


def exponential(x: Tensor, out: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns exp(x / T), in `out`, which may be x."""
    if x.dtype == torch.float64:
        return torch.div(x, temperature, out=out).exp_()
    # ATen's exp2 is one vector loop: several times faster than its exp and softmax, and as accurate.
    return torch.mul(x, LOG2E / temperature, out=out).exp2_()


def exponents_(x: Tensor, temperature: float) -> float:
    """Scales x in place to the exponents that `power` takes; returns the number by which to multiply them for x / T."""
    if x.dtype == torch.float64:
        x /= temperature
        return 1.0
    x *= LOG2E / temperature
    return 1 / LOG2E


def power(exponents: Tensor, out: Tensor) -> Tensor:
    return torch.exp(exponents, out=out) if out.dtype == torch.float64 else torch.exp2(exponents, out=out)


def weigh_(value: Tensor, weight: Tensor) -> Tensor:  # (n, V), (n, V) -> (n, 1)
    """Multiplies `value` by `weight` in place, with 0 * inf = 0; returns the sums of the rows."""
    total = value.mul_(weight).sum(-1, keepdim=True)
    if may_be_infinite(total):
        total = value.masked_fill_(weight == 0, 0).sum(-1, keepdim=True)
    return total


def may_be_infinite(x: Tensor) -> bool:
    """Returns whether x may hold inf or NaN: always True on a device, where looking would be a host sync."""
    return x.device.type != "cpu" or not math.isfinite(x.sum())


def row_max(logits: Tensor) -> Tensor:  # (n, V) -> (n, 1)
    classes = logits.shape[1]
    whole = classes - classes % 32
    if whole == classes or not 32 < classes < 1024:
        return logits.amax(-1, keepdim=True)
    # On the CPU, amax handles the columns beyond a multiple of 32 one by one, which dominates the time of short rows.
    return torch.maximum(logits[:, :whole].amax(-1, keepdim=True), logits[:, -32:].amax(-1, keepdim=True))


def capped(logits: Tensor, softcap: float | None, buffer: Tensor | None, scale: float = 1.0) -> Tensor:
    """Copies logits into `buffer` in its dtype and applies the scale, then the softcap; both keep -inf.

    Without a buffer it returns the logits unchanged: they need no cast, no scale and no softcap.
    """
    if buffer is None:
        return logits
    if softcap is None:
        return buffer.copy_(logits) if scale == 1 else buffer.copy_(logits).mul_(scale)
    impossible = logits == -math.inf
    return buffer.copy_(logits).mul_(scale / softcap).tanh_().mul_(softcap).masked_fill_(impossible, -math.inf)


def row_blocks(shape: Sequence[int], limit: int, first: int = 0) -> Iterator[tuple[Index, slice]]:
    """Cuts rows that lie in dimensions of `shape` into blocks of at most `limit` consecutive rows.

    Yields a block's index in those dimensions and its range of row numbers. Logits like x[:, :-1] cannot be flattened
    without a copy of all of them; a block of them can.
    """
    outer, inner = shape[0], math.prod(shape[1:])
    if inner > limit:
        for i in range(outer):
            for index, rows in row_blocks(shape[1:], limit, first + i * inner):
                yield (i, *index), rows
    elif outer and inner:
        blocks = -(-outer // (limit // inner))
        step = -(-outer // blocks)  # even blocks
        for start in range(0, outer, step):
            stop = min(start + step, outer)
            yield (slice(start, stop),), slice(first + start * inner, first + stop * inner)


def rows_of_a_block(rows: int, classes: int, buffers: int, like: Tensor) -> int:
    """Returns how many rows fit in `buffers` buffers like `like`: at least four, and at least one a thread."""
    limit, least = GPU_BYTES, 4
    if like.device.type == "cpu":
        threads = torch.get_num_threads()
        limit, least = CPU_BYTES * max(threads // 2, 1), max(threads, 4)
    return max(min(rows, max(limit // (buffers * classes * like.itemsize), least)), 1)


def rows_at(logits: Tensor, index: Index, classes: int) -> Tensor:  # (*, >= V) -> (n, V)
    block = logits[index]
    if block.shape[-1] != classes:
        block = block[..., :classes]
    return block if block.dim() == 2 else block.reshape(-1, classes)


def at(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Returns the tensors as kernels read them: a mask like m[:, :1] and the gradient of a sum have other strides."""
    return [None if x is None else x.contiguous() for x in tensors]


def within(indices: Tensor, classes: int) -> bool:
    """Returns whether all are classes; a host sync on a device."""
    return indices.numel() == 0 or all(0 <= extreme.item() < classes for extreme in indices.aminmax())


def checked_indices(name: str, indices: Tensor, counted: Tensor | None, classes: int) -> Tensor:
    """Returns class numbers (N, k) to index with: int64, and 0 in rows that are masked out.

    Raises IndexError for numbers outside the classes, on the CPU only: on a device the check would be a host sync.
    """
    indices = indices.long()
    if counted is not None:
        indices = indices.where(counted.unsqueeze(-1), 0)
    if indices.device.type == "cpu" and indices.numel():
        for extreme in (x.item() for x in indices.aminmax()):
            if not 0 <= extreme < classes:
                raise IndexError(f"{name} holds {extreme}; it should hold classes, 0 to {classes - 1}")
    return indices


def checked_labels(labels: Tensor | None, counted: Tensor | None, classes: int) -> Tensor | None:  # (N) -> (N, 1)
    return None if labels is None else checked_indices("labels", labels.unsqueeze(-1), counted, classes)


def weigh(item_weights: Tensor, counted: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (*), (*)
    """Returns the weights, 0 for rows that are masked out, and which rows count."""
    weights = item_weights.detach().to(dtype)
    if counted is not None:
        weights = weights.where(counted, 0)
    return weights, weights != 0


def row_weights(weight: Tensor | None, counted: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # (N) -> (N, 1)
    """Returns the factors of the rows' gradients, 0 for rows that are masked out; None: all are 1."""
    if counted is None:
        return None if weight is None else weight.unsqueeze(-1)
    weight = counted.to(dtype) if weight is None else weight.masked_fill(~counted, 0)
    return weight.unsqueeze(-1)


def weigh_rows_(gradient: Tensor, weight: Tensor, counted: Tensor | None) -> None:  # (n, V), (n, 1), (n)
    """Multiplies the gradient by `weight` in place; rows that are masked out become 0 even if they hold NaN."""
    gradient *= weight
    if counted is not None and may_be_infinite(gradient):
        gradient.masked_fill_(~counted.unsqueeze(-1), 0)
