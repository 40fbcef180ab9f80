from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastdistill
from bench import attention, cost, eager, measure

SHAPES = [  # batch, length, student_dim, teacher_dim
    (8, 512, 26, 64),
    (1, 2048, 26, 64),
    pytest.param(32, 128, 26, 64, marks=pytest.mark.full),
    pytest.param(32, 512, 26, 64, marks=pytest.mark.full),
    pytest.param(1, 4096, 64, 64, marks=pytest.mark.full),
    pytest.param(4, 4096, 64, 64, marks=pytest.mark.full),
    pytest.param(1, 16384, 64, 64, marks=pytest.mark.full),
]
CAUSAL = [(1, 2048, 64, 64), pytest.param(1, 16384, 64, 128, marks=pytest.mark.full)]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("batch,length,student_dim,teacher_dim", SHAPES)
def bench_attention_kl(measured, batch, length, student_dim, teacher_dim, direction):
    _measure(measured, batch, length, student_dim, teacher_dim, direction)


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("batch,length,student_dim,teacher_dim", CAUSAL)
def bench_attention_kl_causal(measured, batch, length, student_dim, teacher_dim, direction):
    _measure(measured, batch, length, student_dim, teacher_dim, direction, is_causal=True)


def _measure(measured, batch, length, student_dim, teacher_dim, direction, is_causal=False):
    sizes = (batch, attention.HEADS, length, student_dim, teacher_dim)
    case = attention.case(
        "attention_kl" + " causal" * is_causal, sizes, cost.attention_kl(*sizes, measure.DTYPE, causal=is_causal),
        partial(_exact, is_causal), batch * attention.HEADS * length,
    )  # fmt: skip
    memory = (10 if is_causal else 8) * attention.score_bytes(*sizes)
    usual = partial(eager.attention_kl, is_causal=is_causal)
    measured(
        case,
        [*measure.ours(fastdistill.attention_kl, is_causal=is_causal), *measure.usual(usual, memory)],
        direction,
    )


def _exact(is_causal: bool, first: int, *heads: Tensor) -> Tensor:
    """Returns the sum of KL(teacher || student) over a block of queries, from query `first` on."""
    student_query, student_key, teacher_query, teacher_key = heads
    student = student_query @ student_key.mT * student_query.shape[-1] ** -0.5
    teacher = teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    if is_causal:
        hidden = student.new_ones(student.shape, dtype=torch.bool).triu(first + 1)
        student, teacher = student.masked_fill(hidden, -1e300), teacher.masked_fill(hidden, -1e300)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
