"""Distils causal language models in transformers' Trainer and its subclasses; docs/in_your_trainer.md shows how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from fastdistill.train.causal_lm import causal_lm_loss, check_loaded, check_models, check_options, model_inputs
from fastdistill.train.checks import check_own_tokens

__all__ = ["CausalLMDistillationMixin"]


class CausalLMDistillationMixin:
    """Replaces the loss of a Trainer, such as TRL's SFTTrainer, by `causal_lm_loss`. Put it before the Trainer's class.

    Args:
        teacher: a model in eval mode; it is moved to the trainer's device. None: the rows have `topk_logprobs` and
            `topk_indices`.
        distillation: keywords of `causal_lm_loss`: divergence, temperature, alpha, ...; the trainer passes `num_items`.

    The loss is divided by the labels of the whole optimiser step, over accumulation and processes, as Trainer's own is.
    `eval_loss` is the same loss. `compute_metrics` and `predict` get the student's logits from a second forward.

    Raises:
        TypeError: an option that `causal_lm_loss` does not have, or that the trainer sets; a teacher's name.
        ValueError: options of the trainer that ask for another loss, a teacher that shares what the student trains, or
            whose tokens differ.
    """

    args: Any  # these belong to the Trainer
    model: Any
    processing_class: Any
    accelerator: Any
    compute_loss_context_manager: Any
    get_tp_size: Any
    _prepare_inputs: Any
    _signature_columns: Any

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, distillation: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.distillation = dict(distillation or {})
        check_loaded(teacher=teacher)
        check_trainer_options(self.distillation, [*args, *kwargs.values()], kwargs.get("compute_loss_func"))
        super().__init__(*args, **kwargs)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                "the trainer splits sequences over processes (cp_size or sp_size above 1), where the next token may be "
                "on another process; causal_lm_loss needs whole rows: leave both sizes at 1"
            )
        self.model_accepts_loss_kwargs = True  # Trainer then counts the labels of the step, and scales no loss itself
        self._loss_shifts_labels = True  # it leaves the first label of each row out of the count
        self.teacher = teacher
        if teacher is not None:
            teacher.eval()
            if not hasattr(teacher, "hf_device_map") and next(teacher.parameters()).device != self.args.device:
                teacher.to(self.args.device)
            check_models(self.model, teacher)
            check_own_tokens(self.model, teacher, self.processing_class)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        names = ("topk_logprobs", "topk_indices")
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            averaged = self.accelerator.num_processes // self.get_tp_size()  # processes whose gradients are averaged
            num_items_in_batch = num_items_in_batch / averaged
        with self.accelerator.autocast():
            loss = causal_lm_loss(model, self.teacher, inputs, num_items=num_items_in_batch, **self.distillation)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs(model, inputs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


def check_trainer_options(distillation: dict[str, Any], given: list[Any], compute_loss_func: Any) -> None:
    """Refuses options of the loss that the trainer sets, and options of the trainer that ask for another loss."""
    check_options(**distillation)
    ours = {"num_items", "item_weights", "return_parts"} & distillation.keys()
    if ours:
        raise TypeError(f"distillation has {', '.join(sorted(ours))}, which the trainer sets: leave it out")
    if compute_loss_func is not None:
        raise ValueError("compute_loss_func is another loss; it should be None: causal_lm_loss takes its place")
    for arguments in given:
        if not isinstance(arguments, TrainingArguments):
            continue
        if arguments.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {arguments.label_smoothing_factor}; it should be 0, as causal_lm_loss does "
                "not smooth labels: the teacher's distribution does"
            )
        loss_type = getattr(arguments, "loss_type", "nll")  # of TRL's SFTConfig
        if loss_type != "nll":
            raise ValueError(f"loss_type is {loss_type!r}; it should be 'nll': causal_lm_loss takes its place")
        liger = arguments.liger_kernel_config or {}
        if arguments.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
            raise ValueError(
                "use_liger_kernel is True, which puts another loss into the model's forward; leave it False, or keep "
                'its other kernels with liger_kernel_config={"fused_linear_cross_entropy": False}'
            )
