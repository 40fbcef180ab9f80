"""Queries, keys and hidden states of a transformers model, without an attention matrix.

transformers dispatches attention by name, and keyword arguments of `model.forward` reach the function behind the
name. The one registered here as "fastdistill" calls the ordinary SDPA path, with its bits, and hands the query and
the key it was called with, and the value if it is asked for, to a sink that `capture` puts into the forward call.

    with capturable(model):
        states = capture(model, batch, hidden=[0, 2, 4], attention=[2, 4])

The block switches the model to that function and back at its end; nothing else of the model is touched. Keep
`backward()` inside it: recomputation under activation checkpointing runs the attention again.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import TokenClassifierOutput

__all__ = ["LayerAttention", "States", "capturable", "capture", "forward_arguments"]

NAME = "fastdistill"
LABELS = ("labels", "start_positions", "end_positions")


@dataclass
class LayerAttention:
    """What one attention layer computed its scores from: `scale * query @ key.T`, where the masks allow it.

    `is_causal`, `key_mask` and `attn_mask` hold together, each where it is given. `attn_mask` appears only where
    the other two cannot say it (a sliding window shorter than the sequence, packed sequences).
    """

    query: Tensor  # (B, H, L, D), after rotary embedding
    key: Tensor  # (B, H_kv, S, D), before heads are repeated
    scale: float
    key_mask: Tensor | None  # (B, S) bool, True = may be attended
    attn_mask: Tensor | None  # (B, 1 or H, L, S) bool, True = may be attended
    is_causal: bool
    value: Tensor | None = None  # (B, H_kv, S, D_v), where it was asked for


@dataclass
class States:
    """What one forward pass left behind. Hidden state 0 is the embedding output; attention layers count from 1."""

    hidden: dict[int, Tensor]  # (B, L, d) each
    attention: dict[int, LayerAttention]
    logits: Tensor | None  # (B, C), (B, L, V), or of spans (B, 2, L): start and end; None for a model without a head
    head: str = ""  # "spans": a question answering model; "tags": a token classifier; else ""


class _Sink:
    """Collects the layers asked for, numbered from 1 by call order: layers have no dependable index of their own.

    Recomputation under activation checkpointing calls again, in backward, and counts on past the last layer.
    """

    def __init__(self, wanted: Collection[int], values: bool) -> None:
        self.wanted = wanted
        self.values = values
        self.calls = 0
        self.layers: dict[int, LayerAttention] = {}

    def add(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, is_causal: bool
    ) -> None:
        self.calls += 1
        if self.calls in self.wanted:
            is_padding = mask is not None and _is_padding(mask)
            self.layers[self.calls] = LayerAttention(
                query=query,
                key=key,
                scale=scale,
                key_mask=mask[:, 0, 0] if mask is not None and is_padding else None,
                attn_mask=None if is_padding else mask,
                is_causal=is_causal,
                value=value if self.values else None,
            )


def _is_padding(mask: Tensor) -> bool:
    return mask.shape[1] == 1 and mask.shape[2] == 1  # (B, 1, 1, S), the form `_padding_mask` returns


def _capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    fastdistill_sink: _Sink | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask reached the attention of {type(module).__name__} as {attention_mask.dtype}; give the "
            "model a (B, L) mask of 0 and 1, or a bool mask (B, 1, L, S)"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_padding = attention_mask is not None and _is_padding(attention_mask)
    # A dense mask already holds the causal part, as in the SDPA path.
    causal = bool(causal and query.shape[2] > 1 and (attention_mask is None or is_padding))
    if fastdistill_sink is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        fastdistill_sink.add(query, key, value, scale, attention_mask, causal)
    if causal and attention_mask is not None:  # SDPA takes is_causal or a mask, not both
        shape = (query.shape[2], key.shape[2])
        attention_mask = attention_mask & torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, *args, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _padding_mask(attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """The mask of a forward pass: None, the padding as (B, 1, 1, S), or SDPA's (B, 1, L, S) where neither is enough.

    SDPA broadcasts the padding over queries, so that no L x S tensor exists for bidirectional models. The library's
    own function drops a mask without padding, for which it must read it: done here on the CPU only, since on
    an accelerator it would wait for the device in every forward. Leave a full mask out of the batch there.
    """
    # Up to 5.1 the queries are described by `cache_position`, later by their number.
    queries = arguments.get("q_length")
    if queries is None:
        queries = arguments["cache_position"].shape[0]
    keys, window = arguments["kv_length"], arguments.get("local_size")
    # The skip flags are off when the mask has more to say than padding and causality (packed sequences, overlays).
    is_plain = arguments.get("allow_is_causal_skip", True) or arguments.get("allow_is_bidirectional_skip", False)
    if (
        attention_mask is not None
        and is_plain
        and queries == keys == attention_mask.shape[-1]
        and not arguments.get("kv_offset", 0)
        and (window is None or keys < window)
    ):
        attention_mask = attention_mask.bool()
        if attention_mask.device.type == "cpu" and bool(attention_mask.all()):
            return None
        return attention_mask[:, None, None, :]
    return sdpa_mask(attention_mask=attention_mask, **arguments)


AttentionInterface.register(NAME, _capturing_attention)
AttentionMaskInterface.register(NAME, _padding_mask)


@contextmanager
def capturable(*models: PreTrainedModel) -> Iterator[None]:
    """Switch models to the attention function that can hand over queries and keys; switch back at the end.

    Outputs are those of `attn_implementation="sdpa"`, to the bit. May be nested.

    Raises:
        ValueError: the model computes its attention without transformers' attention interface (DeBERTa, MPNet
            and others) or cannot use SDPA. Such a model can be distilled without the attention term.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_switched(model))
        yield


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    way_out = 'distil it without the attention term (terms=("embedding", "hidden"))'
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{name} does not compute its attention through transformers' attention interface, so its queries and "
            f"keys cannot be captured; {way_out}"
        )
    if not model._supports_sdpa:
        raise ValueError(f"{name} cannot use SDPA attention, on which capturing stands; {way_out}")
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def forward_arguments(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `batch` that `model.forward` names, without labels: a loss of the model's own costs time."""
    names = inspect.signature(model.forward).parameters
    batch = {name: value for name, value in batch.items() if name not in LABELS}
    if "input_ids" not in names:  # a wrapper that passes everything on
        return batch
    return {name: value for name, value in batch.items() if name in names}


def capture(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
    values: bool = False,
) -> States:
    """Run `model` once and return the hidden states and attention layers asked for. Only those are kept.

    Gradients, dtype and autocast are the caller's: wrap a teacher in `torch.no_grad()`.

    Args:
        model: a transformers model, with or without a head.
        batch: what a tokenizer returns (`input_ids` (B, L), `attention_mask` (B, L), ...). Entries that the model's
            forward does not name are left out, and so are labels.
        hidden: indices from 0, the embedding output, to the number of layers. The last one comes after the final
            norm on models that have one.
        attention: layers, from 1. Needs `with capturable(model):` around.
        values: keep the values of those layers as well.

    Raises:
        ValueError: an index out of range, `attention` outside `capturable`, reentrant activation checkpointing, or
            a model whose attention calls are not one per layer.
    """
    layers = model.config.num_hidden_layers
    for name, indices, first in (("hidden", hidden, 0), ("attention", attention, 1)):
        wrong = [index for index in indices if not first <= index <= layers]
        if wrong:
            raise ValueError(f"{name} holds {wrong}; {type(model).__name__} has {first}..{layers}")

    arguments = forward_arguments(model, batch)
    sink = None
    if attention:
        if model.config._attn_implementation != NAME:
            raise ValueError(f"capture of attention needs `with capturable(model):` around it ({type(model).__name__})")
        if model.training and torch.is_grad_enabled():
            refuse_reentrant_checkpointing(model)
        sink = arguments["fastdistill_sink"] = _Sink(frozenset(attention), values)
    if hidden:
        arguments["output_hidden_states"] = sorted(hidden)
    if getattr(model.config, "use_cache", False):
        arguments["use_cache"] = False
    outputs = model(**arguments, return_dict=True)

    if sink is not None and sink.calls != layers:
        raise ValueError(
            f"{type(model).__name__} called the attention function {sink.calls} times for its {layers} layers, so "
            "layers cannot be told apart; distil it without the attention term "
            '(terms=("embedding", "hidden"))'
        )
    states = outputs.hidden_states if hidden else ()
    logits, head = outputs.get("logits"), ""
    if "start_logits" in outputs:
        logits, head = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1), "spans"
    elif isinstance(outputs, TokenClassifierOutput):
        head = "tags"
    return States(
        hidden={index: states[index] for index in hidden},
        attention=sink.layers if sink is not None else {},
        logits=logits,
        head=head,
    )


def refuse_reentrant_checkpointing(model: torch.nn.Module) -> None:
    """ValueError where `model` recomputes activations in reentrant mode: it detaches what a forward pass captures,
    so losses on it would silently train nothing."""
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{name or type(model).__name__} uses reentrant activation checkpointing, which detaches captured "
                'states; enable it with {"use_reentrant": False}'
            )
