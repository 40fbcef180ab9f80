"""Tests the modules: their options, their parameters, and data-parallel training of the projection."""

from __future__ import annotations

import copy
import inspect
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _cases import OPS, Op
from _oracle import assert_same, evaluate
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastdistill
from fastdistill import LinearMSELoss

MODULES = {
    "linear_mse": "LinearMSELoss",
    "attention_mse": "AttentionMSELoss",
    "attention_kl": "AttentionKLLoss",
    "soft_cross_entropy": "SoftCrossEntropyLoss",
    "kl_div": "KLDivLoss",
    "jsd": "JSDLoss",
    "tvd": "TVDLoss",
    "topk_soft_cross_entropy": "TopKSoftCrossEntropyLoss",
    "linear_soft_cross_entropy": "LinearSoftCrossEntropyLoss",
    "linear_kl_div": "LinearKLDivLoss",
    "linear_jsd": "LinearJSDLoss",
    "linear_tvd": "LinearTVDLoss",
    "linear_topk_soft_cross_entropy": "LinearTopKSoftCrossEntropyLoss",
}
CHANGED = {  # every option at a value that is not its default
    "student_scale": 0.3,
    "teacher_scale": 0.7,
    "is_causal": True,
    "window": (3, None),
    "temperature": 2.0,
    "t_squared": True,
    "alpha": 0.3,
    "ignore_index": 7,
    "vocab_size": 5,
    "student_softcap": 3.0,
    "teacher_softcap": 4.0,
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 2.0,
    "reverse": True,
    "skew": 0.1,
    "beta": 0.2,
    "tail": "bucket",
    "reduction": "sum",
    "backend": "reference",
}
WITHOUT_PARAMETERS = [op for op in OPS if op.name != "linear_mse"]


def test_every_function_has_a_module() -> None:
    assert set(MODULES.values()) == {name for name in fastdistill.__all__ if name[0].isupper()}


@pytest.mark.parametrize("op", WITHOUT_PARAMETERS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_module_equals_its_function(op: Op, reduction: str, backend: str) -> None:
    """Options passed to the constructor and tensors passed to forward give the function's bits."""
    module = getattr(fastdistill, MODULES[op.name])(**op.options, reduction=reduction, backend=backend)
    assert list(module.parameters()) == list(module.buffers()) == []
    inputs = op.make()
    inputs |= op.some_masked(inputs)
    if reduction == "mean":
        inputs["num_items"] = torch.tensor(11)
    expected = evaluate(op, inputs, op.learned, reduction=reduction, backend=backend)
    assert_same(evaluate(module, inputs, op.learned), expected)


@pytest.mark.parametrize("name,module", MODULES.items())
def test_options_and_arguments_equal_those_of_the_function(name: str, module: str) -> None:
    """A module has the function's options and defaults, and forward takes tensors in the function's order."""
    function = inspect.signature(getattr(fastdistill, name)).parameters
    forward = list(inspect.signature(getattr(fastdistill, module).forward).parameters)[1:]
    options = set(function) - set(forward) - {"weight", "bias"}
    if name != "linear_mse":
        assert forward == [argument for argument in function if argument in forward]
        built = getattr(fastdistill, module)()
        assert built.options == {option: function[option].default for option in options}
    changed = {option: value for option, value in CHANGED.items() if option in options}
    sizes = (3, 4) if name == "linear_mse" else ()
    built = getattr(fastdistill, module)(*sizes, **changed)
    assert built.options == changed
    assert all(f"{option}={value!r}" in repr(built) for option, value in changed.items())


@pytest.mark.parametrize("module", MODULES.values())
def test_an_unknown_option_is_refused(module: str) -> None:
    sizes = (3, 4) if module == "LinearMSELoss" else ()
    with pytest.raises(TypeError, match="temprature"):
        getattr(fastdistill, module)(*sizes, temprature=2.0)


# -- the projection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_mse_loss_owns_its_projection(bias: bool, reduction: str, backend: str) -> None:
    module = LinearMSELoss(6, 10, bias, reduction=reduction, backend=backend)
    expected_names = ["projection.weight", "projection.bias"] if bias else ["projection.weight"]
    assert [name for name, _ in module.named_parameters()] == expected_names
    assert isinstance(module.projection, nn.Linear)
    student, teacher, mask = torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 10), torch.rand(3, 5) > 0.3
    expected = fastdistill.linear_mse(
        student, module.projection.weight, teacher, module.projection.bias, mask=mask, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    found = module(student, teacher, mask=mask)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())

    restored = LinearMSELoss(6, 10, bias, reduction=reduction, backend=backend)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored(student, teacher, mask=mask), found)
    half = copy.deepcopy(module).bfloat16()
    assert half(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_functional_call_and_compile(backend: str) -> None:
    module, student, teacher = LinearMSELoss(6, 10, backend=backend), torch.randn(3, 5, 6), torch.randn(3, 5, 10)
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    found = torch.func.functional_call(module, doubled, (student, teacher))
    weight, bias = (doubled[f"projection.{name}"] for name in ("weight", "bias"))
    expected = fastdistill.linear_mse(student, weight, teacher, bias, backend=backend)
    assert torch.equal(found, expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(student, teacher).item() == pytest.approx(module(student, teacher).item(), rel=1e-6)


def test_training_the_projection_reaches_least_squares(backend: str) -> None:
    """Full-batch descent on the loss reaches the least-squares solution of torch.linalg.lstsq."""
    student, teacher = torch.randn(200, 5), torch.randn(200, 7)
    module = LinearMSELoss(5, 7, bias=False, backend=backend)
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = module(student, teacher)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    solution = torch.linalg.lstsq(student, teacher).solution.T
    assert torch.allclose(module.projection.weight, solution, atol=1e-4)


def test_micro_batches_accumulate_to_the_batch(backend: str) -> None:
    """Gradients of four unequal micro-batches, each normalised by the tokens of all, add up to the batch's."""
    module = LinearMSELoss(6, 10, backend=backend)
    student, teacher, mask = torch.randn(8, 5, 6), torch.randn(8, 5, 10), torch.rand(8, 5) > 0.5
    module(student, teacher, mask=mask).backward()
    whole = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 8)):
        module(student[part], teacher[part], mask=mask[part], num_items=mask.sum()).backward()
    for p, expected in zip(module.parameters(), whole, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-5, atol=1e-7)


# -- two processes -------------------------------------------------------------------------------------------


class _Student(nn.Module):
    """Computes its loss inside forward, as models wrapped by trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.loss = LinearMSELoss(6, 10)

    def forward(self, x: Tensor, teacher: Tensor, mask: Tensor, num_items: Tensor) -> Tensor:
        return self.loss(self.layer(x).tanh(), teacher, mask=mask, num_items=num_items)


def _setting() -> tuple[_Student, Tensor, Tensor, Tensor]:
    """Returns the same values on every process. The first half of the batch counts far fewer tokens than the second."""
    torch.manual_seed(1)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[:4, 1:] = False
    return _Student(), torch.randn(8, 5, 6), torch.randn(8, 5, 10), mask


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }


def _in_process(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        mesh = dist.init_device_mesh("cpu", (2,))
        found = {}
        for wrap in ("ddp", "fsdp", "fsdp-each"):
            model, x, teacher, mask = _setting()
            if wrap == "ddp":
                wrapped: nn.Module = DistributedDataParallel(model)
            else:
                if wrap == "fsdp-each":
                    fully_shard(model.loss, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            mine = slice(4 * rank, 4 * rank + 4)
            # Wrappers average over processes; the loss divides by the tokens of all processes.
            (2 * wrapped(x[mine], teacher[mine], mask[mine], mask.sum())).backward()
            found[wrap] = _gradients(wrapped)
        # FSDP gathers weights for the forward of the module it wraps; that module must be the loss, not its projection.
        model, x, teacher, mask = _setting()
        fully_shard(model.loss.projection, mesh=mesh)
        with pytest.raises(
            TypeError, match=r"^weight is a DTensor.*FSDP.*weight\.full_tensor\(grad_placements=\[Partial"
        ):
            model(x, teacher, mask, mask.sum())
        if rank == 0:
            torch.save(found, results)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", fastdistill.losses.__all__)
def test_a_subclass_inherits_forward(name: str) -> None:
    """FSDP subclasses the class of each module that it wraps."""
    parent = getattr(fastdistill, name)
    child = type("Child", (parent,), {})
    assert child.forward is parent.forward
    assert child.defaults is parent.defaults


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    """Tests DDP, and FSDP2 with the loss inside a unit or as its own unit, on halves with unequal token counts."""
    results = tmp_path / "gradients.pt"
    processes = mp.spawn(_in_process, (str(tmp_path / "meeting"), str(results)), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the two processes did not end: each waits for the other")
    model, x, teacher, mask = _setting()
    model(x, teacher, mask, mask.sum()).backward()
    expected = _gradients(model)
    for found in torch.load(results, weights_only=True).values():
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
