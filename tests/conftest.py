"""Sets one thread per worker and fixed seeds, and chooses the backends that every contract test runs on."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import combinations

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the kernels then run on CPU tensors

import _interpreter
import _oracle
import _simulated

torch.set_num_threads(1)  # pytest-xdist runs one worker a core
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

hypothesis.settings.register_profile("quick", max_examples=3, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("all", parent=hypothesis.settings.get_profile("quick"), max_examples=30)


# Parts of the names of cases that take more than a few seconds in the interpreter, which runs programs one by one.
SLOW_INTERPRETED = (
    "30522", "50257", "128256", "31_elements", "1030-33", "257-1000", "any_number_of_tokens", "accumulate_in_float32",
    "the_same_curve", "opcheck[triton-whole", "compiled_once_for_every_length", "several_threads",
    "triton-400-", "triton-160-",
)  # fmt: skip

# Ops that the interpreter need not run, because another op runs the same kernels with the same branches.
SAME_KERNEL = {
    "soft_cross_entropy", "kl_div", "kl_div-reverse", "jsd", "linear_soft_cross_entropy", "linear_kl_div", "linear_jsd",
    "linear_tvd", "linear_kl_div-reverse", "linear_kl_div-all-options", "linear_topk_soft_cross_entropy-renormalize",
    "attention_mse-long",
}  # fmt: skip

# Tests of the code between PyTorch and the kernels. In the interpreter they need one op for each registered op. Those
# of the compiler and of the registration need no more with plain torch either.
COMPILED = ("test_opcheck", "test_compiled_fullgraph_equals_eager", "test_compiled_once_for_every_length")
AROUND_KERNELS = (
    *COMPILED, "test_autocast", "test_activation_checkpointing",
    "test_functional_call", "test_earlier_operations_keep_their_saved_tensors", "test_differentiating_twice_raises",
    "test_inputs_are_never_written", "test_num_items_is_the_divisor", "test_a_module_equals_its_function",
    "test_every_backward_of_a_graph_gives_the_same_bits", "test_item_weights_multiply_each_items_loss",
    "test_micro_batches_add_up_to_the_batch", "test_gradients_never_hold_uninitialised_memory",
    "test_masked_rows_are_ignored", "test_no_grad_and_inference_mode", "test_sum_and_mean_follow_from_the_items",
)  # fmt: skip
SAME_REGISTERED_OP = {
    "kl_div-all-options", "kl_div-skewed", "tvd", "topk_soft_cross_entropy-renormalize",
    "topk_soft_cross_entropy-renormalize-reverse", "topk_soft_cross_entropy-bucket-reverse", "attention_kl-causal",
    "attention_mse-long-causal",
    "linear_kl_div-skewed", "linear_topk_soft_cross_entropy-renormalize-reverse",
    "linear_topk_soft_cross_entropy-bucket-reverse",
}  # fmt: skip

# In the interpreter the other tests see each value of a parameter, and these each pair of values: they say that an op's
# kernel is right for each dtype, mask and reduction, and for each size beside a border of its tiles.
EVERY_PAIR = (
    "test_value_and_gradients", "test_vocabularies", "test_lengths_around_tile_borders", "test_options", "test_labels",
    "test_masks", "test_grouped_queries", "test_extreme_sizes",
)  # fmt: skip

LONG = {"attention_mse-long", "attention_mse-long-causal"}  # plain torch has an op of its own for them
ON_LOGITS = {"soft_cross_entropy", "kl_div", "jsd", "tvd"}  # the ops for which csrc has kernels


def on_the_card(item: pytest.Item) -> bool:
    """Returns whether a test runs on the GPU: tests with the `backend` fixture do if there is one."""
    return torch.cuda.is_available() and "backend" in item.fixturenames


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes tests create their tensors on the GPU, and frees cached memory for other workers of pytest-xdist."""
    with torch.device("cuda") if on_the_card(request.node) else nullcontext():
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Moves tensor parameters to the GPU: they were created on the CPU when their module was imported."""
    if on_the_card(pyfuncitem):
        for name in pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else ():
            pyfuncitem.funcargs[name] = tree_map_only(
                Tensor, lambda x: x.cuda() if x.device.type == "cpu" else x, pyfuncitem.funcargs[name]
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips the ops and dtypes for which csrc has no kernel."""
    try:
        return (yield)
    except ValueError as refused:
        if str(refused).startswith("backend is 'cuda', but"):
            pytest.skip(str(refused))
        raise


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Lets each test choose its own devices and precision, which accelerate fixes once for a process."""
    yield
    if "accelerate" in sys.modules and not torch.distributed.is_initialized():
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def _few_or_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs half of the cases with few logits or residuals on the blocks that large ones take."""
    if "backend" in request.fixturenames and zlib.crc32(request.node.name.encode()) % 2:
        monkeypatch.setattr("fastdistill.ops._few.FEW", 0)
        monkeypatch.setattr("fastdistill.ops.linear_mse.FEW", 0)


@pytest.fixture(autouse=True)
def _short_scans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton scan causal sequences of few keys, such as those of `long_attention`."""
    if "backend" in request.fixturenames:
        monkeypatch.setattr("fastdistill.ops.attention_mse.SCAN_ROWS", 64)


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
        _interpreter.check_addresses()
    if "cuda" in _oracle.BACKENDS and not torch.cuda.is_available():
        _simulated.install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _oracle.BACKENDS)


def stands_for_another(item: pytest.Item) -> bool:
    """Returns whether a case repeats in the interpreter what another case of the quick run checks."""
    if any(part in item.name for part in SLOW_INTERPRETED):
        return True
    op = str(item.callspec.params.get("op"))
    if item.module.__name__ == "test_linear_logits_ops":  # its kernels see a bias; one op here has no E_s[c]
        return op in SAME_KERNEL - {"linear_soft_cross_entropy"}
    if item.module.__name__ not in ("test_contract", "test_properties", "test_losses"):
        return False
    return op in SAME_KERNEL or (item.originalname in AROUND_KERNELS and op in SAME_REGISTERED_OP)


def covering(cases: list[pytest.Item], together: int) -> list[pytest.Item]:
    """Chooses few cases of a test, greedily, such that all values of `together` parameters occur together; of equally
    good cases it takes the one whose values were taken least."""
    values = {
        case: [(name, repr(value)) for name, value in sorted(case.callspec.params.items()) if name != "backend"]
        for case in cases
    }
    groups = {case: set(combinations(found, min(together, len(found)))) for case, found in values.items()}
    missing = set().union(*groups.values())
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(groups[case] & missing), -sum(taken[x] for x in values[case])))
        chosen.append(best)
        taken.update(values[best])
        missing -= groups[best]
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as slow the cases that the interpreter need not repeat, and drops those that a backend cannot run."""
    if torch.cuda.is_available():
        unseen = pytest.mark.skip(reason="classes are checked on the CPU only: on a GPU it would need a host sync")
        for item in items:
            # PyTorch's own indexing asserts on the device, after which every later test of the process fails.
            if item.originalname in ("test_labels_outside_the_classes", "test_topk_indices_outside_the_classes"):
                item.add_marker(unseen)
        return
    kept, dropped = [], []
    interpreted: dict[str, list[pytest.Item]] = {}  # the cases of each test that the quick run may take
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        elsewhere = (SAME_KERNEL | SAME_REGISTERED_OP) - LONG
        if backend == "torch" and item.originalname in COMPILED and str(item.callspec.params["op"]) in elsewhere:
            item.add_marker(pytest.mark.slow)
        if backend == "cuda":
            item.add_marker(pytest.mark.slow)
            other = getattr(item.callspec.params.get("op"), "name", "kl_div") not in ON_LOGITS
            if other or any(part in item.name for part in SLOW_INTERPRETED):
                dropped.append(item)
                continue
        # The memory tests need a GPU for these backends: the interpreter's arrays are not PyTorch's.
        if backend in ("triton", "cuda") and item.module.__name__ == "test_memory":
            dropped.append(item)
            continue
        if backend == "triton":
            # The kernels of lists in reverse and of skews have their values and gradients checked by other tests.
            label = item.name if item.module.__name__ == "test_properties" else ""
            is_variant = any(part in label for part in ("skewed", "bucket-reverse", "renormalize-reverse"))
            if stands_for_another(item) or is_variant:
                item.add_marker(pytest.mark.slow)
            elif not item.get_closest_marker("slow"):
                interpreted.setdefault(item.nodeid.split("[")[0], []).append(item)
        kept.append(item)
    for cases in interpreted.values():
        together = 2 if cases[0].originalname in EVERY_PAIR else 1
        for item in set(cases) - set(covering(cases, together)):
            item.add_marker(pytest.mark.slow)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
