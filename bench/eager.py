"""Defines the losses as a PyTorch user writes them: the baselines, eager and under torch.compile.

16-bit logits are cast to float32 first, as trainers do: a log-softmax in bfloat16 has two digits. Scores and
projections stay in the dtype of their inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_mse(student: Tensor, weight: Tensor, teacher: Tensor, bias: Tensor) -> Tensor:
    return F.mse_loss(F.linear(student, weight, bias), teacher)


def attention_mse(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    student_scores = student_query @ student_key.mT * student_query.shape[-1] ** -0.5
    teacher_scores = teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    allowed = _causal(student_scores) if is_causal else attn_mask
    if allowed is None:
        return F.mse_loss(student_scores, teacher_scores)
    return F.mse_loss(
        student_scores.masked_fill(~allowed, 0), teacher_scores.masked_fill(~allowed, 0), reduction="sum"
    ) / (allowed.sum() * student_scores.shape[0] * student_scores.shape[1])


def attention_kl(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    student_scores = student_query @ student_key.mT * student_query.shape[-1] ** -0.5
    teacher_scores = teacher_query @ teacher_key.mT * teacher_query.shape[-1] ** -0.5
    allowed = _causal(student_scores) if is_causal else attn_mask  # at least one key of each query
    if allowed is not None:
        least = torch.finfo(student_scores.dtype).min
        student_scores, teacher_scores = (
            student_scores.masked_fill(~allowed, least),
            teacher_scores.masked_fill(~allowed, least),
        )
    student_logp, teacher_logp = student_scores.log_softmax(-1), teacher_scores.log_softmax(-1)
    return F.kl_div(student_logp, teacher_logp, log_target=True, reduction="none").sum(-1).mean()


def _causal(scores: Tensor) -> Tensor:  # (L, S)
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _wide(x: Tensor) -> Tensor:
    return x if x.itemsize >= 4 else x.float()


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return -(_wide(teacher_logits).softmax(-1) * _wide(student_logits).log_softmax(-1)).sum(-1).mean()


def topk_soft_cross_entropy(student_logits: Tensor, teacher_values: Tensor, teacher_indices: Tensor) -> Tensor:
    student_logp = _wide(student_logits).log_softmax(-1).gather(-1, teacher_indices)
    return -(_wide(teacher_values).softmax(-1) * student_logp).sum(-1).mean()


def kl_div(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student_logp, teacher_logp = _wide(student_logits).log_softmax(-1), _wide(teacher_logits).log_softmax(-1)
    return F.kl_div(student_logp, teacher_logp, log_target=True, reduction="batchmean")


def jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student_logp, teacher_logp = _wide(student_logits).log_softmax(-1), _wide(teacher_logits).log_softmax(-1)
    mixture = torch.logsumexp(torch.stack([student_logp, teacher_logp]), 0) - math.log(2)
    return 0.5 * (
        F.kl_div(mixture, teacher_logp, log_target=True, reduction="batchmean")
        + F.kl_div(mixture, student_logp, log_target=True, reduction="batchmean")
    )


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return 0.5 * (_wide(teacher_logits).softmax(-1) - _wide(student_logits).softmax(-1)).abs().sum(-1).mean()


LOGITS_LOSSES = {"soft_cross_entropy": soft_cross_entropy, "kl_div": kl_div, "jsd": jsd, "tvd": tvd}
# About how many float32 logits tensors each holds at its peak; a case that would not fit the device is skipped.
MATRICES = {"soft_cross_entropy": 5, "kl_div": 6, "jsd": 13, "tvd": 5}
