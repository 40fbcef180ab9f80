"""Compiles launches whose faults Triton's interpreter does not see: code that the compiler refuses, 32-bit offsets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton compiles the kernels")

# Only the first stage of the compiler runs, which takes a tenth of the time and needs no GPU. Prints a line for each
# fault, and at last how many launches of each kernel were compiled.
COMPILE = """
import re
from collections import Counter
import torch
from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from bench import static
from fastdistill.kernels import attention_mse, attention_short, attention_tiles, logits, shards
from fastdistill.ops._attention import Attention, Counted
from fastdistill.ops._rows import RowOptions

TARGET = static.ARCHS["sm_90"].target
BACKEND = make_backend(TARGET)
MIXTURES = {(0.5, 0.5, 0.5): "jsd", (0.1, 1.0, 0.0): "skewed KL", (0.9, 0.0, 1.0): "skewed reverse KL",
            (0.3, 0.5, 0.5): "mixture"}
done, double = Counter(), torch.float64


def code(launch):
    options = BACKEND.parse_options(launch.options)
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    return str(source.make_ir(
        TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context
    ))


def compile(name, call, check=lambda launch, code: None):
    with static.recorded("sm_90") as launches:
        call()
    for launch in launches:
        try:
            fault = check(launch, code(launch))
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            fault = str(error).strip().splitlines()[-1]
        done[launch.name] += 1
        if fault:
            print(f"{launch.name}, {name}: {fault}")


def mixture(weights):
    student, labels, loss = torch.zeros(3, 40, dtype=double), torch.zeros(3).long(), torch.zeros(3, dtype=double)
    options = RowOptions("jsd", "", 40, 2.0, *weights, 1.0, 0.5, None, None, 1.0, 1.0, "triton")
    logits.rows(student, (student,), labels, None, options, loss=loss, gradient=student.clone())
    rest = (None, None), labels, options, 40
    shards.summed(student, student, *rest, shards.sums(student, student, *rest, 3, double))


def attention(student, teacher, key_mask=None, query_mask=None):
    heads = student, student[:, :1], teacher, teacher[:, :1]
    return Attention(*heads, 0.1, 0.1, key_mask, query_mask, False, None)


def tiles(is_kl, dtype):
    call = attention(torch.zeros(1, 2, 64, 64, dtype=dtype), torch.zeros(1, 2, 64, 64, dtype=double))
    attention_tiles.loss(
        call, Counted(torch.zeros(0), None, None), is_kl=is_kl, dtype=double, d_query=call.student_query.double(),
        d_key=call.student_key.double(),
    )


def gram(masks):
    call = attention(*(torch.zeros(2, 2, 64, 32, dtype=torch.bfloat16) for _ in range(2)), **masks)
    loss, *saved = attention_mse.loss(call, None, None, None)
    attention_mse.gradients(loss, call, *saved, (None, None), *map(torch.empty_like, call.tensors()[:2]))


def short():
    call = attention(*(torch.zeros(2, 2, 64, 32, dtype=torch.bfloat16) for _ in range(2)))
    attention_short.loss(call, 1.0, None, *map(torch.empty_like, call.tensors()[:2]))


def stores_far(launch, code):
    if "scores" in launch.name and not re.search(r"tt.addptr .*tensor<64x32x!tt.ptr<bf16>>, tensor<64x32xi64>", code):
        return "offsets of the gradients have 32 bits"


def reads_far(launch, code):
    if "d_key" in launch.name and re.search(r"arith.muli .*%stats_size.* : i32", code):
        return "offsets of the statistics have 32 bits"


for weights, name in MIXTURES.items():
    compile(f"{name} in float64", lambda: mixture(weights))
for is_kl in (False, True):
    compile(f"{is_kl=}, a 16-bit student and a float64 teacher", lambda: tiles(is_kl, torch.bfloat16), reads_far)
rows = torch.ones(2, 64, dtype=torch.bool)
for masks in ({"key_mask": rows}, {"query_mask": rows}):
    compile(f"{[*masks]} alone", lambda: gram(masks))
compile("short", short, stores_far)
print(sorted(done.items()))
"""
LAUNCHES = {
    "attention_mse.contract": 2, "attention_mse.finalise": 3, "attention_mse.gradient": 4, "attention_mse.gram": 2,
    "attention_short.scores": 1, "attention_tiles.d_key": 2, "attention_tiles.d_query": 2,
    "attention_tiles.statistics": 1, "logits.rows": 4, "shards.classes": 4, "shards.sums": 4,
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
