"""Checks that two processes learn what one would.

Single steps are compared with plain float64 PyTorch over the rows that both processes saw, whole commands with one
process that has twice the batch.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import _processes
import _tiny
import torch
import torch.nn.functional as F
from _oracle import error
from _processes import LINE, LINES, RATE, TORCHRUN, run, two_processes
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from fastdistill import cli
from fastdistill.recipes.glue import get_task
from fastdistill.train.objective import Objective, resolve_terms

INNER_TERMS = resolve_terms("tinybert")

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch is built without gloo")

# -- the oracle: TinyBERT's losses row by row, nothing padded, float64 ---------------------------------------------

MAP = {0: 0, 1: 2, 2: 4}  # student hidden state -> teacher hidden state


def scores(model: Any, layer: int, hidden: Tensor) -> Tensor:
    """Computes `Q K^T / sqrt(d)`, (1, H, L, L), of a BERT layer, counted from 1, given its input."""
    attention = model.bert.encoder.layer[layer - 1].attention.self
    heads = model.config.num_attention_heads
    query, key = (
        projection(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for projection in (attention.query, attention.key)
    )
    return query @ key.mT * query.shape[-1] ** -0.5


def losses(student: Any, teacher: Any, objective: Objective, rows: list[list[int]]) -> dict[str, Tensor]:
    """Computes the losses of one optimiser step over `rows`, gathered from all processes and micro-batches."""
    sums = dict.fromkeys(("embedding", "hidden", "attention", "prediction"), torch.zeros((), dtype=torch.float64))
    for row in rows:
        ids = torch.tensor([row])
        ours = student(ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(ids, output_hidden_states=True)
        for i, target in MAP.items():
            if objective.layer_map:
                projection = objective.projections["shared"]
                difference = F.linear(ours.hidden_states[i], projection.weight, projection.bias)
                difference = difference - theirs.hidden_states[target]
                name = "hidden" if i else "embedding"
                sums[name] = sums[name] + difference.square().mean(-1).sum()
            if i:
                found = scores(student, i, ours.hidden_states[i - 1])
                wanted = scores(teacher, target, theirs.hidden_states[target - 1])
                sums["attention"] = sums["attention"] + (found - wanted.detach()).square().sum()
        soft = theirs.logits.softmax(-1)
        sums["prediction"] = sums["prediction"] - (soft * ours.logits.log_softmax(-1)).sum()
    tokens, pairs = sum(len(row) for row in rows), sum(len(row) ** 2 for row in rows)
    items = {"embedding": tokens, "hidden": tokens, "attention": 4 * pairs, "prediction": len(rows)}
    return {term: sums[term] / items[term] for term in objective.terms}


def follow(terms: tuple[str, ...], steps: list[list[list[int]]]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Runs SGD over these steps and returns the logs and how far each weight moved."""
    student, teacher, objective = (module.double() for module in _processes.models(terms))
    weights = {f"student.{name}": p for name, p in student.named_parameters()}
    weights |= {f"objective.{name}": p for name, p in objective.named_parameters()}
    start = {name: p.detach().clone() for name, p in weights.items()}
    logs = []
    for rows in steps:
        found = losses(student, teacher, objective, rows)
        loss = torch.stack(list(found.values())).sum()
        gradients = dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True)
        )
        gradients = {name: g for name, g in gradients.items() if g is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        logs.append({"loss": loss.item(), "grad_norm": norm.item(), **{term: x.item() for term, x in found.items()}})
        with torch.no_grad():
            for name, gradient in gradients.items():
                weights[name] -= RATE * gradient
    return logs, {name: p.detach() - start[name] for name, p in weights.items()}


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]


def assert_learns_what_one_process_would(terms: tuple[str, ...], ranks: list[dict[str, Any]]) -> None:
    last = max(step for rank in ranks for step, _ in rank["seen"])
    steps = [
        [row for rank in ranks for at, rows in rank["seen"] if at == step for row in rows] for step in range(last + 1)
    ]
    logs, moved = follow(terms, steps)
    student, _, objective = _processes.models(terms)
    start = {f"student.{name}": p.detach() for name, p in student.named_parameters()}
    start |= {f"objective.{name}": p.detach() for name, p in objective.named_parameters()}
    for rank in ranks:
        assert len(rank["logs"]) == len(steps)
        for found, expected in zip(rank["logs"], logs, strict=True):
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-4), name
        assert rank["weights"].keys() == moved.keys()
        for name, expected in moved.items():
            found = rank["weights"][name].double() - start[name].double()
            if expected.norm() < 1e-5 * start[name].norm().clamp(min=1):  # only rounding
                assert found.norm() < 1e-5 * start[name].norm().clamp(min=1), name
            else:
                assert error(found, expected) < 1e-3, name


# -- in one launch: whole commands, DDP, streams -------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    options = get_task("SST-2").model_options()
    _tiny.classifier(4, 24, seed=1, **options).save_pretrained(folder / "teacher")
    _tiny.tokenizer().save_pretrained(folder / "teacher")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, **_processes.NO_DROPOUT}
    (folder / "student.json").write_text(json.dumps(small))
    (folder / "SST-2").mkdir()
    # With 64 rows or blocks, or twice that, one process with twice the batch puts the same rows into a step.
    for split, rows, seed in (("train", 128, 0), ("dev", 16, 1)):
        lines = [f"{text}\t{len(text) % 2}" for text in _tiny.texts(rows, seed)]
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    words = " ".join(_tiny.texts(1000, 2)).split()
    lines = [" ".join(words[LINE * i : LINE * (i + 1)]) for i in range(64)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (folder / "lines.txt").write_text("\n".join(lines[:LINES]) + "\n")

    general = command(folder, "general", "general-2", 8)
    streamed = [*command(folder, "general", "streamed-2", 8), "--streaming", "--max-steps", "3"]
    task = command(folder, "task", "task-2", 8, student=folder / "general-2")
    (folder / "commands.json").write_text(json.dumps([general, general, task, streamed]))
    (folder / "printed").write_text(two_processes("commands", folder))
    return folder


def command(folder: Path, name: str, output: str, batch: int, student: Path | None = None) -> list[str]:
    parts = [
        name,
        "--teacher",
        folder / "teacher",
        "--student",
        student or folder / "student.json",
    ]
    if name == "general":
        parts += ["--corpus", folder / "corpus.txt", "--max-length", LINE + 2, "--epochs", 1]
        parts += ["--batch-size", batch, "--learning-rate", 1e-3]
    else:
        parts += ["--task", "sst-2", "--data", folder / "SST-2", "--intermediate-epochs", 1, "--prediction-epochs", 1]
        parts += ["--intermediate-learning-rate", 1e-3, "--intermediate-batch-size", batch]
        parts += ["--learning-rates", 1e-3, "--batch-sizes", batch]
    return [str(part) for part in (*parts, "--output", folder / output)]


def distance(folder: Path, one: str, other: str) -> float:
    first, second = (load_file(folder / name / "model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    return torch.stack([(first[name].double() - second[name].double()).norm() for name in first]).norm().item()


def assert_same_student(folder: Path, two: str, one: str, another: str) -> None:
    """Compares relative to another run, since AdamW may take a full step on a gradient that is only rounding."""
    assert distance(folder, two, one) < 1e-2 * distance(folder, another, one)
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in (two, one)]
    assert names[0] == names[1]


def test_general_writes_the_student_of_one_process(launched: Path) -> None:
    for output, batch in (("general-1", 16), ("general-half", 8)):
        assert cli.main(command(launched, "general", output, batch)) == 0
    assert_same_student(launched, "general-2", "general-1", "general-half")
    projections = [load_file(launched / f"general-{n}" / "projections.safetensors") for n in (2, 1)]
    for name, expected in projections[1].items():
        assert error(projections[0][name], expected) < 1e-3, name


def test_task_writes_the_student_of_one_process(launched: Path) -> None:
    for output, batch in (("task-1", 16), ("task-half", 8)):
        assert cli.main(command(launched, "task", output, batch, student=launched / "general-2")) == 0
    assert_same_student(launched, "task-2", "task-1", "task-half")
    two, one = (
        json.loads((launched / f"task-{n}" / "results.json").read_text())["combinations"][0]["seeds"] for n in (2, 1)
    )
    assert two == one
    assert not (launched / "task-2" / "runs").exists()
    AutoModelForSequenceClassification.from_pretrained(launched / "task-2")


def test_outputs_are_written_once_and_then_refused(launched: Path) -> None:
    for rank in range(2):  # the second command repeats the first
        assert json.loads((launched / f"codes{rank}.json").read_text()) == [0, 2, 0, 0]
    printed = (launched / "printed").read_text()
    assert printed.count("is not empty; use --overwrite") == 2
    for name in ("general-2", "task-2", "streamed-2"):
        assert printed.count(f"wrote {launched / name}\n") == 1
    assert not list(launched.glob("*.partial*"))


def test_an_error_in_one_process_is_raised_in_all(launched: Path) -> None:
    for rank in range(2):
        messages = [["FileNotFoundError", f"no file for process {where}"] for where in range(2)]
        assert json.loads((launched / f"errors{rank}.json").read_text()) == [*messages, 0, rank]


def test_processes_split_and_share_the_teacher_logits(launched: Path) -> None:
    ranks = [json.loads((launched / f"logits{rank}.json").read_text()) for rank in range(2)]
    teacher = _tiny.classifier(4, 24, seed=1).eval()
    for rows, *columns in zip((11, 2), *(rank["columns"] for rank in ranks), strict=True):
        assert columns[0] == columns[1]
        for row, logits in zip(_tiny.dataset(rows), columns[0], strict=True):
            with torch.no_grad():
                assert error(torch.tensor(logits), teacher(torch.tensor([row["input_ids"]])).logits[0]) < 1e-5
    # 11 rows sorted by length make six batches, the last with one row; then 2 rows make one batch.
    assert [rank["ran"] for rank in ranks] == [[2, 2, 2, 2], [2, 2, 1]]


def test_finetune_takes_the_mean_over_the_rows_of_both_processes(launched: Path) -> None:
    found = json.loads((launched / "finetuned" / "trainer_state.json").read_text())["log_history"][0]
    model = _tiny.classifier(**_processes.NO_DROPOUT)
    loss = sum(
        F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]]))
        for row in _tiny.dataset(16)
    )
    gradients = torch.autograd.grad(loss / 16, list(model.parameters()))
    norm = torch.stack([x.norm() for x in gradients]).norm()
    assert error(torch.tensor(found["loss"]), loss.detach() / 16) < 1e-3
    assert error(torch.tensor(found["grad_norm"]), norm) < 1e-3


def test_a_streamed_corpus_trains_a_student(launched: Path) -> None:
    assert AutoModel.from_pretrained(launched / "streamed-2").config.hidden_size == 16
    state = json.loads((launched / "streamed-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_each_process_streams_its_own_lines_in_a_new_order_each_pass(launched: Path) -> None:
    lines = (launched / "lines.txt").read_text().splitlines()
    blocks = [_tiny.tokenizer()(line)["input_ids"] for line in lines]
    passes, trained = [], read(launched, "stream")
    for rank in range(2):
        for _, batch in trained[rank]["seen"]:
            assert all(row in blocks[rank::2] for row in batch)
        rows = json.loads((launched / f"stream{rank}.json").read_text())
        half = LINES // 2
        passes += [rows[:half], rows[half:]]
        for one in passes[-2:]:
            assert sorted(one) == sorted(blocks[rank::2])
        assert passes[-1] != passes[-2]
    assert passes[0] != [block for block in blocks if block in passes[0]]
    assert_learns_what_one_process_would(INNER_TERMS, trained)


@pytest.mark.parametrize(("name", "terms"), [("inner", INNER_TERMS), ("prediction", ("prediction",))])
def test_ddp_with_accumulation_and_uneven_batches_learns_as_one_process(
    launched: Path, name: str, terms: tuple[str, ...]
) -> None:
    ranks = read(launched, name)
    sizes = [[len(rows) for _, rows in rank["seen"]] for rank in ranks]
    if name == "inner":  # a short last batch, and a step of fewer micro-batches
        assert sizes == [[2] * 6, [2, 2, 1] * 2]
    tokens = [[sum(map(len, rows)) for _, rows in rank["seen"]] for rank in ranks]
    assert tokens[0] != tokens[1]
    assert_learns_what_one_process_would(terms, ranks)


def test_ddp_with_accumulation_and_uneven_labels_learns_a_language_model_as_one_process(launched: Path) -> None:
    """Follows SGD in float64 over full logits, row by row."""
    ranks = read(launched, "next_tokens")
    student, teacher = (model.double() for model in _processes.language_models())
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    for step in range(2):
        rows = [row for rank in ranks for at, rows in rank["seen"] if at == step for row in rows]
        assert len(rows) == 8
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids, following = torch.tensor([row]), torch.tensor(_processes.chat(row))[1:]
            counted = following != -100
            ours, theirs = (model(ids).logits[0, :-1][counted] for model in (student, teacher))
            log_s, log_t = (ours / 2).log_softmax(-1), (theirs.detach() / 2).log_softmax(-1)
            soft = (log_t.exp() * (log_t - log_s)).sum(-1) * 4
            hard = F.cross_entropy(ours, following[counted], reduction="none")
            total, count = total + (0.5 * soft + 0.5 * hard).sum(), count + int(counted.sum())
        loss = total / count
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        norm = torch.stack([x.norm() for x in gradients]).norm()
        for rank in ranks:
            assert rank["logs"][step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
            assert rank["logs"][step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        with torch.no_grad():
            for p, gradient in zip(student.parameters(), gradients, strict=True):
                p -= RATE * gradient
    seen = [[[x for row in rows for x in _processes.chat(row)] for _, rows in rank["seen"]] for rank in ranks]
    labels = [[len(found) - found.count(-100) for found in of_rank] for of_rank in seen]
    assert labels[0] != labels[1]
    for rank in ranks:
        for name, p in student.named_parameters():
            moved = p.detach() - start[name]
            assert error(rank["weights"][f"student.{name}"].double() - start[name], moved) < 1e-3, name


def test_one_process_gets_sigterm_and_both_stop_after_the_same_step(launched: Path) -> None:
    """SIGTERM comes in step 4 of 6, the first of the second epoch; the resumed run ends like an uninterrupted one."""
    folder = launched / "terminated"
    for rank in range(2):
        end = json.loads((folder / f"end{rank}.json").read_text())
        assert end["code"] == 143
        assert "after step 4" in end["message"]
        assert end["files"] == ["checkpoint-4"]
    logs = [json.loads((folder / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "out")]
    assert [entry.get("loss") for entry in logs[0]] == [entry.get("loss") for entry in logs[1]]
    expected = load_file(folder / "whole" / "model.safetensors")
    for rank in range(2):
        student = torch.load(folder / f"resumed{rank}.pt", weights_only=True)
        for name, weights in expected.items():
            assert torch.equal(student[name], weights), name


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    two_processes("fsdp", folder)
    return folder


@pytest.mark.slow
def test_fsdp2_learns_what_one_process_would(sharded: Path) -> None:
    assert_learns_what_one_process_would(INNER_TERMS, read(sharded, "inner"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_resumes(sharded: Path, kind: str) -> None:
    ranks = read(sharded / kind, "whole")
    for rank, resumed in zip(ranks, read(sharded / kind, "resumed"), strict=True):
        assert resumed["seen"] == [entry for entry in rank["seen"] if entry[0] >= 3]
        for name, expected in rank["weights"].items():
            assert torch.equal(resumed["weights"][name], expected), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_checkpoint_of_fsdp2_is_a_plain_student(sharded: Path, kind: str) -> None:
    weights = read(sharded / kind, "whole")[0]["weights"]
    checkpoint = sharded / kind / "checkpoint-4"
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    for name, p in plain.named_parameters():
        assert torch.equal(p, weights[f"student.{name}"]), name
    _, _, objective = _processes.models(INNER_TERMS)
    objective.load_projections(checkpoint)
    for name, p in objective.named_parameters():
        assert torch.equal(p, weights[f"objective.{name}"]), name


@pytest.mark.slow
def test_stages_in_a_row_under_fsdp2_write_a_plain_student(sharded: Path) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(sharded / "student").state_dict()
    for rank in range(2):
        student = torch.load(sharded / f"student{rank}.pt", weights_only=True)
        assert student.keys() == plain.keys()
        for name, expected in plain.items():
            assert torch.equal(student[name], expected), name


# -- commands under other launchers --------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_accelerate_launch_writes_the_same_student(launched: Path) -> None:
    argv = command(launched, "task", "task-a", 8, student=launched / "general-2")
    launcher = [
        TORCHRUN[0],
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    done = run([*launcher, "--main_process_port", free_port(), "-m", "fastdistill.cli", *argv], launched)
    assert done.returncode == 0, done.stdout[-6000:]
    assert distance(launched, "task-a", "task-2") == 0


@pytest.mark.slow
def test_a_refusal_ends_every_process_with_code_2(launched: Path) -> None:
    """The processes start one by one, as under a scheduler, so no launcher ends the second when the first gives up."""
    for argv, reason in (
        (command(launched, "general", "general-2", 8), "is not empty; use --overwrite"),
        ([*command(launched, "general", "nothing", 8), "--layer-map", "0,9"], "layer_map has 2 entries"),
    ):
        environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [
            _processes.start(
                [TORCHRUN[0], "-m", "fastdistill.cli", *argv], launched, RANK=rank, LOCAL_RANK=rank, **environment
            )
            for rank in ("0", "1")
        ]
        for done in [_processes.finish(process) for process in ranks]:
            assert done.returncode == 2, done.stdout[-6000:]
            assert reason in done.stdout
            assert "Traceback" not in done.stdout
    assert not (launched / "nothing.partial").exists() or not any((launched / "nothing.partial").iterdir())
