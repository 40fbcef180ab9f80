"""Parses the options of a command, calls its Python function, prints the result.

Flags are generated from the dataclasses of `fastdistill.recipes.options`. Bad input ends with exit code 2 and one line.
Imports are deferred: PyTorch until a command runs, transformers' argument parser until a command's flags are parsed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from importlib import metadata
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_type_hints

import fastdistill
from fastdistill.recipes import options as of


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Print versions, devices, and the backend each op takes here."""


# Each command's options, and the function of `fastdistill.recipes` that it calls with them.
COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (of.DemoOptions, "run_demo"),
    "general": (of.GeneralOptions, "distil_general"),
    "augment": (of.AugmentOptions, "augment_task"),
    "task": (of.TaskOptions, "distil_task"),
    "cache": (of.CacheOptions, "cache_teacher"),
    "train-cached": (of.CachedOptions, "distil_cached"),
    "lm": (of.LMOptions, "distil_lm"),
    "finetune": (of.FinetuneOptions, "finetune_task"),
    "evaluate": (of.EvaluateOptions, "evaluate_task"),
    "compare": (of.CompareOptions, "compare_runs"),
    "info": (InfoOptions, ""),
}

CPUINFO = Path("/proc/cpuinfo")
PRINTERS = {
    "task": "print_results", "finetune": "print_results", "evaluate": "print_figures", "lm": "print_held_out",
    "compare": "print_comparison",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TQDM_DELAY", "1")  # hides progress bars of work that takes less than a second
    options = None
    try:
        command, options = parse(argv)
        run(command, options)
        return 0
    except (ValueError, OSError) as error:  # the library raises these for bad input; anything else is a bug
        # An error in a worker of a DataLoader arrives with its traceback.
        text = str(error).strip().split("\n")[-1] if "DataLoader worker" in str(error) else str(error)
        message = as_flags(text, type(options)) + unnamed(error)
    except ModuleNotFoundError as error:
        extra = "train,lm" if error.name in ("trl", "peft") else "train"
        message = f"{error.name} is not installed; the command needs pip install 'fastdistill[{extra}]'"
    except KeyboardInterrupt:
        way_on = "; run the same command with --resume to go on from the last checkpoint"
        print("interrupted" + (way_on if hasattr(options, "resume") else ""), file=sys.stderr)
        return 130
    print(f"fastdistill {title(argv)}: error: {message}", file=sys.stderr)
    return 2


def run(command: str, options: Any) -> None:
    """Calls the function of a command and prints its results, on the main process of many."""
    if command == "info":
        return info()
    from transformers.utils import logging

    from fastdistill import recipes
    from fastdistill.train.processes import processes

    warn_of_slow_bf16(options)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # hides the report on a new head; --log_level shows it again
    try:
        results = getattr(recipes, COMMANDS[command][1])(options)
    finally:
        logging.set_verbosity(level)
    if command in PRINTERS and results and processes().is_main_process:
        getattr(recipes, PRINTERS[command])(results)


def warn_of_slow_bf16(options: Any) -> None:
    """Warns where bfloat16 is computed in software: such a CPU took 70 times as long as in float32."""
    import torch

    if not getattr(options, "bf16", False) or torch.accelerator.is_available() or not CPUINFO.is_file():
        return
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(CPUINFO.read_text().split()):  # the last is Arm's
        print("warning: this CPU has no bfloat16 instructions; without --bf16 float32 is faster", file=sys.stderr)


# The names in TrainingArguments of our short names.
ALIASES = {
    "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type", "workers": "dataloader_num_workers",
    "completion_only": "completion_only_loss", "assistant_only": "assistant_only_loss",
}  # fmt: skip
# The TrainingArguments that a command sets itself, and the flags to use for them.
DECIDED = {
    "output_dir": "--output", "resume_from_checkpoint": "--resume", "seed": "--seeds",
    "learning_rate": "--learning-rates", "per_device_train_batch_size": "--batch-sizes",
    "num_train_epochs": "--intermediate-epochs and --prediction-epochs",
    "teacher_model_name_or_path": "--teacher", "teacher_model_revision": "--teacher",
    "teacher_model_init_kwargs": "--teacher-dtype",
}  # fmt: skip
EPILOG = "All of {} are options too, such as --report_to; names may be written with - or _."
# Read before any other flag: the file may hold the required ones.
CONFIG = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
CONFIG.add_argument("--config", metavar="FILE", help="YAML file of options by their names; flags win over it")


def unnamed(error: Exception) -> str:
    """Returns what the error of a full disk lacks where a library could not write a file of its own: ours are named."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not is_full or error.filename:  # type: ignore[attr-defined]
        return ""
    import tempfile

    from datasets import config

    return f"; there is no room in {config.HF_DATASETS_CACHE} (HF_DATASETS_CACHE) or {tempfile.gettempdir()} (TMPDIR)"


def title(argv: Sequence[str]) -> str:
    """Returns the command, as errors name it: with the file of `--config`, whose options they may be about."""
    config = vars(CONFIG.parse_known_args(argv[1:])[0]).get("config")
    return f"{argv[0]} --config {config}" if config else argv[0]


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Returns the command and its options. Exits with code 2 and one line where they are wrong."""
    about = "Distil Transformers: TinyBERT's stages on your data, and losses that stay low on memory."
    parser = argparse.ArgumentParser(prog="fastdistill", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastdistill {fastdistill.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (options, _) in COMMANDS.items():
        commands.add_parser(name, help=str(options.__doc__).rstrip("."), add_help=not fields(options))
    command = parser.parse_args(argv[:1]).command

    kind = COMMANDS[command][0]
    parser = flags_of(title(argv), kind) if fields(kind) else commands.choices[command]
    is_training = issubclass(kind, of.Training)
    try:
        found, rest = parser.parse_known_args(read_config(argv[1:]) if is_training else argv[1:])
        values = vars(found)
        if rest and is_training:
            values["arguments"], rest = training_arguments(title(argv), rest, values.get("on_policy", False))
            if command not in ("task", "lm") and "eval_strategy" in values["arguments"]:
                raise ValueError("--eval_strategy is for task and lm, which evaluate while they train")
        if rest:
            raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
        return command, kind(**values)
    except (ValueError, OSError) as error:
        return parser.error(as_flags(str(error), kind))


def flags_of(title: str, options: type) -> Any:
    """Returns a parser of a command's flags, whose help and messages show one spelling of each."""
    from transformers.hf_argparser import HfArgumentParser

    epilog = EPILOG.format(
        "trl.SFTConfig (with --on-policy: trl.DistillationConfig)"
        if options is of.LMOptions
        else "transformers.TrainingArguments"
    )
    more: dict[str, Any] = {"parents": [CONFIG], "epilog": epilog} if issubclass(options, of.Training) else {}
    more.update(prog=f"fastdistill {title}", description=options.__doc__, formatter_class=argparse.HelpFormatter)
    parser = HfArgumentParser(groups(options), allow_abbrev=False, **more)
    parser.usage = "%(prog)s"
    for action in parser._actions:
        if action.dest == "runs":  # the one positional argument
            action.option_strings, action.metavar = [], "RUN"
            parser.usage += " RUN [RUN ...]"
        elif action.dest != "help":
            action.option_strings = ["--" + action.dest.replace("_", "-")]
        if action.required and action.option_strings:
            parser.usage += f" {action.option_strings[0]} {action.dest.upper()}"
        if action.default not in (None, False, -1, [], argparse.SUPPRESS) and "default:" not in action.help:
            action.help += f" (default: {str(action.default).strip('[]')})"
    parser.usage += " [options]"
    return parser


def groups(options: type) -> list[type]:
    """Returns a dataclass of flags for each class that `options` inherits from; HfArgumentParser makes groups of them.

    A field belongs to the class that declares it first.
    """
    hints, left, found = get_type_hints(options), {f.name: f for f in fields(options) if f.metadata}, []
    for base in reversed(options.__mro__):
        group = []
        for f in [left.pop(name) for name in get_annotations(base) if name in left]:
            name = ALIASES.get(f.name) if issubclass(options, of.Training) else None
            aliases = [f"--{name}", f"--{name.replace('_', '-')}"] if name else []
            own: Any = {"default": f.default, "default_factory": f.default_factory}
            group.append((f.name, hints[f.name], field(**own, metadata={**f.metadata, "aliases": aliases})))
        title = base.__name__.removesuffix("Options").lower()
        found.append(make_dataclass(base.__name__, group, namespace={"_argument_group_name": title}, kw_only=True))
    return sorted((x for x in reversed(found) if fields(x)), key=lambda group: group.__name__ != "Models")


def read_config(argv: Sequence[str]) -> list[str]:
    """Returns the options of the YAML file that `--config` names, as flags, and then the others, which win."""
    given, rest = CONFIG.parse_known_args(argv)
    if "config" not in given:
        return rest
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {given.config}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, dates and numbers that are none
        raise ValueError(f"--config {given.config}: not YAML ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {given.config}: it should hold options, such as `batch_size: 32`, a line each")
    flags: list[str] = []
    for key, value in found.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags + rest


def training_arguments(title: str, argv: list[str], on_policy: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the TrainingArguments among flags, and the other flags. Raises ValueError for those in DECIDED."""
    from transformers import HfArgumentParser, TrainingArguments

    kind = TrainingArguments
    if title.split()[0] == "lm":
        from trl import DistillationConfig, SFTConfig

        kind = DistillationConfig if on_policy else SFTConfig
    own = {"prog": f"fastdistill {title}", "usage": argparse.SUPPRESS, "allow_abbrev": False}
    parser = HfArgumentParser(kind, **own)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # returns those alone that are given
    found, rest = parser.parse_known_args(argv)
    values = vars(found)
    for name in DECIDED.keys() & values.keys():
        raise ValueError(f"this command sets --{name} itself; use {DECIDED[name]}")
    return values, rest


def as_flags(message: str, options: type) -> str:
    """Returns a message of the Python functions on one line, with flags in the place of `options`' fields."""
    names = "|".join(f.name for f in fields(options)) or "-"

    def flag(found: re.Match[str]) -> str:
        start, name, value = found.groups()
        return f"{'use ' if start else ''}--{name.replace('_', '-')}{f' {value}' if value else ''}"

    message = re.sub(rf"^()({names})()(?= is )", flag, " ".join(message.split()))
    return re.sub(rf"""\b(pass )?({names})=(?:True|['"]([\w-]+)['"])""", flag, message)


def info() -> None:
    """Prints versions, devices, and the backend that the ops take on each of them. Needs torch and numpy alone."""
    import torch

    from fastdistill.functional import explain_backends

    installed = {found.name: found.version for found in metadata.distributions()}
    print(f"fastdistill {fastdistill.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "numpy", "triton", "transformers", "datasets", "accelerate", "tokenizers"):
        print(f"  {name:<13} {installed.get(name, 'not installed')}")
    devices = [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        devices += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name})")
        for backend, why, ops in explain_backends(device):
            print(textwrap.fill(f"backend {backend}: {why}", 100, initial_indent="  ", subsequent_indent="    "))
            print(textwrap.fill(", ".join(ops), 100, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    sys.exit(main())
