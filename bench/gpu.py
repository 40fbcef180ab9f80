"""`python -m bench.gpu --out DIR [--minutes 60]`: runs everything that needs a card, in one command.

First comes one case of every kernel (`bench.smoke`), which says what is broken; then tests that need a card, the
benchmarks that have goals, the contract of the ops on every backend, large tensors, the other benchmarks and tests, and
the sanitizers. A stage has a share of the time, and goes on after the others have had theirs. Nothing is installed and
no network is used.

A test or a benchmark is written down when it ends. Killed or out of time, the same command goes on where it stopped,
on another machine too if DIR is copied there. A kernel that hangs or crashes ends its own test only. DIR holds

    smoke.txt       the lines of the smoke test
    summary.md      the page to read first: what passed, what failed, the goals met and missed
    results.json    every measurement (`bench.report`)
    log.txt         the output of all stages
    journal.jsonl   a line a test (`bench.journal`)
    hangs.txt       where each test stood that was given up
    state.json      what is finished

Exit codes: 0 all done, 1 a test or a benchmark failed, 2 wrong arguments or missing packages, 3 no GPU, 4 out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WITH_GOALS = ("attention_mse", "attention_packed", "linear_logits", "logits", "linear_mse")
NEEDED = ("torch", "triton", "numpy", "fastdistill.kernels")
FOR_TESTS = ("pytest", "pytest_benchmark", "hypothesis", "psutil")  # without them only the smoke test runs
SMOKE, SMOKE_LINES = "smoke", "smoke.txt"
UNUSABLE = 70  # the exit code where the card cannot be used any more
OUTCOMES = ("begun", "skipped", "passed", "failed")  # of several lines about a test the last of these counts
LEAST = 40  # seconds that must be left to begin another stage
LAST = 15  # seconds at the end, to stop what runs and write the summary

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


class Stage(NamedTuple):
    name: str
    arguments: list[str]  # of `python -m`
    share: float  # seconds, before it is the next one's turn


def stages(out: Path) -> Iterator[Stage]:
    """Yields the stages in order."""
    yield Stage(SMOKE, ["bench.smoke", "--minutes", "3", "--out", str(out / SMOKE_LINES)], 240)
    if absent(FOR_TESTS):
        return

    def tests(name: str, share: float, *arguments: str) -> Stage:
        options = ["-q", "-rfE", "--tb=short", "--continue-on-collection-errors", "-p", "bench.journal"]
        journal = ["--journal", str(out / "journal.jsonl"), "--stage", name]
        return Stage(name, ["pytest", *arguments, *options, *journal], share)

    # The tests spend most of their time compiling kernels: run several at once if pytest-xdist is installed.
    processes = ["-n", str(min(os.cpu_count() or 1, 14)), "--max-worker-restart", "100"]
    at_once = processes if find_spec("xdist") else []
    measured = ["--benchmark-only", "--preset", "full", "--results", str(out / "results.json")]
    yield tests("tests for a GPU", 150, *ON_CARDS, "-m", "gpu", "-k", f"not ({LARGE} or sanitizer)", *at_once)
    # -k leaves out the forward alone, for which there are no goals.
    with_goals = [f"bench/bench_{bench}.py" for bench in WITH_GOALS]
    yield tests("goals", 420, *with_goals, "-m", "goal", "-k", "backward", *measured)
    for backend, share in (("triton", 240), ("cuda", 90), ("torch", 90)):
        only = ["--backend", backend, "-m", "not slow", "-k", f"[{backend} and not ({LARGE})"]
        yield tests(f"contract: {backend}", share, *CONTRACT, *only, *at_once)
    yield tests("large tensors", 90, ON_CARDS[0], *CONTRACT[:2], "-k", LARGE)
    others = [f"bench/bench_{bench}.py" for bench in ("attention_kl", "step")]
    yield tests("benchmarks", 300, *with_goals, *others, *measured)
    if find_spec("datasets") and find_spec("transformers"):  # trainer, commands, and tests that need no card
        ignored = (f"--ignore={path}" for path in CONTRACT)
        yield tests("other tests", 120, "tests", *ignored, "-m", "not data and not slow and not gpu", *at_once)
    yield tests("sanitizers", 120, *ON_CARDS, "-m", "gpu", "-k", "sanitizer", *at_once)


def usable() -> bool:
    """Returns whether the card can be used; True as well where this process has not used it."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def absent(names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as problem:
            found.append(f"{name} ({problem})")
    return found


def read(path: Path, start: int = 0) -> dict[str, dict]:
    """Returns the line that counts for each test, from byte `start` on. One that was cut off in the middle does not."""
    found: dict[str, dict] = {}
    for text in path.read_bytes()[start:].decode(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        before = found.setdefault(line["test"], line)
        if OUTCOMES.index(line["outcome"]) > OUTCOMES.index(before["outcome"]):
            found[line["test"]] = line
    return found


def lost(path: Path, start: int) -> list[str]:
    return [test for test, line in read(path, start).items() if line["outcome"] == "begun"]


def write(path: Path, stage: str, test: str, outcome: str, why: str = "") -> None:
    with path.open("a") as file:
        file.write("\n" + json.dumps({"stage": stage, "test": test, "outcome": outcome, "why": why}))


def run(arguments: list[str], seconds: float, log: Path) -> int | None:
    """Returns the exit code, or None if it ran out of time: SIGINT then lets pytest write what it has."""
    with log.open("ab") as out:
        out.write(f"\n# {shlex.join(arguments)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its processes would use the card beside the next stage
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(stage: Stage, seconds: float, out: Path) -> int | None:
    """Runs a stage, and again where a test has ended its process. Returns the exit code, or None if time ran out."""
    if stage.name == SMOKE:
        (out / SMOKE_LINES).unlink(missing_ok=True)
        code = run(stage.arguments, seconds, out / "log.txt")
        return 1 if code is None else code
    end, path = time.monotonic() + seconds, out / "journal.jsonl"
    while (left := end - time.monotonic()) > 0:
        start = path.stat().st_size if path.exists() else 0
        code = run(stage.arguments, left, out / "log.txt")
        if code is None:
            return None
        gone = lost(path, start)
        for test in gone:
            write(path, stage.name, test, "failed", f"its process hung or crashed (exit code {code})")
        if not gone and code != UNUSABLE:
            return 0 if code == 5 else code  # 5: nothing was collected, because all of it has run before
    return None


def digest() -> str:
    """Returns a hash of the code that is tested: results of other code do not belong in the same folder."""
    files = [
        path for folder in ("fastdistill", "kernels", "csrc", "bench", "tests") for path in (ROOT / folder).rglob("*")
    ]
    code = sorted(path for path in files if path.suffix in (".py", ".cu", ".cpp", ".h") and path.is_file())
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in code)).hexdigest()[:12]


def smoke_lines(out: Path) -> list[str]:
    """Returns a line for each case of the smoke test, and how many failed."""
    path = out / SMOKE_LINES
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def failures(out: Path) -> list[str]:
    """Returns a line for each case of the smoke test and each test that failed."""
    wrong = [line for line in smoke_lines(out) if ": ok, error" not in line and not line.endswith(" failed")]
    return [f"{SMOKE}: {line}" for line in wrong] + [
        f"{line['stage']}: {test}: {line['why']}"
        for test, line in read(out / "journal.jsonl").items()
        if line["outcome"] == "failed"
    ]


def outcomes(out: Path, state: dict) -> list[str]:
    """Returns a line for each stage."""
    counts: dict[str, Counter[str]] = {}
    for line in read(out / "journal.jsonl").values():
        counts.setdefault(line["stage"], Counter())[line["outcome"]] += 1
    lines = []
    for stage in stages(out):
        code, count = state["codes"].get(stage.name), counts.get(stage.name, Counter())
        found = [f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if count[outcome]]
        if stage.name == SMOKE and code is not None:
            found = smoke_lines(out)[-1:]
        if code is None:
            found.append("not finished" if found else "not begun")
        elif code and not count["failed"] and not (stage.name == SMOKE and found):
            found.append(f"exit code {code}, see log.txt")
        lines.append(f"- {stage.name}: " + ", ".join(found or ["nothing to run"]))
    return lines


def summary(out: Path, state: dict, short: bool = False) -> str:
    from bench import goals, report

    failed = failures(out)
    shown = [line[:160] for line in failed[:20]] if short else failed
    lines = [f"# fastdistill on {state['device']}", "", *outcomes(out, state)]
    lines += ["", f"## {len(failed)} failed", "", *(f"- {line}" for line in shown)]
    if (out / "results.json").exists():
        try:
            result = report.read(out / "results.json")
            lines += ["", "## Goals", "", goals.table(result)]
            if not short:
                lines += ["", "## All measurements", "", "```", report.summary(result["records"]), "```"]
        except Exception as problem:  # a page that cannot be written is no reason to measure no more
            lines += ["", f"results.json: {type(problem).__name__}: {problem}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; continued if it exists")
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default 60)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only stages whose name contains a TEXT"
    )
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it should be above 0")
    end = time.monotonic() + 60 * options.minutes - LAST
    if missing := absent(NEEDED):
        print("not importable: " + "; ".join(missing), file=sys.stderr)
        print("install the library from its checkout: pip install --no-deps --no-build-isolation -e .", file=sys.stderr)
        return 2
    if missing := absent(FOR_TESTS):
        print("only the smoke test runs; not importable: " + "; ".join(missing), file=sys.stderr)
    import torch

    out = options.out.resolve()
    chosen = [stage for stage in stages(out) if any(text in stage.name for text in options.only)]
    if not chosen:
        parser.error(f"--only is {options.only}; the stages are {', '.join(stage.name for stage in stages(out))}")
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False), so these stages cannot run:", file=sys.stderr)
        for stage in chosen:
            print(f"  {stage.name}: {shlex.join(stage.arguments)}", file=sys.stderr)
        print(
            "Without a GPU: `python -m bench.static --check` compiles every kernel for four architectures, "
            "`make test` runs them in Triton's interpreter, `make bench` measures the CPU.",
            file=sys.stderr,
        )
        return 3

    from bench import report

    out.mkdir(parents=True, exist_ok=True)
    path = out / "state.json"
    found = {"device": f"{torch.cuda.get_device_name()}, torch {torch.__version__}", "sources": digest()}
    state = json.loads(path.read_text()) if path.exists() else found | {"codes": {}}
    for what, here in found.items():
        if state[what] != here:
            parser.error(
                f"{options.out} holds results of the {what} {state[what]}, this is {here}; give another --out, "
                "and --only with the stages to repeat"
            )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stage's processes end as well

    def save() -> None:
        report.write_atomically(path, lambda file: file.write_text(json.dumps(state, indent=1) + "\n"))
        report.write_atomically(out / "summary.md", lambda file: file.write_text(summary(out, state)))

    def left() -> list[Stage]:
        return [stage for stage in chosen if stage.name not in state["codes"]]

    save()
    while left() and end - time.monotonic() > LEAST:
        for stage in left():
            seconds = end - time.monotonic()
            if seconds < LEAST:
                break
            print(f"[{60 * options.minutes - LAST - seconds:5.0f} s] {stage.name}", flush=True)
            code = finish(stage, min(seconds, stage.share), out)
            if code is not None:
                state["codes"][stage.name] = code
            save()
    print(summary(out, state, short=True))
    if left():
        print("left: " + ", ".join(stage.name for stage in left()))
        print(f"the same command goes on there: {shlex.join(['python', '-m', 'bench.gpu', *sys.argv[1:]])}")
    if any(state["codes"].values()):
        return 1
    return 4 if left() else 0


if __name__ == "__main__":
    sys.exit(main())
