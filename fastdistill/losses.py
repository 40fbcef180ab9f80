"""The losses as nn.Modules over `fastdistill.functional`: the constructor takes the options, forward the tensors.

What a forward takes and raises is documented at the function of the same name.
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
    """Keeps the options; a repr that shows them."""

    function: Callable[..., Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - inspect.signature(self.function).parameters.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearMSELoss(_Loss):
    """`linear_mse` with a projection of its own, `.projection`: train it with the student and save it.

    Args:
        student_dim: d_s. teacher_dim: d_t. bias: give the projection a bias, as TinyBERT's code does.
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
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        weight, bias = self.projection.weight, self.projection.bias
        return self.function(student, weight, teacher, bias, mask=mask, num_items=num_items, **self.options)


class _AttentionLoss(_Loss):
    def __init__(
        self,
        *,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        is_causal: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            is_causal=is_causal,
            reduction=reduction,
            backend=backend,
        )

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
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return self.function(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            key_mask=key_mask,
            query_mask=query_mask,
            attn_mask=attn_mask,
            num_items=num_items,
            **self.options,
        )


class AttentionMSELoss(_AttentionLoss):
    """`fastdistill.attention_mse` with its scales, causality, reduction and backend fixed."""

    function = staticmethod(F.attention_mse)


class AttentionKLLoss(_AttentionLoss):
    """`fastdistill.attention_kl` with its scales, causality, reduction and backend fixed."""

    function = staticmethod(F.attention_kl)


class _ClassesLoss(_Loss):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        t_squared: bool = False,
        alpha: float = 1.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        student_softcap: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        **more: Any,
    ) -> None:
        super().__init__(
            temperature=temperature,
            t_squared=t_squared,
            alpha=alpha,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            reduction=reduction,
            backend=backend,
            **more,
        )


class _LogitsLoss(_ClassesLoss):
    def __init__(self, *, teacher_softcap: float | None = None, **options: Any) -> None:
        super().__init__(teacher_softcap=teacher_softcap, **options)

    def forward(
        self,
        student_logits: Tensor,  # (*, V)
        teacher_logits: Tensor,  # (*, V)
        *,
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return self.function(
            student_logits, teacher_logits, labels=labels, mask=mask, num_items=num_items, **self.options
        )


class _LinearLogitsLoss(_ClassesLoss):
    def __init__(self, *, teacher_softcap: float | None = None, **options: Any) -> None:
        super().__init__(teacher_softcap=teacher_softcap, **options)

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
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return self.function(
            student,
            student_weight,
            teacher,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=labels,
            mask=mask,
            num_items=num_items,
            **self.options,
        )


class SoftCrossEntropyLoss(_LogitsLoss):
    """`fastdistill.soft_cross_entropy` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.soft_cross_entropy)


class KLDivLoss(_LogitsLoss):
    """`fastdistill.kl_div` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.kl_div)

    def __init__(self, *, reverse: bool = False, **options: Any) -> None:
        super().__init__(reverse=reverse, **options)


class JSDLoss(_LogitsLoss):
    """`fastdistill.jsd` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.jsd)

    def __init__(self, *, beta: float = 0.5, **options: Any) -> None:
        super().__init__(beta=beta, **options)


class TVDLoss(_LogitsLoss):
    """`fastdistill.tvd` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.tvd)


class LinearSoftCrossEntropyLoss(_LinearLogitsLoss):
    """`fastdistill.linear_soft_cross_entropy` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.linear_soft_cross_entropy)


class LinearKLDivLoss(_LinearLogitsLoss):
    """`fastdistill.linear_kl_div` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.linear_kl_div)

    def __init__(self, *, reverse: bool = False, **options: Any) -> None:
        super().__init__(reverse=reverse, **options)


class LinearJSDLoss(_LinearLogitsLoss):
    """`fastdistill.linear_jsd` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.linear_jsd)

    def __init__(self, *, beta: float = 0.5, **options: Any) -> None:
        super().__init__(beta=beta, **options)


class LinearTVDLoss(_LinearLogitsLoss):
    """`fastdistill.linear_tvd` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.linear_tvd)


class _TopKLoss(_ClassesLoss):
    def __init__(self, *, tail: str = "renormalize", **options: Any) -> None:
        super().__init__(tail=tail, **options)


class TopKSoftCrossEntropyLoss(_TopKLoss):
    """`fastdistill.topk_soft_cross_entropy` with its options fixed; tensors, labels and masks come with the call."""

    function = staticmethod(F.topk_soft_cross_entropy)

    def forward(
        self,
        student_logits: Tensor,  # (*, V)
        topk_logprobs: Tensor,  # (*, k)
        topk_indices: Tensor,  # (*, k)
        *,
        labels: Tensor | None = None,  # (*)
        mask: Tensor | None = None,  # (*)
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return self.function(
            student_logits, topk_logprobs, topk_indices, labels=labels, mask=mask, num_items=num_items, **self.options
        )


class LinearTopKSoftCrossEntropyLoss(_TopKLoss):
    """`fastdistill.linear_topk_soft_cross_entropy` with its options fixed."""

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
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        return self.function(
            student,
            student_weight,
            topk_logprobs,
            topk_indices,
            student_bias=student_bias,
            labels=labels,
            mask=mask,
            num_items=num_items,
            **self.options,
        )
