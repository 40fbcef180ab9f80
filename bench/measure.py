"""What every benchmark measures of one call, forward and backward: seconds, and peak bytes beyond its inputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cost import Cost

IMPLEMENTATIONS = ("fastdistill", "eager", "torch.compile")


def step(loss: Callable[..., Tensor], student: list[Tensor]) -> Callable[[], None]:
    """One forward and backward; the gradients go to `student`."""

    def run() -> None:
        torch.autograd.grad(loss(), student)

    return run


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at once during the call, gradients included, what it found excluded."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def record(
    benchmark,
    op: str,
    shape: str,
    implementation: str,
    loss: Callable[..., Tensor],
    student: list[Tensor],
    cost: Cost,
) -> None:
    """Times the call with pytest-benchmark and leaves in its JSON what the table needs."""
    if implementation == "torch.compile":
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True)
    run = step(loss, student)
    run()
    gradients = sum(x.numel() * x.element_size() for x in student)
    benchmark.extra_info.update(
        op=op, shape=shape, implementation=implementation, extra_bytes=max(0, peak_bytes(run) - gradients),
        least_bytes=cost.least.memory, least_flops=cost.least.flops,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
