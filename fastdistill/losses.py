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
    """Calls `function` with the options given to the constructor and the tensors given to forward.

    Options are the keywords of `function` that are no tensors; the repr shows them.
    """

    function: Callable[..., Tensor]
    defaults: dict[str, Any]

    def __init_subclass__(cls) -> None:
        """Gives a class with a function its options, and the signatures that `help` shows. Subclasses inherit them."""
        super().__init_subclass__()
        if "function" not in vars(cls):
            return
        parameters = inspect.signature(cls.function).parameters.values()
        tensors = [p for p in parameters if "Tensor" in p.annotation]
        options = [p for p in parameters if "Tensor" not in p.annotation]
        cls.defaults = {p.name: p.default for p in options}
        if "__init__" not in vars(cls):
            cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        if "forward" not in vars(cls):
            cls.forward = _forward_of(tensors)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - self.defaults.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.options = self.defaults | options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _forward_of(tensors: list[inspect.Parameter]) -> Any:
    """Returns a forward whose signature lists the tensors."""

    def forward(self: _Loss, *tensors: Tensor, **keywords: Tensor | None) -> Tensor:
        return self.function(*tensors, **keywords, **self.options)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([own, *tensors], return_annotation="Tensor")  # type: ignore[attr-defined]
    return forward


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
        return self.function(student, weight, teacher, bias, mask=mask, num_items=num_items, **self.options)


class AttentionMSELoss(_Loss):
    """Computes `fastdistill.attention_mse` with its options fixed."""

    function = staticmethod(F.attention_mse)


class AttentionKLLoss(_Loss):
    """Computes `fastdistill.attention_kl` with its options fixed."""

    function = staticmethod(F.attention_kl)


class SoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.soft_cross_entropy)


class KLDivLoss(_Loss):
    """Computes `fastdistill.kl_div` with its options fixed."""

    function = staticmethod(F.kl_div)


class JSDLoss(_Loss):
    """Computes `fastdistill.jsd` with its options fixed."""

    function = staticmethod(F.jsd)


class TVDLoss(_Loss):
    """Computes `fastdistill.tvd` with its options fixed."""

    function = staticmethod(F.tvd)


class TopKSoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.topk_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.topk_soft_cross_entropy)


class LinearSoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.linear_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.linear_soft_cross_entropy)


class LinearKLDivLoss(_Loss):
    """Computes `fastdistill.linear_kl_div` with its options fixed."""

    function = staticmethod(F.linear_kl_div)


class LinearJSDLoss(_Loss):
    """Computes `fastdistill.linear_jsd` with its options fixed."""

    function = staticmethod(F.linear_jsd)


class LinearTVDLoss(_Loss):
    """Computes `fastdistill.linear_tvd` with its options fixed."""

    function = staticmethod(F.linear_tvd)


class LinearTopKSoftCrossEntropyLoss(_Loss):
    """Computes `fastdistill.linear_topk_soft_cross_entropy` with its options fixed."""

    function = staticmethod(F.linear_topk_soft_cross_entropy)
