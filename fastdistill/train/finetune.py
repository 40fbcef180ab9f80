"""Training on gold labels alone: it makes teachers, and the students that distilled ones are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastdistill.train.data import PaddingCollator, add_length
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import claim, last_checkpoint
from fastdistill.train.processes import on_main
from fastdistill.train.resumable import ResumableTrainer, load_student, training_arguments

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["finetune"]


def finetune(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    epochs: float = 3,
    batch_size: int = 32,
    learning_rate: float = 3e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    seed: int = 42,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> PreTrainedModel:
    """Trains a classifier in place on the `labels` of `dataset` and writes it to `output_dir`, whole or not at all.

    The schedule is the prediction stage's (linear, with warm-up), so that a student with and without distillation are
    trained alike; `fastdistill.train.options.Schedule` describes it, and the stages the other arguments.

    Raises FileExistsError as the stages do.
    """
    output = Path(output_dir)
    if resume and (output / "config.json").is_file():
        load_student(model, output)
        return model.eval()
    work = on_main(lambda: claim(output, resume=resume, overwrite=overwrite))
    schedule = Schedule(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        arguments=arguments or {},
    )
    trainer = ResumableTrainer(
        model=model,
        args=training_arguments(work, schedule),
        processing_class=tokenizer,
        data_collator=PaddingCollator(tokenizer),
        train_dataset=add_length(dataset),
        callbacks=list(callbacks),
    )
    # Classifiers take num_items_in_batch and ignore it: Trainer would take their means for shares of a sum, and scale
    # them by the processes and the accumulation.
    trainer.model_accepts_loss_kwargs = False
    model = trainer.train_whole(model, output, on_main(lambda: last_checkpoint(work)))
    # Accelerate left a forward under autocast here; its own unwrapping would take transformers' decorators off as well.
    if model.__dict__.pop("_original_forward", None):
        del model.forward
    return model
