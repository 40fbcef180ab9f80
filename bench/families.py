"""Lists which architectures of the installed transformers can be distilled with an attention term.

    python -m bench.families > docs/models.md
    python -m bench.families bert t5    # these model types alone

Each architecture is built with random weights, a few thousand of them, and given two rows of 8 tokens. It is accepted
if its attention probabilities follow from what is captured, and refused if capture raises its ValueError.
"""

from __future__ import annotations

import inspect
import logging
import re
import signal
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from fastdistill.train.capture import WAY_OUT, LayerAttention, capturable, capture, layer_count
from fastdistill.train.checks import check_attention, short_rows
from fastdistill.train.inputs import forward_arguments

COMMON = (
    "albert", "bert", "distilbert", "electra", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "mistral",
    "modernbert", "opt", "qwen2", "qwen3", "roberta", "t5", "vit",
)  # fmt: skip
LENGTH, VOCABULARY, MOST_WEIGHTS = 8, 64, 8_000_000
# The small value of each size that a config may name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "n_embed", "embedding_size",
                     "word_embed_proj_dim", "decoder_hidden_size", "encoder_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim", "encoder_ffn_dim",
                     "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
                     "ffn_hidden_size", "mlp_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
                     "num_encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
                     "n_ctx", "seq_length", "block_size"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window", "window_size"), 4),
    **dict.fromkeys(("pad_token_id",), 0), **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
    "image_size": 16, "patch_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2, "hidden_size_per_layer_input": 8, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "rotary_dim": 4,
}  # fmt: skip

# Sizes that a family checks against one another, or leaves to its checkpoints.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [0]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "segformer": {"depths": [1, 1, 1, 1], "image_size": 32},
    "swin": {"image_size": 32, "patch_size": 2, "window_size": 4, "depths": [1, 1], "num_heads": [2, 4]},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip

# What identifies a message -> what the page says.
REASONS = {
    "attention interface": "does not compute its attention through transformers' attention interface",
    "encoder-decoder": "is an encoder-decoder",
    "cannot use SDPA": "cannot use SDPA attention (softcaps, sinks, other kinds of layers)",
    "cannot be captured": "has a part that cannot use SDPA attention",
    "times for its": "does not call the attention function once a layer (layers of other kinds, several towers)",
    "num_hidden_layers": "consists of several parts, so its config has no number of layers; distil its text model",
    "as well, so": "adds `{}` to its attention",
    "attention_mask reached": "makes a mask of its own, of floating-point numbers",
    "are not those": "has other probabilities than its captured queries and keys",
    "returns no attention": "returns no probabilities to compare with",
    "queries and": "attends to other tokens than its own",
    "million weights": "stays large when the known sizes are small",
    "the main input is": "reads other inputs than ids, images or waveforms",
    "missing": "needs further inputs",
    "requires the": "needs another library",
    "StrictDataclass": "checks sizes against one another",
}
ALWAYS = ("head_dim", "vocab_size", "pad_token_id")  # set even where the default is None


class Verdict(NamedTuple):
    family: str
    kind: str  # "accepted", "refused", "not built" or "failed"
    reason: str = ""


def verdict(family: str) -> Verdict:
    """Returns what becomes of an architecture. "failed" is a fault of ours: another error, or other probabilities."""
    try:
        kind, config = architecture(family)
        with torch.device("meta"):
            outline = kind(config)
    except Exception as error:  # whatever a config or a model does not accept
        return Verdict(family, "not built", describe(error))
    if reason := refusal(outline):
        return Verdict(family, *reason)
    try:
        model = tiny_model(family)
        batches = inputs(model)
        with torch.no_grad():
            for batch in batches:
                model(**forward_arguments(model, batch))
    except Exception as error:
        return Verdict(family, "not built", describe(error))
    if reason := refusal(model, batches):
        return Verdict(family, *reason)
    with capturable(model):
        worst = max(difference(model, batch) for batch in batches)
        if worst > 1e-5:  # scores of 70 leave no more in float32
            worst = max(difference(model.double(), batch) for batch in batches)
    return Verdict(family, "accepted") if worst < 1e-5 else Verdict(family, "failed", f"differ by {worst:.1e}")


def refusal(model: PreTrainedModel, batches: list[dict[str, Tensor]] | None = None) -> tuple[str, str] | None:
    """Returns "refused" and the reason, "failed" and another error, or None. Without batches nothing is run."""
    try:
        with capturable(model):
            layer_count(model)
            if batches is not None:
                check_attention(model, batches[-1])
    except ValueError as error:
        is_ours = str(error).endswith(WAY_OUT)
        return ("refused", str(error).removesuffix(f"; {WAY_OUT}")) if is_ours else ("failed", describe(error))
    except Exception as error:
        return "failed", describe(error)
    return None


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]


def architecture(family: str) -> tuple[Any, PreTrainedConfig]:
    config = tiny_config(CONFIG_MAPPING[family])
    classes = MODEL_MAPPING[type(config)]
    return classes[0] if isinstance(classes, tuple | list) else classes, config


def tiny_model(family: str) -> PreTrainedModel:
    """Returns a model of a few thousand random weights, large enough that its attention is far from uniform."""
    kind, config = architecture(family)
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights / 1e6:.0f} million weights are left when the known sizes are small")
    torch.manual_seed(0)
    model = kind(architecture(family)[1]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():  # sinks, biases and position tables start at zero
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.float()


def tiny_config(kind: type[PreTrainedConfig], given: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """Returns a config in which every size that `SIZES` names is small, in its parts too."""
    default = kind() if given is None else given
    chosen: dict[str, Any] = {}
    for name, size in SIZES.items():
        found = read(default, name)
        is_read_only = isinstance(getattr(kind, name, None), property)
        if is_read_only or (found is None and name not in ALWAYS) or not has(default, name):
            continue
        if isinstance(found, list | tuple) != isinstance(size, list):
            size = [size] * len(found) if isinstance(found, list | tuple) else found
        chosen[name] = size
    heads, grouped = read(default, "num_attention_heads"), read(default, "num_key_value_heads")
    if "num_key_value_heads" in chosen and heads == grouped:
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    types = read(default, "layer_types")
    is_derived = any(isinstance(getattr(kind, name, None), property) for name in ("layer_types", "layers_block_type"))
    if isinstance(types, list) and types and not is_derived:
        chosen["layer_types"] = [min(types), max(types)]
    rope = read(default, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        chosen["rope_parameters"] = {**rope, "mrope_section": [half - half // 2, half // 2, 0]}
    for name in getattr(kind, "sub_configs", None) or {}:
        part = read(default, name)
        if isinstance(part, PreTrainedConfig):
            chosen[name] = tiny_config(type(part), part)
    return kind(**(chosen | OWN.get(kind.model_type, {})))


def read(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a size that differs between layers
        return SIZES.get(name)


def has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:
        return True


def inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Returns a batch without a mask and one with padding, or one batch of images or sound."""
    generator = torch.Generator().manual_seed(1)
    name = "input_ids" if "input_ids" in inspect.signature(model.forward).parameters else model.main_input_name
    config = model.config
    if name == "input_ids":
        full = {"input_ids": torch.randint(4, VOCABULARY, (2, LENGTH), generator=generator)}
        if config.is_encoder_decoder:
            full["decoder_input_ids"] = full["input_ids"]
        return [full, {**full, **short_rows(full)}]
    if name == "pixel_values":
        size = getattr(config, "image_size", 16)
        shape = (2, getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
        return [{name: torch.randn(shape, generator=generator)}]
    if name == "input_values":
        return [{name: torch.randn(2, 400, generator=generator)}]
    raise ValueError(f"the main input is {name}")


@torch.no_grad()
def difference(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """Returns the largest difference between the probabilities of captured layers and the model's own."""
    layers = capture(model, batch, attention=range(1, model.config.num_hidden_layers + 1)).attention
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(**forward_arguments(model, batch), output_attentions=True, return_dict=True)
    model.set_attn_implementation(implementation)
    mask = batch.get("attention_mask")
    worst = 0.0
    for own, layer in zip(outputs.attentions, layers.values(), strict=True):
        gap = (textbook(layer) - own).abs().amax((1, 3))  # (B, L)
        worst = max(worst, float(gap.max() if mask is None else gap[mask.bool()].max()))
    return worst


def textbook(layer: LayerAttention) -> Tensor:
    """Computes softmax(scale q k^T) (B, H, L, S) in float64 over the pairs that every mask allows."""
    heads, length = layer.query.shape[1:3]
    key = layer.key.double().repeat_interleave(heads // layer.key.shape[1], dim=1)
    scores = layer.scale * torch.einsum("bhid,bhjd->bhij", layer.query.double(), key)
    places = torch.arange(length)
    if layer.is_causal:
        scores[..., places[:, None] < places] = -1e30
    if layer.key_mask is not None:
        scores = torch.where(layer.key_mask[:, None, None], scores, -1e30)
    if layer.window is not None:
        left, right = layer.window
        scores = torch.where(torch.ones_like(scores, dtype=torch.bool).tril(right).triu(-left), scores, -1e30)
    if layer.attn_mask is not None:
        scores = torch.where(layer.attn_mask, scores, -1e30)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


class OutOfTime(BaseException):
    """No Exception, so that it passes the handlers of `verdict`."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime(f"took over {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def families() -> list[str]:
    """Returns every model type of the installed transformers that has a base model."""
    return sorted(family for family, config in CONFIG_MAPPING.items() if config in MODEL_MAPPING)


def timed_verdict(family: str) -> Verdict:
    try:
        with at_most(20):
            return verdict(family)
    except OutOfTime as error:
        return Verdict(family, "not built", str(error))


def page(verdicts: list[Verdict]) -> str:
    """Returns the Markdown of docs/models.md."""
    of = {kind: [v for v in verdicts if v.kind == kind] for kind in ("accepted", "refused", "not built", "failed")}
    lines = [
        "# Models with an attention term",
        "",
        f"`python -m bench.families > docs/models.md` wrote this page with transformers {transformers.__version__}.",
        "",
        "The attention terms compare what the student's and the teacher's attention is computed from: queries, keys,",
        "a scale and masks. A model is **accepted** if these give its own attention probabilities. Otherwise it is",
        "**refused** before the first step; it can be distilled without the attention term, by",
        '`method="tinybert", terms=("embedding", "hidden")`. Before the first step the trainer runs the model at hand',
        "on a few tokens and compares, so that this holds for models that are not listed, too.",
        "",
        "Each architecture was built with two layers and random weights, and ran on two rows of 8 tokens (or on two",
        "images or sounds), without a mask and with padding. Names are transformers' model types. A configuration that",
        "mixes other kinds of layers than the one built can be refused where its family is accepted.",
        "",
        f"## Accepted ({len(of['accepted'])})",
        "",
        "Probabilities are equal to 1e-5.",
        "",
        *textwrap.wrap(
            ", ".join(v.family for v in of["accepted"]), 128, break_on_hyphens=False, break_long_words=False
        ),
        "",
        f"## Refused ({len(of['refused'])})",
        "",
        *table(of["refused"], "Why"),
        "",
        f"## Not built ({len(of['not built'])})",
        "",
        "The list says nothing about these: a small model of them cannot be made, or fed, without knowing the family.",
        "",
        *table(of["not built"], "What happened"),
    ]
    if of["failed"]:
        lines += ["", f"## Wrong ({len(of['failed'])})", "", *table(of["failed"], "What happened")]
    return "\n".join(lines)


def table(verdicts: list[Verdict], heading: str) -> list[str]:
    """Returns a Markdown table of reasons, the most frequent first, and the families of each."""
    groups = defaultdict(list)
    for one in verdicts:
        groups[short(one.reason)].append(one.family)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"| {heading} | Model types |", "| --- | --- |", *(f"| {why} | {', '.join(who)} |" for why, who in ordered)]


def short(reason: str) -> str:
    """Returns the reason without the names and numbers that differ between families."""
    for sign, text in REASONS.items():
        if sign in reason:
            return text.format(*re.findall(r"with (.*) as well", reason))
    return "does not run with these sizes or inputs"


def main(names: list[str]) -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    verdicts = [timed_verdict(family) for family in names or families()]
    print("\n".join(" | ".join(v) for v in verdicts) if names else page(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
