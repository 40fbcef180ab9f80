"""Compares MiniLM and MiniLMv2 with the papers' formulas on the outputs of the models' Linears; runs whole stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from losses.test_memory import peak_bytes
from test_stages import QUICK, StopAt, assert_equal, history
from test_trainer import _one_step, _trainer_rank, assert_same_step, two_processes
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastdistill import attention_kl
from fastdistill.train.capture import LayerAttention, States, capturable, capture
from fastdistill.train.objective import Objective, resolve_terms
from fastdistill.train.stages import GeneralStage, IntermediateStage

# -- the formulas, in float64 on materialised relations ----------------------------------------------------------

VECTORS = {
    "attention": ("query", "key"),
    "query_relation": ("query", "query"),
    "key_relation": ("key", "key"),
    "value_relation": ("value", "value"),
}


def rotated(x: Tensor) -> Tensor:
    """Applies the rotary embedding (RoFormer, with Llama's pairs of dimensions) to (H, L, D)."""
    length, width = x.shape[-2:]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def layer_vectors(model: PreTrainedModel, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Returns query, key and value (H, L, D) of one row in `layer`, counted from 1, out of its Linears' outputs."""
    found: dict[str, Tensor] = {}
    is_bert = model.config.model_type == "bert"
    block = model.encoder.layer[layer - 1].attention.self if is_bert else model.layers[layer - 1].self_attn
    names = {name: name if is_bert else f"{name[0]}_proj" for name in ("query", "key", "value")}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, output[0])

    handles = [getattr(block, inner).register_forward_hook(keep(name)) for name, inner in names.items()]
    model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    split = {name: x.unflatten(-1, (-1, width)).transpose(0, 1) for name, x in found.items()}
    if not is_bert:
        split = {name: x if name == "value" else rotated(x) for name, x in split.items()}
    return {name: x.repeat_interleave(heads // len(x), dim=0) for name, x in split.items()}


def resplit_heads(x: Tensor, heads: int) -> Tensor:  # (H, L, D) -> (heads, L, H D / heads)
    wide = torch.cat(list(x), dim=-1)
    return torch.stack(wide.split(wide.shape[-1] // heads, dim=-1))


def published(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Computes the terms without padding, one row at a time: the summed KL divergences, divided by heads and tokens."""
    ((student_layer, teacher_layer),) = objective.attention.items()
    sums: dict[str, Tensor] = {}
    count = 0
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for ids, real in zip(batch["input_ids"], mask, strict=True):
        ours = layer_vectors(student, ids[real], student_layer)
        with torch.no_grad():
            theirs = layer_vectors(teacher, ids[real], teacher_layer)
        length = int(real.sum())
        count += length
        is_causal = student.config.model_type == "llama"
        forbidden = torch.ones(length, length, dtype=torch.bool).triu(1 if is_causal else length)
        for term in objective.terms:
            logs = []
            for vectors in (ours, theirs):
                x, y = (vectors[name] for name in VECTORS[term])
                if objective.options.relation_heads is not None:
                    x, y = (
                        resplit_heads(x, objective.options.relation_heads),
                        resplit_heads(y, objective.options.relation_heads),
                    )
                scores = x @ y.mT / x.shape[-1] ** 0.5
                logs.append(scores.masked_fill(forbidden, -1e30).log_softmax(-1))
            divergence = F.kl_div(logs[0], logs[1], log_target=True, reduction="sum") / len(x)
            sums[term] = sums.get(term, torch.zeros(())) + divergence
    return {term: value / count for term, value in sums.items()}


def captured(
    objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[States, States]:
    with capturable(student, teacher):
        values = objective.needs_values
        states = capture(student, batch, attention=tuple(objective.attention), values=values)
        with torch.no_grad():
            targets = capture(teacher, batch, attention=set(objective.attention.values()), values=values)
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


def gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True, retain_graph=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


def disagreement(found: dict[str, Tensor], truth: dict[str, Tensor], model: PreTrainedModel) -> float:
    """Returns the largest relative error among the terms' values and their gradients for every parameter."""
    assert list(found) == list(truth)
    errors = []
    for term, loss in truth.items():
        errors.append(error(found[term], loss))
        ours, theirs = gradients(found[term], model), gradients(loss, model)
        assert ours.keys() == theirs.keys()
        largest = max(gradient.norm() for gradient in theirs.values())
        for name, gradient in theirs.items():
            if gradient.norm() > 1e-9 * largest:
                errors.append(error(ours[name], gradient))
            else:  # a key's bias shifts all scores of a row alike, which softmax ignores
                assert ours[name].norm() < 1e-6 * largest, (term, name)
    return max(errors)


CASES = {
    "minilm": ("bert", {}, {}, {"method": "minilm"}),
    "minilm-upper-middle": ("bert", {}, {}, {"method": "minilm", "teacher_layer": 3}),
    "minilm-grouped": ("llama", {}, {"num_key_value_heads": 4}, {"method": "minilm"}),
    "minilmv2-narrower": ("bert", {"num_attention_heads": 2}, {}, {"method": "minilmv2", "relation_heads": 8}),
    "minilmv2-wider": ("bert", {}, {}, {"method": "minilmv2", "relation_heads": 2, "teacher_layer": 3}),
    "minilmv2-grouped": (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {},
        {"method": "minilmv2", "relation_heads": 4},
    ),
}


def models(case: str) -> tuple[Objective, PreTrainedModel, PreTrainedModel]:
    family, student_options, teacher_options, options = CASES[case]
    student = _tiny.model(family, layers=2, width=16, **student_options).double()
    teacher = _tiny.model(family, layers=4, width=24, **teacher_options).double()
    return Objective(student.config, teacher.config, **options), student, teacher


@pytest.mark.parametrize("padded", [None, "right"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_published_ones(case: str, padded: str | None) -> None:
    objective, student, teacher = models(case)
    batch = _tiny.batch(rows=3, length=11, padded=padded)
    truth = published(objective, student, teacher, batch)
    assert tuple(truth) == resolve_terms(objective.options.method)
    found = computed(objective, student, teacher, batch)
    # transformers computes rotary embeddings in float32
    assert disagreement(found, truth, student) < (1e-5 if "grouped" in case else 1e-9)


def test_the_cases_tell_layers_and_heads_apart() -> None:
    """A wrong layer, or another number of relation heads, gives other losses."""
    objective, student, teacher = models("minilmv2-wider")
    batch = _tiny.batch()
    truth = published(objective, student, teacher, batch)
    for options in ({"relation_heads": 2}, {"relation_heads": 4, "teacher_layer": 3}):
        other = Objective(student.config, teacher.config, method="minilmv2", **options)
        for term, loss in published(other, student, teacher, batch).items():
            assert error(loss, truth[term]) > 0.01


def wrong(kind: str, *vectors: Tensor, **options: Any) -> Tensor:
    """Computes the op with a planted error."""
    if kind == "scale":
        options["student_scale"] = 1.0
    elif kind == "mean":
        rows = options["query_mask"].sum()
        return attention_kl(*vectors, **options, reduction="sum") / rows
    elif kind == "keys":
        options["key_mask"] = None
    elif kind == "queries":
        options["query_mask"] = None
    elif kind == "sides":
        student, teacher = vectors[:2], vectors[2:]
        return attention_kl(*(x.detach() for x in teacher), *(x.detach() for x in student), **options) + sum(
            0 * x.sum() for x in student
        )
    loss = attention_kl(*vectors, **options)
    return loss.detach() + 1.05 * (loss - loss.detach()) if kind == "gradient" else loss


@pytest.mark.parametrize("case", ["minilm", "minilmv2-narrower"])
@pytest.mark.parametrize("kind", ["none", "scale", "mean", "keys", "queries", "sides", "gradient"])
def test_a_planted_error_is_seen(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistill.functional.attention_kl", partial(wrong, kind))
    objective, student, teacher = models(case)
    batch = _tiny.batch()
    truth = published(objective, student, teacher, batch)
    found = disagreement(computed(objective, student, teacher, batch), truth, student)
    assert found < 1e-9 if kind == "none" else found > 0.01


# -- masks, accumulation, processes ------------------------------------------------------------------------------


METHOD_OPTIONS = [{"method": "minilm"}, {"method": "minilmv2", "relation_heads": 8}]
METHOD_IDS = ["minilm", "minilmv2"]


@pytest.mark.parametrize("options", METHOD_OPTIONS, ids=METHOD_IDS)
@pytest.mark.parametrize("family", _tiny.FAMILIES)
def test_every_family_ignores_padding_and_adds_up_over_micro_batches(family: str, options: dict[str, Any]) -> None:
    student, teacher = _tiny.model(family, layers=2, width=16), _tiny.model(family, layers=3, width=24)
    objective = Objective(student.config, teacher.config, **options)
    batch = _tiny.batch(rows=3, length=11)
    whole = computed(objective, student, teacher, batch)
    assert all(loss > 0 for loss in whole.values())

    lengths = batch["attention_mask"].sum(1)
    rows = [{"input_ids": ids[None, :n]} for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    alone = [computed(objective, student, teacher, row) for row in rows]
    parts = [{name: x[piece] for name, x in batch.items()} for piece in (slice(0, 1), slice(1, 3))]
    count = sum(objective.count(part) for part in parts)
    pieces = [computed(objective, student, teacher, part, num_items=count) for part in parts]
    for term, loss in whole.items():
        weighted = sum(n * found[term] for n, found in zip(lengths, alone, strict=True)) / lengths.sum()
        assert error(weighted, loss) < 1e-4
        assert error(sum(piece[term] for piece in pieces), loss) < 1e-5
        assert error(sum(found[term] for found in alone) / 3, loss) > 1e-3  # a mean of means differs


@pytest.mark.parametrize("options", METHOD_OPTIONS, ids=METHOD_IDS)
def test_the_narrower_window_of_both_sides_applies(options: dict[str, Any]) -> None:
    """Layer 3 of ModernBERT is local; a window of 4 reaches 2 to either side."""
    student, teacher = (
        _tiny.model("modernbert", layers=3, width=width, local_attention=window).double()
        for width, window in ((16, 8), (24, 4))
    )
    objective = Objective(student.config, teacher.config, **options)
    states, targets = captured(objective, student, teacher, _tiny.batch(rows=1, length=12, padded=None))
    losses = objective(states, targets)
    positions = torch.arange(12)
    far = (positions[:, None] - positions).abs() > 2
    for term, loss in losses.items():
        logs = []
        for layer in (states.attention[3], targets.attention[3]):
            x, y = (getattr(layer, name)[0] for name in VECTORS[term])
            if objective.options.relation_heads is not None:
                x, y = (resplit_heads(vector, objective.options.relation_heads) for vector in (x, y))
            scores = (x @ y.mT / x.shape[-1] ** 0.5).masked_fill(far, -1e30)
            logs.append(scores.log_softmax(-1))
        assert error(loss, F.kl_div(*logs, log_target=True, reduction="sum") / (12 * len(x))) < 1e-9
    assert set(losses) == set(resolve_terms(options["method"]))


@pytest.mark.parametrize("options", METHOD_OPTIONS, ids=METHOD_IDS)
def test_accumulation_and_two_processes_take_the_step_of_one_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    objective = {**options, "terms": resolve_terms(options["method"])}
    expected = _one_step(tmp_path / "one", objective, per_device_train_batch_size=8)
    found = _one_step(tmp_path / "four", objective, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_step(found, expected)
    for found in two_processes(_trainer_rank, tmp_path, objective):
        assert_same_step(found, expected)


# -- captured values and memory ----------------------------------------------------------------------------------


def test_values_are_captured_only_for_terms_that_compare_them() -> None:
    student, teacher = _tiny.model(layers=2, width=16), _tiny.model(layers=4, width=24)
    for terms in ("attention",), ("value_relation",):
        objective = Objective(student.config, teacher.config, method="minilm", terms=terms)
        for states, layer in zip(captured(objective, student, teacher, _tiny.batch()), (2, 4), strict=True):
            assert list(states.attention) == [layer]
            assert states.hidden == {}
            assert (states.attention[layer].value is not None) == (terms == ("value_relation",))
    objective = Objective(student.config, teacher.config)
    states, _ = captured(objective, student, teacher, _tiny.batch())
    assert all(layer.value is None for layer in states.attention.values())
    with capturable(student):
        states = capture(student, _tiny.batch(), attention=[2])
    with pytest.raises(ValueError, match=r"captured without its values.*capture\(values=True\)"):
        Objective(student.config, student.config, method="minilm", terms=("value_relation",))(states, states)


def random_layer(length: int, heads: int, kv_heads: int, width: int) -> LayerAttention:
    query, key, value = (torch.randn(1, n, length, width) for n in (heads, kv_heads, kv_heads))
    return LayerAttention(query, key, width**-0.5, None, None, False, value)


@pytest.mark.parametrize("method", ["minilm", "minilmv2"])
def test_memory_is_linear_in_the_length(method: str) -> None:
    configs = (_tiny.config(layers=1, width=width, num_attention_heads=4) for width in (32, 64))
    options = {"relation_heads": 8} if method == "minilmv2" else {}
    objective = Objective(*configs, method=method, **options)

    def peak(length: int) -> int:
        student, teacher = random_layer(length, 4, 2, 8), random_layer(length, 4, 2, 16)
        mask = torch.arange(length)[None] < length - 7
        learned = [x.requires_grad_() for x in (student.query, student.key, student.value) if x is not None]

        def step() -> None:
            losses = objective(States({}, {1: student}, None), States({}, {1: teacher}, None), mask=mask)
            torch.autograd.grad(torch.stack(list(losses.values())).sum(), learned)

        return peak_bytes(step)

    short, long = peak(512), peak(2048)
    scores = 2 * 4 * 4 * 2048**2  # bytes of the float32 scores of 4 heads on both sides
    assert long <= 4.3 * short
    assert long - short < 0.1 * scores


# -- whole stages ------------------------------------------------------------------------------------------------

STAGES = {
    "tinybert": {},
    "minilm": {"method": "minilm", "teacher_layer": 3},
    "minilmv2": {"method": "minilmv2", "relation_heads": 4},
}


@pytest.mark.parametrize("method", STAGES)
def test_a_general_stage_learns_resumes_and_saves_its_objective(tmp_path: Path, method: str) -> None:
    corpus, output = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("\n".join(_tiny.texts(100)) + "\n")
    tokenizer, teacher = _tiny.tokenizer(), _tiny.classifier(4, 24, seed=1)
    stage = GeneralStage(
        corpus=[corpus],
        max_length=16,
        epochs=4,
        batch_size=8,
        learning_rate=5e-3,
        arguments={**QUICK, "logging_steps": 5, "save_strategy": "steps", "save_steps": 10},
        **STAGES[method],
    )
    whole = stage.run(_tiny.classifier(), teacher, tokenizer, tmp_path / "whole")
    log = [entry for entry in history(tmp_path / "whole") if "loss" in entry]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    for term in resolve_terms(method):
        assert log[-1][term] < log[0][term], term

    with pytest.raises(KeyboardInterrupt):
        stage.run(_tiny.classifier(), teacher, tokenizer, output, callbacks=[StopAt(13)])
    again = stage.run(_tiny.classifier(seed=3), teacher, tokenizer, output, resume=True)
    assert_equal(whole, again)

    settings = json.loads((output / "objective.json").read_text())
    assert settings["method"] == method
    assert Objective(whole.config, teacher.config, **settings).settings() == settings
    assert (output / "projections.safetensors").exists() == (method == "tinybert")


def test_prediction_is_learnt_along_with_relations(tmp_path: Path) -> None:
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24, seed=1)
    head = student.classifier.weight.detach().clone()
    stage = IntermediateStage(
        dataset=_tiny.dataset(),
        epochs=8,
        batch_size=8,
        learning_rate=5e-3,
        method="minilm",
        terms=("attention", "value_relation", "prediction"),
        arguments=QUICK,
    )
    stage.run(student, teacher, _tiny.tokenizer(), tmp_path / "out")
    log = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    for term in ("attention", "value_relation", "prediction"):
        assert log[-1][term] < log[0][term], term
    assert not torch.equal(student.classifier.weight, head)


def test_a_stage_loads_the_projections_of_its_terms(tmp_path: Path) -> None:
    """A stage on attention alone writes none; a stage needs those of all its terms from the stage that it reads."""
    student, teacher, tokenizer = _tiny.classifier(), _tiny.classifier(4, 24), _tiny.tokenizer()
    options: dict[str, Any] = {"dataset": _tiny.dataset(8), "epochs": 1, "batch_size": 8, "projection": "per_layer"}
    options["arguments"] = QUICK

    def run(name: str, **more: Any) -> Path:
        IntermediateStage(**{**options, **more}).run(student, teacher, tokenizer, tmp_path / name)
        return tmp_path / name

    full = run("full")
    attention = run("attention", terms=("attention",), projections=full)
    assert not (attention / "projections.safetensors").exists()
    fewer = run("fewer", terms=("hidden",), projections=full, learning_rate=0.0)
    first, second = (
        Objective(student.config, teacher.config, projection="per_layer", terms=("hidden",)) for _ in range(2)
    )
    first.load_projections(full)
    second.load_projections(fewer)
    assert_equal(first, second)
    with pytest.raises(ValueError, match="no terms that the earlier stage left out"):
        run("more", projections=fewer)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "minilmv3"}, r"method is 'minilmv3'; it should be one of \('tinybert', 'minilm', 'minilmv2'\)"),
        ({"method": "minilm", "terms": ("hidden",)}, r"terms is \('hidden',\).*'value_relation'.*method 'minilm'"),
        ({"terms": ("value_relation",)}, "those of method 'tinybert'"),
        ({"teacher_layer": 2}, "teacher_layer is 2; method 'tinybert' compares the layers that layer_map says"),
        ({"relation_heads": 8}, "relation_heads is 8; method 'tinybert' has none"),
        ({"method": "minilm", "relation_heads": 8}, "relation_heads is 8; method 'minilm' has none"),
        ({"method": "minilm", "teacher_layer": 5}, "teacher_layer is 5; it should be 1..4"),
        ({"method": "minilm", "teacher_layer": 0}, "teacher_layer is 0"),
        ({"method": "minilm", "layer_map": "top"}, "layer_map is 'top'.*choose that layer with teacher_layer"),
        ({"method": "minilm", "parity": "official"}, "parity is 'official'"),
        ({"method": "minilmv2"}, "48 by default.*16 of the student and 24 of the teacher: 1, 2, 4, 8"),
        ({"method": "minilmv2", "relation_heads": 3}, "relation_heads is 3; it should divide"),
        ({"method": "minilmv2", "relation_heads": 0}, "relation_heads is 0"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(_tiny.config(layers=2, width=16), _tiny.config(layers=4, width=24), **options)


@pytest.mark.parametrize("method", ["tinybert", "minilm"])
def test_different_numbers_of_heads_suggest_minilmv2(method: str) -> None:
    student, teacher = _tiny.config(layers=2), _tiny.config(layers=4, num_attention_heads=6)
    with pytest.raises(ValueError, match=r'the student has 4 attention heads, the teacher 6.*method="minilmv2"'):
        Objective(student, teacher, method=method)
    assert Objective(student, teacher, method="minilmv2", relation_heads=12).attention == {2: 4}
