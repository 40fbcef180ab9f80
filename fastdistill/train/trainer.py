"""DistillationTrainer: transformers' Trainer with a teacher and an objective.

The student and its projections are one module, so that the optimiser, DDP, FSDP and checkpoints see both, and the
loss is computed inside that module's forward. The teacher stays outside, in eval mode, without gradients.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainingArguments,
)

from fastdistill.train.capture import (
    States,
    capturable,
    capture,
    refuse_reentrant_checkpointing,
)
from fastdistill.train.checks import check_classes, check_vocabularies
from fastdistill.train.data import TOKEN_COLUMN, PaddingCollator
from fastdistill.train.objective import Objective
from fastdistill.train.resumable import ResumableTrainer

__all__ = ["DistillationModel", "DistillationTrainer"]


class DistillationModel(nn.Module):
    """A student and its objective. `forward` returns {"loss", each term's loss, "logits"}.

    Attributes:
        linear_head: whether the loss against an offline teacher may take the student's last hidden state and head
            instead of its logits, which then never exist (`has_linear_head`).
    """

    accepts_loss_kwargs = True  # losses are divided by num_items, not again by the accumulation steps

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.linear_head = False

    def forward(
        self,
        teacher: States | None = None,
        teacher_logits: Tensor | None = None,
        topk_logprobs: Tensor | None = None,
        topk_indices: Tensor | None = None,
        labels: Tensor | None = None,
        num_items: Tensor | None = None,
        with_loss: bool = True,
        **batch: Tensor,
    ) -> dict[str, Tensor | None]:
        objective = self.objective
        predicts = "prediction" in objective.terms
        topk = None if topk_logprobs is None or topk_indices is None else (topk_logprobs, topk_indices)
        head = self.student.get_output_embeddings() if self.linear_head and topk and predicts and with_loss else None
        # The head of a student that learns inner states only would compute logits nobody reads.
        student = self.student if (predicts and head is None) or not with_loss else self.student.base_model
        last = self.student.config.num_hidden_layers  # the hidden state that a head takes
        hidden = set(objective.hidden) if with_loss else set()
        states = capture(
            student,
            batch,
            hidden=hidden if head is None else hidden | {last},
            attention=tuple(objective.attention) if with_loss else (),
            values=objective.needs_values,
        )
        if not with_loss:
            return {"logits": states.logits}
        losses = objective(
            states,
            teacher,
            mask=batch.get("attention_mask"),
            labels=labels,
            teacher_logits=teacher_logits,
            topk=topk,
            head=None if head is None else (states.hidden[last], head.weight, head.bias),
            num_items=num_items,
        )
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "logits": states.logits}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Called by Trainer; `gradient_checkpointing_enable` is the older name."""
        if hasattr(self.student, "activation_checkpointing_enable"):
            self.student.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
        else:
            self.student.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)


@torch.no_grad()
def has_linear_head(student: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether the student's logits are its last hidden state times the head's weight, plus its bias, and nothing else.

    Judged by a forward pass: what the head was given is the last hidden state, and what it made are the logits, to the
    bit. A softcap, a scale, or a transform before the head, whatever a config calls it, makes them differ.
    """
    head = student.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output.clone())))
    was_training = student.training
    student.eval()
    last = student.config.num_hidden_layers
    try:
        logits = capture(student, batch).logits
        hidden = capture(student.base_model, batch, hidden=[last]).hidden[last]
    finally:
        hook.remove()
        student.train(was_training)
    if not seen or logits is None:
        return False
    given, made = seen[0]  # a base model that is the student itself calls the head again
    return torch.equal(given, hidden) and torch.equal(made.to(logits.dtype), logits)


class DistillationTrainer(ResumableTrainer):
    """Trains `model` to follow `teacher`. Every other argument is transformers.Trainer's.

    Checkpoints hold a plain transformers student (`AutoModel.from_pretrained` loads it), its tokenizer,
    `projections.safetensors` and `objective.json`. Each loss is logged under its term's name. Losses are divided by
    the rows, tokens or pairs of the whole optimiser step: accumulation and processes change nothing. Before the first
    step `check` runs, then one small forward and backward pass.

    Args:
        model: the student.
        teacher: a transformers model; may be None where nothing needs it: a regression on gold scores, or a data set
            with the columns of a cache (`teacher_logits`; `topk_logprobs`, `topk_indices`; `hidden_i`).
        objective: what to compare, with the projections to learn.
        data_collator: `PaddingCollator(processing_class)` by default.
    """

    _signature_columns: list[str] | None

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        objective: Objective,
        args: TrainingArguments | None = None,
        *,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None and processing_class is not None:
            data_collator = PaddingCollator(processing_class)
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # what gets no gradient is frozen before the first step
        for name, given in (("model", model), ("teacher", teacher)):
            if given is not None and any(p.is_meta for p in given.parameters()):
                raise ValueError(
                    f"{name} has no weights in this process; where FSDP_CPU_RAM_EFFICIENT_LOADING is on, transformers "
                    "reads them in the first process alone. Turn it off: every process runs both models"
                )
        self.student, self.teacher, self.objective = model, teacher, objective
        super().__init__(
            model=DistillationModel(model, objective),
            args=args,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        if teacher is not None:
            teacher.eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)
        self._sums: dict[str, Tensor] = {}  # of each term since the last log, on the device
        self._sums_start = 0  # the optimiser step they began at

    # -- loss ----------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        counts = torch.stack([self.objective.count(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def _teacher_states(self, inputs: Mapping[str, Any]) -> States | None:
        objective = self.objective
        if self.teacher is None and objective.hidden:
            return States({i: inputs[f"hidden_{i}"] for i in objective.hidden.values()}, {}, None)
        if self.teacher is None or not objective.needs_teacher:
            return None
        is_known = "teacher_logits" in inputs or "topk_logprobs" in inputs
        if not objective.layer_map and is_known:
            return None
        teacher = self.teacher if "prediction" in objective.terms and not is_known else self.teacher.base_model
        with torch.no_grad(), self.accelerator.autocast():
            return capture(
                teacher,
                inputs,
                hidden=set(objective.hidden.values()),
                attention=set(objective.attention.values()),
                values=objective.needs_values,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        outputs = model(**inputs, teacher=self._teacher_states(inputs), num_items=num_items_in_batch)
        # Counted over all processes, whose gradients DDP and FSDP average.
        is_global = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.args.world_size if is_global else 1
        if model.training:
            if not self._sums:
                self._sums_start = self.state.global_step
            for term in self.objective.terms:
                loss = outputs[term].detach() * scale
                self._sums[term] = self._sums[term] + loss if term in self._sums else loss
        loss = outputs["loss"] * scale
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The distillation loss where it can be had, the student's logits, the labels."""
        inputs = self._prepare_inputs(inputs)
        has_target = self.teacher is not None or not (self.objective.attention or self._missing(inputs))
        with torch.no_grad():
            if has_target:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            else:
                loss, outputs = None, model(**inputs, with_loss=False)
        if prediction_loss_only:
            return loss, None, None
        if outputs["logits"] is None and "prediction" in self.objective.terms:  # the loss did without them
            with torch.no_grad():
                outputs = model(**inputs, with_loss=False)
        logits, labels = outputs["logits"], inputs.get("labels")
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

    # -- before the first step -----------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what would fail late or train nothing. `train` calls it, and then runs the first rows once.

        Raises ValueError where the vocabularies differ, the classes or their order differ, a teacher is missing, or
        the student recomputes activations in reentrant mode.
        """
        objective, student, teacher = self.objective, self.student, self.teacher
        columns = getattr(self.train_dataset, "column_names", None) or ()
        if teacher is None:
            if objective.attention:
                raise ValueError(
                    f"teacher is None; the terms {objective.terms} need one: no data set holds the queries and keys "
                    "that the attention term compares. Give a teacher, or leave 'attention' out of terms"
                )
            missing = self._missing(columns)
            if missing:
                raise ValueError(
                    f"teacher is None; the terms {objective.terms} need one, or in train_dataset the columns "
                    f"{', '.join(missing)}, which fastdistill cache writes"
                )
        else:
            check_vocabularies(student.config, teacher.config, self.processing_class)
            if "prediction" in objective.terms and objective.needs_teacher:
                check_classes(student.config, teacher.config)
        if objective.parity == "official" and any(TOKEN_COLUMN.fullmatch(name) for name in columns):
            raise ValueError(
                "parity is 'official', which counts padding, for which the columns of an offline teacher hold nothing; "
                "use 'masked'"
            )
        if self._checkpointing_is_reentrant():
            raise ValueError(
                "activation checkpointing is set to reentrant mode, which detaches captured states, so that losses on "
                'them would train nothing; pass {"use_reentrant": False}'
            )
        refuse_reentrant_checkpointing(student)
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "fsdp is set; accelerate shards on accelerators only and would give every process the whole student "
                "instead. Leave fsdp out, or run where there is an accelerator"
            )

    def _missing(self, columns: Collection[str]) -> list[str]:
        """What rows with these columns lack to do without a teacher, the attention term aside."""
        objective = self.objective
        needed = [f"hidden_{i}" for i in sorted(set(objective.hidden.values()))]
        is_known = "teacher_logits" in columns or {"topk_logprobs", "topk_indices"} <= set(columns)
        if "prediction" in objective.terms and not objective.is_regression and not is_known:
            needed.append("teacher_logits or topk_logprobs and topk_indices")
        return [name for name in needed if name not in columns]

    def _checkpointing_is_reentrant(self) -> bool:
        options = getattr(self.args, "activation_checkpointing_kwargs", None) or getattr(
            self.args, "gradient_checkpointing_kwargs", None
        )
        return bool(options and options.get("use_reentrant"))

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """One small forward and backward pass; freezes for the block what gets no gradient from this objective.

        An inner objective never reaches the pooler and the classifier, nor an attention-only one the end of the last
        layer. DDP waits for their gradients, and weight decay would shrink them.
        """
        model = self.model
        rows = list(itertools.islice(iter(self.train_dataset), min(2, self.args.per_device_train_batch_size)))
        batch = self._get_collator_with_removed_columns(self.data_collator)(rows)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            model.to(self.args.device)  # where the teacher is; Trainer leaves it until it is sharded
        device = next(self.student.parameters()).device
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        was_training = model.training
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if "topk_logprobs" in batch and "prediction" in self.objective.terms:
                model.linear_head = has_linear_head(self.student, batch)
            model.train()
            with self.accelerator.autocast():
                loss = model(**batch, teacher=self._teacher_states(batch))["loss"]
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of the first rows is {loss.item()}; the student or the teacher overflows")
            if loss.requires_grad:
                loss.backward()
        model.train(was_training)
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name for name, p in learned.items() if p.grad is None}
        model.zero_grad(set_to_none=True)
        if len(frozen) == len(learned):
            raise ValueError(f"no parameter of the student gets a gradient from the terms {self.objective.terms}")
        for name in frozen:
            learned[name].requires_grad_(False)
        del learned  # FSDP puts other parameters in their places
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                if name in frozen:
                    parameter.requires_grad_(True)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        models = (self.student, self.teacher) if self.objective.attention else ()
        with capturable(*models):
            yield

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        self._sums = {}
        with self._capturable(), self._trainable():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._capturable():
            return super().evaluation_loop(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that student or teacher take: a DistilBERT student has no token types, its teacher does."""
        if self._signature_columns is None:
            models = [model for model in (self.student, self.teacher) if model is not None]
            names = itertools.chain.from_iterable(inspect.signature(model.forward).parameters for model in models)
            cached = ["teacher_logits", "topk_logprobs", "topk_indices"]
            if self.teacher is None:
                cached += [f"hidden_{i}" for i in self.objective.hidden.values()]
            self._signature_columns = list(dict.fromkeys([*names, "labels", "label", "label_ids", *cached, "length"]))

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {name: _strip(state_dict, name) for name in ("student.", "objective.")}
        self.student.save_pretrained(folder, state_dict=parts["student."])
        self.objective.save(folder, parts["objective."])
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not os.path.isdir(resume_from_checkpoint):
            raise ValueError(f"resume_from_checkpoint is {resume_from_checkpoint!r}; there is no such folder")
        load_student(self.student, resume_from_checkpoint)
        if len(self.objective.projections):
            self.objective.load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def load_student(student: PreTrainedModel, folder: str | Path) -> None:
    """Read a student's weights back in place, whatever transformers did to write them (ties, shards, renames)."""
    student.load_state_dict(read_student(type(student), folder, student.dtype).state_dict())


def read_student(kind: type[PreTrainedModel], folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A student that a stage wrote, with its weights in every process."""
    disable_fsdp_ram_efficient_loading()
    return kind.from_pretrained(str(folder), dtype=dtype)


def _strip(state_dict: dict[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
