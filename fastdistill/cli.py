"""The command line. Every command is a thin layer over a plain Python call.

Bad input ends with exit code 2 and one line. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:  # what the library raises for bad input; anything else is a bug
        message = " ".join(str(error).split())
        flags = {"overwrite=True": "--overwrite", "resume=True": "--resume", 'method="minilmv2"': "--method minilmv2"}
        for python, flag in flags.items():
            message = message.replace(f"pass {python}", f"use {flag}").replace(python, flag)
        print(f"fastdistill {arguments.command}: error: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"fastdistill {arguments.command}: error: {error.name} is not installed; the commands need "
            "pip install 'fastdistill[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        way_on = "; run the same command with --resume to go on from the last checkpoint"
        print("interrupted" + (way_on if hasattr(arguments, "resume") else ""), file=sys.stderr)
        return 130
    return 0


# -- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Without abbreviations, which would take --batch-size, of one stage, for --batch-sizes, of another."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastdistill", description=__doc__.splitlines()[0])
    parser.description = "Distil Transformers: TinyBERT's stages on your data, and losses that stay low on memory."
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="the whole pipeline on built-in text: no network, no GPU, minutes")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    demo.set_defaults(run=_demo)

    general = commands.add_parser("general", help="stage 1: distil on a corpus of plain text")
    _models(general)
    data = general.add_argument_group("data")
    data.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help="text files, a paragraph a line")
    data.add_argument(
        "--max-length", type=int, default=128, metavar="N", help="tokens in a block (default: %(default)s)"
    )
    data.add_argument(
        "--streaming", action="store_true", help="read the corpus while it trains, not before; needs --max-steps"
    )
    _objective(general)
    _schedule(general, epochs=3, batch_size=256, learning_rate=5e-5)
    _outputs(general)
    general.set_defaults(run=_general)

    augment = commands.add_parser("augment", help="make copies of a task's training rows with some words replaced")
    augment.add_argument("--teacher", required=True, help="masked language model: folder or hub name")
    _data(augment)
    augment.add_argument(
        "--glove", type=Path, required=True, metavar="FILE", help="word vectors in GloVe's text format"
    )
    augment.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="NAME.tsv, as the task's own train.tsv, or NAME.arrow",
    )
    augment.add_argument("--copies", type=int, help="of each sentence (default: the published code's for the task)")
    augment.add_argument("--candidates", type=int, default=15, help="words for each word (default: %(default)s)")
    augment.add_argument(
        "--probability", type=float, default=0.4, help="of a word to be replaced (default: %(default)s)"
    )
    augment.add_argument("--legacy", action="store_true", help="sentence pairs as the published code makes them")
    augment.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    augment.add_argument("--batch-size", type=int, default=64, help="masked sentences at a time (default: %(default)s)")
    augment.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    augment.add_argument("--overwrite", action="store_true", help="replace the output")
    augment.add_argument("--resume", action="store_true", help="continue an interrupted run")
    augment.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    augment.set_defaults(run=_augment)

    task = commands.add_parser("task", help="stage 2: intermediate, prediction, evaluation on a task")
    _models(task)
    _data(task).add_argument(
        "--augmented",
        type=Path,
        metavar="FILE",
        help="train on these rows: what augment wrote, or a tsv like the task's own",
    )
    losses = _objective(task, prediction=True)
    losses.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of predictions (default: %(default)s)"
    )
    losses.add_argument(
        "--labels",
        choices=("teacher", "gold"),
        default="teacher",
        help="of the prediction stage: the teacher's predictions, or the gold labels alone (default: %(default)s)",
    )
    first = task.add_argument_group("intermediate stage")
    first.add_argument("--intermediate-epochs", type=float, metavar="N", help=f"default: {_RECIPE}; 0: skip")
    first.add_argument("--intermediate-learning-rate", type=float, metavar="RATE", help=f"default: {_RECIPE}")
    first.add_argument("--intermediate-batch-size", type=int, metavar="N", help=f"of each process (default: {_RECIPE})")
    last = task.add_argument_group("prediction stage")
    last.add_argument(
        "--prediction-epochs",
        type=float,
        metavar="N",
        help=f"default: {_RECIPE}; 0: skip, with prediction among --terms",
    )
    _grid(last)
    _common(task)
    _outputs(task)
    task.set_defaults(run=_task)

    cache = commands.add_parser("cache", help="run a teacher over data once and write down what it says")
    cache.add_argument("--teacher", required=True, help="checkpoint: folder or hub name")
    cache.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, a paragraph a line; with --task the folder of its tsv files",
    )
    cache.add_argument("--task", help="GLUE task whose training rows a classifier reads, instead of plain text")
    cache.add_argument("--top-k", type=int, metavar="K", help="classes of each token that a language model keeps")
    cache.add_argument(
        "--hidden", type=int, nargs="+", default=(), metavar="I", help="hidden states; 0: the embedding output"
    )
    cache.add_argument("--max-length", type=int, default=128, help="tokens in a block of text (default: %(default)s)")
    cache.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: %(default)s)")
    cache.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    cache.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    _outputs(cache)
    cache.set_defaults(run=_cache)

    cached = commands.add_parser("train-cached", help="distil from what cache wrote; no teacher runs")
    cached.add_argument("--cache", type=Path, required=True, metavar="DIR", help="what cache wrote")
    cached.add_argument(
        "--student", required=True, help="checkpoint; or a preset or JSON config file of the teacher's kind"
    )
    cached.add_argument("--teacher", help="checkpoint; only for --init teacher and for the attention term")
    cached.add_argument(
        "--init", choices=("random", "teacher"), help="weights of a preset or config (default: --teacher's, if given)"
    )
    cached.add_argument(
        "--terms",
        nargs="+",
        choices=("embedding", "hidden", "attention", "prediction"),
        help="losses (default: all that the cache serves)",
    )
    _layer_map_option(cached)
    cached.add_argument(
        "--projection",
        choices=("shared", "per_layer"),
        default="shared",
        help="of hidden states (default: %(default)s)",
    )
    cached.add_argument("--temperature", type=float, default=1.0, help="of the prediction (default: %(default)s)")
    cached.add_argument(
        "--tail",
        choices=("renormalize", "bucket"),
        default="renormalize",
        help="the teacher's other classes: left out, or one class together (default: %(default)s)",
    )
    cached.add_argument("--verify", action="store_true", help="compare every file's SHA-256 first")
    _schedule(cached, epochs=3, batch_size=256, learning_rate=5e-5)
    _outputs(cached)
    cached.set_defaults(run=_train_cached, method="tinybert", parity="masked", teacher_layer=None, relation_heads=None)

    finetune = commands.add_parser(
        "finetune", help="train a model on a task's gold labels alone: a teacher, or a student as baseline"
    )
    finetune.add_argument("--model", required=True, help="checkpoint; or with --teacher a preset or config file")
    finetune.add_argument("--teacher", help="whose vocabulary, labels and (with --init teacher) weights a preset takes")
    finetune.add_argument("--init", choices=("random", "teacher"), help="of a preset or config (default: teacher)")
    _layer_map_option(finetune)
    _data(finetune)
    schedule = finetune.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=float, default=3, metavar="N", help="default: %(default)s")
    _grid(schedule, learning_rate=3e-5, batch_size=32)
    _common(finetune)
    _outputs(finetune)
    finetune.set_defaults(run=_finetune)

    evaluate = commands.add_parser("evaluate", help="a model's metrics on a task")
    evaluate.add_argument("--model", required=True, help="checkpoint: folder or hub name")
    evaluate.add_argument("--against", metavar="TEACHER", help="compare with this model: size, speed, share kept")
    _data(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    evaluate.add_argument("--overwrite", action="store_true", help="replace that file")
    evaluate.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="versions, devices, and the backend each op takes here")
    info.set_defaults(run=_info)
    return parser


_TRUST = "run model code that a checkpoint brings along"
_RECIPE = "the published recipe's"


def _models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--teacher", required=True, help="checkpoint: folder or hub name")
    group.add_argument(
        "--student", required=True, help="tinybert-4l-312, tinybert-6l-768, a JSON config file, or a checkpoint"
    )
    group.add_argument(
        "--init", choices=("random", "teacher"), help="weights of a preset or config (default: folded from the teacher)"
    )


def _data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    tasks = "CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI of GLUE, SQuAD, SQuAD2, or tagging of words"
    group.add_argument("--task", required=True, help=tasks)
    group.add_argument("--data", type=Path, metavar="DIR", help="the task's own files (default: from the hub)")
    return group


def _layer_map_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--layer-map",
        default="uniform",
        metavar="MAP",
        help="uniform, top, bottom, last, or the teacher's hidden state for each of the student's, from the embedding "
        "output on: 0,3,6,9,12 (- for none)",
    )


def _objective(parser: argparse.ArgumentParser, *, prediction: bool = False) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("losses")
    group.add_argument(
        "--method",
        choices=("tinybert", "minilm", "minilmv2"),
        default="tinybert",
        help="what inner losses compare (default: %(default)s)",
    )
    _layer_map_option(group)
    group.add_argument(
        "--projection",
        choices=("shared", "per_layer"),
        default="shared",
        help="of hidden states (default: %(default)s)",
    )
    group.add_argument(
        "--parity", choices=("masked", "official"), default="masked", help="padding never counts, or as published"
    )
    terms = ["embedding", "hidden", "attention", "query_relation", "key_relation", "value_relation"]
    group.add_argument(
        "--terms",
        nargs="+",
        choices=[*terms, "prediction"] if prediction else terms,
        metavar="TERM",
        help="inner losses: embedding, hidden, attention of tinybert; attention, value_relation of minilm; "
        "query_relation, key_relation, value_relation of minilmv2 (default: all)"
        + ("; and prediction, in the same stage" if prediction else ""),
    )
    group.add_argument(
        "--teacher-layer", type=int, metavar="N", help="of minilm and minilmv2, from 1 (default: the last)"
    )
    group.add_argument("--relation-heads", type=int, metavar="N", help="of minilmv2 (default: 48)")
    return group


def _schedule(parser: argparse.ArgumentParser, epochs: float, batch_size: int, learning_rate: float) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=float, metavar="N", default=epochs, help="default: %(default)s")
    group.add_argument(
        "--batch-size", type=int, metavar="N", default=batch_size, help="of each process (default: %(default)s)"
    )
    group.add_argument(
        "--learning-rate", type=float, metavar="RATE", default=learning_rate, help="default: %(default)s"
    )
    group.add_argument("--seed", type=int, metavar="N", default=42, help="default: %(default)s")
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--max-steps", type=int, default=-1, metavar="N", help="stop each stage after so many steps")
    parser.add_argument("--trust-remote-code", action="store_true", help=_TRUST)


def _grid(
    parser: argparse._ActionsContainer, learning_rate: float | None = None, batch_size: int | None = None
) -> None:
    """What the last training is searched over; None: the task knows."""
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=learning_rate and [learning_rate],
        metavar="RATE",
        help=f"of the last training (default: {learning_rate or _RECIPE}); of several the best on the dev sets is kept",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=batch_size and [batch_size],
        metavar="SIZE",
        help=f"of the last training, in each process (default: {batch_size or _RECIPE})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        metavar="SEED",
        help="for each learning rate and batch size (default: 42); of several runs all stay in runs/",
    )


def _outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    group.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run")


def _layer_map(text: str) -> str | list[int | None]:
    if not text[:1].isdigit():
        return text
    try:
        return [None if part == "-" else int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layer-map is {text!r}; a list looks like 0,3,6,-,12 with - for none") from None


def _objective_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Objective` takes for the inner losses, and what the method does not have is refused at once."""
    from fastdistill.objective import check_method_options, resolve_terms

    own = {name: getattr(arguments, name) for name in ("parity", "teacher_layer", "relation_heads")}
    check_method_options(arguments.method, **own)
    if arguments.method == "tinybert":  # else --layer-map only says which layers a new student starts from
        own["layer_map"] = _layer_map(arguments.layer_map)
    terms = resolve_terms(arguments.method, arguments.terms)
    return {"method": arguments.method, "terms": terms, "projection": arguments.projection, **own}


def _training_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"bf16": arguments.bf16, "max_steps": arguments.max_steps, "report_to": "none"}
    return options


# -- commands ----------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from fastdistill.demo import run

    run(arguments.output, overwrite=arguments.overwrite)


def _general(arguments: argparse.Namespace) -> None:
    from fastdistill.outputs import check
    from fastdistill.processes import main_first
    from fastdistill.stages import GeneralStage, pack_corpus, read_corpus

    objective = _objective_options(arguments)
    if arguments.streaming and arguments.max_steps < 1:
        raise ValueError("--streaming needs --max-steps: a corpus that is not read beforehand has no length")
    check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    teacher, tokenizer = _load(arguments.teacher, "AutoModel", arguments.trust_remote_code)
    _check_length(arguments.max_length, "teacher", teacher)
    if arguments.streaming:
        corpus = read_corpus(arguments.corpus, streaming=True)
        blocks = _head(pack_corpus(corpus, tokenizer, arguments.max_length), arguments.max_length)
    else:
        corpus = blocks = main_first(lambda: pack_corpus(arguments.corpus, tokenizer, arguments.max_length))
    with tempfile.TemporaryDirectory() as work:
        student = _student(arguments, arguments.student, teacher, tokenizer, blocks, arguments.seed, Path(work))
        _check_length(arguments.max_length, "student", student)
        GeneralStage(
            corpus=corpus,
            max_length=arguments.max_length,
            streaming=arguments.streaming,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            **objective,
            projections=_projections(arguments.student, work),
            seed=arguments.seed,
            arguments=_training_arguments(arguments),
        ).run(student, teacher, tokenizer, arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    _finish(arguments)


def _augment(arguments: argparse.Namespace) -> None:
    from fastdistill.augment import COPIES, Augmenter, augment, check_output, read_glove
    from fastdistill.tasks import Task, get_task

    task = get_task(arguments.task)
    if not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; augment makes rows of the GLUE tasks: {', '.join(COPIES)}")
    check_output(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    train = _split(task, "train", arguments)
    model, tokenizer = _load(arguments.teacher, "AutoModelForMaskedLM", arguments.trust_remote_code)
    augmenter = Augmenter(
        model,
        tokenizer,
        read_glove(arguments.glove, device=model.device),
        copies=COPIES[task.name] if arguments.copies is None else arguments.copies,
        candidates=arguments.candidates,
        probability=arguments.probability,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        bf16=arguments.bf16,
    )
    options = {"legacy": arguments.legacy, "resume": arguments.resume, "overwrite": arguments.overwrite}
    augment(task, train, augmenter, arguments.output, **options)
    _finish(arguments)


def _cache(arguments: argparse.Namespace) -> None:
    from fastdistill.cache import MANIFEST, write_cache
    from fastdistill.outputs import check
    from fastdistill.processes import main_first
    from fastdistill.stages import pack_corpus
    from fastdistill.tasks import Task, get_task

    if arguments.task and (arguments.top_k is not None or len(arguments.data) > 1):
        raise ValueError(
            "with --task, whose classifier's logits are kept whole, --data is one folder and there is no --top-k"
        )
    if not arguments.task and arguments.top_k is None and not arguments.hidden:
        raise ValueError("nothing to keep of plain text: use --top-k, --hidden or both")
    if not (arguments.resume and (arguments.output / MANIFEST).is_file()):
        check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    if arguments.task:
        task, files = get_task(arguments.task), [arguments.data[0] / "train.tsv"]
        if not isinstance(task, Task):
            raise ValueError(f"--task is {task.name}; it should be one of GLUE's, whose classifiers' logits are kept")
        rows = task.load_split("train", arguments.data[0])
        teacher, tokenizer = _load(arguments.teacher, task.auto_class, arguments.trust_remote_code, needs_head=True)
        task = task.for_model(teacher.config)
        dataset = main_first(lambda: task.tokenize(rows, tokenizer))
    else:
        files = arguments.data
        kind = "AutoModel" if arguments.top_k is None else None
        teacher, tokenizer = _load(arguments.teacher, kind, arguments.trust_remote_code)
        dataset = main_first(lambda: pack_corpus(files, tokenizer, arguments.max_length))
    write_cache(
        dataset,
        teacher,
        tokenizer,
        arguments.output,
        top_k=arguments.top_k,
        hidden=arguments.hidden,
        files=files,
        batch_size=arguments.batch_size,
        bf16=arguments.bf16,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    _finish(arguments)


def _train_cached(arguments: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from fastdistill.cache import read_cache, read_manifest, terms_served, weightless_teacher
    from fastdistill.outputs import check
    from fastdistill.stages import CachedStage
    from fastdistill.students import is_config

    check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    dataset = read_cache(arguments.cache, verify=arguments.verify)
    tokenizer = AutoTokenizer.from_pretrained(arguments.cache)
    arguments.terms = arguments.terms or terms_served(arguments.cache)
    is_live = "attention" in arguments.terms
    if arguments.teacher is not None:
        kind = read_manifest(arguments.cache)["teacher"]["class"]
        teacher, _ = _load(arguments.teacher, kind, arguments.trust_remote_code)
    elif is_live or arguments.init == "teacher":
        raise ValueError("the attention term and --init teacher need --teacher: a cache holds no scores and no weights")
    else:
        teacher = weightless_teacher(arguments.cache)
        arguments.init = "random" if is_config(arguments.student) else arguments.init
    with tempfile.TemporaryDirectory() as work:
        student = _student(arguments, arguments.student, teacher, tokenizer, dataset, arguments.seed, Path(work))
        stage = CachedStage(
            cache=arguments.cache,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            terms=arguments.terms,
            layer_map=_layer_map(arguments.layer_map),
            projection=arguments.projection,
            temperature=arguments.temperature,
            tail=arguments.tail,
            projections=_projections(arguments.student, work),
            seed=arguments.seed,
            arguments=_training_arguments(arguments),
        )
        options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
        stage.run(student, teacher if is_live else None, tokenizer, arguments.output, **options)
    _finish(arguments)


def _task(arguments: argparse.Namespace) -> None:
    import copy

    from fastdistill.augment import read_augmented
    from fastdistill.finetune import finetune
    from fastdistill.outputs import check
    from fastdistill.search import check_grid
    from fastdistill.stages import IntermediateStage, PredictionStage, add_teacher_logits
    from fastdistill.tasks import Task

    task = _named_task(arguments, "train")
    objective = _objective_options(arguments)
    _check_stages(arguments, task, objective["terms"])
    has_prediction_stage = arguments.prediction_epochs != 0
    intermediate = {
        "learning_rate": arguments.intermediate_learning_rate or task.intermediate_learning_rate,
        "batch_size": arguments.intermediate_batch_size or task.batch_size,
    }
    prediction = {"learning_rate": task.prediction_learning_rate, "batch_size": task.batch_size}
    last = prediction if has_prediction_stage else intermediate
    grid = {
        "learning_rates": arguments.learning_rates or [last["learning_rate"]],
        "batch_sizes": arguments.batch_sizes or [last["batch_size"]],
        "seeds": arguments.seeds,
    }
    check_grid(**grid)
    if arguments.augmented and not isinstance(task, Task):
        raise ValueError(f"--task is {task.name}; --augmented holds rows of a GLUE task")
    check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    teacher, tokenizer = _load(arguments.teacher, task.auto_class, arguments.trust_remote_code, needs_head=True)
    task = task.for_model(teacher.config)
    train = read_augmented(task, arguments.augmented) if arguments.augmented else _split(task, "train", arguments)
    train = task.tokenize(train, tokenizer)
    for split in task.evaluations:
        _split(task, split, arguments)  # a malformed line shows before the training, not after it

    with _whole_output(arguments) as work, tempfile.TemporaryDirectory() as scratch:
        seed = arguments.seeds[0]
        student = _student(arguments, arguments.student, teacher, tokenizer, train, seed, Path(scratch))
        epochs = arguments.intermediate_epochs
        epochs = task.intermediate_epochs if epochs is None else epochs

        def distil(model: Any, learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
            stage = IntermediateStage(
                dataset=train,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                **objective,
                temperature=arguments.temperature,
                projections=_projections(arguments.student, scratch),
                seed=seed,
                arguments=_training_arguments(arguments),
            )
            return stage.run(model, teacher, tokenizer, folder, resume=True)

        if epochs > 0 and has_prediction_stage:
            student = distil(student, **intermediate, seed=seed, folder=work / "intermediate")
        if task.caches_logits:
            if has_prediction_stage and arguments.labels == "teacher":
                train = add_teacher_logits(train, teacher, tokenizer)
        elif arguments.augmented:  # changed words change the score, so that the published recipe leaves these out
            train = task.tokenize(_split(task, "train", arguments), tokenizer)

        def train_last(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
            model = copy.deepcopy(student)
            if not has_prediction_stage:
                return distil(model, learning_rate, batch_size, seed, folder)
            schedule: dict[str, Any] = {
                "epochs": arguments.prediction_epochs or task.prediction_epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "seed": seed,
                "arguments": _training_arguments(arguments),
            }
            if arguments.labels == "gold":
                return finetune(model, train, tokenizer, folder, **schedule, resume=True)
            stage = PredictionStage(
                dataset=train, **schedule, parity=arguments.parity, temperature=arguments.temperature
            )
            return stage.run(model, teacher, tokenizer, folder, resume=True)

        _search(task, arguments, tokenizer, work, train_last, grid)
    _finish(arguments)


def _finetune(arguments: argparse.Namespace) -> None:
    import torch

    from fastdistill.finetune import finetune
    from fastdistill.outputs import check
    from fastdistill.search import check_grid
    from fastdistill.students import build_student

    task = _named_task(arguments, "train")
    grid = {name: getattr(arguments, name) for name in ("learning_rates", "batch_sizes", "seeds")}
    check_grid(**grid)
    check(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    if arguments.teacher is None and arguments.init is not None:
        raise ValueError("--init needs --teacher, whose weights it takes")
    train = _split(task, "train", arguments)
    source, tokenizer = _load(
        arguments.teacher or arguments.model,
        task.auto_class,
        arguments.trust_remote_code,
        **({} if arguments.teacher else task.model_options(train)),
    )
    task = task.for_model(source.config, "teacher" if arguments.teacher else "model")
    train = task.tokenize(train, tokenizer)
    for split in task.evaluations:
        _split(task, split, arguments)  # a malformed line shows before the training, not after it

    def fit(learning_rate: float, batch_size: int, seed: int, folder: Path) -> Any:
        torch.manual_seed(seed)  # of the weights that no checkpoint brings
        if arguments.teacher:
            model = _student(arguments, arguments.model, source, tokenizer, train, seed)
        else:
            model = build_student(arguments.model, source, trust_remote_code=arguments.trust_remote_code)
        return finetune(
            model,
            train,
            tokenizer,
            folder,
            epochs=arguments.epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            arguments=_training_arguments(arguments),
            resume=True,
        )

    with _whole_output(arguments) as work:
        _search(task, arguments, tokenizer, work, fit, grid)
    _finish(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastdistill.students import count_parameters
    from fastdistill.tasks import mean_score

    task = _named_task(arguments)
    if arguments.json and arguments.json.exists() and not arguments.overwrite:
        raise FileExistsError(f"{arguments.json} exists; pass overwrite=True to replace it")
    names = [arguments.model] + ([arguments.against] if arguments.against else [])
    trust = arguments.trust_remote_code
    models = [_load(name, task.auto_class, trust, needs_head=True) for name in names]
    figures: dict[str, dict[str, Any]] = {}
    for name, (model, tokenizer) in zip(names, models, strict=True):
        task = task.for_model(model.config, argument=name)
        figures[name] = {"parameters": count_parameters(model), "metrics": _metrics(task, arguments, model, tokenizer)}
    if arguments.against:
        (student, tokenizer), (teacher, _) = models
        figures[arguments.model]["speed_up"] = _speed_up(task, arguments, student, teacher, tokenizer)
        scores = [mean_score(figures[name]["metrics"]) for name in names]
        figures[arguments.model]["kept"] = scores[0] / scores[1] if scores[1] else None
    _print_figures(figures)
    if arguments.json:
        from fastdistill.outputs import write_whole

        write_whole(arguments.json, json.dumps(figures, indent=2) + "\n")


def _info(arguments: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    import fastdistill
    from fastdistill.functional import explain_backends

    console = Console()
    versions = Table("package", "version", title="Environment", title_justify="left")
    versions.add_row("fastdistill", fastdistill.__version__)
    versions.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "numpy", "triton", "transformers", "datasets", "accelerate", "tokenizers"):
        versions.add_row(name, _version(name))
    console.print(versions)

    devices = [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        devices += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        table = Table("op", "backend", "why", title=f"{device} ({name})", title_justify="left")
        for row in explain_backends(device):
            table.add_row(*row)
        console.print(table)


# -- parts of commands -------------------------------------------------------------------------------------


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_stages(arguments: argparse.Namespace, task: Any, terms: Sequence[str]) -> None:
    """ValueError where no stage of `task` would train the head, or one on labels that are not there."""
    if arguments.prediction_epochs == 0:
        if "prediction" not in terms or arguments.intermediate_epochs == 0:
            raise ValueError(
                "--prediction-epochs is 0, and nothing else trains the head of the student; add prediction to --terms, "
                "and leave --intermediate-epochs above 0"
            )
        if arguments.labels == "gold":
            raise ValueError("--labels gold is for the prediction stage, which --prediction-epochs 0 leaves out")
    if "prediction" in terms and task.is_regression and arguments.augmented:
        raise ValueError(
            f"--terms prediction learns the gold scores of {task.name}, which changed words change; leave out "
            "--augmented, or prediction"
        )


def _whole_output(arguments: argparse.Namespace) -> AbstractContextManager[Path]:
    from fastdistill.outputs import whole_output

    return whole_output(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)


def _named_task(arguments: argparse.Namespace, *splits: str) -> Any:
    """The task, once its files are known to be there: those of its evaluations, and `splits`."""
    from fastdistill.tasks import get_task

    task = get_task(arguments.task)
    if arguments.data is not None:
        for split in (*splits, *task.evaluations):
            file = arguments.data / task.file(split)
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; --data holds {task.name}'s own files")
    return task


def _load(
    name: str, auto_class: str | None, trust_remote_code: bool, needs_head: bool = False, **options: Any
) -> tuple[Any, Any]:
    """A checkpoint's model, in float32 and eval mode, on the device to run on, and its tokenizer.

    `auto_class` None: as the language model that it is.
    """
    import transformers
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    from fastdistill.processes import processes
    from fastdistill.published import is_published, load_published, load_published_tokenizer

    disable_fsdp_ram_efficient_loading()  # which gives the weights to one process alone
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: no config.json; it is not a transformers checkpoint")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such folder")
    if is_published(name):
        model = load_published(name, auto_class or "AutoModelForMaskedLM", **options)
        return model.to(processes().device), load_published_tokenizer(name)
    try:
        auto_class = auto_class or _language_model(name, trust_remote_code)
        model, loaded = getattr(transformers, auto_class).from_pretrained(
            name, dtype="float32", trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if tokenizer.pad_token is None:  # of GPT-2 and Llama; padding is masked, whatever stands there
            tokenizer.pad_token = tokenizer.eos_token
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    kind = {"AutoModelForMaskedLM": "masked", "AutoModelForCausalLM": "causal"}.get(auto_class)
    if kind and loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise ValueError(f"{name}: not a {kind} language model with its head (there is no {missing})")
    if needs_head and loaded["missing_keys"]:  # else they would be random
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise ValueError(
            f"{name}: not a trained {type(model).__name__} (there is no {missing}); `fastdistill finetune` makes a "
            "model of the task"
        )
    return model.eval().to(processes().device), tokenizer


def _language_model(name: str, trust_remote_code: bool) -> str:
    """The Auto class of a language model: masked where its family has such a head and the checkpoint is not causal."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    is_causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal
    return "AutoModelForMaskedLM" if is_masked else "AutoModelForCausalLM"


def _student(
    arguments: argparse.Namespace,
    spec: str,
    teacher: Any,
    tokenizer: Any,
    dataset: Any,
    seed: int,
    work: Path | None = None,
) -> Any:
    """The student; if it is folded from the teacher, with the projections to start from in `work`."""
    import torch

    from fastdistill.students import build_student, init_from_teacher, is_config, save_projections
    from fastdistill.trainer import PaddingCollator

    torch.manual_seed(seed)  # of weights that no checkpoint brings
    init = "random" if is_config(spec) else arguments.init
    student = build_student(spec, teacher, init=init, trust_remote_code=arguments.trust_remote_code)
    if not is_config(spec) or arguments.init == "random":
        return student
    rows = dataset.select_columns([name for name in tokenizer.model_input_names if name in dataset.column_names])
    chosen: list[Any] = []  # rows spread over the text to learn from
    tokens = 0
    for i in range(0, len(rows), max(len(rows) // 1000, 1)):
        if tokens < CALIBRATION_TOKENS:
            chosen.append(rows[i])
            tokens += len(chosen[-1]["input_ids"])
    calibration = PaddingCollator(tokenizer)(chosen)
    layer_map = _layer_map(arguments.layer_map)
    weight = init_from_teacher(student, teacher, layer_map=layer_map, calibration=calibration)
    if work is not None:
        save_projections(student, teacher, weight, work, **_objective_options(arguments))
    return student


CALIBRATION_TOKENS = 20_000


def _check_length(max_length: int, name: str, model: Any) -> None:
    from fastdistill.augment import positions

    if max_length > positions(model):
        raise ValueError(f"--max-length is {max_length}; the {name} takes {positions(model)} tokens at most")


def _head(blocks: Any, max_length: int) -> Any:
    """Enough of a stream's first blocks to calibrate with."""
    import itertools

    from datasets import Dataset

    first = list(itertools.islice(blocks, CALIBRATION_TOKENS // max_length + 1))
    if not first:
        raise ValueError("corpus holds no text")
    return Dataset.from_list(first)


def _projections(*folders: str | Path) -> Path | None:
    """The first folder that brings projections: an earlier stage's student, or where a folded one left them."""
    from fastdistill.objective import read_projections

    return next((Path(folder) for folder in folders if read_projections(folder)), None)


def _split(task: Any, split: str, arguments: argparse.Namespace) -> Any:
    return task.load_split(split, arguments.data)


def _metrics(task: Any, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Of each evaluation set on its own (MNLI has two)."""
    return {split: task.evaluate(_split(task, split, arguments), model, tokenizer) for split in task.evaluations}


def _search(
    task: Any, arguments: argparse.Namespace, tokenizer: Any, work: Path, train: Any, grid: dict[str, Any]
) -> None:
    """The last training over the grid, of which the best becomes the output itself."""
    from fastdistill.processes import processes
    from fastdistill.search import print_results, search

    results = search(train, lambda model: _metrics(task, arguments, model, tokenizer), work, name=task.name, **grid)
    if processes().is_main_process:
        print_results(results)


def _finish(arguments: argparse.Namespace) -> None:
    """Once the output is there, whole: remove what only a killed run would have needed, and name it."""
    import shutil

    from fastdistill.processes import processes

    if processes().is_main_process:
        runs = arguments.output / "runs"
        if runs.is_dir() and len(list(runs.iterdir())) == 1:
            shutil.rmtree(runs)
        print(f"wrote {arguments.output}")


def _speed_up(task: Any, arguments: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any) -> float:
    """Teacher seconds / student seconds on the same batch of the dev set, interleaved runs."""
    from fastdistill.students import measure_seconds
    from fastdistill.trainer import PaddingCollator

    rows = _split(task, task.evaluations[0], arguments)
    rows = task.encode(rows.select(range(min(len(rows), 32))), tokenizer)
    names = [name for name in tokenizer.model_input_names if name in rows.column_names]
    batch = PaddingCollator(tokenizer)(list(rows.select_columns(names)))
    seconds = measure_seconds({"student": student, "teacher": teacher}, batch)
    return seconds["teacher"] / seconds["student"]


def _print_figures(figures: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = next(iter(figures.values()))["metrics"]
    shown = [(split, metric) for split, found in metrics.items() for metric in found if metric != "score"]
    table = Table("model", "parameters", *(f"{split} {metric}" for split, metric in shown))
    table.add_column("speed-up")
    table.add_column("kept")
    for name, row in figures.items():
        cells = [f"{100 * row['metrics'][split][metric]:.2f}" for split, metric in shown]
        speed_up, kept = row.get("speed_up"), row.get("kept")
        table.add_row(
            name,
            f"{row['parameters']['total'] / 1e6:.2f}M",
            *cells,
            f"{speed_up:.2f}x" if speed_up else "",
            f"{kept:.1%}" if kept else "",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
