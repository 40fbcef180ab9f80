import pytest
from torch import Tensor
from torch.nn import functional as F

import fastdistill
from bench import cost, eager, measure, peers

GPU = measure.DEVICE.type == "cuda"
TOKENS = 8192 if GPU else 256  # on a CPU a call takes seconds
SHAPES = [  # tokens, student_dim, teacher_dim, vocabulary
    (1024, 312, 768, 30522),  # TinyBERT-4 from BERT-base
    pytest.param(8192 if GPU else 2048, 312, 768, 30522, marks=pytest.mark.full),
    pytest.param(8192 if GPU else 512, 1024, 1024, 128256, marks=pytest.mark.full),
    pytest.param(TOKENS, 2048, 4096, 32000, marks=pytest.mark.full),  # Llama 2
    pytest.param(TOKENS, 2048, 4096, 128256, marks=[pytest.mark.full, pytest.mark.goal]),  # Llama 3: 1B from 8B
    pytest.param(TOKENS, 4096, 4096, 128256, marks=pytest.mark.full),
    pytest.param(TOKENS, 2048, 4096, 151936, marks=pytest.mark.full),  # Qwen
    pytest.param(TOKENS, 2048, 4096, 262144, marks=pytest.mark.full),  # Gemma 3
][: None if GPU else 5]
OPS = ["linear_kl_div", "linear_jsd", "linear_soft_cross_entropy", pytest.param("linear_tvd", marks=pytest.mark.full)]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("tokens,student_dim,teacher_dim,vocabulary", SHAPES)
@pytest.mark.parametrize("op", OPS)
def bench_linear_logits_loss(measured, op, tokens, student_dim, teacher_dim, vocabulary, direction):
    loss = eager.LOGITS_LOSSES[op.removeprefix("linear_")]

    def inputs() -> list[Tensor]:
        return [  # logits of standard deviation 2
            measure.randn(tokens, student_dim, needs_grad=True),
            measure.randn(vocabulary, student_dim, scale=2 * student_dim**-0.5, needs_grad=True),
            measure.randn(tokens, teacher_dim),
            measure.randn(vocabulary, teacher_dim, scale=2 * teacher_dim**-0.5),
        ]

    def usual(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return loss(F.linear(student, weight), F.linear(teacher, teacher_weight))

    def exact(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> list[Tensor]:
        value, [d_student], [d_weight] = measure.in_blocks(
            lambda s, t, w, w_t: usual(s, w, t, w_t) * (len(s) / tokens),
            [student, teacher], [weight, teacher_weight], max(1 << 26, vocabulary) // vocabulary,
        )  # fmt: skip
        return [value, d_student, d_weight]

    sizes = {"tokens": tokens, "student_dim": student_dim, "teacher_dim": teacher_dim, "vocabulary": vocabulary}
    model = cost.linear_logits(op.removeprefix("linear_"), *sizes.values(), measure.DTYPE)
    weights = [vocabulary * dim for dim in (student_dim, student_dim, teacher_dim)]  # and the student's gradient
    held = (8 + measure.DTYPE.itemsize) * sum(weights)
    case = measure.Case(op, sizes, model.shape, inputs, exact, model, held)
    memory = eager.MATRICES[op.removeprefix("linear_")] * tokens * vocabulary * 4
    measured(
        case,
        [*measure.ours(getattr(fastdistill, op)), *measure.usual(usual, memory), *peers.PEERS.get(op, [])],
        direction,
    )
