"""Prepares the data of a distillation: augmented rows, cached teacher outputs. Runs the demo."""

from __future__ import annotations

from typing import Any

from fastdistill.recipes import demo
from fastdistill.recipes.augment import COPIES, Augmenter, augment, check_output, read_glove
from fastdistill.recipes.distil import finish
from fastdistill.recipes.glue import Task, get_task
from fastdistill.recipes.options import AugmentOptions, CacheOptions, DemoOptions, refuse
from fastdistill.train.cache import MANIFEST, write_cache
from fastdistill.train.checkpoints import load_model
from fastdistill.train.data import pack_corpus
from fastdistill.train.outputs import check
from fastdistill.train.processes import main_first

__all__ = ["augment_task", "cache_teacher", "run_demo"]


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the whole pipeline on built-in text, as `fastdistill.recipes.demo.run` does."""
    return demo.run(options.output, overwrite=options.overwrite, open=options.open)


def augment_task(options: AugmentOptions) -> None:
    """Writes copies of a GLUE task's training rows with some words replaced to `options.output`."""
    task = get_task(options.task)
    if not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; augment makes rows of the GLUE tasks: {', '.join(COPIES)}")
    check_output(options.output, resume=options.resume, overwrite=options.overwrite)
    train = task.load_split("train", options.data)
    trust = options.trust_remote_code
    model, tokenizer = load_model(options.teacher, "AutoModelForMaskedLM", trust_remote_code=trust)
    augmenter = Augmenter(
        model,
        tokenizer,
        read_glove(options.glove, device=model.device),
        copies=COPIES[task.name] if options.copies is None else options.copies,
        **{name: getattr(options, name) for name in ("candidates", "probability", "seed", "batch_size", "bf16")},
    )
    how = {name: getattr(options, name) for name in ("legacy", "resume", "overwrite")}
    augment(task, train, augmenter, options.output, **how)
    finish(options.output)


def cache_teacher(options: CacheOptions) -> None:
    """Runs a teacher over data once and writes its outputs to `options.output`, for `distil_cached`."""
    if options.task and (options.top_k is not None or len(options.data) > 1):
        raise ValueError(
            "with --task, whose classifier's logits are kept whole, --data is one folder and there is no --top-k"
        )
    if options.task:
        why = "with --task that says how rows are read: leave it out"
        refuse(options, "max_length completion_only assistant_only", why)
    if not options.task and options.top_k is None and not options.hidden:
        raise ValueError("nothing to keep of plain text: use --top-k, --hidden or both")
    if not (options.resume and (options.output / MANIFEST).is_file()):
        check(options.output, resume=options.resume, overwrite=options.overwrite)
    dataset, teacher, tokenizer = rows_to_cache(options)
    how = {name: getattr(options, name) for name in ("top_k", "hidden", "batch_size", "bf16", "resume", "overwrite")}
    files = [options.data[0] / "train.tsv"] if options.task else options.data
    write_cache(dataset, teacher, tokenizer, options.output, files=files, **how)
    finish(options.output)


def rows_to_cache(options: CacheOptions) -> tuple[Any, Any, Any]:
    """Returns the tokenised rows, the teacher and its tokenizer."""
    trust = options.trust_remote_code
    if not options.task:
        is_text = all(path.suffix == ".txt" or not path.suffix for path in options.data)
        if is_text:
            refuse(options, "completion_only assistant_only", "plain text has no prompts and no messages: leave it out")
        kind = "AutoModel" if options.top_k is None else None
        teacher, tokenizer = load_model(options.teacher, kind, trust_remote_code=trust)
        if is_text:
            blocks = main_first(lambda: pack_corpus(options.data, tokenizer, options.max_length or 128))
            return blocks, teacher, tokenizer
        from fastdistill.recipes.lm import rows_for_cache  # needs TRL

        return rows_for_cache(options, teacher, tokenizer), teacher, tokenizer
    task = get_task(options.task)
    if not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; it should be one of GLUE's, whose classifiers' logits are kept")
    rows = task.load_split("train", options.data[0])
    teacher, tokenizer = load_model(options.teacher, task.auto_class, trust_remote_code=trust, needs_head=True)
    task = task.for_model(teacher.config)
    return main_first(lambda: task.tokenize(rows, tokenizer)), teacher, tokenizer
