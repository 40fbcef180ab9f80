"""Measures the memory of a training step with a live teacher of 128,256 classes: the trainer's, and with full logits.

    python -m bench.live_teacher --tokens 2048

Both steps run the teacher, and the student forward and backward, without an optimiser. The peak is what the allocator
holds above the models and the gradients that are there before.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench import measure
from fastdistill.train.capture import States, capture
from fastdistill.train.model import DistillationModel, teacher_states
from fastdistill.train.objective import Objective

CLASSES = 128256
GOAL = 0.20  # of the memory with full logits


def models(width: int) -> list[LlamaForCausalLM]:
    """Returns a student, and a teacher twice as wide; two layers each, since the head is what is measured."""
    found = []
    for d in (width, 2 * width):
        torch.manual_seed(d)
        config = LlamaConfig(
            vocab_size=CLASSES, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        found.append(LlamaForCausalLM(config).to(measure.DEVICE).eval())
    return found


def peaks(tokens: int, width: int = 128, options: dict | None = None) -> tuple[int, int, float]:
    """Returns the peak bytes of the trainer's step and of one with full logits, and how far their losses differ."""
    student, teacher = models(width)
    batch = {"input_ids": torch.randint(CLASSES, (1, tokens), device=measure.DEVICE)}
    objective = Objective(student.config, terms=("prediction",), **(options or {}))
    model = DistillationModel(student, objective)

    def in_trainer() -> States | None:
        return teacher_states(teacher, student, objective, batch, has_logits=False)

    @torch.no_grad()
    def with_logits() -> States:
        return capture(teacher, batch)

    found, losses = [], []
    for teach in (in_trainer, with_logits):

        def step(teach=teach) -> list[Tensor]:
            loss = model(**batch, teacher=teach())["loss"]
            loss.backward()
            losses.append(loss.item())
            return []

        step()  # looks at the heads, and makes room for the gradients
        found.append(measure.peak_bytes(step)[0])
    return found[0], found[1], abs(losses[0] - losses[-1]) / abs(losses[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.live_teacher", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the batch (default: %(default)s)")
    tokens = parser.parse_args().tokens
    lean, full, difference = peaks(tokens)
    logits = tokens * CLASSES * 4
    print(
        f"{measure.DEVICE}, V {CLASSES}, {tokens} tokens, float32; one tensor of logits {logits / 2**20:.0f} MiB\n"
        f"peak of a step: {lean / 2**20:.0f} MiB in the trainer, {full / 2**20:.0f} MiB with full logits: "
        f"{lean / full:.1%} (goal: at most {GOAL:.0%}); losses differ by {difference:.1e}"
    )
    return int(lean > GOAL * full)


if __name__ == "__main__":
    raise SystemExit(main())
