"""The prediction term of language models and classifiers in the trainer, against float64 on full logits, row by row."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    TrainingArguments,
)

from bench import live_teacher
from fastdistill.train.cache import read_cache, write_cache
from fastdistill.train.capture import States, capturable, capture
from fastdistill.train.data import PaddingCollator
from fastdistill.train.model import DistillationModel, teacher_states
from fastdistill.train.objective import Objective
from fastdistill.train.stages import CachedStage
from fastdistill.train.trainer import DistillationTrainer

CLASSES = _tiny.VOCABULARY
COMMON = {
    "vocab_size": CLASSES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.3, "dropout": 0.0}
DRY = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES = {
    "llama": lambda **o: _tiny.config("llama", 2, 16, **o),
    "mistral": lambda **o: _tiny.config("mistral", 2, 16, **o),
    "gpt2": lambda **o: _tiny.config("gpt2", 2, 16, **DRY, **o),
    "opt": lambda **o: OPTConfig(**COMMON | OPT | o),
    "gemma2": lambda **o: Gemma2Config(**COMMON | {"final_logit_softcapping": 3.0} | o),
    "gemma3": lambda **o: Gemma3TextConfig(**COMMON | {"sliding_window": 4} | o),
    "cohere": lambda **o: CohereConfig(**COMMON | {"logit_scale": 0.25} | o),
}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def language_model(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family](**options)).eval()


def chats(count: int = 6, longest: int = 12) -> list[dict[str, list[int]]]:
    """Returns rows of different lengths, whose prompts have the label -100."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        ids = torch.randint(4, CLASSES, (longest - i,), generator=generator).tolist()
        labels = [-100] * (2 + i % 3) + ids[2 + i % 3 :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def packed(rows: list[dict[str, list[int]]], *groups: list[int]) -> list[dict[str, list[int]]]:
    joined = []
    for group in groups:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for number in group:
            row["input_ids"] += rows[number]["input_ids"]
            row["labels"] += [-100, *rows[number]["labels"][1:]]  # no sequence predicts the next one's first token
            row["position_ids"] += range(len(rows[number]["input_ids"]))
        joined.append(row)
    return joined


def collated(rows: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    tokenizer = _tiny.tokenizer()
    tokenizer.padding_side = side
    return PaddingCollator(tokenizer)(rows)


# -- the right values ------------------------------------------------------------------------------------------


def right_items(z_s: Tensor, z_t: Tensor, labels: Tensor, options: Mapping[str, Any]) -> Tensor:  # (N, V) -> (N)
    """Returns the prediction loss of each item in float64."""
    temperature, alpha = options.get("temperature", 1.0), options.get("alpha", 1.0)
    log_s, log_t = ((z.double() / temperature).log_softmax(-1) for z in (z_s, z_t.detach()))
    p_s, p_t = log_s.exp(), log_t.exp()
    log_m = (0.5 * (p_s + p_t)).log()
    soft = {
        "soft_cross_entropy": -(p_t * log_s).sum(-1),
        "kl": (p_t * (log_t - log_s)).sum(-1),
        "jsd": 0.5 * (p_t * (log_t - log_m)).sum(-1) + 0.5 * (p_s * (log_s - log_m)).sum(-1),
        "tvd": 0.5 * (p_t - p_s).abs().sum(-1),
    }[options.get("divergence", "soft_cross_entropy")]
    soft = soft * (temperature**2 if options.get("t_squared") else 1.0)
    if alpha == 1:
        return soft
    return alpha * soft + (1 - alpha) * nn.functional.cross_entropy(z_s.double(), labels, reduction="none")


def right_prediction(
    student: Any, teacher: Any, rows: list[dict[str, Any]], classes: int = CLASSES, **options: Any
) -> Tensor:
    """Returns the mean over all next tokens that count; the models are called on one row at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        following = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        counted = following != -100
        z_s, z_t = (model(ids).logits[0, :-1, :classes][counted] for model in (student, teacher))
        total, count = total + right_items(z_s, z_t, following[counted], options).sum(), count + int(counted.sum())
    return total / count


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


def assert_right(loss: Tensor, student: nn.Module, right: Tensor, exact: nn.Module, bound: float = 1e-4) -> None:
    assert error(loss, right) < bound
    found, truth = gradients(loss, student), gradients(right, exact)
    assert found.keys() == truth.keys()
    scale = max(x.norm() for x in truth.values())
    for name, x in truth.items():
        if x.norm() > 1e-7 * scale:  # a key's bias has no gradient but rounding
            assert error(found[name], x) < bound, name


def live(student: Any, teacher: Any, batch: Mapping[str, Tensor], **options: Any) -> dict[str, Any]:
    """Returns what one step of the trainer computes."""
    objective = Objective(student.config, teacher.config, **{"terms": ("prediction",), **options})
    states = teacher_states(teacher, student, objective, batch, has_logits=False)
    return DistillationModel(student, objective)(**batch, teacher=states)


# -- live teachers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_teachers_loss_and_gradients_are_those_of_full_logits(family: str, side: str) -> None:
    student, teacher = language_model(family), language_model(family, seed=1)
    options = {"alpha": 0.7, "temperature": 2.0, "t_squared": True, "divergence": "kl"}
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    found = live(student, teacher, collated(chats(), side), **options)
    assert found["logits"] is None
    assert_right(found["loss"], student, right_prediction(exact, exact_teacher, chats(), **options), exact)


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl", "jsd", "tvd"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_each_divergence_mixes_with_the_labels(name: str, alpha: float) -> None:
    student, teacher = language_model(), language_model("gpt2", seed=1)
    options = {"divergence": name, "alpha": alpha, "temperature": 1.5, "t_squared": True}
    exact = copy.deepcopy(student).double()
    right = right_prediction(exact, copy.deepcopy(teacher).double(), chats(), **options)
    assert_right(live(student, teacher, collated(chats()), **options)["loss"], student, right, exact)


def test_without_labels_every_token_with_a_successor_counts() -> None:
    student, teacher = language_model(), language_model(seed=1)
    rows = [{name: x for name, x in row.items() if name != "labels"} for row in chats()]
    exact = copy.deepcopy(student).double()
    right = right_prediction(exact, copy.deepcopy(teacher).double(), rows)
    assert_right(live(student, teacher, collated(rows))["loss"], student, right, exact)
    by_row = {**collated(rows), "labels": torch.zeros(len(rows), dtype=torch.long)}  # classes of rows are no tokens
    assert error(live(student, teacher, by_row)["loss"], right) < 1e-5


def test_one_forward_serves_hidden_states_attention_and_prediction() -> None:
    student, teacher = language_model(), language_model(num_hidden_layers=4, seed=1)
    live(student, teacher, collated(chats()))  # looks at the heads
    calls: list[int] = []
    student.register_forward_hook(lambda *_: calls.append(1))
    terms, batch = ("embedding", "hidden", "attention", "prediction"), collated(chats(), "left")
    objective = Objective(student.config, teacher.config, terms=terms)
    with capturable(student, teacher):
        states = teacher_states(teacher, student, objective, batch, has_logits=False)
        found = DistillationModel(student, objective)(**batch, teacher=states)
    assert calls == [1]
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    prediction = right_prediction(exact, exact_teacher, chats())
    hidden, tokens = torch.zeros((), dtype=torch.float64), 0
    projection = copy.deepcopy(objective.projections["shared"]).double()
    for row in chats():
        ids = torch.tensor([row["input_ids"]])
        ours = exact(ids, output_hidden_states=True).hidden_states
        theirs = exact_teacher(ids, output_hidden_states=True).hidden_states
        for i in (1, 2):
            hidden = hidden + (projection(ours[i]) - theirs[2 * i].detach()).square().mean(-1).sum()
        tokens += ids.numel()
    assert error(found["hidden"], hidden / tokens) < 1e-4
    both = found["hidden"] + found["prediction"]
    assert_right(both, student, hidden / tokens + prediction, exact)
    assert torch.isfinite(found["loss"])


class Doubled(nn.Module):
    """A head that is more than a product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight = linear, linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear(2 * x).tanh()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_any_other_head_takes_its_logits(whose: str) -> None:
    models = {"student": language_model(), "teacher": language_model(seed=1)}
    models[whose].lm_head = Doubled(models[whose].lm_head)
    student, teacher = models.values()
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    found = live(student, teacher, collated(chats()))
    assert found["logits"].shape == (6, 12, CLASSES)
    assert_right(found["loss"], student, right_prediction(exact, exact_teacher, chats()), exact)


def test_two_paddings_of_one_vocabulary(tmp_path: Path) -> None:
    student, teacher = language_model(vocab_size=CLASSES + 3), language_model(vocab_size=CLASSES + 10, seed=1)
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    right = right_prediction(exact, exact_teacher, chats(), classes=CLASSES + 3)
    run = trainer(tmp_path, student, teacher, chats())
    run.train()
    assert first_loss(run) == pytest.approx(right.item(), rel=1e-5)
    run.save_model(str(tmp_path / "student"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.vocab_size == CLASSES + 3


# -- packed rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_of_different_lengths_are_read_sequence_by_sequence(tmp_path: Path, family: str, side: str) -> None:
    student, teacher = language_model(family), language_model(family, seed=1)
    rows = packed(chats(), [0, 1], [2], [3, 4, 5])
    if family == "opt":
        with pytest.raises(ValueError, match="OPTForCausalLM reads the sequences of a row as one; pack no rows"):
            trainer(tmp_path, student, teacher, rows).train()
        return
    batch = collated(rows, side)
    assert not batch["attention_mask"].all()
    exact = copy.deepcopy(student).double()
    right = right_prediction(exact, copy.deepcopy(teacher).double(), chats())
    assert_right(live(student, teacher, batch)["loss"], student, right, exact)
    alone = torch.cat([capture(student, {"input_ids": torch.tensor([row["input_ids"]])}).logits[0] for row in chats()])
    assert error(capture(student, batch).logits[batch["attention_mask"].bool()], alone) < 1e-5


def test_packed_rows_are_refused_where_they_would_be_read_as_one() -> None:
    batch = collated(packed(chats(), [0, 1], [2]))
    student = language_model()
    student.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention tells packed sequences apart in a batch of one row only"):
        capture(student, batch)
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=CLASSES, hidden_size=16, n_layer=1, n_head=2))
    bloom.transformer.h[0].self_attention.is_causal = True
    with pytest.raises(ValueError, match="position_ids, which BloomForCausalLM does not take"):
        capture(bloom, batch)


def test_a_cache_of_packed_rows_learns_sequence_by_sequence(tmp_path: Path) -> None:
    student, teacher = language_model(), language_model(seed=1)
    rows = packed(chats(), [0, 1], [2], [3, 4, 5])
    write_cache(Dataset.from_list(rows), teacher, _tiny.tokenizer(), tmp_path / "cache", top_k=CLASSES)
    right = right_prediction(student.double(), copy.deepcopy(teacher).double(), chats())
    stage = CachedStage(cache=tmp_path / "cache", learning_rate=0.0, batch_size=3, epochs=1, arguments=QUICK)
    stage.run(student.float(), None, _tiny.tokenizer(), tmp_path / "out")
    assert logged(tmp_path / "out")["loss"] == pytest.approx(right.item(), rel=1e-3)  # float16 in the cache


# -- cached teachers, in the trainer -----------------------------------------------------------------------------

QUICK = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}


def logged(folder: Path) -> dict[str, float]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]


def trainer(folder: Path, student: Any, teacher: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 1,
        "learning_rate": 0.0, "save_strategy": "no", "max_grad_norm": 1e9, **QUICK, **options.pop("arguments", {}),
    }  # fmt: skip
    options = {"terms": ("prediction",), **options}
    return DistillationTrainer(
        student, teacher, Objective(student.config, None if teacher is None else teacher.config, **options),
        TrainingArguments(**arguments), processing_class=_tiny.tokenizer(), train_dataset=Dataset.from_list(rows),
    )  # fmt: skip


def first_loss(run: Any, name: str = "loss") -> float:
    return next(entry[name] for entry in run.state.log_history if name in entry)


@pytest.mark.parametrize("is_live", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_accumulated_uneven_labels_give_the_loss_and_gradient_of_one_batch(
    tmp_path: Path, family: str, is_live: bool
) -> None:
    student, teacher = language_model(family), language_model(family, seed=1)
    options = {"divergence": "kl", "alpha": 0.5, "temperature": 2.0, "t_squared": True}
    exact = copy.deepcopy(student).double()
    right = right_prediction(exact, copy.deepcopy(teacher).double(), chats(), **options)
    norm = torch.stack([x.norm() for x in gradients(right, exact).values()]).norm()
    if is_live:
        run = trainer(tmp_path, student, teacher, chats(), **options)
        run.train()
        found = {name: first_loss(run, name) for name in ("loss", "grad_norm")}
    else:
        write_cache(Dataset.from_list(chats()), teacher, _tiny.tokenizer(), tmp_path / "cache", top_k=CLASSES)
        arguments = {**QUICK, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9}
        stage = CachedStage(
            cache=tmp_path / "cache", learning_rate=0.0, batch_size=3, epochs=1, arguments=arguments, **options
        )
        stage.run(student, None, _tiny.tokenizer(), tmp_path / "out")
        found = logged(tmp_path / "out")
    bound = 1e-4 if is_live else 2e-3  # float16 in the cache
    assert found["loss"] == pytest.approx(right.item(), rel=bound)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=bound)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["causal", "masked", "classifier"])
def test_kl_to_a_bucket_of_the_other_classes(kind: str, alpha: float) -> None:
    """A cached teacher of 4 classes and a bucket; in half of the rows the bucket holds nothing."""
    torch.manual_seed(0)
    student = language_model() if kind == "causal" else None
    shape = (6, 12) if kind == "causal" else (3, 5) if kind == "masked" else (5,)
    batch: dict[str, Any] = collated(chats()) if kind == "causal" else {}
    p = torch.rand(*shape, 5, dtype=torch.float64) + 0.1
    p[::2, ..., 4] = 0
    p = p / p.sum(-1, keepdim=True)
    kept = torch.rand(*shape, CLASSES).argsort(-1)[..., :4]  # the classes of the cache
    topk = p[..., :4].log().float(), kept
    options = {"divergence": "kl", "alpha": alpha, "tail": "bucket"}
    if student is not None:
        exact = copy.deepcopy(student).double()
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        labels, z = batch["labels"][:, 1:], exact(**inputs).logits[:, :-1]
        p, kept = p[:, :-1], kept[:, :-1]
        objective = Objective(student.config, None, terms=("prediction",), **options)
        found = DistillationModel(student, objective)(**batch, topk_logprobs=topk[0], topk_indices=topk[1])["loss"]
    else:
        z = torch.randn(*shape, CLASSES, dtype=torch.float64).requires_grad_()
        labels = torch.randint(CLASSES, shape)
        logits = z.detach().float().requires_grad_()
        objective = Objective(_tiny.config(num_labels=CLASSES), terms=("prediction",), **options)
        mask = torch.ones(shape, dtype=torch.bool) if kind == "masked" else None
        found = objective(States({}, {}, logits), None, labels=labels, topk=topk, mask=mask)["prediction"]
    q = z.softmax(-1).gather(-1, kept)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    soft = (torch.special.xlogy(p, p) - p * q.log()).sum(-1)
    hard = nn.functional.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    right = (alpha * soft + (1 - alpha) * hard)[labels != -100].mean()
    if student is not None:
        assert_right(found, student, right, exact)
        return
    assert error(found, right) < 1e-5
    assert error(torch.autograd.grad(found, logits)[0], torch.autograd.grad(right, z)[0]) < 1e-5


@pytest.mark.parametrize("is_live", [True, False])
def test_rows_without_a_label_give_loss_0_and_the_run_goes_on(tmp_path: Path, is_live: bool) -> None:
    student, teacher = language_model(), language_model(seed=1)
    rows: Any = [{**row, "labels": [-100] * len(row["labels"])} for row in chats()]
    if not is_live:
        write_cache(Dataset.from_list(rows), teacher, _tiny.tokenizer(), tmp_path / "cache", top_k=4)
        rows = list(read_cache(tmp_path / "cache"))
    before = copy.deepcopy(student)
    arguments = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd"}
    run = trainer(tmp_path, student, teacher if is_live else None, rows, alpha=0.5, arguments=arguments)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [(entry["loss"], entry["grad_norm"]) for entry in entries] == [(0.0, 0.0)] * 3
    for name, p in before.named_parameters():
        assert torch.equal(p, student.get_parameter(name)), name


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    student, teacher = language_model(), language_model(seed=1)
    for options, message in (
        ({"divergence": "renyi"}, "divergence is 'renyi'; it should be one of"),
        ({"alpha": 1.5}, "alpha is 1.5; it should be from 0 to 1"),
        ({"alpha": 0.5, "parity": "official"}, "parity 'official' has no labels"),
        ({"tail": "bucket", "temperature": 2.0}, "tail 'bucket' needs 1, where its mass is known"),
        ({"parity": "official"}, "the prediction term of a causal language model counts next tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, student, teacher, chats(), **options)
    cached = [{**row, "topk_logprobs": [[0.0]] * 12, "topk_indices": [[1]] * 12} for row in chats(1)]
    with pytest.raises(ValueError, match="divergence is 'jsd'; a cached teacher has 'kl' and 'soft_cross_entropy'"):
        trainer(tmp_path, student, None, cached, divergence="jsd").train()


def mixture() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.3,
        experts_implementation="eager",  # the others have no float64
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_mixture_of_experts_learns_its_balance_as_well(tmp_path: Path) -> None:
    student, teacher = mixture(), language_model(seed=1)
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    batch, options = collated(chats()), {"divergence": "kl", "alpha": 0.4}
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    right = right_prediction(exact, exact_teacher, chats(), **options) + 0.3 * exact(**inputs).aux_loss
    found = live(student, teacher, batch, **options)
    assert_right(found["loss"], student, right, exact)
    # Each micro-batch has the weight of its next tokens.
    objective = Objective(student.config, teacher.config, terms=("prediction",), **options)
    halves = [collated(rows) for rows in (chats()[:2], chats()[2:])]
    count = objective.count(halves[0]) + objective.count(halves[1])
    sums, balance = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    total = int((batch["labels"][:, 1:] != -100).sum())
    for half in halves:
        states = teacher_states(teacher, student, objective, half, has_logits=False)
        sums = sums + DistillationModel(student, objective)(**half, teacher=states, num_items=count)["loss"]
        share = int((half["labels"][:, 1:] != -100).sum()) / total
        balance = balance + 0.3 * share * exact(**{name: x for name, x in half.items() if name != "labels"}).aux_loss
    assert_right(sums, student, right_prediction(exact, exact_teacher, chats(), **options) + balance, exact)
    run = trainer(tmp_path, student, teacher, chats(), arguments={"per_device_train_batch_size": 6}, **options)
    run.train()
    assert first_loss(run, "balance") == pytest.approx(float(found["balance"].detach()), rel=1e-4)
    assert first_loss(run) == pytest.approx(float(right), rel=1e-4)


def test_left_and_right_padding_train_alike(tmp_path: Path) -> None:
    found = []
    for side in ("right", "left"):
        student = AutoModelForCausalLM.from_config(GPT2Config(**FAMILIES["gpt2"]().to_dict())).eval()
        student.load_state_dict(language_model("gpt2").state_dict())
        run = trainer(tmp_path, student, language_model("gpt2", seed=1), chats())
        run.data_collator.tokenizer.padding_side = side
        run.train()
        found.append([first_loss(run), first_loss(run, "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# -- memory ----------------------------------------------------------------------------------------------------


def test_a_step_with_a_live_teacher_builds_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdistill.ops.linear_logits.CPU_CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(live_teacher, "CLASSES", 5000)
    lean, full, difference = live_teacher.peaks(tokens=1024, width=16)
    logits = 1024 * 5000 * 4
    assert full > 2 * logits  # the measure sees them
    assert lean < logits / 2
    assert lean < live_teacher.GOAL * full
    assert difference < 1e-5


# -- other models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft_cross_entropy", "kl", "jsd", "tvd"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_a_sequence_classifier_has_the_same_options(name: str, alpha: float) -> None:
    options = {"divergence": name, "alpha": alpha, "temperature": 2.0, "t_squared": True}
    objective = Objective(_tiny.config(num_labels=3), terms=("prediction",), **options)
    torch.manual_seed(0)
    z_s, z_t, labels = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 2, 1, -100, 1])
    counted = labels != -100 if alpha < 1 else torch.ones(5, dtype=torch.bool)
    right = right_items(z_s[counted], z_t[counted], labels[counted], options).mean()
    states = States({}, {}, z_s), States({}, {}, z_t)
    loss = objective(*states, labels=labels)["prediction"]
    assert error(loss, right) < 1e-5
    assert error(torch.autograd.grad(loss, z_s)[0], torch.autograd.grad(right, z_s)[0]) < 1e-5
    batch = {"input_ids": torch.ones(5, 7, dtype=torch.long), "labels": labels}
    count = objective.count(batch)
    halves = [
        objective(*(States({}, {}, s.logits[rows]) for s in states), labels=labels[rows], num_items=count)["prediction"]
        for rows in (slice(0, 2), slice(2, 5))
    ]
    assert error(sum(halves), right) < 1e-5


@pytest.mark.parametrize("kind", ["tags", "masked"])
def test_token_classifiers_and_masked_models_have_the_same_options(kind: str) -> None:
    auto = AutoModelForTokenClassification if kind == "tags" else AutoModelForMaskedLM
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(auto.from_config(_tiny.config("bert", 2, 16, num_labels=4)).eval())
    student, teacher = models
    options = {"divergence": "jsd", "alpha": 0.4, "temperature": 2.0, "t_squared": True}
    batch = collated([{**row, "labels": [-100 if x == -100 else x % 4 for x in row["labels"]]} for row in chats()])
    found = live(student, teacher, batch, **options)["loss"]
    labels = batch["labels"]
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    z_s, z_t = (model(**inputs).logits[labels != -100] for model in (exact, exact_teacher))
    assert_right(found, student, right_items(z_s, z_t, labels[labels != -100], options).mean(), exact)


def test_models_without_such_labels_refuse_alpha() -> None:
    for name, value in (("alpha", 0.5), ("divergence", "kl"), ("t_squared", True)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; a regression"):
            Objective(_tiny.config(num_labels=1, problem_type="regression"), terms=("prediction",), **{name: value})
    models = [AutoModelForQuestionAnswering.from_config(_tiny.config("bert", 2, 16)).eval() for _ in range(2)]
    batch = _tiny.batch()
    with pytest.raises(ValueError, match=r"alpha is 0.5; the prediction term of a question answering model"):
        live(*models, batch, alpha=0.5)
    assert torch.isfinite(live(*models, batch, divergence="kl", temperature=2.0, t_squared=True)["loss"])
    classifier = Objective(_tiny.config(num_labels=3), terms=("prediction",), alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha is 0.5 but labels is None"):
        classifier(*(States({}, {}, torch.randn(2, 3)) for _ in range(2)))
