"""`python -m bench.lm --data ../shared/data --out DIR`: a small causal LM distilled with `fastdistill lm`.

A teacher of 10M weights is trained on two novels and wikitext-2. A student of a quarter of its size then learns from
the live teacher, from a cache of it and the labels, and from the labels alone, with three seeds each, on the same
rows; TRL's own SFTTrainer and GKDTrainer (without generation) train it on them as well. Every leg is a process of
one thread, two legs at a time. Its result stays in DIR, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LENGTH, BATCH, VOCABULARY, TOP_K = 128, 16, 8192, 64
SEEDS = (1, 2, 3)
TEACHER = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 5}
STUDENT = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 5}
TEACHER_STEPS, STUDENT_STEPS = 450, 300  # of 2048 tokens
RATES = {"teacher": 1e-3, "student": 2e-3}
HELD_OUT = 400  # rows
AT_A_TIME = 2  # legs of students, each on one core
# The legs of the student that `fastdistill lm` trains, and what it is told.
LEGS = {
    "live teacher": ("--teacher", "teacher", "--dataset", "student.parquet"),
    # The most probable classes alone teach nothing about the others; labels do.
    "cached teacher and labels": ("--cache", "cache", "--alpha", "0.5"),
    "labels alone": ("--teacher", "teacher", "--dataset", "student.parquet", "--alpha", "0"),
}
TRL = {"TRL GKDTrainer, live teacher": "gkd", "TRL SFTTrainer, labels alone": "sft"}


# -- data ----------------------------------------------------------------------------------------------------


def paragraphs(data: Path) -> Iterator[str]:
    """Yields the paragraphs of the novels, whose lines are joined, and of wikitext-2."""
    for book in sorted((data / "books").glob("*.txt")):
        for part in re.split(r"\n\s*\n", book.read_text(encoding="utf-8-sig")):
            yield " ".join(part.split())
    for line in (data / "wikitext-2" / "train.txt").read_text(encoding="utf-8").splitlines():
        for mark in "-,.":
            line = line.replace(f" @{mark}@ ", mark)
        yield line.strip()


def prepare(data: Path, out: Path, student_rows: int) -> None:
    """Writes a tokenizer, the teacher's first weights, the student's config, and rows of `LENGTH` tokens."""
    import torch
    from datasets import Dataset
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text for text in paragraphs(data) if text and not text.startswith("=")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    end = tokenizer.eos_token_id
    ids = [token for row in tokenizer(texts)["input_ids"] for token in (*row, end)]
    blocks = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    rows = Dataset.from_dict({"input_ids": blocks}).train_test_split(HELD_OUT, seed=0)
    rows["test"].to_parquet(out / "held.parquet")
    rows["train"].to_parquet(out / "teacher.parquet")
    rows["train"].select(range(student_rows)).to_parquet(out / "student.parquet")
    shared = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEACHER, **shared, eos_token_id=end, pad_token_id=end, bos_token_id=None))
    student = LlamaForCausalLM(LlamaConfig(**STUDENT, **shared))
    sizes = {"teacher": model.num_parameters(), "student": student.num_parameters()}
    sizes |= {"tokens": len(ids), "student_tokens": student_rows * LENGTH}
    (out / "student.json").write_text(json.dumps({**STUDENT, "num_key_value_heads": STUDENT["num_attention_heads"]}))
    model.save_pretrained(out / "start")
    tokenizer.save_pretrained(out / "start")
    (out / "sizes.json").write_text(json.dumps(sizes))  # last: it says that all is there


# -- legs ----------------------------------------------------------------------------------------------------


def schedule(rate: float, seed: int, steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 40, "seed": seed,
        "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 0.01, "bf16": True,
        "gradient_checkpointing": False, "eval_strategy": "no", "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "logging_steps": 50, "max_length": LENGTH,
    }  # fmt: skip


def fastdistill(*parts: Any) -> list[str]:
    return [sys.executable, "-m", "fastdistill.cli", *map(str, parts)]


def lm(name: str, seed: int, rate: float, steps: int, *what: str) -> list[str]:
    """Returns the command line of `fastdistill lm`; the names of files are within the folder of the results."""
    flags = {"--scheduler": "cosine", "--warmup": 0.1, "--learning-rate": rate, "--batch-size": BATCH, "--seed": seed}
    flags |= {"--max-steps": steps, "--max-length": LENGTH, "--eval": "held.parquet", "--eval_strategy": "no"}
    flags |= {"--gradient_checkpointing": "false", "--save_strategy": "no", "--per_device_eval_batch_size": 40}
    pairs = [str(part) for pair in flags.items() for part in pair]
    return fastdistill("lm", *what, *pairs, "--bf16", "--overwrite", "--output", name)


def measured(command: list[str], out: Path, name: str) -> None:
    """Runs a leg in `out` unless its result is there, and writes its figures and its peak memory to `NAME.json`."""
    result = out / f"{name}.json"
    if result.is_file():
        return
    print(f"{name}: {' '.join(command[2:])}", flush=True)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = "1"  # on 2 cores a second thread makes bfloat16 products slower
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=out, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed: see {log.name}")
    figures: dict[str, Any] = {"peak_mib": usage.ru_maxrss / 1024}
    state = out / name / "trainer_state.json"
    for entry in json.loads(state.read_text())["log_history"] if state.is_file() else ():
        if "train_runtime" in entry:
            figures["tokens_per_second"] = entry["train_samples_per_second"] * LENGTH
            figures["seconds"] = entry["train_runtime"]
        if "eval_loss" in entry:
            figures["perplexity"] = math.exp(entry["eval_loss"])
    if not name.startswith("teacher"):
        shutil.rmtree(out / name, ignore_errors=True)
    result.write_text(json.dumps(figures))


def train_with_trl(kind: str, seed: int, steps: int, name: str) -> None:
    """Trains the student with TRL's own trainer, on the rows, the weights and the schedule of `fastdistill lm`."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from fastdistill.train.students import build_student

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained("teacher"), AutoTokenizer.from_pretrained("teacher")
    torch.manual_seed(seed)
    student = build_student("student.json", teacher, init="random")
    files = {"train": "student.parquet", "test": "held.parquet"}
    rows = {split: load_dataset("parquet", data_files=file, split="train") for split, file in files.items()}
    options = schedule(RATES["student"], seed, steps)
    shared: dict[str, Any] = {
        "train_dataset": rows["train"], "eval_dataset": rows["test"], "processing_class": tokenizer,
    }  # fmt: skip
    if kind == "sft":
        trainer = SFTTrainer(student, SFTConfig(name, **options), **shared)
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
        args = GKDConfig(name, lmbda=0.0, beta=0.0, temperature=1.0, **options)  # rows as they are, forward KL
        trainer = GKDTrainer(student, teacher.eval(), args, data_collator=collator, **shared)
    trainer.train()
    losses = [labels_loss(student, rows["test"][i : i + 40]["input_ids"]) for i in range(0, len(rows["test"]), 40)]
    trainer.log({"eval_loss": statistics.fmean(losses)})
    trainer.save_state()


def labels_loss(model: Any, ids: Any) -> float:
    """Computes the mean cross-entropy of full rows, as `fastdistill lm` does on held-out rows."""
    import torch

    batch = torch.tensor(ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch).logits[:, :-1].float()  # (B, L - 1, V)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))


# -- the run -------------------------------------------------------------------------------------------------


def table(out: Path) -> str:
    """Returns the results as a table of Markdown."""
    sizes = json.loads((out / "sizes.json").read_text())
    teacher = json.loads((out / "teacher.json").read_text())
    lines = [
        f"Teacher: {sizes['teacher'] / 1e6:.1f}M weights, held-out perplexity {teacher['perplexity']:.1f}; "
        f"student: {sizes['student'] / 1e6:.1f}M; {sizes['tokens'] / 1e6:.1f}M tokens, "
        f"of which the student reads {sizes['student_tokens'] / 1e6:.2f}M",
        "",
        "| student | held-out perplexity | tokens/s | peak memory, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for leg in (*LEGS, *TRL):
        found = [json.loads(path.read_text()) for path in sorted(out.glob(f"{folder(leg)}-*.json"))]
        if not found:
            continue
        scores = [figures["perplexity"] for figures in found]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        speed, peak = (statistics.median(f[name] for f in found) for name in ("tokens_per_second", "peak_mib"))
        lines.append(f"| {leg} | {statistics.fmean(scores):.1f}{spread} | {speed:,.0f} | {peak:,.0f} |")
    return "\n".join(lines)


def folder(leg: str) -> str:
    return re.sub(r"\W+", "-", leg.lower())


def run(data: Path, out: Path, teacher_steps: int, student_steps: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "sizes.json").is_file():
        print("preparing rows", flush=True)
        prepare(data, out, student_steps * BATCH)
    start = ("--student", "start", "--dataset", "teacher.parquet", "--alpha", "0")
    measured(lm("teacher", 0, RATES["teacher"], teacher_steps, *start), out, "teacher")
    cache = ("--teacher", "teacher", "--data", "student.parquet", "--top-k", TOP_K, "--max-length", LENGTH, "--bf16")
    if not (out / "cache").is_dir():
        measured(fastdistill("cache", *cache, "--output", "cache", "--overwrite"), out, "cache-writing")
    commands: dict[str, list[str]] = {}
    for leg, kind in TRL.items():
        name = f"{folder(leg)}-{SEEDS[0]}"
        options = ("--trl", kind, "--out", name, "--student-steps", str(student_steps))
        commands[name] = [sys.executable, "-m", "bench.lm", *options]
    for seed in SEEDS:
        for leg, what in LEGS.items():
            name = f"{folder(leg)}-{seed}"
            commands[name] = lm(name, seed, RATES["student"], student_steps, "--student", "student.json", *what)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda name: measured(commands[name], out, name), commands))
    print(table(out))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lm", description=str(__doc__).split("\n\n")[1])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with books/ and wikitext-2/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of models and results")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="default: %(default)s")
    parser.add_argument("--student-steps", type=int, default=STUDENT_STEPS, help="default: %(default)s")
    parser.add_argument("--trl", choices=sorted(TRL.values()), help=argparse.SUPPRESS)  # a leg, in its own process
    given = parser.parse_args()
    if given.trl is not None:
        train_with_trl(given.trl, SEEDS[0], given.student_steps, str(given.out))
    elif given.data is None:
        parser.error("--data is missing: the folder with books/ and wikitext-2/")
    else:
        run(given.data.resolve(), given.out.resolve(), given.teacher_steps, given.student_steps)


if __name__ == "__main__":
    main()
