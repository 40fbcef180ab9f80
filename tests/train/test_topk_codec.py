"""Tests how the k classes of a token are stored: round trips, sizes, the error of the loss, and damage."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.train.topk_codec import RANGE, TopkIndices, TopkLogprobs, ascending

SHAPES = [(1, 2), (2, 2), (1, 1), (1, 2**31), (3, 2**31), (50, 151936), (7, 256), (256, 256), (33, 65537), (64, 30522)]


def classes_of(rng: np.random.Generator, rows: int, k: int, classes: int) -> np.ndarray:
    """Returns ascending classes (rows, k), with V in the free places: none, some or all of a row."""
    if classes < 1 << 20:
        found = np.argsort(rng.random((rows, classes)), axis=1)[:, :k].astype(np.int64)
    else:
        found = np.stack([rng.choice(classes // k, k) + np.arange(k) * (classes // k) for _ in range(rows)])
    used = np.where(rng.random(rows) < 0.5, k, rng.integers(0, k + 1, rows))
    return np.sort(np.where(np.arange(k) < used[:, None], found, classes), axis=1)


@pytest.mark.parametrize("k, classes", SHAPES)
def test_classes_come_back(k: int, classes: int) -> None:
    feature, indices = TopkIndices(k, classes), classes_of(np.random.default_rng(k), 40, k, classes)
    indices[0] = np.arange(classes - k, classes)  # the last ones
    indices[1] = np.arange(k)
    code = feature.encode(indices)
    assert (code.dtype, code.shape) == (np.uint8, (40, feature.token_bytes))
    found = feature.decode(code)
    assert found.dtype == np.int64
    assert (found == np.where(indices == classes, 0, indices)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_classes_come_back(data: Any) -> None:
    classes = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 4097, 65536, 151936, 2**31])))
    k = data.draw(st.integers(1, min(classes, 70)))
    rows = [sorted(data.draw(st.sets(st.integers(0, classes - 1), max_size=k))) for _ in range(3)]
    indices = np.array([[*row, *[classes] * (k - len(row))] for row in rows])
    feature = TopkIndices(k, classes)
    assert (feature.decode(feature.encode(indices)) == np.where(indices == classes, 0, indices)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([8, 16]))
def test_any_log_probabilities_come_back_within_a_step(data: Any, bits: int) -> None:
    k = data.draw(st.integers(1, 9))
    entry = st.one_of(st.floats(-60, 10, width=32), st.just(-np.inf))
    raw = np.array(data.draw(st.lists(st.lists(entry, min_size=k, max_size=k), min_size=1, max_size=4)), np.float32)
    highest = data.draw(st.floats(-20, 0, width=32))
    exact = raw - np.where(np.isfinite(raw), raw, -np.inf).max(1, keepdims=True, initial=-100) + np.float32(highest)
    found = TopkLogprobs(k, bits).decode(TopkLogprobs(k, bits).encode(exact))
    assert found.dtype == np.float32
    finite = np.isfinite(exact)
    assert (np.isneginf(found) == ~finite).all()
    kept = np.where(finite, np.maximum(exact, highest - RANGE), highest)
    step = 1.5 * (kept.max(1) - kept.min(1)).clip(2**-14) * 1.001 / (2**bits - 2)
    assert (np.abs(np.where(finite, found, highest) - kept) <= step[:, None] + 1e-5).all()
    with np.errstate(divide="ignore"):
        masses = [np.exp(x.astype(np.float64)).sum(1) for x in (exact, found)]
    np.testing.assert_allclose(masses[1], masses[0], rtol=1e-5)


def distributions(k: int, rows: int = 300, classes: int = 20000) -> dict[str, np.ndarray]:
    """Returns the k highest log-probabilities (rows, k) of flat and of peaked distributions with Zipf's long tail."""
    rng = np.random.default_rng(0)
    found = {}
    for name, noise in (("flat", 1.0), ("middle", 2.5), ("peaked", 6.0)):
        logits = -np.log(np.arange(1, classes + 1) + 2.7) + noise * rng.standard_normal((rows, classes))
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found[name] = -np.sort(-logp, axis=1)[:, :k].astype(np.float32)
    return found


@pytest.mark.parametrize("bits, average, most", [(8, 3e-5, 1e-4), (16, 1e-9, 3e-9)])
def test_the_error_of_the_loss(bits: int, average: float, most: float) -> None:
    """The divergence of what is read from what was written is as small as docs/cache.md says."""
    for name, logp in distributions(50).items():
        found = TopkLogprobs(50, bits).decode(TopkLogprobs(50, bits).encode(logp)).astype(np.float64)
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logp.astype(np.float64), found))
        divergence = (p * np.log(p / q)).sum(1)
        assert 0 < divergence.mean() < average, name
        assert divergence.max() < most, name


def test_sizes_are_those_of_the_page() -> None:
    assert TopkIndices(50, 151936).token_bytes == 86
    assert [TopkLogprobs(50, bits).token_bytes for bits in (8, 16)] == [56, 106]
    for k, classes in SHAPES:  # near the smallest size that any code of sets can have
        least = k * np.log2(classes / k) / 8
        assert TopkIndices(k, classes).token_bytes <= least + 0.5 * k + 3


def dataset(rows: int = 6) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """Returns a data set of both columns, and what is to be read of them."""
    rng = np.random.default_rng(0)
    lengths = np.arange(rows) % 4 + 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    indices = classes_of(rng, starts[-1], 3, 60)
    logprobs = np.where(indices == 60, -np.inf, -rng.random(indices.shape)).astype(np.float32)
    columns: dict[str, Any] = {"topk_logprobs": TopkLogprobs(3, 16), "topk_indices": TopkIndices(3, 60)}
    features = Features({"input_ids": List(Value("int64")), **columns})
    ids = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(np.arange(starts[-1])))
    arrays = [
        columns[name].arrow(columns[name].encode(x), starts)
        for name, x in (("topk_logprobs", logprobs), ("topk_indices", indices))
    ]
    table = pa.table([ids, *arrays], schema=features.arrow_schema)
    shown = np.where(indices == 60, 0, indices)
    return Dataset(table).with_format("numpy"), np.split(logprobs, starts[1:-1]), np.split(shown, starts[1:-1])


def changed(data: Dataset) -> dict[str, tuple[Dataset, list[int]]]:
    """Returns data sets made of `data` in ways that trainers use, and the rows that each should have."""
    everything = list(range(len(data)))
    return {
        "as it is": (data, everything),
        "selected": (data.select([4, 1]), [4, 1]),
        "joined": (concatenate_datasets([data, data]), everything * 2),
        "without a column": (data.remove_columns("input_ids"), everything),
        "python": (data.with_format(None), everything),
        "torch": (data.with_format("torch"), everything),
        "mapped": (data.map(lambda row: {"length": len(row["input_ids"])}), everything),
        "mapped in batches": (data.map(lambda rows: {"x": [0] * len(rows["input_ids"])}, batched=True), everything),
        "pickled": (pickle.loads(pickle.dumps(data)), everything),
        "streamed": (data.to_iterable_dataset(), everything),
    }


@pytest.mark.parametrize("way", list(changed(dataset()[0])))
def test_rows_are_read_after_whatever_is_done_to_the_data_set(way: str) -> None:
    data, logprobs, indices = dataset()
    found, rows = changed(data)[way]
    for cached, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(np.asarray(cached["topk_logprobs"]), logprobs[row], atol=1e-4)
        np.testing.assert_array_equal(np.asarray(cached["topk_indices"]), indices[row])


def test_damaged_classes_are_no_classes() -> None:
    feature = TopkIndices(3, 60)
    code = feature.encode(np.array([[1, 5, 60], [2, 3, 4]]))
    code[1, -1] ^= 4
    with pytest.raises(ValueError, match="topk_indices are damaged: find the file with read_cache"):
        feature.decode(code)


def test_ascending_moves_both() -> None:
    logprobs, indices = ascending(np.array([[-1.0, -2.0, -np.inf]]), np.array([[7, 3, 9]]))
    assert indices.tolist() == [[3, 7, 9]]
    assert logprobs.tolist() == [[-2.0, -1.0, -np.inf]]
