"""The objective of a student: the terms to compute, the layers to compare, and the projections between their widths.

`fastdistill.train.terms` holds the terms themselves. docs/objectives.md describes the methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdistill.train.capture import States
from fastdistill.train.options import ObjectiveOptions
from fastdistill.train.outputs import writing
from fastdistill.train.published import load_published_projections
from fastdistill.train.reading import read_json, reading
from fastdistill.train.terms import METHODS, Batch, Counts, Prediction, Setup, check_relation_heads, count_items

__all__ = ["Objective", "check_method_options", "projection_kind", "read_projections", "resolve_layer_map",
           "resolve_terms"]  # fmt: skip

PROJECTIONS_NAME = "projections.safetensors"
SETTINGS_NAME = "objective.json"


class Objective(nn.Module):
    """Turns captured student and teacher states into a dict of losses; owns the projections between their widths.

    Args:
        student_config, teacher_config: transformers configs, for depths, widths and head counts. The teacher's may
            be None when `terms` is ("prediction",).
        options: the fields of `fastdistill.train.options.ObjectiveOptions`.

    Attributes:
        options: the `ObjectiveOptions`, with the defaults that depend on the models filled in.
        terms: the names of the terms, in the order in which they are computed.
        layer_map: the teacher's hidden state for each of the student's; empty where prediction is the only term.
        hidden: student hidden state -> teacher hidden state, to capture.
        attention: student layer -> teacher layer, from 1, to capture; `needs_values`: together with its values.
        needs_logits: whether a term reads the student's logits.

    Raises:
        ValueError: an unknown option, one that the method does not have, a layer map or a number of relation heads
            that does not fit, another number of heads (attention).
    """

    def __init__(self, student_config: Any, teacher_config: Any = None, **options: Any) -> None:
        super().__init__()
        given = ObjectiveOptions(**options)
        self.terms = resolve_terms(given.method, given.terms)
        check_method_options(**options)
        classes = METHODS[given.method]
        inner = [name for name in self.terms if classes[name] is not Prediction]
        if inner and teacher_config is None:
            raise ValueError(f"teacher_config is None; the terms {inner} need a teacher")
        self.options = replace(given, terms=self.terms, temperature=float(given.temperature))
        self.layer_map: tuple[int | None, ...] = ()
        if inner:
            check_layers(student_config, "the student", inner)
            check_layers(teacher_config, "the teacher", inner)
            self.options, self.layer_map = resolve_layers(self.options, student_config, teacher_config)
        self.projections = nn.ModuleDict()
        setup = Setup(self.options, student_config, teacher_config, self.layer_map, self.projections)
        self._terms = {name: classes[name](setup) for name in self.terms}
        terms = self._terms.values()
        self.hidden = {i: target for term in terms for i, target in term.hidden.items()}
        self.attention = {i: target for term in terms for i, target in term.attention.items()}
        self.needs_values = any(term.values for term in terms)
        self.needs_logits = any(term.logits for term in terms)

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a term reads the teacher's prediction."""
        return any(term.teacher_logits for term in self._terms.values())

    def for_head(self, student: Any) -> None:
        """Tells the terms what the student's head predicts. Raises ValueError for an option that it does not have."""
        for term in self._terms.values():
            term.for_head(student.get_output_embeddings() is not None)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher: a regression on gold scores does not."""
        return bool(self.hidden or self.attention or self.needs_teacher_logits)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Counts the items of a batch: `Counts` as one int64 tensor on the batch's device, without a host sync.

        Counts add up over micro-batches and processes; `forward` takes the sum as `num_items`.
        """
        return count_items(batch, self.options.parity)

    def forward(
        self, student: States, teacher: States | None = None, *,
        mask: Tensor | None = None, num_items: Tensor | None = None, **targets: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Returns the losses of one batch, by term, each a scalar.

        Args:
            student, teacher: captured states; a regression needs no teacher.
            mask: `(B, L)`, 1 or True = a token, or a frame of sound, 0 or False = padding; None: no padding.
            num_items: the sum of `count` over everything that makes one optimiser step; None: this batch alone.
            targets: `labels`, `teacher_logits`, `topk` and `next_token_loss`, fields of
                `fastdistill.train.terms.Batch`.
        """
        if teacher is None and (self.hidden or self.attention):
            raise ValueError(f"teacher is None; the terms {self.terms} need the teacher's states")
        check_lengths(student, teacher, mask)
        counts = Counts() if num_items is None else Counts(*num_items.unbind())
        mask = None if mask is None else mask.bool()
        batch = Batch(student, teacher or States({}, {}, None), mask, counts=counts, **targets)
        return {name: term.loss(batch) for name, term in self._terms.items()}

    def settings(self) -> dict[str, Any]:
        """Returns everything but the projections' weights as plain values: the arguments of an equal objective."""
        layer_map = list(self.layer_map) if self.options.method == "tinybert" else None
        return {**asdict(self.options), "terms": list(self.terms), "layer_map": layer_map}

    def check_settings(self, folder: str | Path) -> None:
        """Raises ValueError where `folder` was trained with other settings, naming those, or holds no run."""
        path = Path(folder) / SETTINGS_NAME
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {folder} is no run of a stage. Pass overwrite=True to replace it")
        found, asked = read_json(path), self.settings()
        different = [name for name in asked if found.get(name, asked[name]) != asked[name]]
        if different:
            changes = ", ".join(f"{name} {found[name]!r} instead of {asked[name]!r}" for name in different)
            raise ValueError(f"{folder} was trained with {changes}; ask for the same to go on, or pass overwrite=True")

    def save(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes `objective.json`, and the projections' weights to `projections.safetensors` if there are any."""
        folder = Path(folder)
        state_dict = self.state_dict() if state_dict is None else state_dict
        with writing(folder):
            (folder / SETTINGS_NAME).write_text(json.dumps(self.settings(), indent=2) + "\n")
            if state_dict:
                save_file({name: x.contiguous() for name, x in state_dict.items()}, folder / PROJECTIONS_NAME)

    def load_projections(self, folder: str | Path) -> None:
        """Reads the projections of an objective with the same layer map and projection, see `read_projections`.

        Projections that this objective's terms do not use are left out. Raises FileNotFoundError, and ValueError
        where a projection of this objective is missing there or has another shape.
        """
        saved = read_projections(folder)
        if not saved:
            raise FileNotFoundError(
                f"{Path(folder) / PROJECTIONS_NAME}: no such file; a stage with projections writes it"
            )
        expected, found = ({name: tuple(x.shape) for name, x in side.items()} for side in (self.state_dict(), saved))
        if not expected.items() <= found.items():
            kind = projection_kind(saved)
            way_out = "the same layer map and models, and no terms that the earlier stage left out"
            if kind != self.options.projection:
                way_out = f"projection={kind!r}"
            raise ValueError(
                f"{folder} holds {kind!r} projections, {found}; this objective has {expected}. Use {way_out}"
            )
        self.load_state_dict({name: saved[name] for name in expected})


def read_projections(folder: str | Path) -> dict[str, Tensor]:
    """Reads a stage's `projections.safetensors`, or a published TinyBERT's `fit_dense`. Empty without either."""
    path = Path(folder) / PROJECTIONS_NAME
    if not path.is_file():
        return load_published_projections(folder)
    with reading(path):
        return load_file(path)


def projection_kind(projections: Mapping[str, Tensor]) -> str:
    """Returns "shared" or "per_layer" for the result of `read_projections`."""
    return "shared" if "projections.shared.weight" in projections else "per_layer"


def resolve_terms(method: str, terms: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the terms in the order in which they are computed; None: the default ones of the method.

    Raises ValueError for an unknown method, and for terms that it does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it should be one of {tuple(METHODS)}")
    known = METHODS[method]
    if terms is None:
        return tuple(name for name, term in known.items() if term.by_default)
    if not terms or isinstance(terms, str) or not known.keys() >= set(terms):
        raise ValueError(
            f"terms is {terms!r}; it should be a sequence out of {tuple(known)}, those of method {method!r}"
        )
    return tuple(term for term in known if term in terms)


def check_method_options(method: Any = "tinybert", **options: Any) -> None:
    """Raises ValueError for a wrong field of `ObjectiveOptions`, and for one that the method does not have."""
    given = ObjectiveOptions(method=method, **options)
    for name, hint in get_type_hints(ObjectiveOptions).items():
        value, choices = getattr(given, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{name} is {value!r}; it should be one of {choices}")
    if not given.temperature > 0:
        raise ValueError(f"temperature is {given.temperature!r}; it should be above 0")
    if not 0 <= given.alpha <= 1:
        raise ValueError(f"alpha is {given.alpha!r}; it should be from 0 to 1")
    if given.alpha < 1 and given.parity == "official":
        raise ValueError(f"alpha is {given.alpha}; parity 'official' has no labels in its loss: use 'masked'")
    if given.tail == "bucket" and given.temperature != 1:
        raise ValueError(f"temperature is {given.temperature}; tail 'bucket' needs 1, where its mass is known")
    if method == "tinybert" and given.teacher_layer is not None:
        raise ValueError(
            f"teacher_layer is {given.teacher_layer}; method 'tinybert' compares the layers that layer_map says"
        )
    if method != "minilmv2" and given.relation_heads is not None:
        raise ValueError(f"relation_heads is {given.relation_heads}; method {method!r} has none, 'minilmv2' has")
    if method != "tinybert" and given.layer_map is not None:
        raise ValueError(
            f"layer_map is {given.layer_map!r}; method {method!r} compares the student's last layer with one of the "
            "teacher's: leave it out, and choose that layer with teacher_layer"
        )
    if method != "tinybert" and given.parity == "official":
        raise ValueError(f"parity is 'official', which is TinyBERT's published code; method {method!r} has 'masked'")


def check_layers(config: Any, whose: str, terms: Sequence[str]) -> None:
    """Raises ValueError if a config describes no layers of one width, which the inner terms compare."""
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size")]
    in_stages = any(hasattr(config, name) for name in ("depths", "hidden_sizes"))
    if in_stages or not all(isinstance(size, int) for size in sizes):
        found = "describes stages of different widths" if in_stages else "has no num_hidden_layers and hidden_size"
        raise ValueError(
            f"{whose}'s config, a {type(config).__name__}, {found}; the terms {list(terms)} compare layers of one "
            'width: use terms=("prediction",), or a model of equal layers, such as ViT'
        )


def check_lengths(student: States, teacher: States | None, mask: Tensor | None) -> None:
    """Raises ValueError if the student's states, the teacher's and the mask are not of one length."""
    length, target = student.length, None if teacher is None else teacher.length
    if length is None:
        return
    if target is not None and length != target:
        raise ValueError(
            f"the student makes {length} states (tokens, patches or frames) of a row, the teacher {target}; inner "
            "terms compare them one by one. Give the student the teacher's image size, patch size and special tokens, "
            'or its convolutions over sound, or use terms=("prediction",)'
        )
    if mask is not None and mask.shape[1] != length:
        raise ValueError(
            f"the mask is for {mask.shape[1]} states (tokens or frames) of a row, and the student makes {length}, as "
            'SEW does, which joins frames; use terms=("prediction",)'
        )


def resolve_layers(
    options: ObjectiveOptions, student_config: Any, teacher_config: Any
) -> tuple[ObjectiveOptions, tuple[int | None, ...]]:
    """Fills in the defaults that depend on the models, and returns the layer map of any method beside them."""
    layers = student_config.num_hidden_layers, teacher_config.num_hidden_layers
    if options.method == "tinybert":
        return options, resolve_layer_map("uniform" if options.layer_map is None else options.layer_map, *layers)
    target = layers[1] if options.teacher_layer is None else options.teacher_layer
    if not 1 <= target <= layers[1]:
        raise ValueError(f"teacher_layer is {target}; it should be 1..{layers[1]}, the teacher's layers")
    if options.method == "minilmv2":
        heads = check_relation_heads(student_config, teacher_config, options.relation_heads)
        options = replace(options, relation_heads=heads)
    return replace(options, teacher_layer=target), (*[None] * layers[0], target)


def resolve_layer_map(
    layer_map: str | Sequence[int | None], student_layers: int, teacher_layers: int
) -> tuple[int | None, ...]:
    """Returns the teacher's hidden state for each of the student's hidden states 0..M; None: it learns from none.

    Hidden state 0 is the embedding output and hidden state i the output of layer i, so a map of M layers has M + 1
    entries. With N teacher layers:

    - "uniform": i <- i N / M; M must divide N. As published.
    - "top": i <- i + N - M, the teacher's upper layers; 0 <- 0.
    - "bottom": i <- i, the teacher's lower layers.
    - "last": only M <- N, and 0 <- 0.
    - a sequence of M + 1 indices or None.

    Raises ValueError saying which entry is wrong.
    """
    m, n = student_layers, teacher_layers
    if isinstance(layer_map, str):
        return _named_layer_map(layer_map, m, n)
    if len(layer_map) != m + 1:
        raise ValueError(
            f"layer_map has {len(layer_map)} entries; a student of {m} layers has {m + 1} hidden states, of which "
            "entry 0 is the embedding output"
        )
    for i, index in enumerate(layer_map):
        if index is not None and not (isinstance(index, int) and 0 <= index <= n):
            raise ValueError(f"layer_map[{i}] is {index!r}; it should be None or 0..{n}, the teacher's hidden states")
    return tuple(layer_map)


def _named_layer_map(name: str, m: int, n: int) -> tuple[int | None, ...]:
    listed = f"a list of {m + 1} teacher indices"
    if name == "last":
        return (0, *[None] * (m - 1), n)
    if name not in ("uniform", "top", "bottom"):
        raise ValueError(f"layer_map is {name!r}; it should be 'uniform', 'top', 'bottom', 'last' or {listed}")
    if m > n:
        raise ValueError(
            f"layer_map {name!r} needs a teacher at least as deep as the student; the student has {m} layers, the "
            f"teacher {n}. Give {listed}"
        )
    if name == "uniform" and n % m:
        raise ValueError(
            f"layer_map 'uniform' needs a student depth that divides the teacher's; {m} does not divide {n}. "
            f"Use 'top', 'bottom', 'last' or {listed}"
        )
    step, shift = n // m if name == "uniform" else 1, n - m if name == "top" else 0
    return (0, *(shift + step * i for i in range(1, m + 1)))
