"""Runs the benchmarks as programs: their results, resuming a stopped run, and their message without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="the benchmarks read the free memory with it")
pytest.importorskip("pytest_benchmark", reason="it drives the benchmarks")

from bench import eager, goals, measure, report
from bench.cost import logits

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark turns itself off in a pytest-xdist worker, which it recognises by the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_logits.py", "--benchmark-only", "-q", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run = bench("-k", "32-2 and kl_div", "--results", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    first = report.read(path)
    assert {record["implementation"] for record in first["records"]} == {
        "fastdistill torch", "eager", "torch.compile", "liger-kernel kl_div",
    }  # fmt: skip
    assert str(tmp_path) not in first["command"]
    eager_record = next(record for record in first["records"] if record["implementation"] == "eager")
    assert eager_record["status"] == "ok"
    assert 0 < eager_record["low"] <= eager_record["seconds"] <= eager_record["high"]
    assert eager_record["error"] < eager_record["error_limit"]
    if not torch.cuda.is_available():
        peer = next(record for record in first["records"] if record["implementation"] == "liger-kernel kl_div")
        assert peer["status"] == "needs a GPU"

    again = bench("-k", "32-2 and (kl_div or tvd)", "--results", str(path))
    assert "1 passed" in again.stdout  # tvd alone
    second = report.read(path)
    assert second["records"][: len(first["records"])] == first["records"]
    assert {record["op"] for record in second["records"]} == {"kl_div", "tvd"}

    path.write_text(json.dumps(second | {"commit": "0000000"}))
    other = bench("-k", "32-2 and jsd", "--results", str(path))
    assert other.returncode != 0
    assert "has commit 0000000" in other.stdout + other.stderr


class Benchmark:
    """Implements the part of pytest-benchmark that `measure` uses."""

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, args, setup, rounds) -> None:
        for _ in range(rounds):
            setup()
            target(*args)


def case(exact=None) -> measure.Case:
    def inputs() -> list[torch.Tensor]:
        return [measure.randn(8, 16, needs_grad=True), measure.randn(8, 16)]

    def in_float64(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
        value, [gradient], _ = measure.in_blocks(
            lambda s, t: eager.kl_div(s, t) * (len(s) / 8), [student, teacher], [], 3
        )
        return [value, gradient]

    model = logits("kl_div", 8, 16, measure.DTYPE)
    return measure.Case("kl_div", {"rows": 8, "vocabulary": 16}, model.shape, inputs, exact or in_float64, model)


def records(*implementations: measure.Implementation) -> dict[str, dict]:
    found = measure.measure(Benchmark(), case(), list(implementations), measure.BOTH, "quick")
    return {record["implementation"]: record for record in found}


EAGER = measure.Implementation("eager", eager.kl_div)


def test_a_wrong_gradient_is_red() -> None:
    def wrong(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return eager.kl_div(student, teacher) + 0.001 * (student - student.detach()).sum()

    found = records(EAGER, measure.Implementation("other", wrong))
    assert report.good(found["eager"])
    assert found["other"]["status"] == "ok"
    assert not report.good(found["other"])
    assert "red" in report.summary(found.values())


def test_a_wrong_baseline_is_red_and_excuses_no_other() -> None:
    def wrong(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 2 * eager.kl_div(student, teacher)

    found = records(measure.Implementation("eager", wrong), measure.Implementation("other", wrong))
    assert not report.good(found["eager"])
    assert not report.good(found["other"])


def test_implementations_that_cannot_run_are_reported() -> None:
    def absent(*inputs: torch.Tensor) -> torch.Tensor:
        raise ModuleNotFoundError("No module named 'other'", name="other")

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by nothing\nat all")

    found = records(
        EAGER,
        measure.Implementation("absent", absent, "other-kernel"),
        measure.Implementation("broken", broken),
        measure.Implementation("large", eager.kl_div, memory=1e18),
    )
    assert found["absent"]["status"] == "missing: pip install other-kernel"
    assert found["broken"]["status"] == "failed: ZeroDivisionError: by nothing"
    assert found["large"]["status"].startswith("not run: would take about 931322575 GiB")
    assert "seconds" not in found["large"]


def test_what_is_broken_of_ours_is_named() -> None:
    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by nothing")

    def wrong(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 2 * eager.kl_div(student, teacher)

    mine = [measure.Implementation(f"fastdistill {name}", loss) for name, loss in (("a", broken), ("b", wrong))]
    found = records(*mine, EAGER, measure.Implementation("other", broken))
    assert report.good(found["eager"])
    first, second = measure.broken(list(found.values()))
    assert first == "fastdistill a: failed: ZeroDivisionError: by nothing"
    assert second.startswith("fastdistill b: its error is 1.0e+00, and the limit ")


def test_a_card_that_cannot_be_used_any_more_gives_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "usable", lambda: False)
    found = records(EAGER, measure.Implementation("fastdistill torch", eager.kl_div))
    assert {x["status"] for x in found.values()} == {"failed: another implementation left the card unusable"}
    assert "seconds" not in found["eager"]


def test_every_backend_is_measured_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` does not take csrc's kernels before a measurement, so they are measured under their own name."""
    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr("fastdistill.functional.pick_backend", lambda *arguments: "triton")
    monkeypatch.setattr("fastdistill.cuda.unavailable", lambda device: None)
    names = [f"fastdistill {backend}" for backend in ("triton", "cuda", "torch")]
    assert [x.name for x in measure.ours(eager.kl_div, on_logits=True)] == names
    assert [x.name for x in measure.ours(eager.kl_div)] == [names[0], names[2]]
    with_csrc = [goal for goal in goals.goals("H200") if "csrc" in goal.text]
    record = {"least_bytes": 4.8e9, "seconds": 1e-3}
    assert with_csrc
    assert all(goal.figure(record, {names[1]: record}) > 0 for goal in with_csrc)


BROKEN = """
from bench import measure
from tests.bench.test_bench import EAGER, case

def loss(*inputs):
    raise RuntimeError("an illegal address")

def bench_one(measured):
    measured(case(), [measure.Implementation("fastdistill torch", loss), EAGER], measure.BOTH)
"""


def test_what_a_failing_case_has_measured_is_kept(tmp_path: Path) -> None:
    (tmp_path / "bench_broken.py").write_text(BROKEN)
    path = tmp_path / "results.json"
    options = ["-q", "-c", "pyproject.toml", "-p", "bench.conftest", "--benchmark-only", "--results", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path / "bench_broken.py"), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "fastdistill torch: failed: RuntimeError: an illegal address" in run.stdout, run.stdout + run.stderr
    result = report.read(path)
    assert {x["implementation"]: x["status"][:6] for x in result["records"]} == {
        "fastdistill torch": "failed", "eager": "ok",
    }  # fmt: skip
    assert len(result["cases"]) == 1  # and it is not measured again


def test_peak_memory_excludes_the_returned_tensors() -> None:
    def run() -> list[torch.Tensor]:
        x = torch.ones(1 << 20, device=measure.DEVICE)  # 4 MiB
        return [x + x]

    extra, _ = measure.peak_bytes(run)
    assert extra == 4 << 20


def test_goals_are_met_missed_or_open() -> None:
    def record(implementation: str, seconds: float, **fields: object) -> dict:
        return {
            "op": "attention_mse", "shape": "32 x 12 heads x 512, d 26 / 64", "dtype": "bfloat16",
            "direction": measure.BOTH, "implementation": implementation, "status": "ok", "seconds": seconds,
            "error": 1e-3, "error_limit": 1e-2, "extra_bytes": 1e6, "least_bytes": 1e8, "floor_seconds": 1e-4,
        } | fields  # fmt: skip

    def verdicts(*found: dict) -> list[str]:
        table = goals.table({"card": "H200", "records": found})
        return [line.split("|")[-2].strip() for line in table.splitlines()[2:] if "32 x 12 heads x 512" in line]

    assert verdicts(record("fastdistill triton", 1e-3), record("eager", 2e-2)) == ["met", "met"]
    assert verdicts(record("fastdistill triton", 1e-3), record("eager", 1e-2)) == ["**missed**", "met"]
    assert verdicts(record("fastdistill triton", 1e-3)) == ["open", "met"]
    assert verdicts(record("fastdistill triton", 1e-3, error=0.5), record("eager", 2e-2)) == ["open", "open"]


@pytest.mark.parametrize("smallest", [False, True])
def test_the_commands_of_the_glue_table_parse_and_run_in_order(tmp_path: Path, smallest: bool) -> None:
    """Each leg runs once, after the legs whose outputs it needs; none reads the rows that are held out."""
    from bench import glue
    from fastdistill.cli import parse

    paths = {name: tmp_path / name for name in ("data", "glove", "out")}
    arguments = argparse.Namespace(
        model="bert", masked="mlm", corpus=[tmp_path / "text"], tasks=list(glue.TASKS), seeds=[1, 2, 3],
        smallest=smallest, **paths,
    )  # fmt: skip
    done = set(glue.CONFIGS)
    commands = set()
    for leg in glue.Plan(arguments).legs():
        parsed = vars(parse([*leg.command, "--output", str(leg.output)])[1])
        needed = {str(parsed[name]) for name in ("teacher", "student", "model", "augmented") if parsed.get(name)}
        assert needed <= done | {"bert", "mlm"}, leg.output
        assert leg.output not in done
        assert parsed.get("data") in (None, Path("data") / leg.output.split("/")[0])  # two thirds of the dev set
        assert not leg.task or parsed["seeds"] == ([1] if leg.output.endswith("/teacher") else [1, 2, 3])
        done.add(leg.output)
        assert tuple(leg.command) not in commands, leg.output  # no two rows train the same student
        commands.add(tuple(leg.command))
    names, tasks = ("fine-tuned", *glue.STUDENTS), glue.TASKS
    if smallest:
        names, tasks = (glue.SMALL, glue.SMALL_FINE_TUNED), glue.SMALLEST
    assert {f"{task}/{glue.slug(name)}" for task in tasks for name in names} <= done
