"""Distils a causal language model: TRL's data handling and SFTTrainer, with the loss of `causal_lm_loss`.

    distil_lm(LMOptions(teacher="teacher", student="student", dataset=["chat.jsonl"], output=Path("out")))

The teacher is live, or a cache that `cache_teacher` wrote, or absent (`alpha=0`: the labels alone).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import SFTConfig, SFTTrainer

from fastdistill.integrations.transformers import CausalLMDistillationMixin
from fastdistill.recipes.distil import finish, finished, trainer_arguments
from fastdistill.recipes.lm_rows import read_and_tokenize
from fastdistill.recipes.options import CacheOptions, Divergence, LMOptions
from fastdistill.train.cache import check_cache, read_cache, weightless_teacher
from fastdistill.train.causal_lm import check_options
from fastdistill.train.checkpoints import check_folder, load_model
from fastdistill.train.data import PaddingCollator
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import claim, last_checkpoint, working_folder, write_whole
from fastdistill.train.processes import on_main, processes
from fastdistill.train.resumable import ResumableTrainer, training_arguments
from fastdistill.train.students import auto_name, build_student, is_config, positions

__all__ = ["LMTrainer", "distil_lm"]

SETTINGS = "distillation.json"  # how the student was distilled; a resumed run must agree


def distil_lm(options: LMOptions) -> dict[str, float]:
    """Distils a causal language model into `options.output`, a plain transformers model with its tokenizer.

    Returns the held-out figures, `eval_loss` (cross-entropy of the labels, per token) and `eval_perplexity`; nothing
    without `options.eval` or `options.eval_split`.
    """
    if finished(options) is not None:
        state = json.loads((options.output / "trainer_state.json").read_text(encoding="utf-8"))
        return held_out(state["log_history"])
    run = LMRun(options)
    output = options.output
    checkpoint = on_main(lambda: last_checkpoint(working_folder(output))) if options.resume else None
    if checkpoint is not None:
        on_main(lambda: check_settings(working_folder(output), run.settings))
    trainer = run.trainer()
    on_main(lambda: claim(output, resume=options.resume, overwrite=options.overwrite))
    on_main(lambda: write_whole(working_folder(output) / SETTINGS, json.dumps(run.settings, indent=2) + "\n"))
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
            "lora": options.lora,
        }  # fmt: skip
        if options.lora is not None and is_config(options.student):
            raise ValueError(f"student is {options.student}, a config file; --lora adapts the weights of a checkpoint")
        self.teacher, self.tokenizer = load_teacher(options)
        self.student = self.make_student()
        self.check_tokenizer()
        classes = min(model.config.vocab_size for model in (self.student, self.teacher) if model is not None)
        if (options.vocab_size or 0) > classes:
            raise ValueError(f"vocab_size is {options.vocab_size}; the models have {classes} classes")
        self.args = self.arguments()
        self.train_rows, self.eval_rows = self.rows()

    def make_student(self) -> PreTrainedModel:
        """Returns the student. Each call makes the same one."""
        options = self.options
        torch.manual_seed(options.seed)
        if self.teacher is None:  # labels alone, or a cache that was made elsewhere
            check_causal(options.student, options.trust_remote_code)
            return load_model(options.student, "AutoModelForCausalLM", trust_remote_code=options.trust_remote_code)[0]
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

    def check_tokenizer(self) -> None:
        """Raises ValueError if the student's checkpoint brings another vocabulary than the teacher's tokenizer."""
        if is_config(self.options.student):
            return
        try:
            ours = AutoTokenizer.from_pretrained(
                self.options.student, trust_remote_code=self.options.trust_remote_code
            ).get_vocab()
        except (OSError, ValueError):  # a checkpoint without a tokenizer takes the teacher's
            return
        theirs = self.tokenizer.get_vocab()
        if ours != theirs:
            token = next(iter(sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[::-1])))
            raise ValueError(
                f"student is {self.options.student}, whose tokenizer differs from the teacher's ({token[0]!r} is not "
                f"token {token[1]} of both); both models should read the same token ids: choose a student of the "
                "teacher's family"
            )

    def arguments(self) -> SFTConfig:
        """Returns TRL's arguments. Those given by their own names win."""
        options = self.options
        most = min(positions(model) for model in (self.student, self.teacher) if model is not None)
        if options.max_length is not None and options.max_length > most:
            raise ValueError(f"max_length is {options.max_length}; the models take {most} tokens at most")
        evaluates = options.eval is not None or options.eval_split is not None
        own: dict[str, Any] = {
            "max_length": options.max_length or min(1024, most), "packing": options.packing,
            "completion_only_loss": options.completion_only, "assistant_only_loss": options.assistant_only,
            "logging_steps": 10, "eval_strategy": "epoch" if evaluates else "no",
            "per_device_eval_batch_size": options.batch_size, "trust_remote_code": options.trust_remote_code,
            "train_sampling_strategy": "random",
        }  # fmt: skip
        own.update(trainer_arguments(options))
        args = training_arguments(working_folder(options.output), options, SFTConfig, **own)
        if args.eval_strategy != "no" and not evaluates:
            raise ValueError(f"--eval_strategy is {args.eval_strategy}; pass --eval or --eval-split")
        return args

    def rows(self) -> tuple[Dataset, Dataset | None]:
        """Returns the tokenised rows to train on, and those held out."""
        options, args = self.options, self.args
        read = partial(read_and_tokenize, tokenizer=self.tokenizer, args=args)
        data_set = partial(read, options.dataset, config=options.dataset_config)
        if options.cache is not None:
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

    def trainer(self) -> LMTrainer:
        """Returns the trainer. If it refuses the models or options, no working folder is left."""
        options, args, work = self.options, self.args, Path(self.args.output_dir)
        args.assistant_only_loss = False  # SFTTrainer refuses it for rows that are tokenised
        args.remove_unused_columns = False  # it would remove the cached teacher's
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        is_live = options.cache is None and options.alpha > 0
        is_new = not work.exists()
        try:
            return LMTrainer(
                self.student, args, train_dataset=self.train_rows, eval_dataset=self.eval_rows,
                processing_class=self.tokenizer, peft_config=lora_config(options),
                data_collator=None if options.cache is None else CachedCollator(self.tokenizer),
                teacher=self.teacher if is_live else None, distillation=self.distillation, base=self.make_student,
            )  # fmt: skip
        except Exception:
            if is_new and work.is_dir() and not any(work.iterdir()):
                work.rmdir()
            raise


def load_teacher(options: LMOptions) -> tuple[Any, Any]:
    """Returns the teacher and its tokenizer: a cache's without weights, none (and the student's) for labels alone."""
    trust = options.trust_remote_code
    if options.cache is not None:
        teacher = weightless_teacher(options.cache)
        tokenizer = AutoTokenizer.from_pretrained(options.cache)
        check_cache(options.cache, tokenizer=tokenizer)
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
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    kinds = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, type(config).__name__)]
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
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


class LMTrainer(CausalLMDistillationMixin, ResumableTrainer, SFTTrainer):
    """TRL's SFTTrainer with a teacher, which may be stopped at any moment.

    It evaluates on the labels: `eval_loss` is their cross-entropy per token, whatever the loss that trains.

    Args:
        base: makes the student again, for the output of a LoRA, which is merged.
    """

    def __init__(self, *args: Any, base: Callable[[], PreTrainedModel], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError("fsdp is set; accelerate shards on accelerators only: leave it out on a CPU")
        self.base = base
        self.held_out = torch.zeros(2, dtype=torch.float64)  # sum of the losses of all labels, their number

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.distillation.get("alpha", 1.0) > 0:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return SFTTrainer.compute_loss(self, model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if state.end_of_dataloader and state.remainder > 0 and not self.padding_free:
            # accelerate fills the last batches with rows from the start
            labels[max(state.remainder - len(labels) * self.args.process_index, 0) :] = -100
        result = super().prediction_step(model, inputs, *args, **kwargs)
        count = (labels[:, 1:] != -100).sum()
        self.held_out += torch.stack([result[0] * count, count]).double().cpu()
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            total: Tensor = self.accelerator.reduce(self.held_out.to(self.args.device, torch.float32), "sum")
            logs["eval_loss"] = float(total[0] / total[1])
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
            self.held_out.zero_()
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and evaluates once more if the last step was not."""
        result = super().train(*args, **kwargs)
        done = [entry["step"] for entry in self.state.log_history if "eval_loss" in entry]
        if self.eval_dataset is not None and (
            self.args.load_best_model_at_end or done[-1:] != [self.state.global_step]
        ):
            self.evaluate()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model. The output of a LoRA is the merged model, with the adapter beside it in `adapter`."""
        work = Path(self.args.output_dir)
        if output_dir is not None or not isinstance(self.model, PeftModel):
            return super().save_model(output_dir, _internal_call)
        super().save_model(str(work / "adapter"), True)
        self.accelerator.wait_for_everyone()
        on_main(lambda: self.write_merged(work))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def write_merged(self, work: Path) -> None:
        merged = PeftModel.from_pretrained(self.base(), str(work / "adapter")).merge_and_unload()
        merged.save_pretrained(work)
        self.processing_class.save_pretrained(work)


def check_settings(work: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if an interrupted run was another one."""
    before = json.loads((work / SETTINGS).read_text(encoding="utf-8"))
    if different := [name for name, value in settings.items() if before.get(name) != value]:
        name = different[0]
        raise ValueError(
            f"{work} holds a run with {name} {before.get(name)}, not {settings[name]}; pass the same options, or "
            "overwrite=True to drop it"
        )


def held_out(log: list[dict[str, float]]) -> dict[str, float]:
    """Returns the last held-out figures of a log."""
    last = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    return {name: last[name] for name in ("eval_loss", "eval_perplexity") if name in last}


def print_held_out(figures: dict[str, float]) -> None:
    print(f"held-out loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}")
