"""Knowledge-distillation losses for PyTorch that stay low on memory, and TinyBERT's two-stage distillation.

The losses (functions and modules) are here and need torch and numpy alone. The trainer lives in
`fastdistill.train.trainer` and `fastdistill.train.stages`, with the extra `fastdistill[train]`.
"""

from fastdistill.functional import (
    attention_kl,
    attention_mse,
    jsd,
    kl_div,
    linear_jsd,
    linear_kl_div,
    linear_mse,
    linear_soft_cross_entropy,
    linear_topk_soft_cross_entropy,
    linear_tvd,
    soft_cross_entropy,
    topk_soft_cross_entropy,
    tvd,
)
from fastdistill.losses import (
    AttentionKLLoss,
    AttentionMSELoss,
    JSDLoss,
    KLDivLoss,
    LinearJSDLoss,
    LinearKLDivLoss,
    LinearMSELoss,
    LinearSoftCrossEntropyLoss,
    LinearTopKSoftCrossEntropyLoss,
    LinearTVDLoss,
    SoftCrossEntropyLoss,
    TopKSoftCrossEntropyLoss,
    TVDLoss,
)

__version__ = "0.1.0"

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
