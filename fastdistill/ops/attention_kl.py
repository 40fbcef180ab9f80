"""KL(softmax(teacher scores) || softmax(student scores)) of each query row, in tiles of scores, as flash attention.

With a_s, a_t the scores of a row and Z the log of the sum of their exponentials,

    KL = E_t[a_t - a_s] - Z_t + Z_s        d KL / d a_s = softmax(a_s) - softmax(a_t)

One pass over a row's tiles keeps the maximum and the sum of exponentials of both sides and the cross term
sum exp(a_t) (a_t - a_s), rescaled whenever the teacher's maximum grows. A second pass, if gradients are wanted,
computes the tiles again, except the last, which is at hand: where a row is one tile nothing is computed twice. Memory
is linear in L and S. The gradients are those of a sum; the backward scales them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops import _attention, _common


def attention_kl(
    student_query: Tensor,  # (B, H, L, D_s)
    student_key: Tensor,  # (B, H_s, S, D_s), H_s divides H
    teacher_query: Tensor,  # (B, H, L, D_t)
    teacher_key: Tensor,  # (B, H_t, S, D_t), H_t divides H
    student_scale: float,
    teacher_scale: float,
    key_mask: Tensor | None,  # (B, S)
    query_mask: Tensor | None,  # (B, L)
    is_causal: bool,
    attn_mask: Tensor | None,  # (B|1, H|1, L|1, S|1)
) -> tuple[Tensor, Tensor]:  # sum of the rows' KL (), number of rows with an allowed key () int64
    lengths = student_query.shape[2], student_key.shape[2]
    attn_mask, key_mask, query_mask = _attention.fold_mask(attn_mask, key_mask, query_mask, *lengths)
    return _attention_kl(
        student_query, student_key, teacher_query, teacher_key, student_scale, teacher_scale,
        key_mask, query_mask, is_causal, attn_mask, _attention.differentiable(student_query, student_key),
    )[:2]  # fmt: skip


class _Softmax:
    """One side's running maximum and sum of exponentials of some rows, each (B, H, rows, 1)."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        # Above the score of a pair that is not allowed, below all others.
        self.top = like.new_full(shape, torch.finfo(like.dtype).min / 2)
        self.mass = like.new_zeros(shape, dtype=_common.widest_dtype(like))

    def add(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """`weights` of the scores, and the factor by which what was summed before shrinks."""
        top = torch.maximum(self.top, scores.amax(3, keepdim=True))
        shrink = (self.top - top).exp_()
        self.top = top
        weights = self.weights(scores)
        self.mass.mul_(shrink).add_(weights.sum(3, keepdim=True))
        return weights, shrink

    def weights(self, scores: Tensor) -> Tensor:
        """exp(scores - maximum), in the place of scores."""
        return scores.sub_(self.top).exp_()

    def normalise(self, weights: Tensor) -> Tensor:
        """Probabilities, in the place of weights; 0 in an empty row. exp(scores - Z) would carry the rounding of Z."""
        return weights.mul_(torch.where(self.mass > 0, 1 / self.mass, 0).to(weights.dtype))

    def norm(self) -> Tensor:  # Z
        return self.top + self.mass.log()


def _scores(
    query: Tensor,  # (B * H_kv, H / H_kv * rows, D)
    key: Tensor,  # (B * H_kv, keys, D)
    shape: tuple[int, ...],  # B, H, rows, 1
) -> Tensor:  # (B, H, rows, keys)
    return torch.bmm(query, key.mT).view(*shape[:3], key.shape[1])


def _forbid(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Adds the least number where a pair is not allowed, in place: several times faster than a masked fill."""
    if allowed is not None:
        scores += (allowed.to(scores.dtype) - 1) * torch.finfo(scores.dtype).max
    return scores


@torch.library.custom_op("fastdistill::attention_kl", mutates_args=())
def _attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float,
    teacher_scale: float,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    attn_mask: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sum, count; gradients of the sum in its dtype, empty if not asked for
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, device = student_query.shape[2], student_key.shape[2], student_query.device
    counted = _attention.count_rows(query_length, key_length, device, key_mask, query_mask, is_causal, attn_mask)
    some_key = (counted.keys_per_query > 0).expand(student_query.shape[:3])
    offset = key_length - query_length if is_causal else None
    total, d_query, d_key = _attention.tiled_outputs(*inputs, differentiable)
    divergence = total.to(_common.widest_dtype(total), copy=True)
    with _common.no_autocast(student_query):
        for block in _attention.tile_blocks(*inputs, counted, total.dtype):
            masks = block.masks(offset, attn_mask, key_mask)
            for rows, tiles in block.tiles(offset):
                sq, tq = block.student.queries(rows), block.teacher.queries(rows)
                scaled_sq, scaled_tq = sq * student_scale, tq * teacher_scale
                shape = (*block.student.query.shape[:2], rows.stop - rows.start, 1)
                student, teacher = _Softmax(shape, total), _Softmax(shape, total)
                cross = torch.zeros_like(teacher.mass)  # sum exp(a_t - maximum) (a_t - a_s)
                for keys in tiles:
                    allowed = masks(rows, keys)
                    sk, tk = block.student.keys(keys), block.teacher.keys(keys)
                    student_scores, teacher_scores = _scores(scaled_sq, sk, shape), _scores(scaled_tq, tk, shape)
                    difference = teacher_scores - student_scores
                    student_p, _ = student.add(_forbid(student_scores, allowed))
                    teacher_p, shrink = teacher.add(_forbid(teacher_scores, allowed))
                    cross.mul_(shrink).add_(difference.mul_(teacher_p).sum(3, keepdim=True))
                counts = block.take(some_key)[:, :, rows, None]
                # Rounding must not make the divergence of equal rows negative.
                rows_kl = (cross / teacher.mass - teacher.norm() + student.norm()).clamp_(min=0)
                divergence += torch.where(counts, rows_kl, 0).sum()
                if not differentiable:
                    continue
                dq = torch.zeros(sq.shape, dtype=sq.dtype, device=device)
                for keys in reversed(tiles):
                    sk, tk = block.student.keys(keys), block.teacher.keys(keys)
                    if keys != tiles[-1]:
                        allowed = masks(rows, keys)
                        student_p = student.weights(_forbid(_scores(scaled_sq, sk, shape), allowed))
                        teacher_p = teacher.weights(_forbid(_scores(scaled_tq, tk, shape), allowed))
                    d_scores = student.normalise(student_p).sub_(teacher.normalise(teacher_p))
                    d_scores = d_scores.view(len(sq), -1, sk.shape[1])
                    _attention.add_gradients(d_scores, sq, sk, dq, block.take(d_key)[:, :, keys], student_scale)
                out = block.take(d_query)[:, :, rows]
                out.copy_(dq.view(out.shape))
    return divergence.to(total.dtype), some_key.sum(), d_query, d_key


_attention.register_tiled(_attention_kl, "attention_kl")
