"""Tests checkpoints in the layout of TinyBERT's authors against the BERT whose weights they hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from _oracle import error
from _tiny import SPECIAL, VOCABULARY, batch, classifier, dataset, model, texts
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from fastdistill import cli
from fastdistill.train.objective import Objective, read_projections
from fastdistill.train.published import (
    is_published,
    load_published,
    load_published_projections,
    load_published_tokenizer,
)
from fastdistill.train.stages import IntermediateStage
from fastdistill.train.students import build_student

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
EXTRA = {"pre_trained": "", "training": "", "cell": {}, "structure": [], "emb_size": 16, "hidden_act": "gelu"}
WORDS = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL) - 1)), "[MASK]"]


def bert(seed: int = 1, **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "initializer_range": 0.3, **options})).eval()


def projections(count: int = 0) -> dict[str, Tensor]:
    """Returns `fit_dense`, or `count` of `fit_denses`, to a teacher 24 wide."""
    names = [f"fit_denses.{i}" for i in range(count)] or ["fit_dense"]
    return {name: x for prefix in names for name, x in linear(prefix, 24).items()}


def linear(name: str, rows: int) -> dict[str, Tensor]:
    return {f"{name}.{part}": x for part, x in nn.Linear(16, rows).state_dict().items()}


def body(source: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in source.state_dict().items() if name.startswith("bert.")}


def write(folder: Path, weights: Any, legacy: bool = True, **config: Any) -> Path:
    """Writes a checkpoint. `legacy` selects the file format of torch before 1.6, when TinyBERT was published."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **EXTRA, **config}))
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    names = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == names.keys()
    for name, x in found.named_parameters():
        assert torch.equal(x, names[name]), name


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_a_general_student_of_every_kind(tmp_path: Path, legacy: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    source = BertForMaskedLM(BertConfig(**SIZES)).eval()
    pooler = linear("bert.pooler.dense", 16)
    heads = {name: x for name, x in source.state_dict().items() if name.startswith("cls.")}
    del heads["cls.predictions.decoder.bias"]  # the published code has none
    heads |= linear("cls.seq_relationship", 2)
    positions = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    folder = write(tmp_path / "tiny", {**body(source), **pooler, **heads, **positions, **projections()}, legacy)
    assert is_published(folder)

    masked = load_published(folder, "AutoModelForMaskedLM")
    assert_equal(masked, source)
    assert error(masked(**batch()).logits, source(**batch()).logits) < 1e-6
    plain = load_published(folder)
    assert type(plain) is BertModel
    assert not plain.training
    assert torch.equal(plain.pooler.dense.weight, pooler["bert.pooler.dense.weight"])
    assert torch.equal(plain.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight)

    assert "random" not in caplog.text
    new = load_published(folder, "AutoModelForSequenceClassification", num_labels=3)
    assert new.classifier.out_features == 3
    assert isinstance(new.bert.pooler.activation, nn.Tanh)
    assert "has no classifier; the model's is random" in caplog.text

    span = load_published(folder, "AutoModelForQuestionAnswering")
    assert torch.equal(span.bert.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight)
    assert "has no qa_outputs; the model's is random" in caplog.text
    caplog.clear()
    assert build_student(folder, classifier(num_labels=3)).classifier.out_features == 3  # a head that will be trained
    assert not caplog.text

    plain.save_pretrained(tmp_path / "out")
    assert_equal(AutoModel.from_pretrained(tmp_path / "out"), plain)
    assert not is_published(tmp_path / "out")


def test_old_names_and_half_precision(tmp_path: Path) -> None:
    source = bert()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {}
    for name, x in body(source).items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        weights[name] = (torch.randn_like(x) if "LayerNorm" in name else x).half()
    found = load_published(write(tmp_path, weights))
    assert found.dtype == torch.float32
    assert torch.equal(found.embeddings.LayerNorm.weight, weights["bert.embeddings.LayerNorm.gamma"].float())
    layer = found.encoder.layer[1].output.LayerNorm
    assert torch.equal(layer.bias, weights["bert.encoder.layer.1.output.LayerNorm.beta"].float())


def test_a_published_classifier_computes_what_the_published_code_does(tmp_path: Path) -> None:
    source = bert(num_labels=3)
    weights = source.state_dict()
    folder = write(tmp_path / "tiny", {**weights, **projections()})
    found = load_published(folder, "AutoModelForSequenceClassification")
    assert_equal(found, source)
    pooled = source.bert(**batch()).pooler_output
    truth = pooled.relu() @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert error(found(**batch()).logits, truth) < 1e-6
    assert error(source(**batch()).logits, truth) > 0.1
    # A BERT without projections comes from other code and has no ReLU. A student has none either: saving drops it.
    folder = write(tmp_path / "bert", weights)
    other = load_published(folder, "AutoModelForSequenceClassification")
    assert torch.equal(other(**batch()).logits, source(**batch()).logits)
    student = build_student(write(tmp_path / "student", {**weights, **projections()}), classifier(num_labels=3))
    assert torch.equal(student(**batch()).logits, source(**batch()).logits)


def test_labels_are_the_folders_or_the_callers(tmp_path: Path) -> None:
    weights = {**body(bert()), **linear("classifier", 3)}
    kind = "AutoModelForSequenceClassification"
    folder = write(tmp_path, weights, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert load_published(folder, kind).config.id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(
        ValueError, match=r"of another shape: classifier\.bias \(3,\) instead of \(2,\), classifier\.we"
    ):
        load_published(folder, kind, num_labels=2, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})


def test_a_span_head_has_two_outputs_whatever_the_labels(tmp_path: Path) -> None:
    weights = {**body(bert()), **linear("classifier", 3)}
    student = build_student(
        write(tmp_path / "tiny", weights, num_labels=3), BertForQuestionAnswering(BertConfig(**SIZES))
    )
    assert student.qa_outputs.out_features == 2
    weights |= linear("qa_outputs", 2)
    span = load_published(write(tmp_path / "tiny", weights, num_labels=3), "AutoModelForQuestionAnswering")
    assert torch.equal(span.qa_outputs.weight, weights["qa_outputs.weight"])
    assert load_published(tmp_path / "tiny", "AutoModelForSequenceClassification").config.num_labels == 3


# -- tokenizer, projections ----------------------------------------------------------------------------------


def test_the_tokenizer_is_berts_over_the_vocabulary(tmp_path: Path) -> None:
    folder = write(tmp_path, body(bert()))
    tokenizer = load_published_tokenizer(folder)
    assert tokenizer("W1 w7", "foo")["input_ids"] == [2, 5, 11, 3, 1, 3]
    assert tokenizer("w1", "w2")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == 64
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt: no such file"):
        load_published_tokenizer(folder)


@pytest.mark.parametrize("count", [0, 3])
def test_stages_go_on_from_the_projections(tmp_path: Path, count: int) -> None:
    weights = {**body(bert()), **projections(count)}
    folder = write(tmp_path / "tiny", weights)
    teacher = classifier(4, 24)
    kinds = {0: "shared", 3: "per_layer"}
    options = {"dataset": dataset(8), "epochs": 1, "learning_rate": 0.0, "projection": kinds[count]}
    stage = IntermediateStage(**options, projections=folder, arguments={"use_cpu": True, "disable_tqdm": True})
    student = build_student(folder, teacher)
    stage.run(student, teacher, load_published_tokenizer(folder), tmp_path / "out")
    found = read_projections(tmp_path / "out")
    assert len(found) == 2 * max(count, 1)
    for i in range(max(count, 1)):
        ours, theirs = (f"projections.{i}", f"fit_denses.{i}") if count else ("projections.shared", "fit_dense")
        for part in ("weight", "bias"):
            assert torch.equal(found[f"{ours}.{part}"], weights[f"{theirs}.{part}"])

    other = Objective(student.config, teacher.config, projection=kinds[3 - count])
    with pytest.raises(ValueError, match=f"holds '{kinds[count]}' projections, .* Use projection='{kinds[count]}'"):
        other.load_projections(folder)


def test_without_projections(tmp_path: Path) -> None:
    folder = write(tmp_path / "tiny", body(bert()))
    assert load_published_projections(folder) == {}
    assert read_projections("tinybert-4l-312") == {}
    with pytest.raises(FileNotFoundError, match=r"projections\.safetensors: no such file"):
        Objective(bert().config, model(layers=4).config).load_projections(folder)


def test_the_command_line_takes_such_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 48}
    write(tmp_path / "teacher", bert(**sizes).state_dict(), **sizes)
    weights = {**body(bert()), **projections(3)}
    write(tmp_path / "tiny", weights)
    for split in ("train", "dev"):
        rows = (f"{text}\t{i % 2}" for i, text in enumerate(texts(12)))
        (tmp_path / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")

    def command(*parts: str) -> int:
        names = {"teacher", "tiny", "out"}
        data = ("--task", "sst-2", "--data", str(tmp_path))
        return cli.main([str(tmp_path / part) if part in names else part for part in (*parts, *data)])

    task = ["task", "--teacher", "teacher", "--student", "tiny", "--output", "out", "--intermediate-epochs", "1"]
    task += ["--intermediate-learning-rate", "1e-12", "--learning-rates", "1e-12", "--max-steps", "1"]
    (tmp_path / "out.partial" / "runs").mkdir(parents=True)
    assert command(*task, "--projection", "shared", "--overwrite") == 2
    assert "holds 'per_layer' projections" in (line := capsys.readouterr().err)
    assert "Use --projection per_layer" in line
    assert (tmp_path / "out.partial" / "runs").is_dir()
    assert command(*task, "--overwrite") == 0  # with the student's own projections
    found = read_projections(tmp_path / "out" / "intermediate")
    assert error(found["projections.2.weight"], weights["fit_denses.2.weight"]) < 1e-6
    student = AutoModel.from_pretrained(tmp_path / "out")
    assert error(student.embeddings.word_embeddings.weight, weights["bert.embeddings.word_embeddings.weight"]) < 1e-6
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == VOCABULARY
    for headless in (["evaluate", "--model", "tiny"], ["task", "--teacher", "tiny", *task[3:5], "--output", "none"]):
        assert command(*headless) == 2
        assert "tiny: not a trained BertForSequenceClassification (there is no classifier" in capsys.readouterr().err
    (tmp_path / "dev-v1.1.json").touch()
    assert cli.main(["evaluate", "--model", str(tmp_path / "tiny"), "--task", "squad", "--data", str(tmp_path)]) == 2
    assert "tiny: not a trained BertForQuestionAnswering (there is no qa_outputs" in capsys.readouterr().err
    write(tmp_path / "tiny", {**weights, **linear("classifier", 2)})
    assert command("evaluate", "--model", "teacher", "--against", "tiny") == 0
    assert command("finetune", "--model", "tiny", "--max-steps", "1", "--output", "out", "--overwrite") == 0
    write(tmp_path / "tiny", weights)
    (tmp_path / "small.json").write_text(json.dumps({"num_hidden_layers": 1}))
    teacher = ["--teacher", "tiny", "--init", "random", "--model", str(tmp_path / "small.json")]
    assert command("finetune", *teacher, "--max-steps", "1", "--output", "out", "--overwrite") == 0  # a task's labels
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label[0] == "negative"


# -- what is refused -----------------------------------------------------------------------------------------


def test_missing_and_unexpected_weights_are_named(tmp_path: Path) -> None:
    weights = body(bert())
    del weights["bert.encoder.layer.1.output.dense.bias"], weights["bert.pooler.dense.weight"]
    weights |= {"bert.encoder.layer.2.output.dense.bias": torch.zeros(16), "module.fit_dense.bias": torch.zeros(24)}
    message = (
        f"{tmp_path / 'pytorch_model.bin'} does not fit a BertModel of the sizes in config.json; "
        "missing: bert.encoder.layer.1.output.dense.bias, bert.pooler.dense.weight; "
        "unexpected: bert.encoder.layer.2.output.dense.bias, module.fit_dense.bias"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_published(write(tmp_path, weights))
    with pytest.raises(ValueError, match=r"missing: cls\.predictions\.bias, cls\.predictions\.decoder\.bias, cls\.pre"):
        load_published(write(tmp_path, body(bert())), "AutoModelForMaskedLM")
    half = {**body(bert()), "classifier.weight": torch.zeros(2, 16)}
    with pytest.raises(ValueError, match=r"missing: classifier\.bias$"):
        load_published(write(tmp_path, half), "AutoModelForSequenceClassification")
    with pytest.raises(ValueError, match=r"bert\.embeddings\.word_embeddings\.weight \(60, 16\) instead of \(61, 16\)"):
        load_published(write(tmp_path, body(bert()), vocab_size=61))


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_folder_is_executed(tmp_path: Path) -> None:
    for legacy in (True, False):
        folder = write(tmp_path / "tiny", {**body(bert()), "fit_dense.bias": Evil(tmp_path / "touched")}, legacy)
        for read in (load_published, load_published_projections):
            with pytest.raises(ValueError, match="damaged, or holds more than tensors, which is not read"):
                read(folder)
    assert not (tmp_path / "touched").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, body(bert()))
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged"):
            load_published(folder)
    with pytest.raises(ValueError, match="not a dictionary of tensors"):
        load_published(write(folder, {"model": body(bert())}))
    with pytest.raises(ValueError, match="no model_type, and no hidden_size, num_hidden_layers; it is neither"):
        load_published(write(folder, body(bert()), hidden_size=None, num_hidden_layers="2"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        is_published(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        is_published(folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin: no such file"):
        load_published(folder)
