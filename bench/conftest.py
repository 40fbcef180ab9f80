"""`pytest bench --benchmark-only [--preset full] [--results DIR]`: measures, prints and writes the selected cases."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bench import measure, peers, report

HERE = Path(__file__).parent
ARGUMENTS = list(sys.argv[1:])


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdistill")
    group.addoption(
        "--preset", choices=("quick", "full"), default="quick", help="quick: 10 minutes on 2 cores; full: all shapes"
    )
    group.addoption(
        "--results", type=Path, metavar="PATH",
        help="where to write the results after every case: a folder (a new file, in a folder named after the device), "
        "or a .json file; cases that it already holds are not measured again",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table shows only our ops; the records hold all implementations
    run = config.stash[RUN] = description() | {"preset": config.getoption("--preset"), "cases": [], "records": []}
    path: Path | None = config.getoption("--results")
    if path is None:
        return
    if path.suffix != ".json":
        path = path / report.slug(run["device"]) / f"{run['date'][:10]}-{run['commit']}-{run['preset']}.json"
    elif path.exists():
        before = report.read(path)
        for field in ("device", "commit", "versions"):
            if before[field] != run[field]:
                raise pytest.UsageError(
                    f"--results {path} has {field} {before[field]}, this run has {run[field]}; give a new file"
                )
        run |= {"cases": before["cases"], "records": before["records"]}
    config.stash[PATH] = path


RUN = pytest.StashKey[dict]()  # what the result file holds
PATH = pytest.StashKey[Path]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = config.getoption("--preset") == "full"
    done = set(config.stash[RUN]["cases"])
    left_out = [item for item in items if item.nodeid in done or (item.get_closest_marker("full") and not full)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def measured(benchmark, request: pytest.FixtureRequest):
    """Measures a case and writes its records to the result file before the next case begins."""

    def of(case: measure.Case, implementations: list[measure.Implementation], direction: str) -> None:
        run = request.config.stash[RUN]
        records = measure.measure(benchmark, case, implementations, direction, run["preset"])
        run["records"] += records
        run["cases"].append(request.node.nodeid)
        path = request.config.stash.get(PATH, None)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_atomically(path, lambda file: file.write_text(json.dumps(run, indent=1) + "\n"))
        assert not measure.broken(records), measure.broken(records)

    return of


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    yield
    if measure.DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    records = config.stash[RUN]["records"]
    if not records:
        return
    terminalreporter.section("results")
    terminalreporter.write_line(report.summary(records))
    if PATH in config.stash:
        terminalreporter.write_line(f"\nwritten to {config.stash[PATH]}")


def description() -> dict:
    """Describes the device, versions and command of this run."""
    cuda = measure.DEVICE.type == "cuda"
    packages = ("fastdistill", "torch", "triton", "numpy", "transformers", "pytest-benchmark")
    git = ("git", "-C", str(HERE))
    return {
        "format": 1,
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {os.cpu_count()} cores",
        "card": measure.card_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "commit": _output(*git, "rev-parse", "--short", "HEAD") or "unknown",
        "modified": bool(_output(*git, "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "threads": torch.get_num_threads(),
        "command": shlex.join(
            ["python", "-m", "pytest", *(Path(x).name if Path(x).is_absolute() else x for x in ARGUMENTS)]
        ),
        "peers": {name: _version(name) or f"missing: pip install {name}" for name in peers.PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else None


def _processor() -> str:
    """Returns the processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
