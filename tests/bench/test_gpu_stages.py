"""Runs bench.gpu without a GPU: its stages, and how it goes on after a kill, a hang, a crash and a spoilt card."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil", reason="the benchmarks read the free memory with it")
pytest.importorskip("pytest_benchmark", reason="it drives the benchmarks")

from bench import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_it_names_the_stages_that_it_cannot_run(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 3
    assert "There is no GPU here" in run.stderr
    assert "bench/bench_linear_mse.py -m goal -k backward" in run.stderr
    assert not (tmp_path / "out").exists()


def test_stages_are_in_the_order_of_use_and_name_files_that_exist(tmp_path: Path) -> None:
    """First what is broken, then how fast it is, then everything else."""
    stages = {stage.name: stage.arguments for stage in gpu.stages(tmp_path)}
    names = list(stages)
    assert names[:4] == ["smoke", "tests for a GPU", "goals", "contract: triton"]
    assert names[-1] == "sanitizers"
    assert find_spec(stages.pop("smoke")[0])
    for name, arguments in stages.items():
        files = [argument for argument in arguments if argument.endswith(".py") and not argument.startswith("-")]
        assert files or "tests" in arguments, name
        assert all((gpu.ROOT / file).is_file() for file in files), name


def test_no_stage_takes_all_of_a_short_call(tmp_path: Path) -> None:
    """In ten minutes each of the first three stages gets its turn."""
    first, second, third, *others = gpu.stages(tmp_path)
    assert 600 - first.share - second.share - gpu.LAST > 180
    assert third.name == "goals"
    assert max(stage.share for stage in (first, second, *others)) <= 300


@pytest.mark.slow
def test_contract_stages_run_the_tests_of_their_backend_alone(tmp_path: Path) -> None:
    """Tests without a backend run on the CPU, in `make test`."""
    (stage,) = (stage for stage in gpu.stages(tmp_path) if stage.name == "contract: torch")
    chosen = stage.arguments[stage.arguments.index("-k") + 1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/losses/test_logits_ops.py", "--backend", "torch", "-k", chosen, "-q",
         "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    tests = [line for line in run.stdout.splitlines() if "::" in line]
    assert tests
    assert all("[torch" in test for test in tests)
    assert not any("test_few_logits_give_what_blocks_give" in test for test in tests)


def test_missing_packages_stop_only_what_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert [stage.name for stage in gpu.stages(tmp_path)] == ["smoke"]
    monkeypatch.delitem(sys.modules, "hypothesis")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    found = {stage.name: stage.arguments for stage in gpu.stages(tmp_path)}
    assert "other tests" not in found
    assert not any("-n" in arguments for arguments in found.values())


def test_the_page_says_what_the_smoke_test_found_if_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"device": "a card", "codes": {"smoke": 1}}
    assert "- smoke: exit code 1, see log.txt\n" in gpu.summary(tmp_path, state)
    found = ["jsd (a), triton, half: ok, error 1e-3", "jsd (b), triton, half: HANGS OR CRASHES", "1 of 2 failed"]
    (tmp_path / gpu.SMOKE_LINES).write_text("\n".join(found) + "\n")
    page = gpu.summary(tmp_path, state)
    assert "- smoke: 1 of 2 failed\n" in page
    assert "## 1 failed\n\n- smoke: jsd (b), triton, half: HANGS OR CRASHES\n" in page
    (tmp_path / "results.json").write_text("{")
    assert "results.json: ValueError: " in gpu.summary(tmp_path, state)


# -- Stages of small tests -------------------------------------------------------------------------------------


class Stages:
    """A folder with tests, of which each writes its name into a file when it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.out.mkdir()

    def write(self, **bodies: str) -> None:
        tests = [
            f"def test_{name}():\n    open('ran', 'a').write('{name} ')\n    {body}\n" for name, body in bodies.items()
        ]
        (self.folder / "test_x.py").write_text("import os, time\n" + "\n".join(tests))

    def stage(self, *options: str, name: str = "x") -> gpu.Stage:
        journal = ["--journal", str(self.out / "journal.jsonl"), "--stage", name]
        paths = ["--rootdir", str(self.folder), "-c", "/dev/null", "-p", "no:cacheprovider"]
        arguments = ["pytest", "-q", *paths, "-p", "bench.journal", *journal, *options, "test_x.py"]
        return gpu.Stage(name, arguments, 60)

    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []

    def outcomes(self) -> dict[str, str]:
        lines = gpu.read(self.out / "journal.jsonl").items()
        return {test.split("::test_")[1]: line["outcome"] for test, line in lines}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    return Stages(tmp_path)


def test_a_stage_that_is_killed_goes_on_at_its_next_test(small: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(arguments: list[str], seconds: float, log: Path) -> None:
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=small.folder, stdout=subprocess.DEVNULL)
        while "c" not in small.ran():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
        process.wait()

    small.write(a="pass", b="assert False", c="time.sleep(600)", d="pass")
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run", killed)
        assert gpu.finish(small.stage(), 600, small.out) is None
    assert small.ran() == ["a", "b", "c"]
    assert small.outcomes() == {"a": "passed", "b": "failed", "c": "begun"}
    with (small.out / "journal.jsonl").open("a") as file:
        file.write('\n{"stage": "x", "tes')  # a line that was cut off

    small.write(a="pass", b="assert False", c="pass", d="pass")
    assert gpu.finish(small.stage(), 600, small.out) == 0
    assert small.ran() == ["a", "b", "c", "c", "d"]
    assert small.outcomes() == {"a": "passed", "b": "failed", "c": "passed", "d": "passed"}
    assert gpu.finish(small.stage(), 600, small.out) == 0  # nothing is left
    assert small.ran() == ["a", "b", "c", "c", "d"]


def test_out_of_time_no_process_is_left(small: Stages) -> None:
    (small.folder / "slow.py").write_text(
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(600)\n"
    )
    pids = small.folder / "pids"
    for seconds in (3, 30):  # a busy machine may not even start it in 3
        assert gpu.run(["slow"], seconds, small.out / "log.txt") is None
        if pids.exists():
            break
    left = [Path(f"/proc/{pid}/stat") for pid in pids.read_text().split()]
    end = time.monotonic() + 60  # what is killed takes a moment to go
    while left := [path for path in left if is_alive(path)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def is_alive(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] != "Z"  # the child's parent has gone before it
    except OSError:
        return False


@pytest.mark.parametrize("processes", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_a_test_that_hangs_crashes_or_spoils_the_card_ends_no_other(small: Stages, processes: tuple[str, ...]) -> None:
    (small.folder / "conftest.py").write_text(
        "import bench.journal, os\nbench.journal.SECONDS = 10\nspoilt = []\nbench.journal.usable = lambda: not spoilt\n"
    )
    spoils = "import conftest; conftest.spoilt.append(1); raise RuntimeError('an illegal address')"
    small.write(
        a="pass", hangs="time.sleep(600)", b="pass", crashes="os.kill(os.getpid(), 11)", spoils=spoils, c="pass"
    )
    code = gpu.finish(small.stage(*processes), 600, small.out)
    wrong = dict.fromkeys(("hangs", "crashes", "spoils"), "failed")
    assert small.outcomes() == dict.fromkeys("abc", "passed") | wrong
    assert sorted(small.ran()) == sorted(["a", "b", "c", *wrong])  # none ran twice
    assert bool(code) == bool(processes)  # alone, the last process saw nothing fail: the journal did
    assert "in test_hangs" in (small.out / "hangs.txt").read_text()
    failures = "\n".join(gpu.failures(small.out))
    assert "x: test_x.py::test_spoils: RuntimeError: an illegal address" in failures


def test_every_test_runs_its_first_case_before_any_runs_its_second(small: Stages) -> None:
    two = "@pytest.mark.parametrize('x', [1, 2])\ndef test_{0}(x): open('ran', 'a').write(f'{0}{{x}} ')\n"
    (small.folder / "test_x.py").write_text("import pytest\n" + two.format("a") + two.format("b"))
    assert gpu.finish(small.stage(), 600, small.out) == 0
    assert small.ran() == ["a1", "b1", "a2", "b2"]


def test_the_program_takes_turns_goes_on_and_says_what_is_left(
    small: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.write(a="pass", slow="assert 1 == 2")
    chosen = [small.stage("-k", "slow", name="first"), small.stage("-k", "test_a", name="second")]
    monkeypatch.setattr(gpu, "stages", lambda out: iter(chosen))
    finish, least = gpu.finish, gpu.LEAST

    def one_turn(stage: gpu.Stage, seconds: float, out: Path) -> int | None:
        assert seconds <= stage.share
        if stage.name == "first":
            return None
        monkeypatch.setattr(gpu, "LEAST", 1e9)
        return finish(stage, seconds, out)

    monkeypatch.setattr(gpu, "finish", one_turn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    arguments = ["gpu", "--out", str(small.out), "--minutes", "10"]
    monkeypatch.setattr(sys, "argv", arguments)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main() == 4
        said = capsys.readouterr().out
        assert "left: first\n" in said
        assert f"python -m bench.gpu --out {small.out}" in said
        page = (small.out / "summary.md").read_text()
        assert "- first: not begun" in page
        assert "- second: 1 passed" in page

        monkeypatch.setattr(gpu, "finish", finish)
        monkeypatch.setattr(gpu, "LEAST", least)
        assert gpu.main() == 1
        assert small.ran() == ["a", "slow"]
        assert "first: test_x.py::test_slow: assert 1 == 2" in (small.out / "summary.md").read_text()
        assert len(list(small.out.iterdir())) <= 8

        monkeypatch.setattr(sys, "argv", [*arguments, "--only", "third"])
        with pytest.raises(SystemExit):
            gpu.main()
        assert "the stages are first, second" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
        with pytest.raises(SystemExit):
            gpu.main()
        assert "holds results of the device a card" in capsys.readouterr().err
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(gpu, "digest", lambda: "123")
        with pytest.raises(SystemExit):
            gpu.main()
        assert "holds results of the sources" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)
