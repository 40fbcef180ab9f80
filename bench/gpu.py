"""`python -m bench.gpu --out DIR [--minutes 60]`: runs everything that needs a card, in one command.

First come three minutes of one case of every kernel (`bench.smoke`), which say what is broken; then the contract of the
ops, the benchmarks that have goals, large tensors, the other benchmarks and tests, and the sanitizers, as far as the
minutes reach. Nothing is
installed and no network is used. Finished work stays in DIR: after an interruption, or out of time, the same command
continues where it stopped, a benchmark at its next case, a stage of tests at its beginning. DIR then holds

    summary.md         the page to read first: what passed, and the goals met and missed
    results.json       every measurement (`bench.report`)
    NN-stage.txt       the output of each stage
    state.json         what is finished

Exit codes: 0 all done, 1 a test or a benchmark failed, 2 wrong arguments or missing packages, 3 no GPU, 4 out of time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITH_GOALS = ("attention_mse", "attention_packed", "linear_logits", "logits", "linear_mse")
NEEDED = ("torch", "triton", "numpy", "pytest", "pytest_benchmark", "hypothesis", "psutil", "fastdistill.kernels")
SMOKE = "smoke"
LEAST = 20  # seconds that must be left to begin another stage

# The contract of every op on every backend.
CONTRACT = [
    f"tests/{name}.py"
    for name in (
        "losses/test_contract", "losses/test_logits_ops", "losses/test_linear_logits_ops", "losses/test_hidden_ops",
        "losses/test_attention_ops", "losses/test_losses", "losses/test_memory", "losses/test_properties",
        "train/test_convergence",
    )
]  # fmt: skip
ON_CARDS = ["tests/losses/test_gpu.py", "tests/losses/test_csrc.py"]
LARGE = "two_to_the_31 or real_sizes or large_vocabulary"  # tests that take tens of gigabytes


def stages(results: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each stage and what `python -m` runs, in order."""
    yield SMOKE, ["bench.smoke", "--minutes", "3"]
    one_by_one = ["-q", "-rfE", "--continue-on-collection-errors"]
    # The tests spend most of their time compiling kernels: run several at once if pytest-xdist is installed.
    tests = [*one_by_one, *(["-n", str(min(os.cpu_count() or 1, 8))] if find_spec("xdist") else [])]
    measured = ["--benchmark-only", "-q", "--preset", "full", "--results", str(results)]
    yield "tests for a GPU", ["pytest", *ON_CARDS, "-m", "gpu", "-k", f"not ({LARGE} or sanitizer)", *tests]
    for backend in ("triton", "cuda", "torch"):
        only = ["--backend", backend, "-m", "not slow", "-k", f"not ({LARGE})"]
        yield f"contract: {backend}", ["pytest", *CONTRACT, *only, *tests]
    for bench in WITH_GOALS:
        yield f"goals: {bench}", ["pytest", f"bench/bench_{bench}.py", "-m", "goal", *measured]
    yield "large tensors", ["pytest", ON_CARDS[0], *CONTRACT[:2], "-k", LARGE, *one_by_one]
    for bench in (*WITH_GOALS, "attention_kl", "step"):
        yield f"benchmarks: {bench}", ["pytest", f"bench/bench_{bench}.py", *measured]
    if find_spec("datasets") and find_spec("transformers"):  # trainer, commands, and tests that need no card
        others = ["tests", *(f"--ignore={path}" for path in CONTRACT), "-m", "not data and not slow and not gpu"]
        yield "other tests", ["pytest", *others, *tests]
    yield "sanitizers", ["pytest", *ON_CARDS, "-m", "gpu", "-k", "sanitizer", *tests]


def missing() -> list[str]:
    absent = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as problem:
            absent.append(f"{name} ({problem})")
    return absent


def run(arguments: list[str], seconds: float, log: Path) -> int | None:
    """Returns the exit code, or None if it ran out of time: SIGINT then lets pytest write what it has."""
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip("= ") if lines else ""


def summary(out: Path, state: dict, device: str) -> str:
    from bench import goals, report

    lines = [f"# fastdistill on {device}", ""]
    for name, _ in stages(out / "results.json"):
        lines.append(f"- {name}: {state.get(name, {}).get('outcome', 'not begun')}")
    results = out / "results.json"
    if results.exists():
        result = report.read(results)
        lines += ["", "## Goals", "", goals.table(result), "", "## All measurements", ""]
        lines += ["```", report.summary(result["records"]), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; continued if it exists")
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default 60)")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it should be above 0")
    end = time.monotonic() + 60 * options.minutes
    absent = missing()
    if absent:
        print("not importable: " + "; ".join(absent), file=sys.stderr)
        print("install the library from its checkout: pip install --no-deps --no-build-isolation -e .", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False), so these stages cannot run:", file=sys.stderr)
        for name, arguments in stages(options.out / "results.json"):
            print(f"  {name}: {shlex.join(arguments)}", file=sys.stderr)
        print(
            "Without a GPU: `python -m bench.static --check` compiles every kernel for four architectures, "
            "`make test` runs them in Triton's interpreter, `make bench` measures the CPU.",
            file=sys.stderr,
        )
        return 3

    from bench import report

    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    state_path = out / "state.json"
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if state.setdefault("device", device) != device:
        parser.error(f"{options.out} holds results of {state['device']}, this is {device}; give another --out")
    late = False
    for number, (name, arguments) in enumerate(stages(out / "results.json")):
        if "code" in state.get(name, {}):
            continue
        left = end - time.monotonic()
        if left < LEAST:
            late = True
            break
        print(f"[{60 * options.minutes - left:5.0f} s] {name}", flush=True)
        log = out / f"{number:02d}-{report.slug(name)}.txt"
        code = run(arguments, min(left, 240) if name == SMOKE else left, log)
        if name == SMOKE and code is None:  # a kernel hangs: the log ends with its name
            code = 1
        # 5: pytest collected nothing, because every case is measured already.
        state[name] = {"outcome": "out of time: " + last_line(log) if code is None else last_line(log)}
        if code is None:
            late = True
        else:
            state[name]["code"] = 0 if code == 5 else code
        report.write_atomically(state_path, lambda file: file.write_text(json.dumps(state, indent=1) + "\n"))
        report.write_atomically(out / "summary.md", lambda file: file.write_text(summary(out, state, device)))
        if late:
            break
    page = summary(out, state, device)
    report.write_atomically(out / "summary.md", lambda file: file.write_text(page))
    print(page)
    if any(stage.get("code") for stage in state.values() if isinstance(stage, dict)):
        return 1
    return 4 if late else 0


if __name__ == "__main__":
    sys.exit(main())
