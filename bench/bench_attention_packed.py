"""Packed sequences and windows of both attention losses, against a dense mask of the same pairs: in our op, and eager.

Peers that take packed sequences compute attention, not a loss on its scores.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastdistill
from bench import attention, cost, eager, measure

OPS = ("attention_mse", "attention_kl")
PACKED = [  # sequences of a length, in one row; under a causal mask or not
    (4, 512, False),
    pytest.param(16, 512, False, marks=pytest.mark.goal),
    (2, 1024, True),
    pytest.param(4, 4096, True, marks=pytest.mark.full),
]
WINDOWED = [(4096, 256), pytest.param(16384, 256, marks=pytest.mark.full)]  # length, keys that each query may meet
DIM = 64

Allowed = Callable[[Tensor, Tensor], Tensor]  # positions of queries and keys, which broadcast, to the allowed pairs


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("sequences,length,is_causal", PACKED)
@pytest.mark.parametrize("op", OPS)
def bench_attention_packed(measured, op, sequences, length, is_causal, direction):
    tokens = sequences * length

    def allowed(queries, keys):
        return (queries // length == keys // length) & ((keys <= queries) | (not is_causal))

    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=measure.DEVICE)
    counts = cost.attention_packed(op, sequences, attention.HEADS, length, DIM, DIM, measure.DTYPE, causal=is_causal)
    pairs = sequences * length * (length + 1) // 2 if is_causal else tokens * length
    _measure(measured, op, direction, tokens, counts, allowed, pairs, cu_seqlens=starts, is_causal=is_causal)


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("length,width", WINDOWED)
@pytest.mark.parametrize("op", OPS)
def bench_attention_window(measured, op, length, width, direction):
    """Measures the causal window of Mistral and Gemma: each query meets itself and the keys before it."""
    counts = cost.attention_window(op, attention.HEADS, length, width, DIM, DIM, measure.DTYPE)
    _measure(
        measured, op, direction, length, counts, lambda queries, keys: (keys <= queries) & (keys > queries - width),
        cost.window_pairs(length, width), window=(width - 1, 0),
    )  # fmt: skip


def _measure(measured, op, direction, tokens, counts: cost.Cost, allowed: Allowed, pairs: int, **packing):
    """Measures `op` with `packing` beside dense masks; `pairs` are those of a head."""
    sizes = (1, attention.HEADS, tokens, DIM, DIM)
    position = torch.arange(tokens, device=measure.DEVICE)
    attn_mask = allowed(position[:, None], position)  # (L, S)
    loss, usual = getattr(fastdistill, op), getattr(eager, op)

    def exact(first: int, *heads: Tensor) -> Tensor:
        return _exact(op, attn_mask[first : first + len(heads[0])], *heads)

    is_mse = op == "attention_mse"
    case = attention.case(counts.op, sizes, counts, exact, attention.HEADS * (pairs if is_mse else tokens))
    memory = (6 if is_mse else 7) * attention.score_bytes(*sizes)
    dense = [
        measure.Implementation("dense attn_mask", lambda *inputs: loss(*inputs, attn_mask=attn_mask)),
        measure.Implementation("eager", lambda *inputs: usual(*inputs, attn_mask=attn_mask), memory=memory),
    ]
    measured(case, [*measure.ours(loss, **packing), *dense], direction)


def _exact(op: str, pairs: Tensor, *heads: Tensor) -> Tensor:
    """Returns the sum of the items of a block of queries, whose allowed `pairs` are (rows, S)."""
    student_query, student_key, teacher_query, teacher_key = heads
    student = student_query @ student_key.mT * student_query.shape[-1] ** -0.5
    teacher = teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    if op == "attention_mse":
        return (student - teacher).masked_fill(~pairs, 0).square().sum()
    student, teacher = (x.masked_fill(~pairs, -1e300).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="sum")
