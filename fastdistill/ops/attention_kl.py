"""KL(softmax(teacher scores) || softmax(student scores)) of each query row, in tiles of scores, as flash attention.

With x_s, x_t the scores of a row less their maximum, and l the sum of their exponentials,

    KL = E_t[x_t - x_s] - log l_t + log l_s        d KL / d x_s = exp(x_s) / l_s - exp(x_t) / l_t

One pass over a row's tiles keeps the maximum and l of both sides and the cross term sum exp(x_t) (x_t - x_s), and
rescales them whenever a maximum grows. If gradients are wanted, a second pass recomputes all tiles but the last, which
is still in memory: a row of one tile is computed only once. Memory is linear in L and S. The gradients are those of the
sum; the backward scales them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops import _attention, _common
from fastdistill.ops._attention import Attention, Divisor, TileBlock


def attention_kl(call: Attention, backend: str, divisor: Divisor) -> tuple[Tensor, Divisor]:
    """Returns the sum of the rows' KL () and what is to divide it: `divisor`, or if None the number of rows with an
    allowed key () int64."""
    call = call.folded()
    total, count, *_ = _attention_kl(*call, backend, call.differentiable())
    return total, count if divisor is None else divisor


class _Softmax:
    """The running maximum and sum of exponentials of one side's rows of scores, (B, H, rows, 1) each."""

    top: Tensor
    mass: Tensor

    def start(self, scores: Tensor) -> Tensor:
        """Takes the first tile; returns scores - maximum, in place."""
        self.top = _maximum(scores)
        self.mass = torch.zeros_like(self.top, dtype=_common.widest_dtype(scores))
        return scores.sub_(self.top)

    def proceed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a further tile; returns scores - maximum, in place, and by how much the maximum grew."""
        top = torch.maximum(self.top, _maximum(scores))
        growth = top - self.top
        self.top = top
        self.mass *= torch.exp(-growth)
        return scores.sub_(top), growth

    def add(self, shifted: Tensor) -> Tensor:
        """Adds exp(shifted) to the sum and returns it, in place."""
        weights = _exp(shifted)
        self.mass += weights.sum(3, keepdim=True, dtype=self.mass.dtype)
        return weights

    def normalise(self, weights: Tensor) -> Tensor:
        """Returns probabilities, in place. exp(scores - log(sum)) would carry the rounding of the logarithm."""
        return weights.mul_((1 / self.mass).to(weights.dtype))


class _Rows:
    """The running sums of some rows: both softmaxes, and the cross term sum exp(x_t) (x_t - x_s)."""

    cross: Tensor

    def __init__(self) -> None:
        self.student, self.teacher = _Softmax(), _Softmax()

    def add(self, student_scores: Tensor, teacher_scores: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Adds a tile; returns exp(x_s) and exp(x_t), written over the scores."""
        if first:
            student_x, teacher_x = self.student.start(student_scores), self.teacher.start(teacher_scores)
            self.cross = torch.zeros_like(self.teacher.mass)
        else:
            mass = self.teacher.mass.clone()
            student_x, student_growth = self.student.proceed(student_scores)
            teacher_x, teacher_growth = self.teacher.proceed(teacher_scores)
            self.cross += mass * (student_growth - teacher_growth)
            self.cross *= torch.exp(-teacher_growth)
        difference = teacher_x - student_x
        student_p, teacher_p = self.student.add(student_x), self.teacher.add(teacher_x)
        self.cross += difference.mul_(teacher_p).sum(3, keepdim=True, dtype=self.cross.dtype)
        return student_p, teacher_p

    def divergence(self) -> Tensor:
        # Rounding must not make the divergence of equal rows negative.
        return (self.cross / self.teacher.mass - self.teacher.mass.log() + self.student.mass.log()).clamp_(min=0)


def _maximum(scores: Tensor) -> Tensor:
    # The lower bound lies above the score of a masked pair and below all others.
    return scores.amax(3, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min / 2)


def _exp(shifted: Tensor) -> Tensor:
    """Computes exp in place. exp is ten times slower where it underflows: the clamp keeps it just above that."""
    return shifted.clamp_(min=math.log(torch.finfo(shifted.dtype).tiny) + 1).exp_()


def _scores(
    query: Tensor,  # (B * H_kv, H / H_kv * rows, D)
    key: Tensor,  # (B * H_kv, keys, D)
    shape: tuple[int, ...],  # B, H, rows, 1
) -> Tensor:  # (B, H, rows, keys)
    return torch.bmm(query, key.mT).view(*shape[:3], key.shape[1])


def _forbid(scores: Tensor, columns: slice, allowed: Tensor | None) -> Tensor:
    """Adds the lowest number where a pair is masked, in place: several times faster than a masked fill."""
    if allowed is not None:
        scores[..., columns] += (allowed.to(scores.dtype) - 1) * torch.finfo(scores.dtype).max
    return scores


def _add_block(block: TileBlock, total: Tensor, d_query: Tensor | None, d_key: Tensor | None) -> None:
    student_scale, teacher_scale = block.call.student_scale, block.call.teacher_scale
    for rows, tiles in block.tiles():
        if not tiles:
            continue
        sq, tq = block.student.queries(rows), block.teacher.queries(rows)
        scaled_sq, scaled_tq = sq * student_scale, tq * teacher_scale
        shape = (*block.call.student_query.shape[:2], rows.stop - rows.start, 1)
        sums = _Rows()
        for keys in tiles:
            allowed = block.allowed(rows, keys)
            sk, tk = block.student.keys(keys), block.teacher.keys(keys)
            student_p, teacher_p = sums.add(
                _forbid(_scores(scaled_sq, sk, shape), *allowed),
                _forbid(_scores(scaled_tq, tk, shape), *allowed),
                first=keys.start == 0,
            )
        some_key = block.keys_per_query[:, :, rows, None] > 0
        total += torch.where(some_key, sums.divergence(), 0).sum()
        if d_query is None or d_key is None:
            continue
        dq = sq.new_zeros(sq.shape)
        for keys in reversed(tiles):
            sk, tk = block.student.keys(keys), block.teacher.keys(keys)
            allowed = block.allowed(rows, keys)
            if keys != tiles[-1]:
                student_p = _exp(_forbid(_scores(scaled_sq, sk, shape), *allowed).sub_(sums.student.top))
                teacher_p = _exp(_forbid(_scores(scaled_tq, tk, shape), *allowed).sub_(sums.teacher.top))
            d_scores = sums.student.normalise(student_p).sub_(sums.teacher.normalise(teacher_p))
            columns, pairs = allowed
            if pairs is not None:
                d_scores[..., columns] *= pairs
            d_scores = d_scores.view(len(sq), -1, sk.shape[1])
            _attention.add_gradients(d_scores, sq, sk, dq, d_key[:, :, keys], student_scale)
        d_query[:, :, rows] = dq.view(d_query[:, :, rows].shape)


_attention_kl = _attention.tiled_op("attention_kl", True, _add_block)
