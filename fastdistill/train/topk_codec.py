"""Stores the k classes of each token and their log-probabilities compactly: two columns, each decoded by itself.

The columns are features of `datasets`, so that rows are decoded in every format, in workers, and after selecting,
shuffling or joining. With 50 classes of 151936, a token takes 86 bytes for the classes and 56 or 106 for their
log-probabilities in 8 or 16 bits.

*Classes* ascend, which is the order of both columns. Their low bits are stored as they are, and their high bits as a
bitmap (Elias-Fano code): bit `(class >> low_bits) + j` is set for class j of the token. A token may have fewer than k
classes, or none: the free places hold V, and are read as class 0 with the log-probability -inf.

*Log-probabilities* are read as `offset - scale * level(code)`. The scale is the distance between the token's largest
and smallest; levels are denser near the largest. The offset keeps the sum of the k probabilities as it was.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.features.features import register_feature

__all__ = ["TopkIndices", "TopkLogprobs", "ascending"]

RANGE = 32.0  # log-probabilities further below the token's largest are raised to that: e^-32 is 1e-14
DENSITY = 1.5  # levels are (code / last code) ^ DENSITY
HEADER = 6  # bytes before the codes: the offset, float32, and the scale, float16


class _Column:
    """Has the parts of a feature that both columns share. A row of L tokens is a list of L * token_bytes bytes."""

    pa_type: ClassVar[Any] = pa.list_(pa.uint8())  # numpy would cut zeros off the end of pa.binary()
    token_bytes: int

    def __call__(self) -> Any:
        return self.pa_type

    def decode(self, code: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> np.ndarray:
        """Returns a row's values (L, k). `datasets` calls this."""
        return self.decode(np.asarray(value, np.uint8).reshape(-1, self.token_bytes))

    def arrow(self, code: np.ndarray, starts: np.ndarray) -> Any:
        """Returns the Arrow array of rows that begin at the tokens `starts` of `code` (n, token_bytes)."""
        ends = pa.array(starts * self.token_bytes, pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(code.reshape(-1)))


@dataclass
class TopkIndices(_Column):
    """Stores `size` classes a token, each below `classes`; read as int64 (L, size), ascending."""

    size: int
    classes: int
    dtype: ClassVar[str] = "int64"
    _type: str = field(default="FastdistillTopkIndices", init=False, repr=False)

    @cached_property
    def low_bits(self) -> int:
        """The multiple of 4 with which a token takes the fewest bytes; others would be slower to read."""
        return min(range(0, 33, 4), key=self._token_bytes)

    @cached_property
    def token_bytes(self) -> int:  # type: ignore[override]
        return self._token_bytes(self.low_bits)

    def _token_bytes(self, low_bits: int) -> int:
        halves = (self.size + 1) // 2 if low_bits % 8 else 0
        return self.size * (low_bits // 8) + halves + (self._bitmap(low_bits) + 7) // 8

    def _bitmap(self, low_bits: int) -> int:
        return self.size + (self.classes >> low_bits) + 1

    def encode(self, indices: np.ndarray) -> np.ndarray:
        """Returns the bytes (n, token_bytes) of classes (n, k), ascending, with V in the free places."""
        low, rows = self.low_bits, len(indices)
        parts: list[np.ndarray] = [(indices >> shift).astype(np.uint8) for shift in range(0, low - 7, 8)]
        if low % 8:
            halves = np.zeros((rows, (self.size + 1) // 2 * 2), np.uint8)
            halves[:, : self.size] = (indices >> (low - 4)) & 15
            parts.append(halves[:, ::2] | halves[:, 1::2] << 4)
        bits = np.zeros((rows, self._bitmap(low)), np.uint8)
        np.put_along_axis(bits, (indices >> low) + np.arange(self.size), 1, axis=1)
        return np.concatenate([*parts, np.packbits(bits, axis=1, bitorder="little")], axis=1)

    def decode(self, code: np.ndarray) -> np.ndarray:
        """Returns the classes (n, k) of bytes (n, token_bytes), with 0 in the free places."""
        low, size, rows, width = self.low_bits, self.size, len(code), self._bitmap(self.low_bits)
        bitmap = code[:, self.token_bytes - (width + 7) // 8 :]
        places = np.flatnonzero(np.unpackbits(bitmap, axis=1, count=width, bitorder="little").view(bool))
        if len(places) != rows * size:
            raise ValueError("topk_indices are damaged: find the file with read_cache(folder, verify=True)")
        indices = places.reshape(rows, size)
        indices -= np.arange(rows)[:, None] * width + np.arange(size)
        indices <<= low
        for i, shift in enumerate(range(0, low - 7, 8)):
            indices |= code[:, i * size : (i + 1) * size].astype(np.int64) << shift
        if low % 8:
            pairs = code[:, low // 8 * size :][:, : (size + 1) // 2]
            indices[:, ::2] |= (pairs & 15).astype(np.int64) << (low - 4)
            indices[:, 1::2] |= (pairs[:, : size // 2] >> 4).astype(np.int64) << (low - 4)
        indices[indices == self.classes] = 0
        return indices


@dataclass
class TopkLogprobs(_Column):
    """Stores `size` log-probabilities a token in `bits` (8 or 16) each; read as float32 (L, size)."""

    size: int
    bits: int
    dtype: ClassVar[str] = "float32"
    _type: str = field(default="FastdistillTopkLogprobs", init=False, repr=False)

    @cached_property
    def token_bytes(self) -> int:  # type: ignore[override]
        return HEADER + self.size * self.bits // 8

    def encode(self, logprobs: np.ndarray) -> np.ndarray:
        """Returns the bytes (n, token_bytes) of log-probabilities (n, k), float32, which may be -inf."""
        table = levels(self.bits)
        last = len(table) - 2
        is_finite = np.isfinite(logprobs)
        highest = logprobs.max(1, keepdims=True)
        highest = np.where(np.isfinite(highest), highest, 0)
        below = np.where(is_finite, np.minimum(highest - logprobs, RANGE), 0)
        exact = np.maximum(below.max(1, keepdims=True), 2**-14)
        scale = exact.astype("<f2")
        scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
        codes = np.rint((below / scale) ** (1 / DENSITY) * last).clip(max=last)
        codes = np.where(is_finite, codes, last + 1).astype(f"<u{self.bits // 8}")
        relative = -scale.astype(np.float32) * table[codes]
        with np.errstate(divide="ignore", invalid="ignore"):
            offset = highest + np.log(np.exp(logprobs - highest).sum(1, keepdims=True))
            offset = np.where(
                is_finite.any(1, keepdims=True), offset - np.log(np.exp(relative).sum(1, keepdims=True)), 0
            )
        parts = [offset.astype("<f4"), scale.astype("<f2"), codes]
        return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in parts], axis=1)

    def decode(self, code: np.ndarray) -> np.ndarray:
        """Returns the log-probabilities (n, k) of bytes (n, token_bytes)."""
        offset = code[:, :4].copy().view("<f4")
        scale = code[:, 4:HEADER].copy().view("<f2").astype(np.float32)
        logprobs = levels(self.bits)[np.ascontiguousarray(code[:, HEADER:]).view(f"<u{self.bits // 8}")]
        logprobs *= -scale
        logprobs += offset
        return logprobs


@lru_cache
def levels(bits: int) -> np.ndarray:
    """Returns the level of each code, float32, from 0 to 1. The last code is a class of probability 0."""
    last = 2**bits - 2
    return np.append((np.arange(last + 1) / last) ** DENSITY, np.inf).astype(np.float32)


def ascending(logprobs: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (n, k) each
    """Returns both in the order of the classes, which is how the two columns store them."""
    order = np.argsort(indices, axis=1)
    return np.take_along_axis(logprobs, order, 1), np.take_along_axis(indices, order, 1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental"
    for feature in (TopkIndices, TopkLogprobs):
        register_feature(feature, f"Fastdistill{feature.__name__}")
