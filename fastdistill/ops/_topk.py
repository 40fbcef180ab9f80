"""The soft loss against the k most likely classes of a teacher, given by their log-probabilities.

With x = z - max z, Z = sum exp(x / T) and q_j the teacher's probability of listed class j,

    loss = sum_j q_j (log Z - x_j / T)          gradient = (p sum_j q_j - [v = j] q_j) / T

With tail="bucket", all classes that are not listed form one more class r. Its logit is their log-sum-exp, and q_r is
the teacher's remaining mass. The log-sum-exp is taken over the remaining classes alone: log(1 - sum_j p_j) would
lose the remaining mass of a student that is nearly certain of the listed classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import _common
from fastdistill.ops._rows import RowOptions, Target, checked_indices, exponential, row_max


def topk_divergence(
    options: RowOptions,
    student: Tensor,  # (n, V)
    student_max: Tensor,  # (n, 1)
    target: Target,  # log-probabilities (n, k) and indices (n, k)
    out: Tensor | None,  # (n, V)
    work: Sequence[Tensor],
) -> Tensor:  # (n, 1)
    logprobs, indices = target
    a, b, *_ = work
    temperature, has_bucket = options.temperature, options.tail == "bucket"
    teacher_p, teacher_rest = _probabilities(options, logprobs)
    x = torch.sub(student, student_max, out=a)
    e = exponential(x, b, temperature)
    e_sum = e.sum(-1, keepdim=True)
    log_sum = e_sum.log()
    loss = -_expectation(teacher_p, x.gather(1, indices) / temperature - log_sum)
    slope = options.soft_weight / temperature
    if has_bucket:
        x.scatter_(1, indices, -math.inf)
        rest_max = row_max(x).clamp_(min=torch.finfo(x.dtype).min)  # finite even if no class remains
        rest_e = exponential(x.sub_(rest_max), x, temperature)
        rest_sum = rest_e.sum(-1, keepdim=True)
        loss -= _expectation(teacher_rest, rest_max / temperature + rest_sum.log() - log_sum)
        teacher_rest = teacher_rest.where(rest_sum > 0, 0)  # a bucket of probability 0 has no gradient
    if out is not None:
        mass = teacher_p.sum(-1, keepdim=True) + teacher_rest
        torch.mul(e, slope * mass / e_sum, out=out)
        out.scatter_add_(1, indices, teacher_p * -slope)
        if has_bucket:
            out -= rest_e.mul_(slope * teacher_rest / rest_sum.where(rest_sum > 0, 1))
    return loss.mul_(options.soft_weight)


def listed(
    options: RowOptions, logprobs: Tensor, indices: Tensor, counted: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the list as `topk_divergence` takes it; rows that are masked out may hold anything."""
    logprobs = logprobs.to(dtype)
    if counted is not None:
        logprobs = logprobs.where(counted.unsqueeze(-1), 0)
    return logprobs, checked_indices("topk_indices", indices, counted, options.classes)


def sorted_list(
    options: RowOptions, logprobs: Tensor, indices: Tensor, counted: Tensor | None, dtype: torch.dtype
) -> Target:
    """Returns the list as the kernel takes it: probabilities and classes in ascending order (N, k), and with a bucket
    the probability of the rest (N). Reverse KL takes the logarithms of the probabilities."""
    logprobs, indices = listed(options, logprobs, indices, counted, dtype)
    p, rest = (_log_probabilities if options.kind == "reverse_kl" else _probabilities)(options, logprobs)
    indices, order = indices.sort(-1)
    in_order = p.gather(-1, order), indices
    return (*in_order, rest[:, 0].contiguous()) if options.tail == "bucket" else in_order


def _probabilities(options: RowOptions, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the teacher's probabilities of the listed classes (n, k) and of the rest (n, 1)."""
    nothing = logprobs.new_zeros(logprobs.shape[0], 1)
    if options.tail == "renormalize":
        return torch.softmax(logprobs / options.temperature, -1), nothing
    if logprobs.shape[1] == options.classes:  # no class remains: a difference from 1 would be rounding
        return logprobs.exp(), nothing
    p = logprobs.to(_common.widest_dtype(logprobs)).exp()  # 1 - sum p cancels: it needs the digits
    return p.to(logprobs.dtype), (1 - p.sum(-1, keepdim=True)).clamp(min=0).to(logprobs.dtype)


def _log_probabilities(options: RowOptions, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logarithms of `_probabilities`, with the digits that those of small probabilities have lost."""
    _, rest = _probabilities(options, logprobs)
    if options.tail == "renormalize":
        logprobs = torch.log_softmax(logprobs / options.temperature, -1)
    return logprobs, rest.log()


def _expectation(p: Tensor, value: Tensor) -> Tensor:  # (n, k), (n, k) -> (n, 1)
    """Returns sum p * value, with 0 * inf = 0."""
    return (p * value).masked_fill_(p == 0, 0).sum(-1, keepdim=True)
