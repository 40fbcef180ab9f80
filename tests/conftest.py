"""One thread a worker, fixed seeds, and the backends that every contract test runs on."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the kernels then run on CPU tensors

import _interpreter
import _oracle
import _simulated

torch.set_num_threads(1)  # pytest-xdist runs one worker a core

hypothesis.settings.register_profile("quick", max_examples=8, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("all", parent=hypothesis.settings.get_profile("quick"), max_examples=30)


# Names of tests, and their sizes, that take more than a few seconds in the interpreter: thousands of programs.
SLOW_INTERPRETED = (
    "30522", "50257", "128256", "31_elements", "1030-33", "257-1000", "any_number_of_tokens", "accumulate_in_float32",
    "the_same_curve", "opcheck[triton-whole", "compiled_once_for_every_length", "several_threads",
    "triton-400-", "triton-160-",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is a GPU, the contract of every backend is tested on it: tensors that tests make are born there."""
    if torch.cuda.is_available() and "backend" in request.fixturenames:
        with torch.device("cuda"):
            yield
    else:
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """csrc has kernels for some ops and dtypes, and says so of the others."""
    try:
        return (yield)
    except ValueError as refused:
        if str(refused).startswith("backend is 'cuda', but"):
            pytest.skip(str(refused))
        raise


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="run the contract tests on this backend only; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    quick = "not slow" in config.option.markexpr
    hypothesis.settings.load_profile("quick" if quick else "all")
    if config.getoption("--backend"):
        _oracle.BACKENDS = tuple(config.getoption("--backend"))
    elif not quick and not torch.cuda.is_available() and _simulated.POSSIBLE:
        _oracle.BACKENDS += ("cuda",)
    if "triton" in _oracle.BACKENDS and not torch.cuda.is_available():
        _interpreter.mend_bfloat16()
        _interpreter.prepare_once()
    if "cuda" in _oracle.BACKENDS and not torch.cuda.is_available():
        _simulated.install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _oracle.BACKENDS)


# Ops whose kernels others run as well: in the interpreter the contract's quick tests are of one op for each kernel, and
# for each way through it.
SAME_KERNEL = {
    "soft_cross_entropy", "kl_div", "kl_div-reverse", "jsd", "linear_soft_cross_entropy", "linear_kl_div", "linear_jsd",
    "linear_tvd", "linear_kl_div-reverse", "linear_kl_div-all-options", "linear_topk_soft_cross_entropy-renormalize",
}  # fmt: skip


ON_LOGITS = {"soft_cross_entropy", "kl_div", "jsd", "tvd"}  # what csrc has kernels for


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter not everything is worth its time."""
    if torch.cuda.is_available():
        return
    kept, dropped = [], []
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        interpreted = backend == "triton"
        if backend == "cuda":
            item.add_marker(pytest.mark.slow)
            other = getattr(item.callspec.params.get("op"), "name", "kl_div") not in ON_LOGITS
            if other or any(name in item.name for name in SLOW_INTERPRETED):
                dropped.append(item)
                continue
        # What is allocated is a question for a GPU: the interpreter's arrays are not PyTorch's.
        if backend in ("triton", "cuda") and item.module.__name__ == "test_memory":
            dropped.append(item)
            continue
        if interpreted:
            contract = item.module.__name__ in ("test_contract", "test_properties")
            same = contract and str(item.callspec.params.get("op")) in SAME_KERNEL
            if same or any(name in item.name for name in SLOW_INTERPRETED):
                item.add_marker(pytest.mark.slow)
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
