import pytest
import torch
from torch.nn import functional as F

import fastdistill
from bench import cost, eager, measure

SHAPES = [(2048, 312, 768, 30522), (512, 1024, 1024, 128256)]


@pytest.mark.parametrize("implementation", measure.IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens,student_dim,teacher_dim,vocabulary", SHAPES)
@pytest.mark.parametrize("op", eager.LOGITS_LOSSES)
def bench_linear_logits_loss(benchmark, op, tokens, student_dim, teacher_dim, vocabulary, implementation):
    student = torch.randn(tokens, student_dim, requires_grad=True)
    student_weight = torch.randn(vocabulary, student_dim).mul_(student_dim**-0.5).requires_grad_()
    teacher = torch.randn(tokens, teacher_dim)
    teacher_weight = torch.randn(vocabulary, teacher_dim).mul_(teacher_dim**-0.5)

    def ours() -> torch.Tensor:
        return getattr(fastdistill, f"linear_{op}")(student, student_weight, teacher, teacher_weight)

    def usual() -> torch.Tensor:
        return eager.LOGITS_LOSSES[op](F.linear(student, student_weight), F.linear(teacher, teacher_weight))

    measure.record(
        benchmark,
        f"linear_{op}",
        f"{tokens} tokens, {student_dim} / {teacher_dim}, V {vocabulary}",
        implementation,
        ours if implementation == "fastdistill" else usual,
        [student, student_weight],
        cost.linear_logits(op, tokens, student_dim, teacher_dim, vocabulary, student.dtype),
    )
