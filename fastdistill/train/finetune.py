"""Training on gold labels alone: what makes a teacher, and what a distilled student is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastdistill.train.data import PaddingCollator, add_length
from fastdistill.train.outputs import drop_checkpoints, last_checkpoint, whole_output
from fastdistill.train.processes import on_main
from fastdistill.train.resumable import ResumableTrainer
from fastdistill.train.stages import training_arguments
from fastdistill.train.trainer import load_student, read_student

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
    """Train a classifier in place on the `labels` of `dataset` and write it to `output_dir`, whole or not at all.

    The schedule is the prediction stage's (linear, with warm-up), so that a student with and without distillation are
    trained alike. Arguments are `fastdistill.train.stages`'; `arguments` go to transformers.TrainingArguments.

    Raises FileExistsError as the stages do.
    """
    output, kind, dtype = Path(output_dir), type(model), model.dtype
    if resume and (output / "config.json").is_file():
        load_student(model, output)
        return model.eval()
    with whole_output(output, resume=resume, overwrite=overwrite) as work:
        args = training_arguments(
            work,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup=warmup,
            scheduler="linear",
            weight_decay=weight_decay,
            seed=seed,
            arguments=arguments or {},
        )
        trainer = ResumableTrainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            data_collator=PaddingCollator(tokenizer),
            train_dataset=add_length(dataset),
            callbacks=list(callbacks),
        )
        # Classifiers take num_items_in_batch and leave it unused: Trainer would take their means for shares of a sum,
        # and scale them by the processes and the accumulation.
        trainer.model_accepts_loss_kwargs = False
        trainer.train(resume_from_checkpoint=on_main(lambda: last_checkpoint(work)))
        trainer.save_model()
        trainer.save_state()
    on_main(lambda: drop_checkpoints(output))  # last, so that a killed run always has one
    # Accelerate left a forward under autocast here; its own unwrapping would take transformers' decorators off as well.
    if model.__dict__.pop("_original_forward", None):
        del model.forward
    if trainer.is_fsdp_enabled:  # the given one is left in shards
        model = read_student(kind, output, dtype).to(args.device)
    return model.eval()
