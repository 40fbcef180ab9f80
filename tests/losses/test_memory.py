"""Measures the peak memory of a forward and backward beyond the inputs, from the profiler's allocations and releases.

The peak should grow linearly with the tokens, never with L x S or N x V. It includes the gradients.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import (
    ATTENTION_KL,
    ATTENTION_KL_CAUSAL,
    ATTENTION_MSE,
    ATTENTION_MSE_CAUSAL,
    ATTENTION_OPS,
    LINEAR_LOGITS_OPS,
    LINEAR_MSE,
    LINEAR_TOPK_OPS,
    LOGITS_OPS,
    TOPK_OPS,
    Op,
    attention,
    hidden,
    linear,
    linear_topk,
    logits,
    topk,
    with_labels,
)
from _oracle import cast, evaluate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_bytes(call: Callable[[], Any]) -> int:
    """Returns the most bytes that `call` had allocated at once."""
    if torch.cuda.is_available():
        call()  # warm-up: libraries keep workspaces, cuBLAS 32 MiB
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # memory of earlier calls that is released meanwhile would count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative for a release
        peak = max(peak, held)
    assert peak, "the profiler saw no allocation"
    return peak


def peak(op: Op | Callable[..., Tensor], inputs: dict[str, Any], learned: tuple[str, ...], **keywords: Any) -> int:
    return peak_bytes(lambda: evaluate(op, inputs, learned, **keywords))


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def test_the_measure_sees_a_temporary() -> None:
    x = torch.ones(MIB // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    assert peak_bytes(lambda: (x + 1).sum()) == pytest.approx(MIB, rel=0.01)
    assert peak_bytes(lambda: (x + 1) * (x + 2)) == pytest.approx(3 * MIB, rel=0.01)


# -- attention -------------------------------------------------------------------------------------------------


def long(length: int) -> dict[str, Any]:
    return attention(1, 2, length, length, 26, 64, student_kv=2, teacher_kv=2)


@pytest.mark.parametrize("op", ATTENTION_OPS, ids=str)
@pytest.mark.parametrize("dense_mask", [False, True], ids=["no-dense-mask", "dense-mask"])
def test_attention_memory_is_linear_in_the_length(op: Op, dense_mask: bool, backend: str) -> None:
    short, length = (512, 2048) if dense_mask or op.name == "attention_kl" else (1024, 4096)
    peaks = []
    for n in (short, length):
        inputs = long(n)
        if dense_mask:
            inputs["attn_mask"] = torch.rand(n, n) > 0.3
        peaks.append(peak(op, inputs, op.learned, backend=backend))
    scores = 2 * 4 * length**2
    assert peaks[1] <= 4.2 * peaks[0]
    assert peaks[1] - peaks[0] < 0.1 * scores
    if length == 2048:
        assert peak(op.textbook, inputs, op.learned) > 4 * scores


@pytest.mark.parametrize("op", [ATTENTION_MSE, ATTENTION_MSE_CAUSAL], ids=str)
def test_shared_keys_are_not_repeated(op: Op, backend: str) -> None:
    """With 16 query heads on one key head, keys and their gradients stay one head wide."""
    length = 8192
    inputs = attention(1, 16, length, length, 16, 16, student_kv=1, teacher_kv=1)
    gradients = size(inputs["student_query"], inputs["student_key"])
    repeated = 16 * size(inputs["student_key"], inputs["teacher_key"])
    assert peak(op, inputs, op.learned, backend=backend) < gradients + 0.5 * repeated


@pytest.mark.parametrize("op", [ATTENTION_KL, ATTENTION_KL_CAUSAL], ids=str)
def test_a_padded_batch_needs_no_dense_mask(op: Op, backend: str) -> None:
    plain = attention(4, 2, 512, 512, 26, 64, student_kv=2, teacher_kv=2)
    padded = {**plain, **op.some_masked(plain)}
    unmasked, masked = (peak(op, x, op.learned, backend=backend) for x in (plain, padded))
    assert masked < unmasked + 4 * 512 * 512  # not even one (B, L, S) of bools


# -- hidden states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_mse_never_stores_the_projection(reduction: str, backend: str) -> None:
    tokens = 8192
    inputs = hidden((tokens,), 48, 256)
    projected = 4 * tokens * 256
    gradients = size(*(inputs[name] for name in LINEAR_MSE.learned))
    # A gradient may exist twice: as computed, and scaled by the upstream gradient.
    found = peak(LINEAR_MSE, inputs, LINEAR_MSE.learned, backend=backend, reduction=reduction)
    assert found - 2 * gradients < 0.25 * projected
    assert peak(LINEAR_MSE.textbook, inputs, LINEAR_MSE.learned) > 2 * projected


# -- logits ----------------------------------------------------------------------------------------------------

V = 30522


@pytest.mark.parametrize("op", [*LOGITS_OPS, *TOPK_OPS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_losses_hold_nothing_but_the_gradient(op: Op, dtype: torch.dtype, backend: str) -> None:
    inputs = topk((2, 101), V) if op in TOPK_OPS else logits((2, 101), V)
    inputs = cast(with_labels(inputs, 31), dtype)
    # Causal models cut off the last token's logits, which leaves the others non-contiguous.
    inputs = {name: x[:, :-1] for name, x in inputs.items()}
    gradient = size(inputs["student_logits"])
    keywords = {"backend": backend, "alpha": 0.5}
    assert peak(op, inputs, op.learned, **keywords) < 1.1 * gradient + 4 * MIB
    per_row = {"reduction": "none", "upstream": torch.rand(2, 100)}
    assert peak(op, inputs, op.learned, **keywords, **per_row) < 1.1 * gradient + 4 * MIB
    assert peak_bytes(lambda: op(**inputs, **keywords)) < 0.1 * gradient + 4 * MIB  # no gradient is needed


LINEAR = [op for op in [*LINEAR_LOGITS_OPS, *LINEAR_TOPK_OPS] if "vocab_size" not in op.options]


def vocabulary(op: Op, tokens: int, classes: int) -> dict[str, Any]:
    return linear_topk((tokens,), classes, 8, 64) if op in LINEAR_TOPK_OPS else linear((tokens,), classes, 64, 96)


@pytest.mark.parametrize("op", LINEAR, ids=str)
def test_linear_losses_at_2048_tokens_need_a_fraction_of_eager(op: Op, backend: str) -> None:
    found = peak(op, vocabulary(op, 2048, V), op.learned, backend=backend)
    # Eager's peak grows by the same for each token, so it is extrapolated: 2048 tokens would take gigabytes.
    few, more = (peak(op.textbook, vocabulary(op, tokens, V), op.learned) for tokens in (16, 32))
    eager = few + (more - few) / 16 * (2048 - 16)
    assert eager > 2 * 4 * 2048 * V
    assert found < 0.15 * eager


@pytest.mark.parametrize("op", LINEAR, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_losses_grow_by_hidden_states_alone(op: Op, reduction: str, backend: str) -> None:
    """More tokens cost their gradient and a few numbers each, however many classes there are."""
    classes, peaks, upstream = 500, [], None
    for tokens in (2048, 6144):
        upstream = torch.rand(tokens) if reduction == "none" else None
        inputs = vocabulary(op, tokens, classes)
        peaks.append(peak(op, inputs, op.learned, backend=backend, reduction=reduction, upstream=upstream))
    gradient_of_a_token = 4 * 64
    assert peaks[1] - peaks[0] < 4096 * (2 * gradient_of_a_token + 128)


@pytest.mark.parametrize("op", LINEAR, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_of_linear_losses_need_no_copies(op: Op, reduction: str, backend: str) -> None:
    """Rows that count are gathered chunk by chunk, never all hidden states at once."""
    tokens, upstream = 4096, torch.rand(4096) if reduction == "none" else None
    inputs, few = vocabulary(op, tokens, 500), torch.rand(tokens) < 0.8
    keywords = {"backend": backend, "reduction": reduction, "upstream": upstream}
    plain = peak(op, inputs, op.learned, **keywords)
    if backend == "torch":
        assert peak(op, {**inputs, "mask": few | True}, op.learned, **keywords) < plain + 32 * tokens
    chunk = size(*(inputs[name][:1024] for name in ("student", "teacher") if name in inputs))
    lists = size(*(inputs[name] for name in inputs if name.startswith("topk")))
    assert peak(op, {**inputs, "mask": few}, op.learned, **keywords) < plain + chunk + lists + 64 * tokens
