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
loss of a student near its teacher keeps its digits.

The list is held in registers, with the logits of its classes. Entries of log-probability -inf are padding: they may
repeat a class, and are not listed. The other classes are distinct.

The gradient of all classes is first written as if none were listed, which is one factor times the exponentials. After a
barrier the listed classes are written again. Only the sums of a bucket need to know which classes are listed: a block
of the row gets a bit for each of its classes, 32 to a word, and each word is compared with the whole list.

Rows that fit are held in registers, and each logit is read once. Longer rows are read twice, in blocks: for the maxima
and sums, then for the gradient.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import on_device_of, power_of_2, row_offset, rows_of
from .logits import RESIDENT, _add, _exp, _finish, _joined, _load, _rescale, _shaped, shape_of

if TYPE_CHECKING:
    from ..ops._rows import RowOptions

BLOCK = 8192  # of rows that do not fit in registers
PIECE = 32  # listed classes that are compared at once with the words of a block


@triton.jit
def _listed(start, logprobs_row, classes_row, length, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """Returns which of the columns from `start` on are listed."""
    word = tl.arange(0, BLOCK // 32)
    words = tl.zeros((BLOCK // 32,), tl.int32)
    for first in range(0, length, PIECE):
        places = first + tl.arange(0, PIECE)
        is_listed = tl.load(logprobs_row + places, mask=places < length, other=-float("inf")) != -float("inf")
        column = tl.load(classes_row + places, mask=places < length, other=-1).to(tl.int32) - start
        bit = tl.where(is_listed, 1 << (column & 31), 0)
        words |= tl.sum(tl.where((column >> 5)[None, :] == word[:, None], bit[None, :], 0), 1)
    bits = words[:, None] >> tl.arange(0, 32)[None, :]
    return tl.reshape(bits & 1, (BLOCK,)) != 0


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
def _rows(
    student_ptr,  # (N, >= V)
    bias_ptr,  # (>= V); None: 0
    logprobs_ptr,  # (N, k), the teacher's log-probabilities of the listed classes; None: the soft loss has no weight
    class_ptr,  # (N, k)
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
    BUCKET: tl.constexpr,  # whether the classes that are not listed form one more; else p is normalised over the list
    SHAPE: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether the row is one block
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    # Options arrive in float64; cast them to the dtype of the computation.
    temperature = tl.full((), temperature, WIDE)
    scale, softcap = tl.full((), scale, WIDE), tl.full((), softcap, WIDE)
    gain = scale / softcap
    soft_weight, hard_weight = tl.full((), soft_weight, WIDE), tl.full((), hard_weight, WIDE)
    student_row = student_ptr + row_offset(row, inner, outer_stride, inner_stride)
    d_row, logprobs_row, classes_row = student_row, logprobs_ptr, class_ptr
    if d_student_ptr is not None:
        d_row = d_student_ptr + tl.cast(row, tl.int64) * width
    HAS_LIST: tl.constexpr = logprobs_ptr is not None
    HAS_REST: tl.constexpr = HAS_LIST and BUCKET
    if HAS_LIST:
        logprobs_row = logprobs_ptr + tl.cast(row, tl.int64) * length
        classes_row = class_ptr + tl.cast(row, tl.int64) * length
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

    # 1. The list and the logits of its classes; -inf where an entry is padding. A label or a listed class out of range
    # gives NaN.
    student = tl.zeros((BLOCK,), WIDE)
    if RESIDENT:
        student = _load(student_row, bias_ptr, offsets, classes, gain, softcap, SHAPE, WIDE)
    label, likely = 0, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        is_class = (label >= 0) & (label < classes)
        likely = tl.load(student_row + label, mask=is_class, other=float("nan")).to(WIDE)
        if bias_ptr is not None:
            likely += tl.load(bias_ptr + label, mask=is_class, other=0).to(WIDE)
        likely = _shaped(likely, gain, softcap, SHAPE)
    places = tl.arange(0, LIST_BLOCK)
    listed_z, teacher_log = tl.zeros((LIST_BLOCK,), WIDE), tl.zeros((LIST_BLOCK,), WIDE)
    listed_class, exists, is_listed = places, places < 0, places < 0
    if HAS_LIST:
        teacher_log = tl.load(logprobs_row + places, mask=places < length, other=-float("inf")).to(WIDE)
        listed_class = tl.load(classes_row + places, mask=places < length, other=-1)
        is_listed = teacher_log != -float("inf")
        exists = is_listed & (listed_class >= 0) & (listed_class < classes)
        listed_z = tl.load(student_row + listed_class, mask=exists, other=float("nan")).to(WIDE)
        if bias_ptr is not None:
            listed_z += tl.load(bias_ptr + listed_class, mask=exists, other=0).to(WIDE)
        listed_z = tl.where(is_listed, _shaped(listed_z, gain, softcap, SHAPE), -float("inf"))

    # 2. Maxima and sums of exponentials over the row: with a bucket, over its classes; hard_sum is at temperature 1.
    lowest: tl.constexpr = -1.7e308 if tl.float64 == WIDE else -3.4e38
    LANES: tl.constexpr = BLOCK // 8
    row_max, row_sum = tl.full((LANES,), lowest, WIDE), tl.zeros((LANES,), WIDE)
    hard_max, hard_sum = row_max, row_sum
    if RESIDENT:
        if HAS_REST:
            listed = _listed(0, logprobs_row, classes_row, length, BLOCK, PIECE)
            row_max, row_sum = _add(row_max, row_sum, tl.where(listed, -float("inf"), student), temperature)
        else:
            row_max, row_sum = _add(row_max, row_sum, student, temperature)
        if labels_ptr is not None:
            hard_max, hard_sum = _add(hard_max, hard_sum, student, 1.0)
    else:
        for start in range(0, classes, BLOCK):
            student = _load(student_row, bias_ptr, start + offsets, classes, gain, softcap, SHAPE, WIDE)
            if HAS_REST:
                listed = _listed(start, logprobs_row, classes_row, length, BLOCK, PIECE)
                row_max, row_sum = _add(row_max, row_sum, tl.where(listed, -float("inf"), student), temperature)
            else:
                row_max, row_sum = _add(row_max, row_sum, student, temperature)
            if labels_ptr is not None:
                hard_max, hard_sum = _add(hard_max, hard_sum, student, 1.0)
    row_max, row_sum = _joined(row_max, row_sum, temperature)
    if labels_ptr is not None:
        hard_max, hard_sum = _joined(hard_max, hard_sum, 1.0)

    # 3. The loss. The gradient of a class that is not listed is exp((z - row_max) / T) factor.
    loss, factor = tl.full((), 0.0, WIDE), tl.full((), 0.0, WIDE)
    if labels_ptr is not None:
        loss = hard_weight * (tl.log(hard_sum) + (hard_max - likely))
    listed_slope = tl.zeros((LIST_BLOCK,), WIDE)
    if HAS_LIST:
        # The teacher's log p of the listed classes and p of the bucket. The latter cancels: it needs the digits.
        rest_p, log_norm = tl.full((), 0.0, WIDE), tl.full((), 0.0, WIDE)
        if HAS_REST:
            listed_p = tl.sum(tl.exp(teacher_log.to(tl.float64)), 0)
            least: tl.constexpr = 1e-7 if REVERSE else 0.0
            has_others = tl.sum(is_listed.to(tl.int32), 0) < classes
            rest = tl.where(has_others, tl.maximum(1 - listed_p, least), 0)
            rest_p = rest.to(WIDE)
            if REVERSE:
                log_norm = tl.log(listed_p + rest).to(WIDE)
        else:
            teacher_log = (teacher_log - tl.max(teacher_log, 0)) / temperature
            log_norm = tl.log(tl.sum(tl.exp(teacher_log), 0))
        teacher_log -= log_norm

        student_max, student_sum = row_max, row_sum
        if HAS_REST or REVERSE:  # the student's own, among the listed classes and the bucket
            student_max = tl.maximum(tl.max(listed_z, 0), lowest)
            if HAS_REST:
                student_max = tl.maximum(student_max, row_max)
            student_sum = tl.sum(_exp(listed_z - student_max, temperature), 0)
            # NaN in a class that is neither listed nor in a bucket gives NaN, too.
            student_sum += row_sum * _exp(row_max - student_max, temperature) if HAS_REST else row_sum * 0
        log_sum = tl.log(student_sum)
        listed_x = listed_z - student_max
        listed_q = _exp(listed_x, temperature) / student_sum
        listed_log = listed_x / temperature - log_sum
        row_share = _exp(row_max - student_max, temperature) / student_sum
        # The bucket's log q; a likely bucket's would lose digits as a difference of logarithms.
        rest_log = (row_max - student_max) / temperature + tl.log(row_sum) - log_sum
        rest_log = tl.where(row_share * row_sum > 0.1, tl.log(row_share * row_sum), rest_log)
        slope = soft_weight / temperature
        if REVERSE:
            soft = tl.sum(tl.where(is_listed, _divergence(listed_log, teacher_log), 0), 0)
            rest_c = tl.full((), 0.0, WIDE)
            if HAS_REST:
                rest_teacher_log = tl.log(rest_p) - log_norm
                soft += _divergence(rest_log, rest_teacher_log)
                rest_c = tl.where(row_sum > 0, rest_log - rest_teacher_log, 0)
                factor = row_share * (rest_c - soft) * slope
            listed_slope = listed_q * (listed_log - teacher_log - soft) * slope
        else:
            teacher_p = tl.exp(teacher_log)
            soft = -tl.sum(tl.where(teacher_p == 0, 0, teacher_p * listed_log), 0)
            mass = tl.sum(teacher_p, 0)
            if HAS_REST:
                soft -= tl.where(rest_p == 0, 0, rest_p * rest_log)
                rest_p = tl.where(row_sum > 0, rest_p, 0)  # a bucket of probability 0 has no gradient
                mass += rest_p
            factor = (mass * row_share - rest_p / tl.where(row_sum > 0, row_sum, 1)) * slope
            listed_slope = (mass * listed_q - teacher_p) * slope
        loss += soft_weight * soft
    tl.store(loss_ptr + row, loss)

    # 4. The gradient. It may overwrite the logits: the barrier waits until other threads have fetched the ones they
    # need.
    if d_student_ptr is not None:
        tl.debug_barrier()
        for start in range(0, classes, BLOCK):
            columns = start + offsets
            if not RESIDENT:
                student = _load(student_row, bias_ptr, columns, classes, gain, softcap, SHAPE, WIDE)
            gradient = tl.zeros((BLOCK,), WIDE)
            if HAS_REST or (HAS_LIST and not REVERSE):
                gradient = _exp(student - row_max, temperature) * factor
            gradient = _finish(
                gradient, student, columns, hard_max, hard_sum, label, hard_weight, weight, softcap,
                labels_ptr is not None, SHAPE,
            )  # fmt: skip
            tl.store(d_row + columns, gradient.to(d_row.dtype.element_ty), mask=columns < classes)
        for start in range(classes, width, BLOCK):
            tl.store(d_row + start + offsets, tl.zeros((BLOCK,), d_row.dtype.element_ty), mask=start + offsets < width)
        if HAS_LIST:
            tl.debug_barrier()  # the listed classes come last
            gradient = _finish(
                listed_slope, listed_z, listed_class, hard_max, hard_sum, label, hard_weight, weight, softcap,
                labels_ptr is not None, SHAPE,
            )  # fmt: skip
            tl.store(d_row + listed_class, gradient.to(d_row.dtype.element_ty), mask=exists)


def rows(
    student: Tensor,  # (*, >= V)
    target: tuple[Tensor, ...],  # the teacher's log-probabilities (N, k) and classes (N, k); (): no soft loss
    labels: Tensor | None,  # (N)
    counted: Tensor | None,  # (N)
    options: "RowOptions",
    *,
    loss: Tensor,  # (N), float32 or float64, the dtype of the computation
    gradient: Tensor | None = None,  # (*, >= V) contiguous; may be student itself
    weight: Tensor | None = None,  # (N), of each row's gradient; None: 1
    expected: Tensor | None = None,  # (N), the weights that `gradient` was written with before; None: it was not
    student_bias: Tensor | None = None,  # (>= V), added to each row's logits; None: 0
    teacher_bias: None = None,  # a list has none
) -> None:
    """Writes `loss`, and `gradient` if it is given. With `expected` it writes only the rows whose weight differs."""
    student, *student_rows = rows_of(student)
    count = loss.numel()
    if count == 0:
        return
    logprobs, listed_classes = target or (None, None)
    length = 1 if logprobs is None else logprobs.shape[-1]
    resident = options.classes <= RESIDENT
    block = max(power_of_2(options.classes), 32) if resident else BLOCK
    arch = _common.arch_of(student)
    list_block, numbers = power_of_2(length), 32 * _common.warp_size(arch)
    # Without a limit, NVIDIA's compiler would spill a few registers to fit one more program.
    limit = {"maxnreg": 224} if not resident and length <= block and arch.startswith("sm_") else {}
    with on_device_of(student):
        _rows[(count,)](
            student, student_bias, logprobs, listed_classes, labels, counted, weight, expected, loss, gradient,
            *student_rows, length, 0 if gradient is None else gradient.shape[-1], options.classes,
            options.temperature, options.soft_weight, options.hard_weight,
            options.student_scale, options.student_softcap or 1.0,
            REVERSE=options.kind == "reverse_kl", BUCKET=options.tail == "bucket",
            SHAPE=shape_of(options.student_scale, options.student_softcap),
            WIDE=tl.float64 if loss.dtype == torch.float64 else tl.float32,
            RESIDENT=resident, BLOCK=block, LIST_BLOCK=list_block, PIECE=PIECE,
            num_warps=min(max(1, block // numbers, list_block // numbers), 16), **limit,  # a thread holds 32 logits
        )  # fmt: skip
