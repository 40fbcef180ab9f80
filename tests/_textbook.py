"""Computes losses over classes as textbooks write them: in float64 the truth, in float32 the usual error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _oracle import Outcome
from torch import Tensor
from torch.nn import functional as F

IMPOSSIBLE = -1e4  # stands for -inf, whose gradient autograd turns into NaN; exp(-1e4) is 0


def shaped(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scales, then caps."""
    possible = z > IMPOSSIBLE
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.where(possible, IMPOSSIBLE)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns KL(a || b), where 0 log 0 = 0."""
    a = log_a.exp()
    return torch.where(a == 0, 0, a * (log_a - log_b)).sum(-1)


def mixture(student: Tensor, teacher: Tensor, weights: tuple[float, float, float], temperature: float = 1.0) -> Tensor:
    """Returns w_t KL(p_t || m) + w_s KL(p_s || m) for m = beta p_t + (1 - beta) p_s; `weights` are beta, w_t, w_s."""
    beta, teacher_kl, student_kl = weights
    log_s, log_t = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).clamp(min=torch.finfo(student.dtype).tiny).log()
    return teacher_kl * kl(log_t, log_m) + student_kl * kl(log_s, log_m)


def listed_reverse_kl(
    student: Tensor,  # (n, V)
    logprobs: Tensor,  # (n, k)
    indices: Tensor,  # (n, k)
    tail: str,
    temperature: float = 1.0,
) -> Tensor:  # (n)
    """Returns reverse KL row by row. Entries of log-probability -inf are not listed."""
    losses = []
    for z, logp, classes in zip(student / temperature, logprobs, indices, strict=True):
        classes, logp = classes[logp > -torch.inf], logp[logp > -torch.inf]
        if tail == "renormalize":
            losses.append(kl(torch.log_softmax(z[classes], -1), torch.log_softmax(logp / temperature, -1)))
        else:
            log_s = torch.log_softmax(z, -1)
            others = torch.ones_like(z, dtype=torch.bool).index_fill(0, classes, False)
            rest = (1 - logp.double().exp().sum()).log().to(z)
            in_bucket = torch.logsumexp(log_s[others], 0)
            losses.append(kl(torch.cat([log_s[classes], in_bucket[None]]), torch.cat([logp, rest[None]])))
    return torch.stack(losses)


def outcome(
    loss: Callable[[Tensor], Tensor],  # the soft loss from the student's shaped logits
    student: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    **_: Any,
) -> Outcome:
    """Returns the loss of each row, and the gradient of their weighted sum in the stored logits."""
    stored = student.to(dtype).clamp(min=IMPOSSIBLE).requires_grad_()
    z = shaped(stored if bias is None else stored + bias.to(dtype), scale, softcap)
    value = loss(z)
    if labels is not None:
        value = alpha * value + (1 - alpha) * F.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(value, stored, weight.to(dtype))
    return {"value": value.detach(), "student_logits": gradient}
