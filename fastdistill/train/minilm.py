"""MiniLM (arXiv 2002.10957) and MiniLMv2 (arXiv 2012.15828): how the tokens of one attention layer relate.

A relation is a distribution of each head over the tokens that a token may attend, `softmax(x y^T / sqrt(d))` of two
of the layer's vectors. The student's last layer learns the relations of one teacher layer, which needs neither
projections nor equal widths. With A heads and |x| tokens the loss of each relation is

    L = 1 / (A |x|)  sum_a sum_t  KL(teacher[a, t] || student[a, t])

- MiniLM: `attention`, queries and keys (equation 6), and `value_relation`, values and values (equations 7 to 9).
- MiniLMv2: `query_relation`, `key_relation`, `value_relation`, each of a vector with itself (equations 5 to 8). The
  heads are concatenated and split into equally many relation heads on either side, so that their numbers may differ.

All weights are 1. Memory is linear in the length: no relation is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import Tensor

from fastdistill.functional import attention_kl
from fastdistill.train.capture import LayerAttention

__all__ = ["RELATIONS", "RELATION_HEADS", "check_relation_heads", "relation_losses"]

RELATIONS = ("attention", "query_relation", "key_relation", "value_relation")
RELATION_HEADS = 48  # of MiniLMv2 for a teacher of BERT-base's size; the paper has 64 for BERT-large's


def check_relation_heads(student_config: Any, teacher_config: Any, relation_heads: int | None = None) -> int:
    """MiniLMv2's number of relation heads; None: `RELATION_HEADS`.

    Raises ValueError where it does not divide the width of all heads together, of the student and of the teacher.
    """
    count = RELATION_HEADS if relation_heads is None else relation_heads
    student, teacher = (_width(config) for config in (student_config, teacher_config))
    if count < 1 or student % count or teacher % count:
        common = gcd(student, teacher)
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"relation_heads is {count}{' by default' if relation_heads is None else ''}; it should divide the width "
            f"of all heads together, {student} of the student and {teacher} of the teacher: {fitting}"
        )
    return count


def _width(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim


def relation_losses(
    terms: Sequence[str],
    student: LayerAttention,
    teacher: LayerAttention,
    *,
    relation_heads: int | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of each relation, a scalar.

    Args:
        terms: out of `RELATIONS`.
        student, teacher: the layers to compare, with `value` for the value relation.
        relation_heads: to split the heads of either side into, for relations of a vector with itself; None: the
            heads as they are. Grouped keys and values are repeated to the number of query heads first.
        mask: `(B, L)` bool, True = a token. Padding is neither compared nor related to.
        is_causal, attn_mask: the pairs that may attend each other, as `attention_kl` takes them.
        tokens: the number of tokens to divide by; None: those of `mask`.
    """
    losses = {}
    for term in terms:
        (student_query, student_key, student_scale), (teacher_query, teacher_key, teacher_scale) = (
            _vectors(term, layer, relation_heads) for layer in (student, teacher)
        )
        losses[term] = attention_kl(
            student_query,
            student_key,
            teacher_query,
            teacher_key,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            key_mask=mask,
            query_mask=mask,
            is_causal=is_causal,
            attn_mask=attn_mask,
            # Each token may attend itself, so that each is a counted row of every head, whatever the masks.
            num_items=None if tokens is None else student_query.shape[1] * tokens,
        )
    return losses


def _vectors(
    term: str, layer: LayerAttention, relation_heads: int | None
) -> tuple[Tensor, Tensor, float | None]:  # (B, A, L, d) twice, and a scale; None: 1 / sqrt(d)
    if term == "attention":
        return layer.query, layer.key, layer.scale
    x = {"query_relation": layer.query, "key_relation": layer.key, "value_relation": layer.value}[term]
    if x is None:
        raise ValueError(f"the layer was captured without its values, which {term!r} compares; capture(values=True)")
    heads = layer.query.shape[1]
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    if relation_heads is not None:
        x = x.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)
    return x, x, None
