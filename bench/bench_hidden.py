import pytest
import torch

import fastdistill
from bench import cost, eager, measure

SHAPES = [(16384, 312, 768), (4096, 768, 768), (65536, 312, 768)]


@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens,student_dim,teacher_dim", SHAPES)
def bench_linear_mse(benchmark, tokens, student_dim, teacher_dim, implementation):
    student = torch.randn(tokens, student_dim, requires_grad=True)
    weight = torch.randn(teacher_dim, student_dim).mul_(student_dim**-0.5).requires_grad_()
    bias = torch.zeros(teacher_dim, requires_grad=True)
    teacher = torch.randn(tokens, teacher_dim)
    function = fastdistill.linear_mse if implementation == "fastdistill" else eager.linear_mse
    measure.record(
        benchmark,
        "linear_mse",
        f"{tokens} tokens, {student_dim} to {teacher_dim}",
        implementation,
        lambda: function(student, weight, teacher, bias),
        [student, weight, bias],
        cost.linear_mse(tokens, student_dim, teacher_dim, student.dtype),
    )
