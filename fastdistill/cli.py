"""The command line. Every command is a thin layer over a plain Python call.

This file has the arguments and `fastdistill.recipes.commands` the work. Bad input ends with exit code 2 and one line.
Heavy imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser_of_commands().parse_args(argv)
    try:
        if arguments.command == "info":  # which says what is missing
            info()
        else:
            from fastdistill.recipes import commands

            getattr(commands, "run_" + arguments.command.replace("-", "_"))(arguments)
    except (ValueError, OSError) as error:  # what the library raises for bad input; anything else is a bug
        message = " ".join(str(error).split())
        flags = {
            "overwrite=True": "--overwrite",
            "resume=True": "--resume",
            'method="minilmv2"': "--method minilmv2",
            "init='random'": "--init random",
            "projection='shared'": "--projection shared",
            "projection='per_layer'": "--projection per_layer",
            "init='teacher'": "--init teacher",
        }
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


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**32 - 1")
    return int(text)


def int_or_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def positive_float(text: str) -> float:
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def epochs_or_zero(text: str) -> float:
    if not 0 <= (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def parser_of_commands() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastdistill", description=__doc__.splitlines()[0])
    parser.description = "Distil Transformers: TinyBERT's stages on your data, and losses that stay low on memory."
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="the whole pipeline on built-in text: no network, no GPU, minutes")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")

    general = commands.add_parser("general", help="stage 1: distil on a corpus of plain text")
    _models(general)
    data = general.add_argument_group("data")
    data.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help="text files, a paragraph a line")
    data.add_argument(
        "--max-length", type=positive_int, default=128, metavar="N", help="tokens in a block (default: %(default)s)"
    )
    data.add_argument(
        "--streaming", action="store_true", help="read the corpus while it trains, not before; needs --max-steps"
    )
    _objective(general)
    _schedule(general, epochs=3, batch_size=256, learning_rate=5e-5)
    _outputs(general)

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
    augment.add_argument(
        "--batch-size", type=positive_int, default=64, help="masked sentences at a time (default: %(default)s)"
    )
    augment.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    augment.add_argument("--overwrite", action="store_true", help="replace the output")
    augment.add_argument("--resume", action="store_true", help="continue an interrupted run")
    augment.add_argument("--trust-remote-code", action="store_true", help=_TRUST)

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
        "--temperature", type=positive_float, default=1.0, metavar="T", help="of predictions (default: %(default)s)"
    )
    losses.add_argument(
        "--labels",
        choices=("teacher", "gold"),
        default="teacher",
        help="of the prediction stage: the teacher's predictions, or the gold labels alone (default: %(default)s)",
    )
    first = task.add_argument_group("intermediate stage")
    first.add_argument("--intermediate-epochs", type=epochs_or_zero, metavar="N", help=f"default: {_RECIPE}; 0: skip")
    first.add_argument("--intermediate-learning-rate", type=positive_float, metavar="RATE", help=f"default: {_RECIPE}")
    first.add_argument(
        "--intermediate-batch-size", type=positive_int, metavar="N", help=f"of each process (default: {_RECIPE})"
    )
    last = task.add_argument_group("prediction stage")
    last.add_argument(
        "--prediction-epochs",
        type=epochs_or_zero,
        metavar="N",
        help=f"default: {_RECIPE}; 0: skip, with prediction among --terms",
    )
    _grid(last)
    _common(task)
    _outputs(task)

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
    cache.add_argument(
        "--max-length", type=positive_int, default=128, help="tokens in a block of text (default: %(default)s)"
    )
    cache.add_argument("--batch-size", type=positive_int, default=16, help="rows at a time (default: %(default)s)")
    cache.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    cache.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    _outputs(cache)

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
        help="of hidden states (default: as --student brings them, else shared)",
    )
    cached.add_argument(
        "--temperature", type=positive_float, default=1.0, help="of the prediction (default: %(default)s)"
    )
    cached.add_argument(
        "--tail",
        choices=("renormalize", "bucket"),
        default="renormalize",
        help="the teacher's other classes: left out, or one class together (default: %(default)s)",
    )
    cached.add_argument("--verify", action="store_true", help="compare every file's SHA-256 first")
    cached.add_argument(
        "--workers",
        type=int_or_zero,
        default=0,
        metavar="N",
        help="processes that read the cache for each one that trains (default: 0, which reads for itself)",
    )
    _schedule(cached, epochs=3, batch_size=256, learning_rate=5e-5)
    _outputs(cached)
    cached.set_defaults(method="tinybert", parity="masked", teacher_layer=None, relation_heads=None)

    finetune = commands.add_parser(
        "finetune", help="train a model on a task's gold labels alone: a teacher, or a student as baseline"
    )
    finetune.add_argument("--model", required=True, help="checkpoint; or with --teacher a preset or config file")
    finetune.add_argument("--teacher", help="whose vocabulary, labels and (with --init teacher) weights a preset takes")
    finetune.add_argument("--init", choices=("random", "teacher"), help="of a preset or config (default: teacher)")
    _layer_map_option(finetune)
    _data(finetune)
    schedule = finetune.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=positive_float, default=3, metavar="N", help="default: %(default)s")
    _grid(schedule, learning_rate=3e-5, batch_size=32)
    _common(finetune)
    _outputs(finetune)

    evaluate = commands.add_parser("evaluate", help="a model's metrics on a task")
    evaluate.add_argument("--model", required=True, help="checkpoint: folder or hub name")
    evaluate.add_argument("--against", metavar="TEACHER", help="compare with this model: size, speed, share kept")
    _data(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    evaluate.add_argument("--overwrite", action="store_true", help="replace that file")
    evaluate.add_argument("--trust-remote-code", action="store_true", help=_TRUST)

    commands.add_parser("info", help="versions, devices, and the backend each op takes here")
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
        "output on: 0,3,6,9,12 (- for none; default: %(default)s)",
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
        help="of hidden states (default: as --student brings them, else shared)",
    )
    group.add_argument(
        "--parity",
        choices=("masked", "official"),
        default="masked",
        help="masked: padding never counts; official: as published (default: %(default)s)",
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
    group.add_argument("--epochs", type=positive_float, metavar="N", default=epochs, help="default: %(default)s")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        default=batch_size,
        help="of each process (default: %(default)s)",
    )
    group.add_argument(
        "--learning-rate", type=positive_float, metavar="RATE", default=learning_rate, help="default: %(default)s"
    )
    group.add_argument("--seed", type=seed, metavar="N", default=42, help="default: %(default)s")
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument(
        "--max-steps",
        type=positive_int,
        default=-1,
        metavar="N",
        help="optimiser steps of each stage (default: as many as the epochs make)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help=_TRUST)


def _grid(
    parser: argparse._ActionsContainer, learning_rate: float | None = None, batch_size: int | None = None
) -> None:
    """What the last training is searched over; None: the task knows."""
    parser.add_argument(
        "--learning-rates",
        type=positive_float,
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
        type=seed,
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


# -- info --------------------------------------------------------------------------------------------------


def info() -> None:
    """Print versions, devices, and the backend each op takes on each of them."""
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


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
