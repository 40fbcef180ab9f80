"""Attention-score MSE of short sequences: one program computes all scores of a head, its loss, dQ and dK.

With r = s_t / s_s, the ratio of the scales, a score difference is a_s - a_t = s_s x, and

    x = q_s k_s^T - r q_t k_t^T        loss = s_s^2 sum x^2 / n
    dq_s = f x k_s        dk_s = f x^T q_s        f = 2 s_s^2 / n

    _count   (batch entries): allowed pairs; only where n, the number of items, is not given
    _scores  (key heads of the student x batch): loops over the query heads that share the key head, in order

`_finalise` of attention_mse.py adds the heads' sums and divides by n.

Each input is read once and each gradient is written once, in the dtype of the inputs. Nothing else of the size of the
inputs exists: at 32 x 12 heads x 128, 26 / 64 in bfloat16, 22.8 MB instead of the 25 MB of partial Gram matrices on top
of twice the inputs' 17.7 MB. The forward writes the gradients as if the loss will get the gradient 1. The backward
launches `_scores` again: its programs return at once if the incoming gradient is 1, and otherwise compute their head
again, since scaling a 16-bit gradient would round it twice. The comparison runs in the kernel to avoid a host sync.

Scales multiply float32 scores. x is rounded to the inputs' 16 bits for the second product: bfloat16 has the range of
float32, and float16 gets x scaled by a power of 2 that makes a head's largest entry about 2^14. The sum of squares is
stored before these products: the store ends the life of the float32 x, whose registers would otherwise halve the number
of programs on a multiprocessor.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import heads_of, on_device_of, power_of_2
from .attention_mse import _finalise, _mask, _strides, _unit

if TYPE_CHECKING:
    from ..ops._attention import Attention

WIDEST = 64  # largest head dimension


@triton.jit
def _flags(mask_ptr, rows, length):
    """Returns which rows exist and are not masked out."""
    counted = rows < length
    if mask_ptr is not None:
        counted &= tl.load(mask_ptr + rows, mask=counted, other=0) != 0
    return counted


@triton.jit
def _load(x_ptr, row_stride, rows, counted, DIM: tl.constexpr, PADDED: tl.constexpr):  # (rows, PADDED)
    columns = tl.arange(0, PADDED)
    where = rows[:, None] * row_stride + columns[None, :]
    return tl.load(x_ptr + where, mask=counted[:, None] & (columns < DIM)[None, :], other=0)


@triton.jit
def _store(x_ptr, row_stride, column_stride, rows, exist, x, DIM: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    where = rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(x_ptr + where, x.to(x_ptr.dtype.element_ty), mask=exist[:, None] & (columns < DIM)[None, :])


@triton.jit
def _count(
    query_mask_ptr, key_mask_ptr,  # (B|1, L), (B|1, S) bool; None: all rows count
    pairs_ptr,  # (B) int64: allowed pairs of a head
    query_mask_batch, key_mask_batch,  # strides
    query_length, key_length,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    if query_mask_ptr is not None:
        query_mask_ptr += batch * query_mask_batch
    if key_mask_ptr is not None:
        key_mask_ptr += batch * key_mask_batch
    rows = tl.arange(0, BLOCK)
    allowed = _flags(query_mask_ptr, rows, query_length)[:, None] & _flags(key_mask_ptr, rows, key_length)[None, :]
    if IS_CAUSAL:
        allowed &= rows[None, :] <= rows[:, None] + (key_length - query_length)
    tl.store(pairs_ptr + batch, tl.sum(tl.sum(allowed.to(tl.int32), 1), 0).to(tl.int64))


@triton.jit
def _scores(
    sq_ptr, sk_ptr, tq_ptr, tk_ptr,  # (B, H, L, D_s), (B, H_s, S, D_s), (B, H, L, D_t), (B, H_t, S, D_t)
    query_mask_ptr, key_mask_ptr,  # (B|1, L), (B|1, S) bool; None: all rows count
    num_items_ptr,  # (), divides the gradients, as 1 if it is 0; None: `number` does
    total_ptr,  # (B * H) float64: the loss of a head before it is divided; None: not wanted
    d_query_ptr, d_key_ptr,  # (B, H, L, D_s), (B, H_s, S, D_s); None: not wanted
    grad_ptr,  # () of the loss; None: 1
    # Strides, those of the inputs and of the gradients' rows in units of UNIT_S, UNIT_T and UNIT_D.
    sq_batch, sq_head, sq_row, sk_batch, sk_head, sk_row, tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row,
    dq_batch, dq_head, dq_row, dk_batch, dk_head, dk_row, dq_column, dk_column,
    query_mask_batch, key_mask_batch,
    heads, sharing, teacher_sharing,  # H, H / H_s, H / H_t
    query_length, key_length,
    ratio: tl.float64, squared_scale: tl.float64,  # s_t / s_s, s_s^2
    number: tl.float64,
    expected: tl.float64,  # the gradient of the loss for which dQ and dK are right already
    SEVERAL: tl.constexpr,  # query heads share a key head
    UNIT_S: tl.constexpr, UNIT_T: tl.constexpr, UNIT_D: tl.constexpr,
    D_S: tl.constexpr, D_T: tl.constexpr, PADDED_S: tl.constexpr, PADDED_T: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L and S
):  # fmt: skip
    factor = 2 * tl.full((), squared_scale, tl.float32)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr).to(tl.float64)
        if grad == expected:
            return
        factor *= grad.to(tl.float32)
    HALF: tl.constexpr = sq_ptr.dtype.element_ty == tl.float16
    student_heads = heads // sharing
    batch, student_head = (tl.program_id(0) // student_heads).to(tl.int64), tl.program_id(0) % student_heads

    rows = tl.arange(0, BLOCK)  # queries or keys
    if query_mask_ptr is not None:
        query_mask_ptr += batch * query_mask_batch
    if key_mask_ptr is not None:
        key_mask_ptr += batch * key_mask_batch
    queries, keys = _flags(query_mask_ptr, rows, query_length), _flags(key_mask_ptr, rows, key_length)
    # Query i is allowed the keys up to i + reach. Rows without an allowed pair are not read either: they may hold NaN.
    reach = key_length - query_length if IS_CAUSAL else BLOCK
    if key_mask_ptr is not None or IS_CAUSAL:
        first = tl.min(tl.where(keys, rows, 2 * BLOCK), 0)
        queries &= rows + reach >= first
    if query_mask_ptr is not None:
        last = tl.max(tl.where(queries, rows, -2 * BLOCK), 0)
        keys &= rows <= last + reach

    sk_ptr += (batch * sk_batch + student_head.to(tl.int64) * sk_head) * UNIT_S
    sk = _load(sk_ptr, sk_row * UNIT_S, rows, keys, D_S, PADDED_S)
    dk = tl.zeros((BLOCK, PADDED_S), tl.float32)
    items = tl.full((), number, tl.float32)
    if num_items_ptr is not None:
        items = tl.load(num_items_ptr).to(tl.float32)
    factor /= tl.where(items == 0, 1, items)
    for nth in range(sharing if SEVERAL else 1):
        head = (student_head * sharing + nth).to(tl.int64)
        sq_head_ptr = sq_ptr + (batch * sq_batch + head * sq_head) * UNIT_S
        tq_head_ptr = tq_ptr + (batch * tq_batch + head * tq_head) * UNIT_T
        tk_head_ptr = tk_ptr + (batch * tk_batch + head // teacher_sharing * tk_head) * UNIT_T
        tk = _load(tk_head_ptr, tk_row * UNIT_T, rows, keys, D_T, PADDED_T)
        sq = _load(sq_head_ptr, sq_row * UNIT_S, rows, queries, D_S, PADDED_S)
        tq = _load(tq_head_ptr, tq_row * UNIT_T, rows, queries, D_T, PADDED_T)
        x = tl.dot(tq, tl.trans(tk)) * -tl.full((), ratio, tl.float32)
        x = tl.dot(sq, tl.trans(sk), x)
        if IS_CAUSAL:
            x = tl.where(rows[None, :] <= rows[:, None] + reach, x, 0)
        if total_ptr is not None:
            total = tl.sum(tl.sum(x * x, 1), 0).to(tl.float64) * squared_scale
            tl.store(total_ptr + batch * heads + head, total)
        if d_query_ptr is not None:
            undo = 1.0
            if HALF:
                exponent = tl.max(tl.max(tl.abs(x), 1), 0).to(tl.int32, bitcast=True) >> 23  # biased by 127
                x *= (tl.minimum(268 - exponent, 254) << 23).to(tl.float32, bitcast=True)  # 2^14 / largest
                undo = (tl.maximum(exponent - 14, 0) << 23).to(tl.float32, bitcast=True)
            x = x.to(sq.dtype)
            dq = tl.dot(x, sk)
            if HALF:
                dk += tl.dot(tl.trans(x), sq) * undo
            else:
                dk = tl.dot(tl.trans(x), sq, dk)
            dq_head_ptr = d_query_ptr + (batch * dq_batch + head * dq_head) * UNIT_D
            exist = rows < query_length
            _store(dq_head_ptr, dq_row * UNIT_D, dq_column, rows, exist, dq * (undo * factor), D_S, PADDED_S)
    if d_query_ptr is not None:
        d_key_ptr += (batch * dk_batch + student_head.to(tl.int64) * dk_head) * UNIT_D
        _store(d_key_ptr, dk_row * UNIT_D, dk_column, rows, rows < key_length, dk * factor, D_S, PADDED_S)


# -- launchers -----------------------------------------------------------------------------------------------


def longest(arch: str) -> int:
    """Returns the most queries or keys whose scores one program holds without spills: twice as many where matrix
    instructions read shared memory (sm_90) or write tensor memory (sm_100)."""
    return 128 if arch in ("sm_90", "sm_100", "sm_103", "cpu") else 64


def fits(call: "Attention") -> bool:
    """Returns whether `loss` takes the call: short sequences in 16 bits, narrow heads, no mask of pairs."""
    query, _, teacher_query, _ = tensors = call.tensors()
    length = max(call.lengths())
    return (
        length <= 128
        and query.shape[3] <= WIDEST
        and teacher_query.shape[3] <= WIDEST
        # Offsets have 32 bits, and gradients the strides of the inputs.
        and all(x.itemsize == 2 and x.numel() and x.stride(2) < 2**23 and x.stride(3) < 2**23 for x in tensors)
        and call.attn_mask is None
        and call.student_scale != 0  # the ratio of the scales
        and length <= longest(_common.arch_of(query))
    )


def loss(
    call: "Attention",
    number: float | None,  # divides the sum; None: num_items does, or else the allowed pairs
    num_items: Tensor | None,  # ()
    d_query: Tensor | None,  # as the student's query, to be written as if the loss will get the gradient 1
    d_key: Tensor | None,
) -> tuple[Tensor, Tensor]:  # the loss (), its divisor () float64
    batch, heads, new = *call.student_query.shape[:2], call.student_query.new_empty
    totals, divisor = (new(shape, dtype=torch.float64) for shape in (batch * heads, ()))
    out = new((), dtype=call.dtype)
    host_number = 0.0 if number is None else float(number)
    if num_items is not None:
        num_items = num_items.to(out.device)
    with on_device_of(out):

        def finalise(totals: Tensor, pairs: Tensor | None) -> None:
            _finalise[(1,)](
                totals, None, pairs, num_items, out, divisor, len(totals), batch, heads, host_number, BLOCK=1024,
                num_warps=4,
            )  # fmt: skip

        if number is None and num_items is None:
            pairs = new(batch, dtype=torch.int64)
            (query_mask, query_mask_batch), (key_mask, key_mask_batch) = _mask(call.query_mask), _mask(call.key_mask)
            _count[(batch,)](
                query_mask, key_mask, pairs, query_mask_batch, key_mask_batch, *call.lengths(),
                IS_CAUSAL=call.is_causal, BLOCK=_block(call),
            )  # fmt: skip
            finalise(totals[:0], pairs)
            num_items = divisor
        _launch(call, host_number, num_items, totals, d_query, d_key, None, 1.0)
        finalise(totals, None)
    return out, divisor


def gradients(
    grad_loss: Tensor,  # ()
    call: "Attention",
    divisor: Tensor,  # as `loss` returns it
    d_query: Tensor, d_key: Tensor,  # to be written, unless grad_loss is `expected`
    expected: float,
) -> None:  # fmt: skip
    with on_device_of(call.student_query):
        _launch(call, 0.0, divisor, None, d_query, d_key, grad_loss, expected)


def _block(call: "Attention") -> int:
    return 64 if max(call.lengths()) <= 64 else 128


def _launch(
    call: "Attention", number: float, num_items: Tensor | None, totals: Tensor | None,
    d_query: Tensor | None, d_key: Tensor | None, grad_loss: Tensor | None, expected: float,
) -> None:  # fmt: skip
    sq, sk, tq, tk = (heads_of(x, torch.float32) for x in call.tensors())
    (batch, heads, _, d_s), student_heads, d_t = sq.shape, sk.shape[1], tq.shape[3]
    (query_mask, query_mask_batch), (key_mask, key_mask_batch) = _mask(call.query_mask), _mask(call.key_mask)
    unit_s, unit_t, unit_d, d_strides = _unit(sq, sk), _unit(tq, tk), 1, (0,) * 8
    if d_query is not None and d_key is not None:
        unit_d = _unit(d_query, d_key)
        d_strides = *_strides(unit_d, d_query), *_strides(unit_d, d_key), d_query.stride(3), d_key.stride(3)
    block = _block(call)
    _scores[(batch * student_heads,)](
        sq, sk, tq, tk, query_mask, key_mask, num_items, totals, d_query, d_key, grad_loss,
        *_strides(unit_s, sq), *_strides(unit_s, sk), *_strides(unit_t, tq), *_strides(unit_t, tk), *d_strides,
        query_mask_batch, key_mask_batch, heads, heads // student_heads, heads // tk.shape[1], *call.lengths(),
        call.teacher_scale / call.student_scale, call.student_scale**2, number, expected,
        SEVERAL=heads > student_heads, UNIT_S=unit_s, UNIT_T=unit_t, UNIT_D=unit_d, D_S=d_s, D_T=d_t,
        PADDED_S=max(power_of_2(d_s), 16), PADDED_T=max(power_of_2(d_t), 16), IS_CAUSAL=call.is_causal, BLOCK=block,
        num_warps=block // 16, num_stages=1,
    )  # fmt: skip
