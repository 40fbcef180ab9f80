"""A student and its objective as one module, so that the optimiser, DDP, FSDP and checkpoints see both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill.train.capture import States, capture
from fastdistill.train.causal_lm import Logits, balance_weight, in_factors, losses, student_losses
from fastdistill.train.heads import Head, body, head_of
from fastdistill.train.inputs import forward_arguments
from fastdistill.train.objective import Objective
from fastdistill.train.terms import Counts, next_tokens, prediction_options, with_length

__all__ = ["DistillationModel", "predicts_next_tokens", "state_mask", "teacher_states"]


class DistillationModel(nn.Module):
    """A student and its objective. `forward` returns {"loss", each term's loss, "logits"}.

    The prediction loss of a causal language model is computed inside its head (`fastdistill.train.causal_lm`), so that
    its logits never exist; "logits" is then None. If its config asks for the load-balancing loss of a mixture of
    experts, that is returned as "balance", times its coefficient, and is part of "loss".
    """

    accepts_loss_kwargs = True  # losses are divided by num_items, not again by the accumulation steps

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        objective.for_head(student)
        if predicts_next_tokens(student, objective) and objective.options.parity == "official":
            raise ValueError(
                "parity is 'official', which counts padding; the prediction term of a causal language model counts "
                "next tokens: use 'masked'"
            )

    def forward(
        self, teacher: States | None = None, teacher_logits: Tensor | None = None,
        topk_logprobs: Tensor | None = None, topk_indices: Tensor | None = None,
        labels: Tensor | None = None, num_items: Tensor | None = None, with_loss: bool = True, **batch: Tensor,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        objective = self.objective
        if not with_loss:
            return {"logits": capture(self.student, batch).logits}
        topk = None if topk_logprobs is None or topk_indices is None else (topk_logprobs, topk_indices)
        targets: dict[str, Any] = {"labels": labels, "teacher_logits": teacher_logits, "topk": topk}
        # The head of a student that learns inner states only would compute logits that nobody reads.
        run = partial(
            capture, self.student if objective.needs_logits else body(self.student), batch,
            hidden=set(objective.hidden), attention=objective.attention, values=objective.needs_values,
        )  # fmt: skip
        learns_tokens = predicts_next_tokens(self.student, objective)
        if learns_tokens:
            states, targets["next_token_loss"] = self._next_tokens(run, batch, teacher, num_items, **targets)
        else:
            states = run()
        mask = state_mask(self.student, batch)
        if mask is None and "input_ids" not in batch:
            num_items = image_items(states, num_items, objective.needs_logits)
        found = objective(states, teacher, mask=mask, num_items=num_items, **targets)
        if learns_tokens and states.balance is not None:
            counted = next_tokens({**batch, "labels": labels})[1]
            items = None if num_items is None else Counts(*num_items.unbind()).next_tokens
            found = {**found, "balance": balance_weight(self.student, counted, items) * states.balance}
        return {"loss": torch.stack(list(found.values())).sum(), **found, "logits": states.logits}

    @torch.compiler.disable  # the head's forward is another function in each step
    def _next_tokens(
        self, run: Callable[[], States], batch: Mapping[str, Tensor], teacher: States | None, num_items: Tensor | None,
        *, labels: Tensor | None, teacher_logits: Tensor | None, topk: tuple[Tensor, Tensor] | None,
    ) -> tuple[States, Tensor]:  # fmt: skip
        """Runs the student by `run()`, with the loss in its head. Returns its states and that loss."""
        items = None if num_items is None else Counts(*num_items.unbind()).next_tokens
        options = prediction_options(self.objective.options, items, is_cached=topk is not None)
        target: Logits | None = None
        if topk is None:
            logits = teacher_logits if teacher_logits is not None or teacher is None else teacher.logits
            target = Logits(logits) if logits is not None else None if teacher is None else teacher.factors
            if target is None:
                raise ValueError("there are no teacher logits; give a teacher with a head, or a cache with top_k")
        forward_arguments(self.student, batch)  # may run the model once, which needs its own head
        # The ops take both sides in factors or neither.
        head = Head() if target is not None and target.weight is None else head_of(self.student)
        following, counted = next_tokens({**batch, "labels": labels})
        states, found = student_losses(
            run, {}, head, lambda logits: losses(logits, target, topk, following, counted, options)
        )
        return states if head.linear is None else replace(states, logits=None), found.loss

    def get_input_embeddings(self) -> nn.Module:
        """Returns the student's, to which Trainer adds the noise of `neftune_noise_alpha`."""
        return self.student.get_input_embeddings()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.student.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Earlier versions of Trainer call this name."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)


def state_mask(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:  # (B, L)
    """Returns which of the states that a model makes of a batch are no padding; None: all of them.

    A mask of sound is over samples, or over steps of a spectrogram, of which the model makes fewer frames.
    """
    mask = batch.get("attention_mask")
    if not hasattr(model, "_get_feature_vector_attention_mask"):
        return mask
    sound = batch[model.main_input_name]  # (B, T) or (B, T, d)
    if mask is None:
        mask = torch.ones(sound.shape[:2], dtype=torch.long, device=sound.device)
    lengths, frames = model._get_feat_extract_output_lengths, model._get_feature_vector_attention_mask
    # An adapter comes after the layers whose states are compared.
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}
    return frames(int(lengths(torch.tensor(sound.shape[1]), **options)), mask, **options)


def image_items(states: States, num_items: Tensor | None, needs_logits: bool) -> Tensor | None:
    """Returns the counts of images, of which `count_items` knew the rows alone. Raises ValueError for other logits."""
    if needs_logits and states.logits is not None and states.logits.dim() != 2:
        raise ValueError(
            f"the student's logits are {tuple(states.logits.shape)}; the prediction term of images needs a classifier "
            "of whole images, (B, C): leave 'prediction' out of terms"
        )
    return num_items if num_items is None or states.length is None else with_length(num_items, states.length)


def predicts_next_tokens(student: PreTrainedModel, objective: Objective) -> bool:
    """Returns whether the objective has the prediction term and the student is a causal language model."""
    return objective.needs_logits and student.can_generate() and not student.config.is_encoder_decoder


@torch.no_grad()
def teacher_states(
    teacher: PreTrainedModel, student: PreTrainedModel, objective: Objective, batch: Mapping[str, Any], has_logits: bool
) -> States | None:
    """Runs a teacher on a batch and returns what the terms read of it; None if nothing, in which case it does not run.

    `has_logits` says that the batch brings the teacher's prediction. A causal language model's logits are returned in
    factors, if the student can learn from those.
    """
    needs_logits = objective.needs_teacher_logits and not has_logits
    if not (objective.hidden or objective.attention or needs_logits):
        return None
    run = partial(
        capture, teacher if needs_logits else body(teacher), batch,
        hidden=set(objective.hidden.values()), attention=set(objective.attention.values()),
        values=objective.needs_values,
    )  # fmt: skip
    if not (needs_logits and predicts_next_tokens(student, objective) and head_of(student).linear is not None):
        return run()
    head = head_of(teacher)
    if head.linear is None:
        return run()
    forward_arguments(teacher, batch)  # may run the model once, which needs its own head
    states, factors = in_factors(run, head)
    return replace(states, logits=None, factors=factors)
