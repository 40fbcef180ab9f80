"""`python -m bench.static_csrc [BINARY]`: counts what csrc's kernels do for each class, from their machine code.

It builds csrc/ for sm_90a if no binary is given (needs nvcc, 15 seconds), and shows each kernel that holds a row on
chip: the columns of `bench.static`, and the shared loads of 2 bytes. Classes are those that a thread holds, by its
16-byte loads of both sides. A loop with exponentials runs once for each vector of 16 bytes; other loops count once.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import goals
from bench.sass import Path as Code
from bench.sass import functions, sass_counts
from fastdistill import cuda

KINDS = ("soft_cross_entropy", "kl_div", "reverse_kl", "jsd", "tvd", "mixture")  # in the order of csrc's enum
TYPES = {"13__nv_bfloat16": ("bf16", 8), "6__half": ("fp16", 8), "f": ("fp32", 4)}  # and the numbers of a vector


@dataclass(frozen=True)
class Held:
    kind: str
    dtype: str
    variant: str  # the other template arguments
    main: Code
    loops: tuple[Code, ...]  # of the main path, that run for each vector
    numbers: int  # of a vector

    @property
    def vectors(self) -> int:
        """Vectors of each side that a thread holds."""
        return max(len([load for load in self.main.loads if load.bits == 128]) // 2, 1)

    def _of_a_class(self, count: str) -> float:
        again = sum(getattr(loop, count) for loop in self.loops) * (self.vectors - 1)
        return (getattr(self.main, count) + again) / (self.vectors * self.numbers)

    @property
    def instructions(self) -> float:
        return self._of_a_class("instructions")

    @property
    def mufu(self) -> float:
        return self._of_a_class("mufu")

    @property
    def in_flight(self) -> int:
        return self.main.loads_before_wait

    @property
    def share_in_flight(self) -> float:
        """The share of a row's loads that are issued before an instruction waits for one."""
        return self.in_flight / (2 * self.vectors)

    @property
    def narrow_shared_loads(self) -> int:
        return self.main.count("LDS.U16")


def held(binary: Path) -> Iterator[Held]:
    for name, code in sorted(functions(binary).items()):
        found = re.search(r"held_rowsIL\w*?4Kind(\d)E(13__nv_bfloat16|6__half|f)(\w*?)EEv", name)
        if found is None:
            continue
        counts = sass_counts(code)
        addresses = {step.address for step in counts.main.steps}
        loops = [loop for loop in counts.loops if loop.mufu and loop.steps[0].address in addresses]
        outer = [x for x in loops if not any(x.steps[0] in other.steps for other in loops if other is not x)]
        dtype, numbers = TYPES[found[2]]
        yield Held(KINDS[int(found[1])], dtype, found[3], counts.main, tuple(outer), numbers)


def table(kernels: list[Held]) -> str:
    lines = [
        "| kind | dtype | template | instructions a class | MUFU a class | in flight | shared loads of 2 bytes |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for x in kernels:
        lines.append(
            f"| {x.kind} | {x.dtype} | {x.variant} | {x.instructions:.1f} | {x.mufu:.1f} "
            f"| {x.in_flight} / {2 * x.vectors} | {x.narrow_shared_loads} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is worse than its bound")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        binary = arguments.binary or Path(folder) / "csrc.so"
        if arguments.binary is None:
            cuda.build(binary, ["sm_90a"])
        kernels = list(held(binary))
    print(table(kernels))
    figures = [
        (goal, goal.figure(x)) for goal in goals.CSRC for x in kernels if (goal.what, goal.case) == (x.kind, x.dtype)
    ]
    print("", goals.bounds_table(figures), sep="\n")
    failures = [fault for goal, figure in figures for fault in goal.faults(figure)] if arguments.check else []
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
