"""Compares the loss curve of a small distillation on each backend with that of the reference."""

from __future__ import annotations

import pytest
import torch

import fastdistill
from fastdistill.train.capture import capturable, capture

_tiny = pytest.importorskip("_tiny", exc_type=ImportError)  # a GPU machine may lack its packages

STEPS = 60
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(backend: str, error: float = 1.0) -> torch.Tensor:  # (STEPS, 4): the terms of each step
    """Trains a 2-layer student on a 4-layer teacher with TinyBERT's four terms; `error` scales one term's gradient."""
    torch.manual_seed(0)
    with torch.device("cpu"):  # the same initial weights on every device
        student, teacher = _tiny.classifier(2, 16).to(DEVICE), _tiny.classifier(4, 24, seed=1).to(DEVICE)
        projection = torch.nn.Linear(16, 24).to(DEVICE)
        rows = _tiny.dataset(48)
        batches = [_tiny.tokenizer().pad(rows[i : i + 8], return_tensors="pt").to(DEVICE) for i in range(0, 48, 8)]
    optimizer = torch.optim.AdamW([*student.parameters(), *projection.parameters()], lr=2e-3)
    curve = []
    with capturable(student, teacher):
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                target = capture(teacher, batch, hidden=[0, 2, 4], attention=[2, 4])
            states = capture(student, batch, hidden=[0, 1, 2], attention=[1, 2])
            hidden = [
                fastdistill.linear_mse(
                    states.hidden[i],
                    projection.weight,
                    target.hidden[2 * i],
                    projection.bias,
                    mask=mask,
                    backend=backend,
                )
                for i in range(3)
            ]
            attention = [
                fastdistill.attention_mse(
                    states.attention[i].query,
                    states.attention[i].key,
                    target.attention[2 * i].query,
                    target.attention[2 * i].key,
                    key_mask=mask,
                    query_mask=mask,
                    backend=backend,
                )
                for i in (1, 2)
            ]
            prediction = fastdistill.soft_cross_entropy(states.logits, target.logits, backend=backend)
            terms = torch.stack([hidden[0], hidden[1] + hidden[2], attention[0] + attention[1], prediction])
            optimizer.zero_grad()
            (terms * torch.tensor([1, 1, error, 1], device=DEVICE)).sum().backward()
            optimizer.step()
            curve.append(terms.detach())
    return torch.stack(curve)


@pytest.fixture(scope="module")
def reference_curve() -> torch.Tensor:
    return train("reference")


def distance(curve: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the largest relative error among the terms' curves."""
    return ((curve - reference).norm(dim=0) / reference.norm(dim=0)).max().item()


def test_every_backend_follows_the_same_curve(backend: str, reference_curve: torch.Tensor) -> None:
    assert (reference_curve[-1] < 0.9 * reference_curve[0]).any()  # it learns
    assert distance(train(backend), reference_curve) < 1e-4


def test_a_wrong_gradient_gives_another_curve(reference_curve: torch.Tensor) -> None:
    assert distance(train("reference", error=1.05), reference_curve) > 1e-3
