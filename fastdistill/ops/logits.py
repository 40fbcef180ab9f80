from __future__ import annotations

from typing import Any

import torch

from fastdistill import reference


def divergence(s, t, kind, *, counted, labels, temperature, soft_weight, hard_weight, beta, vocab_size, student_softcap, teacher_softcap) -> Any:  # type: ignore
    f = {"soft_cross_entropy": reference.soft_cross_entropy, "kl_div": reference.kl_div, "tvd": reference.tvd, "jsd": lambda *a, **k: reference.jsd(*a, beta=beta, **k), "reverse_kl": lambda *a, **k: reference.kl_div(*a, reverse=True, **k)}[kind]
    kw = dict(mask=counted, vocab_size=vocab_size, student_softcap=student_softcap, teacher_softcap=teacher_softcap, reduction="none")
    out = f(s, t, temperature=temperature, **kw) * soft_weight
    if hard_weight:
        out = out + hard_weight * f(s, t, labels=labels, alpha=0.0, **kw)
    return out


def topk_divergence(s, lp, idx, tail, *, counted, labels, temperature, soft_weight, hard_weight, vocab_size, student_softcap) -> Any:  # type: ignore
    kw = dict(mask=counted, vocab_size=vocab_size, student_softcap=student_softcap, reduction="none", tail=tail)
    out = reference.topk_soft_cross_entropy(s, lp, idx, temperature=temperature, **kw) * soft_weight
    if hard_weight:
        out = out + hard_weight * reference.topk_soft_cross_entropy(s, lp, idx, labels=labels, alpha=0.0, **kw)
    return out
