"""Compares the cost model with figures worked out by hand and with PyTorch's own counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cost, eager
from fastdistill.ops import attention_mse

H200 = cost.CARDS["H200"]


def test_the_floors_are_those_of_the_goals() -> None:
    """The goals rest on 1.44 MFLOP and 1.8 ns per token, on 21.5 TFLOP and 27 ms, and on 3 passes over logits."""
    hidden = cost.linear_mse(32768, 312, 768, torch.bfloat16)
    assert hidden.least.flops / 32768 == pytest.approx(1.44e6, rel=0.01)
    assert hidden.least.seconds(H200) / 32768 == pytest.approx(1.8e-9, rel=0.02)
    head = cost.linear_logits("kl_div", 8192, 2048, 4096, 128256, torch.bfloat16)
    assert head.least.flops == pytest.approx(21.5e12, rel=0.01)
    assert head.least.seconds(H200) == pytest.approx(27e-3, rel=0.02)
    rows = cost.logits("kl_div", 8192, 131072, torch.bfloat16)
    assert rows.least.memory == 3 * 8192 * 131072 * 2
    assert rows.least.seconds(H200) / rows.floor(H200) == pytest.approx(0.6)


@pytest.mark.parametrize("cost_of_op", cost.examples(), ids=lambda c: f"{c.op} {c.shape}")
@pytest.mark.parametrize("card", cost.CARDS.values(), ids=lambda c: c.name)
def test_no_floor_is_below_the_least_cost_of_its_op(cost_of_op: cost.Cost, card: cost.Card) -> None:
    assert 0 < cost_of_op.least.seconds(card) <= cost_of_op.floor(card) * (1 + 1e-9)


def test_instructions_and_partial_sums_bound_the_floor() -> None:
    """An H200 issues 132 x 128 x 1.755e9 thread instructions a second; JSD's 141 a class take 5.1 ms, not 3.5."""
    rows = cost.logits("jsd", 8192, 131072, torch.bfloat16)
    assert rows.floor(H200) == pytest.approx(141 * 8192 * 131072 / 29.65e12, rel=0.01)
    assert rows.floor(H200) > rows.steps[0].memory / H200.memory
    # One split of 384 groups of two 90 x 90 float32 matrices; 5 splits of 48 groups.
    for batch, length, partial in ((32, 512, 2 * 384 * 8100 * 4), (4, 4096, 5 * 2 * 48 * 8100 * 4)):
        gram, sums, _ = cost.attention_mse(batch, 12, length, 26, 64, torch.bfloat16).steps
        assert sums.memory == partial
        assert gram.memory == partial + 2 * batch * 12 * length * 90 * 2


@pytest.mark.parametrize("groups,rows,dims", [(48, 4096, (26, 64)), (384, 512, (26, 64)), (12, 65536, (64, 64))])
def test_rows_are_split_as_the_kernel_splits_them(groups: int, rows: int, dims: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    from fastdistill.kernels import attention_mse

    plan = attention_mse.plan("sm_90", cost.MULTIPROCESSORS, False, groups, rows, *dims)
    assert cost.splits(groups, rows, *dims) == plan.splits


def test_a_small_call_takes_as_long_as_the_host() -> None:
    small, large = (cost.attention_mse(32, 12, length, 26, 64, torch.bfloat16) for length in (128, 65536))
    assert small.floor(H200) < small.host == small.predicted(H200)
    assert large.host < large.floor(H200) == large.predicted(H200)


def test_the_limit_of_resident_rows_is_that_of_the_kernel() -> None:
    pytest.importorskip("triton")
    from fastdistill.kernels import logits

    assert logits.RESIDENT == cost.RESIDENT


def test_the_least_operations_are_those_pytorch_counts() -> None:
    """Compares the least operations with PyTorch's count of the eager formulas, forward and backward."""
    x, w, t = torch.randn(64, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True), torch.randn(64, 40)
    assert _flops(lambda: eager.linear_mse(x, w, t, w.new_zeros(40))) == _least(
        cost.linear_mse(64, 24, 40, torch.float32)
    )
    head, teacher, teacher_head = torch.randn(50, 24, requires_grad=True), torch.randn(64, 32), torch.randn(50, 32)
    assert _flops(lambda: eager.kl_div(x @ head.mT, teacher @ teacher_head.mT)) == _least(
        cost.linear_logits("kl_div", 64, 24, 32, 50, torch.float32)
    )
    query, key = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(2))
    teacher_query, teacher_key = torch.randn(2, 3, 20, 6), torch.randn(2, 3, 20, 6)
    # Eager keeps the scores for the backward; the model computes them again.
    scores = 2 * (2 * 3 * 20 * 20) * (8 + 6)
    assert _flops(lambda: eager.attention_kl(query, key, teacher_query, teacher_key)) + scores == _least(
        cost.attention_kl(2, 3, 20, 8, 6, torch.float32)
    )


def test_packed_sequences_cost_what_a_batch_of_them_does() -> None:
    packed = cost.attention_packed("attention_kl", 5, 3, 20, 8, 6, torch.float32)
    batch = cost.attention_kl(5, 3, 20, 8, 6, torch.float32)
    assert packed.least == batch.least
    assert [step.memory for step in packed.steps] == [step.memory for step in batch.steps]
    mse = cost.attention_packed("attention_mse", 5, 3, 200, 8, 6, torch.float32)
    batch = cost.attention_mse(5, 3, 200, 8, 6, torch.float32)
    assert (mse.least, mse.steps) == (batch.least, batch.steps)


def test_the_scan_is_taken_where_the_model_says_that_tiles_take_about_as_long() -> None:
    """Tiles take 4 / 5 of the scan's predicted time at SCAN_ROWS, as they do not issue at every cycle."""
    sizes = 8, 12, attention_mse.SCAN_ROWS, 64, 64, torch.bfloat16
    scan = cost.attention_packed("attention_mse", *sizes, causal=True).floor(H200)
    issued = cost.INSTRUCTIONS["mse in ranges"]
    pairs = 8 * 12 * attention_mse.SCAN_ROWS**2 / 2
    tiles = pairs * (issued["d_query"] + issued["d_key"]) / H200.issue
    assert 0.7 < tiles / scan < 0.95


@pytest.mark.parametrize("width", [1, 7, 30])
def test_the_pairs_of_a_window(width: int) -> None:
    position = torch.arange(30)
    allowed = (position <= position[:, None]) & (position > position[:, None] - width)
    assert cost.window_pairs(30, width) == allowed.sum()


def _flops(loss: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def _least(of: cost.Cost) -> float:
    return of.least.flops
