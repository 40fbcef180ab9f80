"""Finds the parameters of a student that its objective reaches, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Reached", "layerdrop", "reached"]


class Reached(NamedTuple):
    """The trainable parameters of a model, by name."""

    learned: set[str]  # a term reaches these
    frozen: set[str]  # no term reaches these
    is_random: bool  # whether single steps may leave out some of `learned`


def reached(model: nn.Module, config: Any, backward: Callable[[], None]) -> Reached:
    """Runs `backward`, which leaves the gradients of a few rows, in eval mode and in training mode.

    In eval mode no layer is skipped at random (layerdrop). Training mode adds what only training uses, such as the
    embedding of masked frames. An expert of a mixture that no token of the rows chose counts as reached.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ran: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: ran.add(module)) for module in model.modules()]
    passes = []
    try:
        for training in (False, True):
            model.train(training)
            backward()
            passes.append({name for name, p in trainable.items() if p.grad is not None})
            model.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    idle = trainable.keys() & idle_experts(model, ran)
    learned = passes[0] | passes[1] | idle
    is_random = bool(layerdrop(config.to_dict()) or idle or passes[0] != passes[1])
    return Reached(learned, trainable.keys() - learned, is_random)


def layerdrop(config: Mapping[str, Any]) -> dict[str, float]:
    """Returns the probabilities above 0 at which a config and the configs in it have layers skipped, by name."""
    found = {name: value for name, value in config.items() if "layerdrop" in str(name) and value}
    return found | {k: v for part in config.values() if isinstance(part, Mapping) for k, v in layerdrop(part).items()}


def idle_experts(model: nn.Module, ran: set[nn.Module]) -> set[str]:
    """Returns the parameters of those elements of a list that did not run, where another element did."""
    found = set()
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList):
            idle = [i for i, element in enumerate(modules) if ran.isdisjoint(element.modules())]
            if len(idle) < len(modules):
                found |= {f"{name}.{i}.{key}" for i in idle for key, _ in modules[i].named_parameters()}
    return found
