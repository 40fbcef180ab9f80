from __future__ import annotations

from typing import Any

from fastdistill import reference


def attention_kl(sq, sk, tq, tk, s_scale, t_scale, key_mask, query_mask, is_causal, attn_mask) -> Any:  # type: ignore
    allowed = reference.allowed_pairs(*sq.shape[:3], sk.shape[2], sq.device, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, attn_mask=attn_mask)
    return reference.attention_kl(sq, sk, tq, tk, student_scale=s_scale, teacher_scale=t_scale, key_mask=key_mask, query_mask=query_mask, is_causal=is_causal, attn_mask=attn_mask, reduction="sum"), allowed.any(-1).sum()
