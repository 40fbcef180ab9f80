"""Checks that a student and its teacher fit together, made before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from fastdistill.train.capture import capture
from fastdistill.train.inputs import is_causal

MOST_PADDING = 1024  # models round their vocabulary up to a multiple of 64 to 1024


def check_vocabularies(student: Any, teacher: Any, tokenizer: Any = None, *, whose: str = "the teacher's") -> None:
    """Raises ValueError if the tokenizer has more tokens than either config's vocab_size, or if the two differ.

    They may differ a little with a tokenizer whose tokens both have: the rest is padding. `whose` says in the
    message whose config `teacher` is.
    """
    sizes = student.vocab_size, teacher.vocab_size
    if sizes[0] != sizes[1] and (tokenizer is None or max(sizes) > len(tokenizer) + MOST_PADDING):
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} tokens, {whose} {sizes[1]}; both should be one vocabulary, since "
            "both models read the same token ids: give the student the teacher's tokenizer and vocab_size. Two "
            f"paddings of one vocabulary may differ, by at most {MOST_PADDING} tokens beyond a tokenizer that is given"
        )
    if tokenizer is not None and len(tokenizer) > min(sizes):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the student's vocabulary {sizes[0]}, {whose} {sizes[1]}; both "
            "models should have all of them: use the teacher's tokenizer, and a student of its vocabulary"
        )


def check_classes(student: Any, teacher: Any) -> None:
    """Raises ValueError if the two configs differ in the number of classes or, where both name them, in their order."""
    if student.num_labels != teacher.num_labels:
        raise ValueError(f"the student has {student.num_labels} classes, the teacher {teacher.num_labels}")
    orders = [[str(config.id2label[i]) for i in range(config.num_labels)] for config in (student, teacher)]
    is_named = all(names != [f"LABEL_{i}" for i in range(len(names))] for names in orders)
    if is_named and [name.lower() for name in orders[0]] != [name.lower() for name in orders[1]]:
        raise ValueError(
            f"the student orders its classes {orders[0]}, the teacher {orders[1]} (label2id); give both one order"
        )


def reads_text(model: PreTrainedModel) -> bool:
    """Returns whether a model reads tokens, and not images or sound."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def check_inputs(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises ValueError if the two models read different inputs, say one images and the other text."""
    names = [getattr(model, "main_input_name", "input_ids") for model in (student, teacher)]
    if names[0] != names[1]:
        raise ValueError(
            f"the student reads {names[0]}, the teacher {names[1]}; both read the same batch, so they should take the "
            "same inputs"
        )


def check_transcripts(student: PreTrainedModel, teacher: PreTrainedModel | None, alpha: float) -> None:
    """Raises ValueError for a CTC student whose letters are not the teacher's, or that would learn labels as well."""
    if type(student).__name__ not in MODEL_FOR_CTC_MAPPING_NAMES.values():
        return
    if alpha < 1:
        raise ValueError(
            f"alpha is {alpha}; labels of a CTC model are transcripts, not classes of frames, so the prediction term "
            "learns from the teacher alone: leave alpha at 1.0"
        )
    models = [model for model in (student, teacher) if model is not None]
    if any(getattr(model.config, "add_adapter", False) for model in models):
        raise ValueError(
            "add_adapter is True; an adapter changes the number of frames under a CTC head, which has no mask then: "
            "leave 'prediction' out of terms, or use models without an adapter"
        )
    sizes = [model.config.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} letters, the teacher's {sizes[1]}; the prediction term compares "
            "them one by one: give the student the teacher's processor and vocab_size"
        )


def check_layerdrop(config: Any, terms: Sequence[str]) -> None:
    """Raises ValueError if the student skips layers at random, so that its layers cannot be told apart."""
    if getattr(config, "layerdrop", 0.0):
        raise ValueError(
            f"the student's layerdrop is {config.layerdrop}; a skipped layer has no states, so the terms {list(terms)} "
            "would compare the wrong layers: load the student with layerdrop=0.0"
        )


@torch.no_grad()
def check_packed(model: PreTrainedModel) -> None:
    """Raises ValueError if a causal model reads packed sequences as one. It runs on two sequences of two tokens."""
    if not is_causal(model):
        return
    training = [module for module in model.modules() if module.training]
    ids = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    try:
        for module in training:
            module.training = False
        packed, alone = (
            capture(model.base_model, {"input_ids": ids[:, start:], "position_ids": ids[:, start:] % 2}, hidden=[1])
            for start in (0, 2)
        )
    finally:
        for module in training:
            module.training = True
    found, expected = packed.hidden[1][:, 2:], alone.hidden[1]
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"the rows are packed (position_ids), and {type(model).__name__} reads the sequences of a row as one; pack "
            "no rows, and leave the column position_ids out"
        )
