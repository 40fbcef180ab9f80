"""Damages each input file of each command: exit code 2, one line with the file's name, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

import datasets
import numpy as np
import pyarrow as pa
import torch
from _tiny import config
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastdistill import cli
from fastdistill.recipes.glue import get_task
from fastdistill.train.resumable import ResumableTrainer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [a + b for a in "bcdfghjklmn" for b in "aeiou"]  # 55 words of letters, which augment replaces
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STUDENT = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}
CHECKPOINT = "checkpoint-2"


class Case(NamedTuple):
    """A command line, with paths relative to the folder of the files, and the input files to damage."""

    name: str
    argv: str
    targets: str  # each of them must be whole
    beside: str = ""  # files that the command can do without, or that are right in part
    output: str = "out"


MODEL = "{0}/config.json {0}/model.safetensors {0}/tokenizer.json"
AUX = "{0}/tokenizer_config.json"
SHORT = "--max-steps 1 --batch-size 8"
TASK = "--teacher teacher --student student.json --task sst-2 --data SST-2 --max-steps 1"
GENERAL = f"general --teacher teacher --student student.json --corpus corpus.txt --max-length 24 {SHORT}"
AUGMENT = "augment --task sst-2 --data SST-2 --teacher masked --glove glove.txt --copies 1 --output out.tsv"
CACHE = "cache --teacher causal --top-k 4 --hidden 0 --data"
LM = f"lm --teacher causal --student small {SHORT}"
CASES = (
    Case("general", f"{GENERAL} --output out", MODEL.format("teacher") + " student.json",
         AUX.format("teacher") + " corpus.txt"),
    Case("general-config", f"{GENERAL} --output out --config options.yaml", "", "options.yaml"),
    Case("general-streaming", f"{GENERAL} --output out --streaming", "", "corpus.txt"),
    Case("general-stage", f"{GENERAL} --output out".replace("student.json", "stage"),
         "stage/config.json stage/model.safetensors stage/projections.safetensors"),
    Case("general-published", f"{GENERAL} --output out".replace("teacher teacher", "teacher published"),
         "published/config.json published/pytorch_model.bin", "published/vocab.txt"),
    Case("general-resume", f"{GENERAL} --output run --resume".replace("steps 1", "steps 4"),
         " ".join(f"run.partial/{CHECKPOINT}/{name}" for name in (
             "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "model.safetensors",
             "projections.safetensors", "objective.json")), output="run"),
    Case("task", f"task {TASK} --output out", MODEL.format("teacher"), "SST-2/train.tsv SST-2/dev.tsv"),
    Case("task-augmented", f"task {TASK} --output out --augmented augmented.arrow", "augmented.arrow"),
    Case("task-finished", f"task {TASK} --output done --resume", "done/results.json", output="done"),
    Case("finetune", "finetune --model teacher --task sst-2 --data SST-2 --max-steps 1 --output out",
         MODEL.format("teacher"), "SST-2/train.tsv"),
    Case("finetune-pickle", "finetune --model pickled --task sst-2 --data SST-2 --max-steps 1 --output out",
         "pickled/pytorch_model.bin"),
    Case("finetune-tagging", "finetune --model tagger --task tagging --data tagging --max-steps 1 --output out", "",
         "tagging/train.txt tagging/dev.txt"),
    Case("finetune-squad", "finetune --model spans --task squad --data squad --max-steps 1 --output out",
         "squad/train-v1.1.json squad/dev-v1.1.json"),
    Case("finetune-resume", "finetune --model teacher --task sst-2 --data SST-2 --max-steps 4 --output tuned --resume",
         " ".join(f"tuned.partial/runs/rate3e-05-batch32-seed42.partial/{CHECKPOINT}/{name}" for name in (
             "trainer_state.json", "optimizer.pt", "model.safetensors")), output="tuned"),
    Case("evaluate", "evaluate --model teacher --task sst-2 --data SST-2 --json out", MODEL.format("teacher"),
         "SST-2/dev.tsv"),
    Case("augment", AUGMENT, MODEL.format("masked"), "glove.txt SST-2/train.tsv", "out.tsv"),
    Case("cache", f"{CACHE} corpus.txt --output out", MODEL.format("causal"), "corpus.txt"),
    Case("cache-jsonl", f"{CACHE} rows.jsonl --output out", "", "rows.jsonl"),
    Case("cache-parquet", f"{CACHE} rows.parquet --output out", "rows.parquet"),
    Case("cache-resume", f"{CACHE} corpus.txt --output cached --resume",
         "cached.partial/manifest.json cached.partial/00000.json", output="cached"),
    Case("train-cached", f"train-cached --cache cache --student student.json {SHORT} --output out",
         "cache/manifest.json cache/00000.arrow cache/config.json cache/tokenizer.json"),
    Case("lm", f"{LM} --dataset rows.jsonl --output out",
         MODEL.format("causal") + " small/config.json small/model.safetensors small/tokenizer.json", "rows.jsonl"),
    Case("lm-parquet", f"{LM} --dataset rows.parquet --output out", "rows.parquet"),
    Case("lm-folder", f"{LM} --dataset ./rows-folder --output out",
         "rows-folder/state.json rows-folder/dataset_info.json rows-folder/data-00000-of-00001.arrow"),
    Case("lm-template", f"{LM} --dataset rows.jsonl --chat_template_path chat.jinja --output out", "", "chat.jinja"),
    Case("lm-cached", f"lm --cache rows-cache --student small {SHORT} --output out",
         "rows-cache/manifest.json rows-cache/00000.arrow rows-cache/config.json rows-cache/tokenizer.json"),
    Case("lm-resume", f"{LM} --dataset rows.jsonl --output chat --resume".replace("steps 1", "steps 4"),
         f"chat.partial/distillation.json chat.partial/{CHECKPOINT}/trainer_state.json "
         f"chat.partial/{CHECKPOINT}/optimizer.pt chat.partial/{CHECKPOINT}/model.safetensors", output="chat"),
)  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", **names)


def save(folder: Path, kind: type[PreTrainedModel], family: str = "bert", width: int = 16, **options: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "num_attention_heads": 2, "max_position_embeddings": 128}
    kind(config(family, 2, width, **{**sizes, **options})).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def run(argv: str) -> int:
    try:
        return cli.main(argv.split())
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def write_data(root: Path) -> None:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(3, 12)))

    for folder in ("SST-2", "tagging", "squad", "published"):
        Path(folder).mkdir()
    for split, rows in (("train", 24), ("dev", 12)):
        lines = [f"{text()}\t{i % 2}" for i in range(rows)]
        Path(f"SST-2/{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        lines = [f"{word} {draw.choice(['O', 'B-X'])}" for _ in range(rows) for word in (*text().split(), "")]
        Path(f"tagging/{split}.txt").write_text("\n".join(line if line[0] != " " else "" for line in lines) + "\n")
        entries = []
        for i in range(rows):
            context = text()
            answers = [{"text": context.split()[1], "answer_start": len(context.split()[0]) + 1}]
            entries.append({"context": context, "qas": [{"id": f"q{i}", "question": text(), "answers": answers}]})
        Path(f"squad/{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": entries}]}))
    Path("corpus.txt").write_text("\n".join(text() for _ in range(60)) + "\n")
    Path("student.json").write_text(json.dumps(STUDENT))
    Path("options.yaml").write_text("learning_rate: 0.001\nwarmup: 0.5\n")
    vectors = (" ".join(f"{draw.uniform(-1, 1):.3f}" for _ in range(4)) for _ in WORDS)
    Path("glove.txt").write_text("".join(f"{word} {vector}\n" for word, vector in zip(WORDS, vectors, strict=True)))
    rows = [{"prompt": text() + " ", "completion": text()} for _ in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet("rows.parquet")
    Dataset.from_list(rows).save_to_disk("rows-folder")
    Path("chat.jinja").write_text("{% for message in messages %}{{ message.content }} {% endfor %}")


def write_models(root: Path) -> None:
    labels = get_task("SST-2").model_options()
    save(root / "teacher", BertForSequenceClassification, **labels)
    save(root / "masked", BertForMaskedLM)
    save(root / "causal", LlamaForCausalLM, "llama")
    save(root / "small", LlamaForCausalLM, "llama", 8)
    save(root / "tagger", BertForTokenClassification, id2label={0: "B-X", 1: "O"}, label2id={"B-X": 0, "O": 1})
    save(root / "spans", BertForQuestionAnswering, max_position_embeddings=384)
    shutil.copytree("teacher", "pickled")
    torch.save(load_file("pickled/model.safetensors"), "pickled/pytorch_model.bin")
    Path("pickled/model.safetensors").unlink()
    torch.save(AutoModel.from_config(BertConfig(**SIZES)).state_dict(), "published/pytorch_model.bin")
    state = torch.load("published/pytorch_model.bin")
    torch.save({f"bert.{name}": x for name, x in state.items()}, "published/pytorch_model.bin")
    Path("published/config.json").write_text(json.dumps({**SIZES, "max_position_embeddings": 512}))
    Path("published/vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")


def write_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes caches, augmented rows, a student of the general stage, and runs that were interrupted at step 3."""
    assert run(f"{GENERAL} --output stage") == 0
    assert run(f"task {TASK} --output done") == 0
    assert run(AUGMENT.replace("out.tsv", "augmented.arrow")) == 0
    assert run(f"{CACHE} corpus.txt --output cache") == 0
    assert run(f"{CACHE} rows.jsonl --output rows-cache") == 0
    shutil.copytree("cache", "cached.partial")
    manifest = json.loads(Path("cache/manifest.json").read_text())
    (shard,) = manifest.pop("shards")
    Path("cached.partial/manifest.json").write_text(json.dumps(manifest))
    Path("cached.partial/00000.json").write_text(json.dumps(shard))
    step = ResumableTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "training_step", interrupted)
    for case in CASES:
        if case.name in ("general-resume", "finetune-resume", "lm-resume"):
            assert run(case.argv.replace("--resume", "--save_steps 2 --save_strategy steps")) == 130
            assert all(Path(target).is_file() for target in case.targets.split()), case.name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        write_data(root)
        write_models(root)
        with monkeypatch.context() as patched:
            write_runs(patched)
        yield root


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def replace(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(len(data))


def empty(data: bytes, draw: random.Random) -> bytes:
    return b""


DAMAGES = {"truncated": truncate, "flipped": flip, "replaced": replace, "emptied": empty}
FUZZ = [
    pytest.param(case, target, damage, id=f"{case.name}-{target.replace('/', '.')}-{damage}")
    for case in CASES
    for target in (case.targets + " " + case.beside).split()
    for damage in DAMAGES
]


def snapshot(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def check(root: Path, case: Case, target: str, must_fail: bool, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command in `root`, and checks its exit code, its message and what it leaves. Returns the message."""
    before = snapshot(root)
    capsys.readouterr()
    code = run(case.argv)
    error = capsys.readouterr().err
    assert code in ((2,) if must_fail else (0, 2)), error
    if code == 0:
        assert Path(case.output).exists()
        assert not Path(f"{case.output}.partial").exists()
        return ""
    (line,) = [line for line in error.splitlines() if "error:" in line]
    assert "Traceback" not in error
    assert snapshot(root).keys() <= before.keys(), sorted(snapshot(root).keys() - before.keys())
    assert all(snapshot(root)[path] == data for path, data in before.items() if "partial" not in str(path))
    return line


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target", "damage"), FUZZ)
def test_fuzz(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    case: Case, target: str, damage: str,
) -> None:  # fmt: skip
    root = tmp_path / "files"
    shutil.copytree(files, root)
    monkeypatch.chdir(root)
    path = root / target
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(f"{case.name} {target} {damage}")))
    must_fail = damage != "flipped" and target in case.targets.split()
    line = check(root, case, target, must_fail, capsys)
    assert not line or target in line or (damage == "flipped" and target.split("/")[0] in line), line


@pytest.fixture
def root(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of the files, which is the current folder."""
    shutil.copytree(files, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("executed").touch, ()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("finetune-pickle", "pickled/pytorch_model.bin"),
        ("general-published", "published/pytorch_model.bin"),
        ("general-resume", f"run.partial/{CHECKPOINT}/optimizer.pt"),
        ("general-resume", f"run.partial/{CHECKPOINT}/rng_state.pth"),
    ],
)
def test_code_in_a_pickle_never_runs(root: Path, capsys: pytest.CaptureFixture[str], name: str, target: str) -> None:
    for save_as in (torch.save, lambda x, path: Path(path).write_bytes(pickle.dumps(x))):
        save_as({"weight": Code()}, target)
        assert target in check(root, case_of(name), target, True, capsys)
        assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "not a JSON object"),
        ('{"model_type": "bert", ', "not JSON"),
        ('{"model_type": "brt"}', "brt"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "gelo"}, "gelo"),
        ({"vocab_size": -1}, "-1"),
    ],
)
def test_a_wrong_config(root: Path, capsys: pytest.CaptureFixture[str], text: Any, says: str) -> None:
    path = root / "teacher" / "config.json"
    path.write_text(text if isinstance(text, str) else json.dumps({**json.loads(path.read_text()), **text}))
    line = check(root, case_of("evaluate"), "teacher/config.json", True, capsys)
    assert "teacher/config.json" in line
    assert says in line


@pytest.mark.parametrize("target", ["teacher/config.json", "teacher/model.safetensors", "teacher/tokenizer.json",
                                    "student.json", "corpus.txt"])  # fmt: skip
def test_a_folder_or_a_loop_of_links_instead_of_a_file(
    root: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    for damage in (lambda path: path.mkdir(), lambda path: path.symlink_to(path.name)):
        path = root / target
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        damage(path)
        line = check(root, case_of("general"), target, True, capsys)
        assert target.split("/")[0] in line


def test_weights_that_are_not_finite(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (float("nan"), float("inf")):
        weights = load_file("teacher/model.safetensors")
        weights["bert.encoder.layer.1.output.dense.weight"][2, 3] = number
        save_file(weights, "teacher/model.safetensors", {"format": "pt"})
        line = check(root, case_of("general"), "teacher/model.safetensors", True, capsys)
        assert "teacher: encoder.layer.1.output.dense.weight holds NaN, infinity or huge numbers" in line


@pytest.mark.parametrize(
    ("name", "target"), [("train-cached", "cache/00000.arrow"), ("task-augmented", "augmented.arrow")]
)
def test_offsets_outside_an_arrow_file(root: Path, capsys: pytest.CaptureFixture[str], name: str, target: str) -> None:
    """Arrow would read memory that is not the file's."""
    column = Dataset.from_file(target).data.column(0).chunk(0)
    offsets = column.offsets.to_numpy() if pa.types.is_list(column.type) else None
    if offsets is None:
        offsets = np.frombuffer(column.buffers()[1], np.int32)[: len(column) + 1]
    data = Path(target).read_bytes()
    place = data.index(offsets.tobytes()) + 8
    Path(target).write_bytes(data[:place] + (2**30).to_bytes(4, "little") + data[place + 4 :])
    assert target in check(root, case_of(name), target, True, capsys)


def test_token_ids_without_an_embedding(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"ba": 5,', '"ba": 95,'))
    line = check(root, case_of("evaluate"), "teacher/tokenizer.json", True, capsys)
    assert "teacher: the tokenizer has token ids up to 95, the model 60 of them" in line


def limit_files(size: int) -> None:
    """Limits the size of files, which stops writes as a full disk does: the system raises EFBIG in place of ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    yield
    limit_files(before)


QUICK = (("general", 3000), ("augment", 600), ("cache", 3000))
FULL = [
    pytest.param(name, limit, marks=() if (name, limit) in QUICK else pytest.mark.slow)
    for name in ("general", "task", "finetune", "evaluate", "augment", "cache", "train-cached", "lm")
    for limit in (100, 600, 3000, 12_000)
]


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize(("name", "limit"), FULL)
def test_a_full_disk(root: Path, capsys: pytest.CaptureFixture[str], name: str, limit: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit_files(limit)
    line = check(root, case_of(name), "", False, capsys)
    limit_files(before)
    assert not line or line.count("cannot be written") + line.count("there is no room in") == 1
    assert line or name in ("evaluate", "augment")  # whose outputs are small
    assert run(case_of(name).argv + (" --overwrite" if not line else "")) == 0


@pytest.mark.usefixtures("unlimited")
def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, step = resource.getrlimit(resource.RLIMIT_FSIZE)[0], ResumableTrainer.training_step

    def fills_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            limit_files(3000)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "training_step", fills_up)
    argv = GENERAL.replace("steps 1", "steps 4") + " --output out --save_steps 1 --save_strategy steps"
    capsys.readouterr()
    assert run(argv) == 2
    limit_files(before)
    assert "out.partial/checkpoint-3: cannot be written" in capsys.readouterr().err
    assert [path.name for path in Path("out.partial").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(ResumableTrainer, "training_step", step)
    assert run(f"{argv} --resume") == 0
