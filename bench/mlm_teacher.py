"""`python -m bench.mlm_teacher --model BERT --corpus FILE... --out DIR`: trains a masked-LM head for a BERT.

Augmentation needs a masked language model. For a BERT without its head (all-MiniLM-L6-v2, say), a few minutes on two
cores train a new one on wikitext-2. The head learns quickly from random weights; the encoder is trained slowly, because
a sentence encoder no longer represents the token at each position. docs/augmentation.md shows the resulting words.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer

from fastdistill.train.data import pack_corpus
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import whole_output
from fastdistill.train.resumable import training_arguments

LENGTH, BATCH = 64, 32
HEAD_RATE, ENCODER_RATE = 1e-3, 2e-4
HELD_OUT = 256  # blocks


class MaskedTrainer(Trainer):
    """Applies the head to masked tokens only: the product with the vocabulary costs as much as the encoder."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        masked = labels != -100
        hidden = model.bert(**inputs).last_hidden_state[masked]
        loss = F.cross_entropy(model.cls(hidden).float(), labels[masked])
        return (loss, {"loss": loss}) if return_outputs else loss


def read_wikitext(paths: list[Path], unknown: str) -> Dataset:
    """Reads paragraphs without headings; undoes wikitext's spacing of hyphens and numbers."""
    lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("=")]
    for mark in "-,.":
        lines = [line.replace(f" @{mark}@ ", mark) for line in lines]
    return Dataset.from_dict({"text": [line.replace("<unk>", unknown) for line in lines]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mlm_teacher", description="Train the head anew.")
    parser.add_argument("--model", required=True, help="a BERT: folder or hub name")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", required=True, metavar="FILE", help="wikitext's training file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in that folder")
    parser.add_argument("--steps", type=int, default=400, help=f"of {LENGTH * BATCH} tokens (default: %(default)s)")
    arguments = parser.parse_args()

    torch.manual_seed(0)  # for the new head
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = BertForMaskedLM.from_pretrained(arguments.model, dtype=torch.float32)
    blocks = pack_corpus(read_wikitext(arguments.corpus, tokenizer.unk_token), tokenizer, LENGTH)
    blocks = blocks.train_test_split(HELD_OUT, seed=0)
    head = [*model.cls.predictions.transform.parameters(), model.cls.predictions.bias]
    groups = [
        {"params": head, "lr": HEAD_RATE},
        {"params": list(model.bert.parameters()), "lr": ENCODER_RATE},  # and the decoder, which shares its embeddings
    ]
    with whole_output(arguments.out, overwrite=arguments.overwrite) as work:
        options = {"max_steps": arguments.steps, "bf16": True, "save_strategy": "no", "report_to": "none"}
        schedule = Schedule(epochs=1, batch_size=BATCH, learning_rate=HEAD_RATE, warmup=0.1, seed=0, arguments=options)
        trainer = MaskedTrainer(
            model,
            training_arguments(work, schedule),
            data_collator=DataCollatorForLanguageModeling(tokenizer),
            train_dataset=blocks["train"],
            eval_dataset=blocks["test"],
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.01), None),
        )
        trainer.train()
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        torch.manual_seed(0)  # masks the same tokens whatever was trained
        loss = trainer.evaluate()["eval_loss"]
    print(f"held-out text: loss {loss:.2f} a masked token, perplexity {math.exp(loss):.1f}; wrote {arguments.out}")


if __name__ == "__main__":
    main()
