"""Tests the promises that every op makes, on every backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from _cases import (
    ATTENTION_OPS,
    CLASS_OPS,
    LINEAR_LOGITS_OPS,
    LINEAR_MSE,
    LINEAR_TOPK_OPS,
    LOGITS_OPS,
    LONG_ATTENTION_OPS,
    OPS,
    PER_ITEM_OPS,
    TOPK_OPS,
    Op,
)
from _oracle import assert_accurate, assert_same, cast, error, evaluate
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import fastdistill

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *NARROW]

ONE_OF_EACH_REGISTERED_OP = [
    LINEAR_MSE, ATTENTION_OPS[0], LONG_ATTENTION_OPS[0], ATTENTION_OPS[2],
    LOGITS_OPS[0], TOPK_OPS[0], LINEAR_LOGITS_OPS[0],
]  # fmt: skip

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_per_item_op = pytest.mark.parametrize("op", PER_ITEM_OPS, ids=str)


def floating_names(op: Op) -> list[str]:
    return [name for name, x in op.make().items() if x.is_floating_point()]


# -- values and gradients --------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients(op: Op, dtype: torch.dtype, masked: bool, reduction: str, backend: str) -> None:
    inputs = cast(op.make(), dtype)
    masks = op.some_masked(inputs) if masked else {}
    outcome = op.assert_accurate({**inputs, **masks}, backend=backend, reduction=reduction)
    assert outcome["value"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert outcome["value"].shape == ()


@every_per_item_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reduction_none_weighs_each_item_by_its_own_gradient(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = cast(op.make(), dtype)
    inputs |= op.some_masked(inputs)
    weights = torch.randn(3, 5)
    outcome = op.assert_accurate(inputs, backend=backend, reduction="none", upstream=weights)
    assert outcome["value"].shape == (3, 5)
    assert (outcome["value"][~inputs["mask"]] == 0).all()


@every_op
def test_the_upstream_gradient_scales_every_gradient(op: Op, backend: str) -> None:
    op.assert_accurate(op.make(), backend=backend, upstream=torch.tensor(-2.5))
    silent = evaluate(op, op.make(), op.learned, backend=backend, upstream=torch.tensor(0.0))
    assert all((silent[name] == 0).all() for name in op.learned)


@every_per_item_op
@pytest.mark.parametrize("rows", [(), (4,), (2, 3, 2)], ids=str)
def test_any_number_of_leading_dimensions(op: Op, rows: tuple[int, ...], backend: str) -> None:
    inputs = op.make(rows)
    if "labels" in inputs:
        inputs["labels"] = torch.randint(31, rows)
    assert op.assert_accurate(inputs, backend=backend, reduction="none")["value"].shape == rows


@pytest.mark.parametrize(
    "op,learned",
    [
        pytest.param(op, tuple(name for i, name in enumerate(op.learned) if chosen >> i & 1), id=f"{op}-{chosen:03b}")
        for op in [op for op in OPS if len(op.learned) > 1]
        for chosen in range(1, 2 ** len(op.learned) - 1)
    ],
)
def test_gradients_of_a_subset_of_the_inputs(op: Op, learned: tuple[str, ...], backend: str) -> None:
    inputs = op.make()
    op.assert_accurate(inputs, learned, backend=backend)
    if op.per_item:
        op.assert_accurate(inputs, learned, backend=backend, reduction="none", upstream=torch.randn(3, 5))


@every_op
def test_no_grad_and_inference_mode(op: Op, backend: str) -> None:
    inputs = op.make()
    learning = {name: x.requires_grad_() if name in op.learned else x for name, x in op.make().items()}
    with torch.no_grad():
        value = op(**learning, backend=backend)
    assert not value.requires_grad
    torch.manual_seed(0)
    with torch.inference_mode():
        inputs = op.make()
        assert op.textbook(**inputs).item() == pytest.approx(op(**inputs, backend=backend).item(), rel=1e-5)
    assert not op(**inputs, backend=backend).requires_grad


@every_op
@pytest.mark.parametrize("student,teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_student_and_teacher_of_different_dtypes(
    op: Op, student: torch.dtype, teacher: torch.dtype, backend: str
) -> None:
    inputs = cast(op.make(), teacher)
    inputs |= cast({name: inputs[name] for name in op.learned}, student)
    op.assert_accurate(inputs, backend=backend)


@every_op
def test_several_threads(op: Op, backend: str, request: pytest.FixtureRequest) -> None:
    """The number of threads determines the size of blocks."""
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(3)
    inputs = op.make((7, 40)) if op.per_item else op.make()
    inputs |= op.some_masked(inputs)
    outcome = op.assert_accurate(inputs, backend=backend)
    assert_same(evaluate(op, inputs, op.learned, backend=backend), outcome)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_is_a_backend(op: Op, dtype: torch.dtype) -> None:
    """The reference can be chosen for a second opinion, and "auto" chooses the backend made for the device."""
    inputs = cast(op.make(), dtype)
    inputs |= op.some_masked(inputs)
    for reduction in op.reductions:
        upstream = torch.rand(3, 5) if reduction == "none" else None
        outcome = op.assert_accurate(inputs, backend="reference", reduction=reduction, upstream=upstream)
        best = evaluate(op, inputs, op.learned, backend="torch", reduction=reduction, upstream=upstream)
        auto = evaluate(op, inputs, op.learned, reduction=reduction, upstream=upstream)
        assert_same(auto, best)
        assert outcome["value"].dtype == auto["value"].dtype


# -- the comparison fails on planted errors --------------------------------------------------------------------


def one_row_dropped(gradient: Tensor) -> Tensor:
    wrong = gradient.clone()
    largest = wrong.flatten(1).norm(dim=1).argmax() if wrong.dim() > 1 else wrong.abs().argmax()
    wrong[largest] = 0
    return wrong


PLANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "sign": torch.neg,
    "scale": lambda gradient: gradient * 1.05,
    "row dropped": one_row_dropped,
}


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_planted_wrong_gradient_fails_the_comparison(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = cast(op.make(), dtype)
    inputs |= op.some_masked(inputs)
    outcome = op.assert_accurate(inputs, backend=backend)
    truth, textbook = op.truth(inputs), evaluate(op.textbook, inputs, op.learned, backend=backend)
    for name in op.learned:
        for plant in PLANTS.values():
            with pytest.raises(AssertionError, match=f"{name}: error"):
                assert_accurate({**outcome, name: plant(outcome[name])}, truth, textbook)
    with pytest.raises(AssertionError, match="value: error"):  # 0.04%: the error of logits rounded to bfloat16
        assert_accurate({**outcome, "value": outcome["value"] * 1.0004}, truth, textbook)

    # One row too many is counted, with the divisor of the right mask.
    one_more = dict(inputs)
    for name in op.masks:
        one_more[name] = inputs[name].clone()
        one_more[name].view(-1)[0] = True
    kept = op.items(**{**op.options, **inputs})[1].sum()
    included = evaluate(op, one_more, op.learned, backend=backend, num_items=kept)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate({**included, "value": outcome["value"]}, truth, textbook)


# -- reductions and masked items -------------------------------------------------------------------------------


@every_op
def test_num_items_is_the_divisor(op: Op, backend: str) -> None:
    inputs = op.make()
    total = evaluate(op, inputs, op.learned, backend=backend, reduction="sum")
    for num_items in (7, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32), 2.5, 0.5):
        outcome = evaluate(op, inputs, op.learned, backend=backend, num_items=num_items)
        assert_same(outcome, {name: x / num_items for name, x in total.items()}, within=1e-6)
    for nothing in (0, 0.0, torch.tensor(0)):
        outcome = evaluate(op, inputs, op.learned, backend=backend, num_items=nothing)
        assert_same(outcome, total, within=1e-6)


@every_op
def test_micro_batches_add_up_to_the_batch(op: Op, backend: str) -> None:
    """All micro-batches divide by the count of the whole batch, so their own counts may differ."""
    inputs = op.make()
    inputs |= op.some_masked(inputs)
    counted = op.items(**{**op.options, **inputs})[1].sum()
    whole = evaluate(op, inputs, op.learned, backend=backend)
    in_batch = {name for name in inputs if name.split("_")[-1] not in ("weight", "bias")}
    rows = next(iter(inputs.values())).shape[0]
    parts = [
        evaluate(
            op,
            {name: x[i : i + 1] if name in in_batch else x for name, x in inputs.items()},
            op.learned,
            backend=backend,
            num_items=counted,
        )
        for i in range(rows)
    ]
    together = {
        name: torch.cat([part[name] for part in parts]) if name in in_batch else sum(part[name] for part in parts)
        for name in whole
    }
    assert_same(together, whole, within=1e-6)


@every_op
def test_all_masked_gives_zero(op: Op, backend: str) -> None:
    inputs = op.make()
    inputs |= op.none_counted(inputs)
    inputs = op.overwrite_masked(inputs, inputs, float("nan"))
    for reduction in op.reductions:
        upstream = torch.randn(3, 5) if reduction == "none" else None
        outcome = evaluate(op, inputs, op.learned, backend=backend, reduction=reduction, upstream=upstream)
        assert all((x == 0).all() for x in outcome.values())


@every_op
def test_empty_batch(op: Op, backend: str) -> None:
    if op.per_item:
        shapes = [{"rows" if op in CLASS_OPS else "tokens": rows} for rows in ((0,), (2, 0))]
    else:
        shapes = [{"batch": 0}, {"length": 0}, {"keys": 0}]
    for shape in shapes:
        inputs = op.make(**shape)
        for reduction in op.reductions:
            outcome = evaluate(op, inputs, op.learned, backend=backend, reduction=reduction)
            assert all((x == 0).all() for x in outcome.values())
            assert all(outcome[name].shape == inputs[name].shape for name in op.learned)


@every_op
def test_one_item(op: Op, backend: str) -> None:
    inputs = op.make((1, 1)) if op.per_item else op.make(batch=1, length=1, keys=1)
    if "labels" in inputs:
        inputs["labels"] = torch.randint(31, (1, 1))
    if str(op).startswith("attention_kl"):  # one key has probability 1 on both sides
        outcome = evaluate(op, inputs, op.learned, backend=backend)
        assert all((x == 0).all() for x in outcome.values())
    else:
        op.assert_accurate(inputs, backend=backend)


@every_op
def test_masked_rows_are_ignored(op: Op, backend: str) -> None:
    inputs = op.make()
    masks = op.some_masked(inputs)
    for reduction in op.forms:
        upstream = torch.rand(3, 5) if reduction == "none" else None
        clean, *poisoned = (
            evaluate(op, {**x, **masks}, op.learned, backend=backend, reduction=reduction, upstream=upstream)
            for x in (inputs, *(op.overwrite_masked(inputs, masks, x) for x in (float("nan"), float("inf"), 1e38)))
        )
        for outcome in poisoned:
            assert_same(outcome, clean)
    for name, masked in op.masks.items():  # masked rows get a gradient of exactly 0
        rows = ~masks[name] if op.per_item else ~masks[name][:, None].expand(-1, clean[masked[0]].shape[1], -1)
        assert (clean[masked[0]][rows] == 0).all()


@every_op
def test_nan_in_gives_nan_out(op: Op, backend: str) -> None:
    for name in floating_names(op):
        inputs = op.make()
        inputs[name].view(-1)[0] = float("nan")
        outcome = evaluate(op, inputs, op.learned, backend=backend)
        assert outcome["value"].isnan(), name
        assert name not in op.learned or any(outcome[learned].isnan().any() for learned in op.learned), name
        if op.per_item and name in op.masks["mask"]:  # NaN stays in its row
            per_item = evaluate(op, inputs, op.learned[:1], backend=backend, reduction="none")
            for x in per_item.values():
                assert not x.view(15, -1)[1:].isnan().any(), name


# -- item weights ----------------------------------------------------------------------------------------------


@every_per_item_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_item_weights_multiply_each_items_loss(op: Op, dtype: torch.dtype, backend: str) -> None:
    """The mean divides by the number of counted items, those of weight 0 included, and these may hold anything."""
    inputs = cast(op.make(), dtype)
    masks = op.some_masked(inputs)
    weights = 3 * torch.rand(3, 5)
    weights.view(-1)[2] = 0
    masks["mask"].view(-1)[2] = True
    per_item = op.truth({**inputs, **masks}, reduction="none")["value"]
    weighted = {**inputs, **masks, "item_weights": weights}
    poisoned = op.overwrite_masked(weighted, {"mask": weights != 0}, float("nan"))
    for reduction in op.reductions:
        found = evaluate(op, weighted, op.learned, backend=backend, reduction=reduction)
        # The same gradients by hand: per-item losses, each with its weight as the upstream gradient.
        counted = op.items(**{**op.options, **inputs, **masks})[1].sum() if reduction == "mean" else 1
        whole = op.truth({**inputs, **masks}, reduction="none", upstream=weights.double() / counted)
        truth = {**whole, "value": per_item * weights}
        if reduction != "none":
            truth["value"] = truth["value"].sum() / counted
        for name, x in truth.items():
            assert error(found[name], x) < (1e-2 if name != "value" and dtype == torch.bfloat16 else 2e-6), name
        assert_same(evaluate(op, poisoned, op.learned, backend=backend, reduction=reduction), found)
        for name in op.masks["mask"]:
            if name in op.learned:
                assert (found[name].view(15, -1)[2] == 0).all()


@every_per_item_op
def test_bad_item_weights(op: Op, backend: str) -> None:
    inputs = op.make()
    for wrong, kind, message in (
        (torch.ones(3, 5).long(), TypeError, "item_weights has dtype torch.int64; it should be floating point"),
        (torch.ones(3, 4), ValueError, r"item_weights has shape \(3, 4\); it should be \(3, 5\)"),
        (torch.ones(3, 5, device="meta"), ValueError, "item_weights is on meta; it should be on"),
        (torch.ones(3, 5, requires_grad=True), ValueError, r"item_weights has requires_grad=True.*\.detach\(\)"),
    ):
        with pytest.raises(kind, match=message):
            op(**inputs, item_weights=wrong, backend=backend)


# -- repeatability ---------------------------------------------------------------------------------------------


def gradients_of_one_graph(
    call: Callable[..., Tensor], inputs: dict[str, Tensor], learned: tuple[str, ...], upstreams: list[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Returns the gradients of several backwards of one graph, and checks that none changes those before it."""
    leaves = {name: x.detach().requires_grad_(name in learned) for name, x in inputs.items()}
    # A compiled backward may free what the forward saved: a user who runs it twice switches this off.
    with functorch.patch(donated_buffer=False):
        value = call(**leaves)
        targets = [leaves[name] for name in learned]
        found, copies = [], []
        for upstream in upstreams:
            found.append(torch.autograd.grad(value, targets, upstream.expand(value.shape), retain_graph=True))
            copies.append([x.clone() for x in found[-1]])
    for gradients, kept in zip(found, copies, strict=True):
        assert all(map(torch.equal, gradients, kept))
    return found


def assert_every_backward_gives_the_same_bits(
    call: Callable[..., Tensor], op: Op, dtype: torch.dtype, reduction: str
) -> None:
    """The bits follow from the upstream gradient alone, not from how many backwards of the graph came before."""
    inputs = cast(op.make((2, 2)) if op.per_item else op.make(batch=1), dtype)
    inputs |= op.some_masked(inputs)
    one, other = (torch.randn(2, 2) if reduction == "none" else torch.tensor(x) for x in (1.0, 1 / 3))
    first, second, third, fourth = gradients_of_one_graph(call, inputs, op.learned, [one, other, one, other])
    later, before = gradients_of_one_graph(call, inputs, op.learned, [other, one])
    for here, there in ((first, third), (first, before), (second, fourth), (second, later)):
        assert all(map(torch.equal, here, there))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_every_backward_of_a_graph_gives_the_same_bits(op: Op, dtype: torch.dtype, backend: str) -> None:
    on_torch = backend == "torch"
    for name, reduction in product((backend, "reference") if on_torch else (backend,), op.reductions):
        call = partial(op, backend=name, reduction=reduction)
        assert_every_backward_gives_the_same_bits(call, op, dtype, reduction)
        if on_torch:
            checkpointed = partial(checkpoint, call, use_reentrant=False)
            assert_every_backward_gives_the_same_bits(checkpointed, op, dtype, reduction)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("op", ONE_OF_EACH_REGISTERED_OP, ids=str)
def test_every_backward_of_a_compiled_graph_gives_the_same_bits(op: Op, backend: str) -> None:
    for reduction in op.forms:
        call = torch.compile(partial(op, backend=backend, reduction=reduction), fullgraph=True, backend="aot_eager")
        assert_every_backward_gives_the_same_bits(call, op, torch.float32, reduction)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_call_gives_the_same_bits(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = cast(op.make(), dtype)
    inputs |= op.some_masked(inputs)
    first, second = (evaluate(op, inputs, op.learned, backend=backend) for _ in range(2))
    assert_same(second, first)


@every_op
def test_inputs_are_never_written(op: Op, backend: str) -> None:
    for reduction in op.forms:
        inputs = op.make()
        inputs |= op.some_masked(inputs)
        leaves = {name: x.requires_grad_() if name in op.learned else x for name, x in inputs.items()}
        before = {name: (x.detach().clone(), x._version) for name, x in leaves.items()}
        value = op(**leaves, backend=backend, reduction=reduction)
        upstream = torch.rand_like(value)
        kept = upstream.clone()
        value.backward(upstream)
        assert torch.equal(upstream, kept)
        for name, (data, version) in before.items():
            assert torch.equal(leaves[name].detach(), data), name
            assert leaves[name]._version == version, name


@every_op
def test_earlier_operations_keep_their_saved_tensors(op: Op, backend: str) -> None:
    """exp saves its output, which is our input: writing into it would corrupt exp's own gradient."""
    name = op.learned[0]
    inputs = op.make()
    base = (0.3 * inputs[name]).requires_grad_()
    op(**{**inputs, name: base.exp()}, backend=backend).backward()
    expected = op.truth({**inputs, name: base.exp()}, (name,))[name] * base.detach().cpu().double().exp()
    assert torch.allclose(base.grad.cpu().double(), expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())


@every_op
def test_differentiating_twice_raises(op: Op, backend: str) -> None:
    for reduction in op.forms:
        leaves = {name: x.requires_grad_() if name in op.learned else x for name, x in op.make().items()}
        value = op(**leaves, backend=backend, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*create_graph"):
            torch.autograd.grad(value, leaves[op.learned[0]], create_graph=True)


@every_op
def test_gradients_never_hold_uninitialised_memory(
    op: Op, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic mode fills what torch.empty returns with NaN."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    inputs = op.make()
    masked = {**inputs, **op.some_masked(inputs)}
    nothing = {**inputs, **op.none_counted(inputs)}
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would need an environment variable
    assert torch.empty(1).isnan()
    for x in (inputs, masked, nothing):
        for reduction in op.forms:
            outcome = evaluate(op, x, op.learned, backend=backend, reduction=reduction)
            assert not any(tensor.isnan().any() for tensor in outcome.values())


# -- layouts ---------------------------------------------------------------------------------------------------


def transposed(x: Tensor) -> Tensor:
    """Returns the same values with a last stride that is not 1."""
    return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]


def sliced(x: Tensor) -> Tensor:
    """Returns the same values as a slice of a larger tensor: 1:-1 in every dimension."""
    larger = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
    inner = larger[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner


def reversed_dimensions(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


@every_op
@pytest.mark.parametrize("layout", [transposed, sliced, reversed_dimensions], ids=lambda layout: layout.__name__)
def test_inputs_of_any_layout(op: Op, layout: Callable[[Tensor], Tensor], backend: str) -> None:
    inputs = {name: layout(x) if x.is_floating_point() else x for name, x in op.make().items()}
    masks = {name: transposed(mask) for name, mask in op.some_masked(inputs).items()}
    op.assert_accurate({**inputs, **masks}, backend=backend)
    if op.per_item:
        weights = torch.randn(5, 3).T
        op.assert_accurate({**inputs, **masks}, backend=backend, reduction="none", upstream=weights)


@every_op
def test_expanded_inputs(op: Op, backend: str) -> None:
    inputs = op.make()
    for name in (name for names in op.masks.values() for name in names):
        inputs[name] = inputs[name][:1].expand(inputs[name].shape)
    if not op.per_item:  # heads share one teacher
        inputs["teacher_query"] = inputs["teacher_query"][:, :1].expand(inputs["teacher_query"].shape)
    op.assert_accurate(inputs, backend=backend)


@every_per_item_op
def test_a_gradient_expanded_from_one_number(op: Op, backend: str) -> None:
    """`loss.sum().backward()` sends a gradient whose strides are all 0."""
    weights = torch.tensor(0.7).expand(3, 5)
    op.assert_accurate(op.make(), backend=backend, reduction="none", upstream=weights)


@every_op
def test_arguments_may_share_storage(op: Op, backend: str) -> None:
    """Student and teacher may be the same storage, and query and key too."""
    inputs = op.make()
    if not op.per_item:
        inputs = op.make(student_kv=4, teacher_kv=4, keys=inputs["student_query"].shape[2])
        shared = inputs["student_query"]
        leaf = shared.clone().requires_grad_()
        op(**{**inputs, "student_query": leaf, "student_key": leaf}, backend=backend).backward()
        separate = op.truth({**inputs, "student_key": shared})
        expected = separate["student_query"] + separate["student_key"]
        assert error(leaf.grad, expected) < 1e-5
    student, teacher = next(iter(op.masks.values()))
    if inputs[student].shape == inputs[teacher].shape:
        leaf = inputs[student].clone().requires_grad_()
        op(**{**inputs, student: leaf, teacher: leaf.detach()}, backend=backend).backward()
        assert torch.equal(leaf.detach(), inputs[student])


STRIDE = 2**30 + 5  # elements from one row to the next: the third row lies beyond 2^31


@every_op
def test_offsets_beyond_two_to_the_31(op: Op, backend: str) -> None:
    """Rows lie so far apart that a 32-bit offset overflows. All inputs share one tensor of 4.3 GB.

    On a CPU only the pages that hold values become resident.
    """
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    inputs = cast(op.make((3, 5)) if op.per_item else op.make(batch=3), torch.bfloat16)
    in_rows = {name: x for name, x in inputs.items() if x.dim() > 2 and x.is_floating_point()}
    storage = torch.empty(2 * STRIDE + sum(x[0].numel() + 16 for x in in_rows.values()), dtype=torch.bfloat16)
    start = 0
    for name, x in in_rows.items():
        inputs[name] = storage.as_strided(x.shape, (STRIDE, *x.stride()[1:]), start)
        inputs[name].copy_(x)
        start += x[0].numel() // 16 * 16 + 16  # each begins at a multiple of 32 bytes
    op.assert_accurate(inputs, backend=backend)


# -- machinery around the ops ----------------------------------------------------------------------------------


class _Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the calls of this library's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastdistill":
            self.found.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered_calls(op: Op, inputs: dict[str, Tensor], backend: str, reduction: str) -> list[Any]:
    """Returns (op, args, kwargs) for each of this library's registered ops that forward and backward call."""
    leaves = {name: x.clone().requires_grad_(name in op.learned) for name, x in inputs.items()}
    with _Calls() as forward:
        value = op(**leaves, backend=backend, reduction=reduction).sum()
    with _Calls() as backward:
        value.backward()
    # Ops called by backward are not differentiated again.
    detached = tree_map_only(Tensor, Tensor.detach, backward.found)
    return [*forward.found, *detached]


@every_op
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_opcheck(op: Op, masked: bool, backend: str) -> None:
    """Checks schema, fake implementation, autograd registration and AOT tracing of every op that a call reaches."""
    inputs = op.make()
    masks = op.some_masked(inputs) if masked else {}
    for reduction in op.forms:
        calls = registered_calls(op, {**inputs, **masks}, backend, reduction)
        assert calls, "no registered op was reached"
        for func, args, kwargs in calls:
            torch.library.opcheck(func, args, kwargs)


def test_the_table_reaches_every_registered_op() -> None:
    """Ops choose a formulation by size, so the table's inputs must reach each one, forward and backward."""
    reached = {
        call[0]._schema.name
        for op in OPS
        for reduction in op.forms
        for call in registered_calls(op, op.make(), "torch", reduction)
    }
    # tests of their own: test_distributed.py, test_attention_short.py
    others = ("fastdistill::sharded", "fastdistill::attention_mse_short")
    names = [name for name in torch._library.custom_ops.OPDEFS if name.startswith("fastdistill::")]
    registered = {name for name in names if not name.startswith(others)}
    assert {name.removesuffix(".default") for name in registered} == reached


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@every_op
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_fullgraph_equals_eager(op: Op, backend: str) -> None:
    """Forward and backward are traced into one graph; "aot_eager" leaves out the fusions of the compiler."""
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = op.make()
    masks = op.some_masked(inputs)
    for reduction in op.forms:
        keywords = {"backend": backend, "reduction": reduction}
        upstream = torch.rand(3, 5) if reduction == "none" else None
        expected, found = (
            evaluate(f, {**inputs, **masks}, op.learned, upstream=upstream, **keywords) for f in (op, compiled)
        )
        assert_same(found, expected, within=1e-6)


@every_op
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_once_for_every_length(op: Op, backend: str) -> None:
    """With dynamic shapes, another length or another number of items does not recompile."""
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    first = 5 if op.per_item else op.make()["student_query"].shape[2]
    for i, length in enumerate((first, first + 1, first + 4)):
        inputs = op.make((3, length)) if op.per_item else op.make(length=length, keys=length + 2)
        for x in inputs.values():
            if x.dim() > 2 and op.per_item:
                torch._dynamo.mark_dynamic(x, 1)
        num_items = torch.tensor(7 + i)
        expected, found = (
            evaluate(f, inputs, op.learned, backend=backend, num_items=num_items) for f in (op, compiled)
        )
        assert_same(found, expected, within=1e-6)
        if i == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("op", [LINEAR_MSE, ATTENTION_OPS[0], LOGITS_OPS[0], LINEAR_LOGITS_OPS[0]], ids=str)
def test_compiled_by_inductor_equals_eager(op: Op, backend: str) -> None:
    inputs = op.make()
    inputs |= op.some_masked(inputs)
    expected, found = (
        evaluate(f, inputs, op.learned, backend=backend) for f in (op, torch.compile(op, fullgraph=True))
    )
    assert_same(found, expected, within=1e-6)


HAS_PROJECTION = [LINEAR_MSE, *LINEAR_LOGITS_OPS, *LINEAR_TOPK_OPS]


@every_op
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(op: Op, activations: torch.dtype, backend: str) -> None:
    """Float32 weights meet bfloat16 activations. Autocast rounds only the operands of a projection, never a loss."""
    rows = (3, 25)
    inputs = op.make(rows) if op in HAS_PROJECTION else op.make()  # rounding: enough numbers to rule out luck
    in_rows = {name for names in op.masks.values() for name in names}
    inputs |= cast({name: inputs[name] for name in in_rows}, activations)
    # The truth takes the operands of projections as autocast rounds them.
    rounded = dict(inputs)
    if op in HAS_PROJECTION:
        others = {"topk_logprobs", "teacher" if op is LINEAR_MSE else ""}
        rounded |= cast({name: x for name, x in inputs.items() if name not in others}, torch.bfloat16)

    for reduction in op.forms:
        upstream = torch.rand(rows if op in HAS_PROJECTION else (3, 5)) if reduction == "none" else torch.tensor(1.0)
        outcomes = []
        for backward_inside in (False, True):
            leaves = {name: x.detach().clone().requires_grad_(name in op.learned) for name, x in inputs.items()}
            with torch.autocast(upstream.device.type, torch.bfloat16):
                value = op(**leaves, backend=backend, reduction=reduction)
            with torch.autocast(upstream.device.type, torch.bfloat16, enabled=backward_inside):
                value.backward(upstream)
            outcomes.append({"value": value.detach(), **{name: leaves[name].grad for name in op.learned}})
        outcome, inside = outcomes
        assert_same(inside, outcome)
        assert value.dtype == torch.float32
        assert all(outcome[name].dtype == inputs[name].dtype for name in op.learned)
        keywords: dict[str, Any] = {"upstream": upstream, "reduction": reduction}
        if op in HAS_PROJECTION:
            textbook = evaluate(op.textbook, rounded, op.learned, backend=backend, **keywords)
            assert_accurate(outcome, op.truth(rounded, **keywords), textbook)
        else:
            assert_same(outcome, evaluate(op, inputs, op.learned, backend=backend, **keywords))


@every_op
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(op: Op, reentrant: bool, backend: str) -> None:
    inputs = op.make()

    def checkpointed(reduction: str, **tensors: Tensor) -> Tensor:
        def call(*values: Tensor) -> Tensor:
            return op(**dict(zip(tensors, values, strict=True)), backend=backend, reduction=reduction)

        return checkpoint(call, *tensors.values(), use_reentrant=reentrant)

    for reduction in op.forms:
        # A reentrant checkpoint runs backward inside itself and does not support torch.autograd.grad.
        leaves = {name: x.detach().clone().requires_grad_(name in op.learned) for name, x in inputs.items()}
        value = checkpointed(reduction, **leaves)
        upstream = torch.rand_like(value)
        value.backward(upstream)
        outcome = {"value": value.detach(), **{name: leaves[name].grad for name in op.learned}}
        expected = evaluate(op, inputs, op.learned, backend=backend, reduction=reduction, upstream=upstream)
        assert_same(outcome, expected)


class _Student(nn.Module):
    """Holds the op's learned inputs as parameters."""

    def __init__(self, op: Op, inputs: dict[str, Tensor], backend: str) -> None:
        super().__init__()
        self.op, self.backend = op, backend
        self.learned = nn.ParameterDict({name: inputs[name] for name in op.learned})

    def forward(self, **rest: Tensor) -> Tensor:
        return self.op(**dict(self.learned.items()), **rest, backend=self.backend)


@every_op
def test_functional_call(op: Op, backend: str) -> None:
    inputs = op.make()
    rest = {name: x for name, x in inputs.items() if name not in op.learned}
    module = _Student(op, op.make(), backend)
    leaves = {f"learned.{name}": inputs[name].clone().requires_grad_() for name in op.learned}
    value = torch.func.functional_call(module, leaves, kwargs=rest)
    gradients = torch.autograd.grad(value, tuple(leaves.values()))
    outcome = {"value": value.detach(), **dict(zip(op.learned, gradients, strict=True))}
    assert_same(outcome, evaluate(op, inputs, op.learned, backend=backend))


# -- signatures and bad arguments ------------------------------------------------------------------------------

# The order of arguments: tensors first, student before teacher, then keywords.
_ATTENTION = (
    "student_query student_key teacher_query teacher_key * student_scale teacher_scale key_mask query_mask is_causal "
    "attn_mask cu_seqlens cu_seqlens_key window reduction num_items backend"
)
_CLASSES = "temperature t_squared labels alpha ignore_index mask vocab_size student_softcap"
_SCALES = "teacher_softcap student_logit_scale teacher_logit_scale item_weights"
_END = "reduction num_items backend"
_TOPK = f"tail reverse {_CLASSES} student_logit_scale item_weights {_END}"
_LOGITS = f"student_logits teacher_logits * {{}}{_CLASSES} {_SCALES} {_END}"
_LINEAR = f"student student_weight teacher teacher_weight * student_bias teacher_bias {{}}{_CLASSES} {_SCALES} {_END}"
SIGNATURES = {
    "linear_mse": f"student weight teacher bias * mask item_weights {_END}",
    "attention_mse": _ATTENTION,
    "attention_kl": _ATTENTION,
    "soft_cross_entropy": _LOGITS.format(""),
    "kl_div": _LOGITS.format("reverse skew "),
    "jsd": _LOGITS.format("beta "),
    "tvd": _LOGITS.format(""),
    "linear_soft_cross_entropy": _LINEAR.format(""),
    "linear_kl_div": _LINEAR.format("reverse skew "),
    "linear_jsd": _LINEAR.format("beta "),
    "linear_tvd": _LINEAR.format(""),
    "topk_soft_cross_entropy": f"student_logits topk_logprobs topk_indices * {_TOPK}",
    "linear_topk_soft_cross_entropy": (f"student student_weight topk_logprobs topk_indices * student_bias {_TOPK}"),
}
DEFAULTS = {
    "bias": None, "mask": None, "reduction": "mean", "num_items": None, "backend": "auto",
    "student_scale": None, "teacher_scale": None, "key_mask": None, "query_mask": None, "is_causal": False,
    "attn_mask": None, "cu_seqlens": None, "cu_seqlens_key": None, "window": None,
    "temperature": 1.0, "t_squared": False, "labels": None, "alpha": 1.0, "ignore_index": -100,
    "vocab_size": None, "student_softcap": None, "teacher_softcap": None, "reverse": False, "beta": 0.5,
    "skew": 0.0, "student_logit_scale": 1.0, "teacher_logit_scale": 1.0, "item_weights": None,
    "tail": "renormalize", "student_bias": None, "teacher_bias": None,
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """No default adds a hard loss, a temperature or a weight that the caller did not ask for."""
    parameters = inspect.signature(getattr(fastdistill, name)).parameters.values()
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert " ".join([*positional, "*", *keyword_only]) == SIGNATURES[name]
    for p in parameters:
        if p.default is not p.empty:
            assert p.default == DEFAULTS[p.name]
            assert type(p.default) is type(DEFAULTS[p.name])


def test_every_op_is_in_the_table() -> None:
    assert {op.name for op in OPS} == set(SIGNATURES) == {n for n in fastdistill.__all__ if n[0].islower()}


@every_op
def test_a_teacher_that_requires_grad_is_refused(op: Op, backend: str) -> None:
    for name in set(floating_names(op)) - set(op.learned):
        inputs = op.make()
        inputs[name].requires_grad_()
        with pytest.raises(ValueError, match=rf"^{name} has requires_grad=True.*torch\.no_grad\(\).*\.detach\(\)"):
            op(**inputs, backend=backend)


@every_op
def test_inputs_that_are_not_floating_tensors_are_refused(op: Op, backend: str) -> None:
    inputs = op.make()
    for name in floating_names(op):
        with pytest.raises(TypeError, match=rf"^{name} has dtype torch\.int64; it should be floating point"):
            op(**{**inputs, name: inputs[name].long()}, backend=backend)
        with pytest.raises(TypeError, match=rf"^{name} has dtype torch\.complex64; it should be floating point"):
            op(**{**inputs, name: inputs[name].to(torch.complex64)}, backend=backend)
        with pytest.raises(TypeError, match=rf"^{name} is list; it should be a torch\.Tensor"):
            op(**{**inputs, name: inputs[name].tolist()}, backend=backend)
        if name != "weight" and not name.endswith("bias"):
            with pytest.raises(TypeError, match=rf"^{name} is NoneType; it should be a torch\.Tensor"):
                op(**{**inputs, name: None}, backend=backend)


@every_op
def test_tensors_on_another_device_are_refused(op: Op, backend: str) -> None:
    inputs = op.make()
    first, *others = floating_names(op)
    device = inputs[first].device
    for name in others:
        with pytest.raises(ValueError, match=rf"^{name} is on meta but {first} is on {device}; move it there"):
            op(**{**inputs, name: inputs[name].to("meta")}, backend=backend)


@pytest.fixture
def _one_process_group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_tensor_is_refused(backend: str) -> None:
    """A raw DTensor would be read as its local shard, which gives wrong values or an illegal access on a GPU."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    with torch.device("cpu"):  # gloo runs on the CPU, even on a machine with a GPU
        mesh = init_device_mesh("cpu", (1,))
        for op in OPS:
            inputs = op.make()
            for name in floating_names(op):
                sharded = distribute_tensor(inputs[name], mesh, [Shard(0)])
                with pytest.raises(
                    TypeError, match=rf"^{name} is a DTensor.*FSDP.*{name}\.full_tensor\(grad_placements=\[Partial"
                ):
                    op(**{**inputs, name: sharded}, backend=backend)


@pytest.mark.parametrize("op", [LINEAR_MSE, *LINEAR_LOGITS_OPS, *LINEAR_TOPK_OPS], ids=str)
def test_a_parameter_that_zero_3_has_partitioned_is_refused(op: Op, backend: str) -> None:
    inputs = op.make()
    name = op.learned[1]
    inputs[name] = nn.Parameter(torch.empty(0))
    inputs[name].ds_id = 3  # as DeepSpeed marks it
    with pytest.raises(ValueError, match=rf"^{name} is a parameter that DeepSpeed ZeRO-3.*GatheredParameters"):
        op(**inputs, backend=backend)


@every_op
def test_bad_masks(op: Op, backend: str) -> None:
    inputs = op.make()
    for name, mask in op.some_masked(inputs).items():
        with pytest.raises(TypeError, match=rf"^{name} is torch\.int64; it should be a bool tensor.*{name}\.bool\(\)"):
            op(**inputs, **{name: mask.long()}, backend=backend)
        with pytest.raises(TypeError, match=rf"^{name} is list; it should be a bool tensor"):
            op(**inputs, **{name: mask.tolist()}, backend=backend)
        rows, columns = mask.shape
        for wrong in (mask[:, :-1], mask.unsqueeze(-1), mask[0]):
            shapes = re.escape(f"{tuple(wrong.shape)}; it should be {(rows, columns)}")
            with pytest.raises(ValueError, match=rf"^{name} has shape {shapes}"):
                op(**inputs, **{name: wrong}, backend=backend)
        remedy = rf"it should be on {mask.device}: pass {name}\.to\('{mask.device}'\)"
        with pytest.raises(ValueError, match=rf"^{name} is on meta; {remedy}"):
            op(**inputs, **{name: mask.to("meta")}, backend=backend)


BAD_REDUCTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "average"}, ValueError, r"^reduction is 'average'; it should be one of 'mean', 'sum'"),
    ({"reduction": None}, ValueError, r"^reduction is None; it should be one of 'mean', 'sum'"),
    ({"reduction": "sum", "num_items": 3}, ValueError, r"^num_items is given but reduction is 'sum'"),
    (
        {"num_items": -1},
        ValueError,
        r"^num_items is -1; it should be the number of counted items, finite and 0 or more",
    ),
    ({"num_items": float("inf")}, ValueError, r"^num_items is inf; it should be the number of counted items, finite"),
    ({"num_items": float("nan")}, ValueError, r"^num_items is nan; it should be the number of counted items, finite"),
    ({"num_items": -0.5}, ValueError, r"^num_items is -0.5; it should be the number of counted items, finite"),
    ({"num_items": "7"}, TypeError, r"^num_items is str; it should be a number or a 0-d tensor"),
    ({"num_items": True}, TypeError, r"^num_items is bool; it should be a number or a 0-d tensor"),
    ({"num_items": torch.ones(2)}, ValueError, r"^num_items has shape \(2,\); it should be a number or a 0-d tensor"),
    ({"backend": "gpu"}, ValueError, r"^backend is 'gpu'.*should be 'auto', 'reference', 'torch', 'triton' or 'cuda'"),
    ({"backend": None}, ValueError, r"^backend is None.*should be 'auto', 'reference', 'torch', 'triton' or 'cuda'"),
]


@pytest.mark.parametrize("wrong,kind,message", BAD_REDUCTIONS)
def test_bad_reduction_num_items_or_backend(
    wrong: dict[str, Any], kind: type[Exception], message: str, backend: str
) -> None:
    for op in OPS:
        with pytest.raises(kind, match=message):
            op(**op.make(), **{"backend": backend, **wrong})


@every_op
def test_an_unknown_keyword_is_refused(op: Op) -> None:
    with pytest.raises(TypeError, match="temprature"):
        op(**op.make(), temprature=2.0)
