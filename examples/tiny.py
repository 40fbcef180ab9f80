"""Makes what the examples run on: random models of a few thousand weights, a tokenizer and chats of random words."""

import random
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(125))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}w0 {% endif %}"
)


def language_models():
    """Returns folders with a student and a teacher, for AutoModelForCausalLM and AutoTokenizer."""
    common = {"vocab_size": len(WORDS), "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
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


def saved(model_class, config):
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    model_class(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "padding_side": "left"}
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


def batches(tokenizer, count=8, rows=4):
    """Returns batches of chats whose prompts and padding are labelled -100."""
    found = []
    for start in range(0, count * rows, rows):
        prompts, completions = (texts(count * rows, seed)[start : start + rows] for seed in (0, 1))
        chats = [f"{prompt} {completion}" for prompt, completion in zip(prompts, completions, strict=True)]
        batch = tokenizer(chats, padding=True, return_tensors="pt")
        lengths = torch.tensor([len(tokenizer(prompt).input_ids) for prompt in prompts])[:, None]
        position = batch["attention_mask"].cumsum(-1)  # from 1 on, after the padding
        labels = batch["input_ids"].masked_fill(position <= lengths, -100)
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return found
