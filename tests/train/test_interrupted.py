"""Tests that killed and terminated runs resume without loss, streams resume in place, and memory does not grow."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import _processes
import _tiny
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging as hf_logging

from fastdistill import cli
from fastdistill.train.data import pack_corpus, read_corpus
from fastdistill.train.outputs import last_checkpoint
from fastdistill.train.resumable import Terminated
from fastdistill.train.stages import GeneralStage, IntermediateStage

QUICK = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 3, "report_to": "none"}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def distil(output: Path, seed: int = 0, resume: bool = False, callbacks: Any = ()) -> nn.Module:
    """Trains 8 steps with dropout, ending in the middle of an epoch, with checkpoints after steps 3, 6 and 8."""
    arguments = {**QUICK, "max_steps": 8}
    stage = IntermediateStage(
        dataset=_tiny.dataset(24), epochs=1, batch_size=4, learning_rate=5e-3, arguments=arguments
    )
    student, teacher = _tiny.classifier(seed=seed), _tiny.classifier(4, 24, seed=1)
    return stage.run(student, teacher, _tiny.tokenizer(), output, resume=resume, callbacks=callbacks)


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    for name, p in expected.named_parameters():
        assert torch.equal(p, found.get_parameter(name)), name


def in_a_child(function: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    return child


# -- killed ----------------------------------------------------------------------------------------------------------


class Files:
    """Records this process's file operations below a folder and kills it before operation number `fatal`."""

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self, folder: Path, fatal: int | None = None) -> None:
        self.folder, self.fatal, self.seen = str(folder), fatal, []
        sys.addaudithook(self.watch)

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        path = str(args[0])  # rmtree names files without their folder
        if event not in self.EVENTS or not (path.startswith(self.folder) or (event == "os.remove" and "/" not in path)):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if len(self.seen) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((event, path.removeprefix(self.folder)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[tuple[str, str]], list[str]]:
    """Returns the student of an uninterrupted run, the run's file operations, and the names of its output files."""
    folder = tmp_path_factory.mktemp("whole")

    def watched() -> None:
        files = Files(folder)
        distil(folder / "out")
        seen = list(files.seen)
        (folder / "events.json").write_text(json.dumps(seen))

    child = in_a_child(watched)
    child.join(60)
    assert child.exitcode == 0
    events = [tuple(event) for event in json.loads((folder / "events.json").read_text())]
    names = sorted(path.name for path in (folder / "out").iterdir())
    return distil(folder / "again"), events, names


def killed_and_resumed(folder: Path, fatal: int, whole: Any) -> None:
    student, _, names = whole

    def doomed() -> None:
        Files(folder, fatal)
        distil(folder / "out")

    child = in_a_child(doomed)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    # If there is something to resume from, it must replace the other weights that the resumed run starts with.
    seed = 3 if (folder / "out").exists() or last_checkpoint(folder / "out.partial") else 0
    assert_equal(distil(folder / "out", seed=seed, resume=True), student)
    assert sorted(path.name for path in folder.iterdir()) == ["out"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == names


def nth(events: list[tuple[str, str]], kind: str, name: str) -> int:
    return next(i for i, (event, path) in enumerate(events) if event == kind and path.endswith(name))


def test_a_run_killed_while_it_writes_a_checkpoint_resumes(tmp_path: Path, whole: Any) -> None:
    events = whole[1]
    for name in ("checkpoint-3/trainer_state.json", "checkpoint-6/config.json", "checkpoint-6/whole"):
        killed_and_resumed(tmp_path / name.replace("/", "-"), nth(events, "open", name), whole)


def test_a_run_killed_while_it_writes_its_output_resumes(tmp_path: Path, whole: Any) -> None:
    events = whole[1]
    rename = nth(events, "os.rename", "/out.partial")
    state = nth(events, "open", "/out.partial/trainer_state.json")
    # The run is killed after training, before the output appears, and while checkpoints are removed from the output.
    for fatal in (state, rename, rename + 4):
        killed_and_resumed(tmp_path / str(fatal), fatal, whole)


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_resumes(tmp_path: Path, whole: Any) -> None:
    for fatal in range(0, len(whole[1]), 3):
        killed_and_resumed(tmp_path / str(fatal), fatal, whole)


@pytest.mark.slow
def test_a_run_killed_at_any_time_resumes(tmp_path: Path, whole: Any) -> None:
    draw, killed, done = random.Random(0), 0, False
    while not done:
        child = in_a_child(functools.partial(distil, tmp_path / "out", resume=killed > 0))
        child.join(draw.uniform(0.1, 0.8 if killed else 0.2) if killed < 20 else 60)
        done = child.exitcode is not None
        if not done:
            child.kill()
            child.join()
            killed += 1
    assert child.exitcode == 0
    assert killed > 0
    assert_equal(distil(tmp_path / "out", seed=4, resume=True), whole[0])


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    """A file of a checkpoint may be cut short, so only a checkpoint with the marker file `whole` counts."""
    for step, name in ((3, "whole"), (6, "trainer_state.json")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6" / "whole").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert last_checkpoint(tmp_path / "nowhere") is None


class Listing(TrainerCallback):
    """Records which checkpoints exist after each save."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(sorted(path.parent.name for path in Path(args.output_dir).glob("checkpoint-*/whole")))


def test_older_checkpoints_are_removed_once_the_next_is_complete(tmp_path: Path) -> None:
    listing = Listing()
    distil(tmp_path / "out", callbacks=[listing])
    assert listing.found == [["checkpoint-3"], ["checkpoint-6"], ["checkpoint-8"]]


# -- terminated ------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_step_and_saves(tmp_path: Path, whole: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="stopped by SIGTERM after step 5") as end:
        distil(tmp_path / "out", callbacks=[_processes.SigtermAt(4)])
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / "out.partial") == str(tmp_path / "out.partial" / "checkpoint-5")
    seen = StepsSeen()
    assert_equal(distil(tmp_path / "out", seed=3, resume=True, callbacks=[seen]), whole[0])
    assert seen.steps == [5, 6, 7]  # no step is repeated or skipped


class StepsSeen(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_sigterm_keeps_the_newest_checkpoint_even_if_another_is_the_best(tmp_path: Path) -> None:
    """Trainer removes all checkpoints but the best when training ends, but SIGTERM does not end training."""
    best = {**QUICK, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1}
    options = {"dataset": _tiny.dataset(), "epochs": 1, "batch_size": 4, "learning_rate": 10.0, "arguments": best}
    with pytest.raises(Terminated):
        IntermediateStage(**options).run(
            _tiny.classifier(),
            _tiny.classifier(4, 24, seed=1),
            _tiny.tokenizer(),
            tmp_path / "out",
            eval_dataset=_tiny.dataset(8),
            callbacks=[_processes.SigtermAt(6)],
        )
    found = sorted(path.name for path in (tmp_path / "out.partial").glob("checkpoint-*"))
    assert found[-1] == "checkpoint-7"


@pytest.mark.slow
def test_sigterm_to_torchrun_and_resume_on_the_command_line(tmp_path: Path) -> None:
    _tiny.classifier(4, 24, seed=1).save_pretrained(tmp_path / "teacher")
    _tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "student.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 16}))
    (tmp_path / "corpus.txt").write_text("\n".join(_tiny.texts(2000)) + "\n")
    argv = ["general", "--teacher", tmp_path / "teacher", "--student", tmp_path / "student.json", "--max-length", 24]
    argv += ["--corpus", tmp_path / "corpus.txt", "--batch-size", 4, "--epochs", 4]
    command = [*_processes.TORCHRUN, "-m", "fastdistill.cli", *argv, "--output"]

    process = _processes.start([*command, tmp_path / "out"], tmp_path)
    while not (tmp_path / "out.partial").is_dir() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(4)  # until it is in the middle of training
    process.send_signal(signal.SIGTERM)
    done = _processes.finish(process, 60)
    assert done.returncode != 0
    assert "stopped by SIGTERM after step" in done.stdout, done.stdout[-6000:]
    (checkpoint,) = (tmp_path / "out.partial").glob("checkpoint-*/whole")
    step = int(checkpoint.parent.name.split("-")[1])
    assert f"after step {step}, whose checkpoint is written" in done.stdout

    for output in ("out", "whole"):
        done = _processes.run([*command, tmp_path / output, *(["--resume"] if output == "out" else [])], tmp_path)
        assert done.returncode == 0, done.stdout[-6000:]
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert found == expected


@pytest.mark.slow
def test_a_run_resumes_after_one_of_its_two_processes_is_killed(tmp_path: Path) -> None:
    done = _processes.run([*_processes.TORCHRUN, _processes.__file__, "killed", tmp_path], tmp_path)
    assert done.returncode != 0
    checkpoints = sorted(path.name for path in (tmp_path / "out.partial").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(tmp_path / "out.partial") == str(tmp_path / "out.partial" / "checkpoint-2")
    _processes.two_processes("resumed", tmp_path)
    for rank in range(2):  # the timeout for waiting while the other process tokenises
        assert (tmp_path / f"timeout{rank}").read_text() == "7200.0"
    for rank in range(2):
        found, expected = torch.load(tmp_path / f"resumed{rank}.pt", weights_only=True)
        for name, weights in expected.items():
            assert torch.equal(found[name], weights), name


def test_ctrl_c_suggests_resume_if_there_is_one(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    def interrupted(arguments: Any) -> None:
        raise KeyboardInterrupt

    general = ["general", "--teacher", "t", "--student", "s", "--corpus", "c", "--output", str(tmp_path / "out")]
    evaluate = ["evaluate", "--model", "m", "--task", "SST-2"]
    for function, argv in (("distil.distil_general", general), ("evaluate.evaluate_task", evaluate)):
        monkeypatch.setattr(f"fastdistill.recipes.{function}", interrupted)
        assert cli.main(argv) == 130
        assert ("--resume" in capsys.readouterr().err) is (argv is general)


# -- streams ---------------------------------------------------------------------------------------------------------


def streamed(corpus: Any, **options: Any) -> GeneralStage:
    arguments = {**QUICK, "max_steps": 8, **options}
    return GeneralStage(
        corpus=corpus, max_length=16, batch_size=4, learning_rate=5e-3, streaming=True, arguments=arguments
    )


def write_corpus(folder: Path, rows: int) -> Path:
    (folder / "corpus.txt").write_text("\n".join(_tiny.texts(rows)) + "\n")
    return folder / "corpus.txt"


def test_a_repeated_stream_resumes_where_it_stopped(tmp_path: Path) -> None:
    """The corpus has fewer blocks than 8 steps take, so the run resumes in the middle of a later pass."""
    corpus, teacher = write_corpus(tmp_path, 24), _tiny.classifier(4, 24, seed=1)
    blocks = len(pack_corpus([corpus], _tiny.tokenizer(), 16))
    assert 8 < blocks < 20
    student = streamed([corpus]).run(_tiny.classifier(), teacher, _tiny.tokenizer(), tmp_path / "whole")
    with pytest.raises(Terminated):
        streamed([corpus]).run(
            _tiny.classifier(), teacher, _tiny.tokenizer(), tmp_path / "out", callbacks=[_processes.SigtermAt(6)]
        )
    again = streamed([corpus]).run(_tiny.classifier(seed=3), teacher, _tiny.tokenizer(), tmp_path / "out", resume=True)
    assert_equal(again, student)


def test_a_stream_is_packed_into_the_same_blocks_as_a_loaded_corpus(tmp_path: Path) -> None:
    corpus, tokenizer = write_corpus(tmp_path, 60), _tiny.tokenizer()
    expected = pack_corpus([corpus], tokenizer, 16)["input_ids"]
    for source in (
        read_corpus([corpus], streaming=True),
        read_corpus(Dataset.from_dict({"text": _tiny.texts(60)}), True),
    ):
        rows = list(pack_corpus(source, tokenizer, 16))
        assert [row["input_ids"] for row in rows] == expected
        assert [row["length"] for row in rows] == [len(block) for block in expected]
    one_pass = [row["input_ids"] for row, _ in zip(streamed([corpus]).prepare(tokenizer), expected, strict=False)]
    assert one_pass != expected
    assert sorted(one_pass) == sorted(expected)


def test_bad_streams_are_refused(tmp_path: Path, capsys: Any) -> None:
    corpus, tokenizer = write_corpus(tmp_path, 4), _tiny.tokenizer()
    for source in ([corpus], read_corpus([corpus], streaming=True)):
        with pytest.raises(ValueError, match="max_steps is -1; a streamed corpus has no length"):
            GeneralStage(corpus=source, streaming=source == [corpus])
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="corpus holds no text"):
        streamed([tmp_path / "empty.txt"]).prepare(tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        streamed([tmp_path / "nowhere.txt"]).prepare(tokenizer)
    argv = ["general", "--teacher", "t", "--student", "s", "--corpus", str(corpus), "--output", str(tmp_path / "out")]
    assert cli.main([*argv, "--streaming"]) == 2
    assert "--streaming needs --max-steps" in capsys.readouterr().err


# -- long runs -------------------------------------------------------------------------------------------------------


class Memory(TrainerCallback):
    """Records the resident memory of this process after the given steps, in MiB."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.found = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the test reads /proc")
@pytest.mark.parametrize("logging_steps", [10, 10_000])
def test_memory_does_not_grow(tmp_path: Path, logging_steps: int) -> None:
    """Neither a long log nor the sums over many steps between two logs make it grow."""

    def measured() -> None:
        memory = Memory(200, 1100, 2000)
        arguments = {**QUICK, "save_strategy": "no", "max_steps": 2000, "logging_steps": logging_steps}
        long = IntermediateStage(dataset=_tiny.dataset(64), epochs=1, batch_size=4, arguments=arguments)
        teacher = _tiny.classifier(4, 24, seed=1)
        long.run(_tiny.classifier(), teacher, _tiny.tokenizer(), tmp_path / "out", callbacks=[memory])
        (tmp_path / "memory.json").write_text(json.dumps(memory.found))

    child = in_a_child(measured)
    child.join(280)
    child.kill()
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found[-1] - found[0] < 4, found
