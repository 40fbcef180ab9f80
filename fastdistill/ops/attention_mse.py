"""Mean squared error between attention scores, in time linear in L and S.

With q' = [q_s, q_t], k' = [k_s, k_t] side by side (D' = D_s + D_t) and v = [s_s, ..., -s_t, ...] the scales,

    a_s - a_t = (v q') k'^T        sum_ij (a_s - a_t)^2 = < V Gq, Gk V >        Gq = q'^T q', Gk = k'^T k', V = diag(v)
    dq_s = 2 s_s q' V Gk[:, :D_s]        dk_s = 2 s_s k' V Gq[:, :D_s]

so two D' x D' Gram matrices hold all of the L x S scores. Masked rows are zero rows. Under a causal mask a chunk of
queries meets the Gram matrix of the keys before it, and the few keys beside it as a dense triangle: a chunked scan, as
in linear attention.

The sum is a difference of terms that cancel as the student nears its teacher: with a relative mismatch e, a rounding of
u in a Gram matrix is one of u / e^2 in the value and u / e in the gradients. So everything here is float64, in which
products of float32 inputs are exact. In float32, which is what devices without float64 (MPS) get, gradients are 4 to 25
times further off than those of materialised scores, and the value is worthless at e = 1e-3.

Short sequences, and masks that are no product of a query mask and a key mask, are computed in tiles of scores instead:
quadratic time, linear memory. A tile gives loss and gradients while it is in the cache, for a sum; the backward scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import gcd, lcm
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops import _attention, _common

# Rows of a chunk of the causal scan: its dense triangles cost CHUNK D' a row, its Gram matrices D'^2.
CHUNK = 64


def attention_mse(
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
    backend: str,
) -> tuple[Tensor, Tensor]:  # sum of squares (), number of allowed pairs () int64
    _, heads, query_length, width = student_query.shape
    key_length = student_key.shape[2]
    attn_mask, key_mask, query_mask = _attention.fold_mask(attn_mask, key_mask, query_mask, query_length, key_length)
    tensors = (student_query, student_key, teacher_query, teacher_key)
    inputs = (*tensors, student_scale, teacher_scale)
    if backend == "triton":
        width = max(width, teacher_query.shape[3])
        # Wider heads have no other kernel.
        linear = is_causal or width > _attention.WIDEST_TILE or takes_gram(*tensors)
    else:
        # Query rows that meet the same keys, and what a row costs either way, as measured.
        rows = query_length * (heads // max(student_key.shape[1], teacher_key.shape[1]))
        worth = (5 if is_causal else 2) * (width + teacher_query.shape[3])
        linear = rows * key_length > worth * (rows + key_length)
    if attn_mask is None and linear:
        return _linear(*inputs, key_mask, query_mask, is_causal, backend)[:2]
    differentiable = _attention.differentiable(student_query, student_key)
    return _tiled(*inputs, key_mask, query_mask, is_causal, attn_mask, backend, differentiable)[:2]


def takes_gram(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> bool:
    """Whether the kernels' Gram matrices move no more bytes and take no longer to multiply than scores in tiles do.

    Predicted for heads of all pairs, no mask, forward and backward, of the query rows that meet the same keys. What
    either way does is left out: each row is read twice. D' = D_s + D_t.

                  bytes                                     products
        Gram      D'^2 partial sums and D' D_s kept, of     2 (rows + keys) (D_s^2 + D_s D_t + D_t^2 + terms D' D_s),
                  queries and of keys, written and read     two terms of the backward's matrix for 16-bit inputs
        kernels   dQ and dK of the sum in float32, which    4 rows keys (D' + D_s): dQ and dK each compute the scores
                  wait for the backward
        torch     ten passes over float32 scores; only of   2 rows keys (D' + 2 D_s), but in float32: 13 times as long
                  heads too wide for the kernels            as in 16 bits (60 and 790 TFLOP/s on an H200)
    """
    _, heads, query_length, d_s = student_query.shape
    keys, d_t = student_key.shape[2], teacher_query.shape[3]
    rows = query_length * (heads // max(student_key.shape[1], teacher_key.shape[1]))
    wide, width = max(student_query.itemsize, teacher_query.itemsize) > 2, d_s + d_t
    if width <= 128:  # a matrix is one program's, and those of many heads stay in the L2 cache
        return True
    gram_bytes = 4 * (8 if wide else 4) * width * (width + d_s)
    terms = 1 if wide else 2
    gram_products = 2 * (rows + keys) * (d_s * d_s + d_s * d_t + d_t * d_t + terms * width * d_s)
    if max(d_s, d_t) <= _attention.WIDEST_TILE:
        tile_bytes, tile_products = 8 * (rows + keys) * d_s, 4 * rows * keys * (width + d_s)
    else:
        tile_bytes, tile_products = 40 * rows * keys, 2 * rows * keys * (width + 2 * d_s) * (1 if wide else 13)
    return gram_bytes <= tile_bytes and gram_products <= tile_products


def _count(keys_per_query: Tensor, student_query: Tensor) -> Tensor:
    return keys_per_query.expand(student_query.shape[:3]).sum()


# -- Gram matrices, and the scan ---------------------------------------------------------------------------


class _Block(NamedTuple):
    """Some batch entries, and some heads of all four tensors that belong together. Blocks are independent."""

    take: Callable[[Tensor], Tensor]  # the block's view of a tensor (B, heads, ...)
    queries: Callable[[slice], Tensor]  # q' of some rows, (P, n * rows, D'), n queries share a key
    keys: Callable[[slice], Tensor]  # k' of some rows, (P, rows, D')
    step: int  # rows to read at a time


def _blocks(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    counted: _attention.Counted,
    is_causal: bool,
) -> Iterator[_Block]:
    batch, heads, _, width = student_query.shape
    units = gcd(student_key.shape[1], teacher_key.shape[1])  # the least heads that share no key with others
    row = heads // units * (width + teacher_query.shape[3])  # numbers in a row of a unit
    area = _attention.tile_area(student_query.device)
    for take in _attention.blocks(batch, units, area // (row * CHUNK)):
        sq, sk, tq, tk = map(take, (student_query, student_key, teacher_query, teacher_key))
        queries, keys = (None if x is None else take(x) for x in (counted.queries, counted.keys))
        groups = lcm(sk.shape[1], tk.shape[1])
        yield _Block(
            take,
            partial(_side_by_side, sq, tq, queries, sq.shape[1], groups),
            partial(_side_by_side, sk, tk, keys, groups, groups),
            CHUNK if is_causal else max(CHUNK, area // (sq.shape[0] * sq.shape[1] * (width + teacher_query.shape[3]))),
        )


def _side_by_side(
    student: Tensor,  # (B, heads / i, T, D_s)
    teacher: Tensor,  # (B, heads / j, T, D_t)
    counted: Tensor | None,  # (B|1, 1, T)
    heads: int,
    groups: int,
    rows: slice,
) -> Tensor:  # (B * groups, heads / groups * rows, D')
    """[student, teacher] in the widest dtype, each repeated to `heads` heads; rows that do not count are zero."""
    student, teacher = student[:, :, None, rows], teacher[:, :, None, rows]
    batch, _, _, length, width = student.shape
    out = student.new_empty((batch, heads, length, width + teacher.shape[4]), dtype=_common.widest_dtype(student))
    out[..., :width].unflatten(1, (student.shape[1], -1)).copy_(student)
    out[..., width:].unflatten(1, (teacher.shape[1], -1)).copy_(teacher)
    if counted is not None:
        out.masked_fill_(~counted[:, :, rows, None], 0)
    return out.view(batch * groups, heads // groups * length, out.shape[3])


def _scales(student_query: Tensor, teacher_query: Tensor, student_scale: float, teacher_scale: float) -> Tensor:
    """v, (D')."""
    v = student_query.new_empty(
        student_query.shape[3] + teacher_query.shape[3], dtype=_common.widest_dtype(student_query)
    )
    v[: student_query.shape[3]] = student_scale
    v[student_query.shape[3] :] = -teacher_scale
    return v


def _gram_shapes(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> list[int]:
    width = student_query.shape[3]
    groups = lcm(student_key.shape[1], teacher_key.shape[1])
    return [student_query.shape[0], groups, width + teacher_query.shape[3], width]


def _seen_by_all(query_length: int, key_length: int, is_causal: bool) -> int:
    """How many keys, the first ones, every query sees."""
    return max(0, key_length - query_length) if is_causal else key_length


def _beside(rows: slice, offset: int) -> tuple[slice, int]:
    """The keys that only a part of these queries sees, and the last diagonal of that part."""
    keys = slice(max(0, rows.start + offset), max(0, rows.stop + offset))
    return keys, rows.start + offset - keys.start


def _triangle(scaled_queries: Tensor, keys: Tensor, length: int, diagonal: int) -> Tensor:  # (P, n * length, keys)
    scores = torch.bmm(scaled_queries, keys.mT)
    scores.unflatten(1, (-1, length)).tril_(diagonal)
    return scores


@torch.library.custom_op("fastdistill::attention_mse_linear", mutates_args=())
def _linear(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float,
    teacher_scale: float,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sum, count; the student's columns of Gq and of Gk (not if causal)
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, width = student_query.shape[2], student_key.shape[2], student_query.shape[3]
    counted = _attention.count_rows(
        query_length, key_length, student_query.device, key_mask, query_mask, is_causal, None
    )
    if backend == "triton":
        from fastdistill.kernels import attention_mse as kernels

        masked = (*inputs, student_scale, teacher_scale, counted.queries, counted.keys, is_causal)
        total, *grams = kernels.loss(*masked)
        if is_causal:
            total += _within_chunks(*masked, kernels.CHUNK, None, None)
        total = total.clamp_(min=0).to(_common.compute_dtype(*inputs))
        return total, _count(counted.keys_per_query, student_query), *grams
    v = _scales(student_query, teacher_query, student_scale, teacher_scale)
    query_gram = v.new_empty(_gram_shapes(*inputs))
    key_gram = v.new_empty(0 if is_causal else _gram_shapes(*inputs))
    total = v.new_zeros(())
    with _common.no_autocast(student_query):
        for block in _blocks(*inputs, counted, is_causal):
            gram = block.take(query_gram)
            gq = v.new_zeros(gram.shape[0] * gram.shape[1], len(v), len(v))  # (P, D', D')
            gk = torch.zeros_like(gq)  # of the keys seen by all queries of the chunk
            for rows in _attention.slices(0, _seen_by_all(query_length, key_length, is_causal), block.step):
                k = block.keys(rows)
                gk.baddbmm_(k.mT, k)
            for rows in _attention.slices(0, query_length, block.step):
                q = block.queries(rows)
                if not is_causal:
                    gq.baddbmm_(q.mT, q)
                    continue
                chunk = torch.bmm(q.mT, q)
                near, diagonal = _beside(rows, key_length - query_length)
                k = block.keys(near)
                total += (chunk * gk).sum(0) @ v @ v
                total += _triangle(q * v, k, rows.stop - rows.start, diagonal).square_().sum()
                gq += chunk
                gk.baddbmm_(k.mT, k)
            gram.copy_(gq[..., :width].view(gram.shape))
            if not is_causal:
                total += (gq * gk).sum(0) @ v @ v
                block.take(key_gram).copy_(gk[..., :width].view(gram.shape))
    # Rounding must not make the sum of squares of equal scores negative.
    total = total.clamp_(min=0).to(_common.compute_dtype(*inputs))
    return total, _count(counted.keys_per_query, student_query), query_gram, key_gram


def _within_chunks(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float,
    teacher_scale: float,
    counted_queries: Tensor | None,
    counted_keys: Tensor | None,
    is_causal: bool,
    chunk: int,
    d_query: Tensor | None,  # to be written
    d_key: Tensor | None,
) -> Tensor:  # (), float64
    """The kernels' part of a causal sum that has no Gram matrices."""
    from fastdistill.kernels import attention_tiles as kernels

    inputs = (student_query, student_key, teacher_query, teacher_key)
    return kernels.loss(
        *inputs, student_scale, teacher_scale, counted_queries, counted_keys, is_causal, None, chunk=chunk,
        is_kl=False, dtype=_common.compute_dtype(*inputs), d_query=d_query, d_key=d_key,
    )  # fmt: skip


@_linear.register_fake
def _(student_query, student_key, teacher_query, teacher_key, student_scale, teacher_scale, *masks):  # type: ignore[no-untyped-def]
    inputs = (student_query, student_key, teacher_query, teacher_key)
    _, _, is_causal, backend = masks
    if backend == "triton":
        from fastdistill.kernels import attention_mse as kernels

        shape = _gram_shapes(*inputs)
        if is_causal:
            shape = [kernels.grams_of_a_scan(student_query.shape[2]), *shape]
        total = student_query.new_empty((), dtype=_common.compute_dtype(*inputs))
        grams = (student_query.new_empty(shape, dtype=kernels.gram_dtype(*inputs)) for _ in range(2))
        return total, total.new_empty((), dtype=torch.int64), *grams
    total = student_query.new_empty((), dtype=_common.compute_dtype(*inputs))
    query_gram = student_query.new_empty(_gram_shapes(*inputs), dtype=_common.widest_dtype(student_query))
    key_gram = query_gram.new_empty(0 if is_causal else query_gram.shape)
    return total, total.new_empty((), dtype=torch.int64), query_gram, key_gram


@torch.library.custom_op("fastdistill::attention_mse_linear_backward", mutates_args=())
def _linear_backward(
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
    backend: str,
    query_gram: Tensor,
    key_gram: Tensor,
) -> tuple[Tensor, Tensor]:
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, width = student_query.shape[2], student_key.shape[2], student_query.shape[3]
    counted = _attention.count_rows(
        query_length, key_length, student_query.device, key_mask, query_mask, is_causal, None
    )
    d_query, d_key = torch.empty_like(student_query), torch.empty_like(student_key)
    if backend == "triton":
        from fastdistill.kernels import attention_mse as kernels

        masked = (*inputs, student_scale, teacher_scale, counted.queries, counted.keys, is_causal)
        within: tuple[Tensor | None, ...] = None, None
        if is_causal:
            within = tuple(
                torch.zeros(x.shape, dtype=_common.compute_dtype(*inputs), device=x.device) for x in inputs[:2]
            )
            _within_chunks(*masked, kernels.CHUNK, *within)
        kernels.gradients(grad_total, *masked, query_gram, key_gram, within, d_query, d_key)
        return d_query, d_key
    v = _scales(student_query, teacher_query, student_scale, teacher_scale)
    sharing = query_gram.shape[1] // student_key.shape[1]
    w = 2 * student_scale * grad_total.to(v.dtype) * v
    with _common.no_autocast(student_query):
        for block in _blocks(*inputs, counted, is_causal):
            dq, dk = block.take(d_query), block.take(d_key)
            later = (block.take(query_gram) * w[:, None]).flatten(0, 1)  # (P, D', D_s), of queries that see the chunk
            earlier = torch.zeros_like(later) if is_causal else (block.take(key_gram) * w[:, None]).flatten(0, 1)

            def write_keys(rows: slice, gradient: Tensor, dk: Tensor = dk) -> None:  # groups share keys
                dk[:, :, rows] = gradient.view(*dk.shape[:2], sharing, *gradient.shape[1:]).sum(2)

            for rows in _attention.slices(0, _seen_by_all(query_length, key_length, is_causal), block.step):
                k = block.keys(rows)
                write_keys(rows, torch.bmm(k, later))
                if is_causal:
                    earlier.baddbmm_((k * w).mT, k[..., :width])
            for rows in _attention.slices(0, query_length, block.step):
                q = block.queries(rows)
                gradient = torch.bmm(q, earlier)
                if is_causal:
                    near, diagonal = _beside(rows, key_length - query_length)
                    k = block.keys(near)
                    scaled = q * w
                    scores = _triangle(scaled, k, rows.stop - rows.start, diagonal)
                    gradient.baddbmm_(scores, k[..., :width])
                    later.baddbmm_(scaled.mT, q[..., :width], alpha=-1)
                    write_keys(near, torch.bmm(k, later).baddbmm_(scores.mT, q[..., :width]))
                    earlier.baddbmm_((k * w).mT, k[..., :width])
                dq[:, :, rows] = gradient.view(dq.shape[0], dq.shape[1], -1, width)
    return d_query, d_key


@_linear_backward.register_fake
def _(grad_total, student_query, student_key, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student_query), torch.empty_like(student_key)


def _linear_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.student_scale, ctx.teacher_scale, key_mask, query_mask, ctx.is_causal, ctx.backend = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, key_mask, query_mask, *rest[1:])


def _linear_gradients(ctx, grad_total, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("attention_mse")
    if grad_total is None:
        return (None,) * 10
    *tensors, key_mask, query_mask, query_gram, key_gram = ctx.saved_tensors
    gradients = _linear_backward(
        grad_total, *tensors, ctx.student_scale, ctx.teacher_scale, key_mask, query_mask, ctx.is_causal,
        ctx.backend, query_gram, key_gram,
    )  # fmt: skip
    return *gradients, *(None,) * 8


_linear.register_autograd(_linear_gradients, setup_context=_linear_setup_context)


# -- tiles of scores ---------------------------------------------------------------------------------------


@torch.library.custom_op("fastdistill::attention_mse_tiled", mutates_args=())
def _tiled(
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
    backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sum, count; gradients of the sum in its dtype, empty if not asked for
    inputs = (student_query, student_key, teacher_query, teacher_key)
    query_length, key_length, device = student_query.shape[2], student_key.shape[2], student_query.device
    counted = _attention.count_rows(query_length, key_length, device, key_mask, query_mask, is_causal, attn_mask)
    offset = key_length - query_length if is_causal else None
    total, d_query, d_key = _attention.tiled_outputs(*inputs, differentiable)
    if backend == "triton":
        from fastdistill.kernels import attention_tiles as kernels

        gradients = (d_query, d_key) if differentiable else (None, None)
        squares = kernels.loss(
            *inputs, student_scale, teacher_scale, counted.queries, counted.keys, is_causal, attn_mask,
            is_kl=False, dtype=total.dtype, d_query=gradients[0], d_key=gradients[1],
        )  # fmt: skip
        return squares.to(total.dtype), _count(counted.keys_per_query, student_query), d_query, d_key
    squares = total.to(_common.widest_dtype(total), copy=True)
    with _common.no_autocast(student_query):
        for block in _attention.tile_blocks(*inputs, counted, total.dtype):
            # Keys and queries that are masked as a whole are read as zeros, and so are their scores.
            masks = block.masks(offset, attn_mask, None)
            for rows, tiles in block.tiles(offset):
                sq, tq = block.student.queries(rows), block.teacher.queries(rows)
                dq = torch.zeros(sq.shape, dtype=sq.dtype, device=device)
                for keys in tiles:
                    sk, tk = block.student.keys(keys), block.teacher.keys(keys)
                    # Scales apply to scores: folded into the products they would round a whole row of keys alike.
                    scores = torch.bmm(sq, sk.mT).mul_(student_scale)  # (B * H_s, H / H_s * rows, keys)
                    scores.sub_(torch.bmm(tq, tk.mT).mul_(teacher_scale).view(scores.shape))
                    columns, allowed = masks(rows, keys)
                    if allowed is not None:
                        scores.view(*block.student.query.shape[:2], -1, sk.shape[1])[..., columns] *= allowed
                    squares += torch.linalg.vector_norm(scores, dim=2).to(squares.dtype).square_().sum()
                    if differentiable:
                        dk = block.take(d_key)[:, :, keys]
                        _attention.add_gradients(scores, sq, sk, dq, dk, 2 * student_scale)
                if differentiable:
                    out = block.take(d_query)[:, :, rows]
                    out.copy_(dq.view(out.shape))
    return squares.to(total.dtype), _count(counted.keys_per_query, student_query), d_query, d_key


_attention.register_tiled(_tiled, "attention_mse")
