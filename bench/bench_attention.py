import pytest
import torch

import fastdistill
from bench import cost, eager, measure

HEADS, STUDENT_DIM, TEACHER_DIM = 12, 26, 64  # TinyBERT-4 from BERT-base
EAGER_LIMIT = 4096  # beyond it the score matrices alone take tens of GiB


def _inputs(batch: int, length: int) -> list[torch.Tensor]:
    student = [torch.randn(batch, HEADS, length, STUDENT_DIM, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(batch, HEADS, length, TEACHER_DIM) for _ in range(2)]
    return [*student, *teacher]


def _cases(shapes: list[tuple[int, int]]) -> list[tuple[int, int, str]]:
    return [
        (batch, length, implementation)
        for batch, length in shapes
        for implementation in measure.IMPLEMENTATIONS
        if implementation == "fastdistill" or length <= EAGER_LIMIT
    ]


def _record(benchmark, op, batch, length, implementation, **options):
    inputs = _inputs(batch, length)
    function = getattr(fastdistill if implementation == "fastdistill" else eager, op)
    measure.record(
        benchmark,
        op + (" causal" if options else ""),
        f"{batch} x {HEADS} heads x {length}, d {STUDENT_DIM} / {TEACHER_DIM}",
        implementation,
        lambda: function(*inputs, **options),
        inputs[:2],
        getattr(cost, op)(batch, HEADS, length, STUDENT_DIM, TEACHER_DIM, inputs[0].dtype),
    )


@pytest.mark.parametrize(
    "batch,length,implementation", _cases([(32, 128), (8, 512), (1, 2048), (1, 4096), (1, 8192), (1, 16384)])
)
def bench_attention_mse(benchmark, batch, length, implementation):
    _record(benchmark, "attention_mse", batch, length, implementation)


@pytest.mark.parametrize("batch,length,implementation", _cases([(8, 512), (1, 4096), (1, 16384)]))
def bench_attention_mse_causal(benchmark, batch, length, implementation):
    _record(benchmark, "attention_mse", batch, length, implementation, is_causal=True)


@pytest.mark.parametrize("batch,length,implementation", _cases([(8, 512), (1, 2048), (1, 4096)]))
def bench_attention_kl(benchmark, batch, length, implementation):
    _record(benchmark, "attention_kl", batch, length, implementation)
