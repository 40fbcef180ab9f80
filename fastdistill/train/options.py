"""The options of the objective and of a schedule. The stages and the command line inherit them.

This module imports the standard library only, so that the command line can print its help without loading PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field with a default and the sentence that `--help` prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Says what a student learns from its teacher. `fastdistill.train.objective.Objective` takes these as keywords.

    `fastdistill.train.objective.resolve_layer_map` describes the layer maps.
    """

    method: Literal["tinybert", "minilm", "minilmv2"] = option("tinybert", "what the inner losses compare")
    terms: Sequence[str] | None = option(
        None, "losses to compute: inner losses of the method, and prediction (default: all inner losses)"
    )
    layer_map: str | Sequence[int | None] | None = option(
        None,
        "for tinybert: uniform, top, bottom, last, or the teacher's hidden state for each of the student's, from the "
        "embedding output on: 0,3,6,9,12 (- for none; default: uniform). Attention layers follow hidden states",
    )
    projection: Literal["shared", "per_layer"] = option(
        "shared", "one Linear with bias for all hidden states, as published, or one for each"
    )
    parity: Literal["masked", "official"] = option(
        "masked",
        "masked: padding never counts; official: as TinyBERT's published code computes it, padding counted in the "
        "denominators of the inner losses, the prediction's mean over rows and classes (spans and tags: as masked)",
    )
    temperature: float = option(1.0, "temperature of the prediction loss")
    t_squared: bool = option(False, "multiply the prediction loss by temperature^2")
    divergence: Literal["soft_cross_entropy", "kl", "jsd", "tvd"] = option(
        "soft_cross_entropy", "what the prediction loss computes from the teacher's distribution and the student's"
    )
    alpha: float = option(
        1.0, "share of the teacher in the prediction loss; the rest is cross-entropy with the labels, at temperature 1"
    )
    scores: Literal["gold", "teacher"] = option(
        "gold", "what a regression head learns in the prediction loss, by MSE: the labels, or the teacher's scores"
    )
    teacher_layer: int | None = option(
        None,
        "for minilm and minilmv2: the teacher's layer, from 1, that the last layer learns from (default: the last)",
    )
    relation_heads: int | None = option(None, "for minilmv2 (default: 48)")
    tail: Literal["renormalize", "bucket"] = option(
        "renormalize", "the classes that a cached teacher does not list: left out, or one class together"
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Says how long and how fast a stage trains.

    `arguments` holds anything else that transformers.TrainingArguments takes ({"bf16": True}, {"report_to": "wandb"},
    ...) and wins over the other fields.
    """

    epochs: float = option(3, "passes over the data")
    batch_size: int = option(32, "rows of each process and step")
    learning_rate: float = option(5e-5, "peak learning rate")
    warmup: float = option(0.0, "share of the steps in which the rate rises")
    scheduler: str = option("linear", "lr_scheduler_type of transformers")
    weight_decay: float = option(0.01, "not applied to biases and norms")
    seed: int = option(42, "seed of shuffling, dropout and new weights")
    arguments: Mapping[str, Any] = field(default_factory=dict)
