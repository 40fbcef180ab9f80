"""DistillationTrainer: transformers' Trainer with a teacher and an objective.

The loss is computed inside the forward of `DistillationModel`, which holds the student and its projections. The
teacher stays outside, in eval mode, without gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from fastdistill.train.adapters import check_adapter
from fastdistill.train.capture import States, capturable, refuse_reentrant_checkpointing
from fastdistill.train.checks import (
    check_arguments,
    check_attention,
    check_classes,
    check_inputs,
    check_layerdrop,
    check_own_tokens,
    check_packed,
    check_shared,
    check_transcripts,
    check_vocabularies,
    reads_text,
)
from fastdistill.train.data import TOKEN_COLUMN, PaddingCollator, default_collator
from fastdistill.train.heads import body
from fastdistill.train.inputs import input_names, judge, refuse_encoder_decoder, with_positions
from fastdistill.train.model import DistillationModel, state_mask, teacher_states
from fastdistill.train.objective import Objective
from fastdistill.train.reached import reached
from fastdistill.train.resumable import ResumableTrainer, load_student

__all__ = ["DistillationTrainer", "PaddingCollator"]


class DistillationTrainer(ResumableTrainer):
    """Trains `model` to follow `teacher`. Every other argument is transformers.Trainer's.

    Checkpoints hold a plain transformers student (`AutoModel.from_pretrained` loads it), or the adapters of a PEFT
    student (`PeftModel.from_pretrained` loads them, `merge_and_unload` merges them); its tokenizer,
    `projections.safetensors` and `objective.json`. Each loss is logged under its term's name, and under `balance` the
    load-balancing loss of a mixture of experts whose config has `output_router_logits`. Losses are divided by the rows,
    tokens or pairs of the whole optimiser step: accumulation and processes change nothing. Before the first step
    `check` runs, then two small forward and backward passes.

    Args:
        model: the student.
        teacher: a transformers model; may be None where nothing needs it: a regression on gold scores, or a data set
            with the columns of a cache (`teacher_logits`; `topk_logprobs`, `topk_indices`; `hidden_i`).
        objective: the terms to compute, with the projections to learn.
        processing_class: a tokenizer, an image processor, a feature extractor or None.
        data_collator: `PaddingCollator(processing_class)` by default where that is a tokenizer; Trainer's own default
            for images, which stacks them, and for sound, which a feature extractor pads.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective,
        args: TrainingArguments | None = None, *,
        processing_class: Any = None, data_collator: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if data_collator is None:
            data_collator = default_collator(processing_class)
        if args is not None:
            check_arguments(args)
        self._finds_unused = args is None or args.ddp_find_unused_parameters is None
        refuse_encoder_decoder(model=model, teacher=teacher)
        for name, given in (("model", model), ("teacher", teacher)):
            if given is not None and any(p.is_meta for p in given.parameters()):
                raise ValueError(
                    f"{name} has no weights in this process; where FSDP_CPU_RAM_EFFICIENT_LOADING is on, transformers "
                    "reads them in the first process alone. Turn it off: every process runs both models"
                )
        self.student, self.teacher, self.objective = model, teacher, objective
        super().__init__(
            DistillationModel(model, objective), args, data_collator, processing_class=processing_class, **kwargs
        )
        if teacher is not None:
            teacher.eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._sums: dict[str, Tensor] = {}  # each term's losses since the last log, on the device
        self._sums_start = 0  # the optimiser step at which they began

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        masks = [state_mask(self.student, batch) for batch in batch_samples]
        batches = [{**batch, "attention_mask": mask} for batch, mask in zip(batch_samples, masks, strict=True)]
        counts = torch.stack([self.objective.count(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def _teacher_states(self, inputs: Mapping[str, Any]) -> States | None:
        objective = self.objective
        if self.teacher is None:
            hidden = {i: inputs[f"hidden_{i}"] for i in objective.hidden.values()}
            return States(hidden, {}, None) if hidden else None
        with self.accelerator.autocast():
            return teacher_states(self.teacher, self.student, objective, inputs, _holds_logits(inputs))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, teacher=self._teacher_states(inputs), num_items=num_items_in_batch)
        # Items are counted over all processes, and DDP and FSDP average the gradients of the processes.
        is_global = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.args.world_size if is_global else 1
        if model.training:
            if not self._sums:
                self._sums_start = self.state.global_step
            for term in (*self.objective.terms, *({"balance"} & outputs.keys())):
                self._sums[term] = self._sums.get(term, 0) + outputs[term].detach() * scale
        loss = outputs["loss"] * scale
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Returns the distillation loss where it has a target, the student's logits, and the labels."""
        inputs = self._prepare_inputs(inputs)
        has_target = self.teacher is not None or not (self.objective.attention or self._missing(inputs))
        loss, outputs = None, {"logits": None}
        with torch.no_grad():
            if has_target:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            if outputs["logits"] is None and (self.objective.needs_logits or not has_target):
                outputs = model(**inputs, with_loss=False)  # the loss did without them
        logits, found = outputs["logits"], tuple(inputs.get(name) for name in self.label_names)
        labels: Any = None if any(x is None for x in found) else found[0] if len(found) == 1 else found
        if logits is not None and "start_positions" in inputs:  # (B, 2, L), and Trainer joins batches along (B, L)
            logits, labels = logits.unbind(1), (inputs["start_positions"], inputs["end_positions"])
        return loss, logits, labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._sums_start, 1)
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())), "mean") / steps
            logs.update(zip(self._sums, means.tolist(), strict=True))
            self._sums = {}
        super().log(logs, start_time)

    def check(self) -> None:
        """Raises ValueError for a run that would fail late or train nothing. `train` calls it before the first step.

        It compares the inputs, the vocabularies and their tokens, the classes and their order, and refuses a missing
        teacher, layers that are skipped at random under inner terms, reentrant activation checkpointing, and FSDP
        without an accelerator.
        """
        objective, student, teacher = self.objective, self.student, self.teacher
        columns = getattr(self.train_dataset, "column_names", None) or ()
        needed = f"teacher is None; the terms {objective.terms} need one"
        if teacher is None and objective.attention:
            raise ValueError(
                f"{needed}: no data set holds the queries and keys that the attention term compares. Give a teacher, "
                "or leave 'attention' out of terms"
            )
        if teacher is None and (missing := ", ".join(self._missing(columns))):
            raise ValueError(f"{needed}, or in train_dataset the columns {missing}, which fastdistill cache writes")
        check_adapter(student)
        if objective.hidden or objective.attention:
            check_layerdrop(student.config, objective.terms)
        if objective.needs_teacher_logits:
            check_transcripts(student, teacher, objective.options.alpha)
        if teacher is not None:
            check_shared(student, teacher)
            check_inputs(student, teacher)
            if reads_text(student):
                check_vocabularies(student.config, teacher.config, self.processing_class)
            if objective.needs_teacher_logits and student.get_output_embeddings() is None:
                check_classes(student.config, teacher.config)
        check_own_tokens(student, teacher, self.processing_class)
        if objective.options.parity == "official" and any(TOKEN_COLUMN.fullmatch(name) for name in columns):
            raise ValueError(
                "parity is 'official', which counts padding, for which the columns of an offline teacher hold nothing; "
                "use 'masked'"
            )
        self._check_arguments()

    def _check_arguments(self) -> None:
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        if any((getattr(self.args, name, None) or {}).get("use_reentrant") for name in names):
            raise ValueError(
                "activation checkpointing is set to reentrant mode, which detaches captured states, so that losses on "
                'them would train nothing; pass {"use_reentrant": False}'
            )
        refuse_reentrant_checkpointing(self.student)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "fsdp is set; accelerate shards on accelerators only and would give every process the whole student "
                "instead. Leave fsdp out, or run where there is an accelerator"
            )

    def _missing(self, columns: Collection[str]) -> list[str]:
        """Returns the columns that rows need to do without a teacher and lack, for all terms but attention."""
        needed = [f"hidden_{i}" for i in sorted(set(self.objective.hidden.values()))]
        if self.objective.needs_teacher_logits and not _holds_logits(columns):
            needed.append("teacher_logits or topk_logprobs and topk_indices")
        return [name for name in needed if name not in columns]

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Freezes for the block the parameters that no term reaches, as two small passes show.

        Inner terms never reach the pooler and the classifier, and an attention term alone does not reach the end of
        the last layer. DDP waits for their gradients, and weight decay would shrink them.
        """
        model, batch = self.model, self._first_rows()
        found = reached(model, self.student.config, lambda: self._backward(batch))
        if not found.learned:
            raise ValueError(f"no parameter of the student gets a gradient from the terms {self.objective.terms}")
        for each in (self.student, self.teacher):
            if each is not None and self.objective.attention:
                check_attention(body(each), batch)
        if self._finds_unused:
            self.args.ddp_find_unused_parameters = found.is_random
        for name, parameter in model.named_parameters():
            if name in found.frozen:
                parameter.requires_grad_(False)
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                if name in found.frozen:
                    parameter.requires_grad_(True)

    def _first_rows(self) -> dict[str, Any]:
        """Returns the first rows as a batch on the device; raises ValueError where a model cannot read them."""
        rows = list(itertools.islice(iter(self.train_dataset), min(2, self.args.per_device_train_batch_size)))
        batch = self._get_collator_with_removed_columns(self.data_collator)(rows)
        is_late = self.args.bf16_full_eval or self.args.fp16_full_eval
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_late:
            self.model.to(self.args.device)  # to the teacher; Trainer moves it only later
        batch = self._prepare_inputs(batch)
        positioned = with_positions(batch)
        for model in (self.student, self.teacher):
            if model is not None and "position_ids" in positioned:
                check_packed(model, positioned)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # each process will hold a shard of the student
            judge(self.student if self.objective.needs_logits else body(self.student), batch)
        return batch

    def _backward(self, batch: Mapping[str, Any]) -> None:
        """Leaves the gradients of a batch; raises ValueError where its loss is not finite."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with self.accelerator.autocast():
                loss = self.model(**batch, teacher=self._teacher_states(batch))["loss"]
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of the first rows is {loss.item()}; the student or the teacher overflows")
            if loss.requires_grad:
                loss.backward()

    def _capturable(self) -> AbstractContextManager[None]:
        return capturable(*((self.student, self.teacher) if self.objective.attention else ()))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        self._sums = {}
        with self._capturable(), self._trainable():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._capturable():
            return super().evaluation_loop(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that student or teacher take: a BERT teacher of a DistilBERT student takes token types."""
        models = [model for model in (self.student, self.teacher) if model is not None]
        everything = {name for rows in (self.train_dataset, self.eval_dataset) for name in _columns(rows)}
        names = [name for model in models for name in input_names(model) or everything]
        hidden = [f"hidden_{i}" for i in self.objective.hidden.values()] if self.teacher is None else []
        cached = ["teacher_logits", "topk_logprobs", "topk_indices", *hidden]
        self._signature_columns = [*names, "labels", "label", "label_ids", *cached]
        self._signature_columns += ["length", self.args.length_column_name, *self.label_names]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.student.save_pretrained(folder, state_dict=_part(state_dict, "student."))
        self.objective.save(folder, _part(state_dict, "objective."))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not Path(resume_from_checkpoint).is_dir():
            raise ValueError(f"resume_from_checkpoint is {resume_from_checkpoint!r}; there is no such folder")
        load_student(self.student, resume_from_checkpoint)
        if len(self.objective.projections):
            self.objective.load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _columns(rows: Any) -> Collection[str]:
    several = rows.values() if isinstance(rows, dict) else (rows,)
    return [name for each in several for name in getattr(each, "column_names", None) or ()]


def _holds_logits(columns: Collection[str]) -> bool:
    """Returns whether rows with these columns bring the teacher's prediction."""
    return "teacher_logits" in columns or {"topk_logprobs", "topk_indices"} <= set(columns)


def _part(state_dict: dict[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
