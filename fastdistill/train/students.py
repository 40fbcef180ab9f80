"""Makes students from a preset, a config file or a checkpoint, with random weights or weights from the teacher.

TinyBERT's students start from a general distillation on Wikipedia, which is costly to repeat for another teacher.
`init_from_teacher` gives a smaller BERT-like student a start within seconds.
"""

from __future__ import annotations

import copy
import inspect
import logging
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.bert.modeling_bert import BertLayer

from fastdistill.train.checks import check_tokens, check_vocabularies, tokenizer_of
from fastdistill.train.heads import is_peft
from fastdistill.train.inputs import ENCODER_DECODER, forward_arguments, refuse_encoder_decoder
from fastdistill.train.objective import Objective, resolve_layer_map
from fastdistill.train.published import is_published, load_published
from fastdistill.train.reading import WEIGHTS, check_finite, read_json, reading

__all__ = ["PRESETS", "build_student", "count_parameters", "init_from_teacher", "measure_seconds", "save_projections"]

logger = logging.getLogger(__name__)

# From arXiv 1909.10351, section 4.1. The teacher's config gives the rest: vocabulary, positions, dropout, labels.
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
PRESETS: dict[str, dict[str, int]] = {
    "tinybert-4l-312": dict(zip(SIZES, (4, 312, 1200, 12), strict=True)),
    "tinybert-6l-768": dict(zip(SIZES, (6, 768, 3072, 12), strict=True)),
}
AUTO_CLASSES = {
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}
LABEL_OPTIONS = ("num_labels", "id2label", "label2id", "problem_type")
LABELLED = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
RIDGE = 0.01


def build_student(
    spec: str | Path,
    teacher: PreTrainedModel,
    *,
    init: str | None = None,
    layer_map: str | Sequence[int | None] = "uniform",
    calibration: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
) -> PreTrainedModel:
    """Makes a student with the teacher's kind of head, vocabulary and labels (names and order).

    Args:
        spec: a preset (`tinybert-4l-312`, `tinybert-6l-768`); a JSON file, either a whole transformers config (with
            `model_type`) or only what differs from the teacher's config ({"num_hidden_layers": 4, ...}); or a
            checkpoint, as a folder (a published TinyBERT's too: `fastdistill.train.published`) or a name on the Hugging
            Face hub.
        init: "random", or "teacher" (`init_from_teacher`, with `layer_map` and `calibration`), the default for a
            preset or a config. A checkpoint brings its own weights and takes None only; its classifier is made anew if
            the teacher has another number of labels.
        trust_remote_code: run the model code that a checkpoint brings along.
        tokenizer: the teacher's; with it the two vocabularies may be padded to different sizes. A checkpoint's tokens
            are compared with it, or else with those that lie beside the teacher.

    Returns a float32 model in eval mode, on the CPU. Raises OSError for a folder without a model or an unknown name.
    """
    refuse_encoder_decoder(teacher=teacher)
    if is_peft(teacher):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}; a student is made from the weights and the config of a whole "
            "model: call teacher.merge_and_unload() first"
        )
    if init not in (None, "random", "teacher"):
        raise ValueError(f"init is {init!r}; it should be 'random' or 'teacher'")
    kind = auto_name(teacher)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if kind in LABELLED:
        options |= {name: getattr(teacher.config, name) for name in LABEL_OPTIONS}
    if is_config(spec):
        config = read_config(spec, teacher, **options)
        check_vocabularies(config, teacher.config, tokenizer)
        with reading(spec):
            if type(config) is type(teacher.config):
                student = type(teacher)(config).float()
            else:
                student = getattr(modeling_auto, kind).from_config(config, dtype=torch.float32)
        refuse_encoder_decoder(student=student)
        if init != "random":
            init_from_teacher(student, teacher, layer_map=layer_map, calibration=calibration)
    else:
        if init is not None:
            raise ValueError(f"init is {init!r}; a checkpoint ({spec}) brings its own weights")
        student = read_student(spec, kind, **options)
        check_vocabularies(student.config, teacher.config, tokenizer)
        ours = tokenizer_of(spec, local=False, trust_remote_code=trust_remote_code)
        check_tokens(ours, tokenizer or tokenizer_of(teacher.name_or_path), f"the tokenizer of {spec}", "the teacher's")
    return student.eval()


def read_student(spec: str | Path, kind: str, *, trust_remote_code: bool, **labels: Any) -> PreTrainedModel:
    """Reads a checkpoint as a model of the Auto class `kind`."""
    path = Path(spec)
    if path.is_symlink():
        path.stat()  # raises OSError for a link that leads nowhere: it is no name on the hub
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; it is not a transformers checkpoint")
    if is_published(path):
        return load_published(path, kind, relu=False, **labels)
    try:
        return load_checkpoint(getattr(modeling_auto, kind), spec, trust_remote_code=trust_remote_code, **labels)[0]
    except OSError as error:
        raise OSError(f"{spec}: no preset ({', '.join(PRESETS)}), no file, and no checkpoint: {error}") from error


def load_checkpoint(kind: Any, name: str | Path, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """Returns a checkpoint as a model of an Auto class, float32 by default, and the names of its random weights.

    Random weights are those that the checkpoint lacks, and a head's if `options` change its `num_labels`. Raises
    ValueError if weights of the encoder are missing, or if any other weight has another shape than the config says.
    """
    file = Path(name, "config.json")
    with reading(file if file.is_file() else name):
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=options.get("trust_remote_code", False))
    if config.is_encoder_decoder and config.model_type not in AUTO_CLASSES.get(kind.__name__, {}):
        raise ValueError(f"{name} is a {config.model_type}, {ENCODER_DECODER}")
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(is_no_load_report)
    try:
        # What is wrong where all weights can be read is in the config.
        with reading(file if file.is_file() else name, *WEIGHTS):
            model, loaded = kind.from_pretrained(
                str(name), output_loading_info=True, ignore_mismatched_sizes=True, **{"dtype": torch.float32, **options}
            )
    finally:
        report.removeFilter(is_no_load_report)
    refuse_encoder_decoder(**{str(name): model})
    prefix, kind_name, missing = f"{model.base_model_prefix}.", type(model).__name__, set(loaded["missing_keys"])
    if names := first_names(key for key in missing if model.base_model is model or key.startswith(prefix)):
        raise ValueError(f"{name}: its weights are no {kind_name}'s; there is no {names}")
    parts = {part for part, _ in model.base_model.named_children()}
    unused = (key for key in loaded["unexpected_keys"] if key.removeprefix(prefix).split(".")[0] in parts)
    if names := first_names(unused):
        logger.warning("%s holds weights that a %s of its config does not use: %s", name, kind_name, names)
    for key, found, expected in sorted(loaded["mismatched_keys"]):
        if "num_labels" not in options or key.startswith(prefix):
            raise ValueError(f"{name}: {key} is {tuple(found)}, and by its config {tuple(expected)}")
        missing.add(key)
    check_finite(name, model.named_parameters())
    return model, missing


def first_names(weights: Iterable[str]) -> str:
    """Lists up to three weights, without poolers and the buffers that older checkpoints hold."""
    names = sorted(name for name in weights if not any(part in name for part in ("pooler", "position_ids", "inv_freq")))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def is_no_load_report(record: logging.LogRecord) -> bool:
    """Filters out the table in which transformers warns of every weight that is missing, unused or of another shape.

    `load_checkpoint` raises or warns where it matters; the rest is a head that is new on purpose.
    """
    return "LOAD REPORT" not in (text := record.getMessage()) or "CONVERSION" in text  # an error refers to these


def is_config(spec: str | Path) -> bool:
    """Returns whether `spec` is a preset or a config file, which come without weights."""
    return str(spec) in PRESETS or Path(spec).is_file()


def read_config(spec: str | Path, teacher: PreTrainedModel, **options: Any) -> Any:
    """Returns the config that a preset or a JSON file describes, with the teacher's labels."""
    values = PRESETS.get(str(spec)) or read_json(spec)
    if "model_type" in values:
        with reading(spec):
            return AutoConfig.from_pretrained(str(spec), **options)
    config = copy.deepcopy(teacher.config)
    for name in values:
        if not hasattr(config, name):
            raise ValueError(f"{spec}: {name!r} is no setting of a {config.model_type} config")
    derived = derived_settings(teacher.config, values)
    try:
        for name, value in values.items():
            setattr(config, name, value)
        if derived:
            config = type(config).from_dict({name: x for name, x in config.to_dict().items() if name not in derived})
        if hasattr(config, "validate"):
            config.validate()
        has_layers = config.num_hidden_layers >= 1
    except Exception as error:  # huggingface_hub raises errors of its own kind
        raise ValueError(f"{spec}: {error}") from error
    if not has_layers:
        raise ValueError(f"{spec}: num_hidden_layers is {config.num_hidden_layers}; it should be 1 or more")
    config.dtype = torch.float32
    return config


def derived_settings(config: Any, changed: Collection[str]) -> set[str]:
    """Returns the settings that a family's config computes from those `changed`, and has to compute again."""
    derived = set()
    if "num_hidden_layers" in changed and getattr(config, "layer_types", None) is not None:
        derived.add("layer_types")  # full attention or a window, one name a layer
    is_resized = not {"hidden_size", "num_attention_heads"}.isdisjoint(changed)
    # A head_dim that differs from this quotient, as Qwen3's does, was chosen freely and stays.
    if is_resized and getattr(config, "head_dim", None) == config.hidden_size // config.num_attention_heads:
        derived.add("head_dim")
    return derived - set(changed)


def auto_name(model: PreTrainedModel) -> str:
    """Returns the name of the transformers Auto class that makes this kind of model (`AutoModel` without a head)."""
    for name, classes in AUTO_CLASSES.items():
        if type(model).__name__ == classes.get(model.config.model_type):
            return name
    known = ", ".join(AUTO_CLASSES)
    raise ValueError(f"teacher is a {type(model).__name__}; build_student knows what {known} make")


@torch.no_grad()
def init_from_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    layer_map: str | Sequence[int | None] = "uniform",
    calibration: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Initialises a BERT-like student (BERT, RoBERTa, ELECTRA) from its teacher's weights, in place.

    If width and FFN are equal, the mapped layers and everything beside the layers are copied. Otherwise the goal for
    the student's hidden states is the projection of the teacher's onto their first principal components over the
    calibration text. In the order of the forward pass, each linear map of the student is fitted by ridge regression
    from the student's inputs to the teacher's outputs. Queries and keys of a head are reduced to the student's head
    dimension by the truncated SVD of their scores, values by that of what they add to the output; the FFN keeps the
    neurons that add most. A head on top of the encoder stays random.

    Measured on a real BERT (6 layers, 384 wide) folded into 4 layers, 156 wide: before any training its hidden and
    attention losses are half those of a random student after 200 steps of general distillation.

    Args:
        layer_map: as in `fastdistill.train.objective.resolve_layer_map`. A layer mapped to None starts from a teacher
            layer evenly spaced between those of its neighbours.
        calibration: a batch `input_ids` (N, L), with `attention_mask` and whatever else the tokenizer returns: ten
            thousand tokens or more of the text to distil on. None: random tokens, which serve half as well.

    Returns the projection (d_teacher, d_student) from the student's hidden states to the teacher's, float32. It can
    initialise the projections of an `Objective` (`save_projections`).
    """
    source, target = teacher.base_model, student.base_model
    check_foldable(target, source)
    first, *places = fill_gaps(resolve_layer_map(layer_map, len(target.encoder.layer), len(source.encoder.layer)))
    places = [max(place, 1) for place in places]  # teacher layers, from 1
    d_t, d_s = source.config.hidden_size, target.config.hidden_size
    if d_s == d_t and target.config.intermediate_size == source.config.intermediate_size:
        copy_layers(student, teacher, places)
        return torch.eye(d_t)

    batch = calibration_batch(source, calibration, min(positions(student), positions(teacher)))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().cpu()  # (N, L)
    with eval_mode(source, target), decomposing(teacher):
        hidden, attended = teacher_states(source, batch, mask, [first, *places])
        projection = principal_projection([hidden[place] for place in (first, *places)], d_s)
        x = fold_embeddings(target, source, batch, mask, hidden[first] @ projection, projection)
        for layer, place in zip(target.encoder.layer, places, strict=True):
            theirs = copy.deepcopy(source.encoder.layer[place - 1]).float().cpu()
            states = hidden[place - 1], attended[place], hidden[place]
            x = fold_layer(layer, theirs, x, states, projection, mask)
    return projection


@contextmanager
def decomposing(teacher: PreTrainedModel) -> Iterator[None]:
    """Turns the failure of a decomposition into a ValueError: the teacher's states overflow, or are constant."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"init is 'teacher'; the hidden states of {teacher.name_or_path or 'the teacher'} cannot be decomposed "
            f"({error}): its weights may be damaged; copy them again, or use init='random'"
        ) from error


def calibration_batch(teacher: Any, calibration: Mapping[str, Tensor] | None, most: int) -> dict[str, Tensor]:
    """Returns the teacher's inputs on its device, cut to `most` tokens a row. Without a calibration they are random."""
    if calibration is None:
        length = min(128, teacher.config.max_position_embeddings // 2)
        calibration = {"input_ids": torch.randint(teacher.config.vocab_size, (8192 // length, length))}
    return {name: x[:, :most].to(teacher.device) for name, x in forward_arguments(teacher, calibration).items()}


def teacher_states(
    teacher: Any, batch: Mapping[str, Tensor], mask: Tensor, places: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Returns, by layer, the hidden states and the states between attention and FFN, (T, d) without padding."""
    attended: dict[int, Tensor] = {}

    def tokens(x: Tensor) -> Tensor:  # (N, L, d) -> (T, d)
        return x.float().cpu()[mask]

    hooks = [
        teacher.encoder.layer[place - 1].attention.output.register_forward_hook(
            lambda _module, _inputs, output, place=place: attended.update({place: tokens(output)})
        )
        for place in {*places} - {0}
    ]
    states = teacher(**batch, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return {i: tokens(states[i]) for place in places for i in {place, max(place - 1, 0)}}, attended


def save_projections(
    student: PreTrainedModel, teacher: PreTrainedModel, weight: Tensor, folder: str | Path, **options: Any
) -> None:
    """Writes what `init_from_teacher` returned, for a stage whose argument `projections` is this folder.

    `options` are the stage's options of `Objective`: `method`, `terms`, `layer_map`, `projection` and so on.
    """
    objective = Objective(student.config, teacher.config, **options)
    for linear in objective.projections.values():
        linear.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight))})
    objective.save(folder)


def check_foldable(student: Any, teacher: Any) -> None:
    """Raises ValueError if the student cannot start from the teacher's weights."""
    with torch.device("meta"):
        expected = dict(BertLayer(BertConfig()).named_parameters()).keys()
    for side, model in (("student", student), ("teacher", teacher)):
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if layers is None or any(dict(layer.named_parameters()).keys() != expected for layer in layers):
            raise ValueError(
                f"the {side} is a {type(model).__name__}, whose layers are not BERT's; init='teacher' folds BERT, "
                "RoBERTa and ELECTRA. Use init='random'"
            )
    if (family := student.config.model_type) != (other := teacher.config.model_type):
        raise ValueError(
            f"the student's model_type is {family!r}, the teacher's {other!r}; init='teacher' folds models of one "
            "family. Use init='random'"
        )
    equal = ["num_attention_heads"]
    if hasattr(student, "embeddings_project"):  # ELECTRA, whose embedding tables are copied
        equal.append("embedding_size")
    for name in (*equal, "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours > theirs or (ours != theirs and name in equal):
            raise ValueError(
                f"the student's {name} is {ours}; for init='teacher' it should be {'' if name in equal else 'at most '}"
                f"the teacher's {theirs}. Change it, or use init='random'"
            )


def fill_gaps(places: Sequence[int | None]) -> list[int]:
    """Returns a layer map in which layers evenly spaced between the mapped neighbours replace None."""
    known = {i: place for i, place in enumerate(places) if place is not None}
    if not known:
        raise ValueError("layer_map maps no layer; init='teacher' needs one")
    return np.interp(range(len(places)), [*known], [*known.values()]).round().astype(int).tolist()


def copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, places: Sequence[int]) -> None:
    """Copies the teacher's layers `places`, and every other parameter that fits."""
    for layer, place in zip(student.base_model.encoder.layer, places, strict=True):
        layer.load_state_dict(teacher.base_model.encoder.layer[place - 1].state_dict())
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if ".layer." not in name and name in theirs:
            x = theirs[name]
            if "embeddings." in name:
                x = x[: len(parameter)]  # the first positions and types
            if x.shape == parameter.shape:
                parameter.copy_(x)


def principal_projection(states: Sequence[Tensor], width: int) -> Tensor:
    """Returns orthonormal columns (d_t, width) that keep most of the states' energy, weighting states (T, d_t) alike.

    One direction of the student stays empty: the vector of equal entries, which LayerNorm would remove.
    """
    energy = torch.stack([x.T @ x / x.square().sum() for x in states]).double().sum(0)
    principal = torch.linalg.eigh(energy)[1].flip(1)  # (d_t, d_t), strongest first
    if width == len(principal):
        return torch.eye(width)
    start = torch.eye(width, dtype=torch.float64)
    start[:, 0] = 1
    rotation = torch.linalg.qr(start)[0][:, 1:]  # (width, width - 1), orthogonal to a vector of equal entries
    return (principal[:, : width - 1] @ rotation.T).float()


def fold_embeddings(
    student: Any, teacher: Any, batch: Mapping[str, Tensor], mask: Tensor, goal: Tensor, projection: Tensor
) -> Tensor:
    """Fits the student's embedding output to `goal` (T, d_s), and returns that output (T, d_s)."""
    ours, theirs = student.embeddings, copy.deepcopy(teacher.embeddings).float().cpu()
    names = inspect.signature(ours.forward).parameters
    inputs = {name: x.cpu() for name, x in batch.items() if name in names}
    if hasattr(student, "embeddings_project"):  # ELECTRA: tables of another width, then a Linear
        for name, table in theirs.named_parameters():
            mine = ours.get_parameter(name)
            mine.copy_(table[: len(mine)])
        x = ours(**inputs)[mask]
        set_linear(student.embeddings_project, solve(x, goal))
        return student.embeddings_project(x)
    narrow = projection
    if hasattr(teacher, "embeddings_project"):
        narrow = teacher.embeddings_project.weight.float().cpu().T @ projection
    scale = theirs.LayerNorm.weight / theirs.LayerNorm.weight.mean()
    for name, table in theirs.named_parameters():
        if not name.startswith("LayerNorm"):
            centred = table - table.mean(1, keepdim=True)  # the teacher's LayerNorm removes the mean
            mine = ours.get_parameter(name)
            mine.copy_((centred * scale @ narrow)[: len(mine)])  # the first positions and types
    norm, ours.LayerNorm = ours.LayerNorm, nn.Identity()
    x = ours(**inputs)[mask]
    ours.LayerNorm = norm
    return fit_norm(norm, x, goal)


def fold_layer(
    student: Any, teacher: Any, x: Tensor, states: tuple[Tensor, Tensor, Tensor], projection: Tensor, mask: Tensor
) -> Tensor:
    """Fits one layer and returns the student's output (T, d_s). `x` (T, d_s) is the student's input.

    `states` (T, d_t) are the teacher's before its layer, after the attention and after the FFN.
    """
    teacher_x, attended, output = states
    ours, theirs = student.attention.self, teacher.attention.self
    heads, d, d_t = ours.num_attention_heads, ours.attention_head_size, theirs.attention_head_size
    # The teacher's queries, keys and values, as far as they are linear in the student's input.
    fits = {name: solve(x, getattr(theirs, name)(teacher_x)) for name in ("query", "key", "value")}
    query, key, value = (F.pad(x, (0, 1), value=1.0) @ fit.float() for fit in fits.values())  # (T, H * d_t)
    to_student = projection.T @ teacher.attention.output.dense.weight  # (d_s, H * d_t)
    for head in range(heads):
        wide, narrow = slice(head * d_t, (head + 1) * d_t), slice(head * d, (head + 1) * d)
        query_root, query_inverse = roots(query[:, wide])
        key_root, key_inverse = roots(key[:, wide])
        value_root, value_inverse = roots(value[:, wide] - value[:, wide].mean(0))
        u, s, v = torch.linalg.svd(query_root @ key_root)  # the scores of whitened queries and keys
        scale = s[:d].sqrt() * (d / d_t) ** 0.25  # the student divides its scores by sqrt(d)
        strongest = torch.linalg.svd(to_student[:, wide].double() @ value_root)[2][:d]
        reductions = {  # (d_t, d)
            "query": query_inverse @ u[:, :d] * scale,
            "key": key_inverse @ v[:d].T * scale,
            "value": value_inverse @ strongest.T,
        }
        for name, reduction in reductions.items():
            set_linear(getattr(ours, name), fits[name][:, wide] @ reduction, narrow)

    padded = x.new_zeros(*mask.shape, x.shape[1])  # (N, L, d_s)
    padded[mask] = x
    query, key, value = (getattr(ours, name)(padded).unflatten(2, (heads, d)).transpose(1, 2) for name in fits)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])  # (N, H, L, d)
    context = context.transpose(1, 2).flatten(2)[mask]  # (T, H * d)
    x = fit_residual(student.attention.output, context, x, attended @ projection)

    before = teacher.intermediate.dense(attended)  # (T, FFN)
    strength = teacher.intermediate.intermediate_act_fn(before).square().mean(0).sqrt()
    strength = strength * (projection.T @ teacher.output.dense.weight).norm(dim=0)
    kept = strength.topk(student.intermediate.dense.out_features).indices
    set_linear(student.intermediate.dense, solve(x, before[:, kept]))
    return fit_residual(student.output, student.intermediate(x), x, output @ projection)


def fit_residual(block: Any, inputs: Tensor, residual: Tensor, goal: Tensor) -> Tensor:
    """Fits `LayerNorm(dense(inputs) + residual)` to `goal`, and returns its value."""
    set_linear(block.dense, solve(inputs, goal - residual))
    return fit_norm(block.LayerNorm, block.dense(inputs) + residual, goal)


def fit_norm(norm: nn.LayerNorm, inputs: Tensor, goal: Tensor) -> Tensor:
    """Fits scale and bias of each dimension by least squares, and returns the norm of `inputs`."""
    x = F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    x_mean, goal_mean = x.mean(0), goal.mean(0)
    covariance = ((x - x_mean) * (goal - goal_mean)).mean(0)
    norm.weight.copy_(covariance / x.var(0, correction=0).clamp_min(1e-12))
    norm.bias.copy_(goal_mean - norm.weight * x_mean)
    return norm(inputs)


def set_linear(linear: nn.Linear, solution: Tensor, rows: slice = slice(None)) -> None:
    linear.weight[rows] = solution[:-1].T.to(linear.weight)
    linear.bias[rows] = solution[-1].to(linear.bias)


def solve(inputs: Tensor, goal: Tensor) -> Tensor:
    """Solves a ridge regression with an intercept, which comes last: (T, a), (T, b) -> (a + 1, b), float64."""
    x = F.pad(inputs, (0, 1), value=1.0).double()
    gram = x.T @ x
    gram.diagonal()[:-1].add_(RIDGE * gram.diagonal()[:-1].mean())
    return torch.linalg.solve(gram, x.T @ goal.double())


def roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the symmetric square root of the second moment of x (T, d), and its inverse, (d, d) float64."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = values.clamp_min(values.max() * 1e-6 + 1e-30).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def positions(model: PreTrainedModel) -> int:
    """Returns how many tokens a model takes. RoBERTa's family counts positions from its padding index + 1."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [getattr(table, "padding_idx", None) for table in tables]
    first = max((0 if padding is None else padding + 1 for padding in paddings), default=0)
    return getattr(model.config, "max_position_embeddings", 10**9) - first


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Counts the `total` parameters, tied ones once, and those of the `encoder`: no embeddings, pooler or heads."""
    beside = ("embeddings", "pooler", "embed_tokens", "wte", "wpe")
    encoder = [p.numel() for name, p in model.base_model.named_parameters() if name.split(".")[0] not in beside]
    return {"total": model.num_parameters(), "encoder": sum(encoder)}


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Switches models to eval mode, and each back to its own mode at the end."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@torch.no_grad()
def measure_seconds(
    models: Mapping[str, PreTrainedModel], batch: Mapping[str, Tensor], runs: int = 15
) -> dict[str, float]:
    """Measures the seconds of one forward pass of each model on the same batch, on the device each model is on.

    Returns the median of `runs` after two warm-up passes. The models take turns, so that other load on the machine
    slows all of them alike.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; it should be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with eval_mode(*models.values()):
        for _ in range(runs + 2):
            for name, model in models.items():
                inputs = {key: x.to(model.device) for key, x in forward_arguments(model, batch).items()}
                synchronize = torch.cpu.synchronize if model.device.type == "cpu" else torch.accelerator.synchronize
                synchronize(model.device)
                start = time.perf_counter()
                model(**inputs)
                synchronize(model.device)
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}
