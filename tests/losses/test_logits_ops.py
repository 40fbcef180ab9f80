"""Tests the losses on logits beyond the contract: vocabularies, options, saturation, impossible classes, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _cases import LOGITS_OPS, TOPK_OPS, Op, logits, topk, with_labels, without_ties
from _oracle import assert_same, cast, error, evaluate

import fastdistill
from fastdistill.ops import _few

OPS = [op for op in LOGITS_OPS if "vocab_size" not in op.options]
ALL = [*OPS, *TOPK_OPS]
every_op = pytest.mark.parametrize("op", ALL, ids=str)
every_divergence = pytest.mark.parametrize("op", OPS, ids=str)
BY_NAME = {str(op): op for op in ALL}


def make(op: Op, rows: tuple[int, ...], classes: int) -> dict[str, Any]:
    return topk(rows, classes, min(8, classes - 1)) if op in TOPK_OPS else logits(rows, classes)


# -- shapes ----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("classes", [2, 3, 127, 30522, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies(op: Op, classes: int, dtype: torch.dtype, backend: str) -> None:
    inputs = make(op, (4,), classes)
    if op.name == "tvd" and classes > 1000:
        inputs = without_ties(inputs)
    op.assert_accurate(cast(inputs, dtype), backend=backend, reduction="none")


@every_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_losses_keep_small_float16_gradients(op: Op, reduction: str, backend: str) -> None:
    """Loss scaling must act before rounding: a gradient of 1e-6 rounded to float16 first has few digits left."""
    inputs = make(op, (4,), 30522)
    if op.name == "tvd":
        inputs = without_ties(inputs)
    inputs = cast(inputs, torch.float16)
    op.assert_accurate(inputs, backend=backend, reduction=reduction, upstream=torch.tensor(2.0**12))


@every_op
@pytest.mark.parametrize("rows,classes", [(1, 33), (63, 33), (65, 33), (1030, 33), (257, 1000), (9, 12345)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_rows(op: Op, rows: int, classes: int, reduction: str, backend: str) -> None:
    inputs = make(op, (rows,), classes)
    inputs["mask"] = torch.rand(rows) > 0.3
    inputs["mask"][-1] = True
    upstream = torch.randn(rows) if reduction == "none" else None
    op.assert_accurate(inputs, backend=backend, reduction=reduction, upstream=upstream)


@every_divergence
def test_one_class(op: Op, backend: str) -> None:
    """Both sides give the only class probability 1."""
    outcome = evaluate(op, logits((3,), 1), op.learned, backend=backend)
    assert all((x == 0).all() for x in outcome.values())


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """All rows are one in memory, so only the gradient takes 4.3 GB. Its last row must be as accurate as its first."""
    classes = 128256
    rows = 2**31 // classes + 3
    row = cast(logits((1,), classes), torch.bfloat16)
    op = BY_NAME["soft_cross_entropy"]
    truth = op.truth(row)
    outcome = evaluate(op, {name: x.expand(rows, classes) for name, x in row.items()}, op.learned, backend=backend)
    assert error(outcome["value"], truth["value"]) < 1e-6
    for i in (0, 2**31 // classes, -1):
        assert error(outcome["student_logits"][i] * rows, truth["student_logits"][0]) < 2**-8


# -- options ---------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("t_squared", [False, True])
def test_temperature(op: Op, temperature: float, t_squared: bool, backend: str) -> None:
    if op.options.get("tail") == "bucket":
        temperature = 1.0  # the bucket takes no other
    inputs = make(op, (30,), 40)
    op.assert_accurate(inputs, backend=backend, temperature=temperature, t_squared=t_squared, reduction="none")


@every_op
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels(op: Op, alpha: float, dtype: torch.dtype, reduction: str, backend: str) -> None:
    temperature = {} if op.options.get("tail") == "bucket" else {"temperature": 3.0, "t_squared": True}
    inputs = cast(with_labels(make(op, (30,), 40), 40), dtype)
    inputs["mask"] = torch.rand(30) > 0.3
    op.assert_accurate(inputs, backend=backend, alpha=alpha, reduction=reduction, **temperature)
    if reduction == "mean":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
        op.assert_accurate(inputs, backend=backend, alpha=alpha, ignore_index=5, **temperature)


@every_op
def test_masked_rows_and_their_labels_are_ignored(op: Op, backend: str) -> None:
    inputs = with_labels(make(op, (3, 5), 37), 37)
    masks = op.some_masked(inputs)
    clean = evaluate(op, {**inputs, **masks}, op.learned, backend=backend, alpha=0.4)
    inputs["labels"] = inputs["labels"].where(masks["mask"], 12345)
    if "topk_indices" in inputs:
        inputs["topk_indices"] = inputs["topk_indices"].where(masks["mask"].unsqueeze(-1), -7)
    poisoned = op.overwrite_masked({**inputs, **masks}, masks, math.nan)
    assert_same(evaluate(op, poisoned, op.learned, backend=backend, alpha=0.4), clean)
    ignored = {**inputs, "labels": inputs["labels"].where(masks["mask"], -100)}
    assert_same(evaluate(op, ignored, op.learned, backend=backend, alpha=0.4), clean, within=1e-6)


@every_op
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_any_integer_type(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = with_labels(make(op, (3, 5), 37), 37)
    inputs["labels"] = inputs["labels"].where(inputs["labels"] >= 0, 255)
    expected = evaluate(op, inputs, op.learned, backend=backend, alpha=0.4, ignore_index=255)
    narrow = {k: x if x.is_floating_point() else x.to(dtype) for k, x in inputs.items()}
    assert_same(evaluate(op, narrow, op.learned, backend=backend, alpha=0.4, ignore_index=255), expected)
    assert_same(evaluate(op, narrow, op.learned, backend="reference", alpha=0.4, ignore_index=255), expected, 1e-6)
    inputs["labels"] = torch.full_like(inputs["labels"], 5)
    narrow["labels"] = inputs["labels"].to(dtype)
    for name in (backend, "reference"):  # in eight bits -251 wraps to 5, as the default of -100 wraps to 156
        wide, short = (
            evaluate(op, x, op.learned, backend=name, alpha=0.4, ignore_index=-251) for x in (inputs, narrow)
        )
        assert_same(short, wide)


@every_op
@pytest.mark.parametrize("cap", [3.0, 30.0])
@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap(op: Op, cap: float, sides: tuple[str, ...], dtype: torch.dtype, backend: str) -> None:
    if op in TOPK_OPS:
        sides = ("student",)
    caps = {f"{side}_softcap": cap + i for i, side in enumerate(sides)}
    inputs = with_labels(make(op, (30,), 40), 40)
    inputs["student_logits"] *= 4
    op.assert_accurate(cast(inputs, dtype), backend=backend, alpha=0.6, **caps, reduction="none")


@every_divergence
@pytest.mark.parametrize("student,teacher,vocab_size", [(40, 40, 33), (48, 40, 40), (40, 48, 40), (41, 43, 1)])
def test_padded_vocabularies(op: Op, student: int, teacher: int, vocab_size: int, backend: str) -> None:
    """Padded classes are ignored, even if they are NaN, and get a gradient of exactly 0."""
    inputs = {"student_logits": torch.randn(3, 5, student), "teacher_logits": torch.randn(3, 5, teacher)}
    clean = evaluate(op, inputs, op.learned, backend=backend, vocab_size=vocab_size)
    if vocab_size > 1:
        op.assert_accurate(inputs, backend=backend, vocab_size=vocab_size)
    for poison in (math.nan, math.inf, -math.inf):
        for x in inputs.values():
            x[..., vocab_size:] = poison
        assert_same(evaluate(op, inputs, op.learned, backend=backend, vocab_size=vocab_size), clean)
    assert (clean["student_logits"][..., vocab_size:] == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jsd_beta(beta: float, dtype: torch.dtype, backend: str) -> None:
    op, inputs = BY_NAME["jsd"], cast(logits((30,), 40), dtype)
    if beta in (0, 1):
        expected = evaluate(fastdistill.kl_div, inputs, op.learned, backend=backend, reverse=beta == 1)
        assert_same(evaluate(op, inputs, op.learned, backend=backend, beta=beta), expected, within=1e-6)
        beta = int(beta)  # an int is accepted too
        assert_same(evaluate(op, inputs, op.learned, backend=backend, beta=beta), expected, within=1e-6)
    else:
        op.assert_accurate(inputs, backend=backend, beta=beta, reduction="none")


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
def test_padding_of_lists_and_rows_without_a_class_are_ignored(op: Op, backend: str) -> None:
    """Entries of -inf may name any class or none; a row of them alone does not count, even if it holds NaN."""
    inputs = topk((3, 5), 37, 5)
    inputs["topk_logprobs"][1:, :, 3:] = -math.inf
    expected = evaluate(op, inputs, op.learned, backend=backend)
    inputs["topk_indices"][1:, :, 3:] = torch.tensor([-1, 40])
    assert_same(evaluate(op, inputs, op.learned, backend=backend), expected, within=1e-6)
    inputs["topk_indices"][1:, :, 3:] = inputs["topk_indices"][1:, :, :1]
    assert_same(evaluate(op, inputs, op.learned, backend=backend), expected, within=1e-6)
    inputs["topk_logprobs"][0, 0] = -math.inf
    inputs["student_logits"][0, 0] = math.nan
    masked = {**inputs, "mask": torch.arange(15).view(3, 5) > 0}
    for name in (backend, "reference"):
        found = evaluate(op, inputs, op.learned, backend=name)
        assert_same(found, evaluate(op, masked, op.learned, backend=name))
        assert found["value"].isfinite()
    assert (found["student_logits"][0, 0] == 0).all()


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_sizes(op: Op, k: int, dtype: torch.dtype, backend: str) -> None:
    inputs = topk((30,), 37, k)
    order = torch.randperm(k)  # in any order
    inputs |= {name: inputs[name][:, order] for name in ("topk_logprobs", "topk_indices")}
    if k < 30 or dtype == torch.float32:  # rounded to bfloat16, 36 of 37 probabilities may add up to more than 1
        op.assert_accurate(cast(inputs, dtype), backend=backend, reduction="none")


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
def test_topk_long_lists(op: Op, backend: str) -> None:
    """Lists hold runs, scattered classes, and the first and last class; many blocks that kernels read hold none."""
    classes, lists = 9001, []
    for start in (0, 2040, 8000):
        few, last = 500 + torch.randperm(1400)[:20], torch.tensor([classes - 1])
        lists.append(torch.cat([start + torch.arange(380), few, last]))
    inputs = topk((3,), classes, 401)
    inputs["topk_indices"] = torch.stack(lists)[:, torch.randperm(401)]
    inputs["labels"] = torch.tensor([0, 2047, classes - 1])
    op.assert_accurate(inputs, backend=backend, reduction="none", alpha=0.7)
    inputs = topk((2,), classes, 1100)
    op.assert_accurate(inputs, backend=backend, reduction="none")


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
def test_topk_rows_padded_with_impossible_classes(op: Op, backend: str) -> None:
    """A row with fewer classes is padded with -inf at any classes that are not listed already."""
    inputs = topk((3, 5), 37, 5)
    expected = evaluate(op, inputs, op.learned, backend=backend)
    rest = inputs["student_logits"].scatter(-1, inputs["topk_indices"], math.inf).argsort(-1)[..., :2]
    inputs["topk_indices"] = torch.cat([inputs["topk_indices"], rest], -1)
    inputs["topk_logprobs"] = torch.cat([inputs["topk_logprobs"], torch.full((3, 5, 2), -math.inf)], -1)
    if op.options["tail"] == "renormalize":
        assert_same(evaluate(op, inputs, op.learned, backend=backend), expected, within=1e-6)
    else:  # a class listed with probability 0 is not part of the rest
        outcome = evaluate(op, inputs, op.learned, backend=backend)
        truth = op.truth(inputs)
        assert all(error(outcome[name], truth[name]) < 1e-6 for name in truth)


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_of_every_class_is_soft_cross_entropy(op: Op, dtype: torch.dtype, backend: str) -> None:
    """The bucket is empty: the teacher's rounding error there must not be multiplied by the student's log 0."""
    student, teacher = torch.randn(30, 9, dtype=dtype), torch.randn(30, 9, dtype=dtype)
    logprobs, indices = teacher.log_softmax(-1).topk(9)
    inputs = {"student_logits": student, "topk_logprobs": logprobs, "topk_indices": indices}
    found = evaluate(op, inputs, op.learned, backend=backend, reduction="none")
    reference = evaluate(op, inputs, op.learned, backend="reference", reduction="none")
    pair = {"student_logits": student, "teacher_logits": teacher}
    same = BY_NAME["kl_div-reverse" if "reverse" in op.options else "soft_cross_entropy"]
    expected = same.truth(pair, reduction="none")
    for name in expected:
        assert error(found[name], expected[name]) < 1e-6
        assert error(reference[name], expected[name]) < 1e-6


@pytest.mark.parametrize("op", TOPK_OPS, ids=str)
def test_topk_with_impossible_classes(op: Op, backend: str) -> None:
    """Classes at -inf for the student are ignored if they are not listed or listed with -inf."""
    inputs = topk((30,), 37, 5)
    inputs["topk_indices"][:] = torch.tensor([3, 1, 0, 2, 4])
    without = {**inputs, "student_logits": inputs["student_logits"][:, :32]}
    inputs["student_logits"][:, 32:] = -math.inf
    found = evaluate(op, inputs, op.learned, backend=backend, reduction="none")
    expected = op.truth(without, reduction="none")
    assert error(found["value"], expected["value"]) < 1e-6
    assert error(found["student_logits"][:, :32], expected["student_logits"]) < 1e-6
    assert (found["student_logits"][:, 32:] == 0).all()
    inputs["topk_indices"] = torch.cat([inputs["topk_indices"], torch.full((30, 1), 35)], -1)
    inputs["topk_logprobs"] = torch.cat([inputs["topk_logprobs"], torch.full((30, 1), -math.inf)], -1)
    assert_same(evaluate(op, inputs, op.learned, backend=backend, reduction="none"), found, within=1e-6)


@pytest.mark.parametrize("op", [op for op in TOPK_OPS if "reverse" not in op.options], ids=str)
def test_a_listed_class_of_student_probability_0_costs_inf(op: Op, backend: str) -> None:
    inputs = topk((30,), 37, 5)
    inputs["student_logits"][3, inputs["topk_indices"][3, 1]] = -math.inf
    found = evaluate(op, inputs, op.learned, backend=backend, reduction="none")
    assert found["value"][3] == math.inf
    others = [i for i in range(30) if i != 3]
    truth = op.truth(inputs, reduction="none")
    assert all(error(found[name][others], truth[name][others]) < 1e-6 for name in truth)


# -- small differences, saturation, impossible classes -----------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("mismatch", [1e-1, 1e-2, 1e-3])
def test_student_close_to_teacher(op: Op, mismatch: float, backend: str) -> None:
    inputs = logits((64,), 200)
    inputs["student_logits"] = inputs["teacher_logits"] + mismatch * torch.randn(64, 200)
    if op.name == "tvd" and mismatch < 1e-2:
        pytest.skip("TVD's gradient jumps where probabilities are equal, and some are equal up to rounding")
    # Float32 cannot resolve a KL of 1e-7, so the bound on its value is wide; the bound on its gradient stays tight.
    op.assert_accurate(inputs, backend=backend, reduction="none", loosest=1.0 if mismatch < 1e-2 else 0.02)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_student_and_teacher(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = cast(logits((30,), 200), dtype)
    inputs["student_logits"] = inputs["teacher_logits"].clone()
    outcome = evaluate(op, inputs, op.learned, backend=backend, reduction="none")
    assert outcome["student_logits"].abs().max() < 1e-6
    if op.name != "soft_cross_entropy":
        assert (outcome["value"] >= 0).all()
        assert outcome["value"].max() < 2e-6


@pytest.mark.parametrize("name", ["kl_div", "kl_div-reverse", "jsd", "tvd"])
@pytest.mark.parametrize("mismatch", [1e-4, 1e-6])
def test_almost_equal_sides_never_give_a_negative_divergence(name: str, mismatch: float, backend: str) -> None:
    inputs = logits((200,), 300)
    inputs["student_logits"] = inputs["teacher_logits"] + mismatch * torch.randn(200, 300)
    assert (BY_NAME[name](**inputs, backend=backend, reduction="none") >= 0).all()


@pytest.mark.parametrize("student,teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["kl_div", "kl_div-reverse", "jsd", "tvd"])
def test_mixed_dtypes_never_give_a_negative_divergence(
    name: str, student: torch.dtype, teacher: torch.dtype, backend: str
) -> None:
    inputs = logits((40,), 3000)
    inputs["teacher_logits"] = inputs["student_logits"].to(teacher)
    inputs["student_logits"] = inputs["student_logits"].to(student)
    value = BY_NAME[name](**inputs, backend=backend, reduction="none")
    assert (value > 0).all()


def saturated(size: float) -> dict[str, Any]:
    """Returns every pairing of saturated, flat and ordinary rows."""
    peaks = [size * torch.nn.functional.one_hot(torch.tensor(i), 37) for i in (3, 20)]
    rows = [peaks[0], peaks[1] - size, torch.zeros(37), torch.randn(37), size * torch.randn(37).sign()]
    pairs = [(a, b) for a in rows for b in rows]
    return {
        "student_logits": torch.stack([a for a, _ in pairs]).float(),
        "teacher_logits": torch.stack([b for _, b in pairs]).float(),
    }


@every_divergence
@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "temperature": 2.0}], ids=["plain", "labels"])
def test_saturated_rows(
    op: Op, size: float, dtype: torch.dtype, reduction: str, options: dict[str, float], backend: str
) -> None:
    inputs = cast(with_labels(saturated(size), 37), dtype)
    op.assert_accurate(inputs, backend=backend, reduction=reduction, **options)


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_saturated_student_against_topk(size: float, sign: int, backend: str) -> None:
    inputs = topk((30,), 37, 5)
    inputs["student_logits"][:15, 7] = sign * size
    BY_NAME["topk_soft_cross_entropy-renormalize"].assert_accurate(inputs, backend=backend, reduction="none")


@pytest.mark.parametrize("size,tolerance", [(30.0, 1e-5), (1e4, 1e-2)])  # a log-probability of -1e4 has an ulp of 1e-3
def test_a_student_certain_of_the_listed_classes(size: float, tolerance: float, backend: str) -> None:
    """The student's remaining mass underflows: 1 - p would lose it, the oracle's logsumexp over the rest keeps it."""
    op, inputs = BY_NAME["topk_soft_cross_entropy-bucket"], topk((30,), 37, 5)
    inputs["student_logits"].scatter_add_(-1, inputs["topk_indices"][:, :1], torch.full((30, 1), size))
    outcome = evaluate(op, inputs, op.learned, backend=backend, reduction="none")
    truth = op.truth(inputs, reduction="none")
    assert all(error(outcome[name], truth[name]) < tolerance for name in truth)


@every_divergence
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_classes_impossible_on_both_sides(
    op: Op, softcap: float | None, dtype: torch.dtype, tolerance: float, backend: str
) -> None:
    """Classes at -inf on both sides are ignored. They differ from row to row."""
    inputs = cast(with_labels(logits((6,), 37), 37), dtype)
    options: dict[str, Any] = {"student_softcap": softcap, "teacher_softcap": softcap, "alpha": 0.5}
    possible = torch.rand(6, 37) > 0.4
    possible.scatter_(1, inputs["labels"].clamp(min=0)[:, None], True)
    gone = {name: x.masked_fill(~possible, -math.inf) if x.dim() > 1 else x for name, x in inputs.items()}
    outcome = evaluate(op, gone, op.learned, backend=backend, reduction="none", **options)
    assert (outcome["student_logits"][~possible] == 0).all()
    for i in range(6):
        left = {name: x[i, possible[i]][None] if x.dim() > 1 else x[i : i + 1] for name, x in inputs.items()}
        if left["labels"] >= 0:  # its index among the classes that are left
            left["labels"] = possible[i, : left["labels"]].sum()[None]
        truth = op.truth(left, reduction="none", **options)
        assert error(outcome["value"][i], truth["value"][0]) < 1e-6
        assert error(outcome["student_logits"][i, possible[i]], truth["student_logits"][0]) < tolerance


IMPOSSIBLE = {  # the value if a class has only student mass, and if it has only teacher mass
    "soft_cross_entropy": (math.isfinite, math.isinf),
    "kl_div": (math.isfinite, math.isinf),
    "kl_div-reverse": (math.isinf, math.isfinite),
    "jsd": (math.isfinite, math.isfinite),
    "tvd": (math.isfinite, math.isfinite),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_classes_impossible_on_one_side(name: str, side: str, softcap: float | None, backend: str) -> None:
    """The value is inf in the rows where the formula is; elsewhere value and gradient are finite."""
    op, inputs = BY_NAME[name], logits((6,), 37)
    inputs[f"{side}_logits"][:3, 5:9] = -math.inf
    caps = {"student_softcap": softcap, "teacher_softcap": softcap}
    outcome = evaluate(op, inputs, op.learned, backend=backend, reduction="none", **caps)
    kind = IMPOSSIBLE[name][side == "student"]
    assert all(kind(value) for value in outcome["value"][:3].tolist())
    gradient, truth = outcome["student_logits"], op.truth(inputs, reduction="none", **caps)
    assert error(outcome["value"], truth["value"]) < 1e-5
    if side == "student":
        assert (gradient[:3, 5:9] == 0).all()
    defined = slice(None) if kind is math.isfinite else slice(3, None)
    assert error(gradient[defined], truth["student_logits"][defined]) < 1e-5


def test_a_label_of_probability_0_costs_inf_unless_its_weight_is_0(backend: str) -> None:
    inputs = with_labels(logits((6,), 37), 37)
    inputs["labels"][0] = 4
    inputs["student_logits"][0, 4] = inputs["teacher_logits"][0, 4] = -math.inf
    value = fastdistill.kl_div(**inputs, alpha=0.5, reduction="none", backend=backend)
    assert value[0].isinf()
    assert value[1:].isfinite().all()
    outcome = evaluate(fastdistill.kl_div, inputs, ["student_logits"], alpha=1.0, backend=backend)
    assert all(x.isfinite().all() for x in outcome.values())


def test_an_infinite_soft_loss_of_weight_0_is_ignored(backend: str) -> None:
    inputs = with_labels(logits((6,), 37), 37)
    inputs["labels"][:] = 3
    inputs["student_logits"][:, 9] = -math.inf  # the teacher has mass there
    outcome = evaluate(fastdistill.kl_div, inputs, ["student_logits"], alpha=0.0, backend=backend)
    expected = torch.nn.functional.cross_entropy(inputs["student_logits"], inputs["labels"])
    assert outcome["value"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert outcome["student_logits"].isfinite().all()


# -- errors ----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": torch.tensor(1.0)}, ValueError, r"^student_logits is a scalar; it should be \(\*, V\)"),
    ({"temperature": 0}, ValueError, r"^temperature is 0; it should be a positive finite number"),
    ({"temperature": -1.0}, ValueError, r"^temperature is -1\.0; it should be a positive finite number"),
    ({"temperature": math.inf}, ValueError, r"^temperature is inf; it should be a positive finite number"),
    ({"temperature": math.nan}, ValueError, r"^temperature is nan; it should be a positive finite number"),
    ({"temperature": None}, TypeError, r"^temperature is NoneType; it should be a number"),
    ({"temperature": "2"}, TypeError, r"^temperature is str; it should be a number"),
    ({"temperature": True}, TypeError, r"^temperature is bool; it should be a number"),
    ({"temperature": torch.tensor(2.0)}, TypeError, r"^temperature is Tensor; it should be a number"),
    ({"t_squared": 1}, TypeError, r"^t_squared is int; it should be a bool"),
    ({"alpha": 0.5}, ValueError, r"^alpha is 0\.5 but labels is None; pass labels, or leave alpha at 1\.0"),
    ({"alpha": -0.1}, ValueError, r"^alpha is -0\.1; it should be between 0 and 1"),
    ({"alpha": 1.5}, ValueError, r"^alpha is 1\.5; it should be between 0 and 1"),
    ({"alpha": math.nan}, ValueError, r"^alpha is nan; it should be between 0 and 1"),
    ({"alpha": "half"}, TypeError, r"^alpha is str; it should be a number"),
    ({"labels": torch.zeros(3, 5)}, TypeError, r"^labels is torch\.float32; it should be an integer.*labels\.long\(\)"),
    ({"labels": torch.zeros(3, 5).bool()}, TypeError, r"^labels is torch\.bool; it should be an integer tensor"),
    ({"labels": [[1] * 5] * 3}, TypeError, r"^labels is list; it should be an integer tensor"),
    ({"labels": torch.zeros(15).long()}, ValueError, r"^labels has shape \(15,\); it should be \(3, 5\)"),
    (
        {"labels": torch.zeros(3, 5, device="meta").long()},
        ValueError,
        r"^labels is on meta; it should be on (cpu|cuda:0)",
    ),
    ({"ignore_index": 1.5}, TypeError, r"^ignore_index is float; it should be an int"),
    ({"vocab_size": 0}, ValueError, r"^vocab_size is 0; it should be between 1 and the 37 classes"),
    ({"vocab_size": 38}, ValueError, r"^vocab_size is 38; it should be between 1 and the 37 classes"),
    ({"vocab_size": -1}, ValueError, r"^vocab_size is -1; it should be between 1 and the 37 classes"),
    ({"vocab_size": 30.0}, TypeError, r"^vocab_size is float; it should be an int"),
    ({"student_softcap": 0.0}, ValueError, r"^student_softcap is 0\.0; it should be a positive finite number"),
    ({"student_softcap": -30}, ValueError, r"^student_softcap is -30; it should be a positive finite number"),
    ({"student_softcap": "30"}, TypeError, r"^student_softcap is str; it should be a number"),
    ({"reduction": "batchmean"}, ValueError, r"^reduction is 'batchmean'; it should be one of 'mean', 'sum', 'none'"),
    ({"reduction": "none", "num_items": 3}, ValueError, r"^num_items is given but reduction is 'none'"),
]
BAD_DIVERGENCE: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"teacher_logits": torch.ones(3, 5, 38)},
        ValueError,
        r"^teacher_logits has 38 classes and student_logits 37; pass vocab_size",
    ),
    ({"teacher_logits": torch.ones(3, 4, 37)}, ValueError, r"^teacher_logits has shape \(3, 4, 37\).*\(3, 5, 37\)"),
    ({"teacher_logits": torch.ones(15, 37)}, ValueError, r"^teacher_logits has shape \(15, 37\).*\(3, 5, 37\)"),
    ({"teacher_logits": torch.ones(37)}, ValueError, r"^teacher_logits has shape \(37,\).*\(3, 5, 37\)"),
    ({"teacher_softcap": math.inf}, ValueError, r"^teacher_softcap is inf; it should be a positive finite number"),
    (
        {"student_logits": torch.ones(3, 5, 0), "teacher_logits": torch.ones(3, 5, 0)},
        ValueError,
        r"logits have 0 classes; they should have at least 1",
    ),
]
BAD_TOPK: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"topk_logprobs": torch.ones(3, 4, 5)}, ValueError, r"^topk_logprobs has shape \(3, 4, 5\).*\(3, 5, 5\)"),
    ({"topk_logprobs": torch.ones(5)}, ValueError, r"^topk_logprobs has shape \(5,\).*\(3, 5, 5\)"),
    ({"topk_indices": torch.ones(3, 5, 4).long()}, ValueError, r"^topk_indices has shape \(3, 5, 4\).*\(3, 5, 5\)"),
    ({"topk_indices": torch.ones(3, 5, 5)}, TypeError, r"^topk_indices is torch\.float32; it should be an integer"),
    ({"topk_indices": [1]}, TypeError, r"^topk_indices is list; it should be an integer tensor"),
    ({"topk_indices": torch.ones(3, 5, 5, device="meta").long()}, ValueError, r"^topk_indices is on meta"),
    (
        {"topk_logprobs": torch.ones(3, 5, 0), "topk_indices": torch.ones(3, 5, 0).long()},
        ValueError,
        r"^topk_logprobs has k = 0; it should hold at least one class a row",
    ),
    ({"tail": "drop"}, ValueError, r"^tail is 'drop'; it should be 'renormalize' or 'bucket'"),
    ({"tail": None}, ValueError, r"^tail is None; it should be 'renormalize' or 'bucket'"),
    ({"tail": "bucket", "temperature": 2.0}, ValueError, r"^temperature is 2\.0 with tail='bucket'.*renormalize"),
]


@pytest.mark.parametrize("wrong,kind,message", BAD)
def test_bad_arguments(wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    for op in [*LOGITS_OPS, *TOPK_OPS]:
        plain = {"labels": None, "alpha": 1.0}
        with pytest.raises(kind, match=message):
            op(**{**op.make(), **plain, **wrong}, backend=backend)


@pytest.mark.parametrize("wrong,kind,message", BAD_DIVERGENCE)
def test_bad_arguments_of_two_sided_losses(
    wrong: dict[str, Any], kind: type[Exception], message: str, backend: str
) -> None:
    for op in OPS:
        with pytest.raises(kind, match=message):
            op(**{**logits(), **wrong}, backend=backend)


@pytest.mark.parametrize("wrong,kind,message", BAD_TOPK)
def test_bad_arguments_of_topk(wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(kind, match=message):
        fastdistill.topk_soft_cross_entropy(**{**topk(), **wrong}, backend=backend)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("index,vocab_size", [(37, None), (-1, None), (33, 33)])
def test_topk_indices_outside_the_classes(tail: str, index: int, vocab_size: int | None, backend: str) -> None:
    inputs = topk((3, 5), 33, 5)
    inputs["student_logits"] = torch.randn(3, 5, 37)
    inputs["topk_indices"][1, 2, 3] = index
    with pytest.raises(IndexError, match=rf"topk_indices.*{index}|{index}.*out of (bounds|range)"):
        fastdistill.topk_soft_cross_entropy(**inputs, tail=tail, vocab_size=vocab_size, backend=backend)


@every_op
@pytest.mark.parametrize("label,vocab_size", [(37, None), (-1, None), (33, 33)])
def test_labels_outside_the_classes(op: Op, label: int, vocab_size: int | None, backend: str) -> None:
    inputs = with_labels(make(op, (3, 5), 33), 33)
    inputs |= {name: torch.randn(3, 5, 37) for name in inputs if name.endswith("logits")}
    inputs["labels"][1, 2] = label
    with pytest.raises(IndexError, match=rf"labels.*{label}|{label}.*out of (bounds|range)"):
        op(**inputs, alpha=0.5, vocab_size=vocab_size, backend=backend)


@pytest.mark.parametrize(
    "name,wrong,kind,message",
    [
        ("kl_div", {"reverse": 1}, TypeError, r"^reverse is int; it should be a bool"),
        ("jsd", {"beta": 1.2}, ValueError, r"^beta is 1\.2; it should be between 0 and 1"),
        ("jsd", {"beta": -0.1}, ValueError, r"^beta is -0\.1; it should be between 0 and 1"),
        ("jsd", {"beta": math.nan}, ValueError, r"^beta is nan; it should be between 0 and 1"),
        ("jsd", {"beta": None}, TypeError, r"^beta is NoneType; it should be a number"),
    ],
)
def test_bad_reverse_or_beta(
    name: str, wrong: dict[str, Any], kind: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(kind, match=message):
        getattr(fastdistill, name)(**logits(), **wrong, backend=backend)


# -- gradients computed in forward ----------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("reduction,num_items", [("mean", None), ("mean", 7), ("mean", "tensor"), ("sum", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_arrive_with_the_weights_that_forward_expected(
    op: Op, reduction: str, num_items: Any, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The kernel of backward has nothing to do, because each row has exactly the weight that forward expected."""
    if backend != "triton":
        pytest.skip("tests the Triton kernels only")
    from fastdistill.kernels import logits as divergences
    from fastdistill.kernels import topk as lists

    module, calls = (lists if op in TOPK_OPS else divergences), []
    rows = module.rows
    monkeypatch.setattr(module, "rows", lambda *inputs, **keywords: (calls.append(keywords), rows(*inputs, **keywords)))
    inputs = cast({**op.make(), "mask": torch.rand(3, 5) > 0.3}, dtype)
    num_items = torch.tensor(7) if num_items == "tensor" else num_items
    evaluate(op, inputs, op.learned, backend=backend, reduction=reduction, num_items=num_items)
    forward, backward = calls
    assert forward["gradient"] is not None
    assert forward["expected"] is None
    assert (backward["weight"] == backward["expected"]).all()
    assert (backward["expected"] == forward["weight"]).all()


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_with_the_expected_weight_are_not_recomputed(
    op: Op, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows are scaled if that loses no digits (in bfloat16 only by a power of 2), and recomputed if it does."""
    if backend != "triton":
        pytest.skip("tests the Triton kernels only")
    from fastdistill.kernels import logits as divergences
    from fastdistill.kernels import topk as lists

    module = lists if op in TOPK_OPS else divergences
    rows, inputs = module.rows, cast(op.make(), dtype)
    whole = evaluate(op, inputs, op.learned, backend=backend, reduction="sum")["student_logits"]

    def again(*arguments: Any, **keywords: Any) -> None:
        if keywords["expected"] is not None:
            keywords["gradient"].fill_(5)
            keywords["weight"][1], keywords["weight"][2] = 0.5, 0.3
        rows(*arguments, **keywords)

    monkeypatch.setattr(module, "rows", again)
    found = evaluate(op, inputs, op.learned, backend=backend, reduction="sum")["student_logits"].reshape(15, -1)
    assert (found[0] == 5).all()
    assert (found[3:] == 5).all()
    for row, factor, is_scaled in ((1, 0.5, dtype != torch.float16), (2, 0.3, dtype == torch.float32)):
        expected = torch.full_like(found[row], 5) if is_scaled else whole.reshape(15, -1)[row]
        assert_same({"row": found[row]}, {"row": factor * expected}, within=1e-6 if is_scaled else 1e-2)


# -- promises of the docstrings --------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("skew", [1e-2, 1e-3, 1e-4, 1e-5])
def test_small_skews_lose_no_more_digits_than_promised(reverse: bool, skew: float, backend: str) -> None:
    inputs = {name: 3 * x for name, x in logits((80,), 60).items()}
    keywords = {"reverse": reverse, "skew": skew}
    found = evaluate(fastdistill.kl_div, inputs, ("student_logits",), backend=backend, **keywords)
    wide = cast(inputs, torch.float64)
    s, t = (wide[name].log_softmax(-1) for name in ("student_logits", "teacher_logits"))
    first, second = (s, t) if reverse else (t, s)
    expected = (first.exp() * (first - (skew * first.exp() + (1 - skew) * second.exp()).log())).sum(-1).mean()
    truth = evaluate(fastdistill.kl_div, wide, ("student_logits",), backend="reference", **keywords)
    assert error(truth["value"], expected) < 1e-12
    for name, x in truth.items():
        assert error(found[name], x) < (1e-7 / skew if backend == "triton" else 3e-6), name
    if skew >= 1e-3:  # float64 logits keep the digits on every backend
        narrow = evaluate(fastdistill.kl_div, wide, ("student_logits",), backend=backend, **keywords)
        assert error(narrow["value"], expected) < 1e-12


def test_a_negative_item_weight_changes_the_sign_of_its_row(backend: str) -> None:
    inputs = logits((6,), 20)
    weights = torch.tensor([1.0, -2.0, 0.5, -0.5, 0.0, 3.0])
    plain = evaluate(fastdistill.kl_div, inputs, ("student_logits",), backend=backend, reduction="none")
    found = evaluate(
        fastdistill.kl_div, inputs, ("student_logits",), backend=backend, reduction="none", item_weights=weights
    )
    assert error(found["value"], plain["value"] * weights) < 1e-6
    assert error(found["student_logits"], plain["student_logits"] * weights[:, None]) < 1e-6


# -- few logits ----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("rows,classes", [((32,), 2), ((2, 4), 64)])
@pytest.mark.parametrize("options", [{}, {"labels": True}, {"mask": True, "item_weights": True}, {"temperature": 3.0}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_logits_give_what_blocks_give(
    op: Op, rows: tuple[int, ...], classes: int, options: dict, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    inputs, keywords = make(op, rows, classes), {"reduction": reduction, "backend": "torch"}
    if "temperature" in options and op.options.get("tail") != "bucket":
        keywords |= {"temperature": 3.0, "t_squared": True}
    if "labels" in options:
        inputs, keywords["alpha"] = with_labels(inputs, classes), 0.4
    if "mask" in options:
        inputs["mask"] = torch.rand(rows) > 0.3
        inputs["student_logits"][~inputs["mask"]] = math.nan
        inputs["item_weights"] = torch.rand(rows) - 0.2
    keywords["upstream"] = torch.randn(rows if reduction == "none" else ())
    found = evaluate(op, inputs, op.learned, **keywords)
    monkeypatch.setattr(_few, "FEW", 0)
    assert_same(found, evaluate(op, inputs, op.learned, **keywords), within=2e-6)


@every_op
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_few_logits_that_are_not_finite(op: Op, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("student_logits", "topk_logprobs" if op in TOPK_OPS else "teacher_logits"):
        inputs = make(op, (3, 5), 37)
        inputs[name][1, 2, 3] = value
        monkeypatch.undo()
        found = evaluate(op, inputs, op.learned, backend="torch", reduction="none")
        monkeypatch.setattr(_few, "FEW", 0)
        expected = evaluate(op, inputs, op.learned, backend="torch", reduction="none")
        for key, x in expected.items():
            torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-7, equal_nan=True)
