"""Compares the objective with its formulas on materialised attention scores; `test_parity` has the published losses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastdistill.train.capture import States, capturable, capture
from fastdistill.train.objective import Objective, resolve_layer_map, resolve_terms

INNER_TERMS = resolve_terms("tinybert")
TERMS = (*INNER_TERMS, "prediction")

# -- the formulas ----------------------------------------------------------------------------------


@contextmanager
def linear_outputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that collects the output of each Linear of a model by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, output)

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield found
    for handle in handles:
        handle.remove()


def bert_internals(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns hidden states (B, L, d) and raw scores QK^T / sqrt(D) (B, H, L, L) from a BERT's eager forward pass."""
    with linear_outputs(model) as outputs:
        hidden = list(model(**batch, output_hidden_states=True).hidden_states)
    scores = []
    for i in range(len(hidden) - 1):
        query, key = (
            outputs[f"encoder.layer.{i}.attention.self.{name}"].unflatten(-1, (4, -1)).transpose(1, 2)
            for name in ("query", "key")
        )
        scores.append(query @ key.mT / query.shape[-1] ** 0.5)
    return hidden, scores


def masked(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    projections: list[torch.nn.Linear],
    layer_map: list[int],
    batch: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Computes the losses without padding, one row at a time: sums of squares divided by their number of entries."""
    sums = {"embedding": torch.zeros(()), "hidden": torch.zeros(()), "attention": torch.zeros(())}
    tokens = pairs = 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        row = {"input_ids": ids[mask][None]}
        s_hidden, s_scores = bert_internals(student, row)
        with torch.no_grad():
            t_hidden, t_scores = bert_internals(teacher, row)
        tokens += int(mask.sum())
        pairs += t_scores[0].numel()
        for i, j in enumerate(layer_map):
            distance = (projections[i](s_hidden[i]) - t_hidden[j]).square().mean(-1).sum()
            sums["hidden" if i else "embedding"] = sums["hidden" if i else "embedding"] + distance
            if i > 0:
                sums["attention"] = sums["attention"] + (s_scores[i - 1] - t_scores[j - 1]).square().sum()
    return {
        "embedding": sums["embedding"] / tokens,
        "hidden": sums["hidden"] / tokens,
        "attention": sums["attention"] / pairs,
    }


def captured(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[States, States]:
    mapped = objective.hidden, objective.attention
    with capturable(student, teacher) if objective.attention else capturable():
        states = capture(student, batch, hidden=tuple(mapped[0]), attention=tuple(mapped[1]))
        with torch.no_grad():
            targets = capture(teacher, batch, hidden=set(mapped[0].values()), attention=set(mapped[1].values()))
    return states, targets


def computed(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Mapping[str, Tensor],
    **arguments: Any,
) -> dict[str, Tensor]:
    states, targets = captured(objective, student, teacher, batch)
    return objective(states, targets, mask=batch.get("attention_mask"), **arguments)


def gradients(loss: Tensor, *modules: torch.nn.Module) -> dict[str, Tensor]:
    named = {f"{i}.{name}": p for i, module in enumerate(modules) for name, p in module.named_parameters()}
    found = torch.autograd.grad(loss, tuple(named.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return _tiny.model("bert", layers=2, width=16)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return _tiny.model("bert", layers=4, width=24)


@pytest.mark.parametrize("projection", ["shared", "per_layer"])
def test_losses_and_gradients_equal_those_without_padding(
    student: PreTrainedModel, teacher: PreTrainedModel, projection: str
) -> None:
    batch, layer_map = _tiny.batch(rows=3, length=11), [0, 2, 4]
    objective = Objective(student.config, teacher.config, projection=projection)
    projections = [objective.projections["shared" if projection == "shared" else str(i)] for i in range(3)]
    assert len(set(projections)) == (1 if projection == "shared" else 3)
    losses = computed(objective, student, teacher, batch)
    expected = masked(student, teacher, projections, layer_map, batch)
    assert list(losses) == list(INNER_TERMS)
    for term, loss in losses.items():
        assert error(loss, expected[term]) < 1e-5, term
        found = gradients(loss, student, objective)
        truth = gradients(expected[term], student, objective)
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            if gradient.norm() > 1e-6:  # softmax ignores a key's bias, so its gradient is rounding
                assert error(found[name], gradient) < 2e-4, (term, name)


@pytest.mark.parametrize("terms", [("embedding",), ("hidden",), ("attention",), ("embedding", "attention")])
def test_terms_can_be_switched_off(student: PreTrainedModel, teacher: PreTrainedModel, terms: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    everything = Objective(student.config, teacher.config)
    torch.manual_seed(3)
    some = Objective(student.config, teacher.config, terms=terms)
    assert len(some.projections) == (0 if terms == ("attention",) else 1)
    losses = computed(some, student, teacher, _tiny.batch())
    assert tuple(losses) == terms
    full = computed(everything, student, teacher, _tiny.batch())
    assert all(torch.equal(losses[term], full[term]) for term in terms)


@pytest.mark.parametrize("family", [name for name in _tiny.FAMILIES if name != "mistral"])
def test_every_family_distils_and_ignores_padding(family: str) -> None:
    student, teacher = _tiny.model(family, layers=1, width=16), _tiny.model(family, layers=3, width=24)
    objective = Objective(student.config, teacher.config, layer_map=[0, 2])
    batch = _tiny.batch(rows=2, length=9, padded="right")
    losses = computed(objective, student, teacher, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    sums, pairs = dict.fromkeys(INNER_TERMS, 0.0), []
    for ids, length in zip(batch["input_ids"], lengths, strict=True):
        row = {"input_ids": ids[None, :length]}
        states, targets = captured(objective, student, teacher, row)
        pairs.append(allowed_pairs(states, targets))
        alone = objective(states, targets)
        for term, loss in alone.items():
            sums[term] += loss.item() * (pairs[-1] if term == "attention" else length)
    for term, loss in losses.items():
        assert loss.item() == pytest.approx(
            sums[term] / (sum(pairs) if term == "attention" else sum(lengths)), rel=1e-4
        )


def allowed_pairs(student: States, teacher: States) -> int:
    layers = [*student.attention.values(), *teacher.attention.values()]
    length = layers[0].query.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool)
    for layer in layers:
        allowed = allowed.tril() if layer.is_causal else allowed
        assert layer.attn_mask is None
        allowed = allowed if layer.window is None else allowed.tril(layer.window[1]).triu(-layer.window[0])
    return int(allowed.sum())


@pytest.mark.parametrize(("student_layer", "windows"), [(2, (4, 8)), (2, (8, 4)), (1, (4, 4))])  # layer 1 is global
def test_only_pairs_inside_both_windows_count(student_layer: int, windows: tuple[int, int]) -> None:
    student, teacher = (
        _tiny.model("modernbert", layers=3, width=width, local_attention=window)
        for width, window in zip((16, 24), windows, strict=True)
    )
    layer_map = [None, 2, None, None] if student_layer == 1 else [None, None, 2, None]
    objective = Objective(student.config, teacher.config, terms=("attention",), layer_map=layer_map)
    states, targets = captured(objective, student, teacher, _tiny.batch(rows=1, length=12, padded=None))
    s, t = states.attention[student_layer], targets.attention[2]
    positions = torch.arange(12)
    near = (positions[:, None] - positions).abs() <= 2  # the narrower window, 4, reaches 2 to either side
    distance = s.scale * s.query @ s.key.mT - t.scale * t.query @ t.key.mT
    assert error(objective(states, targets)["attention"], distance[:, :, near].square().mean()) < 1e-5


# -- accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("parity", ["masked", "official"])
def test_micro_batches_add_up_to_one_batch(parity: str, family: str) -> None:
    student, teacher = _tiny.model(family, layers=2, width=16), _tiny.model(family, layers=4)
    objective = Objective(student.config, teacher.config, parity=parity)
    batch = _tiny.batch(rows=3, length=11)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    count = sum(objective.count(part) for part in parts)
    assert torch.equal(count, objective.count(batch))
    whole = computed(objective, student, teacher, batch)
    pieces = [computed(objective, student, teacher, part, num_items=count) for part in parts]
    alone = [computed(objective, student, teacher, part) for part in parts]
    for term, loss in whole.items():
        assert error(sum(piece[term] for piece in pieces), loss) < 1e-5
        if parity == "masked":
            assert error(sum(piece[term] for piece in alone) / 2, loss) > 1e-3  # a mean of means differs


def test_micro_batches_with_windows_are_weighted_by_their_tokens() -> None:
    student, teacher = _tiny.model("mistral", layers=2, width=16), _tiny.model("mistral", layers=4)
    objective = Objective(student.config, teacher.config, terms=("attention",))
    batch = _tiny.batch(rows=3, length=11)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    count = sum(objective.count(part) for part in parts)
    pieces = [computed(objective, student, teacher, part, num_items=count)["attention"] for part in parts]
    alone = [computed(objective, student, teacher, part)["attention"] for part in parts]
    tokens = [int(part["attention_mask"].sum()) for part in parts]
    expected = sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens)
    assert error(sum(pieces), expected) < 1e-5


def test_counts_equal_those_worked_out_by_hand() -> None:
    objective = Objective(_tiny.config(layers=2), _tiny.config(layers=4))
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    # rows, tokens, pairs 16 + 4, causal pairs 10 + 3, labelled tokens, tokens with a successor
    assert objective.count({"input_ids": ids, "attention_mask": mask}).tolist() == [2, 6, 20, 13, 6, 4]
    assert objective.count({"input_ids": ids}).tolist() == [2, 8, 32, 20, 8, 6]
    packed = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])
    assert objective.count({"input_ids": ids, "position_ids": packed}).tolist() == [2, 8, 32, 20, 8, 4]
    rows = {"input_ids": ids, "labels": torch.tensor([1, -100])}  # classes of rows
    assert objective.count(rows).tolist() == [2, 8, 32, 20, 1, 6]
    objective = Objective(_tiny.config(layers=2), _tiny.config(layers=4), parity="official")
    assert objective.count({"input_ids": ids, "attention_mask": mask}).tolist() == [2, 8, 32, 20, 6, 4]
    labels = torch.tensor([[-100, 0, -100, 2], [1, 1, -100, 1]])  # labels on padding are not counted
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    # a label counts where it is a target: at the second to last position
    assert objective.count(batch).tolist() == [2, 8, 32, 20, 3, 4]


# -- prediction ----------------------------------------------------------------------------------------------


def only_logits(logits: Tensor) -> States:
    return States(hidden={}, attention={}, logits=logits)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prediction_is_the_soft_cross_entropy_of_a_row(temperature: float) -> None:
    objective = Objective(_tiny.config(num_labels=3), terms=("prediction",), temperature=temperature)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    soft = -(teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)
    expected = soft.sum(-1).mean()
    loss = objective(only_logits(student), only_logits(teacher))["prediction"]
    cached = objective(only_logits(student), teacher_logits=teacher)["prediction"]
    assert torch.equal(loss, cached)
    assert error(loss, expected) < 1e-6
    (found,), (truth,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    assert error(found, truth) < 1e-6

    halves = [
        objective(only_logits(student[rows]), only_logits(teacher[rows]), num_items=torch.tensor([5, 0, 0, 0, 0, 0]))
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert error(sum(half["prediction"] for half in halves), expected) < 1e-6


@pytest.mark.parametrize("parity", ["masked", "official"])
def test_prediction_averages_over_tokens(parity: str) -> None:
    objective = Objective(_tiny.config(), terms=("prediction",), parity=parity)
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    expected = (soft * mask).sum() / 5 if parity == "masked" else soft.mean() / 7
    assert error(objective(only_logits(student), only_logits(teacher), mask=mask)["prediction"], expected) < 1e-6


def test_regression_learns_from_gold_scores_alone() -> None:
    objective = Objective(_tiny.config(num_labels=1), terms=("prediction",))
    assert not objective.needs_teacher
    student, gold = torch.randn(5, 1), torch.rand(5)
    loss = objective(only_logits(student), only_logits(torch.randn(5, 1)), labels=gold)["prediction"]
    assert error(loss, F.mse_loss(student[:, 0], gold)) < 1e-6
    with pytest.raises(ValueError, match="labels is None; a regression learns from gold scores"):
        objective(only_logits(student))


def test_missing_targets_are_named() -> None:
    objective = Objective(_tiny.config(num_labels=3), terms=("prediction",))
    with pytest.raises(ValueError, match="there are no teacher logits"):
        objective(only_logits(torch.randn(2, 3)))
    with pytest.raises(ValueError, match="the student returned no logits"):
        objective(States({}, {}, None), only_logits(torch.randn(2, 3)))
    with pytest.raises(ValueError, match="teacher is None; the terms"):
        Objective(_tiny.config(), _tiny.config())(States({}, {}, None))


# -- layer maps and other settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (0, 3, 6, 9, 12)),
        ("uniform", 3, 3, (0, 1, 2, 3)),
        ("top", 4, 12, (0, 9, 10, 11, 12)),
        ("bottom", 4, 12, (0, 1, 2, 3, 4)),
        ("last", 4, 12, (0, None, None, None, 12)),
        ([0, 1, 3, 4, 6], 4, 6, (0, 1, 3, 4, 6)),
        ([None, 5], 1, 6, (None, 5)),
    ],
)
def test_layer_maps_resolve_to_teacher_layers(layer_map: Any, student: int, teacher: int, expected: Any) -> None:
    assert resolve_layer_map(layer_map, student, teacher) == expected


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "message"),
    [
        ("uniform", 4, 6, "4 does not divide 6"),
        ("top", 4, 3, "the student has 4 layers, the teacher 3"),
        ("middle", 4, 12, "layer_map is 'middle'"),
        ([3, 6, 9, 12], 4, 12, "has 4 entries; a student of 4 layers has 5 hidden states"),
        ([0, 3, 6, 9, 13], 4, 12, r"layer_map\[4\] is 13; it should be None or 0..12"),
        ([0, 3, 6, 9, -1], 4, 12, r"layer_map\[4\] is -1"),
    ],
)
def test_bad_layer_maps_are_refused(layer_map: Any, student: int, teacher: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layer_map(layer_map, student, teacher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": ("hidden", "logits")}, "terms is .*it should be a sequence out of"),
        ({"terms": ()}, "terms is"),
        ({"terms": "hidden"}, "terms is 'hidden'"),
        ({"projection": "none"}, "projection is 'none'"),
        ({"parity": "strict"}, "parity is 'strict'"),
        ({"temperature": 0.0}, "temperature is 0.0; it should be above 0"),
        ({"layer_map": [None, 2, 4]}, r"layer_map\[0\] is None"),
        ({"layer_map": [0, 0, 4]}, "maps a layer to 0"),
        ({"layer_map": [0, None, None]}, "maps no layer"),
    ],
)
def test_bad_settings_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(_tiny.config(layers=2), _tiny.config(layers=4), **options)


def test_different_numbers_of_heads_suggest_relation_losses() -> None:
    student, teacher = _tiny.config(layers=2), _tiny.config(layers=4, num_attention_heads=6)
    with pytest.raises(ValueError, match=r"4 attention heads, the teacher 6.*relation losses with re-split heads"):
        Objective(student, teacher)
    Objective(student, teacher, terms=("embedding", "hidden"))
    with pytest.raises(ValueError, match="teacher_config is None"):
        Objective(student)


def test_terms_without_a_target_are_refused() -> None:
    student, teacher = _tiny.config(layers=2), _tiny.config(layers=4)
    with pytest.raises(ValueError, match="layer_map maps no layer, so the hidden term has no target"):
        Objective(student, teacher, layer_map=[0, None, None], terms=("embedding", "hidden"))
    Objective(student, teacher, layer_map=[0, None, None], terms=("embedding",))
    several = _tiny.config(layers=2, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="'multi_label_classification'; the prediction term compares softmaxes"):
        Objective(several, teacher, terms=("prediction",))
    Objective(several, teacher, terms=("hidden",))


def test_saved_files_hold_settings_and_projections(tmp_path: Path) -> None:
    configs = _tiny.config(layers=2, width=16), _tiny.config(layers=4)
    objective = Objective(*configs, projection="per_layer", layer_map=[0, 1, 4], terms=TERMS, temperature=2)
    objective.save(tmp_path)
    assert json.loads((tmp_path / "objective.json").read_text()) == {
        "method": "tinybert",
        "terms": list(TERMS),
        "layer_map": [0, 1, 4],
        "projection": "per_layer",
        "parity": "masked",
        "temperature": 2.0,
        "t_squared": False,
        "divergence": "soft_cross_entropy",
        "alpha": 1.0,
        "teacher_layer": None,
        "relation_heads": None,
        "scores": "gold",
        "tail": "renormalize",
    }
    again = Objective(*configs, projection="per_layer", layer_map=[0, 1, 4])
    assert not torch.equal(again.projections["1"].weight, objective.projections["1"].weight)
    again.load_projections(tmp_path)
    for i in "012":
        assert torch.equal(again.projections[i].weight, objective.projections[i].weight)
        assert torch.equal(again.projections[i].bias, objective.projections[i].bias)
    with pytest.raises(ValueError, match="Use projection='per_layer'"):
        Objective(*configs).load_projections(tmp_path)
    deeper = Objective(_tiny.config(layers=3, width=16), configs[1], projection="per_layer", layer_map=[0, 1, 2, 4])
    with pytest.raises(ValueError, match="Use the same layer map and models"):
        deeper.load_projections(tmp_path)
    with pytest.raises(FileNotFoundError, match="a stage with projections writes it"):
        again.load_projections(tmp_path / "elsewhere")
