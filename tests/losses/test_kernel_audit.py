"""Tests for faults that Triton's interpreter does not show: code that the compiler refuses, offsets beyond 32 bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the kernels")

from fastdistill.kernels import attention_short

from fastdistill.ops._attention import Attention

# Runs only the first stage of the compiler, which takes a tenth of the time and needs no GPU. Prints a line for each
# launch that the compiler refuses, and at last how many launches of each kernel there were.
COMPILE = """
from collections import Counter
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from bench import static, static_cases
from fastdistill.kernels import _common, attention_mse, attention_tiles, logits, shards
from fastdistill.ops._attention import Attention, Counted
from fastdistill.ops._rows import RowOptions

_common.WIDENS = True  # as with Triton 3.6
TARGET = static.ARCHS["sm_90"].target
BACKEND = make_backend(TARGET)
MIXTURES = {(0.5, 0.5, 0.5): "jsd", (0.1, 1.0, 0.0): "skewed KL", (0.9, 0.0, 1.0): "skewed reverse KL",
            (0.3, 0.5, 0.5): "mixture"}
done, double = Counter(), torch.float64


def to_first_code(launch):
    options = BACKEND.parse_options(launch.options)
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    source.make_ir(TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context)


def compile(name, call):
    with static.recorded("sm_90") as launches:
        call()
    for launch in launches:
        # Triton 3.6 compiles no product of float64 one of whose factors depends on a load of fewer than 32 bits.
        if launch.constants.get("WIDE") == tl.float64:
            read = launch.signature.keys() - {"out_ptr", "d_query_ptr", "d_key_ptr"}
            if narrow := sorted(name for name in read if launch.signature[name] in ("*bf16", "*fp16", "*i1")):
                print(f"{launch.name}, {name}: {narrow} have fewer than 32 bits")
        try:
            to_first_code(launch)
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            print(f"{launch.name}, {name}: {str(error).strip().splitlines()[-1]}")
        done[launch.name] += 1


def mixture(weights):
    student, labels, loss = torch.zeros(3, 40, dtype=double), torch.zeros(3).long(), torch.zeros(3, dtype=double)
    options = RowOptions("jsd", "", 40, 2.0, *weights, 1.0, 0.5, None, None, 1.0, 1.0, "triton")
    logits.rows(student, (student,), labels, None, options, loss=loss, gradient=student.clone())
    rest = (None, None), labels, options, 40
    shards.summed(student, student, *rest, shards.sums(student, student, *rest, 3, double))


def attention(student, teacher, key_mask=None, query_mask=None):
    heads = student, student[:, :1], teacher, teacher[:, :1]
    return Attention(*heads, 0.1, 0.1, key_mask, query_mask, False, None)


def tiles(is_kl):
    call = attention(torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 64, 64, dtype=double))
    attention_tiles.loss(
        call, Counted(torch.zeros(0), None, None), is_kl=is_kl, dtype=double, d_query=call.student_query.double(),
        d_key=call.student_key.double(),
    )


def gram(masks, student=torch.bfloat16, teacher=torch.bfloat16):
    call = attention(*(torch.zeros(2, 2, 64, 32, dtype=dtype) for dtype in (student, teacher)), **masks)
    loss, *saved = attention_mse.loss(call, None, None, None)
    attention_mse.gradients(loss, call, *saved, (None, None), *map(torch.empty_like, call.tensors()[:2]))


for weights, name in MIXTURES.items():
    compile(f"{name} in float64", lambda: mixture(weights))
for is_kl in (False, True):
    compile(f"{is_kl=}, a 16-bit student and a float64 teacher", lambda: tiles(is_kl))
rows = torch.ones(2, 64, dtype=torch.bool)
for masks in ({"key_mask": rows}, {"query_mask": rows}):
    compile(f"{[*masks]} alone", lambda: gram(masks))
for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
    compile(f"a student in {student} and a teacher in {teacher}", lambda: gram({"key_mask": rows}, student, teacher))
masked = {
    "gram": static_cases._gram(32, 64, "fp32", masked=True),
    "packed": static_cases._packed_gram(64, "fp32", is_causal=True),
    "tiles of kl": static_cases._tiles(True, 64, 64, "fp64", with_all=True),
    "tiles": static_cases._tiles(False, 64, 64, "fp64", with_all=True),
    "residual": static_cases._residual(312, 768, "fp64", with_all=True),
}
for name, (_, call) in masked.items():
    compile(f"{name} with masks in float64", call)
print(sorted(done.items()))
"""
LAUNCHES = {
    "attention_mse.contract": 6, "attention_mse.finalise": 6, "attention_mse.gradient": 12, "attention_mse.gram": 6,
    "attention_packed.bounds": 1, "attention_tiles.d_key": 4, "attention_tiles.d_query": 4,
    "attention_tiles.statistics": 2, "linear_mse.residual": 1, "logits.rows": 4, "shards.classes": 4, "shards.sums": 4,
}  # fmt: skip


def test_the_compiler_takes_what_the_interpreter_takes() -> None:
    """Triton's interpreter runs only the branch that is taken, and multiplies any two dtypes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    *faults, launches = run.stdout.splitlines()
    assert not faults, "\n".join(faults)
    assert launches == str(sorted(LAUNCHES.items()))


@pytest.mark.parametrize("stride", [2**23 - 1, 2**23])
@pytest.mark.parametrize("dimension", [2, 3])
def test_short_sequences_far_apart_in_memory_take_other_kernels(stride: int, dimension: int) -> None:
    """128 rows of 64 columns at 2^24 numbers each do not fit 32-bit offsets, and the gradients are laid out alike."""
    strides = [64, 64, 64, 1]
    strides[dimension] = stride
    near = torch.empty(2, 2, 128, 64, dtype=torch.float16, device="meta")
    far = torch.empty_strided(near.shape, strides, dtype=torch.float16, device="meta")
    for query, key in ((far, near), (near, far)):
        call = Attention(query, key, near, near, 0.1, 0.1, None, None, False, None)
        assert attention_short.fits(call) == (stride < 2**23)
