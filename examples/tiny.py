"""Makes what the examples run on: random models of a few thousand weights, a tokenizer and chats of random words."""

import functools
import random
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(125))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}w0 {% endif %}"
)


@functools.cache
def language_models():
    """Returns folders with a student and a teacher, for AutoModelForCausalLM and AutoTokenizer."""
    common = {"vocab_size": len(WORDS), "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
              "bos_token_id": None, "eos_token_id": 2, "max_position_embeddings": 128}  # fmt: skip
    student = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, **common)
    teacher = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, **common)
    return saved(LlamaForCausalLM, student), saved(LlamaForCausalLM, teacher)


def encoders():
    """Returns folders with a student and a teacher of another width, for sentence_transformers."""
    common = {"vocab_size": len(WORDS), "num_attention_heads": 2, "max_position_embeddings": 64}
    student = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, **common)
    teacher = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, **common)
    return saved(BertModel, student), saved(BertModel, teacher)


def encoder_decoders(family):
    """Returns folders with a student and a teacher of the family "bart" or "t5", for AutoModelForSeq2SeqLM."""
    common = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    if family == "bart":
        common |= {"bos_token_id": None, "forced_eos_token_id": None, "max_position_embeddings": 64, "init_std": 0.3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = [{"encoder_layers": n, "decoder_layers": n, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **heads}
                 for n in (1, 2)]  # fmt: skip
        kinds = BartForConditionalGeneration, BartConfig
    else:
        sizes = [{"num_layers": n, "num_heads": 2, "d_kv": 8, "d_ff": 32} for n in (1, 2)]
        kinds = T5ForConditionalGeneration, T5Config
    model_class, config = kinds
    student, teacher = (config(d_model=16 * (i + 1), **common, **size) for i, size in enumerate(sizes))
    return saved(model_class, student, padding_side="right"), saved(model_class, teacher, padding_side="right")


def image_classifiers():
    """Returns folders with a student and a teacher of images (3, 32, 32), for AutoModelForImageClassification."""
    common = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2, "num_labels": 4}
    student = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, **common)
    teacher = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, **common)
    return saved(ViTForImageClassification, student), saved(ViTForImageClassification, teacher)


def images(count=16):
    """Returns random images as an image processor would."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator).numpy()


def saved(model_class, config, padding_side="left"):
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    model_class(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "padding_side": padding_side}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE, **names)
    tokenizer.save_pretrained(folder)
    return folder


def texts(count=16, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[3:], k=draw.randrange(4, 12))) for _ in range(count)]


def chats(count=16):
    """Returns conversational rows of a prompt and a completion."""
    return [
        {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
        for a, b in zip(texts(count), texts(count, seed=1), strict=True)
    ]


def rows(tokenizer, count=32):
    """Returns tokenised chats whose prompts are labelled -100, for DataCollatorForSeq2Seq, which pads them."""
    found = []
    for prompt, completion in zip(texts(count), texts(count, seed=1), strict=True):
        a, b = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
        found.append({"input_ids": a + b, "labels": [-100] * len(a) + b})
    return found


def pairs(tokenizer, count=32):
    """Returns tokenised inputs and answers for encoder-decoders, of different lengths."""
    both = zip(texts(count), texts(count, seed=1), strict=True)
    end = [tokenizer.eos_token_id]
    return [{"input_ids": tokenizer(a).input_ids, "labels": tokenizer(b).input_ids + end} for a, b in both]
