"""Builds the cases of both attention losses: inputs, and the loss in float64, a few heads at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import measure
from bench.cost import Cost

HEADS = 12
QUERIES = 1024  # of a block
PAIRS = {"cpu": 1 << 28, "cuda": 1 << 34}  # pairs of query and key in the float64 loss, about 3 seconds' worth


def score_bytes(batch: int, heads: int, length: int, *dims: int) -> float:
    """Returns the bytes of one matrix of scores, all heads together."""
    return batch * heads * length * length * measure.DTYPE.itemsize


def case(op: str, sizes: tuple[int, ...], cost: Cost, loss: Callable[..., Tensor], items: float) -> measure.Case:
    """Returns a case for `loss(first, q_s, k_s, q_t, k_t)`, the sum over a block of one head's queries from `first` on.

    The mean of the whole divides by `items`.
    """
    batch, heads, length, student_dim, teacher_dim = sizes

    def inputs() -> list[Tensor]:
        student = [measure.randn(batch, heads, length, student_dim, needs_grad=True) for _ in range(2)]
        return [*student, *(measure.randn(batch, heads, length, teacher_dim) for _ in range(2))]

    def exact(*inputs: Tensor) -> list[Tensor | None]:
        """Computes as many heads as `PAIRS` allows: the loss if all, dQ of its first rows if one is too long."""
        pairs = PAIRS[measure.DEVICE.type]
        some = min(max(pairs // length**2, 1), batch * heads)
        rows = min(max(pairs // length, QUERIES), length)
        total, d_query, d_key = torch.zeros((), dtype=torch.float64, device=measure.DEVICE), [], []
        for head in range(some):
            q_s, k_s, q_t, k_t = (x.detach().flatten(0, 1)[head] for x in inputs)
            q_s, k_s = q_s[:rows].requires_grad_(), k_s.requires_grad_()
            first = iter(range(0, rows, QUERIES))
            part, [dq], [dk] = measure.in_blocks(
                lambda q_s, q_t, k_s, k_t, first=first: loss(next(first), q_s, k_s, q_t, k_t) / items,
                [q_s, q_t[:rows]], [k_s, k_t], QUERIES,
            )  # fmt: skip
            total, d_query, d_key = total + part, [*d_query, dq], [*d_key, dk]
        return [
            total if some == batch * heads else None,
            torch.stack(d_query),
            torch.stack(d_key) if rows == length else None,
        ]

    names = ("batch", "heads", "length", "student_dim", "teacher_dim")
    return measure.Case(op, dict(zip(names, sizes, strict=True)), cost.shape, inputs, exact, cost)
