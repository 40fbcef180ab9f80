"""Tiny language models, chats, and the right loss of a distillation: float64, from full logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastdistill.integrations import causal_lm_loss

CLASSES, TEMPERATURE, ALPHA = 61, 2.0, 0.5
OPTIONS = {"alpha": ALPHA, "temperature": TEMPERATURE, "t_squared": True}
WIDE = {"layers": 3, "width": 24, "seed": 2}

# Family -> what its config needs beyond the common part.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "GPT2": {},
    "OPT": {},
}


def language_model(family: str = "Llama", layers: int = 2, width: int = 16, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    if family == "GPT2":
        own = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2,
               "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
    else:
        own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "pad_token_id": 0}
        own |= {"max_position_embeddings": 32}
        if family == "OPT":
            own |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "dropout": 0.0, "init_std": 0.3}
        else:
            own |= {"intermediate_size": 2 * width, "num_key_value_heads": 1}
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    common = {"vocab_size": CLASSES, "initializer_range": 0.3, "tie_word_embeddings": False}
    config = getattr(transformers, config_class)(**common | own | FAMILIES.get(family, {}) | options)
    return getattr(transformers, model_class)(config)


def chats(count: int = 4, seed: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
    """Rows of different lengths whose prompts have the label -100."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, CLASSES, (length - i % 4,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 5] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def padded(rows: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value, padding_side=side)
        for name, value in values.items()
    }


def one_by_one(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: x[None] for name, x in row.items()} for row in rows]


# -- the right value -------------------------------------------------------------------------------------------


def divergence(log_s: Tensor, log_t: Tensor, name: str, **options: Any) -> Tensor:  # (N, V) -> (N)
    p_s, p_t = log_s.exp(), log_t.exp()
    if name == "soft_cross_entropy":
        return -(p_t * log_s).sum(-1)
    if name == "kl":
        log_p, log_q = (log_s, log_t) if options.get("reverse") else (log_t, log_s)
        skew = options.get("skew", 0.0)
        return (log_p.exp() * (log_p - (skew * log_p.exp() + (1 - skew) * log_q.exp()).log())).sum(-1)
    if name == "tvd":
        return (p_t - p_s).abs().sum(-1) / 2
    beta = options.get("beta", 0.5)
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    return beta * (p_t * (log_t - log_m)).sum(-1) + (1 - beta) * (p_s * (log_s - log_m)).sum(-1)


def right_sum(
    student: Any,
    teacher: Any,
    batches: list[dict[str, Tensor]],
    name: str = "kl",
    alpha: float = ALPHA,
    classes: int | None = None,
    item_weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """The sum over counted positions, from full logits in float64, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        inputs = {key: x for key, x in batch.items() if key != "labels"}
        inputs["use_cache"] = False  # with a cache, transformers lets packed sequences attend each other
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        length = labels.shape[1] + 1  # PEFT may have put virtual tokens before the rows
        z_s = student(**inputs).logits[:, -length:-1, :classes][counted].double()
        z_t = teacher(**inputs).logits[:, -length:-1, :classes][counted].detach().double()
        log_s, log_t = (z_s / TEMPERATURE).log_softmax(-1), (z_t / TEMPERATURE).log_softmax(-1)
        hard = nn.functional.cross_entropy(z_s, labels[counted], reduction="none")
        soft = divergence(log_s, log_t, name, **options) * TEMPERATURE**2
        weights = 1.0 if item_weights is None else item_weights[:, 1:][counted]
        total = total + (weights * (alpha * soft + (1 - alpha) * hard)).sum()
        count += int(counted.sum())
    return total, count


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_right(
    loss: Tensor, found: Mapping[str, Tensor], right_loss: Tensor, right: Mapping[str, Tensor], bound: float = 1e-4
) -> None:
    assert abs(loss.double() - right_loss) <= bound * abs(right_loss)
    assert found.keys() == right.keys()
    scale = max(x.norm() for x in right.values())
    for name, x in right.items():
        difference = (found[name].double() - x).norm()
        if x.norm() < 1e-12 * scale:  # 0 in theory, as that of a bias of the keys
            assert difference < 1e-6 * scale, name
        else:
            assert difference < bound * x.norm(), f"{name}: {difference / x.norm()}"


def check(
    student: Any, teacher: Any, batch: dict[str, Tensor], batches: Any = None, wrap: Any = None, **options: Any
) -> None:
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    loss = causal_lm_loss(wrap(student) if wrap else student, teacher, batch, **OPTIONS, **options)
    loss.backward()
    names = {"divergence": "name", "vocab_size": "classes"}
    how = {names.get(key, key): value for key, value in options.items()}
    total, count = right_sum(right, right_teacher, batches or [batch], **how)
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right))


# -- text ------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ m.role + ':' + m.content + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)


def tokenizer() -> Any:
    """Returns a tokenizer of single letters for the tiny models."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    pieces = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .:,;!?"]
    letters = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE, **special)


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (count,), generator=generator))
