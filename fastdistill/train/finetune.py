"""Training on gold labels alone: it makes teachers, and the students that distilled ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastdistill.train.data import PaddingCollator, add_length
from fastdistill.train.options import Schedule
from fastdistill.train.outputs import claimed, last_checkpoint
from fastdistill.train.processes import on_main
from fastdistill.train.resumable import ResumableTrainer, load_student, training_arguments

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["finetune"]


def finetune(
    model: PreTrainedModel, dataset: Dataset, tokenizer: Any, output_dir: str | Path, *,
    callbacks: Sequence[Any] = (), resume: bool = False, overwrite: bool = False, **schedule: Any,
) -> PreTrainedModel:  # fmt: skip
    """Trains a classifier in place on the `labels` of `dataset` and writes it to `output_dir`, whole or not at all.

    Args:
        callbacks, resume, overwrite: as in the stages.
        schedule: the fields of `fastdistill.train.options.Schedule`. The defaults are those of the prediction stage
            (3 epochs, batches of 32, learning rate 3e-5, linear with warm-up over the first 10%), so that students
            with and without distillation are trained alike.

    Raises FileExistsError as the stages do.
    """
    options = Schedule(**{"learning_rate": 3e-5, "warmup": 0.1, **schedule})
    output = Path(output_dir)
    if resume and (output / "config.json").is_file():
        load_student(model, output)
        return model.eval()
    with claimed(output, resume=resume, overwrite=overwrite) as work:
        trainer = ResumableTrainer(
            model, training_arguments(work, options), PaddingCollator(tokenizer), add_length(dataset),
            processing_class=tokenizer, callbacks=list(callbacks),
        )  # fmt: skip
        # Classifiers take num_items_in_batch and ignore it: Trainer would take their means for shares of a sum, and
        # scale them by the processes and the accumulation.
        trainer.model_accepts_loss_kwargs = False
        model = trainer.train_whole(model, output, on_main(lambda: last_checkpoint(work)))
    # Accelerate left a forward under autocast here; its own unwrapping would take transformers' decorators off as well.
    if model.__dict__.pop("_original_forward", None):
        del model.forward
    return model
