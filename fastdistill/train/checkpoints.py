"""Loads a model and its tokenizer by name: a folder, a hub name, or a published TinyBERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import disable_fsdp_ram_efficient_loading
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastdistill.train.processes import processes
from fastdistill.train.published import is_published, load_published, load_published_tokenizer, untrained_head
from fastdistill.train.reading import TOKENIZER, UNKNOWN, reading
from fastdistill.train.students import load_checkpoint, positions

__all__ = ["load_config", "load_model", "load_tokenizer"]


def load_model(
    name: str, auto_class: str | None = None, *, trust_remote_code: bool = False,
    needs_head: bool = False, headless: dict[str, Any] | None = None, **options: Any,
) -> tuple[PreTrainedModel, Any]:  # fmt: skip
    """Returns a checkpoint's model, in float32 and eval mode, on the device to run on, and its tokenizer.

    Args:
        auto_class: a transformers Auto class; None for the kind of language model that the checkpoint is.
        needs_head: refuse a checkpoint whose head is untrained.
        options: settings that win over the checkpoint's config.
        headless: settings in the place of `options` for a checkpoint that has no head of this kind.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: a language model has no head; with `needs_head`, any model.
    """
    disable_fsdp_ram_efficient_loading()  # it would give the weights to one process alone
    check_folder(name)
    published = is_published(name)

    def load(**settings: Any) -> tuple[PreTrainedModel, set[str]]:
        """Returns the model, and the names of its weights that are random."""
        if not published:
            return load_checkpoint(getattr(transformers, kind), name, trust_remote_code=trust_remote_code, **settings)
        model = load_published(name, kind, **settings)
        head = untrained_head(model, name)
        return model, {f"{head}.weight"} if head else set()

    try:
        kind = auto_class or _language_model(name, published, trust_remote_code)
        model, missing = load(**options)
        if missing and headless:
            model, missing = load(**headless)
        if missing and (needs_head or (kind.endswith("LM") and not published)):
            raise ValueError(f"{name}: {_no_head(model, kind, missing)}")
        tokenizer = load_published_tokenizer(name) if published else _tokenizer(name, model, trust_remote_code)
        _check_ids(name, tokenizer, model)
    except OSError as error:
        if not Path(name).exists():
            raise OSError(f"{name}: no such folder, and not read from the hub: {error}") from error
        raise error if name in str(error) else OSError(f"{name}: {error}") from error
    return model.eval().to(processes().device), tokenizer


def check_folder(name: str) -> None:
    """Raises FileNotFoundError where `name` is a path and leads to no checkpoint."""
    folder = Path(name)
    if folder.is_symlink():
        folder.stat()  # raises OSError for a link that leads nowhere: it is no name on the hub
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}: an adapter of PEFT; it should be a whole model. Load the model that it was trained on, merge it, "
            f"PeftModel.from_pretrained(model, {name!r}).merge_and_unload().save_pretrained(FOLDER), and save the "
            "tokenizer there too"
        )
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: no config.json; it is not a transformers checkpoint")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such folder")


def load_config(name: str | Path, trust_remote_code: bool = False) -> Any:
    """Returns a checkpoint's transformers config."""
    file = Path(name, "config.json")
    with reading(file if file.is_file() else name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """Returns a checkpoint's tokenizer, as it was saved."""
    with reading(name, *TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer(UNKNOWN)
    return tokenizer


def _tokenizer(name: str, model: PreTrainedModel, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(name, trust_remote_code)
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none; padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions(model))  # rows are cut to what fits
    return tokenizer


def _check_ids(name: str, tokenizer: Any, model: PreTrainedModel) -> None:
    """Raises ValueError where the tokenizer has ids that the model's embeddings do not have."""
    highest, tokens = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= tokens:
        raise ValueError(
            f"{name}: the tokenizer has token ids up to {highest}, the model {tokens} of them; they should be of one "
            "checkpoint: copy its files again, or call resize_token_embeddings on the model and save it"
        )


def _no_head(model: PreTrainedModel, auto_class: str, missing: set[str]) -> str:
    names = ", ".join(sorted(missing))
    what = {"AutoModelForMaskedLM": "masked", "AutoModelForCausalLM": "causal"}.get(auto_class)
    if what:
        return f"not a {what} language model with its head (there is no {names})"
    kind = type(model).__name__
    return f"not a trained {kind} (there is no {names}); `fastdistill finetune` makes a model of the task"


def _language_model(name: str, published: bool, trust_remote_code: bool) -> str:
    """Returns the Auto class: masked where the family has such a head and the checkpoint is not causal."""
    if published:
        return "AutoModelForMaskedLM"
    config = load_config(name, trust_remote_code)
    is_causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal
    return "AutoModelForMaskedLM" if is_masked else "AutoModelForCausalLM"
