"""Starts two real processes for the tests, and holds the functions that they run.

`two_processes("ddp", folder)` has torchrun start this file twice, on the CPU with gloo. Each process runs the function
`ddp(folder)` below and saves its results in `folder`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import _tiny
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from fastdistill.cli import main
from fastdistill.train.data import add_teacher_logits
from fastdistill.train.finetune import finetune
from fastdistill.train.objective import Objective, resolve_terms
from fastdistill.train.processes import main_first, on_main
from fastdistill.train.resumable import Terminated
from fastdistill.train.stages import GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.trainer import DistillationTrainer

INNER_TERMS = resolve_terms("tinybert")
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


# -- starting them -------------------------------------------------------------------------------------------


def two_processes(function: str, folder: Path, timeout: float = 200) -> str:
    """Runs a function of this file in two processes and returns what they printed."""
    done = run([*TORCHRUN, __file__, function, folder], folder, timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run(command: list[Any], folder: Path, timeout: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(command, folder, **environment)
    return finish(process, timeout)


def start(command: list[Any], folder: Path, **environment: str) -> subprocess.Popen[str]:
    quiet = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(folder),
    }
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Waits until a process ends. After `timeout` seconds, kills it with all its descendants and fails."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in (*descendants(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the process did not end within {timeout} s:\n{output[-6000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def descendants(pid: int) -> list[int]:
    """Returns all descendants. torchrun gives each process its own session, so no process group has them all."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


# -- models and trainers -------------------------------------------------------------------------------------

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RATE = 0.1


def models(terms: tuple[str, ...]) -> tuple[PreTrainedModel, PreTrainedModel, Objective]:
    """Returns the same student, teacher and projections at every call."""
    student, teacher = _tiny.classifier(**NO_DROPOUT), _tiny.classifier(layers=4, width=24, seed=1)
    objective = Objective(student.config, teacher.config, terms=terms)
    torch.manual_seed(5)
    for p in objective.parameters():
        nn.init.normal_(p, std=0.1)
    return student, teacher, objective


class Recording(DistillationTrainer):
    """Remembers which rows this process saw at which step, without their padding."""

    seen: list[tuple[int, list[list[int]]]]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        self.seen.append((self.state.global_step, rows))
        return super().compute_loss(model, inputs, *args, **kwargs)


def learn(folder: Path, terms: tuple[str, ...], rows: Any, resume: str | None = None, **arguments: Any) -> Recording:
    """Trains on `rows` (a dataset or a number of rows) with plain SGD, whose steps show the scale of gradients."""
    student, teacher, objective = models(terms)
    if resume:  # the checkpoint must replace these
        for p in (*student.parameters(), *objective.parameters()):
            nn.init.normal_(p)
    options = {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # the norm is logged and never clipped
        "report_to": "none",
        "use_cpu": True,
    }
    trainer = Recording(
        student,
        teacher,
        objective,
        TrainingArguments(**{**options, **arguments}),
        processing_class=_tiny.tokenizer(),
        train_dataset=_tiny.dataset(rows) if isinstance(rows, int) else rows,
    )
    trainer.seen = []
    trainer.train(resume)
    return trainer


def leave(trainer: Recording, path: Path) -> None:
    """Saves rows, logs and weights for the test to read."""
    weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"seen": trainer.seen, "logs": logs, "weights": weights}, path)


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def rank() -> int:
    return int(os.environ["RANK"])


# -- functions that the processes run ----------------------------------------------------------------------------------


def commands(folder: Path) -> None:
    """Runs `errors` before accelerate knows of the processes, then the command lines, then the functions below."""
    errors(folder)
    codes = []
    for argv in json.loads((folder / "commands.json").read_text()):
        try:
            codes.append(main(argv))
        except SystemExit as end:
            codes.append(end.code)
    (folder / f"codes{rank()}.json").write_text(json.dumps(codes))
    teacher_logits(folder)
    finetuned(folder)
    ddp(folder)
    next_tokens(folder)
    streams(folder)
    terminated(folder / "terminated")


def errors(folder: Path) -> None:
    """Saves the errors that this process raises when another one fails."""

    def fail() -> None:
        raise FileNotFoundError(f"no file for process {rank()}")

    heard = []
    for attempt in (lambda: on_main(fail), lambda: main_first(fail if rank() == 1 else list)):
        try:
            attempt()
        except OSError as error:
            heard.append([type(error).__name__, str(error)])
    (folder / f"errors{rank()}.json").write_text(json.dumps([*heard, on_main(rank), main_first(rank)]))


def teacher_logits(folder: Path) -> None:
    """Saves teacher logits of 11 rows and of 2 rows, in batches of 2, and the sizes of the batches that ran.

    The second process has none of the 2 rows.
    """
    teacher = _tiny.classifier(4, 24, seed=1)
    add_teacher_logits(_tiny.dataset(11), teacher, _tiny.tokenizer(), batch_size=2)  # tries its padding out, once
    ran: list[int] = []
    columns: list[Any] = []
    teacher.register_forward_hook(lambda model, inputs, output: ran.append(len(output.logits)))
    for rows in (11, 2):
        found = add_teacher_logits(_tiny.dataset(rows), teacher, _tiny.tokenizer(), batch_size=2)
        columns.append(found["teacher_logits"][:])
    (folder / f"logits{rank()}.json").write_text(json.dumps({"columns": columns, "ran": ran}))


def finetuned(folder: Path) -> None:
    """Fine-tunes for one step of 8 rows on each process."""
    arguments = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 1e9}
    model, tokenizer = _tiny.classifier(**NO_DROPOUT), _tiny.tokenizer()
    rows = _tiny.dataset(16)
    finetune(model, rows, tokenizer, folder / "finetuned", batch_size=8, learning_rate=1e-9, arguments=arguments)


UNEVEN = {"accelerator_config": {"even_batches": False}}  # the last batch is short, on one process only


def ddp(folder: Path) -> None:
    leave(learn(folder / "work", INNER_TERMS, 11, **UNEVEN), folder / f"inner{rank()}.pt")
    leave(learn(folder / "work", ("prediction",), 10), folder / f"prediction{rank()}.pt")


def chat(row: list[int]) -> list[int]:
    """Returns the labels of a row: its prompt, from nothing to all of it, has -100."""
    prompt = row[1] % (len(row) + 1)
    return [-100] * prompt + row[prompt:]


def language_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns the same student and teacher at every call."""
    found = []
    for layers, width in ((2, 16), (4, 24)):
        torch.manual_seed(layers)
        found.append(AutoModelForCausalLM.from_config(_tiny.config("llama", layers, width)).eval())
    return found[0], found[1]


LM_OPTIONS: dict[str, Any] = {"divergence": "kl", "alpha": 0.5, "temperature": 2.0, "t_squared": True}


def next_tokens(folder: Path) -> None:
    """Trains a language model for two steps of two micro-batches, whose numbers of labels differ."""
    student, teacher = language_models()
    rows = [{"input_ids": row, "labels": chat(row)} for row in _tiny.dataset(16)["input_ids"]]
    arguments = TrainingArguments(
        str(folder / "work"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=1, save_strategy="no", optim="sgd", learning_rate=RATE, lr_scheduler_type="constant",
        max_grad_norm=1e9, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Recording(
        student, teacher, Objective(student.config, terms=("prediction",), **LM_OPTIONS), arguments,
        processing_class=_tiny.tokenizer(), train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.seen = []
    trainer.train()
    leave(trainer, folder / f"next_tokens{rank()}.pt")


def layerdrop(folder: Path) -> None:
    """Trains a language model whose layers are skipped at random, in each process by itself."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = OPTConfig(vocab_size=60, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=4, ffn_dim=16,
                           num_attention_heads=2, layerdrop=0.5, dropout=0.0)  # fmt: skip
        models.append(OPTForCausalLM(config))
    arguments = TrainingArguments(
        str(folder / "work"), per_device_train_batch_size=2, max_steps=12, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Recording(
        *models, Objective(models[0].config, terms=("prediction",)), arguments, processing_class=_tiny.tokenizer(),
        train_dataset=_tiny.dataset(48).remove_columns("labels"),
    )  # fmt: skip
    trainer.seen = []
    before = {name: whole(p) for name, p in trainer.model.named_parameters()}
    torch.manual_seed(rank())
    trainer.train()
    leave(trainer, folder / f"layerdrop{rank()}.pt")
    torch.save(before, folder / f"before{rank()}.pt")


LINES = 20
LINE = 22  # words; with the special tokens they make a block of 24


def streams(folder: Path) -> None:
    """Reads a stream of lines twice, each line filling a block, and trains a few steps on it."""
    stage = GeneralStage(
        corpus=[folder / "lines.txt"], max_length=LINE + 2, streaming=True, arguments={"max_steps": 1, "use_cpu": True}
    )
    stream = stage.prepare(_tiny.tokenizer())
    rows = [row["input_ids"] for row in itertools.islice(stream, LINES)]
    (folder / f"stream{rank()}.json").write_text(json.dumps(rows))
    leave(learn(folder / "work", INNER_TERMS, stream, max_steps=3), folder / f"stream{rank()}.pt")


class SigtermAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(folder: Path) -> None:
    """Runs a stage to its end. Then runs it again, with a SIGTERM in one process, and resumes it."""
    folder.mkdir(exist_ok=True)
    stage = IntermediateStage(
        dataset=_tiny.dataset(48),
        epochs=2,
        batch_size=4,
        learning_rate=5e-3,
        arguments={"use_cpu": True, "disable_tqdm": True, "gradient_accumulation_steps": 2, "logging_steps": 1},
    )
    _, teacher, _ = models(INNER_TERMS)
    for name, callbacks in (("whole", ()), ("out", [SigtermAt(3)] if rank() == 1 else ())):
        try:
            stage.run(_tiny.classifier(), teacher, _tiny.tokenizer(), folder / name, callbacks=callbacks)
        except Terminated as end:
            found = {"code": end.code, "message": str(end), "files": sorted(os.listdir(folder / "out.partial"))}
            (folder / f"end{rank()}.json").write_text(json.dumps(found))
    student = stage.run(_tiny.classifier(seed=3), teacher, _tiny.tokenizer(), folder / "out", resume=True)
    torch.save(student.state_dict(), folder / f"resumed{rank()}.pt")


def shard_on_cpu() -> None:
    """Makes accelerate shard on CPUs. It refuses to, although its code and PyTorch's work there."""
    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def fsdp(folder: Path) -> None:
    shard_on_cpu()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    trainer = learn(folder, INNER_TERMS, 11, fsdp=True, fsdp_config=config, **UNEVEN)
    assert any(isinstance(p, DTensor) for p in trainer.student.parameters())
    assert all(p.requires_grad for p in trainer.model.parameters())  # frozen parameters are unfrozen again
    leave(trainer, folder / f"inner{rank()}.pt")
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": kind}
        options = {"fsdp": True, "fsdp_config": config, "save_strategy": "steps", "save_steps": 3, **UNEVEN}
        options |= {"optim": "adamw_torch", "learning_rate": 1e-2}
        leave(learn(folder / kind, INNER_TERMS, 11, **options), folder / kind / f"whole{rank()}.pt")
        resumed = learn(folder / kind, INNER_TERMS, 11, resume=str(folder / kind / "checkpoint-3"), **options)
        leave(resumed, folder / kind / f"resumed{rank()}.pt")

    student, teacher, _ = models(INNER_TERMS)
    arguments = {"fsdp": True, "fsdp_config": config, "use_cpu": True, "disable_tqdm": True}
    rows = {"dataset": _tiny.dataset(), "epochs": 1, "batch_size": 8, "arguments": arguments}
    student = IntermediateStage(**rows).run(student, teacher, _tiny.tokenizer(), folder / "intermediate")
    student = PredictionStage(**rows).run(student, teacher, _tiny.tokenizer(), folder / "student")
    assert not any(isinstance(p, DTensor) for p in student.parameters())
    torch.save(student.state_dict(), folder / f"student{rank()}.pt")


def adapted() -> PeftModel:
    """Returns the same student with adapters at every call."""
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(_tiny.classifier(**NO_DROPOUT), config)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step == self.step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def fsdp_adapter(folder: Path) -> None:
    shard_on_cpu()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    arguments = {"fsdp": True, "fsdp_config": config, "use_cpu": True, "disable_tqdm": True}
    stage = PredictionStage(dataset=_tiny.dataset(24), epochs=1, batch_size=4, learning_rate=1e-2, arguments=arguments)
    teacher, tokenizer = _tiny.classifier(layers=4, width=24, seed=1), _tiny.tokenizer()
    whole = stage.run(adapted(), teacher, tokenizer, folder / "whole")
    with suppress(KeyboardInterrupt):
        stage.run(adapted(), teacher, tokenizer, folder / "stopped", callbacks=[StopAt(1)])
    resumed = stage.run(adapted(), teacher, tokenizer, folder / "stopped", resume=True)
    torch.save((whole.state_dict(), resumed.state_dict()), folder / f"student{rank()}.pt")


def endangered() -> IntermediateStage:
    arguments = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
    return IntermediateStage(dataset=_tiny.dataset(48), epochs=1, batch_size=4, learning_rate=5e-3, arguments=arguments)


def killed(folder: Path) -> None:
    """Kills process 1 when it should add its file to the second checkpoint."""
    save = DistillationTrainer._save_rng_state

    def fatal(self: DistillationTrainer, output_dir: str) -> None:
        if rank() == 1 and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    DistillationTrainer._save_rng_state = fatal
    _, teacher, _ = models(INNER_TERMS)
    endangered().run(_tiny.classifier(), teacher, _tiny.tokenizer(), folder / "out")


def resumed(folder: Path) -> None:
    _, teacher, _ = models(INNER_TERMS)
    students = [
        endangered().run(_tiny.classifier(), teacher, _tiny.tokenizer(), folder / name, resume=True).state_dict()
        for name in ("out", "whole")
    ]
    torch.save(students, folder / f"resumed{rank()}.pt")
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    (folder / f"timeout{rank()}").write_text(str(group.options._timeout.total_seconds()))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
