"""How a result is judged.

The truth is `fastdistill.reference` in float64 on the CPU, called with the very values the op was given. The measure is
`||out - truth|| / ||truth||` of each tensor on its own: the value and every gradient. The bound is twice what the
textbook formula in plain PyTorch reaches at the same dtype, plus a few units in the last place, so that it scales with
the data: nothing here is absolute, and a gradient whose entries are 1e-9 is held to the same standard as one of 1.
In float64 the oracle's own rounding is a part of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastdistill import cuda

# Every backend that must honour the contract. A new one joins the whole suite here. Triton's kernels run on CPU tensors
# in its interpreter, where it is installed; csrc's are simulated in the long run of all tests (_simulated.py).
BACKENDS = ("torch", "triton") if find_spec("triton") else ("torch",)
if torch.cuda.is_available() and cuda.unavailable(torch.device("cuda")) is None:
    BACKENDS += ("cuda",)

# Beyond this the textbook formula is itself so far off that a comparison with it would show nothing.
LOOSEST_BOUND = 0.02

# Few enough that a value off by 0.04% fails, in every dtype.
TINY = {torch.float32: 8 * torch.finfo(torch.float32).eps, torch.float64: 64 * torch.finfo(torch.float64).eps}

Outcome = dict[str, Tensor]  # "value", and the gradient of each learned input by the input's name


def evaluate(
    function: Callable[..., Tensor],
    inputs: dict[str, Any],
    learned: Iterable[str],
    *,
    upstream: Tensor | None = None,  # gradient that arrives at the value; None: 1
    **keywords: Any,
) -> Outcome:
    """Value and gradients of `function(**inputs, **keywords)`."""
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
    """The floating tensors in `dtype`; labels, indices and masks as they are."""
    return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}


def on_cpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: x.cpu() if isinstance(x, Tensor) else x for k, x in inputs.items()}


def error(out: Tensor, truth: Tensor) -> float:
    """`||out - truth|| / ||truth||`; infinities that agree count as equal, NaN never passes a bound."""
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, should be {tuple(truth.shape)}"
    out, truth = out.double(), truth.to(out.device, torch.float64)
    distance = torch.where(out == truth, 0.0, out - truth).norm()
    return 0.0 if distance == 0 else (distance / truth.norm()).item()


def errors(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    assert outcome.keys() == truth.keys()
    return {name: error(outcome[name], truth[name]) for name in truth}


def assert_accurate(
    outcome: Outcome, truth: Outcome, textbook: Outcome, loosest: float = LOOSEST_BOUND, value_off: float = 0.0
) -> None:
    """Each tensor at most twice as far from the truth as the textbook formula at the same dtype; the value, where its
    arithmetic is by design another, `value_off` more."""
    tiny = TINY[outcome["value"].dtype]
    failures = []
    baseline = errors(textbook, truth)
    for name, found in errors(outcome, truth).items():
        bound = 2 * baseline[name] + tiny + (value_off if name == "value" else 0)
        assert bound < loosest, f"{name}: the textbook formula is off by {baseline[name]:.1e}, choose other data"
        if not found <= bound:
            failures.append(f"{name}: error {found:.2e}, bound {bound:.2e}")
    assert not failures, "; ".join(failures)


def assert_same(outcome: Outcome, expected: Outcome, within: float = 0.0) -> None:
    """Two ways of computing one thing: the same bits, or relative errors `within` a few units in the last place."""
    found = errors(outcome, expected)
    assert all(value <= within for value in found.values()), found
    assert all(outcome[name].dtype == expected[name].dtype for name in expected)


def stacked(outcomes: list[Outcome]) -> Outcome:
    """Several outcomes as one, for errors of single numbers: one of them may be small by luck."""
    return {name: torch.stack([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
