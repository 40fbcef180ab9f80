"""Compares `parity="official"` with the published losses, transcribed here in float64 PyTorch, on whole BERTs.

The transcription shares nothing with the library: scores come from hooks on the query and key layers of an ordinary
forward pass with eager attention. The tests compare values and the gradient of every parameter.

The published code sets every score of -100 and below to 0, which undoes the -10000 that it adds on padded keys. A real
score that low would be set to 0 as well, on one side alone; the library keeps it. No score here is that low.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments

from fastdistill.train.capture import capturable, capture
from fastdistill.train.data import PaddingCollator
from fastdistill.train.model import DistillationModel
from fastdistill.train.objective import Objective, resolve_terms
from fastdistill.train.trainer import DistillationTrainer

INNER_TERMS = resolve_terms("tinybert")

Batch = Mapping[str, Tensor]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# -- the published losses ------------------------------------------------------------------------------------


def forward(model: PreTrainedModel, batch: Batch) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor]:
    """Returns hidden states (B, L, d), embeddings first, scores (B, H, L, L) of each layer, and logits (B, C).

    Scores are QK^T / sqrt(D), with -10000 added on padded keys.
    """
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = []
    for i, layer in enumerate(model.bert.encoder.layer):
        for name in ("query", "key"):
            linear = getattr(layer.attention.self, name)
            handles.append(
                linear.register_forward_hook(lambda module, args, output, at=(i, name): outputs.update({at: output}))
            )
    model.set_attn_implementation("eager")
    found = model(**batch, output_hidden_states=True)
    for handle in handles:
        handle.remove()

    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    heads, scores = model.config.num_attention_heads, []
    for i in range(model.config.num_hidden_layers):
        query, key = (outputs[i, name].unflatten(2, (heads, -1)).permute(0, 2, 1, 3) for name in ("query", "key"))
        raw = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
        assert raw.min() > -100
        scores.append(raw + (1.0 - mask[:, None, None, :].double()) * -10000.0)
    return found.hidden_states, scores, found.logits


def published(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    projections: list[nn.Linear],
    batch: Batch,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Computes a batch's losses by term: plain means over all entries, padding included, summed over layers."""
    hidden, scores, logits = forward(student, batch)
    with torch.no_grad():
        teacher_hidden, teacher_scores, teacher_logits = forward(teacher, batch)
    step = len(teacher_scores) // len(scores)
    states = [
        F.mse_loss(projection(x), teacher_hidden[i * step])
        for i, (projection, x) in enumerate(zip(projections, hidden, strict=True))
    ]
    attention = torch.zeros((), dtype=torch.float64)
    for i, ours in enumerate(scores):
        theirs = teacher_scores[(i + 1) * step - 1]  # from 0: layer i + 1 learns from layer (i + 1) * step
        ours, theirs = (torch.where(x <= -100.0, torch.zeros_like(x), x) for x in (ours, theirs))
        attention = attention + F.mse_loss(ours, theirs)
    soft = -(F.softmax(teacher_logits / temperature, -1) * F.log_softmax(logits / temperature, -1))
    return {"embedding": states[0], "hidden": sum(states[1:]), "attention": attention, "prediction": soft.mean()}


# -- the library ---------------------------------------------------------------------------------------------


@pytest.fixture
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return pair(num_labels=3)


def pair(**options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    student = _tiny.classifier(2, 16, **NO_DROPOUT, **options)
    return student.double(), _tiny.classifier(4, 24, seed=1, **NO_DROPOUT, **options).double()


def objective_of(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> Objective:
    return Objective(student.config, teacher.config, **{"parity": "official", **options}).double()


def projections_of(objective: Objective) -> list[nn.Linear]:
    """Returns the projection of each of the student's hidden states."""
    found = objective.projections
    return [found["shared"]] * 3 if "shared" in found else [found[str(i)] for i in range(3)]


def computed(
    student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, batch: Batch, **arguments: Any
) -> dict[str, Tensor]:
    """Computes the losses by term through the module that the trainer trains."""
    with capturable(student, teacher):
        with torch.no_grad():
            targets = capture(
                teacher, batch, hidden=set(objective.hidden.values()), attention=set(objective.attention.values())
            )
        found = DistillationModel(student, objective)(**batch, teacher=targets, **arguments)
    assert torch.equal(found["loss"], sum(found[term] for term in objective.terms))
    return {term: found[term] for term in objective.terms}


def gradients(loss: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    """Returns the gradient of every parameter, which is 0 if the loss does not depend on it."""
    named = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    found = torch.autograd.grad(loss, tuple(named.values()), materialize_grads=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float = 1e-10) -> None:
    """Compares each gradient relative to its own norm, or to the largest norm if it is 0 up to rounding.

    The gradient of a key's bias is such a 0, since the bias shifts all scores of a softmax alike.
    """
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    assert largest > 0
    for name, x in expected.items():
        if x.norm() > 1e-12 * largest:
            assert error(found[name], x) < within, name
        else:
            assert found[name].norm() <= 1e-12 * largest, name


def part(batch: Batch, rows: slice, length: int | None = None) -> dict[str, Tensor]:
    return {name: x[rows, :length] for name, x in batch.items()}


# -- inner losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", ["right", "left", None])
@pytest.mark.parametrize("projection", ["shared", "per_layer"])
def test_inner_losses_equal_the_published_ones(
    models: tuple[PreTrainedModel, PreTrainedModel], projection: str, padded: str | None
) -> None:
    student, teacher = models
    objective = objective_of(student, teacher, projection=projection)
    batch = _tiny.batch(rows=3, length=11, padded=padded)
    if padded == "left":  # a classifier refuses it where the batch brings no positions
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = published(student, teacher, projections_of(objective), batch)
    losses = computed(student, teacher, objective, batch)
    assert tuple(losses) == INNER_TERMS
    for term, loss in losses.items():
        assert error(loss, expected[term]) < 1e-12, term
        assert_equal(gradients(loss, student, objective), gradients(expected[term], student, objective))

    masked = objective_of(student, teacher, projection=projection, parity="masked")
    masked.load_state_dict(objective.state_dict())
    for term, loss in computed(student, teacher, masked, batch).items():
        assert (error(loss, expected[term]) > 1e-3) == (padded is not None), term  # they differ only with padding


def test_accumulated_inner_losses_equal_the_published_ones(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Micro-batches add up to the whole batch; if their lengths differ, every entry has the same weight."""
    student, teacher = models
    objective = objective_of(student, teacher)
    projections, batch = projections_of(objective), _tiny.batch(rows=3, length=11)
    whole = published(student, teacher, projections, batch)
    expected = gradients(sum(whole[term] for term in INNER_TERMS), student, objective)
    parts = [part(batch, slice(0, 1)), part(batch, slice(1, 3))]
    assert_equal(accumulated(student, teacher, objective, parts), expected)

    parts = [part(batch, slice(0, 1)), part(batch, slice(1, 3), 8)]  # tokens 11 + 2 * 8
    loss = torch.zeros((), dtype=torch.float64)
    for piece, tokens, pairs in zip(parts, (11, 16), (11**2, 2 * 8**2), strict=True):
        found = published(student, teacher, projections, piece)
        loss = loss + (found["embedding"] + found["hidden"]) * tokens / 27 + found["attention"] * pairs / 249
    assert_equal(accumulated(student, teacher, objective, parts), gradients(loss, student, objective))


def accumulated(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: Objective,
    parts: list[dict[str, Tensor]],
    **more: Any,
) -> dict[str, Tensor]:
    """Returns the sum of the micro-batches' gradients, as the trainer accumulates them."""
    count = sum(objective.count(piece) for piece in parts)
    losses = [computed(student, teacher, objective, piece, num_items=count, **more) for piece in parts]
    return gradients(sum(loss for piece in losses for loss in piece.values()), student, objective)


def test_an_accumulated_trainer_step_is_the_published_gradient(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    """Plain gradient descent with learning rate 1 moves each parameter by its gradient."""
    student, teacher = models
    objective, batches = objective_of(student, teacher), []

    class Noted(PaddingCollator):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            batches.append(super().__call__(features))
            return batches[-1]

    trainer = DistillationTrainer(
        student,
        teacher,
        objective,
        TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        ),
        data_collator=Noted(_tiny.tokenizer()),
        train_dataset=_tiny.dataset(6),
    )
    before = copy.deepcopy(trainer.model)
    trainer.train()
    seen = batches[-2:]
    shapes = [piece["input_ids"].shape for piece in seen]
    assert all("attention_mask" in piece for piece in seen)
    tokens, pairs = ([rows * length**power for rows, length in shapes] for power in (1, 2))
    loss = torch.zeros((), dtype=torch.float64)
    for i, piece in enumerate(seen):
        inputs = {name: piece[name] for name in ("input_ids", "attention_mask")}
        found = published(before.student, teacher, projections_of(before.objective), inputs)
        loss = loss + (found["embedding"] + found["hidden"]) * tokens[i] / sum(tokens)
        loss = loss + found["attention"] * pairs[i] / sum(pairs)
    after = dict(trainer.model.named_parameters())
    moved = {name: p.detach() - after[name].detach() for name, p in before.named_parameters()}
    assert_equal(moved, {name[2:]: x for name, x in gradients(loss, before).items()}, within=1e-9)


# -- prediction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prediction_is_a_mean_over_rows_and_classes(
    models: tuple[PreTrainedModel, PreTrainedModel], temperature: float
) -> None:
    student, teacher = models
    objective = objective_of(student, teacher, terms=("prediction",), temperature=temperature)
    batch, unused = _tiny.batch(rows=3, length=11), [nn.Linear(16, 24).double()] * 3
    expected = published(student, teacher, unused, batch, temperature)["prediction"]
    with torch.no_grad():
        logits = teacher(**batch).logits
    for extra in ({}, {"teacher_logits": logits}):
        loss = computed(student, teacher, objective, batch, **extra)["prediction"]
        assert error(loss, expected) < 1e-12
        assert_equal(gradients(loss, student), gradients(expected, student))

    parts = [part(batch, slice(0, 1)), part(batch, slice(1, 3), 8)]  # weighted by rows, not by tokens
    found = accumulated(student, teacher, objective, parts)
    assert_equal(found, gradients(expected, student, objective))


def test_a_regression_is_the_squared_distance_from_gold() -> None:
    student, teacher = pair(num_labels=1)
    objective = objective_of(student, teacher, terms=("prediction",))
    batch, gold = _tiny.batch(rows=3, length=11), torch.tensor([0.5, 4.0, 2.5], dtype=torch.float64)
    expected = F.mse_loss(forward(student, batch)[2].view(-1), gold)
    model, count = DistillationModel(student, objective), objective.count(batch)
    loss = model(**batch, labels=gold)["loss"]
    assert error(loss, expected) < 1e-12
    assert_equal(gradients(loss, student), gradients(expected, student))
    halves = [
        model(**part(batch, rows), labels=gold[rows], num_items=count)["loss"] for rows in (slice(0, 1), slice(1, 3))
    ]
    assert_equal(gradients(sum(halves), student), gradients(expected, student))
