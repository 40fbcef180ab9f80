"""`python -m bench.cache --model M --corpus FILE`: compares an offline teacher with the live one.

One run over the first tokens of a text measures the bytes per token against full logits; the seconds to write (between
two passes of the teacher alone), to read and to verify; the effect of rounding; and the time of a training step with
the live teacher and with the cache. The two kinds of step alternate on the same rows and include reading and padding
them. The student has the teacher's architecture with half its layers and half its width.

`python -m bench.cache --codec` measures the storage alone, without a model: bytes, time and error at k = 50 of 151936.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from fastdistill.train.cache import file_identity, read_cache, read_manifest, write_cache
from fastdistill.train.cache_from import write_cache_from
from fastdistill.train.capture import capture
from fastdistill.train.data import PaddingCollator, pack_corpus
from fastdistill.train.model import DistillationModel, teacher_states
from fastdistill.train.objective import Objective
from fastdistill.train.topk_codec import TopkIndices, TopkLogprobs

CHECKED = 16  # rows whose rounding is checked


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(function: Any) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def small(teacher: Any) -> Any:
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers //= 2
    config.hidden_size //= 2
    config.intermediate_size //= 2
    torch.manual_seed(0)
    return type(teacher)(config).to(teacher.device)


class Bench:
    """Measures every way on the same rows in the same batches."""

    def __init__(self, teacher: Any, tokenizer: Any, blocks: Dataset, size: int) -> None:
        self.teacher, self.tokenizer, self.blocks, self.size = teacher, tokenizer, blocks, size
        self.collate = PaddingCollator(tokenizer)
        self.batches = [list(range(i, i + size)) for i in range(0, len(blocks) - size + 1, size)]
        self.tokens = sum(sum(blocks[i]["length"] for i in batch) for batch in self.batches)
        self.rows = blocks  # replaced by those of the cache once it is written

    def fetch(self, rows: Dataset, numbers: list[int]) -> dict[str, Tensor]:
        names = [name for name in rows.column_names if name != "length"]
        batch = self.collate(rows.select_columns(names).__getitems__(numbers))
        return {name: x.to(self.teacher.device) for name, x in batch.items()}

    def alone(self) -> float:
        """Returns the seconds per token of the teacher's forward pass."""

        def run() -> None:
            for numbers in self.batches:
                with torch.inference_mode():
                    capture(self.teacher, self.fetch(self.blocks, numbers))

        return seconds(run) / self.tokens

    def files(self, folder: Path, k: int, bits: int, hidden: list[int]) -> str:
        def write() -> None:
            options: dict[str, Any] = {"top_k": k, "logprobs_bits": bits, "hidden": hidden, "batch_size": self.size}
            write_cache(self.blocks, self.teacher, self.tokenizer, folder, **options)

        def read() -> None:
            for i in torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(0)).tolist():
                self.fetch(self.rows, self.batches[i])

        before, writing, after = self.alone(), seconds(write), self.alone()
        manifest = read_manifest(folder)
        self.rows, self.classes = read_cache(folder), manifest["classes"]
        paths = [folder / shard["name"] for shard in manifest["shards"]]
        stored, full = sum(path.stat().st_size for path in paths), 4 * self.classes
        hashing = seconds(lambda: [file_identity(path) for path in paths])
        writing, reading, alone = writing / manifest["tokens"], seconds(read) / self.tokens, (before + after) / 2
        return (
            f"{stored / manifest['tokens']:.0f} bytes a token; full logits in float32 are {full}, "
            f"{full * manifest['tokens'] / stored:.0f}x\n"
            f"  a million tokens: the teacher alone {1e6 * alone:.0f} s, write {1e6 * writing:.0f} s "
            f"({writing / alone:.2f}x), read shuffled {1e6 * reading:.1f} s (1/{alone / reading:.0f}); "
            f"verify {1e9 * hashing / stored:.2f} s a GB"
        )

    def rounding(self) -> str:
        """Compares the stored log-probabilities with those of the same rows computed now, in float64."""
        distances, divergences, masses = [], [], []
        for row in range(min(CHECKED, len(self.rows))):
            found = self.rows[row]
            with torch.no_grad():
                logits = self.teacher(torch.tensor(found["input_ids"], device=self.teacher.device)[None]).logits[0]
            stored, indices = torch.tensor(found["topk_logprobs"]).double(), torch.tensor(found["topk_indices"])
            exact = logits[:, : self.classes].double().log_softmax(-1).cpu().gather(-1, indices)
            distances.append(0.5 * (stored.softmax(-1) - exact.softmax(-1)).abs().sum(-1))
            divergences.append(divergence(exact.numpy(), stored.numpy()))
            masses.append(exact.exp().sum(-1))
        distance, lost, mass = torch.cat(distances), np.concatenate(divergences), torch.cat(masses)
        return (
            f"mass of the k classes {mass.mean():.3f}; rounding moves their distribution by KL {lost.mean():.1e} on "
            f"average, {lost.max():.1e} at most; total variation {distance.mean():.1e}, {distance.max():.1e}"
        )

    def step(self, steps: int) -> str:
        """Trains one student with the live teacher and another from the cache."""
        took: dict[str, list[float]] = {"live": [], "cached": []}
        models, optimizers = {}, {}
        for name in took:
            student = small(self.teacher)
            models[name] = DistillationModel(student, Objective(student.config, terms=("prediction",))).train()
            optimizers[name] = torch.optim.AdamW(models[name].parameters(), lr=1e-4)

        def train(name: str, numbers: list[int]) -> None:
            batch, states = self.fetch(self.rows if name == "cached" else self.blocks, numbers), None
            if name == "live":
                states = teacher_states(self.teacher, models[name].student, models[name].objective, batch, False)
            models[name](**batch, teacher=states)["loss"].backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        for i in range(steps + 1):
            for name, found in took.items():
                found.append(seconds(partial(train, name, self.batches[i % len(self.batches)])))
        live, cached = (statistics.median(found[1:]) for found in took.values())
        return (
            f"training step: {1000 * live:.0f} ms with the live teacher, {1000 * cached:.0f} ms from the cache: "
            f"{live / cached:.2f}x"
        )


def divergence(exact: np.ndarray, stored: np.ndarray) -> np.ndarray:  # (n, k) each -> (n)
    """Computes KL(teacher || stored teacher) of the listed classes: what rounding can add to a loss."""
    p, q = (np.exp(x.astype(np.float64)) for x in (exact, stored))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return (p * np.log(p / q)).sum(1)


def codec(k: int = 50, classes: int = 151936, tokens: int = 20_000, row: int = 512) -> None:
    """Prints the storage's figures for Zipf-like distributions that are flat (noise 1) to peaked (noise 8)."""
    rng = np.random.default_rng(0)
    indices = np.sort(np.stack([rng.choice(classes, k, replace=False) for _ in range(200)]), axis=1)
    indices = np.tile(indices, (tokens // 200, 1))
    of_classes = TopkIndices(k, classes)
    print(f"k = {k}, V = {classes}, rows of {row} tokens, one core")
    print(rates("classes", of_classes, indices, row))
    for bits in (16, 8):
        of_logprobs = TopkLogprobs(k, bits)
        for noise in (1.0, 3.0, 8.0):
            logits = -np.log(np.arange(1, 20_001) + 2.7) + noise * rng.standard_normal((500, 20_000))
            logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            logp = -np.sort(-logp, axis=1)[:, :k].astype(np.float32)
            lost = divergence(logp, of_logprobs.decode(of_logprobs.encode(logp)))
            mode = np.exp(logp[:, 0]).mean()
            print(f"{bits} bits, probability of the first {mode:.2f}: KL {lost.mean():.1e}, at most {lost.max():.1e}")
        logprobs = np.tile(logp, (tokens // 500, 1))
        print(rates(f"log-probabilities, {bits} bits", of_logprobs, logprobs, row))
        print(f"{bits} bits, {whole_cache(logprobs, indices, classes, bits, row)}")


def whole_cache(logprobs: np.ndarray, indices: np.ndarray, classes: int, bits: int, row: int) -> str:
    given = [
        {"input_ids": [0] * row, "topk_logprobs": logprobs[i : i + row], "topk_indices": indices[i : i + row]}
        for i in range(0, len(indices) - row, row)
    ]
    tokens = len(given) * row
    with tempfile.TemporaryDirectory() as work:
        folder, k = Path(work) / "cache", indices.shape[1]
        writing = seconds(lambda: write_cache_from(given, classes, folder, top_k=k, logprobs_bits=bits))
        rows, stored = read_cache(folder), sum(shard["bytes"] for shard in read_manifest(folder)["shards"])
        batches = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 8 * 8].reshape(-1, 8).tolist()
        reading = min(seconds(lambda: [rows.__getitems__(batch) for batch in batches]) for _ in range(3))
    return (
        f"a whole cache: {stored / tokens:.0f} bytes a token with input_ids; write_cache_from {tokens / writing:,.0f}, "
        f"read_cache in shuffled batches of 8 {8 * row * len(batches) / reading:,.0f} tokens a second"
    )


def rates(name: str, feature: Any, values: np.ndarray, row: int) -> str:
    codes: list[np.ndarray] = []
    writing = seconds(lambda: codes.append(feature.encode(values)))
    pieces = [codes[0][i : i + row] for i in range(0, len(values), row)]
    reading = min(seconds(lambda: [feature.decode(piece) for piece in pieces]) for _ in range(5))
    return (
        f"{name}: {feature.token_bytes} bytes a token; write {1e-6 * len(values) / writing:.2f}, read "
        f"{1e-6 * len(values) / reading:.2f} million tokens a second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__.split(":")[1])
    parser.add_argument("--codec", action="store_true", help="measure the storage alone")
    parser.add_argument("--model", help="a language model: folder or hub name")
    parser.add_argument("--kind", default="AutoModelForMaskedLM", help="its Auto class (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="text, a paragraph a line")
    parser.add_argument("--tokens", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens in a block (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks at a time (default: %(default)s)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64], help="default: 16 64")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8], help="of log-probabilities (default: 16 8)")
    parser.add_argument("--hidden", type=int, nargs="*", default=(), help="hidden states to keep as well")
    parser.add_argument("--steps", type=int, default=10, help="of training, each way (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.codec:
        codec()
        return
    if arguments.model is None or arguments.corpus is None:
        parser.error("--model and --corpus are needed, or --codec")

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    teacher = getattr(transformers, arguments.kind).from_pretrained(arguments.model, dtype=torch.float32)
    teacher = teacher.eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    blocks = pack_corpus([arguments.corpus], tokenizer, arguments.length)
    blocks = blocks.select(range(min(len(blocks), arguments.tokens // arguments.length)))
    bench = Bench(teacher, tokenizer, blocks, arguments.batch_size)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {len(blocks)} blocks of text")
    for k in arguments.top_k:
        for bits in arguments.bits:
            with tempfile.TemporaryDirectory() as work:
                print(f"\nk = {k}, {bits} bits: {bench.files(Path(work) / 'cache', k, bits, arguments.hidden)}")
                print(f"  {bench.rounding()}")
                if bits == arguments.bits[0]:
                    print(f"  {bench.step(arguments.steps)}")


if __name__ == "__main__":
    main()
