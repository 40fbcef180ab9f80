"""Distils a causal language model: TRL's data handling and SFTTrainer, with the loss of `causal_lm_loss`.

    distil_lm(LMOptions(teacher="teacher", student="student", dataset=["chat.jsonl"], output=Path("out")))

The teacher is live, or a cache that `cache_teacher` wrote, or absent (`alpha=0`: the labels alone). With
`on_policy=True` it judges the student's own answers (`fastdistill.recipes.lm_on_policy`).
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import SFTConfig

from fastdistill.recipes.distil import finish, finished, trainer_arguments
from fastdistill.recipes.lm_on_policy import OnPolicyTrainer, on_policy_arguments, read_prompts
from fastdistill.recipes.lm_rows import read_and_tokenize
from fastdistill.recipes.lm_trainers import LMTrainer, StudentTrainer
from fastdistill.recipes.options import CacheOptions, Divergence, LMOptions
from fastdistill.recipes.report import where, write_report
from fastdistill.train.cache import check_cache, read_cache, warn_of_lost_mass, weightless_teacher
from fastdistill.train.causal_lm import check_options
from fastdistill.train.checkpoints import check_folder, load_config, load_model, load_tokenizer
from fastdistill.train.checks import check_tokens
from fastdistill.train.data import PaddingCollator
from fastdistill.train.inputs import ENCODER_DECODER
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import claimed, last_checkpoint, working_folder, write_whole
from fastdistill.train.processes import on_main, processes
from fastdistill.train.reading import read_json, reading
from fastdistill.train.resumable import training_arguments
from fastdistill.train.students import (
    auto_name,
    build_student,
    count_parameters,
    is_config,
    measure_seconds,
    positions,
)

__all__ = ["LMTrainer", "distil_lm"]

ROW = 128  # tokens of the row that measures the speed-up
SETTINGS = "distillation.json"  # how the student was distilled; a resumed run must agree


def distil_lm(options: LMOptions) -> dict[str, float]:
    """Distils a causal language model into `options.output`, a plain transformers model with its tokenizer.

    Returns the held-out figures, `eval_loss` (cross-entropy of the labels, per token) and `eval_perplexity`; nothing
    without `options.eval` or `options.eval_split`.
    """
    if finished(options) is not None:
        state = options.output / "trainer_state.json"
        with reading(state):
            return held_out(TrainerState.load_from_json(str(state)).log_history)
    run = LMRun(options)
    output = options.output
    checkpoint = on_main(lambda: last_checkpoint(working_folder(output))) if options.resume else None
    if checkpoint is not None:
        on_main(lambda: check_settings(working_folder(output), run.settings))
    trainer = run.trainer()
    with claimed(output, resume=options.resume, overwrite=options.overwrite) as work:
        on_main(lambda: write_whole(work / SETTINGS, json.dumps(run.settings, indent=2) + "\n"))
        trainer.train_whole(run.student, output, checkpoint)
    finish(output)
    return held_out(trainer.state.log_history)


class LMRun:
    """Models and rows of `distil_lm`, checked before the output is touched."""

    def __init__(self, options: LMOptions) -> None:
        self.options = options
        loss = {f.name: getattr(options, f.name) for f in fields(Divergence)}
        self.distillation = {f.name: loss[f.name] for f in fields(Divergence) if loss[f.name] != f.default}
        check_options(**self.distillation)
        self.settings = {
            **loss, "teacher": options.teacher, "student": options.student, "seed": options.seed,
            "cache": None if options.cache is None else str(options.cache), "dataset": options.dataset,
            "lora": options.lora, "on_policy": options.on_policy or None,
        }  # fmt: skip
        if options.lora is not None and is_config(options.student):
            raise ValueError(f"student is {options.student}, a config file; --lora adapts the weights of a checkpoint")
        self.teacher, self.tokenizer = load_teacher(options)
        self.student = self.make_student()
        models = (
            {"student": self.student} if self.has_no_teacher() else {"teacher": self.teacher, "student": self.student}
        )
        self.parameters = {name: count_parameters(model) for name, model in models.items()}
        classes = min(model.config.vocab_size for model in (self.student, self.teacher) if model is not None)
        if (options.vocab_size or 0) > classes:
            raise ValueError(f"vocab_size is {options.vocab_size}; the models have {classes} classes")
        if options.on_policy and self.student.config.vocab_size != self.teacher.config.vocab_size:
            raise ValueError(
                f"on_policy is True, with which TRL compares all classes; the student has "
                f"{self.student.config.vocab_size} and the teacher {self.teacher.config.vocab_size}: leave it out"
            )
        self.args = self.arguments()
        self.train_rows, self.eval_rows = self.rows()

    def has_no_teacher(self) -> bool:
        """Returns whether no teacher with weights is there: the labels alone, or a cache."""
        return self.teacher is None or self.options.cache is not None

    def make_student(self) -> PreTrainedModel:
        """Returns the student. Each call makes the same one."""
        options = self.options
        torch.manual_seed(options.seed)
        if self.teacher is None:  # labels alone, or a cache that was made elsewhere
            check_causal(options.student, options.trust_remote_code)
            trust = options.trust_remote_code
            student, ours = load_model(options.student, "AutoModelForCausalLM", trust_remote_code=trust)
            check_tokens(ours, self.tokenizer, f"the tokenizer of {options.student}", "that of the cache")
            return student
        copies = options.init == "teacher" and is_config(options.student)
        init = "random" if is_config(options.student) else options.init
        if not is_config(options.student):
            check_causal(options.student, options.trust_remote_code)
        student = build_student(
            options.student, self.teacher, init=init, trust_remote_code=options.trust_remote_code,
            tokenizer=self.tokenizer,
        )  # fmt: skip
        if copies:
            if options.cache is not None:
                raise ValueError("init is teacher; a cache holds no weights: pass --teacher and --dataset")
            copy_decoder(student, self.teacher)
        return student

    def arguments(self) -> Any:
        """Returns TRL's arguments. Those given by their own names win."""
        options = self.options
        evaluates = options.eval is not None or options.eval_split is not None
        own: dict[str, Any] = {
            "logging_steps": 10, "eval_strategy": "epoch" if evaluates else "no",
            "per_device_eval_batch_size": options.batch_size, "trust_remote_code": options.trust_remote_code,
            "train_sampling_strategy": "random",
        }  # fmt: skip
        own.update(trainer_arguments(options))
        if options.on_policy:
            args: Any = on_policy_arguments(options, own)
        else:
            own = {**self.row_arguments(), **own}
            args = training_arguments(working_folder(options.output), options, SFTConfig, **own)
        if args.eval_strategy != "no" and not evaluates:
            raise ValueError(f"--eval_strategy is {args.eval_strategy}; pass --eval or --eval-split")
        return args

    def row_arguments(self) -> dict[str, Any]:
        """Returns those of SFTConfig that say how rows are tokenised."""
        options, most = self.options, self.positions()
        if options.max_length is not None and options.max_length > most:
            raise ValueError(f"max_length is {options.max_length}; the models take {most} tokens at most")
        return {
            "max_length": options.max_length or min(1024, most), "packing": options.packing,
            "completion_only_loss": options.completion_only, "assistant_only_loss": options.assistant_only,
        }  # fmt: skip

    def positions(self) -> int:
        """Returns how many tokens both models take."""
        return min(positions(model) for model in (self.student, self.teacher) if model is not None)

    def rows(self) -> tuple[Dataset, Dataset | None]:
        """Returns the rows to train on, tokenised unless they are prompts, and those held out, tokenised."""
        options, args = self.options, self.args
        if options.on_policy:  # held-out rows are tokenised as without it
            work = working_folder(options.output)
            args = training_arguments(work, Schedule(), SFTConfig, bf16=False, **self.row_arguments())
        read = partial(read_and_tokenize, tokenizer=self.tokenizer, args=args)
        data_set = partial(read, options.dataset, config=options.dataset_config)
        if options.on_policy:
            train = read_prompts(options, self.tokenizer, self.args, self.positions())
        elif options.cache is not None:
            train = cached_rows(options.cache)
        else:
            train = data_set(packing=args.packing, split=options.split)
        packing = args.packing if args.eval_packing is None else args.eval_packing
        held: Dataset | None = None
        if options.eval is not None:
            held = read(options.eval, packing=packing, flag="eval")
        elif options.eval_split is not None:
            held = data_set(packing=packing, split=options.eval_split, flag="eval-split")
        if processes().is_main_process:
            print(f"{len(train)} rows to train on" + (f", {len(held)} held out" if held is not None else ""))
        return train, held

    def trainer(self) -> StudentTrainer:
        """Returns the trainer. If it refuses the models or options, no working folder is left."""
        work = Path(self.args.output_dir)
        is_new = not work.exists()
        shared: dict[str, Any] = {
            "args": self.args, "train_dataset": self.train_rows, "eval_dataset": self.eval_rows,
            "processing_class": self.tokenizer, "peft_config": lora_config(self.options), "base": self.make_student,
            "report": self.report,
        }  # fmt: skip
        try:
            if self.options.on_policy:
                return OnPolicyTrainer(self.student, self.teacher, **shared)
            return self.sft_trainer(**shared)
        except Exception:
            if is_new and work.is_dir() and not any(work.iterdir()):
                work.rmdir()
            raise

    def sft_trainer(self, args: SFTConfig, **shared: Any) -> LMTrainer:
        options = self.options
        args.assistant_only_loss = False  # SFTTrainer refuses it for rows that are tokenised
        args.remove_unused_columns = False  # it would remove the cached teacher's
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        return LMTrainer(
            self.student, args, data_collator=None if options.cache is None else CachedCollator(self.tokenizer),
            teacher=self.teacher if options.cache is None and options.alpha > 0 else None,
            distillation=self.distillation, **shared,
        )  # fmt: skip

    def report(self, trainer: StudentTrainer) -> None:
        """Writes `report.md`. All processes evaluate the teacher."""
        figures: dict[str, dict[str, Any]] = {
            name: {"parameters": found, "metrics": {}} for name, found in self.parameters.items()
        }
        ours = held_out(trainer.state.log_history)
        if ours:
            figures["student"]["metrics"]["held-out"] = {name.removeprefix("eval_"): x for name, x in ours.items()}
            if "teacher" in figures:
                figures["teacher"]["metrics"]["held-out"] = trainer.evaluate_teacher(self.teacher)
        if not processes().is_main_process:
            return
        notes = "Held-out figures are those of the labels, per token."
        if "teacher" in figures and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            figures["student"]["speed_up"] = self.speed_up(trainer)
            notes += f" The speed-up is that of one row of {ROW} tokens on {where()}."
        title = f"{self.options.student} from {self.options.teacher or self.options.cache or 'labels alone'}"
        work = Path(trainer.args.output_dir)
        write_report(work, title, figures, {"training": work}, notes)

    def speed_up(self, trainer: StudentTrainer) -> float:
        """Returns teacher seconds / student seconds of one row; a LoRA is left out, as it is merged into the output."""
        student: Any = trainer.accelerator.unwrap_model(trainer.model)
        row = {"input_ids": torch.arange(min(ROW, self.positions()))[None] % student.config.vocab_size}  # (1, tokens)
        with student.disable_adapter() if isinstance(student, PeftModel) else nullcontext():
            whole = student.get_base_model() if isinstance(student, PeftModel) else student
            seconds = measure_seconds({"teacher": self.teacher, "student": whole}, row)
        return seconds["teacher"] / seconds["student"]


def load_teacher(options: LMOptions) -> tuple[Any, Any]:
    """Returns the teacher and its tokenizer: a cache's without weights, none (and the student's) for labels alone."""
    trust = options.trust_remote_code
    if options.cache is not None:
        teacher = weightless_teacher(options.cache)
        tokenizer = load_tokenizer(options.cache)
        check_cache(options.cache, tokenizer=tokenizer)
        warn_of_lost_mass(options.cache, options.alpha)
        return teacher, tokenizer
    if options.teacher is None:
        check_causal(options.student, trust)
        return None, load_model(options.student, "AutoModelForCausalLM", trust_remote_code=trust)[1]
    check_causal(options.teacher, trust)
    return load_model(options.teacher, "AutoModelForCausalLM", trust_remote_code=trust, dtype=options.teacher_dtype)


def check_causal(name: str, trust_remote_code: bool) -> None:
    """Raises ValueError if the checkpoint `name` is of another kind than a causal language model."""
    if is_config(name):
        raise ValueError(f"{name}: a config file; without a teacher it should be a checkpoint")
    check_folder(name)
    config = load_config(name, trust_remote_code)
    kinds = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, type(config).__name__)]
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        if config.is_encoder_decoder:
            raise ValueError(f"{name} is a {', '.join(kinds)}, {ENCODER_DECODER}")
        raise ValueError(f"{name}: a {', '.join(kinds)}; it should be a causal language model")


def rows_for_cache(options: CacheOptions, teacher: PreTrainedModel, tokenizer: Any) -> Dataset:
    """Returns the tokenised rows of files for `cache_teacher`, with the labels that `distil_lm` would give them."""
    if auto_name(teacher) != "AutoModelForCausalLM":
        raise ValueError(f"teacher is a {type(teacher).__name__}; rows of a language model need a causal one")
    own = {"completion_only_loss": options.completion_only, "assistant_only_loss": options.assistant_only}
    most = positions(teacher)
    length = options.max_length or min(1024, most)
    args = training_arguments(options.output, Schedule(), SFTConfig, max_length=length, bf16=False, **own)
    return read_and_tokenize([str(path) for path in options.data], tokenizer, args, flag="data")


def cached_rows(folder: Path) -> Dataset:
    """Returns the columns of a cache that train a language model."""
    rows = read_cache(folder)
    if "topk_indices" not in rows.column_names:
        raise ValueError(f"{folder}: a cache of {', '.join(rows.column_names)}; write it with --top-k")
    return rows.select_columns([name for name in rows.column_names if name in CACHED or name.startswith("topk_")])


CACHED = ("input_ids", "labels", "position_ids", "attention_mask")


class CachedCollator(PaddingCollator):
    """Pads cached rows. In a row without labels every token counts."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__([{"labels": row["input_ids"], **row} for row in features])


def lora_config(options: LMOptions) -> LoraConfig | None:
    if options.lora is None:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM", r=options.lora, lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout, target_modules=options.lora_targets or "all-linear",
    )  # fmt: skip


@torch.no_grad()
def copy_decoder(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Copies every weight from a teacher of the same width, and its layers evenly spaced, the last one included."""
    ours, theirs = (layers_of(model) for model in (student, teacher))
    count, most = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    if count > most:
        raise ValueError(f"init is teacher, which has {most} layers; the student has {count}: use --init random")
    places = [(i + 1) * most // count - 1 for i in range(count)]
    source = teacher.state_dict()
    for name, x in student.state_dict().items():
        if name.startswith(ours):
            number, rest = name.removeprefix(ours).split(".", 1)
            name = f"{theirs}{places[int(number)]}.{rest}"
        if name not in source or source[name].shape != x.shape:
            found = tuple(source[name].shape) if name in source else "missing"
            raise ValueError(
                f"init is teacher, which copies layers; {name} of the student is {tuple(x.shape)}, of the teacher "
                f"{found}: change num_hidden_layers alone, or use --init random"
            )
        x.copy_(source[name])


def layers_of(model: PreTrainedModel) -> str:
    """Returns the prefix of the names of a decoder's layers, such as `model.layers.`."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}."
    raise ValueError(f"init is teacher; {type(model).__name__} keeps its layers in no list: use --init random")


def check_settings(work: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if an interrupted run was another one."""
    before = read_json(work / SETTINGS)
    if different := [name for name, value in settings.items() if before.get(name) != value]:
        name = different[0]
        raise ValueError(
            f"{work} holds a run with {name} {before.get(name)}, not {settings[name]}; pass the same options, or "
            "overwrite=True to drop it"
        )


def held_out(log: list[dict[str, float]]) -> dict[str, float]:
    """Returns the last held-out figures of a log."""
    last = next((entry for entry in reversed(log) if "eval_loss" in entry), None)
    return {name: float(last[name]) for name in ("eval_loss", "eval_perplexity")} if last else {}


def print_held_out(figures: dict[str, float]) -> None:
    print(f"held-out loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}")
