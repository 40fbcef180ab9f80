"""`python -m bench.packing --text FILE --vocab VOCAB.txt`: compares packing with padding in the general stage.

A small BERT learns the embeddings, hidden states and attention scores of a larger one, both with random weights, on the
paragraphs of a text. One process takes turns between the same batches packed into one row, padded in the order of
chance, and padded in batches of similar length. Tokens are those of the text, without padding. Prints a line for each.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from bench import measure
from fastdistill.train.capture import capturable
from fastdistill.train.data import PaddingCollator, flatten, pack_corpus
from fastdistill.train.model import DistillationModel, teacher_states
from fastdistill.train.objective import Objective


def bert(layers: int, width: int) -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, num_attention_heads=4),
        add_pooling_layer=False,
    ).to(measure.DEVICE)


def step(model: DistillationModel, teacher: BertModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Returns the loss and, in place of an optimiser's step, drops the gradients."""
    batch = {name: x.to(measure.DEVICE) for name, x in batch.items()}
    loss = model(**batch, teacher=teacher_states(teacher, model.student, model.objective, batch, False))["loss"]
    loss.backward()
    model.zero_grad()
    return [loss.detach()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    for name in ("text", "vocab"):
        if not (path := getattr(options, name)).is_file():
            parser.error(f"argument --{name}: {path}: no such file")
    tokenizer = BertTokenizerFast(str(options.vocab))
    lines = Dataset.from_dict({"text": options.text.read_text().splitlines()})
    rows = pack_corpus(lines, tokenizer, 512, apart=True)["input_ids"][:]
    random.Random(0).shuffle(rows)
    rows = rows[: options.batch_size * options.batches]
    grouped = sorted(rows, key=len)
    pad = PaddingCollator(tokenizer)
    ways = {"packed": (flatten, rows), "padded": (pad, rows), "padded, of similar length": (pad, grouped)}
    teacher, student = bert(6, 384), bert(3, 192)
    model = DistillationModel(student, Objective(student.config, teacher.config)).to(measure.DEVICE).eval()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0)
    with capturable(student, teacher.eval()):
        for first in range(0, len(rows), options.batch_size):
            for way, (collate, given) in ways.items():
                batch = collate([{"input_ids": row} for row in given[first : first + options.batch_size]])
                run = partial(step, model, teacher, dict(batch))
                peaks[way] = max(peaks[way], measure.peak_bytes(run)[0])
                seconds[way].append(measure.seconds(run))
    tokens = sum(map(len, rows))
    print(f"{len(rows)} sequences of {min(map(len, rows))} to {max(map(len, rows))} tokens, "
          f"{statistics.mean(map(len, rows)):.0f} on average; batches of {options.batch_size}")  # fmt: skip
    for way in ways:
        rate, peak = tokens / sum(seconds[way]), peaks[way]
        slower, more = sum(seconds[way]) / sum(seconds["packed"]), peak / peaks["packed"]
        print(f"{way:26} {rate:7.0f} tokens/s ({slower:.2f}x the time)  peak {peak / 2**20:6.0f} MiB ({more:.2f}x)")


if __name__ == "__main__":
    main()
