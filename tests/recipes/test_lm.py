"""`fastdistill lm` end to end on tiny models: steps against float64 on full logits, held-out figures, bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastdistill import cli
from fastdistill.recipes import distil_lm
from fastdistill.recipes.options import LMOptions

WORDS = ("red", "blue", "cat", "dog", "sun", "sea")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PLAIN_STEP = (
    "--optim",
    "sgd",
    "--learning-rate",
    1.0,
    "--max_grad_norm",
    0,
    "--max-steps",
    1,
    "--scheduler",
    "constant",
)
PLAIN_STEP += ("--weight-decay", 0, "--gradient_checkpointing", "false")


def tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Makes a tokenizer in which each character is a token."""
    tokens = ["<pad>", "<|end|>", "<user>", "<assistant>", *map(chr, range(32, 127)), *extra]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.decoder = decoders.Fuse()
    special = {"additional_special_tokens": ["<user>", "<assistant>"]}
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|end|>", **special)
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, width: int, layers: int, seed: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    made = tokenizer()
    config = {
        "vocab_size": len(made), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2,
        "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**config, **options}))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return model


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a teacher, students, and the same kinds of rows as files; everything else is in the tests."""
    root, rng = tmp_path_factory.mktemp("lm"), random.Random(0)
    save(root / "teacher", 32, 3, 0)
    save(root / "student", 16, 2, 1)
    (root / "student.json").write_text(json.dumps({"num_hidden_layers": 2}))
    chat = [
        [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": words(rng, 3)}
            for turn in range(2 * rng.randint(1, 2))
        ]
        for _ in range(12)
    ]
    write_lines(root / "chat.jsonl", [{"messages": messages} for messages in chat])
    write_lines(root / "pairs.jsonl", [{"prompt": words(rng, 3) + " ", "completion": words(rng, 3)} for _ in range(12)])
    write_lines(root / "text.txt", [line for _ in range(12) for line in (words(rng, 6), "", "  ")])
    write_lines(root / "held.txt", [words(rng, 5) for _ in range(7)])
    return root


def command(files: Path, output: Path, *more: Any, data: str | None = "chat.jsonl") -> list[str]:
    given = [part for part in more if isinstance(part, str)]
    argv = ["lm"]
    for name in ("teacher", "student"):
        argv += (
            [] if f"--{name}" in given or (name == "teacher" and "--cache" in given) else [f"--{name}", files / name]
        )
    if data is not None:
        argv += ["--dataset", files / data]
    return [str(part) for part in (*argv, "--output", output, *more)]


def rows_of(files: Path, name: str) -> list[tuple[str, str]]:
    """Returns the rows of a file as texts, each with a mask of the same length: x where the token is learned."""
    lines = [line for line in (files / name).read_text().split("\n") if line.strip()]
    found = []
    for line in lines:
        if name.endswith(".txt"):
            found.append((line + "|", "x" * (len(line) + 1)))  # | stands for the end token
            continue
        row = json.loads(line)
        if "prompt" in row:
            prompt, completion = row["prompt"], row["completion"] + "|"
            found.append((prompt + completion, "." * len(prompt) + "x" * len(completion)))
            continue
        text = mask = ""
        for message in row["messages"]:
            is_ours = message["role"] == "assistant"
            text += ("A" if is_ours else "U") + message["content"] + "|"
            mask += "." + ("x" if is_ours else ".") * (len(message["content"]) + 1)
        found.append((text, mask))
    return found


def ids_of(text: str) -> list[int]:
    special = {"|": 1, "U": 2, "A": 3}
    return [special.get(letter, ord(letter) - 32 + 4) for letter in text]


def token_losses(student: Any, teacher: Any, text: str, mask: str, alpha: float = 1.0) -> list[Tensor]:
    """Computes alpha KL(teacher || student) + (1 - alpha) cross-entropy of each token that the mask marks, float64."""
    ids = torch.tensor([ids_of(text)])
    ours = student(ids).logits[0].log_softmax(-1)
    with torch.no_grad():
        theirs = teacher(ids).logits[0].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    labels = F.nll_loss(ours[:-1], ids[0, 1:], reduction="none")
    return [alpha * divergence[i] + (1 - alpha) * labels[i] for i in range(ids.shape[1] - 1) if mask[i + 1] == "x"]


def expected_step(
    files: Path, rows: list[tuple[str, str]], alpha: float = 1.0, student: Path | None = None
) -> dict[str, Tensor]:
    """Returns the gradient of the mean over all counted tokens of `rows`, by autograd in float64."""
    ours = AutoModelForCausalLM.from_pretrained(student or files / "student", dtype=torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(files / "teacher", dtype=torch.float64)
    losses = [loss for text, mask in rows for loss in token_losses(ours, theirs, text, mask, alpha)]
    torch.stack(losses).mean().backward()
    return {name: p.grad for name, p in ours.named_parameters()}


def error_of_step(files: Path, output: Path, gradient: dict[str, Tensor], student: Path | None = None) -> float:
    """Returns the largest relative error of a step of plain SGD with learning rate 1."""
    before, after = (
        load_file((student or files / "student") / "model.safetensors"),
        load_file(output / "model.safetensors"),
    )
    moved = {name: before[name].double() - after[name].double() for name in gradient if name in after}
    assert moved
    return max(float((moved[name] - gradient[name]).norm() / gradient[name].norm()) for name in moved)


def fails(capsys: Any, argv: list[str], code: int = 2) -> str:
    capsys.readouterr()
    try:
        found = cli.main(argv)
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error:" in line]
    assert found == code, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


class TestSteps:
    """One step of SGD over all rows, in two micro-batches, equals float64."""

    @pytest.mark.parametrize(
        ("data", "whole", "options"),
        [
            ("chat.jsonl", False, ("--assistant-only",)),
            ("chat.jsonl", True, ("--alpha", 0.25)),
            ("pairs.jsonl", False, ()),
            ("pairs.jsonl", True, ("--completion-only", "false")),
            ("text.txt", True, ()),
            ("text.txt", True, ("--packing", "--max-length", 64)),
            ("pairs.jsonl", False, ("--packing", "--max-length", 48, "--alpha", 0.5)),
        ],
    )
    def test_live_teacher(self, files: Path, tmp_path: Path, data: str, whole: bool, options: tuple[Any, ...]) -> None:
        batches = ("--batch-size", 6, "--gradient_accumulation_steps", 2)
        if "--packing" in options:
            batches = ("--batch-size", 50)  # all packed rows in one step
        assert cli.main(command(files, tmp_path / "out", *PLAIN_STEP, *batches, *options, data=data)) == 0
        rows = [(text, "x" * len(text) if whole else mask) for text, mask in rows_of(files, data)]
        alpha = options[options.index("--alpha") + 1] if "--alpha" in options else 1.0
        assert error_of_step(files, tmp_path / "out", expected_step(files, rows, alpha)) < 1e-4

    def test_labels_alone_need_no_teacher(self, files: Path, tmp_path: Path) -> None:
        options = ("--alpha", 0, "--batch-size", 6, "--gradient_accumulation_steps", 2, "--assistant-only")
        argv = command(files, tmp_path / "out", *PLAIN_STEP, *options)
        at = argv.index("--teacher")
        assert cli.main(argv[:at] + argv[at + 2 :]) == 0
        gradient = expected_step(files, rows_of(files, "chat.jsonl"), 0.0)
        assert error_of_step(files, tmp_path / "out", gradient) < 1e-4

    def test_options_of_trl_and_a_config_file(self, files: Path, tmp_path: Path) -> None:
        """Rows that run into each other (packing_strategy wrapped) have one loss more for each seam."""
        (tmp_path / "run.yaml").write_text("packing_strategy: wrapped\nmax_length: 64\npacking: true\nalpha: 0.9\n")
        options = ("--config", tmp_path / "run.yaml", "--batch-size", 50, "--alpha", 1)
        assert cli.main(command(files, tmp_path / "out", *PLAIN_STEP, *options, data="text.txt")) == 0
        joined = "".join(text for text, _ in rows_of(files, "text.txt"))
        rows = [(joined[i : i + 64], "x" * 64) for i in range(0, len(joined), 64)]
        rows = [(text, mask[: len(text)]) for text, mask in rows]
        assert error_of_step(files, tmp_path / "out", expected_step(files, rows)) < 1e-4

    def test_cached_teacher(self, files: Path, tmp_path: Path) -> None:
        """A cache of all classes gives the live step, up to the rounding of its log-probabilities."""
        argv = ["cache", "--teacher", files / "teacher", "--data", files / "chat.jsonl", "--assistant-only"]
        argv += ["--top-k", len(tokenizer()), "--output", tmp_path / "cache"]
        assert cli.main([str(part) for part in argv]) == 0
        options = ("--cache", tmp_path / "cache", "--batch-size", 6, "--gradient_accumulation_steps", 2, "--alpha", 0.5)
        assert cli.main(command(files, tmp_path / "out", *PLAIN_STEP, *options, data=None)) == 0
        gradient = expected_step(files, rows_of(files, "chat.jsonl"), 0.5)
        assert error_of_step(files, tmp_path / "out", gradient) < 1e-2


class TestStudents:
    def test_a_config_file_starts_from_the_layers_of_the_teacher(self, files: Path, tmp_path: Path) -> None:
        options = ("--student", files / "student.json", "--init", "teacher", "--max-steps", 1, "--learning-rate", 1e-9)
        assert cli.main(command(files, tmp_path / "out", *options)) == 0
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", files / "teacher"))
        for name, x in ours.items():
            source = name.replace("layers.1.", "layers.2.")  # 3 layers of the teacher's -> 2
            torch.testing.assert_close(x, theirs[source if "layers" in name else name], atol=1e-6, rtol=0, msg=name)

    def test_lora_is_merged_and_its_adapter_kept(self, files: Path, tmp_path: Path) -> None:
        from peft import PeftModel

        options = ("--lora", 2, "--epochs", 3, "--learning-rate", 0.02)
        assert cli.main(command(files, tmp_path / "out", *options)) == 0
        before, after = (load_file(folder / "model.safetensors") for folder in (files / "student", tmp_path / "out"))
        moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
        linear = {name for name, x in before.items() if "proj" in name}
        assert moved == linear
        base = AutoModelForCausalLM.from_pretrained(files / "student")
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor([ids_of("Ured|Acat|")])
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE

    def test_a_lora_step_moves_as_float64_says(self, files: Path, tmp_path: Path) -> None:
        """B is 0 at first, so that only B learns: its gradient is scaling * A^T of that of the merged weight."""
        options = ("--lora", 2, "--lora-alpha", 6, "--batch-size", 12, "--lora-targets", "q_proj")
        assert cli.main(command(files, tmp_path / "out", *PLAIN_STEP, *options)) == 0
        rows = [(text, "x" * len(text)) for text, _ in rows_of(files, "chat.jsonl")]
        gradient = expected_step(files, rows)
        adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            a, b = (adapter[f"{name}{part}.weight"].double() for part in "AB")
            wanted = -3 * gradient[f"model.layers.{layer}.self_attn.q_proj.weight"] @ a.T
            assert (b - wanted).norm() < 1e-4 * wanted.norm()


class TestEvaluation:
    @pytest.mark.parametrize("batch", [2, 8])
    def test_perplexity_is_that_of_all_held_out_tokens(
        self, files: Path, tmp_path: Path, batch: int, capsys: Any
    ) -> None:
        options = ("--eval", files / "held.txt", "--max-steps", 3, "--per_device_eval_batch_size", batch)
        options += ("--eval_strategy", "steps", "--eval_steps", 2, "--learning-rate", 1e-3)
        assert cli.main(command(files, tmp_path / "out", *options, data="text.txt")) == 0
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
        with torch.no_grad():
            losses = [
                x for text, mask in rows_of(files, "held.txt") for x in token_losses(student, student, text, mask, 0.0)
            ]
        expected = math.exp(torch.stack(losses).mean())
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        figures = [entry for entry in log if "eval_loss" in entry]
        assert [entry["step"] for entry in figures] == [2, 3]
        assert figures[-1]["eval_perplexity"] == pytest.approx(expected, rel=1e-5)
        assert f"perplexity {expected:.2f}" in capsys.readouterr().out

    def test_splits_of_a_saved_data_set(self, files: Path, tmp_path: Path) -> None:
        texts = {"train": [t[:-1] for t, _ in rows_of(files, "text.txt")], "test": ["red cat", "blue sea"]}
        DatasetDict({name: Dataset.from_dict({"text": x, "id": x}) for name, x in texts.items()}).save_to_disk(
            tmp_path / "data"
        )
        options = LMOptions(
            teacher=str(files / "teacher"), student=str(files / "student"), dataset=[str(tmp_path / "data")],
            eval_split="test", output=tmp_path / "out", max_steps=1, arguments={"eval_strategy": "no"},
        )  # fmt: skip
        figures = distil_lm(options)
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
        with torch.no_grad():
            losses = [
                x for t in texts["test"] for x in token_losses(student, student, t + "|", "x" * (len(t) + 1), 0.0)
            ]
        assert figures["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        again = LMOptions(**{**options.__dict__, "resume": True})
        assert distil_lm(again) == figures  # reads the finished run


ANSWERS = ("--max_completion_length", 8, "--gradient_checkpointing", "false")


def prompts_of(files: Path, data: str) -> list[Any]:
    rows = [json.loads(line) for line in (files / data).read_text().splitlines()]
    return [row["messages"][:-1] if "messages" in row else row["prompt"] for row in rows]


def trl_on_policy(files: Path, folder: Path, data: str, **options: Any) -> Any:
    """Trains by TRL's own trainer and loss; returns the student."""
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = (AutoModelForCausalLM.from_pretrained(files / name) for name in ("student", "teacher"))
    common = {
        "output_dir": str(folder), "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "seed": 42,
        "lr_scheduler_type": "constant", "weight_decay": 0, "gradient_checkpointing": False, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "max_completion_length": 8,
    }  # fmt: skip
    prompts = Dataset.from_dict({"prompt": prompts_of(files, data)})
    config, made = DistillationConfig(**common, **options), AutoTokenizer.from_pretrained(files / "teacher")
    DistillationTrainer(student, teacher, config, train_dataset=prompts, processing_class=made).train()
    return student


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """Returns what the chat template makes of a prompt, as `rows_of` writes it."""
    return "".join({"user": "U", "assistant": "A"}[m["role"]] + m["content"] + "|" for m in prompt) + "A"


class TestOnPolicy:
    """The student samples answers, and the teacher judges them."""

    @pytest.mark.parametrize(
        ("data", "options", "beta"),
        [
            ("chat.jsonl", (), 0.0),
            ("chat.jsonl", ("--reverse",), 1.0),
            ("pairs.jsonl", ("--divergence", "jsd", "--beta", 0.3), 0.3),
        ],
    )
    def test_steps_are_those_of_trl(
        self, files: Path, tmp_path: Path, data: str, options: tuple[Any, ...], beta: float
    ) -> None:
        """Two steps; the samples of the second depend on the first."""
        options += ("--batch-size", 3, "--gradient_accumulation_steps", 2, "--temperature", 1.3, "--top_p", 0.9)
        argv = command(files, tmp_path / "out", "--on_policy", *PLAIN_STEP, *ANSWERS, *options, data=data)
        argv[argv.index("--max-steps") + 1] = "2"
        argv[argv.index("--learning-rate") + 1] = "0.1"
        assert cli.main(argv) == 0
        right = trl_on_policy(
            files, tmp_path / "trl", data, beta=beta, temperature=1.3, top_p=0.9, max_steps=2,
            per_device_train_batch_size=3, gradient_accumulation_steps=2,
        )  # fmt: skip
        before, after = (load_file(folder / "model.safetensors") for folder in (files / "student", tmp_path / "out"))
        for name, p in right.named_parameters():
            moved = p.detach() - before[name]
            assert float((after[name] - p.detach()).norm()) < 1e-4 * float(moved.norm()), name

    def test_held_out_labels_and_a_lora_are_as_without_it(self, files: Path, tmp_path: Path) -> None:
        from peft import PeftModel

        options = ("--lora", 2, "--learning-rate", 0.02, "--max-steps", 2, "--eval", files / "chat.jsonl")
        options += ("--assistant-only", "--per_device_eval_batch_size", 5)
        assert cli.main(command(files, tmp_path / "out", "--on_policy", *ANSWERS, *options)) == 0
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
        rows = rows_of(files, "chat.jsonl")
        with torch.no_grad():
            losses = [x for row in rows for x in token_losses(student, student, *row, 0.0)]
        log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert found[-1] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        base = AutoModelForCausalLM.from_pretrained(files / "student")
        before = {name: p.clone() for name, p in base.named_parameters()}
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).merge_and_unload()
        moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "proj" in name}

    def test_the_advice_on_a_long_prompt_runs(self, files: Path, tmp_path: Path, capsys: Any) -> None:
        argv = command(files, tmp_path / "out", "--on_policy", "--max-steps", 1)
        room = 96 - max(len(ids_of(prompt_text(prompt))) for prompt in prompts_of(files, "chat.jsonl"))
        advice = f"--max_completion_length {room}"
        assert f"its answer up to 512; the models take 96: pass {advice}" in fails(capsys, argv)
        assert advice in fails(capsys, [*argv, "--max_completion_length", str(room + 1)])
        assert not list(tmp_path.iterdir())
        assert cli.main([*argv, *advice.split()]) == 0


class TestResume:
    @pytest.mark.parametrize(
        "kind", [(), ("--lora", 2), ("--on_policy", *ANSWERS), ("--on_policy", *ANSWERS, "--batch-size", 2,
                                                               "--gradient_accumulation_steps", 2)]
    )  # fmt: skip
    def test_an_interrupted_run_goes_on(
        self, files: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, kind: Any
    ) -> None:
        """Also where the student's samples, and so all later steps, depend on the random state."""
        from fastdistill.recipes.lm_on_policy import OnPolicyTrainer
        from fastdistill.recipes.lm_trainers import LMTrainer

        trainer = OnPolicyTrainer if "--on_policy" in kind else LMTrainer
        options = ("--epochs", 2, "--batch-size", 4, "--save_steps", 2, "--learning-rate", 1e-2, *kind)
        assert cli.main(command(files, tmp_path / "whole", *options)) == 0
        step, steps = trainer.training_step, []

        def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append(self.state.global_step)
            if steps[-1] == 5 and steps.count(5) == 1:  # in the second epoch
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", interrupted)
        argv = command(files, tmp_path / "out", *options)
        assert cli.main(argv) == 130
        assert not (tmp_path / "out").exists()
        assert "--resume" in fails(capsys, argv)
        assert "temperature 1.0, not 2.0" in fails(capsys, [*argv, "--resume", "--temperature", "2"])
        assert cli.main([*argv, "--resume"]) == 0
        assert [number for number, _ in itertools.groupby(steps)] == [0, 1, 2, 3, 4, 5, 4, 5]
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
        for name, x in one.items():
            torch.testing.assert_close(x, other[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def wrong(files: Path) -> Path:
    """Writes what should be refused, beside the good files."""
    write_lines(
        files / "mixed.jsonl", [{"text": "red"}, {"text": "cat"}, {"messages": [{"role": "user", "content": "x"}]}]
    )
    write_lines(files / "number.jsonl", [{"text": "red"}, {"text": 5}])
    write_lines(
        files / "role.jsonl", [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"content": "y"}]}]
    )
    write_lines(files / "empty-chat.jsonl", [{"messages": [{"role": "user", "content": "x"}]}, {"messages": []}])
    write_lines(files / "broken.jsonl", [{"text": "red"}, '{"text": "re'])
    write_lines(files / "other.jsonl", [{"question": "red", "answer": "blue"}])
    write_lines(files / "half.jsonl", [{"prompt": "red ", "completion": [{"role": "assistant", "content": "x"}]}])
    write_lines(files / "long.jsonl", [{"prompt": "red " * 10, "completion": "blue"}])
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    write_lines(files / "answers.jsonl", [{"messages": turns[i == 1 :]} for i in range(8)])
    write_lines(files / "tools.jsonl", [{"messages": turns, "tools": [{"name": "f"}]}] * 8)
    long_chat = [{"messages": [{"role": "user", "content": "red " * n}, turns[1]]} for n in (1, 30)]
    write_lines(files / "long-chat.jsonl", [long_chat[1] if i == 1 else long_chat[0] for i in range(8)])
    save(files / "more-classes", 16, 1, 0, vocab_size=101)
    (files / "empty.jsonl").touch()
    (files / "blank.txt").write_text("\n  \n")
    (files / "rows.csv").write_text("text\nred\n")
    (files / "not.txt").write_bytes(b"\xff\xfe\x00red")
    bert = BertForMaskedLM(
        BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    bert.save_pretrained(files / "bert")
    tokenizer().save_pretrained(files / "bert")
    save(files / "no-template", 16, 1, 0)
    (files / "no-template" / "chat_template.jinja").unlink()
    save(files / "other-tokens", 16, 1, 0)
    swapped = json.loads((files / "other-tokens" / "tokenizer.json").read_text())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (files / "other-tokens" / "tokenizer.json").write_text(json.dumps(swapped))
    (files / "wide.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 16}))
    save(files / "strict", 16, 1, 0)
    (files / "strict" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    (files / "folder").mkdir()
    Dataset.from_dict({"text": ["red", "cat"]}).save_to_disk(files / "one-set")
    return files


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "options", "what"),
        [
            ("nowhere.jsonl", (), "nowhere.jsonl: no such file"),
            ("rows.csv", (), "should end with .jsonl, .json, .parquet, .txt"),
            ("empty.jsonl", (), "the file is empty"),
            ("blank.txt", (), "the file holds no text"),
            ("not.txt", (), "not text"),
            ("broken.jsonl", (), "broken.jsonl: not json"),
            ("mixed.jsonl", (), "mixed.jsonl: row 1: no messages, which other rows have"),
            ("number.jsonl", (), "number.jsonl: row 2: text is 5; it should be text"),
            ("role.jsonl", (), "role.jsonl: row 2: messages has a message without role"),
            ("empty-chat.jsonl", (), "empty-chat.jsonl: row 2: messages is empty"),
            ("half.jsonl", (), "row 1: prompt and completion should both be text"),
            ("other.jsonl", (), "rows have question, answer; they should have messages, or prompt and completion"),
            ("long.jsonl", ("--max-length", 20), "--dataset: no token counts: prompts fill all 20 tokens"),
            ("chat.jsonl", ("--max-length", 200), "--max-length is 200; the models take 96 tokens"),
            ("chat.jsonl", ("--completion-only",), "--completion-only is for rows with a prompt"),
            ("text.txt", ("--assistant-only",), "--assistant-only is for chat"),
            ("chat.jsonl", ("--teacher", "bert"), "BertForMaskedLM; it should be a causal language model"),
            ("chat.jsonl", ("--student", "bert"), "BertForMaskedLM; it should be a causal language model"),
            ("chat.jsonl", ("--teacher", "no-template"), "no chat template: pass --chat_template_path"),
            ("chat.jsonl", ("--teacher", "strict"), "row 1 does not fit the chat template (roles must alternate"),
            ("chat.jsonl", ("--chat_template_path", "folder"), "should be a file that ends with .jinja"),
            ("chat.jsonl", ("--student", "other-tokens"), "and the teacher's differ in 2 tokens: id 69 is 'b' and 'a'"),
            ("chat.jsonl", ("--student", "wide.json", "--init", "teacher"), "change num_hidden_layers alone"),
            ("chat.jsonl", ("--student", "student.json", "--lora", 4), "--lora adapts the weights of a checkpoint"),
            ("chat.jsonl", ("--init", "teacher"), "brings its own weights"),
            ("chat.jsonl", ("--lora", 2, "--lora-targets", "nothing"), "nothing"),
            ("chat.jsonl", ("--lora-alpha", 8), "--lora-alpha is 8; there is no LoRA: pass --lora RANK, or leave it"),
            ("chat.jsonl", ("--alpha", 0, "--temperature", 2), "--temperature is 2.0; alpha is 0: the labels alone"),
            ("chat.jsonl", ("--alpha", 0, "--divergence", "tvd"), "--divergence is tvd; alpha is 0: the labels alone"),
            ("chat.jsonl", ("--eval-split", "test"), "--eval-split is test; files have no splits: leave it out, and"),
            ("chat.jsonl", ("--eval-split", "train"), "--eval-split is train; files have no splits"),
            ("chat.jsonl", ("--split", "test"), "--split is test; files have no splits"),
            ("chat.jsonl", ("--dataset-config", "x"), "--dataset-config is x; files have none: leave it out"),
            (None, ("--dataset", "one-set", "--eval-split", "test"), "--eval-split is test; one-set holds one split"),
            (None, ("--cache", "folder", "--max-length", 9), "--max-length is 9; the rows of a cache are as the"),
            (None, ("--cache", "folder", "--split", "test"), "--split is test; the rows of a cache are as the"),
            (None, ("--cache", "folder", "--teacher-dtype", "float16"), "--teacher-dtype is float16; no teacher"),
            ("chat.jsonl", ("--eval", "nowhere.txt"), "nowhere.txt: no such file"),
            ("chat.jsonl", ("--eval_strategy", "epoch"), "pass --eval or --eval-split"),
            ("chat.jsonl", ("--alpha", 1.5), "--alpha is 1.5; it should be from 0 to 1"),
            ("chat.jsonl", ("--lora", 0), "--lora is 0; it should be a positive integer"),
            ("chat.jsonl", ("--vocab-size", 1000), "--vocab-size is 1000; the models have 99 classes"),
            ("chat.jsonl", ("--divergence", "tvd", "--temperature", 0), "--temperature is 0.0; it should be"),
            ("chat.jsonl", ("--output_dir", "x"), "this command sets --output_dir itself; use --output"),
            ("chat.jsonl", ("--packing_strategy", "best"), "invalid choice: 'best'"),
            (None, (), "--dataset is missing"),
            (None, ("--cache", "folder"), "manifest.json: no such file"),
            ("chat.jsonl", ("--cache", "folder"), "leave out --dataset"),
            (None, ("--cache", "folder", "--divergence", "jsd"), "a cached teacher has kl and soft_cross_entropy"),
            (None, ("--cache", "folder", "--skew", 0.1), "--skew is 0.1; a cached teacher has none"),
            (None, ("--dataset", "chat.jsonl", "folder"), "several should all be files"),
            (None, ("--dataset", "text.txt", "chat.jsonl"), "chat.jsonl: rows have no text, which the first file has"),
            ("text.txt", ("--on_policy",), "rows have text; with --on-policy they should have messages, or prompt and"),
            ("tools.jsonl", ("--on_policy",), "rows have tools; with --on-policy all rows take one chat template"),
            ("answers.jsonl", ("--on_policy",), "--dataset: row 2: there is no prompt before the answer"),
            ("long-chat.jsonl", ("--on_policy",), "row 2: the prompt has 123 tokens and its answer up to "
             "512; the models take 96: leave the row out"),
            ("chat.jsonl", ("--on_policy", *ANSWERS, "--batch-size", 13), "12 rows, and a step takes 13: use a"),
            ("chat.jsonl", ("--on_policy", "--teacher", "no-template"), "row 1: it holds messages, and the teacher's"),
            ("chat.jsonl", ("--on_policy", "--teacher", "strict"), "row 1: roles must alternate"),
            ("chat.jsonl", ("--on_policy", "--student", "more-classes"), "the student has 101 and the teacher 99"),
            ("chat.jsonl", ("--on_policy", "--divergence", "tvd"), "--divergence is tvd; with --on-policy it should"),
            ("chat.jsonl", ("--on_policy", "--alpha", 0.5), "--alpha is 0.5; --on-policy has no such option: leave it"),
            ("chat.jsonl", ("--on_policy", "--skew", 0.1), "--skew is 0.1; --on-policy has no such option"),
            ("chat.jsonl", ("--on_policy", "--t-squared"), "--t-squared is True; --on-policy has no such option"),
            ("chat.jsonl", ("--on_policy", "--packing"), "--packing is True; --on-policy has no such option"),
            ("chat.jsonl", ("--on_policy", "--vocab-size", 9), "--vocab-size is 9; --on-policy has no such option"),
            ("chat.jsonl", ("--on_policy", "--beta", 0.3), "beta is an option of 'jsd' alone"),
            ("chat.jsonl", ("--on_policy", "--max-length", 9), "--max-length is 9; with --on-policy it is for held"),
            ("chat.jsonl", ("--on_policy", "--completion-only", "no"), "with --on-policy it is for held-out rows"),
            ("chat.jsonl", ("--on_policy", "--assistant-only"), "pass --eval, or leave it out (--max_completion"),
            (None, ("--on_policy", "--cache", "folder"), "with --on-policy a live teacher reads the answers"),
            ("chat.jsonl", ("--on_policy", "--packing_strategy", "bfd"), "unrecognized arguments: --packing_strategy"),
            ("chat.jsonl", ("--on_policy", "--teacher_model_name_or_path", "x"), "use --teacher"),
            ("chat.jsonl", ("--on_policy", *ANSWERS, "--use_vllm"), "use_vllm is True; vllm is not installed"),
            ("chat.jsonl", ("--on_policy", "--max_completion_length", 0), "max_completion_length is 0; it should be"),
            (None, ("--on_policy",), "--dataset is missing: --on-policy needs it"),
            ("chat.jsonl", ("--max_completion_length", 8), "unrecognized arguments: --max_completion_length"),
        ],
    )  # fmt: skip
    def test_one_line_and_nothing_left(
        self, wrong: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, data: str | None, options: Any, what: str
    ) -> None:
        monkeypatch.chdir(wrong)
        assert what in fails(capsys, command(wrong, tmp_path / "out", *options, data=data))
        assert not list(tmp_path.iterdir())

    def test_a_missing_teacher_is_asked_for(self, files: Path, tmp_path: Path, capsys: Any) -> None:
        argv = ["lm", "--student", files / "student", "--dataset", files / "chat.jsonl", "--output", tmp_path / "out"]
        assert "--teacher is missing" in fails(capsys, [str(part) for part in argv])
        assert cli.main([str(part) for part in (*argv, "--teacher", files / "teacher", "--max-steps", 1)]) == 0
        assert "is not empty; use --overwrite" in fails(capsys, command(files, tmp_path / "out"))


# -- two processes: torchrun starts this file twice ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "on policy"])
def test_two_processes_learn_what_one_does(files: Path, tmp_path: Path, kind: str) -> None:
    from _processes import TORCHRUN, run

    options = ("--assistant-only", "--epochs", 2, "--learning-rate", 1e-2, "--eval", files / "chat.jsonl")
    options += ("--per_device_eval_batch_size", 5)  # 12 rows: some are repeated to fill the last batches
    if kind == "on policy":  # two processes would draw other samples than one
        options += ("--on_policy", *ANSWERS, "--generation_kwargs", json.dumps({"do_sample": False}))
    assert cli.main(command(files, tmp_path / "one", *options, "--batch-size", 4)) == 0
    if kind == "FSDP2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options += ("--fsdp", "full_shard", "--fsdp_config", json.dumps(config), "--gradient_checkpointing", "false")
    done = run([*TORCHRUN, __file__, *command(files, tmp_path / "two", *options, "--batch-size", 2)], tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(x, two[name], atol=1e-5, rtol=1e-4, msg=name)
    theirs = [
        json.loads((tmp_path / name / "report.json").read_text())["teacher"]["metrics"] for name in ("one", "two")
    ]
    assert theirs[1]["held-out"] == pytest.approx(theirs[0]["held-out"], rel=1e-5)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    first, second = ([entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in logs)
    assert second == pytest.approx(first, rel=1e-5)


if __name__ == "__main__":
    from _processes import shard_on_cpu

    if "--fsdp" in sys.argv:
        shard_on_cpu()
    code = cli.main(sys.argv[1:])
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads sometimes abort a process that ends in the ordinary way
