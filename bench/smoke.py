"""`python -m bench.smoke [--minutes 3] [--out FILE]`: runs one case of every kernel and dtype, to see what is broken.

Each case is a loss and its gradients at a size that takes milliseconds. It is compiled, run, compared with the
definition in float64, and run again for its time: a line each, written as it goes, the dtypes of training first.
Several processes share the cases, since most of the time goes into compiling; so the times are no measurements. A case
that hangs, crashes, or leaves the card unusable (an illegal address) ends its process, and another one goes on with the
next case. Out of time, the cases that are left are named. bfloat16 runs every variant, the other dtypes one of each
kernel. Without a card it runs small tensors in Triton's interpreter (`TRITON_INTERPRET=1`), whose bfloat16 is wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

import fastdistill
from bench.gpu import usable

SECONDS = 90  # after which a case is given up; its first one imports libraries as well
# The largest error ||out - exact|| / ||exact|| of the loss and of each gradient.
ERROR = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Case:
    op: str
    name: str  # what is special about it
    inputs: Callable[[], dict[str, Any]]  # in float32, on the CPU
    learned: tuple[str, ...]
    backend: str = "triton"
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = tuple(ERROR)

    def __str__(self) -> str:
        return f"{self.op} ({self.name}), {self.backend}"


TRAINING = (torch.bfloat16,)


def cases(small: bool) -> Iterator[Case]:
    """Yields calls that together run every kernel, in every variant that has code of its own."""
    batch, heads, length, tokens, classes, long = (1, 2, 8, 5, 40, 9000) if small else (4, 12, 512, 700, 8000, 50000)
    learned = ("student_query", "student_key")

    def attention(d_s: int, d_t: int, length: int = length) -> Callable[[], dict[str, Any]]:
        return lambda: {
            f"{side}_{part}": torch.randn(batch, heads if part == "query" else heads // 2, length, d)
            for side, d in (("student", d_s), ("teacher", d_t))
            for part in ("query", "key")
        }

    def masked(inputs: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            made = inputs()
            rows = made["student_query"].shape[2]
            mask = (torch.arange(rows) < rows - rows // 3).expand(batch, rows)
            return made | {"key_mask": mask, "query_mask": mask}

        return call

    def dense(inputs: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        return lambda: inputs() | {"attn_mask": torch.rand(batch, 1, length, length) < 0.7}

    def packed(inputs: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def row() -> dict[str, Any]:
            tensors = {name: x[:1] for name, x in inputs().items()}
            tokens = tensors["student_query"].shape[2]
            return tensors | {"cu_seqlens": torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)}

        return row

    yield Case("attention_mse", "26 / 64, masks", masked(attention(26, 64)), learned)
    yield Case("attention_mse", "64 / 64, short", attention(64, 64, length // 4), learned, dtypes=TRAINING)
    short = masked(attention(26, 64, min(length, 128)))
    yield Case("attention_mse", "26 / 64, masks, short", short, learned, options={"reduction": "mean"}, dtypes=TRAINING)
    yield Case("attention_mse", "causal", attention(32, 64), learned, options={"is_causal": True})
    scan = attention(32, 64, 2100)
    yield Case("attention_mse", "causal, long", scan, learned, options={"is_causal": True})
    yield Case("attention_mse", "mask of pairs", dense(attention(64, 64)), learned)
    yield Case("attention_mse", "384 / 768", attention(384, 768), learned, dtypes=TRAINING)
    yield Case("attention_mse", "window", attention(64, 64), learned, options={"window": (length // 8, 3)})
    yield Case("attention_mse", "packed", packed(attention(64, 64, max(2 * length, 600))), learned)
    scan = packed(attention(64, 64, 4200))
    yield Case("attention_mse", "packed, causal, long", scan, learned, options={"is_causal": True}, dtypes=TRAINING)
    yield Case("attention_kl", "packed, causal", packed(attention(64, 64)), learned, options={"is_causal": True})
    yield Case("attention_kl", "64 / 64, masks", masked(attention(64, 64)), learned)
    yield Case(
        "attention_kl", "26 / 64, causal", attention(26, 64), learned, options={"is_causal": True}, dtypes=TRAINING
    )

    def hidden() -> dict[str, Any]:
        return {
            "student": torch.randn(tokens, 312), "weight": torch.randn(768, 312) / 312**0.5,
            "teacher": torch.randn(tokens, 768), "bias": torch.randn(768), "mask": torch.rand(tokens) < 0.7,
        }  # fmt: skip

    yield Case("linear_mse", "312 to 768, mask", hidden, ("student", "weight", "bias"))

    def logits(classes: int) -> Callable[[], dict[str, Any]]:
        return lambda: {f"{side}_logits": 2 * torch.randn(tokens, classes) for side in ("student", "teacher")}

    def listed(classes: int) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            values, indices = (2 * torch.randn(tokens, classes)).log_softmax(-1).topk(16)
            return {"student_logits": torch.randn(tokens, classes), "topk_logprobs": values, "topk_indices": indices}

        return call

    kinds: list[tuple[str, dict[str, Any]]] = [
        ("soft_cross_entropy", {}), ("kl_div", {}), ("kl_div", {"reverse": True}), ("kl_div", {"skew": 0.1}),
        ("jsd", {}), ("tvd", {}),
    ]  # fmt: skip
    for backend, all_of_them in (("triton", tuple(ERROR)), ("cuda", tuple(ERROR)[:3])):
        for op, options in kinds:
            for name, size in (("row in registers", classes), ("long row", long)):
                dtypes = all_of_them if not options and op in ("kl_div", "jsd") else TRAINING
                name = ", ".join([name, *options])
                yield Case(op, name, logits(size), ("student_logits",), backend, options, dtypes)
    for tail in ("renormalize", "bucket"):
        for reverse in (False, True):
            options, dtypes = {"tail": tail, "reverse": reverse}, TRAINING if reverse else tuple(ERROR)
            name = tail + ", reverse" * reverse
            yield Case("topk_soft_cross_entropy", name, listed(classes), ("student_logits",), "triton", options, dtypes)

    def heads_of(labels: bool) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            made = {
                "student": torch.randn(tokens, 64), "student_weight": torch.randn(classes, 64) / 8,
                "teacher": torch.randn(tokens, 128), "teacher_weight": torch.randn(classes, 128) / 11,
            }  # fmt: skip
            return made | ({"labels": torch.randint(-1, classes, (tokens,))} if labels else {})

        return call

    both = ("student", "student_weight")
    yield Case("linear_kl_div", "all tokens", heads_of(False), both, dtypes=TRAINING)
    yield Case("linear_kl_div", "labels", heads_of(True), both, options={"alpha": 0.5, "ignore_index": -1})


def runs(device: torch.device, only: str = "") -> list[tuple[Case, torch.dtype]]:
    """Returns the cases that can run here and whose op and name contain `only`, those of the first dtype first."""
    on_card = device.type == "cuda"
    found = [(case, dtype) for case in cases(small=not on_card) for dtype in case.dtypes if only in str(case)]
    if not on_card:
        found = [(case, torch.float16 if dtype == torch.bfloat16 else dtype) for case, dtype in found]
        found = [run for i, run in enumerate(found) if run not in found[:i]]
    if not on_card or torch.cuda.get_device_capability() < (9, 0):
        found = [run for run in found if run[0].backend != "cuda"]
    return sorted(found, key=lambda run: list(ERROR).index(run[1]))


def line(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Runs a case; returns whether it is right, and its error and times, or what it raised."""
    torch.manual_seed(0)
    inputs = {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in case.inputs().items()}
    try:
        start = time.perf_counter()
        out = _evaluate(case, inputs, case.backend)
        _finish(device)
        first = time.perf_counter() - start
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        worst = max(map(_error, out, _evaluate(case, wide, "reference")))
        start = time.perf_counter()
        again = _evaluate(case, inputs, case.backend)
        _finish(device)
        second = time.perf_counter() - start
    except Exception as problem:  # a smoke test reports whatever a case raises, and goes on
        return (
            False,
            f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}",
        )
    same = all(a.equal(b) or a.isnan().any() for a, b in zip(out, again, strict=True))
    verdict = ("ok" if worst <= ERROR[dtype] else "WRONG") + ("" if same else ", NOT THE SAME AGAIN")
    return verdict == "ok", f"{verdict}, error {worst:.1e}, first {first:.2f} s, then {1e3 * second:.2f} ms"


def _evaluate(case: Case, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.learned}
    # The sum, since the mean's gradients would underflow in float16.
    options = {"reduction": "sum"} | case.options
    value = getattr(fastdistill, case.op)(**inputs | leaves, **options, backend=backend)
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]


def _error(out: Tensor, exact: Tensor) -> float:
    error = ((out.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def title(case: Case, dtype: torch.dtype) -> str:
    return f"{case}, {str(dtype).removeprefix('torch.')}: "


def serve(device: torch.device, chosen: list[tuple[Case, torch.dtype]], numbers: list[int], end: float) -> int:
    """Runs cases and prints a line each until `end`, or until one leaves the card unusable. Returns the exit code."""
    for number in numbers:
        if time.time() > end:
            return 0
        print(title(*chosen[number]), end="", flush=True)  # so that the name of a case that hangs is there
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(line(*chosen[number], device)[1], flush=True)
        faulthandler.cancel_dump_traceback_later()
        if not usable():
            return 1
    return 0


def shepherd(arguments: list[str], titles: dict[int, str], write: Callable[[str], None]) -> None:
    """Runs the cases with these numbers and titles in a process, and those after one that ended it in another."""
    left = list(titles)
    while left:
        command = [sys.executable, "-m", "bench.smoke", *arguments, "--cases", *map(str, left)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        before = len(left)
        for text in process.stdout or ():
            if left and text.startswith(titles[left[0]]):  # anything else is printed by a library
                del left[0]
            write(text if text.endswith("\n") else f"{text}HANGS OR CRASHES\n")
        if process.wait() == 0 or len(left) == before:  # all of them, or out of time; or none can run
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--out", type=Path, help="file to append the lines to, beside the standard output")
    parser.add_argument("--only", default="", help="only cases whose op and name contain this")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 14), help="that run cases at once")
    parser.add_argument("--cases", nargs="+", type=int, help="numbers of the cases that this process runs itself")
    parser.add_argument("--end", type=float, help="when it ends, in seconds since 1970")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = arguments.end or time.time() + 60 * arguments.minutes
    chosen = runs(device, arguments.only)
    if not chosen:
        parser.error(f"--only is {arguments.only!r}, which no case contains: leave it out to see their names")
    if arguments.cases:
        return serve(device, chosen, arguments.cases, end)
    lock = Lock()
    found: list[str] = []

    def write(text: str) -> None:
        with lock:
            found.append(text)
            print(text, end="", flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text)

    # One process waits for the compiler of csrc/, and the others share Triton's cases.
    titles = {number: title(*run) for number, run in enumerate(chosen)}
    of_csrc = [number for number in titles if chosen[number][0].backend == "cuda"]
    others = [number for number in titles if number not in of_csrc]
    shares = [of_csrc, *(others[start :: arguments.processes] for start in range(arguments.processes))]
    passed_on = ["--only", arguments.only, "--end", str(end)]
    threads = [
        Thread(target=shepherd, args=(passed_on, {number: titles[number] for number in share}, write))
        for share in shares if share
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ran = [text for text in found if text.startswith(tuple(titles.values()))]
    missed = [case for case in titles.values() if not any(text.startswith(case) for text in ran)]
    write("".join(f"{case}not reached\n" for case in missed))
    failed = len(chosen) - sum(": ok, error " in text for text in ran)
    write(f"{failed} of {len(chosen)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
