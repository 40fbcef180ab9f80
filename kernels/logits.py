"""Losses over classes, one program a row: computes the loss and, if wanted, its gradient in the student's logits.

With x = z - max z, e = exp(x / T), Z = sum e, p = e / Z of each side and m = beta p_t + (1 - beta) p_s, each class adds
a term to its row's loss (`_terms`) and has a gradient (`_slope`):

    kind                rest of the loss   term                                    gradient
    soft_cross_entropy  log Z_s            -p_t x_s / T                            (p_s - p_t) / T
    kl_div              -log(Z_t / Z_s)    p_t (x_t - x_s) / T                     (p_s - p_t) / T
    reverse_kl          -log(Z_s / Z_t)    p_s c / T            c = x_s - x_t      p_s (c - E_s[c]) / T^2
    mixture                                -w_t p_t log(m / p_t) - w_s p_s log(m / p_s) - bend d
                                                                                   p_s (c - E_s[c]) / T
    tvd                                    |p_s - p_t| / 2      c = sgn(p_s - p_t) p_s (c - E_s[c]) / 2T

"mixture" is w_t KL(p_t || m) + w_s KL(p_s || m). With d = p_t - p_s and bend = (1 - beta) w_t - beta w_s, its
c = -w_s log(m / p_s) - (1 - beta) bend d / m. "jsd" has w_t = beta and w_s = 1 - beta, so bend = 0. "skewed_kl" has
w_s = 0 and "skewed_reverse_kl" w_t = 0, and do not compute that logarithm. `bend d` is the part of a term that is
linear in d; over the classes it adds up to 0, so it is left out of the sum.

Each class's difference is taken before the sum, so a student near its teacher keeps its digits.

A side's logits are z = softcap(scale * (stored + bias)); gradients are in the stored logits. The scale of a side with a
softcap is part of the factor that the softcap needs anyway, and the student's scale is part of its row's weight.

The logarithms of a mixture that is close to p are 2 artanh((m - p) / (m + p)), by its series. The others are
log m - log p, for which both sides need one log m. There m = beta p_t + (1 - beta) p_s has no cancellation, however
small beta is.

Rows that fit are held in registers, and each logit is read once. Longer rows are read in blocks: for the maxima and
sums, for the loss and E_s[c], and for the gradient. Only mixtures and TVD need the third reading: without E_s[c] the
gradient is written with the loss, and reverse KL's E_s[c] is added up in the first reading. A thread adds up eight
neighbours at a time, and the threads are joined once, after the last block.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import log1p, on_device_of, power_of_2, row_offset, rows_of, tanh

if TYPE_CHECKING:
    from ..ops._rows import RowOptions

# Longest row that is held in registers, and the largest block of longer rows: a multiprocessor then works on one row or
# two, which the L2 cache still holds when they are read again. Larger ones would leave a thread too few registers.
RESIDENT = 8192
BLOCK = 16384


@triton.jit
def _shaped(z, gain, softcap, SHAPE: tl.constexpr):
    """Applies a side's scale, or its scale and softcap. -inf stays -inf: the class has probability 0."""
    if SHAPE == "scale":
        z *= gain
    elif SHAPE == "softcap":
        z = tl.where(z == -float("inf"), z, softcap * tanh(z * gain))
    return z


@triton.jit
def _load(row_ptr, bias_ptr, columns, classes, gain, softcap, SHAPE: tl.constexpr, WIDE: tl.constexpr):
    """Loads logits of some columns, with bias, scale and softcap applied; -inf beyond the row."""
    z = tl.load(row_ptr + columns, mask=columns < classes, other=-float("inf")).to(WIDE)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < classes, other=0).to(WIDE)
    return _shaped(z, gain, softcap, SHAPE)


@triton.jit
def _exp(x, temperature):
    if x.dtype == tl.float64:
        return tl.exp(x / temperature)
    return tl.exp2(x * (1.4426950408889634 / temperature))


@triton.jit
def _add(x_max, x_sum, x, temperature):  # (L), (L), (8 L)
    """Adds eight numbers to each of L running maxima and sums of exponentials. A thread waits for no other. The maxima
    stay finite: they are subtracted from -inf."""
    x = tl.reshape(x, (x_max.shape[0], 8))
    top = tl.maximum(x_max, tl.max(x, 1))
    return top, x_sum * _exp(x_max - top, temperature) + tl.sum(_exp(x - top[:, None], temperature), 1)


@triton.jit
def _joined(x_max, x_sum, temperature):  # (L), (L) -> (), ()
    """Returns the maximum and the sum of exponentials of all numbers."""
    top = tl.max(x_max, 0)
    return top, tl.sum(x_sum * _exp(x_max - top, temperature), 0)


@triton.jit
def _shift(total, x_sum, student_before, teacher_before, student_max, teacher_max, temperature):
    """Returns sums of e_s c, with c = x_s - x_t, for larger maxima; x_sum are the sums of e_s."""
    moved = (student_max - student_before) - (teacher_max - teacher_before)
    moved = tl.minimum(tl.maximum(moved, -1e30), 1e30)  # finite if there was no maximum
    return (total - moved * x_sum) * _exp(student_before - student_max, temperature)


@triton.jit
def _mean_terms(student, teacher, student_max, teacher_max, temperature):  # (8 L), (8 L), (L), (L) -> (L)
    """Returns the sums of eight e_s c, with c = x_s - x_t."""
    student_x = tl.reshape(student, (student_max.shape[0], 8)) - student_max[:, None]
    teacher_x = tl.reshape(teacher, (student_max.shape[0], 8)) - teacher_max[:, None]
    student_e = _exp(student_x, temperature)
    # A class that the teacher excludes has an infinite c, but its e_s may vanish once the maximum is known.
    c = tl.minimum(student_x - teacher_x, 1e30)
    return tl.sum(tl.where(student_e == 0, 0, student_e * c), 1)


@triton.jit
def _neighbours(x):  # (8 L) -> (L)
    """Adds eight neighbours, which lie in one thread: sums over a row become one number only after its last block."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 8, 8)), 1)


@triton.jit
def _reciprocal(x):
    """Computes 1 / x to the last digit for x of at least the smallest normal number: a division takes twice as long."""
    if x.dtype == tl.float64:
        return 1 / x
    root = tl.rsqrt(x)
    return root * root * (2 - x * (root * root))


@triton.jit
def _log(x):
    """Computes log x of normal numbers: a general logarithm takes twice as long."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:  # Triton would compile code after the branch as well: the bits of a float64 are no int32
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) & -0x800000  # x = 2^exponent (1 + f) with 2/3 <= 1 + f < 4/3
        f = (bits - exponent).to(tl.float32, bitcast=True) - 1
        series = 0.20003836 - f * (0.16539125 - f * (0.14116979 - f * (0.14704154 - f * 0.13433774)))
        series = 0.5 - f * (0.33333319 - f * (0.25001809 - f * series))
        return exponent.to(tl.float32) * (0.6931471805599453 / 0x800000) + (f - f * f * series)


@triton.jit
def _log_of_ratio(m, p, step, far):
    """Computes log(m / p) with m = p + step; `far` is log m - log p, which has too few digits if the two are close."""
    ratio = step * _reciprocal(m + p)
    if p.dtype == tl.float64:
        near = log1p(step / (m - step))
    else:
        y = ratio * ratio  # 2 artanh(ratio)
        near = ratio * (2 + y * (2 / 3 + y * (2 / 5 + y * (2 / 7))))
    return tl.where(tl.abs(ratio) < 0.15, near, far)


@triton.jit
def _terms(
    student, teacher, student_max, teacher_max, student_sum, teacher_sum, temperature, beta, others, teacher_kl,
    student_kl, KIND: tl.constexpr,
):  # fmt: skip
    """Returns for each class: its term of the loss, p_s, p_t, p_s c, and e_a - e_b, whose sum gives log(Z_a / Z_b).
    All are 0 beyond the row. `others` is 1 - beta."""
    student_x, teacher_x = student - student_max, teacher - teacher_max
    student_e, teacher_e = _exp(student_x, temperature), _exp(teacher_x, temperature)
    student_p, teacher_p = student_e * (1 / student_sum), teacher_e * (1 / teacher_sum)
    value = student_p * 0  # p_s c
    excess = student_p * 0
    if KIND == "soft_cross_entropy":
        term = -tl.where(teacher_p == 0, 0, teacher_p * student_x)
    elif KIND == "kl_div":
        term = tl.where(teacher_p == 0, 0, teacher_p * (teacher_x - student_x))
        excess = teacher_e - student_e
    elif KIND == "reverse_kl":
        value = tl.where(student_p == 0, 0, student_p * (student_x - teacher_x))
        term = value
        excess = student_e - teacher_e
    elif KIND == "tvd":
        difference = student_p - teacher_p
        term = tl.abs(difference)
        # NaN where the difference is NaN.
        value = student_p * tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    else:
        # The smallest normal number keeps logarithms and ratios finite where a probability is 0.
        tiny: tl.constexpr = 2.2250738585072014e-308 if student_p.dtype == tl.float64 else 1.1754943508222875e-38
        log_tiny: tl.constexpr = -708.3 if student_p.dtype == tl.float64 else -87.3
        difference = teacher_p - student_p
        rest = others * student_p + tiny
        m = beta * teacher_p + rest  # no smaller than beta p_t, however small beta is
        log_m = _log(m)
        if KIND != "skewed_kl":
            student_log = tl.maximum(student_x * (1 / temperature) - tl.log(student_sum), log_tiny)
            log_ratio = _log_of_ratio(m, student_p, beta * difference, log_m - student_log)
            value = -(student_kl * student_p) * log_ratio
        term = value
        if KIND != "skewed_reverse_kl":
            teacher_log = tl.maximum(teacher_x * (1 / temperature) - tl.log(teacher_sum), log_tiny)
            log_ratio = _log_of_ratio(m, teacher_p, -others * difference, log_m - teacher_log)
            term -= teacher_kl * teacher_p * log_ratio
        if KIND != "jsd":
            bent = (others * teacher_kl - beta * student_kl) * difference
            term -= bent
            value -= bent * (rest * _reciprocal(m))
    return term, student_p, teacher_p, value, excess


@triton.jit
def _row_loss(total, excess, student_sum, teacher_sum, temperature, soft_weight, KIND: tl.constexpr):
    """Returns the soft loss of a row from the sum of its classes' terms."""
    if KIND == "soft_cross_entropy":
        loss = tl.log(student_sum) + total / temperature
    elif KIND == "kl_div":
        loss = total / temperature - _log_ratio(excess, teacher_sum, student_sum)
    elif KIND == "reverse_kl":
        loss = total / temperature - _log_ratio(excess, student_sum, teacher_sum)
    elif KIND == "tvd":
        loss = total / 2
    else:
        loss = total
    return tl.where(loss < 0, 0, loss) * soft_weight  # rounding may turn a loss of 0 into -1e-8


@triton.jit
def _log_ratio(excess, a_sum, b_sum):
    """Returns log(a / b), to the last digit where they are close; `excess` is a - b, summed class by class."""
    return tl.where(tl.abs(excess) < 0.5 * b_sum, log1p(excess / b_sum), tl.log(a_sum / b_sum))


@triton.jit
def _slope(student_p, teacher_p, value, mean, temperature, soft_weight, KIND: tl.constexpr):
    """Returns the gradient of the soft loss in the student's logits after the softcap."""
    if KIND == "soft_cross_entropy" or KIND == "kl_div":
        return (student_p - teacher_p) * (soft_weight / temperature)
    centred = value - student_p * mean
    if KIND == "reverse_kl":
        return centred * (soft_weight / (temperature * temperature))
    elif KIND == "tvd":
        return centred * (soft_weight / (2 * temperature))
    return centred * (soft_weight / temperature)


@triton.jit
def _finish(
    gradient, student, columns, student_max, hard_sum, label, hard_weight, weight, softcap,
    HAS_LABELS: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Turns the soft loss's gradient into that of the row's loss before the softcap, times `weight`."""
    if HAS_LABELS:
        hard_p = _exp(student - student_max, 1.0) / hard_sum
        gradient += hard_weight * (hard_p - tl.where(columns == label, 1.0, 0.0))
    # Where the target or the label is a class of probability 0, the loss is infinite and the class has gradient 0.
    gradient = tl.where(student == -float("inf"), 0, gradient)
    if SHAPE == "softcap":
        ratio = student / softcap
        gradient = tl.where(student == -float("inf"), 0, gradient * (1 - ratio * ratio))
    return gradient * weight


@triton.jit
def _rescale(d_row, width, ratio, BLOCK: tl.constexpr):
    """Multiplies a row of gradients in place if that rounds as recomputing it would; returns whether it did.

    Multiplying bfloat16 by a power of 2 is exact. In float16, numbers below 6e-5 have already lost digits.
    """
    exact = tl.abs(ratio) < 3e38
    if d_row.dtype.element_ty == tl.float16:
        exact = exact & (ratio == 1)
    elif d_row.dtype.element_ty == tl.bfloat16:
        single = ratio.to(tl.float32)
        exact = exact & (single.to(ratio.dtype) == ratio) & (single.to(tl.int32, bitcast=True) & 0x7FFFFF == 0)
    if exact:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            scaled = tl.load(d_row + columns, mask=columns < width).to(ratio.dtype) * ratio
            tl.store(d_row + columns, scaled.to(d_row.dtype.element_ty), mask=columns < width)
    return exact


@triton.jit
def _rows(
    student_ptr,  # (N, >= V)
    teacher_ptr,  # (N, >= V); None: the soft loss has no weight
    student_bias_ptr,  # (>= V); None: 0
    teacher_bias_ptr,  # (>= V); None: 0
    labels_ptr,  # (N)
    counted_ptr,  # (N)
    weight_ptr,  # (N), of each row's gradient; None: 1
    expected_ptr,  # (N), the weights that d_student was written with; None: it was not written yet
    loss_ptr,  # (N)
    d_student_ptr,  # (N, width), contiguous; None: not wanted
    student_inner, student_outer_stride, student_inner_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride,
    width,  # of a row of d_student; zero from V on
    classes,  # V
    temperature: tl.float64, beta: tl.float64, teacher_kl: tl.float64, student_kl: tl.float64,
    soft_weight: tl.float64, hard_weight: tl.float64,
    student_scale: tl.float64, teacher_scale: tl.float64, student_softcap: tl.float64, teacher_softcap: tl.float64,
    KIND: tl.constexpr,  # as `_kind` returns it
    STUDENT_SHAPE: tl.constexpr, TEACHER_SHAPE: tl.constexpr,  # "": logits as stored; "scale"; "softcap" (and scale)
    WIDE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether the row is one block
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    # Options arrive in float64; cast them to the dtype of the computation.
    temperature, others, beta = tl.full((), temperature, WIDE), tl.full((), 1 - beta, WIDE), tl.full((), beta, WIDE)
    teacher_kl, student_kl = tl.full((), teacher_kl, WIDE), tl.full((), student_kl, WIDE)
    soft_weight, hard_weight = tl.full((), soft_weight, WIDE), tl.full((), hard_weight, WIDE)
    student_softcap, teacher_softcap = tl.full((), student_softcap, WIDE), tl.full((), teacher_softcap, WIDE)
    student_scale, teacher_scale = tl.full((), student_scale, WIDE), tl.full((), teacher_scale, WIDE)
    student_gain, teacher_gain = student_scale / student_softcap, teacher_scale / teacher_softcap
    student_row = student_ptr + row_offset(row, student_inner, student_outer_stride, student_inner_stride)
    teacher_row, d_row = student_row, student_row
    if teacher_ptr is not None:
        teacher_row = teacher_ptr + row_offset(row, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    if d_student_ptr is not None:
        d_row = d_student_ptr + tl.cast(row, tl.int64) * width
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
    if STUDENT_SHAPE != "":
        weight *= student_scale

    # Read before d_student is written: it may share the student's memory. A label out of range gives NaN.
    label, likely = 0, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        is_class = (label >= 0) & (label < classes)
        likely = tl.load(student_row + label, mask=is_class, other=float("nan")).to(WIDE)
        if student_bias_ptr is not None:
            likely += tl.load(student_bias_ptr + label, mask=is_class, other=0).to(WIDE)
        likely = _shaped(likely, student_gain, student_softcap, STUDENT_SHAPE)

    # 1. Maxima and sums of exponentials; hard_sum is the student's at temperature 1. In a longer row reverse KL's mean
    # is added up with them.
    END = BLOCK if RESIDENT else classes  # a row in registers takes each loop once
    ONLINE: tl.constexpr = KIND == "reverse_kl" and teacher_ptr is not None and not RESIDENT
    LANES: tl.constexpr = BLOCK // 8
    row_mean = tl.full((), 0.0, WIDE)
    if RESIDENT:
        student = _load(
            student_row, student_bias_ptr, offsets, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
        )
        teacher = student
        if teacher_ptr is not None:
            teacher = _load(
                teacher_row, teacher_bias_ptr, offsets, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
            )
        student_max, teacher_max = tl.max(student, 0), tl.max(teacher, 0)
        student_sum = tl.sum(_exp(student - student_max, temperature), 0)
        teacher_sum = tl.sum(_exp(teacher - teacher_max, temperature), 0)
        hard_max, hard_sum = student_max, student_sum
        if labels_ptr is not None:
            hard_sum = tl.sum(_exp(student - student_max, 1.0), 0)
    else:
        student = tl.zeros((BLOCK,), WIDE)
        teacher = student
        lowest: tl.constexpr = -1.7e308 if tl.float64 == WIDE else -3.4e38
        student_max, student_sum = tl.full((LANES,), lowest, WIDE), tl.zeros((LANES,), WIDE)
        teacher_max, teacher_sum, hard_max, hard_sum = student_max, student_sum, student_max, student_sum
        mean = student_sum
        for start in range(0, classes, BLOCK):
            columns = start + offsets
            student = _load(
                student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
            )
            before, sum_before = (student_max, teacher_max), student_sum
            student_max, student_sum = _add(student_max, student_sum, student, temperature)
            if labels_ptr is not None:
                hard_max, hard_sum = _add(hard_max, hard_sum, student, 1.0)
            if teacher_ptr is not None:
                teacher = _load(
                    teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
                )
                teacher_max, teacher_sum = _add(teacher_max, teacher_sum, teacher, temperature)
            if ONLINE:
                mean = _shift(mean, sum_before, before[0], before[1], student_max, teacher_max, temperature)
                mean += _mean_terms(student, teacher, student_max, teacher_max, temperature)
        before, sum_before = (student_max, teacher_max), student_sum
        student_max, student_sum = _joined(student_max, student_sum, temperature)
        teacher_max, teacher_sum = _joined(teacher_max, teacher_sum, temperature)
        if ONLINE:
            mean = _shift(mean, sum_before, before[0], before[1], student_max, teacher_max, temperature)
            row_mean = tl.sum(mean, 0) / student_sum
        if labels_ptr is not None:
            hard_max, hard_sum = _joined(hard_max, hard_sum, 1.0)
    loss = tl.full((), 0.0, WIDE)
    if labels_ptr is not None:
        loss = hard_weight * (tl.log(hard_sum) + (student_max - likely))

    # 2. The loss, and the gradient unless it needs E_s[c] first.
    CENTRED: tl.constexpr = teacher_ptr is not None and KIND != "soft_cross_entropy" and KIND != "kl_div" and not ONLINE
    total, excess_sum, mean = tl.zeros((LANES,), WIDE), tl.zeros((LANES,), WIDE), tl.zeros((LANES,), WIDE)
    student_p, value = tl.zeros((BLOCK,), WIDE), tl.zeros((BLOCK,), WIDE)
    if teacher_ptr is not None or d_student_ptr is not None:
        for start in range(0, END, BLOCK):
            columns = start + offsets
            if not RESIDENT:
                student = _load(
                    student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
                )
            gradient = tl.zeros((BLOCK,), WIDE)
            if teacher_ptr is not None:
                if not RESIDENT:
                    teacher = _load(
                        teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE,
                        WIDE,
                    )  # fmt: skip
                term, student_p, teacher_p, value, excess = _terms(
                    student, teacher, student_max, teacher_max, student_sum, teacher_sum, temperature, beta, others,
                    teacher_kl, student_kl, KIND,
                )  # fmt: skip
                total += _neighbours(term)
                excess_sum += _neighbours(excess)
                mean += _neighbours(value)
                if not CENTRED:
                    gradient = _slope(student_p, teacher_p, value, row_mean, temperature, soft_weight, KIND)
            if d_student_ptr is not None and not CENTRED:
                gradient = _finish(
                    gradient, student, columns, student_max, hard_sum, label, hard_weight, weight, student_softcap,
                    labels_ptr is not None, STUDENT_SHAPE,
                )  # fmt: skip
                tl.store(d_row + columns, gradient.to(d_row.dtype.element_ty), mask=columns < classes)
    if teacher_ptr is not None:
        loss += _row_loss(
            tl.sum(total, 0), tl.sum(excess_sum, 0), student_sum, teacher_sum, temperature, soft_weight, KIND
        )

    # 3. The gradient that needs E_s[c].
    if d_student_ptr is not None and CENTRED:
        row_mean = tl.sum(mean, 0)
        for start in range(0, END, BLOCK):
            columns = start + offsets
            if not RESIDENT:
                student = _load(
                    student_row, student_bias_ptr, columns, classes, student_gain, student_softcap, STUDENT_SHAPE, WIDE
                )
                teacher = _load(
                    teacher_row, teacher_bias_ptr, columns, classes, teacher_gain, teacher_softcap, TEACHER_SHAPE, WIDE
                )
                _, student_p, _, value, _ = _terms(
                    student, teacher, student_max, teacher_max, student_sum, teacher_sum, temperature, beta, others,
                    teacher_kl, student_kl, KIND,
                )  # fmt: skip
            gradient = _slope(student_p, student_p, value, row_mean, temperature, soft_weight, KIND)
            gradient = _finish(
                gradient, student, columns, student_max, hard_sum, label, hard_weight, weight, student_softcap,
                labels_ptr is not None, STUDENT_SHAPE,
            )  # fmt: skip
            tl.store(d_row + columns, gradient.to(d_row.dtype.element_ty), mask=columns < classes)

    if d_student_ptr is not None:
        for start in range(classes, width, BLOCK):
            tl.store(d_row + start + offsets, tl.zeros((BLOCK,), d_row.dtype.element_ty), mask=start + offsets < width)
    tl.store(loss_ptr + row, loss)


def shape_of(scale: float, softcap: float | None) -> str:
    """Returns SHAPE as `_shaped` takes it."""
    return "softcap" if softcap is not None else "scale" if scale != 1 else ""


def _kind(options: "RowOptions") -> str:
    """Returns the kind; the mixtures that `RowOptions` calls "jsd" are told apart by what they need not compute."""
    beta, teacher_kl, student_kl = options.beta, options.teacher_kl, options.student_kl
    if options.kind != "jsd" or (1 - beta) * teacher_kl == beta * student_kl:
        return options.kind
    return "skewed_kl" if student_kl == 0 else "skewed_reverse_kl" if teacher_kl == 0 else "mixture"


def rows(
    student: Tensor,  # (*, >= V)
    target: tuple[Tensor, ...],  # the teacher's logits (*, >= V); (): the soft loss has no weight
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    options: "RowOptions",
    *,
    loss: Tensor,  # (N), float32 or float64, the dtype of the computation
    gradient: Tensor | None = None,  # (*, >= V) contiguous; may be student itself
    weight: Tensor | None = None,  # (N), of each row's gradient; None: 1
    expected: Tensor | None = None,  # (N), the weights that `gradient` was written with before; None: it was not
    student_bias: Tensor | None = None,  # (>= V), added to each row's logits; None: 0
    teacher_bias: Tensor | None = None,  # (>= V)
) -> None:
    """Writes `loss`, and `gradient` if it is given. With `expected` it writes only the rows whose weight differs."""
    student, *student_rows = rows_of(student)
    teacher, teacher_rows = None, [1, 0, 0]
    if target:
        teacher, *teacher_rows = rows_of(*target)
    count = student.shape[:-1].numel()
    if count == 0:
        return
    kind = _kind(options)
    has_softcap = options.student_softcap is not None or options.teacher_softcap is not None
    is_mixture = kind in ("jsd", "skewed_kl", "skewed_reverse_kl", "mixture")
    arch = _common.arch_of(student)
    # A thread holds 16 numbers of each side. Of logarithms and softcaps it needs more registers.
    resident = options.classes <= (RESIDENT // 2 if is_mixture and (kind != "jsd" or has_softcap) else RESIDENT)
    block = BLOCK // 4 if kind == "mixture" else BLOCK // 2 if is_mixture or has_softcap or kind == "tvd" else BLOCK
    if resident:
        block = max(power_of_2(options.classes), 32)
    warps = max(1, block // (16 * _common.warp_size(arch)))
    # Without a limit, NVIDIA's compiler would spill a few registers to fit one more program.
    limit = {"maxnreg": 224} if kind == "mixture" and not resident and arch.startswith("sm_") else {}
    with on_device_of(student):
        _rows[(count,)](
            student, teacher, student_bias, teacher_bias, labels, counted, weight, expected, loss, gradient,
            *student_rows, *teacher_rows,
            0 if gradient is None else gradient.shape[-1], options.classes,
            options.temperature, options.beta, options.teacher_kl, options.student_kl,
            options.soft_weight, options.hard_weight, options.student_scale, options.teacher_scale,
            options.student_softcap or 1.0, options.teacher_softcap or 1.0,
            KIND=kind,
            STUDENT_SHAPE=shape_of(options.student_scale, options.student_softcap),
            TEACHER_SHAPE=shape_of(options.teacher_scale, options.teacher_softcap),
            WIDE=tl.float64 if loss.dtype == torch.float64 else tl.float32, RESIDENT=resident, BLOCK=block,
            num_warps=warps, **limit,
        )  # fmt: skip
