"""`pytest bench --benchmark-only [--preset full] [--results DIR]`: what a run measures, prints and writes."""

from __future__ import annotations

import json
import os
import platform
import re
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
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="quick: 10 minutes on 2 cores; full: all shapes",
    )
    group.addoption("--results", type=Path, help="folder for the results, one JSON file a run, in a folder a device")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a case of `--preset full` alone")
    config.option.benchmark_quiet = True  # its table knows ours alone; the records have everything
    config.stash[RECORDS] = []


RECORDS = pytest.StashKey[list[dict]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--preset") == "full":
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def measured(benchmark, request: pytest.FixtureRequest):
    """Measures a case and keeps its records for the end of the run."""

    def of(case: measure.Case, implementations: list[measure.Implementation], direction: str) -> None:
        preset = request.config.getoption("--preset")
        records = request.config.stash[RECORDS]
        records += measure.measure(benchmark, case, implementations, direction, preset)

    return of


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    yield
    if measure.DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("results")
    terminalreporter.write_line(report.summary(records))
    folder: Path | None = config.getoption("--results")
    if folder is not None:
        result = description() | {"preset": config.getoption("--preset"), "records": records}
        path = folder / slug(result["device"]) / f"{result['date'][:10]}-{result['commit']}-{result['preset']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(path)
        terminalreporter.write_line(f"\nwritten to {path}")


def description() -> dict:
    """On what and with what this run measures."""
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
        "command": " ".join(["python -m pytest", *ARGUMENTS]),
        "peers": {name: _version(name) or f"missing: pip install {name}" for name in peers.PACKAGES},
    }


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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
    """As the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
