"""Every example runs as it stands; the loops also on two processes, with their steps against float64.

torchrun starts this file twice, on the CPU with gloo, and runs the loops there.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
RATE = 1.0
ALPHA = 0.5  # of the examples


def run(name: str, *arguments: str) -> dict[str, Any]:
    """Runs an example as a script; returns its globals."""
    sys.argv = [f"{name}.py", *arguments]
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


# -- one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("tiny", "torchtitan_loss")),
)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch and its packages in this process. Each trains a student, which changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = run(name)
    student = found["trainer"].model if "student" not in found else found["student"]
    begun = reloaded(found)
    student = getattr(student, "module", student)
    assert any(not torch.equal(p.cpu(), q) for p, q in zip(student.parameters(), begun.parameters(), strict=True))
    assert all(p.isfinite().all() for p in student.parameters())


def test_the_example_of_torchtitan_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process, as torchrun would start it. test_torchtitan.py has two."""
    import _torchtitan_cpu  # noqa: F401 - before torchtitan
    from torchtitan.config import ConfigManager

    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    options = ["--model.name", "tiny", "--model.flavor", "student", "--training.steps", "2"]
    config = ConfigManager().parse_args([*options, "--training.local_batch_size", "2"])
    monkeypatch.setattr(ConfigManager, "parse_args", lambda self: config)  # it would read pytest's command line
    monkeypatch.chdir(tmp_path)
    steps = []
    monkeypatch.setattr(
        "torchtitan.components.metrics.MetricsProcessor.log", lambda self, *seen, **_: steps.append(seen)
    )
    try:
        run("torchtitan_loss")
    finally:
        gc.enable()  # torchtitan collects garbage itself
    ((step, loss, *_),) = steps
    assert step == 1
    assert 0 < loss < 10


def reloaded(found: dict[str, Any]) -> Any:
    if name := found.get("SentenceTransformer"):
        return name(found["STUDENT"])
    from transformers import AutoModelForCausalLM

    names = ("AutoModelForSeq2SeqLM", "AutoModelForImageClassification")
    kind = next((found[name] for name in names if name in found), AutoModelForCausalLM)
    return kind.from_pretrained(found["STUDENT"])


# -- the pages "In your trainer" and "Objectives" ----------------------------------------------------------------


def test_the_pages_show_the_examples() -> None:
    """Each fenced block after `<!-- examples/FILE.py NAME -->` is the part of that file between `# [NAME]` and
    `# [end]`, and every example that runs is shown."""
    page = "".join((ROOT / "docs" / name).read_text() for name in ("in_your_trainer.md", "objectives.md"))
    shown = re.findall(r"<!-- examples/(\w+\.py) (\w+) -->\n```python\n(.*?)```", page, re.DOTALL)
    for file, part, block in shown:
        (code,) = re.findall(rf"# \[{part}\]\n(.*?)# \[end\]", (EXAMPLES / file).read_text(), re.DOTALL)
        assert block.strip() == code.strip(), f"{file} {part}"
    assert {file for file, *_ in shown} == {path.name for path in EXAMPLES.glob("*.py")} - {"tiny.py"}


# -- two processes -----------------------------------------------------------------------------------------------


class PlainSGD(torch.optim.SGD):
    """Takes the place of AdamW in the examples, so that the step of the weights is the gradient."""

    def __init__(self, parameters: Any, *_: Any, **__: Any) -> None:
        super().__init__(parameters, RATE)


def right_step(student: Any, teacher: Any, batch: dict[str, Tensor]) -> None:
    """Steps `student` by SGD on the mean over the labels of a whole step, from full logits in float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    z_s, z_t = (model(**inputs).logits[:, :-1][counted] for model in (student, teacher))
    log_s, log_t = z_s.log_softmax(-1), z_t.detach().log_softmax(-1)
    soft = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    hard = nn.functional.cross_entropy(z_s, batch["labels"][:, 1:][counted])
    (ALPHA * soft + (1 - ALPHA) * hard).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= RATE * p.grad
            p.grad = None


def check_steps(example: str, student: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    from tiny import language_models
    from transformers import AutoModelForCausalLM

    right, teacher = (AutoModelForCausalLM.from_pretrained(name).double() for name in language_models())
    begun = copy.deepcopy(right)
    for batch in batches:
        right_step(right, teacher, batch)
    for (name, p), q, start in zip(student.named_parameters(), right.parameters(), begun.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        error, step = (whole.double() - q).norm(), (q - start).norm()
        assert error < 1e-4 * step + 2e-7 * q.norm(), f"{example} {name}: {error / step}"
        first = whole.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, whole), f"{example} {name} differs between the processes"


def loops() -> None:
    sys.path.insert(0, str(EXAMPLES))
    os.environ["ACCELERATE_USE_CPU"] = "1"  # as `accelerate launch --cpu` does
    torch.optim.AdamW = PlainSGD  # type: ignore[misc, assignment]
    from tiny import language_models, rows
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    student_name, teacher_name = language_models()
    tokenizer = AutoTokenizer.from_pretrained(student_name)
    data, collator = rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    for name, arguments, size in (("bare_loop", ["ddp"], 8), ("bare_loop", ["fsdp2"], 8), ("accelerate_loop", [], 16)):
        student = run(name, *arguments)["student"]
        batches = [collator(data[i : i + size]) for i in range(0, len(data), size)]
        check_steps(name, getattr(student, "module", student), batches)

    import lightning

    example = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in (student_name, teacher_name))
    sampler = torch.utils.data.DistributedSampler(data, shuffle=False)  # Lightning's own would shuffle
    loader = torch.utils.data.DataLoader(data, 4, sampler=sampler, collate_fn=collator)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 2}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
    trainer.fit(example["Distiller"](student.train(), teacher), loader)
    check_steps("lightning_module", student, [collator(data[:8]), collator(data[8:16])])
    assert dist.get_world_size() == 2


def shards() -> None:
    """Two processes share the vocabulary, and FSDP2 two such pairs. A step's loss gathers 8 numbers a token, once."""
    sys.path.insert(0, str(EXAMPLES))
    torch.optim.AdamW = PlainSGD  # type: ignore[misc, assignment]
    import tiny
    from _shards import counted_collectives
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    dist.init_process_group("gloo")
    folders: list[Any] = [tiny.language_models() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    tiny.language_models = lambda: folders[0]
    sent: list[tuple[str, int]] = []
    with counted_collectives(sent):
        student = run("tensor_parallel")["student"]
    tokenizer = AutoTokenizer.from_pretrained(folders[0][0])
    data, collator = tiny.rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    own = data[dist.get_rank() // 2 :: 2]
    tokens = [(collator(own[i : i + 4])["labels"][:, 1:] != -100).sum() for i in range(0, len(own), 4)]
    assert [size for kind, size in sent if kind == "all_gather"] == [8 * x for x in tokens]
    assert student.lm_head.weight.device_mesh.shape == (2, 2)
    check_steps("tensor_parallel", student, [collator(data[i : i + 8]) for i in range(0, len(data), 8)])


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes(tmp_path: Path, processes: int) -> None:
    import _processes

    done = _processes.run([*_processes.TORCHRUN[:-1], processes, __file__, tmp_path], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    (shards if os.environ["WORLD_SIZE"] == "4" else loops)()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way
