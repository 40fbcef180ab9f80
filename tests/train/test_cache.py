"""Tests offline teachers: files against the live teacher, damage, resuming, and training without a teacher."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _tiny
import numpy as np
import pytest
import torch
from _oracle import error
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from test_cli import STUDENT, fails
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from fastdistill import cli
from fastdistill.recipes.glue import get_task
from fastdistill.train import cache
from fastdistill.train.cache import check_cache, read_cache, read_manifest, warn_of_lost_mass, write_cache
from fastdistill.train.capture import capture
from fastdistill.train.data import PaddingCollator
from fastdistill.train.model import DistillationModel
from fastdistill.train.objective import Objective
from fastdistill.train.stages import CachedStage
from fastdistill.train.trainer import DistillationTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUICK = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolates each test from the cached data sets and process states of others."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def causal(layers: int = 4, width: int = 24, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_tiny.config("llama", layers, width, **options)).eval()


def masked(layers: int = 4, width: int = 24, seed: int = 0, **options: Any) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return BertForMaskedLM(_tiny.config("bert", layers, width, **NO_DROPOUT, **options)).eval()


def rows(count: int = 24) -> Dataset:
    return _tiny.dataset(count).remove_columns("labels")


def write(folder: Path, teacher: PreTrainedModel | None = None, **options: Any) -> Path:
    """Writes a cache of the 24 rows, in several shards."""
    arguments = {"batch_size": 7, "shard_bytes": 3000, **options}
    dataset, tokenizer = arguments.pop("dataset", rows()), arguments.pop("tokenizer", _tiny.tokenizer())
    write_cache(dataset, causal() if teacher is None else teacher, tokenizer, folder, **arguments)
    return folder


def distribution(
    teacher: PreTrainedModel, row: dict[str, Any], hidden: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Returns the teacher's log-probabilities (L, V), float64, and hidden states (L, d) for one row alone."""
    with torch.no_grad():
        out = teacher(torch.tensor([row["input_ids"]]), output_hidden_states=True)
    return out.logits[0].double().log_softmax(-1), [out.hidden_states[i][0] for i in hidden]


def is_rounded(stored: Tensor, exact: Tensor, bits: int = 16) -> bool:
    """Returns whether log-probabilities (L, k) are as near to the exact ones as the codes of so many bits allow."""
    step = 1.5 * (exact.amax(-1) - exact.amin(-1)) / (2**bits - 2)  # the widest; the offset may move by half of it
    return bool(((stored - exact).abs() <= step[:, None] + 1e-5).all())


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, bits", [(causal, 8), (causal, 16), (masked, 8)])
def test_a_row_has_what_the_teacher_says_of_it_alone(tmp_path: Path, make: Any, bits: int) -> None:
    teacher = make()
    folder = write(tmp_path / "cache", teacher.train(), top_k=5, hidden=[4, 0, 2], logprobs_bits=bits)
    assert not teacher.training
    found = read_cache(folder, verify=True)
    assert len(read_manifest(folder)["shards"]) > 4
    assert [row.tolist() for row in found["input_ids"]] == rows()["input_ids"]
    assert found["length"][:].tolist() == [len(row) for row in rows()["input_ids"]]
    assert found.features["hidden_0"].dtype == "float16"
    for row, cached in zip(rows(), found, strict=True):
        truth, states = distribution(teacher, row, (0, 2, 4))
        logprobs, indices = (torch.tensor(cached[name]) for name in ("topk_logprobs", "topk_indices"))
        assert logprobs.shape == indices.shape == (len(row["input_ids"]), 5)
        assert (logprobs.dtype, indices.dtype) == (torch.float32, torch.int64)
        assert torch.equal(indices, truth.topk(5).indices.sort(-1).values)
        assert is_rounded(logprobs, truth.gather(-1, indices), bits)
        assert error(logprobs.double().logsumexp(-1).exp(), truth.topk(5).values.logsumexp(-1).exp()) < 1e-6
        for i, state in zip((0, 2, 4), states, strict=True):
            assert error(torch.tensor(cached[f"hidden_{i}"]), state) < 2**-11
    first, second = (torch.tensor(found[i]["hidden_4"][:4]) for i in (0, 1))
    assert error(first, second) > 0.1  # another row's values would not pass


def test_a_classifiers_logits_and_columns(tmp_path: Path) -> None:
    teacher, data = _tiny.classifier(4, 24), _tiny.dataset(20)
    found = read_cache(write(tmp_path / "cache", teacher, dataset=data, hidden=[3], shard_bytes=2000))
    assert found.column_names == [*data.column_names, "length", "teacher_logits", "hidden_3"]
    assert found["labels"][:].tolist() == data["labels"]
    for row, cached in zip(data, found, strict=True):
        with torch.no_grad():
            out = teacher(torch.tensor([row["input_ids"]]), output_hidden_states=True)
        assert error(torch.tensor(cached["teacher_logits"]), out.logits[0]) < 1e-5
        assert error(torch.tensor(cached["hidden_3"]), out.hidden_states[3][0]) < 2**-11


def test_classes_beyond_the_vocabulary_take_no_part(tmp_path: Path) -> None:
    teacher = causal(vocab_size=64)
    folder = write(tmp_path / "cache", teacher, top_k=60)
    for row, cached in zip(rows(), read_cache(folder), strict=True):
        with torch.no_grad():
            truth = teacher(torch.tensor([row["input_ids"]])).logits[0, :, :60].double().log_softmax(-1)
        logprobs = torch.tensor(cached["topk_logprobs"])
        assert is_rounded(logprobs, truth.gather(-1, torch.tensor(cached["topk_indices"])))
        assert error(logprobs.exp().sum(-1), torch.ones(len(logprobs))) < 1e-6
    with pytest.raises(ValueError, match="top_k is 61; it should be 1 to 60"):
        write(tmp_path / "other", teacher, top_k=61)


def test_padding_of_the_tokenizer_on_the_left_changes_nothing(tmp_path: Path) -> None:
    """GPT-2 counts positions from the first column, even if that is padding."""
    torch.manual_seed(0)
    teacher, tokenizer = GPT2LMHeadModel(_tiny.config("gpt2", 2)).eval(), _tiny.tokenizer()
    tokenizer.padding_side = "left"
    found = read_cache(write(tmp_path / "cache", teacher, tokenizer=tokenizer, top_k=4))
    for row, cached in zip(rows(), found, strict=True):
        truth, _ = distribution(teacher, row)
        assert is_rounded(torch.tensor(cached["topk_logprobs"]).sort(-1, descending=True).values, truth.topk(4).values)
    batch = PaddingCollator(tokenizer)([found[i] for i in range(3)])  # on the right, as the teacher saw them
    assert tokenizer.padding_side == "left"
    for i in range(3):
        length = len(rows()[i]["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == rows()[i]["input_ids"]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert torch.equal(batch["topk_logprobs"][i, :length], torch.tensor(found[i]["topk_logprobs"]))
        assert torch.equal(batch["topk_indices"][i, :length], torch.tensor(found[i]["topk_indices"]))
        assert not batch["topk_logprobs"][i, length:].any()
    plain = PaddingCollator(tokenizer)(rows().select(range(3)).select_columns(["input_ids"]).to_list())
    assert plain["input_ids"][0, -len(rows()[0]["input_ids"]) :].tolist() == rows()[0]["input_ids"]


def test_labels_of_tokens_are_padded_beside_the_targets(tmp_path: Path) -> None:
    data = rows().map(lambda row: {"labels": row["input_ids"]})
    found = read_cache(write(tmp_path / "cache", causal(), dataset=data, top_k=4))
    batch = PaddingCollator(_tiny.tokenizer())([found[i] for i in range(3)])
    for i in range(3):
        ids = rows()[i]["input_ids"]
        assert batch["labels"][i].tolist() == ids + [-100] * (batch["input_ids"].shape[1] - len(ids))


def test_the_manifest_says_of_whom_and_of_what(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("w0 w1\n")
    manifest = read_manifest(write(tmp_path / "cache", top_k=3, hidden=[1], files=[data]))
    assert {"format": 2, "top_k": 3, "classes": 60, "hidden": [1], "rows": 24}.items() <= manifest.items()
    assert manifest["tokens"] == sum(map(len, rows()["input_ids"]))
    [file] = manifest["data"]["files"]
    assert file == {"name": "data.txt", "bytes": 6, "sha256": hashlib.sha256(b"w0 w1\n").hexdigest()}
    assert sum(shard["rows"] for shard in manifest["shards"]) == 24
    teachers = [manifest["teacher"]]
    for teacher in (causal(), causal(seed=1), causal(rope_theta=500.0)):
        teachers.append(cache.identity(teacher))
    assert teachers[0] == teachers[1]
    assert teachers[0]["weights_sha256"] != teachers[2]["weights_sha256"]
    assert teachers[0]["config_sha256"] == teachers[2]["config_sha256"]
    assert teachers[0]["weights_sha256"] == teachers[3]["weights_sha256"]
    assert teachers[0]["config_sha256"] != teachers[3]["config_sha256"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for options, message in (
        ({}, "give top_k for a language model, hidden, or both"),
        ({"top_k": 0}, "top_k is 0; it should be 1 to 60"),
        ({"top_k": 61}, "top_k is 61; it should be 1 to 60"),
        ({"hidden": [5]}, r"hidden holds \[5\]; LlamaForCausalLM has 0..4"),
        ({"top_k": 2, "teacher": _tiny.classifier()}, r"returns logits \(1, 2\); it should be a language model"),
        ({"top_k": 2, "teacher": _tiny.model()}, "returns no logits; it should be a language model"),
        ({"top_k": 2, "teacher": causal(vocab_size=59)}, "tokenizer has token ids up to 59, the teacher 59 of them"),
        ({"top_k": 2, "teacher": causal(max_position_embeddings=9)}, r"row \d+ has 15 tokens; the teacher takes 9"),
        ({"top_k": 2, "dataset": Dataset.from_dict({"input_ids": [[2], []]})}, "row 1 has no tokens"),
        ({"top_k": 2, "shard_bytes": 0}, "shard_bytes is 0"),
        ({"top_k": 2, "logprobs_bits": 4}, "logprobs_bits is 4; it should be 8 or 16"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "cache", **options)
    assert not list(tmp_path.glob("cache*"))


def test_numbers_that_float16_cannot_hold(tmp_path: Path) -> None:
    teacher = causal()
    word = rows()[9]["input_ids"][3]
    before = next(row for row in range(24) if word in rows()[row]["input_ids"])
    with torch.no_grad():
        teacher.model.embed_tokens.weight[word, 0] = 1e5
    with pytest.raises(ValueError, match=f"row {before}: hidden_0 of the teacher is inf; float16 holds numbers up to"):
        write(tmp_path / "cache", teacher, hidden=[0])
    with torch.no_grad():
        teacher.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 0: topk_logprobs of the teacher is nan"):
        write(tmp_path / "other", teacher, top_k=2)


def test_a_class_that_cannot_be(tmp_path: Path) -> None:
    teacher = causal()
    teacher.lm_head = torch.nn.Linear(24, 60)
    with torch.no_grad():
        teacher.lm_head.bias[7] = -torch.inf
    found = read_cache(write(tmp_path / "cache", teacher, top_k=60))
    for row in found:
        assert (row["topk_indices"][:, 7] == 7).all()
        assert (np.isneginf(row["topk_logprobs"]) == (np.arange(60) == 7)).all()


# -- interruptions and damage --------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_at_the_first_missing_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"top_k": 3, "hidden": [0]}
    whole, output = write(tmp_path / "whole", **options), tmp_path / "out"
    calls: list[int] = []
    stop = [5]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == stop[0]:
            raise KeyboardInterrupt
        return capture(*args, **kwargs)

    monkeypatch.setattr("fastdistill.train.data.capture", counted)
    with pytest.raises(KeyboardInterrupt):
        write(output, **options)
    assert not output.exists()
    done = len(list((tmp_path / "out.partial").glob("*.arrow")))
    assert 1 < done < len(read_manifest(whole)["shards"])
    with pytest.raises(ValueError, match=r"out\.partial is what an interrupted run left"):
        read_cache(tmp_path / "out.partial")
    with pytest.raises(FileExistsError, match="holds an interrupted run; pass resume=True"):
        write(output, **options)
    with pytest.raises(ValueError, match="interrupted run with another teacher; pass overwrite=True"):
        write(output, causal(seed=1), **options, resume=True)
    with pytest.raises(ValueError, match="interrupted run with another data"):
        write(output, dataset=rows().select([*range(23), 0]), **options, resume=True)
    calls.clear()
    stop[0] = 0
    write(output, **options, resume=True)
    assert (
        len(calls) == 1 + len(read_manifest(whole)["shards"]) - done
    )  # one batch a shard, which has fewer than 7 rows
    assert read_manifest(output) == read_manifest(whole)  # hashes included, so the files are equal to the bit
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert not (tmp_path / "out.partial").exists()

    calls.clear()
    write(output, **options, resume=True)  # the run has finished, so nothing runs
    assert not calls
    with pytest.raises(FileExistsError, match="out is not empty; pass overwrite=True"):
        write(output, **options)
    write(output, top_k=1, overwrite=True)
    assert read_manifest(output)["top_k"] == 1


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", top_k=3)
    shard = folder / "00001.arrow"
    written = shard.read_bytes()
    middle = len(written) // 2
    shard.write_bytes(written[:middle] + bytes([written[middle] ^ 1]) + written[middle + 1 :])
    read_cache(folder)
    with pytest.raises(ValueError, match=r"00001\.arrow: its SHA-256 is not that of what was written"):
        read_cache(folder, verify=True)
    shard.write_bytes(written[:-8])
    with pytest.raises(ValueError, match=rf"00001\.arrow: {len(written) - 8} bytes; {len(written)} were written"):
        read_cache(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.arrow: no such file"):
        read_cache(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="format 1; this version reads 2: write the cache again"):
        read_cache(folder)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: no such file"):
        read_cache(tmp_path)


def test_another_vocabulary_is_refused_and_both_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", top_k=3)
    check_cache(folder, student=causal(2, 16), tokenizer=_tiny.tokenizer())
    with pytest.raises(ValueError, match=r"vocabulary has 61 tokens, that of .*cache \(LlamaForCausalLM \) 60"):
        check_cache(folder, student=causal(2, 16, vocab_size=61))
    tokenizer = _tiny.tokenizer()
    tokenizer.add_tokens(["w99"])
    with pytest.raises(ValueError, match=r"tokenizer's vocabulary \(61 tokens.* is not that of .*cache \(60 tokens"):
        CachedStage(cache=folder).run(causal(2, 16), None, tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    turned = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    write(tmp_path / "classes", _tiny.classifier(**named), dataset=_tiny.dataset(4))
    with pytest.raises(ValueError, match="orders its classes"):
        check_cache(tmp_path / "classes", student=_tiny.classifier(**turned))


# -- training ------------------------------------------------------------------------------------------------


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("make", [causal, masked])
@pytest.mark.parametrize("k, tail", [(60, "renormalize"), (7, "renormalize"), (7, "bucket")])
def test_loss_and_gradients_are_those_of_plain_pytorch_in_float64(tmp_path: Path, make: Any, k: int, tail: str) -> None:
    """Compares with the sum over rows alone, and, if all classes are kept, with the live teacher's loss."""
    teacher, student = make(), make(2, 16, seed=1)
    found = read_cache(write(tmp_path / "cache", teacher, top_k=k))
    batch = PaddingCollator(_tiny.tokenizer())([found[i] for i in range(6)])
    assert not batch["attention_mask"].all()
    model = DistillationModel(student, Objective(student.config, terms=("prediction",), tail=tail))
    found_losses = model(**batch)
    loss = found_losses["loss"]
    assert (found_losses["logits"] is None) is (make is causal)
    gradients = torch.autograd.grad(loss, tuple(student.parameters()), allow_unused=True)

    exact = copy.deepcopy(student).double()
    rounded, live, tokens = torch.zeros(()), torch.zeros(()), 0
    for row, cached in zip(rows().select(range(6)), found, strict=False):
        counted = len(row["input_ids"]) - (make is causal)  # the last token has no successor
        logp = exact(torch.tensor([row["input_ids"]])).logits[0, :counted].double().log_softmax(-1)
        listed = logp.gather(-1, torch.tensor(cached["topk_indices"])[:counted])
        q = torch.tensor(cached["topk_logprobs"])[:counted].double()
        if tail == "renormalize":
            row_loss = -(q.softmax(-1) * listed).sum()
        else:
            rest, student_rest = (1 - x.exp().sum(-1) for x in (q, listed))
            row_loss = -(q.exp() * listed).sum() - (rest.clamp(min=0) * student_rest.log()).sum()
        truth, _ = distribution(teacher, row)
        rounded, live = rounded + row_loss, live - (truth[:counted].exp() * logp).sum()
        tokens += counted
    for total, within in ((rounded, 1e-5), *([(live, 1e-3)] if k == 60 else [])):
        assert error(loss, total / tokens) < within
        truths = torch.autograd.grad(total / tokens, tuple(exact.parameters()), allow_unused=True, retain_graph=True)
        pairs = [(a, b) for a, b in zip(gradients, truths, strict=True) if b is not None]
        assert len(pairs) > 10
        assert error(flat([a for a, _ in pairs]), flat([b for _, b in pairs])) < 10 * within
    if k < 60:
        assert error(live, rounded) > 1e-4  # the teacher's other classes matter


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_stage_has_the_live_teachers_losses_without_it(tmp_path: Path) -> None:
    """Compares one step over all rows, in three micro-batches, with each term computed row by row from the teacher."""
    teacher, student = masked(), masked(2, 16, seed=1)
    folder = write(tmp_path / "cache", teacher, top_k=60, hidden=[0, 2, 4])
    terms = ("embedding", "hidden", "prediction")
    options = {"learning_rate": 0.0, "epochs": 1, "batch_size": 8}
    stage = CachedStage(cache=folder, terms=terms, **options, arguments={**QUICK, "gradient_accumulation_steps": 3})
    stage.run(student, None, _tiny.tokenizer(), tmp_path / "out")
    projection = {name.rsplit(".")[-1]: x for name, x in load_file(tmp_path / "out/projections.safetensors").items()}
    sums, tokens = dict.fromkeys(terms, 0.0), 0
    for row in rows():
        truth, states = distribution(teacher, row, (0, 2, 4))
        logp, ours = distribution(student, row, (0, 1, 2))
        sums["prediction"] -= (truth.exp() * logp).sum().item()
        for i, (x, y) in enumerate(zip(ours, states, strict=True)):
            distance = (F.linear(x, projection["weight"], projection["bias"]) - y).square().mean(-1).sum().item()
            sums["hidden" if i else "embedding"] += distance
        tokens += len(row["input_ids"])
    found = history(tmp_path / "out")[0]
    for term in terms:
        assert found[term] == pytest.approx(sums[term] / tokens, rel=1e-3), term


@pytest.mark.parametrize("top_k, alpha, warns", [(4, 1.0, True), (4, 0.5, False), (60, 1.0, False)])
def test_lost_mass_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, top_k: int, alpha: float, warns: bool
) -> None:
    folder = write(tmp_path / "cache", top_k=top_k)
    kept = [distribution(causal(), row)[0].exp().topk(top_k).values.sum(-1) for row in rows()]
    warn_of_lost_mass(folder, alpha)
    assert (f"hold {100 * float(torch.cat(kept).mean()):.0f}% of the teacher's" in caplog.text) == warns


@pytest.mark.parametrize("make", [causal, masked, _tiny.classifier])
def test_training_without_the_teacher_follows_training_with_it(tmp_path: Path, make: Any) -> None:
    teacher, data = make(4, 24), _tiny.dataset(24)
    folder = write(tmp_path / "cache", teacher, dataset=data, top_k=None if make is _tiny.classifier else 60)
    curves = []
    for is_live in (True, False):
        student = make(2, 16, seed=1, **(NO_DROPOUT if make is _tiny.classifier else {}))
        options = {"max_steps": 6, "learning_rate": 5e-3, "per_device_train_batch_size": 8, **QUICK}
        run = DistillationTrainer(
            student,
            teacher if is_live else None,
            Objective(student.config, terms=("prediction",)),
            TrainingArguments(str(tmp_path), save_strategy="no", **options),
            processing_class=_tiny.tokenizer(),
            train_dataset=data.remove_columns("labels") if is_live else read_cache(folder),
        )
        run.train()
        curves.append([entry["prediction"] for entry in run.state.log_history if "prediction" in entry])
        predictions = run.predict(read_cache(folder)).predictions  # logits, although the loss may not need them
        assert predictions.shape[-1] == (2 if make is _tiny.classifier else 60)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_what_a_cache_cannot_serve(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", masked(), top_k=4, hidden=[0, 4])
    for options, message in (
        ({"terms": ("attention",)}, "no data set holds the queries and keys that the attention term compares"),
        (
            {"terms": ("embedding", "hidden")},
            "in train_dataset the columns hidden_2, which fastdistill cache writes",
        ),
        ({"parity": "official"}, "parity is 'official', which counts padding"),
        ({"tail": "bucket", "temperature": 2.0}, "temperature is 2.0; tail 'bucket' needs 1"),
        ({"tail": "drop"}, "tail is 'drop'; it should be"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedStage(cache=folder, arguments=QUICK, **options).run(
                masked(2, 16), None, _tiny.tokenizer(), tmp_path / "out"
            )
    assert not (tmp_path / "out").exists()
    stage = CachedStage(cache=folder, terms=("attention", "prediction"), epochs=1, arguments=QUICK)
    stage.run(masked(2, 16), masked(), _tiny.tokenizer(), tmp_path / "out")  # the live teacher gives the scores
    assert {"attention", "prediction"} <= history(tmp_path / "out")[0].keys()


# -- command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cached")
    task = get_task("SST-2")
    models = {"causal": causal(2), "masked": masked(2), "classifier": _tiny.classifier(2, 24, **task.model_options())}
    for name, model in models.items():
        model.save_pretrained(root / name)
        _tiny.tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text("\n".join(_tiny.texts(120)) + "\n")
    (root / "SST-2").mkdir()
    lines = [f"{text}\t{len(text) % 2}" for text in _tiny.texts(40)]
    (root / "SST-2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (root / "student.json").write_text(json.dumps(STUDENT))
    return root


def command(*parts: Any) -> list[str]:
    return [str(part) for part in parts]


@pytest.mark.parametrize(
    "name, keep, auto_class, terms",
    [
        ("causal", ("--top-k", 8), AutoModelForCausalLM, ["prediction"]),
        ("masked", ("--top-k", 8, "--hidden", 0, 2), AutoModelForMaskedLM, ["embedding", "hidden", "prediction"]),
        ("classifier", ("--task", "sst-2"), AutoModelForSequenceClassification, ["prediction"]),
    ],
)
def test_commands(files: Path, tmp_path: Path, name: str, keep: Any, auto_class: Any, terms: list[str]) -> None:
    data = files / ("SST-2" if name == "classifier" else "text.txt")
    length = () if name == "classifier" else ("--max-length", 16)
    folder, output = tmp_path / "cache", tmp_path / "out"
    argv = command("cache", "--teacher", files / name, "--data", data, *keep, *length, "--output", folder)
    assert cli.main(argv) == 0
    manifest = read_manifest(folder)
    assert manifest["teacher"]["name"] == name
    assert [file["name"] for file in manifest["data"]["files"]] == ["train.tsv" if name == "classifier" else "text.txt"]
    argv = command("train-cached", "--cache", folder, "--student", files / "student.json", "--output", output)
    assert cli.main([*argv, *command("--epochs", 24, "--batch-size", 8, "--learning-rate", 1e-2, "--verify")]) == 0
    assert json.loads((output / "objective.json").read_text())["terms"] == terms
    assert auto_class.from_pretrained(output).config.hidden_size == 8
    log = [entry["loss"] for entry in history(output) if "loss" in entry]
    assert log[-1] < log[0]


def test_workers_read_the_same_rows(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    argv = command("cache", "--teacher", files / "causal", "--data", files / "text.txt", "--output", folder)
    assert cli.main([*argv, *command("--top-k", 8, "--max-length", 16)]) == 0
    argv = command("train-cached", "--cache", folder, "--student", files / "student.json", "--batch-size", 8)
    for workers in (0, 2):
        assert cli.main([*argv, *command("--workers", workers, "--output", tmp_path / f"out{workers}")]) == 0
    one, other = (load_file(tmp_path / f"out{workers}" / "model.safetensors") for workers in (0, 2))
    for name, weights in one.items():
        assert torch.equal(weights, other[name]), name
    with pytest.raises(SystemExit):
        cli.main([*argv, *command("--workers", -1, "--output", tmp_path / "none")])
    assert "--workers is -1; it should be 0 or more" in capsys.readouterr().err


def test_a_student_folded_from_the_teacher(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    argv = command("cache", "--teacher", files / "masked", "--data", files / "text.txt", "--output", folder)
    assert cli.main([*argv, *command("--hidden", 0, 2, "--max-length", 16)]) == 0
    losses = {}
    for init in ("random", "teacher"):
        argv = command("train-cached", "--cache", folder, "--student", files / "student.json", "--init", init)
        argv += command("--teacher", files / "masked", "--output", tmp_path / init)
        argv += command("--max-steps", 1, "--learning-rate", 1e-9)
        assert cli.main(argv) == 0
        losses[init] = history(tmp_path / init)[-1]["train_loss"]
    assert losses["teacher"] < 0.8 * losses["random"]


def test_another_teacher_is_refused(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    argv = command("cache", "--teacher", files / "masked", "--data", files / "text.txt", "--output", folder)
    assert cli.main([*argv, *command("--top-k", 4, "--max-length", 16)]) == 0
    other = AutoModelForMaskedLM.from_pretrained(files / "masked")
    with torch.no_grad():
        other.cls.predictions.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    _tiny.tokenizer().save_pretrained(tmp_path / "other")
    argv = command("train-cached", "--cache", folder, "--student", files / "student.json", "--max-steps", 1)
    argv += command("--output", tmp_path / "out", "--teacher")
    assert "has other weights than masked, the teacher whose cache" in fails(capsys, [*argv, str(tmp_path / "other")])
    assert cli.main([*argv, str(files / "masked")]) == 0


def test_bad_input_is_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    argv = command("cache", "--teacher", files / "causal", "--data", files / "text.txt", "--output", folder)
    argv += command("--max-length", 16)
    assert "use --top-k, --hidden or both" in fails(capsys, argv)
    assert "--top-k is 61; it should be 1 to 60" in fails(capsys, [*argv, "--top-k", "61"])
    assert "hidden holds [9]" in fails(capsys, [*argv, "--hidden", "9"])
    assert "there is no --top-k" in fails(capsys, [*argv, "--task", "sst-2", "--top-k", "2"])
    assert "row 0 has 128 tokens; the teacher takes 64" in fails(capsys, [*argv, "--top-k", "2", "--max-length", "128"])
    train = command("train-cached", "--cache", tmp_path, "--student", files / "student.json")
    train += command("--output", tmp_path / "out")
    assert "manifest.json: no such file" in fails(capsys, train)
    assert cli.main([*argv, "--top-k", "2"]) == 0
    assert "use --overwrite" in fails(capsys, [*argv, "--top-k", "2"])
    train[2] = str(folder)
    assert "need --teacher" in fails(capsys, [*train, "--terms", "attention"])
    terms = ("--terms", "embedding", "--layer-map", "0,-")
    assert "in train_dataset the columns hidden_0" in fails(capsys, [*train, *terms])
    (tmp_path / "narrow.json").write_text(json.dumps({**STUDENT, "vocab_size": 50}))
    assert "the student's vocabulary 50" in fails(capsys, [*train, "--student", str(tmp_path / "narrow.json")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cache", "train-cached"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: fastdistill {name}" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    lines = ["import sys; from pathlib import Path; import test_cache"]
    lines.append("test_cache.write(Path(sys.argv[1]), top_k=4, shard_bytes=1000)")
    (tmp_path / "main.py").write_text("\n".join(lines))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, tmp_path / "main.py", tmp_path / "two"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_manifest(tmp_path / "two")["shards"]) > 2
    assert read_manifest(tmp_path / "two") == read_manifest(write(tmp_path / "one", top_k=4, shard_bytes=1000))
