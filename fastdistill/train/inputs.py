"""Chooses what a model is given of a batch: the inputs that it takes, and the positions of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["check_positions", "forward_arguments", "is_causal", "refuse_encoder_decoder"]

ENCODER_DECODER = (
    "an encoder-decoder; it should be an encoder or a decoder alone, whose tokens are the positions that the losses "
    "count: distil it in transformers' Trainer with fastdistill.kl_div on the logits of both models, as "
    "examples/seq2seq.py does"
)
LABELS = ("labels", "start_positions", "end_positions")


def forward_arguments(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `batch` that `model.forward` names, without labels: with them it computes a loss too.

    A causal model counts positions from each row's first token, on whichever side it is padded. Where `position_ids`
    start anew within a row, its sequences do not see each other, in rows of different lengths too.
    """
    names = inspect.signature(model.forward).parameters
    read = getattr(model, "main_input_name", "input_ids")  # pixel_values, input_values, ...
    passes_all = read not in names  # a wrapper that passes everything on
    found = {name: x for name, x in batch.items() if name not in LABELS and (passes_all or name in names)}
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if (mask is None and positions is None) or not is_causal(model):
        return found
    takes_positions = passes_all or "position_ids" in names
    if positions is not None:
        check_positions(model, positions, takes_positions)
    if takes_positions and mask is not None and mask.dim() == 2:
        if positions is None:
            first = mask.long().argmax(-1, keepdim=True)  # (B, 1)
            places = torch.arange(mask.shape[1], device=mask.device)
            return {**found, "position_ids": (places - first).clamp(min=0)}
        # transformers tells packed sequences apart in a batch without a mask only. Padding, at positions that do not
        # lead to a sequence's first, 0, is then a sequence of its own, which no token of another sees.
        del found["attention_mask"]
    return found


def is_causal(model: torch.nn.Module) -> bool:
    """Returns whether a token attends those before it only, as the model's attention modules say."""
    return next((bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")), False)


def check_positions(model: Any, positions: Tensor, takes_positions: bool) -> None:
    """Raises ValueError if a model takes no `position_ids`, or its attention tells no sequences of a batch apart."""
    if not takes_positions:
        raise ValueError(
            f"the batch has position_ids, which {type(model).__name__} does not take, so that packed sequences would "
            "see each other; leave the column out, and pack no rows"
        )
    if positions.shape[0] > 1 and "flash" in (getattr(model.config, "_attn_implementation", None) or ""):
        raise ValueError(
            f"the batch has {positions.shape[0]} rows with position_ids; flash attention tells packed sequences apart "
            'in a batch of one row only: use batches of one row, or load the model with attn_implementation="sdpa"'
        )


def refuse_encoder_decoder(**models: Any) -> None:
    """Raises ValueError for a model that runs a decoder beside its encoder. The keywords name the models.

    The decoder has positions, masks and lengths of its own. An encoder alone, such as T5EncoderModel, is accepted.
    """
    for name, model in models.items():
        for module in () if model is None else model.modules():  # wrappers and adapters first
            # Configs do not tell: T5ForTokenClassification, which has no decoder, has T5's.
            if isinstance(module, PreTrainedModel) and any(
                argument.startswith("decoder_") for argument in inspect.signature(module.forward).parameters
            ):
                raise ValueError(f"{name} is a {type(module).__name__}, {ENCODER_DECODER}")
