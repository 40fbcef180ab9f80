"""`python -m bench.static [--arch sm_90 ...] [--kernel NAME]`: compiles every shipped kernel without a GPU.

It calls each launcher of `kernels/` as an op does, on tensors of the sizes in static_cases.py, but compiles the kernels
for each architecture instead of launching them: the table shows exactly the configurations that run. Its columns are
registers per thread, bytes of spills, shared memory, tensor-core instructions, the widest load in bits, and how many
programs fit a multiprocessor at once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastdistill.kernels import _common
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import static_cases


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
    warps = kernel.metadata.num_warps
    if arch.target.backend == "cuda":
        registers, spills, tensor_core, widest = _nvidia(kernel.asm["cubin"])
    else:
        registers, spills, tensor_core, widest = _amd(kernel.asm["amdgcn"])
    threads = warps * arch.target.warp_size
    programs = min(arch.threads // threads, arch.registers // max(registers * threads, 1), 32)
    if kernel.metadata.shared:
        programs = min(programs, arch.shared // kernel.metadata.shared)
    return Compiled(
        launch, case, arch.name, warps, registers, spills, kernel.metadata.shared, tensor_core, widest, programs
    )


def _nvidia(cubin: bytes) -> tuple[int, int, int, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
        "| kernel | case | arch | warps | registers | spills | shared | tensor core | widest load | programs |",
        "| --- | --- | --- |" + " ---: |" * 7,
    ]
    for r in rows:
        lines.append(
            f"| {r.launch.name} | {r.case} | {r.arch} | {r.warps} | {r.registers} | {r.spills} "
            f"| {r.shared / 1024:.1f} KiB | {r.tensor_core} | {r.widest_load} | {r.programs} |"
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
        kernel.launch.name not in ("attention_mse.contract", "attention_mse.finalise")
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
        "--check", action="store_true", help="exit with 1 if a kernel spills, or loads less than 16 bytes at once"
    )
    parser.add_argument("--few", action="store_true", help="only one case for each kernel and dtype")
    arguments = parser.parse_args()
    rows = []
    for arch in arguments.arch:
        chosen = list(cases(arch, arguments.kernel))
        if arguments.few:  # the last, which has the most options
            chosen = list({(launch.name, launch.dtype): (case, launch) for case, launch in chosen}.values())
        rows += [compiled(launch, case, ARCHS[arch]) for case, launch in chosen]
    print(table(rows))
    failures = [fault for row in rows for fault in faults(row)] if arguments.check else []
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
