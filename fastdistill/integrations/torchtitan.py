"""Distils in torchtitan's Trainer, without logits; docs/in_your_trainer.md shows how.

torchtitan gives its loss function the logits and the labels, and divides the sum by the valid tokens of the whole step.
A teacher needs the tokens too, and logits are what the losses here avoid. So the mixin replaces the step that calls the
loss function. The forward of the student's head, which FSDP has gathered at that moment, returns in place of logits

    carrier = loss - loss.detach()                              value 0, slope 1

which torchtitan's models hand out unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fastdistill
from fastdistill import distributed
from fastdistill.train.causal_lm import carried_by, in_place_of_logits, replaced, sharded_as

__all__ = ["DistillationMixin"]

LOSSES = {"kl": "linear_kl_div", "jsd": "linear_jsd", "tvd": "linear_tvd",
          "soft_cross_entropy": "linear_soft_cross_entropy"}  # fmt: skip


class DistillationMixin:
    """Replaces the loss of torchtitan's Trainer. Put it before that class, and define `build_teacher`.

    `distillation` holds `divergence` ("kl", "jsd", "tvd" or "soft_cross_entropy") and keywords of that `linear_` loss:
    temperature, t_squared, alpha, beta, ... As in torchtitan, labels are already shifted, and the loss is the sum over
    the valid tokens of a micro-batch, divided by those of the step. Validation measures the loss of the train spec.

    Raises:
        ValueError: an unknown divergence; pipeline or context parallelism; a head that is not an nn.Linear.
        TypeError: an option that the loss does not have.
    """

    distillation: Mapping[str, Any] = {}
    model_parts: list[nn.Module]  # these belong to the Trainer
    train_context: Any
    maybe_enable_amp: Any
    post_dataloading_process: Any

    def __init__(self, job_config: Any) -> None:
        self.loss_of_rows = chosen_loss(**self.distillation)
        for name in ("pipeline", "context"):
            degree = getattr(job_config.parallelism, f"{name}_parallel_degree")
            if degree != 1:
                raise ValueError(
                    f"parallelism.{name}_parallel_degree is {degree}; it should be 1, as the teacher is not split: "
                    "shard with data_parallel_shard_degree or tensor_parallel_degree"
                )
        super().__init__(job_config)  # type: ignore[call-arg]
        self.teacher = self.build_teacher().requires_grad_(False).eval()
        for model in (self.model_parts[0], self.teacher):
            head_of(model)

    def build_teacher(self) -> nn.Module:
        """Returns the teacher on this process's device: a torchtitan model with the student's vocabulary."""
        raise NotImplementedError(f"{type(self).__name__} should define build_teacher, which returns the teacher")

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels)
        arguments = {**extra_inputs, **extra_kwargs}
        with self.train_context(), self.maybe_enable_amp:
            hidden, weight, bias = teacher_logits(self.teacher, inputs, arguments)

            def carrier(x: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
                shard = sharded_as(head.weight, weight)
                own = None if bias is None else sharded_as(head.weight, bias)
                others = {"teacher_bias": own, "labels": labels, "num_items": global_valid_tokens}
                loss = self.loss_of_rows(x, head.weight, hidden, shard, student_bias=head.bias, **others)
                return in_place_of_logits(loss - loss.detach(), x), loss.detach()

            with replaced(head_of(self.model_parts[0]), carrier) as seen:
                output = self.model_parts[0](inputs, **arguments)
            loss = seen[0] + carried_by(output)
        loss.backward()
        return loss


def chosen_loss(divergence: str = "kl", **options: Any) -> Callable[..., Tensor]:
    if divergence not in LOSSES:
        raise ValueError(f"divergence is {divergence!r}; it should be one of {', '.join(map(repr, LOSSES))}")
    name = LOSSES[divergence]
    unknown = options.keys() - inspect.signature(getattr(fastdistill, name)).parameters.keys()
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}")

    def loss(student: Tensor, student_weight: Tensor, *teacher: Tensor, **keywords: Any) -> Tensor:
        ops = distributed if isinstance(student_weight, DTensor) else fastdistill  # under tensor parallelism
        return getattr(ops, name)(student, student_weight, *teacher, **keywords, **options)

    return loss


def head_of(model: Any) -> nn.Linear:
    head = getattr(model, "output", None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head of {type(model).__name__} (.output) is a {type(head).__name__}; it should be an nn.Linear: "
            "leave it out of the model converters"
        )
    return head


Factors = tuple[Tensor, Tensor, Tensor | None]  # hidden states (B, L, d), weight (V, d) and bias (V) of logits


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: Tensor, arguments: dict[str, Any]) -> Factors:
    """Runs the teacher up to the product of its head. FSDP frees the whole weight afterwards, so a copy is kept."""
    head = head_of(teacher)
    is_sharded = isinstance(head.weight, DTensor)

    def keep(x: Tensor, module: nn.Linear) -> tuple[Tensor, Factors]:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if is_sharded:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return x.new_zeros(1, 1, 1), (x, weight, bias)

    with replaced(head, keep) as seen:
        teacher(inputs, **arguments)
    return seen[0]
