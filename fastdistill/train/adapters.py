"""Reads and checks the adapters of a PEFT student. PEFT is imported where a model has adapters, and so is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdistill.train.heads import is_peft, refuse_virtual_tokens
from fastdistill.train.reading import reading

__all__ = ["ADAPTER", "check_adapter", "load_adapters"]

ADAPTER = "adapter_config.json"


def check_adapter(student: Any) -> None:
    """Raises ValueError if a PEFT student trains weights that PEFT does not save, or has virtual tokens."""
    if not is_peft(student):
        return
    from peft import get_peft_model_state_dict

    refuse_virtual_tokens(student)
    tensors = {**student.state_dict(), **dict(student.named_parameters())}
    saved = {id(x) for name in student.peft_config for x in get_peft_model_state_dict(student, tensors, name).values()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and id(parameter) not in saved:
            raise ValueError(
                f"{name} trains, and PEFT saves adapters alone, so that it would be lost; name its module in "
                "modules_to_save, or freeze it"
            )


def load_adapters(student: Any, folder: Path) -> None:
    """Reads the adapters of a PEFT model back in place. PEFT itself would skip what one of the two sides lacks."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    for name in student.peft_config:
        part = folder if name == "default" else folder / name
        if not (part / ADAPTER).is_file():
            raise ValueError(
                f"{part}: no {ADAPTER}, and the student is a PEFT model; pass the student that the run trained"
            )
        with reading(part / ADAPTER, "adapter_model.*"):
            weights = load_peft_weights(str(part), device="cpu")
        found, own = shapes(weights), shapes(get_peft_model_state_dict(student, adapter_name=name))
        if found != own:
            one = sorted(x for x, _ in found.items() ^ own.items())[0]
            raise ValueError(
                f"{part}: not the student's adapter {name!r}; {one} is {found.get(one, 'missing')} there and "
                f"{own.get(one, 'missing')} in the student: pass a PEFT model with the configuration in {ADAPTER}"
            )
        set_peft_model_state_dict(student, weights, adapter_name=name)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in weights.items()}
