"""Distils causal language models in transformers' Trainer and its subclasses; docs/in_your_trainer.md shows how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.train.causal_lm import causal_lm_loss, check_options

__all__ = ["CausalLMDistillationMixin"]


class CausalLMDistillationMixin:
    """Replaces a Trainer's loss by `causal_lm_loss`. Put it before the Trainer's class.

    Args:
        teacher: a model in eval mode; it is moved to the trainer's device. None: the rows have `topk_logprobs` and
            `topk_indices`.
        distillation: keywords of `causal_lm_loss`: divergence, temperature, alpha, ...; the trainer passes `num_items`.

    The loss is divided by the labels of the whole optimiser step, over accumulation and processes, as Trainer's own is.
    """

    args: Any  # these belong to the Trainer
    accelerator: Any
    compute_metrics: Any

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, distillation: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.distillation = dict(distillation or {})
        check_options(**self.distillation)
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # Trainer then counts the labels of the step, and scales no loss itself
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # whose gradients are averaged
        with self.accelerator.autocast():
            loss = causal_lm_loss(model, self.teacher, inputs, num_items=num_items_in_batch, **self.distillation)
        if not return_outputs:
            return loss
        if self.compute_metrics is None:
            return loss, {"loss": loss}
        with torch.no_grad():
            return loss, model(**{name: x for name, x in inputs.items() if name != "labels"})
