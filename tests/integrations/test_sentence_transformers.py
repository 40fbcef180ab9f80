"""Losses for SentenceTransformerTrainer: against sentence_transformers' own and float64, on one process and on two.

torchrun starts this file twice for the case of two processes, on the CPU with gloo.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from fastdistill.integrations.sentence_transformers import EmbeddingMSELoss, TokenSimilarityLoss

WIDTH, TEACHER_WIDTH = 16, 24
RATE = 1e3  # of one step of SGD: weights then differ by the gradient, in all its digits


def sentence_model(folder: Any, layers: int = 2, width: int = WIDTH, seed: int = 1, **options: Any) -> Any:
    path = f"{folder}/model-{layers}-{width}"
    _tiny.tokenizer().save_pretrained(path)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = _tiny.model("bert", layers, width, **quiet | options)
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.save_pretrained(path)  # the first process writes
    if dist.is_initialized():
        dist.barrier()
    return SentenceTransformer(modules=[Transformer(path), Pooling(width)], device="cpu")


def teacher_model(folder: Any) -> Any:
    return sentence_model(folder, 3, TEACHER_WIDTH, seed=2)


def features(model: Any, *seeds: int) -> list[dict[str, Tensor]]:
    return [model.preprocess(_tiny.texts(5, seed)) for seed in seeds]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], right: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert found.keys() == right.keys()
    scale = max(x.norm() for x in right.values())
    for name, x in right.items():
        error = (found[name] - x).norm()
        assert error < bound * x.norm() + 1e-7 * scale, f"{name}: {error / x.norm()}"


# -- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2])
def test_embedding_mse_is_that_of_sentence_transformers(columns: int, tmp_path: Path) -> None:
    """With labels for every column, and with labels that two columns share."""
    model = sentence_model(tmp_path)
    ours, theirs = (cls(model, projection_dim=TEACHER_WIDTH) for cls in (EmbeddingMSELoss, MSELoss))
    theirs.load_state_dict(ours.state_dict())
    for shape in ((5, TEACHER_WIDTH), (5, columns, TEACHER_WIDTH)):
        labels, seen = torch.randn(shape), []
        for loss_module in (ours, theirs):
            model.zero_grad()
            loss = loss_module(features(model, *range(columns)), labels)
            loss.backward()
            seen.append(gradients(loss_module) | {"loss": loss.detach().double()})
        assert_near(*seen)
        loss_module.zero_grad()
        ours.zero_grad()


def test_embedding_mse_without_projection(tmp_path: Path) -> None:
    model, labels = sentence_model(tmp_path), torch.randn(5, WIDTH)
    found, right = (cls(model)(features(model, 0), labels) for cls in (EmbeddingMSELoss, MSELoss))
    assert abs(found - right) < 1e-6 * right


def test_the_projection_is_saved_and_loaded(tmp_path: Path) -> None:
    model, labels = sentence_model(tmp_path), torch.randn(5, TEACHER_WIDTH)
    saved = EmbeddingMSELoss(model, projection_dim=TEACHER_WIDTH)
    saved.save_projection(tmp_path / "projection.safetensors")
    loaded = EmbeddingMSELoss(model)
    loaded.load_projection(tmp_path / "projection.safetensors")
    assert torch.equal(saved(features(model, 0), labels), loaded(features(model, 0), labels))


def right_similarity(student: Any, teacher: Any, columns: list[dict[str, Tensor]]) -> Tensor:
    """Text by text, without padding, in float64."""
    losses = []
    for column in columns:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, mask in zip(column["input_ids"], column["attention_mask"], strict=True):
            one = {"input_ids": ids[mask.bool()][None]}
            h_s, h_t = (model[0].model(**one).last_hidden_state[0] for model in (student.double(), teacher.double()))
            total = total + ((h_s @ h_s.T - h_t @ h_t.T) ** 2).sum()
            count += len(h_s) ** 2
        losses.append(total / count)
    return torch.stack(losses).mean()


def test_token_similarity(tmp_path: Path) -> None:
    student, teacher = sentence_model(tmp_path), teacher_model(tmp_path)
    right, right_teacher = copy.deepcopy(student), copy.deepcopy(teacher).requires_grad_(False)
    columns = features(student, 0, 1)
    loss = TokenSimilarityLoss(student, teacher)(columns)
    loss.backward()
    expected = right_similarity(right, right_teacher, features(right, 0, 1))
    expected.backward()
    assert abs(loss.double() - expected) < 1e-5 * expected
    assert_near(gradients(student), gradients(right))
    assert not gradients(teacher)


# -- refused -------------------------------------------------------------------------------------------------------


def test_refused(tmp_path: Path) -> None:
    student, teacher = sentence_model(tmp_path), teacher_model(tmp_path)
    with pytest.raises(ValueError, match=r"^the labels have width 24, .* 16; .* pass projection_dim=24$"):
        EmbeddingMSELoss(student)(features(student, 0), torch.randn(5, TEACHER_WIDTH))
    with pytest.raises(ValueError, match=r"^teacher is the student itself"):
        TokenSimilarityLoss(student, student)
    teacher.tokenizer.add_tokens("another")
    with pytest.raises(ValueError, match=r"^teacher has another vocabulary .* use EmbeddingMSELoss"):
        TokenSimilarityLoss(student, teacher)
    flat = {"input_ids": torch.ones(1, 9).long(), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with pytest.raises(ValueError, match=r"^the texts of a batch are flattened .*unpad_inputs = False$"):
        TokenSimilarityLoss(student, copy.deepcopy(student))([flat])


# -- in the trainer ------------------------------------------------------------------------------------------------


def one_step(folder: Any, kind: str, processes: int = 1) -> None:
    """Checks one SGD step of SentenceTransformerTrainer, of 4 rows in all, against float64."""
    student, teacher = sentence_model(folder), teacher_model(folder)
    right, right_teacher = copy.deepcopy(student), copy.deepcopy(teacher).requires_grad_(False)
    texts = [" ".join(text.split()[:3]) for text in _tiny.texts(4)]  # of one length: any two make half of the mean
    labels = torch.randn(4, TEACHER_WIDTH, generator=torch.Generator().manual_seed(5))
    if kind == "mse":
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # processes that draw different projections
        loss = EmbeddingMSELoss(student, projection_dim=TEACHER_WIDTH)
        rows, projection = {"text": texts, "label": labels.tolist()}, copy.deepcopy(loss.projection).double()
        if processes > 1:
            for p in projection.parameters():
                dist.broadcast(p.data, 0)
    else:
        loss, rows, projection = TokenSimilarityLoss(student, teacher), {"text": texts}, nn.Identity()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    drawn = {name: p.detach().clone() for name, p in projection.named_parameters()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4 // processes, max_steps=1, learning_rate=RATE,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, weight_decay=0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=processes > 1,  # BERT's pooler
    )  # fmt: skip
    SentenceTransformerTrainer(student, arguments, train_dataset=Dataset.from_dict(rows), loss=loss).train()

    right.double()
    if kind == "mse":
        pooled = right(right.preprocess(texts))["sentence_embedding"]
        ((projection(pooled) - labels.double()) ** 2).mean().backward()
    else:
        right_similarity(right, right_teacher, [right.preprocess(texts)]).backward()
    steps = {name: (before[name] - p.detach()).double() / RATE for name, p in student.named_parameters()}
    expected = gradients(right)
    assert_near({name: steps[name] for name in expected}, expected, 1e-3)
    if kind == "mse":
        moved = {name: (drawn[name] - p.detach()) / RATE for name, p in loss.projection.named_parameters()}
        assert_near(moved, gradients(projection), 1e-3)


@pytest.mark.parametrize("kind", ["mse", "similarity"])
def test_a_step_of_the_trainer(kind: str, tmp_path: Path) -> None:
    one_step(tmp_path, kind)


def steps_under_ddp(folder: str) -> None:
    dist.init_process_group("gloo")
    for kind in ("mse", "similarity"):
        one_step(folder, kind, processes=2)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes(tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    steps_under_ddp(sys.argv[1])
