"""Distils a causal language model on its own answers: TRL's DistillationTrainer samples them, and the teacher judges.

The loss is TRL's generalised Jensen-Shannon divergence, computed without logits by `DistillationMixin`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer, maybe_convert_to_chatml

from fastdistill.integrations.trl import DistillationMixin
from fastdistill.recipes.lm_rows import BESIDE, read_rows
from fastdistill.recipes.lm_trainers import StudentTrainer
from fastdistill.recipes.options import LMOptions
from fastdistill.train.data import PaddingCollator
from fastdistill.train.outputs import working_folder
from fastdistill.train.processes import main_first
from fastdistill.train.resumable import training_arguments

__all__ = ["OnPolicyTrainer", "on_policy_arguments", "read_prompts"]


class OnPolicyTrainer(StudentTrainer, DistillationMixin, DistillationTrainer):
    """TRL's DistillationTrainer, which may be stopped at any moment, and which evaluates on held-out labels."""

    data_collator: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int] | None:
        sampler: Any = super()._get_train_sampler(*args, **kwargs)
        sampler.sampler.generator = torch.default_generator  # which EpochSampler seeds
        return sampler

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        collator, self.data_collator = self.data_collator, PaddingCollator(self.processing_class)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _prepare_inputs(self, batch: Any) -> Any:
        """Samples answers while it trains; held-out rows bring theirs."""
        return super()._prepare_inputs(batch) if self.model.training else Trainer._prepare_inputs(self, batch)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return model(**inputs, use_cache=False).loss


def on_policy_arguments(options: LMOptions, own: dict[str, Any]) -> DistillationConfig:
    """Returns TRL's arguments: the beta 0 is KL(teacher || student), and 1 is KL(student || teacher)."""
    beta = options.beta if options.divergence == "jsd" else float(options.reverse)
    own = {"beta": beta, "temperature": options.temperature, **own}
    args = training_arguments(working_folder(options.output), options, DistillationConfig, **own)
    if (args.max_completion_length or 0) < 1:
        raise ValueError(f"max_completion_length is {args.max_completion_length}; it should be a positive integer")
    if args.use_vllm and find_spec("vllm") is None:
        raise ValueError("use_vllm is True; vllm is not installed: install it, or leave --use_vllm out")
    return args


def read_prompts(options: LMOptions, tokenizer: Any, args: DistillationConfig, positions: int) -> Dataset:
    """Returns the prompts of the rows, in the column `prompt`: `messages` without the last answer, or `prompt`.

    Raises ValueError for rows without prompts, for a prompt that the models cannot answer, and for fewer rows than one
    optimiser step takes.
    """
    rows = main_first(lambda: read_rows(options.dataset or [], config=options.dataset_config, split=options.split))
    check_columns(rows)
    if tokenizer.eos_token is None:
        raise ValueError("the teacher's tokenizer has no eos_token, which ends an answer: set it, and save it there")
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(rows) < step:
        raise ValueError(f"--dataset: {len(rows)} rows, and a step takes {step}: use a smaller --batch-size")

    def prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        found = prompt_of(dict(row))
        try:
            return {"prompt": found, "tokens": count_tokens(found, tokenizer, args)}
        except (ValueError, TemplateError) as error:
            raise ValueError(f"--dataset: row {index + 1}: {error}") from None

    found = main_first(lambda: rows.map(prompt, with_indices=True, remove_columns=rows.column_names))
    check_lengths(found["tokens"][:], args.max_completion_length, positions)
    return found.remove_columns("tokens")


def check_columns(rows: Dataset) -> None:
    columns = rows.column_names
    if not {"messages", "conversations", "prompt"} & set(columns):
        raise ValueError(
            f"--dataset: rows have {', '.join(columns)}; with --on-policy they should have messages, or prompt and "
            "completion, since the student answers prompts"
        )
    for name in BESIDE:
        if name in columns and any(rows[name]):
            raise ValueError(f"--dataset: rows have {name}; with --on-policy all rows take one chat template alone")


def prompt_of(row: dict[str, Any]) -> Any:
    """Returns a text or a list of messages."""
    if "prompt" in row:
        return row["prompt"]
    messages = maybe_convert_to_chatml(row)["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def count_tokens(prompt: Any, tokenizer: Any, args: DistillationConfig) -> int:
    """Returns the length of a prompt. Raises ValueError where there is none."""
    if not prompt:
        raise ValueError("there is no prompt before the answer")
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("it holds messages, and the teacher's tokenizer has no chat template: save one with it")
    template: Any = args.chat_template_kwargs or {}
    return len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template).input_ids
    )


def check_lengths(tokens: list[int], answer: int, positions: int) -> None:
    """Raises ValueError if the models do not take the longest prompt and an answer."""
    longest = max(tokens)
    if longest + answer > positions:
        room = positions - longest
        raise ValueError(
            f"--dataset: row {tokens.index(longest) + 1}: the prompt has {longest} tokens and its answer up to "
            f"{answer}; the models take {positions}: "
            + (f"pass --max_completion_length {room}" if room > 0 else "leave the row out")
        )
