from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from fastdistill.ops.logits import divergence, topk_divergence


def linear_divergence(s, sw, t, tw, sb, tb, kind, *, per_row, **kw) -> Any:  # type: ignore
    out = divergence(F.linear(s, sw, sb), F.linear(t, tw, tb), kind, **kw)
    return out if per_row else out.sum()


def linear_topk_divergence(s, sw, sb, lp, idx, tail, *, per_row, **kw) -> Any:  # type: ignore
    out = topk_divergence(F.linear(s, sw, sb), lp, idx, tail, **kw)
    return out if per_row else out.sum()
