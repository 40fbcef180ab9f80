"""Tests that each architecture of transformers gives its own attention probabilities, or is refused before a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from datasets import Dataset
from transformers import BertModel, T5Config, T5EncoderModel, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.bert import modeling_bert

from bench.families import COMMON, Verdict, families, timed_verdict
from fastdistill.train import DistillationTrainer, Objective
from fastdistill.train.capture import capturable, capture
from fastdistill.train.checks import check_attention, short_rows

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WAY_OUT = r'; distil it without the attention term \(method="tinybert", terms=\("embedding", "hidden"\)\)$'


def listed(verdict: Verdict) -> bool:
    """Returns whether docs/models.md lists a family under its verdict."""
    heading = {"accepted": "Accepted", "refused": "Refused", "not built": "Not built"}[verdict.kind]
    section = PAGE.read_text().split(f"## {heading} (")[1].split("\n## ")[0]
    return re.search(rf"(?<![\w.-]){re.escape(verdict.family)}(?![\w.-])", section) is not None


@pytest.mark.parametrize("family", COMMON)
def test_common_families_are_accepted_or_refused_as_the_page_says(family: str) -> None:
    verdict = timed_verdict(family)
    assert verdict.kind in ("accepted", "refused"), verdict.reason
    assert listed(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families()) - set(COMMON)))
def test_every_family_is_accepted_or_refused(family: str) -> None:
    verdict = timed_verdict(family)
    if verdict.kind == "not built":
        pytest.skip(verdict.reason)
    assert verdict.kind in ("accepted", "refused"), verdict.reason


def test_the_page_holds_no_wrong_family() -> None:
    assert "## Wrong" not in PAGE.read_text()


def test_a_position_bias_is_refused() -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model, batch = T5EncoderModel(config).eval(), {"input_ids": torch.arange(2, 8)[None]}
    with capturable(model), pytest.raises(ValueError, match="with position_bias as well.*" + WAY_OUT):
        capture(model, batch, attention=[1])
    with torch.no_grad():
        assert torch.equal(capture(model, batch, hidden=[1]).hidden[1], model(**batch)[0])


@pytest.mark.parametrize("extra", [{"s_aux": torch.ones(4)}, {"softcap": 30.0}, {"anything": torch.zeros(2)}])
def test_what_reaches_the_attention_unknown_is_refused_by_name(extra: dict[str, Any]) -> None:
    model = _tiny.model()
    name = next(iter(extra))
    with capturable(model), pytest.raises(ValueError, match=f"with {name} as well.*" + WAY_OUT):
        run_with(model, extra)


def run_with(model: Any, extra: dict[str, Any]) -> None:
    forward = model.forward
    model.forward = lambda input_ids, **given: forward(input_ids, **given, **extra)
    capture(model, {"input_ids": _tiny.batch()["input_ids"]}, attention=[1])


def test_cross_attention_to_other_tokens_is_refused() -> None:
    config = _tiny.config(is_decoder=True, add_cross_attention=True)
    model, batch = BertModel(config).eval(), _tiny.batch(padded=None)
    batch["encoder_hidden_states"] = torch.randn(3, 5, 24)
    with capturable(model), pytest.raises(ValueError, match="11 queries and 5 keys.*" + WAY_OUT):
        capture(model, batch, attention=[1])


def with_hidden_bias(attend: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Returns an eager attention with something that does not reach the attention function of another name."""

    def eager(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        if part == "scores":
            query = query * 1.05
        if part == "values":
            value = value * 1.05
        if part == "mask":
            mask = None
        return attend(module, query, key, value, mask, **given)

    return eager


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("scores", "probabilities of layer 1 of BertModel are not those of its captured queries"),
        ("mask", "probabilities of layer 1 of BertModel are not those of its captured queries"),
        ("values", "outputs of BertModel are not its attention probabilities times its captured values"),
    ],
)
def test_a_difference_that_no_argument_shows_is_found_by_running(
    part: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = _tiny.model(layers=1), _tiny.batch()
    with capturable(model):
        check_attention(model, batch)
    monkeypatch.setattr(
        modeling_bert, "eager_attention_forward", with_hidden_bias(modeling_bert.eager_attention_forward, part)
    )
    with capturable(model), pytest.raises(ValueError, match=message + ".*" + WAY_OUT):
        check_attention(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", _tiny.FAMILIES)
def test_the_check_accepts_every_precision_and_leaves_the_model_as_it_was(family: str, dtype: torch.dtype) -> None:
    model = _tiny.model(family).to(dtype).train()
    with capturable(model):
        check_attention(model, _tiny.batch(padded="left"))
        assert model.config._attn_implementation == "fastdistill"
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def test_the_check_reads_a_few_tokens() -> None:
    few = short_rows({**_tiny.batch(length=50), "length": torch.tensor([50, 47, 44]), "text": ["a", "b", "c"]})
    assert few["input_ids"].shape == (2, 8)
    assert few["attention_mask"].tolist() == [[1] * 8, [0] * 2 + [1] * 6]
    packed = short_rows({"input_ids": torch.zeros(1, 20), "position_ids": torch.zeros(1, 20)})
    assert {name: tuple(x.shape) for name, x in packed.items()} == {"input_ids": (2, 8), "position_ids": (2, 8)}


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_trainer_refuses_before_the_first_step(side: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = {"student": _tiny.model(), "teacher": _tiny.model("roberta", max_position_embeddings=70)}
    odd = {"student": "bert", "teacher": "roberta"}[side]
    module = __import__(f"transformers.models.{odd}.modeling_{odd}", fromlist=["modeling"])
    monkeypatch.setattr(module, "eager_attention_forward", with_hidden_bias(module.eager_attention_forward, "scores"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True)
    rows = Dataset.from_dict(_tiny.tokenizer()(_tiny.texts(4)))

    def trainer(*terms: str) -> DistillationTrainer:
        student, teacher = models["student"], models["teacher"]
        objective = Objective(student.config, teacher.config, terms=terms)
        return DistillationTrainer(
            student, teacher, objective, arguments, train_dataset=rows, processing_class=_tiny.tokenizer()
        )

    before = {name: p.clone() for name, p in models["student"].named_parameters()}
    with pytest.raises(ValueError, match="layer 1 of .*Model are not those" + ".*" + WAY_OUT):
        trainer("hidden", "attention").train()
    assert all(torch.equal(p, before[name]) for name, p in models["student"].named_parameters())
    trainer("embedding", "hidden").train()  # the way out


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_that_is_attended_would_show(family: str) -> None:
    mask = AttentionMaskInterface._global_mapping["fastdistill"]
    AttentionMaskInterface.register("fastdistill", lambda *_, **__: None)
    try:
        assert "are not those of its captured queries" in timed_verdict(family).reason
    finally:
        AttentionMaskInterface.register("fastdistill", mask)
