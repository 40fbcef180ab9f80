"""Two vocabularies of one size whose ids stand for other tokens are refused wherever two tokenizers meet."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import _tiny
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from fastdistill import cli
from fastdistill.recipes.glue import get_task
from fastdistill.train import DistillationTrainer, Objective
from fastdistill.train.checks import check_tokens, tokenizer_of
from fastdistill.train.students import build_student


def named(words: list[str], lowercase: bool = False, added: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose id i is words[i], or an added token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    core.add_tokens([AddedToken(token, special=True) for token in (added or {}).values()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")


def ordered() -> list[str]:
    vocabulary = _tiny.tokenizer().get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def turned() -> list[str]:
    """Returns the words with w0 and w1 in each other's places, and w2 replaced."""
    swap = {"w0": "w1", "w1": "w0", "w2": "another"}
    return [swap.get(word, word) for word in ordered()]


MESSAGE = (
    r"differ in 3 tokens: id 4 is 'w[01]' and 'w[01]', id 5 is .*, id 6 is '(w2|another)' and '(w2|another)'; both"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns classifiers of one size: with the tokens of _tiny.tokenizer, with others, and without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, tokenizer in (("same", _tiny.tokenizer()), ("other", named(turned())), ("none", None)):
        _tiny.classifier(**get_task("SST-2").model_options()).save_pretrained(root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
    data = root / "SST-2"
    data.mkdir()
    for split in ("train", "dev"):
        rows = "\n".join(f"{text}\t{i % 2}" for i, text in enumerate(_tiny.texts(8)))
        (data / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}\n")
    (root / "corpus.txt").write_text("\n".join(_tiny.texts(20)) + "\n")
    return {path.name: path for path in root.iterdir()}


def trainer(folders: dict[str, Path], student: str, teacher: str, tokenizer: Any) -> DistillationTrainer:
    from transformers import AutoModelForSequenceClassification as Auto

    models = [Auto.from_pretrained(folders[name]) for name in (student, teacher)]
    objective = Objective(*(model.config for model in models), terms=("prediction",))
    args = TrainingArguments(str(folders["SST-2"].parent / "run"), use_cpu=True, report_to=[])
    rows = _tiny.dataset()
    return DistillationTrainer(*models, objective, args, processing_class=tokenizer, train_dataset=rows)


@pytest.mark.parametrize(
    ("student", "teacher", "given"),
    [
        ("same", "other", None),
        ("other", "same", None),
        ("other", "none", "same"),
        ("none", "other", "same"),
        ("same", "none", "other"),
        ("other", "same", "other"),
    ],
)
def test_the_trainer_compares_what_lies_beside_the_models(
    folders: dict[str, Path], student: str, teacher: str, given: str | None
) -> None:
    tokenizer = None if given is None else tokenizer_of(folders[given])
    with pytest.raises(ValueError, match=MESSAGE):
        trainer(folders, student, teacher, tokenizer).check()


def test_the_mixins_compare_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

    from fastdistill.integrations.transformers import CausalLMDistillationMixin

    class Distiller(CausalLMDistillationMixin, Trainer):
        pass

    for name, tokenizer in (("student", _tiny.tokenizer()), ("teacher", named(turned()))):
        LlamaForCausalLM(_tiny.config("llama", 1, 16)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    for given in (None, _tiny.tokenizer()):
        with pytest.raises(ValueError, match=MESSAGE):
            Distiller(student, args, train_dataset=_tiny.dataset(), processing_class=given, teacher=teacher)
    Distiller(
        student, args, train_dataset=_tiny.dataset(), teacher=AutoModelForCausalLM.from_pretrained(student.name_or_path)
    )


def test_models_of_one_vocabulary_or_without_a_tokenizer_pass(folders: dict[str, Path]) -> None:
    for student, teacher, given in (("same", "same", None), ("none", "same", "same"), ("none", "other", "other")):
        trainer(folders, student, teacher, given and tokenizer_of(folders[given])).check()


def test_build_student_compares_a_checkpoint(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    teacher = Auto.from_pretrained(folders["same"])
    for tokenizer in (None, _tiny.tokenizer()):
        with pytest.raises(ValueError, match=rf"^the tokenizer of {folders['other']} and the teacher's {MESSAGE}"):
            build_student(folders["other"], teacher, tokenizer=tokenizer)
        build_student(folders["same"], teacher, tokenizer=tokenizer)
        build_student(folders["none"], teacher, tokenizer=tokenizer)


@pytest.mark.parametrize("command", ["general", "task", "finetune", "evaluate", "train-cached"])
def test_commands_compare_tokens(
    folders: dict[str, Path], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other, corpus = folders["same"], folders["other"], folders["corpus.txt"]
    task = ["--task", "sst-2", "--data", folders["SST-2"]]
    if command == "train-cached":
        cache = [
            "cache",
            "--teacher",
            same,
            "--data",
            corpus,
            "--hidden",
            1,
            "--max-length",
            24,
            "--output",
            tmp_path / "cache",
        ]
        assert cli.main([str(part) for part in cache]) == 0
    parts = {
        "general": ["--teacher", same, "--student", other, "--corpus", corpus, "--max-length", 24],
        "task": ["--teacher", same, "--student", other, *task],
        "finetune": ["--teacher", same, "--model", other, *task],
        "evaluate": ["--model", other, "--against", same, *task],
        "train-cached": ["--cache", tmp_path / "cache", "--student", other],
    }
    more = [] if command == "evaluate" else ["--output", tmp_path / "out"]
    assert cli.main([str(part) for part in (command, *parts[command], *more)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"the tokenizer of {other} and " in line
    assert "differ in 3 tokens: id 4 is 'w1' and 'w0'" in line
    assert not (tmp_path / "out").exists()


def compare(ours: Any, theirs: Any) -> None:
    check_tokens(ours, theirs, "the tokenizer of student", "the teacher's")


def test_tokens_that_one_has_may_be_added_or_renamed() -> None:
    words = ordered()
    compare(named(words), named([*words, "<pad 1>", "<pad 2>"]))
    compare(named([*words, "[unused1]", "[unused2]"]), named(words, added={60: "<tool>", 61: "<end>"}))
    with pytest.raises(ValueError, match=r"differ in 1 tokens: id 60 is 'plain' and 'another'; both"):
        compare(named([*words, "plain"]), named([*words, "another"]))
    with pytest.raises(ValueError, match=r"differ in 2 tokens: id 60 is '<tool>' and '<end>', id 61 is .* both"):
        compare(named(words, added={60: "<tool>", 61: "<end>"}), named(words, added={60: "<end>", 61: "<tool>"}))


def test_byte_level_and_sentencepiece_may_name_one_token_differently() -> None:
    words = ordered()
    byte_level = ["Ġthe", "Ċ", "Ã©", "ĠÃ©t", "plain"]
    sentencepiece = ["▁the", "<0x0A>", "é", "▁ét", "plain"]
    compare(named([*words, *byte_level]), named([*words, *sentencepiece]))
    with pytest.raises(ValueError, match=r"differ in 1 tokens: id 60 is 'Ġthe' and '▁The'"):
        compare(named([*words, "Ġthe"]), named([*words, "▁The"]))


def test_other_rules_for_text_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    words = [*ordered(), "STOP", "stop"]
    with caplog.at_level(logging.WARNING, "fastdistill"):
        compare(named(words), named(words))
        assert not caplog.records
        compare(named(words, lowercase=True), named(words))
    (record,) = caplog.records
    assert "the tokenizer of student and the teacher's have one vocabulary and split text differently" in record.message


def test_a_checkpoint_without_a_tokenizer_has_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes one of special tokens alone."""
    assert tokenizer_of(folders["none"]) is None
    assert tokenizer_of(tmp_path / "nowhere") is None
    assert tokenizer_of("") is None
    assert tokenizer_of(folders["same"]).get_vocab() == _tiny.tokenizer().get_vocab()


def test_a_large_vocabulary_is_compared_quickly() -> None:
    words = ["[UNK]", "[PAD]", *(f"token {i}" for i in range(150_000))]
    ours, theirs = named(words), named([*words, "one more"])
    start = time.process_time()
    compare(ours, theirs)
    assert time.process_time() - start < 3  # 0.3 on an idle core
