"""Tests csrc/ without a GPU: its algorithm on a simulated cluster, its planner, and the compiled code."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import _simulated
import _textbook
import pytest
import torch
from _cases import LOGITS_OPS, Op
from _oracle import Outcome, assert_accurate, assert_same, cast, errors, evaluate, in_float64
from _simulated import DTYPES, Call, compile_simulation, once, plan, strides_of
from torch import Tensor

import fastdistill
from fastdistill import cuda, reference
from fastdistill.functional import explain_backends, pick_backend
from fastdistill.ops._rows import RowOptions

pytestmark = pytest.mark.skipif(not _simulated.POSSIBLE, reason="csrc needs nvcc and g++ to build, and one is missing")

STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
KINDS = {
    "soft_cross_entropy": (reference.soft_cross_entropy, {}),
    "kl_div": (reference.kl_div, {}),
    "reverse_kl": (reference.kl_div, {"reverse": True}),
    "jsd": (reference.jsd, {"beta": 0.3}),
    "tvd": (reference.tvd, {}),
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


# -- The simulated cluster -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def simulator() -> ctypes.CDLL:
    return _simulated.simulator()


def simulate(
    simulator: ctypes.CDLL,
    kind: str,
    student: Tensor,
    teacher: Tensor,
    *,
    cluster: int | None = None,  # None: as planned
    backwards: bool = False,
    counted: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    expected: Tensor | None = None,
    gradient: Tensor | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mixture: tuple[float, float, float] | None = None,  # beta, teacher_kl, student_kl
) -> Outcome:
    """Simulates `cuda.rows`, with outputs allocated over NaN."""
    count, size = student[..., 0].numel(), student.element_size()
    classes = vocab_size or student.shape[-1]
    loss = torch.full((count,), float("nan"))
    if gradient is None:
        gradient = torch.full(student.shape, float("nan"), dtype=student.dtype)
    pointers = (student, teacher, labels, counted, weight, expected, loss, gradient)
    beta = KINDS[kind][1].get("beta", 0.5) if mixture is None else None
    call = Call(
        *(None if x is None else x.data_ptr() for x in pointers),
        strides_of(simulator, student), strides_of(simulator, teacher), count, gradient.shape[-1], classes, temperature,
        *(mixture or (beta, beta, 1 - beta)), soft_weight, hard_weight, student_scale, teacher_scale,
        student_softcap or 0, teacher_softcap or 0,
    )  # fmt: skip
    blocks, threads = plan(simulator, classes, size, aligned=False)
    if cluster is not None:
        vectors = -(-(classes + 16) * size // 16)
        blocks, threads = cluster, 32 * -(-vectors // (cluster * 8 * 32))
    simulator.simulate(ctypes.byref(call), DTYPES[student.dtype], cuda.KINDS.index(kind), blocks, threads, backwards)
    return {"value": loss, "student_logits": gradient}


def compare(
    simulator: ctypes.CDLL, kind: str, inputs: dict[str, Tensor], options: dict[str, Any] | None = None, **how: Any
) -> tuple[Outcome, Outcome, Outcome]:
    """Returns the results of the simulation, the float64 and the float32 definition for rows of unequal weight."""
    function, own = KINDS[kind]
    options = {"reduction": "none", **own, **(options or {})}
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    shape = student.shape[:-1]
    weight = torch.linspace(0.5, 2, shape.numel()).reshape(shape)
    truth = evaluate(function, in_float64(inputs), ["student_logits"], upstream=weight.double(), **options)
    textbook = evaluate(function, inputs, ["student_logits"], upstream=weight, **options)
    labels, mask, alpha = options.get("labels"), options.get("mask"), options.get("alpha", 1.0)
    counted = mask
    if labels is not None:
        counted = (labels != -100) if mask is None else mask & (labels != -100)
    temperature = options.get("temperature", 1.0)
    outcome = simulate(
        simulator, kind, student, teacher, counted=counted, labels=labels, weight=weight, temperature=temperature,
        soft_weight=alpha * (temperature**2 if options.get("t_squared") else 1),
        hard_weight=0.0 if labels is None else 1 - alpha, vocab_size=options.get("vocab_size"),
        student_softcap=options.get("student_softcap"), teacher_softcap=options.get("teacher_softcap"), **how,
    )  # fmt: skip
    outcome["value"] = outcome["value"].view(shape)
    return outcome, truth, textbook


def logits(rows: int, classes: int, dtype: torch.dtype, scale: float = 2.0) -> dict[str, Tensor]:
    teacher = scale * torch.randn(rows, classes)
    student = teacher + 0.7 * scale * torch.randn(rows, classes)
    return {"student_logits": student.to(dtype), "teacher_logits": teacher.to(dtype)}


# Sizes of rows, and how many blocks of a cluster hold one.
SIZES = [(2, 1), (3, 2), (127, 1), (128, 2), (1000, 1), (1000, 4), (1000, 16), (8192, None), (8193, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cluster_computes_the_definition(simulator: ctypes.CDLL, kind: str, dtype: torch.dtype) -> None:
    for classes, cluster in SIZES:
        assert_accurate(*compare(simulator, kind, logits(3, classes, dtype), cluster=cluster))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [30522, 128256])
@pytest.mark.parametrize("cluster", [None, 16])
def test_vocabularies_of_models(
    simulator: ctypes.CDLL, kind: str, dtype: torch.dtype, classes: int, cluster: int | None
) -> None:
    assert_accurate(*compare(simulator, kind, logits(2, classes, dtype), cluster=cluster))


def test_one_vocabulary_of_a_model(simulator: ctypes.CDLL) -> None:
    assert_accurate(*compare(simulator, "kl_div", logits(1, 128256, torch.bfloat16)))


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_at_once(simulator: ctypes.CDLL, kind: str, cluster: int) -> None:
    for dtype in DTYPES:
        inputs = logits(5, 517, dtype)
        inputs["student_logits"][3] = float("nan")  # a masked row
        options = {
            "temperature": 2.5, "t_squared": True, "alpha": 0.6, "vocab_size": 501, "student_softcap": 5.0,
            "teacher_softcap": 4.0, "labels": torch.tensor([0, 500, -100, 7, 300]),
            "mask": torch.tensor([True, True, True, False, True]),
        }  # fmt: skip
        outcome, *others = compare(simulator, kind, inputs, options, cluster=cluster)
        assert_accurate(outcome, *others)
        assert (outcome["student_logits"][:, 501:] == 0).all()
        assert (outcome["student_logits"][2:4] == 0).all()


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_classes_and_saturated_rows(simulator: ctypes.CDLL, kind: str, cluster: int) -> None:
    for dtype in DTYPES:
        inputs = logits(4, 700, dtype)
        for x in inputs.values():
            x[0, 100:] = float("-inf")  # whole blocks of the cluster
            x[1, :690] = float("-inf")
            x[2, ::3] = float("-inf")
        if kind not in ("reverse_kl",):
            inputs["teacher_logits"][3, 5:9] = float("-inf")
        if kind in ("reverse_kl", "jsd", "tvd"):
            inputs["student_logits"][3, 9:14] = float("-inf")
        outcome, *others = compare(simulator, kind, inputs, cluster=cluster)
        assert_accurate(outcome, *others)
        assert (outcome["student_logits"][inputs["student_logits"] == float("-inf")] == 0).all()
        for size in (30.0, 1e4):
            inputs = {name: size * x.sign() for name, x in logits(3, 700, dtype).items()}
            inputs["student_logits"][:, 3] *= 1.01
            outcome, *others = compare(simulator, kind, inputs, cluster=cluster)
            if kind == "tvd":  # its gradient has the sign of differences, here of equal numbers
                outcome, *others = ({"value": x["value"]} for x in (outcome, *others))
            assert_accurate(outcome, *others)


@pytest.mark.parametrize("cluster", [1, 2])
def test_nan_and_infinite_logits(simulator: ctypes.CDLL, cluster: int) -> None:
    """NaN gives NaN. A class with teacher mass that is -inf for the student costs inf and gets no gradient."""
    inputs = logits(3, 300, torch.float32)
    inputs["student_logits"][0, 7] = float("nan")
    inputs["student_logits"][1, 7] = float("-inf")
    for kind in ("soft_cross_entropy", "kl_div"):
        outcome = simulate(simulator, kind, *inputs.values(), cluster=cluster)
        assert outcome["value"].isnan().tolist() == [True, False, False]
        assert outcome["value"].isinf().tolist() == [False, True, False]
        assert outcome["student_logits"][0].isnan().all()
        assert outcome["student_logits"][1].isfinite().all()
        assert outcome["student_logits"][1, 7] == 0


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_near_its_teacher_keeps_its_digits(simulator: ctypes.CDLL, kind: str, cluster: int) -> None:
    inputs = logits(4, 1000, torch.float32)
    inputs["student_logits"] = inputs["teacher_logits"] + 1e-3 * torch.randn(4, 1000)
    outcome, truth, textbook = compare(simulator, kind, inputs, cluster=cluster)
    found, usual = errors(outcome, truth), errors(textbook, truth)
    assert found["value"] < min(0.1, 2 * usual["value"])
    if kind != "tvd":  # its gradient has the sign of each difference
        assert found["student_logits"] < usual["student_logits"]
    same = simulate(simulator, kind, inputs["teacher_logits"], inputs["teacher_logits"], cluster=cluster)
    assert (same["student_logits"].abs() <= 1e-7).all()
    if kind != "soft_cross_entropy":
        assert (same["value"].abs() < 1e-6).all()


@pytest.mark.parametrize("cluster", [1, 4])
def test_rows_of_any_layout(simulator: ctypes.CDLL, cluster: int) -> None:
    """Rows may start anywhere, at other places on each side, if two strides reach them."""
    for dtype in DTYPES:
        wide = logits(12, 1103, dtype)
        student = wide["student_logits"].view(3, 4, 1103)[:, 1:, 3:1000]
        teacher = wide["teacher_logits"].view(3, 4, 1103)[:, :-1, 10:1007]
        assert_accurate(
            *compare(simulator, "jsd", {"student_logits": student, "teacher_logits": teacher}, cluster=cluster)
        )
    x = torch.empty(2, 3, 4, 5, 6)
    reached = {
        "contiguous": (x, True), "a slice": (x[:, :, :, 1:], True), "two slices": (x[:, :2, 1:], False),
        "every other class": (x[..., ::2], False), "expanded": (x[:1, 0, 0].expand(7, 5, 6), True),
    }  # fmt: skip
    for name, (y, expected) in reached.items():
        rows = strides_of(simulator, y)
        assert (rows is not None) == expected, name
        if rows is not None:
            firsts = y[..., 0].reshape(-1)
            starts = [
                i // rows.inner * rows.outer_stride + i % rows.inner * rows.inner_stride for i in range(len(firsts))
            ]
            torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,), 0).copy_(torch.arange(x.numel()))
            assert [starts[i] + y.storage_offset() for i in range(len(starts))] == y[..., 0].reshape(-1).tolist(), name


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_written_with_other_weights_is_corrected(
    simulator: ctypes.CDLL, dtype: torch.dtype, cluster: int
) -> None:
    inputs = logits(4, 303, dtype).values()
    counted = torch.tensor([True, True, True, False])
    expected = torch.tensor([0.5, 0.5, 0.5, 0.5])
    weight = torch.tensor([0.5, 2.0, 0.3, 7.0])
    before = simulate(simulator, "jsd", *inputs, weight=expected, counted=counted, cluster=cluster)["student_logits"]
    wanted = simulate(simulator, "jsd", *inputs, weight=weight, counted=counted, cluster=cluster)["student_logits"]
    found = simulate(
        simulator, "jsd", *inputs, weight=weight, expected=expected, counted=counted, gradient=before, cluster=cluster
    )["student_logits"]
    assert_same({"x": found}, {"x": wanted}, within=2e-7 if dtype == torch.float32 else 0)
    assert (found[3] == 0).all()


def test_the_backward_finds_wrong_rows_among_right_ones(simulator: ctypes.CDLL) -> None:
    """A cluster checks several rows at once where there are many."""
    inputs, count = logits(520, 64, torch.bfloat16).values(), 520
    expected = torch.full((count,), 0.5)
    weight = expected.clone()
    weight[[3, 4, 260, 519]] = torch.tensor([0.3, 1.0, 0.7, 0.1])
    before, wanted = (
        simulate(simulator, "kl_div", *inputs, weight=x, cluster=4)["student_logits"] for x in (expected, weight)
    )
    touched = before.clone()
    touched[0] = 7  # a right row is not even read
    found = simulate(simulator, "kl_div", *inputs, weight=weight, expected=expected, gradient=touched, cluster=4)
    assert (found["student_logits"][0] == 7).all()
    assert torch.equal(found["student_logits"][1:], wanted[1:])


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_does_not_depend_on_thread_order(simulator: ctypes.CDLL, kind: str, cluster: int) -> None:
    inputs = logits(2, 5000, torch.bfloat16).values()
    first = simulate(simulator, kind, *inputs, cluster=cluster)
    second = simulate(simulator, kind, *inputs, cluster=cluster, backwards=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_without_a_gradient(simulator: ctypes.CDLL) -> None:
    """Without a gradient and a soft weight, only the cross-entropy with the labels is computed."""
    inputs = logits(3, 100, torch.float32)
    labels = torch.tensor([1, 99, 100])  # the last is out of range
    student = inputs["student_logits"]
    outcome = simulate(
        simulator, "kl_div", student, student, labels=labels, soft_weight=0.0, hard_weight=1.0, gradient=student[:0, :0]
    )
    expected = torch.nn.functional.cross_entropy(student[:2].double(), labels[:2], reduction="none")
    assert errors({"value": outcome["value"][:2]}, {"value": expected})["value"] < 1e-6
    assert outcome["value"][2].isnan()


MIXTURES = {
    "jsd": (0.3, 0.3, 0.7),
    "skewed": (0.1, 1.0, 0.0),
    "skewed reverse": (0.9, 0.0, 1.0),
    "both": (0.4, 0.7, 0.9),
}


def compare_mixture(
    simulator: ctypes.CDLL,
    name: str,
    student: Tensor,
    teacher: Tensor,
    *,
    cluster: int,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    **given: Any,
) -> tuple[Outcome, Outcome, Outcome]:
    """Returns the results of the simulation and of the textbook formula in float64 and float32."""
    weights, weight = MIXTURES[name], torch.linspace(0.5, 2, student.shape[0])
    alpha = given.get("alpha", 1.0)
    outcome = simulate(
        simulator, "jsd" if name == "jsd" else "mixture", student, teacher, cluster=cluster, weight=weight,
        mixture=weights, temperature=temperature, labels=given.get("labels"), soft_weight=alpha, hard_weight=1 - alpha,
        student_scale=given.get("scale", 1.0), student_softcap=given.get("softcap"), teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap,
    )  # fmt: skip

    def textbook(dtype: torch.dtype) -> Outcome:
        z = _textbook.shaped(teacher.to(dtype).clamp(min=_textbook.IMPOSSIBLE), teacher_scale, teacher_softcap)
        usual = _textbook.outcome(
            lambda x: _textbook.mixture(x, z, weights, temperature), student, weight, dtype, **given
        )
        return usual | ({} if dtype == torch.float64 else {"student_logits": usual["student_logits"].to(student.dtype)})

    return outcome, textbook(torch.float64), textbook(torch.float32)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_scales_and_mixtures(simulator: ctypes.CDLL, name: str, cluster: int) -> None:
    for dtype in DTYPES:
        inputs = logits(3, 517, dtype).values()
        scales = {"scale": 1.7, "teacher_scale": 0.6, "temperature": 2.0}
        assert_accurate(*compare_mixture(simulator, name, *inputs, cluster=cluster, **scales))
        with_all = scales | {
            "softcap": 5.0, "teacher_softcap": 4.0, "alpha": 0.7, "labels": torch.tensor([0, 516, 7]),
        }  # fmt: skip
        assert_accurate(*compare_mixture(simulator, name, *inputs, cluster=cluster, **with_all))
    student, teacher = logits(3, 700, torch.float32).values()
    student[:, ::3] = float("-inf")
    teacher[:, ::2] = float("-inf")
    outcome, *others = compare_mixture(simulator, name, student, teacher, cluster=cluster, scale=0.5)
    assert_accurate(outcome, *others)
    assert (outcome["student_logits"][:, ::3] == 0).all()
    student, teacher = logits(3, 700, torch.float32).values()
    outcome, truth, _ = compare_mixture(
        simulator, name, teacher + 1e-3 * student.sign(), teacher, cluster=cluster
    )  # the textbook formula is off by a tenth
    assert errors(outcome, truth)["value"] < 1e-3
    assert errors(outcome, truth)["student_logits"] < 1e-3


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_logits_equal_logits_that_were_scaled_before(
    simulator: ctypes.CDLL, kind: str, softcap: float | None
) -> None:
    for cluster in (1, 2):
        student, teacher = logits(3, 517, torch.float32).values()
        options = {"labels": torch.tensor([0, 5, 516]), "hard_weight": 0.5, "student_softcap": softcap}
        found = simulate(
            simulator, kind, student, teacher, cluster=cluster, student_scale=2.0, teacher_scale=2.0, **options
        )
        expected = simulate(
            simulator, kind, 2 * student, 2 * teacher, cluster=cluster, weight=torch.full((3,), 2.0), **options
        )
        assert_same(found, expected, within=2e-6)


MISTAKES = {
    "the maximum is not subtracted": ("offset(-(top * exponent))", "offset(-0 * top)"),
    "blocks do not wait for each other": (
        "    cluster.arrive(cluster.thread < 32);\n    cluster.wait();\n    collect",
        "    collect",
    ),
    "a block takes another's classes": ("stop = min(start + of_block, vectors)", "stop = vectors"),
    "the gradient is 5% too large": ("slope = weight * c.soft_weight", "slope = 1.05f * weight * c.soft_weight"),
    "a class excluded from the row has a gradient": ("student_z[i] == -INFINITE ? 0 : gradient[i]", "1 * gradient[i]"),
    "warps are added without a barrier": ("    cluster.wait_for_block();\n", ""),
    "a round overwrites what others still read": ("[ROUND]", "[0]"),
    "blocks write to others that have not started": ("joins = cluster.size > 1 && !c.expected", "joins = false"),
    "a gradient is rounded twice": ("(bits<uint32_t>(ratio) & 0x7fffff) == 0", "true"),
    "the backward checks only a cluster's first row": ("row = first + cluster.thread % 32", "row = first"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(tmp_path: Path, mistake: str) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(cuda.SOURCES, sources)
    text, (before, after) = (sources / "rows.h").read_text(), MISTAKES[mistake]
    assert before in text
    (sources / "rows.h").write_text(text.replace(before, after))
    compile_simulation(tmp_path / "simulate.so", sources)
    wrong = ctypes.CDLL(str(tmp_path / "simulate.so"))
    with pytest.raises(AssertionError):  # noqa: PT012 - any of them
        for cluster in (1, 4):
            assert_accurate(*compare(wrong, "kl_div", logits(3, 3001, torch.float32), cluster=cluster))
            test_impossible_classes_and_saturated_rows(wrong, "kl_div", cluster)
            test_nan_and_infinite_logits(wrong, cluster)
            test_the_result_does_not_depend_on_thread_order(wrong, "kl_div", cluster)
            test_a_gradient_written_with_other_weights_is_corrected(wrong, torch.bfloat16, cluster)
        test_the_backward_finds_wrong_rows_among_right_ones(wrong)


# -- The planner -----------------------------------------------------------------------------------------------


def test_clusters_are_the_smallest_that_hold_a_row(simulator: ctypes.CDLL) -> None:
    sizes = (1024, 8192, 16384, 32768, 65536, 131072, 262144, 524288)
    blocks, threads = zip(*(plan(simulator, classes, 2) for classes in sizes), strict=True)
    assert blocks == (1, 1, 1, 2, 4, 8, 16, 0)  # 0: no cluster holds the row
    assert threads[:3] == (32, 128, 256)
    blocks, threads = zip(*(plan(simulator, classes, 4) for classes in sizes), strict=True)
    assert blocks == (1, 1, 2, 4, 8, 16, 0, 0)
    assert plan(simulator, 131072, 2, aligned=False)[0] == 16  # a row within vectors touches one more


@pytest.mark.parametrize("size", [2, 4])
def test_every_plan_fits(simulator: ctypes.CDLL, size: int) -> None:
    for classes in (*range(1, 70), 127, 1000, 4095, 4097, 8192, 30522, 50257, 128256):
        for aligned in (True, False):
            cluster, threads = plan(simulator, classes, size, aligned)
            assert threads % 32 == 0
            assert 32 <= threads <= 256
            vectors = -(-classes * size // 16) if aligned else (classes * size + 30 - size) // 16
            assert -(-vectors // cluster) <= 8 * threads
            assert cluster == 1 or -(-vectors // (cluster // 2)) > 8 * 256


# -- The compiled code -----------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Returns the path of a CUDA tool; Triton brings its own copy if the compiler's package lacks it."""
    spec = importlib.util.find_spec("triton")
    carried = Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin" / name if spec else Path()
    found = shutil.which(name) or (str(carried) if carried.is_file() else None)
    if found is None:
        pytest.skip(f"{name} is missing")
    return found


@pytest.fixture(scope="session")
def binary(shared: Path) -> Path:
    return once(shared / "fastdistill_cuda_sm_90.so", lambda path: cuda.build(path, ["sm_90"], STRICT))


@pytest.fixture(scope="session")
def kernels(binary: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the resources and the machine code of each kernel."""

    def dump(flag: str) -> str:
        return subprocess.run([tool("cuobjdump"), flag, binary], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+rowsI\S+):\s*\n\s*(REG:.*)", dump("-res-usage")))
    code = dict(re.findall(r"Function : (\S+rowsI\S+)\n(.*?)(?=\n\s*Function :|\Z)", dump("-sass"), re.DOTALL))
    assert len(usage) == len(code) == 36  # kinds, dtypes, plain rows or not
    return usage, code


def test_two_blocks_fit_and_nothing_spills_but_a_word(kernels: tuple[dict[str, str], dict[str, str]]) -> None:
    """jsd and mixture, with the most arithmetic, store and load one word a row. Every thread may have 128 registers."""
    for name, resources in kernels[0].items():
        count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
        assert count["REG"] <= 128, name
        spills = re.findall(r"\b(?:LDL|STL)\b", kernels[1][name])
        assert len(spills) <= (2 if "Kind3ELb1" in name or "Kind5ELb1" in name else 0), name


def named(x: dict[str, str], part: str) -> list[str]:
    return [text for name, text in x.items() if part in name]


def instructions(text: str) -> list[tuple[int, str, str, str]]:
    """Returns address, predicate, operation and operands of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]+)([^;]*);", text)
    return [(int(address, 16), *rest) for address, *rest in found]


def main_path(text: str) -> list[str]:
    """Returns the operations of the way through a kernel on which a whole row of an aligned block goes.

    It is the shortest way forward that passes every exponential, reduction, barrier of the cluster and 16-byte store.
    """
    code = instructions(text)
    index = {address: i for i, (address, *_) in enumerate(code)}
    target = [re.search(r"0x([0-9a-f]+)", operands) for *_, operands in code]
    jumps = [op.startswith(("BRA", "EXIT", "RET", "CALL")) for _, _, op, _ in code]
    reduces = next(i for i, (_, _, op, _) in enumerate(code) if op.startswith("SHFL"))
    wanted = {
        i for i, (_, _, op, _) in enumerate(code)
        if re.match(r"MUFU\.EX2|SHFL|UCGABAR_WAIT|LDS\.128", op) or (op.startswith("STG.E.128") and i > reduces)
    }  # fmt: skip
    # From the end backwards: how many wanted instructions the best way from i meets, then how few instructions it has.
    best: list[tuple[int, int, int]] = [(0, 0, 0)] * (len(code) + 1)
    for i in reversed(range(len(code))):
        _, predicate, op, operands = code[i]
        ways = []
        if op.startswith("BRA") and target[i] and index[int(target[i][1], 16)] > i:
            ways.append(index[int(target[i][1], 16)])
        falls = bool(predicate) or not jumps[i] or "DIV" in op or re.match(r"\s*!?U?P\d", operands)
        if falls:
            ways.append(i + 1)
        met, length, way = max(((*best[way][:2], way) for way in ways), default=(0, 0, len(code)))
        best[i] = (met + (i in wanted), length - 1, way)
    path, i = [], 0
    while i < len(code):
        path.append(code[i][2])
        i = best[i][2]
    return path


# The most instructions and special functions a class, in bfloat16 and for plain rows. An H200 issues 41 instructions
# and 5.2 special functions a class while its memory moves the class's 6 bytes.
MOST = {
    "soft_cross_entropy": (41, 5.2),
    "kl_div": (41, 5.2),
    "reverse_kl": (41, 5.2),
    "tvd": (41, 5.2),
    "jsd": (60, 7.2),
}


@pytest.mark.parametrize("kind", MOST)
def test_instructions_for_a_class(kernels: tuple[dict[str, str], dict[str, str]], kind: str) -> None:
    for dtype, more in (("13__nv_bfloat16", 0), ("6__half", 0.5)):
        (text,) = named(kernels[1], f"Kind{cuda.KINDS.index(kind)}ELb1E{dtype}")
        path = main_path(text)
        assert sum(op == "MUFU.EX2" for op in path) >= 3 * 64  # it is the main path
        assert len(path) / 64 <= MOST[kind][0] + more
        assert sum(op.startswith("MUFU") for op in path) / 64 <= MOST[kind][1] + 0.01


def test_all_loads_of_a_row_are_in_flight_at_once(kernels: tuple[dict[str, str], dict[str, str]]) -> None:
    """Nothing stands between the 16 loads of a thread, so nothing waits for one of them."""
    for name, text in kernels[1].items():
        code = "".join("L" if op.startswith("LDG.E.128") and not p else "." for _, p, op, _ in instructions(text))
        assert "L" * 16 in code or "Lb0" in name, name
        assert code.count("L") >= 16
        assert "STG.E.128" in text
        assert not re.search(r"\b(LDS|STS)\.[US](8|16)\b", text), name


def test_blocks_of_a_cluster_communicate(kernels: tuple[dict[str, str], dict[str, str]]) -> None:
    for text in kernels[1].values():
        assert "UCGABAR_ARV" in text  # barriers of the cluster
        assert "UCGABAR_WAIT" in text
        assert "MAPA" in text or re.search(r"\bST\.E\b|\bSTAS\b", text)  # stores to another block's shared memory


# -- Building --------------------------------------------------------------------------------------------------


def test_importing_compiles_nothing() -> None:
    command = (
        "import subprocess, sys; subprocess.run = None; import fastdistill.cuda; print('subprocess' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a fake compiler that takes half a second and records each run."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo 13.0 && exit\necho run >> {tmp_path}/runs\nsleep 0.5\n'
        'while [ "$1" != -o ]; do shift; done\necho built > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_concurrent_processes_build_once(pretended: Path) -> None:
    command = [sys.executable, "-c", "from fastdistill import cuda; print(cuda.cached(('sm_90',)))"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "built\n"
    assert (pretended / "runs").read_text() == "run\n"
    folder = pretended / "cache" / "fastdistill"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(folder.glob(".building*"))


def test_each_architecture_and_compiler_has_its_own_binary(pretended: Path) -> None:
    first = cuda.cached(("sm_90",))
    assert cuda.cached(("sm_90",)) == first
    assert cuda.cached(("sm_100",)) != first
    compiler = pretended / "bin" / "nvcc"
    compiler.write_text(compiler.read_text().replace("13.0", "13.1"))
    assert cuda.cached(("sm_90",)) != first
    assert (pretended / "runs").read_text() == "run\n" * 3


def test_a_failed_build_says_why(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pretended / "bin" / "nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho no host compiler >&2\nexit 1\n'
    )
    with pytest.raises(RuntimeError, match="no host compiler"):
        cuda.cached(("sm_90",))
    assert not list((pretended / "cache" / "fastdistill").glob("*.so"))
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc is neither in CUDA_HOME nor on the PATH"):
        cuda.cached(("sm_90",))


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports fastdistill.cuda afresh: without cached results, and without the simulation of `make test-all`."""
    spec = importlib.util.find_spec("fastdistill.cuda")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(fastdistill, "cuda", module)
    return module


@pytest.fixture
def card(as_it_is: ModuleType, pretended: Path, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Returns a GPU for which nothing is built yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(as_it_is, "prebuilt", lambda: pretended / "nothing.so")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return torch.device("cuda", 0)


# nvcc's messages if the toolkit is older than the GPU, and if there is no host compiler.
@pytest.mark.parametrize("says", ["Unsupported gpu architecture 'compute_90'", "Failed to preprocess host compiler"])
def test_a_build_that_fails_is_tried_once(says: str, card: torch.device, pretended: Path) -> None:
    (pretended / "bin" / "nvcc").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo 11.5 && exit\necho run >> {pretended}/runs\n'
        f'echo "nvcc fatal   : {says}" >&2\nexit 1\n'
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^backend is 'cuda', but .* for sm_90 with .*nvcc fatal : {says}"):
            pick_backend("cuda", card, (torch.bfloat16, torch.bfloat16))
    assert (pretended / "runs").read_text() == "run\n"


def test_a_binary_that_cannot_be_loaded_is_not_available(
    card: torch.device, pretended: Path, as_it_is: ModuleType
) -> None:
    """The fake compiler's output is not a binary."""
    assert re.search(r"not be run: .*fastdistill_cuda_\w+\.so", as_it_is.unavailable(card))
    assert (pretended / "runs").read_text() == "run\n"


def test_a_binary_that_cannot_launch_is_not_available(
    card: torch.device, pretended: Path, as_it_is: ModuleType
) -> None:
    """A toolkit newer than the driver builds a binary that loads; only its launches fail."""
    (pretended / "bin" / "nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 99 && exit\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo \'extern "C" const char* fastdistill_probe() { return "the driver is too old"; }\' '
        '| g++ -shared -fPIC -x c++ - -o "$2"\n'
    )
    assert re.search(r"not be run: a launch fails: the driver is too old$", as_it_is.unavailable(card))


def test_the_probe_runs_on_the_device_and_no_context_is_made_on_another(
    as_it_is: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cudaSetDevice back to a device that is not in use would take memory there, or fail if it is exclusive."""
    assert "cudaSetDevice" not in (cuda.SOURCES / "rows.cu").read_text()
    entered: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def load(path: str) -> SimpleNamespace:
        return SimpleNamespace(fastdistill_probe=lambda *given: b"none" if (given, entered) == ((), [second]) else b"!")

    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(as_it_is.ctypes, "CDLL", load)
    with pytest.raises(RuntimeError, match="a launch fails: none"):
        as_it_is._load(tmp_path / "binary.so", second)
    assert entered == []


def test_other_systems_are_refused(card: torch.device, as_it_is: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # absent on Windows
    assert as_it_is.unavailable(card) == "its kernels are built for Linux, not for win32"
    assert pick_backend("auto", card, (torch.bfloat16, torch.bfloat16)) == "triton"


def test_machines_of_two_kinds_do_not_share_a_binary(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may share a home folder."""
    first = cuda.cached(("sm_90",))
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert cuda.cached(("sm_90",)) != first


def test_a_cache_that_others_can_write_to_is_refused(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretended / "cache" / "fastdistill"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match=r"others can write to .*fastdistill, .* \(chmod 700 .*\), or set XDG_CACHE"):
        cuda.cached(("sm_90",))
    folder.chmod(0o755)
    cuda.cached(("sm_90",))
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(RuntimeError, match="others can write to"):
        cuda.cached(("sm_90",))


BOUND = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
for name in ("fastdistill_cuda_sm_90", "fastdistill_cuda_other"):
    torch.ops.load_library(f"{sys.argv[2]}/{name}.so")
    rows = getattr(torch.ops, name).rows
    print(rows.default._schema)
    x = torch.zeros(2, 8)
    try:
        rows(x, x, None, None, None, None, x[0, :2], None, 0, 8, 1, *[0.5] * 5, 1, 1, 0, 0)
    except NotImplementedError as error:
        print("CPU" in str(error))
probe = ctypes.CDLL(f"{sys.argv[2]}/fastdistill_cuda_sm_90.so").fastdistill_probe
probe.restype = ctypes.c_char_p
print(probe())
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch with CUDA loads the binary without a stub")
def test_binaries_for_two_cards_register_their_ops_in_one_process(binary: Path, tmp_path: Path) -> None:
    """A stub provides the one function that a CPU build of torch lacks. The second binary has no kernels."""
    stub = tmp_path / "stub.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", stub], input=source, text=True, check=True)
    (tmp_path / binary.name).symlink_to(binary)
    kernels = tmp_path / "kernels.cpp"
    kernels.write_text('#include "launch.h"\nvoid launch_rows(const Call&, Element, Kind, void*) {}\n')
    flags = [flag for flag in cuda.FLAGS if flag.startswith(("-std", "-D"))]
    torch_folder = Path(torch.__file__).parent
    subprocess.run(
        ["g++", *flags, "-O0", "-fPIC", "-shared", "-DLIBRARY=fastdistill_cuda_other", f"-I{cuda.SOURCES}",
         "-isystem", torch_folder / "include", cuda.SOURCES / "binding.cpp", kernels, f"-L{torch_folder / 'lib'}",
         "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-o", tmp_path / "fastdistill_cuda_other.so"],
        check=True,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOUND, stub, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("Tensor(a!) loss") == run.stdout.count("True") == 2
    assert torch.cuda.is_available() or "driver" in run.stdout.splitlines()[-1]


# -- As a backend ----------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", cuda.unavailable)  # monkeypatch restores both at the end
    monkeypatch.setattr(cuda, "library", cuda.library)
    _simulated.install()


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("op", LOGITS_OPS, ids=str)
def test_public_functions(op: Op) -> None:
    """This is a quick check; `make test-all` runs the contract's own tests on the simulation."""
    for dtype in DTYPES:
        inputs = cast(op.make(), dtype)
        op.assert_accurate({**inputs, **op.some_masked(inputs)}, backend="cuda")
        rows = inputs["student_logits"].shape[:-1]
        upstream = torch.linspace(0.5, 2, rows.numel()).reshape(rows)
        op.assert_accurate(inputs, backend="cuda", reduction="none", upstream=upstream)


@pytest.mark.usefixtures("simulated")
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace the file lookup that finds the backend; it must not break the graph."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: str(tmp_path) if (tmp_path / "x").exists() else None)
    inputs = logits(5, 100, torch.float32)

    def loss(**x: Tensor) -> Tensor:
        return fastdistill.jsd(**x, backend="cuda")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(*(evaluate(f, inputs, ["student_logits"]) for f in (compiled, loss)), within=1e-6)


@pytest.mark.usefixtures("simulated")
def test_unsupported_dtypes_and_ops_are_refused() -> None:
    narrow, wide = logits(2, 5, torch.bfloat16), logits(2, 5, torch.float64)
    with pytest.raises(ValueError, match=r"^backend is 'cuda', but its logits are float32, .* not torch.float64 and"):
        fastdistill.kl_div(**wide, backend="cuda")
    with pytest.raises(ValueError, match=r"not torch.bfloat16 and torch.float64; use backend='auto' or 'torch'$"):
        fastdistill.kl_div(narrow["student_logits"], wide["teacher_logits"], backend="cuda")
    with pytest.raises(ValueError, match=r"^backend is 'cuda', but csrc has kernels for the losses on logits only"):
        fastdistill.linear_mse(*torch.randn(2, 3, 3), torch.randn(3, 3), backend="cuda")


@pytest.mark.usefixtures("as_it_is")
def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^backend is 'cuda', but its kernels run on NVIDIA GPUs, not on cpu"):
        fastdistill.kl_div(**logits(2, 5, torch.bfloat16), backend="cuda")


def test_auto_takes_triton_until_a_measurement_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    card, alike = torch.device("cuda:0"), (torch.bfloat16,) * 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    assert pick_backend("auto", card, alike) == "triton"
    assert pick_backend("cuda", card, alike) == "cuda"
    monkeypatch.setattr(cuda, "unavailable", None)  # and "auto" does not build them to find out
    assert pick_backend("auto", card, alike) == "triton"
    assert "not cuda: no measurement" in why_of(card, "kl_div")
    assert "not cuda" not in why_of(card, "linear_kl_div")


def test_cards_without_clusters_are_refused(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with pytest.raises(
        ValueError, match=r"^backend is 'cuda', but .* need compute capability 9.0, and a card has less"
    ):
        pick_backend("cuda", card, (torch.bfloat16, torch.bfloat16))


def why_of(device: torch.device, op: str) -> str:
    (why,) = (why for _, why, ops in explain_backends(device) if op in ops)
    return why


def plain(kind: str, classes: int) -> RowOptions:
    beta = KINDS[kind][1].get("beta", 0.5)
    return RowOptions(kind, "", classes, 1.0, beta, beta, 1 - beta, 1.0, 0.0, None, None, 1.0, 1.0, "cuda")


# -- On a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_card_agrees_with_the_simulation(simulator: ctypes.CDLL, kind: str, dtype: torch.dtype) -> None:
    for classes in (2, 127, 1000, 8193, 30522, 128256):
        inputs = logits(3, classes, dtype)
        student, teacher = (x.cuda() for x in inputs.values())
        loss, gradient = student.new_empty(3, dtype=torch.float32), torch.empty_like(student)
        cuda.rows(student, (teacher,), None, None, plain(kind, classes), loss=loss, gradient=gradient)
        simulated = simulate(simulator, kind, *inputs.values())
        found = errors({"value": loss.cpu(), "student_logits": gradient.cpu()}, simulated)
        assert found["value"] < 1e-5
        assert found["student_logits"] < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_concurrent_launches_for_rows_of_several_lengths(dtype: torch.dtype) -> None:
    """All threads share a kernel's limit of shared memory, and a block of the longer rows needs at least 70 KB."""

    def gradients(classes: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(classes)
        x, t = torch.randn(2, 4, classes, device="cuda", generator=generator).to(dtype)
        found = []
        for _ in range(200):
            found.append(torch.empty_like(x))
            cuda.rows(
                x,
                (t,),
                None,
                None,
                plain("kl_div", classes),
                loss=x.new_empty(4, dtype=torch.float32),
                gradient=found[-1],
            )
        return found

    sizes = (700, 16000) * 2
    expected = [gradients(classes)[0] for classes in sizes]
    with ThreadPoolExecutor(len(sizes)) as threads:
        for found, alone in zip(threads.map(gradients, sizes), expected, strict=True):
            assert all(torch.equal(x, alone) for x in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(check: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is missing")
    script = (
        "import torch; from fastdistill import cuda; from fastdistill.ops._rows import RowOptions\n"
        "for v in (1000, 20001, 128256):\n"
        "    x, t = torch.randn(2, 2, v, device='cuda', dtype=torch.bfloat16)\n"
        "    options = RowOptions('jsd', '', v, 1.0, 0.5, 0.5, 0.5, 1.0, 0.0, None, None, 1.0, 1.0, 'cuda')\n"
        "    loss = x.new_empty(2, dtype=torch.float32)\n"
        "    cuda.rows(x, (t,), None, None, options, loss=loss, gradient=torch.empty_like(x))\n"
        "torch.cuda.synchronize()"
    )
    run = subprocess.run(
        [sanitizer, f"--tool={check}", "--error-exitcode=9", sys.executable, "-c", script],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device, as in some virtual machines")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
