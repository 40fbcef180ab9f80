"""Tests that need a GPU: sizes, streams, graphs. The contract's own tests run on a GPU as well (conftest.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import (
    ATTENTION_KL,
    ATTENTION_KL_CAUSAL,
    ATTENTION_MSE,
    ATTENTION_MSE_CAUSAL,
    LINEAR_LOGITS_OPS,
    LINEAR_MSE,
    LOGITS_OPS,
    TOPK_OPS,
    Op,
    attention,
    hidden,
    linear,
    logits,
    topk,
)
from _oracle import assert_same, cast, errors, evaluate
from torch import Tensor

import fastdistill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _on_the_card() -> Any:
    with torch.device("cuda"):
        yield


def real(op: Op, dtype: torch.dtype) -> dict[str, Any]:
    """Returns inputs with the sizes of real models, at which eager float64 still fits the GPU."""
    if op.name.startswith("attention"):
        inputs = attention(4, 12, 1024, 1024, 26, 64, 12, 12)
    elif op.name == "linear_mse":
        inputs = hidden((32768,), 312, 768)
    elif op.name.startswith("linear_"):
        inputs = linear((1500,), 32000, 312, 768)
    elif op.name.startswith("topk"):
        inputs = topk((1024,), 128256, 64)
    else:
        inputs = logits((1024,), 128256)
    return cast(inputs, dtype)


SIZED = [
    ATTENTION_MSE, ATTENTION_MSE_CAUSAL, ATTENTION_KL, ATTENTION_KL_CAUSAL, LINEAR_MSE, *LOGITS_OPS[:5], *TOPK_OPS,
    *LINEAR_LOGITS_OPS[:5],
]  # fmt: skip
KERNELS = ("triton", "cuda")  # the latter is csrc/: losses on logits only, skipped if it cannot be built
# The name "backend" is taken by the fixture of the contract's tests.
every_op = pytest.mark.parametrize(
    "op,kernels",
    [
        pytest.param(op, kernels, id=f"{op}-{kernels}")
        for op in SIZED
        for kernels in (KERNELS if op in LOGITS_OPS else KERNELS[:1])
    ],
)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_sizes(op: Op, kernels: str, dtype: torch.dtype) -> None:
    """The float64 reference runs on the GPU too, because the CPU would take minutes."""
    inputs = real(op, dtype)
    truth = evaluate(
        lambda **x: getattr(fastdistill, op.name)(**x, **op.options, backend="reference"),
        cast(inputs, torch.float64),
        op.learned,
    )
    textbook = errors(evaluate(op.textbook, inputs, op.learned, backend="triton"), truth)
    for name, found in errors(evaluate(op, inputs, op.learned, backend=kernels), truth).items():
        assert found < 2 * textbook[name] + 1e-5, f"{name}: error {found:.1e}, the textbook's {textbook[name]:.1e}"


def needs(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl_div", "jsd", "tvd"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_more_than_two_to_the_31_logits(name: str, kernels: str) -> None:
    """A wrong offset would miss the last rows."""
    needs(16)
    rows, classes = 17000, 131072
    student = torch.randn(rows, classes, dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(rows, classes, dtype=torch.bfloat16)
    loss = getattr(fastdistill, name)(student, teacher, reduction="sum", backend=kernels)
    (gradient,) = torch.autograd.grad(loss, student)
    last = {"student_logits": student.detach()[-3:].clone(), "teacher_logits": teacher[-3:].clone()}
    few = evaluate(getattr(fastdistill, name), last, ["student_logits"], reduction="sum", backend=kernels)
    assert torch.equal(gradient[-3:], few["student_logits"])


def test_more_than_two_to_the_31_numbers_of_queries_and_hidden_states() -> None:
    needs(24)
    query = torch.randn(17, 32, 65536, 64, dtype=torch.bfloat16).requires_grad_()  # 2.28e9
    key = torch.randn(17, 1, 128, 64, dtype=torch.bfloat16)
    arguments = (query, key, query.detach(), key)
    loss = fastdistill.attention_mse(*arguments, teacher_scale=0.5, reduction="sum", backend="triton")
    (gradient,) = torch.autograd.grad(loss, query)
    few = query.detach()[-1:].clone().requires_grad_()
    last = fastdistill.attention_mse(
        few, key[-1:], few.detach(), key[-1:], teacher_scale=0.5, reduction="sum", backend="triton"
    )
    torch.testing.assert_close(gradient[-1:], torch.autograd.grad(last, few)[0])
    del query, gradient, few, arguments, loss, last

    tokens = 2**31 // 768 + 1000
    student = torch.randn(tokens, 768, dtype=torch.bfloat16)
    teacher = torch.randn(tokens, 768, dtype=torch.bfloat16)
    weight = torch.randn(768, 768, dtype=torch.bfloat16) / 28
    per_token = fastdistill.linear_mse(student, weight, teacher, reduction="none", backend="triton")
    expected = fastdistill.linear_mse(student[-5:], weight, teacher[-5:], reduction="none", backend="torch")
    torch.testing.assert_close(per_token[-5:], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_tensor_cores_truncate_no_more_than_modelled(length: int, dtype: torch.dtype) -> None:
    """Sums of squares lose n * 2^-29.5 of themselves in n rows, and a loss at a mismatch of 0.01 twice that / 0.01^2
    at most (`SUMMED` in kernels/attention_mse.py). Printed with -s: what this card loses."""
    from fastdistill.kernels import attention_mse as kernels

    from fastdistill.ops._attention import Attention

    basis = torch.linalg.qr(torch.randn(64, 26))[0]
    student = [torch.randn(4, 12, length, 26) for _ in range(2)]
    teacher = [(x @ basis.T).to(dtype) for x in student]
    student = [(x + 0.01 * torch.randn_like(x)).to(dtype) for x in student]
    call = Attention(*student, *teacher, 1.0, 1.0, None, None, False, None)
    loss, _, _, query_gram, _ = kernels.loss(call, 1.0, None, None)
    truth = student[0].double().square().sum(2)
    bias = (query_gram.diagonal(dim1=2, dim2=3) / truth - 1).mean().item()
    joined = [torch.cat([s.double(), t.double()], 3) for s, t in zip(student, teacher, strict=True)]
    signs = torch.tensor([1.0] * 26 + [-1.0] * 64, dtype=torch.float64)
    gq, gk = (x.mT @ x for x in joined)
    error = (loss.double() / (signs[:, None] * signs * gq * gk).sum() - 1).item()
    model = min(length, kernels.SUMMED) * 2**-29.5
    print(f"{length} rows, {dtype}: sums {bias:+.2e} (model {-model:.2e}), loss {error:+.2e}")
    assert -1.5 * model < bias < 0.5 * model
    assert abs(error) < 2 * model / 0.01**2


def maybe_masked(op: Op, masked: bool) -> dict[str, Any]:
    inputs = op.make()
    return {**inputs, **op.some_masked(inputs)} if masked else inputs


@every_op
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graphs(op: Op, kernels: str, masked: bool) -> None:
    """A captured step is replayed on other values: it may have no host sync, and may not depend on values."""
    first, second = maybe_masked(op, masked), maybe_masked(op, masked)
    static = {name: x.clone() if isinstance(x, Tensor) else x for name, x in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(op, static, op.learned, backend=kernels)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = evaluate(op, static, op.learned, backend=kernels)
    for name, x in second.items():
        if isinstance(x, Tensor):
            static[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(outcome, evaluate(op, second, op.learned, backend=kernels))


def tinybert_step(student: Any, teacher: Any, objective: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the loss and the gradients of the student and the projections."""
    from fastdistill.train.capture import capturable, capture

    with capturable(student, teacher):
        states = capture(student, batch, hidden=tuple(objective.hidden), attention=tuple(objective.attention))
        with torch.no_grad():
            layers = set(objective.hidden.values()), set(objective.attention.values())
            targets = capture(teacher, batch, hidden=layers[0], attention=layers[1])
        losses = objective(
            states, targets, mask=batch["attention_mask"], num_items=objective.count(batch),
        )  # fmt: skip
        total = torch.stack([x.float() for x in losses.values()]).sum()
        learned = {f"{i}.{k}": p for i, m in enumerate((student, objective)) for k, p in m.named_parameters()}
        gradients = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    found = {name: x for name, x in zip(learned, gradients, strict=True) if x is not None}
    return {"value": total.detach(), **found}


def test_a_step_of_tinybert_in_a_cuda_graph() -> None:
    """Both models, all four losses and their gradients are captured once and replayed on another batch."""
    pytest.importorskip("transformers")
    from _tiny import batch, classifier

    from fastdistill.train.objective import Objective

    with torch.device("cpu"):  # the batches' generator is the CPU's
        student, teacher = classifier(2, 16), classifier(4, 32, seed=1)
        terms = ("embedding", "hidden", "attention", "prediction")
        objective = Objective(student.config, teacher.config, terms=terms)
        first, second = batch(rows=4, length=24), batch(rows=4, length=24)
        second = {"input_ids": second["input_ids"].flip(1), "attention_mask": second["attention_mask"].roll(1, 0)}
        for x in (first, second):  # without positions, the library reads the mask on the host to refuse left padding
            x["position_ids"] = torch.arange(24).repeat(4, 1)
    student, teacher, objective = (m.to("cuda", torch.bfloat16) for m in (student, teacher, objective))
    static, second = ({name: x.cuda() for name, x in b.items()} for b in (first, second))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            tinybert_step(student, teacher, objective, static)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = tinybert_step(student, teacher, objective, static)
    for name, x in second.items():
        static[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    expected = tinybert_step(student, teacher, objective, second)
    assert len(expected) > 10
    assert_same(outcome, expected, within=1e-2)  # SDPA's backward adds in any order


@every_op
def test_two_streams(op: Op, kernels: str) -> None:
    inputs = [op.make() for _ in range(2)]
    expected = [evaluate(op, x, op.learned, backend=kernels) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        outcomes = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outcomes.append(evaluate(op, x, op.learned, backend=kernels))
        torch.cuda.synchronize()
        for outcome, truth in zip(outcomes, expected, strict=True):
            assert_same(outcome, truth)


@every_op
@pytest.mark.parametrize("masked", [False, True])
def test_no_host_syncs(op: Op, kernels: str, masked: bool) -> None:
    """Neither forward nor backward has a host sync."""
    inputs = maybe_masked(op, masked)
    evaluate(op, inputs, op.learned, backend=kernels)
    leaves = {name: inputs[name].clone().requires_grad_() for name in op.learned}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(**{**inputs, **leaves}, backend=kernels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_are_counted_without_host_syncs() -> None:
    from fastdistill.train.terms import count_items

    batch = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    counts = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for more in ({}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
            counts.append(count_items({**batch, **more}))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [count.tolist() for count in counts] == [[3, 15, 75, 45, 15]] * 2


def test_training_steps_under_autocast() -> None:
    """Ten bfloat16 steps of a student with a projection and a head give the same curve on both backends."""

    def curve(backend: str) -> list[float]:
        torch.manual_seed(0)
        body, projection, head = (torch.nn.Linear(a, b) for a, b in ((64, 48), (48, 80), (48, 500)))
        x, h_t, z_t = torch.randn(256, 64), torch.randn(256, 80), 3 * torch.randn(256, 500)
        optimizer = torch.optim.Adam([*body.parameters(), *projection.parameters(), *head.parameters()], 1e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                h = torch.relu(body(x))
                loss = fastdistill.linear_mse(h, projection.weight, h_t, projection.bias, backend=backend)
                loss = loss + fastdistill.kl_div(head(h), z_t, temperature=2.0, backend=backend)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    torch.testing.assert_close(curve("triton"), curve("reference"), rtol=0.01, atol=0)


@every_op
def test_torch_compile(op: Op, kernels: str) -> None:
    inputs = op.make()
    compiled = torch.compile(op, fullgraph=True)
    outcome = evaluate(lambda **x: compiled(**x, backend=kernels), inputs, op.learned)
    assert_same(outcome, evaluate(op, inputs, op.learned, backend=kernels), within=1e-6)


SANITIZED = """
import sys
sys.path.insert(0, "tests")
import torch
torch.set_default_device("cuda")
import _cases, _oracle
op = next(op for op in _cases.OPS if str(op) == sys.argv[1])
inputs = op.make()
_oracle.evaluate(op, {**inputs, **op.some_masked(inputs)}, op.learned, backend=sys.argv[2])
torch.cuda.synchronize()
"""


@every_op
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(op: Op, kernels: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, str(op), kernels],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device, as in some virtual machines")
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


def peak(call: Callable[[], Any]) -> int:
    call()  # warm-up: libraries keep workspaces, cuBLAS 32 MiB
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_a_large_vocabulary() -> None:
    """The goal is at most 2 GiB beyond inputs and gradients for 8192 tokens and heads of 2048 and 4096 to 128256."""
    needs(12)
    narrow: dict[str, Any] = {"dtype": torch.bfloat16}
    student = torch.randn(8192, 2048, **narrow).requires_grad_()
    weight = torch.randn(128256, 2048, **narrow).div_(45).requires_grad_()
    teacher, teacher_weight = torch.randn(8192, 4096, **narrow), torch.randn(128256, 4096, **narrow).div_(64)

    def step() -> None:
        loss = fastdistill.linear_kl_div(student, weight, teacher, teacher_weight, backend="triton")
        torch.autograd.grad(loss, [student, weight])

    gradients = student.nbytes + weight.nbytes
    assert peak(step) - gradients < 2.1 * 2**30
