"""The losses between a student and its teacher: a layer map, the projections it needs, and one dict of losses.

`method` says which; all terms have weight 1. "tinybert" (arXiv 1909.10351, equations 7 to 11):

- `embedding`: MSE between the projected student embedding output and the teacher's;
- `hidden`: the same for the outputs of the mapped layers, summed over layers;
- `attention`: MSE between attention scores before the softmax, summed over layers;
- `prediction`: cross-entropy against the teacher's softened prediction, or for a regression the MSE against the
  gold score. Of a question answering model the predictions are two, over the row's tokens: where the answer starts
  and where it ends, of which the mean is taken; of a token classifier there is one for each labelled token.

"minilm" and "minilmv2" have the terms of `fastdistill.train.minilm` in place of the first three.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdistill.functional import (
    attention_mse,
    linear_mse,
    linear_topk_soft_cross_entropy,
    soft_cross_entropy,
    topk_soft_cross_entropy,
)
from fastdistill.train.capture import LayerAttention, States
from fastdistill.train.minilm import RELATIONS, check_relation_heads, relation_losses
from fastdistill.train.published import load_published_projections

__all__ = [
    "METHODS",
    "PROJECTIONS_NAME",
    "SETTINGS_NAME",
    "TERMS",
    "Objective",
    "check_method_options",
    "resolve_layer_map",
    "resolve_terms",
]

TERMS = ("embedding", "hidden", "attention", "prediction")
INNER_TERMS = TERMS[:3]
METHODS: dict[str, tuple[str, ...]] = {  # and its inner terms
    "tinybert": INNER_TERMS,
    "minilm": ("attention", "value_relation"),
    "minilmv2": ("query_relation", "key_relation", "value_relation"),
}
PROJECTIONS_NAME = "projections.safetensors"
MULTI_LABEL = "multi_label_classification"
SETTINGS_NAME = "objective.json"


def resolve_terms(method: str, terms: Sequence[str] | None = None) -> tuple[str, ...]:
    """The terms, in the order they are computed; None: all inner terms of the method.

    Raises ValueError for an unknown method, and for terms that it does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it should be one of {tuple(METHODS)}")
    known = (*METHODS[method], "prediction")
    if terms is None:
        return METHODS[method]
    if not terms or isinstance(terms, str) or any(term not in known for term in terms):
        raise ValueError(f"terms is {terms!r}; it should be a sequence out of {known}, those of method {method!r}")
    return tuple(term for term in known if term in terms)


def resolve_layer_map(
    layer_map: str | Sequence[int | None], student_layers: int, teacher_layers: int
) -> tuple[int | None, ...]:
    """The teacher's hidden state each of the student's hidden states 0..M learns from; None: learns from none.

    Hidden state 0 is the embedding output and hidden state i the output of layer i, so a map of M layers has M + 1
    entries. With N teacher layers:

    - "uniform": i <- i N / M; M must divide N. As published.
    - "top": i <- i + N - M, the teacher's upper layers; 0 <- 0.
    - "bottom": i <- i, the teacher's lower layers.
    - "last": M <- N alone, and 0 <- 0.
    - a sequence of M + 1 indices or None.

    Raises ValueError saying which entry is wrong.
    """
    m, n = student_layers, teacher_layers
    if isinstance(layer_map, str):
        if layer_map == "last":
            return (0, *[None] * (m - 1), n)
        if layer_map not in ("uniform", "top", "bottom"):
            raise ValueError(
                f"layer_map is {layer_map!r}; it should be 'uniform', 'top', 'bottom', 'last' or a list of "
                f"{m + 1} teacher indices"
            )
        if m > n:
            raise ValueError(
                f"layer_map {layer_map!r} needs a teacher at least as deep as the student; the student has {m} "
                f"layers, the teacher {n}. Give a list of {m + 1} teacher indices"
            )
        if layer_map == "uniform":
            if n % m:
                raise ValueError(
                    f"layer_map 'uniform' needs a student depth that divides the teacher's; {m} does not divide "
                    f"{n}. Use 'top', 'bottom', 'last' or a list of {m + 1} teacher indices"
                )
            return tuple(i * (n // m) for i in range(m + 1))
        return (0, *(i + (n - m if layer_map == "top" else 0) for i in range(1, m + 1)))
    if len(layer_map) != m + 1:
        raise ValueError(
            f"layer_map has {len(layer_map)} entries; a student of {m} layers has {m + 1} hidden states, of which "
            "entry 0 is the embedding output"
        )
    for i, index in enumerate(layer_map):
        if index is not None and not (isinstance(index, int) and 0 <= index <= n):
            raise ValueError(f"layer_map[{i}] is {index!r}; it should be None or 0..{n}, the teacher's hidden states")
    return tuple(layer_map)


class Objective(nn.Module):
    """Turns captured student and teacher states into a dict of losses; owns the projections between their widths.

    Args:
        student_config, teacher_config: transformers configs, for depths, widths and head counts. The teacher's may
            be None when `terms` is ("prediction",).
        method: what the inner terms compare: "tinybert", "minilm" or "minilmv2".
        terms: which to compute: of the method's inner terms (`METHODS`; None: all of them) and "prediction".
        layer_map: of "tinybert", whose default is "uniform"; see `resolve_layer_map`. Attention layer i learns from
            the same teacher layer as hidden state i.
        projection: "shared", one Linear with bias for all hidden states as published, or "per_layer".
        parity: "masked": padding never counts. "official": as TinyBERT's published code computes it, padding counted
            in the denominators of the inner terms, the prediction's mean taken over rows and classes. Nothing is
            published for spans and tags: their prediction term is the same in both.
        temperature: of the prediction term; no factor temperature^2.
        teacher_layer: of "minilm" and "minilmv2": the layer, from 1, that the student's last one learns from; None:
            the last.
        relation_heads: of "minilmv2"; None: `fastdistill.train.minilm.RELATION_HEADS`.
        tail: of the prediction term against an offline teacher's k classes: "renormalize" or "bucket", as in
            `fastdistill.topk_soft_cross_entropy`.

    Raises:
        ValueError: an unknown option, one that the method does not have, a layer map or a number of relation heads
            that does not fit, another number of heads (attention).
    """

    def __init__(
        self,
        student_config: Any,
        teacher_config: Any = None,
        *,
        method: str = "tinybert",
        terms: Sequence[str] | None = None,
        layer_map: str | Sequence[int | None] | None = None,
        projection: str = "shared",
        parity: str = "masked",
        temperature: float = 1.0,
        teacher_layer: int | None = None,
        relation_heads: int | None = None,
        tail: str = "renormalize",
    ) -> None:
        super().__init__()
        self.terms = resolve_terms(method, terms)
        if projection not in ("shared", "per_layer"):
            raise ValueError(f"projection is {projection!r}; it should be 'shared' or 'per_layer'")
        if parity not in ("masked", "official"):
            raise ValueError(f"parity is {parity!r}; it should be 'masked' or 'official'")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}; it should be above 0")
        if "prediction" in self.terms and getattr(student_config, "problem_type", None) == MULTI_LABEL:
            raise ValueError(
                f"problem_type is {MULTI_LABEL!r}; the prediction term compares softmaxes, of one class a row. "
                "Leave it out of terms"
            )
        if tail not in ("renormalize", "bucket"):
            raise ValueError(f"tail is {tail!r}; it should be 'renormalize' or 'bucket'")
        if tail == "bucket" and temperature != 1:
            raise ValueError(f"temperature is {temperature}; tail 'bucket' needs 1, where its mass is known")
        check_method_options(
            method, layer_map=layer_map, parity=parity, teacher_layer=teacher_layer, relation_heads=relation_heads
        )
        self.method = method
        self.projection = projection
        self.parity = parity
        self.temperature = float(temperature)
        self.tail = tail
        self.teacher_layer = teacher_layer
        self.relation_heads = relation_heads
        self.is_regression = "prediction" in self.terms and _is_regression(student_config)
        self.layer_map: tuple[int | None, ...] = ()
        self.projections = nn.ModuleDict()
        inner = [term for term in self.terms if term != "prediction"]
        if not inner:
            return
        if teacher_config is None:
            raise ValueError(f"teacher_config is None; the terms {inner} need a teacher")

        layers = student_config.num_hidden_layers, teacher_config.num_hidden_layers
        if method != "tinybert":
            target = layers[1] if teacher_layer is None else teacher_layer
            if not 1 <= target <= layers[1]:
                raise ValueError(f"teacher_layer is {teacher_layer}; it should be 1..{layers[1]}, the teacher's layers")
            if method == "minilmv2":
                self.relation_heads = check_relation_heads(student_config, teacher_config, relation_heads)
            else:
                _check_heads(student_config, teacher_config, "method 'minilm'")
            self.teacher_layer = target
            self.layer_map = (*[None] * layers[0], target)
            return
        self.layer_map = resolve_layer_map("uniform" if layer_map is None else layer_map, *layers)
        if "embedding" in inner and self.layer_map[0] is None:
            raise ValueError("layer_map[0] is None, so the embedding term has no target; leave it out of terms")
        if "hidden" in inner and all(place is None for place in self.layer_map[1:]):
            raise ValueError("layer_map maps no layer, so the hidden term has no target; leave it out of terms")
        if "attention" in inner:
            self._check_attention(student_config, teacher_config)
        for index in self.student_hidden:
            name = "shared" if projection == "shared" else str(index)
            if name not in self.projections:
                self.projections[name] = nn.Linear(student_config.hidden_size, teacher_config.hidden_size)

    def _check_attention(self, student_config: Any, teacher_config: Any) -> None:
        _check_heads(student_config, teacher_config, "the attention term", "leave 'attention' out of terms, ")
        if not self.attention:
            raise ValueError("layer_map maps no layer, so the attention term has no target; leave it out of terms")
        if 0 in self.attention.values():
            raise ValueError(
                "layer_map maps a layer to 0, the embedding output, which has no attention; map it to 1 or above, "
                "to None, or leave 'attention' out of terms"
            )

    # -- what to capture -----------------------------------------------------------------------------------

    @property
    def hidden(self) -> dict[int, int]:
        """Student hidden state -> teacher hidden state, for the embedding and hidden terms."""
        return {
            i: target
            for i, target in enumerate(self.layer_map)
            if target is not None and ("embedding" if i == 0 else "hidden") in self.terms
        }

    @property
    def attention(self) -> dict[int, int]:
        """Student layer -> teacher layer, from 1, for the terms that compare attention layers."""
        if not any(term in RELATIONS for term in self.terms):
            return {}
        return {i: target for i, target in enumerate(self.layer_map) if i > 0 and target is not None}

    @property
    def needs_values(self) -> bool:
        """Whether the values of those layers are compared too."""
        return "value_relation" in self.terms

    def _projection(self, index: int) -> nn.Linear:
        projection = self.projections["shared" if self.projection == "shared" else str(index)]
        assert isinstance(projection, nn.Linear)
        return projection

    @property
    def student_hidden(self) -> list[int]:
        return sorted(self.hidden)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher: a regression on gold scores does not."""
        return self.terms != ("prediction",) or not self.is_regression

    # -- losses --------------------------------------------------------------------------------------------

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Items in a batch: (rows, tokens, pairs, causal pairs, labelled tokens), int64, on the batch's device, not
        synchronised.

        They add up over micro-batches and processes; `forward` takes the sum as `num_items`. A pair is a query
        and a key that may attend each other, counted once for all heads. In "official" parity padding counts.
        Labelled tokens are those a tagger learns from: where `labels` (B, L) is not -100.
        """
        rows, length = batch["input_ids"].shape[:2]
        mask = None if self.parity == "official" else batch.get("attention_mask")
        if mask is None:
            counts = (rows, rows * length, rows * length**2, rows * length * (length + 1) // 2)
            # Each written by a kernel: numbers copied from the host would be waited for.
            like = batch["input_ids"]
            count = torch.stack([torch.full((), n, dtype=torch.long, device=like.device) for n in counts])
        else:
            mask = mask.long()
            tokens = mask.sum(1)  # (B)
            causal = (mask * mask.cumsum(1)).sum()
            count = torch.stack([torch.full_like(causal, rows), tokens.sum(), (tokens**2).sum(), causal])
        labelled = _labelled(batch["input_ids"].shape, batch.get("attention_mask"), batch.get("labels"))
        return torch.cat([count, (count[1] if labelled is None else labelled.sum()).view(1)])

    def forward(
        self,
        student: States,
        teacher: States | None = None,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        topk: tuple[Tensor, Tensor] | None = None,
        head: tuple[Tensor, Tensor, Tensor | None] | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one batch, by term, each a scalar.

        Args:
            student, teacher: captured states; a regression needs no teacher.
            mask: `(B, L)`, 1 or True = a token, 0 or False = padding; None: no padding.
            labels: `(B)` gold scores of a regression, or `(B, L)` of a tagger, -100 where a token does not count.
                Else they are not looked at.
            teacher_logits: `(B, C)`, in place of `teacher.logits`.
            topk: log-probabilities and classes, `(B, L, k)` each, in place of a language model's `teacher.logits`.
            head: with `topk`, in place of `student.logits`: the last hidden state `(B, L, d)`, and the weight `(V, d)`
                and bias `(V)` or None that make the logits of it.
            num_items: the sum of `count` over everything that makes one optimiser step; this batch's without.
        """
        mask = None if mask is None else mask.bool()
        rows, tokens, pairs, causal_pairs, labelled = (None,) * 5 if num_items is None else num_items.unbind()
        losses: dict[str, Tensor] = {}
        if self.hidden or self.attention:
            if teacher is None:
                raise ValueError(f"teacher is None; the terms {self.terms} need the teacher's states")
            for i, target in self.hidden.items():
                projection = self._projection(i)
                loss = linear_mse(
                    student.hidden[i],
                    projection.weight,
                    teacher.hidden[target],
                    projection.bias,
                    mask=None if self.parity == "official" else mask,
                    num_items=tokens,
                )
                _add(losses, "embedding" if i == 0 else "hidden", loss)
            for i, target in self.attention.items():
                layers = (student.attention[i], teacher.attention[target])
                if self.method == "tinybert":
                    _add(losses, "attention", self._attention_loss(*layers, mask, tokens, pairs, causal_pairs))
                else:
                    losses.update(self._relation_losses(*layers, mask, tokens))
        if "prediction" in self.terms and topk is not None:
            losses["prediction"] = self._topk_loss(student.logits, head, topk, mask, tokens)
        elif "prediction" in self.terms:
            if teacher_logits is None and teacher is not None:
                teacher_logits = teacher.logits
            items = (rows, tokens, labelled)
            losses["prediction"] = self._prediction_loss(student, teacher_logits, mask, labels, *items)
        return losses

    def _attention_loss(
        self,
        student: LayerAttention,
        teacher: LayerAttention,
        mask: Tensor | None,
        tokens: Tensor | None,
        pairs: Tensor | None,
        causal_pairs: Tensor | None,
    ) -> Tensor:
        batch, heads, length, _ = student.query.shape
        is_causal, attn_mask = _shared_masks(student, teacher)
        num_items: int | Tensor | None
        share: float | Tensor = 1.0
        if self.parity == "official":
            num_items = heads * (batch * length**2 if pairs is None else pairs)
        elif attn_mask is not None:
            # Pairs of a dense mask are known only now, so that micro-batches are weighted by their tokens.
            num_items = None
            if tokens is not None:
                share = (batch * length if mask is None else mask.sum()) / tokens
        else:
            counted = causal_pairs if is_causal else pairs
            num_items = None if counted is None else heads * counted
        return share * attention_mse(
            student.query,
            student.key,
            teacher.query,
            teacher.key,
            student_scale=student.scale,
            teacher_scale=teacher.scale,
            key_mask=mask,
            query_mask=None if self.parity == "official" else mask,
            is_causal=is_causal,
            attn_mask=attn_mask,
            num_items=num_items,
        )

    def _relation_losses(
        self, student: LayerAttention, teacher: LayerAttention, mask: Tensor | None, tokens: Tensor | None
    ) -> dict[str, Tensor]:
        is_causal, attn_mask = _shared_masks(student, teacher)
        return relation_losses(
            [term for term in self.terms if term in RELATIONS],
            student,
            teacher,
            relation_heads=self.relation_heads,
            mask=mask,
            is_causal=is_causal,
            attn_mask=attn_mask,
            tokens=tokens,
        )

    def _prediction_loss(
        self,
        student: States,
        teacher_logits: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
        rows: Tensor | None,
        tokens: Tensor | None,
        labelled: Tensor | None,
    ) -> Tensor:
        logits = student.logits
        if logits is None:
            raise ValueError("the student returned no logits; the prediction term needs a model with a head")
        if self.is_regression:
            if labels is None:
                raise ValueError("labels is None; a regression learns from gold scores (B)")
            return linear_mse(logits, None, labels.to(logits.dtype).view(logits.shape), num_items=rows)
        if teacher_logits is None:
            raise ValueError("there are no teacher logits; give a teacher with a head, or teacher_logits")
        num_items: int | Tensor | None
        if student.head == "spans":  # (B, 2, L): the row's tokens are the classes, and padding is none of them
            if mask is not None:
                padding = ~mask[:, None]
                logits = logits.masked_fill(padding, -math.inf)
                teacher_logits = teacher_logits.masked_fill(padding, -math.inf)
            num_items = None if rows is None else 2 * rows
            return soft_cross_entropy(logits, teacher_logits, temperature=self.temperature, num_items=num_items)
        per_token = logits.dim() == 3  # (B, L, V): language models
        if student.head == "tags":
            mask, num_items = _labelled(logits.shape[:2], mask, labels), labelled
        else:
            mask = mask if per_token and self.parity == "masked" else None
            num_items = tokens if per_token else rows
            if self.parity == "official":
                num_items = logits.shape[-1] * (logits.shape[:-1].numel() if num_items is None else num_items)
        return soft_cross_entropy(logits, teacher_logits, temperature=self.temperature, mask=mask, num_items=num_items)

    def _topk_loss(
        self,
        logits: Tensor | None,
        head: tuple[Tensor, Tensor, Tensor | None] | None,
        topk: tuple[Tensor, Tensor],
        mask: Tensor | None,
        tokens: Tensor | None,
    ) -> Tensor:
        if self.parity == "official":
            raise ValueError("parity is 'official', which counts padding, for which topk holds nothing; use 'masked'")
        options: dict[str, Any] = {
            "tail": self.tail,
            "temperature": self.temperature,
            "mask": mask,
            "num_items": tokens,
        }
        if head is not None:
            x, weight, bias = head
            return linear_topk_soft_cross_entropy(x, weight, *topk, student_bias=bias, **options)
        if logits is None:
            raise ValueError("the student returned no logits; the prediction term needs a model with a head")
        return topk_soft_cross_entropy(logits, *topk, **options)

    # -- files ---------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Everything but the projections' weights, as plain values: the arguments of an equal objective."""
        return {
            "method": self.method,
            "terms": list(self.terms),
            "layer_map": list(self.layer_map) if self.method == "tinybert" else None,
            "projection": self.projection,
            "parity": self.parity,
            "temperature": self.temperature,
            "teacher_layer": self.teacher_layer,
            "relation_heads": self.relation_heads,
            "tail": self.tail,
        }

    def check_settings(self, folder: str | Path) -> None:
        """ValueError where `folder` holds what an objective with other settings trained, naming those, or none did."""
        path = Path(folder) / SETTINGS_NAME
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {folder} is no run of a stage. Pass overwrite=True to replace it")
        found = json.loads(path.read_text())
        different = [
            f"{name} {found[name]!r} instead of {value!r}"
            for name, value in self.settings().items()
            if found.get(name, value) != value
        ]
        if different:
            raise ValueError(
                f"{folder} was trained with {', '.join(different)}; ask for the same to go on, or pass overwrite=True"
            )

    def save(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write `objective.json`, and the projections' weights to `projections.safetensors` if there are any."""
        folder = Path(folder)
        (folder / SETTINGS_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n")
        state_dict = self.state_dict() if state_dict is None else state_dict
        if state_dict:
            save_file({name: x.contiguous() for name, x in state_dict.items()}, folder / PROJECTIONS_NAME)

    def load_projections(self, folder: str | Path) -> None:
        """Read the projections of an objective with the same layer map and projection, see `read_projections`.

        What this objective's terms do not use stays unread. Raises FileNotFoundError, and ValueError where a
        projection of this objective is missing there or has another shape.
        """
        saved = read_projections(folder)
        if not saved:
            path = Path(folder) / PROJECTIONS_NAME
            raise FileNotFoundError(f"{path}: no such file; a stage with projections writes it")
        expected = {name: tuple(x.shape) for name, x in self.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in saved.items()}
        if any(found.get(name) != shape for name, shape in expected.items()):
            kind = projection_kind(saved)
            way_out = "the same layer map and models, and no terms that the earlier stage left out"
            if kind != self.projection:
                way_out = f"projection={kind!r}"
            raise ValueError(
                f"{folder} holds {kind!r} projections, {found}; this objective has {expected}. Use {way_out}"
            )
        self.load_state_dict({name: saved[name] for name in expected})


def read_projections(folder: str | Path) -> dict[str, Tensor]:
    """What a stage wrote to `projections.safetensors`, or a published TinyBERT's `fit_dense`; empty without either."""
    path = Path(folder) / PROJECTIONS_NAME
    return load_file(path) if path.is_file() else load_published_projections(folder)


def projection_kind(projections: Mapping[str, Tensor]) -> str:
    """ "shared" or "per_layer", of what `read_projections` found."""
    return "shared" if "projections.shared.weight" in projections else "per_layer"


def _add(losses: dict[str, Tensor], term: str, loss: Tensor) -> None:
    losses[term] = losses[term] + loss if term in losses else loss


def _labelled(shape: torch.Size, mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """(B, L), the tokens that a tagger learns from: neither padding nor labelled -100. None: all."""
    if labels is None or labels.shape != shape:
        return mask
    return labels != -100 if mask is None else (labels != -100) & mask.bool()


def _shared_masks(student: LayerAttention, teacher: LayerAttention) -> tuple[bool, Tensor | None]:
    """`is_causal` and `attn_mask` of the pairs that may attend each other on both sides."""
    attn_mask = student.attn_mask
    if teacher.attn_mask is not None:
        attn_mask = teacher.attn_mask if attn_mask is None else attn_mask & teacher.attn_mask
    return student.is_causal or teacher.is_causal, attn_mask


def _check_heads(student_config: Any, teacher_config: Any, what: str, way_out: str = "") -> None:
    heads = (student_config.num_attention_heads, teacher_config.num_attention_heads)
    if heads[0] != heads[1]:
        raise ValueError(
            f"the student has {heads[0]} attention heads, the teacher {heads[1]}; {what} compares them one to one. "
            f"Give the student as many heads, {way_out}or use "
            'method="minilmv2", relation losses with re-split heads'
        )


def check_method_options(
    method: str,
    *,
    layer_map: str | Sequence[int | None] | None = None,
    parity: str = "masked",
    teacher_layer: int | None = None,
    relation_heads: int | None = None,
) -> None:
    """ValueError for an option of `Objective` that the method does not have."""
    if method == "tinybert" and teacher_layer is not None:
        raise ValueError(f"teacher_layer is {teacher_layer}; method 'tinybert' compares the layers that layer_map says")
    if method != "minilmv2" and relation_heads is not None:
        raise ValueError(f"relation_heads is {relation_heads}; method {method!r} has none, 'minilmv2' has")
    if method != "tinybert" and layer_map is not None:
        raise ValueError(
            f"layer_map is {layer_map!r}; method {method!r} compares the student's last layer with one of the "
            "teacher's: leave it out, and choose that layer with teacher_layer"
        )
    if method != "tinybert" and parity == "official":
        raise ValueError(f"parity is 'official', which is TinyBERT's published code; method {method!r} has 'masked'")


def _is_regression(config: Any) -> bool:
    return config.num_labels == 1 or getattr(config, "problem_type", None) == "regression"
