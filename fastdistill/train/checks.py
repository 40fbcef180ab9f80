"""Checks that a student and its teacher fit together, made before a run begins."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from fastdistill.train.capture import WAY_OUT, Sink, is_switched, layer_count, probabilities, run
from fastdistill.train.heads import evaluating, unwrapped
from fastdistill.train.inputs import check_apart, difference, is_causal, is_packed, rounding
from fastdistill.train.published import is_published, load_published_tokenizer
from fastdistill.train.reached import layerdrop
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


def check_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError if training the student would change the teacher: one model, or weights that both hold."""
    if unwrapped(student) is unwrapped(teacher):
        raise ValueError(
            "teacher is the student itself; it should be another model, or a copy.deepcopy made beforehand (before "
            "peft.get_peft_model, where the student gets adapters)"
        )
    norms = (module for module in student.modules() if isinstance(module, _NormBase))
    statistics = (x for norm in norms for x in norm.buffers(recurse=False))  # training changes them without gradients
    trained = set().union(*map(places, (*(p for p in student.parameters() if p.requires_grad), *statistics)))
    held = (*teacher.named_parameters(), *teacher.named_buffers())
    shared = [name for name, x in held if places(x) & trained]
    if shared:
        raise ValueError(f"teacher shares {shared[0]} with the student, which trains it; make it a copy.deepcopy")


def places(parameter: Tensor) -> set[tuple[str, int]]:
    """Returns what tells a parameter and its memory from others; a shard, or a wrapper of tensors, may have none."""
    found = {("parameter", id(parameter))}
    is_plain = type(parameter) in (Tensor, nn.Parameter) and parameter.device.type != "meta" and parameter.numel()
    if is_plain and (place := parameter.data_ptr()):  # 0: FSDP has freed the memory
        found.add((str(parameter.device), place))
    return found


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
    for name, value in layerdrop(config.to_dict()).items():
        raise ValueError(
            f"the student's {name} is {value}; a skipped layer has no states, so the terms {list(terms)} would compare "
            f"the wrong layers: load the student with {name}=0.0"
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


def check_packed(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raises ValueError if a batch has packed rows and the model reads their sequences as one.

    A causal model is judged by a small run, whatever the first rows hold. A bidirectional model reads them as one,
    except where capture computes its attention, for a batch of one row.
    """
    if is_causal(model):
        check_apart(model, batch)
    elif is_packed(batch["position_ids"], batch.get("attention_mask")):
        what = f"the rows are packed (position_ids start anew), and {type(model).__name__}, which is bidirectional,"
        if not is_switched(model) or len(batch["position_ids"]) > 1:
            raise ValueError(
                f"{what} reads the sequences of a row as one; pack no rows, or all sequences of a batch into one row "
                "(the general stage's packing=True, or transformers' DataCollatorWithFlattening with \"attention\" "
                "among the terms)"
            )
        if not counts_from_zero(model, batch["position_ids"].device):
            raise ValueError(f"{what} does not count the positions of a sequence from 0; pack no rows")


@torch.no_grad()
def counts_from_zero(model: PreTrainedModel, device: torch.device) -> bool:
    """Returns whether a sequence packed behind another has the states that it has alone, up to rounding."""
    ids, positions = torch.arange(4, device=device)[None], torch.arange(4, device=device)[None] % 2
    alone: dict[str, Tensor] = {"input_ids": ids[:, 2:]}
    with evaluating(model):
        packed, second = (
            run(model, rows, hidden=[layer_count(model)]).hidden_states[-1]
            for rows in ({"input_ids": ids, "position_ids": positions}, alone)
        )
    return difference(packed[:, 2:], second) <= rounding(model, device)


@torch.no_grad()
def check_attention(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raises ValueError if captured queries, keys, masks and values do not reproduce the model's own attention.

    It runs a few tokens of two rows, one of them padded, twice: once with transformers' eager attention, and once with
    attention outputs computed from what is captured. The probabilities of each layer and the outputs should be equal.
    Needs `with capturable(model):` around the call.
    """
    name, few = type(model).__name__, short_rows(batch)
    sink = Sink(range(1, layer_count(model) + 1), values=True, rebuilds=True)
    implementation, training = model.config._attn_implementation, [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        found = run(model, few, sink)[0]
        model.set_attn_implementation("eager")
        outputs = run(model, few, attentions=True)
    finally:
        model.set_attn_implementation(implementation)
        for module in training:
            module.training = True
    own = outputs.get("attentions") or ()
    if len(own) != len(sink.layers) or any(x is None for x in own):
        raise ValueError(
            f"{name} returns no attention probabilities of its {len(sink.layers)} layers, with which those of captured "
            f"queries and keys could be compared; {WAY_OUT}"
        )
    mask = few.get("attention_mask")
    for i, layer in sink.layers.items():
        if not _are_close(probabilities(layer).transpose(1, 2), own[i - 1].transpose(1, 2), mask):
            raise ValueError(
                f"the attention probabilities of layer {i} of {name} are not those of its captured queries, keys and "
                f"masks: something that capture does not see changes its attention; {WAY_OUT}"
            )
    if not _are_close(found, outputs[0], mask):
        raise ValueError(
            f"the attention outputs of {name} are not its attention probabilities times its captured values; {WAY_OUT}"
        )


def short_rows(batch: Mapping[str, Any], length: int = 8) -> dict[str, Any]:
    """Returns the first tokens of two rows, the second padded, or two whole rows of a batch without `input_ids`."""
    ids = batch.get("input_ids")
    tensors = {name: x[[0, -1]] for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0}
    if ids is None:
        return tensors
    few = {name: x[:, :length] if x.shape[1:2] == ids.shape[1:] else x for name, x in tensors.items()}
    few.pop("attention_mask", None)
    if "position_ids" not in batch:  # packed rows have no padding
        mask = torch.ones_like(few["input_ids"])
        mask[1, : mask.shape[1] // 3] = 0  # on the left, where causality does not hide it
        few["attention_mask"] = mask
    return few


def _are_close(found: Tensor, expected: Tensor, mask: Tensor | None) -> bool:
    """Returns whether two tensors (B, L, ...) are equal up to rounding. Padding may hold anything."""
    if found.shape != expected.shape:
        return False
    if mask is not None and found.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))
