"""Losses on attention scores, from queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks as check
from .. import reference
from .._checks import Backend, Total
from ..ops._attention import WIDEST_TILE, Attention, Divisor
from ..ops._common import no_autocast, traced
from ..ops.attention_kl import attention_kl as _attention_kl_op
from ..ops.attention_mse import attention_mse as _attention_mse_op
from ..ops.attention_mse import takes_gram
from ._dispatch import mean, pick_backend
from ._docs import documented

__all__ = ["attention_kl", "attention_mse"]

_TENSORS = Attention._fields[:4]
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@documented
def attention_mse(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, *,
    student_scale: float | None = None, teacher_scale: float | None = None,
    key_mask: Tensor | None = None, query_mask: Tensor | None = None,
    is_causal: bool = False, attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_key: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    reduction: Total = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the mean squared error between student and teacher attention scores, without an L x S tensor.

    The scores are those before the softmax. The item is an allowed pair (b, h, i, j); its loss is
    `(a_student - a_teacher)^2` with `a[b,h,i,j] = scale * <query[b,h,i], key[b,h,j]>`. This is the attention loss of
    TinyBERT (arXiv 1909.10351, equation 7). Time and memory are linear in L and S, causal or not; a dense `attn_mask`
    costs time L x S and linear memory.

    With hidden states as both query and key (one head, `(B, 1, L, d)`, both scales 1) it is the token-similarity
    loss `||H_s H_s^T - H_t H_t^T||^2` of similarity-preserving distillation (arXiv 1907.09682), between any two
    widths and without a projection.

    Args:
        {attention}

    Raises:
        {attention_raises}
    """
    return _attention(
        _attention_mse_op, reference.attention_mse, (student_query, student_key, teacher_query, teacher_key),
        (student_scale, teacher_scale), (key_mask, query_mask, is_causal, attn_mask),
        (cu_seqlens, cu_seqlens_key), window, reduction, num_items, backend,
    )  # fmt: skip


@documented
def attention_kl(
    student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor, *,
    student_scale: float | None = None, teacher_scale: float | None = None,
    key_mask: Tensor | None = None, query_mask: Tensor | None = None,
    is_causal: bool = False, attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, cu_seqlens_key: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    reduction: Total = "mean", num_items: int | float | Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Computes the KL divergence from the student's attention distribution to the teacher's, without an L x S tensor.

    The item is a query row (b, h, i) with at least one allowed key; its loss is
    `KL(softmax(teacher scores) || softmax(student scores))` over the allowed keys. This is MiniLM's attention
    transfer (arXiv 2002.10957, equation 6); with values in place of queries and keys it is MiniLM's value relation
    (equation 9), and with heads re-split by reshaping first it is MiniLMv2's loss (arXiv 2012.15828). Time is L x S,
    memory linear in L and S.

    Args:
        {attention}

    Raises:
        {attention_raises}
    """
    return _attention(
        _attention_kl_op, reference.attention_kl, (student_query, student_key, teacher_query, teacher_key),
        (student_scale, teacher_scale), (key_mask, query_mask, is_causal, attn_mask),
        (cu_seqlens, cu_seqlens_key), window, reduction, num_items, backend,
    )  # fmt: skip


def _attention(
    op: Callable[[Attention, str, Divisor], tuple[Tensor, Divisor]], definition: Callable[..., Tensor],
    tensors: _Tensors, scales: tuple[float | None, float | None],
    masks: tuple[Tensor | None, Tensor | None, bool, Tensor | None],
    packing: tuple[Tensor | None, Tensor | None], window: tuple[int | None, int | None] | None,
    reduction: Total, num_items: int | float | Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    query, _, teacher_query, teacher_key = tensors
    check.floating(**dict(zip(_TENSORS, tensors, strict=True)))
    check.frozen(teacher_query=teacher_query, teacher_key=teacher_key)
    check.reduction(reduction, num_items, ("mean", "sum"))
    check.finite("student_scale", scales[0])
    check.finite("teacher_scale", scales[1])
    _check_heads(*tensors)
    attn_mask = _check_masks(*masks, query.device, (*query.shape[:3], tensors[1].shape[2]))
    packing = _check_packing(*packing, attn_mask, query.shape[0], (query.shape[2], tensors[1].shape[2]), query.device)
    left, right = _check_window(window)
    is_tiled = definition is reference.attention_kl or masks[2] or attn_mask is not None
    backend = _pick(backend, tensors, is_tiled or packing[0] is not None or window is not None)
    student_scale = query.shape[3] ** -0.5 if scales[0] is None else float(scales[0])
    teacher_scale = teacher_query.shape[3] ** -0.5 if scales[1] is None else float(scales[1])
    call = Attention(*tensors, student_scale, teacher_scale, *masks[:3], attn_mask, *packing, left, right)
    with no_autocast(query):
        if backend == "reference":
            return definition(**call._asdict(), reduction=reduction, num_items=num_items)
        divisor = 1 if reduction == "sum" else num_items
        if isinstance(divisor, Tensor) and divisor.device.type == "cpu" and not traced():
            divisor = divisor.item()  # a number: kernels cannot read it, and a copy to the device would wait
        total, divisor = op(call, backend, divisor)
        return total if divisor is None or reduction == "sum" else mean(total, divisor)


def _pick(backend: Backend, tensors: _Tensors, is_tiled: bool) -> Backend:
    """Returns the backend. `is_tiled`: the kernels need tiles of scores, which wide heads do not fit."""
    chosen = pick_backend(backend, tensors[0].device)
    if chosen != "triton" or (width := max(x.shape[3] for x in tensors)) <= WIDEST_TILE:
        return chosen
    if backend == "triton" and is_tiled:
        raise ValueError(
            f"backend is 'triton', but heads are {width} wide; its tiles of scores hold up to {WIDEST_TILE}: "
            "use backend='auto' or 'torch'"
        )
    # Gram matrices of hidden states cost more than the scores of short sequences. If forced, the kernels run anyway.
    return "torch" if backend == "auto" and (is_tiled or not takes_gram(*tensors)) else chosen


def _check_heads(student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> None:
    for name, x in zip(_TENSORS, (student_query, student_key, teacher_query, teacher_key), strict=True):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it should be (batch, heads, length, head_dim)")
    batch, heads, query_length, _ = student_query.shape
    key_length = student_key.shape[2]
    if teacher_query.shape[1] != heads:
        raise ValueError(
            f"teacher_query has {teacher_query.shape[1]} heads and student_query {heads}; score matrices pair head "
            "by head: give the student the teacher's number of heads, or re-split both into equally many "
            "relation heads (MiniLMv2) by reshaping query and key first"
        )
    for side, query, key in (("student", student_query, student_key), ("teacher", teacher_query, teacher_key)):
        width, key_heads = query.shape[3], key.shape[1]
        check.shape(f"{side}_query", query, (batch, heads, query_length, width), "(B, H, L, D)")
        check.shape(f"{side}_key", key, (batch, key_heads, key_length, width), "(B, H_kv, S, D), D the query's")
        if key_heads == 0 or heads % key_heads:
            raise ValueError(f"{side}_key has {key_heads} heads; the {heads} query heads should be a multiple of that")
        if query.dtype != key.dtype:
            raise TypeError(f"{side}_query is {query.dtype} and {side}_key {key.dtype}; they should be the same")
        if width == 0:
            raise ValueError(f"{side}_query has head_dim 0; it should be at least 1")


def _check_masks(
    key_mask: Tensor | None, query_mask: Tensor | None, is_causal: bool, attn_mask: Tensor | None,
    device: torch.device, shape: tuple[int, int, int, int],
) -> Tensor | None:  # fmt: skip
    """Returns `attn_mask` in four dimensions; `shape` is (B, H, L, S)."""
    check.mask("key_mask", key_mask, (shape[0], shape[3]), "(B, S)", device)
    check.mask("query_mask", query_mask, (shape[0], shape[2]), "(B, L)", device)
    check.boolean("is_causal", is_causal)
    if attn_mask is None:
        return None
    check.mask("attn_mask", attn_mask, None, "", device)
    padded = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(padded) != 4 or any(m not in (1, n) for m, n in zip(padded, shape, strict=True)):
        raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; it should broadcast to {shape}, (B, H, L, S)")
    return attn_mask.reshape(padded)


def _check_packing(
    cu_seqlens: Tensor | None, cu_seqlens_key: Tensor | None, attn_mask: Tensor | None,
    batch: int, lengths: tuple[int, int], device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Returns the ends of packed sequences of queries and of keys; `lengths` is (L, S)."""
    if cu_seqlens is None:
        if cu_seqlens_key is not None:
            raise ValueError("cu_seqlens_key is given without cu_seqlens: pass both")
        return None, None
    if attn_mask is not None:
        raise ValueError("attn_mask is given with cu_seqlens, which takes key_mask, query_mask and window only")
    if batch != 1:
        raise ValueError(
            f"cu_seqlens is given, but the batch size is {batch}; packed sequences are one row: pass "
            "tensors (1, H, L, D), the sequences one after the other in L"
        )
    ends = {"cu_seqlens": cu_seqlens, "cu_seqlens_key": cu_seqlens if cu_seqlens_key is None else cu_seqlens_key}
    for (name, x), length in zip(ends.items(), lengths, strict=True):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{name} is a {type(x).__name__}; it should be an int32 tensor: pass torch.tensor({name})"
                )
            raise TypeError(f"{name} is {x.dtype}; it should be an int32 tensor: pass {name}.int()")
        if x.dim() != 1 or x.shape[0] < 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it should be (n + 1) for n sequences")
        check.on_device(name, x, device)
        if device.type != "cpu" or traced():
            continue  # to look at the values would be a host sync
        starts = x.tolist()
        if starts[0] != 0 or starts[-1] != length or any(a > b for a, b in pairwise(starts)):
            raise ValueError(f"{name} is {_shortened(starts)}; it should rise from 0 to the length, {length}")
    if ends["cu_seqlens_key"].shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_key has shape {tuple(ends['cu_seqlens_key'].shape)}; it should be {tuple(cu_seqlens.shape)}, "
            "that of cu_seqlens"
        )
    return cu_seqlens, ends["cu_seqlens_key"]


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def _check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window is {window!r}; it should be (left, right), each an int or None")
    for bound in window:
        if bound is not None:
            check.integer("window's bound", bound)
            if bound < 0:
                raise ValueError(f"window is {tuple(window)}; its bounds should be at least 0, or None for no bound")
    return window[0], window[1]
