"""Tests the linear_ losses beyond the contract: chunks of tokens, logits that stay float32, weights, errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from _cases import (
    LINEAR_LOGITS_OPS,
    LINEAR_TOPK_OPS,
    LOGITS_OPS,
    TOPK_OPS,
    Op,
    linear,
    linear_topk,
    with_labels,
    without_ties,
)
from _oracle import assert_accurate, assert_same, cast, error, evaluate
from torch import Tensor

import fastdistill
from fastdistill.ops import _common, linear_logits
from fastdistill.ops.linear_logits import CHUNK

OPS = [op for op in LINEAR_LOGITS_OPS if "vocab_size" not in op.options]
ALL = [*OPS, *LINEAR_TOPK_OPS]
every_op = pytest.mark.parametrize("op", ALL, ids=str)
every_divergence = pytest.mark.parametrize("op", OPS, ids=str)
ON_LOGITS = {str(op): op for op in [*LOGITS_OPS, *TOPK_OPS]}


def make(op: Op, rows: tuple[int, ...], classes: int, **sizes: int) -> dict[str, Any]:
    if op in LINEAR_TOPK_OPS:
        sizes.pop("d_t", None)
        return linear_topk(rows, classes, min(8, classes - 1), **sizes)
    return linear(rows, classes, **sizes)


# -- shapes ----------------------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("classes", [2, 3, 127, 30522, 50257, 128256])
def test_vocabularies(op: Op, classes: int, backend: str) -> None:
    inputs = make(op, (4,), classes)
    if op.name == "linear_tvd" and classes > 1000:
        inputs = without_ties(inputs)
    op.assert_accurate(inputs, backend=backend, reduction="none")


@every_op
@pytest.mark.parametrize("classes", [127, 30522])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_never_rounded(op: Op, classes: int, dtype: torch.dtype, backend: str) -> None:
    """Logits rounded to 16 bits would change the loss by 4e-4 and the gradients by 4% and more."""
    rows = 6 if classes > 1000 else 40  # enough numbers that no single rounding dominates
    inputs = make(op, (rows,), classes, d_s=24)
    if op.name == "linear_tvd" and classes > 1000:
        inputs = without_ties(inputs)
    inputs = cast(inputs, dtype)
    op.assert_accurate(inputs, backend=backend)
    op.assert_accurate(inputs, backend=backend, reduction="none", upstream=torch.randn(rows))


@every_op
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_losses_keep_small_float16_gradients(op: Op, reduction: str, backend: str) -> None:
    """Loss scaling must act before rounding: a gradient of 1e-6 rounded to float16 first has few digits left."""
    inputs = make(op, (4,), 30522, d_s=24)
    if op.name == "linear_tvd":
        inputs = without_ties(inputs)
    inputs = cast(inputs, torch.float16)
    op.assert_accurate(inputs, backend=backend, reduction=reduction, upstream=torch.tensor(2.0**12))


@every_op
@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
def test_any_number_of_tokens(op: Op, tokens: int, backend: str) -> None:
    inputs = with_labels(make(op, (tokens,), 33), 33)
    inputs["mask"] = torch.rand(tokens) > 0.3
    inputs["mask"][-1] = True
    inputs["labels"][-1] = 3
    for options in ({"reduction": "mean"}, {"reduction": "none", "upstream": torch.randn(tokens)}):
        op.assert_accurate(inputs, backend=backend, alpha=0.7, **options)


@every_op
@pytest.mark.parametrize("d_s,d_t", [(1, 1), (1, 9), (48, 16), (16, 64), (312, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(op: Op, d_s: int, d_t: int, dtype: torch.dtype, backend: str) -> None:
    op.assert_accurate(cast(make(op, (2, 9), 50, d_s=d_s, d_t=d_t), dtype), backend=backend)


@every_op
@pytest.mark.parametrize("student_bias", [False, True])
@pytest.mark.parametrize("teacher_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_biases_are_optional(op: Op, student_bias: bool, teacher_bias: bool, reduction: str, backend: str) -> None:
    inputs = op.make()
    if not student_bias:
        inputs["student_bias"] = None
    if not teacher_bias and op in OPS:
        inputs["teacher_bias"] = None
    op.assert_accurate(inputs, op.learned if student_bias else op.learned[:2], backend=backend, reduction=reduction)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weight_gradients_of_many_tokens_accumulate_in_float32(
    op: Op, dtype: torch.dtype, reduction: str, backend: str
) -> None:
    """The terms of the 40 chunks have similar size and sign: in bfloat16 each chunk would add a rounding error."""
    inputs = make(op, (40 * CHUNK,), 12, d_s=6)
    inputs["student"] = inputs["student"].abs() * 0.02  # small enough that float16 holds the sum
    if "teacher" in inputs:
        inputs["teacher"] = inputs["teacher"].abs()
    op.assert_accurate(cast(inputs, dtype), backend=backend, reduction=reduction)


# -- options ---------------------------------------------------------------------------------------------------


@every_op
def test_options(op: Op, backend: str) -> None:
    """Each option is tested alone, so that none is silently ignored."""
    inputs = with_labels(make(op, (30,), 40), 40)
    inputs["student"] *= 3
    two_sided = op in OPS
    for options in [
        {"t_squared": True},
        {"alpha": 0.3},
        {"alpha": 0.0},
        {"alpha": 0.5, "ignore_index": 3, "labels": inputs["labels"].clamp(min=3)},
        {"student_softcap": 4.0},
        {"student_softcap": 4.0, "alpha": 0.5},
        *([{"teacher_softcap": 4.0}, {"vocab_size": 29, "labels": inputs["labels"] % 29}] if two_sided else []),
        *([{"temperature": 3.0, "t_squared": True}] if op.options.get("tail") != "bucket" else []),
    ]:
        op.assert_accurate({**inputs, **options}, backend=backend, reduction="none")


def scaled(op: Op, backend: str, student_scale: float, teacher_scale: float, **inputs: Any) -> Tensor:
    """Computes the textbook's loss with scales in the heads: c (x W^T + b) = x (c W)^T + c b."""
    for side, scale in (("student", student_scale), ("teacher", teacher_scale)):
        inputs |= {name: inputs[name] * scale for name in (f"{side}_weight", f"{side}_bias") if name in inputs}
        if f"{side}_logit_scale" in op.options:
            inputs[f"{side}_logit_scale"] = 1.0
    return op.textbook(backend=backend, **inputs)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0625, 4.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logit_scales(op: Op, dtype: torch.dtype, scale: float, softcap: float | None, backend: str) -> None:
    inputs = cast(with_labels(make(op, (12,), 37), 37), dtype)
    inputs["student_weight"] /= scale
    both = {"teacher_logit_scale": 0.5} if op in OPS else {}
    options = {"alpha": 0.6, "student_softcap": softcap, "reduction": "sum"}
    outcome = evaluate(op, inputs, op.learned, backend=backend, student_logit_scale=scale, **both, **options)
    truth, textbook = (
        evaluate(partial(scaled, op, name, scale, 0.5), values, op.learned, **options)
        for values, name in ((cast(inputs, torch.float64), "reference"), (inputs, backend))
    )
    assert_accurate(outcome, truth, textbook)


@every_divergence
@pytest.mark.parametrize("student,teacher,vocab_size", [(40, 40, 33), (48, 40, 40), (40, 48, 40)])
def test_padded_vocabularies(op: Op, student: int, teacher: int, vocab_size: int, backend: str) -> None:
    """Weight rows beyond the shared classes are ignored, even if they are NaN, and get a gradient of exactly 0."""
    sides = {"student": linear(classes=student), "teacher": linear(classes=teacher)}
    inputs = {name: x for side, own in sides.items() for name, x in own.items() if name.startswith(side)}
    clean = op.assert_accurate(inputs, backend=backend, vocab_size=vocab_size)
    for poison in (float("nan"), float("inf")):
        for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
            inputs[name][vocab_size:] = poison
        assert_same(evaluate(op, inputs, op.learned, backend=backend, vocab_size=vocab_size), clean)
    assert (clean["student_weight"][vocab_size:] == 0).all()
    assert (clean["student_bias"][vocab_size:] == 0).all()


@every_op
def test_equals_the_loss_on_logits(op: Op, backend: str) -> None:
    """In float32 the op equals the loss on materialised logits, with autograd through F.linear."""
    inputs = op.make()
    logits_op = ON_LOGITS[str(op).removeprefix("linear_")]

    def materialised(student: Any, student_weight: Any, student_bias: Any, **rest: Any) -> torch.Tensor:
        linear = torch.nn.functional.linear
        logits = {"student_logits": linear(student, student_weight, student_bias)}
        if "teacher" in rest:
            teacher = (rest.pop(name) for name in ("teacher", "teacher_weight", "teacher_bias"))
            logits["teacher_logits"] = linear(*teacher)
        return logits_op(**logits, **rest, backend=backend)

    expected = evaluate(materialised, inputs, op.learned)
    assert_same(evaluate(op, inputs, op.learned, backend=backend), expected, within=2e-6)


@every_divergence
def test_biases_of_minus_infinity_forbid_classes(op: Op, backend: str) -> None:
    inputs = op.make()
    inputs["student_bias"][30:] = inputs["teacher_bias"][30:] = float("-inf")
    outcome = evaluate(op, inputs, op.learned, backend=backend)
    expected = evaluate(op, inputs, op.learned, backend=backend, vocab_size=30)
    assert_same(outcome, expected, within=1e-6)


@every_divergence
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_saturated_logits(op: Op, size: float, backend: str) -> None:
    """The teacher is certain of its class; the student's logits are ordinary."""
    inputs = make(op, (20,), 37)
    inputs["teacher_weight"] = inputs["teacher_weight"].sign() * size
    op.assert_accurate(inputs, backend=backend)


# -- rows that do not count ------------------------------------------------------------------------------------

Chunks = Callable[[int], None]


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Chunks:
    """Returns a function that sets the most tokens of a chunk, so that few tokens make several chunks."""
    return lambda tokens: monkeypatch.setattr(linear_logits, "CHUNK", tokens)


def counting(rows: int, number: int) -> Tensor:
    """Returns a mask in which `number` rows count, neither sorted nor evenly spread."""
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows)[:number]] = True
    return mask


def poisoned(op: Op, inputs: dict[str, Any], counted: Tensor) -> dict[str, Any]:
    return op.overwrite_masked(inputs, {"mask": counted}, float("nan"))


@every_op
@pytest.mark.parametrize("number", [0, 1, 8, 30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_out_rows_are_left_out(op: Op, number: int, reduction: str, chunks_of: Chunks, backend: str) -> None:
    chunks_of(8)
    inputs, mask = make(op, (30,), 37), counting(30, number)
    keywords = {"backend": backend, "reduction": reduction, "upstream": torch.rand(30) if reduction == "none" else None}
    clean = op.assert_accurate({**inputs, "mask": mask}, **keywords)
    for name in ("student", *(["value"] if reduction == "none" else [])):
        assert (clean[name][~mask] == 0).all()
    assert_same(evaluate(op, {**poisoned(op, inputs, mask), "mask": mask}, op.learned, **keywords), clean)


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_masked_out_rows_of_every_dtype(
    op: Op, dtype: torch.dtype, reduction: str, chunks_of: Chunks, backend: str
) -> None:
    """Some rows are masked out, others have a label that is ignored."""
    chunks_of(8)
    inputs = cast(with_labels(make(op, (30,), 37), 37), dtype)
    inputs["labels"][torch.randperm(30)[:12]] = -100
    mask = counting(30, 20)
    keywords = {"backend": backend, "reduction": reduction, "alpha": 0.5, "student_softcap": 9.0}
    clean = op.assert_accurate({**inputs, "mask": mask}, **keywords)
    inputs = poisoned(op, inputs, mask & (inputs["labels"] != -100))
    assert_same(evaluate(op, {**inputs, "mask": mask}, op.learned, **keywords), clean)


def weighted(op: Op, weights: Tensor, reduction: str, **inputs: Any) -> Tensor:
    """Computes the textbook's loss; rows of weight 0 count in the mean."""
    items, counted = op.items(**{**op.options, **inputs})
    items = torch.where(counted & (weights > 0), items, 0) * weights
    return items if reduction == "none" else items.sum() / counted.sum()


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_item_weights(
    op: Op, dtype: torch.dtype, masked: bool, reduction: str, chunks_of: Chunks, backend: str
) -> None:
    """Weights of 0 leave their rows out, even if these hold NaN."""
    chunks_of(8)
    inputs = cast(make(op, (30,), 37), dtype)
    weights = torch.rand(30).masked_fill(~counting(30, 20), 0)
    mask = counting(30, 25) if masked else None
    counted = weights > 0 if mask is None else mask & (weights > 0)
    upstream = torch.rand(30) if reduction == "none" else None
    given = poisoned(op, inputs, counted)
    if mask is not None:
        given["item_weights"] = weights.where(mask, float("nan"))
    outcome = evaluate(
        op, {"item_weights": weights, **given}, op.learned, backend=backend, reduction=reduction, mask=mask,
        upstream=upstream,
    )  # fmt: skip
    keywords = {"mask": mask, "upstream": upstream}
    truth, textbook = (
        evaluate(partial(weighted, op, x, reduction), values, op.learned, **keywords, **options)
        for x, values, options in (
            (weights.double(), cast(inputs, torch.float64), {}),
            (weights, inputs, {"narrow": backend == "triton"}),
        )
    )
    assert_accurate(outcome, truth, textbook)
    assert (outcome["student"][~counted] == 0).all()


@every_op
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_small_item_weights_do_not_underflow(op: Op, reduction: str, backend: str) -> None:
    inputs, weights = cast(make(op, (20,), 37), torch.float16), torch.rand(20)
    expected, scaled = (
        evaluate(
            op, inputs, op.learned, backend=backend, reduction=reduction, item_weights=weights * unit,
            upstream=torch.full((20,) if reduction == "none" else (), 1 / unit),
        )
        for unit in (1.0, 2.0**-30)
    )  # fmt: skip
    del expected["value"], scaled["value"]
    assert_same(scaled, expected)


@pytest.mark.parametrize("number", [0, 1, 20, 200])
def test_work_is_that_of_the_rows_that_count(
    number: int, monkeypatch: pytest.MonkeyPatch, chunks_of: Chunks, backend: str
) -> None:
    chunks_of(64)
    inputs = {**linear((200,), 37), "mask": counting(200, number)}
    if backend == "torch":
        multiplications = [0]
        for name, first in (("wide_mm", 0), ("add_mm_", 1)):
            product = getattr(_common, name)

            def count(*operands: Any, product: Any = product, first: int = first, **keywords: Any) -> Any:
                multiplications[0] += operands[first].numel() * operands[first + 1].shape[1]
                return product(*operands, **keywords)

            monkeypatch.setattr(_common, name, count)
        evaluate(fastdistill.linear_kl_div, inputs, ("student", "student_weight"), backend=backend)
        d_s, d_t = (inputs[name].shape[1] for name in ("student", "teacher"))
        assert multiplications[0] == number * 37 * (3 * d_s + d_t)  # both sides' logits, dX and dW
        return
    if torch.cuda.is_available():
        pytest.skip("the interpreter counts the products")
    from triton.runtime.interpreter import InterpreterBuilder

    dots = [0]
    multiply = InterpreterBuilder.create_dot

    def count_dots(*operands: Any) -> Any:
        dots[0] += 1
        return multiply(*operands)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count_dots)
    evaluate(fastdistill.linear_kl_div, inputs, ("student", "student_weight"), backend=backend)
    chunk = 50  # four even chunks, each one tile
    assert dots[0] == 4 * -(-number // chunk)


@pytest.mark.parametrize("op", LINEAR_TOPK_OPS, ids=str)
def test_products_without_a_mask_are_whole(op: Op, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Nearly every list has a possible class, so looking for lists without one must not choose slower products."""
    inputs = make(op, (20,), 37)
    counted = torch.arange(20) != 3
    expected = evaluate(op, {**inputs, "mask": counted}, op.learned, backend=backend)
    inputs["topk_logprobs"][3], inputs["student"][3] = float("-inf"), float("nan")
    if backend == "triton":
        from fastdistill.kernels import counted_mm

        monkeypatch.setattr(counted_mm, "logits", lambda *_: pytest.fail("the rows were sorted"))
    assert_same(evaluate(op, inputs, op.learned, backend=backend), expected, within=2e-6)


@every_op
def test_a_device_is_never_waited_for(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the op's code on the meta device: like a host that does not wait for its GPU, it sees no numbers."""
    from fastdistill.kernels import counted_mm, logits, topk

    calls = []
    run = linear_logits._run
    monkeypatch.setattr(linear_logits, "_run", lambda *inputs: calls.append(inputs) or run(*inputs))
    inputs = with_labels(make(op, (150,), 37), 37)
    inputs |= {"mask": counting(150, 30), "item_weights": torch.rand(150)}
    for reduction in ("mean", "none"):
        evaluate(op, inputs, op.learned, backend="torch", reduction=reduction, alpha=0.5)
    assert len(calls) == 3  # losses per row run again in the backward

    launched = set()
    for module, name in ((logits, "rows"), (topk, "rows"), (counted_mm, "logits"), (counted_mm, "add_d_weight")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: launched.add(name))

    def d_hidden(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
        launched.add("d_hidden")
        return gradient.new_empty(len(gradient), weight.shape[1])

    monkeypatch.setattr(counted_mm, "d_hidden", d_hidden)
    monkeypatch.setattr(_common, "no_autocast", lambda x: nullcontext())  # autocast does not know the meta device
    for given, options in calls:
        on_meta = linear_logits.Inputs._make(x.detach().to("meta") if isinstance(x, Tensor) else x for x in given)
        for backend in ("torch", "triton"):
            launched.clear()
            assert all(x.is_meta for x in run(on_meta, options._replace(backend=backend)))
            products = {"d_hidden", "add_d_weight"} if given.needs_weight else set()
            assert launched == (products | {"logits", "rows"} if backend == "triton" else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [40, 41, 240, 1000])
@pytest.mark.parametrize("d,classes", [(6, 37), (300, 37), (24, 600)])
def test_products_of_the_rows_that_count(
    dtype: torch.dtype, count: int, d: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond the count are neither read nor written. At 600 classes dX is summed in parts."""
    counted_mm = pytest.importorskip("fastdistill.kernels.counted_mm", reason="needs triton")
    monkeypatch.setattr(counted_mm, "LEAST_DEPTH", 16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        check_products(counted_mm, dtype, count, d, classes)


def check_products(counted_mm: Any, dtype: torch.dtype, count: int, d: int, classes: int) -> None:
    tokens, start = 300, 40
    counted = min(max(count - start, 0), tokens)
    x, weight = torch.randn(tokens, d).to(dtype), torch.randn(d, classes).to(dtype).mT  # columns are contiguous
    gradient = torch.zeros(tokens, counted_mm.padded(classes)).to(dtype)
    gradient[:, :classes] = torch.randn(tokens, classes)
    sums = torch.randn(classes, d).to(torch.promote_types(dtype, torch.float32))
    logits = torch.full_like(gradient, float("nan"), dtype=sums.dtype)
    exact = {"logits": x.double() @ weight.double().mT, "d_hidden": gradient[:, :classes].double() @ weight.double()}
    exact = {name: product[:counted] for name, product in exact.items()}
    exact["sums"] = sums + gradient[:counted, :classes].double().mT @ x[:counted].double()
    x[counted:] = gradient[counted:] = float("nan")

    device_count = torch.tensor(count)
    counted_mm.logits(x, weight, device_count, start, logits)
    d_hidden = counted_mm.d_hidden(gradient, weight, device_count, start, sums.dtype)
    counted_mm.add_d_weight(gradient, x, device_count, start, sums)

    assert logits[counted:].isnan().all()
    assert (logits[:counted, classes:] == 0).all()
    within = 1e-14 if dtype == torch.float64 else 2e-6
    for out, name in ((logits[:counted, :classes], "logits"), (d_hidden[:counted], "d_hidden"), (sums, "sums")):
        assert out.dtype == sums.dtype
        assert error(out, exact[name]) < within


# -- errors ----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": torch.tensor(1.0)}, ValueError, r"^student is a scalar; it should be \(\*, d\)"),
    ({"student": torch.ones(3, 5, 7)}, ValueError, r"^student_weight has shape \(37, 6\); it should be \(V, 7\)"),
    ({"student_weight": torch.ones(37)}, ValueError, r"^student_weight has shape \(37,\); it should be \(V, 6\)"),
    ({"student_weight": torch.ones(6, 37)}, ValueError, r"^student_weight has shape \(6, 37\); it should be \(V, 6\)"),
    ({"student_bias": torch.ones(36)}, ValueError, r"^student_bias has shape \(36,\); it should be \(37,\)"),
    (
        {"student_weight": torch.ones(37, 6).bfloat16()},
        TypeError,
        r"^student torch\.float32, student_weight torch\.bfloat16.*one dtype.*autocast",
    ),
    ({"student_bias": torch.ones(37).half()}, TypeError, r"student_bias torch\.float16 should have one dtype"),
    (
        {
            "student_weight": torch.ones(0, 6),
            "teacher_weight": torch.ones(0, 10),
            "student_bias": None,
            "teacher_bias": None,
        },
        ValueError,
        r"^the logits have 0 classes; they should have at least 1",
    ),
    ({"temperature": 0.0}, ValueError, r"^temperature is 0\.0; it should be a positive finite number"),
    ({"alpha": 0.5}, ValueError, r"^alpha is 0\.5 but labels is None"),
    ({"alpha": 2}, ValueError, r"^alpha is 2; it should be between 0 and 1"),
    ({"labels": torch.zeros(3, 4).long()}, ValueError, r"^labels has shape \(3, 4\); it should be \(3, 5\)"),
    ({"vocab_size": 99}, ValueError, r"^vocab_size is 99; it should be between 1 and the 37 classes"),
    ({"student_softcap": -1.0}, ValueError, r"^student_softcap is -1\.0; it should be a positive finite number"),
    ({"t_squared": "yes"}, TypeError, r"^t_squared is str; it should be a bool"),
]
BAD_DIVERGENCE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"teacher": torch.ones(3, 4, 10)}, ValueError, r"^teacher has shape \(3, 4, 10\); it should be \(3, 5, 10\)"),
    ({"teacher": torch.ones(3, 5, 9)}, ValueError, r"^teacher_weight has shape \(37, 10\); it should be \(V, 9\)"),
    ({"teacher_bias": torch.ones(1)}, ValueError, r"^teacher_bias has shape \(1,\); it should be \(37,\)"),
    (
        {"teacher_weight": torch.ones(40, 10), "teacher_bias": None},
        ValueError,
        r"^teacher_weight has 40 classes and student_weight 37; pass vocab_size",
    ),
    (
        {"teacher_weight": torch.ones(37, 10).bfloat16()},
        TypeError,
        r"^teacher torch\.float32, teacher_weight torch\.bfloat16.*one dtype",
    ),
    ({"teacher_softcap": 0}, ValueError, r"^teacher_softcap is 0; it should be a positive finite number"),
]
BAD_TOPK: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"topk_logprobs": torch.ones(3, 4, 5)}, ValueError, r"^topk_logprobs has shape \(3, 4, 5\).*\(3, 5, 5\)"),
    ({"topk_indices": torch.ones(3, 5, 5)}, TypeError, r"^topk_indices is torch\.float32; it should be an integer"),
    ({"tail": "other"}, ValueError, r"^tail is 'other'; it should be 'renormalize' or 'bucket'"),
    ({"tail": "bucket", "temperature": 0.5}, ValueError, r"^temperature is 0\.5 with tail='bucket'"),
]


def expect(ops: list[Op], wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    for op in ops:
        inputs = {**op.make(), **wrong}
        if op in LINEAR_TOPK_OPS:
            inputs = {name: x for name, x in inputs.items() if not name.startswith("teacher")}
        with pytest.raises(kind, match=message):
            op(**inputs, backend=backend)


@pytest.mark.parametrize("wrong,kind,message", BAD)
def test_bad_arguments(wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    expect(ALL, wrong, kind, message, backend)


@pytest.mark.parametrize("wrong,kind,message", BAD_DIVERGENCE)
def test_bad_arguments_of_two_sided_losses(
    wrong: dict[str, Any], kind: type[Exception], message: str, backend: str
) -> None:
    expect(OPS, wrong, kind, message, backend)


@pytest.mark.parametrize("wrong,kind,message", BAD_TOPK)
def test_bad_arguments_of_topk(wrong: dict[str, Any], kind: type[Exception], message: str, backend: str) -> None:
    expect(LINEAR_TOPK_OPS, wrong, kind, message, backend)


@every_op
@pytest.mark.parametrize("label,vocab_size", [(37, None), (-1, None), (33, 33)])
def test_labels_outside_the_classes(op: Op, label: int, vocab_size: int | None, backend: str) -> None:
    inputs = {**op.make(), "labels": torch.ones(3, 5).long()}
    if "topk_indices" in inputs:
        inputs["topk_indices"] = torch.arange(5).expand(3, 5, 5)
    inputs["labels"][1, 2] = label
    with pytest.raises(IndexError, match=rf"labels.*{label}|{label}.*out of (bounds|range)"):
        op(**inputs, alpha=0.5, vocab_size=vocab_size, backend=backend)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("index,vocab_size", [(37, None), (-1, None), (33, 33)])
def test_topk_indices_outside_the_classes(tail: str, index: int, vocab_size: int | None, backend: str) -> None:
    inputs = linear_topk()
    inputs["topk_indices"] = torch.arange(5).repeat(3, 5, 1)
    inputs["topk_indices"][1, 2, 3] = index
    with pytest.raises(IndexError, match=rf"topk_indices.*{index}|{index}.*out of (bounds|range)"):
        fastdistill.linear_topk_soft_cross_entropy(**inputs, tail=tail, vocab_size=vocab_size, backend=backend)
