"""Checks the host time of every op against its bound, and the counts that `bench.host` reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="one of the measured backends")

from bench import goals, host


def test_no_op_takes_more_host_time_than_its_bound() -> None:
    """Runs in another process, since the interpreter replaces the launches in this one; again if it is busy."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "bench.host", "--check", "--rounds", "5"],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode == 0:
            break
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    measured = [line.split("|")[1].strip() for line in run.stdout.split("| | case |")[0].splitlines() if "|" in line]
    assert {goal.what for goal in goals.HOST} <= set(measured)


def test_kernels_are_counted_without_views_and_conversions_of_numbers() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    out, kernels = host._profiled(lambda: (x.reshape(2, 8).t().reshape(4, 4) @ x + 1).exp())
    assert out.shape == (4, 4)
    assert kernels == 4  # copy, mm, add, exp
