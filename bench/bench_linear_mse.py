import pytest
from torch import Tensor
from torch.nn import functional as F

import fastdistill
from bench import cost, eager, measure

SHAPES = [  # tokens, student_dim, teacher_dim
    (16384, 312, 768),  # TinyBERT-4 from BERT-base
    (4096, 768, 768),  # TinyBERT-6
    pytest.param(4096, 312, 768, marks=pytest.mark.full),
    pytest.param(32768, 312, 768, marks=[pytest.mark.full, pytest.mark.goal]),
    pytest.param(65536, 312, 768, marks=pytest.mark.full),
    pytest.param(16384, 768, 1024, marks=pytest.mark.full),
    pytest.param(8192, 2048, 4096, marks=pytest.mark.full),
]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("tokens,student_dim,teacher_dim", SHAPES)
def bench_linear_mse(measured, tokens, student_dim, teacher_dim, direction):
    def inputs() -> list[Tensor]:
        return [
            measure.randn(tokens, student_dim, needs_grad=True),
            measure.randn(teacher_dim, student_dim, scale=student_dim**-0.5, needs_grad=True),
            measure.randn(teacher_dim, scale=0.1, needs_grad=True),
            measure.randn(tokens, teacher_dim),
        ]

    def exact(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> list[Tensor]:
        value, [d_student], [d_weight, d_bias] = measure.in_blocks(
            lambda s, t, w, b: F.mse_loss(F.linear(s, w, b), t, reduction="sum") / teacher.numel(),
            [student, teacher], [weight, bias], 4096,
        )  # fmt: skip
        return [value, d_student, d_weight, d_bias]

    sizes = {"tokens": tokens, "student_dim": student_dim, "teacher_dim": teacher_dim}
    model = cost.linear_mse(*sizes.values(), measure.DTYPE)
    case = measure.Case("linear_mse", sizes, model.shape, inputs, exact, model)
    ours = measure.ours(lambda student, weight, bias, teacher, **how: fastdistill.linear_mse(
        student, weight, teacher, bias, **how
    ))  # fmt: skip
    usual = measure.usual(
        lambda student, weight, bias, teacher: eager.linear_mse(student, weight, teacher, bias),
        4 * tokens * teacher_dim * measure.DTYPE.itemsize,
    )
    measured(case, [*ours, *usual], direction)
