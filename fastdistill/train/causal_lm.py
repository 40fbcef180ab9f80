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
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastdistill
from fastdistill import distributed
from fastdistill._checks import Backend, Tail, fraction, positive
from fastdistill.functional._dispatch import mean
from fastdistill.train.checks import check_shared
from fastdistill.train.heads import Head, head_of, is_sharded, replaced, takes_virtual_tokens, unwrapped
from fastdistill.train.inputs import (
    entries,
    forward_arguments,
    input_names,
    judge,
    refuse_encoder_decoder,
    refuse_look_ahead,
    with_positions,
)

__all__ = ["CausalLMLoss", "causal_lm_loss"]

Divergence = Literal["kl", "jsd", "tvd", "soft_cross_entropy"]
DIVERGENCES = get_args(Divergence)


class CausalLMLoss(NamedTuple):
    """`causal_lm_loss` with its parts, all scalars; the parts have no gradient."""

    loss: Tensor
    soft: Tensor  # the divergence at the temperature, without alpha and temperature^2
    hard: Tensor  # cross-entropy with the labels
    entropy: Tensor  # of the student


class Logits(NamedTuple):
    """Logits in factors: `scale * (hidden @ weight.T + bias)`, softcapped. `weight` None: `hidden` are the logits."""

    hidden: Tensor  # (B, L, d)
    weight: Tensor | None = None  # (V, d)
    bias: Tensor | None = None  # (V)
    softcap: float | None = None
    scale: float = 1.0

    @property
    def classes(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]


class Options(NamedTuple):
    divergence: Divergence
    temperature: float
    t_squared: bool
    alpha: float
    beta: float
    reverse: bool
    vocab_size: int | None
    num_items: int | float | Tensor | None
    return_parts: bool
    backend: Backend
    skew: float = 0.0
    item_weights: Tensor | None = None  # (B, L), shifted as the labels
    tail: Tail = "renormalize"  # of a cached teacher


@overload
def causal_lm_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    beta: float = 0.5,
    reverse: bool = False,
    skew: float = 0.0,
    vocab_size: int | None = None,
    item_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    return_parts: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...
@overload
def causal_lm_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    beta: float = 0.5,
    reverse: bool = False,
    skew: float = 0.0,
    vocab_size: int | None = None,
    item_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    return_parts: Literal[True],
    backend: Backend = "auto",
) -> CausalLMLoss: ...
def causal_lm_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    beta: float = 0.5,
    reverse: bool = False,
    skew: float = 0.0,
    vocab_size: int | None = None,
    item_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
    backend: Backend = "auto",
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
        temperature, t_squared, alpha, backend: as in `fastdistill.linear_kl_div`.
        beta: of "jsd".
        reverse, skew: of "kl"; a cached teacher has no skew.
        vocab_size: only the first so many classes take part; None: those that both models have.
        item_weights: `(B, L)`, at least 0; the loss that has `labels[:, i]` as its target is multiplied by
            `item_weights[:, i]`. The mean still divides by the number of positions that count.
        num_items: the number of positions to divide by in place of those counted here, such as `num_items_in_batch`
            of transformers divided by the number of processes whose gradients are averaged.
        return_parts: return a `CausalLMLoss`; its parts cost three more products of the head.

    The auxiliary loss of a mixture of experts is added with the coefficient of the config, if the config asks for it.
    With `num_items` it is weighted by `counted / num_items`, so that micro-batches add up to its mean.

    Raises:
        TypeError: a model that is not loaded, such as its name.
        ValueError: an unknown divergence, an option of another divergence, a teacher that is or shares what the student
            trains or is in training mode, neither a teacher nor top-k columns, a divergence that a cached teacher does
            not have, labels of another shape than the tokens, an encoder-decoder, a model whose tokens see those after
            them (BERT's masked language model), and what the losses raise.
    """
    check_options(divergence, beta, reverse, skew, temperature=temperature, alpha=alpha)
    check_models(student, teacher)
    labels, counted = targets(batch)
    options = Options(divergence, temperature, t_squared, alpha, beta, reverse, vocab_size, num_items, return_parts,
                      backend, skew, shifted(item_weights, batch))  # fmt: skip
    topk = None if teacher is not None else cached_teacher(batch, options)
    inputs = model_inputs(student, batch)
    head = head_of(student, inputs)
    target: Logits | None = None
    if teacher is not None:
        target = teacher_logits(teacher, model_inputs(teacher, batch), linear=head.linear is not None)
        if target.weight is None:  # the ops take both sides in factors or neither
            head = Head()

    def compute(logits: Logits) -> CausalLMLoss:
        return losses(logits, target, topk, labels, counted, options)

    output, found = student_losses(student, inputs, head, compute)
    balance = getattr(output, "aux_loss", None)
    if balance is not None:
        found = found._replace(loss=found.loss + balance_weight(student, counted, num_items) * balance)
    return found if return_parts else found.loss


def check_options(
    divergence: Divergence = "kl", beta: float = 0.5, reverse: bool = False, skew: float = 0.0, **others: Any
) -> None:
    parameters = inspect.signature(causal_lm_loss).parameters.values()
    unknown = others.keys() - {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    if unknown:
        raise TypeError(f"causal_lm_loss has no option {', '.join(sorted(unknown))}")
    positive("temperature", others.get("temperature", 1.0))
    fraction("alpha", others.get("alpha", 1.0))
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it should be one of {', '.join(map(repr, DIVERGENCES))}")
    for name, value, default, owner in (
        ("beta", beta, 0.5, "jsd"), ("reverse", reverse, False, "kl"), ("skew", skew, 0.0, "kl")
    ):  # fmt: skip
        if value != default and divergence != owner:
            raise ValueError(f"{name} is {value} and divergence {divergence!r}; {name} is an option of {owner!r} alone")


# -- the batch -----------------------------------------------------------------------------------------------


def targets(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:  # (B, L) each
    """Returns the class that each position predicts, and whether it counts. The last position predicts nothing."""
    if "input_ids" not in batch:
        raise ValueError(
            f"batch has the columns {sorted(batch)}; it should have input_ids (B, L), which both models read"
        )
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels is not None:
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; it should be {tuple(ids.shape)}, that of input_ids, a token "
                "a position: they are shifted by one here"
            )
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return following, following != -100
    positions = with_positions(batch).get("position_ids")
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, -1] = False
    if mask is not None:
        counted[:, :-1] &= mask[:, 1:].bool() & mask[:, :-1].bool()
    if positions is not None:
        counted[:, :-1] &= positions[:, 1:] > positions[:, :-1]
    return nn.functional.pad(ids[:, 1:], (0, 1)), counted


def shifted(item_weights: Tensor | None, batch: Mapping[str, Any]) -> Tensor | None:
    if item_weights is None:
        return None
    rows = tuple(batch["input_ids"].shape)
    if tuple(item_weights.shape) != rows:
        raise ValueError(f"item_weights has shape {tuple(item_weights.shape)}; it should be {rows}, as the labels")
    return nn.functional.pad(item_weights[:, 1:], (0, 1))


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `forward_arguments` does, without a cache of keys and values.

    Virtual tokens of PEFT are allowed, where a language model reads them before a row that has no other positions.
    """
    if takes_virtual_tokens(model):
        check_virtual_tokens(batch)
        inputs = entries(model, batch)
    else:
        judge(model, batch)
        inputs = forward_arguments(model, batch)
    return {**inputs, "use_cache": False} if "use_cache" in (input_names(model) or ()) else inputs


def check_virtual_tokens(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for positions and for padding on the left, which PEFT puts behind virtual tokens."""
    mask = batch.get("attention_mask")
    for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
        if name in batch:
            raise ValueError(
                f"batch has {name}, and the model is a PEFT model with virtual tokens, which ignores them: leave "
                f"{name} out (and do not pack rows), or use another adapter"
            )
    if mask is not None and not bool(mask[:, 0].all()):
        raise ValueError(
            "the batch is padded on the left, and the model is a PEFT model with virtual tokens, which the padding "
            'would separate from the text: set padding_side="right" on the tokenizer, or use another adapter'
        )


def cached_teacher(batch: Mapping[str, Any], options: Options) -> tuple[Tensor, Tensor]:  # (B, L, k) each
    if "topk_logprobs" not in batch or "topk_indices" not in batch:
        raise ValueError(
            f"teacher is None and batch has the columns {sorted(batch)}; pass a teacher, or topk_logprobs and "
            "topk_indices, which fastdistill.train.write_cache writes"
        )
    if options.divergence not in ("kl", "soft_cross_entropy"):
        raise ValueError(
            f"divergence is {options.divergence!r}; a cached teacher has 'kl' and 'soft_cross_entropy': pass a teacher"
        )
    if options.skew:
        raise ValueError(f"skew is {options.skew}; a cached teacher has none: pass a teacher, or leave skew at 0.0")
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
    length = labels.shape[1]  # PEFT may have put virtual tokens before the rows
    student = student._replace(hidden=student.hidden[:, -length:])
    teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[:, -length:])
    classes = options.vocab_size
    if classes is None and teacher is not None and teacher.classes != student.classes:
        classes = min(student.classes, teacher.classes)
    shared = {
        "mask": counted, "vocab_size": classes, "item_weights": options.item_weights, "num_items": options.num_items,
        "student_logit_scale": student.scale, "student_softcap": student.softcap, "backend": options.backend,
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
    classes = student.hidden if student.weight is None else student.weight
    # Under tensor parallelism each process holds some rows of the head's weight.
    ops = distributed if isinstance(classes, DTensor) else fastdistill
    prefix, tensors = "", [student.hidden]
    if student.weight is not None:
        prefix = "linear_"
        tensors.append(student.weight)
        keywords["student_bias"] = student.bias
    if topk is not None:
        op = getattr(ops, f"{prefix}topk_soft_cross_entropy")
        loss = op(*tensors, *topk, tail=options.tail, reverse=options.reverse, **keywords)
        if options.divergence != "kl" or options.reverse:
            return loss
        return loss - teacher_entropy(topk[0], options.tail, **keywords)
    assert teacher is not None
    keywords |= {"teacher_logit_scale": teacher.scale, "teacher_softcap": teacher.softcap}
    if teacher.weight is None:
        tensors.append(sharded_as(classes, teacher.hidden))
    else:
        tensors += [teacher.hidden, sharded_as(classes, teacher.weight)]
        keywords["teacher_bias"] = None if teacher.bias is None else sharded_as(classes, teacher.bias)
    name = {"kl": "kl_div"}.get(options.divergence, options.divergence)
    own: dict[str, Any] = {
        "kl": {"reverse": options.reverse, "skew": options.skew}, "jsd": {"beta": options.beta},
    }  # fmt: skip
    return getattr(ops, prefix + name)(*tensors, **keywords, **own.get(options.divergence, {}))


def sharded_as(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns what the teacher has for each class, sharded over processes as the student's classes are."""
    if isinstance(student, DTensor) and not isinstance(teacher, DTensor):
        # Each process has the whole and takes its own part: nothing is sent.
        return distribute_tensor(teacher, student.device_mesh, student.placements, src_data_rank=None)
    if isinstance(teacher, DTensor) and not isinstance(student, DTensor):
        raise ValueError(
            "the teacher's head is sharded over processes, and the student's is not: shard the student as the teacher "
            "(the same tp_plan)"
        )
    return teacher


def teacher_entropy(
    logprobs: Tensor,  # (B, L, k)
    tail: str,
    mask: Tensor,  # (B, L)
    item_weights: Tensor | None = None,  # (B, L)
    num_items: int | float | Tensor | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    **_: Any,
) -> Tensor:
    """Computes the mean entropy of a cached teacher, weighted as the soft part of the loss is."""
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    if tail == "bucket":
        rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=0).log()
        log_q = torch.cat([logprobs, rest], -1)  # (B, L, k + 1)
    else:
        log_q = (logprobs / temperature).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).nan_to_num(0.0).sum(-1)  # (B, L); a class of probability 0 adds 0
    if item_weights is not None:
        entropy = entropy * item_weights
    counted = mask & logprobs.isfinite().any(-1)  # the rows that the loss counts
    total = entropy.masked_fill(~counted, 0).sum() * alpha * (temperature**2 if t_squared else 1.0)
    return mean(total, counted.sum() if num_items is None else num_items)


# -- the models ----------------------------------------------------------------------------------------------


# The teacher with which a student was checked last. The checks visit every module and weight, which takes milliseconds.
_CHECKED: WeakKeyDictionary[nn.Module, Callable[[], nn.Module | None]] = WeakKeyDictionary()


def check_loaded(**models: Any) -> None:
    """Raises TypeError for the name of a model in a model's place."""
    for name, model in models.items():
        if model is not None and not isinstance(model, nn.Module):
            what = repr(model) if isinstance(model, str) else type(model).__name__
            raise TypeError(f"{name} is {what}; it should be a model, as AutoModelForCausalLM.from_pretrained returns")


def check_models(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raises ValueError if the two cannot be distilled; what no step changes is checked at a pair's first call only."""
    check_loaded(student=student, teacher=teacher)
    checked = _CHECKED.get(student)
    if checked is None or checked() is not teacher:
        refuse_encoder_decoder(student=student, teacher=teacher)
        refuse_look_ahead(student=student, teacher=teacher)
        if teacher is not None:
            check_shared(student, teacher)
        _CHECKED[student] = (lambda: None) if teacher is None else weakref.ref(teacher)
    if teacher is not None and unwrapped(teacher).training:
        raise ValueError("teacher is in training mode; it should be in eval mode: call teacher.eval()")


def student_losses(
    student: Any, inputs: dict[str, Any], head: Head, compute: Callable[[Logits], CausalLMLoss]
) -> tuple[Any, CausalLMLoss]:
    """Runs the student with the loss in place of its head's product; returns its output as well."""
    if head.linear is None:
        output = student(**inputs)
        return output, compute(Logits(whole_logits(student, output.logits)))

    def carrier(x: Tensor, linear: nn.Linear) -> tuple[Tensor, CausalLMLoss]:
        found = compute(Logits(x, linear.weight, linear.bias, head.softcap, head.scale))
        return in_place_of_logits((found.loss - found.loss.detach()) / head.scale, x), found

    with replaced(head.linear, carrier) as seen:
        output = student(**inputs)
    (found,) = seen
    return output, found._replace(loss=found.loss.detach() + carried_by(output.logits))


def in_place_of_logits(carried: Tensor, x: Tensor) -> Tensor:  # () -> (1, 1, 1)
    """Returns what a head with the input x returns in place of logits."""
    carrier = carried.new_zeros(1, 1, 1) + carried  # no view: FSDP2 warns of them
    if isinstance(x, DTensor):  # torch's tensor parallelism takes the output for a shard of the logits
        return DTensor.from_local(carrier, x.device_mesh, [Shard(2)] * x.device_mesh.ndim, run_check=False)
    return carrier


def carried_by(logits: Tensor) -> Tensor:  # ()
    return (logits.to_local() if isinstance(logits, DTensor) else logits).sum()


def whole_logits(model: Any, logits: Tensor) -> Tensor:
    """Returns logits of the whole vocabulary: whole on each process, or a DTensor that shards their classes.

    Raises ValueError for plain shards, as torch's tensor parallelism returns them.
    """
    if isinstance(logits, DTensor):
        sharded = any(x.is_shard(logits.dim() - 1) for x in logits.placements)
        return logits if sharded else logits.full_tensor()
    head: Any = unwrapped(model).get_output_embeddings() if isinstance(model, nn.Module) else None
    weight = getattr(head, "weight", None)
    if isinstance(weight, DTensor) and logits.shape[-1] < weight.shape[0]:
        raise ValueError(
            f"the logits have {logits.shape[-1]} of {weight.shape[0]} classes: {type(model).__name__} returns the "
            "shard of each process; shard the head with ColwiseParallel(use_local_output=False)"
        )
    return logits


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: dict[str, Any], linear: bool) -> Logits:
    head = head_of(teacher, inputs) if linear else Head()
    if head.linear is None:
        return Logits(whole_logits(teacher, teacher(**inputs).logits))
    return in_factors(lambda: teacher(**inputs), head, is_sharded(teacher))[1]


@torch.no_grad()
def in_factors(run: Callable[[], Any], head: Head, copied: bool = False) -> tuple[Any, Logits]:
    """Runs a teacher without its head's product; returns what `run` does, and the logits in factors.

    `copied`: copy the weight, which a wrapper frees after the head's forward.
    """

    def keep(x: Tensor, module: nn.Linear) -> tuple[Tensor, Logits]:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        if copied:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return x.new_zeros(1, 1, 1), Logits(x, weight, bias, head.softcap, head.scale)

    assert head.linear is not None
    with replaced(head.linear, keep) as seen:
        output = run()
    return output, seen[0]


def balance_weight(student: nn.Module, counted: Tensor, num_items: int | float | Tensor | None) -> float | Tensor:
    """Returns the factor of a mixture's auxiliary loss: its coefficient, times this batch's share of `num_items`."""
    coefficient = unwrapped(student).config.get_text_config().router_aux_loss_coef
    return coefficient if num_items is None else coefficient * mean(counted.sum().float(), num_items)
