"""What a student and its teacher must share before a run may begin."""

from __future__ import annotations

from typing import Any


def check_vocabularies(student: Any, teacher: Any, tokenizer: Any = None) -> None:
    """ValueError where the configs' vocabularies differ in size, or the tokenizer has more tokens than they do."""
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the student's vocabulary has {student.vocab_size} tokens, the teacher's {teacher.vocab_size}; both read "
            "the same token ids, so give the student the teacher's tokenizer and vocab_size. One tokenizer's, padded "
            f"to two sizes, are made equal by student.resize_token_embeddings({teacher.vocab_size})"
        )
    if tokenizer is not None and len(tokenizer) > student.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the models {student.vocab_size}; use the teacher's tokenizer"
        )


def check_classes(student: Any, teacher: Any) -> None:
    """ValueError where the configs' classes differ in number or, where both name them, in order."""
    if student.num_labels != teacher.num_labels:
        raise ValueError(f"the student has {student.num_labels} classes, the teacher {teacher.num_labels}")
    orders = [[str(config.id2label[i]) for i in range(config.num_labels)] for config in (student, teacher)]
    is_named = all(names != [f"LABEL_{i}" for i in range(len(names))] for names in orders)
    if is_named and [name.lower() for name in orders[0]] != [name.lower() for name in orders[1]]:
        raise ValueError(
            f"the student orders its classes {orders[0]}, the teacher {orders[1]} (label2id); give both one order"
        )
