"""The losses as nn.Modules over `fastdistill.functional`: the constructor takes the options, forward the tensors.

The function of the same name documents what a forward takes and raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdistill import functional as F

__all__ = [
    "AttentionKLLoss",
    "AttentionMSELoss",
    "JSDLoss",
    "KLDivLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "LinearMSELoss",
    "LinearSoftCrossEntropyLoss",
    "LinearTVDLoss",
    "LinearTopKSoftCrossEntropyLoss",
    "SoftCrossEntropyLoss",
    "TVDLoss",
    "TopKSoftCrossEntropyLoss",
]


class _Loss(nn.Module):
    """Keeps the options of `function`: its keywords that forward does not take. The repr shows them."""

    function: Callable[..., Tensor]
    defaults: dict[str, Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "function" in vars(cls):
            tensors = inspect.signature(cls.forward).parameters
            keywords = [p for p in inspect.signature(cls.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
            options = [p for p in keywords if p.name not in tensors]
            cls.defaults = {p.name: p.default for p in options}
            if cls.__init__ is _Loss.__init__:
                cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - self.defaults.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.options = self.defaults | options

    def _loss(self, *tensors: Tensor | None, **keywords: Any) -> Tensor:
        return self.function(*tensors, **keywords, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearMSELoss(_Loss):
    """Computes `linear_mse` with a projection of its own, `.projection`: train it with the student and save it.

    Args:
        student_dim: d_s.
        teacher_dim: d_t.
        bias: give the projection a bias, as TinyBERT's code does.
        reduction, backend: as in `fastdistill.linear_mse`.
    """

    function = staticmethod(F.linear_mse)

    def __init__(
        self, student_dim: int, teacher_dim: int, bias: bool = True, *, reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__(reduction=reduction, backend=backend)
        self.projection = nn.Linear(student_dim, teacher_dim, bias=bias)

    def forward(
        self,
        student: Tensor,  # (*, d_s)
        teacher: Tensor,  # (*, d_t)
        *,
        mask: Tensor | None = None,  # (*)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        weight, bias = self.projection.weight, self.projection.bias
        return self._loss(student, weight, teacher, bias, mask=mask, num_items=num_items)


class _AttentionLoss(_Loss):
    def forward(
        self,
        student_query: Tensor,  # (B, H, L, D_s)
        student_key: Tensor,  # (B, H_kv, S, D_s)
        teacher_query: Tensor,  # (B, H, L, D_t)
        teacher_key: Tensor,  # (B, H_kv_t, S, D_t)
        *,
        key_mask: Tensor | None = None,  # (B, S)
        query_mask: Tensor | None = None,  # (B, L)
        attn_mask: Tensor | None = None,  # broadcastable to (B, H, L, S)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        masks = {"key_mask": key_mask, "query_mask": query_mask, "attn_mask": attn_mask}
        return self._loss(student_query, student_key, teacher_query, teacher_key, num_items=num_items, **masks)


class _LogitsLoss(_Loss):
    def forward(
        self,
        student_logits: Tensor,  # (*, V)
        teacher_logits: Tensor,  # (*, V)
        *,
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(student_logits, teacher_logits, labels=labels, mask=mask, num_items=num_items)


class _LinearLogitsLoss(_Loss):
    def forward(
        self,
        student: Tensor,  # (*, d_s)
        student_weight: Tensor,  # (V, d_s)
        teacher: Tensor,  # (*, d_t)
        teacher_weight: Tensor,  # (V, d_t)
        *,
        student_bias: Tensor | None = None,  # (V)
        teacher_bias: Tensor | None = None,  # (V)
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        tensors = (student, student_weight, teacher, teacher_weight)
        rows = {"labels": labels, "mask": mask, "num_items": num_items}
        return self._loss(*tensors, student_bias=student_bias, teacher_bias=teacher_bias, **rows)


class AttentionMSELoss(_AttentionLoss):
    """Computes `fastdistill.attention_mse` with its options fixed."""

    function = staticmethod(F.attention_mse)


class AttentionKLLoss(_AttentionLoss):
    """Computes `fastdistill.attention_kl` with its options fixed."""

    function = staticmethod(F.attention_kl)


class SoftCrossEntropyLoss(_LogitsLoss):
    """Computes `fastdistill.soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.soft_cross_entropy)


class KLDivLoss(_LogitsLoss):
    """Computes `fastdistill.kl_div` with its options fixed."""

    function = staticmethod(F.kl_div)


class JSDLoss(_LogitsLoss):
    """Computes `fastdistill.jsd` with its options fixed."""

    function = staticmethod(F.jsd)


class TVDLoss(_LogitsLoss):
    """Computes `fastdistill.tvd` with its options fixed."""

    function = staticmethod(F.tvd)


class LinearSoftCrossEntropyLoss(_LinearLogitsLoss):
    """Computes `fastdistill.linear_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.linear_soft_cross_entropy)


class LinearKLDivLoss(_LinearLogitsLoss):
    """Computes `fastdistill.linear_kl_div` with its options fixed."""

    function = staticmethod(F.linear_kl_div)


class LinearJSDLoss(_LinearLogitsLoss):
    """Computes `fastdistill.linear_jsd` with its options fixed."""

    function = staticmethod(F.linear_jsd)


class LinearTVDLoss(_LinearLogitsLoss):
    """Computes `fastdistill.linear_tvd` with its options fixed."""

    function = staticmethod(F.linear_tvd)


class TopKSoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.topk_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.topk_soft_cross_entropy)

    def forward(
        self,
        student_logits: Tensor,  # (*, V)
        topk_logprobs: Tensor,  # (*, k)
        topk_indices: Tensor,  # (*, k)
        *,
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        tensors = (student_logits, topk_logprobs, topk_indices)
        return self._loss(*tensors, labels=labels, mask=mask, num_items=num_items)


class LinearTopKSoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.linear_topk_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.linear_topk_soft_cross_entropy)

    def forward(
        self,
        student: Tensor,  # (*, d_s)
        student_weight: Tensor,  # (V, d_s)
        topk_logprobs: Tensor,  # (*, k)
        topk_indices: Tensor,  # (*, k)
        *,
        student_bias: Tensor | None = None,  # (V)
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | float | Tensor | None = None,
    ) -> Tensor:
        tensors = (student, student_weight, topk_logprobs, topk_indices)
        return self._loss(*tensors, student_bias=student_bias, labels=labels, mask=mask, num_items=num_items)
