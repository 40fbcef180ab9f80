"""Checks that a student and its teacher fit together, made before a run begins."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastdistill.train.capture import capture
from fastdistill.train.inputs import is_causal
from fastdistill.train.published import is_published, load_published_tokenizer
from fastdistill.train.reading import TOKENIZER, reading

logger = logging.getLogger(__name__)

PROBE = "The  Élan of 1,234 ﬁsh;\tdon't STOP\n"  # split otherwise by tokenizers that lower-case, strip, or normalise
SHOWN = 3  # differing tokens in a message
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


def check_tokens(ours: Any, theirs: Any, our_name: str, their_name: str) -> None:
    """Raises ValueError if two tokenizers give an id to different tokens. The names say in the message whose they are.

    Ids that only one of them has are not compared, nor are two names of one byte string (byte-level BPE and
    SentencePiece). An added token may stand where the other has a token that is not used, such as a reserved one. A
    warning says if the same vocabulary is read through other rules, such as lower case.
    """
    if ours is None or theirs is None:
        return
    first, second = ours.get_vocab(), theirs.get_vocab()
    if different := [] if first == second else list(differing(ours, theirs)):
        shown = ", ".join(f"id {i} is {a!r} and {b!r}" for i, a, b in different[:SHOWN])
        raise ValueError(
            f"{our_name} and {their_name} differ in {len(different)} tokens: {shown}; both models should read the same "
            "token ids: use the teacher's tokenizer, and a student that was trained with it or is made from a config"
        )
    if all(hasattr(tokenizer, "backend_tokenizer") for tokenizer in (ours, theirs)):
        (our_ids, our_pieces), (their_ids, their_pieces) = split(ours), split(theirs)
        if our_ids != their_ids:
            logger.warning(
                "%s and %s have one vocabulary and split text differently (%r into %s and %s); tokenise rows with the "
                "teacher's", our_name, their_name, PROBE, our_pieces, their_pieces,
            )  # fmt: skip


def split(tokenizer: Any) -> tuple[list[int], list[str]]:
    """Returns the ids and the names of the tokens of PROBE, without padding."""
    found = tokenizer.backend_tokenizer.encode(PROBE, add_special_tokens=False)
    mask = found.attention_mask
    return list(itertools.compress(found.ids, mask)), list(itertools.compress(found.tokens, mask))


def differing(ours: Any, theirs: Any) -> Iterator[tuple[int, str, str]]:
    """Yields, in order, each id of both tokenizers that stands for different tokens, and the two tokens."""
    first, second = ours.get_vocab(), theirs.get_vocab()
    names = [{i: token for token, i in vocabulary.items()} for vocabulary in (first, second)]
    added = ours.added_tokens_decoder.keys() | theirs.added_tokens_decoder.keys()
    for i in sorted(names[0].keys() & names[1].keys()):
        a, b = names[0][i], names[1][i]
        is_renamed = i in added and a not in second and b not in first
        if a != b and not is_renamed and not readings(a) & readings(b):
            yield i, a, b


BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as byte-level BPE spells them


def readings(token: str) -> set[bytes]:
    """Returns the bytes that a token may stand for: as it is, as SentencePiece spells them, and as byte-level BPE."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return {token.encode(), bytes.fromhex(found[1])}
    plain = {token.encode(), token.replace("▁", " ").encode()}
    return plain | ({bytes(BYTES[x] for x in token)} if BYTES.keys() >= set(token) else set())


def tokenizer_of(name: str | Path, *, local: bool = True, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a checkpoint, or None if it has none. Damaged files raise. `local`: use no network.

    transformers makes a tokenizer of special tokens for a checkpoint without one; it is not returned.
    """
    options = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    if not str(name):
        return None
    try:
        with reading(name, *TOKENIZER):
            published = is_published(name)
            found = load_published_tokenizer(name) if published else AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError):
        if any(next(Path(name).glob(pattern), None) for pattern in TOKENIZER):
            raise
        return None
    return found if len(found.get_vocab()) > len(found.added_tokens_decoder) + 1 else None


def check_own_tokens(student: Any, teacher: Any, processing_class: Any) -> None:
    """Raises ValueError if the tokenizers in the student's and the teacher's folders and the given one differ."""
    given = getattr(processing_class, "tokenizer", processing_class)
    found = [("processing_class", given)] if hasattr(given, "get_vocab") else []
    sides = (("teacher", teacher), ("student", student))
    names = {getattr(model, "name_or_path", ""): side for side, model in sides}
    for name, side in names.items():
        if name != getattr(given, "name_or_path", None) and (own := tokenizer_of(name)) is not None:
            found.append((f"the tokenizer of the {side} ({name})", own))
    for (our_name, ours), (their_name, theirs) in itertools.pairwise(found):
        check_tokens(ours, theirs, our_name, their_name)


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


def check_arguments(args: Any) -> None:
    """Raises ValueError for a TrainingArguments that DistillationTrainer would ignore or compute wrongly."""
    refused = {
        "label_smoothing_factor": (0.0, "the teacher's distribution takes the place of smoothed labels"),
        "use_liger_kernel": (False, "liger's kernels would not reach the student inside the trainer's module"),
        "use_cache": (False, "training reads no cache of keys and values"),
        "enable_jit_checkpoint": (False, "SIGTERM writes a checkpoint in any case, from which a run goes on"),
        "predict_with_generate": (False, "evaluation compares the distributions of teacher and student"),
        "sortish_sampler": (False, "train_sampling_strategy='group_by_length' does the same"),
    }
    for name, (default, reason) in refused.items():
        if (value := getattr(args, name, default)) != default:
            raise ValueError(f"{name} is {value!r}; it should be {default!r}, since {reason}: leave it out")
    if any("underflow" in str(option).lower() for option in args.debug or ()):
        raise ValueError("debug is 'underflow_overflow', whose hooks cannot read boolean masks: leave it out")
    parallel = getattr(args, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (getattr(parallel, name, None) or 1) > 1:
            raise ValueError(
                f"parallelism_config has {name} {getattr(parallel, name)}; the losses need whole rows and layers in "
                "each process: it should be 1, and data parallelism takes all processes"
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
