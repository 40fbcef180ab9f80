"""The losses as nn.Modules over `fastdistill.functional`: the constructor takes the options, forward the tensors.

The function of the same name documents what a forward takes and raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import functional as F
from ._checks import Backend, Reduction, Tail, Total

__all__ = [
    "AttentionKLLoss", "AttentionMSELoss", "JSDLoss", "KLDivLoss", "LinearJSDLoss", "LinearKLDivLoss", "LinearMSELoss",
    "LinearSoftCrossEntropyLoss", "LinearTVDLoss", "LinearTopKSoftCrossEntropyLoss", "SoftCrossEntropyLoss", "TVDLoss",
    "TopKSoftCrossEntropyLoss",
]  # fmt: skip

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class AttentionOptions(TypedDict, total=False):
        student_scale: float | None
        teacher_scale: float | None
        is_causal: bool
        window: tuple[int | None, int | None] | None
        reduction: Total
        backend: Backend

    class StudentOptions(TypedDict, total=False):
        temperature: float
        t_squared: bool
        alpha: float
        ignore_index: int
        vocab_size: int | None
        student_softcap: float | None
        student_logit_scale: float
        reduction: Reduction
        backend: Backend

    class TopKOptions(StudentOptions, total=False):
        tail: Tail
        reverse: bool

    class ClassOptions(StudentOptions, total=False):
        teacher_softcap: float | None
        teacher_logit_scale: float

    class KLOptions(ClassOptions, total=False):
        reverse: bool
        skew: float

    class JSDOptions(ClassOptions, total=False):
        beta: float


class _Loss(nn.Module):
    """Calls `function` with the options given to the constructor and the tensors given to forward.

    Options are the keywords of `function` that are no tensors; the repr shows them.
    """

    __call__: Callable[..., Tensor]  # for type checkers: nn.Module's returns Any
    function: Callable[..., Tensor]
    defaults: dict[str, Any]

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None) -> None:
        """Gives a class with a function its options, and the signatures that `help` shows. Subclasses inherit them."""
        super().__init_subclass__()
        if function is None:
            return
        cls.function = staticmethod(function)
        parameters = inspect.signature(function).parameters.values()
        tensors = [p for p in parameters if "Tensor" in p.annotation]
        options = [p for p in parameters if "Tensor" not in p.annotation]
        cls.defaults = {p.name: p.default for p in options}
        if "__init__" not in vars(cls):
            cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        if "forward" not in vars(cls):

            def forward(self: _Loss, *tensors: Tensor, **keywords: Tensor | None) -> Tensor:
                return self.function(*tensors, **keywords, **self.options)

            own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
            signature = inspect.Signature([own, *tensors], return_annotation="Tensor")
            forward.__signature__ = signature  # type: ignore[attr-defined]
            cls.forward = forward

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - self.defaults.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.options = self.defaults | options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearMSELoss(_Loss, function=F.linear_mse):
    """Computes `linear_mse` with a projection of its own, `.projection`: train it with the student and save it.

    Args:
        student_dim: d_s.
        teacher_dim: d_t.
        bias: give the projection a bias, as TinyBERT's code does.
        reduction, backend: as in `fastdistill.linear_mse`.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        bias: bool = True,
        *,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(reduction=reduction, backend=backend)
        self.projection = nn.Linear(student_dim, teacher_dim, bias=bias)

    def forward(
        self, student: Tensor, teacher: Tensor, *,
        mask: Tensor | None = None, item_weights: Tensor | None = None, num_items: int | float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        weight, bias = self.projection.weight, self.projection.bias
        given = {"mask": mask, "item_weights": item_weights, "num_items": num_items}
        return self.function(student, weight, teacher, bias, **given, **self.options)


# The options of each family, for type checkers.


class _AttentionLoss(_Loss):
    def __init__(self, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(**options)


class _ClassLoss(_Loss):
    def __init__(self, **options: Unpack[ClassOptions]) -> None:
        super().__init__(**options)


class _KLLoss(_Loss):
    def __init__(self, **options: Unpack[KLOptions]) -> None:
        super().__init__(**options)


class _JSDLoss(_Loss):
    def __init__(self, **options: Unpack[JSDOptions]) -> None:
        super().__init__(**options)


class _TopKLoss(_Loss):
    def __init__(self, **options: Unpack[TopKOptions]) -> None:
        super().__init__(**options)


class AttentionMSELoss(_AttentionLoss, function=F.attention_mse):
    """Computes `fastdistill.attention_mse` with its options fixed."""


class AttentionKLLoss(_AttentionLoss, function=F.attention_kl):
    """Computes `fastdistill.attention_kl` with its options fixed."""


class SoftCrossEntropyLoss(_ClassLoss, function=F.soft_cross_entropy):
    """Computes `fastdistill.soft_cross_entropy` with its options fixed."""


class KLDivLoss(_KLLoss, function=F.kl_div):
    """Computes `fastdistill.kl_div` with its options fixed."""


class JSDLoss(_JSDLoss, function=F.jsd):
    """Computes `fastdistill.jsd` with its options fixed."""


class TVDLoss(_ClassLoss, function=F.tvd):
    """Computes `fastdistill.tvd` with its options fixed."""


class TopKSoftCrossEntropyLoss(_TopKLoss, function=F.topk_soft_cross_entropy):
    """Computes `fastdistill.topk_soft_cross_entropy` with its options fixed."""


class LinearSoftCrossEntropyLoss(_ClassLoss, function=F.linear_soft_cross_entropy):
    """Computes `fastdistill.linear_soft_cross_entropy` with its options fixed."""


class LinearKLDivLoss(_KLLoss, function=F.linear_kl_div):
    """Computes `fastdistill.linear_kl_div` with its options fixed."""


class LinearJSDLoss(_JSDLoss, function=F.linear_jsd):
    """Computes `fastdistill.linear_jsd` with its options fixed."""


class LinearTVDLoss(_ClassLoss, function=F.linear_tvd):
    """Computes `fastdistill.linear_tvd` with its options fixed."""


class LinearTopKSoftCrossEntropyLoss(_TopKLoss, function=F.linear_topk_soft_cross_entropy):
    """Computes `fastdistill.linear_topk_soft_cross_entropy` with its options fixed."""
