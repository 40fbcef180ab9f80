"""The losses over classes where each process of a group holds a shard of the vocabulary.

A process computes with its own columns of the logits alone. What a row needs of the others are sums over classes: each
process sends its row's maximum of z and its sums relative to that maximum, and all processes combine what they receive
in the same way. With m_r the maximum on rank r, M the largest of them, and d_r = m_r - M,

    Z = sum_r exp(d_r / T) Z_r
    sum_v e_t (x_t - x_s) = sum_r exp(d_t,r / T) (A_r + Z_t,r (d_t,r - d_s,r))        A_r: the same sum on rank r

so maxima and sums travel together, in one collective. The gradient of the cross-entropy and of the KL divergences
follows from them. JSD, skewed KL and TVD are sums of functions of p, which a second collective adds. A teacher's list
needs the student's logits of the listed classes (N, k), each from the process that has it.

All processes of the group pass the same rows, labels and lists, and get the same losses. The gradient in the logits or
in the vocabulary weights is that of the own shard; the gradient in the hidden states is summed over the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from . import _common, _rows, _topk
from ._rows import Index, RowOptions, at, exponential, row_max

BUFFERS = 6  # scratch of a block of rows, in tensors of its size
SUMS = 8  # of each row: the fields of `Row`


class Shard(NamedTuple):
    """The classes of this process."""

    group: str  # the process group's name
    first: int  # the number of classes on the ranks before
    width: int  # V_r, the number of classes here, without padding

    def processes(self) -> ProcessGroup:
        return _resolve_process_group(self.group)  # type: ignore[arg-type]


class Row(NamedTuple):
    """What all processes know of a row, (n, 1) each; maxima and sums are those of the whole vocabulary."""

    student_max: Tensor
    student_sum: Tensor  # Z_s
    hard_sum: Tensor  # Z_s at temperature 1
    label: Tensor  # the student's logit of the label, 0 without one
    teacher_max: Tensor  # with a bucket, this and the next are of the student's classes that are not listed
    teacher_sum: Tensor  # Z_t
    cross: Tensor  # sum e_t x_s (soft cross-entropy), sum e_t (x_t - x_s) (KL), sum e_s (x_s - x_t) (reverse KL)
    excess: Tensor  # sum (e_t - e_s)

    def at(self, rows: slice) -> Row:
        return Row(*(x[rows] for x in self))


class Given(NamedTuple):
    """What rows are compared with, other than the teacher's logits; classes count from the first of all ranks."""

    logprobs: Tensor | None  # (n, k), of the listed classes
    indices: Tensor | None  # (n, k)
    labels: Tensor | None  # (n, 1)

    def at(self, rows: slice) -> Given:
        return Given(*(at(x, rows) for x in self))


# -- the own classes -----------------------------------------------------------------------------------------


def own(classes: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:  # (n, k) -> (n, k), (n, k)
    """Returns the columns of classes, 0 where another process has them, and where they are here."""
    columns = classes - shard.first
    here = (columns >= 0) & (columns < shard.width)
    return columns.where(here, 0), here


def gathered(x: Tensor, classes: Tensor, shard: Shard) -> Tensor:  # (n, V_r), (n, k) -> (n, k)
    """Returns x at the classes that are here, and 0 for the others."""
    if shard.width == 0:
        return x.new_zeros(classes.shape)
    columns, here = own(classes, shard)
    return x.gather(1, columns).where(here, 0)


def scatter_add_(out: Tensor, classes: Tensor, values: Tensor, shard: Shard) -> None:
    if shard.width:
        columns, here = own(classes, shard)
        out.scatter_add_(1, columns, values.where(here, 0))


def not_listed(student: Tensor, indices: Tensor, shard: Shard) -> Tensor:  # (n, V_r)
    """Returns the student's logits with -inf at the listed classes."""
    columns, here = own(indices, shard)
    barrier = torch.where(here, -torch.inf, torch.inf).to(student.dtype)
    return student.scatter_reduce(1, columns, barrier, "amin")


def softmax(x: Tensor, top: Tensor, total: Tensor, temperature: float) -> Tensor:
    shifted = x - top
    return exponential(shifted, shifted, temperature).mul_(1 / total)


def sums(options: RowOptions, student: Tensor, teacher: Tensor | None, given: Given, shard: Shard) -> Tensor:
    """Returns `Row` of the own classes, relative to their own maxima, (SUMS, n, 1)."""
    out = student.new_zeros(SUMS, len(student), 1)
    lowest = torch.finfo(student.dtype).min  # finite even where no class here has a probability above 0
    out[0] = out[4] = lowest
    if shard.width == 0:
        return out
    student_max = row_max(student).clamp_(min=lowest)
    student_x, temperature = student - student_max, options.temperature
    student_e = exponential(student_x, torch.empty_like(student), temperature)
    out[0], out[1] = student_max, student_e.sum(-1, keepdim=True)
    if given.labels is not None:
        hard = student_e if temperature == 1 else exponential(student_x, torch.empty_like(student))
        out[2], out[3] = hard.sum(-1, keepdim=True), gathered(student, given.labels, shard)
    if given.indices is not None and options.tail == "bucket":
        others = not_listed(student, given.indices, shard)
        out[4] = row_max(others).clamp_(min=lowest)
        out[5] = exponential(others.sub_(out[4]), others).sum(-1, keepdim=True)
    if teacher is None:
        return out
    teacher_max = row_max(teacher).clamp_(min=lowest)
    teacher_x = teacher - teacher_max
    teacher_e = exponential(teacher_x, torch.empty_like(teacher), temperature)
    out[4], out[5] = teacher_max, teacher_e.sum(-1, keepdim=True)
    if options.kind == "soft_cross_entropy":
        out[6] = _rows.weigh_(student_x, teacher_e)
    elif options.kind == "kl_div":
        out[6] = _rows.weigh_(teacher_x.sub_(student_x), teacher_e)
    elif options.kind == "reverse_kl":
        out[6] = _rows.weigh_(student_x.sub_(teacher_x), student_e)
    out[7] = teacher_e.sub_(student_e).sum(-1, keepdim=True)
    return out


def summands(options: RowOptions, student: Tensor, teacher: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Returns the own classes' part of a sum of functions of p (n, 1), and p_s c (n, V_r), as in _divergence.py."""
    student_p = softmax(student, row.student_max, row.student_sum, options.temperature)
    teacher_p = softmax(teacher, row.teacher_max, row.teacher_sum, options.temperature)
    if options.kind == "tvd":
        difference = student_p - teacher_p
        return difference.abs().sum(-1, keepdim=True) / 2, difference.sign_().mul_(student_p).div_(2)
    beta, teacher_kl, student_kl = options.beta, options.teacher_kl, options.student_kl
    bend = (1 - beta) * teacher_kl - beta * student_kl
    tiny = torch.finfo(student_p.dtype).tiny  # makes the ratios finite, and 1 where both probabilities are 0
    student_q, teacher_q = student_p + tiny, teacher_p + tiny
    difference = teacher_q - student_q
    value = (difference / student_q).mul_(beta).log1p_().mul_(student_p).mul_(-student_kl)
    loss = value - (difference / teacher_q).mul_(beta - 1).log1p_().mul_(teacher_p).mul_(teacher_kl)
    if bend:
        loss.sub_(difference, alpha=bend)
        value.sub_((difference / (student_q + beta * difference)).mul_(student_p), alpha=(1 - beta) * bend)
    return loss.sum(-1, keepdim=True), value


def gradient(
    options: RowOptions, student: Tensor, teacher: Tensor | None, given: Given, row: Row, more: Tensor | None,
    shard: Shard,
) -> Tensor:  # (n, V_r) # fmt: skip
    """Returns the gradient of the rows' losses in the own logits, before scale and softcap."""
    temperature, slope = options.temperature, options.soft_weight / options.temperature
    p = softmax(student, row.student_max, row.student_sum, temperature)
    if not options.soft_weight:
        out = torch.zeros_like(p)
    elif given.indices is not None:
        of_list = list_loss(options, given, row, more)
        out = p.mul_(of_list.whole)
        if options.tail == "bucket" and shard.width:
            others = not_listed(student, given.indices, shard).sub_(row.teacher_max)
            out.addcmul_(exponential(others, others), of_list.rest / row.teacher_sum.where(row.teacher_sum > 0, 1))
        scatter_add_(out, given.indices, of_list.listed, shard)
    else:
        assert teacher is not None
        if options.kind in ("soft_cross_entropy", "kl_div"):
            out = p.sub_(softmax(teacher, row.teacher_max, row.teacher_sum, temperature)).mul_(slope)
        elif options.kind == "reverse_kl":
            c = (student - row.student_max).sub_(teacher - row.teacher_max).sub_(row.cross / row.student_sum)
            out = c.mul_(p).masked_fill_(p == 0, 0).mul_(slope / temperature)
        else:
            assert more is not None
            value = summands(options, student, teacher, row)[1]
            out = value.addcmul_(p, more[:, 1:], value=-1).mul_(slope)
    if given.labels is not None:
        hard = softmax(student, row.student_max, row.hard_sum, 1.0)
        scatter_add_(hard, given.labels, hard.new_full(given.labels.shape, -1.0), shard)
        out.add_(hard, alpha=options.hard_weight)
    return out.masked_fill_(student == -torch.inf, 0)


# -- what all processes compute alike ------------------------------------------------------------------------


def combined(options: RowOptions, parts: Tensor) -> Row:  # (ranks, SUMS, n, 1)
    part = Row(*parts.unbind(1))
    student_max, teacher_max = part.student_max.amax(0), part.teacher_max.amax(0)
    student_d, teacher_d = part.student_max - student_max, part.teacher_max - teacher_max  # (ranks, n, 1)
    temperature = options.temperature
    student_scale, teacher_scale = (student_d / temperature).exp_(), (teacher_d / temperature).exp_()
    # The cross term's e, its sum, and what x of the own classes lacks.
    scale, weight, lacks = {
        "soft_cross_entropy": (teacher_scale, part.teacher_sum, student_d),
        "reverse_kl": (student_scale, part.student_sum, student_d - teacher_d),
    }.get(options.kind, (teacher_scale, part.teacher_sum, teacher_d - student_d))
    cross = (scale * (part.cross + weight * lacks)).masked_fill_(scale == 0, 0).sum(0)
    # Near the teacher the two scales are close: their difference follows from that of the exponents.
    gap = (teacher_d - student_d) / temperature
    apart = torch.where(gap.abs() < 1, student_scale * gap.expm1(), teacher_scale - student_scale)
    excess = (teacher_scale * part.excess + apart * part.student_sum).sum(0)
    return Row(
        student_max, (student_scale * part.student_sum).sum(0), (student_d.exp() * part.hard_sum).sum(0),
        part.label.sum(0), teacher_max, (teacher_scale * part.teacher_sum).sum(0), cross, excess,
    )  # fmt: skip


def losses(options: RowOptions, row: Row, more: Tensor | None, given: Given) -> Tensor:  # (n)
    """`more` (n, .) is what the second collective added."""
    student_sum, teacher_sum, temperature = row.student_sum, row.teacher_sum, options.temperature
    if not options.soft_weight:
        loss = torch.zeros_like(student_sum)
    elif given.indices is not None:
        loss = list_loss(options, given, row, more).loss
    elif options.kind == "soft_cross_entropy":
        loss = student_sum.log() - row.cross / (temperature * teacher_sum)
    elif options.kind == "kl_div":
        loss = row.cross / (temperature * teacher_sum) - log_ratio(row.excess, teacher_sum, student_sum)
    elif options.kind == "reverse_kl":
        loss = row.cross / (temperature * student_sum) - log_ratio(-row.excess, student_sum, teacher_sum)
    else:
        assert more is not None
        loss = more[:, :1]
    loss = loss.clamp(min=0) * options.soft_weight  # rounding may leave -1e-8 of a loss that is 0
    if given.labels is not None:
        loss = loss + options.hard_weight * (row.hard_sum.log() + (row.student_max - row.label))
    return loss[:, 0]


def log_ratio(excess: Tensor, total: Tensor, other: Tensor) -> Tensor:
    """Returns log(total / other), where excess = total - other was summed class by class."""
    excess = excess / other
    return torch.where(excess.abs() < 0.5, excess.log1p(), (total / other).log())


class ListLoss(NamedTuple):
    """A loss (n, 1) against a list; its gradient is `whole` p_s + `rest` softmax of the bucket + `listed`."""

    loss: Tensor
    whole: Tensor  # (n, 1)
    rest: Tensor  # (n, 1)
    listed: Tensor  # (n, k)


def list_loss(options: RowOptions, given: Given, row: Row, more: Tensor | None) -> ListLoss:
    """Computes the loss of _topk.py; `more` (n, k) holds the student's logits of the listed classes."""
    assert given.logprobs is not None
    assert more is not None
    temperature, has_bucket = options.temperature, options.tail == "bucket"
    slope, k = options.soft_weight / temperature, more.shape[1]
    wide = _common.widest_dtype(more)  # the lists are short: their digits cost nothing
    x, top, logprobs = more.to(wide), row.student_max.to(wide), given.logprobs.to(wide)
    x, rest_log = x - top, row.teacher_max.to(wide) - top + row.teacher_sum.to(wide).log()
    if options.kind == "reverse_kl":
        teacher_logp, teacher_rest = _topk._log_probabilities(options, logprobs)
        student_logp = (x / temperature).masked_fill_(logprobs == -math.inf, -math.inf)
        if has_bucket:
            student_logp = torch.cat([student_logp, rest_log], 1)  # (n, k + 1)
            teacher_logp = torch.cat([teacher_logp, teacher_rest], 1)
        student_logp = student_logp.log_softmax(-1)
        p = student_logp.exp()
        c = (student_logp - teacher_logp).masked_fill_(p == 0, 0)
        # q - p sums to 0; added to each term it keeps the digits of a student that is close to its teacher.
        excess = torch.where(c.abs() < 1, p * torch.expm1(-c), teacher_logp.exp() - p)
        loss = (p * c + excess).sum(-1, keepdim=True)
        d = p * (c - (p * c).sum(-1, keepdim=True)) * slope
        nothing = torch.zeros_like(loss)
        found = ListLoss(loss, nothing, d[:, k:] if has_bucket else nothing, d[:, :k])
    else:
        log_sum = row.student_sum.to(wide).log()
        p, p_rest = _topk._probabilities(options, logprobs)
        loss = -_topk._expectation(p, x / temperature - log_sum)
        if has_bucket:
            loss -= _topk._expectation(p_rest, rest_log - log_sum)
            p_rest = p_rest.where(rest_log > -math.inf, 0)  # a bucket of probability 0 has no gradient
        found = ListLoss(loss, (p.sum(-1, keepdim=True) + p_rest) * slope, p_rest * -slope, p * -slope)
    return ListLoss(*(part.to(more.dtype) for part in found))


# -- sending and receiving -----------------------------------------------------------------------------------

# Returns a block of rows: the logits of student and teacher (n, V_r), wide, scaled and capped.
Read = Callable[[Index, slice], tuple[Tensor, Tensor | None]]


class Stored(NamedTuple):
    """Logits as the kernels read them: as given, without bias, scale and softcap."""

    student: Tensor  # (*, >= V_r)
    teacher: Tensor | None  # (*, >= V_r); None: the soft loss has no weight
    biases: tuple[Tensor | None, Tensor | None]  # (>= V_r)
    labels: Tensor | None  # (n), columns of the own shard, or -1


class Rows(NamedTuple):
    """Rows on one process: how to read them block by block, and what they are compared with."""

    blocks: list[tuple[Index, slice]]
    read: Read
    given: Given
    size: int  # n
    dtype: torch.dtype  # of the computation
    stored: Stored | None = None  # what the kernels read instead


def by_kernels(options: RowOptions, shard: Shard, given: Given) -> bool:
    """Returns whether kernels run. Lists run the portable code on every backend: their part of a row is small."""
    return options.backend == "triton" and given.indices is None and shard.width > 0


def stored_for(
    options: RowOptions, shard: Shard, student: Tensor, teacher: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None], given: Given,
) -> Stored | None:  # fmt: skip
    """Returns what the kernels read, None if portable code runs."""
    if not by_kernels(options, shard, given):
        return None
    labels = None
    if given.labels is not None:
        columns, here = own(given.labels, shard)
        labels = columns.masked_fill(~here, -1)[:, 0].contiguous()
    student_bias, teacher_bias = _rows.contiguous(*biases)
    return Stored(student, teacher if options.soft_weight else None, (student_bias, teacher_bias), labels)


class Sent(NamedTuple):
    """Sums of rows that are on their way."""

    parts: Tensor  # (ranks, SUMS, n, 1)
    listed: Tensor | None  # (n, k), the student's logits of the listed classes
    works: list[Any]


def send(options: RowOptions, shard: Shard, rows: Rows) -> Sent:
    group, listed = shard.processes(), None
    if rows.stored is not None:
        from ..kernels import shards as kernels

        part = kernels.sums(*rows.stored, options, shard.width, rows.size, rows.dtype)
    else:
        part, listed = _sums_in_blocks(options, shard, rows)
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    works = [dist.all_gather(list(parts.unbind()), part, group=group, async_op=True)]
    if listed is not None:
        works.append(dist.all_reduce(listed, group=group, async_op=True))
    return Sent(parts, listed, works)


def _sums_in_blocks(options: RowOptions, shard: Shard, rows: Rows) -> tuple[Tensor, Tensor | None]:
    parts, listed = [], []
    for index, block in rows.blocks:
        student, teacher = rows.read(index, block)
        given = rows.given.at(block)
        parts.append(sums(options, student, teacher, given, shard))
        if given.indices is not None:
            listed.append(gathered(student, given.indices, shard))
    return torch.cat(parts, 1), torch.cat(listed) if listed else None


def receive(options: RowOptions, shard: Shard, rows: Rows, sent: Sent) -> tuple[Row, Tensor | None]:
    """Returns what all processes know of the rows, and what the second collective added."""
    for work in sent.works:
        work.wait()
    row = combined(options, sent.parts)
    if not options.soft_weight or options.kind not in ("jsd", "tvd"):
        return row, sent.listed
    if rows.stored is not None:
        from ..kernels import shards as kernels

        more = kernels.summed(*rows.stored, options, shard.width, torch.stack(row))
    else:
        more = row.label.new_empty(len(row.label), 2)
        for index, block in rows.blocks:
            student, teacher = rows.read(index, block)
            assert teacher is not None
            loss, value = summands(options, student, teacher, row.at(block))
            more[block] = torch.cat([loss, value.sum(-1, keepdim=True)], 1)
    dist.all_reduce(more, group=shard.processes())
    return row, more


def write_gradient(
    options: RowOptions, shard: Shard, rows: Rows, row: Row, more: Tensor | None,
    weight: Tensor | None,  # (n, 1), of the rows' gradients; rows of weight 0 may hold anything
    out: Tensor,  # (n, >= V_r) contiguous, for the gradient in the logits as they were given
) -> None:  # fmt: skip
    if rows.stored is not None:
        from ..kernels import shards as kernels

        mean = row.cross / row.student_sum if options.kind == "reverse_kl" else None
        mean, weight = _rows.contiguous(mean if more is None else more[:, 1], weight)
        kernels.gradient(*rows.stored, options, shard.width, torch.stack(row), mean, weight, out)
        return
    for index, block in rows.blocks:
        student, teacher = rows.read(index, block)
        d = gradient(options, student, teacher, rows.given.at(block), row.at(block), at(more, block), shard)
        if weight is not None:
            d.mul_(weight[block]).masked_fill_(weight[block] == 0, 0)
        if options.student_softcap is not None:
            slope = (student / options.student_softcap).square_().clamp_(max=1)  # 0 where -inf was kept
            d.mul_(slope.mul_(-options.student_scale).add_(options.student_scale))
        elif options.student_scale != 1:
            d.mul_(options.student_scale)
        out[block, : shard.width].copy_(d)


def given_of(
    options: RowOptions, logprobs: Tensor, indices: Tensor | None, labels: Tensor | None, counted: Tensor | None,
    dtype: torch.dtype,
) -> Given:  # fmt: skip
    labels = _rows.checked_labels(labels, counted, options.classes)
    if indices is None or not options.soft_weight:
        return Given(None, None, labels)
    return Given(*_topk.listed(options, logprobs, indices, counted, dtype), labels)
