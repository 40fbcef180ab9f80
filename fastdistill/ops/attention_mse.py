"""Mean squared error between attention scores, in time linear in L and S.

With q' = [q_s, q_t], k' = [k_s, k_t] side by side (D' = D_s + D_t) and v = [s_s, ..., -s_t, ...] the scales,

    a_s - a_t = (v q') k'^T        sum_ij (a_s - a_t)^2 = < V Gq, Gk V >        Gq = q'^T q', Gk = k'^T k', V = diag(v)
    dq_s = 2 s_s q' V Gk[:, :D_s]        dk_s = 2 s_s k' V Gq[:, :D_s]

so two D' x D' Gram matrices stand for all of the L x S scores. Masked rows are zero rows. Under a causal mask the
queries are split into chunks. A chunk is multiplied by the Gram matrix of the keys before it; its scores with the keys
beside it are computed as a dense triangle. This is a chunked scan, as in linear attention.

The sum is a difference of terms that cancel as the student nears its teacher: at a relative mismatch e, a rounding
error u in a Gram matrix becomes u / e^2 in the value and u / e in the gradients. So everything here is float64, where
products of float32 inputs are exact. Devices without float64 (MPS) compute in float32; there the gradients are 4 to 25
times less accurate than those of materialised scores, and the value is worthless at e = 1e-3.

Short sequences, and masks that are not the product of a query mask and a key mask, use tiles of scores instead:
quadratic time, linear memory. On a GPU, short sequences in 16 bits have a kernel of their own (attention_short.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import gcd, lcm
from typing import NamedTuple

import torch
from torch import Tensor

from . import _attention, _common
from ._attention import SCHEMA, Attention, Counted, Divisor, TileBlock, slices
from .attention_short import attention_short, takes_short

# Mean rows of packed sequences from which the Gram kernels take them. On sm_90 at 26 / 64 tiles issue 30 instructions a
# pair, and the Gram kernels 3300 a row of both sides and about 160,000 a sequence: as many at 160 rows.
PACKED_ROWS = 256

# Keys of a causal sequence from which Triton scans. On an H200 the scan moves 5.6 KB a row of both sides at 64 / 64, of
# which the matrices of chunks are half: 1.3 ns (`python -m bench.cost`). Tiles meet half of the pairs, 30 instructions
# each: as long at 2500 rows, if they issue at every cycle, which no kernel does.
SCAN_ROWS = 2048

# Rows of a chunk of the causal scan: its dense triangles cost CHUNK D' a row, its Gram matrices D'^2.
CHUNK = 64


def attention_mse(call: Attention, backend: str, divisor: Divisor) -> tuple[Tensor, Divisor]:
    """Returns the sum of squares () divided by `divisor`, or by the number of allowed pairs if that is None; or the sum
    and what is still to divide it. A divisor of 0 stands for 1."""
    call = call.folded()
    if divisor is None:
        divisor = call.pairs()
    is_short = backend == "triton" and call.is_dense() and takes_short(call)
    if is_short or _takes_linear(call, backend):
        number, num_items = (None, divisor) if isinstance(divisor, Tensor) else (divisor, None)
        if is_short:
            return attention_short(call, number, num_items), None
        return _linear(*call, backend, number, num_items)[0], None
    total, count, *_ = _tiled(*call, backend, call.differentiable())
    return total, count if divisor is None else divisor


def _takes_linear(call: Attention, backend: str) -> bool:
    if call.cu_seqlens is not None:
        return backend == "triton" and _takes_packed_gram(call)
    return call.is_dense() and call.attn_mask is None and _prefers_gram(call, backend)


def _takes_packed_gram(call: Attention) -> bool:
    """Returns whether the Gram kernels take packed sequences, by their mean length: the host does not know more. They
    have no window."""
    assert call.cu_seqlens is not None
    if call.window_left is not None or call.window_right is not None:
        return False
    mean = [-(-x.shape[2] // max(len(call.cu_seqlens) - 1, 1)) for x in call.tensors()]
    least = SCAN_ROWS if call.is_causal else PACKED_ROWS
    return min(mean) >= least and takes_gram(*(x[:, :, :n] for x, n in zip(call.tensors(), mean, strict=True)))


def _prefers_gram(call: Attention, backend: str) -> bool:
    d_s, d_t = call.student_query.shape[3], call.teacher_query.shape[3]
    query_length, key_length = call.lengths()
    if backend == "triton":
        if max(d_s, d_t) > _attention.WIDEST_TILE:  # these have no other kernel
            return True
        if call.is_causal:
            shorter = (x[:, :, : x.shape[2] // 2] for x in call.tensors())  # with half of the pairs for each row
            return key_length >= SCAN_ROWS and (_float64_cost(*call.tensors()) == 1 or takes_gram(*shorter))
        return takes_gram(*call.tensors())
    # Query rows that meet the same keys, and the measured cost of a row either way.
    rows = query_length * (call.student_query.shape[1] // max(call.student_key.shape[1], call.teacher_key.shape[1]))
    cost = (5 if call.is_causal else 2) * (d_s + d_t) * (20 if _has_slow_float64(call.student_query.device) else 1)
    return rows * key_length > cost * (rows + key_length)


def _has_slow_float64(device: torch.device) -> bool:
    """Returns whether float64 is a 32nd or 64th of float32's speed, as on consumer cards and inference cards."""
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return not torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9")
    return torch.cuda.get_device_capability(device) not in ((8, 0), (9, 0), (10, 0))  # A100, H100, B200


def _float64_cost(*tensors: Tensor) -> int:
    """Returns how many times as long as three TF32 products the Gram products of the Triton kernels take."""
    in_float64 = any(x.itemsize > 2 for x in tensors)
    return 20 if in_float64 and _has_slow_float64(tensors[0].device) else 1  # 27 and 1.3 TFLOP/s on an RTX 4090


def takes_gram(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> bool:
    """Predicts whether the Gram kernels move no more bytes and multiply no longer than tiles of scores would.

    The prediction is for forward and backward without a mask, over the query rows that meet the same keys. It leaves
    out the cost that both share: each row is read twice. D' = D_s + D_t.

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
    slowness = _float64_cost(student_query, teacher_query)
    if (
        width <= 128 and slowness == 1
    ):  # one program computes a whole matrix, and the matrices of many heads stay in the L2 cache
        return True
    gram_bytes = 4 * (8 if wide else 4) * width * (width + d_s)
    terms = 1 if wide else 2
    gram_products = slowness * 2 * (rows + keys) * (d_s * d_s + d_s * d_t + d_t * d_t + terms * width * d_s)
    if max(d_s, d_t) <= _attention.WIDEST_TILE:
        tile_bytes, tile_products = 8 * (rows + keys) * d_s, 4 * rows * keys * (width + d_s)
    else:
        tile_bytes, tile_products = 40 * rows * keys, 2 * rows * keys * (width + 2 * d_s) * (1 if wide else 13)
    return gram_bytes <= tile_bytes and gram_products <= tile_products


# -- Gram matrices, and the scan ---------------------------------------------------------------------------


class _Block(NamedTuple):
    """Some batch entries, and the heads of all four tensors that belong together. Blocks are independent."""

    take: Callable[[Tensor], Tensor]  # returns the block's view of a tensor (B, heads, ...)
    queries: Callable[[slice], Tensor]  # q' of some rows, (P, n * rows, D'), n queries share a key
    keys: Callable[[slice], Tensor]  # k' of some rows, (P, rows, D')
    step: int  # rows to read at a time


def _blocks(call: Attention, counted: Counted) -> Iterator[_Block]:
    batch, heads, _, width = call.student_query.shape
    width += call.teacher_query.shape[3]  # D'
    units = gcd(call.student_key.shape[1], call.teacher_key.shape[1])  # the fewest heads that share no key with others
    area = _attention.tile_area(call.student_query.device)
    for take in _attention.blocks(batch, units, area // (heads // units * width * CHUNK)):
        sq, sk, tq, tk = map(take, call.tensors())
        queries, keys = (None if x is None else take(x) for x in (counted.queries, counted.keys))
        groups = lcm(sk.shape[1], tk.shape[1])
        yield _Block(
            take,
            partial(_side_by_side, sq, tq, queries, sq.shape[1], groups),
            partial(_side_by_side, sk, tk, keys, groups, groups),
            CHUNK if call.is_causal else max(CHUNK, area // (sq.shape[0] * sq.shape[1] * width)),
        )


def _side_by_side(
    student: Tensor,  # (B, heads / i, T, D_s)
    teacher: Tensor,  # (B, heads / j, T, D_t)
    counted: Tensor | None,  # (B|1, 1, T)
    heads: int, groups: int, rows: slice,
) -> Tensor:  # (B * groups, heads / groups * rows, D')  # fmt: skip
    """Returns [student, teacher] in the widest dtype, repeated to `heads` heads; rows that do not count are zero."""
    student, teacher = student[:, :, None, rows], teacher[:, :, None, rows]
    batch, _, _, length, width = student.shape
    out = student.new_empty((batch, heads, length, width + teacher.shape[4]), dtype=_common.widest_dtype(student))
    out[..., :width].unflatten(1, (student.shape[1], -1)).copy_(student)
    out[..., width:].unflatten(1, (teacher.shape[1], -1)).copy_(teacher)
    if counted is not None:
        out.masked_fill_(~counted[:, :, rows, None], 0)
    return out.view(batch * groups, heads // groups * length, out.shape[3])


def _scales(call: Attention) -> Tensor:
    """Returns v, (D')."""
    d_s, d_t = call.student_query.shape[3], call.teacher_query.shape[3]
    v = call.student_query.new_empty(d_s + d_t, dtype=_common.widest_dtype(call.student_query))
    v[:d_s] = call.student_scale
    v[d_s:] = -call.teacher_scale
    return v


def _gram_shape(call: Attention) -> list[int]:  # B, groups, D', D_s
    d_s, groups = call.student_query.shape[3], lcm(call.student_key.shape[1], call.teacher_key.shape[1])
    return [call.student_query.shape[0], groups, d_s + call.teacher_query.shape[3], d_s]


def _seen_by_all(call: Attention) -> int:
    """Returns how many keys, counted from the first, every query is allowed."""
    query_length, key_length = call.lengths()
    return max(0, key_length - query_length) if call.is_causal else key_length


def _beside(call: Attention, rows: slice) -> tuple[slice, int]:
    """Returns the keys that only some of these queries are allowed, and the last diagonal of the allowed part."""
    query_length, key_length = call.lengths()
    offset = key_length - query_length
    keys = slice(max(0, rows.start + offset), max(0, rows.stop + offset))
    return keys, rows.start + offset - keys.start


def _triangle(scaled_queries: Tensor, keys: Tensor, length: int, diagonal: int) -> Tensor:  # (P, n * length, keys)
    scores = torch.bmm(scaled_queries, keys.mT)
    scores.unflatten(1, (-1, length)).tril_(diagonal)
    return scores


def _forward(*inputs):  # type: ignore[no-untyped-def]
    """Returns the loss, its divisor, pairs (see `kernels.loss`), the student's columns of Gq and of Gk (not if causal),
    and which queries and keys count, (B|1, T) bool, if Triton had to find out (otherwise empty). attn_mask is None."""
    *fields, backend, number, num_items = inputs
    call = Attention(*fields)
    if backend == "triton":
        from ..kernels import attention_mse as kernels

        near: Tensor | None = None
        found: tuple[Tensor | None, ...] = None, None
        if call.is_causal or call.cu_seqlens is not None:
            counted = _attention.count_rows(call, _attention.bounds_of(call, backend))
            near = _within_chunks(call, counted, None, None) if call.is_causal else None
            call = counted.as_masks(call)
            found = call.query_mask, call.key_mask
            if number is None and num_items is None:
                num_items = counted.pairs(call)
        if num_items is not None:
            num_items = num_items.to(call.student_query.device)
        new = call.student_query.new_empty
        rows = (new(0, dtype=torch.bool) if x is None else x for x in found)  # a tensor each: outputs share no memory
        return *kernels.loss(call, number, num_items, near), *rows
    counted = _attention.count_rows(call)
    with _common.no_autocast(call.student_query):
        total, *grams = _linear_loss(call, counted)
    if number is not None:
        divisor = total.new_full((), number or 1)
    else:
        divisor = (counted.pairs(call) if num_items is None else num_items).to(total)
        divisor = torch.where(divisor == 0, 1, divisor)
    # Rounding must not make the sum of squares of equal scores negative.
    loss = total.clamp_(min=0).div_(divisor).to(call.dtype)
    no_rows = (total.new_empty(0, dtype=torch.bool) for _ in range(2))
    return loss, divisor, total.new_empty(0, dtype=torch.int64), *grams, *no_rows


def _linear_loss(call: Attention, counted: Counted) -> tuple[Tensor, Tensor, Tensor]:
    query_length, width = call.lengths()[0], call.student_query.shape[3]
    v = _scales(call)
    query_gram = v.new_empty(_gram_shape(call))
    key_gram = v.new_empty(0 if call.is_causal else _gram_shape(call))
    total = v.new_zeros(())
    for block in _blocks(call, counted):
        gram = block.take(query_gram)
        gq = v.new_zeros(gram.shape[0] * gram.shape[1], len(v), len(v))  # (P, D', D')
        gk = torch.zeros_like(gq)  # of the keys that all queries of the chunk are allowed
        for rows in slices(0, _seen_by_all(call), block.step):
            k = block.keys(rows)
            gk.baddbmm_(k.mT, k)
        for rows in slices(0, query_length, block.step):
            q = block.queries(rows)
            if not call.is_causal:
                gq.baddbmm_(q.mT, q)
                continue
            chunk = torch.bmm(q.mT, q)
            near, diagonal = _beside(call, rows)
            k = block.keys(near)
            total += (chunk * gk).sum(0) @ v @ v
            total += _triangle(q * v, k, rows.stop - rows.start, diagonal).square_().sum()
            gq += chunk
            gk.baddbmm_(k.mT, k)
        gram.copy_(gq[..., :width].view(gram.shape))
        if not call.is_causal:
            total += (gq * gk).sum(0) @ v @ v
            block.take(key_gram).copy_(gk[..., :width].view(gram.shape))
    return total, query_gram, key_gram


def _within_chunks(call: Attention, counted: Counted, d_query: Tensor | None, d_key: Tensor | None) -> Tensor:
    """Returns the part of a causal sum () float64 that the Gram kernels leave out; writes its gradients."""
    from ..kernels import attention_mse, attention_packed, attention_tiles

    chunk = attention_mse.CHUNK
    if call.cu_seqlens is not None:
        counted, chunk = counted._replace(bounds=attention_packed.bounds(call, chunk)), 0
    return attention_tiles.loss(call, counted, chunk=chunk, is_kl=False, dtype=call.dtype, d_query=d_query, d_key=d_key)


def _fake(*inputs):  # type: ignore[no-untyped-def]
    *fields, backend, _, _ = inputs
    call = Attention(*fields)
    shape, dtype, pairs = _gram_shape(call), _common.widest_dtype(call.student_query), 0
    row_shapes: list[tuple[int, ...]] = [(0,), (0,)]
    divisor = call.student_query.new_empty((), dtype=dtype)
    key_shape = [0] if call.is_causal else shape
    if backend == "triton":
        from ..kernels import attention_mse as kernels

        chunks = [len(call.cu_seqlens) - 1] if call.cu_seqlens is not None else []
        if call.is_causal:
            chunks = [kernels.grams_of_a_scan(call)]
        shape = key_shape = [*chunks, *shape]
        dtype = kernels.gram_dtype(*call.tensors())
        masks = [x for x in (call.key_mask, call.query_mask) if x is not None]
        if not chunks and masks:
            pairs = call.student_query.shape[0]
        query_length, key_length = call.lengths()
        if call.cu_seqlens is not None or (call.is_causal and (masks or key_length < query_length)):
            batch = max([1, *(x.shape[0] for x in masks)])
            row_shapes = [(batch, query_length), (batch, key_length)]
    rows = (divisor.new_empty(x, dtype=torch.bool) for x in row_shapes)
    grams = (divisor.new_empty(x, dtype=dtype) for x in (shape, key_shape))
    loss = divisor.new_empty((), dtype=call.dtype)
    return loss, divisor, divisor.new_empty(pairs, dtype=torch.int64), *grams, *rows


def _gradients(grad_loss, *inputs):  # type: ignore[no-untyped-def]
    *fields, backend, divisor, pairs, query_gram, key_gram, queries, keys = inputs
    call = Attention(*fields)
    d_query, d_key = torch.empty_like(call.student_query), torch.empty_like(call.student_key)
    if backend == "triton":
        from ..kernels import attention_mse as kernels

        near: tuple[Tensor | None, ...] = None, None
        if call.is_causal or call.cu_seqlens is not None:
            queries, keys = (x[:, None] if x.numel() else None for x in (queries, keys))
            counted = Counted(torch.empty(0), queries, keys)  # nothing reads how many keys a query has
            if call.is_causal:
                near = tuple(torch.empty(x.shape, dtype=call.dtype, device=x.device) for x in call.tensors()[:2])
                _within_chunks(call, counted, *near)
            call = counted.as_masks(call)
        kernels.gradients(grad_loss, call, divisor, pairs, query_gram, key_gram, near, d_query, d_key)
    else:
        counted = _attention.count_rows(call)
        with _common.no_autocast(call.student_query):
            _linear_gradients(grad_loss / divisor, call, counted, query_gram, key_gram, d_query, d_key)
    return d_query, d_key


def _linear_gradients(
    grad_sum: Tensor, call: Attention, counted: Counted,
    query_gram: Tensor, key_gram: Tensor,  # as `_linear_loss` returns them
    d_query: Tensor, d_key: Tensor,  # to be written
) -> None:  # fmt: skip
    query_length, width = call.lengths()[0], call.student_query.shape[3]
    v = _scales(call)
    sharing = query_gram.shape[1] // call.student_key.shape[1]
    w = 2 * call.student_scale * grad_sum.to(v.dtype) * v
    for block in _blocks(call, counted):
        dq, dk = block.take(d_query), block.take(d_key)
        later = (block.take(query_gram) * w[:, None]).flatten(0, 1)  # (P, D', D_s), of queries that see the chunk
        earlier = torch.zeros_like(later) if call.is_causal else (block.take(key_gram) * w[:, None]).flatten(0, 1)

        def write_keys(rows: slice, gradient: Tensor, dk: Tensor = dk) -> None:  # groups share keys
            dk[:, :, rows] = gradient.view(*dk.shape[:2], sharing, *gradient.shape[1:]).sum(2)

        for rows in slices(0, _seen_by_all(call), block.step):
            k = block.keys(rows)
            write_keys(rows, torch.bmm(k, later))
            if call.is_causal:
                earlier.baddbmm_((k * w).mT, k[..., :width])
        for rows in slices(0, query_length, block.step):
            q = block.queries(rows)
            gradient = torch.bmm(q, earlier)
            if call.is_causal:
                near, diagonal = _beside(call, rows)
                k = block.keys(near)
                scaled = q * w
                scores = _triangle(scaled, k, rows.stop - rows.start, diagonal)
                gradient.baddbmm_(scores, k[..., :width])
                later.baddbmm_(scaled.mT, q[..., :width], alpha=-1)
                write_keys(near, torch.bmm(k, later).baddbmm_(scores.mT, q[..., :width]))
                earlier.baddbmm_((k * w).mT, k[..., :width])
            dq[:, :, rows] = gradient.view(dq.shape[0], dq.shape[1], -1, width)


_gradients_op = torch.library.custom_op(
    f"{_common.NAMESPACE}::attention_mse_linear_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor grad_loss, {SCHEMA}, str backend, Tensor divisor, Tensor pairs, Tensor query_gram, "
    "Tensor key_gram, Tensor queries, Tensor keys) -> (Tensor, Tensor)",
)


@_gradients_op.register_fake
def _(grad_loss, student_query, student_key, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(student_query), torch.empty_like(student_key)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *fields, ctx.backend, _, _ = inputs
    call = Attention(*fields)
    packing = call.cu_seqlens, call.cu_seqlens_key
    ctx.save_for_backward(*call.tensors(), call.key_mask, call.query_mask, *packing, *output[1:])
    ctx.scales, ctx.is_causal = (call.student_scale, call.teacher_scale), call.is_causal


def _backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
    _common.refuse_double_backward("attention_mse")
    if grad_loss is None:
        return (None,) * (len(Attention._fields) + 3)
    sq, sk, tq, tk, key_mask, query_mask, starts, key_starts, *saved = ctx.saved_tensors
    masks = key_mask, query_mask, ctx.is_causal, None
    call = Attention(sq, sk, tq, tk, ctx.scales[0], ctx.scales[1], *masks, starts, key_starts)
    gradients = _gradients_op if _common.traced() else _gradients
    return *gradients(grad_loss, *call, ctx.backend, *saved), *(None,) * (len(Attention._fields) + 1)


_linear = _common.registered(
    "attention_mse_linear",
    f"({SCHEMA}, str backend, Scalar? number, Tensor? num_items) -> ({', '.join(['Tensor'] * 7)})",
    _forward, _fake, _setup_context, _backward,
)  # fmt: skip


# -- tiles of scores ---------------------------------------------------------------------------------------


def _add_block(block: TileBlock, total: Tensor, d_query: Tensor | None, d_key: Tensor | None) -> None:
    student_scale, teacher_scale = block.call.student_scale, block.call.teacher_scale
    for rows, keys in block.tiles():
        sq, tq = block.student.queries(rows), block.teacher.queries(rows)
        sk, tk = block.student.keys(keys), block.teacher.keys(keys)
        scores = block.product(student_scale, sq, sk, 0)  # (B * H_s, H / H_s * rows, keys)
        of_teacher = scores.view(tq.shape[0], -1, tk.shape[1])
        torch.baddbmm(of_teacher, tq, tk.mT, alpha=-teacher_scale, out=of_teacher)  # the difference
        columns, allowed = block.allowed(rows, keys)
        if allowed is not None:
            scores.view(*block.call.student_query.shape[:2], -1, sk.shape[1])[..., columns] *= allowed
        total += torch.linalg.vector_norm(scores, dim=2).to(total.dtype).square_().sum()
        if d_query is not None and d_key is not None:
            _attention.add_gradients(scores, sq, sk, 2 * student_scale, d_query[:, :, rows], d_key[:, :, keys])


def _add(call: Attention, counted: Counted, total: Tensor, d_query: Tensor | None, d_key: Tensor | None) -> None:
    if not _takes_linear(call, "torch"):
        _attention.add_tiles(_add_block, call, counted, total, d_query, d_key)
        return
    loss, query_gram, key_gram = _linear_loss(call, counted)  # of a long sequence among packed ones
    total += loss.clamp_(min=0)
    if d_query is not None and d_key is not None:
        _linear_gradients(torch.ones_like(loss), call, counted, query_gram, key_gram, d_query, d_key)


_tiled = _attention.tiled_op("attention_mse_tiled", False, _add)
