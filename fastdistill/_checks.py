"""Checks the arguments of the public functions. Each check raises before any work, and names the argument, what it was,
what it should be and how to mend it."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

# The words that options take. `Total` is the reduction of a loss whose items are never in memory.
Reduction = Literal["mean", "sum", "none"]
Total = Literal["mean", "sum"]
Backend = Literal["auto", "reference", "torch", "triton", "cuda"]
Tail = Literal["renormalize", "bucket"]

REDUCTIONS = get_args(Reduction)
_PLAIN = (Tensor, Parameter)


def given(**optional: Tensor | None) -> dict[str, Tensor]:
    """Returns the optional tensors that are not None."""
    return {name: x for name, x in optional.items() if x is not None}


def floating(**tensors: Tensor) -> None:
    """Checks that all are real floating tensors on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if type(x) in _PLAIN and x.is_floating_point() and x.device == first.device and x.numel():
            continue  # the usual case: to look for attributes that are not there is slow
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}; it should be a torch.Tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; it should be floating point: cast it with .float()")
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor; it should be a plain tensor. Under FSDP, where each process has its own data, "
                "call the op inside the forward of the module that FSDP wraps, or pass "
                f'{name}.full_tensor(grad_placements=[Partial("avg")]), which averages its gradient over processes. '
                "Under tensor parallelism, where the processes share their data, call the function of the same name in "
                "fastdistill.distributed"
            )
        if hasattr(x, "ds_id") and x.numel() == 0:
            raise ValueError(
                f"{name} is a parameter that DeepSpeed ZeRO-3 has partitioned and holds no values here: call the op "
                "inside the forward of the module that owns it, or under deepspeed.zero.GatheredParameters"
            )
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}; move it there")


def frozen(**tensors: Tensor | None) -> None:
    """Checks that no tensor of the teacher requires a gradient: it gets none, so asking for one is a mistake."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name} has requires_grad=True, but the teacher gets no gradient: run the teacher under "
                f"torch.no_grad(), or pass {name}.detach()"
            )


def same_dtype(**tensors: Tensor | None) -> None:
    """Checks the operands of one matrix product, after autocast has cast them."""
    if len({x.dtype for x in tensors.values() if x is not None}) > 1:
        listed = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items() if x is not None)
        raise TypeError(f"{listed} should have one dtype: cast them, or run under torch.autocast")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it should be {tuple(expected)}, {meaning}")


def mask(name: str, x: Tensor | None, expected: tuple[int, ...] | None, meaning: str, device: torch.device) -> None:
    """Checks a bool tensor, True = counts. With `expected` None it may have any shape."""
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {what}; it should be a bool tensor, True = counts: pass {name}.bool()")
    if expected is not None:
        shape(name, x, expected, meaning)
    on_device(name, x, device)


def item_weights(x: Tensor | None, expected: tuple[int, ...], meaning: str, device: torch.device) -> None:
    if x is None:
        return
    floating(item_weights=x)
    shape("item_weights", x, expected, meaning)
    on_device("item_weights", x, device)
    if x.requires_grad:
        raise ValueError("item_weights has requires_grad=True, but it gets no gradient: pass item_weights.detach()")


def on_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it should be on {device}: pass {name}.to({str(device)!r})")


def integers(name: str, x: Tensor, expected: tuple[int, ...], meaning: str, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {what}; it should be an integer tensor: pass {name}.long()")
    shape(name, x, expected, meaning)
    on_device(name, x, device)


def reduction(value: str, num_items: int | float | Tensor | None, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    if value not in allowed:
        raise ValueError(f"reduction is {value!r}; it should be one of {', '.join(map(repr, allowed))}")
    if num_items is None:
        return
    if value != "mean":
        raise ValueError(f"num_items is given but reduction is {value!r}; only 'mean' divides by it")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items has shape {tuple(num_items.shape)}; it should be a number or a 0-d tensor")
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"num_items is {type(num_items).__name__}; it should be a number or a 0-d tensor")
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items is {num_items}; it should be the number of counted items, finite and 0 or more")


def positive(name: str, value: float) -> None:
    if not (_is_number(name, value) and 0 < value < math.inf):
        raise ValueError(f"{name} is {value}; it should be a positive finite number")


def integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {type(value).__name__}; it should be an int")


def boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; it should be a bool")


def finite(name: str, value: float | None) -> None:
    if value is not None and not (_is_number(name, value) and -math.inf < value < math.inf):
        raise ValueError(f"{name} is {value}; it should be a finite number")


def fraction(name: str, value: float) -> None:
    if not (_is_number(name, value) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value}; it should be between 0 and 1")


def _is_number(name: str, value: object) -> bool:
    if type(value) is float:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} is {type(value).__name__}; it should be a number")
    return True
