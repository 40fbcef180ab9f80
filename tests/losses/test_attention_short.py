"""Tests the kernel of attention_mse for short sequences against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _cases import ATTENTION_MSE, attention
from _oracle import assert_accurate as compare
from _oracle import assert_same, cast, error, evaluate
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs the kernel")

from fastdistill.kernels import attention_short as kernels
from fastdistill.kernels._common import arch_of

import fastdistill
from fastdistill.ops import attention_short
from fastdistill.ops._attention import Attention

HALVES = (torch.bfloat16, torch.float16)
LEARNED = ATTENTION_MSE.learned
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def _on_the_card() -> Iterator[None]:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if kernels.longest(arch_of(torch.empty(0))) < 128:
            pytest.skip("this card's registers hold fewer rows")
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the `expected` gradient of each launch that writes gradients."""
    seen: list[float] = []
    launch = kernels._launch

    def recorded(*arguments: Any) -> None:
        seen.append(arguments[-1])
        launch(*arguments)

    monkeypatch.setattr(kernels, "_launch", recorded)
    return seen


def padded(inputs: dict[str, Any], query_mask: bool = True) -> dict[str, Any]:
    """Adds masks and puts NaN where they say that nothing counts."""
    masks = {"key_mask": torch.rand(2, inputs["student_key"].shape[2]) > 0.3}
    if query_mask:
        masks["query_mask"] = torch.rand(2, inputs["student_query"].shape[2]) > 0.3
    inputs = {name: x.clone() for name, x in inputs.items()}
    for side in ("student", "teacher"):
        for part, mask in ((part, masks.get(f"{part}_mask")) for part in ("query", "key")):
            if mask is not None:
                inputs[f"{side}_{part}"].masked_fill_(~mask[:, None, :, None], float("nan"))
    return inputs | masks


def assert_accurate(inputs: dict[str, Any], launches: list[float], **keywords: Any) -> None:
    """Checks the kernel's value and gradients; the oracle reads zeros where masks hide NaN."""
    clean = {name: x.nan_to_num() if x.is_floating_point() else x for name, x in inputs.items()}
    truth = ATTENTION_MSE.truth(clean, **keywords)
    usual = evaluate(ATTENTION_MSE.textbook, clean, LEARNED, **keywords)
    found = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton", **keywords)
    assert launches, "another kernel ran"
    compare(found, truth, usual)


@halves
@pytest.mark.parametrize(
    "length,keys,d_s,d_t,student_kv,teacher_kv,masked,is_causal",
    [
        (128, 128, 26, 64, 4, 4, True, False),
        (100, 128, 64, 64, 2, 4, False, False),
        (64, 63, 26, 64, 1, 2, True, True),
        (65, 90, 16, 32, 2, 1, True, True),
        (90, 33, 26, 20, 4, 2, False, True),  # the first queries are allowed no key
        (1, 5, 1, 64, 4, 1, True, False),
    ],
)
def test_against_float64(
    length: int, keys: int, d_s: int, d_t: int, student_kv: int, teacher_kv: int, masked: bool, is_causal: bool,
    dtype: torch.dtype, launches: list[float],
) -> None:  # fmt: skip
    inputs = cast(attention(2, 4, length, keys, d_s, d_t, student_kv, teacher_kv), dtype)
    assert_accurate(padded(inputs) if masked else inputs, launches, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_without_an_allowed_pair_may_hold_nan(is_causal: bool, launches: list[float]) -> None:
    """A row may count by its own mask and still be in no pair: the other side is masked, or comes later."""
    inputs = cast(attention(length=20, keys=24), torch.bfloat16)
    inputs |= {"key_mask": torch.ones(2, 24, dtype=torch.bool), "query_mask": torch.ones(2, 20, dtype=torch.bool)}
    inputs["key_mask"][0] = False
    inputs["query_mask"][1, 10:] = False
    for side in ("student", "teacher"):
        inputs[f"{side}_query"][0] = inputs[f"{side}_query"][1, :, 10:] = inputs[f"{side}_key"][0] = float("nan")
        if is_causal:
            inputs[f"{side}_key"][1, :, 14:] = float("nan")  # query 9 sees the keys up to 13
    assert_accurate(inputs, launches, is_causal=is_causal)


def test_nothing_counts(launches: list[float]) -> None:
    inputs = cast(attention(), torch.bfloat16) | {"key_mask": torch.zeros(2, 9, dtype=torch.bool)}
    outcome = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton")
    assert launches
    assert all((x == 0).all() for x in outcome.values())


@pytest.mark.parametrize("num_items", [None, 1000, 12.5, torch.tensor(77), torch.tensor(0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divisors(num_items: Any, reduction: str, launches: list[float]) -> None:
    if reduction == "sum" and num_items is not None:
        pytest.skip("a sum has no divisor")
    inputs = padded(cast(attention(), torch.bfloat16))
    if isinstance(num_items, Tensor) and num_items == 0:
        found = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton", num_items=num_items)
        assert_same(found, evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton", reduction="sum"))
        return
    assert_accurate(inputs, launches, num_items=num_items, reduction=reduction)


@halves
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_differences_of_any_size(size: float, dtype: torch.dtype, launches: list[float]) -> None:
    """Scores of 1e6 exceed float16, and gradients of 1e-6 have few digits there before a loss scale multiplies them."""
    inputs = attention(length=40, keys=40, d_s=26, d_t=26)
    inputs = cast({name: size * x if "query" in name else x for name, x in inputs.items()}, dtype)
    clean = {name: x.float() for name, x in inputs.items()}
    upstream = torch.tensor(2.0**10 / size**2)
    found = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton", upstream=upstream)
    truth = evaluate(ATTENTION_MSE, clean, LEARNED, backend="reference", upstream=upstream)
    assert launches
    for name in LEARNED:
        if truth[name].abs().max() < 6e4:
            assert error(found[name], truth[name]) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_student_close_to_teacher(launches: list[float]) -> None:
    """Gradients keep their digits: only x is rounded, and x is the difference."""
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        teacher = attention(length=48, keys=48, d_s=26, d_t=26, student_kv=4)
        teacher["student_query"] = teacher["teacher_query"] * 1.01
        teacher["student_key"] = teacher["teacher_key"]
        inputs = cast(teacher, dtype)
        scale = torch.tensor(2.0**12)  # as a gradient scaler: without it float16 gradients of 1e-6 lose digits
        truth = ATTENTION_MSE.truth(inputs, upstream=scale)
        found = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton", upstream=scale)
        for name in LEARNED:
            assert error(found[name], truth[name]) < bound
        assert error(found["value"], truth["value"]) < 1e-4
    assert launches


def graph(inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in LEARNED}
    return fastdistill.attention_mse(**{**inputs, **leaves}, backend="triton"), list(leaves.values())


def test_the_backward_computes_again_only_for_another_gradient(launches: list[float]) -> None:
    """The first backward hands over the forward's gradients if they are right; a second one computes the same bits."""
    inputs = padded(cast(attention(length=30, keys=40), torch.bfloat16))
    for upstream in (1.0, 0.37):
        launches.clear()
        loss, leaves = graph(inputs)
        written = loss.grad_fn.gradients[0]  # type: ignore[union-attr]
        before = written.clone()
        first = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
        assert first[0].data_ptr() == written.data_ptr()
        assert torch.equal(first[0], before) == (upstream == 1)
        second = torch.autograd.grad(loss, leaves, torch.tensor(upstream))
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))
        assert launches[:2] == [1.0, 1.0]
        assert len(launches) == 3


def test_the_kernel_compares_the_gradient() -> None:
    inputs = cast(attention(), torch.bfloat16)
    call = Attention(*(inputs[name] for name in Attention._fields[:4]), 0.4, 0.3, None, None, False, None)
    d_query, d_key = (torch.full_like(x, 7.0) for x in call.tensors()[:2])
    divisor = torch.tensor(3.0, dtype=torch.float64)
    kernels.gradients(torch.tensor(0.5), call, divisor, d_query, d_key, 0.5)
    assert (d_query == 7).all()
    assert (d_key == 7).all()
    kernels.gradients(torch.tensor(0.5), call, divisor, d_query, d_key, 1.0)
    assert (d_query != 7).all()
    assert (d_key != 7).all()


def test_no_gradient_is_written_where_none_is_wanted(launches: list[float]) -> None:
    inputs = padded(cast(attention(), torch.float16))
    value = ATTENTION_MSE(**inputs, backend="triton")
    assert value.grad_fn is None
    assert launches == [1.0]
    assert torch.equal(value, evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton")["value"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads of a token side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slices of a packed projection": lambda x: torch.cat([x, x + 1, x - 1], -1)[..., : x.shape[-1]],
    "columns apart": lambda x: x.mT.contiguous().mT,
    "batch shared": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, launches: list[float]) -> None:
    inputs = {name: LAYOUTS[layout](x) for name, x in cast(attention(d_s=6, d_t=8), torch.bfloat16).items()}
    plain = {name: x.contiguous() for name, x in inputs.items()}
    found = evaluate(ATTENTION_MSE, inputs, LEARNED, backend="triton")
    assert_same(found, evaluate(ATTENTION_MSE, plain, LEARNED, backend="triton"))
    assert len(launches) == 4


def test_other_calls_take_other_kernels(launches: list[float]) -> None:
    def run(inputs: dict[str, Any], **keywords: Any) -> bool:
        launches.clear()
        ATTENTION_MSE(**inputs, backend="triton", **keywords)
        return bool(launches)

    narrow = cast(attention(), torch.bfloat16)
    assert run(narrow)
    assert run(narrow, is_causal=True, teacher_scale=0.0)
    assert run(narrow, attn_mask=torch.rand(2, 1, 1, 9) > 0.5)  # is a key mask
    assert not run(narrow, attn_mask=torch.rand(7, 9) > 0.5)
    assert not run(narrow, student_scale=0.0)
    assert not run(attention())  # float32
    assert not run(cast(attention(length=129, keys=8), torch.bfloat16))
    assert not run(cast(attention(d_t=65), torch.bfloat16))
    assert not run({name: x[:0] for name, x in narrow.items()})


def test_the_registered_ops() -> None:
    """Whoever traces sees two ops, which give what eager calls give."""
    inputs = padded(cast(attention(), torch.bfloat16))
    tensors = [inputs[name] for name in Attention._fields[:4]]
    tensors[:2] = [x.requires_grad_() for x in tensors[:2]]
    fields = Attention(*tensors, 0.4, 0.3, inputs["key_mask"], inputs["query_mask"], False, None)
    op = torch.ops.fastdistill.attention_mse_short.default
    torch.library.opcheck(op, (*fields, None, None, False), test_utils=("test_schema", "test_faketensor"))
    traced = torch.autograd.grad(op(*fields, None, None, False)[0], tensors[:2], torch.tensor(0.5))
    eager = torch.autograd.grad(attention_short.attention_short(fields, None, None), tensors[:2], torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))
