"""`python -m bench.host [--check]`: times what a call of each op costs the host, forward and backward, beside eager.

Tensors are so small that only the work around them counts. Each op runs as the eager formula of eager.py, with
`backend="torch"`, and with `backend="triton"` where each launch is replaced by a function that counts it: so the last
shows the host's part of a call on a card, without the launches themselves (5 to 10 us each there). The three take turns
in one process on one thread; times are medians over rounds, and a ratio is the median of the rounds' ratios.

    torch, triton  microseconds forward + backward, and their ratio to eager's
    launches       of Triton kernels, forward + backward
    kernels        other operations that launch a kernel on a card, with `backend="triton"`: PyTorch's own, as its
                   profiler reports them, without views and allocations

`--check` exits with 1 where a ratio or a count is worse than its bound in goals.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastdistill
from bench import eager, goals

ROUNDS, CALLS = 15, 10
# Operations without a kernel of their own.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "as_strided", "view", "_unsafe_view", "reshape",
    "_reshape_alias", "expand", "expand_as", "unsqueeze", "squeeze", "flatten", "unflatten", "slice", "select",
    "narrow", "split", "chunk", "unbind", "transpose", "t", "permute", "detach", "detach_", "alias", "lift_fresh",
    "result_type", "view_as", "broadcast_to", "set_", "to", "contiguous", "resolve_conj",
    "promote_types", "scalar_tensor",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    options: str
    learned: list[Tensor]
    eager: Callable[[], Tensor]
    ours: Callable[[str], Tensor]  # of the backend

    @property
    def name(self) -> str:
        return self.op + (f", {self.options}" if self.options else "")


@dataclass(frozen=True)
class Result:
    case: Case
    micro: dict[str, tuple[float, float]]  # "eager", "torch", "triton": microseconds forward, backward
    ratios: dict[str, float]  # "torch", "triton": forward + backward, to eager's
    launches: tuple[int, int]  # forward, backward
    kernels: tuple[int, int]


def cases() -> Iterator[Case]:
    """Yields each op with tensors of a few numbers; the attention losses also with padding and a causal mask."""
    batch, heads, length, d_s, d_t, classes, k = 2, 2, 8, 8, 16, 32, 4

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape)

    query, key = (randn(batch, heads, length, d_s).requires_grad_() for _ in range(2))
    attention = [query, key, randn(batch, heads, length, d_t), randn(batch, heads, length, d_t)]
    mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
    pairs = mask.sum() * length * heads
    for op in ("attention_mse", "attention_kl"):
        usual, ours = getattr(eager, op), getattr(fastdistill, op)
        for options in ({}, {"is_causal": True}):
            name = "causal" if options else ""
            yield Case(op, name, [query, key], _of(usual, *attention, **options), _backend(ours, *attention, **options))
    yield Case(
        "attention_mse", "masks", [query, key], _of(_masked_attention_mse, *attention, mask, pairs),
        _backend(fastdistill.attention_mse, *attention, key_mask=mask, query_mask=mask, num_items=pairs),
    )  # fmt: skip

    x, weight = randn(length, d_s).requires_grad_(), randn(d_t, d_s).requires_grad_()
    bias, t = randn(d_t).requires_grad_(), randn(length, d_t)
    learned = [x, weight, bias]
    yield Case(
        "linear_mse", "", learned, _of(eager.linear_mse, x, weight, t, bias),
        _backend(fastdistill.linear_mse, x, weight, t, bias),
    )  # fmt: skip

    student, teacher = randn(length, classes).requires_grad_(), randn(length, classes)
    for op, usual in eager.LOGITS_LOSSES.items():
        both = (student, teacher)
        yield Case(op, "", [student], _of(usual, *both), _backend(getattr(fastdistill, op), *both))
    values, indices = teacher.log_softmax(-1).topk(k)
    listed = (student, values, indices)
    op = "topk_soft_cross_entropy"
    yield Case(
        op, "", [student], _of(eager.topk_soft_cross_entropy, *listed), _backend(getattr(fastdistill, op), *listed)
    )

    head, teacher_head = randn(classes, d_s).requires_grad_(), randn(classes, d_t)
    for op in ("linear_kl_div", "linear_jsd"):
        usual = eager.LOGITS_LOSSES[op.removeprefix("linear_")]
        yield Case(
            op, "", [x, head], lambda usual=usual: usual(x @ head.mT, t @ teacher_head.mT),
            _backend(getattr(fastdistill, op), x, head, t, teacher_head),
        )  # fmt: skip


def _of(loss: Callable[..., Tensor], *inputs: Tensor, **options: bool) -> Callable[[], Tensor]:
    return lambda: loss(*inputs, **options)


def _backend(loss: Callable[..., Tensor], *inputs: Tensor, **options: object) -> Callable[[str], Tensor]:
    return lambda backend: loss(*inputs, **options, backend=backend)


def _masked_attention_mse(
    query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, mask: Tensor, pairs: Tensor
) -> Tensor:
    difference = (
        query @ key.mT * query.shape[-1] ** -0.5 - teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    )
    allowed = mask[:, None, :, None] & mask[:, None, None, :]
    return difference.masked_fill(~allowed, 0).square().sum() / pairs


@contextmanager
def stubbed() -> Iterator[list[int]]:
    """Replaces each launch of a Triton kernel by a count; launchers choose tiles for an H100 or H200."""
    from fastdistill.kernels import _common
    from triton.runtime.jit import JITFunction

    from fastdistill.functional import _dispatch

    launches = [0]

    def run(self, *arguments, grid, warmup, **keywords):  # type: ignore[no-untyped-def]
        launches[0] += 1

    with (
        patch.object(JITFunction, "run", run),
        patch.object(_common, "arch_of", lambda x: "sm_90"),
        patch.object(_dispatch, "no_triton", lambda device: None),  # the tensors are on the CPU
    ):
        yield launches


def measure(case: Case, rounds: int = ROUNDS) -> Result:
    calls = {"eager": case.eager, "torch": lambda: case.ours("torch"), "triton": lambda: case.ours("triton")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with stubbed() as launched:
        for loss in calls.values():  # warm up
            _timed(loss, case.learned)
        for _ in range(rounds):
            for name, loss in calls.items():
                parts = [_timed(loss, case.learned) for _ in range(CALLS)]
                times[name].append((statistics.median(x for x, _ in parts), statistics.median(x for _, x in parts)))
        before = launched[0]
        value, forward = _profiled(lambda: case.ours("triton"))
        middle = launched[0]
        one = torch.ones(())
        _, backward = _profiled(lambda: torch.autograd.grad(value, case.learned, one))
        launches = middle - before, launched[0] - middle
    micro = {name: tuple(1e6 * statistics.median(part) for part in zip(*of, strict=True)) for name, of in times.items()}
    ratios = {
        name: statistics.median(sum(ours) / sum(usual) for ours, usual in zip(times[name], times["eager"], strict=True))
        for name in ("torch", "triton")
    }
    return Result(case, micro, ratios, launches, (forward, backward))  # type: ignore[arg-type]


def _timed(loss: Callable[[], Tensor], learned: list[Tensor]) -> tuple[float, float]:
    start = time.perf_counter()
    value = loss()
    middle = time.perf_counter()
    torch.autograd.grad(value, learned)
    return middle - start, time.perf_counter() - middle


def _profiled(run: Callable[[], Any]) -> tuple[Any, int]:
    """Returns the result, and how many operations would launch a kernel of PyTorch on a card."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = run()
    return out, sum(map(_kernels, (event for event in profiler.events() if event.cpu_parent is None)))


def _kernels(event: Any) -> int:
    """Counts the kernels below an event; what converts the Python numbers of an operation launches none."""
    is_wrapper = not event.name.startswith("aten::") or event.name.removeprefix("aten::") in FREE
    within = [child for child in event.cpu_children if child.name.startswith("aten::")]
    if is_wrapper or any(child.name.removeprefix("aten::") not in FREE for child in within):
        return sum(map(_kernels, event.cpu_children))
    return 1


def table(results: list[Result]) -> str:
    lines = [
        f"torch {torch.__version__}, one thread; microseconds forward + backward",
        "",
        "| op | eager | torch | times eager | triton, launches stubbed | times eager | launches | kernels |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        eager_, torch_, triton_ = (
            " + ".join(f"{part:.0f}" for part in result.micro[name]) for name in ("eager", "torch", "triton")
        )
        lines.append(
            f"| {result.case.name} | {eager_} | {torch_} | {result.ratios['torch']:.2f} | {triton_} "
            f"| {result.ratios['triton']:.2f} | {' + '.join(map(str, result.launches))} "
            f"| {' + '.join(map(str, result.kernels))} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is worse than its bound")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter has no launches to replace; unset it")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = [measure(case, arguments.rounds) for case in cases() if arguments.op in case.name]
    print(table(results))
    figures = [(goal, goal.figure(x)) for goal in goals.HOST for x in results if goal.what == x.case.name]
    print("", goals.bounds_table(figures), sep="\n")
    failures = [fault for goal, figure in figures for fault in goal.faults(figure)] if arguments.check else []
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
