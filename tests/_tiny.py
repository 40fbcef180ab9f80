"""Makes random models of a few thousand weights, one per family, a word-level tokenizer, and rows of random words."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCABULARY = 60
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

_COMMON = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,  # large enough that layers and scores differ
}
# In ModernBERT, local_attention 4 is a window of 2 on either side; the second and third of three layers are local.
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, {}),
    "roberta": (RobertaConfig, {}),
    "electra": (ElectraConfig, {"embedding_size": 16}),
    "distilbert": (DistilBertConfig, {}),
    "albert": (AlbertConfig, {"embedding_size": 16}),
    "modernbert": (ModernBertConfig, {"local_attention": 4, "global_attn_every_n_layers": 3}),
    "gpt2": (GPT2Config, {}),
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 4}),
    "deberta": (DebertaV2Config, {}),
    "mpnet": (MPNetConfig, {}),
    "camembert": (CamembertConfig, {}),
    "xlm-roberta": (XLMRobertaConfig, {}),
}
FAMILIES = tuple(_FAMILIES)[:-4]  # the last four are for tests of masked language models


def config(family: str = "bert", layers: int = 3, width: int = 24, **options: Any) -> PreTrainedConfig:
    kind, special = _FAMILIES[family]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    if family == "distilbert":
        sizes = {"dim": width, "n_layers": layers, "hidden_dim": 2 * width, "n_heads": 4}
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64}
    return kind(**{**_COMMON, **sizes, **special, **options})


def model(family: str = "bert", layers: int = 3, width: int = 24, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(config(family, layers, width, **options)).eval()


def classifier(layers: int = 2, width: int = 16, seed: int = 0, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(config("bert", layers, width, **options)).eval()


def batch(rows: int = 3, length: int = 11, padded: str | None = "right") -> dict[str, Tensor]:
    """Returns random ids in rows of different lengths, padded on one side. With padded=None all rows are full."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (rows, length), generator=generator)
    if padded is None:
        return {"input_ids": ids}
    mask = torch.arange(length) < torch.tensor([length - 3 * row for row in range(rows)])[:, None]
    if padded == "left":
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def texts(rows: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = VOCABULARY - len(SPECIAL)
    return [" ".join(f"w{draw.randrange(words)}" for _ in range(draw.randrange(3, 14))) for _ in range(rows)]


def dataset(rows: int = 32, classes: int = 2) -> Dataset:
    """Returns tokenised rows of 5 to 15 tokens. Labels are class indices, or scores if there is one class."""
    found = texts(rows)
    labels: list[Any] = [len(text) % classes if classes > 1 else len(text) / 10 for text in found]
    return Dataset.from_dict({**tokenizer()(found), "labels": labels})
