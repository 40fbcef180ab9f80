"""Checks what bench.sass counts on a small function whose figures were worked out by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="its package brings cuobjdump, and bench.sass imports it")

from bench.sass import Load, sass_counts

NONE = 7  # no barrier


def line(address: int, text: str, sets: int = NONE, waits: tuple[int, ...] = ()) -> str:
    control = sets << 5 | NONE << 8 | sum(1 << barrier for barrier in waits) << 11
    return f"/*{address:04x}*/ {text} ; /* 0x{0:016x} */\n /* 0x{control << 41:016x} */\n"


def function(*steps: tuple) -> str:
    code = "".join(line(16 * i, *step) for i, step in enumerate(steps))
    return '.headerflags @"EF_CUDA_SM90"\n' + code


# Rows of two operands: `a` in 16 bytes (its address is the first argument), `b` in 2 bytes (the second). One row in
# front may be skipped: then the program stores once and ends.
CODE = function(
    ("LDC.64 R2, c[0x0][0x210]", 0),  # 0x00
    ("ISETP.NE.AND P0, PT, R9, RZ, PT",),
    ("@P0 BRA 0x60",),
    ("STG.E desc[UR4][R2.64], RZ",),
    ("MOV R5, RZ",),
    ("EXIT",),
    ("MOV R4, 0x2",),  # 0x60
    ("LDG.E.128 R12, desc[UR4][R2.64]", 1, (0,)),  # 0x70, the loop
    ("IMAD.WIDE R6, R8, R4, c[0x0][0x218]",),
    ("LDG.E.128 R16, desc[UR4][R2.64+0x800]", 1),
    ("@P1 LDG.E.U16 R10, desc[UR4][R6.64]", 2),
    ("MUFU.EX2 R20, R12", 3, (1,)),
    ("@P2 BRA 0xd0",),
    ("HMMA.16816.F32.BF16 R24, R12, R16, R24",),  # 0xd0
    ("LDS.128 R28, [R30+UR6]",),
    ("@!PT LDS RZ, [RZ]",),
    ("LDG.E.128 R16, desc[UR4][R2.64+0x1000]", 1),
    ("IADD3 R2, P3, R2, 0x10, RZ",),
    ("@P0 BRA 0x70",),
    ("STG.E.128 desc[UR4][R2.64], R24",),
    ("EXIT",),
)


def test_the_loop_is_counted_as_by_hand() -> None:
    [loop] = sass_counts(CODE).loops
    assert loop.instructions == 12
    assert loop.mufu == 1
    assert loop.shared_wavefronts == 4
    assert loop.flops(warps=4) == 4 * 2 * 16 * 8 * 16
    assert loop.count("LDG.E.128") == 3
    assert loop.count("LDG") == 4


def test_loads_name_their_width_and_argument_and_how_many_are_in_flight() -> None:
    [loop] = sass_counts(CODE).loops
    a, b = Load(128, (0,), False), Load(16, (8,), False)
    assert loop.loads == [a, a, b, a]
    assert (loop.loads_before_wait, len(loop.widest_loads)) == (2, 3)


def test_the_main_path_leaves_out_the_early_exit() -> None:
    counts = sass_counts(CODE)
    assert counts.hot is counts.innermost[0]
    assert [step.address for step in counts.main.steps] == [0, 16, 32, *range(0x60, 0x150, 16)]
    assert counts.everything.instructions == 21


def test_a_program_may_end_inside_its_loop() -> None:
    code = function(("MOV R2, RZ",), ("IADD3 R2, R2, 0x1, RZ",), ("@!P0 EXIT",), ("BRA 0x10",))
    counts = sass_counts(code)
    assert (counts.main.instructions, counts.hot.instructions) == (4, 3)


def test_the_shape_of_a_matrix_instruction_must_be_known() -> None:
    [loop] = sass_counts(CODE.replace("HMMA.16816", "HMMA.161632")).loops
    with pytest.raises(ValueError, match=r"the shape of HMMA\.161632\.F32\.BF16 is unknown"):
        loop.flops(4)
