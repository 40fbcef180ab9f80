import pytest
from torch import Tensor

import fastdistill
from bench import cost, eager, measure, peers

SHAPES = [  # rows, vocabulary
    (32, 2),  # a classifier's batch
    (1024, 30522),  # BERT
    pytest.param(4096, 127, marks=pytest.mark.full),
    pytest.param(2048, 32000, marks=pytest.mark.full),  # Llama 2
    pytest.param(512, 128256, marks=pytest.mark.full),  # Llama 3
    pytest.param(512, 151936, marks=pytest.mark.full),  # Qwen
    pytest.param(512, 262144, marks=pytest.mark.full),  # Gemma 3
]
GPU = [  # what goals are given for
    pytest.param(8192, vocabulary, marks=[pytest.mark.full, pytest.mark.goal])
    for vocabulary in (8192, 16384, 32000, 131072, 262144)
]
LISTED = [(1024, 30522, 64), *(pytest.param(512, v, 64, marks=pytest.mark.full) for v in (128256, 262144))]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("rows,vocabulary", SHAPES + GPU * (measure.DEVICE.type == "cuda"))
@pytest.mark.parametrize("op", eager.LOGITS_LOSSES)
def bench_logits_loss(measured, op, rows, vocabulary, direction):
    loss = eager.LOGITS_LOSSES[op]

    def inputs() -> list[Tensor]:
        return [measure.randn(rows, vocabulary, scale=2, needs_grad=True), measure.randn(rows, vocabulary, scale=2)]

    def exact(student: Tensor, teacher: Tensor) -> list[Tensor]:
        value, [d_student], _ = measure.in_blocks(
            lambda s, t: loss(s, t) * (len(s) / rows), [student, teacher], [], max(1 << 24, vocabulary) // vocabulary
        )
        return [value, d_student]

    model = cost.logits(op, rows, vocabulary, measure.DTYPE)
    case = measure.Case(op, {"rows": rows, "vocabulary": vocabulary}, model.shape, inputs, exact, model)
    usual = measure.usual(loss, eager.MATRICES[op] * rows * vocabulary * 4)
    ours = measure.ours(getattr(fastdistill, op), on_logits=True)
    measured(case, [*ours, *usual, *peers.PEERS.get(op, [])], direction)


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
@pytest.mark.parametrize("rows,vocabulary,k", LISTED)
def bench_topk_soft_cross_entropy(measured, rows, vocabulary, k, direction):
    def inputs() -> list[Tensor]:
        teacher = measure.randn(rows, vocabulary, scale=2).float().log_softmax(-1)
        return [measure.randn(rows, vocabulary, scale=2, needs_grad=True), *teacher.topk(k)]

    def exact(student: Tensor, values: Tensor, indices: Tensor) -> list[Tensor]:
        count = max(1 << 24, vocabulary) // vocabulary
        starts = iter(range(0, rows, count))

        def loss(s: Tensor, v: Tensor) -> Tensor:
            start = next(starts)
            return eager.topk_soft_cross_entropy(s, v, indices[start : start + count]) * (len(s) / rows)

        value, [d_student], _ = measure.in_blocks(loss, [student, values], [], count)
        return [value, d_student]

    sizes = {"rows": rows, "vocabulary": vocabulary, "k": k}
    model = cost.topk(rows, vocabulary, k, measure.DTYPE)
    case = measure.Case("topk_soft_cross_entropy", sizes, model.shape, inputs, exact, model)
    usual = measure.usual(eager.topk_soft_cross_entropy, 4 * rows * vocabulary * 4)
    measured(case, [*measure.ours(fastdistill.topk_soft_cross_entropy), *usual], direction)
