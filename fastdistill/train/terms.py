"""The terms of the objective: each class says what it captures, what it counts and what it computes.

The objective is the sum of its terms, all with weight 1. `METHODS` at the end names the terms of each method.
docs/contributing.md has the recipe for a new term. Equations are those of TinyBERT (arXiv 1909.10351) where no other
paper is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import functional as F
from fastdistill.train.capture import LayerAttention, States
from fastdistill.train.causal_lm import Logits, Options, divergence, targets
from fastdistill.train.options import ObjectiveOptions

__all__ = ["METHODS", "RELATION_HEADS", "Batch", "Counts", "Setup", "Term", "count_items", "next_tokens",
           "prediction_options", "with_length"]  # fmt: skip

RELATION_HEADS = 48  # MiniLMv2's number for teachers of BERT-base's size; the paper uses 64 for BERT-large's


class Counts(NamedTuple):
    """The numbers of items that means divide by, each an int64 tensor (). None: this batch's own number."""

    rows: Any = None
    tokens: Any = None  # or frames of sound, or patches of images: the states of a layer
    pairs: Any = None  # a query and a key that may attend each other, counted once for all heads
    causal_pairs: Any = None  # the pairs whose key is not behind the query
    labelled: Any = None  # `labels` that are not -100: of tokens (B, L), else of rows (B)
    next_tokens: Any = None  # the positions whose next token a causal language model learns


def count_items(batch: Mapping[str, Any], parity: str = "masked") -> Tensor:  # (6), the fields of Counts
    """Counts the items of a batch without a host sync; in "official" parity padding too, except as labelled tokens.

    Without `input_ids`, tokens are what `attention_mask` masks: frames of sound. Without both, as with images, only
    rows are counted: `with_length` derives the other counts.
    """
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids", mask)
    if ids is None:
        some = next(x for x in batch.values() if isinstance(x, Tensor))  # (B, ...)
        ids = torch.ones(len(some), 1, dtype=torch.long, device=some.device)
    counted = torch.ones_like(ids, dtype=torch.long) if mask is None or parity == "official" else mask.long()  # (B, L)
    tokens = counted.sum(1)  # (B)
    labels = batch.get("labels")
    labelled = labelled_tokens(ids.shape, mask, labels)
    if labels is not None and labels.shape == tokens.shape:
        labelled = labels != -100
    counts = Counts(
        rows=torch.ones_like(tokens).sum(),  # a number copied from the host would wait for the device
        tokens=tokens.sum(),
        pairs=(tokens**2).sum(),
        causal_pairs=(counted * counted.cumsum(1)).sum(),
        labelled=tokens.sum() if labelled is None else labelled.sum(),
        next_tokens=next_tokens({**batch, "input_ids": ids})[1].sum(),
    )
    return torch.stack(counts)


def with_length(num_items: Tensor, length: int) -> Tensor:  # (6), the fields of Counts
    """Returns the counts for rows of which each has `length` states, all of which count, such as an image's patches.

    Images of different sizes then weigh the same in a mean over several batches.
    """
    counts = Counts(*num_items.unbind())
    rows = counts.rows
    counts = counts._replace(
        tokens=rows * length, pairs=rows * length**2, causal_pairs=rows * (length * (length + 1) // 2)
    )
    return torch.stack(counts)


def next_tokens(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:  # (B, L) each
    """Returns the token that each position of a causal language model predicts, and whether it counts.

    It counts if that token's label is not -100; without labels (B, L), if it has a successor in its sequence.
    """
    labels = batch.get("labels")
    if labels is None or labels.shape != batch["input_ids"].shape:
        batch = {name: x for name, x in batch.items() if name != "labels"}
    return targets(batch)


def labelled_tokens(shape: torch.Size, mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Returns (B, L): the tokens that are neither padding nor labelled -100. None: all tokens."""
    if labels is None or labels.shape != shape:
        return mask
    return labels != -100 if mask is None else (labels != -100) & mask.bool()


class Setup(NamedTuple):
    """Everything that terms are built from."""

    options: ObjectiveOptions  # with the defaults that depend on the models filled in
    student: Any  # transformers config
    teacher: Any  # transformers config; None where prediction is the only term
    layer_map: tuple[int | None, ...]  # the teacher's hidden state for each of the student's 0..M
    projections: Any  # the objective's nn.ModuleDict; `projection` adds to it

    def layers_for(self, term: str) -> dict[int, int]:
        """Returns student layer -> teacher layer, from 1. Raises ValueError where none is mapped."""
        layers = {i: target for i, target in enumerate(self.layer_map) if i > 0 and target is not None}
        if not layers:
            raise ValueError(f"layer_map maps no layer, so the {term} term has no target; leave it out of terms")
        return layers

    def projection(self, index: int, target: int) -> nn.Linear:
        """Returns the projection of the student's hidden state `index` to the width of the teacher's `target`."""
        name = "shared" if self.options.projection == "shared" else str(index)
        widths = state_width(self.student, index), state_width(self.teacher, target)
        if name not in self.projections:
            self.projections[name] = nn.Linear(*widths)
        found = self.projections[name]
        if (found.in_features, found.out_features) != widths:
            raise ValueError(
                f"projection is 'shared'; it maps width {found.in_features} to {found.out_features}, and hidden state "
                f"{index} of the student has width {widths[0]}, its target {widths[1]}: use 'per_layer'"
            )
        return found


def state_width(config: Any, index: int) -> int:
    """Returns the width of a model's hidden state. OPT maps its last one to the width of its embedding table."""
    last = getattr(config, "word_embed_proj_dim", None) if index == config.num_hidden_layers else None
    return last or config.hidden_size


class Batch(NamedTuple):
    """Everything that a term sees of one batch."""

    student: States
    teacher: States  # empty where there is none
    mask: Tensor | None = None  # (B, L) bool, True = a token or a frame of sound; None: no padding
    labels: Tensor | None = None  # (B) gold scores of a regression or classes of rows, or (B, L) classes of tokens
    teacher_logits: Tensor | None = None  # (B, C), in place of `teacher.logits`
    topk: tuple[Tensor, Tensor] | None = None  # log-probabilities and classes (B, L, k), in place of `teacher.logits`
    next_token_loss: Tensor | None = None  # the prediction loss of a causal language model, computed in its head
    counts: Counts = Counts()


class Term:
    """One loss between a student and its teacher.

    `hidden` and `attention` are the hidden states and attention layers to capture: the student's -> the teacher's.
    """

    by_default = True  # whether the method computes this term where no terms are named
    values = False  # whether the values of the attention layers are captured too
    logits = teacher_logits = False  # whether the term reads the student's, and the teacher's

    def __init__(self, setup: Setup) -> None:
        self.options = setup.options
        self.is_official = setup.options.parity == "official"
        self.hidden: dict[int, int] = {}
        self.attention: dict[int, int] = {}

    def for_head(self, is_language_model: bool) -> None:
        """Tells the term what the student's head predicts, which a config does not say."""

    def loss(self, batch: Batch) -> Tensor:
        """Returns the loss of one batch, a scalar."""
        raise NotImplementedError


class Hidden(Term):
    """TinyBERT's MSE between projected student and teacher hidden states, summed over layers (equation 8)."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.hidden = self.targets(setup)
        self.projections = {i: setup.projection(i, target) for i, target in self.hidden.items()}

    def targets(self, setup: Setup) -> dict[int, int]:
        return setup.layers_for("hidden")

    def loss(self, batch: Batch) -> Tensor:
        mask, losses = None if self.is_official else batch.mask, []
        for i, j in self.hidden.items():
            x, linear = batch.student.hidden[i], self.projections[i]
            # A projection stays in float32 beside a student in bfloat16, whose updates would round to nothing in it.
            weight, bias = linear.weight.to(x.dtype), linear.bias.to(x.dtype)
            losses.append(
                F.linear_mse(x, weight, batch.teacher.hidden[j], bias, mask=mask, num_items=batch.counts.tokens)
            )
        return torch.stack(losses).sum()


class Embedding(Hidden):
    """The same for the embedding output, which is hidden state 0 (equation 9)."""

    def targets(self, setup: Setup) -> dict[int, int]:
        target = setup.layer_map[0]
        if target is None:
            raise ValueError("layer_map[0] is None, so the embedding term has no target; leave it out of terms")
        return {0: target}


class Attention(Term):
    """TinyBERT's MSE between attention scores before the softmax, summed over layers (equation 7)."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        check_heads(setup, "the attention term", "leave 'attention' out of terms, ")
        self.attention = setup.layers_for("attention")
        if 0 in self.attention.values():
            raise ValueError(
                "layer_map maps a layer to 0, the embedding output, which has no attention; map it to 1 or above, "
                "to None, or leave 'attention' out of terms"
            )

    def loss(self, batch: Batch) -> Tensor:
        layers = [(batch.student.attention[i], batch.teacher.attention[j]) for i, j in self.attention.items()]
        return torch.stack([self.layer_loss(batch, *layer) for layer in layers]).sum()

    def layer_loss(self, batch: Batch, student: LayerAttention, teacher: LayerAttention) -> Tensor:
        rows, heads, length, _ = student.query.shape
        masks = shared_masks(student, teacher)
        counts, mask = batch.counts, batch.mask
        pairs = counts.causal_pairs if masks["is_causal"] and not self.is_official else counts.pairs
        share: float | Tensor = 1.0
        if self.is_official:
            pairs = rows * length**2 if pairs is None else pairs
        elif any(masks[name] is not None for name in ("attn_mask", "cu_seqlens", "window")):
            # The pairs of such a mask are known only now, so micro-batches are weighted by their tokens.
            pairs = None
            if counts.tokens is not None:
                share = (rows * length if mask is None else mask.sum()) / counts.tokens
        return share * F.attention_mse(
            student.query, student.key, teacher.query, teacher.key,
            student_scale=student.scale, teacher_scale=teacher.scale,
            key_mask=mask, query_mask=None if self.is_official else mask, **masks,
            num_items=None if pairs is None else heads * pairs,
        )  # fmt: skip


class Relation(Term):
    """KL between the relations of one student layer, the last, and one teacher layer.

    A relation is a distribution of each head over the tokens that a token may attend, `softmax(x y^T / sqrt(d))` of
    two of the layer's vectors. With A heads and |x| tokens its loss is

        L = 1 / (A |x|)  sum_a sum_t  KL(teacher[a, t] || student[a, t])

    MiniLM (arXiv 2002.10957) compares queries with keys (equation 6) and values with values (equations 7 to 9).
    MiniLMv2 (arXiv 2012.15828) compares each vector with itself (equations 5 to 8), after the heads are concatenated
    and split into equally many relation heads on both sides, so that the numbers of heads may differ.
    Memory is linear in the length: no relation is stored.
    """

    vector = ""  # "query", "key" or "value", compared with itself; "": queries with keys

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.options.method == "minilm":
            check_heads(setup, "method 'minilm'")
        self.attention = setup.layers_for("relation")
        self.values = self.vector == "value"

    def loss(self, batch: Batch) -> Tensor:
        ((layer, target),) = self.attention.items()
        student, teacher = batch.student.attention[layer], batch.teacher.attention[target]
        (query, key, scale), (teacher_query, teacher_key, teacher_scale) = map(self.compared, (student, teacher))
        tokens = batch.counts.tokens
        return F.attention_kl(
            query, key, teacher_query, teacher_key, student_scale=scale, teacher_scale=teacher_scale,
            key_mask=batch.mask, query_mask=batch.mask, **shared_masks(student, teacher),
            # Every token may attend itself, so each is a counted row of every head under any mask.
            num_items=None if tokens is None else query.shape[1] * tokens,
        )  # fmt: skip

    def compared(self, layer: LayerAttention) -> tuple[Tensor, Tensor, float | None]:
        """Returns both vectors (B, A, L, d) of a layer and their scale; None: 1 / sqrt(d)."""
        if not self.vector:
            return layer.query, layer.key, layer.scale
        x, heads = getattr(layer, self.vector), layer.query.shape[1]
        if x is None:
            raise ValueError("the layer was captured without its values; capture it with capture(values=True)")
        if x.shape[1] != heads:  # grouped keys and values
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        if self.options.relation_heads is not None:
            x = x.transpose(1, 2).flatten(2).unflatten(2, (self.options.relation_heads, -1)).transpose(1, 2)
        return x, x, None


class QueryRelation(Relation):
    vector = "query"


class KeyRelation(Relation):
    vector = "key"


class ValueRelation(Relation):
    vector = "value"


def check_relation_heads(student_config: Any, teacher_config: Any, relation_heads: int | None = None) -> int:
    """Returns MiniLMv2's number of relation heads; None: `RELATION_HEADS`.

    Raises ValueError where it does not divide the width of all heads together, of the student and of the teacher.
    """
    count = RELATION_HEADS if relation_heads is None else relation_heads
    sides = [(config, config.num_attention_heads) for config in (student_config, teacher_config)]
    widths = [heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) for config, heads in sides]
    common = math.gcd(*widths)
    if count < 1 or common % count:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(
            f"relation_heads is {count}{' by default' if relation_heads is None else ''}; it should divide the width "
            f"of all heads together, {widths[0]} of the student and {widths[1]} of the teacher: {fitting}"
        )
    return count


class Prediction(Term):
    """Cross-entropy against the teacher's softened prediction (equation 10), or MSE against a regression's scores.

    A sequence classifier predicts once a row, a masked language model once a token, and a token classifier once a
    labelled token. A question answering model predicts twice a row, over the row's tokens: where the answer starts and
    where it ends; the loss is the mean of both. A causal language model predicts each next token, in its head:
    `DistillationModel` computes its loss.

    With `alpha` < 1 labels take part, and what has the label -100 does not count.
    """

    by_default = False
    logits = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.num_labels, problem_type = setup.student.num_labels, getattr(setup.student, "problem_type", None)
        self.is_regression = self.num_labels == 1 or problem_type == "regression"
        self.teacher_logits = not self.is_regression or setup.options.scores == "teacher"
        if problem_type == "multi_label_classification":
            raise ValueError(
                f"problem_type is {problem_type!r}; the prediction term compares softmaxes, of one class a row. "
                "Leave it out of terms"
            )
        if problem_type == "regression":
            self.check_options()

    def for_head(self, is_language_model: bool) -> None:
        if is_language_model:  # whose config may say num_labels 1 all the same
            self.is_regression, self.teacher_logits = False, True
        self.check_options()

    def check_options(self) -> None:
        """Raises ValueError for an option that a regression does not have, or that it alone has."""
        if not self.is_regression and self.options.scores != "gold":
            raise ValueError(
                f"scores is {self.options.scores!r}, which is for a regression (num_labels 1); other students learn "
                "the teacher's predictions anyway: leave it at 'gold'"
            )
        changed = {"divergence": "soft_cross_entropy", "alpha": 1.0, "t_squared": False}
        for name, default in changed.items() if self.is_regression else ():
            if getattr(self.options, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self.options, name)!r}; a regression (num_labels 1) learns scores by MSE, "
                    f"which has no such option: leave it at {default!r}"
                )

    def loss(self, batch: Batch) -> Tensor:
        if batch.next_token_loss is not None:
            return batch.next_token_loss
        logits = student_logits(batch)
        targets = batch.teacher.logits if batch.teacher_logits is None else batch.teacher_logits
        if self.is_regression and logits.dim() == 2:
            return self.regression_loss(logits, targets, batch)
        if targets is None and batch.topk is None:
            raise ValueError("there are no teacher logits; give a teacher with a head, or teacher_logits")
        if batch.topk is not None and self.is_official:
            raise ValueError("parity is 'official', which counts padding, for which topk holds nothing; use 'masked'")
        if batch.student.head == "spans":  # (B, 2, L): the row's tokens are the classes, and padding is none of them
            assert targets is not None
            return self.span_loss(logits, targets, batch)
        mask, items = self.counted(logits, batch)
        return self.compared(logits, targets, batch, mask, items)

    def regression_loss(self, logits: Tensor, teacher_scores: Tensor | None, batch: Batch) -> Tensor:
        self.check_options()
        scores, name = batch.labels, "labels"
        if self.options.scores == "teacher":
            scores, name = teacher_scores, "teacher_logits"
        if scores is None:
            raise ValueError(f"{name} is None; a regression learns from {self.options.scores} scores (B)")
        scores = scores if scores.is_floating_point() else scores.float()
        return F.linear_mse(logits, None, scores.view(logits.shape), num_items=batch.counts.rows)

    def counted(self, logits: Tensor, batch: Batch) -> tuple[Tensor | None, Any]:
        """Returns the mask of what counts, and the number of items of the optimiser step; None: this batch's own."""
        counts, is_classifier = batch.counts, logits.dim() == 2
        if batch.student.head == "tags" or self.options.alpha < 1:
            if is_classifier:
                return None, counts.labelled
            return labelled_tokens(logits.shape[:2], batch.mask, batch.labels), counts.labelled
        mask, items = None if is_classifier else batch.mask, counts.rows if is_classifier else counts.tokens
        if not self.is_official:
            return mask, items
        # The mean over rows and classes, padding included.
        return None, logits.shape[-1] * (logits.shape[:-1].numel() if items is None else items)

    def span_loss(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        if self.options.alpha < 1:
            raise ValueError(
                f"alpha is {self.options.alpha}; the prediction term of a question answering model takes no labels: "
                "leave alpha at 1.0"
            )
        if batch.mask is not None:
            logits, targets = (x.masked_fill(~batch.mask[:, None], -math.inf) for x in (logits, targets))
        rows = batch.counts.rows
        return self.compared(logits, targets, batch, None, None if rows is None else 2 * rows)

    def compared(
        self, logits: Tensor, targets: Tensor | None, batch: Batch, mask: Tensor | None, num_items: Any
    ) -> Tensor:
        options = prediction_options(self.options, num_items, is_cached=batch.topk is not None)
        shared = options._asdict()
        keywords = {name: shared[name] for name in ("temperature", "t_squared", "num_items")}
        if options.alpha < 1:
            keywords |= {"alpha": options.alpha, "labels": batch.labels}
        teacher = None if targets is None or batch.topk is not None else Logits(targets)
        if teacher is not None and teacher.classes != logits.shape[-1]:
            keywords["vocab_size"] = min(teacher.classes, logits.shape[-1])
        if mask is None and batch.topk is not None:
            mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return divergence(Logits(logits), teacher, batch.topk, options, mask=mask, **keywords)


def prediction_options(options: ObjectiveOptions, num_items: Any = None, is_cached: bool = False) -> Options:
    """Returns the options of `causal_lm_loss`. Raises ValueError for a divergence that a cached teacher cannot have."""
    if is_cached and options.divergence not in ("kl", "soft_cross_entropy"):
        raise ValueError(
            f"divergence is {options.divergence!r}; a cached teacher has 'kl' and 'soft_cross_entropy': pass a teacher"
        )
    return Options(
        divergence=options.divergence, temperature=options.temperature, t_squared=options.t_squared,
        alpha=options.alpha, beta=0.5, reverse=False, vocab_size=None, num_items=num_items, return_parts=False,
        backend="auto", tail=options.tail,
    )  # fmt: skip


def student_logits(batch: Batch) -> Tensor:
    if batch.student.logits is None:
        raise ValueError("the student returned no logits; the prediction term needs a model with a head")
    return batch.student.logits


def shared_masks(student: LayerAttention, teacher: LayerAttention) -> dict[str, Any]:
    """Returns the masks, as keywords of the attention losses, of the pairs that may attend each other on both sides.

    Raises ValueError if one side alone reads the row as packed sequences, or the sequences differ.
    """
    ours, theirs = student.cu_seqlens, teacher.cu_seqlens
    agree = ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)
    if not agree:
        counts = [1 if x is None else len(x) - 1 for x in (ours, theirs)]
        raise ValueError(
            f"the student reads the row as {counts[0]} packed sequences, the teacher as {counts[1]}, or they end "
            "elsewhere; capture both from one batch, both inside `with capturable(student, teacher):`"
        )
    masks = [x.attn_mask for x in (student, teacher) if x.attn_mask is not None]
    windows = [x.window for x in (student, teacher) if x.window is not None]
    return {
        "is_causal": student.is_causal or teacher.is_causal,
        "attn_mask": masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None,
        "cu_seqlens": ours,
        "window": tuple(map(min, zip(*windows, strict=True))) if windows else None,
    }


def check_heads(setup: Setup, what: str, way_out: str = "") -> None:
    student, teacher = setup.student.num_attention_heads, setup.teacher.num_attention_heads
    if student != teacher:
        raise ValueError(
            f"the student has {student} attention heads, the teacher {teacher}; {what} compares them one to one. "
            f'Give the student as many heads, {way_out}or use method="minilmv2", relation losses with re-split heads'
        )


# The terms of each method, in the order in which they are computed.
METHODS: dict[str, dict[str, type[Term]]] = {
    "tinybert": {"embedding": Embedding, "hidden": Hidden, "attention": Attention, "prediction": Prediction},
    "minilm": {"attention": Relation, "value_relation": ValueRelation, "prediction": Prediction},
    "minilmv2": {
        "query_relation": QueryRelation,
        "key_relation": KeyRelation,
        "value_relation": ValueRelation,
        "prediction": Prediction,
    },
}
