"""Judges the accuracy of a result.

The truth is `fastdistill.reference` in float64 on the CPU, called with exactly the values that the op was given. The
error is `||out - truth|| / ||truth||`, measured separately for the value and for every gradient. The bound is twice the
error of the textbook formula in plain PyTorch at the same dtype, plus a few units in the last place. It scales with the
data: no tolerance is absolute, and a gradient whose entries are 1e-9 is held to the same standard as one of 1.
In float64 the measured error includes the oracle's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastdistill import cuda

# Every backend that must honour the contract; a new one joins the whole suite here. Where Triton is installed, its
# kernels run on CPU tensors in its interpreter. The run of all tests also simulates csrc's kernels (_simulated.py).
BACKENDS = ("torch", "triton") if find_spec("triton") else ("torch",)
if torch.cuda.is_available() and cuda.unavailable(torch.device("cuda")) is None:
    BACKENDS += ("cuda",)

# Above this bound the textbook formula itself is so far off that a comparison with it shows nothing.
LOOSEST_BOUND = 0.02

# Small enough that a value off by 0.04% fails in every dtype.
TINY = {torch.float32: 8 * torch.finfo(torch.float32).eps, torch.float64: 64 * torch.finfo(torch.float64).eps}

Outcome = dict[str, Tensor]  # "value", and the gradient of each learned input by the input's name


def evaluate(
    function: Callable[..., Tensor],
    inputs: dict[str, Any],
    learned: Iterable[str],
    *,
    upstream: Tensor | None = None,  # upstream gradient of the value; None means 1
    **keywords: Any,
) -> Outcome:
    """Returns the value and the gradients of `function(**inputs, **keywords)`."""
    learned = tuple(learned)
    leaves = {name: inputs[name].detach().requires_grad_() for name in learned}
    value = function(**{**inputs, **leaves}, **keywords)
    if upstream is None:
        upstream = torch.ones_like(value)
    gradients = torch.autograd.grad(value, tuple(leaves.values()), upstream.to(value).expand(value.shape))
    return {"value": value.detach(), **dict(zip(learned, gradients, strict=True))}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return cast(inputs, torch.float64)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Casts floating tensors to `dtype`; leaves labels, indices and masks as they are."""
    return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}


def on_cpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: x.cpu() if isinstance(x, Tensor) else x for k, x in inputs.items()}


def error(out: Tensor, truth: Tensor) -> float:
    """Returns `||out - truth|| / ||truth||`. Infinities of one sign count as equal; NaN passes no bound."""
    assert out.shape == truth.shape, f"the shape is {tuple(out.shape)}; it should be {tuple(truth.shape)}"
    out, truth = out.double(), truth.to(out.device, torch.float64)
    distance = torch.where(out == truth, 0.0, out - truth).norm()
    return 0.0 if distance == 0 else (distance / truth.norm()).item()


def errors(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    assert outcome.keys() == truth.keys()
    return {name: error(outcome[name], truth[name]) for name in truth}


def assert_accurate(
    outcome: Outcome, truth: Outcome, textbook: Outcome, loosest: float = LOOSEST_BOUND, value_off: float = 0.0
) -> None:
    """Checks that each tensor is at most twice as far from the truth as the textbook formula at the same dtype.

    `value_off` is an extra allowance for the value, for ops that compute it with other arithmetic by design.
    """
    tiny = TINY[outcome["value"].dtype]
    failures = []
    baseline = errors(textbook, truth)
    for name, found in errors(outcome, truth).items():
        bound = 2 * baseline[name] + tiny + (value_off if name == "value" else 0)
        assert bound < loosest, f"{name}: the textbook formula is off by {baseline[name]:.1e}; choose other data"
        if not found <= bound:
            failures.append(f"{name}: error {found:.2e}, bound {bound:.2e}")
    assert not failures, "; ".join(failures)


def assert_same(outcome: Outcome, expected: Outcome, within: float = 0.0) -> None:
    """Checks that two computations agree: to the bit, or with relative errors of at most `within`."""
    found = errors(outcome, expected)
    assert all(value <= within for value in found.values()), found
    assert all(outcome[name].dtype == expected[name].dtype for name in expected)


def stacked(outcomes: list[Outcome]) -> Outcome:
    """Stacks outcomes into one, because the error of a single number may be small by luck."""
    return {name: torch.stack([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
