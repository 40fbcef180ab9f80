"""`python -m bench.static [--arch sm_90 ...] [--kernel NAME]`: compiles every shipped kernel without a GPU.

It calls each launcher of `kernels/` as an op does, on tensors of the sizes in static_cases.py, but compiles the kernels
for each architecture instead of launching them: the table shows exactly the configurations that run. Its columns are
registers per thread, bytes of spills, shared memory, and how many programs fit a multiprocessor at once. For NVIDIA
they are also, for the part of the machine code where the time goes (sass.py; `work` of static_cases.py says which part
and which elements it handles):

    unit          what the next three columns are divided by
    instructions  thread instructions a unit: an H200 issues 41 in the time that memory needs for 6 bytes
    MUFU          exponentials, logarithms, reciprocals a unit: 5.2 in the same time
    wavefronts    passes of 128 bytes through shared memory a unit, without bank conflicts
    products      operations of the matrix instructions / operations that the products need
    loads         for each operand: loads of a thread in one pass x their bits; single loads of small operands left out
    in flight     of the widest loads, how many are issued before the first wait / how many one pass has; asynchronous
                  copies are issued some passes ahead

An operand is found by tracing the address of each load back to the kernel's arguments. Where the code chooses between
two pointers, both are named. Bits are those of the instruction. `--check` fails where a figure is worse than the bound
in goals.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import triton
from fastdistill.kernels import _common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import goals, static_cases
from bench.sass import Counts, Path, disassembled, sass_counts


@dataclass(frozen=True)
class Arch:
    name: str
    target: GPUTarget
    shared: int  # bytes a program may have
    threads: int  # of a multiprocessor
    registers: int


ARCHS = {
    "sm_80": Arch("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 2048, 65536),
    "sm_90": Arch("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 2048, 65536),
    "sm_100": Arch("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 2048, 65536),
    "gfx942": Arch("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 2048, 512 * 4 * 64),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would launch it."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.function.__module__.rsplit('.', 1)[-1]}.{self.function.__name__.strip('_')}"

    @property
    def dtype(self) -> str:
        """The type of the first tensor, as Triton writes it."""
        return next(kind for kind in self.signature.values() if kind.startswith("*"))

    @property
    def parameters(self) -> dict[int, str]:
        """The names of the arguments by their byte offset in the compiled kernel."""
        names, offset = {}, 0
        for name, kind in self.signature.items():
            if kind == "constexpr":
                continue
            size = 8 if kind.startswith("*") or kind.endswith("64") else 4
            offset = -(-offset // size) * size
            names[offset] = name
            offset += size
        return names

    @property
    def key(self) -> tuple[str, ...]:
        """A key that is equal for launches of the same compiled kernel."""
        return (self.name, *map(repr, (self.signature, self.constants, self.attributes, self.options)))


@dataclass(frozen=True)
class Compiled:
    launch: Launch
    case: str
    arch: str
    warps: int
    registers: int
    spills: int  # bytes a thread
    shared: int  # bytes a program
    tensor_core: int  # instructions
    widest_load: int  # bits
    programs: int  # that fit a multiprocessor
    counts: Counts | None = field(default=None, repr=False)  # None: not NVIDIA
    needed_flops: float = 0  # of the products in the Triton code

    @property
    def name(self) -> str:
        return f"{self.launch.name}, {self.case}, {self.arch}"

    @cached_property
    def hot(self) -> list[Path]:
        """The parts of the machine code where the time goes; together they handle `elements`."""
        if self.counts is None or self.counts.everything.count("UTCHMMA", "UTCQMMA"):  # specialised warps on sm_100
            return []
        if "RESIDENT" not in self.launch.constants:  # not a kernel of rows
            return [self.counts.hot]
        student = next(offset for offset, name in self.launch.parameters.items() if name == "student_ptr")
        paths = [self.counts.main] if self.launch.constants["RESIDENT"] else self.counts.loops
        loops = [path for path in paths if any(student in load.parameters for load in path.loads)]
        return [x for x in loops if not any(x.steps[0] in other.steps for other in loops if other is not x)]

    def _of_an_element(self, count: float) -> float:
        return count / static_cases.work(self.launch.name, self.launch.constants)[1]

    @property
    def instructions(self) -> float:
        return self._of_an_element(sum(path.instructions for path in self.hot) * 32 * self.warps)

    @property
    def mufu(self) -> float:
        return self._of_an_element(sum(path.mufu for path in self.hot) * 32 * self.warps)

    @property
    def wavefronts(self) -> float:
        return self._of_an_element(sum(path.shared_wavefronts for path in self.hot) * self.warps)

    @property
    def redundancy(self) -> float | None:
        """How often each product is computed; None if the machine code does not say."""
        if self.counts is None or not self.hot or not self.needed_flops:
            return None
        return self.counts.everything.flops(self.warps) / self.needed_flops

    @cached_property
    def loads(self) -> dict[str, Counter[int]]:
        """For each operand, how many loads of which width a thread does in one pass."""
        found: dict[str, Counter[int]] = {}
        names = self.launch.parameters
        for path in self.hot:
            for load in path.loads:
                pointers = [
                    names[x] for x in load.parameters if self.launch.signature.get(names.get(x, ""), "")[:1] == "*"
                ]
                for name in pointers or ["?"]:
                    found.setdefault(name.removesuffix("_ptr"), Counter())[load.bits] += 1
        return found

    def narrowest_load(self, operand: str) -> int:
        """Returns the bits of the narrowest load from an operand."""
        return min(self.loads[operand])

    @property
    def in_flight(self) -> tuple[int, int]:
        """Of the widest loads of the longest pass, how many are issued before the first wait; how many there are."""
        path = max(self.hot, key=lambda path: path.instructions)
        return path.loads_before_wait, len(path.widest_loads)


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Records launches instead of running them; launchers choose tiles for `arch`."""
    launches: list[Launch] = []

    def run(self, *arguments, grid, warmup, **keywords):  # type: ignore[no-untyped-def]
        launches.append(_launch(self, arguments, keywords))

    run_before, arch_before = JITFunction.run, _common.arch_of
    JITFunction.run, _common.arch_of = run, lambda x: arch  # type: ignore[method-assign,assignment]
    try:
        yield launches
    finally:
        JITFunction.run, _common.arch_of = run_before, arch_before  # type: ignore[method-assign]


def _launch(function: JITFunction, arguments: tuple, keywords: dict[str, Any]) -> Launch:
    """Specialises a call as Triton does: None, 1 and constexprs are constants; divisibility by 16 is recorded."""
    values = dict(zip(function.arg_names, arguments, strict=False))
    values.update({name: keywords.pop(name) for name in list(keywords) if name in function.arg_names})
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = values.get(parameter.name, parameter.default if parameter.has_default else None)
        is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        is_one = is_one and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = parameter.annotation_type or "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return Launch(function, signature, constants, attributes, keywords)


_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def compiled(launch: Launch, case: str, arch: Arch) -> Compiled:
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    kernel = triton.compile(source, target=arch.target, options={**launch.options, "enable_fp_fusion": True})
    warps, counts = kernel.metadata.num_warps, None
    if arch.target.backend == "cuda":
        code = disassembled(kernel.asm["cubin"])
        registers, spills, tensor_core, widest = _nvidia(code)
        counts = sass_counts(code)
    else:
        registers, spills, tensor_core, widest = _amd(kernel.asm["amdgcn"])
    threads = warps * arch.target.warp_size
    programs = min(arch.threads // threads, arch.registers // max(registers * threads, 1), 32)
    if kernel.metadata.shared:
        programs = min(programs, arch.shared // kernel.metadata.shared)
    return Compiled(
        launch, case, arch.name, warps, registers, spills, kernel.metadata.shared, tensor_core, widest, programs,
        counts, _flops_of_dots(kernel.asm["ttgir"]) if counts else 0,
    )  # fmt: skip


def _flops_of_dots(code: str) -> float:
    """Adds up the operations of each product in Triton's intermediate code, as if each ran once."""
    flops = 0
    for line in re.findall(r"(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*", code):
        (m, k, dtype), (_, n, _) = re.findall(r"(?:tensor|memdesc)<(?:\d+x)*?(\d+)x(\d+)x(\w+)", line)[:2]
        flops += 2 * int(m) * int(n) * int(k) * (3 if "tf32x3" in line and dtype == "f32" else 1)
    return flops


def _nvidia(code: str) -> tuple[int, int, int, int]:
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    loads = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)
    widths = [next((int(part) for part in load.split(".") if part.isdigit()), 32) for load in loads]
    copies = 128 if "UTMALDG" in code or "UBLKCP" in code else 0
    tensor_core = len(re.findall(r"\b(?:HMMA|HGMMA|DMMA|UTCHMMA|UTCQMMA)\b", code))
    return registers, stack + local, tensor_core, max([*widths, copies])


def _amd(code: str) -> tuple[int, int, int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}
    loads = re.findall(r"\b(?:global|buffer)_load_(dwordx[234]|dword|u?short|ubyte)", code)
    spills = 4 * field("vgpr_spill_count")  # scalar registers spill into lanes of vector registers, not into memory
    registers = field("vgpr_count") + field("agpr_count")
    return registers, max(spills, field("private_segment_fixed_size")), code.count("v_mfma"), max(
        [sizes[x] for x in loads], default=0
    )  # fmt: skip


def cases(arch: str, only: str = "") -> Iterator[tuple[str, Launch]]:
    """Yields every shipped configuration on `arch` once: the name of its case, and the launch."""
    seen = set()
    for name, call in static_cases.all_cases():
        if only not in name:
            continue
        with recorded(arch) as launches:
            call()
        for launch in launches:
            if launch.key not in seen:
                seen.add(launch.key)
                yield name, launch


def compilations(sizes: Iterable[int], arch: str = "sm_90") -> dict[str, set[tuple[str, ...]]]:
    """Returns for each op the kernels that calls of these sizes (tokens, rows, or lengths) have to compile."""
    compiled: dict[str, set[tuple[str, ...]]] = {}
    for size in sizes:
        for name, call in static_cases.growing(size):
            with recorded(arch) as launches:
                call()
            compiled.setdefault(name, set()).update(launch.key for launch in launches)
    return compiled


def table(rows: list[Compiled]) -> str:
    lines = [
        f"triton {triton.__version__}",
        "",
        "| kernel | case | arch | warps | registers | spills | shared | programs "
        "| unit | instructions | MUFU | wavefronts | products | loads | in flight |",
        "| --- | --- | --- |" + " ---: |" * 5 + " --- |" + " ---: |" * 4 + " --- | ---: |",
    ]
    for r in rows:
        start = f"| {r.launch.name} | {r.case} | {r.arch} | {r.warps} | {r.registers} | {r.spills} "
        start += f"| {r.shared / 1024:.1f} KiB | {r.programs} |"
        if not r.hot:
            lines.append(f"{start} | | | | {r.tensor_core} instructions | at most {r.widest_load} bits | |")
            continue
        unit = static_cases.work(r.launch.name, r.launch.constants)[0]
        loads = [
            f"{name} " + " + ".join(f"{count} x {bits}" for bits, count in widths.items())
            for name, widths in r.loads.items()
            if widths.total() > 1 or max(widths) >= 64
        ]
        lines.append(
            f"{start} {unit} | {r.instructions:.3g} | {r.mufu:.2g} | {r.wavefronts:.2g} "
            f"| {'' if r.redundancy is None else f'{r.redundancy:.2f}'} | {', '.join(loads)} "
            f"| {r.in_flight[0]} / {r.in_flight[1]} |"
        )
    return "\n".join(lines)


def faults(kernel: Compiled, bytes_of_a_load: int = 16) -> list[str]:
    """Returns what would make a kernel slow or fail to launch; a shipped kernel must have none of it."""
    found = []
    if kernel.spills:
        found.append(f"{kernel.spills} bytes of spills")
    if kernel.shared > ARCHS[kernel.arch].shared:
        found.append(f"{kernel.shared} bytes of shared memory")
    multiplies = "tl.dot(" in kernel.launch.function.src and "no product" not in kernel.case
    if multiplies and not kernel.tensor_core:
        found.append("no tensor-core instructions")
    hot = (
        kernel.launch.name not in ("attention_mse.contract", "attention_mse.finalise", "attention_packed.bounds")
        and "unaligned" not in kernel.case
    )
    if hot and kernel.widest_load < 8 * bytes_of_a_load:
        found.append(f"loads of at most {kernel.widest_load} bits")
    return [f"{kernel.launch.name}, {kernel.case}, {kernel.arch}: {fault}" for fault in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--kernel", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a kernel spills, loads less than 16 bytes, or misses a bound",
    )
    parser.add_argument("--few", action="store_true", help="only one case for each kernel and dtype")
    arguments = parser.parse_args()
    rows = []
    for arch in arguments.arch:
        chosen = list(cases(arch, arguments.kernel))
        if arguments.few:  # the last, which has the most options, and those with goals
            with_goals = [x for x in chosen if any(goal.is_about(x[1].name, x[0], arch) for goal in goals.STATIC)]
            last = {(launch.name, launch.dtype): (case, launch) for case, launch in chosen}
            chosen = [*last.values(), *(x for x in with_goals if x not in last.values())]
        rows += [compiled(launch, case, ARCHS[arch]) for case, launch in chosen]
    print(table(rows))
    figures = [
        (goal, goal.figure(row))
        for goal in goals.STATIC
        for row in rows
        if goal.is_about(row.launch.name, row.case, row.arch) and row.hot
    ]
    print("", goals.bounds_table(figures), sep="\n")
    failures = []
    if arguments.check:
        failures = [fault for row in rows for fault in faults(row)]
        failures += [fault for goal, figure in figures for fault in goal.faults(figure)]
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
