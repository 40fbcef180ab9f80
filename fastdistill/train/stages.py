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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel, TrainingArguments

from fastdistill.train.cache import check_cache, read_cache, teacher_config, warn_of_lost_mass
from fastdistill.train.capture import WAY_OUT, capturable
from fastdistill.train.data import OwnRows, add_length, flatten, named, pack_corpus, read_corpus, reading_text
from fastdistill.train.inputs import refuse_encoder_decoder
from fastdistill.train.objective import Objective
from fastdistill.train.options import ObjectiveOptions, Schedule
from fastdistill.train.outputs import claimed, drop_checkpoints, last_checkpoint, working_folder
from fastdistill.train.processes import main_first, on_main, processes
from fastdistill.train.resumable import load_student, training_arguments
from fastdistill.train.trainer import DistillationTrainer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["CachedStage", "GeneralStage", "IntermediateStage", "PredictionStage"]

SHUFFLED = 10_000  # blocks of a stream that the next one is drawn from


@dataclass(frozen=True, kw_only=True)
class _Stage(ObjectiveOptions, Schedule, ABC):
    """Trains a student. The options are those of `ObjectiveOptions` and `Schedule`."""

    # The folder of an earlier stage. This stage continues from the projections there that its terms have.
    projections: str | Path | None = None
    packing: ClassVar[bool] = False  # whether the sequences of a batch make one row

    def run(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, tokenizer: Any, output_dir: str | Path, *,
        eval_dataset: Dataset | None = None, compute_metrics: Any = None, callbacks: Sequence[Any] = (),
        resume: bool = False, overwrite: bool = False,
    ) -> PreTrainedModel:  # fmt: skip
        """Trains `student` in place and writes it to `output_dir`, whole or not at all.

        FSDP leaves the given student in shards; the returned one is whole.

        `output_dir` receives the student as a plain transformers model, the tokenizer, `objective.json`,
        `projections.safetensors` where there are any, and `trainer_state.json` with the losses over the steps.
        The run works in `<output_dir>.partial`, which stays behind when it is interrupted.

        Args:
            resume: continue an interrupted run; return the finished student where there is one.
            overwrite: replace the contents of `output_dir`, and drop an interrupted run.

        Raises:
            FileExistsError: `output_dir` is not empty, or an interrupted run lies beside it, and neither `resume`
                nor `overwrite` is set.
            ValueError: `Objective` or `DistillationTrainer.check` refuses the models or options; with `resume`, the
                settings of the objective differ from the run's.
            Terminated: SIGTERM came; the last step's checkpoint is written, for `resume`.
        """
        refuse_encoder_decoder(student=student, teacher=teacher)
        output = Path(output_dir)
        args = self._training_arguments(working_folder(output))  # sets the processes up
        torch.manual_seed(args.seed)  # new projections
        options = {option.name: getattr(self, option.name) for option in fields(ObjectiveOptions)}
        objective = Objective(student.config, self._teacher_config(teacher), **options)
        if on_main(lambda: resume and not overwrite and output.is_dir() and any(output.iterdir())):
            on_main(lambda: objective.check_settings(output))
            on_main(lambda: drop_checkpoints(output))
            load_student(student, output)
            return student.eval()
        if self.projections is not None and len(objective.projections):
            objective.load_projections(self.projections)
        checkpoint = on_main(lambda: last_checkpoint(working_folder(output))) if resume else None
        if checkpoint is not None:
            on_main(lambda: objective.check_settings(checkpoint))
        with claimed(output, resume=resume, overwrite=overwrite), ExitStack() as stack:
            if self.packing:
                stack.enter_context(packing(objective, student, teacher))
            trainer = DistillationTrainer(
                student, teacher, objective, args, processing_class=tokenizer,
                data_collator=flatten if self.packing else None,
                train_dataset=main_first(lambda: self.prepare(tokenizer)), eval_dataset=eval_dataset,
                compute_metrics=compute_metrics, callbacks=list(callbacks),
            )  # fmt: skip
            return trainer.train_whole(student, output, checkpoint)

    @abstractmethod
    def prepare(self, tokenizer: Any) -> Dataset | OwnRows:
        """Returns the rows to train on, tokenised, with a `length` column."""

    def _training_arguments(self, work: Path) -> Any:
        if not self.packing:
            return training_arguments(work, self)
        # A batch of rows of similar length would hold few tokens, or many. transformers 5.0 has another name.
        is_named = hasattr(TrainingArguments, "train_sampling_strategy")
        order: dict[str, Any] = {"train_sampling_strategy": "random"} if is_named else {"group_by_length": False}
        return training_arguments(work, self, **order)

    def _teacher_config(self, teacher: PreTrainedModel | None) -> Any:
        """Returns the teacher's transformers config; None where the stage needs no teacher."""
        return None if teacher is None else teacher.config


@contextmanager
def packing(objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Iterator[None]:
    """Lets capture compute the attention of the models in the block, so that sequences of a row do not see each other.

    Raises ValueError where it cannot, and for terms that count rows or padding.
    """
    if objective.options.parity == "official":
        raise ValueError("parity is 'official', which counts padding, of which packing leaves none: use 'masked'")
    if objective.needs_logits and student.get_output_embeddings() is None:
        raise ValueError(
            f"packing is True; {type(student).__name__} predicts once a row, which holds several sequences: leave "
            "'prediction' out of terms, or packing"
        )
    with ExitStack() as stack:
        try:
            stack.enter_context(capturable(*(model for model in (student, teacher) if model is not None)))
        except ValueError as error:
            raise ValueError(
                f"packing is True; {str(error).removesuffix('; ' + WAY_OUT)}, and would read the sequences of a row as "
                "one: leave packing out"
            ) from error
        yield


@dataclass(frozen=True, kw_only=True)
class GeneralStage(_Stage):
    """Stage 1: inner losses on a corpus of plain text. Defaults: 3 epochs, batches of 256, learning rate 5e-5, linear
    with warm-up over the first 10%.

    Attributes:
        corpus: text files, or a data set with a `text` column or with `input_ids` already.
        max_length: tokens in a block; sentences are packed into blocks.
        streaming: read the corpus while it trains, without end, instead of tokenising it before the first step. It
            needs `arguments={"max_steps": N}`, ignores `epochs`, and takes `warmup` as a share of N. Each process
            reads lines of its own. An IterableDataset is always streamed.
        packing: keep lines apart. Each is a sequence, or several where it is longer than `max_length`, and all
            sequences of a batch make one row without padding, in which they do not see each other.
    """

    corpus: Sequence[str | Path] | Dataset | IterableDataset
    max_length: int = 128
    streaming: bool = False
    packing: bool = False  # type: ignore[misc]  # a field here
    batch_size: int = 256
    warmup: float = 0.1

    def __post_init__(self) -> None:
        from datasets import IterableDataset

        object.__setattr__(self, "streaming", self.streaming or isinstance(self.corpus, IterableDataset))
        max_steps = self.arguments.get("max_steps", -1)
        if self.streaming and max_steps < 1:
            raise ValueError(
                f"max_steps is {max_steps}; a streamed corpus has no length, so pass the number of steps as "
                'arguments={"max_steps": N}'
            )

    def prepare(self, tokenizer: Any) -> Dataset | OwnRows:
        if not self.streaming:
            return pack_corpus(self.corpus, tokenizer, self.max_length, apart=self.packing)
        corpus, here = read_corpus(self.corpus, streaming=True), processes()
        index, number = here.process_index, here.num_processes
        # split_dataset_by_node splits after packing and shuffling, so that every process would tokenise all lines.
        mine = corpus.filter(lambda _, line: line % number == index, with_indices=True)
        blocks = pack_corpus(mine, tokenizer, self.max_length, apart=self.packing)
        with reading_text(self.corpus):
            is_empty = next(iter(blocks), None) is None
        if is_empty:
            share = f" for process {index} of {number}" if number > 1 else ""
            raise ValueError(f"corpus holds no text{share} ({named(self.corpus)})")
        return OwnRows(blocks.shuffle(seed=self.seed, buffer_size=SHUFFLED), self.corpus)


@dataclass(frozen=True, kw_only=True)
class IntermediateStage(_Stage):
    """Stage 2, first half: the same losses on the task's (augmented) text. Defaults: 20 epochs, batches of 32,
    learning rate 5e-5, constant. With "prediction" among the terms it trains the head as well.

    Attributes:
        dataset: tokenised rows, as `fastdistill.recipes.glue.tokenize` makes them.
    """

    dataset: Dataset
    epochs: float = 20
    scheduler: str = "constant"

    def prepare(self, tokenizer: Any) -> Dataset:
        return add_length(self.dataset)


@dataclass(frozen=True, kw_only=True)
class PredictionStage(_Stage):
    """Stage 2, second half: the teacher's soft predictions, or the gold scores of a regression. Defaults: 3 epochs,
    batches of 32, learning rate 3e-5, linear with warm-up over the first 10%.

    Attributes:
        dataset: tokenised rows. With the `teacher_logits` of `add_teacher_logits` the teacher does not run.
    """

    dataset: Dataset
    learning_rate: float = 3e-5
    warmup: float = 0.1
    terms: Sequence[str] | None = field(default=("prediction",), init=False)

    def prepare(self, tokenizer: Any) -> Dataset:
        return add_length(self.dataset)


@dataclass(frozen=True, kw_only=True)
class CachedStage(_Stage):
    """Learns from an offline teacher, which `fastdistill.train.cache` wrote. Defaults: the prediction term, and the
    general stage's schedule. `run` takes None for the teacher. A given teacher runs for the inner terms, including the
    attention term, which no cache can serve.

    Attributes:
        cache: the folder. Pass its tokenizer to `run`; a student or a tokenizer with another vocabulary, or a
            classifier with other classes, is a ValueError.
    """

    cache: str | Path
    batch_size: int = 256
    warmup: float = 0.1
    terms: Sequence[str] | None = ("prediction",)

    def run(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, tokenizer: Any, output_dir: str | Path,
        **options: Any,
    ) -> PreTrainedModel:  # fmt: skip
        check_cache(self.cache, student=student, tokenizer=tokenizer)
        if "prediction" in (self.terms or ()) and self.tail == "renormalize":
            warn_of_lost_mass(self.cache, self.alpha)
        return super().run(student, teacher, tokenizer, output_dir, **options)

    def prepare(self, tokenizer: Any) -> Dataset:
        return read_cache(self.cache)

    def _teacher_config(self, teacher: PreTrainedModel | None) -> Any:
        return teacher_config(self.cache)
