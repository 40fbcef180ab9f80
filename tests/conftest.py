"""One thread a worker, fixed seeds, and the backends that every contract test runs on."""

from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
import torch
from _oracle import BACKENDS

torch.set_num_threads(1)  # pytest-xdist runs one worker a core

hypothesis.settings.register_profile("fastdistill", max_examples=20, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastdistill")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
