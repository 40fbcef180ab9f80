"""Reads the checkpoints of TinyBERT's authors as transformers models.

Such a folder holds a `config.json` without `model_type`, `pytorch_model.bin` and `vocab.txt`. The weights are BERT's
under `bert.`, heads under `cls.`, `classifier.` or `qa_outputs.`, and the projections of the hidden states:
`fit_dense`, one for all, or `fit_denses.0` to `fit_denses.M`, one for each. Nothing in such a folder is executed:
weights are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, PreTrainedModel

from fastdistill.train.reading import UNKNOWN, check_finite, read_json, read_pickle, reading

__all__ = ["is_published", "load_published", "load_published_projections", "load_published_tokenizer"]

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, VOCABULARY = "config.json", "pytorch_model.bin", "vocab.txt"
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FIT = re.compile(r"fit_dense(?:s\.(\d+))?\.(weight|bias)")
HEADS = ("classifier", "qa_outputs")  # of tasks
# Weights that a checkpoint may hold although the model has no place for them.
SPARE = ("cls.", "classifier.", "qa_outputs.", "bert.pooler.", "bert.embeddings.position_ids")


def is_published(folder: str | Path) -> bool:
    """Returns whether the config.json in `folder` lacks `model_type`, so that transformers cannot read the folder."""
    return (Path(folder) / CONFIG).is_file() and "model_type" not in read_json(Path(folder) / CONFIG)


def load_published(
    folder: str | Path, auto_class: str = "AutoModel", *, relu: bool = True, **options: Any
) -> PreTrainedModel:
    """Reads a published checkpoint as a transformers BERT: float32, in eval mode, on the CPU.

    A `classifier` or `qa_outputs` that the checkpoint lacks gets random weights, with a warning.

    Args:
        auto_class: the transformers Auto class of the model to make, such as "AutoModelForSequenceClassification".
        relu: put a ReLU between the pooler and a classifier that comes with projections. The published code has it
            there; a transformers BERT does not, and `save_pretrained` does not keep it. Pass False for a model that
            will be trained, whose new head then needs no warning.
        options: settings that win over config.json, such as `num_labels` and `id2label`. Without any there are as many
            labels as the checkpoint's classifier has rows.
    """
    weights, path = _read_weights(folder), Path(folder) / WEIGHTS
    config = _config(folder, weights, auto_class, options)
    with reading(Path(folder) / CONFIG):
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    untrained = _untrained_head(model, weights)
    _fill(model, weights, untrained, path)
    if untrained and relu:
        logger.warning("%s has no %s; the model's is random until it is trained", path, untrained)
    elif relu and isinstance(model, BertForSequenceClassification) and any(FIT.fullmatch(name) for name in weights):
        model.bert.pooler.activation = nn.Sequential(nn.Tanh(), nn.ReLU())
    return model.eval()


def _config(folder: str | Path, weights: dict[str, Tensor], auto_class: str, options: dict[str, Any]) -> BertConfig:
    path = Path(folder) / CONFIG
    values = read_json(path)
    if missing := [name for name in SIZES if not isinstance(values.get(name), int)]:
        raise ValueError(
            f"{path}: no model_type, and no {', '.join(missing)}; it is neither transformers' nor that of a published "
            "TinyBERT"
        )
    known = BertConfig()  # does not have the published code's pre_trained, training, cell, structure, emb_size
    # The two outputs of a span head are no labels.
    dropped = ("num_labels", "id2label", "label2id") if auto_class == "AutoModelForQuestionAnswering" else ()
    values = {name: value for name, value in values.items() if hasattr(known, name) and name not in dropped} | options
    if not dropped and "classifier.weight" in weights and not {"num_labels", "id2label"} & values.keys():
        values["num_labels"] = len(weights["classifier.weight"])
    with reading(path):
        return BertConfig(**values)


def untrained_head(model: PreTrainedModel, folder: str | Path) -> str | None:
    """Returns the name of the model's head for a task if its checkpoint has no weights for it, else None."""
    return _untrained_head(model, _read_weights(folder))


def load_published_tokenizer(folder: str | Path, **options: Any) -> BertTokenizer:
    """Returns BERT's tokenizer over the folder's vocab.txt. `options` are its own, such as `do_lower_case` (True)."""
    path = Path(folder) / VOCABULARY
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is a published TinyBERT's tokenizer")
    options = {"model_max_length": read_json(Path(folder) / CONFIG).get("max_position_embeddings", 512), **options}
    with reading(path):
        tokenizer = BertTokenizer.from_pretrained(str(folder), **options)
        tokenizer(UNKNOWN)
    return tokenizer


def load_published_projections(folder: str | Path) -> dict[str, Tensor]:
    """Returns the projections of a checkpoint, if it has any, under the names in an `Objective`'s state.

    These are `projections.shared.weight` (d_teacher, d_student) and `.bias` (d_teacher), or `projections.0.weight` and
    so on for each hidden state.
    """
    if not (Path(folder) / WEIGHTS).is_file():
        return {}
    found = ((FIT.fullmatch(name), x) for name, x in _read_weights(folder).items())
    return {f"projections.{name[1] or 'shared'}.{name[2]}": x.float() for name, x in found if name}


def _untrained_head(model: PreTrainedModel, weights: dict[str, Tensor]) -> str | None:
    head = next((name for name in HEADS if hasattr(model, name)), None)
    return None if head is None or any(name.startswith(f"{head}.") for name in weights) else head


def _fill(model: PreTrainedModel, weights: dict[str, Tensor], untrained: str | None, path: Path) -> None:
    """Copies the weights into the model's parameters. Raises ValueError naming every one that does not fit."""
    prefix = "bert" if model.base_model is model else ""
    parameters = dict(model.named_parameters(prefix, remove_duplicate=False))
    found = {name: x for name, x in weights.items() if name in parameters}
    filled = {id(parameters[name]) for name in found}  # includes tied parameters
    problems = {
        "missing": [
            name for name, x in parameters.items() if id(x) not in filled and not name.startswith(f"{untrained}.")
        ],
        "unexpected": [
            name for name in weights.keys() - found.keys() if not name.startswith(SPARE) and not FIT.fullmatch(name)
        ],
        "of another shape": [
            f"{name} {tuple(x.shape)} instead of {tuple(parameters[name].shape)}"
            for name, x in found.items()
            if x.shape != parameters[name].shape
        ],
    }
    if listed := "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names):
        raise ValueError(f"{path} does not fit a {type(model).__name__} of the sizes in {CONFIG}; {listed}")
    check_finite(path, found.items())
    with torch.no_grad():
        for name, x in found.items():
            parameters[name].copy_(x)


def _read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Returns the tensors by name. LayerNorm's `gamma` and `beta` of early BERTs become `weight` and `bias`."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a published TinyBERT has its weights there")
    weights = read_pickle(path)
    are_tensors = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in weights.items()
    )
    if not are_tensors:
        raise ValueError(f"{path}: not a dictionary of tensors")
    return {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): x for name, x in weights.items()}
