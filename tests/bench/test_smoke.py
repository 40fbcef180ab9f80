"""Runs cases of bench.smoke in Triton's interpreter, and checks that the cases launch every kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the smoke test runs Triton's kernels")

import fastdistill
from bench import smoke

CPU = torch.device("cpu")


def case(op: str, name: str) -> smoke.Case:
    return next(case for case in smoke.cases(small=True) if (case.op, case.name) == (op, name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled here")
@pytest.mark.parametrize("op,name", [("attention_mse", "26 / 64, masks"), ("kl_div", "row in registers")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_case_is_right_in_the_interpreter(op: str, name: str, dtype: torch.dtype) -> None:
    right, line = smoke.line(case(op, name), dtype, CPU)
    assert right, line
    assert line.startswith("ok, error ")


def test_a_wrong_gradient_and_an_exception_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kl_div = fastdistill.kl_div

    def wrong(*, student_logits: torch.Tensor, backend: str, **inputs) -> torch.Tensor:
        loss = kl_div(student_logits=student_logits, backend="reference", **inputs)
        return loss if backend == "reference" else loss + 0.1 * (student_logits - student_logits.detach()).sum()

    monkeypatch.setattr(fastdistill, "kl_div", wrong)
    right, line = smoke.line(case("kl_div", "row in registers"), torch.float32, CPU)
    assert not right
    assert line.startswith("WRONG, error ")

    def broken(**inputs) -> torch.Tensor:
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setattr(fastdistill, "kl_div", broken)
    right, line = smoke.line(case("kl_div", "row in registers"), torch.float32, CPU)
    assert (right, line) == (False, "RuntimeError: an illegal memory access")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the small sizes of the interpreter")
def test_the_program_writes_a_line_a_case_and_names_what_it_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(minutes: str, only: str) -> list[str]:
        out = tmp_path / f"{minutes}.txt"
        options = ["--minutes", minutes, "--only", only, "--out", str(out), "--processes", "1"]
        monkeypatch.setattr(sys, "argv", ["smoke", *options])
        assert smoke.main() == (minutes == "-1")
        return out.read_text().splitlines()

    *lines, last = written("1", "kl_div (row in registers), triton")
    assert [line.split(": ok, error ")[0] for line in lines] == [
        f"kl_div (row in registers), triton, {dtype}" for dtype in ("float16", "float32", "float64")
    ]
    assert last == "0 of 3 failed"
    assert written("-1", "tvd (row in registers)") == [
        "tvd (row in registers), triton, float16: not reached", "1 of 1 failed",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        written("1", "no such case")


# Prints as a process of the smoke test does. Case 1 ends it, as a kernel that crashes; case 3 spoils the card.
PRINTS = """#!{python}
import os, sys
for number in map(int, sys.argv[sys.argv.index("--cases") + 1 :]):
    print(f"case {{number}}: ", end="", flush=True)
    if number == 1:
        os._exit(1)
    print("an illegal address" if number == 3 else "ok, error 0", flush=True)
    if number == 3:
        sys.exit(1)
    print("a library says hello")
"""


def test_a_case_that_ends_its_process_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(PRINTS.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found: list[str] = []
    smoke.shepherd([], {number: f"case {number}: " for number in range(6)}, found.append)
    assert [line for line in "".join(found).splitlines() if "hello" not in line] == [
        "case 0: ok, error 0", "case 1: HANGS OR CRASHES", "case 2: ok, error 0", "case 3: an illegal address",
        "case 4: ok, error 0", "case 5: ok, error 0",
    ]  # fmt: skip


HANGS = """
import time
from bench import smoke
smoke.SECONDS = 0.5
smoke.line = lambda *case: time.sleep(60)
raise SystemExit(smoke.serve("cpu", smoke.runs(smoke.torch.device("cpu")), [0, 1], time.time() + 60))
"""


def test_a_case_that_hangs_is_given_up() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HANGS], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False, timeout=50,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout == "attention_mse (26 / 64, masks), triton, float16: "
    assert "Timeout" in run.stderr


LAUNCHED = """
import torch
from triton.runtime.jit import JITFunction
from bench import host, smoke, static
names = set()
with host.stubbed():
    JITFunction.run = lambda self, *arguments, **keywords: names.add(self.__name__)
    for case in smoke.cases(small=True):
        inputs = {k: x.to(case.dtypes[0]) if x.is_floating_point() else x for k, x in case.inputs().items()}
        if case.backend == "triton":
            smoke._evaluate(case, inputs, "triton")
print(sorted({launch.function.__name__ for _, launch in static.cases("sm_90")} - names))
"""


def test_the_cases_launch_every_kernel() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHED],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "[]"
