"""Tests the trainer: accumulation, checkpoints, logs, freezing, the checks before the first step, two processes."""

from __future__ import annotations

import copy
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from fastdistill.train.capture import capturable, capture
from fastdistill.train.checks import check_classes, check_vocabularies
from fastdistill.train.data import PaddingCollator
from fastdistill.train.model import DistillationModel
from fastdistill.train.objective import Objective, resolve_terms
from fastdistill.train.trainer import DistillationTrainer

INNER_TERMS = resolve_terms("tinybert")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trainer(
    tmp_path: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    *,
    rows: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    compute_metrics: Any = None,
    objective: dict[str, Any] | None = None,
    **arguments: Any,
) -> DistillationTrainer:
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return DistillationTrainer(
        student,
        teacher,
        Objective(student.config, None if teacher is None else teacher.config, **(objective or {})),
        TrainingArguments(**{**options, **arguments}),
        processing_class=_tiny.tokenizer(),
        train_dataset=_tiny.dataset() if rows is None else rows,
        eval_dataset=eval_dataset,
        compute_metrics=compute_metrics,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def losses(run: DistillationTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_a_few_steps_train_student_and_projections_but_not_the_teacher(tmp_path: Path) -> None:
    student, teacher = _tiny.classifier(**NO_DROPOUT), _tiny.classifier(layers=4, width=24, seed=1)
    run = trainer(tmp_path, student, teacher, max_steps=20, learning_rate=5e-3)
    before, taught = weights(run.model), weights(teacher)
    teacher.train()
    run = trainer(tmp_path, student, teacher, max_steps=20, learning_rate=5e-3)
    run.train()
    found = losses(run)
    assert found[-1] < 0.7 * found[0]
    assert not teacher.training
    assert changed(taught, teacher) == set()
    assert all(p.grad is None for p in teacher.parameters())
    moved = changed(before, run.model)
    assert {"objective.projections.shared.weight", "objective.projections.shared.bias"} <= moved
    assert "student.bert.encoder.layer.0.attention.self.query.weight" in moved
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", [name for name in _tiny.FAMILIES if name not in ("gpt2", "mistral")])
def test_every_family_trains(tmp_path: Path, family: str) -> None:
    student, teacher = _tiny.model(family, layers=2, width=16), _tiny.model(family, layers=4)
    rows = _tiny.dataset().remove_columns("labels")
    run = trainer(tmp_path, student, teacher, rows=rows, max_steps=8, learning_rate=5e-3)
    run.train()
    assert sum(losses(run)[4:]) < sum(losses(run)[:4])  # the same rows, one epoch later
    for term in INNER_TERMS:
        assert all(math.isfinite(value) and value > 0 for value in losses(run, term))


def test_inner_terms_compute_no_logits(tmp_path: Path) -> None:
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24)
    calls: list[str] = []
    student.classifier.register_forward_hook(lambda *_: calls.append("student"))
    teacher.classifier.register_forward_hook(lambda *_: calls.append("teacher"))
    trainer(tmp_path, student, teacher).train()
    assert calls == []
    trainer(tmp_path, student, teacher, objective={"terms": ("hidden", "prediction")}, max_steps=1).train()
    assert calls[-4:] == ["teacher", "student"] * 2  # the second small pass, and one step


def test_each_term_is_logged_and_the_terms_sum_to_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, _tiny.classifier(), _tiny.classifier(4, 24), max_steps=6, logging_steps=2)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert sum(entry[term] for term in INNER_TERMS) == pytest.approx(entry["loss"], rel=1e-5)


def test_a_model_without_the_attention_interface_trains_without_the_attention_term(tmp_path: Path) -> None:
    student, teacher = _tiny.model("deberta", layers=2, width=16), _tiny.model("deberta", layers=4)
    with pytest.raises(ValueError, match=r"DebertaV2Model does not compute its attention.*without the attention term"):
        trainer(tmp_path, student, teacher).train()
    run = trainer(tmp_path, student, teacher, objective={"terms": ("embedding", "hidden")})
    run.train()
    assert len(losses(run, "hidden")) == 3


def test_a_distilbert_student_trains_with_a_bert_teacher(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in _tiny.dataset()])
    run = trainer(tmp_path, _tiny.model("distilbert", layers=2), _tiny.model("bert", layers=4), rows=rows)
    assert "token_type_ids" in next(iter(run.get_train_dataloader()))
    run.train()


# -- accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parity", ["masked", "official"])
@pytest.mark.parametrize("terms", [INNER_TERMS, ("prediction",)])
def test_accumulated_micro_batches_take_the_step_of_one_batch(
    tmp_path: Path, parity: str, terms: tuple[str, ...]
) -> None:
    rows = _tiny.dataset(16)
    if parity == "official":  # it counts padding, so rows must have one length for batches to agree
        rows = rows.map(lambda row: {name: (row[name] + [0] * 15)[:15] for name in ("input_ids", "attention_mask")})
    steps = []
    for size in (8, 2):
        student, teacher = _tiny.classifier(**NO_DROPOUT), _tiny.classifier(layers=4, width=24, seed=1)
        run = trainer(
            tmp_path,
            student,
            teacher,
            rows=rows,
            objective={"terms": terms, "parity": parity},
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
        )
        torch.manual_seed(5)
        for p in run.objective.parameters():
            nn.init.normal_(p, std=0.1)
        before = weights(run.model)
        run.train()
        steps.append((run, {name: p - before[name] for name, p in weights(run.model).items()}))
    (whole, step), (parts, accumulated) = steps
    assert (
        error(torch.cat([x.flatten() for x in accumulated.values()]), torch.cat([x.flatten() for x in step.values()]))
        < 1e-5
    )
    for name in ("loss", *terms):
        assert losses(parts, name) == pytest.approx(losses(whole, name), rel=1e-5)


# -- freezing ------------------------------------------------------------------------------------------------


def frozen_names(run: DistillationTrainer) -> set[str]:
    with run._capturable(), run._trainable():
        return {name for name, p in run.student.named_parameters() if not p.requires_grad}


def test_parameters_that_no_term_reaches_are_frozen_for_the_run(tmp_path: Path) -> None:
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24)
    run = trainer(tmp_path, student, teacher, weight_decay=0.1)
    assert frozen_names(run) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    before = weights(student)
    run.train()
    assert not changed(before, student) & {"bert.pooler.dense.weight", "classifier.weight"}
    assert all(p.requires_grad for p in student.parameters())

    attention = frozen_names(trainer(tmp_path, student, teacher, objective={"terms": ("attention",)}))
    assert {"bert.encoder.layer.1.attention.self.value.weight", "bert.encoder.layer.1.output.dense.weight"} < attention
    assert not {name for name in attention if ".layer.0." in name or "layer.1.attention.self.query" in name}
    assert frozen_names(trainer(tmp_path, student, teacher, objective={"terms": ("prediction",)})) == set()


def test_the_freezing_check_draws_no_random_numbers_and_leaves_no_gradients(tmp_path: Path) -> None:
    run = trainer(tmp_path, _tiny.classifier(), _tiny.classifier(4, 24))
    state = torch.get_rng_state()
    frozen_names(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in run.model.parameters())


def test_weight_decay_spares_biases_and_norms(tmp_path: Path) -> None:
    run = trainer(tmp_path, _tiny.classifier(), _tiny.classifier(4, 24), weight_decay=0.01)
    decayed = run.get_decay_parameter_names(run.model)
    assert "objective.projections.shared.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "LayerNorm" in name]


# -- checks before the first step ----------------------------------------------------------------------------


def test_bad_models_and_settings_are_refused_before_the_first_step(tmp_path: Path) -> None:
    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24)
    with pytest.raises(ValueError, match="student's vocabulary has 60 tokens, the teacher's 3000"):
        trainer(tmp_path, student, _tiny.classifier(4, 24, vocab_size=3000)).train()
    with pytest.raises(ValueError, match=r"teacher is None; the terms .'prediction',. need one"):
        trainer(tmp_path, student, None, objective={"terms": ("prediction",)}).train()
    recompute = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="reentrant"):
        trainer(tmp_path, student, teacher, **recompute).train()
    student.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        trainer(tmp_path, student, teacher).train()


def test_a_loss_that_overflows_is_refused(tmp_path: Path) -> None:
    teacher = _tiny.classifier(4, 24)
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss of the first rows is nan"):
        trainer(tmp_path, _tiny.classifier(), teacher).train()


def test_a_student_that_learns_nothing_is_refused(tmp_path: Path) -> None:
    student = _tiny.classifier().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the student gets a gradient"):
        trainer(tmp_path, student, _tiny.classifier(4, 24), objective={"terms": ("attention",)}).train()


def test_different_vocabularies_and_classes_are_refused() -> None:
    for sizes in ((59, 59), (59, 64), (64, 59)):
        configs = [_tiny.config(vocab_size=size) for size in sizes]
        with pytest.raises(ValueError, match=f"the tokenizer has 60 tokens, .*vocabulary {sizes[0]}, .* {sizes[1]};"):
            check_vocabularies(*configs, _tiny.tokenizer())
    check_vocabularies(_tiny.config(vocab_size=64), _tiny.config(vocab_size=61), _tiny.tokenizer())  # two paddings
    with pytest.raises(ValueError, match="vocabulary has 64 tokens, the teacher's 61; both should be one vocabulary"):
        check_vocabularies(_tiny.config(vocab_size=64), _tiny.config(vocab_size=61))
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    turned = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    with pytest.raises(ValueError, match=r"orders its classes \['no', 'yes'\], the teacher \['yes', 'no'\]"):
        check_classes(_tiny.config(**named), _tiny.config(**turned))
    with pytest.raises(ValueError, match="the student has 2 classes, the teacher 3"):
        check_classes(_tiny.config(), _tiny.config(num_labels=3))
    check_classes(_tiny.config(), _tiny.config(**turned))  # placeholder names are not compared
    check_classes(_tiny.config(**named), _tiny.config(**named))


# -- prediction ----------------------------------------------------------------------------------------------


def test_cached_teacher_logits_need_no_teacher(tmp_path: Path) -> None:
    rows, teacher = _tiny.dataset(), _tiny.classifier(4, 24)
    collate = PaddingCollator(_tiny.tokenizer())
    with torch.no_grad():
        logits = [teacher(**collate([row])).logits[0].tolist() for row in rows]
    results = []
    for cached in (False, True):
        run = trainer(
            tmp_path,
            _tiny.classifier(),
            None if cached else teacher,
            rows=rows.add_column("teacher_logits", logits) if cached else rows,
            objective={"terms": ("prediction",)},
        )
        run.train()
        results.append(losses(run, "prediction"))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_language_model_learns_the_distribution_of_every_next_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = LlamaForCausalLM(_tiny.config("llama", 2, 16)), LlamaForCausalLM(_tiny.config("llama", 4)).eval()
    rows = _tiny.dataset().remove_columns("labels")
    run = trainer(tmp_path, student, teacher, rows=rows, objective={"terms": ("prediction",)}, eval_dataset=rows)
    total, tokens = 0.0, 0
    for row in rows:  # one by one, so that nothing is padded
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            soft = -(teacher(ids).logits.softmax(-1) * student(ids).logits.log_softmax(-1)).sum(-1)[:, :-1]
        total, tokens = total + soft.sum().item(), tokens + soft.numel()
    run.args.per_device_eval_batch_size = len(rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    run.train()
    assert run.evaluate()["eval_loss"] < total / tokens


def test_regression_trains_on_gold_scores_without_a_teacher(tmp_path: Path) -> None:
    rows = _tiny.dataset(classes=1).rename_column("labels", "label")
    run = trainer(
        tmp_path,
        _tiny.classifier(num_labels=1),
        None,
        rows=rows,
        objective={"terms": ("prediction",)},
        max_steps=10,
        learning_rate=1e-2,
    )
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_evaluation_gives_the_distillation_loss_and_the_students_logits(tmp_path: Path) -> None:
    rows, seen = _tiny.dataset(10), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    student, teacher = _tiny.classifier(), _tiny.classifier(4, 24)
    for teach in (teacher, None):
        run = trainer(
            tmp_path,
            student,
            teach,
            eval_dataset=rows,
            compute_metrics=metrics,
            objective={"terms": ("prediction",)},
            per_device_eval_batch_size=4,
        )
        found = run.evaluate()
        assert ("eval_loss" in found) is (teach is not None)
        assert found["eval_rows"] == 10
    with torch.no_grad():
        first = student(torch.tensor([rows[0]["input_ids"]])).logits
    for prediction in seen:
        assert error(torch.tensor(prediction.predictions[:1]), first) < 1e-5
        assert prediction.label_ids.tolist() == rows["labels"]
    inner = trainer(tmp_path, student, teacher, eval_dataset=rows).evaluate()
    assert inner["eval_loss"] > 0


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_student_with_its_projections(tmp_path: Path) -> None:
    student = _tiny.classifier()
    run = trainer(tmp_path, student, _tiny.classifier(4, 24), save_strategy="steps", save_steps=3)
    run.train()
    folder = tmp_path / "checkpoint-3"
    plain = AutoModel.from_pretrained(folder)
    for name, p in plain.named_parameters():
        assert torch.equal(p, student.bert.get_parameter(name)), name
    assert len(AutoTokenizer.from_pretrained(folder)) == 60
    again = Objective(student.config, run.teacher.config)
    again.load_projections(folder)
    assert torch.equal(again.projections["shared"].weight, run.objective.projections["shared"].weight)
    assert (folder / "objective.json").is_file()
    assert not list(folder.glob("training_args.bin"))  # a pickle that nobody needs


def test_tied_weights_are_still_tied_after_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = BertForMaskedLM(_tiny.config(layers=2, width=16)), BertForMaskedLM(_tiny.config(layers=4))
    run = trainer(tmp_path, student, teacher, objective={"terms": ("hidden", "prediction")})
    run.train()
    run.save_model(str(tmp_path / "out"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert torch.equal(again.cls.predictions.decoder.weight, student.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("projection", ["shared", "per_layer"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, projection: str) -> None:
    teacher, ends, logs = _tiny.classifier(4, 24, seed=1), [], []
    for resume in (False, True):
        options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
        student = _tiny.classifier(seed=2 if resume else 0)  # other weights, which the checkpoint must replace
        run = trainer(tmp_path, student, teacher, objective={"projection": projection}, **options)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        ends.append(weights(run.model))
        logs.append([losses(run, name)[3:] for name in ("loss", *INNER_TERMS)])
    for name, p in ends[0].items():
        assert torch.equal(ends[1][name], p), name
    assert logs[0] == logs[1]


def test_resuming_from_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer(tmp_path, _tiny.classifier(), _tiny.classifier(4, 24)).train(resume_from_checkpoint="nowhere")


def test_the_best_student_is_loaded_at_the_end(tmp_path: Path) -> None:
    student = _tiny.classifier()
    run = trainer(
        tmp_path,
        student,
        _tiny.classifier(4, 24),
        eval_dataset=_tiny.dataset(8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=10.0,  # so that the first step is the best
    )
    run.train()
    assert run.state.best_global_step == 1
    first = AutoModel.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, first.embeddings.word_embeddings.weight)


# -- precision, recomputation, processes ---------------------------------------------------------------------


def test_bfloat16_autocast_follows_float32(tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        run = trainer(tmp_path, _tiny.classifier(**NO_DROPOUT), _tiny.classifier(4, 24), bf16=bf16)
        run.train()
        assert run.student.dtype == torch.float32
        found.append(losses(run))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        student = _tiny.classifier(**NO_DROPOUT)
        run = trainer(tmp_path, student, _tiny.classifier(4, 24), activation_checkpointing=checkpointing)
        run.train()
        assert student.is_gradient_checkpointing is checkpointing
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def _one_step(folder: Path, objective: dict[str, Any], **arguments: Any) -> dict[str, Tensor]:
    """Returns the losses of one SGD step on the same 8 rows and its change of each weight, which is the gradient."""
    student, teacher = _tiny.classifier(**NO_DROPOUT), _tiny.classifier(layers=4, width=24, seed=1)
    run = trainer(
        folder,
        student,
        teacher,
        rows=_tiny.dataset(8),
        objective=objective,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        max_steps=1,
        **arguments,
    )
    torch.manual_seed(5)
    for p in run.objective.parameters():
        nn.init.normal_(p, std=0.1)
    before = copy.deepcopy(weights(run.model))
    run.train()
    return {
        **{name: p - before[name] for name, p in weights(run.model).items()},
        **{name: torch.tensor(losses(run, name)) for name in ("loss", *objective["terms"])},
    }


def _enter(rank: int, port: int) -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})


def _trainer_rank(rank: int, port: int, folder: Path, objective: dict[str, Any]) -> None:
    _enter(rank, port)
    step = _one_step(folder, objective, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert torch.distributed.get_world_size() == 2
    torch.save(step, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _gradients(batch: dict[str, Tensor], rank: int | None = None) -> dict[str, Tensor]:
    """Returns the gradients of the inner terms on `batch`, or with FSDP2 on `rank`'s half of it if a rank is given."""
    torch.manual_seed(0)
    student, teacher = _tiny.classifier(**NO_DROPOUT), _tiny.classifier(layers=4, width=24, seed=1)
    model = DistillationModel(student, Objective(student.config, teacher.config)).train()
    num_items = model.objective.count(batch)
    if rank is not None:
        batch = {name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}
        for layer in student.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    with capturable(student, teacher):
        with torch.no_grad():
            states = capture(teacher.base_model, batch, hidden=[0, 2, 4], attention=[2, 4])
        loss = model(teacher=states, num_items=num_items, **batch)["loss"]
        (loss if rank is None else 2 * loss).backward()  # FSDP2 averages over the two ranks
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found if rank is None else {name: gradient.full_tensor() for name, gradient in found.items()}


def _sharded_rank(rank: int, port: int, folder: Path, batch: dict[str, Tensor]) -> None:
    _enter(rank, port)
    torch.distributed.init_process_group("gloo")
    torch.save(_gradients(batch, rank), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def two_processes(function: Any, folder: Path, *args: Any) -> list[dict[str, Tensor]]:
    """Runs `function` on two gloo ranks and returns what each wrote to `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(function, (port, folder, *args), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    moved = [name for name, x in expected.items() if x.abs().max() > 1e-6]
    assert len(moved) > 10
    for name in moved:
        assert error(found[name], expected[name]) < 1e-4, name


@pytest.mark.parametrize("terms", [INNER_TERMS, ("attention",), ("prediction",)])
def test_two_processes_take_the_step_of_one(tmp_path: Path, terms: tuple[str, ...]) -> None:
    objective = {"terms": terms}
    expected = _one_step(tmp_path / "one", objective, per_device_train_batch_size=8)
    for found in two_processes(_trainer_rank, tmp_path, objective):
        assert_same_step(found, expected)


def test_sharded_student_and_projections_get_the_gradients_of_one_process(tmp_path: Path) -> None:
    batch = {name: x[[0, 1, 2, 1]] for name, x in _tiny.batch().items()}
    expected = _gradients(batch)
    for found in two_processes(_sharded_rank, tmp_path, batch):
        assert_same_step(found, expected)


def test_full_masks_are_left_out_of_a_batch() -> None:
    collate = PaddingCollator(_tiny.tokenizer())
    rows = [
        {"input_ids": [2, 5, 3], "teacher_logits": [0.5, -1.0]},
        {"input_ids": [2, 5, 6, 3], "teacher_logits": [0.0, 1.0]},
    ]
    padded = collate([dict(row) for row in rows])
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded["teacher_logits"].dtype == torch.float32
    assert "attention_mask" not in collate([dict(rows[0]), dict(rows[0])])
