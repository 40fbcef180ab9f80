"""The three stages of TinyBERT (arXiv 1909.10351): general, intermediate, prediction.

A stage is a plain object that owns its data, its losses and its schedule; `run` trains a student and returns it:

    GeneralStage(corpus=["corpus.txt"]).run(student, teacher, tokenizer, "out/general")
    IntermediateStage(dataset=dataset).run(classifier, task_teacher, tokenizer, "out/intermediate")
    PredictionStage(dataset=dataset).run(classifier, task_teacher, tokenizer, "out/student")
    CachedStage(cache="cache").run(student, None, tokenizer, "out/student")  # from an offline teacher

Defaults are the published recipe's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from fastdistill.train.cache import check_cache, read_cache, teacher_config
from fastdistill.train.data import OwnRows, add_length, pack_corpus, read_corpus
from fastdistill.train.objective import Objective
from fastdistill.train.outputs import claim, drop_checkpoints, last_checkpoint, replace, working_folder
from fastdistill.train.processes import main_first, on_main, processes
from fastdistill.train.trainer import DistillationTrainer, load_student, read_student

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = [
    "CachedStage",
    "GeneralStage",
    "IntermediateStage",
    "PredictionStage",
]


@dataclass(kw_only=True)
class _Stage(ABC):
    """What the stages share.

    Attributes:
        epochs, batch_size (per process), learning_rate, warmup (share of the steps), scheduler, weight_decay (not
            on biases and norms): the schedule.
        method, terms, layer_map, projection, parity, temperature, teacher_layer, relation_heads, tail: see
            `fastdistill.train.objective.Objective`.
        projections: a folder written by an earlier stage, whose projections this one continues from, as far as its
            terms have any.
        seed: of shuffling, dropout and new projections.
        arguments: anything else transformers.TrainingArguments takes ({"bf16": True}, {"report_to": "wandb"}, ...);
            it wins over the attributes here.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    warmup: float = 0.0
    scheduler: str = "linear"
    weight_decay: float = 0.01
    method: str = "tinybert"
    terms: Sequence[str] | None
    layer_map: str | Sequence[int | None] | None = None
    projection: str = "shared"
    parity: str = "masked"
    temperature: float = 1.0
    teacher_layer: int | None = None
    relation_heads: int | None = None
    tail: str = "renormalize"
    projections: str | Path | None = None
    seed: int = 42
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: Any,
        output_dir: str | Path,
        *,
        eval_dataset: Dataset | None = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> PreTrainedModel:
        """Train `student` in place and write it to `output_dir`, whole or not at all.

        FSDP leaves the given one in shards; the one that is returned is whole.

        `output_dir` receives the student as a plain transformers model, the tokenizer, `objective.json`,
        `projections.safetensors` where there are any, and `trainer_state.json` with the losses over the steps.
        Work goes on in `<output_dir>.partial` beside it, which an interrupted run leaves behind.

        Args:
            resume: continue an interrupted run; return the finished student where there is one.
            overwrite: replace what is in `output_dir`, and drop an interrupted run.

        Raises:
            FileExistsError: `output_dir` is not empty, or an interrupted run lies beside it, and neither `resume`
                nor `overwrite` is set.
            ValueError: what `Objective` and `DistillationTrainer.check` refuse; with `resume`, a run with other
                settings of the objective.
            Terminated: SIGTERM came; the last step's checkpoint is written, for `resume`.
        """
        output = Path(output_dir)
        work = working_folder(output)
        args = self._training_arguments(work)  # which sets the processes up
        torch.manual_seed(args.seed)  # new projections
        objective = Objective(
            student.config,
            self._teacher_config(teacher),
            method=self.method,
            terms=self.terms,
            layer_map=self.layer_map,
            projection=self.projection,
            parity=self.parity,
            temperature=self.temperature,
            teacher_layer=self.teacher_layer,
            relation_heads=self.relation_heads,
            tail=self.tail,
        )
        if on_main(lambda: resume and not overwrite and output.is_dir() and any(output.iterdir())):
            on_main(lambda: objective.check_settings(output))
            on_main(lambda: drop_checkpoints(output))
            load_student(student, output)
            return student.eval()
        if self.projections is not None and len(objective.projections):
            objective.load_projections(self.projections)
        checkpoint = on_main(lambda: last_checkpoint(work)) if resume else None
        if checkpoint is not None:
            on_main(lambda: objective.check_settings(checkpoint))
        on_main(lambda: claim(output, resume=resume, overwrite=overwrite))
        dataset = main_first(lambda: self.prepare(tokenizer))
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            args,
            processing_class=tokenizer,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        on_main(lambda: replace(work, output))
        on_main(lambda: drop_checkpoints(output))  # last, so that a killed run always has one
        if trainer.is_fsdp_enabled:
            student = read_student(type(student), output, student.dtype).to(args.device)
        return student.eval()

    @abstractmethod
    def prepare(self, tokenizer: Any) -> Dataset | OwnRows:
        """The rows to train on, tokenised, with a `length` column."""

    def _teacher_config(self, teacher: PreTrainedModel | None) -> Any:
        """The teacher's transformers config; None where nothing is asked of a teacher."""
        return None if teacher is None else teacher.config

    def _training_arguments(self, work: Path) -> TrainingArguments:
        return training_arguments(
            work,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            scheduler=self.scheduler,
            weight_decay=self.weight_decay,
            seed=self.seed,
            arguments=self.arguments,
        )


@dataclass(kw_only=True)
class GeneralStage(_Stage):
    """Stage 1: inner losses on a corpus of plain text. Defaults: 3 epochs, batches of 256, learning rate 5e-5, linear
    with warm-up over the first 10%.

    Attributes:
        corpus: text files, or a data set with a `text` column or with `input_ids` already.
        max_length: tokens in a block; sentences are packed into blocks.
        streaming: read the corpus while it trains, without end, instead of tokenising it before the first step; needs
            `arguments={"max_steps": N}`, of which `warmup` is a share, and takes no notice of `epochs`. Each process
            reads lines of its own. Always so for an IterableDataset.

    Raises ValueError where a streamed corpus comes without `max_steps`.
    """

    corpus: Sequence[str | Path] | Dataset | IterableDataset
    max_length: int = 128
    streaming: bool = False
    epochs: float = 3
    batch_size: int = 256
    learning_rate: float = 5e-5
    warmup: float = 0.1
    terms: Sequence[str] | None = None

    def __post_init__(self) -> None:
        from datasets import IterableDataset

        self.streaming = self.streaming or isinstance(self.corpus, IterableDataset)
        max_steps = self.arguments.get("max_steps", -1)
        if self.streaming and max_steps < 1:
            raise ValueError(
                f"max_steps is {max_steps}; a streamed corpus has no length, so pass the number of steps as "
                'arguments={"max_steps": N}'
            )

    def prepare(self, tokenizer: Any) -> Dataset | OwnRows:
        if not self.streaming:
            return pack_corpus(self.corpus, tokenizer, self.max_length)
        corpus, here = read_corpus(self.corpus, streaming=True), processes()
        index, number = here.process_index, here.num_processes
        mine = corpus.filter(lambda _, line: line % number == index, with_indices=True)
        blocks = pack_corpus(mine, tokenizer, self.max_length)
        if next(iter(blocks), None) is None:
            raise ValueError("corpus holds no text" + (f" for process {index} of {number}" if number > 1 else ""))
        return OwnRows(blocks.shuffle(seed=self.seed, buffer_size=SHUFFLED))

    def _training_arguments(self, work: Path) -> TrainingArguments:
        args = super()._training_arguments(work)
        if self.streaming and hasattr(args, "group_by_length"):
            args.group_by_length = False  # transformers 5.0 refuses it for streams, later versions pass over it
        return args


SHUFFLED = 10_000  # blocks of a stream that a random one is drawn from


@dataclass(kw_only=True)
class IntermediateStage(_Stage):
    """Stage 2, first half: the same losses on the task's (augmented) text. Defaults: 20 epochs, batches of 32,
    learning rate 5e-5, constant. With "prediction" among the terms it trains the head as well.

    Attributes:
        dataset: tokenised rows, as `fastdistill.recipes.glue.tokenize` makes them.
    """

    dataset: Dataset
    epochs: float = 20
    batch_size: int = 32
    learning_rate: float = 5e-5
    scheduler: str = "constant"
    terms: Sequence[str] | None = None

    def prepare(self, tokenizer: Any) -> Dataset:
        return add_length(self.dataset)


@dataclass(kw_only=True)
class PredictionStage(_Stage):
    """Stage 2, second half: the teacher's soft predictions, or the gold scores of a regression. Defaults: 3 epochs,
    batches of 32, learning rate 3e-5, linear with warm-up over the first 10%.

    Attributes:
        dataset: tokenised rows. With the `teacher_logits` of `add_teacher_logits` the teacher does not run.
    """

    dataset: Dataset
    epochs: float = 3
    batch_size: int = 32
    learning_rate: float = 3e-5
    warmup: float = 0.1
    terms: Sequence[str] | None = field(default=("prediction",), init=False)

    def prepare(self, tokenizer: Any) -> Dataset:
        return add_length(self.dataset)


@dataclass(kw_only=True)
class CachedStage(_Stage):
    """Learning from an offline teacher: what `fastdistill.train.cache` wrote. Defaults: the prediction term, and the
    general stage's schedule.

    `run` takes None for the teacher. One that is given runs for the inner terms, the attention term among them, which
    no cache can serve.

    Attributes:
        cache: the folder. Its tokenizer is the one to pass to `run`; a student or a tokenizer with another vocabulary,
            or a classifier with other classes, is a ValueError.
    """

    cache: str | Path
    epochs: float = 3
    batch_size: int = 256
    learning_rate: float = 5e-5
    warmup: float = 0.1
    terms: Sequence[str] = ("prediction",)

    def run(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: Any,
        output_dir: str | Path,
        **options: Any,
    ) -> PreTrainedModel:
        check_cache(self.cache, student=student, tokenizer=tokenizer)
        return super().run(student, teacher, tokenizer, output_dir, **options)

    def prepare(self, tokenizer: Any) -> Dataset:
        return read_cache(self.cache)

    def _teacher_config(self, teacher: PreTrainedModel | None) -> Any:
        return teacher_config(self.cache)


def training_arguments(
    work: Path,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    warmup: float,
    scheduler: str,
    weight_decay: float,
    seed: int,
    arguments: Mapping[str, Any],
) -> TrainingArguments:
    """The Trainer's arguments for a schedule; `arguments` holds any others and wins."""
    options: dict[str, Any] = {
        "output_dir": str(work),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": max(batch_size, 64),
        "learning_rate": learning_rate,
        "warmup_steps": warmup,  # below 1: a share of all steps
        "lr_scheduler_type": scheduler,
        "weight_decay": weight_decay,
        "seed": seed,
        "save_total_limit": 1,
        "logging_steps": 50,
        # The filter reads every step's loss back from the device, and hides a NaN by repeating older losses.
        "logging_nan_inf_filter": False,
        # Else Trainer refuses bf16 on a machine without an accelerator.
        "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
    }
    processes()  # before TrainingArguments, with whose shorter timeout the others would give up on a long tokenising
    # Batches of similar length need little padding. Named `group_by_length` in transformers 5.0.
    names = {option.name for option in fields(TrainingArguments)}
    if "train_sampling_strategy" in names:
        options["train_sampling_strategy"] = "group_by_length"
    else:
        options["group_by_length"] = True
    return TrainingArguments(**{**options, **arguments})
