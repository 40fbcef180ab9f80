"""Checks that a student and its teacher fit together, made before a run begins."""

from __future__ import annotations

from typing import Any


def check_vocabularies(student: Any, teacher: Any, tokenizer: Any = None, *, whose: str = "the teacher's") -> None:
    """Raises ValueError if the two configs differ in vocab_size, or if the tokenizer has more tokens than that.

    `whose` says in the message whose config `teacher` is.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student's vocabulary has {student.vocab_size} tokens, {whose} {teacher.vocab_size}; both should be "
            "one vocabulary, since both models read the same token ids: give the student the teacher's tokenizer and "
            "vocab_size. If one tokenizer's vocabulary was padded to two sizes, "
            f"student.resize_token_embeddings({teacher.vocab_size}) makes them equal"
        )
    if tokenizer is not None and len(tokenizer) > student.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the models {student.vocab_size}; use the teacher's tokenizer"
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
