"""Compares the losses of a vocabulary that is sharded over 2 and 3 processes with those of the whole vocabulary.

The processes run tests/_shards.py. The truth is the definition in float64; the bound is twice the error of the
definition in the dtype of the call, plus a few units in the last place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _oracle import TINY
from _processes import ROOT, TORCHRUN, run

Results = list[dict[str, Any]]  # one of each rank


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: Path = tmp_path_factory.mktemp("shards")
    command = [*TORCHRUN[:-1], request.param, ROOT / "tests" / "_shards.py", folder]
    done = run(command, folder, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(request.param)]


def of_two(results: Results) -> Results:
    if len(results) != 2:
        pytest.skip("runs with 2 processes")
    return results


@pytest.mark.parametrize(
    "call", ["float64", "float32", "bfloat16", "reference", "triton float64", "triton float32", "close"]
)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(results: Results, call: str) -> None:
    tiny = TINY[torch.float64 if "64" in call or call == "reference" else torch.float32]
    for rank in results:
        cases = rank["accuracy"].get(call, {})
        assert len(cases) >= 20 or len(results) > 2
        for case, errors in cases.items():
            usual, alike = errors["usual"], errors["hidden alike"]
            assert alike == 0, (case, "the gradient of the hidden states differs between processes")
            for name, error in errors.items():
                assert error <= 2 * usual + tiny or name == "usual", (case, name, error, usual)


def test_mistakes_are_refused_on_all_processes_alike(results: Results) -> None:
    first, *others = (rank["refusals"] for rank in results)
    assert all(other == first for other in others)
    found = first
    assert found["widths"].startswith("ValueError: student_logits has [3, 4")
    assert "pass vocab_size" in found["widths"]
    assert "student_logits has [3, 4" in found["compiled"]
    assert "the logits have 0 classes" in found["none"]
    assert "between 1 and the" in found["vocab_size"]
    assert "of the first 6 classes" in found["cut"]
    assert found["keyword"].startswith("TypeError")
    assert found["keyword"].endswith("topk_soft_cross_entropy has no keyword teacher_softcap")
    assert "placements" in found["replicated"]
    assert "should both be DTensors, or both plain shards" in found["mixed"]
    assert found["label"].startswith("IndexError: labels holds 50")
    assert "backend is 'cuda'" in found["cuda"]
    assert "requires_grad=True" in found["teacher"]


def test_a_call_gives_the_same_bits_again(results: Results) -> None:
    for rank in results:
        assert all(rank["again"].values()), rank["again"]


def test_dtensors_give_group_and_shard(results: Results) -> None:
    for rank in of_two(results):
        found = dict(rank["dtensors"])
        assert found.pop("kind") == "DTensor"
        assert found.pop("placements")[0].is_shard(1)
        assert max(found.values()) < 1e-13, found


def test_memory_does_not_grow_with_the_rows_times_the_classes(results: Results) -> None:
    for rank in of_two(results):
        logits = 4 * 32768 * 512  # bytes of one side's shard
        for name in ("linear_kl_div", "linear_jsd", "linear_topk_soft_cross_entropy"):
            assert rank["cost"][f"{name} bytes"] < logits / 2


def test_a_chunk_sends_one_or_two_small_collectives(results: Results) -> None:
    """Sums alone, 8 numbers a row; JSD adds two more numbers. The gradient of the hidden states follows at the end.

    The sums of a chunk are on their way while the logits of the next one are computed.
    """
    rows, width, chunks = 32768, 8, 32
    for rank in of_two(results):
        for name, more in (("linear_kl_div", 0), ("linear_jsd", 2)):
            sizes, *sent, last = rank["cost"][name]
            assert sizes == ("all_gather", 2)
            assert last == ("all_reduce", rows * width)
            step = ["wait", "all_reduce"] if more else ["wait"]
            assert [kind for kind, _ in sent] == ["all_gather", *(["all_gather", *step] * (chunks - 1)), *step]
            assert sum(elements for _, elements in sent) == rows * (8 + more)


def test_causal_lm_loss_takes_sharded_heads_without_logits(results: Results) -> None:
    for rank in of_two(results):
        found = rank["language_models"]
        assert len(found) == 15
        assert any("the teacher's head is sharded over processes, and the student's is not" in name for name in found)
        assert max(found.values()) < 5e-6, found
