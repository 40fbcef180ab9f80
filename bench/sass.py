"""Counts what the machine code of an NVIDIA kernel does: instructions, loads, matrix products, along its main path.

    from bench.sass import functions, sass_counts

    code = functions("kernel.cubin")  # also a .so of nvcc: {name of the function: its SASS}
    counts = sass_counts(code["_gram"])
    loop = counts.hot  # the innermost loop with the most matrix instructions, else with the most instructions
    loop.instructions * 32 * warps / pairs_of_a_tile  # thread instructions a pair, as kernels.md counts them
    loop.mufu * 32 * warps / pairs_of_a_tile
    loop.shared_wavefronts * warps / pairs_of_a_tile
    counts.main.instructions  # from entry to exit, every loop once: for kernels that hold a row in registers
    loop.count("LDS.U16"), loop.flops(warps)  # instructions by name; operations of all warps' matrix instructions
    [(load.bits, load.parameters) for load in loop.loads]  # width, and the byte offsets of its pointer arguments
    loop.loads_before_wait, len(loop.widest_loads)  # loads in flight before the first wait for one of them

`sass_counts(text)` takes the SASS of one function as `cuobjdump -sass` prints it (hexadecimal words included: the
waits are in them). All counts are instructions that one warp issues in one pass over a path, predicated ones included.
The main path reads and writes most global memory; among equals it has most matrix instructions, then most loops, then
fewest instructions. So early returns, rows that do not count, edges of rows, slow paths of divisions and options that
read nothing are left out; with `optional=True` the most instructions decide last, which is an upper bound. A path
contains each inner loop once. Several iterations that the compiler unrolled are one longer pass.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as File

import triton

MATRIX = ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA")
SHAPES = {
    "16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4), "8x8x4": (8, 8, 4),
    "16x8x4": (16, 8, 4), "16x8x8": (16, 8, 8), "16x8x16": (16, 8, 16),
}  # fmt: skip
PARAMETERS = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}  # where arguments start in constant bank 0, by generation


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P0", or ""
    opcode: str  # "LDG.E.128"
    operands: tuple[str, ...]
    control: int  # scheduling: which barriers it sets and waits for

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """The width of a memory access in a thread."""
        widths = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((widths[part] for part in reversed(self.opcode.split(".")) if part in widths), 32)

    @property
    def sets(self) -> int | None:
        """The barrier that is released when its result has arrived."""
        barrier = self.control >> 5 & 7
        return None if barrier == 7 else barrier

    @property
    def waits_for(self) -> set[int]:
        return {barrier for barrier in range(6) if self.control >> 11 >> barrier & 1}

    @cached_property
    def written(self) -> list[str]:
        """The registers that it writes, as far as addresses are computed with them."""
        found = re.match(r"(U?R)(\d+)", self.operands[0]) if self.operands else None
        if found is None or self.name.startswith(("ST", "RED", "LDGSTS")):
            return []
        parts = self.opcode.split(".")
        count = 4 if "128" in parts else 2 if {"64", "WIDE"} & {*parts} or self.name in ("CS2R", "DADD", "DFMA") else 1
        return [f"{found[1]}{int(found[2]) + i}" for i in range(count)]

    @cached_property
    def read(self) -> list[str]:
        return re.findall(r"\bU?R\d+", " ".join(self.operands[1:]))

    @property
    def address_registers(self) -> list[str]:
        """The registers of a global access' address; those of a 64-bit address are named by the lower half."""
        memory = next(x for x in reversed(self.operands) if "desc[" in x or (x.startswith("[") and ".64" in x))
        return re.findall(r"\bU?R\d+", memory.split("][")[-1])

    @property
    def wavefronts(self) -> int:
        """Passes through shared memory of 128 bytes each, if no two threads meet in a bank."""
        if self.predicate == "@!PT":
            return 0
        if self.name in ("LDSM", "STSM"):
            return int(self.opcode.split(".")[-1]) if self.opcode[-1] in "24" else 1
        if self.name in ("LDS", "STS", "LDGSTS", "ATOMS"):
            return max(self.bits // 32, 1)
        return 0

    def flops(self) -> float:
        """Operations of a matrix instruction, divided by the warps that issue it together."""
        shape = self.opcode.split(".")[1]
        if self.name == "HGMMA":  # four warps together
            m, n, k = map(int, shape.split("x"))
            return 2 * m * n * k / 4
        if self.name not in ("HMMA", "DMMA") or shape not in SHAPES:
            raise ValueError(f"the shape of {self.opcode} is unknown")
        m, n, k = SHAPES[shape]
        return 2 * m * n * k


@dataclass(frozen=True)
class Load:
    """A load from global memory: how many bits a thread reads, and from which pointer arguments."""

    bits: int
    parameters: tuple[int, ...]  # byte offsets among the arguments; several if the code chooses between pointers
    into_shared: bool  # an asynchronous copy


@dataclass(frozen=True)
class Path:
    """Instructions in the order in which one warp issues them."""

    steps: tuple[Instruction, ...]
    tracer: Tracer

    @property
    def instructions(self) -> int:
        return len(self.steps)

    @property
    def mufu(self) -> int:
        return sum(step.name == "MUFU" for step in self.steps)

    @property
    def shared_wavefronts(self) -> int:
        return sum(step.wavefronts for step in self.steps)

    @property
    def matrix(self) -> int:
        return sum(step.name in MATRIX for step in self.steps)

    def flops(self, warps: int) -> float:
        """Operations of the matrix instructions of all warps of a program."""
        return sum(step.flops() for step in self.steps if step.name in MATRIX) * warps

    def count(self, *names: str) -> int:
        """Counts instructions by name and suffixes: `count("LDS.U16")`, `count("LDGSTS")`."""
        return sum(
            any(step.opcode == name or step.opcode.startswith(name + ".") for name in names) for step in self.steps
        )

    @cached_property
    def loads(self) -> list[Load]:
        return [
            Load(step.bits, self.tracer.parameters(step), step.name == "LDGSTS")
            for step in self.steps
            if step.name in ("LDG", "LDGSTS")
        ]

    @property
    def widest_loads(self) -> list[Load]:
        return [load for load in self.loads if load.bits == max(other.bits for other in self.loads)]

    @property
    def loads_before_wait(self) -> int:
        """The widest loads that are issued before an instruction waits for one of them.

        Asynchronous copies: those of the groups that a wait leaves under way, and of the one that it waits for.
        """
        copies, groups = self.count("LDGSTS"), self.count("LDGDEPBAR")
        if copies and groups:
            left = [int(step.operands[1], 16) for step in self.steps if step.opcode == "DEPBAR.LE"]
            return round(copies / groups * (max(left, default=0) + 1))
        issued, barriers = 0, set()
        for step in self.steps:
            if barriers & step.waits_for:
                break
            if step.name == "LDG" and step.bits == self.widest_loads[0].bits:
                issued += 1
                barriers.add(step.sets)
        return issued


@dataclass(frozen=True)
class Counts:
    everything: Path  # all instructions, in the order of their addresses
    main: Path  # from entry to exit
    loops: tuple[Path, ...]  # by address; each once through its body, inner loops included once
    innermost: tuple[Path, ...]  # those that contain no other

    @property
    def hot(self) -> Path:
        """The innermost loop with the most matrix instructions, else with the most instructions; else the main path."""
        return max(self.innermost, key=lambda loop: (loop.matrix, loop.instructions), default=self.main)


def sass_counts(text: str, optional: bool = False) -> Counts:
    code = _Graph(text, optional)
    tracer = Tracer(code)

    def path(blocks: list[int]) -> Path:
        return Path(tuple(step for block in blocks for step in code.blocks[block]), tracer)

    loops = code.loops()
    paths: dict[int, list[int]] = {}  # of each loop, by its header
    for header, body in sorted(loops.items(), key=lambda loop: len(loop[1])):
        paths[header] = code.main_path(header, body, loops, paths)
    innermost = [header for header, body in loops.items() if not body & (loops.keys() - {header})]
    return Counts(
        everything=path(list(code.order)),
        main=path(code.main_path(code.entry, set(code.blocks), loops, paths)),
        loops=tuple(path(paths[header]) for header in sorted(loops)),
        innermost=tuple(path(paths[header]) for header in sorted(innermost)),
    )


class _Graph:
    """The control flow of a function: basic blocks by the address of their first instruction."""

    def __init__(self, text: str, optional: bool) -> None:
        self.optional = optional
        steps = list(_instructions(text))
        generation = re.search(r"EF_CUDA_SM(\d+)", text)
        self.first_parameter = PARAMETERS[int(generation[1]) // 10] if generation else PARAMETERS[9]
        targets = {target for step in steps if (target := _target(step)) is not None}
        ends = {step.address for step in steps if step.name in ("BRA", "CALL", "EXIT", "RET", "BRX")}
        self.blocks: dict[int, list[Instruction]] = {}
        block: list[Instruction] = []
        for before, step in zip([None, *steps], steps, strict=False):
            if before is None or before.address in ends or step.address in targets:
                block = self.blocks[step.address] = []
            block.append(step)
        self.entry = steps[0].address
        starts = list(self.blocks)
        self.successors: dict[int, list[int]] = {}
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            last = self.blocks[start][-1]
            target = _target(last)
            leaves = last.name in ("BRA", "EXIT", "RET", "BRX") and not last.predicate and len(last.operands) < 2
            after = [] if leaves or following is None else [following]
            self.successors[start] = after if target is None else [target, *after]
        self.predecessors: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, after in self.successors.items():
            for block_after in after:
                self.predecessors[block_after].append(start)
        self.order, self.back_edges = self._depth_first()

    def _depth_first(self) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """Returns each block's place in reverse postorder, and the edges to a block that is still open."""
        finished: list[int] = []
        back, state = [], {self.entry: "open"}
        stack = [(self.entry, iter(self.successors[self.entry]))]
        while stack:
            block, after = stack[-1]
            for following in after:
                if state.get(following) == "open":
                    back.append((block, following))
                elif following not in state:
                    state[following] = "open"
                    stack.append((following, iter(self.successors[following])))
                    break
            else:
                stack.pop()
                state[block] = "done"
                finished.append(block)
        return {block: place for place, block in enumerate(reversed(finished))}, back

    def loops(self) -> dict[int, set[int]]:
        """Returns the blocks of each loop by its first block; back edges to one block are one loop."""
        loops: dict[int, set[int]] = {}
        for latch, header in self.back_edges:
            body = loops.setdefault(header, {header})
            waiting = [latch]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += self.predecessors[block]
        return loops

    def main_path(
        self, first: int, body: set[int], loops: dict[int, set[int]], paths: dict[int, list[int]]
    ) -> list[int]:
        """Returns the blocks of the main path from `first` to an exit, or back to `first`.

        The paths of inner loops are taken from `paths`.
        """
        owner = {block: block for block in body if block in self.order}
        for header, inner in sorted(loops.items(), key=lambda loop: len(loop[1])):
            if header != first and inner <= body:
                owner.update(dict.fromkeys(inner, header))
        best: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        for block in sorted(set(owner.values()), key=self.order.__getitem__, reverse=True):
            inner = block in paths and block != first
            own = paths[block] if inner else [block]
            steps = [step for x in own for step in self.blocks[x]]
            worth = (
                sum(step.bits for step in steps if step.name in ("LDG", "STG", "LDGSTS")),
                sum(step.name in MATRIX for step in steps),
                inner,
                len(steps) if self.optional else -len(steps),
            )
            members = [member for member, of in owner.items() if of == block]
            following = [x for member in members for x in self.successors[member]]
            leaves = any(self.blocks[member][-1].name in ("EXIT", "RET") for member in members)
            if first in following if first in loops else leaves or not following:
                best[block] = (worth, own)
            after = {owner[x] for x in following if x in owner} - {block, first}
            rest = max((best[x] for x in after if x in best), default=None)
            if rest is not None:
                longer = tuple(a + b for a, b in zip(worth, rest[0], strict=True))
                best[block] = max(best.get(block, (longer, own + rest[1])), (longer, own + rest[1]))
        return best[owner[first]][1]


class Tracer:
    """Finds the pointer arguments that an address is computed from."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.place = {step.address: (start, i) for start, block in graph.blocks.items() for i, step in enumerate(block)}

    def parameters(self, access: Instruction) -> tuple[int, ...]:
        """Returns the byte offsets of 64-bit arguments that reach the address, following every possible path."""
        found, seen = set(), set()
        waiting = [(access, register) for register in access.address_registers]
        while waiting:
            for writer in self._writers(*waiting.pop()):
                if writer.address in seen:
                    continue
                seen.add(writer.address)
                for offset in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", " ".join(writer.operands)):
                    if int(offset, 16) >= self.graph.first_parameter:
                        found.add(int(offset, 16) - self.graph.first_parameter)
                if writer.name not in ("LDG", "LDS", "SHFL"):  # an index that was loaded is no pointer
                    waiting += [(writer, register) for register in writer.read]
        return tuple(sorted(found))

    def _writers(self, reader: Instruction, register: str) -> Iterator[Instruction]:
        start, end = self.place[reader.address]
        waiting, seen = [(start, end)], set()
        while waiting:
            start, end = waiting.pop()
            for step in reversed(self.graph.blocks[start][:end]):
                if register in step.written:
                    yield step
                    if not step.predicate:
                        break
            else:
                for before in self.graph.predecessors[start]:
                    if before not in seen:
                        seen.add(before)
                        waiting.append((before, len(self.graph.blocks[before])))


def _target(step: Instruction) -> int | None:
    if step.name not in ("BRA", "CALL"):  # ptxas calls where a branch would be too far
        return None
    return int(step.operands[-1], 16)


def _instructions(text: str) -> Iterator[Instruction]:
    word = r"/\* 0x([0-9a-f]{16}) \*/"
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@\S+ )?\s*([A-Z][\w.]*)\s*([^;]*);\s+" + word + r"\s+" + word
    for address, predicate, opcode, operands, _, high in re.findall(pattern, text):
        words = re.split(r",\s*", operands.replace("`(", "").replace(")", "").strip()) if operands.strip() else []
        yield Instruction(int(address, 16), predicate.strip(), opcode, tuple(words), int(high, 16) >> 41)


def functions(path: File | str) -> dict[str, str]:
    """Returns the SASS of each function of a cubin or a library, by its (mangled) name."""
    text = _cuobjdump(path, "-sass")
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.DOTALL))


def disassembled(cubin: bytes) -> str:
    """Returns the resources and the SASS of a cubin with one function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _cuobjdump(file.name, "-res-usage", "-sass")


def _cuobjdump(path: File | str, *options: str) -> str:
    tool = File(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout
