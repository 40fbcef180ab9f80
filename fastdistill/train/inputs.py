"""Chooses what a model is given of a batch: the inputs that it takes, and the positions of its tokens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from fastdistill.train.heads import evaluating, refuse_virtual_tokens

__all__ = [
    "check_apart", "entries", "forward_arguments", "input_names", "is_causal", "is_packed", "judge",
    "refuse_encoder_decoder", "refuse_look_ahead", "text_columns", "with_positions",
]  # fmt: skip

ENCODER_DECODER = (
    "an encoder-decoder; it should be an encoder or a decoder alone, whose tokens are the positions that the losses "
    "count: distil it in transformers' Trainer with fastdistill.kl_div on the logits of both models, as "
    "examples/seq2seq.py does"
)
LEFT_PADDING, PACKED = "_fastdistill_left_padding", "_fastdistill_packed"  # on the model: what small runs showed
SIDE_SEEN = "_fastdistill_padded_on_the_right"  # on the model: a batch on a device was
LABELS = ("labels", "start_positions", "end_positions")
# Columns that only the losses read: the teacher's, and the sampler's. No model takes them.
NOT_INPUTS = re.compile(r"topk_logprobs|topk_indices|hidden_\d+|teacher_logits|length")
PACKING = {*FlashAttentionKwargs.__annotations__, "seq_idx"}


def input_names(model: nn.Module) -> set[str] | None:
    """Returns the inputs that a model takes: those that its forward names and, if it hands others on, those of its
    base class and of the transformers models inside (PEFT, DDP, a model of one's own around a backbone).

    None: it takes everything, since it hands inputs on to modules that name none. transformers' own models also have
    `**kwargs`, which reach no input; layers take from them what collators without padding say of packed rows.
    """
    names: set[str] = set()
    for kind in type(model).__mro__:  # wrappers replace the forward of an instance
        forward = vars(kind).get("forward")
        if forward is None or kind is nn.Module:
            continue
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not hands_on:
            return names
        if forward.__module__.startswith("transformers."):
            return names | PACKING
    found = [input_names(inner) for inner in transformers_inside(model)]
    return names.union(*(inner for inner in found if inner is not None)) if found else None


def transformers_inside(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yields the outermost transformers models within a model."""
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from transformers_inside(child)


def transformers_model(model: Any) -> Any:
    """Returns the first transformers model, from the outside, of a model that may be wrapped."""
    return model if isinstance(model, PreTrainedModel) else next(transformers_inside(model), model)


def text_columns(model: nn.Module, tokenizer: Any, columns: Sequence[str]) -> list[str]:
    """Returns the columns of tokenised rows that a model may read: the tokenizer's, and those that the model takes."""
    names = {*tokenizer.model_input_names, "position_ids", *(input_names(model) or ())}
    return [name for name in columns if name in names and "label" not in name and name not in LABELS]


def entries(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `batch` that a model takes, without labels: with them it computes a loss too."""
    names = input_names(model)
    found = {name: x for name, x in batch.items() if name not in LABELS and not NOT_INPUTS.fullmatch(name)}
    return found if names is None else {name: x for name, x in found.items() if name in names}


def forward_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `batch` that a model takes, without labels, and the positions that it needs.

    Positions count from each row's first token, on whichever side it is padded. Where `position_ids` start anew within
    a row of a causal model, its sequences do not see each other, in rows of different lengths too.

    Raises ValueError for a model that cannot be padded on the left, and for one with virtual tokens (prompt tuning).
    """
    refuse_virtual_tokens(model)
    batch = with_positions(batch)
    found = entries(model, batch)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    padding = mask if mask is not None and mask.dim() == 2 else None  # (B, L)
    if "input_ids" not in batch:
        return found
    if positions is None:
        needs = padding is not None and not counts_itself(model, padding.device, padding)
        return {**found, "position_ids": positions_of(padding)} if needs else found
    if not is_causal(model):
        return found
    check_positions(model, batch)
    if padding is None or positions.dim() != 2:
        return found
    # transformers tells packed sequences apart in a batch without a mask only. Padding, at the position of the row's
    # first token, is then a sequence of its own, which no token of another sees.
    found.pop("attention_mask", None)
    positions = positions.expand(padding.shape)
    first = positions.gather(1, first_token(padding))
    return {**found, "position_ids": positions.where(padding.bool(), first)}


def judge(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Makes the small runs that show how a model reads padding and packed rows, if it has not made them.

    Call this before the model is changed for a step, and in all processes together if they share its weights: only
    some of their batches may be padded.
    """
    if "input_ids" in batch:
        counts_itself(model, batch["input_ids"].device)
    if "position_ids" in batch and is_causal(model) and "position_ids" in (input_names(model) or ()):
        keeps_apart(model, batch["position_ids"].device, "seq_idx" in batch)


def first_token(mask: Tensor) -> Tensor:  # (B, 1)
    return mask.long().argmax(-1, keepdim=True)


def positions_of(mask: Any) -> Tensor:  # (B, L)
    """Returns each token's position, counted from the first token of its row."""
    return (torch.arange(mask.shape[1], device=mask.device) - first_token(mask)).clamp(min=0)


def counts_itself(model: Any, device: torch.device, mask: Tensor | None = None) -> bool:
    """Returns whether a model reads rows that are padded on the left as they are; otherwise it needs positions.

    Raises ValueError if `mask` is padded on the left and the model cannot read that: it takes no positions, or its
    head reads the first place of a row. The answer comes from a few small forward passes, once for a model.
    """
    if not hasattr(model, LEFT_PADDING):
        setattr(model, LEFT_PADDING, left_padding(model, device))
    answer = getattr(model, LEFT_PADDING)
    if answer != "refused" or mask is None or hasattr(model, SIDE_SEEN):
        return bool(answer != "positions")
    if not bool(mask[:, 0].all()):
        raise ValueError(
            f"the batch is padded on the left, which {type(transformers_model(model)).__name__} does not read as it "
            'reads padding on the right; set padding_side="right" on the tokenizer'
        )
    if mask.device.type != "cpu" and not bool(mask[:, -1].all()):
        setattr(model, SIDE_SEEN, True)  # a collator pads on one side; to look again would be a host sync a step
    return True


@torch.no_grad()
def left_padding(model: Any, device: torch.device) -> str:
    """Returns how a model takes padding on the left: "as it is", with "positions" given, or "refused".

    It is whatever gives the states of the same row without padding. Positions are given where both do: after a rotary
    embedding, the scores are the same without them, but not queries and keys.
    """
    text = transformers_model(model).config.get_text_config()
    padding = getattr(text, "pad_token_id", None) or 0
    ids = [i for i in range(min(text.vocab_size, 8)) if i != padding][:3]
    names = input_names(model)
    tolerance = rounding(model, device)

    def read(left: int = 0, right: int = 0, **more: Tensor) -> list[Tensor]:
        rows = torch.tensor([[padding] * left + ids + [padding] * right], device=device)
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right], device=device)
        out = model(input_ids=rows, attention_mask=mask, output_hidden_states=True, return_dict=True, **more)
        found, logits = [x[:, left : left + len(ids)] for x in (out.get("hidden_states") or ())[-1:]], out.get("logits")
        return [*found, *([logits] if logits is not None and logits.dim() == 2 and "start_logits" not in out else [])]

    def differences(found: list[Tensor]) -> list[float]:
        return [difference(x, y) for x, y in zip(found, alone, strict=True)]

    def excess(found: list[Tensor]) -> float:
        """Returns the largest difference, beyond twice the noise."""
        return max(x - 2 * noise for x, noise in zip(differences(found), noises, strict=True))

    with evaluating(model), torch.compiler.set_stance("force_eager"):
        alone = read()
        if not alone:  # a model that shows no states
            return "as it is"
        noises = differences(read(right=2))  # of quantised models, whose rounding depends on the batch
        as_it_is = given = excess(read(left=2))
        if takes_positions := names is None or "position_ids" in names:
            positions = torch.tensor([[0, 0, *range(len(ids))]], device=device)
            given = excess(read(left=2, position_ids=positions))
    if min(as_it_is, given) > tolerance:
        return "refused"
    return "positions" if takes_positions and given <= max(as_it_is, tolerance / 10) else "as it is"


def is_causal(model: nn.Module) -> bool:
    """Returns whether a token attends those before it only, as the model's attention modules say."""
    return next((bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")), False)


def check_positions(model: Any, batch: Mapping[str, Any]) -> None:
    """Raises ValueError if a causal model takes no `position_ids`, or tells no packed sequences of a batch apart."""
    inner, positions = transformers_model(model), batch["position_ids"]
    names = input_names(model)
    if names is not None and "position_ids" not in names:
        raise ValueError(
            f"the batch has position_ids, which {type(inner).__name__} does not take, so that packed sequences would "
            "see each other; leave the column out, and pack no rows"
        )
    if positions.shape[0] > 1 and "flash" in (getattr(inner.config, "_attn_implementation", None) or ""):
        raise ValueError(
            f"the batch has {positions.shape[0]} rows with position_ids; flash attention tells packed sequences apart "
            'in a batch of one row only: use batches of one row, or load the model with attn_implementation="sdpa"'
        )
    is_alone = keeps_apart(model, positions.device, "seq_idx" in batch)
    if not is_alone and is_packed(positions, batch.get("attention_mask")):
        check_apart(model, batch)


def check_apart(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises ValueError if a causal model reads packed sequences as one, with `seq_idx` where the batch has it."""
    if not keeps_apart(model, batch["position_ids"].device, "seq_idx" in batch):
        raise ValueError(
            f"the rows are packed (position_ids), and {type(transformers_model(model)).__name__} reads the sequences "
            "of a row as one; pack no rows, and leave the column position_ids out"
        )


def packed_ends(arguments: Mapping[str, Any]) -> list[int] | None:
    """Returns the ends of the sequences of one packed row, from 0 to L; None: the batch is no such row.

    Like transformers, it starts a sequence wherever a position does not follow the one before. Reading them is a host
    sync. Raises ValueError if `cu_seq_lens_q`, which flash attention reads, says something else than `position_ids`.
    """
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")  # (1, L) each
    if positions is None or positions.dim() != 2 or arguments.get("input_ids", positions).shape[0] != 1:
        return None
    if mask is not None:
        if mask.dim() != 2 or not is_packed(positions, mask):
            return None
        positions = positions.where(mask.bool(), -2)  # padding: each token is a sequence of its own
    starts = (positions[0].diff() != 1).nonzero()[:, 0].tolist()
    ends = [0, *(i + 1 for i in starts), positions.shape[1]]
    given = arguments.get("cu_seq_lens_q")
    if given is not None and given.tolist() != ends and mask is None:
        raise ValueError(
            f"cu_seq_lens_q ends {len(given) - 1} sequences, and position_ids start {len(ends) - 1}, or elsewhere; "
            "both should say where the sequences of the row start"
        )
    return ends if len(ends) > 2 else None


def with_positions(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a batch whose `position_ids` follow from `cu_seq_lens_q` or `seq_idx`, where it has only these."""
    if "position_ids" in batch or not {"cu_seq_lens_q", "seq_idx"} & batch.keys():
        return batch
    places = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    if "cu_seq_lens_q" not in batch:
        is_start = nn.functional.pad(batch["seq_idx"].diff(dim=-1) != 0, (1, 0), value=True)  # (B, L)
        return {**batch, "position_ids": places - (places * is_start).cummax(-1).values}
    starts = batch["cu_seq_lens_q"].to(places.device).long()
    return {**batch, "position_ids": (places - starts[torch.bucketize(places, starts, right=True) - 1])[None]}


def is_packed(positions: Tensor, mask: Tensor | None) -> bool:
    """Returns whether positions start anew within a row, after a token: those of padding mean nothing. A host sync."""
    restarts = positions.diff(dim=-1) < 0  # (B, L - 1)
    if mask is not None and mask.dim() == 2:
        restarts = restarts & mask[:, 1:].bool() & (mask.cumsum(-1)[:, :-1] > 0)
    return bool(restarts.any())


def keeps_apart(model: Any, device: torch.device, has_seq_idx: bool = False) -> bool:
    """Returns whether packed sequences do not see each other. The answer comes from three small forward passes, once
    for a model, and once with `seq_idx`, which Mamba's layers read."""
    name = f"{PACKED}_seq_idx" if has_seq_idx else PACKED
    if not hasattr(model, name):
        setattr(model, name, packed_is_alone(model, device, has_seq_idx))
    return bool(getattr(model, name))


@torch.no_grad()
def packed_is_alone(model: Any, device: torch.device, has_seq_idx: bool) -> bool:
    """Returns whether the second of two packed sequences has the states that it has alone, up to the model's noise.

    The first one, which the second follows, shows that noise.
    """
    vocabulary = transformers_model(model).config.get_text_config().vocab_size
    ids = torch.arange(4, device=device)[None] % vocabulary  # (1, 4)
    positions = torch.arange(4, device=device)[None] % 2
    names = input_names(model)
    takes_seq_idx = has_seq_idx and (names is None or "seq_idx" in names)
    packing = {"seq_idx": torch.arange(4, dtype=torch.int32, device=device)[None] // 2} if takes_seq_idx else {}
    options = {"output_hidden_states": True, "return_dict": True}
    if "use_cache" in (names or ()):
        options["use_cache"] = False  # with a cache, transformers does not look for packed sequences
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        packed, first, second = (
            model(input_ids=ids[:, some], position_ids=positions[:, some], **options, **more).hidden_states[-1]
            for some, more in ((slice(0, 4), packing), (slice(0, 2), {}), (slice(2, 4), {}))
        )
    noise = difference(packed[:, :2], first)
    return difference(packed[:, 2:], second) <= 2 * noise + rounding(model, device)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rounding(model: nn.Module, device: torch.device) -> float:
    """Returns the relative difference that rounding may make between two runs of a model on a device, where its
    weights may be loaded only while it runs."""
    is_full = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return 1e-3 if is_full and not torch.is_autocast_enabled(device.type) else 3e-2


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


def refuse_look_ahead(**models: Any) -> None:
    """Raises ValueError for a model whose tokens attend those after them, among which is the one to be predicted.

    The keywords name the models.
    """
    for name, model in models.items():
        if model is None:
            continue
        kind = type(transformers_model(model)).__name__
        causal = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
        if kind.endswith("ForMaskedLM") or (causal and not any(causal)):  # images, beside a text, are no sequence
            raise ValueError(
                f"{name} is a {kind}, whose tokens attend those after them; it should be a causal language model, "
                "since each position learns the next token (a BERT is one with is_decoder=True in its config): distil "
                'other models in fastdistill.train.DistillationTrainer with the term "prediction"'
            )
