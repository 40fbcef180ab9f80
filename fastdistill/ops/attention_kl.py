"""KL(softmax(teacher scores) || softmax(student scores)) of each query row, in tiles of scores, as flash attention.

With x_s, x_t the scores of a row less their maximum, and l the sum of their exponentials,

    KL = E_t[x_t - x_s] - log l_t + log l_s        d KL / d x_s = exp(x_s) / l_s - exp(x_t) / l_t

A tile holds whole rows of scores; they are computed once and used for both the loss and the gradients. Memory is linear
in L and S. The gradients are those of the sum; the backward scales them.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from . import _attention, _common
from ._attention import Attention, Divisor, TileBlock


def attention_kl(call: Attention, backend: str, divisor: Divisor) -> tuple[Tensor, Divisor]:
    """Returns the sum of the rows' KL () and what is to divide it: `divisor`, or if None the number of rows with an
    allowed key () int64."""
    call = call.folded()
    total, count, *_ = _attention_kl(*call, backend, call.differentiable())
    return total, count if divisor is None else divisor


def _add_block(block: TileBlock, total: Tensor, d_query: Tensor | None, d_key: Tensor | None) -> None:
    student_scale, teacher_scale = block.call.student_scale, block.call.teacher_scale
    for rows, keys in block.tiles():
        sq, tq = block.student.queries(rows), block.teacher.queries(rows)
        sk, tk = block.student.keys(keys), block.teacher.keys(keys)
        shape = (*block.call.student_query.shape[:2], -1, sk.shape[1])
        s = block.product(student_scale, sq, sk, 0).view(shape)  # (B, H, rows, keys)
        t = block.product(teacher_scale, tq, tk, 1).view(shape)
        columns, allowed = block.allowed(rows, keys)
        if allowed is not None:
            # This is several times faster than a masked fill. In a row without an allowed key all scores are equal.
            lowest = (allowed.to(s.dtype) - 1) * (torch.finfo(s.dtype).max / 2)
            s[..., columns] += lowest
            t[..., columns] += lowest
        # Exponentials are powers of 2: torch.exp is 4 times slower on a CPU, and 100 times where it underflows. The
        # factor comes after the subtraction: before it, scores of 10000 would be rounded by 1e-3.
        s.sub_(s.amax(3, keepdim=True)).mul_(1 / math.log(2))
        t.sub_(t.amax(3, keepdim=True)).mul_(1 / math.log(2))
        log_ratio = torch.sub(t, s, out=block.scratch[2, : s.numel()].view(s.shape))
        s.exp2_()
        t.exp2_()
        wide = _common.widest_dtype(s)
        s_mass, t_mass = s.sum(3, keepdim=True, dtype=wide), t.sum(3, keepdim=True, dtype=wide)  # l
        cross = log_ratio.mul_(t).sum(3, keepdim=True).to(wide) * math.log(2)
        mass_ratio = s_mass / t_mass
        # Rounding must not make the divergence of equal rows negative.
        total += (cross / t_mass + mass_ratio.log()).clamp_(min=0).sum()
        if d_query is not None and d_key is not None:
            s.addcmul_(t, mass_ratio.to(t.dtype), value=-1)  # l_s (p_s - p_t)
            weight = (student_scale / s_mass).to(s.dtype).view(*sq.shape[:2], 1)
            d_scores = s.view(*sq.shape[:2], sk.shape[1])
            _attention.add_gradients(d_scores, sq, sk, weight, d_query[:, :, rows], d_key[:, :, keys])


_attention_kl = _attention.tiled_op("attention_kl", True, partial(_attention.add_tiles, _add_block))
