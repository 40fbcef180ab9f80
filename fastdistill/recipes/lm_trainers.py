"""Trains the student of `fastdistill lm`: a trainer of TRL, held-out figures, and a whole output."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTTrainer

from fastdistill.integrations.transformers import CausalLMDistillationMixin
from fastdistill.train.causal_lm import causal_lm_loss, targets
from fastdistill.train.processes import on_main
from fastdistill.train.resumable import ResumableTrainer

__all__ = ["LMTrainer", "StudentTrainer"]


class StudentTrainer(ResumableTrainer):
    """Evaluates a student on held-out labels, and writes it whole. Put it before a loss and one of TRL's trainers.

    `eval_loss` is the cross-entropy of the labels per token, whatever the loss that trains.

    Args:
        base: makes the student again, for the output of a LoRA, which is merged.
        report: writes the report to the working folder, on all processes, when all else is there.
    """

    def __init__(
        self, *args: Any, base: Callable[[], PreTrainedModel], report: Callable[[StudentTrainer], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError("fsdp is set; accelerate shards on accelerators only: leave it out on a CPU")
        self.base, self.report = base, report
        self.held_out = torch.zeros(2, dtype=torch.float64)  # sum of the losses of all labels, their number

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self.mask_repeated(self._prepare_inputs(inputs))
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self.hold_out(result[0], inputs["labels"])
        return result

    def mask_repeated(self, inputs: Any) -> Any:
        """Leaves the labels of repeated rows out of the count."""
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if state.end_of_dataloader and state.remainder > 0 and not getattr(self, "padding_free", False):
            # accelerate fills the last batches with rows from the start
            labels[max(state.remainder - len(labels) * self.args.process_index, 0) :] = -100
        return inputs

    def hold_out(self, loss: Tensor, labels: Tensor) -> None:
        """Adds a batch's mean loss to that of all held-out rows."""
        count = (labels[:, 1:] != -100).sum()
        total = (loss * count).masked_fill(count == 0, 0)  # the mean of no labels is NaN
        self.held_out += torch.stack([total, count]).double().cpu()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs.update({f"eval_{name}": value for name, value in self.take_held_out().items()})
        super().log(logs, *args, **kwargs)

    def take_held_out(self) -> dict[str, float]:
        """Returns the loss and perplexity of the held-out rows that were read since the last call."""
        total: Tensor = self.accelerator.reduce(self.held_out.to(self.args.device, torch.float32), "sum")
        self.held_out.zero_()
        loss = float(total[0] / total[1])
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    @torch.no_grad()
    def evaluate_teacher(self, teacher: nn.Module) -> dict[str, float]:
        """Returns a teacher's loss and perplexity on the held-out rows, without storing its logits."""
        self.model.eval()  # else on-policy training would answer the rows
        for inputs in self.get_eval_dataloader():
            inputs = self.mask_repeated(self._prepare_inputs(inputs))
            following, _ = targets(inputs)
            labels = {"topk_indices": following.clamp_min(0)[..., None]}  # as of a teacher that is sure of them
            labels["topk_logprobs"] = torch.zeros_like(labels["topk_indices"], dtype=torch.float32)
            with self.compute_loss_context_manager():
                loss = causal_lm_loss(teacher, None, {**inputs, **labels}, divergence="soft_cross_entropy")
            self.hold_out(loss, inputs["labels"])
        return self.take_held_out()

    def save_state(self) -> None:
        super().save_state()
        self.report(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and evaluates once more if the last step was not."""
        result = super().train(*args, **kwargs)
        done = [entry["step"] for entry in self.state.log_history if "eval_loss" in entry]
        if self.eval_dataset is not None and (
            self.args.load_best_model_at_end or done[-1:] != [self.state.global_step]
        ):
            self.evaluate()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model. The output of a LoRA is the merged model, with the adapter beside it in `adapter`."""
        work = Path(self.args.output_dir)
        if output_dir is not None or not isinstance(self.model, PeftModel):
            return super().save_model(output_dir, _internal_call)
        super().save_model(str(work / "adapter"), True)
        self.accelerator.wait_for_everyone()
        on_main(lambda: self.write_merged(work))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def write_merged(self, work: Path) -> None:
        merged = PeftModel.from_pretrained(self.base(), str(work / "adapter")).merge_and_unload()
        merged.save_pretrained(work)
        self.processing_class.save_pretrained(work)


class LMTrainer(StudentTrainer, CausalLMDistillationMixin, SFTTrainer):
    """TRL's SFTTrainer with a teacher, which may be stopped at any moment."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.distillation.get("alpha", 1.0) > 0:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return SFTTrainer.compute_loss(self, model, inputs, *args, **kwargs)
