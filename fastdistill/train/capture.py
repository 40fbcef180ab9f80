"""Captures queries, keys and hidden states of a transformers model, without an attention matrix.

transformers dispatches attention by name, and keyword arguments of `model.forward` reach the function behind the
name. The function registered here as "fastdistill" calls the ordinary SDPA path, whose bits it keeps, and hands its
query and key, and its value if asked for, to a sink that `capture` passes through the forward call.

    with capturable(model):
        states = capture(model, batch, hidden=[0, 2, 4], attention=[2, 4])

The block switches the model to that function and back at its end, and changes nothing else. Keep `backward()` inside
it: under activation checkpointing, backward runs the attention again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import TokenClassifierOutput

from fastdistill.train.inputs import forward_arguments, is_causal, is_packed, packed_ends, refuse_encoder_decoder

try:
    from transformers.utils.output_capturing import select_hidden_states
except ImportError:  # this version (5.17, for one) takes no indices of hidden states, or counts them from another start
    select_hidden_states = None

if TYPE_CHECKING:
    from fastdistill.train.causal_lm import Logits

__all__ = ["LayerAttention", "States", "capturable", "capture"]

NAME = "fastdistill"
BAND = "_fastdistill_band"  # on a dense mask that says no more: its padding (B, S), or None, and its window
WAY_OUT = 'distil it without the attention term (method="tinybert", terms=("embedding", "hidden"))'
# What reaches the attention function and leaves its scores alone: a window is part of the mask, and rotary embedding
# is applied before.
HARMLESS = {
    "dropout", "sliding_window", "position_ids", "position_embeddings", "cache_position", "hidden_states",
    "token_type_ids", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


@dataclass
class LayerAttention:
    """Holds what one attention layer computes its scores from: `scale * query @ key.T`, where every mask allows it.

    A key is attended if all masks below allow it; a mask of None allows everything. `attn_mask` is given only where
    the others cannot express the mask (several rows of packed sequences, a mask of the user's own).
    """

    query: Tensor  # (B, H, L, D), after rotary embedding
    key: Tensor  # (B, H_kv, S, D), before heads are repeated
    scale: float
    key_mask: Tensor | None  # (B, S) bool, True = may be attended
    attn_mask: Tensor | None  # (B, 1 or H, L, S) bool, True = may be attended
    is_causal: bool
    value: Tensor | None = None  # (B, H_kv, S, D_v), if asked for
    cu_seqlens: Tensor | None = None  # (n + 1) int32, the ends of packed sequences, from 0 to L; B = 1
    window: tuple[int, int] | None = None  # keys before and after the query that may be attended


@dataclass
class States:
    """Holds the results of one forward pass. Hidden state 0 is the embedding output; attention layers count from 1."""

    hidden: dict[int, Tensor]  # (B, L, d) each
    attention: dict[int, LayerAttention]
    logits: Tensor | None  # (B, C), (B, L, V), or for spans (B, 2, L), start and end; None without a head
    head: str = ""  # "spans" for question answering, "tags" for a token classifier, else ""
    factors: Logits | None = None  # of a causal language model's logits, in their place
    balance: Tensor | None = None  # the load-balancing loss of a mixture of experts, without its coefficient

    @property
    def length(self) -> int | None:
        """The number of states of a row, L; None where no layer was captured."""
        for x in self.hidden.values():
            return x.shape[1]
        for layer in self.attention.values():
            return layer.query.shape[2]
        return None


class Packed:  # no dataclass, as `Sink`
    """Says where the sequences of a packed row end."""

    def __init__(self, ends: Sequence[int], device: torch.device) -> None:
        self.lengths = [stop - start for start, stop in pairwise(ends)]
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)  # (n + 1), from 0 to L

    def marker(self) -> Tensor:  # (1, 1, 1, L)
        """Returns what is passed as attention mask, so that transformers makes no mask of (L, L).

        It hands a mask of four dimensions to the attention function as it is. No other function accepts integers.
        """
        shape = (1, 1, 1, sum(self.lengths))
        return torch.zeros(shape, dtype=torch.int32, device=self.cu_seqlens.device)


class Sink:  # no dataclass: FSDP hands each module a copy of a dataclass among its arguments
    """Collects the layers asked for. It numbers them from 1 in the order of calls: not every layer knows its index.

    Under activation checkpointing, backward calls the attention again, which counts on past the last layer.
    """

    def __init__(self, wanted: Collection[int], values: bool, rebuilds: bool = False) -> None:
        self.wanted, self.values, self.calls = wanted, values, 0
        self.rebuilds = rebuilds  # attention outputs are computed from what was captured, see `check_attention`
        self.layers: dict[int, LayerAttention] = {}

    def add(self, layer: LayerAttention) -> None:
        self.calls += 1
        if self.calls in self.wanted:
            self.layers[self.calls] = layer if self.values else replace(layer, value=None)


def _capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    fastdistill_sink: Sink | None = None,
    fastdistill_packed: Packed | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_decoder = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if fastdistill_packed is not None:
        layer = LayerAttention(query, key, scale, None, None, is_decoder, value, fastdistill_packed.cu_seqlens)
        layer = _packed_layer(module, layer, attention_mask, kwargs)
        if fastdistill_sink is not None:
            fastdistill_sink.add(layer)
        return _each_sequence(module, layer, fastdistill_packed.lengths, *args, scaling=scaling, **kwargs), None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask reached the attention of {type(module).__name__} as {attention_mask.dtype}; give the "
            f"model a (B, L) mask of 0 and 1, or a bool mask (B, 1, L, S). If it makes that mask itself, {WAY_OUT}"
        )
    is_padding = attention_mask is not None and attention_mask.shape[1:3] == (1, 1)  # see `_padding_mask`
    padding, dense = (attention_mask, None) if is_padding else (None, attention_mask)
    # A dense mask already contains the causal part, as in the SDPA path.
    causal = is_decoder and query.shape[2] > 1 and dense is None
    if fastdistill_sink is not None:
        _refuse_changed_scores(module, query, key, kwargs)
        key_mask = None if padding is None else padding[:, 0, 0]
        layer = LayerAttention(query, key, scale, key_mask, dense, causal, value)
        if dense is not None and not torch.compiler.is_compiling() and hasattr(dense, BAND):
            key_mask, window = getattr(dense, BAND)
            layer = replace(layer, key_mask=key_mask, attn_mask=None, is_causal=is_decoder, window=window)
        fastdistill_sink.add(layer)
        if fastdistill_sink.rebuilds:
            return (probabilities(layer) @ _repeated(value, query.shape[1])).transpose(1, 2).contiguous(), None
    if causal and attention_mask is not None:  # SDPA takes is_causal or a mask, not both
        shape = (query.shape[2], key.shape[2])
        attention_mask = attention_mask & torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, *args, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _packed_layer(
    module: torch.nn.Module, layer: LayerAttention, attention_mask: Tensor | None, extras: Mapping[str, Any]
) -> LayerAttention:
    """Returns a packed layer with its window. Raises ValueError if more than packing and a window is part of it."""
    _refuse_changed_scores(module, layer.query, layer.key, extras)
    if attention_mask is None or attention_mask.dtype != torch.int32:
        raise ValueError(
            f"the row is packed, and {type(module).__name__} changes the attention mask that it is given, so that its "
            "sequences would see each other; pack no rows"
        )
    if "sliding_window" not in extras and getattr(getattr(module, "config", None), "sliding_window", None):
        raise ValueError(
            f"the row is packed, and {type(module).__name__} has a sliding window that only its mask would say; pack "
            "no rows"
        )
    width = extras.get("sliding_window")  # as flash attention reads it: the query is counted on either side
    return layer if width is None else replace(layer, window=(width - 1, 0 if layer.is_causal else width - 1))


def _each_sequence(
    module: torch.nn.Module, layer: LayerAttention, lengths: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor:  # (1, L, H, D_v)
    """Computes the attention of each packed sequence by itself."""
    assert layer.value is not None
    outputs = []
    for query, key, value in zip(*(x.split(lengths, 2) for x in (layer.query, layer.key, layer.value)), strict=True):
        length, mask = query.shape[2], None
        if layer.window is not None and max(layer.window) < length - 1:
            mask = in_window(length, layer.window, query.device)  # (L_i, L_i), with the causal part
        is_causal = layer.is_causal and mask is None
        outputs.append(sdpa_attention_forward(module, query, key, value, mask, *args, is_causal=is_causal, **kwargs)[0])
    return torch.cat(outputs, 1)


def in_window(length: int, window: tuple[int, int], device: torch.device) -> Tensor:  # (L, L) bool
    ahead = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]  # of the query
    return (ahead >= -window[0]) & (ahead <= window[1])


def _refuse_changed_scores(module: torch.nn.Module, query: Tensor, key: Tensor, extras: Mapping[str, Any]) -> None:
    """Raises ValueError if the attention scores are more than the scaled product of query and key."""
    name = type(module).__name__
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys: it attends to other tokens than its own "
            f"(cross attention, a cache or virtual tokens), which the attention term does not compare; {WAY_OUT}"
        )
    changing = [k for k, x in extras.items() if isinstance(x, Tensor | float) and k not in HARMLESS]
    if changing:
        raise ValueError(
            f"{name} computes its attention with {', '.join(changing)} as well, so that the product of its queries and "
            f"keys is not its scores; {WAY_OUT}"
        )


def probabilities(layer: LayerAttention) -> Tensor:
    """Computes the attention probabilities (B, H, L, S) of a captured layer, for checks on a few tokens.

    The order of operations and the dtypes are those of transformers' eager attention, so that rounding is too.
    """
    scores = layer.query @ _repeated(layer.key, layer.query.shape[1]).mT * layer.scale  # (B, H, L, S)
    allowed = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
    if layer.is_causal:
        allowed = allowed.tril()
    if layer.window is not None:
        allowed = allowed & in_window(len(allowed), layer.window, allowed.device)
    if layer.cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(len(allowed), device=allowed.device), layer.cu_seqlens, right=True)
        allowed = allowed & (sequence == sequence[:, None])
    for mask in (None if layer.key_mask is None else layer.key_mask[:, None, None], layer.attn_mask):
        allowed = allowed if mask is None else allowed & mask
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(layer.query.dtype)


def _repeated(x: Tensor, heads: int) -> Tensor:  # (B, H_kv, S, D) -> (B, H, S, D)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _padding_mask(attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Returns the mask of a forward pass: None, the padding as (B, 1, 1, S), or else SDPA's own (B, 1, L, S), which
    carries its padding and its window where it is made of nothing else.

    SDPA broadcasts the padding over queries, so that bidirectional models need no L x S tensor. transformers' own
    function reads the mask in order to drop one without padding. This one does so on the CPU only: on an accelerator
    it would be a host sync in every forward. Leave a full mask out of the batch there.
    """
    # transformers up to 5.1 passes `cache_position` instead of the number of queries.
    queries = arguments.get("q_length") or arguments["cache_position"].shape[0]
    keys, window = arguments["kv_length"], arguments.get("local_size")
    # The skip flags are off if the mask holds more than padding and causality (packed sequences, overlays).
    is_plain = arguments.get("allow_is_causal_skip", True) or arguments.get("allow_is_bidirectional_skip", False)
    is_plain = is_plain and queries == keys and not arguments.get("kv_offset", 0)
    is_plain = is_plain and (attention_mask is None or attention_mask.shape[-1] == keys)
    if attention_mask is not None and is_plain and (window is None or keys < window):
        attention_mask = attention_mask.bool()
        if attention_mask.device.type == "cpu" and bool(attention_mask.all()):
            return None
        return attention_mask[:, None, None, :]
    mask = sdpa_mask(attention_mask=attention_mask, **arguments)
    config = arguments.get("config")
    is_window = window == getattr(config, "sliding_window", None)
    is_window = is_window and getattr(config, "attention_chunk_size", None) is None  # chunks have a size as well
    if mask is not None and is_plain and window is not None and is_window and not torch.compiler.is_compiling():
        left, right = (window - 1, 0) if arguments.get("allow_is_causal_skip", True) else (window, window)
        setattr(mask, BAND, (None if attention_mask is None else attention_mask.bool(), (left, right)))
    return mask


AttentionInterface.register(NAME, _capturing_attention)
AttentionMaskInterface.register(NAME, _padding_mask)


@contextmanager
def capturable(*models: PreTrainedModel) -> Iterator[None]:
    """Switches models to the attention function that hands over queries and keys, and back at the end.

    Outputs equal those of `attn_implementation="sdpa"` to the bit. Blocks may be nested. `capture` computes the
    sequences of one packed row each by itself, of bidirectional models too, so that outputs are those of each alone.

    Raises ValueError if a model computes its attention without transformers' attention interface (DeBERTa, MPNet and
    others), cannot use SDPA, or is an encoder-decoder. Such a model can be distilled without the attention term.
    """
    with ExitStack() as stack:
        for model in models:
            name = type(model).__name__
            if not model._can_set_attn_implementation():
                raise ValueError(
                    f"{name} does not compute its attention through transformers' attention interface, so its queries "
                    f"and keys cannot be captured; {WAY_OUT}"
                )
            if model.config.is_encoder_decoder:
                raise ValueError(f"{name} is an encoder-decoder, whose attention layers are of three kinds; {WAY_OUT}")
            if not model._supports_sdpa:
                raise ValueError(f"{name} cannot use SDPA attention, which capturing needs; {WAY_OUT}")
            stack.callback(_restore, _implementations(model))
            try:
                model.set_attn_implementation(NAME)
            except ValueError as error:  # a model inside this one cannot use SDPA
                raise ValueError(f"{name} cannot be captured: {' '.join(str(error).split())}; {WAY_OUT}") from error
        yield


def _reads_mask(config: Any) -> bool:
    """Returns whether a model needs a real mask: for the load-balancing loss of its experts, or for chunks."""
    return bool(getattr(config, "output_router_logits", False) or getattr(config, "attention_chunk_size", None))


def is_switched(model: PreTrainedModel) -> bool:
    """Returns whether a model is inside `with capturable(model):`."""
    return bool(model.config._attn_implementation == NAME)


def _implementations(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Returns the attention implementation of each config in a model: models inside it may have others."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [(config, config._attn_implementation) for config in configs]


def _restore(implementations: list[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation = implementation


def capture(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
    values: bool = False,
) -> States:
    """Runs `model` once and returns its logits and the hidden states and attention layers asked for, no others.

    Gradients, dtype and autocast are the caller's: wrap a teacher in `torch.no_grad()`.

    Args:
        model: a transformers model, with or without a head.
        batch: what a tokenizer returns (`input_ids` (B, L), `attention_mask` (B, L), ...). Labels and entries that the
            model's forward does not name are left out.
        hidden: indices from 0, the embedding output, to the number of layers. The last state comes after the final
            norm of models that have one.
        attention: layers, from 1. Needs `with capturable(model):` around the call.
        values: keep the values of those layers as well.
    """
    refuse_encoder_decoder(model=model)
    _check(model, hidden, attention)
    sink = Sink(attention, values)
    outputs = run(model, batch, sink if attention else None, hidden)
    logits, head = outputs.get("logits"), "tags" if isinstance(outputs, TokenClassifierOutput) else ""
    if "start_logits" in outputs:
        logits, head = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1), "spans"
    return States(
        {i: outputs.hidden_states[i] for i in hidden}, sink.layers, logits, head, balance=outputs.get("aux_loss")
    )


def run(
    model: PreTrainedModel, batch: Mapping[str, Any], sink: Sink | None = None, hidden: Collection[int] = (),
    attentions: bool = False,
) -> Any:  # fmt: skip
    """Runs `model` once, fills `sink` with its attention layers, and returns the model's outputs.

    `attentions` asks the model for its own attention probabilities, which its eager attention returns.
    """
    arguments = forward_arguments(model, batch)
    if is_switched(model) and not torch.compiler.is_compiling() and not _reads_mask(model.config):
        _refuse_packed_rows(model, arguments)
        ends = packed_ends(arguments)
        if ends is not None:
            packed = Packed(ends, arguments["position_ids"].device)
            arguments |= {"attention_mask": packed.marker(), "fastdistill_packed": packed}
    if sink is not None:
        arguments["fastdistill_sink"] = sink
    if attentions:
        arguments["output_attentions"] = True
    if hidden:
        arguments["output_hidden_states"] = sorted(hidden) if select_hidden_states else True
    if getattr(model.config, "use_cache", False):
        arguments["use_cache"] = False
    outputs = model(**arguments, return_dict=True)
    if sink is not None and sink.calls != (layers := layer_count(model)):
        raise ValueError(
            f"{type(model).__name__} called the attention function {sink.calls} times for its {layers} layers, so "
            f"layers cannot be told apart; {WAY_OUT}"
        )
    return outputs


def _refuse_packed_rows(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if a bidirectional model gets several packed rows: transformers makes a mask of causal ones."""
    positions = arguments.get("position_ids")
    if positions is None or positions.dim() != 2 or is_causal(model):
        return
    rows = len(arguments.get("input_ids", positions))
    if rows > 1 and is_packed(positions, arguments.get("attention_mask")):
        raise ValueError(
            f"the batch has {rows} packed rows (position_ids start anew), and {type(model).__name__}, which "
            "is bidirectional, reads the sequences of each as one; pack all sequences of a batch into one row"
        )


def layer_count(model: PreTrainedModel) -> int:
    """Returns the number of layers. Raises ValueError if the config does not say it, as in models of several parts."""
    layers = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"the config of {type(model).__name__} has no num_hidden_layers, so its layers cannot be told apart; "
            f"{WAY_OUT}"
        )
    return layers


def _check(model: PreTrainedModel, hidden: Collection[int], attention: Collection[int]) -> None:
    name = type(model).__name__
    layers = layer_count(model) if hidden or attention else 0
    for what, indices, first in (("hidden", hidden, 0), ("attention", attention, 1)):
        if wrong := [index for index in indices if not first <= index <= layers]:
            raise ValueError(f"{what} holds {wrong}; {name} has {first}..{layers}")
    if attention and not is_switched(model):
        raise ValueError(f"capture of attention needs `with capturable(model):` around it ({name})")
    if attention and model.training and torch.is_grad_enabled():
        refuse_reentrant_checkpointing(model)


def refuse_reentrant_checkpointing(model: torch.nn.Module) -> None:
    """Raises ValueError if `model` uses reentrant activation checkpointing.

    It detaches what a forward pass captures, so that losses on it would train nothing.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{name or type(model).__name__} uses reentrant activation checkpointing, which detaches captured "
                'states; enable it with {"use_reentrant": False}'
            )
