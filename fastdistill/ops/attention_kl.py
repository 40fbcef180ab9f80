"""KL(softmax(teacher scores) || softmax(student scores)) of each query row, in tiles of scores, as flash attention.

With a_s, a_t the scores of a row and Z the log of the sum of their exponentials,

    KL = E_t[a_t - a_s] - Z_t + Z_s        d KL / d a_s = softmax(a_s) - softmax(a_t)

One pass over tiles of keys keeps, for each row, the maximum and the sum of exponentials of both sides and the cross
term sum exp(a_t) (a_t - a_s), rescaled whenever the teacher's maximum grows. The backward computes the tiles again.
Memory is linear in L and S: Z_s and Z_t of each row are kept for the backward.
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
        key_mask, query_mask, is_causal, attn_mask,
    )[:2]  # fmt: skip


def _scores(
    query: Tensor,  # (B * H_kv, H / H_kv * rows, D)
    key: Tensor,  # (B * H_kv, keys, D)
    heads: torch.Size,  # B, H
    bias: Tensor | None = None,
) -> Tensor:  # (B, H, rows, keys)
    scores = torch.bmm(query, key.mT).view(*heads, -1, key.shape[1])
    return scores if bias is None else scores.add_(bias)


def _bias(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a pair is allowed, else the least number: adding it is several times faster than a masked fill."""
    return None if allowed is None else (allowed.to(dtype) - 1) * torch.finfo(dtype).max


class _Softmax:
    """One side's running maximum and sum of exponentials of each row, (B, H, rows, 1)."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        # Above the score of a pair that is not allowed, below all others.
        self.top = like.new_full(shape, torch.finfo(like.dtype).min / 2)
        self.mass = like.new_zeros(shape, dtype=_common.widest_dtype(like))

    def add(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """exp(scores - maximum), in the place of scores; the factor that what was summed before has shrunk by."""
        top = torch.maximum(self.top, scores.amax(3, keepdim=True))
        shrink = (self.top - top).exp_()
        weights = scores.sub_(top).exp_()
        self.top = top
        self.mass.mul_(shrink).add_(weights.sum(3, keepdim=True))
        return weights, shrink

    def norm(self) -> Tensor:
        return self.top + self.mass.log()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sum, count; Z_s and Z_t (B, H, L), 0 where a row does not count
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, device = student_query.shape[2], student_key.shape[2], student_query.device
    counted = _attention.count_rows(query_length, key_length, device, key_mask, query_mask, is_causal, attn_mask)
    some_key = (counted.keys_per_query > 0).expand(student_query.shape[:3])
    offset = key_length - query_length if is_causal else None
    total, student_norm, teacher_norm = _outputs(*inputs)
    divergence = total.to(_common.widest_dtype(total))
    with _common.no_autocast(student_query):
        for block in _attention.tile_blocks(*inputs, counted, total.dtype):
            heads = block.student.query.shape[:2]
            counts, student_norms, teacher_norms = map(block.take, (some_key, student_norm, teacher_norm))
            masks = block.masks(offset, attn_mask, key_mask)
            for rows, tiles in block.tiles(offset):
                sq, tq = block.student.queries(rows) * student_scale, block.teacher.queries(rows) * teacher_scale
                shape = (*heads, rows.stop - rows.start, 1)
                student, teacher = _Softmax(shape, total), _Softmax(shape, total)
                cross = torch.zeros_like(teacher.mass)  # sum exp(a_t - maximum) (a_t - a_s)
                for keys in tiles:
                    bias = _bias(masks(rows, keys), total.dtype)
                    student_scores = _scores(sq, block.student.keys(keys), heads)
                    teacher_scores = _scores(tq, block.teacher.keys(keys), heads)
                    difference = teacher_scores - student_scores
                    if bias is not None:
                        student_scores += bias
                        teacher_scores += bias
                    student.add(student_scores)
                    weights, shrink = teacher.add(teacher_scores)
                    cross.mul_(shrink).add_(difference.mul_(weights).sum(3, keepdim=True))
                row_counts = counts[:, :, rows, None]
                zs, zt = (torch.where(row_counts, side.norm(), 0) for side in (student, teacher))
                # Rounding must not make the divergence of equal rows negative.
                rows_kl = (cross / teacher.mass - zt + zs).clamp_(min=0)
                divergence += torch.where(row_counts, rows_kl, 0).sum()
                student_norms[:, :, rows] = zs.squeeze(3)
                teacher_norms[:, :, rows] = zt.squeeze(3)
    return divergence.to(total.dtype), some_key.sum(), student_norm, teacher_norm


def _outputs(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _common.compute_dtype(student_query, student_key, teacher_query, teacher_key)
    total = student_query.new_zeros((), dtype=dtype)
    return total, total.new_zeros(student_query.shape[:3]), total.new_zeros(student_query.shape[:3])


@_attention_kl.register_fake
def _(student_query, student_key, teacher_query, teacher_key, *_):  # type: ignore[no-untyped-def]
    total, *norms = _outputs(student_query, student_key, teacher_query, teacher_key)
    return total, total.new_empty((), dtype=torch.int64), *norms


@torch.library.custom_op("fastdistill::attention_kl_backward", mutates_args=())
def _attention_kl_backward(
    grad_total: Tensor,  # ()
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
    student_norm: Tensor,  # (B, H, L)
    teacher_norm: Tensor,  # (B, H, L)
) -> tuple[Tensor, Tensor]:
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, device = student_query.shape[2], student_key.shape[2], student_query.device
    counted = _attention.count_rows(query_length, key_length, device, key_mask, query_mask, is_causal, attn_mask)
    offset = key_length - query_length if is_causal else None
    dtype = student_norm.dtype
    d_query, d_key = torch.empty_like(student_query), torch.empty_like(student_key)
    with _common.no_autocast(student_query):
        for block in _attention.tile_blocks(*inputs, counted, dtype):
            heads = block.student.query.shape[:2]
            student_norms, teacher_norms = block.take(student_norm), block.take(teacher_norm)
            masks = block.masks(offset, attn_mask, key_mask)
            out_query, out_key = block.take(d_query), block.take(d_key)
            dk = torch.zeros(out_key.shape, dtype=dtype, device=device).flatten(0, 1)
            for rows, tiles in block.tiles(offset):
                sq, tq = block.student.queries(rows) * student_scale, block.teacher.queries(rows) * teacher_scale
                zs, zt = student_norms[:, :, rows, None], teacher_norms[:, :, rows, None]
                dq = torch.zeros_like(sq)
                for keys in tiles:
                    bias = _bias(masks(rows, keys), dtype)
                    sk = block.student.keys(keys)
                    student = _scores(sq, sk, heads, bias).sub_(zs).exp_()
                    teacher = _scores(tq, block.teacher.keys(keys), heads, bias).sub_(zt).exp_()
                    # A row that does not count is zero on both sides, and so is this.
                    d_scores = student.sub_(teacher).view(len(sq), -1, sk.shape[1])
                    dq.baddbmm_(d_scores, sk)
                    dk[:, keys] += torch.bmm(sq.mT, d_scores).mT  # faster than its transpose
                out_query[:, :, rows] = dq.view(*heads, -1, dq.shape[2]) * (grad_total * student_scale)
            out_key.copy_(dk.view(out_key.shape) * grad_total)
    return d_query, d_key


@_attention_kl_backward.register_fake
def _(grad_total, student_query, student_key, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student_query), torch.empty_like(student_key)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.student_scale, ctx.teacher_scale, key_mask, query_mask, ctx.is_causal, attn_mask = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, key_mask, query_mask, attn_mask, *rest[1:])


def _gradients(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("attention_kl")
    if grad_total is None:
        return (None,) * 10
    *tensors, key_mask, query_mask, attn_mask, student_norm, teacher_norm = ctx.saved_tensors
    gradients = _attention_kl_backward(
        grad_total, *tensors, ctx.student_scale, ctx.teacher_scale, key_mask, query_mask, ctx.is_causal, attn_mask,
        student_norm, teacher_norm,
    )  # fmt: skip
    return *gradients, *(None,) * 8


_attention_kl.register_autograd(_gradients, setup_context=_setup_context)
