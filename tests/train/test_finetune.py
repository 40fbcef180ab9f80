"""Tests training on gold labels: accumulation leaves the gradient as it is, and the model keeps its precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import _tiny
import torch
from _oracle import error
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fastdistill.train.finetune import finetune


def one_step(folder: Path, model: PreTrainedModel, **arguments: Any) -> dict[str, float]:
    """Returns the log of one step over 16 rows, with the loss and the norm of the gradient."""
    options = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 1e9}
    batch_size = 16 // arguments.get("gradient_accumulation_steps", 1)
    finetune(
        model,
        _tiny.dataset(16),
        _tiny.tokenizer(),
        folder,
        batch_size=batch_size,
        learning_rate=1e-9,
        arguments={**options, **arguments},
    )
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]


def test_a_step_is_the_mean_over_its_rows_with_and_without_accumulation(tmp_path: Path) -> None:
    model = _tiny.classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loss = torch.stack(
        [
            cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]]))
            for row in _tiny.dataset(16)
        ]
    ).mean()
    norm = torch.stack([x.norm() for x in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    for steps in (1, 4):
        found = one_step(tmp_path / str(steps), model, gradient_accumulation_steps=steps)
        assert error(torch.tensor(found["loss"]), loss.detach()) < 1e-3, steps  # logged to four digits
        assert error(torch.tensor(found["grad_norm"]), norm) < 1e-3, steps


def test_a_model_trained_under_autocast_computes_in_its_own_precision(tmp_path: Path) -> None:
    model = _tiny.classifier()
    one_step(tmp_path / "out", model, bf16=True)
    logits = model(**_tiny.batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**_tiny.batch()).logits
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert error(logits, again(**_tiny.batch()).logits) < 1e-6
    assert error(rounded, logits) > 1e-4
