"""Tests what a model is given of a batch: inputs that wrappers hand on, and positions under padding on either side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

from fastdistill.train.capture import capturable, capture
from fastdistill.train.causal_lm import causal_lm_loss
from fastdistill.train.data import add_teacher_logits
from fastdistill.train.inputs import entries, forward_arguments, is_packed
from fastdistill.train.objective import Objective
from fastdistill.train.trainer import DistillationTrainer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 60, "initializer_range": 0.5, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
PAIRS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]),
    "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2),
    "position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]] * 2),
}
ADAPTERS = {
    "lora": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False),
    "dora": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], use_dora=True, init_lora_weights=False),
    "ia3": IA3Config(task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    "no task": LoraConfig(target_modules=["query"], init_lora_weights=False),
}


def classifier(seed: int = 0, **sizes: Any) -> hf.BertForSequenceClassification:
    torch.manual_seed(seed)
    return hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, **sizes})).eval()


class Around(nn.Module):
    """Names one input and hands the others on to the model inside."""

    def __init__(self, inner: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, attributes.get("config", getattr(inner, "config", None))

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return self.inner(input_ids, **others)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids) if attention_mask is None else self.table(input_ids) * attention_mask[..., None]


class Named(hf.BertForSequenceClassification):
    """Names one input and hands the others on to its base class."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return super().forward(input_ids, **others)


@torch.no_grad()
def test_a_model_of_ones_own_is_given_what_it_hands_on() -> None:
    """Its inputs are those of a base class, or all that no loss reads if no module is transformers'."""
    named = Named(hf.BertConfig(**SIZES)).eval()
    batch = {**PAIRS, "length": torch.tensor([6, 6]), "teacher_logits": torch.zeros(2, 2), "hidden_1": torch.zeros(2)}
    assert forward_arguments(named, batch).keys() == PAIRS.keys()
    assert torch.equal(capture(named, batch).logits, named(**PAIRS).logits)
    masked = {"input_ids": PAIRS["input_ids"], "attention_mask": torch.ones(2, 6).tril()}
    table = Around(Table(), config=None)
    found = entries(table, {**masked, "length": torch.tensor([6, 6]), "topk_indices": torch.zeros(2, 6, 1)})
    assert torch.equal(table(**found), table(**masked))


@torch.no_grad()
def test_a_teacher_reads_columns_that_the_tokenizer_does_not_name() -> None:
    model, tokenizer = classifier(), _tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    columns = {name: PAIRS[name] for name in ("input_ids", "token_type_ids")}
    rows = Dataset.from_dict({**{name: x.tolist() for name, x in columns.items()}, "labels": [0, 1]})
    found = add_teacher_logits(rows, model, tokenizer)["teacher_logits"]
    assert torch.allclose(torch.tensor(found[:]), model(**columns).logits, rtol=1e-5)


@pytest.mark.parametrize("name", [*ADAPTERS, "around"])
@torch.no_grad()
def test_inputs_that_a_wrapper_hands_on_arrive(name: str) -> None:
    model: Any = Around(classifier()) if name == "around" else get_peft_model(classifier(), ADAPTERS[name]).eval()
    arguments = forward_arguments(model, {**PAIRS, "length": torch.tensor([6, 6]), "labels": torch.tensor([0, 1])})
    assert arguments.keys() == PAIRS.keys()
    assert torch.equal(model(**arguments).logits, model(**PAIRS).logits)
    if name != "around":
        assert torch.equal(capture(model, PAIRS).logits, model(**PAIRS).logits)


def test_virtual_tokens_are_refused() -> None:
    model = get_peft_model(classifier(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"^the model is a PeftModelForSequenceClassification with virtual tokens"):
        capture(model, PAIRS)


@pytest.mark.parametrize("terms", [("hidden",), ("prediction",)])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_the_trainer_refuses_virtual_tokens(tmp_path: Path, kind: Any, whose: str, terms: tuple[str, ...]) -> None:
    """For inner terms too, which the model without its head would compute without them."""
    models = {"student": classifier(), "teacher": classifier(1)}
    models[whose] = get_peft_model(models[whose], kind(task_type="SEQ_CLS", num_virtual_tokens=2))
    student, teacher = models.values()
    args = hf.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = DistillationTrainer(
        student, teacher, Objective(student.config, teacher.config, terms=terms), args,
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]]}), processing_class=_tiny.tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"with virtual tokens.*use an adapter without them, such as LoRA"):
        trainer.train()


def test_two_peft_models_keep_their_columns_and_learn(tmp_path: Path) -> None:
    """The loss of the trainer is that of calling both models on the rows in float64."""
    student, teacher = (get_peft_model(classifier(seed), ADAPTERS["lora"]).eval() for seed in (0, 1))
    rows = Dataset.from_dict({name: x.tolist() for name, x in PAIRS.items()})
    args = hf.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2)
    objective = Objective(student.config, teacher.config, terms=("hidden", "attention", "prediction"))
    trainer = DistillationTrainer(
        student, teacher, objective, args, train_dataset=rows, eval_dataset=rows, processing_class=_tiny.tokenizer()
    )
    found = trainer.predict(rows)
    with torch.no_grad():
        ours, theirs = (copy.deepcopy(model).double()(**PAIRS).logits for model in (student, teacher))
    assert torch.allclose(torch.tensor(found.predictions).double(), ours, rtol=1e-5)
    expected = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean()
    with trainer._capturable():
        loss = trainer.compute_loss(trainer.model, PAIRS, True)[1]["prediction"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer.train()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name or "classifier" in name for name in changed)


def test_packed_rows_of_a_bidirectional_model_are_refused(tmp_path: Path) -> None:
    """Positions that only go up are taken: the padding's, 0, restart nothing."""
    student, teacher = classifier(0), classifier(1)
    args = hf.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1)
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    for positions, starts_anew in (([[0, 1, 2, 0, 1, 2], [0, 1, 2]], True), ([[3, 4, 5, 6, 7, 8], [0, 1, 2]], False)):
        rows = Dataset.from_dict({"input_ids": ids, "position_ids": positions})
        trainer = DistillationTrainer(
            student,
            teacher,
            Objective(student.config, teacher.config, terms=("hidden",)),
            args,
            train_dataset=rows,
            processing_class=_tiny.tokenizer(),
        )
        if starts_anew:
            with pytest.raises(ValueError, match=r"^the rows are packed.*BertForSequenceClassification.*bidirectional"):
                trainer.train()
        else:
            trainer.train()


# -- padding ---------------------------------------------------------------------------------------------------

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11], [12, 13, 14]
SMALL = {"vocab_size": 40, "pad_token_id": 0}
FAMILIES = {
    "bert": (hf.BertModel, hf.BertConfig(**SIZES)),
    "electra": (hf.ElectraModel, hf.ElectraConfig(**SIZES, embedding_size=16)),
    "albert": (hf.AlbertModel, hf.AlbertConfig(**SIZES, embedding_size=16)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**{**SIZES, "pad_token_id": 1})),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0, attention_dropout=0.0,
                            initializer_range=0.5, **SMALL),
    ),
    "modernbert": (
        hf.ModernBertModel,
        hf.ModernBertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                            initializer_range=0.5, **SMALL),
    ),
    "gpt2": (
        hf.GPT2Model, hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5, **SMALL),
    ),
    "roberta decoder": (hf.RobertaModel, hf.RobertaConfig(**{**SIZES, "pad_token_id": 1}, is_decoder=True)),
    "bert decoder": (hf.BertModel, hf.BertConfig(**SIZES, is_decoder=True)),
    "llama": (
        hf.LlamaModel,
        hf.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                       intermediate_size=32, initializer_range=0.5, **SMALL),
    ),
    "opt": (
        hf.OPTModel,
        hf.OPTConfig(hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
                     dropout=0.0, init_std=0.5, **SMALL),
    ),
}  # fmt: skip


def padded(side: str, pad: int) -> dict[str, Tensor]:
    more = [pad] * (len(LONG) - len(SHORT))
    row, mask = (SHORT + more, [1] * 3 + [0] * 4) if side == "right" else (more + SHORT, [0] * 4 + [1] * 3)
    return {"input_ids": torch.tensor([LONG, row]), "attention_mask": torch.tensor([[1] * 7, mask])}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_both_sides_of_padding_agree_with_none(name: str) -> None:
    kind, config = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    alone = model(input_ids=torch.tensor([SHORT]), output_hidden_states=True)
    for side in ("right", "left"):
        batch = padded(side, config.pad_token_id)
        with capturable(model):
            states = capture(model, batch, hidden=[0, 2], attention=[1])
        tokens = batch["attention_mask"][1].bool()
        for i in (0, 2):
            expected = alone.hidden_states[i][0]
            assert (states.hidden[i][1, tokens] - expected).abs().max() <= 1e-5 * expected.abs().max()
        scores = states.attention[1].query[1][:, tokens] @ states.attention[1].key[1][:, tokens].mT
        with capturable(model):
            own = capture(model, {"input_ids": torch.tensor([SHORT])}, attention=[1]).attention[1]
        expected = own.query[0] @ own.key[0].mT
        assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_head_that_reads_the_first_place_refuses_padding_on_the_left() -> None:
    model = classifier()
    alone = model(input_ids=torch.tensor([SHORT])).logits
    assert torch.allclose(capture(model, padded("right", 0)).logits[1], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"^the batch is padded on the left.*padding_side=\"right\""):
        capture(model, padded("left", 0))


# -- causal language models ----------------------------------------------------------------------------------------

HALF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "initializer_range": 0.5, "vocab_size": 40}  # fmt: skip
DECODERS = {
    "gpt2": (hf.GPT2LMHeadModel, FAMILIES["gpt2"][1]),
    "llama": (hf.LlamaForCausalLM, FAMILIES["llama"][1]),
    "roberta": (hf.RobertaForCausalLM, hf.RobertaConfig(**HALF, pad_token_id=0, is_decoder=True)),
    "opt": (hf.OPTForCausalLM, FAMILIES["opt"][1]),
    "bart": (
        hf.BartForCausalLM,
        hf.BartConfig(d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, init_std=0.5,
                      is_encoder_decoder=False, **{**SMALL, "pad_token_id": 1}),
    ),
}  # fmt: skip


def decoders(name: str) -> Any:
    kind, config = DECODERS[name]
    for seed in (0, 1):
        torch.manual_seed(seed)
        yield kind(config).eval()


def expected_loss(student: Any, teacher: Any, *documents: list[int]) -> float:
    """Returns the mean KL over all next tokens, of each document by itself, in float64."""
    losses = []
    with torch.no_grad():
        for document in documents:
            ours, theirs = (
                copy.deepcopy(model).double()(torch.tensor([document])).logits[0, :-1].log_softmax(-1)
                for model in (student, teacher)
            )
            losses.append((theirs.exp() * (theirs - ours)).sum(-1))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_learn_padded_rows_as_they_learn_rows_alone(name: str, side: str) -> None:
    student, teacher = decoders(name)
    batch = padded(side, student.config.pad_token_id)
    if (name, side) == ("bart", "left"):
        with pytest.raises(ValueError, match=r"^the batch is padded on the left, which BartForCausalLM does not read"):
            causal_lm_loss(student, teacher, batch)
        return
    loss = causal_lm_loss(student, teacher, batch)
    assert loss.item() == pytest.approx(expected_loss(student, teacher, LONG, SHORT), rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "opt"])
def test_packed_rows_keep_apart_beside_a_mask(name: str, side: str) -> None:
    """Collators add a mask of ones to packed rows, and of zeros to shorter ones."""
    student, teacher = decoders(name)
    rows = [[LONG, SHORT], [[20, 21], [22, 23]]][: 1 if side == "none" else 2]
    batch: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "attention_mask": []}
    for row in rows:
        ids, places = (
            [token for document in row for token in document],
            [i for document in row for i in range(len(document))],
        )
        more = [0] * (len(LONG + SHORT) - len(ids))
        for column, x in zip(batch.values(), (ids, places, [1] * len(ids)), strict=True):
            column.append(more + x if side == "left" else x + more)
    tensors = {name: torch.tensor(x) for name, x in batch.items()}
    if name in ("roberta", "opt"):
        for call in (lambda: causal_lm_loss(student, teacher, tensors), lambda: capture(student, tensors)):
            with pytest.raises(ValueError, match="reads the sequences of a row as one; pack no rows"):
                call()
        return
    loss = causal_lm_loss(student, teacher, tensors)
    assert loss.item() == pytest.approx(
        expected_loss(student, teacher, *(document for row in rows for document in row)), rel=1e-5
    )


@torch.no_grad()
def test_positions_that_count_padding_leave_it_unseen() -> None:
    student, _ = decoders("gpt2")
    batch = {**padded("left", 0), "position_ids": torch.arange(7).expand(2, 7)}
    assert torch.allclose(capture(student, batch).logits[1, 4:], student(**batch).logits[1, 4:], rtol=1e-4, atol=1e-5)


def test_virtual_tokens_stand_next_to_the_text() -> None:
    student, teacher = decoders("gpt2")
    student = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    assert causal_lm_loss(student, teacher, padded("right", 0)).isfinite()
    with pytest.raises(ValueError, match=r"padded on the left.*virtual tokens.*padding_side=\"right\""):
        causal_lm_loss(student, teacher, padded("left", 0))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "tinybert": {"terms": ("embedding", "hidden", "attention", "prediction")},
    "minilm": {"method": "minilm"},
    "minilmv2": {"method": "minilmv2", "relation_heads": 4},
}


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "opt"])
def test_every_term_is_the_same_under_padding_on_either_side(tmp_path: Path, name: str, method: str) -> None:
    """Each is the mean over the items of both rows, each read by itself."""
    student, teacher = decoders(name)

    def found(side: str, *rows: list[int]) -> dict[str, float]:
        torch.manual_seed(0)  # of the projections
        args = hf.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
        objective = Objective(student.config, teacher.config, **OBJECTIVES[method])
        tokenizer = _tiny.tokenizer()
        tokenizer.padding_side = side
        trainer = DistillationTrainer(student, teacher, objective, args, processing_class=tokenizer)
        batch = dict(trainer.data_collator([{"input_ids": row} for row in rows]))
        with trainer._capturable(), torch.no_grad():
            outputs = trainer.compute_loss(trainer.model.eval(), batch, True)[1]
        return {term: outputs[term].item() for term in objective.terms}

    def items(term: str, row: list[int]) -> int:
        length = len(row)
        if method == "tinybert" and term == "attention":
            return length * (length + 1) // 2
        return length - 1 if term == "prediction" else length

    long, short = found("right", LONG), found("right", SHORT)
    for side in ("right", "left"):
        for term, loss in found(side, LONG, SHORT).items():
            first, second = items(term, LONG), items(term, SHORT)
            expected = (first * long[term] + second * short[term]) / (first + second)
            assert loss == pytest.approx(expected, rel=2e-5), (term, side)


UNMARKED = {
    "bloom": hf.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0,
                            initializer_range=0.5),
    "mamba": hf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, initializer_range=0.5),
    "xglm": hf.XGLMConfig(vocab_size=60, d_model=16, num_layers=2, attention_heads=2, ffn_dim=16, dropout=0.0,
                          activation_dropout=0.0, attention_dropout=0.0, init_std=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMARKED)
def test_causal_models_whose_attention_does_not_say_so_learn_tokens(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = (hf.AutoModelForCausalLM.from_config(UNMARKED[name]).eval() for _ in range(2))
    rows = _tiny.dataset(2).remove_columns("labels")
    args = hf.TrainingArguments(
        tmp_path, use_cpu=True, max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = copy.deepcopy(student)
    trainer = DistillationTrainer(
        student, teacher, Objective(student.config, terms=("prediction",)), args, train_dataset=rows,
        processing_class=_tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    losses = []
    with torch.no_grad():
        for row in rows:  # each by itself, without padding
            logits = [m(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double() for m in (before, teacher)]
            losses.append(-(logits[1].softmax(-1) * logits[0].log_softmax(-1)).sum(-1))
    expected = float(torch.cat(losses).mean())
    assert trainer.state.log_history[0]["prediction"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 0, 1, 2], None, True),
        ([0, 1, 2, 3, 4], None, False),
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], False),  # padding on the left
        ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0], False),  # and on the right
        ([0, 1, 1, 0, 1], [1, 1, 0, 1, 1], True),  # and between two sequences
        ([1, 0, 1, 0, 1], [0, 1, 1, 1, 1], True),
    ],
)
def test_positions_start_anew_after_a_token(positions: Any, mask: Any, expected: bool) -> None:
    assert is_packed(torch.tensor([positions]), None if mask is None else torch.tensor([mask])) is expected
