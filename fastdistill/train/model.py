"""A student and its objective as one module, so that the optimiser, DDP, FSDP and checkpoints see both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill.train.capture import States, capture
from fastdistill.train.objective import Objective

__all__ = ["DistillationModel", "has_linear_head"]


class DistillationModel(nn.Module):
    """A student and its objective. `forward` returns {"loss", each term's loss, "logits"}.

    `linear_head` says whether the loss against an offline teacher may take the student's last hidden state and head
    instead of its logits, which then never exist (`has_linear_head`).
    """

    accepts_loss_kwargs = True  # losses are divided by num_items, not again by the accumulation steps

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective, self.linear_head = student, objective, False

    def forward(
        self, teacher: States | None = None, teacher_logits: Tensor | None = None,
        topk_logprobs: Tensor | None = None, topk_indices: Tensor | None = None,
        labels: Tensor | None = None, num_items: Tensor | None = None, with_loss: bool = True, **batch: Tensor,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        objective = self.objective
        if not with_loss:
            return {"logits": capture(self.student, batch).logits}
        topk = None if topk_logprobs is None or topk_indices is None else (topk_logprobs, topk_indices)
        layer = self.student.get_output_embeddings() if self.linear_head and topk and objective.needs_logits else None
        # The head of a student that learns inner states only would compute logits that nobody reads.
        student = self.student if objective.needs_logits and layer is None else self.student.base_model
        last = self.student.config.num_hidden_layers  # the hidden state that a head takes
        states = capture(
            student, batch, hidden=set(objective.hidden) if layer is None else {*objective.hidden, last},
            attention=objective.attention, values=objective.needs_values,
        )  # fmt: skip
        losses = objective(
            states, teacher, mask=batch.get("attention_mask"), num_items=num_items,
            labels=labels, teacher_logits=teacher_logits, topk=topk,
            head=None if layer is None else (states.hidden[last], layer.weight, layer.bias),
        )  # fmt: skip
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "logits": states.logits}

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.student.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Earlier versions of Trainer call this name."""
        self.student.gradient_checkpointing_enable(*args, **kwargs)


@torch.no_grad()
def has_linear_head(student: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Returns whether the student's logits are exactly its last hidden state times the head's weight, plus its bias.

    A forward pass decides: the head's input must be the last hidden state, and its output the logits, to the bit.
    A softcap, a scale, or a transform before the head makes them differ, whatever the config calls it.
    """
    head = student.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output.clone())))
    was_training = student.training
    student.eval()
    last = student.config.num_hidden_layers
    try:
        logits = capture(student, batch).logits
        hidden = capture(student.base_model, batch, hidden=[last]).hidden[last]
    finally:
        hook.remove()
        student.train(was_training)
    if not seen or logits is None:
        return False
    given, made = seen[0]  # a base model that is the student itself calls the head again
    return torch.equal(given, hidden) and torch.equal(made.to(logits.dtype), logits)
