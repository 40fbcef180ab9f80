"""Encoder-decoders are refused before any work, and the way out, examples/seq2seq.py, learns what it should."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForTokenClassification,
    TrainingArguments,
)

from fastdistill import cli
from fastdistill.integrations import causal_lm_loss
from fastdistill.train import DistillationTrainer, Objective
from fastdistill.train.cache import write_cache
from fastdistill.train.capture import capture
from fastdistill.train.data import add_teacher_logits
from fastdistill.train.stages import IntermediateStage, PredictionStage
from fastdistill.train.students import build_student

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def model(kind: type, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config: Any
    if kind.__name__.startswith("T5"):
        config = T5Config(d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16, vocab_size=60, dropout_rate=0.0)
    else:
        config = BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=60, pad_token_id=0, bos_token_id=2, eos_token_id=3,
            decoder_start_token_id=2, forced_eos_token_id=None, **options,
        )  # fmt: skip
    return kind(config).eval()


def train(student: PreTrainedModel, teacher: PreTrainedModel, folder: Path, **options: Any) -> DistillationTrainer:
    arguments = TrainingArguments(str(folder / "run"), use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True)
    objective = Objective(student.config, teacher.config, **options)
    return DistillationTrainer(
        student, teacher, objective, arguments, processing_class=_tiny.tokenizer(), train_dataset=_tiny.dataset()
    )


def run_stage(student: PreTrainedModel, teacher: PreTrainedModel, folder: Path) -> Any:
    stage = PredictionStage(dataset=_tiny.dataset(), arguments={"use_cpu": True})
    return stage.run(student, teacher, _tiny.tokenizer(), folder / "out")


def build_from_checkpoint(encoder_decoder: PreTrainedModel, folder: Path) -> Any:
    encoder_decoder.save_pretrained(folder / "student")
    return build_student(folder / "student", _tiny.model())


# (what is called, the name that the message begins with)
CALLS: dict[str, tuple[Callable[[PreTrainedModel, Path], Any], str]] = {
    "trainer, student": (lambda m, f: train(m, _tiny.classifier(), f, terms=("prediction",)), "model"),
    "trainer, teacher": (lambda m, f: train(_tiny.classifier(), m, f, terms=("prediction",)), "teacher"),
    "stage, student": (lambda m, f: run_stage(m, _tiny.classifier(), f), "student"),
    "stage, teacher": (lambda m, f: run_stage(_tiny.classifier(), m, f), "teacher"),
    "capture": (lambda m, f: capture(m, _tiny.batch(), hidden=[1]), "model"),
    "write_cache": (
        lambda m, f: write_cache(_tiny.dataset(), m, _tiny.tokenizer(), f / "out", hidden=[1]),
        "teacher",
    ),
    "add_teacher_logits": (lambda m, f: add_teacher_logits(_tiny.dataset(), m, _tiny.tokenizer()), "teacher"),
    "build_student": (lambda m, f: build_student("tinybert-4l-312", m, init="random"), "teacher"),
    "build_student, checkpoint": (build_from_checkpoint, r".*student"),
    "causal_lm_loss, student": (lambda m, f: causal_lm_loss(m, _tiny.model("llama"), _tiny.batch()), "student"),
    "causal_lm_loss, teacher": (lambda m, f: causal_lm_loss(_tiny.model("llama"), m, _tiny.batch()), "teacher"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "kind", [BartForConditionalGeneration, BartForSequenceClassification, T5ForConditionalGeneration]
)
def test_an_encoder_decoder_is_refused(kind: type, call: str, tmp_path: Path) -> None:
    run, name = CALLS[call]
    found = BartModel if call == "build_student, checkpoint" and kind is not T5ForConditionalGeneration else kind
    found_name = "T5Model" if call == "build_student, checkpoint" and found is kind else found.__name__
    expected = rf"^{name} is a {found_name}, an encoder-decoder; .*examples/seq2seq.py"
    with pytest.raises(ValueError, match=expected):
        run(model(kind), tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_wrappers_are_seen_through(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    with pytest.raises(ValueError, match=r"^model is a BartForConditionalGeneration, an encoder-decoder"):
        capture(peft.get_peft_model(model(BartForConditionalGeneration), config), _tiny.batch(), hidden=[1])


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("command", ["general", "task", "cache", "lm", "augment", "finetune", "evaluate"])
def test_commands_refuse_it_in_one_line(
    command: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {"bart": BartForConditionalGeneration, "t5": T5ForConditionalGeneration}[family]
    folder, data, output = tmp_path / "model", tmp_path / "SST-2", tmp_path / "out"
    model(kind).save_pretrained(folder)
    _tiny.tokenizer().save_pretrained(folder)
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("sentence\tlabel\nw1 w2\t0\nw3 w4\t1\n")
    (tmp_path / "corpus.txt").write_text("w1 w2\n")
    (tmp_path / "student.json").write_text(json.dumps({"num_hidden_layers": 1}))
    (tmp_path / "glove.txt").write_text("w1 0.5 0.5\n")
    parts = {
        "general": ["--teacher", folder, "--student", tmp_path / "student.json", "--corpus", tmp_path / "corpus.txt"],
        "task": ["--teacher", folder, "--student", tmp_path / "student.json", "--task", "sst-2", "--data", data],
        "cache": ["--teacher", folder, "--data", tmp_path / "corpus.txt", "--top-k", 2],
        "lm": ["--teacher", folder, "--student", folder, "--dataset", tmp_path / "corpus.txt"],
        "augment": ["--teacher", folder, "--task", "sst-2", "--data", data, "--glove", tmp_path / "glove.txt"],
        "finetune": ["--model", folder, "--task", "sst-2", "--data", data],
        "evaluate": ["--model", folder, "--task", "sst-2", "--data", data],
    }
    if command == "lm":
        pytest.importorskip("trl")
    more = [] if command == "evaluate" else ["--output", output.with_suffix(".tsv") if command == "augment" else output]
    assert cli.main([str(part) for part in (command, *parts[command], *more)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "an encoder-decoder; it should be" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", [T5EncoderModel, T5ForTokenClassification])
def test_an_encoder_of_such_a_family_trains(kind: type, tmp_path: Path) -> None:
    student, teacher = model(kind), model(kind)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.5)
    rows = _tiny.dataset().remove_columns("labels")
    stage = IntermediateStage(
        dataset=rows, terms=("hidden",), layer_map=[0, 1, 2], epochs=1, arguments={"use_cpu": True, "max_steps": 1}
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    stage.run(student, teacher, _tiny.tokenizer(), tmp_path / "out")
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_a_decoder_of_such_a_family_is_a_causal_language_model() -> None:
    student, teacher = model(BartForCausalLM), model(BartForCausalLM, init_std=0.5)
    assert causal_lm_loss(student, teacher, _tiny.batch()).isfinite()


# -- the way out ---------------------------------------------------------------------------------------------


def right_step(student: Any, teacher: Any, rows: list[dict[str, list[int]]]) -> None:
    """Steps `student` by SGD on the mean over all labels, each row alone, so that nothing is padded."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        labels = torch.tensor(row["labels"])  # (L)
        start = torch.tensor([[student.config.decoder_start_token_id, *row["labels"][:-1]]])
        inputs: dict[str, Tensor] = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": start}
        z_s, z_t = student(**inputs).logits[0], teacher(**inputs).logits[0].detach()  # (L, V)
        p, log_p, log_q = (z_t / 2).softmax(-1), (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)
        hard = -z_s.log_softmax(-1)[torch.arange(len(labels)), labels]
        total = total + (0.5 * 4 * (p * (log_p - log_q)).sum(-1) + 0.5 * hard).sum()
        count += len(labels)
    (total / count).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad


def check_step(family: str, count: int) -> None:
    """Compares one step of the example's trainer on `count` rows, a whole step, with float64."""
    example = runpy.run_path(str(EXAMPLES / "seq2seq.py"), run_name="__main__")
    off = {"dropout_rate": 0.0} if family == "t5" else {"dropout": 0.0}
    student = AutoModelForSeq2SeqLM.from_pretrained(example["STUDENT"], **off)
    right = AutoModelForSeq2SeqLM.from_pretrained(example["STUDENT"], dtype=torch.float64).eval()
    begun = {name: p.detach().clone() for name, p in right.named_parameters()}
    teacher = AutoModelForSeq2SeqLM.from_pretrained(example["TEACHER"], dtype=torch.float64).eval()
    rows, args = example["rows"][:count], example["args"]
    assert len({len(row["labels"]) for row in rows}) > 2
    args.max_steps, args.max_grad_norm = 1, 0.0
    sgd = torch.optim.SGD(student.parameters(), 1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = example["Distiller"](
        student, args, train_dataset=rows, data_collator=example["collator"], optimizers=(sgd, constant)
    )
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    right_step(right, teacher, rows)
    steps = {name: (q - begun[name]).norm() for name, q in right.named_parameters()}
    least = 1e-7 * max(steps.values())  # a bias of the keys has a gradient of 0
    for (name, p), q in zip(student.named_parameters(), right.parameters(), strict=True):
        error = (p.double() - q).norm()
        assert error < 1e-4 * steps[name] + 2e-7 * q.norm() + least, f"{name}: {error / steps[name]}"


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_step_of_the_example_is_right(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches whose labels and inputs have other lengths, padded by the example's collator."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["seq2seq.py", family])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_step(family, 8)


def test_a_step_of_two_processes_is_right(tmp_path: Path) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.path.insert(0, str(EXAMPLES))
    os.environ["ACCELERATE_USE_CPU"] = "1"
    sys.argv = ["seq2seq.py", "t5"]
    check_step("t5", 16)
    assert dist.get_world_size() == 2
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way
