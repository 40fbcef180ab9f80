"""The soft loss against the k most likely classes of a teacher, given by their log-probabilities.

With x = z - max z, Z = sum exp(x / T) and q_j the teacher's probability of listed class j,

    loss = sum_j q_j (log Z - x_j / T)          gradient = (p sum_j q_j - [v = j] q_j) / T

With tail="bucket", all classes that are not listed form one more class r. Its logit is their log-sum-exp, and q_r is
the teacher's remaining mass. The log-sum-exp is taken over the remaining classes alone: log(1 - sum_j p_j) would
lose the remaining mass of a student that is nearly certain of the listed classes.

Reverse KL takes the student's p among the listed classes alone or, with a bucket, among all: with c = log(p / q) of a
listed class or of the bucket,

    loss = sum_j p_j c_j + p_r c_r         gradient = p (c - loss) / T, where a class of the bucket has the bucket's c
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _common
from ._rows import RowOptions, Target, checked_indices, exponential, may_be_infinite, row_max, within


def topk_divergence(
    options: RowOptions,
    student: Tensor,  # (n, V)
    student_max: Tensor,  # (n, 1)
    target: Target,  # log-probabilities (n, k) and indices (n, k)
    out: Tensor | None,  # (n, V)
    work: Sequence[Tensor],
    weight: Tensor | float,  # (n, 1), multiplies the gradient
) -> Tensor:  # (n, 1)
    logprobs, indices = target
    if options.kind == "reverse_kl":
        return _reverse(options, student, student_max, logprobs, indices, out, work[0], weight)
    a, b, *_ = work
    temperature, has_bucket = options.temperature, options.tail == "bucket"
    teacher_p, teacher_rest = _probabilities(options, logprobs)
    x = torch.sub(student, student_max, out=a)
    e = exponential(x, b, temperature)
    e_sum = e.sum(-1, keepdim=True)
    log_sum = e_sum.log()
    loss = -_expectation(teacher_p, x.gather(1, indices) / temperature - log_sum)
    slope = weight * (options.soft_weight / temperature)
    if has_bucket:
        rest_max, rest_e, rest_sum = _rest(x, indices)
        loss -= _expectation(teacher_rest, rest_max + rest_sum.log() - log_sum)
        teacher_rest = teacher_rest.where(rest_sum > 0, 0)  # a bucket of probability 0 has no gradient
    if out is not None:
        mass = teacher_p.sum(-1, keepdim=True) + teacher_rest
        torch.mul(e, slope * mass / e_sum, out=out)
        out.scatter_add_(1, indices, teacher_p * -slope)
        if has_bucket:
            out -= rest_e.mul_(slope * teacher_rest / rest_sum.where(rest_sum > 0, 1))
    return loss.mul_(options.soft_weight)


def _reverse(
    options: RowOptions, student: Tensor, student_max: Tensor, logprobs: Tensor, indices: Tensor, out: Tensor | None,
    scratch: Tensor, weight: Tensor | float,
) -> Tensor:  # fmt: skip
    wide = _common.widest_dtype(logprobs)  # the list is short: its digits cost nothing
    teacher_logp, teacher_rest = _log_probabilities(options, logprobs.to(wide))
    x = torch.sub(student, student_max, out=scratch)
    student_logp = x.gather(1, indices).to(wide).div_(options.temperature)
    student_logp.masked_fill_(logprobs == -math.inf, -math.inf)
    rest_e = rest_sum = None
    if options.tail == "bucket":
        rest_max, rest_e, rest_sum = _rest(x, indices)
        student_logp = torch.cat([student_logp, rest_max.to(wide) + rest_sum.to(wide).log()], 1)  # (n, k + 1)
        teacher_logp = torch.cat([teacher_logp, teacher_rest], 1)
    student_logp = student_logp.log_softmax(-1)
    p = student_logp.exp()
    c = (student_logp - teacher_logp).masked_fill_(p == 0, 0)
    mean = (p * c).sum(-1, keepdim=True)
    if out is not None:
        slope = (c - mean).mul_(p).mul_(weight * (options.soft_weight / options.temperature))
        if rest_e is None or rest_sum is None:
            out.zero_()
        else:
            torch.mul(rest_e, (slope[:, -1:] / rest_sum.where(rest_sum > 0, 1)).to(out.dtype), out=out)
        out.scatter_add_(1, indices, slope[:, : indices.shape[1]].to(out.dtype))
    # q - p sums to 0. Added to each term it keeps the digits of a student that is close to its teacher: there it is
    # computed from c, as a difference of exponentials would be rounding.
    excess = torch.where(c.abs() < 1, p * torch.expm1(-c), teacher_logp.exp() - p)
    loss = (p * c).add_(excess).sum(-1, keepdim=True)
    return loss.clamp_(min=0).mul_(options.soft_weight).to(student.dtype)


def _rest(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (n, 1), (n, V), (n, 1)
    """Returns the largest x of the classes that are not listed, exp(x - largest), which overwrites x, and its sum."""
    x.scatter_(1, indices, -math.inf)
    rest_max = row_max(x).clamp_(min=torch.finfo(x.dtype).min)  # finite even if no class remains
    rest_e = exponential(x.sub_(rest_max), x)
    return rest_max, rest_e, rest_e.sum(-1, keepdim=True)


def listed(
    options: RowOptions, logprobs: Tensor, indices: Tensor, counted: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the list as `topk_divergence` takes it; rows that are masked out may hold anything."""
    logprobs = logprobs.to(dtype)
    if counted is not None:
        logprobs = logprobs.where(counted.unsqueeze(-1), 0)
    if may_be_infinite(logprobs):
        # Entries of -inf are padding at any class, even one that is listed: they take the most likely class.
        indices = indices.where(logprobs != -math.inf, indices.gather(-1, logprobs.argmax(-1, keepdim=True)))
    return logprobs, checked_indices("topk_indices", indices, counted, options.classes)


def kernel_list(
    options: RowOptions, logprobs: Tensor, indices: Tensor, counted: Tensor | None, unchecked: bool = True
) -> Target:
    """Returns the list as the kernel takes it: unchanged. On the CPU it checks the classes once."""
    if unchecked and indices.device.type == "cpu" and not within(indices, options.classes):
        listed(options, logprobs, indices, counted, logprobs.dtype)  # entries that do not count may hold anything
    return logprobs.contiguous(), indices.contiguous()


def _probabilities(options: RowOptions, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the teacher's probabilities of the listed classes (n, k) and of the rest (n, 1)."""
    if options.tail == "renormalize":
        return torch.softmax(logprobs / options.temperature, -1), logprobs.new_zeros(logprobs.shape[0], 1)
    return logprobs.exp(), _remaining(options, logprobs, least=0.0)


def _log_probabilities(options: RowOptions, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logarithms of the teacher's probabilities of the listed classes (n, k) and of the rest (n, 1)."""
    if options.tail == "renormalize":
        return torch.log_softmax(logprobs / options.temperature, -1), logprobs.new_zeros(logprobs.shape[0], 1)
    rest = _remaining(options, logprobs, least=1e-7)
    both = torch.cat([logprobs, rest.log()], 1).log_softmax(-1)
    return both[:, :-1], both[:, -1:]


def _remaining(options: RowOptions, logprobs: Tensor, least: float) -> Tensor:  # (n, 1)
    """Returns the teacher's mass of all classes that are not listed: at least `least`, or 0 where there are none."""
    p = logprobs.to(_common.widest_dtype(logprobs)).exp()  # 1 - sum p cancels: it needs the digits
    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=least).to(logprobs.dtype)
    if logprobs.shape[1] < options.classes:
        return rest
    return rest.masked_fill_((logprobs != -math.inf).all(-1, keepdim=True), 0)


def _expectation(p: Tensor, value: Tensor) -> Tensor:  # (n, k), (n, k) -> (n, 1)
    """Returns sum p * value, with 0 * inf = 0."""
    return (p * value).masked_fill_(p == 0, 0).sum(-1, keepdim=True)
