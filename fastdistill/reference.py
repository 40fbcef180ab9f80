"""Every op's definition in plain eager PyTorch: the oracle of the tests and `backend="reference"`.

Nothing here is clever. Everything is materialised, autograd differentiates it, and it runs in any floating dtype on any
device: float64 inputs give the true value. Inputs are cast to float32 (float64 stays), so a reference in bfloat16
measures the cost of the *inputs'* dtype, not that of eager bfloat16 arithmetic.

Rows, tokens and pairs that are masked out are replaced by zeros before any arithmetic, so their content, even NaN,
reaches neither the value nor a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(*tensors: Any) -> list[Any]:
    """Casts the tensors to the dtype losses are computed in: float64 if any of them is float64, else float32."""
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
    return [None if x is None else x.to(dtype) for x in tensors]


def reduce(per_item: Tensor, counted: Tensor, reduction: str, num_items: int | float | Tensor | None) -> Tensor:
    """Sums, or averages over the counted items. `per_item` is already 0 where `counted` is False."""
    if reduction == "none":
        return per_item
    total = per_item.sum()
    if reduction == "sum":
        return total
    count = torch.as_tensor(counted.sum() if num_items is None else num_items, device=total.device, dtype=total.dtype)
    return total / torch.where(count == 0, 1, count)  # the mean of no items is 0


def _weighed(counted: Tensor, item_weights: Tensor | None) -> Tensor:
    """Returns which counted items have a weight: the others add 0, whatever they hold."""
    return counted if item_weights is None else counted & (item_weights != 0)


# -- hidden states ---------------------------------------------------------------------------------------


def linear_mse(
    student: Tensor,  # (*, d_s)
    weight: Tensor | None,  # (d_t, d_s)
    teacher: Tensor,  # (*, d_t)
    bias: Tensor | None = None,  # (d_t)
    *, mask: Tensor | None = None,  # (*)
    item_weights: Tensor | None = None,  # (*)
    reduction: str = "mean", num_items: int | float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    student, weight, teacher, bias = _wide(student, weight, teacher, bias)
    counted = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask
    weighed = _weighed(counted, item_weights)
    student = torch.where(weighed.unsqueeze(-1), student, 0)
    teacher = torch.where(weighed.unsqueeze(-1), teacher, 0)
    projected = student if weight is None else student @ weight.T
    if bias is not None:
        projected = projected + bias
    per_token = (projected - teacher).square().mean(-1)
    if item_weights is not None:
        per_token = per_token * torch.where(weighed, item_weights, 0).to(per_token.dtype)
    return reduce(torch.where(weighed, per_token, 0), counted, reduction, num_items)


# -- attention -------------------------------------------------------------------------------------------


def _scores_and_pairs(
    student_query: Tensor,  # (B, H, L, D_s)
    student_key: Tensor,  # (B, H_kv_s, S, D_s)
    teacher_query: Tensor,  # (B, H, L, D_t)
    teacher_key: Tensor,  # (B, H_kv_t, S, D_t)
    student_scale: float | None = None, teacher_scale: float | None = None,
    key_mask: Tensor | None = None,  # (B, S)
    query_mask: Tensor | None = None,  # (B, L)
    is_causal: bool = False,
    attn_mask: Tensor | None = None,  # broadcastable to (B, H, L, S)
    cu_seqlens: Tensor | None = None, cu_seqlens_key: Tensor | None = None,  # (n + 1)
    window_left: int | None = None, window_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the student's scores, the teacher's, and the pairs that every given mask allows, each (B, H, L, S)."""
    student_query, student_key, teacher_query, teacher_key = _wide(
        student_query, student_key, teacher_query, teacher_key
    )
    (batch, heads, query_length, _), key_length = student_query.shape, student_key.shape[2]
    device = student_query.device
    allowed = torch.ones(batch, heads, query_length, key_length, dtype=torch.bool, device=device)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
        student_key, teacher_key = (torch.where(key_mask[:, None, :, None], x, 0) for x in (student_key, teacher_key))
    if query_mask is not None:
        allowed = allowed & query_mask[:, None, :, None]
        student_query, teacher_query = (
            torch.where(query_mask[:, None, :, None], x, 0) for x in (student_query, teacher_query)
        )
    distance, is_same = _positions(query_length, key_length, cu_seqlens, cu_seqlens_key, device)
    if is_same is not None:
        allowed = allowed & is_same
    if is_causal:
        allowed = allowed & (distance <= 0)
    if window_left is not None:
        allowed = allowed & (distance >= -window_left)
    if window_right is not None:
        allowed = allowed & (distance <= window_right)
    if attn_mask is not None:
        allowed = allowed & attn_mask
    student_scores = _scores(student_query, student_key, student_scale)
    return student_scores, _scores(teacher_query, teacher_key, teacher_scale), allowed


def _positions(
    query_length: int, key_length: int, cu_seqlens: Tensor | None, cu_seqlens_key: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Returns j - i - (S - L) of each pair (L, S), and whether it lies in one packed sequence; then i, j, S and L are
    those of the sequence."""
    i, j = torch.arange(query_length, device=device), torch.arange(key_length, device=device)
    if cu_seqlens is None:
        return j - i[:, None] - (key_length - query_length), None
    cu_seqlens, cu_seqlens_key = (
        x.long() for x in (cu_seqlens, cu_seqlens if cu_seqlens_key is None else cu_seqlens_key)
    )
    of_query = torch.searchsorted(cu_seqlens[1:], i, right=True)  # the number of sequences that end before
    of_key = torch.searchsorted(cu_seqlens_key[1:], j, right=True)
    # Position from the end of the sequence: (j - S) - (i - L).
    distance = (j - cu_seqlens_key[of_key + 1]) - (i - cu_seqlens[of_query + 1])[:, None]
    return distance, of_query[:, None] == of_key


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Returns scale * <q_i, k_j>, (B, H, L, S), for query (B, H, L, D) and key (B, H_kv, S, D)."""
    groups = query.shape[1] // key.shape[1]
    return (query @ key.repeat_interleave(groups, dim=1).mT) * (query.shape[-1] ** -0.5 if scale is None else scale)


def attention_mse(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, *,
    reduction: str = "mean", num_items: int | float | Tensor | None = None, **scales_and_masks: Any,
) -> Tensor:  # fmt: skip
    student_scores, teacher_scores, allowed = _scores_and_pairs(
        student_query, student_key, teacher_query, teacher_key, **scales_and_masks
    )
    difference = torch.where(allowed, student_scores - teacher_scores, 0)
    return reduce(difference.square(), allowed, reduction, num_items)


def attention_kl(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, *,
    reduction: str = "mean", num_items: int | float | Tensor | None = None, **scales_and_masks: Any,
) -> Tensor:  # fmt: skip
    student_scores, teacher_scores, allowed = _scores_and_pairs(
        student_query, student_key, teacher_query, teacher_key, **scales_and_masks
    )
    counted = allowed.any(-1)  # (B, H, L)
    # A row with no allowed key gets all of them, so that its softmax is finite; it is dropped below.
    allowed = allowed | ~counted.unsqueeze(-1)
    student_logp = torch.log_softmax(torch.where(allowed, student_scores, -math.inf), dim=-1)
    teacher_logp = torch.log_softmax(torch.where(allowed, teacher_scores, -math.inf), dim=-1)
    per_row = _expectation(teacher_logp, teacher_logp, student_logp)
    return reduce(torch.where(counted, per_row, 0), counted, reduction, num_items)


# -- logits ----------------------------------------------------------------------------------------------


def _expectation(weight_logp: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """Returns sum_v w (log p - log q) with w = exp(weight_logp) and 0 * inf = 0."""
    weight = weight_logp.exp()
    difference = torch.where(weight > 0, logp, 0) - torch.where(weight > 0, logq, 0)
    return (weight * difference).sum(-1)


def _soft_cross_entropy(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return _expectation(teacher_logp, torch.zeros_like(teacher_logp), student_logp)


def _kl_div(student_logp: Tensor, teacher_logp: Tensor, reverse: bool = False) -> Tensor:
    if reverse:
        return _expectation(student_logp, student_logp, teacher_logp)
    return _expectation(teacher_logp, teacher_logp, student_logp)


def _jsd(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return _kl_div(student_logp, teacher_logp, reverse=beta == 1)
    mixture = _mixture(student_logp, teacher_logp, beta)
    teacher_kl = _expectation(teacher_logp, teacher_logp, mixture)
    return beta * teacher_kl + (1 - beta) * _expectation(student_logp, student_logp, mixture)


def _skewed_kl(student_logp: Tensor, teacher_logp: Tensor, reverse: bool, skew: float) -> Tensor:
    if skew == 0:
        return _kl_div(student_logp, teacher_logp, reverse)
    mixture = _mixture(student_logp, teacher_logp, 1 - skew if reverse else skew)
    logp = student_logp if reverse else teacher_logp
    return _expectation(logp, logp, mixture)


def _mixture(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """Returns log(beta p_t + (1 - beta) p_s)."""
    nowhere = (student_logp == -math.inf) & (teacher_logp == -math.inf)  # log m would be -inf - (-inf) backward
    return torch.logaddexp(
        torch.where(nowhere, 0, teacher_logp) + math.log(beta),
        torch.where(nowhere, 0, student_logp) + math.log(1 - beta),
    )


def _tvd(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return 0.5 * (teacher_logp.exp() - student_logp.exp()).abs().sum(-1)


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Returns the logits after the scale and then the softcap, which keep -inf as a constant."""
    infinite = logits == -math.inf
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.where(infinite, -math.inf, logits)


def _class_loss(
    soft: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    student_logits: Tensor,  # (*, >= V)
    *, temperature: float = 1.0, t_squared: bool = False,
    labels: Tensor | None = None, alpha: float = 1.0, ignore_index: int = -100,
    mask: Tensor | None = None, vocab_size: int | None = None, student_softcap: float | None = None,
    student_logit_scale: float = 1.0, item_weights: Tensor | None = None,
    reduction: str = "mean", num_items: int | float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`soft` takes a function that zeroes rows that are ignored, and the student's log-probabilities; it returns the
    soft loss of each row."""
    student_logits = student_logits[..., :vocab_size]
    counted = _counted_rows(student_logits, labels, ignore_index, mask)
    weighed = _weighed(counted, item_weights)

    def clean(x: Tensor) -> Tensor:
        return torch.where(weighed.unsqueeze(-1), x, 0)

    student_logits = capped(clean(student_logits), student_logit_scale, student_softcap)
    loss = soft(clean, torch.log_softmax(student_logits / temperature, -1))
    if t_squared:
        loss = loss * temperature**2
    if labels is not None:
        flat, classes = student_logits.reshape(-1, student_logits.shape[-1]), torch.where(weighed, labels, 0).flatten()
        hard = F.cross_entropy(flat, classes.long(), reduction="none").view(counted.shape)
        # A term of weight 0 is left out: it may be infinite.
        loss = (1 - alpha) * hard if alpha == 0 else loss if alpha == 1 else alpha * loss + (1 - alpha) * hard
    if item_weights is not None:
        loss = loss * torch.where(weighed, item_weights, 0).to(loss.dtype)
    return reduce(torch.where(weighed, loss, 0), counted, reduction, num_items)


def _counted_rows(student: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None) -> Tensor:
    counted = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask is not None:
        counted = counted & mask
    if labels is not None:
        counted = counted & (labels.long() != ignore_index)
    return counted


def _divergence(
    formula: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,  # (*, V)
    teacher_logits: Tensor,  # (*, V)
    *, temperature: float = 1.0, vocab_size: int | None = None, teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0, **keywords: Any,
) -> Tensor:  # fmt: skip
    student_logits, teacher_logits = _wide(student_logits, teacher_logits)

    def soft(clean: Callable[[Tensor], Tensor], student_logp: Tensor) -> Tensor:
        teacher = capped(clean(teacher_logits[..., :vocab_size]), teacher_logit_scale, teacher_softcap)
        return formula(student_logp, torch.log_softmax(teacher / temperature, -1))

    return _class_loss(soft, student_logits, temperature=temperature, vocab_size=vocab_size, **keywords)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, **keywords: Any) -> Tensor:
    """-sum_v p_t log p_s."""
    return _divergence(_soft_cross_entropy, student_logits, teacher_logits, **keywords)


def kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *, reverse: bool = False, skew: float = 0.0, **keywords: Any
) -> Tensor:
    """KL(p_t || skew p_t + (1 - skew) p_s); reverse=True: KL(p_s || skew p_s + (1 - skew) p_t)."""
    formula = partial(_skewed_kl, reverse=reverse, skew=skew)
    return _divergence(formula, student_logits, teacher_logits, **keywords)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, **keywords: Any) -> Tensor:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s."""
    return _divergence(partial(_jsd, beta=beta), student_logits, teacher_logits, **keywords)


def tvd(student_logits: Tensor, teacher_logits: Tensor, **keywords: Any) -> Tensor:
    """0.5 sum_v |p_t - p_s|."""
    return _divergence(_tvd, student_logits, teacher_logits, **keywords)


def topk_soft_cross_entropy(
    student_logits: Tensor,  # (*, V)
    topk_logprobs: Tensor,  # (*, k), at temperature 1
    topk_indices: Tensor,  # (*, k)
    *, tail: str = "renormalize", reverse: bool = False, temperature: float = 1.0, mask: Tensor | None = None,
    teacher_softcap: None = None, teacher_logit_scale: float = 1.0, **keywords: Any,
) -> Tensor:  # fmt: skip
    student_logits, topk_logprobs = _wide(student_logits, topk_logprobs)
    mask = _with_list(topk_logprobs, mask)

    def soft(clean: Callable[[Tensor], Tensor], student_logp: Tensor) -> Tensor:
        teacher_logp = clean(topk_logprobs)
        listed = teacher_logp != -math.inf  # the other entries are padding
        indices = torch.where(listed, clean(topk_indices), 0).long()
        student_topk = torch.where(listed, student_logp.gather(-1, indices), -math.inf)
        if tail == "renormalize":
            teacher_logp = torch.log_softmax(teacher_logp / temperature, -1)
            if reverse:
                student_topk = torch.log_softmax(student_topk, -1)
        else:  # the remaining classes become one
            taken = torch.zeros_like(student_logp).scatter_add(-1, indices, listed.to(student_logp)) > 0
            rest = torch.logsumexp(torch.where(taken, -math.inf, student_logp), -1, keepdim=True)
            student_topk = torch.cat([student_topk, rest], -1)
            teacher_logp = _with_rest(teacher_logp, taken.all(-1, keepdim=True), reverse)
        return (
            _kl_div(student_topk, teacher_logp, reverse) if reverse else _soft_cross_entropy(student_topk, teacher_logp)
        )

    return _class_loss(soft, student_logits, temperature=temperature, mask=mask, **keywords)


def _with_rest(teacher_logp: Tensor, is_whole: Tensor, reverse: bool) -> Tensor:
    """Appends the log-probability of the classes that are not listed: exactly -inf where all are."""
    rest = 1 - teacher_logp.exp().sum(-1, keepdim=True)
    rest = torch.where(is_whole, 0, rest.clamp(min=1e-7 if reverse else 0))
    teacher_logp = torch.cat([teacher_logp, rest.log()], -1)
    return torch.log_softmax(teacher_logp, -1) if reverse else teacher_logp


def _with_list(topk_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    """Returns which of the counted rows list a class that is possible."""
    possible = (topk_logprobs != -math.inf).any(-1)
    return possible if mask is None else possible & mask


# -- logits straight from hidden states and vocabulary weights -------------------------------------------


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, keywords: dict[str, Any]) -> Tensor:
    hidden, weight, bias = _wide(hidden, weight, bias)
    counted = _counted_rows(hidden, keywords.get("labels"), keywords.get("ignore_index", -100), keywords.get("mask"))
    weighed = _weighed(counted, keywords.get("item_weights"))
    return F.linear(torch.where(weighed.unsqueeze(-1), hidden, 0), weight, bias)


def _linear(
    loss: Callable[..., Tensor],
    student: Tensor,  # (*, d_s)
    student_weight: Tensor,  # (V, d_s)
    teacher: Tensor,  # (*, d_t)
    teacher_weight: Tensor,  # (V, d_t)
    *, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, **keywords: Any,  # biases (V)
) -> Tensor:  # fmt: skip
    student_logits = _logits(student, student_weight, student_bias, keywords)
    teacher_logits = _logits(teacher, teacher_weight, teacher_bias, keywords)
    return loss(student_logits, teacher_logits, **keywords)


linear_soft_cross_entropy = partial(_linear, soft_cross_entropy)
linear_kl_div = partial(_linear, kl_div)
linear_jsd = partial(_linear, jsd)
linear_tvd = partial(_linear, tvd)


def linear_topk_soft_cross_entropy(
    student: Tensor,  # (*, d_s)
    student_weight: Tensor,  # (V, d_s)
    topk_logprobs: Tensor,  # (*, k)
    topk_indices: Tensor,  # (*, k)
    *, student_bias: Tensor | None = None, mask: Tensor | None = None, **keywords: Any,  # bias (V)
) -> Tensor:  # fmt: skip
    keywords["mask"] = _with_list(topk_logprobs, mask)
    student_logits = _logits(student, student_weight, student_bias, keywords)
    return topk_soft_cross_entropy(student_logits, topk_logprobs, topk_indices, **keywords)
