"""Tests linear_mse beyond the contract: widths, chunk borders, weight gradients of many tokens, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from _cases import LINEAR_MSE as OP
from _cases import hidden
from _oracle import assert_same, cast, evaluate

import fastdistill
from fastdistill.ops.linear_mse import CHUNK


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 37])
def test_any_number_of_tokens(tokens: int, backend: str) -> None:
    inputs = hidden((tokens,), 12, 20)
    inputs["mask"] = torch.rand(tokens) > 0.3
    inputs["mask"][-1] = True
    OP.assert_accurate(inputs, backend=backend)
    OP.assert_accurate(inputs, backend=backend, reduction="none", upstream=torch.randn(tokens))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_and_tiles_of_tokens(reduction: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's chunks hold thousands of tokens; here they are as small as possible, with a partial last tile."""
    if backend == "triton":
        monkeypatch.setattr("fastdistill.kernels.linear_mse.CHUNK_BYTES", 1)
    inputs = hidden((CHUNK + 300,), 6, 10)
    inputs["mask"] = torch.rand(CHUNK + 300) > 0.3
    OP.assert_accurate(inputs, backend=backend, reduction=reduction)


@pytest.mark.parametrize("d_s,d_t", [(1, 1), (1, 7), (7, 1), (26, 64), (312, 768), (768, 312), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(d_s: int, d_t: int, dtype: torch.dtype, backend: str) -> None:
    OP.assert_accurate(cast(hidden((2, 9), d_s, d_t), dtype), backend=backend)


@pytest.mark.parametrize("weight", [False, True], ids=["no-weight", "weight"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_and_bias_are_optional(
    weight: bool, bias: bool, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    inputs = cast(hidden((3, 5), 10, 10), dtype)
    learned = tuple(name for name in OP.learned if (name != "weight" or weight) and (name != "bias" or bias))
    inputs |= {name: None for name in OP.learned if name not in learned}
    inputs |= OP.some_masked(inputs)
    OP.assert_accurate(inputs, learned, backend=backend, reduction=reduction)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_without_a_projection_autocast_rounds_nothing(bias: bool, backend: str) -> None:
    inputs = hidden((3, 5), 10, 10) | {"weight": None} | ({} if bias else {"bias": None})
    inputs["teacher"] = inputs["student"].detach() + 1e-3 * torch.randn_like(inputs["student"])
    learned = ("student", "bias") if bias else ("student",)
    expected = evaluate(fastdistill.linear_mse, inputs, learned, backend=backend)
    with torch.autocast(inputs["student"].device.type, torch.bfloat16):
        assert_same(evaluate(fastdistill.linear_mse, inputs, learned, backend=backend), expected)
        if bias:  # as the output of a Linear meets a float32 parameter
            inputs["student"] = inputs["student"].bfloat16()
            assert fastdistill.linear_mse(**inputs, backend=backend).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weight_gradients_of_many_tokens_accumulate_in_float32(
    dtype: torch.dtype, reduction: str, backend: str
) -> None:
    """All terms of the 100 chunks have one sign: in bfloat16 each chunk would add a rounding error."""
    inputs = cast({name: x.abs() * 0.02 for name, x in hidden((100 * CHUNK,), 4, 4).items()}, dtype)
    inputs["bias"] += 0.1
    OP.assert_accurate(inputs, backend=backend, reduction=reduction)


@pytest.mark.parametrize("mismatch", [1e-1, 1e-2, 1e-3])
def test_student_close_to_teacher(mismatch: float, backend: str) -> None:
    """The residual is a small difference of large numbers; it must be as accurate as eager's."""
    cases = []
    for _ in range(5):
        inputs = hidden((4, 16), 24, 32)
        projected = torch.nn.functional.linear(inputs["student"], inputs["weight"], inputs["bias"])
        cases.append({**inputs, "teacher": projected + mismatch * torch.randn_like(projected)})
    OP.assert_accurate_together(cases, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_losses_keep_small_float16_gradients(reduction: str, backend: str) -> None:
    """Loss scaling must act before rounding: a gradient of 1e-6 rounded to float16 first has few digits left."""
    inputs = hidden((4, 16), 312, 768)
    projected = torch.nn.functional.linear(inputs["student"], inputs["weight"], inputs["bias"])
    inputs = cast({**inputs, "teacher": projected}, torch.float16)
    OP.assert_accurate(inputs, backend=backend, reduction=reduction, upstream=torch.tensor(2.0**14))


def test_equal_student_and_teacher(backend: str) -> None:
    student = torch.randn(3, 5, 10)
    outcome = evaluate(
        OP, {"student": student, "weight": None, "teacher": student.clone()}, ["student"], backend=backend
    )
    assert all((x == 0).all() for x in outcome.values())


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_extreme_sizes(scale: float, backend: str) -> None:
    """Float32 just holds the squares; float16 and bfloat16 sums would lose them."""
    inputs = {name: x * scale if name in ("student", "teacher", "bias") else x for name, x in hidden().items()}
    OP.assert_accurate(inputs, backend=backend)


# -- the last backward of a graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_the_last_backward_gives_the_bits_of_those_before(dtype: torch.dtype, upstream: float, backend: str) -> None:
    """It writes in place what the forward computed; those before it must not."""
    inputs = cast(hidden(), dtype)
    leaves = {name: x.detach().requires_grad_(name in OP.learned) for name, x in inputs.items()}
    loss = OP(**leaves, num_items=torch.tensor(7.0), backend=backend)
    learned, scale = [leaves[name] for name in OP.learned], torch.tensor(upstream)
    first = torch.autograd.grad(loss, learned, scale, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:  # as accumulation in place does
        x += 1
    last = torch.autograd.grad(loss, learned, scale)
    for x, y in zip(last, kept, strict=True):
        assert torch.equal(x, y)


def test_the_last_backward_copies_no_gradient(backend: str) -> None:
    inputs = hidden((64,), 300, 400)
    leaves = {name: x.detach().requires_grad_(name in OP.learned) for name, x in inputs.items()}
    loss = OP(**leaves, backend=backend)
    assert loss.grad_fn is not None
    saved = {x.data_ptr() for x in loss.grad_fn.saved_tensors}
    loss.backward()
    assert {leaves[name].grad.data_ptr() for name in OP.learned} == saved


FAR = """
import torch
from fastdistill import linear_mse

device, rows, step = "cuda" if torch.cuda.is_available() else "cpu", {rows}, {step}
storage = torch.empty((rows - 1) * step + 16 + rows, dtype=torch.float16, device=device)
near = [torch.randn(rows, width, device=device).half() for width in (8, 8, rows)]  # student, weight, teacher
far = [storage.as_strided(x.shape, (step, 1), first).copy_(x) for x, first in zip(near, (0, 8, 16))]
found = []
for student, weight, teacher in (near, far):
    student, weight = student.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = linear_mse(student, weight, teacher, backend="triton")
    found.append((loss, *torch.autograd.grad(loss, (student, weight))))
assert found[0][0] > 0.1
for x, y in zip(*found):
    torch.testing.assert_close(x, y)
print("the same")
"""


@pytest.mark.parametrize("rows,step", [(70, 2**25), (2, 2**31)], ids=["within-a-tile", "stride-beyond-32-bits"])
def test_rows_far_apart(rows: int, step: int) -> None:
    """The first tokens of long sequences, `hidden[:, 0]`, lie so far apart that 32-bit offsets in a tile overflow.

    The test runs in its own process, which an invalid address would end. Only pages that hold values become resident.
    """
    pytest.importorskip("triton", reason="the kernel needs it")
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAR.format(rows=rows, step=step)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "the same\n"), run.stderr[-2000:]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": torch.tensor(1.0)}, ValueError, r"^student is a scalar; it should be \(\*, d_s\)"),
    ({"student": torch.ones(3, 5, 7)}, ValueError, r"^weight has shape \(10, 6\); it should be \(d_t, 7\)"),
    ({"weight": torch.ones(6)}, ValueError, r"^weight has shape \(6,\); it should be \(d_t, 6\).*nn\.Linear"),
    ({"weight": torch.ones(6, 10)}, ValueError, r"^weight has shape \(6, 10\); it should be \(d_t, 6\)"),
    ({"weight": None}, ValueError, r"^teacher has shape \(3, 5, 10\); it should be \(3, 5, 6\).*weight is None"),
    ({"teacher": torch.ones(3, 5, 9)}, ValueError, r"^teacher has shape \(3, 5, 9\); it should be \(3, 5, 10\)"),
    ({"teacher": torch.ones(3, 4, 10)}, ValueError, r"^teacher has shape \(3, 4, 10\); it should be \(3, 5, 10\)"),
    ({"teacher": torch.ones(15, 10)}, ValueError, r"^teacher has shape \(15, 10\); it should be \(3, 5, 10\)"),
    ({"bias": torch.ones(6)}, ValueError, r"^bias has shape \(6,\); it should be \(10,\)"),
    ({"bias": torch.ones(1)}, ValueError, r"^bias has shape \(1,\); it should be \(10,\)"),
    ({"weight": torch.ones(10, 6).bfloat16()}, TypeError, r"student torch\.float32, weight torch\.bfloat16.*autocast"),
    ({"bias": torch.ones(10).double()}, TypeError, r"bias torch\.float64 should have one dtype"),
    (
        {"weight": torch.ones(0, 6), "teacher": torch.ones(3, 5, 0), "bias": None},
        ValueError,
        r"^teacher has width 0.*at least one feature",
    ),
    ({"reduction": "batchmean"}, ValueError, r"^reduction is 'batchmean'; it should be one of 'mean', 'sum', 'none'"),
    ({"reduction": "none", "num_items": 3}, ValueError, r"^num_items is given but reduction is 'none'"),
]


@pytest.mark.parametrize("wrong,kind,message", BAD)
def test_bad_arguments(wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(kind, match=message):
        fastdistill.linear_mse(**{**hidden(), **wrong}, backend=backend)
