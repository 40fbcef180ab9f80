"""Tests that capturing changes no output and returns the model's own scores and hidden states."""

from __future__ import annotations

from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from fastdistill.train.capture import LayerAttention, capturable, capture

PADDINGS = (None, "right", "left")


def forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def twin(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    other = AutoModel.from_config(model.config, attn_implementation=implementation).eval()
    other.load_state_dict(model.state_dict())
    return other


def probabilities(layer: LayerAttention) -> Tensor:
    """Computes the attention matrix (B, H, L, S) of a captured layer by the definition."""
    heads, length, keys = layer.query.shape[1], layer.query.shape[2], layer.key.shape[2]
    key = layer.key.repeat_interleave(heads // layer.key.shape[1], dim=1)
    scores = layer.scale * layer.query @ key.mT
    allowed = torch.ones(length, keys, dtype=torch.bool)
    if layer.is_causal:
        allowed = allowed.tril()
    if layer.window is not None:
        left, right = layer.window
        allowed = allowed.tril(right).triu(-left)
    allowed = allowed.expand(scores.shape)
    if layer.key_mask is not None:
        allowed = allowed & layer.key_mask[:, None, None]
    if layer.attn_mask is not None:
        allowed = allowed & layer.attn_mask
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)


@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("family", _tiny.FAMILIES)
def test_outputs_keep_their_bits_and_scores_are_the_models_own(family: str, padded: str | None) -> None:
    model, batch = _tiny.model(family), _tiny.batch(padded=padded)
    given = batch
    if padded == "left" and family != "roberta":  # counts its own; for others `capture` counts from the first token
        given = {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    expected = forward(model, given)
    with capturable(model), torch.no_grad():
        assert torch.equal(forward(model, given), expected)
        states = capture(model, batch, hidden=range(4), attention=[1, 2, 3])
    assert torch.equal(states.hidden[3], expected)
    assert model.config._attn_implementation == "sdpa"

    with torch.no_grad():
        eager = twin(model, "eager")(**given, output_attentions=True, output_hidden_states=True)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for i, layer in states.attention.items():
        found = probabilities(layer).transpose(1, 2)[real]  # rows of padding may attend to nothing or everything
        assert error(found, eager.attentions[i - 1].transpose(1, 2)[real]) < 1e-5
    for i, state in states.hidden.items():
        assert error(state[real], eager.hidden_states[i][real]) < 1e-5


def test_layers_differ_so_that_a_wrong_index_would_show() -> None:
    with torch.no_grad():
        eager = twin(_tiny.model(), "eager")(**_tiny.batch(), output_attentions=True, output_hidden_states=True)
    assert error(eager.attentions[0], eager.attentions[1]) > 0.1
    assert error(eager.hidden_states[1], eager.hidden_states[2]) > 0.1


@pytest.mark.parametrize("family", ["bert", "llama", "albert"])
def test_only_what_was_asked_for_is_kept(family: str) -> None:
    model, batch = _tiny.model(family), _tiny.batch()
    with capturable(model), torch.no_grad():
        states = capture(model, batch, hidden=[3, 0], attention=[2])
        everything = capture(model, batch, hidden=range(4), attention=[1, 2, 3])
    assert set(states.hidden) == {0, 3}
    assert set(states.attention) == {2}
    assert torch.equal(states.attention[2].query, everything.attention[2].query)
    assert torch.equal(states.hidden[0], everything.hidden[0])
    assert states.logits is None
    assert capture(model, batch).hidden == {}


def test_transformers_that_counts_hidden_states_otherwise_is_asked_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _tiny.model(), _tiny.batch()
    asked = []
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    monkeypatch.setattr("fastdistill.train.capture.select_hidden_states", None)
    states = capture(model, batch, hidden=[3, 0])
    assert asked[0]["output_hidden_states"] is True
    every = model(**batch, output_hidden_states=True).hidden_states
    assert set(states.hidden) == {0, 3}
    assert all(torch.equal(states.hidden[i], every[i]) for i in (0, 3))


@pytest.mark.parametrize(
    ("family", "padded", "key_mask", "window", "is_causal"),
    [
        ("bert", None, None, None, False),
        ("bert", "right", (3, 11), None, False),
        ("llama", None, None, None, True),
        ("llama", "left", (3, 11), None, True),
        ("modernbert", "right", (3, 11), (2, 2), False),
        ("mistral", "right", (3, 11), (3, 0), True),
        ("mistral", None, None, (3, 0), True),
    ],
)
def test_masks_stay_in_their_smallest_form(
    family: str, padded: str | None, key_mask: Any, window: Any, is_causal: bool
) -> None:
    model = _tiny.model(family)
    with capturable(model), torch.no_grad():
        layer = capture(model, _tiny.batch(padded=padded), attention=[2]).attention[2]
    assert (None if layer.key_mask is None else tuple(layer.key_mask.shape)) == key_mask
    assert (layer.attn_mask, layer.window) == (None, window)
    assert layer.is_causal is is_causal


@pytest.mark.parametrize(
    ("family", "window"), [("modernbert", {"local_attention": 48}), ("mistral", {"sliding_window": 24})]
)
def test_a_window_wider_than_the_rows_is_no_window(family: str, window: Any) -> None:
    model, batch = _tiny.model(family, **window), _tiny.batch()
    with capturable(model), torch.no_grad():
        layer = capture(model, batch, attention=[2]).attention[2]
    assert (layer.attn_mask, layer.window) == (None, None)


def test_a_mask_that_says_more_than_padding_is_kept_whole() -> None:
    model, batch = _tiny.model("llama"), _tiny.batch()
    inputs = {
        "inputs_embeds": torch.zeros(3, 11, 24),
        "attention_mask": batch["attention_mask"],
        "past_key_values": None,
    }
    every_second = {"and_mask_function": lambda b, h, q, k: (q - k) % 2 == 0}
    with capturable(model):
        assert create_causal_mask(model.config, **inputs).shape == (3, 1, 1, 11)
        mask = create_causal_mask(model.config, **inputs, **every_second)
    assert torch.equal(mask, create_causal_mask(model.config, **inputs, **every_second))  # the mask of "sdpa"
    assert mask.shape == (3, 1, 11, 11)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_length_by_length_tensor_for_padded_rows() -> None:
    length = 512
    model = _tiny.model("bert", max_position_embeddings=length, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    batch = _tiny.batch(rows=2, length=length)
    with LargestTensor() as plain:
        model.train()(**batch)[0].sum().backward()
    assert plain.numel >= 2 * length**2  # transformers' own mask, so the measure can see one
    with capturable(model), LargestTensor() as lean:
        states = capture(model, batch, hidden=[0, 3], attention=[1, 3])
        (states.hidden[3].sum() + states.attention[3].query.sum()).backward()
    assert lean.numel <= 2 * length * 60  # (B, L, intermediate) is the largest tensor


def test_captured_tensors_carry_gradients_to_the_weights() -> None:
    model, batch = _tiny.model(), _tiny.batch()
    with capturable(model):
        states = capture(model, batch, hidden=[2], attention=[2])
        (states.attention[2].query.square().sum() + states.attention[2].key.sum()).backward()
    weight = model.encoder.layer[1].attention.self.query.weight
    # by hand: d(sum q^2)/dW = 2 q^T x, with x the input of layer 2
    with torch.no_grad():
        x = model(**batch, output_hidden_states=True).hidden_states[1].flatten(0, 1)
        projection = model.encoder.layer[1].attention.self.query
        expected = 2 * projection(x).T @ x
    assert error(weight.grad, expected) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])  # llama merges padding and causality into one mask
def test_recomputation_adds_nothing_and_gives_the_same_gradients(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _tiny.model(family, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capturable(model):
            states = capture(model, _tiny.batch(), hidden=[0, 3], attention=[1, 2, 3])
            before = {i: layer.query for i, layer in states.attention.items()}
            loss = sum(layer.query.square().sum() + layer.key.square().sum() for layer in states.attention.values())
            (loss + states.hidden[3].square().sum()).backward()
        assert all(states.attention[i].query is query for i, query in before.items())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert error(gradients[1][name], expected) < 1e-6, name


def test_reentrant_checkpointing_is_refused() -> None:
    model = _tiny.model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with capturable(model), pytest.raises(ValueError, match=r'reentrant.*"use_reentrant": False'):
        capture(model, _tiny.batch(), attention=[1])
    with capturable(model), torch.no_grad():  # nothing to detach
        capture(model.eval(), _tiny.batch(), attention=[1])


@pytest.mark.parametrize("family", ["deberta", "mpnet"])
def test_models_without_the_interface_are_named_with_the_way_out(family: str) -> None:
    model = _tiny.model(family)
    with pytest.raises(ValueError, match=r"attention interface.*without the attention term"), capturable(model):
        pass
    with torch.no_grad():
        states = capture(model, _tiny.batch(), hidden=[0, 3])
    assert torch.equal(states.hidden[3], forward(model, _tiny.batch()))


def test_more_attention_calls_than_layers_are_refused() -> None:
    config = BertConfig(**{**_tiny.config().to_dict(), "is_decoder": True, "add_cross_attention": True})
    model, batch = BertModel(config).eval(), _tiny.batch(padded=None)
    batch["encoder_hidden_states"] = torch.randn(3, 11, 24)
    with capturable(model), pytest.raises(ValueError, match=r"6 times for its 3 layers.*without the attention term"):
        capture(model, batch, attention=[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": [4]}, r"hidden holds \[4\]; BertModel has 0..3"),
        ({"hidden": [-1]}, r"hidden holds \[-1\]; BertModel has 0..3"),
        ({"attention": [0]}, r"attention holds \[0\]; BertModel has 1..3"),
    ],
)
def test_indices_out_of_range(arguments: Any, message: str) -> None:
    model = _tiny.model()
    with capturable(model), pytest.raises(ValueError, match=message):
        capture(model, _tiny.batch(), **arguments)


def test_attention_needs_the_block() -> None:
    model = _tiny.model()
    with pytest.raises(ValueError, match=r"with capturable\(model\):"):
        capture(model, _tiny.batch(), attention=[1])


def test_a_float_mask_is_refused() -> None:
    model, batch = _tiny.model(), _tiny.batch(padded=None)
    batch["attention_mask"] = torch.zeros(3, 1, 11, 11)
    with capturable(model), pytest.raises(ValueError, match=r"attention_mask reached.*torch.float32"):
        capture(model, batch, attention=[1])


def test_the_model_gets_its_own_attention_back() -> None:
    eager = twin(_tiny.model(), "eager")
    with capturable(eager):
        with capturable(eager):
            assert eager.config._attn_implementation == "fastdistill"
        assert eager.config._attn_implementation == "fastdistill"
    assert eager.config._attn_implementation == "eager"
    assert "fastdistill" not in str(eager.config.to_dict())
    with pytest.raises(ValueError, match="hidden holds"), capturable(eager):
        capture(eager, _tiny.batch(), hidden=[9])
    assert eager.config._attn_implementation == "eager"


def test_entries_the_model_does_not_name_are_left_out() -> None:
    model, batch = _tiny.model("distilbert"), _tiny.batch()
    with capturable(model), torch.no_grad():
        plain = capture(model, batch, hidden=[3], attention=[1])
        extra = {"token_type_ids": torch.zeros(3, 11, dtype=torch.long), "labels": torch.zeros(3), "length": 3}
        assert torch.equal(capture(model, {**batch, **extra}, hidden=[3]).hidden[3], plain.hidden[3])
