"""Calls other libraries' implementations of the same losses, as their documentation says.

Each function imports its package when it is called: the benchmark reports a missing one and continues. All take the
mean over rows at temperature 1, as `bench.eager` does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Implementation


def _liger_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    # It takes log-probabilities, so computing them is part of the loss.
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(student.log_softmax(-1), teacher.log_softmax(-1))


def _liger_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=0.5)(student.log_softmax(-1), teacher.log_softmax(-1))


def _liger_tvd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerTVDLoss

    return LigerTVDLoss(reduction="batchmean")(student.softmax(-1), teacher.softmax(-1))


def _trl_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5)


def _torch_linear_cross_entropy(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.linear(teacher, teacher_weight).softmax(-1)
    return F.linear_cross_entropy(student, weight, target)


def _torch_linear_cross_entropy_in_chunks(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Tensor:
    with torch.no_grad():
        target = F.linear(teacher, teacher_weight).softmax(-1)
    return F.linear_cross_entropy(student, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _liger_linear_jsd(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)(student, weight, teacher, teacher_weight)


def _liger_linear_kl(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(
        student, weight, teacher, teacher_weight
    )  # forward KL by its documentation


def _liger_chunked_jsd(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)  # required, but of weight 0
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return loss(student, weight, teacher, teacher_weight, labels)


def _fla_linear_kl(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    from fla.modules import FusedKLDivLoss

    return FusedKLDivLoss()(student, teacher, weight, teacher_weight)


PEERS = {
    "kl_div": [Implementation("liger-kernel kl_div", _liger_kl_div, "liger-kernel", needs_gpu=True)],
    "jsd": [
        Implementation("liger-kernel jsd", _liger_jsd, "liger-kernel", needs_gpu=True),
        Implementation("trl jsd", _trl_jsd, "trl"),
    ],
    "tvd": [Implementation("liger-kernel tvd", _liger_tvd, "liger-kernel", needs_gpu=True)],
    "linear_soft_cross_entropy": [
        Implementation("F.linear_cross_entropy", _torch_linear_cross_entropy, "torch>=2.13"),
        Implementation("F.linear_cross_entropy chunked", _torch_linear_cross_entropy_in_chunks, "torch>=2.13"),
    ],
    "linear_kl_div": [
        Implementation("liger-kernel fused linear jsd, beta 0", _liger_linear_kl, "liger-kernel", needs_gpu=True),
        Implementation("fla-core fused kl", _fla_linear_kl, "fla-core", needs_gpu=True),
    ],
    "linear_jsd": [
        Implementation("liger-kernel fused linear jsd", _liger_linear_jsd, "liger-kernel", needs_gpu=True),
        Implementation("liger-kernel chunked jsd", _liger_chunked_jsd, "liger-kernel"),
    ],
}
PACKAGES = ("liger-kernel", "fla-core", "trl")
