"""Tests caches of log-probabilities made elsewhere: what is written of any rows, and training on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tiny
import numpy as np
import pytest
import torch
from _oracle import error
from datasets import Dataset
from test_cache import QUICK, causal, command, distribution, history, rows
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from fastdistill import cli
from fastdistill.integrations import causal_lm_loss
from fastdistill.train import cache_from
from fastdistill.train.cache import check_cache, read_cache, read_manifest, weightless_teacher
from fastdistill.train.cache_from import write_cache_from
from fastdistill.train.data import PaddingCollator
from fastdistill.train.external import rows_from_vllm
from fastdistill.train.stages import CachedStage


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


def scored(teacher: Any = None, k: int = 60) -> list[dict[str, Any]]:
    """Returns rows with the k most probable next tokens of each position, the most probable first."""
    teacher = causal(2) if teacher is None else teacher
    found = []
    for row in rows():
        top = distribution(teacher, row)[0].topk(k)
        columns = {"topk_logprobs": top.values.tolist(), "topk_indices": top.indices.tolist()}
        found.append({"input_ids": row["input_ids"], "labels": row["input_ids"], **columns})
    return found


def write_from(folder: Path, given: Any, **options: Any) -> Path:
    write_cache_from(given, _tiny.tokenizer(), folder, **{"top_k": 5, "shard_bytes": 1500, **options})
    return folder


def position(logprobs: Any, indices: Any) -> dict[str, Any]:
    """Returns a row whose second of three positions has these entries."""
    return {"input_ids": [4, 5, 6], "topk_logprobs": [[-1.0], logprobs, None], "topk_indices": [[9], indices, None]}


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_rows_are_those_given(tmp_path: Path, kind: Any) -> None:
    given = scored(k=5)
    folder = write_from(
        tmp_path / "cache", ({name: kind(x) for name, x in row.items()} for row in given), teacher="big"
    )
    found = read_cache(folder, verify=True)
    assert found.column_names == ["input_ids", "labels", "length", "topk_logprobs", "topk_indices"]
    for row, cached in zip(given, found, strict=True):
        assert cached["input_ids"].tolist() == cached["labels"].tolist() == row["input_ids"]
        order = np.argsort(row["topk_indices"], axis=1)
        assert (cached["topk_indices"] == np.take_along_axis(np.array(row["topk_indices"]), order, 1)).all()
        expected = np.take_along_axis(np.array(row["topk_logprobs"]), order, 1)
        np.testing.assert_allclose(cached["topk_logprobs"], expected, atol=1e-3)
    manifest = read_manifest(folder)
    tokens = sum(len(row["input_ids"]) for row in given)
    about = {"top_k": 5, "classes": 60, "rows": 24, "tokens": tokens, "missing": 0, "hidden": []}
    assert about.items() <= manifest.items()
    assert manifest["teacher"] == {"name": "big", "vocab_size": 60}
    assert len(manifest["shards"]) > 3
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "manifest.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    check_cache(folder, student=causal(2, 16), tokenizer=_tiny.tokenizer())
    check_cache(folder, student=causal(2, 16, vocab_size=64))  # one vocabulary, padded
    with pytest.raises(ValueError, match=r"vocabulary has 59 tokens, that of .*cache 60; both should be one"):
        check_cache(folder, student=causal(2, 16, vocab_size=59))


def test_positions_may_have_any_number_of_entries(tmp_path: Path) -> None:
    row = {
        "input_ids": [4, 5, 6, 7],
        "topk_logprobs": [[-0.5, -3.0, -1.5, -2.0], [], None, [-np.inf, -0.25]],
        "topk_indices": [[50, 3, 20, 0], [], None, [2, 59]],
    }
    folder = write_from(tmp_path / "cache", [row], top_k=3)
    (cached,) = read_cache(folder)
    assert cached["topk_indices"].tolist() == [[0, 20, 50], [0, 0, 0], [0, 0, 0], [2, 59, 0]]
    nothing = [-np.inf] * 3
    expected = [[-2.0, -1.5, -0.5], nothing, nothing, [-np.inf, -0.25, -np.inf]]
    np.testing.assert_allclose(cached["topk_logprobs"], expected, atol=1e-3)
    assert read_manifest(folder)["missing"] == 2


def test_bytes_of_a_token(tmp_path: Path) -> None:
    """Everything is counted: files and offsets of Arrow, input_ids and labels, 50 of 151936 classes."""
    rng, row = np.random.default_rng(0), {"input_ids": [7] * 1024, "labels": [7] * 1024}
    row["topk_logprobs"] = np.log(rng.dirichlet(np.ones(50), 1024))
    row["topk_indices"] = np.stack([rng.choice(151936, 50, replace=False) for _ in range(1024)])
    for bits, most in ((8, 160), (16, 210)):
        write_cache_from([row] * 8, 151936, tmp_path / f"{bits}", top_k=50, logprobs_bits=bits)
        size = sum(shard["bytes"] for shard in read_manifest(tmp_path / f"{bits}")["shards"])
        assert size / (8 * 1024) < most


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write_cache_from(scored(), 60, tmp_path / "cache", top_k=2)
    assert read_manifest(tmp_path / "cache")["tokenizer"] is None
    check_cache(tmp_path / "cache", student=causal(2, 16), tokenizer=_tiny.tokenizer())


def test_rows_are_written_while_they_come(tmp_path: Path) -> None:
    written: list[int] = []

    def stream() -> Iterator[dict[str, Any]]:
        for row in scored(k=5):
            written.append(len(list((tmp_path / "cache.partial").glob("*.arrow"))))
            yield row

    write_from(tmp_path / "cache", stream())
    assert written[0] == 0
    assert written[-1] == len(read_manifest(tmp_path / "cache")["shards"]) - 1 > 2


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stream(last: BaseException) -> Iterator[dict[str, Any]]:
        yield from scored(k=5)
        raise last

    for interruption in (KeyboardInterrupt(), ValueError("no")):
        with pytest.raises(type(interruption)):
            write_from(tmp_path / "cache", stream(interruption))
        assert not list(tmp_path.iterdir())
    write_from(tmp_path / "cache", scored(k=5))
    with pytest.raises(FileExistsError, match="cache is not empty; pass overwrite=True"):
        write_from(tmp_path / "cache", scored(k=5))
    with pytest.raises(ValueError, match="rows is empty"):
        write_from(tmp_path / "cache", [], overwrite=True)
    assert len(read_cache(tmp_path / "cache")) == 24  # as before
    write_from(tmp_path / "cache", scored(k=5)[:2], overwrite=True)
    assert len(read_cache(tmp_path / "cache")) == 2
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "00000.arrow").touch()
    with pytest.raises(FileExistsError, match="which an iterable cannot continue; pass overwrite=True to drop it"):
        write_from(tmp_path / "other", scored(k=5))
    write_from(tmp_path / "other", scored(k=5), overwrite=True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"input_ids": [4], "topk_logprobs": [[-1.0]]}, "row 1: it has the columns .*; it should have topk_indices"),
        ({**position([-1.0], [2]), "labels": [1, 2, 3]}, "row 1: it has the columns .*; the rows before have"),
        ({**position([-1.0], [2]), "input_ids": [4, 5]}, "row 1: topk_.* has 3 entries; input_ids has 2"),
        ({"input_ids": [], "topk_logprobs": [], "topk_indices": []}, "row 1: it has no tokens; leave it out"),
        ({**position([-1.0], [2]), "input_ids": [4, 5, 60]}, "row 1: input_ids should be 0 to 59"),
        (position([-1.0, -2.0], [2]), "row 1: position 1 has 2 topk_logprobs and 1 topk_indices"),
        (position([-1.0], None), "row 1: position 1 has 1 topk_logprobs and 0 topk_indices"),
        (position([0.5], [2]), "position 1 has the log-probability 0.5; it should be at most 0"),
        (position([np.nan], [2]), "position 1 has the log-probability nan; it should be at most 0"),
        (position([-1.0], [60]), "position 1 has the class 60; it should be 0 to 59"),
        (position([-1.0, -2.0], [-1, 3]), "position 1 has the class -1; it should be 0 to 59"),
        (position([-1.0, -2.0], [3, 3]), "position 1 has class 3 twice"),
        (position([-0.2, -0.2], [2, 3]), "probabilities of position 1 sum to 1.64; .* should be natural logarithms"),
        (position(["a"], [3]), "row 1: "),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_from(tmp_path / "cache", [position([-1.0], [2]), given])
    assert not list(tmp_path.iterdir())


def test_columns_that_change_their_type(tmp_path: Path) -> None:
    given = [{**position([-1.0], [2]), "note": 1}, {**position([-1.0], [2]), "note": "x"}]
    for shard_bytes in (1, 10_000):  # in different files, and in one
        with pytest.raises(ValueError, match=r"rows \d to 1: their columns have different types"):
            write_from(tmp_path / "cache", given, shard_bytes=shard_bytes)
        with pytest.raises(ValueError, match=r"row 1: it has the columns \['input_ids'\]; the rows before have .*note"):
            write_from(tmp_path / "cache", [given[0], position([-1.0], [2])], shard_bytes=shard_bytes)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    for options, message in (
        ({"top_k": 61}, "top_k is 61; it should be 1 to 60"),
        ({"logprobs_bits": 4}, "logprobs_bits is 4; it should be 8 or 16"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            write_from(tmp_path / "cache", [], **options)
    assert not list(tmp_path.iterdir())


def test_log_probabilities_at_the_wrong_position_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM always lists the token itself, so that rows that nobody moved list every position's own token."""
    right = list(rows_from_vllm(scored_by_vllm(causal(2), 3)))
    wrong = [
        {**row, **{name: [None, *row[name][:-1]] for name in ("topk_logprobs", "topk_indices")}} for row in right
    ]  # fmt: skip
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for given, is_noticed in ((right, False), (wrong, True)):
        caplog.clear()
        write_from(tmp_path / "cache", given, overwrite=True)
        assert ("move both columns by one" in caplog.text) is is_noticed


def test_rows_made_by_hand_are_padded() -> None:
    """Rows that `write_cache_from` never saw, with lists of any length, as datasets hands them out."""
    given = [
        {"input_ids": [4, 5], "topk_logprobs": [[-1.0, -0.5], None], "topk_indices": [[7, 3], None]},
        {"input_ids": [6], "topk_logprobs": [[-2.0]], "topk_indices": [[9]]},
    ]
    batch = PaddingCollator(_tiny.tokenizer())(list(Dataset.from_list(given)))
    assert batch["topk_indices"].tolist() == [[[7, 3], [0, 0]], [[9, 0], [0, 0]]]
    nothing = -np.inf
    assert batch["topk_logprobs"].tolist() == [[[-1.0, -0.5], [nothing] * 2], [[-2.0, nothing], [0, 0]]]
    assert not batch["attention_mask"][1, 1]  # the last position is padding


# -- training ------------------------------------------------------------------------------------------------


def scored_by_vllm(teacher: Any, k: int) -> list[dict[str, Any]]:
    """Returns what vLLM gives for prompts: for each token but the first, the k most probable ones and itself."""
    found = []
    for row in rows():
        ids, (logp, _) = row["input_ids"], distribution(teacher, row)
        entries: list[Any] = [None]
        for i in range(1, len(ids)):
            top = logp[i - 1].topk(k).indices.tolist()
            entries.append({token: {"logprob": logp[i - 1, token].item()} for token in (ids[i], *top)})
        found.append({"prompt_token_ids": ids, "prompt_logprobs": entries})
    return found


@pytest.mark.parametrize("bits, within", [(16, 1e-4), (8, 1e-2)])
def test_loss_and_gradients_are_those_of_the_live_teacher_in_float64(tmp_path: Path, bits: int, within: float) -> None:
    teacher, student = causal(2).double(), causal(2, 16, seed=1).double()
    folder = write_from(tmp_path / "cache", rows_from_vllm(scored_by_vllm(teacher, 60)), top_k=60, logprobs_bits=bits)
    found = read_cache(folder)
    batch = PaddingCollator(_tiny.tokenizer())([found[i] for i in range(6)])
    loss = causal_lm_loss(student, None, {**batch, "topk_logprobs": batch["topk_logprobs"].double()})
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    total, tokens = torch.zeros(()), 0
    for row in rows().select(range(6)):
        ids = torch.tensor([row["input_ids"]])
        ours, theirs = (model(ids).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
        total = total + (theirs.exp() * (theirs - ours)).sum()
        tokens += ids.shape[1] - 1
    truths = torch.autograd.grad(total / tokens, list(student.parameters()))
    assert error(loss, total / tokens) < within
    flat = [torch.cat([x.flatten() for x in each]) for each in (gradients, truths)]
    assert error(*flat) < within


def test_a_stage_trains_without_a_teacher_of_ours(tmp_path: Path) -> None:
    folder = write_from(tmp_path / "cache", rows_from_vllm(scored_by_vllm(causal(2), 8)), top_k=8)
    assert weightless_teacher(folder) is None
    stage = CachedStage(cache=folder, epochs=10, batch_size=8, learning_rate=1e-2, arguments=QUICK)
    stage.run(causal(2, 16, seed=1), None, _tiny.tokenizer(), tmp_path / "out")
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"the terms \['hidden'\] need a teacher"):
        CachedStage(cache=folder, terms=("hidden",)).run(causal(2), None, _tiny.tokenizer(), tmp_path / "other")


def test_the_command_trains_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_from(tmp_path / "cache", rows_from_vllm(scored_by_vllm(causal(2), 8)), top_k=8)
    causal(2, 16, seed=1).save_pretrained(tmp_path / "student")
    _tiny.tokenizer().save_pretrained(tmp_path / "student")
    argv = command("train-cached", "--cache", folder, "--output", tmp_path / "out", "--max-steps", 2, "--student")
    assert cli.main([*argv, str(tmp_path / "student")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16
    (tmp_path / "student.json").write_text(json.dumps({"num_hidden_layers": 1}))
    for more, message in (
        ((tmp_path / "student.json",), "a cache made elsewhere has no teacher's config: pass a checkpoint"),
        ((tmp_path / "student", "--teacher", tmp_path / "student"), "was made elsewhere, without a teacher"),
    ):
        again = [*argv[:4], str(tmp_path / "again"), *argv[5:], *command(*more)]
        assert cli.main(again) == 2
        assert message in capsys.readouterr().err


def test_nothing_but_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_from, "on_main", lambda function: None)
    write_from(tmp_path / "cache", iter(scored(k=5)))
    assert not list(tmp_path.iterdir())
