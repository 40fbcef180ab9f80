"""Distils a causal language model inside its own forward, without building logits.

The student is called as the trainer holds it: plain, compiled, under DDP, FSDP or PEFT. While it runs, the forward of
its head is replaced by one that computes the loss from the head's input and weight. Every hook of every wrapper fires,
and autocast stays as the trainer set it. In place of logits the replaced head returns

    carrier = (loss - loss.detach()) / scale                    value 0, slope 1 / scale

Models transform what the head returns into `cap * tanh(scale * z / cap)`, or into a part of that. At 0 the transform
has the value 0 and the slope `scale`, so the model's output carries the gradient of the loss, unchanged, through the
wrapper's own output.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import fastdistill

__all__ = ["CausalLMLoss", "causal_lm_loss"]

DIVERGENCES = ("kl", "jsd", "tvd", "soft_cross_entropy")
NOT_INPUTS = ("labels", "topk_logprobs", "topk_indices", "length")  # columns that no model takes


class CausalLMLoss(NamedTuple):
    """`causal_lm_loss` with its parts, all scalars; the parts have no gradient."""

    loss: Tensor
    soft: Tensor  # the divergence at the temperature, without alpha and temperature^2
    hard: Tensor  # cross-entropy with the labels
    entropy: Tensor  # of the student


class Head(NamedTuple):
    """How a model makes its logits: `cap * tanh(scale * (x @ W.T + b) / cap)`. `linear` is None if in another way."""

    linear: nn.Linear | None = None
    scale: float = 1.0
    softcap: float | None = None


class Logits(NamedTuple):
    """Logits in factors: `hidden @ weight.T + bias`, softcapped. `weight` None: `hidden` are the logits."""

    hidden: Tensor  # (B, L, d)
    weight: Tensor | None = None  # (V, d)
    bias: Tensor | None = None  # (V)
    softcap: float | None = None

    @property
    def classes(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]


class Options(NamedTuple):
    divergence: str
    temperature: float
    t_squared: bool
    alpha: float
    beta: float
    reverse: bool
    vocab_size: int | None
    num_items: int | float | Tensor | None
    return_parts: bool
    backend: str
    tail: str = "renormalize"  # of a cached teacher


def causal_lm_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    beta: float = 0.5,
    reverse: bool = False,
    vocab_size: int | None = None,
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | CausalLMLoss:
    """Computes the loss of a causal language model against a teacher, token by token.

    A position counts if its next token is a target: a label other than -100; without labels, a token that is neither
    padding nor the first of a packed sequence.

    Args:
        student: the model as the trainer holds it.
        teacher: a model in eval mode, wrapped or not; None where `batch` has `topk_logprobs` and `topk_indices`,
            `(B, L, k)` each.
        batch: what a collator returns; `labels` `(B, L)` are shifted here.
        divergence: "kl", "jsd", "tvd" or "soft_cross_entropy".
        temperature, t_squared, alpha, beta, reverse, backend: as in `fastdistill.linear_kl_div` and its siblings.
        vocab_size: only the first so many classes take part; None: those that both models have.
        num_items: the number of positions to divide by in place of those counted here, such as `num_items_in_batch`
            of transformers divided by the number of processes whose gradients are averaged.
        return_parts: return a `CausalLMLoss`; its parts cost three more products of the head.

    Raises:
        ValueError: an unknown divergence, a teacher that is the student itself or in training mode, neither a teacher
            nor top-k columns, a divergence that a cached teacher does not have, and what the losses raise.
    """
    check_options(divergence=divergence)
    options = Options(
        divergence, temperature, t_squared, alpha, beta, reverse, vocab_size, num_items, return_parts, backend
    )
    labels, counted = targets(batch)
    topk = None if teacher is not None else cached_teacher(batch, options)
    inputs = model_inputs(student, batch)
    head = head_of(student)
    target: Logits | None = None
    if teacher is not None:
        check_teacher(student, teacher)
        target = teacher_logits(teacher, model_inputs(teacher, batch), linear=head.linear is not None)
        if target.weight is None and head.linear is not None:  # the ops take both sides in factors or neither
            head = Head()

    def compute(logits: Logits) -> CausalLMLoss:
        return losses(logits, target, topk, labels, counted, options)

    output, found = student_losses(student, inputs, head, compute)
    loss = found.loss
    balance = getattr(output, "aux_loss", None)  # of a mixture of experts, where its config asks for it
    if balance is not None:
        loss = loss + unwrapped(student).router_aux_loss_coef * balance
    return found._replace(loss=loss) if return_parts else loss


def check_options(divergence: str = "kl", **others: Any) -> None:
    unknown = others.keys() - inspect.signature(causal_lm_loss).parameters.keys()
    if unknown:
        raise TypeError(f"causal_lm_loss has no option {', '.join(sorted(unknown))}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it should be one of {', '.join(map(repr, DIVERGENCES))}")


# -- the batch -----------------------------------------------------------------------------------------------


def targets(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:  # (B, L) each
    """Returns the class that each position predicts, and whether it counts. The last position predicts nothing."""
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if "labels" in batch:
        following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return following, following != -100
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    if mask is not None:
        counted[:, :-1] &= mask[:, 1:].bool() & mask[:, :-1].bool()
    if positions is not None:
        counted[:, :-1] &= positions[:, 1:] > positions[:, :-1]
    return nn.functional.pad(ids[:, 1:], (0, 1)), counted


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns that the model takes. Positions of rows padded on the left start at their first token."""
    inputs = {name: x for name, x in batch.items() if name not in NOT_INPUTS}
    takes = inspect.signature(type(unwrapped(model)).forward).parameters  # wrappers replace an instance's
    mask = inputs.get("attention_mask")
    if mask is not None and "position_ids" not in inputs and "position_ids" in takes:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "use_cache": False} if "use_cache" in takes else inputs


def cached_teacher(batch: Mapping[str, Any], options: Options) -> tuple[Tensor, Tensor]:  # (B, L, k) each
    if "topk_logprobs" not in batch or "topk_indices" not in batch:
        raise ValueError(
            f"teacher is None and batch has the columns {sorted(batch)}; pass a teacher, or topk_logprobs and "
            "topk_indices, which fastdistill.train.write_cache writes"
        )
    if options.divergence not in ("kl", "soft_cross_entropy") or options.reverse:
        asked = "reverse=True" if options.reverse else repr(options.divergence)
        raise ValueError(f"divergence is {asked}; a cached teacher has 'kl' and 'soft_cross_entropy': pass a teacher")
    return batch["topk_logprobs"], batch["topk_indices"]


# -- the losses ----------------------------------------------------------------------------------------------


def losses(
    student: Logits,
    teacher: Logits | None,
    topk: tuple[Tensor, Tensor] | None,
    labels: Tensor,  # (B, L)
    counted: Tensor,  # (B, L)
    options: Options,
) -> CausalLMLoss:
    classes = options.vocab_size
    if classes is None and teacher is not None and teacher.classes != student.classes:
        classes = min(student.classes, teacher.classes)
    shared = {
        "mask": counted, "vocab_size": classes, "num_items": options.num_items, "backend": options.backend,
        "student_softcap": student.softcap,
    }  # fmt: skip
    soft = {"temperature": options.temperature, "t_squared": options.t_squared}
    hard = {"labels": labels, "alpha": options.alpha} if options.alpha < 1 else {}
    loss = divergence(student, teacher, topk, options, **soft, **hard, **shared)
    if not options.return_parts:
        return CausalLMLoss(loss, loss, loss, loss)
    with torch.no_grad():
        same = student._replace(
            hidden=student.hidden.detach(),
            weight=None if student.weight is None else student.weight.detach(),
            bias=None if student.bias is None else student.bias.detach(),
        )
        return CausalLMLoss(
            loss,
            divergence(student, teacher, topk, options, temperature=options.temperature, **shared),
            divergence(student, teacher, topk, options, labels=labels, alpha=0.0, **shared),
            divergence(same, same, None, options._replace(divergence="soft_cross_entropy"), **shared),
        )


def divergence(
    student: Logits, teacher: Logits | None, topk: tuple[Tensor, Tensor] | None, options: Options, **keywords: Any
) -> Tensor:
    prefix, tensors = "", [student.hidden]
    if student.weight is not None:
        prefix = "linear_"
        tensors.append(student.weight)
        keywords["student_bias"] = student.bias
    if topk is not None:
        op = getattr(fastdistill, f"{prefix}topk_soft_cross_entropy")
        loss = op(*tensors, *topk, tail=options.tail, **keywords)
        return loss - teacher_entropy(topk[0], keywords) if options.divergence == "kl" else loss
    assert teacher is not None
    tensors.append(teacher.hidden)
    keywords["teacher_softcap"] = teacher.softcap
    if teacher.weight is not None:
        tensors.append(teacher.weight)
        keywords["teacher_bias"] = teacher.bias
    name = {"kl": "kl_div"}.get(options.divergence, options.divergence)
    own: dict[str, Any] = {"kl": {"reverse": options.reverse}, "jsd": {"beta": options.beta}}
    return getattr(fastdistill, prefix + name)(*tensors, **keywords, **own.get(options.divergence, {}))


def teacher_entropy(logprobs: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Computes the mean entropy of the teacher's listed classes, weighted as the soft loss is."""
    temperature, counted = keywords.get("temperature", 1.0), keywords["mask"]
    log_q = (logprobs.float() / temperature).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).nan_to_num(0.0).sum(-1)  # (B, L); a class of probability 0 adds 0
    weight = keywords.get("alpha", 1.0) * (temperature**2 if keywords.get("t_squared") else 1.0)
    items = counted.sum() if keywords["num_items"] is None else keywords["num_items"]
    total = entropy.masked_fill(~counted, 0).sum() * weight
    return total / torch.as_tensor(items, device=total.device).clamp(min=torch.finfo(total.dtype).tiny)


# -- the models ----------------------------------------------------------------------------------------------


def unwrapped(model: Any) -> PreTrainedModel:
    """Returns the transformers model inside DDP, FSDP1, DeepSpeed (`module`), torch.compile (`_orig_mod`) and PEFT."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
            continue
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(
                f"the model is a {type(model).__name__}; it should be a transformers model, wrapped or not"
            )
        model = inner
    return model


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    if unwrapped(student) is unwrapped(teacher):
        raise ValueError("teacher is the student itself; it should be another model, or a deep copy made beforehand")
    if teacher.training:
        raise ValueError("teacher is in training mode; it should be in eval mode: call teacher.eval()")


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the nn.Linear whose forward makes the logits; None if something else does (a LoRA, 8 bits)."""
    head: Any = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)  # PEFT's copy of a module that is trained whole
    if isinstance(saved, nn.ModuleDict) and not getattr(head, "disable_adapters", False):
        (name,) = head.active_adapters
        head = saved[name]
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return head if plain else None


HEADS: weakref.WeakKeyDictionary[nn.Module, Head] = weakref.WeakKeyDictionary()


def head_of(model: nn.Module) -> Head:
    """Returns how the model makes its logits: as its config says, if a forward of 4 tokens agrees with it."""
    base = unwrapped(model)
    linear = linear_head(base)
    if linear is None:
        return Head()
    if linear not in HEADS:
        HEADS[linear] = judged(model, base, linear)
    return HEADS[linear]


@torch.no_grad()
def judged(model: Any, base: PreTrainedModel, linear: nn.Linear) -> Head:
    if hasattr(model, "_orig_mod"):
        model = model._orig_mod  # no graph is compiled for a look at the head
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    made: list[Tensor] = []
    hook = linear.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    device = next(base.parameters()).device
    try:
        logits = model(input_ids=torch.arange(4, device=device)[None] % config.vocab_size).logits
    finally:
        hook.remove()
    if len(made) != 1 or made[0].shape != logits.shape:
        return Head()
    expected = made[0] * scale
    if softcap:
        expected = torch.tanh(expected / softcap) * softcap
    agrees = torch.allclose(expected.to(logits.dtype), logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    return Head(linear, scale, softcap or None) if agrees else Head()


@contextmanager
def replaced(linear: nn.Linear, function: Callable[[Tensor, nn.Linear], tuple[Tensor, Any]]) -> Iterator[list[Any]]:
    """Replaces the module's forward by `function` within the block; yields the list of the second things it returns."""
    seen: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        output, found = function(x, linear)
        seen.append(found)
        return output

    before: Any = linear.__dict__.get("forward")
    linear.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        if before is None:
            del linear.forward
        else:
            linear.forward = before  # type: ignore[method-assign]


def student_losses(
    student: Callable[..., Any], inputs: dict[str, Any], head: Head, compute: Callable[[Logits], CausalLMLoss]
) -> tuple[Any, CausalLMLoss]:
    """Runs the student with the loss in place of its head's product; returns its output as well."""
    if head.linear is None:
        output = student(**inputs)
        return output, compute(Logits(output.logits))

    def carrier(x: Tensor, linear: nn.Linear) -> tuple[Tensor, CausalLMLoss]:
        found = compute(Logits(x * head.scale, linear.weight, linear.bias, head.softcap))
        return ((found.loss - found.loss.detach()) / head.scale).view(1, 1, 1), found

    with replaced(head.linear, carrier) as seen:
        output = student(**inputs)
    (found,) = seen
    return output, found._replace(loss=found.loss.detach() + output.logits.sum())


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: dict[str, Any], linear: bool) -> Logits:
    head = head_of(teacher) if linear else Head()
    if head.linear is None:
        return Logits(teacher(**inputs).logits)
    # FSDP and DeepSpeed free the whole weight after the head's forward, so that a copy must be kept.
    is_sharded = isinstance(head.linear.weight, DTensor) or any(hasattr(p, "ds_id") for p in head.linear.parameters())

    def keep(x: Tensor, module: nn.Linear) -> tuple[Tensor, Logits]:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if is_sharded:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return x.new_zeros(1, 1, 1), Logits(x * head.scale, weight, bias, head.softcap)

    with replaced(head.linear, keep) as seen:
        teacher(**inputs)
    return seen[0]
