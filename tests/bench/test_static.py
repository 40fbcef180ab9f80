"""Compiles the shipped configurations of the Triton kernels for GPUs; no GPU has to be present."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

from bench import goals


def test_no_kernel_spills_or_reads_in_small_pieces() -> None:
    """Compiles one configuration of each kernel and dtype; the slow test below compiles all of them."""
    check("sm_90", "--few")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_configuration_spills_or_reads_in_small_pieces(arch: str) -> None:
    check(arch)


def check(arch: str, *options: str) -> None:
    run = _compiler("-m", "bench.static", "--check", "--arch", arch, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count(f"| {arch} |") >= 8


MEASURED = """
from bench import goals, static
known = {(launch.name, case) for case, launch in static.cases("sm_90")}
print([(goal.what, goal.case) for goal in goals.STATIC if (goal.what, goal.case) not in known])
chosen = dict((launch.name, (case, launch)) for case, launch in static.cases("sm_90", "attention_mse 32 / 32"))
kernel = static.compiled(*reversed(chosen["attention_mse.gram"]), static.ARCHS["sm_90"])
print(kernel.redundancy, sorted(kernel.loads), kernel.narrowest_load("a_query"))
"""


def test_every_static_goal_is_about_a_shipped_configuration_and_operands_have_names() -> None:
    run = _compiler("-c", MEASURED)
    assert run.returncode == 0, run.stderr[-3000:]
    without, kernel = run.stdout.splitlines()
    assert without == "[]"
    redundancy, operands = kernel.split(" ", 1)
    assert float(redundancy) >= 1
    assert operands == "['a_key', 'a_query', 'b_key', 'b_query'] 128"


def test_a_figure_beyond_its_bound_is_a_fault() -> None:
    goal = goals.Bound("kernel", "case", "instructions a class", False, 41, 57.8, lambda kernel: 0)
    assert [goal.verdict(figure) for figure in (41.1, 57.9, 58.2)] == ["met", "open", "**worse**"]
    assert goal.faults(57.9) == []
    assert goal.faults(58.2) == ["kernel, case: instructions a class is 58.2, and the bound in goals.py is 57.8"]
    programs = goal._replace(least=True, target=2, bound=1)
    assert [programs.verdict(figure) for figure in (2, 1, 0)] == ["met", "open", "**worse**"]


SIZES = """
from bench.static import compilations
first, then = compilations(range(1000, 1033)), compilations([*range(1290, 1300), 2000, 2049])
for name, keys in first.items():
    print(name, len(keys), len(then[name] - keys))
"""


def test_nothing_is_compiled_again_when_only_the_number_of_tokens_changes() -> None:
    """Triton specialises on whether 16 divides a size or a product of sizes, so 33 steps meet all variants."""
    run = _compiler("-c", SIZES)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) >= 6
    for line in lines:
        *_, variants, new = line.split()
        assert int(new) == 0, line
        assert int(variants) <= 24, line


def _compiler(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in another process, since Triton's interpreter replaces the compiler in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
