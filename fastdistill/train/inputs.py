"""Chooses what a model is given of a batch: the inputs that it takes, and the positions of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["check_positions", "forward_arguments", "input_names", "is_causal", "refuse_encoder_decoder"]

ENCODER_DECODER = (
    "an encoder-decoder; it should be an encoder or a decoder alone, whose tokens are the positions that the losses "
    "count: distil it in transformers' Trainer with fastdistill.kl_div on the logits of both models, as "
    "examples/seq2seq.py does"
)
LEFT_PADDING = "_fastdistill_left_padding"  # the answer of `left_padding`, on the model
LABELS = ("labels", "start_positions", "end_positions")


def input_names(model: nn.Module) -> set[str] | None:
    """Returns the inputs that a model takes: those that its forward names and, if it hands others on, those of the
    transformers models inside (PEFT, DDP, a model of one's own around a backbone). None: it takes everything.

    transformers' own models also have `**kwargs`, which reach no input.
    """
    forward = type(model).forward  # wrappers replace that of an instance
    parameters = inspect.signature(forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not hands_on or forward.__module__.startswith("transformers."):
        return names
    found = [input_names(inner) for inner in transformers_inside(model)]
    if not found and getattr(model, "main_input_name", "input_ids") not in names:
        return None
    return names.union(*(inner for inner in found if inner is not None))


def transformers_inside(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yields the outermost transformers models within a model."""
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from transformers_inside(child)


def forward_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `batch` that a model takes, without labels: with them it computes a loss too.

    Positions count from each row's first token, on whichever side it is padded. Where `position_ids` start anew within
    a row of a causal model, its sequences do not see each other, in rows of different lengths too.

    Raises ValueError for a model that cannot be padded on the left, and for one with virtual tokens (prompt tuning).
    """
    if any(
        getattr(adapter, "is_prompt_learning", False)
        for adapter in (getattr(model, "peft_config", None) or {}).values()
    ):
        raise ValueError(
            f"the model is a {type(model).__name__} with virtual tokens, whose states have other positions than the "
            "batch's tokens; use an adapter without them, such as LoRA"
        )
    names = input_names(model)
    found = {name: x for name, x in batch.items() if name not in LABELS and (names is None or name in names)}
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if "input_ids" not in batch or (mask is None and positions is None):
        return found
    takes_positions = names is None or "position_ids" in names
    padding = mask if mask is not None and mask.dim() == 2 else None
    if not is_causal(model):
        if padding is not None and positions is None and not counts_itself(model, padding):
            return {**found, "position_ids": positions_of(padding)}
        return found
    if positions is not None:
        check_positions(model, positions, takes_positions)
    if takes_positions and padding is not None:
        if positions is None:
            return {**found, "position_ids": positions_of(padding)}
        # transformers tells packed sequences apart in a batch without a mask only. Padding, at positions that do not
        # lead to a sequence's first, 0, is then a sequence of its own, which no token of another sees.
        del found["attention_mask"]
    return found


def positions_of(mask: Tensor) -> Tensor:  # (B, L)
    """Returns each token's position, counted from the first token of its row."""
    first = mask.long().argmax(-1, keepdim=True)  # (B, 1)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)


def counts_itself(model: Any, mask: Tensor) -> bool:
    """Returns whether a bidirectional model reads rows that are padded on the left as they are; else make positions.

    Raises ValueError if `mask` is padded on the left and the model cannot read that: it takes no positions, or its
    head reads the first place of a row. The answer comes from a few small forward passes, once for a model.
    """
    if not hasattr(model, LEFT_PADDING):
        setattr(model, LEFT_PADDING, left_padding(model))
    answer = getattr(model, LEFT_PADDING)
    if answer == "refused" and not bool(mask[:, 0].all()):
        raise ValueError(
            f"the batch is padded on the left, which {type(model).__name__} does not read as it reads padding on the "
            'right; set padding_side="right" on the tokenizer'
        )
    return bool(answer != "positions")


@torch.no_grad()
def left_padding(model: Any) -> str:
    """Returns how a bidirectional model takes padding on the left: "as it is", with "positions" given, or "refused"."""
    text = model.config.get_text_config()
    padding = getattr(text, "pad_token_id", None) or 0
    ids = [i for i in range(min(text.vocab_size, 8)) if i != padding][:3]
    device = next(model.parameters()).device
    names, training = input_names(model) or set(), [module for module in model.modules() if module.training]

    is_half = next(model.parameters()).dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    rounding = 3e-2 if is_half else 1e-3

    def read(left: int = 0, right: int = 0, **more: Tensor) -> list[Tensor]:
        rows = torch.tensor([[padding] * left + ids + [padding] * right], device=device)
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right], device=device)
        out = model(input_ids=rows, attention_mask=mask, output_hidden_states=True, return_dict=True, **more)
        states, logits = out.hidden_states[-1][:, left : left + len(ids)], out.get("logits")
        return [states, *([logits] if logits is not None and logits.dim() == 2 and "start_logits" not in out else [])]

    def differences(found: list[Tensor]) -> list[float]:
        return [float((x - y).norm() / y.norm()) for x, y in zip(found, alone, strict=True)]

    def is_right(found: list[Tensor]) -> bool:
        return all(x <= 2 * noise + rounding for x, noise in zip(differences(found), noises, strict=True))

    try:
        for module in training:
            module.training = False
        if model(input_ids=torch.tensor([ids], device=device), output_hidden_states=True).get("hidden_states") is None:
            return "as it is"  # a model that shows no states
        alone = read()
        noises = differences(read(right=2))  # of quantised models, whose rounding depends on the batch
        if is_right(read(left=2)):
            return "as it is"
        positions = torch.tensor([[0, 0, *range(len(ids))]], device=device)
        return "positions" if "position_ids" in names and is_right(read(left=2, position_ids=positions)) else "refused"
    finally:
        for module in training:
            module.training = True


def is_causal(model: nn.Module) -> bool:
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
