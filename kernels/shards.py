"""Losses over classes of a sharded vocabulary, one program a row of the own shard (ops/_shards.py, ops/_divergence.py).

    _sums        the row's maxima, its sums of exponentials, and its cross term, relative to the own maxima
    _summed      jsd, tvd, mixtures: the own classes' part of the loss and of E_s[c], once p is known
    _gradient    the gradient in the own logits

The collectives between them are the op's. Terms and slopes of the classes are those of logits.py. `_sums` reads a row
twice: maxima first, which keeps every sum exact in its own scale. A shard's row is short and stays in the L2 cache.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import on_device_of, row_offset, rows_of
from .logits import _exp, _finish, _kind, _load, _shaped, _slope, _terms, shape_of

if TYPE_CHECKING:
    from ..ops._rows import RowOptions

BLOCK = 2048  # classes; a thread holds 16 numbers of each side
SUMS = 8  # the fields of ops/_shards.py's Row


@triton.jit
def _sums(
    student_ptr, teacher_ptr,  # (N, >= V_r); teacher None: the soft loss has no weight
    student_bias_ptr, teacher_bias_ptr,  # (>= V_r); None: 0
    labels_ptr,  # (N), columns of the own shard, or -1 elsewhere
    out_ptr,  # (SUMS, N)
    student_inner, student_outer_stride, student_inner_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride,
    classes,  # V_r
    temperature: tl.float64, student_scale: tl.float64, teacher_scale: tl.float64,
    student_softcap: tl.float64, teacher_softcap: tl.float64,
    KIND: tl.constexpr, STUDENT_SHAPE: tl.constexpr, TEACHER_SHAPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    temperature = tl.full((), temperature, WIDE)
    student_softcap, teacher_softcap = tl.full((), student_softcap, WIDE), tl.full((), teacher_softcap, WIDE)
    student_gain = tl.full((), student_scale, WIDE) / student_softcap
    teacher_gain = tl.full((), teacher_scale, WIDE) / teacher_softcap
    student_row = student_ptr + row_offset(row, student_inner, student_outer_stride, student_inner_stride)
    teacher_row = student_row
    if teacher_ptr is not None:
        teacher_row = teacher_ptr + row_offset(row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    lowest: tl.constexpr = -1.7e308 if tl.float64 == WIDE else -3.4e38
    offsets = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), lowest, WIDE)
    teacher_tops = tl.full((BLOCK,), lowest, WIDE)
    for start in range(0, classes, BLOCK):
        columns = start + offsets
        tops = tl.maximum(
            tops,
            _load(student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE),
        )
        if teacher_ptr is not None:
            teacher_tops = tl.maximum(
                teacher_tops,
                _load(
                    teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
                ),
            )
    student_max, teacher_max = tl.max(tops, 0), tl.max(teacher_tops, 0)
    nothing = tl.zeros((BLOCK,), WIDE)
    student_sum, teacher_sum, hard_sum, total, apart = nothing, nothing, nothing, nothing, nothing
    one = tl.full((), 1.0, WIDE)
    for start in range(0, classes, BLOCK):
        columns = start + offsets
        student = _load(
            student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
        )
        student_sum += _exp(student - student_max, temperature)
        if labels_ptr is not None:
            hard_sum += _exp(student - student_max, one)
        if teacher_ptr is not None:
            teacher = _load(
                teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
            )
            teacher_sum += _exp(teacher - teacher_max, temperature)
            if KIND == "soft_cross_entropy" or KIND == "kl_div" or KIND == "reverse_kl":
                term, student_e, teacher_e, _value, _excess = _terms(
                    student, teacher, student_max, teacher_max, one, one, temperature, one, one, one, one, KIND
                )
                inside = columns < classes
                total += tl.where(inside, term, 0)
                apart += tl.where(inside, teacher_e - student_e, 0)
    likely = tl.full((), 0.0, WIDE)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        here = (label >= 0) & (label < classes)
        likely = tl.load(student_row + label, mask=here, other=0).to(WIDE)
        if student_bias_ptr is not None:
            likely += tl.load(student_bias_ptr + label, mask=here, other=0).to(WIDE)
        likely = tl.where(here, _shaped(likely, student_gain, student_softcap, STUDENT_SHAPE), 0)
    cross = tl.sum(total, 0)
    if KIND == "soft_cross_entropy":
        cross = -cross
    tl.store(out_ptr + row, student_max)
    tl.store(out_ptr + rows + row, tl.sum(student_sum, 0))
    tl.store(out_ptr + 2 * rows + row, tl.sum(hard_sum, 0))
    tl.store(out_ptr + 3 * rows + row, likely)
    tl.store(out_ptr + 4 * rows + row, teacher_max)
    tl.store(out_ptr + 5 * rows + row, tl.sum(teacher_sum, 0))
    tl.store(out_ptr + 6 * rows + row, cross)
    tl.store(out_ptr + 7 * rows + row, tl.sum(apart, 0))


@triton.jit
def _classes(
    student_ptr, teacher_ptr,  # (N, >= V_r); teacher None: the soft loss has no weight
    student_bias_ptr, teacher_bias_ptr,  # (>= V_r); None: 0
    labels_ptr,  # (N), columns of the own shard, or -1 elsewhere
    known_ptr,  # (SUMS, N), of the whole vocabulary
    mean_ptr,  # (N), E_s[c]; None: the kind needs none, or it is wanted
    weight_ptr,  # (N), of each row's gradient; None: 1
    summed_ptr,  # (N, 2), the own classes' part of the loss and of E_s[c]; None: the gradient is wanted
    d_student_ptr,  # (N, width)
    student_inner, student_outer_stride, student_inner_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride,
    width,  # of a row of d_student
    classes,  # V_r
    temperature: tl.float64, beta: tl.float64, others: tl.float64, teacher_kl: tl.float64, student_kl: tl.float64,
    soft_weight: tl.float64, hard_weight: tl.float64,
    student_scale: tl.float64, teacher_scale: tl.float64, student_softcap: tl.float64, teacher_softcap: tl.float64,
    KIND: tl.constexpr, STUDENT_SHAPE: tl.constexpr, TEACHER_SHAPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    temperature, beta, others = tl.full((), temperature, WIDE), tl.full((), beta, WIDE), tl.full((), others, WIDE)
    teacher_kl, student_kl = tl.full((), teacher_kl, WIDE), tl.full((), student_kl, WIDE)
    soft_weight, hard_weight = tl.full((), soft_weight, WIDE), tl.full((), hard_weight, WIDE)
    student_softcap, teacher_softcap = tl.full((), student_softcap, WIDE), tl.full((), teacher_softcap, WIDE)
    student_scale = tl.full((), student_scale, WIDE)
    student_gain = student_scale / student_softcap
    teacher_gain = tl.full((), teacher_scale, WIDE) / teacher_softcap
    student_row = student_ptr + row_offset(row, student_inner, student_outer_stride, student_inner_stride)
    teacher_row = student_row
    if teacher_ptr is not None:
        teacher_row = teacher_ptr + row_offset(row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    student_max, student_sum = tl.load(known_ptr + row), tl.load(known_ptr + rows + row)
    hard_sum = tl.load(known_ptr + 2 * rows + row)
    teacher_max, teacher_sum = tl.load(known_ptr + 4 * rows + row), tl.load(known_ptr + 5 * rows + row)
    weight, mean, label = tl.full((), 1.0, WIDE), tl.full((), 0.0, WIDE), 0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row).to(WIDE)
    skipped = weight == 0  # such a row may hold anything
    if STUDENT_SHAPE != "":
        weight *= student_scale
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
    offsets = tl.arange(0, BLOCK)
    terms, values = tl.zeros((BLOCK,), WIDE), tl.zeros((BLOCK,), WIDE)
    for start in range(0, classes, BLOCK):
        columns = start + offsets
        inside = columns < classes
        student = _load(
            student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
        )
        gradient = tl.zeros((BLOCK,), WIDE)
        if teacher_ptr is not None:
            teacher = _load(
                teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
            )
            term, student_p, teacher_p, value, _excess = _terms(
                student, teacher, student_max, teacher_max, student_sum, teacher_sum, temperature, beta,
                others, teacher_kl, student_kl, KIND,
            )  # fmt: skip
            terms += tl.where(inside, term, 0)
            values += tl.where(inside, value, 0)
            gradient = _slope(student_p, teacher_p, value, mean, temperature, soft_weight, KIND)
        if summed_ptr is None:
            gradient = _finish(
                gradient, student, columns, student_max, hard_sum, label, hard_weight, weight, student_softcap,
                labels_ptr is not None, STUDENT_SHAPE,
            )  # fmt: skip
            gradient = tl.where(skipped, 0, gradient)
            tl.store(d_student_ptr + row * width + columns, gradient.to(d_student_ptr.dtype.element_ty), mask=inside)
    if summed_ptr is not None:
        total = tl.sum(terms, 0)
        if KIND == "tvd":
            total = total / 2
        tl.store(summed_ptr + 2 * row, total)
        tl.store(summed_ptr + 2 * row + 1, tl.sum(values, 0))


def sums(
    student: Tensor,  # (*, >= V_r), as given
    teacher: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],  # (>= V_r)
    labels: Tensor | None,  # (N), columns of the own shard, or -1 elsewhere
    options: "RowOptions", classes: int, rows: int, dtype: torch.dtype,  # V_r, N
) -> Tensor:  # (SUMS, N, 1) # fmt: skip
    out = student.new_empty(SUMS, rows, 1, dtype=dtype)
    sides, strides, constants = _sides(student, teacher, options, dtype)
    with on_device_of(student):
        _sums[(rows,)](
            *sides, *biases, labels, out, *strides, classes, options.temperature, options.student_scale,
            options.teacher_scale, options.student_softcap or 1.0, options.teacher_softcap or 1.0, **constants,
        )  # fmt: skip
    return out


def summed(
    student: Tensor, teacher: Tensor | None, biases: tuple[Tensor | None, Tensor | None], labels: Tensor | None,
    options: "RowOptions", classes: int,  # as in `sums`
    known: Tensor,  # (SUMS, N, 1), of the whole vocabulary
) -> Tensor:  # (N, 2) # fmt: skip
    """Returns the own classes' part of the loss and of E_s[c]."""
    out = known.new_empty(known.shape[1], 2)
    _run(student, teacher, biases, labels, options, classes, known, None, None, out, None)
    return out


def gradient(
    student: Tensor, teacher: Tensor | None, biases: tuple[Tensor | None, Tensor | None], labels: Tensor | None,
    options: "RowOptions", classes: int,  # as in `sums`
    known: Tensor,  # (SUMS, N, 1), of the whole vocabulary
    mean: Tensor | None,  # (N, .), E_s[c]; None: the kind needs none
    weight: Tensor | None,  # (N, 1), of the rows' gradients; None: 1
    out: Tensor,  # (N, >= V_r) contiguous
) -> None:  # fmt: skip
    """Writes the gradient in the logits as they were given."""
    _run(student, teacher, biases, labels, options, classes, known, mean, weight, None, out)


def _run(
    student: Tensor, teacher: Tensor | None, biases: tuple[Tensor | None, Tensor | None], labels: Tensor | None,
    options: "RowOptions", classes: int, known: Tensor, mean: Tensor | None, weight: Tensor | None,
    out: Tensor | None, d_student: Tensor | None,
) -> None:  # fmt: skip
    sides, strides, constants = _sides(student, teacher, options, known.dtype)
    with on_device_of(student):
        _classes[(known.shape[1],)](
            *sides, *biases, labels, known, mean, weight, out, d_student, *strides,
            0 if d_student is None else d_student.shape[-1], classes, options.temperature, options.beta,
            1 - options.beta,
            options.teacher_kl, options.student_kl, options.soft_weight, options.hard_weight, options.student_scale,
            options.teacher_scale, options.student_softcap or 1.0, options.teacher_softcap or 1.0, **constants,
        )  # fmt: skip


def _sides(
    student: Tensor, teacher: Tensor | None, options: "RowOptions", dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor | None], list[int], dict[str, Any]]:
    """Returns both sides' logits, their strides, and the constants of all launches."""
    student, *student_rows = rows_of(student)
    teacher_rows = [1, 0, 0]
    if teacher is not None:
        teacher, *teacher_rows = rows_of(teacher)
    constants = {
        "KIND": _kind(options), "STUDENT_SHAPE": shape_of(options.student_scale, options.student_softcap),
        "TEACHER_SHAPE": shape_of(options.teacher_scale, options.teacher_softcap),
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK": BLOCK,
        "num_warps": max(1, BLOCK // (16 * _common.warp_size(_common.arch_of(student)))),
    }  # fmt: skip
    return (student, teacher), [*student_rows, *teacher_rows], constants
