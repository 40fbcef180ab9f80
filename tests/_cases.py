"""Lists every op with inputs to call it with, the inputs that learn, and a textbook formula.

The formulas set the standard of accuracy and share no code with the library. They are written as a careful user writes
them: inputs are cast to float32 first, so that the only error left comes from the dtype of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _oracle import LOOSEST_BOUND, Outcome, assert_accurate, evaluate, in_float64, on_cpu, stacked
from torch import Tensor
from torch.nn import functional as F

import fastdistill
from fastdistill import reference

# -- textbook formulas: per-item losses and which items count ------------------------------------------------


def wide(x: Tensor | None) -> Any:
    return x if x is None or x.dtype == torch.float64 else x.float()


def hidden_items(
    student: Tensor,
    weight: Tensor | None,
    teacher: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    projected = wide(student) if weight is None else with_head(student, weight, None, narrow)
    teacher, bias = map(wide, (teacher, bias))
    projected = projected if bias is None else projected + bias
    items = F.mse_loss(projected.to(teacher.dtype), teacher, reduction="none").mean(-1)
    return items, torch.ones_like(items, dtype=torch.bool) if mask is None else mask


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("bhld,bhsd->bhls", wide(query), wide(key)) * (scale or query.shape[-1] ** -0.5)


def _allowed(
    like: Tensor,  # (B, H, L, S)
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    attn_mask: Tensor | None,
) -> Tensor:
    allowed = torch.ones_like(like, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril(like.shape[3] - like.shape[2])
    for mask, where in ((key_mask, (slice(None), None, None)), (query_mask, (slice(None), None, slice(None), None))):
        if mask is not None:
            allowed = allowed & mask[where]
    return allowed if attn_mask is None else allowed & attn_mask


def score_items(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    student = _scores(student_query, student_key, student_scale)
    teacher = _scores(teacher_query, teacher_key, teacher_scale)
    allowed = _allowed(student, key_mask, query_mask, is_causal, attn_mask)
    return (student - teacher).square(), allowed


def attention_items(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    student = _scores(student_query, student_key, student_scale)
    teacher = _scores(teacher_query, teacher_key, teacher_scale)
    allowed = _allowed(student, key_mask, query_mask, is_causal, attn_mask)
    lowest = torch.finfo(student.dtype).min
    student = student.masked_fill(~allowed, lowest).log_softmax(-1)
    teacher = teacher.masked_fill(~allowed, lowest).softmax(-1)
    return F.kl_div(student, teacher, reduction="none").sum(-1), allowed.any(-1)


def soft_ce_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def reverse_kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_rows(teacher, student)


def skewed_kl_rows(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """Returns KL(p_t || skew p_t + (1 - skew) p_s)."""
    weights = torch.tensor([skew, 1 - skew], dtype=student.dtype).log()
    both = torch.stack([teacher.log_softmax(-1), student.log_softmax(-1)], -1)  # (*, V, 2)
    return F.kl_div((both + weights).logsumexp(-1), both[..., 0], log_target=True, reduction="none").sum(-1)


def jsd_rows(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    weights = torch.tensor([beta, 1 - beta], dtype=student.dtype).log()
    both = torch.stack([teacher.log_softmax(-1), student.log_softmax(-1)], -1)  # (*, V, 2)
    mixture = (both + weights).logsumexp(-1)
    teacher_part, student_part = (
        F.kl_div(mixture, logp, log_target=True, reduction="none").sum(-1) for logp in both.unbind(-1)
    )
    return beta * teacher_part + (1 - beta) * student_part


def tvd_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


def topk_rows(
    student: Tensor, logprobs: Tensor, indices: Tensor, temperature: float, tail: str, reverse: bool
) -> Tensor:
    student_logp = student.log_softmax(-1).gather(-1, indices)
    if reverse:
        if tail == "renormalize":
            return reverse_kl_rows(student_logp, logprobs / temperature)
        least = 1e-7  # of the bucket, where the rounding of a list leaves it nothing
        rests = [(1 - x.exp().sum(-1, keepdim=True)).clamp(min=least).log() for x in (student_logp, logprobs)]
        both = [torch.cat(parts, -1) for parts in zip((student_logp, logprobs), rests, strict=True)]
        return reverse_kl_rows(*both)
    if tail == "renormalize":
        return -((logprobs / temperature).softmax(-1) * student_logp).sum(-1)
    teacher_p, student_p = logprobs.exp(), student_logp.exp()
    rest = (1 - teacher_p.sum(-1)) * (1 - student_p.sum(-1)).log()
    return -(teacher_p * student_logp).sum(-1) - rest


def class_items(
    soft: Callable[[Tensor, Tensor], Tensor],  # student logits / T, teacher logits / T (or top-k): rows
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    alpha: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    student, teacher = wide(student_logits)[..., :vocab_size], wide(teacher_logits)[..., :vocab_size]
    student, teacher = student * student_logit_scale, teacher * teacher_logit_scale
    if student_softcap is not None:
        student = student_softcap * torch.tanh(student / student_softcap)
    if teacher_softcap is not None:
        teacher = teacher_softcap * torch.tanh(teacher / teacher_softcap)
    items = soft(student / temperature, teacher / temperature)
    if t_squared:
        items = items * temperature**2
    counted = torch.ones_like(items, dtype=torch.bool) if mask is None else mask
    if labels is None:
        return items, counted
    counted = counted & (labels != ignore_index)
    hard = F.cross_entropy(
        student.reshape(-1, student.shape[-1]), labels.flatten(), reduction="none", ignore_index=ignore_index
    )
    return alpha * items + (1 - alpha) * hard.view(items.shape), counted


def topk_items(
    student_logits: Tensor,
    topk_logprobs: Tensor,
    topk_indices: Tensor,
    tail: str = "renormalize",
    reverse: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    def soft(student: Tensor, _: Tensor) -> Tensor:
        return topk_rows(student, wide(topk_logprobs), topk_indices.long(), temperature, tail, reverse)

    student_logits = wide(student_logits)[..., :vocab_size]
    return class_items(soft, student_logits, student_logits.detach(), temperature=temperature, **keywords)


def with_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, narrow: bool = False) -> Tensor:
    """Computes logits. `narrow` rounds their gradient to the operands' precision, as matrix products on GPUs do."""
    logits = F.linear(wide(hidden), wide(weight), wide(bias))
    if narrow and logits.requires_grad and hidden.itemsize == 2:
        logits.register_hook(partial(_round, digits=1 - int(math.log2(torch.finfo(hidden.dtype).eps))))
    return logits


def _round(x: Tensor, digits: int) -> Tensor:
    """Rounds the mantissa to `digits` binary digits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**digits) / 2**digits, exponent)


def linear_items(soft: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def items(
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        narrow: bool = False,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor]:
        student_logits = with_head(student, student_weight, student_bias, narrow)
        teacher_logits = with_head(teacher, teacher_weight, teacher_bias)
        return logits_items(soft)(student_logits, teacher_logits, **keywords)

    return items


def logits_items(soft: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the items of a loss on logits. The options beta and reverse choose or parametrise the row formula."""

    def items(student_logits: Tensor, teacher_logits: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        own = {name: keywords.pop(name) for name in ("beta", "reverse", "skew") if name in keywords}
        rows = reverse_kl_rows if own.pop("reverse", False) else soft
        rows = skewed_kl_rows if "skew" in own else rows
        return class_items(lambda s, t: rows(s, t, **own), student_logits, teacher_logits, **keywords)

    return items


def linear_topk_items(
    student: Tensor,
    student_weight: Tensor,
    topk_logprobs: Tensor,
    topk_indices: Tensor,
    student_bias: Tensor | None = None,
    narrow: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    student_logits = with_head(student, student_weight, student_bias, narrow)
    return topk_items(student_logits, topk_logprobs, topk_indices, **keywords)


# -- inputs: float32, by argument name -------------------------------------------------------------------------


def hidden(tokens: tuple[int, ...] = (3, 5), d_s: int = 6, d_t: int = 10) -> dict[str, Any]:
    return {
        "student": torch.randn(*tokens, d_s),
        "weight": torch.randn(d_t, d_s) * d_s**-0.5,
        "teacher": torch.randn(*tokens, d_t),
        "bias": torch.randn(d_t),
    }


def attention(
    batch: int = 2,
    heads: int = 4,
    length: int = 7,
    keys: int = 9,
    d_s: int = 6,
    d_t: int = 10,
    student_kv: int = 2,
    teacher_kv: int = 4,
) -> dict[str, Any]:
    return {
        "student_query": torch.randn(batch, heads, length, d_s),
        "student_key": torch.randn(batch, student_kv, keys, d_s),
        "teacher_query": torch.randn(batch, heads, length, d_t),
        "teacher_key": torch.randn(batch, teacher_kv, keys, d_t),
    }


def long_attention(batch: int = 2, heads: int = 4, length: int = 70, keys: int = 72, **kv: int) -> dict[str, Any]:
    """Returns narrow heads with enough rows that attention_mse chooses its Gram form or its causal scan."""
    return attention(batch, heads, length, keys, 2, 3, **{"student_kv": 1, "teacher_kv": 2, **kv})


def logits(rows: tuple[int, ...] = (3, 5), classes: int = 37) -> dict[str, Any]:
    return {"student_logits": 2 * torch.randn(*rows, classes), "teacher_logits": 2 * torch.randn(*rows, classes)}


def with_labels(inputs: dict[str, Any], classes: int) -> dict[str, Any]:
    """Adds labels for every row; the second is -100, which is ignored."""
    rows = next(iter(inputs.values())).shape[:-1]
    labels = torch.randint(classes, rows)
    labels.view(-1)[1:2] = -100
    return {**inputs, "labels": labels}


def topk(rows: tuple[int, ...] = (3, 5), classes: int = 37, k: int = 5) -> dict[str, Any]:
    logprobs, indices = (2 * torch.randn(*rows, classes)).log_softmax(-1).topk(k)
    return {"student_logits": 2 * torch.randn(*rows, classes), "topk_logprobs": logprobs, "topk_indices": indices}


def head(side: str, rows: tuple[int, ...], classes: int, width: int) -> dict[str, Any]:
    return {
        side: torch.randn(*rows, width),
        f"{side}_weight": torch.randn(classes, width) * 2 * width**-0.5,
        f"{side}_bias": torch.randn(classes),
    }


def linear(rows: tuple[int, ...] = (3, 5), classes: int = 37, d_s: int = 6, d_t: int = 10) -> dict[str, Any]:
    return {**head("student", rows, classes, d_s), **head("teacher", rows, classes, d_t)}


def linear_topk(rows: tuple[int, ...] = (3, 5), classes: int = 37, k: int = 5, d_s: int = 6) -> dict[str, Any]:
    inputs = {**head("student", rows, classes, d_s), **topk(rows, classes, k)}
    del inputs["student_logits"]
    return inputs


def without_ties(inputs: dict[str, Any]) -> dict[str, Any]:
    """Replaces the teacher by one whose probabilities all differ from the student's: TVD's gradient jumps at ties.

    The teacher's logits are the student's plus -0.7 or 1.3. The offset that all logits of a row share lies in between.
    """
    out = dict(inputs)
    if "student_logits" in inputs:
        x = inputs["student_logits"]
        out["teacher_logits"] = x + torch.where(torch.rand(x.shape) > 0.5, 1.3, -0.7).to(x.dtype)
    else:
        out["teacher"], out["teacher_weight"] = inputs["student"], inputs["student_weight"]
        bias = inputs["student_bias"]
        out["teacher_bias"] = bias + torch.where(torch.rand(bias.shape) > 0.5, 1.3, -0.7).to(bias.dtype)
    return out


# -- the table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """Holds one op with one set of options. Calling it calls the public function with these options."""

    name: str  # of the public function
    make: Callable[..., dict[str, Any]]
    items: Callable[..., tuple[Tensor, Tensor]]
    learned: tuple[str, ...]
    masks: dict[str, tuple[str, ...]]  # mask argument: the inputs whose rows it masks
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name

    def __call__(self, **keywords: Any) -> Tensor:
        return getattr(fastdistill, self.name)(**{**self.options, **keywords})

    @property
    def per_item(self) -> bool:
        """Returns whether the op has reduction="none"."""
        return not self.name.startswith("attention")

    @property
    def reductions(self) -> tuple[str, ...]:
        return ("mean", "sum", "none") if self.per_item else ("mean", "sum")

    @property
    def forms(self) -> tuple[str, ...]:
        """Returns one reduction for each code path of the op: reduced inside it, and per item."""
        return ("mean", "none") if self.per_item else ("mean",)

    def textbook(
        self, *, reduction: str = "mean", num_items: Any = None, backend: str | None = None, **keywords: Any
    ) -> Tensor:
        if self.name.startswith("linear_") and (backend == "triton" or torch.cuda.is_available()):
            keywords["narrow"] = True
        items, counted = self.items(**{**self.options, **keywords})
        if reduction == "none":
            return torch.where(counted, items, 0)
        total = items[counted].sum()
        return total if reduction == "sum" else total / (max(counted.sum(), 1) if num_items is None else num_items)

    def truth(self, inputs: dict[str, Any], learned: tuple[str, ...] | None = None, **keywords: Any) -> Outcome:
        function = getattr(reference, self.name)
        learned = self.learned if learned is None else learned
        with torch.device("cpu"):
            return evaluate(function, on_cpu(in_float64(inputs)), learned, **on_cpu({**self.options, **keywords}))

    def assert_accurate(
        self,
        inputs: dict[str, Any],
        learned: tuple[str, ...] | None = None,
        *,
        backend: str,
        loosest: float = LOOSEST_BOUND,
        **keywords: Any,
    ) -> Outcome:
        """Checks value and gradients against the oracle, within twice the textbook's error, and returns them."""
        learned = self.learned if learned is None else learned
        outcome = evaluate(self, inputs, learned, backend=backend, **keywords)
        truth = self.truth(inputs, learned, **keywords)
        textbook = evaluate(self.textbook, inputs, learned, backend=backend, **keywords)
        assert_accurate(outcome, truth, textbook, loosest)
        assert all(outcome[name].dtype == inputs[name].dtype for name in learned)
        return outcome

    def assert_accurate_together(
        self, batches: list[dict[str, Any]], *, backend: str, value_off: float = 0.0, **keywords: Any
    ) -> None:
        """Checks several batches as one, because the error of a single number may be small by luck."""
        assert_accurate(
            stacked([evaluate(self, x, self.learned, backend=backend, **keywords) for x in batches]),
            stacked([self.truth(x, **keywords) for x in batches]),
            stacked([evaluate(self.textbook, x, self.learned, backend=backend, **keywords) for x in batches]),
            value_off=value_off,
        )

    def some_masked(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Returns a mask for each mask argument: about a third is False, the first False and the last True."""
        masks = {}
        for name, (masked, *_) in self.masks.items():
            x = inputs[masked]
            shape = (x.shape[0], x.shape[2]) if x.dim() == 4 and not self.per_item else x.shape[:-1]
            mask = torch.rand(shape) > 0.35
            mask.view(-1)[:1] = False
            mask.view(-1)[-1:] = True
            masks[name] = mask
        return masks

    def none_counted(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(mask) for name, mask in self.some_masked(inputs).items()}

    def overwrite_masked(self, inputs: dict[str, Any], masks: dict[str, Tensor], value: float) -> dict[str, Any]:
        """Returns the inputs with every masked row filled with `value`."""
        out = dict(inputs)
        for name, masked in self.masks.items():
            for x in masked:
                rows = masks[name] if self.per_item else masks[name].unsqueeze(1)
                out[x] = torch.where(rows.unsqueeze(-1), inputs[x], value)
        return out


ROWS_OF_LOGITS = {"mask": ("student_logits", "teacher_logits")}
ROWS_OF_TOPK = {"mask": ("student_logits", "topk_logprobs")}
ROWS_OF_HIDDEN = {"mask": ("student", "teacher")}
ROWS_OF_LINEAR_TOPK = {"mask": ("student", "topk_logprobs")}
PAIRS = {"query_mask": ("student_query", "teacher_query"), "key_mask": ("student_key", "teacher_key")}
QUERY_KEY = ("student_query", "student_key")
HEAD = ("student", "student_weight", "student_bias")

# Every option at once, each at a value that is not its default.
ALL_OPTIONS = {
    "temperature": 2.0,
    "t_squared": True,
    "alpha": 0.3,
    "vocab_size": 31,
    "student_softcap": 5.0,
    "teacher_softcap": 7.0,
}
# One scale for both sides: equal logits should stay equal. test_row_kernels has two.
SKEWED = {"skew": 0.2, "student_logit_scale": 0.8, "teacher_logit_scale": 0.8}
SOFT = {"soft_cross_entropy": soft_ce_rows, "kl_div": kl_rows, "jsd": jsd_rows, "tvd": tvd_rows}


def _labelled(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *args, **sizes: with_labels(make(*args, **sizes), 31)


LINEAR_MSE = Op("linear_mse", hidden, hidden_items, ("student", "weight", "bias"), ROWS_OF_HIDDEN)
ATTENTION_MSE = Op("attention_mse", attention, score_items, QUERY_KEY, PAIRS)
ATTENTION_MSE_CAUSAL = Op(
    "attention_mse", attention, score_items, QUERY_KEY, PAIRS, {"is_causal": True}, "attention_mse-causal"
)
ATTENTION_MSE_LONG = Op("attention_mse", long_attention, score_items, QUERY_KEY, PAIRS, {}, "attention_mse-long")
ATTENTION_MSE_LONG_CAUSAL = Op(
    "attention_mse", long_attention, score_items, QUERY_KEY, PAIRS, {"is_causal": True}, "attention_mse-long-causal"
)
ATTENTION_KL = Op("attention_kl", attention, attention_items, QUERY_KEY, PAIRS)
ATTENTION_KL_CAUSAL = Op(
    "attention_kl", attention, attention_items, QUERY_KEY, PAIRS, {"is_causal": True}, "attention_kl-causal"
)
ATTENTION_OPS = [ATTENTION_MSE, ATTENTION_MSE_CAUSAL, ATTENTION_KL, ATTENTION_KL_CAUSAL]
LONG_ATTENTION_OPS = [ATTENTION_MSE_LONG, ATTENTION_MSE_LONG_CAUSAL]


def _class_ops(
    prefix: str, make: Callable[..., dict[str, Any]], items: Any, learned: tuple[str, ...], masks: Any
) -> list[Op]:
    plain = [Op(prefix + name, make, items(soft), learned, masks) for name, soft in SOFT.items()]
    reverse = Op(f"{prefix}kl_div", make, items(kl_rows), learned, masks, {"reverse": True}, f"{prefix}kl_div-reverse")
    everything = [
        Op(
            prefix + name, _labelled(make), items(soft), learned, masks, {**ALL_OPTIONS, **own},
            f"{prefix}{name}-all-options",
        )
        for name, soft, own in (("kl_div", kl_rows, {"reverse": True}), ("jsd", jsd_rows, {"beta": 0.2}))
    ]  # fmt: skip
    skewed = Op(f"{prefix}kl_div", make, items(kl_rows), learned, masks, SKEWED, f"{prefix}kl_div-skewed")
    return [*plain, reverse, skewed, *everything]


def _topk_ops(
    prefix: str, make: Callable[..., dict[str, Any]], items: Any, learned: tuple[str, ...], masks: Any
) -> list[Op]:
    name = f"{prefix}topk_soft_cross_entropy"
    return [
        Op(name, make, items, learned, masks, {"tail": tail, **reverse}, f"{name}-{tail}" + "-reverse" * len(reverse))
        for tail in ("renormalize", "bucket")
        for reverse in ({}, {"reverse": True})
    ]


LOGITS_OPS = _class_ops("", logits, logits_items, ("student_logits",), ROWS_OF_LOGITS)
TOPK_OPS = _topk_ops("", topk, topk_items, ("student_logits",), ROWS_OF_TOPK)
LINEAR_LOGITS_OPS = _class_ops("linear_", linear, linear_items, HEAD, ROWS_OF_HIDDEN)
LINEAR_TOPK_OPS = _topk_ops("linear_", linear_topk, linear_topk_items, HEAD, ROWS_OF_LINEAR_TOPK)

CLASS_OPS = [*LOGITS_OPS, *TOPK_OPS, *LINEAR_LOGITS_OPS, *LINEAR_TOPK_OPS]
PER_ITEM_OPS = [LINEAR_MSE, *CLASS_OPS]
OPS = [LINEAR_MSE, *ATTENTION_OPS, *LONG_ATTENTION_OPS, *CLASS_OPS]
