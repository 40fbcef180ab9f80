"""The public functions. Each checks its arguments, picks a backend and calls one op.

Common to all of them:

- Student first, teacher second. `*` is any number of leading dimensions, the same in every tensor of a call.
- Losses are computed in float32 (float64 for float64 inputs) whatever the inputs' dtype, and come out in it.
  Gradients have the dtype of the tensor they belong to. The teacher's side gets none.
- `mask` is bool, True = counts. What does not count changes nothing, whatever it holds.
- `reduction`: "sum"; "mean" = sum / number of counted items, or / `num_items` (int or 0-d tensor, never
  synchronised) where that is given, as gradient accumulation and data parallelism need; "none" = per item.
  No counted item: loss 0 and gradients 0.
- Under `torch.autocast` the operands of a projection are cast as `nn.Linear` casts them; losses stay float32.
- Bad arguments raise ValueError or TypeError before any work. Differentiating twice raises RuntimeError
  (`backend="reference"` can be).
- `backend`: "auto" takes the best one that can run here; "reference" (eager definitions), "torch" (portable,
  memory-lean), "triton" (fused kernels, on NVIDIA and AMD GPUs) and, for the losses on logits, "cuda" (csrc/, on NVIDIA
  GPUs; what "auto" takes from sm_90 on) can be forced. A name that cannot run raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastdistill import _checks as check
from fastdistill import reference
from fastdistill.ops._attention import WIDEST_TILE
from fastdistill.ops.attention_kl import attention_kl as _attention_kl_op
from fastdistill.ops.attention_mse import attention_mse as _attention_mse_op
from fastdistill.ops.attention_mse import takes_gram
from fastdistill.ops.linear_logits import linear_divergence, linear_topk_divergence
from fastdistill.ops.linear_mse import linear_mse as _linear_mse_op
from fastdistill.ops.logits import divergence
from fastdistill.ops.topk import topk_divergence

__all__ = [
    "attention_kl",
    "attention_mse",
    "jsd",
    "kl_div",
    "linear_jsd",
    "linear_kl_div",
    "linear_mse",
    "linear_soft_cross_entropy",
    "linear_topk_soft_cross_entropy",
    "linear_tvd",
    "soft_cross_entropy",
    "topk_soft_cross_entropy",
    "tvd",
]

BACKENDS = ("reference", "torch", "triton", "cuda")

# find_spec of a top-level name imports nothing. Importing fastdistill must not import Triton.
_TRITON_INSTALLED = find_spec("triton") is not None
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")  # Triton's own


def pick_backend(backend: str, device: torch.device, logits: tuple[torch.dtype, ...] = ()) -> str:
    """The backend a call takes: `backend` itself, or for "auto" the best that can run on `device`.

    `logits`: the dtypes of a loss on logits, which csrc/ has kernels for.
    """
    if backend == "auto":
        if logits and device.type == "cuda" and _no_cuda(device, logits, automatic=True) is None:
            return "cuda"
        return "triton" if device.type == "cuda" and _no_triton(device) is None else "torch"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}; on {device.type} it should be 'auto', 'reference', 'torch', 'triton' or 'cuda'"
        )
    if backend == "triton":
        reason = _no_triton(device)
        if reason is not None:
            raise ValueError(f"backend is 'triton', but {reason}; use backend='auto' or 'torch'")
    if backend == "cuda":
        reason = _no_cuda(device, logits)
        if reason is not None:
            raise ValueError(f"backend is 'cuda', but {reason}; use backend='auto' or 'torch'")
    return backend


def _no_cuda(device: torch.device, logits: tuple[torch.dtype, ...], automatic: bool = False) -> str | None:
    """Why the kernels of csrc/ cannot run on logits of these dtypes on `device`, or "auto" does not take them; None:
    they can."""
    if not logits:
        return "csrc has kernels for the losses on logits only"

    from fastdistill import cuda  # not above: `python -m fastdistill.cuda` would find itself imported already

    if len(set(logits)) > 1 or logits[0] not in cuda.DTYPES:
        return f"its logits are float32, float16 or bfloat16, both alike, and not {' and '.join(map(str, logits))}"
    reason = cuda.unavailable(device)
    if reason is None and automatic and torch.cuda.get_device_capability(device) < (9, 0):
        reason = "it beats Triton's kernels from compute capability 9.0 on only"  # where blocks form clusters
    return reason


# Files are looked for, which cannot be traced. What torch.compiler.assume_constant_result does, but for importing the
# compiler.
_no_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`; None: they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install 'fastdistill[triton]')"
    if device.type == "cpu":
        if _TRITON_INTERPRETS:
            return None
        return "on a CPU its kernels run only in Triton's interpreter (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda":
        return f"its kernels run on NVIDIA and AMD GPUs, not on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def explain_backends(device: torch.device) -> list[tuple[str, str, str]]:
    """(op, the backend "auto" takes on `device`, why) for every public function; `fastdistill info` prints it."""
    rows = []
    for op in __all__:
        logits = (torch.bfloat16, torch.bfloat16) if op in ("soft_cross_entropy", "kl_div", "jsd", "tvd") else ()
        backend = pick_backend("auto", device, logits)
        reason = _no_triton(device)
        why = "the fused kernel" if reason is None else f"the portable implementation: {reason}"
        if backend == "cuda":
            why = "the fused kernel on a cluster of blocks, for logits of one 16- or 32-bit dtype"
        elif logits and device.type == "cuda":
            why += f"; not cuda: {_no_cuda(device, logits, automatic=True)}"
        rows.append((op, backend, why))
    return rows


def _mean(total: Tensor, count: int | Tensor) -> Tensor:
    """total / count; 0 items divide by 1, so that an empty sum stays 0."""
    if not isinstance(count, Tensor):
        return total / max(count, 1)
    count = count.to(device=total.device, dtype=total.dtype)
    return total / torch.where(count == 0, 1, count)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Operands of a matrix product, cast as autocast casts those of nn.Linear; as they are without autocast."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


# -- hidden states -----------------------------------------------------------------------------------------


def linear_mse(
    student: Tensor,
    weight: Tensor | None,
    teacher: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error between the projected student and the teacher, the projection never stored whole.

    The item is a token; its loss is the mean over d_t of `(student @ weight.T + bias - teacher)^2`. This is the
    hidden-state and the embedding loss of TinyBERT (arXiv 1909.10351, equations 8 and 9).

    Args:
        student: `(*, d_s)`.
        weight: `(d_t, d_s)` as in nn.Linear, or None where d_s == d_t.
        teacher: `(*, d_t)`; any floating dtype.
        bias: `(d_t)` or None.
        mask: `(*)` bool, True = counts.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of tokens to divide by in place of the number counted.
        backend: "auto", "reference", "torch" or "triton".

    Raises:
        ValueError: shapes that do not fit, a teacher that requires a gradient, an unknown reduction or backend.
        TypeError: tensors that are not floating, student, weight and bias of several dtypes outside autocast.
    """
    check.floating(student=student, **check.given(weight=weight), teacher=teacher, **check.given(bias=bias))
    check.frozen(teacher=teacher)
    check.reduction(reduction, num_items)
    if student.dim() < 1:
        raise ValueError("student is a scalar; it should be (*, d_s)")
    tokens = tuple(student.shape[:-1])
    if weight is None:
        check.shape("teacher", teacher, tuple(student.shape), "the student's shape, as weight is None")
        width = student.shape[-1]
    else:
        if weight.dim() != 2 or weight.shape[1] != student.shape[-1]:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it should be (d_t, {student.shape[-1]}), as in "
                "nn.Linear(d_s, d_t).weight"
            )
        width = weight.shape[0]
        check.shape("teacher", teacher, (*tokens, width), "(*, d_t) with the student's leading dimensions")
    if width == 0:
        raise ValueError("teacher has width 0; the mean over d_t needs at least one feature")
    if bias is not None:
        check.shape("bias", bias, (width,), "(d_t)")
    check.mask("mask", mask, tokens, "the student's leading dimensions", student.device)
    backend = pick_backend(backend, student.device)

    if weight is not None:
        student, weight, bias = _autocast(student, weight, bias)
    elif bias is not None and torch.is_autocast_enabled(student.device.type):
        bias = bias.to(student.dtype)  # without a product autocast rounds nothing
    check.same_dtype(student=student, weight=weight, bias=bias)
    with _no_autocast(student):
        if backend == "reference":
            return reference.linear_mse(
                student, weight, teacher, bias, mask=mask, reduction=reduction, num_items=num_items
            )
        loss = _linear_mse_op(
            student.reshape(-1, student.shape[-1]),
            weight,
            teacher.reshape(-1, width),
            bias,
            None if mask is None else mask.reshape(-1),
            per_token=reduction == "none",
            backend=backend,
        )
        if reduction == "none":
            return loss.view(tokens)
        if reduction == "sum":
            return loss
        if num_items is None:
            num_items = student.numel() // max(student.shape[-1], 1) if mask is None else mask.sum()
        return _mean(loss, num_items)


# -- attention ---------------------------------------------------------------------------------------------


def _attention(
    op: Callable[..., tuple[Tensor, Tensor]],
    definition: Callable[..., Tensor],
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_scale: float | None,
    teacher_scale: float | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    attn_mask: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    backend: str,
) -> Tensor:
    check.floating(
        student_query=student_query,
        student_key=student_key,
        teacher_query=teacher_query,
        teacher_key=teacher_key,
    )
    check.frozen(teacher_query=teacher_query, teacher_key=teacher_key)
    check.reduction(reduction, num_items, ("mean", "sum"))
    check.finite("student_scale", student_scale)
    check.finite("teacher_scale", teacher_scale)
    for name, x in (("student_query", student_query), ("student_key", student_key),
                    ("teacher_query", teacher_query), ("teacher_key", teacher_key)):  # fmt: skip
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
    for side, query, key in (
        ("student", student_query, student_key),
        ("teacher", teacher_query, teacher_key),
    ):
        check.shape(f"{side}_query", query, (batch, heads, query_length, query.shape[3]), "(B, H, L, D)")
        check.shape(
            f"{side}_key",
            key,
            (batch, key.shape[1], key_length, query.shape[3]),
            "(B, H_kv, S, D), D the query's",
        )
        if key.shape[1] == 0 or heads % key.shape[1]:
            raise ValueError(
                f"{side}_key has {key.shape[1]} heads; the {heads} query heads should be a multiple of that"
            )
        if query.dtype != key.dtype:
            raise TypeError(f"{side}_query is {query.dtype} and {side}_key {key.dtype}; they should be the same")
        if query.shape[3] == 0:
            raise ValueError(f"{side}_query has head_dim 0; it should be at least 1")
    device = student_query.device
    check.mask("key_mask", key_mask, (batch, key_length), "(B, S)", device)
    check.mask("query_mask", query_mask, (batch, query_length), "(B, L)", device)
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal is {type(is_causal).__name__}; it should be a bool")
    if attn_mask is not None:
        full = (batch, heads, query_length, key_length)
        check.mask("attn_mask", attn_mask, None, "", device)
        padded = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if len(padded) != 4 or any(m not in (1, n) for m, n in zip(padded, full, strict=True)):
            raise ValueError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; it should broadcast to {full}, (B, H, L, S)"
            )
        attn_mask = attn_mask.reshape(padded)
    chosen = pick_backend(backend, device)
    width = max(student_query.shape[3], teacher_query.shape[3])
    if chosen == "triton" and width > WIDEST_TILE:
        needs_tiles = definition is reference.attention_kl or is_causal or attn_mask is not None
        if backend == "triton" and needs_tiles:
            raise ValueError(
                f"backend is 'triton', but heads are {width} wide; its tiles of scores hold up to {WIDEST_TILE}: "
                "use backend='auto' or 'torch'"
            )
        # Gram matrices of hidden states outweigh the scores of short sequences. Forced, the kernels run all the same.
        if backend == "auto" and (
            needs_tiles or not takes_gram(student_query, student_key, teacher_query, teacher_key)
        ):
            chosen = "torch"
    backend = chosen

    with _no_autocast(student_query):
        if backend == "reference":
            return definition(
                student_query, student_key, teacher_query, teacher_key, student_scale=student_scale,
                teacher_scale=teacher_scale, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal,
                attn_mask=attn_mask, reduction=reduction, num_items=num_items,
            )  # fmt: skip
        total, count = op(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            student_query.shape[3] ** -0.5 if student_scale is None else float(student_scale),
            teacher_query.shape[3] ** -0.5 if teacher_scale is None else float(teacher_scale),
            key_mask,
            query_mask,
            is_causal,
            attn_mask,
            backend,
        )
        if reduction == "sum":
            return total
        return _mean(total, count if num_items is None else num_items)


def attention_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error between student and teacher attention scores (before softmax), without an L x S tensor.

    The item is an allowed pair (b, h, i, j); its loss is `(a_student - a_teacher)^2` with
    `a[b,h,i,j] = scale * <query[b,h,i], key[b,h,j]>`. This is the attention loss of TinyBERT (arXiv 1909.10351,
    equation 7). Time and memory are linear in L and S, causal or not; a dense `attn_mask` costs time L x S and
    linear memory.

    With hidden states as both query and key (one head, `(B, 1, L, d)`, both scales 1) it is the token-similarity
    loss `||H_s H_s^T - H_t H_t^T||^2` of similarity-preserving distillation (arXiv 1907.09682), between any two
    widths and without a projection.

    Args:
        student_query: `(B, H, L, D_s)`.
        student_key: `(B, H_kv, S, D_s)`, H a multiple of H_kv (grouped queries).
        teacher_query: `(B, H, L, D_t)`; its dtype may differ from the student's.
        teacher_key: `(B, H_kv_t, S, D_t)`; H_kv_t may differ from the student's.
        student_scale: factor of the student's scores; None: `D_s ** -0.5`.
        teacher_scale: factor of the teacher's scores; None: `D_t ** -0.5`.
        key_mask: `(B, S)` bool, True = counts.
        query_mask: `(B, L)` bool, True = counts.
        is_causal: allow only `j <= i + S - L`.
        attn_mask: bool, broadcastable to `(B, H, L, S)`, True = allowed.
        reduction: "mean" or "sum".
        num_items: number of pairs to divide by in place of the number counted.
        backend: "auto", "reference", "torch" or "triton".

    Raises:
        ValueError: shapes that do not fit, head counts that differ, a teacher that requires a gradient, an
            unknown reduction or backend.
        TypeError: tensors that are not floating, masks that are not bool, query and key of different dtypes.
    """
    return _attention(
        _attention_mse_op, reference.attention_mse, student_query, student_key, teacher_query, teacher_key,
        student_scale, teacher_scale, key_mask, query_mask, is_causal, attn_mask, reduction, num_items, backend,
    )  # fmt: skip


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL divergence from the student's attention distribution to the teacher's, without an L x S tensor.

    The item is a query row (b, h, i) with at least one allowed key; its loss is
    `KL(softmax(teacher scores) || softmax(student scores))` over the allowed keys. This is MiniLM's attention
    transfer (arXiv 2002.10957, equation 6); with values in place of queries and keys it is MiniLM's value relation
    (equation 9), and heads re-split by reshaping first make it MiniLMv2's (arXiv 2012.15828). Time is L x S, memory
    linear in L and S.

    Args:
        student_query: `(B, H, L, D_s)`.
        student_key: `(B, H_kv, S, D_s)`, H a multiple of H_kv (grouped queries).
        teacher_query: `(B, H, L, D_t)`; its dtype may differ from the student's.
        teacher_key: `(B, H_kv_t, S, D_t)`; H_kv_t may differ from the student's.
        student_scale: factor of the student's scores; None: `D_s ** -0.5`.
        teacher_scale: factor of the teacher's scores; None: `D_t ** -0.5`.
        key_mask: `(B, S)` bool, True = counts.
        query_mask: `(B, L)` bool, True = counts.
        is_causal: allow only `j <= i + S - L`.
        attn_mask: bool, broadcastable to `(B, H, L, S)`, True = allowed.
        reduction: "mean" or "sum".
        num_items: number of rows to divide by in place of the number counted.
        backend: "auto", "reference", "torch" or "triton".

    Raises:
        ValueError: shapes that do not fit, head counts that differ, a teacher that requires a gradient, an
            unknown reduction or backend.
        TypeError: tensors that are not floating, masks that are not bool, query and key of different dtypes.
    """
    return _attention(
        _attention_kl_op, reference.attention_kl, student_query, student_key, teacher_query, teacher_key,
        student_scale, teacher_scale, key_mask, query_mask, is_causal, attn_mask, reduction, num_items, backend,
    )  # fmt: skip


# -- logits ------------------------------------------------------------------------------------------------


def _check_rows(
    rows: tuple[int, ...],
    classes: int,
    device: torch.device,
    temperature: float,
    t_squared: bool,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    mask: Tensor | None,
    vocab_size: int | None,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor | None:
    """Checks what all losses over classes share; the rows that count, `(*)`, or None where all do."""
    check.reduction(reduction, num_items)
    check.positive("temperature", temperature)
    check.fraction("alpha", alpha)
    if not isinstance(t_squared, bool):
        raise TypeError(f"t_squared is {type(t_squared).__name__}; it should be a bool")
    if classes == 0:
        raise ValueError("the logits have 0 classes; they should have at least 1")
    if vocab_size is not None:
        check.integer("vocab_size", vocab_size)
        if not 1 <= vocab_size <= classes:
            raise ValueError(
                f"vocab_size is {vocab_size}; it should be between 1 and the {classes} classes of the logits"
            )
    check.integer("ignore_index", ignore_index)
    check.mask("mask", mask, rows, "one entry a row", device)
    if labels is None:
        if alpha < 1:
            raise ValueError(f"alpha is {alpha} but labels is None; pass labels, or leave alpha at 1.0")
        return mask
    check.integers("labels", labels, rows, "one entry a row", device)
    counted = labels.long() != ignore_index  # as uint8 -100 would be class 156
    return counted if mask is None else counted & mask


def _check_softcaps(**softcaps: float | None) -> None:
    for name, value in softcaps.items():
        if value is not None:
            check.positive(name, value)


def _row_count(
    logits: Tensor, counted: Tensor | None, reduction: str, num_items: int | Tensor | None
) -> int | Tensor | None:
    """What a mean divides by; None: the reduction is no mean."""
    if reduction != "mean":
        return None
    if num_items is not None:
        return num_items
    return logits.shape[:-1].numel() if counted is None else counted.sum()


def _row_gradient(logits: Tensor, reduction: str, count: int | Tensor | None, backend: str) -> Tensor | None:
    """The gradient of the mean or sum in each row's loss, (), as autograd will compute it; None: not known before."""
    if reduction == "none" or torch.compiler.is_compiling():
        return None
    # Plain torch compares it with what arrives, which would wait for a device, and takes None for 1.
    if backend == "torch" and (count is None or logits.device.type != "cpu"):
        return None
    one = torch.ones((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    return one if count is None else _mean(one, count)


def _reduced(per_row: Tensor, reduction: str, count: int | Tensor | None) -> Tensor:
    """`per_row` is already 0 for rows that do not count."""
    if reduction == "none":
        return per_row
    return per_row.sum() if count is None else _mean(per_row.sum(), count)


def _soft_weight(temperature: float, t_squared: bool, labels: Tensor | None, alpha: float) -> float:
    return (1.0 if labels is None else alpha) * (temperature**2 if t_squared else 1.0)


def _logits_loss(
    kind: str,
    definition: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    t_squared: bool,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    mask: Tensor | None,
    vocab_size: int | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    reduction: str,
    num_items: int | Tensor | None,
    backend: str,
    **options: Any,
) -> Tensor:
    check.floating(student_logits=student_logits, teacher_logits=teacher_logits)
    check.frozen(teacher_logits=teacher_logits)
    if student_logits.dim() < 1:
        raise ValueError("student_logits is a scalar; it should be (*, V)")
    rows = tuple(student_logits.shape[:-1])
    check.shape("teacher_logits", teacher_logits, (*rows, *teacher_logits.shape[-1:]), "(*, V) with the student's *")
    if vocab_size is None and teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            f"teacher_logits has {teacher_logits.shape[-1]} classes and student_logits {student_logits.shape[-1]}; "
            "pass vocab_size, the number of classes that both share, if the rest is padding"
        )
    counted = _check_rows(
        rows, min(student_logits.shape[-1], teacher_logits.shape[-1]), student_logits.device, temperature, t_squared,
        labels, alpha, ignore_index, mask, vocab_size, reduction, num_items,
    )  # fmt: skip
    _check_softcaps(student_softcap=student_softcap, teacher_softcap=teacher_softcap)
    backend = pick_backend(backend, student_logits.device, (student_logits.dtype, teacher_logits.dtype))

    with _no_autocast(student_logits):
        if backend == "reference":
            return definition(
                student_logits, teacher_logits, temperature=temperature, t_squared=t_squared, labels=labels,
                alpha=alpha, ignore_index=ignore_index, mask=mask, vocab_size=vocab_size,
                student_softcap=student_softcap, teacher_softcap=teacher_softcap, reduction=reduction,
                num_items=num_items, **options,
            )  # fmt: skip
        count = _row_count(student_logits, counted, reduction, num_items)
        per_row = divergence(
            student_logits,
            teacher_logits,
            kind,
            counted=counted,
            labels=labels,
            temperature=temperature,
            soft_weight=_soft_weight(temperature, t_squared, labels, alpha),
            hard_weight=0.0 if labels is None else 1 - alpha,
            beta=options.get("beta", 0.5),
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            row_gradient=_row_gradient(student_logits, reduction, count, backend),
            backend=backend,
        )
        return _reduced(per_row, reduction, count)


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the student under the teacher's distribution: `-sum p_t log p_s`.

    With `p = softmax(z / temperature)` of each side, summed over the classes; the item is a row. This is the
    prediction loss of TinyBERT (arXiv 1909.10351, equation 10) and Hinton's distillation (arXiv 1503.02531). It equals
    `kl_div` plus the teacher's entropy, so both have the same gradient.

    Args:
        student_logits: `(*, V)`.
        teacher_logits: `(*, V)`; its dtype may differ from the student's.
        temperature: divides both sides' logits before the softmax.
        t_squared: multiply the soft part by temperature^2, so that its gradient keeps its size (arXiv 1503.02531).
        labels: `(*)` integer classes; the loss is then `alpha * soft + (1 - alpha) * CE(student at temperature 1)`.
        alpha: weight of the soft part, 0 to 1; below 1 it needs labels.
        ignore_index: rows with this label do not count at all.
        mask: `(*)` bool, True = counts.
        vocab_size: only the first so many classes take part; the others get gradient 0. Needed where V differs.
        student_softcap: `z <- c * tanh(z / c)` on the student's logits before anything else.
        teacher_softcap: the same on the teacher's.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of rows to divide by in place of the number counted.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    A logit of -inf is a class of probability 0 (also under a softcap): it adds nothing and its gradient is 0.
    A class with teacher mass and student probability 0 gives inf, as the formula does.

    Raises:
        ValueError: shapes that do not fit, V that differs without vocab_size, alpha < 1 without labels, a teacher
            that requires a gradient, an option out of its range.
        TypeError: logits that are not floating, a mask that is not bool, labels that are not integers.
    """
    return _logits_loss(
        "soft_cross_entropy", reference.soft_cross_entropy,
        student_logits, teacher_logits, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size,
        student_softcap, teacher_softcap, reduction, num_items, backend,
    )  # fmt: skip


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Kullback-Leibler divergence between teacher and student: `sum p_t (log p_t - log p_s)`.

    `KL(p_t || p_s)` with `p = softmax(z / temperature)`, or `KL(p_s || p_t)` where `reverse` (arXiv 2306.08543); the
    item is a row.

    Args:
        student_logits: `(*, V)`.
        teacher_logits: `(*, V)`; its dtype may differ from the student's.
        reverse: KL(p_s || p_t), which seeks the teacher's modes, in place of KL(p_t || p_s).
        temperature: divides both sides' logits before the softmax.
        t_squared: multiply the soft part by temperature^2, so that its gradient keeps its size (arXiv 1503.02531).
        labels: `(*)` integer classes; the loss is then `alpha * soft + (1 - alpha) * CE(student at temperature 1)`.
        alpha: weight of the soft part, 0 to 1; below 1 it needs labels.
        ignore_index: rows with this label do not count at all.
        mask: `(*)` bool, True = counts.
        vocab_size: only the first so many classes take part; the others get gradient 0. Needed where V differs.
        student_softcap: `z <- c * tanh(z / c)` on the student's logits before anything else.
        teacher_softcap: the same on the teacher's.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of rows to divide by in place of the number counted.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    A logit of -inf is a class of probability 0 (also under a softcap): it adds nothing and its gradient is 0.
    A class with mass on the first side of the divergence and none on the second gives inf, as the formula does.

    Raises:
        ValueError: shapes that do not fit, V that differs without vocab_size, alpha < 1 without labels, a teacher
            that requires a gradient, an option out of its range.
        TypeError: logits that are not floating, a mask that is not bool, labels that are not integers.
    """
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse is {type(reverse).__name__}; it should be a bool")
    return _logits_loss(
        "reverse_kl" if reverse else "kl_div", reference.kl_div,
        student_logits, teacher_logits, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size,
        student_softcap, teacher_softcap, reduction, num_items, backend, reverse=reverse,
    )  # fmt: skip


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Generalised Jensen-Shannon divergence: `beta KL(p_t || m) + (1 - beta) KL(p_s || m)`.

    With `m = beta p_t + (1 - beta) p_s` and `p = softmax(z / temperature)` (GKD, arXiv 2306.13649, equation 1); beta 0
    is `KL(p_t || p_s)` and beta 1 `KL(p_s || p_t)`. The item is a row. At beta 0.5 it is symmetric and at most log 2.

    Args:
        student_logits: `(*, V)`.
        teacher_logits: `(*, V)`; its dtype may differ from the student's.
        beta: weight of the teacher in the mixture, 0 to 1.
        temperature: divides both sides' logits before the softmax.
        t_squared: multiply the soft part by temperature^2, so that its gradient keeps its size (arXiv 1503.02531).
        labels: `(*)` integer classes; the loss is then `alpha * soft + (1 - alpha) * CE(student at temperature 1)`.
        alpha: weight of the soft part, 0 to 1; below 1 it needs labels.
        ignore_index: rows with this label do not count at all.
        mask: `(*)` bool, True = counts.
        vocab_size: only the first so many classes take part; the others get gradient 0. Needed where V differs.
        student_softcap: `z <- c * tanh(z / c)` on the student's logits before anything else.
        teacher_softcap: the same on the teacher's.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of rows to divide by in place of the number counted.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    A logit of -inf is a class of probability 0 (also under a softcap): it adds nothing and its gradient is 0.

    Raises:
        ValueError: shapes that do not fit, V that differs without vocab_size, alpha < 1 without labels, a teacher
            that requires a gradient, an option out of its range.
        TypeError: logits that are not floating, a mask that is not bool, labels that are not integers.
    """
    check.fraction("beta", beta)
    return _logits_loss(
        _jsd_kind(beta), reference.jsd,
        student_logits, teacher_logits, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size,
        student_softcap, teacher_softcap, reduction, num_items, backend, beta=beta,
    )  # fmt: skip


def tvd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Total variation distance between teacher and student: `0.5 sum |p_t - p_s|`, between 0 and 1.

    With `p = softmax(z / temperature)`; the item is a row (f-distillation, arXiv 2307.15190). Where the two are equal
    the subgradient is 0.

    Args:
        student_logits: `(*, V)`.
        teacher_logits: `(*, V)`; its dtype may differ from the student's.
        temperature: divides both sides' logits before the softmax.
        t_squared: multiply the soft part by temperature^2, so that its gradient keeps its size (arXiv 1503.02531).
        labels: `(*)` integer classes; the loss is then `alpha * soft + (1 - alpha) * CE(student at temperature 1)`.
        alpha: weight of the soft part, 0 to 1; below 1 it needs labels.
        ignore_index: rows with this label do not count at all.
        mask: `(*)` bool, True = counts.
        vocab_size: only the first so many classes take part; the others get gradient 0. Needed where V differs.
        student_softcap: `z <- c * tanh(z / c)` on the student's logits before anything else.
        teacher_softcap: the same on the teacher's.
        reduction: "mean", "sum" or "none"; "none" returns `(*)`.
        num_items: number of rows to divide by in place of the number counted.
        backend: "auto", "reference", "torch", "triton" or "cuda".

    A logit of -inf is a class of probability 0 (also under a softcap): it adds nothing and its gradient is 0.

    Raises:
        ValueError: shapes that do not fit, V that differs without vocab_size, alpha < 1 without labels, a teacher
            that requires a gradient, an option out of its range.
        TypeError: logits that are not floating, a mask that is not bool, labels that are not integers.
    """
    return _logits_loss(
        "tvd", reference.tvd,
        student_logits, teacher_logits, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size,
        student_softcap, teacher_softcap, reduction, num_items, backend,
    )  # fmt: skip


def _jsd_kind(beta: float) -> str:
    return "kl_div" if beta == 0 else "reverse_kl" if beta == 1 else "jsd"


_TAILS = ("renormalize", "bucket")


def _check_topk(
    topk_logprobs: Tensor, topk_indices: Tensor, rows: tuple[int, ...], tail: str, temperature: float
) -> None:
    check.frozen(topk_logprobs=topk_logprobs)
    k = topk_logprobs.shape[-1] if topk_logprobs.dim() else 0
    check.shape("topk_logprobs", topk_logprobs, (*rows, k), "(*, k) with the student's leading dimensions")
    check.integers("topk_indices", topk_indices, (*rows, k), "the shape of topk_logprobs", topk_logprobs.device)
    if k == 0:
        raise ValueError("topk_logprobs has k = 0; it should hold at least one class a row")
    if tail not in _TAILS:
        raise ValueError(f"tail is {tail!r}; it should be 'renormalize' or 'bucket'")
    if tail == "bucket" and temperature != 1:
        raise ValueError(
            f"temperature is {temperature} with tail='bucket'; the bucket's mass is known at temperature 1 alone: use "
            "temperature=1.0 or tail='renormalize'"
        )


def topk_soft_cross_entropy(
    student_logits: Tensor,
    topk_logprobs: Tensor,
    topk_indices: Tensor,
    *,
    tail: str = "renormalize",
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Soft cross-entropy against the k most likely classes of an offline teacher.

    With `tail="renormalize"` the k classes are the teacher's whole distribution: their log-probabilities are divided
    by the temperature and normalised again. With `tail="bucket"` (temperature 1) the teacher's remaining mass is one
    more class, compared with the student's remaining mass. The item is a row.

    Args:
        student_logits: `(*, V)`.
        topk_logprobs: `(*, k)` log-probabilities at temperature 1; -inf pads a row with fewer classes. In the list a
            class of -inf is one of probability 0, and so is no part of the bucket: pad with classes that cannot be.
        topk_indices: `(*, k)` integer classes of them, distinct within a row.
        tail: "renormalize" or "bucket".
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, reduction, num_items,
            backend: as in `soft_cross_entropy`.

    Raises:
        ValueError: shapes that do not fit, an unknown tail, "bucket" with a temperature other than 1, and what
            `soft_cross_entropy` raises.
        TypeError: indices that are not integers, and what `soft_cross_entropy` raises.
        IndexError: on the CPU, an index outside the classes.
    """
    check.floating(student_logits=student_logits, topk_logprobs=topk_logprobs)
    if student_logits.dim() < 1:
        raise ValueError("student_logits is a scalar; it should be (*, V)")
    rows = tuple(student_logits.shape[:-1])
    counted = _check_rows(
        rows, student_logits.shape[-1], student_logits.device, temperature, t_squared, labels, alpha, ignore_index,
        mask, vocab_size, reduction, num_items,
    )  # fmt: skip
    _check_topk(topk_logprobs, topk_indices, rows, tail, temperature)
    _check_softcaps(student_softcap=student_softcap)
    backend = pick_backend(backend, student_logits.device)

    with _no_autocast(student_logits):
        if backend == "reference":
            return reference.topk_soft_cross_entropy(
                student_logits, topk_logprobs, topk_indices, tail=tail, temperature=temperature, t_squared=t_squared,
                labels=labels, alpha=alpha, ignore_index=ignore_index, mask=mask, vocab_size=vocab_size,
                student_softcap=student_softcap, reduction=reduction, num_items=num_items,
            )  # fmt: skip
        count = _row_count(student_logits, counted, reduction, num_items)
        per_row = topk_divergence(
            student_logits,
            topk_logprobs,
            topk_indices,
            tail,
            counted=counted,
            labels=labels,
            temperature=temperature,
            soft_weight=_soft_weight(temperature, t_squared, labels, alpha),
            hard_weight=0.0 if labels is None else 1 - alpha,
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            row_gradient=_row_gradient(student_logits, reduction, count, backend),
            backend=backend,
        )
        return _reduced(per_row, reduction, count)


# -- logits straight from hidden states and vocabulary weights -----------------------------------------------


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() < 1:
        raise ValueError(f"{side} is a scalar; it should be (*, d)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight has shape {tuple(weight.shape)}; it should be (V, {hidden.shape[-1]}), as in "
            "nn.Linear(d, V).weight"
        )
    if bias is not None:
        check.shape(f"{side}_bias", bias, (weight.shape[0],), "(V)")


def _linear_logits_loss(
    kind: str,
    definition: Callable[..., Tensor],
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    temperature: float,
    t_squared: bool,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    mask: Tensor | None,
    vocab_size: int | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    reduction: str,
    num_items: int | Tensor | None,
    backend: str,
    **options: Any,
) -> Tensor:
    check.floating(
        student=student, student_weight=student_weight, teacher=teacher, teacher_weight=teacher_weight,
        **check.given(student_bias=student_bias, teacher_bias=teacher_bias),
    )  # fmt: skip
    check.frozen(teacher=teacher, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    _check_head("student", student, student_weight, student_bias)
    _check_head("teacher", teacher, teacher_weight, teacher_bias)
    rows = tuple(student.shape[:-1])
    check.shape("teacher", teacher, (*rows, teacher.shape[-1]), "(*, d_t) with the student's leading dimensions")
    if vocab_size is None and teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight has {teacher_weight.shape[0]} classes and student_weight {student_weight.shape[0]}; pass "
            "vocab_size, the number of classes that both share, if the rest is padding"
        )
    counted = _check_rows(
        rows, min(student_weight.shape[0], teacher_weight.shape[0]), student.device, temperature, t_squared, labels,
        alpha, ignore_index, mask, vocab_size, reduction, num_items,
    )  # fmt: skip
    _check_softcaps(student_softcap=student_softcap, teacher_softcap=teacher_softcap)
    backend = pick_backend(backend, student.device)

    student, student_weight, student_bias = _autocast(student, student_weight, student_bias)
    teacher, teacher_weight, teacher_bias = _autocast(teacher, teacher_weight, teacher_bias)
    check.same_dtype(student=student, student_weight=student_weight, student_bias=student_bias)
    check.same_dtype(teacher=teacher, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    with _no_autocast(student):
        if backend == "reference":
            return definition(
                student, student_weight, teacher, teacher_weight, student_bias=student_bias, teacher_bias=teacher_bias,
                temperature=temperature, t_squared=t_squared, labels=labels, alpha=alpha, ignore_index=ignore_index,
                mask=mask, vocab_size=vocab_size, student_softcap=student_softcap, teacher_softcap=teacher_softcap,
                reduction=reduction, num_items=num_items, **options,
            )  # fmt: skip
        loss = linear_divergence(
            student.reshape(-1, student.shape[-1]),
            student_weight,
            teacher.reshape(-1, teacher.shape[-1]),
            teacher_weight,
            student_bias,
            teacher_bias,
            kind,
            counted=None if counted is None else counted.reshape(-1),
            labels=None if labels is None else labels.reshape(-1),
            temperature=temperature,
            soft_weight=_soft_weight(temperature, t_squared, labels, alpha),
            hard_weight=0.0 if labels is None else 1 - alpha,
            beta=options.get("beta", 0.5),
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            per_row=reduction == "none",
            backend=backend,
        )
        return _linear_reduced(loss, rows, student, counted, reduction, num_items)


def _linear_reduced(
    loss: Tensor,  # () or (N)
    rows: tuple[int, ...],
    student: Tensor,
    counted: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    if reduction == "none":
        return loss.view(rows)
    if reduction == "sum":
        return loss
    if num_items is None:
        num_items = student.numel() // max(student.shape[-1], 1) if counted is None else counted.sum()
    return _mean(loss, num_items)


def linear_soft_cross_entropy(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`soft_cross_entropy` of the logits `x @ W.T + b` of each side, neither `(*, V)` tensor ever stored whole.

    The logits reach the loss in float32, not rounded to a narrower input dtype on the way.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        teacher: `(*, d_t)`.
        teacher_weight: `(V, d_t)`.
        student_bias: `(V)` or None.
        teacher_bias: `(V)` or None.
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
            reduction, num_items, backend: as in `soft_cross_entropy`.

    Raises:
        ValueError: weights or biases that do not fit, and what `soft_cross_entropy` raises.
        TypeError: hidden states, weight and bias of one side in several dtypes outside autocast, and what
            `soft_cross_entropy` raises.
    """
    return _linear_logits_loss(
        "soft_cross_entropy", reference.linear_soft_cross_entropy,
        student, student_weight, teacher, teacher_weight, student_bias, teacher_bias,
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
        reduction, num_items, backend,
    )  # fmt: skip


def linear_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reverse: bool = False,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`kl_div` of the logits `x @ W.T + b` of each side, neither `(*, V)` tensor ever stored whole.

    The logits reach the loss in float32, not rounded to a narrower input dtype on the way.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        teacher: `(*, d_t)`.
        teacher_weight: `(V, d_t)`.
        student_bias: `(V)` or None.
        teacher_bias: `(V)` or None.
        reverse, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap,
            teacher_softcap, reduction, num_items, backend: as in `kl_div`.

    Raises:
        ValueError: weights or biases that do not fit, and what `kl_div` raises.
        TypeError: hidden states, weight and bias of one side in several dtypes outside autocast, and what
            `kl_div` raises.
    """
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse is {type(reverse).__name__}; it should be a bool")
    return _linear_logits_loss(
        "reverse_kl" if reverse else "kl_div", reference.linear_kl_div,
        student, student_weight, teacher, teacher_weight, student_bias, teacher_bias,
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
        reduction, num_items, backend, reverse=reverse,
    )  # fmt: skip


def linear_jsd(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`jsd` of the logits `x @ W.T + b` of each side, neither `(*, V)` tensor ever stored whole.

    The logits reach the loss in float32, not rounded to a narrower input dtype on the way.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        teacher: `(*, d_t)`.
        teacher_weight: `(V, d_t)`.
        student_bias: `(V)` or None.
        teacher_bias: `(V)` or None.
        beta, temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
            reduction, num_items, backend: as in `jsd`.

    Raises:
        ValueError: weights or biases that do not fit, and what `jsd` raises.
        TypeError: hidden states, weight and bias of one side in several dtypes outside autocast, and what
            `jsd` raises.
    """
    check.fraction("beta", beta)
    return _linear_logits_loss(
        _jsd_kind(beta), reference.linear_jsd,
        student, student_weight, teacher, teacher_weight, student_bias, teacher_bias,
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
        reduction, num_items, backend, beta=beta,
    )  # fmt: skip


def linear_tvd(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`tvd` of the logits `x @ W.T + b` of each side, neither `(*, V)` tensor ever stored whole.

    The logits reach the loss in float32, not rounded to a narrower input dtype on the way.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        teacher: `(*, d_t)`.
        teacher_weight: `(V, d_t)`.
        student_bias: `(V)` or None.
        teacher_bias: `(V)` or None.
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
            reduction, num_items, backend: as in `tvd`.

    Raises:
        ValueError: weights or biases that do not fit, and what `tvd` raises.
        TypeError: hidden states, weight and bias of one side in several dtypes outside autocast, and what
            `tvd` raises.
    """
    return _linear_logits_loss(
        "tvd", reference.linear_tvd,
        student, student_weight, teacher, teacher_weight, student_bias, teacher_bias,
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, teacher_softcap,
        reduction, num_items, backend,
    )  # fmt: skip


def linear_topk_soft_cross_entropy(
    student: Tensor,
    student_weight: Tensor,
    topk_logprobs: Tensor,
    topk_indices: Tensor,
    *,
    student_bias: Tensor | None = None,
    tail: str = "renormalize",
    temperature: float = 1.0,
    t_squared: bool = False,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`topk_soft_cross_entropy` of the logits `student @ student_weight.T + student_bias`, never stored whole.

    Args:
        student: `(*, d_s)` hidden states before the vocabulary head.
        student_weight: `(V, d_s)`.
        topk_logprobs: `(*, k)` log-probabilities at temperature 1; -inf pads a row with fewer classes. In the list a
            class of -inf is one of probability 0, and so is no part of the bucket: pad with classes that cannot be.
        topk_indices: `(*, k)` integer classes of them, distinct within a row.
        student_bias: `(V)` or None.
        tail: "renormalize" or "bucket".
        temperature, t_squared, labels, alpha, ignore_index, mask, vocab_size, student_softcap, reduction, num_items,
            backend: as in `soft_cross_entropy`.

    Raises:
        ValueError: a weight or bias that does not fit, and what `topk_soft_cross_entropy` raises.
        TypeError: hidden states, weight and bias in several dtypes outside autocast, and what
            `topk_soft_cross_entropy` raises.
        IndexError: on the CPU, an index outside the classes.
    """
    check.floating(
        student=student,
        student_weight=student_weight,
        topk_logprobs=topk_logprobs,
        **check.given(student_bias=student_bias),
    )
    _check_head("student", student, student_weight, student_bias)
    rows = tuple(student.shape[:-1])
    counted = _check_rows(
        rows, student_weight.shape[0], student.device, temperature, t_squared, labels, alpha, ignore_index, mask,
        vocab_size, reduction, num_items,
    )  # fmt: skip
    _check_topk(topk_logprobs, topk_indices, rows, tail, temperature)
    _check_softcaps(student_softcap=student_softcap)
    backend = pick_backend(backend, student.device)

    student, student_weight, student_bias = _autocast(student, student_weight, student_bias)
    check.same_dtype(student=student, student_weight=student_weight, student_bias=student_bias)
    with _no_autocast(student):
        if backend == "reference":
            return reference.linear_topk_soft_cross_entropy(
                student, student_weight, topk_logprobs, topk_indices, student_bias=student_bias, tail=tail,
                temperature=temperature, t_squared=t_squared, labels=labels, alpha=alpha, ignore_index=ignore_index,
                mask=mask, vocab_size=vocab_size, student_softcap=student_softcap, reduction=reduction,
                num_items=num_items,
            )  # fmt: skip
        loss = linear_topk_divergence(
            student.reshape(-1, student.shape[-1]),
            student_weight,
            student_bias,
            topk_logprobs.reshape(-1, topk_logprobs.shape[-1]),
            topk_indices.reshape(-1, topk_indices.shape[-1]),
            tail,
            counted=None if counted is None else counted.reshape(-1),
            labels=None if labels is None else labels.reshape(-1),
            temperature=temperature,
            soft_weight=_soft_weight(temperature, t_squared, labels, alpha),
            hard_weight=0.0 if labels is None else 1 - alpha,
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            per_row=reduction == "none",
            backend=backend,
        )
        return _linear_reduced(loss, rows, student, counted, reduction, num_items)
