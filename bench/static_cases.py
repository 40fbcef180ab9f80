"""Lists the calls whose kernels `bench.static` compiles: each launcher, at the sizes and dtypes that choose its tiles.

Tensors are uninitialised: nothing runs, and only sizes, dtypes and alignment matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastdistill.kernels import (
    attention_mse,
    attention_packed,
    attention_short,
    attention_tiles,
    counted_mm,
    linear_mse,
    logits,
    scale,
    topk,
)  # fmt: skip
from torch import Tensor

from fastdistill.ops._attention import Attention, Counted
from fastdistill.ops._rows import RowOptions

Call = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def work(kernel: str, constants: dict[str, Any]) -> tuple[str, float]:
    """Returns the unit that a kernel's costs are counted in, and how many units one pass over its hot part handles.

    The hot part is the whole main path if the row is one block, else the loops that read the student's logits; of
    other kernels it is the innermost loop with the most matrix instructions.
    """
    try:
        if "rows" in kernel:
            return "class", constants["BLOCK"]
        if kernel.startswith("attention_tiles."):
            return "pair", constants["BLOCK_M"] * constants["BLOCK_N"]
        if kernel == "attention_mse.contract":
            return "entry", constants["BLOCK"] ** 2
        if kernel.startswith("attention_mse."):
            return "row of a head", constants["ROWS"]
        if kernel.startswith("counted_mm.") or constants.get("weight_ptr", 0) is not None:
            return "1024 products", constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"] / 1024
        return "number", constants["BLOCK_M"] * constants["BLOCK_N"]
    except KeyError:
        return "pass", 1


def all_cases() -> Iterator[tuple[str, Call]]:
    yield from logits_cases()
    yield from topk_cases()
    yield from linear_mse_cases()
    yield from counted_mm_cases()
    yield from scale_cases()
    yield from attention_mse_cases()
    yield from attention_tiles_cases()
    yield from attention_short_cases()


def growing(size: int) -> Iterator[tuple[str, Call]]:
    """Yields one call of each op with `size` tokens, rows, or length: the size that changes during training."""
    yield "logits", _rows("jsd", 4096, "bf16", with_all=True, rows=size)[1]
    yield "topk", _listed(4096, "bucket", "bf16", with_all=True, rows=size)[1]
    yield "linear_mse", _residual(320, 768, "bf16", with_all=True, tokens=size)[1]
    yield "counted_mm", _products(320, 32000, "bf16", tokens=size)[1]
    for is_causal in (False, True):
        yield f"attention_mse, {is_causal=}", _gram(64, 64, "bf16", True, is_causal, size)[1]
    yield "attention_kl", _tiles(True, 64, 64, "bf16", True, size)[1]
    yield "attention_kl, packed", _packed(True, 64, size)[1]
    for is_causal in (False, True):
        yield f"attention_mse, packed, {is_causal=}", _packed_gram(64, "bf16", is_causal, 16 * size)[1]
    yield "attention_mse, short", _short(64, 64, "bf16", 97 + size % 32, True)[1]


# beta, teacher_kl and student_kl of the mixtures that RowOptions calls "jsd"
MIXTURES = {
    "jsd": (0.5, 0.5, 0.5), "skewed_kl": (0.1, 1.0, 0.0), "skewed_reverse_kl": (0.9, 0.0, 1.0),
    "mixture": (0.3, 0.5, 0.5),
}  # fmt: skip


def logits_cases() -> Iterator[tuple[str, Call]]:
    for kind in ("soft_cross_entropy", "kl_div", "reverse_kl", *MIXTURES, "tvd"):
        for classes in (512, 8192, 131072):
            yield _rows(kind, classes, "bf16", with_all=False)
    for kind in ("kl_div", "mixture"):
        for classes in (8192, 131072):
            yield _rows(kind, classes, "bf16", with_all=False, scale=0.25)
    for name in ("bf16", "fp16", "fp32"):
        yield _rows("kl_div", 16384, name, with_all=True)
        yield _rows("jsd", 32000, name, with_all=True)
        for kind in ("skewed_kl", "skewed_reverse_kl", "mixture"):
            for classes in (4096, 8192):
                yield _rows(kind, classes, name, with_all=True, scale=0.25)


def _rows(kind: str, classes: int, name: str, with_all: bool, rows: int = 64, scale: float = 1.0) -> tuple[str, Call]:
    student, teacher = (torch.empty(rows, classes, dtype=DTYPES[name]) for _ in range(2))
    loss, gradient = torch.empty(rows), torch.empty_like(student)
    labels = torch.empty(rows, dtype=torch.int64) if with_all else None
    counted = torch.empty(rows, dtype=torch.bool) if with_all else None
    cap = 30.0 if with_all else None
    of_options = "jsd" if kind in MIXTURES else kind
    mixture = MIXTURES.get(kind, MIXTURES["jsd"])
    options = RowOptions(of_options, "", classes, 2.0, *mixture, 1.0, 0.5, cap, cap, scale, scale, "triton")

    def call() -> None:
        logits.rows(
            student, (teacher,), labels, counted, options, loss=loss, gradient=gradient, weight=loss,
            expected=loss if with_all else None,
        )  # fmt: skip

    return f"logits {kind} V={classes} {name}" + " scaled" * (scale != 1) + " all options" * with_all, call


def topk_cases() -> Iterator[tuple[str, Call]]:
    for kind in ("soft_cross_entropy", "reverse_kl"):
        for classes in (512, 8192, 131072):
            for tail in ("renormalize", "bucket"):
                yield _listed(classes, tail, "bf16", with_all=False, kind=kind)
        for name in ("bf16", "fp32"):
            yield _listed(32000, "bucket", name, with_all=True, kind=kind)


def _listed(
    classes: int, tail: str, name: str, with_all: bool, rows: int = 64, kind: str = "soft_cross_entropy"
) -> tuple[str, Call]:
    student, loss, p = torch.empty(rows, classes, dtype=DTYPES[name]), torch.empty(rows), torch.empty(rows, 64)
    labels = torch.empty(rows, dtype=torch.int64) if with_all else None
    cap = 30.0 if with_all else None
    options = RowOptions(kind, tail, classes, 1.0, 0.5, 0.5, 0.5, 1.0, 0.5, cap, None, 1.0, 1.0, "triton")

    def call() -> None:
        topk.rows(
            student, (p, p.long()), labels, loss > 0 if with_all else None,
            options, loss=loss, gradient=torch.empty_like(student), weight=loss,
            expected=loss if with_all else None,
        )  # fmt: skip

    reverse = " reverse" * (kind == "reverse_kl")
    return f"topk {tail}{reverse} V={classes} {name}" + " all options" * with_all, call


def linear_mse_cases() -> Iterator[tuple[str, Call]]:
    for d_s, d_t, name, with_all in (
        (312, 768, "bf16", False),
        (312, 768, "bf16", True),
        (768, 1024, "fp16", False),
        (312, 768, "fp32", True),
        (312, 768, "fp64", True),
        (768, 768, "bf16", False),
    ):
        yield _residual(d_s, d_t, name, with_all)
    yield _residual(768, 768, "bf16", True, project=False)


def _residual(
    d_s: int, d_t: int, name: str, with_all: bool, project: bool = True, tokens: int = 4096
) -> tuple[str, Call]:
    dtype = DTYPES[name]
    x, t = torch.empty(tokens, d_s, dtype=dtype), torch.empty(tokens, d_t, dtype=dtype)
    weight = torch.empty(d_t, d_s, dtype=dtype) if project else None
    loss = torch.empty(tokens, dtype=torch.float64 if name == "fp64" else torch.float32)
    count = torch.empty((), dtype=torch.int64)

    def call() -> None:
        linear_mse.residual(
            x, weight, t, t[0] if with_all else None, loss > 0 if with_all else None, loss if with_all else None,
            count if with_all else None, scale=0.1, slope=0.2, dtype=loss.dtype, weighs_loss=True, wants_loss=True,
            wants_bias=with_all, out=torch.empty_like(t), clean=torch.empty_like(x) if with_all else None,
        )  # fmt: skip

    options = (" all options" if with_all else "") + ("" if project else " no product")
    return f"linear_mse {d_s} to {d_t} {name}{options}", call


def counted_mm_cases() -> Iterator[tuple[str, Call]]:
    for d, classes, name in (
        (2048, 128256, "bf16"),
        (4096, 50257, "fp16"),
        (312, 30522, "bf16"),
        (2048, 128256, "fp64"),
        (2048, 128256, "fp32"),
    ):
        yield _products(d, classes, name)


def _products(d: int, classes: int, name: str, tokens: int = 784) -> tuple[str, Call]:
    dtype, wide = DTYPES[name], torch.float64 if name == "fp64" else torch.float32
    x, weight, count = torch.empty(tokens, d, dtype=dtype), torch.empty(classes, d, dtype=dtype), torch.empty(1).long()
    gradient = torch.empty(tokens, counted_mm.padded(classes), dtype=dtype)

    def call() -> None:
        start = tokens  # of the second chunk
        counted_mm.logits(x, weight, count, start, torch.empty_like(gradient, dtype=wide))
        counted_mm.d_hidden(gradient, weight, count, start, wide)
        counted_mm.add_d_weight(gradient, x, count, start, torch.empty_like(weight, dtype=wide))

    return f"counted_mm {d} to {classes} {name}", call


def scale_cases() -> Iterator[tuple[str, Call]]:
    for learned, wide, in_place in (("bf16", "fp32", False), ("bf16", "bf16", True), ("fp32", "fp32", True)):
        yield _scale(learned, wide, in_place)


def _scale(name: str, kept: str, in_place: bool, tokens: int = 4096) -> tuple[str, Call]:
    gradients = [torch.empty(*shape, dtype=DTYPES[kept]) for shape in ((tokens, 312), (768, 312), (768,))]
    factor = torch.empty((), dtype=torch.float32)

    def call() -> None:
        scale.scale_gradients(gradients, factor, [DTYPES[name]] * 3, in_place)

    return f"scale {kept} to {name}", call


def _attention(
    student: Tensor, teacher: Tensor, rows: Tensor | None, is_causal: bool, pairs: Tensor | None = None
) -> tuple[Attention, Counted]:
    call = Attention(student, student[:, :2], teacher, teacher, 0.125, 0.125, None, None, is_causal, pairs)
    return call, Counted(torch.empty(0), rows, rows)


def attention_mse_cases() -> Iterator[tuple[str, Call]]:
    for d_s, d_t, name, masked in (
        (32, 32, "bf16", False),  # several heads a program
        (18, 32, "fp16", True),
        (32, 64, "bf16", False),
        (26, 64, "bf16", False),
        (26, 64, "bf16", True),
        (64, 64, "fp16", True),
        (64, 128, "bf16", False),
        (128, 128, "bf16", False),
        (32, 64, "fp32", True),
        (384, 768, "bf16", False),  # hidden states for queries and keys
    ):
        yield _gram(d_s, d_t, name, masked)
    yield _gram(64, 64, "bf16", True, is_causal=True)
    yield _gram(32, 64, "bf16", True, length=8192)  # in several splits
    for d_s, name in ((26, "bf16"), (64, "bf16"), (64, "fp32")):
        for is_causal in (False, True):
            yield _packed_gram(d_s, name, is_causal)


def _gram(d_s: int, d_t: int, name: str, masked: bool, is_causal: bool = False, length: int = 512) -> tuple[str, Call]:
    student, teacher = (torch.empty(2, 4, length, d, dtype=DTYPES[name]) for d in (d_s, d_t))
    rows = torch.empty(2, 1, length, dtype=torch.bool) if masked else None

    def call() -> None:
        call, _ = _attention(student, teacher, None, is_causal)
        mask = None if rows is None else rows[:, 0]
        call = call._replace(query_mask=mask, key_mask=mask)
        total = torch.empty(()).double() if is_causal else None
        loss, *saved = attention_mse.loss(call, None if masked and not is_causal else 1.0, None, total)
        near = (student.float(), student[:, :2].float()) if is_causal else (None, None)
        gradients = torch.empty_like(student), torch.empty_like(student[:, :2])
        attention_mse.gradients(loss, call, *saved, near, *gradients)

    return f"attention_mse {d_s} / {d_t} {name}" + " masked" * masked + " causal" * is_causal + " long" * (
        length > 4096
    ) + " unaligned" * (d_s % 8 > 0), call


def _packed_gram(d_s: int, name: str, is_causal: bool, length: int = 8192) -> tuple[str, Call]:
    student, teacher = (torch.empty(1, 4, length, d, dtype=DTYPES[name]) for d in (d_s, 64))
    rows, starts = torch.empty(1, length, dtype=torch.bool), torch.empty(17, dtype=torch.int32)

    def call() -> None:
        call, _ = _attention(student, teacher, None, is_causal)
        call = call._replace(query_mask=rows, key_mask=rows, cu_seqlens=starts, cu_seqlens_key=starts.long())
        loss, *saved = attention_mse.loss(call, 1.0, None, torch.empty(()).double() if is_causal else None)
        gradients = torch.empty_like(student), torch.empty_like(student[:, :2])
        near = (student.float(), student[:, :2].float()) if is_causal else (None, None)
        attention_mse.gradients(loss, call, *saved, near, *gradients)
        if is_causal:
            attention_packed.bounds(call, attention_mse.CHUNK)

    return f"attention_mse {d_s} / 64 {name} packed" + " causal" * is_causal + " unaligned" * (d_s % 8 > 0), call


def attention_tiles_cases() -> Iterator[tuple[str, Call]]:
    for is_kl, d_s, d_t, name, with_all in (
        (True, 26, 64, "bf16", False),
        (True, 64, 64, "bf16", False),
        (True, 64, 64, "fp16", True),
        (True, 64, 128, "bf16", True),
        (True, 128, 128, "bf16", False),
        (True, 64, 64, "fp32", False),
        (True, 64, 64, "fp64", False),
        (False, 64, 64, "bf16", True),
        (False, 256, 256, "bf16", False),
    ):
        yield _tiles(is_kl, d_s, d_t, name, with_all)
    for is_kl, width in ((True, 64), (True, 128), (False, 64)):
        yield _packed(is_kl, width)


def _tiles(is_kl: bool, d_s: int, d_t: int, name: str, with_all: bool, length: int = 512) -> tuple[str, Call]:
    student, teacher = (torch.empty(2, 4, length, d, dtype=DTYPES[name]) for d in (d_s, d_t))
    rows = torch.empty(2, 1, length, dtype=torch.bool) if with_all else None
    pairs = torch.empty(2, 1, length, length, dtype=torch.bool) if with_all else None
    dtype = torch.float64 if name == "fp64" else torch.float32

    def call() -> None:
        attention_tiles.loss(
            *_attention(student, teacher, rows, with_all, pairs), is_kl=is_kl, dtype=dtype,
            d_query=torch.empty_like(student, dtype=dtype), d_key=torch.empty_like(student[:, :2], dtype=dtype),
        )  # fmt: skip

    options = " all options" * with_all + " unaligned" * (d_s % 8 > 0)
    return f"attention_{'kl' if is_kl else 'mse'} tiles {d_s} / {d_t} {name}{options}", call


def _packed(is_kl: bool, width: int, length: int = 8192) -> tuple[str, Call]:
    student, starts = torch.empty(1, 4, length, width, dtype=torch.bfloat16), torch.empty(17, dtype=torch.int32)

    def call() -> None:
        call, counted = _attention(student, student, torch.empty(1, 1, length, dtype=torch.bool), True)
        bounds = attention_packed.bounds(call._replace(cu_seqlens=starts, cu_seqlens_key=starts, window_left=512))
        attention_tiles.loss(
            call, counted._replace(bounds=bounds), is_kl=is_kl, dtype=torch.float32,
            d_query=student.float(), d_key=student[:, :2].float(),
        )  # fmt: skip

    return f"attention_{'kl' if is_kl else 'mse'} packed tiles {width} / {width} bf16", call


def attention_short_cases() -> Iterator[tuple[str, Call]]:
    for length, d_s, d_t, name, with_all, sharing in (
        (128, 26, 64, "bf16", False, 1),
        (128, 26, 64, "bf16", True, 1),
        (128, 64, 64, "bf16", False, 1),
        (128, 64, 64, "fp16", True, 1),
        (128, 64, 64, "bf16", True, 2),
        (128, 64, 64, "fp16", False, 2),
        (64, 26, 64, "bf16", True, 1),
        (64, 64, 64, "fp16", True, 1),
        (64, 64, 64, "fp16", False, 2),
    ):
        yield _short(d_s, d_t, name, length, with_all, sharing)


def _short(d_s: int, d_t: int, name: str, length: int, with_all: bool, sharing: int = 1) -> tuple[str, Call]:
    # As models have them: the heads of a token lie side by side.
    student, teacher = (torch.empty(4, length, 4, d, dtype=DTYPES[name]).transpose(1, 2) for d in (d_s, d_t))
    key, teacher_key = student[:, ::sharing], teacher[:, ::sharing]
    rows = torch.empty(4, length, dtype=torch.bool) if with_all else None
    number = None if with_all else 1e4
    inputs = Attention(student, key, teacher, teacher_key, 0.125, 0.125, rows, rows, with_all, None)

    def call() -> None:
        if attention_short.fits(inputs):
            gradients = torch.empty_like(student), torch.empty_like(key)
            _, divisor = attention_short.loss(inputs, number, None, *gradients)
            attention_short.gradients(torch.empty(()), inputs, divisor, *gradients, 1.0)

    groups = f" {sharing} heads a key" * (sharing > 1)
    options = " all options" * with_all + " unaligned" * (d_s % 8 > 0)
    return f"attention_mse short {d_s} / {d_t} {name} {length}{groups}{options}", call
