"""The command line: parses the options of a command, calls its Python function, prints the result.

Flags are generated from the dataclasses of `fastdistill.recipes.options`. Bad input ends with exit code 2 and one line.
PyTorch is loaded when a command runs, transformers' argument parser when the flags of a command are parsed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
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
    "finetune": (of.FinetuneOptions, "finetune_task"),
    "evaluate": (of.EvaluateOptions, "evaluate_task"),
    "info": (InfoOptions, ""),
}


def main(argv: Sequence[str] | None = None) -> int:
    command, options = parse(sys.argv[1:] if argv is None else argv)
    try:
        run(command, options)
    except (ValueError, OSError) as error:  # the library raises these for bad input; anything else is a bug
        message = as_flags(str(error), type(options))
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed; the commands need pip install 'fastdistill[train]'"
    except KeyboardInterrupt:
        way_on = "; run the same command with --resume to go on from the last checkpoint"
        print("interrupted" + (way_on if hasattr(options, "resume") else ""), file=sys.stderr)
        return 130
    else:
        return 0
    print(f"fastdistill {command}: error: {message}", file=sys.stderr)
    return 2


def run(command: str, options: Any) -> None:
    """Calls the function of a command and prints its results, on the main process of many."""
    if command == "info":
        return info()
    from fastdistill import recipes
    from fastdistill.recipes.evaluate import print_figures
    from fastdistill.recipes.search import print_results
    from fastdistill.train.processes import processes

    warn_of_slow_bf16(options)
    with quiet():
        results = getattr(recipes, COMMANDS[command][1])(options)
    if command in ("task", "finetune", "evaluate") and results and processes().is_main_process:
        print_figures(results) if command == "evaluate" else print_results(results)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' warnings, such as the report on a new head; TrainingArguments' log_level shows them again."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def warn_of_slow_bf16(options: Any) -> None:
    import torch

    cpu = Path("/proc/cpuinfo")
    if not getattr(options, "bf16", False) or torch.accelerator.is_available() or not cpu.is_file():
        return
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu.read_text().split()):  # the last is Arm's
        print("warning: this CPU has no bfloat16 instructions; float32 (without --bf16) is faster", file=sys.stderr)


# -- arguments ---------------------------------------------------------------------------------------------

# What TrainingArguments call our short names.
ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "workers": "dataloader_num_workers",
}
# TrainingArguments that a command decides itself, and the flags that say them.
DECIDED = {
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "num_train_epochs": "--intermediate-epochs and --prediction-epochs",
    "learning_rate": "--learning-rates",
    "per_device_train_batch_size": "--batch-sizes",
    "seed": "--seeds",
}
EPILOG = (
    "Every option of transformers.TrainingArguments is taken by its own name as well, such as --report_to or "
    "--gradient_accumulation_steps; names may be written with - or _."
)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Returns the command and its options. Exits with code 2 and one line where they are wrong."""
    parser = argparse.ArgumentParser(prog="fastdistill", allow_abbrev=False)
    parser.description = "Distil Transformers: TinyBERT's stages on your data, and losses that stay low on memory."
    parser.add_argument("--version", action="version", version=f"fastdistill {fastdistill.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (options, _) in COMMANDS.items():
        commands.add_parser(name, help=str(options.__doc__).rstrip("."), add_help=False)
    command = parser.parse_args(argv[:1]).command

    kind = COMMANDS[command][0]
    is_training = issubclass(kind, of.Training)
    parser = flags_of(command, kind, is_training)
    file, argv = config_file(argv[1:]) if is_training else (None, argv[1:])
    try:
        given = read_config(file, kind) if file else []
        found, rest = parser.parse_known_args([*given, *argv])
        values = {name: value for name, value in vars(found).items() if name != "config"}
        if is_training and rest:
            values["arguments"] = training_arguments(parser.prog, rest)
        elif rest:
            raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
        return command, kind(**values)
    except (ValueError, OSError) as error:
        parser.error(as_flags(str(error), kind))


def flags_of(command: str, options: type, is_training: bool) -> Any:
    """Returns a parser of a command's flags, which leaves out those that are not given."""
    from transformers.hf_argparser import HfArgumentParser

    required = [f"--{f.name} {f.name.upper()}" for f in flag_fields(options) if is_required(f)]
    parser = HfArgumentParser(
        groups(options, is_training),
        prog=f"fastdistill {command}",
        usage=" ".join(["%(prog)s", *required, "[options]"]),
        description=options.__doc__,
        epilog=EPILOG if is_training else None,
        formatter_class=argparse.HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if is_training:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options by their names; flags win over it")
    for action in parser._actions:  # help and messages show one spelling of each
        if action.dest != "help":
            action.option_strings[:] = ["--" + action.dest.replace("_", "-")]
    return parser


def flag_fields(options: type) -> list[Field[Any]]:
    return [f for f in fields(options) if "help" in f.metadata]


def is_required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def groups(options: type, is_training: bool) -> list[type]:
    """Returns a dataclass of flags for each class that `options` inherits from. HfArgumentParser makes groups of them.

    A field belongs to the class that declares it first. None has a default, except that the help text names it.
    """
    hints, found, flags = get_type_hints(options), [], {f.name: f for f in flag_fields(options)}
    bases = options.__mro__
    metavars = {int: "N", float: "X", Path: "PATH", str: "NAME"}
    for i, base in enumerate(bases):
        later = {name for other in bases[i + 1 :] for name in get_annotations(other)}
        group = []
        for name in get_annotations(base):
            if name in later or name not in flags:
                continue
            f, metadata = flags[name], dict(flags[name].metadata)
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if default not in (MISSING, None, False, -1, []) and "default:" not in metadata["help"]:
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                metadata["help"] += f" (default: {shown})"
            metadata["help"] = metadata["help"].replace("%", "%%")
            if is_training and name in ALIASES:
                metadata["aliases"] = [f"--{ALIASES[name]}", f"--{ALIASES[name].replace('_', '-')}"]
            kind = next((kind for kind in metavars if re.search(rf"\b{kind.__name__}\b", str(hints[name]))), None)
            if kind and "metavar" not in metadata and "Literal" not in str(hints[name]):
                metadata["metavar"] = metavars[kind]
            absent = {} if is_required(f) else {"default": argparse.SUPPRESS}
            group.append((name, hints[name], field(**absent, metadata=metadata)))
        if group:
            title = {"_argument_group_name": base.__name__.removesuffix("Options").lower()}
            found.append(make_dataclass(base.__name__, group, namespace=title, kw_only=True))
    return found


def config_file(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(argv)
    return found.config, rest


def read_config(file: str, options: type) -> list[str]:
    """Returns the options of a YAML file as flags. ValueError for a key that is no option."""
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: it should hold options, such as `batch_size: 32`, a line each")
    known = {f.name for f in flag_fields(options)}
    unknown = [key for key in found if str(key).replace("-", "_") not in {*known, *ALIASES.values()}]
    if unknown:
        from transformers import TrainingArguments

        known = {f.name for f in fields(TrainingArguments)}
        if wrong := [str(key) for key in unknown if str(key).replace("-", "_") not in known]:
            raise ValueError(f"{file}: unknown key {', '.join(wrong)}")
    flags: list[str] = []
    for key, value in found.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def training_arguments(prog: str, argv: Sequence[str]) -> dict[str, Any]:
    """Returns the TrainingArguments among the flags. ValueError for others, and for those that a command decides."""
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, prog=prog, usage="%(prog)s [options]", allow_abbrev=False)
    absent = object()
    start = argparse.Namespace(**{f.name: absent for f in fields(TrainingArguments)})
    found, rest = parser.parse_known_args(argv, start)
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
    values = {name: value for name, value in vars(found).items() if value is not absent}
    for name in values:
        if name in DECIDED:
            raise ValueError(f"--{name} is what this command decides from {DECIDED[name]}; use that")
    return values


def as_flags(message: str, options: type) -> str:
    """Returns a message of the Python functions on one line and with flags in the place of `options`' fields."""
    names = "|".join(f.name for f in fields(options)) or "-"

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    message = " ".join(message.split())
    message = re.sub(rf"^({names}) is ", lambda m: f"{flag(m[1])} is ", message)
    message = re.sub(rf"\b(pass )?({names})=True\b", lambda m: ("use " if m[1] else "") + flag(m[2]), message)
    value = r"""['"]([\w-]+)['"]"""
    return re.sub(rf"\b(pass )?({names})={value}", lambda m: f"{'use ' if m[1] else ''}{flag(m[2])} {m[3]}", message)


# -- info --------------------------------------------------------------------------------------------------


def info() -> None:
    """Prints versions, devices, and the backend that the ops take on each of them. Needs torch and numpy alone."""
    import torch

    from fastdistill.functional import explain_backends

    print(f"fastdistill {fastdistill.__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "numpy", "triton", "transformers", "datasets", "accelerate", "tokenizers"):
        print(f"  {name:<13} {version(name)}")
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


def version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
