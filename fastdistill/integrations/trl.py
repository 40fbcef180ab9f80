"""Computes the losses of TRL's DistillationTrainer and GKDTrainer without logits; docs/in_your_trainer.md shows how.

TRL keeps its generation, its masks, its counts and the meaning of its options. The losses have the values of TRL's own:

    beta 0      KL(teacher || student)                                          forward
    beta 1      KL(student || teacher)                                          reverse
    between     beta KL(teacher || m) + (1 - beta) KL(student || m)             m = beta teacher + (1 - beta) student
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.train.causal_lm import causal_lm_loss
from fastdistill.train.checks import check_own_tokens

__all__ = ["DistillationMixin", "GKDMixin"]


class DistillationMixin:
    """Replaces the loss of TRL's DistillationTrainer by `causal_lm_loss`. Put it before that class.

    The loss compares the softmax at `args.temperature`, as TRL's does. The student's entropy is not logged.

    Raises:
        ValueError: the teacher is on a server, its tokens differ from the student's, or the models take images.
    """

    args: Any  # these belong to the trainer
    accelerator: Any
    model: Any
    processing_class: Any
    teacher_model: Any
    beta: float
    temperature: float
    _is_vlm: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for config in (*args, kwargs.get("args")):
            if hasattr(config, "teacher_model_server_url"):
                raise ValueError(
                    f"args.teacher_model_server_url is {config.teacher_model_server_url!r}; a server sends "
                    "loss_top_k classes, and the mixin compares whole distributions: use DistillationTrainer with a "
                    "teacher_model, or ServerDistillationTrainer without the mixin"
                )
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError("teacher_model is None; it should be a model, or the name or path of one")
        if self._is_vlm:
            raise ValueError(
                f"processing_class is a {type(self.processing_class).__name__}, of a model that takes images; it "
                "should be a tokenizer: use DistillationTrainer without the mixin"
            )
        check_own_tokens(self.model, self.teacher_model, self.processing_class)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.model.training and inputs.get("num_items_in_batch") is not None:  # counted after the generation
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, C)
        labels = inputs["completion_ids"].masked_fill(counted == 0, -100)
        batch = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(inputs["prompt_ids"], -100), labels], dim=1),
        }
        loss = generalized_jsd(self, model, batch, num_items_in_batch, temperature=self.temperature)
        return (loss, None) if return_outputs else loss


class GKDMixin:
    """Replaces the loss of TRL's GKDTrainer by `causal_lm_loss`. Put it before that class.

    `args.temperature` is the temperature of the generation only: TRL's loss compares the softmax at temperature 1.

    Raises ValueError if the teacher's tokens differ from the student's.
    """

    accelerator: Any  # these belong to the trainer
    compute_metrics: Any
    model: Any
    processing_class: Any
    teacher_model: Any
    beta: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_own_tokens(self.model, self.teacher_model, self.processing_class)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = generalized_jsd(self, model, batch, num_items_in_batch)
        if not return_outputs:
            return loss
        if self.compute_metrics is None:
            return loss, {"loss": loss}
        with torch.no_grad():
            return loss, model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def generalized_jsd(
    trainer: Any, model: nn.Module, batch: dict[str, Tensor], num_items: Tensor | int | None, temperature: float = 1.0
) -> Tensor:
    """Computes the loss of both trainers."""
    trainer.teacher_model.eval()
    with trainer.accelerator.autocast():
        return causal_lm_loss(
            model,
            trainer.teacher_model,
            batch,
            divergence="jsd",
            beta=trainer.beta,
            temperature=temperature,
            num_items=num_items,
        )
