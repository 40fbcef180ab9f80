from functools import partial

import pytest
from torch import Tensor

import fastdistill
from bench import attention, cost, eager, measure

SHAPES = [  # batch, length, student_dim, teacher_dim
    pytest.param(32, 128, 26, 64, marks=pytest.mark.goal),  # TinyBERT-4 from BERT-base
    (8, 512, 26, 64),
    (1, 2048, 26, 64),
    (1, 4096, 26, 64),
    pytest.param(32, 512, 26, 64, marks=[pytest.mark.full, pytest.mark.goal]),
    pytest.param(4, 4096, 26, 64, marks=[pytest.mark.full, pytest.mark.goal]),
    pytest.param(1, 16384, 26, 64, marks=pytest.mark.full),
    pytest.param(1, 65536, 26, 64, marks=pytest.mark.full),
    pytest.param(32, 128, 64, 64, marks=pytest.mark.full),  # TinyBERT-6
    pytest.param(8, 512, 64, 64, marks=pytest.mark.full),
    pytest.param(1, 4096, 64, 64, marks=pytest.mark.full),
]
CAUSAL = [
    (1, 4096, 26, 64),
    pytest.param(8, 512, 26, 64, marks=pytest.mark.full),
    pytest.param(1, 16384, 26, 64, marks=pytest.mark.full),
    pytest.param(1, 65536, 64, 128, marks=pytest.mark.full),
]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("batch,length,student_dim,teacher_dim", SHAPES)
def bench_attention_mse(measured, batch, length, student_dim, teacher_dim, direction):
    _measure(measured, batch, length, student_dim, teacher_dim, direction)


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("batch,length,student_dim,teacher_dim", CAUSAL)
def bench_attention_mse_causal(measured, batch, length, student_dim, teacher_dim, direction):
    _measure(measured, batch, length, student_dim, teacher_dim, direction, is_causal=True)


def _measure(measured, batch, length, student_dim, teacher_dim, direction, is_causal=False):
    usual = partial(eager.attention_mse, is_causal=is_causal)
    sizes = (batch, attention.HEADS, length, student_dim, teacher_dim)
    case = attention.case(
        "attention_mse" + " causal" * is_causal, sizes, cost.attention_mse(*sizes, measure.DTYPE),
        partial(_exact, is_causal), batch * attention.HEADS * length * ((length + 1) / 2 if is_causal else length),
    )  # fmt: skip
    memory = (7 if is_causal else 5) * attention.score_bytes(*sizes)
    measured(
        case,
        [*measure.ours(fastdistill.attention_mse, is_causal=is_causal), *measure.usual(usual, memory)],
        direction,
    )


def _exact(is_causal: bool, first: int, *heads: Tensor) -> Tensor:
    """Returns the sum of squares of a block of queries, from query `first` on."""
    student_query, student_key, teacher_query, teacher_key = heads
    difference = student_query @ student_key.mT * student_query.shape[-1] ** -0.5
    difference = difference - teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    if is_causal:
        difference = difference.tril(first)
    return difference.square().sum()
