"""Arguments and errors that several public functions share, documented once."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import indent
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

CLASS_OPTIONS = """\
temperature: divides both sides' logits before the softmax.
t_squared: multiply the soft part by temperature^2, so that its gradient keeps its size (arXiv 1503.02531).
labels: `(*)` integer classes; the loss is then `alpha * soft + (1 - alpha) * CE(student at temperature 1)`.
alpha: weight of the soft part, 0 to 1; below 1 it needs labels.
ignore_index: rows with this label are masked out.
mask: `(*)` bool, True = counts.
vocab_size: number of leading classes that take part; the others get gradient 0. Required where V differs.
student_softcap: `z <- c * tanh(z / c)` on the student's logits, before the softmax.
teacher_softcap: the same on the teacher's logits.
student_logit_scale: `z <- scale * z` on the student's logits, before the softcap; positive.
teacher_logit_scale: the same on the teacher's logits.
item_weights: `(*)` floating, at least 0, without gradient; multiplies each row's loss. A row of weight 0 is ignored,
    even if it holds NaN, but the mean still counts it. A negative weight is not refused, since the check would be a
    host sync: it changes the sign of the row's loss.
reduction: "mean", "sum" or "none"; "none" returns `(*)`.
num_items: number of rows (int, float or 0-d tensor) to divide by in place of the number counted.
backend: "auto", "reference", "torch" or "triton"; on the logits of both sides also "cuda".
"""

SHARED = {
    "attention": """\
student_query: `(B, H, L, D_s)`.
student_key: `(B, H_kv, S, D_s)`, H a multiple of H_kv (grouped queries).
teacher_query: `(B, H, L, D_t)`; its dtype may differ from the student's.
teacher_key: `(B, H_kv_t, S, D_t)`; H_kv_t may differ from the student's.
student_scale: factor of the student's scores; None: `D_s ** -0.5`.
teacher_scale: factor of the teacher's scores; None: `D_t ** -0.5`.
key_mask: `(B, S)` bool, True = counts.
query_mask: `(B, L)` bool, True = counts.
is_causal: allow only `j <= i + S - L`.
attn_mask: bool, broadcastable to `(B, H, L, S)`, True = allowed.
cu_seqlens: `(n + 1)` int32 or int64, where n packed sequences begin and end, from 0 to L; B is 1 and only pairs of one
    sequence are allowed. Its values are checked on the CPU only: on a device that would be a host sync.
    The torch backend reads it on the host, which waits for the device once.
cu_seqlens_key: the same of the keys, from 0 to S, where they differ. S and L of the other arguments are then those of
    each sequence.
window: `(left, right)`, ints of at least 0 or None (no bound): allow only `-left <= j - i - (S - L) <= right`.
reduction: "mean" or "sum".
num_items: number of items (int, float or 0-d tensor) to divide by in place of the number counted.
backend: "auto", "reference", "torch" or "triton".
""",
    "attention_raises": """\
ValueError: shapes that do not fit, head counts that differ, a teacher that requires a gradient, an
    unknown reduction or backend.
TypeError: tensors that are not floating, masks that are not bool, query and key of different dtypes.
""",
    "logits": """\
student_logits: `(*, V)`. On both sides -inf (also under a softcap) is a class of probability 0 with gradient 0.
teacher_logits: `(*, V)`; its dtype may differ from the student's.
""",
    "heads": """\
student: `(*, d_s)` hidden states before the vocabulary head.
student_weight: `(V, d_s)`.
teacher: `(*, d_t)`.
teacher_weight: `(V, d_t)`.
student_bias: `(V)` or None.
teacher_bias: `(V)` or None.
""",
    "class_options": CLASS_OPTIONS,
    "skew": """\
skew: share a of the first side in the second, 0 <= a < 1: KL(p_t || a p_t + (1 - a) p_s), or reversed
    KL(p_s || a p_s + (1 - a) p_t). The Triton kernels have a relative error of up to 1e-7 / a in float32: below
    a = 1e-3, use float64 logits where more digits matter.
""",
    "topk": """\
topk_logprobs: `(*, k)` log-probabilities at temperature 1; -inf pads a row with fewer classes. An entry of -inf is
    not listed and its index is ignored. A row without any other entry does not count.
topk_indices: `(*, k)` integer classes of the log-probabilities, distinct within a row.
""",
    "topk_options": 'tail: "renormalize" or "bucket".\nreverse: KL(p_s || p_t) in place of the cross-entropy.\n'
    + re.sub("teacher_(softcap|logit_scale):.*\n", "", CLASS_OPTIONS),
    "class_raises": """\
ValueError: shapes that do not fit, V that differs without vocab_size, alpha < 1 without labels, a teacher that
    requires a gradient, an option out of its range.
TypeError: tensors that are not floating, a mask that is not bool, labels or indices that are not integers, operands
    of one product in several dtypes outside autocast.
""",
}


def documented(function: Function) -> Function:
    """Replaces each line `{name}` of the docstring with the shared text of that name."""
    if function.__doc__:  # python -OO strips it
        function.__doc__ = re.sub(
            r"^( *)\{(\w+)\}$", lambda line: indent(SHARED[line[2]].rstrip(), line[1]), function.__doc__, flags=re.M
        )
    return function
