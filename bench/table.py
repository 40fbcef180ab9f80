"""`python -m bench.table [pytest arguments]`: runs the benchmarks and prints the table of docs/performance.md.

Every row is one op at one shape, forward and backward, all implementations in the same run: median seconds, the peak of
what was allocated beyond inputs and gradients, and how many times slower than ours the others are. The last columns are
our speed at what the op cannot do without (`bench.cost`, `least`).
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch

import fastdistill
from bench import measure


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        here = str(Path(__file__).parent)
        code = pytest.main(
            [
                "-q",
                "-p",
                "no:xdist",
                "--benchmark-disable-gc",
                "--benchmark-columns=median",
                f"--benchmark-json={results}",
            ]
            + (arguments or [here])
        )
        if code != 0:
            return int(code)
        benchmarks = json.loads(results.read_text())["benchmarks"]
    print(render(benchmarks))
    return 0


def render(benchmarks: list[dict]) -> str:
    rows: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    least: dict[tuple[str, str], tuple[float, float]] = {}
    for entry in benchmarks:
        info = entry["extra_info"]
        least[info["op"], info["shape"]] = info["least_bytes"], info["least_flops"]
        cell = (entry["stats"]["median"], info["extra_bytes"])
        rows.setdefault((info["op"], info["shape"]), {})[info["implementation"]] = cell
    lines = [
        f"fastdistill {fastdistill.__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, float32, forward + backward.",
        "",
        "| op | shape | "
        + " | ".join(f"{name} | extra" for name in measure.IMPLEMENTATIONS)
        + " | eager / ours | compile / ours | extra, of eager's | GB/s | GFLOP/s |",
        "| --- | --- |" + " ---: |" * (2 * len(measure.IMPLEMENTATIONS) + 5),
    ]
    for (op, shape), cells in rows.items():
        ours_seconds, ours_bytes = cells["fastdistill"]
        line = [op, shape]
        for name in measure.IMPLEMENTATIONS:
            line += [_seconds(cells[name][0]), _mib(cells[name][1])] if name in cells else ["", ""]
        for name in ("eager", "torch.compile"):
            line.append(f"{cells[name][0] / ours_seconds:.2f}x" if name in cells else "")
        line.append(f"{ours_bytes / cells['eager'][1]:.1%}" if cells.get("eager", (0, 0))[1] else "")
        line += [f"{amount / ours_seconds / 1e9:.3g}" for amount in least[op, shape]]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms"


def _mib(value: int) -> str:
    return f"{value / 2**20:.3g} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
