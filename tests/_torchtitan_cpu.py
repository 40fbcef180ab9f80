"""Lets torchtitan's Trainer run on CPUs with gloo. Import this before any module of torchtitan."""

from __future__ import annotations

import types
import unittest.mock
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule


class Device(types.ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that torchtitan calls."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=2**30)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


with unittest.mock.patch.multiple(
    torch._utils, _get_available_device_type=lambda: "cpu", _get_device_module=lambda device: Device(device)
):
    pytest.importorskip("torchtitan.train")  # torchtitan reads the device when it is imported
    from torchtitan.models.llama3.infra import parallelize

undivided = parallelize.disable_fsdp_gradient_division


def summed(model: torch.nn.Module) -> None:
    """Sums the gradients by plain sums: gloo cannot multiply while it sums."""
    undivided(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


parallelize.disable_fsdp_gradient_division = summed
