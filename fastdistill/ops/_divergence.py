"""The soft losses against the teacher's logits: divergences between two softmax distributions, one loss a row.

For each side, x = z - max z, e = exp(x / T), Z = sum e and p = e / Z. Further, m = beta p_t + (1 - beta) p_s, and E_s
and E_t are means under p_s and p_t:

    kind                loss                                         gradient in the student's logits z
    soft_cross_entropy  log Z_s - E_t[x_s] / T                       (p_s - p_t) / T
    kl_div              E_t[x_t - x_s] / T - log(Z_t / Z_s)          (p_s - p_t) / T
    reverse_kl          E_s[c] / T - log(Z_s / Z_t)                  p_s (c - E_s[c]) / T^2           c = x_s - x_t
    jsd                 w_t E_t[log(p_t / m)] + w_s E_s[log(p_s / m)]  p_s (c - E_s[c]) / T           c: below
    tvd                 sum |p_s - p_t| / 2                          p_s (c - E_s[c]) / 2T            c = sgn(p_s - p_t)

"jsd" is the family w_t KL(p_t || m) + w_s KL(p_s || m), with w_t = `teacher_kl` and w_s = `student_kl`: JSD has beta
and 1 - beta, and skewed KL has one of the two alone. With d = p_t - p_s and bend = (1 - beta) w_t - beta w_s, up to a
constant,

    c = -w_s log(m / p_s) - (1 - beta) bend d / m

`bend sum d` is 0 but for rounding and is subtracted from the loss, which keeps the digits of a student that is close to
its teacher. JSD has bend 0.

The gradient is the only tensor of the logits' size. Differences are taken class by class before they are summed, and
the largest e of a row is exactly 1, so the loss keeps its digits where the student is close to its teacher or nearly
certain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._rows import RowOptions, Target, exponents_, power, row_max, weigh_


def divergence(
    options: RowOptions,
    student: Tensor,  # (n, V)
    student_max: Tensor,  # (n, 1)
    target: Target,  # the teacher's logits (n, V)
    out: Tensor | None,  # (n, V)
    work: Sequence[Tensor],
    weight: Tensor | float,  # (n, 1), multiplies the gradient
) -> Tensor:  # (n, 1)
    (teacher,) = target
    a, b, c, d = work
    kind = options.kind
    # x is overwritten by e where it is not needed again.
    student_x = torch.sub(student, student_max, out=a)
    unit = exponents_(student_x, options.temperature)  # x / T = unit * student_x
    student_e = power(student_x, a if kind in ("jsd", "tvd") else b)
    student_sum = student_e.sum(-1, keepdim=True)
    teacher_x = torch.sub(teacher, row_max(teacher), out=c)
    exponents_(teacher_x, options.temperature)
    teacher_e = power(teacher_x, d if kind in ("kl_div", "reverse_kl") else c)
    teacher_sum = teacher_e.sum(-1, keepdim=True)
    slope = weight * (options.soft_weight / options.temperature)
    if kind == "soft_cross_entropy":
        loss = student_sum.log() - weigh_(student_x, teacher_e) * (unit / teacher_sum)
        if out is not None:
            _difference(student_e, student_sum, teacher_e, teacher_sum, slope, out)
    elif kind == "kl_div":
        mean = weigh_(teacher_x.sub_(student_x), teacher_e) / teacher_sum
        difference = torch.sub(student_e, teacher_e, out=a if out is None else out)
        excess = difference.sum(-1, keepdim=True)
        loss = mean * unit + _log_ratio(excess, student_sum, teacher_sum)
        if out is not None:  # p_s - p_t = (e_s - e_t + e_s (Z_t / Z_s - 1)) / Z_t
            out.addcmul_(student_e, excess / student_sum, value=-1).mul_(slope / teacher_sum)
    elif kind == "reverse_kl":
        mean = weigh_(student_x.sub_(teacher_x), student_e) / student_sum
        excess = torch.sub(student_e, teacher_e, out=c).sum(-1, keepdim=True)
        loss = mean * unit - _log_ratio(excess, student_sum, teacher_sum)
        if out is not None:
            _centred(student_x, student_e, mean, slope * unit / student_sum, out)
    elif kind == "jsd":
        student_p, teacher_p = student_e.mul_(1 / student_sum), teacher_e.mul_(1 / teacher_sum)
        loss = _mixture(options, student_p, teacher_p, slope, out, b, d)
    else:
        # The gradient's factor goes into p, which saves one more product. A weight may be 0.
        factor = options.soft_weight / options.temperature / 2
        student_p, teacher_p = student_e.mul_(factor / student_sum), teacher_e.mul_(factor / teacher_sum)
        loss = _tvd(student_p, teacher_p, factor, out, b, c)
        if out is not None and isinstance(weight, Tensor):
            out *= weight
    return loss.clamp_(min=0).mul_(options.soft_weight)  # rounding may leave -1e-8 of a loss that is 0


def _mixture(
    options: RowOptions,
    student_p: Tensor,
    teacher_p: Tensor,
    slope: Tensor | float,
    out: Tensor | None,
    b: Tensor,
    d: Tensor,
) -> Tensor:
    beta, teacher_kl, student_kl = options.beta, options.teacher_kl, options.student_kl
    bend = (1 - beta) * teacher_kl - beta * student_kl
    # Adding the smallest normal number makes the ratios of the two finite, and 1 where both probabilities are 0.
    tiny = torch.finfo(student_p.dtype).tiny
    student_q, teacher_q = torch.add(student_p, tiny, out=b), teacher_p.add_(tiny)
    difference = torch.sub(teacher_q, student_q, out=d)
    loss = difference.sum(-1, keepdim=True).mul_(-bend) if bend else torch.zeros_like(student_p[:, :1])
    if bend and out is not None:
        m = torch.mul(teacher_q, beta, out=out).add_(student_q, alpha=1 - beta)
        torch.div(difference, m, out=out).mul_(student_p).mul_((1 - beta) * bend)
    if student_kl:
        # log(m / p_s) = log1p(beta (p_t - p_s) / p_s)
        value = torch.div(difference, student_q, out=b if teacher_kl else d).mul_(beta).log1p_()
        if not teacher_kl:
            _mend_small_(value, teacher_q.div_(student_q), beta)
        value.mul_(student_p)
        mean = value.sum(-1, keepdim=True)
        loss -= student_kl * mean
        if bend and out is not None:
            out.add_(value, alpha=student_kl)
        elif out is not None:
            _centred(value, student_p, mean, -slope * student_kl, out)
    if bend and out is not None:
        _centred(out, student_p, out.sum(-1, keepdim=True), -slope, out)
    if teacher_kl:
        teacher_log = difference.div_(teacher_q).mul_(beta - 1).log1p_()
        if not student_kl:
            _mend_small_(teacher_log, student_q.div_(teacher_q), 1 - beta)
        loss -= teacher_kl * teacher_log.mul_(teacher_q).sum(-1, keepdim=True)
    return loss


def _mend_small_(log: Tensor, ratio: Tensor, weight: float) -> None:
    """Computes log(m / p) again where m / p < 1/2: there log1p's argument has lost the digits of a small skew.

    `ratio`, which is overwritten, is the other side's probability over p, and `weight` its weight in m.
    """
    if weight > 0.5:
        small = ratio.mul_(weight).add_(1 - weight)
        is_small = small < 0.5
        torch.where(is_small, small.log_(), log, out=log)


def _tvd(
    student_p: Tensor, teacher_p: Tensor, factor: float, out: Tensor | None, b: Tensor, c: Tensor
) -> Tensor:  # from factor * p of each side; `c` may be teacher_p
    difference = torch.sub(student_p, teacher_p, out=b)  # exactly 0 where the two are equal
    loss = torch.abs(difference, out=c).sum(-1, keepdim=True) / (2 * factor)
    if out is not None:
        value = torch.mul(difference.sign_(), student_p, out=c)
        torch.addcmul(value, student_p, value.sum(-1, keepdim=True) / factor, value=-1, out=out)
    return loss


def _difference(
    student_e: Tensor, student_sum: Tensor, teacher_e: Tensor, teacher_sum: Tensor, factor: Tensor | float, out: Tensor
) -> None:
    """Writes factor (p_s - p_t)."""
    torch.mul(student_e, factor / student_sum, out=out)
    out.addcmul_(teacher_e, factor / teacher_sum, value=-1)


def _centred(value: Tensor, p: Tensor, mean: Tensor, factor: float | Tensor, out: Tensor) -> None:
    """Writes factor (value - p mean), the gradient of a mean under the softmax p; `value` is p c, `mean` its sum."""
    torch.addcmul(value, p, mean, value=-1, out=out).mul_(factor)


def _log_ratio(excess: Tensor, e_sum: Tensor, other_sum: Tensor) -> Tensor:
    """Returns log(e_sum / other_sum). `excess` is the sum of the classes' differences, which cancels nothing."""
    excess = excess / other_sum
    return torch.where(excess.abs() < 0.5, excess.log1p(), (e_sum / other_sum).log())
