"""`python -m bench.long_sequences --text NOVEL.txt... --out DIR`: compares two ways to distil at 512 to 8192 tokens.

A Llama-like student (causal, rotary, grouped keys) learns the hidden states and attention scores of a teacher twice as
deep and wide, both with random weights, on real text. For each length one process alternates between the step with this
library; the same step with score matrices; and the two models with a trivial loss, a cost that neither way can avoid.
Some training steps with the library follow. Writes DIR/long_sequences.json and .png, and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.masking_utils import eager_mask

from bench import measure
from bench.conftest import description
from bench.report import write_atomically
from fastdistill.train.capture import capturable, capture
from fastdistill.train.objective import Objective

LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = ("fastdistill", "usual", "models alone")
VOCABULARY = 8192
HEADS = 4


def config(layers: int, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=max(LENGTHS),
        use_cache=False,
    )  # fmt: skip


# -- the step, three ways ----------------------------------------------------------------------------------


def keep_scores(module, query, key, value, attention_mask, scaling, dropout=0.0, *, scores=None, **kwargs):
    """Computes attention and keeps its score matrix, from before the causal mask and the softmax, for the loss."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    of_layer = query @ key.mT * scaling  # (B, H, L, L)
    if scores is not None:
        scores.append(of_layer)
    attended = (of_layer + attention_mask).softmax(-1) @ value
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register("keep_scores", keep_scores)
AttentionMaskInterface.register("keep_scores", eager_mask)


def usual(student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, ids: Tensor) -> Tensor:
    scores: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    with torch.no_grad():
        targets = teacher(ids, output_hidden_states=True, scores=scores["teacher"]).hidden_states
    states = student(ids, output_hidden_states=True, scores=scores["student"]).hidden_states
    project = objective.projections["shared"]
    losses = [F.mse_loss(project(states[i]), targets[target]) for i, target in objective.hidden.items()]
    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    pairs = ids.shape[0] * HEADS * allowed.sum()
    for i, target in objective.attention.items():
        difference = (scores["student"][i - 1] - scores["teacher"][target - 1]).masked_fill(~allowed, 0)
        losses.append(difference.square().sum() / pairs)
    return torch.stack(losses).sum()


def ours(student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, ids: Tensor) -> Tensor:
    batch = {"input_ids": ids}
    with torch.no_grad():
        targets = capture(
            teacher, batch, hidden=set(objective.hidden.values()), attention=set(objective.attention.values())
        )
    states = capture(student, batch, hidden=tuple(objective.hidden), attention=tuple(objective.attention))
    return torch.stack(list(objective(states, targets).values())).sum()


def models_alone(student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, ids: Tensor) -> Tensor:
    with torch.no_grad():
        teacher(ids)
    return student(ids).last_hidden_state.square().mean()


class Way:
    """One way to compute the step, with its own copies of the models."""

    def __init__(self, name: str, models: list[nn.Module], lr: float) -> None:
        self.loss: Callable[..., Tensor] = {"fastdistill": ours, "usual": usual, "models alone": models_alone}[name]
        self.student, self.teacher, self.objective = models = [copy.deepcopy(model) for model in models]
        if name == "usual":
            for model in (self.student, self.teacher):
                model.set_attn_implementation("keep_scores")
        self.parameters = [p for model in (self.student, self.objective) for p in model.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)

    def step(self, ids: Tensor) -> list[Tensor]:
        """Takes one step of the optimiser; returns the loss and the gradients."""
        with capturable(*([self.student, self.teacher] if self.loss is ours else [])):
            loss = self.loss(self.student, self.teacher, self.objective, ids)
            loss.backward()
        self.optimizer.step()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.optimizer.zero_grad()
        return [loss.detach(), *gradients]


# -- what is measured --------------------------------------------------------------------------------------


def measure_length(length: int, blocks: Tensor, models: list[nn.Module], rounds: int, steps: int) -> dict[str, Any]:
    """Measures one length: seconds, bytes and loss of each way, and the losses of some training steps."""
    found: dict[str, Any] = {"length": length, "ways": {}}
    # Each student layer keeps its scores, the softmax's input and output; the teacher's layers keep scores only.
    matrix = HEADS * length**2 * measure.DTYPE.itemsize
    student, teacher = models[0].config.num_hidden_layers, models[1].config.num_hidden_layers
    least = {"usual": (3 * student + teacher + 3) * matrix}
    running: dict[str, Way] = {}
    for name in WAYS:
        if least.get(name, 0) > 0.8 * measure.available():
            found["ways"][name] = {"status": f"not run: would take about {least[name] / 2**30:.0f} GiB"}
            continue
        running[name] = Way(name, models, lr=1e-6)  # so small that the weights hardly change between measurements
        first = running[name].step(blocks[:1])
        extra, _ = measure.peak_bytes(partial(running[name].step, blocks[:1]))
        found["ways"][name] = {"status": "ok", "extra_bytes": extra, "loss": first[0].item()}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, way in running.items():
            seconds[name].append(measure.seconds(partial(way.step, blocks[turn % len(blocks)][None])))
    for name, times in seconds.items():
        found["ways"][name] |= {"seconds": statistics.median(times), "low": min(times), "high": max(times)}
    trained = Way("fastdistill", models, lr=1e-3)
    found["training"] = [trained.step(blocks[i % len(blocks)][None])[0].item() for i in range(steps)]
    return found


def blocks_of(texts: list[Path], length: int, tokenizer: ByteLevelBPETokenizer) -> Tensor:
    """Returns all texts in blocks (N, length)."""
    ids = torch.tensor([i for path in texts for i in tokenizer.encode(path.read_text(encoding="utf-8")).ids])
    return ids[: len(ids) // length * length].view(-1, length).to(measure.DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.long_sequences", description=__doc__.split(":")[1])
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each way and length (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps at each length (default: %(default)s)")
    arguments = parser.parse_args()

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in arguments.text], vocab_size=VOCABULARY, show_progress=False)
    torch.manual_seed(0)
    student, teacher = LlamaModel(config(3, 128)), LlamaModel(config(6, 256)).eval()
    objective = Objective(student.config, teacher.config)
    models = [model.to(measure.DEVICE, measure.DTYPE) for model in (student, teacher, objective)]
    result = description() | {"texts": [path.name for path in arguments.text], "lengths": []}
    result = {key: value for key, value in result.items() if key not in ("format", "peers", "command")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for length in arguments.lengths:
        blocks = blocks_of(arguments.text, length, tokenizer)
        result["lengths"].append(measure_length(length, blocks, models, arguments.rounds, arguments.steps))
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(arguments.out / "long_sequences.json", partial(Path.write_text, data=text, encoding="utf-8"))
        write_atomically(arguments.out / "long_sequences.png", partial(plot, result["lengths"]))
        print(table(result["lengths"]).splitlines()[-1], flush=True)


# -- the output ---------------------------------------------------------------------------------------------


def table(lengths: list[dict[str, Any]]) -> str:
    """Returns Markdown: seconds and memory of each way, what the losses add to the models, and the training losses."""
    lines = [
        "| tokens | step, ours | usual | models alone | losses, ours | usual | memory, ours | usual | models alone "
        "| loss of the first and last steps |",
        "| ---: " * 10 + "|",
    ]
    for found in lengths:
        ways = found["ways"]
        seconds = {name: way.get("seconds") for name, way in ways.items()}
        added = {name: s - seconds["models alone"] if s else None for name, s in seconds.items()}
        cells = [f"{s:.3g} s" if s else "-" for s in seconds.values()]
        cells += [f"{added[name]:.2g} s" if added[name] else "-" for name in WAYS[:2]]
        cells += [f"{way['extra_bytes'] / 2**20:.0f} MiB" if "seconds" in way else way["status"]
                  for way in ways.values()]  # fmt: skip
        cells.append(f"{found['training'][0]:.3f}, {found['training'][-1]:.3f}" if found["training"] else "-")
        lines.append(f"| {found['length']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(lengths: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = (("seconds a step", "seconds", 1.0), ("memory of a step, MiB", "extra_bytes", 2.0**20))
    for axes, (label, field, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in WAYS:
            points = [
                (found["length"], found["ways"][name][field] / unit)
                for found in lengths
                if "seconds" in found["ways"][name]
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        start = lengths[0]["length"], lengths[0]["ways"]["fastdistill"][field] / unit
        straight = [(found["length"], start[1] * found["length"] / start[0]) for found in lengths]
        axes.plot(*zip(*straight, strict=True), ":", color="gray", label="linear in the length")
        ticks = [found["length"] for found in lengths]
        axes.set(xlabel="tokens of the sequence", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    main()
