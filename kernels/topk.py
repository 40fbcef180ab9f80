"""Soft cross-entropy and reverse KL against the k most likely classes of a teacher, one program a row: computes the
loss and, if wanted, its gradient in the student's logits.

With x = z - max z, e = exp(x / T), Z = sum e, p_j the teacher's probability of the listed class j and p_r that of the
bucket r of all other classes, and R the sum of exponentials over those others,

    loss = sum_j p_j (log Z - x_j / T) + p_r (log Z - log R)
    gradient = (e / Z (sum_j p_j + p_r) - p_j where listed, p_r e / R elsewhere) / T

Reverse KL compares log q, the student's log-probability among the listed classes alone or, with a bucket, among all,
with the teacher's log p: with c = log q - log p of a listed class or of the bucket,

    loss = sum_j q_j c_j + q_r c_r
    gradient = q (c - loss) / T, where a class of the bucket has the bucket's c

A class's term of the loss is q c + p - q. The added parts cancel in the sum, and such a term is never negative, so the
loss of a student near its teacher keeps its digits. Entries of probability 0 are not listed.

The listed classes come sorted, so a pass over the row in blocks walks them in step: each class is compared with the
columns of the one block that holds it, and the block is written once, with p_j already subtracted.

Rows that fit are held in registers, and each logit is read once. Longer rows are read twice, in blocks: for the maxima
and sums, then for the gradient. The logits of the listed classes are fetched in between.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastdistill.kernels import _common
from fastdistill.kernels._common import on_device_of, power_of_2, row_offset, rows_of
from fastdistill.kernels.logits import BLOCK, RESIDENT, _exp, _finish, _load, _rescale, _shaped, shape_of
from torch import Tensor

if TYPE_CHECKING:
    from fastdistill.ops._rows import RowOptions

LIST_BLOCK = 1024  # listed classes fetched at a time


@triton.jit
def _sums(x_max, x_sum, x, temperature):
    """Adds numbers to a maximum and a sum of exponentials. The maximum stays finite: it is subtracted from -inf."""
    top = tl.maximum(x_max, tl.max(x, 0))
    return top, x_sum * _exp(x_max - top, temperature) + tl.sum(_exp(x - top, temperature), 0)


@triton.jit
def _walk(columns, end, position, class_row, p_row, length, REVERSE: tl.constexpr, WIDE: tl.constexpr):
    """Returns which columns are listed, their p (REVERSE: log p), and the position of the first listed class beyond
    these columns."""
    listed = columns < 0
    p = tl.zeros(columns.shape, WIDE)
    upcoming = tl.load(class_row + position, mask=position < length, other=2147483647).to(tl.int32)
    while upcoming < end:
        value = tl.load(p_row + position)
        if REVERSE:
            here = columns == tl.where(value == -float("inf"), -1, upcoming)
            p = tl.where(here, value, p)
        else:
            here = columns == upcoming
            p += tl.where(here, value, 0)
        listed = listed | here
        position += 1
        upcoming = tl.load(class_row + position, mask=position < length, other=2147483647).to(tl.int32)
    return listed, p, position


@triton.jit
def _divergence(student_log, teacher_log):
    """Returns q c + p - q for log-probabilities log q of the student and log p of the teacher, without cancellation."""
    student_p, teacher_p = tl.exp(student_log), tl.exp(teacher_log)
    c = student_log - teacher_log
    # q (c + exp(-c) - 1), by its series for small c
    series = 1 / 720 - c * (1 / 5040 - c * (1 / 40320 - c / 362880))
    near = student_p * (c * c * (1 / 2 - c * (1 / 6 - c * (1 / 24 - c * (1 / 120 - c * series)))))
    far = tl.where(student_p == 0, 0, student_p * (c - 1)) + teacher_p
    return tl.where(tl.abs(c) < 0.1, near, far)


@triton.jit
def _slope(
    student, listed, p, student_max, student_sum, mass, rest_max, rest_share, scale, temperature,
    HAS_REST: tl.constexpr,
):  # fmt: skip
    """Returns the gradient of the cross-entropy in the student's logits after the softcap; rest_share is p_r / R."""
    gradient = _exp(student - student_max, temperature) * (mass / student_sum) - p
    if HAS_REST:
        gradient -= tl.where(listed, 0, _exp(student - rest_max, temperature) * rest_share)
    return gradient * scale


@triton.jit
def _reverse_slope(
    student, listed, p, student_max, student_sum, log_sum, mean, rest_c, scale, temperature, HAS_REST: tl.constexpr
):
    """Returns the gradient of reverse KL in the student's logits after the softcap; p is log p, mean the row's loss."""
    x = student - student_max
    c = x / temperature - log_sum - p
    gradient = _exp(x, temperature) / student_sum * (tl.where(listed, c, rest_c) - mean) * scale
    return gradient if HAS_REST else tl.where(listed, gradient, 0)


@triton.jit
def _rows(
    student_ptr,  # (N, >= V)
    bias_ptr,  # (>= V); None: 0
    p_ptr,  # (N, k), p of the listed classes, REVERSE: log p; None: the soft loss has no weight
    class_ptr,  # (N, k), ascending
    rest_ptr,  # (N), p of all other classes together, REVERSE: log p; None: there is no bucket
    labels_ptr,  # (N)
    counted_ptr,  # (N)
    weight_ptr,  # (N), of each row's gradient; None: 1
    expected_ptr,  # (N), the weights that d_student was written with; None: it was not written yet
    loss_ptr,  # (N)
    d_student_ptr,  # (N, width), contiguous; None: not wanted
    inner, outer_stride, inner_stride,
    length,  # k
    width,  # of a row of d_student; zero from V on
    classes,  # V
    temperature: tl.float64, soft_weight: tl.float64, hard_weight: tl.float64, scale: tl.float64, softcap: tl.float64,
    REVERSE: tl.constexpr,  # whether the loss is reverse KL
    SHAPE: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether the row is one block
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    # Options arrive in float64; cast them to the dtype of the computation.
    temperature = tl.full((), temperature, WIDE)
    scale, softcap = tl.full((), scale, WIDE), tl.full((), softcap, WIDE)
    gain = scale / softcap
    soft_weight, hard_weight = tl.full((), soft_weight, WIDE), tl.full((), hard_weight, WIDE)
    student_row = student_ptr + row_offset(row, inner, outer_stride, inner_stride)
    d_row, p_row, class_row = student_row, p_ptr, class_ptr
    if d_student_ptr is not None:
        d_row = d_student_ptr + tl.cast(row, tl.int64) * width
    if p_ptr is not None:
        p_row = p_ptr + tl.cast(row, tl.int64) * length
        class_row = class_ptr + tl.cast(row, tl.int64) * length
    HAS_REST: tl.constexpr = p_ptr is not None and rest_ptr is not None
    AMONG_LISTED: tl.constexpr = REVERSE and p_ptr is not None and rest_ptr is None
    offsets = tl.arange(0, BLOCK)

    weight = tl.full((), 1.0, WIDE)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row).to(WIDE)
    if counted_ptr is not None:  # noqa: SIM102 - resolved at compile time, the next line at run time
        if tl.load(counted_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            if d_student_ptr is not None:
                for start in range(0, width, BLOCK):
                    columns = start + offsets
                    tl.store(d_row + columns, tl.zeros((BLOCK,), d_row.dtype.element_ty), mask=columns < width)
            return
    if expected_ptr is not None:
        expected = tl.load(expected_ptr + row).to(WIDE)
        if expected == weight:
            return
        if _rescale(d_row, width, weight / expected, BLOCK):
            return
    if SHAPE != "":
        weight *= scale

    # 1. Maxima and sums of exponentials; hard_sum is at temperature 1, rest_sum over the classes that are not
    # listed. Reverse KL without a bucket takes the student's among the listed classes.
    lowest: tl.constexpr = -1.7e308 if tl.float64 == WIDE else -3.4e38
    student_max, student_sum = tl.full((), lowest, WIDE), tl.full((), 0.0, WIDE)
    rest_max, rest_sum = student_max, student_sum
    hard_max, hard_sum = student_max, student_sum
    student = tl.zeros((BLOCK,), WIDE)
    listed, p, first = offsets < 0, student, tl.full((), 0, tl.int32)
    position = first
    if RESIDENT:
        student = _load(student_row, bias_ptr, offsets, classes, gain, softcap, SHAPE, WIDE)
        if p_ptr is not None:
            listed, p, position = _walk(offsets, classes, first, class_row, p_row, length, REVERSE, WIDE)
        among = student
        if AMONG_LISTED:
            among = tl.where(listed | (student != student), student, -float("inf"))  # NaN anywhere gives NaN
        student_max, student_sum = _sums(student_max, student_sum, among, temperature)
        if HAS_REST:
            rest = tl.where(listed, -float("inf"), student)
            rest_max, rest_sum = _sums(rest_max, rest_sum, rest, temperature)
        if labels_ptr is not None:
            hard_max, hard_sum = _sums(hard_max, hard_sum, student, 1.0)
    else:
        for start in range(0, classes, BLOCK):
            columns = start + offsets
            student = _load(student_row, bias_ptr, columns, classes, gain, softcap, SHAPE, WIDE)
            if HAS_REST or AMONG_LISTED:
                listed, p, position = _walk(columns, start + BLOCK, position, class_row, p_row, length, REVERSE, WIDE)
            among = student
            if AMONG_LISTED:
                among = tl.where(listed | (student != student), student, -float("inf"))
            student_max, student_sum = _sums(student_max, student_sum, among, temperature)
            if HAS_REST:
                rest = tl.where(listed, -float("inf"), student)
                rest_max, rest_sum = _sums(rest_max, rest_sum, rest, temperature)
            if labels_ptr is not None:
                hard_max, hard_sum = _sums(hard_max, hard_sum, student, 1.0)

    # 2. The loss. A label or a listed class out of range gives NaN.
    loss = tl.full((), 0.0, WIDE)
    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        is_class = (label >= 0) & (label < classes)
        likely = tl.load(student_row + label, mask=is_class, other=float("nan")).to(WIDE)
        if bias_ptr is not None:
            likely += tl.load(bias_ptr + label, mask=is_class, other=0).to(WIDE)
        loss = hard_weight * (tl.log(hard_sum) + (hard_max - _shaped(likely, gain, softcap, SHAPE)))
    mass, rest_share = tl.full((), 0.0, WIDE), tl.full((), 0.0, WIDE)
    soft, log_sum, rest_c = mass, mass, mass
    if p_ptr is not None:
        log_sum = tl.log(student_sum)
        for start in range(0, length, LIST_BLOCK):
            places = start + tl.arange(0, LIST_BLOCK)
            listed_p = tl.load(p_row + places, mask=places < length, other=-float("inf") if REVERSE else 0)
            listed_class = tl.load(class_row + places, mask=places < length, other=-1)
            exists = (listed_class >= 0) & (listed_class < classes)
            z = tl.load(student_row + listed_class, mask=exists, other=float("nan")).to(WIDE)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + listed_class, mask=exists, other=0).to(WIDE)
            x = _shaped(z, gain, softcap, SHAPE) - student_max
            if REVERSE:
                is_listed = listed_p != -float("inf")
                soft += tl.sum(tl.where(is_listed, _divergence(x / temperature - log_sum, listed_p), 0), 0)
            else:
                soft += tl.sum(tl.where(listed_p == 0, 0, listed_p * (log_sum - x / temperature)), 0)
                mass += tl.sum(listed_p, 0)
        if HAS_REST:
            rest_p = tl.load(rest_ptr + row)
            rest_x = (rest_max - student_max) / temperature
        if HAS_REST and REVERSE:
            rest_log = rest_x + tl.log(rest_sum) - log_sum
            soft += _divergence(rest_log, rest_p)
            rest_c = tl.where(rest_sum > 0, rest_log - rest_p, 0)
        elif HAS_REST:
            soft += tl.where(rest_p == 0, 0, rest_p * (log_sum - (rest_x + tl.log(rest_sum))))
            # A bucket of probability 0 has no gradient.
            rest_p = tl.where(rest_sum > 0, rest_p, 0)
            rest_share = rest_p / tl.where(rest_sum > 0, rest_sum, 1)
            mass += rest_p
        loss += soft_weight * soft
    tl.store(loss_ptr + row, loss)

    # 3. The gradient. It may overwrite the logits: the barrier waits until other threads have fetched the ones they
    # need.
    if d_student_ptr is not None:
        tl.debug_barrier()
        slope = soft_weight / temperature
        if RESIDENT:
            if REVERSE and p_ptr is not None:
                gradient = _reverse_slope(
                    student, listed, p, student_max, student_sum, log_sum, soft, rest_c, slope, temperature, HAS_REST
                )
            else:
                gradient = _slope(
                    student, listed, p, student_max, student_sum, mass, rest_max, rest_share, slope, temperature,
                    HAS_REST,
                )  # fmt: skip
            gradient = _finish(
                gradient, student, offsets, hard_max, hard_sum, label, hard_weight, weight, softcap,
                labels_ptr is not None, SHAPE,
            )  # fmt: skip
            tl.store(d_row + offsets, gradient.to(d_row.dtype.element_ty), mask=offsets < classes)
        else:
            position = first
            for start in range(0, classes, BLOCK):
                columns = start + offsets
                student = _load(student_row, bias_ptr, columns, classes, gain, softcap, SHAPE, WIDE)
                gradient = tl.zeros((BLOCK,), WIDE)
                if p_ptr is not None:
                    listed, p, position = _walk(
                        columns, start + BLOCK, position, class_row, p_row, length, REVERSE, WIDE
                    )
                if REVERSE and p_ptr is not None:
                    gradient = _reverse_slope(
                        student, listed, p, student_max, student_sum, log_sum, soft, rest_c, slope, temperature,
                        HAS_REST,
                    )  # fmt: skip
                elif p_ptr is not None:
                    gradient = _slope(
                        student, listed, p, student_max, student_sum, mass, rest_max, rest_share, slope, temperature,
                        HAS_REST,
                    )  # fmt: skip
                gradient = _finish(
                    gradient, student, columns, hard_max, hard_sum, label, hard_weight, weight, softcap,
                    labels_ptr is not None, SHAPE,
                )  # fmt: skip
                tl.store(d_row + columns, gradient.to(d_row.dtype.element_ty), mask=columns < classes)
        for start in range(classes, width, BLOCK):
            tl.store(d_row + start + offsets, tl.zeros((BLOCK,), d_row.dtype.element_ty), mask=start + offsets < width)


def rows(
    student: Tensor,  # (*, >= V)
    target: tuple[Tensor, ...],  # p (N, k), ascending classes (N, k) and, with a bucket, p_r (N); (): no soft loss
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    options: "RowOptions",
    *,
    loss: Tensor,  # (N), float32 or float64, the dtype of the computation and of p
    gradient: Tensor | None = None,  # (*, >= V) contiguous; may be student itself
    weight: Tensor | None = None,  # (N), of each row's gradient; None: 1
    expected: Tensor | None = None,  # (N), the weights that `gradient` was written with before; None: it was not
    student_bias: Tensor | None = None,  # (>= V), added to each row's logits; None: 0
    teacher_bias: None = None,  # a list has none
) -> None:
    """Writes `loss`, and `gradient` if it is given. With `expected` it writes only the rows whose weight differs.

    For reverse KL the target holds log p and log p_r.
    """
    student, *student_rows = rows_of(student)
    count = student.shape[:-1].numel()
    if count == 0:
        return
    p, listed_classes, rest = (*target, None, None, None)[:3]
    length = 1 if p is None else p.shape[-1]
    resident = options.classes <= RESIDENT
    block = max(power_of_2(options.classes), 16) if resident else BLOCK
    with on_device_of(student):
        _rows[(count,)](
            student, student_bias, p, listed_classes, rest, labels, counted, weight, expected, loss, gradient,
            *student_rows, length, 0 if gradient is None else gradient.shape[-1], options.classes,
            options.temperature, options.soft_weight, options.hard_weight,
            options.student_scale, options.student_softcap or 1.0,
            REVERSE=options.kind == "reverse_kl", SHAPE=shape_of(options.student_scale, options.student_softcap),
            WIDE=tl.float64 if loss.dtype == torch.float64 else tl.float32,
            RESIDENT=resident, BLOCK=block, LIST_BLOCK=min(power_of_2(length), LIST_BLOCK),
            # A thread holds 16 logits.
            num_warps=max(1, block // (16 * _common.warp_size(_common.arch_of(student)))),
        )  # fmt: skip
