import pytest
import torch

import fastdistill
from bench import cost, eager, measure

SHAPES = [(32, 2), (4096, 3), (4096, 127), (2048, 30522), (512, 128256)]


@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
@pytest.mark.parametrize("rows,vocabulary", SHAPES)
@pytest.mark.parametrize("op", eager.LOGITS_LOSSES)
def bench_logits_loss(benchmark, op, rows, vocabulary, implementation):
    student = torch.randn(rows, vocabulary, requires_grad=True)
    teacher = torch.randn(rows, vocabulary)
    function = getattr(fastdistill if implementation == "fastdistill" else eager, op)
    shape = f"{rows} rows, V {vocabulary}"
    measure.record(
        benchmark, op, shape, implementation, lambda: function(student, teacher), [student],
        cost.logits(op, rows, vocabulary, student.dtype),
    )  # fmt: skip
