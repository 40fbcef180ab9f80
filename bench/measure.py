"""Measures one case: every implementation in the same run, in turns, against float64.

Times are medians over rounds. In a round each implementation has one turn; slow ones take part in fewer rounds. On a
GPU CUDA events measure the time; the L2 cache is flushed before each turn, and the inputs rotate over several sets. The
GPU waits until the host has launched a call's first millisecond of kernels, as it does in training, where the host is
ahead: `bench.host` measures the host. On a CPU it is the wall clock.

Memory is the peak allocation during a call, less what it returns (its gradients). The error is the largest
||out - exact|| / ||exact|| over the loss and the gradients. It is red beyond twice that of the eager formula at the
same dtype (or `ERROR`, if that is more), and always beyond `WORST`: then `bench.report` prints no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import psutil
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cost import CARDS, Cost
from bench.gpu import usable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FORWARD, BOTH, STEP = "forward", "forward + backward", "training step"
DIRECTIONS = [BOTH, pytest.param(FORWARD, marks=pytest.mark.full)]
ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
WORST = 0.1  # always red, whatever the eager formula's error, and for the eager formula too
USUAL = "eager", "usual"  # names of the baseline implementations
ROUNDS = {"quick": (3, 30), "full": (3, 50)}  # at least, at most
SECONDS = {"quick": 1.5, "full": 3.0}  # per implementation and case, within these bounds of rounds
HEAD_START = 1 << 21  # cycles that a GPU waits before a call, about 1 ms: the host has launched its kernels by then
SLOWEST = {"quick": 10.0, "full": 20.0}  # of one call; a slower implementation is measured once


@dataclass
class Implementation:
    name: str
    loss: Callable[..., Tensor]  # called with the case's inputs
    package: str | None = None  # the package it imports when called
    needs_gpu: bool = False
    memory: float = 0  # bytes beyond inputs and gradients; 0 where they surely fit the device


@dataclass
class Case:
    op: str
    sizes: dict[str, int]
    shape: str
    inputs: Callable[[], list[Tensor]]  # makes new inputs; those that require gradients come first
    exact: Callable[..., list[Tensor | None]]  # loss and gradients of the inputs in float64; None: not compared
    cost: Cost | None = None  # of forward and backward
    memory: float = 0  # bytes of inputs and float64; 0 where they surely fit the device


def randn(*shape: int, scale: float = 1.0, needs_grad: bool = False) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE).requires_grad_(needs_grad)


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles anew: after other cases torch.compile would make sizes dynamic."""
    torch.compiler.reset()
    return torch.compile(loss, fullgraph=True)


def ours(loss: Callable[..., Tensor], on_logits: bool = False, **options) -> list[Implementation]:
    """Returns a public function on every backend that runs here, first the one that `auto` takes."""
    from fastdistill import cuda
    from fastdistill.functional import pick_backend

    first = pick_backend("auto", DEVICE, (DTYPE, DTYPE) if on_logits else ())
    backends = [first, *(x for x in ("triton", "torch") if DEVICE.type == "cuda" and x != first)]
    if on_logits and first != "cuda" and cuda.unavailable(DEVICE) is None:
        backends.insert(1, "cuda")
    return [
        Implementation(
            f"fastdistill {backend}", lambda *inputs, backend=backend: loss(*inputs, backend=backend, **options)
        )
        for backend in backends
    ]


def usual(loss: Callable[..., Tensor], memory: float = 0) -> list[Implementation]:
    """Returns the formula in PyTorch, eager and compiled."""
    return [
        Implementation("eager", loss, memory=memory),
        Implementation("torch.compile", compiled(loss), memory=memory / 2),
    ]


def call(loss: Callable[..., Tensor], inputs: list[Tensor], direction: str) -> list[Tensor]:
    """Returns the loss and, in the direction `BOTH`, the gradients. A whole training step returns them itself."""
    if direction == STEP:
        return loss(*inputs)
    if direction == FORWARD:
        with torch.no_grad():
            return [loss(*inputs)]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])]


def peak_bytes(run: Callable[[], list[Tensor]]) -> tuple[int, float]:
    """Returns the peak allocation during the call, less what it returns, and its seconds."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run()
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            start = time.perf_counter()
            out = run()
            took = time.perf_counter() - start
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peak = max(accumulate((nbytes for _, nbytes in changes), initial=0))
    return max(0, peak - sum(x.nbytes for x in out)), took


def error(out: Sequence[Tensor], exact: Sequence[Tensor | None]) -> float | None:
    """Returns the largest relative error, or NaN. Exact gradients may cover the first heads and rows only."""
    if all(b is None for b in exact):
        return None
    errors = [
        ((_first(a, b).double() - b).norm() / b.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
        for a, b in zip(out, exact, strict=True)
        if b is not None
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _first(a: Tensor, b: Tensor) -> Tensor:
    return a if a.dim() == b.dim() else a.flatten(0, 1)[: b.shape[0], : b.shape[1]]  # (B, H, L, D) and (heads, rows, D)


def in_blocks(
    loss: Callable[..., Tensor], rows: list[Tensor], whole: Sequence[Tensor], count: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Computes a sum over rows and its gradients in float64, `count` rows at a time.

    `loss(*rows, *whole)` gets blocks of `rows`, cut along dimension -2, and all of `whole`. Only tensors that require a
    gradient get one.
    """
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    whole64 = [x.detach().double().requires_grad_(x.requires_grad) for x in whole]
    gradients: list[list[Tensor]] = [[] for x in rows if x.requires_grad]
    for block in zip(*(x.detach().split(count, -2) for x in rows), strict=True):
        block64 = [part.double().requires_grad_(x.requires_grad) for part, x in zip(block, rows, strict=True)]
        part = loss(*block64, *whole64)
        part.backward()
        total += part.detach()
        for gradient, x in zip(gradients, (x for x in block64 if x.requires_grad), strict=True):
            gradient.append(x.grad)
    return total, [torch.cat(x, -2) for x in gradients], [x.grad for x in whole64 if x.requires_grad]


def measure(
    benchmark, case: Case, implementations: Sequence[Implementation], direction: str, preset: str
) -> list[dict]:
    """Returns one record per implementation, for `bench.report`. `benchmark` times the first implementation."""
    least = case.cost.least if case.cost else None
    if direction == FORWARD and DEVICE.type == "cpu" and least and (least.flops > 1e11 or least.memory > 5e8):
        pytest.skip("on a CPU the forward alone is measured at smaller shapes")
    free = available()
    if case.memory > 0.8 * free:
        pytest.skip(f"would take about {case.memory / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free")
    torch.manual_seed(0)
    inputs = case.inputs()
    sets = [inputs]
    if DEVICE.type == "cuda":
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        of_a_set = max(sum(x.nbytes for x in inputs), 1)
        sets += [case.inputs() for _ in range(min(2 * cache // of_a_set, 15))]
    exact = case.exact(*inputs)
    card = CARDS.get(card_name() or "")
    model = case.cost if direction == BOTH else None
    records, running = [], []
    limit = ERROR[DTYPE]
    # The baseline comes first: its error sets the limit of the others.
    for each in sorted(implementations, key=lambda each: each.name not in USUAL):
        record = {
            "op": case.op, "shape": case.shape, "sizes": case.sizes, "dtype": str(DTYPE).removeprefix("torch."),
            "direction": direction, "implementation": each.name,
            "least_bytes": model.least.memory if model else None, "least_flops": model.least.flops if model else None,
            "floor_seconds": model.floor(card) if model and card else None,
        }  # fmt: skip
        records.append(record)

        def run(each: Implementation = each, inputs: list[Tensor] = inputs) -> list[Tensor]:
            return call(each.loss, inputs, direction)

        try:
            record["status"] = cannot(each) or "ok"
            if record["status"] == "ok":
                of = error(run(), exact[:1] if direction == FORWARD else exact)
                if each.name in USUAL and of is not None:
                    limit = min(max(limit, 2 * of), WORST)
                extra, once = peak_bytes(run)
                record |= {"error": of, "extra_bytes": extra}
                running.append((each, record, once))
        except ImportError as problem:
            record["status"] = f"missing: pip install {each.package or problem.name}"
        except (RuntimeError, torch.OutOfMemoryError) as problem:
            memory = isinstance(problem, torch.OutOfMemoryError) or "allocate memory" in str(problem)
            record["status"] = "out of memory" if memory else _failure(problem)
        except Exception as problem:  # no exception of a peer may end the run
            record["status"] = _failure(problem)
    del exact
    if not usable():
        running.clear()
        for record in records:
            if record["status"] == "ok":
                record["status"] = "failed: another implementation left the card unusable"
    records.sort(key=lambda record: [each.name for each in implementations].index(record["implementation"]))
    for each, record, once in list(running):
        record["error_limit"] = limit
        if once > SLOWEST[preset]:  # keep the one call that was seen
            record |= {"seconds": once, "low": once, "high": once, "rounds": 1}
            running.remove((each, record, once))
    running.sort(key=lambda entry: entry[0] is not implementations[0])
    if running:
        _take_turns(benchmark, running, sets, direction, preset)
    benchmark.extra_info["records"] = records
    return records


def broken(records: list[dict]) -> list[str]:
    """Returns which of our implementations failed or are wrong."""
    found = []
    for record in records:
        if record["implementation"].startswith("fastdistill"):
            name, error = record["implementation"], record.get("error")
            if record["status"].startswith("failed"):
                found.append(f"{name}: {record['status']}")
            elif error is not None and not error <= record["error_limit"]:
                found.append(f"{name}: its error is {error:.1e}, and the limit {record['error_limit']:.1e}")
    return found


def _take_turns(benchmark, running: list, sets: list[list[Tensor]], direction: str, preset: str) -> None:
    """Gives each implementation a turn per round, as many as fit its time; the first one's end the run."""
    least, most = ROUNDS[preset]
    rounds = {each.name: min(max(int(SECONDS[preset] / once), least), most) for each, _, once in running}
    times: dict[str, list[float]] = {each.name: [] for each, *_ in running}

    def turn(each: Implementation) -> None:
        inputs = sets[len(times[each.name]) % len(sets)]
        times[each.name].append(seconds(lambda: call(each.loss, inputs, direction)))

    def others() -> None:
        for each, *_ in running[1:]:
            if len(times[each.name]) < rounds[each.name]:
                turn(each)

    first = running[0][0]
    benchmark.pedantic(turn, args=(first,), setup=others, rounds=rounds[first.name])
    for each, record, _ in running:
        low, median, high = statistics.quantiles(times[each.name], n=4)
        record |= {"seconds": median, "low": low, "high": high, "rounds": len(times[each.name])}


_flush: Tensor | None = None


def seconds(run: Callable[[], object]) -> float:
    """Returns the seconds of one call, on a GPU with a cold cache."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    global _flush
    if _flush is None:
        _flush = torch.empty(
            4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size, dtype=torch.int8, device=DEVICE
        )
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush.zero_()
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cannot(each: Implementation) -> str | None:
    """Returns why an implementation is not run here, or None."""
    if each.needs_gpu and DEVICE.type != "cuda":
        return "needs a GPU"
    free = available()
    if each.memory > 0.8 * free:
        return f"not run: would take about {each.memory / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"
    return None


def available() -> int:
    """Returns the free bytes of the device."""
    return torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else psutil.virtual_memory().available


def _failure(problem: Exception) -> str:
    return f"failed: {type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"


def card_name() -> str | None:
    """Returns this device's name in the cost model, or None."""
    if DEVICE.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((card for card in CARDS if card in name), None)
