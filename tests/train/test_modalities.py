"""Tests students and teachers of images and sound in the trainer, against formulas computed row by row without padding.

The formulas run in float64, as do the models here; a scalar or two of the trainer is float32.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BaseImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    HubertConfig,
    HubertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SEWConfig,
    SEWForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Processor,
    WavLMConfig,
    WavLMForSequenceClassification,
)

from fastdistill.train.cache import write_cache
from fastdistill.train.data import add_teacher_logits
from fastdistill.train.objective import Objective
from fastdistill.train.stages import GeneralStage, IntermediateStage, PredictionStage
from fastdistill.train.students import build_student
from fastdistill.train.trainer import DistillationTrainer

CLASSES = 3
IMAGES = {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Two convolutions: 11 samples make the first frame, each further 8 samples one more.
SOUND = {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [4, 2], "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "vocab_size": 7, "classifier_proj_size": 12,
         "layerdrop": 0.0, "mask_time_prob": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
         "feat_proj_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0}  # fmt: skip
SPECTRA = {"num_mel_bins": 12, "max_length": 20, "patch_size": 4, "time_stride": 4, "frequency_stride": 4,
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit": (ViTForImageClassification, ViTConfig, IMAGES),
    "deit": (DeiTForImageClassification, DeiTConfig, IMAGES),
    "beit": (BeitForImageClassification, BeitConfig, {**IMAGES, "drop_path_rate": 0.0}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, IMAGES),
    "ast": (ASTForAudioClassification, ASTConfig, SPECTRA),
    "wav2vec2": (Wav2Vec2ForSequenceClassification, Wav2Vec2Config, SOUND),
    "ctc": (Wav2Vec2ForCTC, Wav2Vec2Config, SOUND),
    "hubert": (HubertForSequenceClassification, HubertConfig, SOUND),
    "wavlm": (WavLMForSequenceClassification, WavLMConfig, SOUND),
    "sew": (SEWForSequenceClassification, SEWConfig, {**SOUND, "squeeze_factor": 2}),
}
LAYER_MAP = {0: 0, 1: 2, 2: 4}  # "uniform", of 2 layers and 4


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def model(family: str, layers: int, width: int, seed: int, **options: Any) -> PreTrainedModel:
    kind, config, special = MODELS[family]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(seed)
    found = kind(config(**{**sizes, **special, "num_labels": CLASSES, "initializer_range": 0.3, **options}))
    return found.double().eval()


def pair(family: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    return model(family, 2, 16, 0, **options), model(family, 4, 24, 1)


def dataset(family: str, rows: int = 4) -> Dataset:
    """Returns random images (3, 16, 16), spectra (20, 12) or sound of different lengths, with labels of rows."""
    draw = np.random.default_rng(0)
    labels = [i % CLASSES for i in range(rows)]
    if family == "ast":
        return Dataset.from_dict({"input_values": draw.normal(size=(rows, 20, 12)), "labels": labels})
    if "image_size" in MODELS[family][2]:
        return Dataset.from_dict({"pixel_values": draw.normal(size=(rows, 3, 16, 16)), "labels": labels})
    sound = [draw.normal(size=60 + 23 * ((5 * i) % 7)) for i in range(rows)]  # 7 to 24 frames
    if family == "ctc":
        return Dataset.from_dict({"input_values": sound})
    return Dataset.from_dict({"input_values": sound, "labels": labels})


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads sound with numbers that would be noticed if they counted. Floats stay float64."""
    features = [{name: torch.from_numpy(np.asarray(x)) for name, x in row.items()} for row in features]
    batch = {name: [row[name] for row in features] for name in features[0]}
    if "input_values" in batch and batch["input_values"][0].dim() == 1:
        lengths = torch.tensor([len(x) for x in batch["input_values"]])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.nn.utils.rnn.pad_sequence(batch.pop("input_values"), batch_first=True, padding_value=5.0)
        return {"input_values": padded, "attention_mask": mask.long(), **stacked(batch)}
    return stacked(batch)


def stacked(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.stack(x) for name, x in batch.items()}


def trainer(
    folder: Path, student: PreTrainedModel, teacher: PreTrainedModel | None, rows: Dataset,
    objective: dict[str, Any] | None = None, **arguments: Any,
) -> DistillationTrainer:  # fmt: skip
    own = {name: arguments.pop(name) for name in ("processing_class", "data_collator") if name in arguments}
    options = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "max_steps": 1,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8, "logging_steps": 1, "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no",
    }  # fmt: skip
    found = DistillationTrainer(
        student, teacher, Objective(student.config, None if teacher is None else teacher.config, **(objective or {})),
        TrainingArguments(**{**options, **arguments}), train_dataset=rows, eval_dataset=rows,
        **{"data_collator": collate, **own},
    )  # fmt: skip
    torch.manual_seed(5)
    for p in found.objective.double().parameters():
        nn.init.normal_(p, std=0.1)
    return found


# -- the formulas, row by row ------------------------------------------------------------------------------------


def internals(model: PreTrainedModel, row: dict[str, Any]) -> tuple[Any, list[dict[str, Tensor]]]:
    """Returns a model's own outputs for one row, and the vectors (L, d) of each attention layer, if they are called."""
    layers: list[dict[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name == "q":
                layers.append({})
            layers[-1][name] = output[0]

        return hook

    hooks = [
        module.register_forward_hook(keep(name[-6]))
        for name, module in model.named_modules()
        if name.endswith((".q_proj", ".k_proj", ".v_proj"))
    ]
    (name,) = {"pixel_values", "input_values"} & row.keys()
    outputs = model(**{name: torch.tensor(row[name], dtype=torch.float64)[None]}, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return outputs, layers


def heads(x: Tensor, number: int) -> Tensor:  # (L, d) -> (number, L, d / number)
    return x.unflatten(1, (number, -1)).transpose(0, 1)


def formula(
    student: PreTrainedModel, teacher: PreTrainedModel, projection: nn.Linear, rows: Dataset, alpha: float = 1.0
) -> dict[str, Tensor]:
    """Returns each term's loss of the rows together. Frames, pairs of them, and rows weigh the same in their means."""
    sums: dict[str, Any] = dict.fromkeys(("embedding", "hidden", "attention", "prediction"), 0.0)
    relations, states, pairs, items = torch.zeros(3, dtype=torch.float64), 0, 0, 0
    for row in rows:
        (found, layers), (target, theirs) = internals(student, row), internals(teacher, row)
        for i, j in LAYER_MAP.items():
            difference = projection(found.hidden_states[i][0]) - target.hidden_states[j][0].detach()
            sums["hidden" if i else "embedding"] += difference.square().mean(-1).sum()
            if i and layers:
                scores = [
                    heads(x["q"], 4) @ heads(x["k"], 4).mT * (x["q"].shape[1] // 4) ** -0.5
                    for x in (layers[i - 1], theirs[j - 1])
                ]
                sums["attention"] += (scores[0] - scores[1].detach()).square().sum() / 4
        for place, name in enumerate("qkv" if layers else ""):
            mine, other = (
                (heads(x[-1][name], 2) @ heads(x[-1][name], 2).mT * (x[-1][name].shape[1] // 2) ** -0.5).log_softmax(-1)
                for x in (layers, theirs)
            )
            kl = other.detach().exp() * (other.detach() - mine)
            relations = relations + kl.sum() / 2 * torch.eye(3, dtype=torch.float64)[place]
        length = found.hidden_states[0].shape[1]
        states, pairs = states + length, pairs + length**2
        z_s, z_t = (x.logits.reshape(-1, x.logits.shape[-1]) for x in (found, target))
        sums["prediction"] -= alpha * (z_t.detach().softmax(-1) * z_s.log_softmax(-1)).sum()
        if alpha < 1:
            sums["prediction"] -= (1 - alpha) * z_s.log_softmax(-1)[0, row["labels"]]
        items += len(z_s)
    counts = {"embedding": states, "hidden": states, "attention": pairs, "prediction": items}
    of_relations = dict(zip(("query_relation", "key_relation", "value_relation"), relations / states, strict=True))
    return {name: sums[name] / count for name, count in counts.items()} | of_relations


TINYBERT = {"terms": ("embedding", "hidden", "attention", "prediction")}
MINILM = {"method": "minilmv2", "relation_heads": 2}
SMALL_STEPS = [
    ("vit", {**TINYBERT, "alpha": 0.25}),
    ("vit", MINILM),
    ("deit", {**TINYBERT}),
    ("beit", {**TINYBERT}),
    ("dinov2", {**TINYBERT}),
    ("ast", {**TINYBERT, "alpha": 0.25}),
    ("wav2vec2", {**TINYBERT, "alpha": 0.25}),
    ("wav2vec2", MINILM),
    ("ctc", {**TINYBERT}),
    ("hubert", {"terms": ("embedding", "hidden", "prediction")}),
    ("wavlm", {"terms": ("embedding", "hidden", "prediction")}),
]


@pytest.mark.parametrize(("family", "objective"), SMALL_STEPS, ids=[f"{a}-{len(b)}" for a, b in SMALL_STEPS])
def test_two_micro_batches_take_the_step_of_the_formula(tmp_path: Path, family: str, objective: dict[str, Any]) -> None:
    student, teacher = pair(family)
    rows = dataset(family)
    run = trainer(tmp_path, student, teacher, rows, objective, gradient_accumulation_steps=2)
    projection = run.objective.projections["shared"] if len(run.objective.projections) else nn.Linear(16, 24).double()
    expected = formula(student, teacher, projection, rows, objective.get("alpha", 1.0))
    expected = {name: expected[name] for name in run.objective.terms}
    learned = dict(run.model.named_parameters())
    gradients = torch.autograd.grad(
        torch.stack(list(expected.values())).sum(), list(learned.values()), allow_unused=True
    )
    before = {name: p.detach().clone() for name, p in learned.items()}

    loss = run.evaluate()["eval_loss"]
    assert loss == pytest.approx(sum(expected.values()).item(), rel=1e-6)
    run.train()
    for name, value in expected.items():
        logged = next(entry[name] for entry in run.state.log_history if name in entry)
        assert logged == pytest.approx(value.item(), rel=1e-6), name
    for (name, p), gradient in zip(run.model.named_parameters(), gradients, strict=True):
        step = before[name] - p.detach()
        if gradient is None:
            assert not step.any(), name
        else:
            assert (step - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


def _one_step(rank: int, port: int, folder: Path, family: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    run = trainer(folder, *pair(family), dataset(family), TINYBERT, per_device_train_batch_size=2)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert torch.distributed.get_world_size() == 2
    torch.save({name: before[name] - p.detach() for name, p in run.model.named_parameters()}, folder / f"{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_two_processes_take_the_step_of_the_formula(tmp_path: Path, family: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_one_step, (port, tmp_path, family), nprocs=2, start_method="fork")
    (student, teacher), rows = pair(family), dataset(family)
    run = trainer(tmp_path, student, teacher, rows, TINYBERT)
    loss = sum(formula(student, teacher, run.objective.projections["shared"], rows)[name] for name in TINYBERT["terms"])
    learned = dict(run.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    for rank in range(2):
        steps = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (name, step), gradient in zip(steps.items(), gradients, strict=True):
            expected = torch.zeros_like(step) if gradient is None else gradient
            assert (step - expected).norm() <= 1e-9 * expected.norm() + 1e-12, name


# -- the trainer around them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_a_resumed_run_ends_as_the_whole_run(tmp_path: Path, family: str) -> None:
    ends = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        options = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
        steps = (4,) if name == "whole" else (2, 4)
        for most in steps:
            student, teacher = pair(family)
            run = trainer(folder, student, teacher, dataset(family, 8), TINYBERT, max_steps=most, **options)
            run.train(resume_from_checkpoint=most == 4 and name == "resumed")
        ends.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name]), name
    again = type(student).from_pretrained(folder / "checkpoint-4", dtype=torch.float64)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), student.parameters(), strict=True))


class ImageProcessor(BaseImageProcessor):
    """Stands for any family's: those of transformers need torchvision or Pillow."""

    model_input_names = ["pixel_values"]  # noqa: RUF012


def test_default_collators_stack_images_and_pad_sound(tmp_path: Path) -> None:
    for family, processor in (("vit", ImageProcessor()), ("wav2vec2", Wav2Vec2FeatureExtractor())):
        processor.return_attention_mask = True
        rows = dataset(family, 3)
        student, teacher = (each.float() for each in pair(family))
        run = trainer(tmp_path, student, teacher, rows, TINYBERT, processing_class=processor, data_collator=None)
        batch = run.data_collator([rows[i] for i in range(3)])
        assert batch["labels"].tolist() == [0, 1, 2]
        if family == "vit":
            assert torch.equal(batch["pixel_values"], torch.tensor(rows["pixel_values"][:]))
        else:
            assert batch["attention_mask"].sum(1).tolist() == [len(x) for x in rows["input_values"]]
            assert batch["input_values"].shape == batch["attention_mask"].shape
        run.objective.float()
        run.train()


def test_stages_take_images_and_sound_with_the_teachers_logits(tmp_path: Path) -> None:
    for family, processor in (("vit", ImageProcessor()), ("wav2vec2", Wav2Vec2FeatureExtractor())):
        processor.return_attention_mask = True
        student, teacher = (each.float() for each in pair(family))
        rows = add_teacher_logits(dataset(family), teacher, processor, batch_size=3)
        with torch.no_grad():
            expected = torch.cat([internals(teacher.double(), row)[0].logits for row in rows])
        found = torch.tensor(rows["teacher_logits"][:], dtype=torch.float64)
        assert (found - expected).norm() < 1e-5 * expected.norm()
        quick = {
            "batch_size": 2,
            "epochs": 1,
            "arguments": {"use_cpu": True, "disable_tqdm": True, "report_to": "none"},
        }
        teacher.float()
        folder = tmp_path / family
        student = IntermediateStage(dataset=rows, **quick).run(student, teacher, processor, folder / "inner")
        before = [p.clone() for p in student.parameters()]
        student = PredictionStage(dataset=rows, **quick).run(student, None, processor, folder / "student")
        assert any(not torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))
        assert (folder / "student" / "preprocessor_config.json").is_file()
        PredictionStage(dataset=rows, **quick).run(student, None, processor, folder / "student", resume=True)


def test_sound_without_a_mask_counts_every_frame(tmp_path: Path) -> None:
    """As for models whose feature extractor gives no mask; all rows have one length here."""
    rows = dataset("wav2vec2").map(lambda row: {"input_values": row["input_values"][:60]})
    losses = []
    for mask in (False, True):
        student, teacher = pair("wav2vec2")

        def one_length(features: list[dict[str, Any]], mask: bool = mask) -> dict[str, Tensor]:
            return {name: x for name, x in collate(features).items() if mask or name != "attention_mask"}

        run = trainer(
            tmp_path, student, teacher, rows, TINYBERT, data_collator=one_length, gradient_accumulation_steps=2
        )
        run.train()
        losses.append([run.state.log_history[0][name] for name in TINYBERT["terms"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_images_of_different_sizes_weigh_the_same(tmp_path: Path) -> None:
    student, teacher = pair("dinov2")  # which interpolates its positions
    rows = Dataset.from_list([*dataset("dinov2", 2), {"pixel_values": np.ones((3, 24, 20)).tolist(), "labels": 1}])
    how = {"terms": ("hidden", "attention")}
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    run = trainer(tmp_path, student, teacher, rows, how, **accumulated)
    each = [formula(student, teacher, run.objective.projections["shared"], [row]) for row in rows]
    run.train()
    for name in how["terms"]:
        mean = sum(found[name].item() for found in each) / 3
        assert run.state.log_history[0][name] == pytest.approx(mean, rel=1e-6), name


# -- what is refused, before the first step ----------------------------------------------------------------------


def swin() -> PreTrainedModel:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    return SwinForImageClassification(SwinConfig(**sizes, window_size=2, num_labels=CLASSES)).double().eval()


def resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": CLASSES}
    return ResNetForImageClassification(ResNetConfig(**sizes)).double().eval()


def masked_images() -> PreTrainedModel:
    config = BeitConfig(**IMAGES, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16)
    return BeitForMaskedImageModeling(config).double().eval()


REFUSED: dict[str, tuple[Any, Any, str, dict[str, Any], str]] = {
    "stages of different widths": (swin, swin, "vit", {"terms": ("hidden",)}, "SwinConfig, describes stages.*such as"),
    "another number of tokens": (
        lambda: pair("vit")[0], lambda: pair("deit")[1], "vit", {"terms": ("hidden",)}, "17 states.*teacher 18.*patch",
    ),
    "the same in attention": (
        lambda: pair("vit")[0], lambda: pair("deit")[1], "vit", {"method": "minilm"}, "17 states.*teacher 18",
    ),
    "joined frames": (
        lambda: pair("sew")[0], lambda: pair("sew")[1], "sew", {"terms": ("hidden",)}, "mask is for.*SEW.*prediction",
    ),
    "other inputs": (
        lambda: pair("vit")[0], lambda: pair("wav2vec2")[1], "vit", {"terms": ("prediction",)},
        "student reads pixel_values, the teacher input_values",
    ),
    "labels of CTC": (
        lambda: pair("ctc")[0], lambda: pair("ctc")[1], "ctc", {"terms": ("prediction",), "alpha": 0.5},
        "transcripts.*leave alpha at 1.0",
    ),
    "other letters": (
        lambda: pair("ctc", vocab_size=9)[0], lambda: pair("ctc")[1], "ctc", {"terms": ("prediction",)}, "9 letters",
    ),
    "an adapter under CTC": (
        lambda: pair("ctc", add_adapter=True, num_adapter_layers=1)[0],
        lambda: model("ctc", 4, 24, 1, add_adapter=True, num_adapter_layers=1),
        "ctc", {"terms": ("prediction",)}, "add_adapter is True",
    ),
    "skipped layers": (
        lambda: pair("wav2vec2", layerdrop=0.1)[0], lambda: pair("wav2vec2")[1], "wav2vec2", {"terms": ("hidden",)},
        "layerdrop is 0.1.*layerdrop=0.0",
    ),
    "a prediction for each patch": (
        masked_images, masked_images, "vit", {"terms": ("prediction",)}, "classifier of whole images",
    ),
    "attention that cannot be captured": (
        lambda: pair("hubert")[0], lambda: pair("hubert")[1], "hubert", {"terms": ("attention",)},
        "distil it without the attention term",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_that_would_be_wrong_is_refused(tmp_path: Path, what: str) -> None:
    make_student, make_teacher, family, objective, message = REFUSED[what]
    student, teacher = make_student(), make_teacher()
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, student, teacher, dataset(family), objective).train()
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))


def test_the_ways_out_that_errors_name_work(tmp_path: Path) -> None:
    """Prediction alone, for models of which inner terms are refused; and with layerdrop."""
    cases = [
        (swin(), pair("vit")[1], "vit"),
        (resnet(), swin(), "vit"),
        (pair("vit")[0], pair("deit")[1], "vit"),
        (*pair("sew"), "sew"),
        (pair("wav2vec2", layerdrop=0.5)[0], pair("wav2vec2")[1], "wav2vec2"),
    ]
    for student, teacher, family in cases:
        run = trainer(tmp_path, student, teacher, dataset(family), {"terms": ("prediction",)})
        with torch.no_grad():
            batch = {name: x for name, x in collate(list(dataset(family))).items() if name != "labels"}
            z_s, z_t = (each(**batch).logits for each in (student, teacher))
        expected = -(z_t.softmax(-1) * z_s.log_softmax(-1)).sum(-1).mean().item()
        assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
        run.train()


def test_what_reads_text_alone_says_so(tmp_path: Path) -> None:
    _, teacher = pair("vit")
    with pytest.raises(ValueError, match="reads pixel_values; a cache holds rows of input_ids"):
        write_cache(dataset("vit"), teacher, None, tmp_path / "cache", hidden=[0])
    assert not list(tmp_path.iterdir())
    (tmp_path / "student.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(ValueError, match="teacher is a ViTForImageClassification; build_student knows"):
        build_student(tmp_path / "student.json", teacher)
    with pytest.raises(ValueError, match=r"columns \['pixel_values', 'labels'\]; it should have 'text'"):
        GeneralStage(corpus=dataset("vit")).run(teacher, teacher, None, tmp_path / "general")
    processor = Wav2Vec2Processor.__new__(Wav2Vec2Processor)  # of a feature extractor and a tokenizer
    with pytest.raises(ValueError, match=r"Wav2Vec2Processor.*pass a data_collator"):
        trainer(tmp_path, *pair("ctc"), dataset("ctc"), TINYBERT, processing_class=processor, data_collator=None)
