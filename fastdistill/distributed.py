"""The losses over classes where the vocabulary is sharded over a process group (tensor parallelism).

Each function is the one of the same name in `fastdistill`, called by every process of a group with its own shard: the
logits' last dimension, or the rows of the vocabulary weights and biases, in the order of ranks. The shards may differ
in size, but a process holds the same classes of student and teacher. Hidden states, labels, masks and lists are the
same on all processes and count classes over all shards; so does `vocab_size`.

Every process gets the loss and the gradients that one process with the whole vocabulary would get: of its own shard of
logits, weight and bias, and the whole gradient in the hidden states. Two small collectives are sent for each chunk of
rows; no tensor has the size (N, V).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import _checks as check
from . import functional, reference
from ._checks import Backend, Reduction, Tail
from .functional import _rows
from .functional._dispatch import pick_backend
from .functional._rows import Keywords
from .functional.linear_logits import Head as _Head
from .functional.linear_logits import _check_head, _flat_rows, _operands
from .ops._common import NAMESPACE, compute_dtype, no_autocast, traced
from .ops._rows import weigh
from .ops._shards import Shard as _Shard
from .ops.sharded_linear import linear_row_losses as sharded_linear_row_losses
from .ops.sharded_logits import row_losses as sharded_row_losses

__all__ = [
    "jsd", "kl_div", "linear_jsd", "linear_kl_div", "linear_soft_cross_entropy", "linear_topk_soft_cross_entropy",
    "linear_tvd", "soft_cross_entropy", "topk_soft_cross_entropy", "tvd",
]  # fmt: skip

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import TypedDict, Unpack

    class ClassOptions(TypedDict, total=False):
        """The keywords of `fastdistill.soft_cross_entropy`, with the same defaults."""

        temperature: float
        t_squared: bool
        labels: Tensor | None
        alpha: float
        ignore_index: int
        mask: Tensor | None
        vocab_size: int | None
        student_softcap: float | None
        teacher_softcap: float | None
        student_logit_scale: float
        teacher_logit_scale: float
        item_weights: Tensor | None
        reduction: Reduction
        num_items: int | float | Tensor | None
        backend: Backend


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, group: ProcessGroup | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.soft_cross_entropy` of logits that are sharded over a process group.

    Args:
        student_logits: `(*, V_r)`, this process's classes; or a DTensor `(*, V)` that a mesh dimension shards by its
            last dimension, which gives the group.
        teacher_logits: the same classes of the teacher.
        group: the processes that hold the shards, in the order of their ranks; None: all processes, or the DTensors'.
        options: the other keywords of `fastdistill.soft_cross_entropy`. `labels` and `vocab_size` count the classes of
            all shards.

    Raises:
        ValueError: student and teacher are sharded in other ways; and what the function without shards raises.
    """
    return _on_logits("soft_cross_entropy", "soft_cross_entropy", student_logits, teacher_logits, group, options)


def kl_div(
    student_logits: Tensor, teacher_logits: Tensor, *, reverse: bool = False, skew: float = 0.0,
    group: ProcessGroup | None = None, **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.kl_div` of logits that are sharded over a process group; see `soft_cross_entropy`."""
    kind = _rows.kl_kind(reverse, skew)
    return _on_logits("kl_div", kind, student_logits, teacher_logits, group, options, reverse=reverse, skew=skew)


def jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, group: ProcessGroup | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.jsd` of logits that are sharded over a process group; see `soft_cross_entropy`."""
    return _on_logits("jsd", _rows.jsd_kind(beta), student_logits, teacher_logits, group, options, beta=beta)


def tvd(
    student_logits: Tensor, teacher_logits: Tensor, *, group: ProcessGroup | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.tvd` of logits that are sharded over a process group; see `soft_cross_entropy`."""
    return _on_logits("tvd", "tvd", student_logits, teacher_logits, group, options)


def topk_soft_cross_entropy(
    student_logits: Tensor, topk_logprobs: Tensor, topk_indices: Tensor, *, tail: Tail = "renormalize",
    reverse: bool = False, group: ProcessGroup | None = None, **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.topk_soft_cross_entropy` of logits that are sharded over a process group.

    Args:
        student_logits, group, options: as in `soft_cross_entropy`.
        topk_logprobs, topk_indices: `(*, k)`, the same on all processes; the indices count the classes of all shards.
        tail, reverse: as in `fastdistill.topk_soft_cross_entropy`.
    """
    name = "topk_soft_cross_entropy"
    given, (student,), shard, classes, _ = _prepared(name, options, group, -1, student_logits=student_logits)
    check.floating(student_logits=student, topk_logprobs=topk_logprobs)
    rows = tuple(student.shape[:-1])
    _check_keywords(given, rows, student.device)
    _rows.check_topk(topk_logprobs, topk_indices, rows, tail, reverse, given.temperature)
    own = {"tail": tail, "reverse": reverse}
    return _logits_loss(
        name, _rows.topk_kind(reverse), student, topk_logprobs, topk_indices, given, shard, classes, own
    )


def linear_soft_cross_entropy(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, group: ProcessGroup | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.linear_soft_cross_entropy` with vocabulary weights that are sharded over a process group.

    Args:
        student: `(*, d_s)` hidden states, the same on all processes, or a DTensor; they get their whole gradient.
        student_weight: `(V_r, d_s)`, this process's classes; or a DTensor `(V, d_s)` that a mesh dimension shards by
            its first dimension, which gives the group.
        teacher: `(*, d_t)`, the same on all processes, or a DTensor.
        teacher_weight: `(V_r, d_t)`, the same classes of the teacher, or a DTensor.
        student_bias, teacher_bias: `(V_r)`, a DTensor `(V)`, or None.
        group: the processes that hold the shards, in the order of their ranks; None: all processes, or the DTensors'.
        options: the other keywords of `fastdistill.linear_soft_cross_entropy`. `labels` and `vocab_size` count the
            classes of all shards.

    Raises:
        ValueError: student and teacher are sharded in other ways; and what the function without shards raises.
    """
    heads = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _on_heads("linear_soft_cross_entropy", "soft_cross_entropy", *heads, group, options)


def linear_kl_div(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, reverse: bool = False, skew: float = 0.0,
    group: ProcessGroup | None = None, **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.linear_kl_div` with sharded vocabulary weights; see `linear_soft_cross_entropy`."""
    heads = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    kind = _rows.kl_kind(reverse, skew)
    return _on_heads("linear_kl_div", kind, *heads, group, options, reverse=reverse, skew=skew)


def linear_jsd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, beta: float = 0.5,
    group: ProcessGroup | None = None, **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.linear_jsd` with sharded vocabulary weights; see `linear_soft_cross_entropy`."""
    heads = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _on_heads("linear_jsd", _rows.jsd_kind(beta), *heads, group, options, beta=beta)


def linear_tvd(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, group: ProcessGroup | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.linear_tvd` with sharded vocabulary weights; see `linear_soft_cross_entropy`."""
    heads = (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)
    return _on_heads("linear_tvd", "tvd", *heads, group, options)


def linear_topk_soft_cross_entropy(
    student: Tensor, student_weight: Tensor, topk_logprobs: Tensor, topk_indices: Tensor, *,
    student_bias: Tensor | None = None, tail: Tail = "renormalize", reverse: bool = False,
    group: ProcessGroup | None = None, **options: Unpack[ClassOptions],
) -> Tensor:  # fmt: skip
    """Computes `fastdistill.linear_topk_soft_cross_entropy` with vocabulary weights sharded over a process group.

    Args:
        student, student_weight, student_bias, group, options: as in `linear_soft_cross_entropy`.
        topk_logprobs, topk_indices: `(*, k)`, the same on all processes; the indices count the classes of all shards.
        tail, reverse: as in `fastdistill.topk_soft_cross_entropy`.
    """
    name = "linear_topk_soft_cross_entropy"
    given, (weight,), shard, classes, ranks = _prepared(name, options, group, 0, student_weight=student_weight)
    head = _whole(student, ranks), weight, _shard_of_bias("student_bias", student_bias, weight)
    check.floating(student=head[0], student_weight=weight, topk_logprobs=topk_logprobs)
    rows, _ = _check_head("student", head)
    _check_keywords(given, rows, weight.device)
    _rows.check_topk(topk_logprobs, topk_indices, rows, tail, reverse, given.temperature)
    own = {"tail": tail, "reverse": reverse}
    lists = (topk_logprobs, None, None)
    return _head_loss(name, _rows.topk_kind(reverse), head, lists, topk_indices, given, shard, classes, own)


# -- shards --------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor's classes lie."""

    group: ProcessGroup
    widths: tuple[int, ...]  # the number of classes on each rank of the group


def _prepared(
    name: str, options: Any, group: ProcessGroup | None, dim: int, **tensors: Tensor
) -> tuple[Keywords, list[Tensor], _Shard, int, list[int]]:
    """Returns the keywords, the local shards, where they lie, the number of classes that take part, and the ranks of
    the group."""
    unknown = sorted(options.keys() - _KEYWORDS[name])
    if unknown:
        raise TypeError(f"fastdistill.distributed.{name} has no keyword {', '.join(unknown)}")
    given = Keywords(**_DEFAULTS | options)
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group, or start with torchrun"
        )
    found = [_place_of(tensor_name, x, dim, group) for tensor_name, x in tensors.items()]
    places = [place for _, place in found if place is not None]
    if len(places) not in (0, len(found)):
        raise ValueError(f"{' and '.join(tensors)} should both be DTensors, or both plain shards")
    shards = [x for x, _ in found]
    if not places:
        group = dist.distributed_c10d._get_default_group() if group is None else group
        widths = [x.shape[dim] if x.dim() else 0 for x in shards]
        exchange = _exchange_op if traced() else _exchange
        own = exchange(shards[0], ", ".join(tensors), widths, given.vocab_size, group.group_name).tolist()
    else:
        group, own = places[0].group, _own_classes(list(tensors), places, given.vocab_size)
    ranks = dist.get_process_group_ranks(group)
    others = [dist.get_process_group_ranks(place.group) for place in places[1:]]
    if others and others[0] != ranks:
        raise ValueError(
            f"{' and '.join(tensors)} are sharded over the ranks {[ranks, *others]}; they should be the same ranks"
        )
    first, width, classes = own
    return given, shards, _Shard(group.group_name, first, width), classes, ranks


_DEFAULTS = {x: inspect.signature(functional.soft_cross_entropy).parameters[x].default for x in Keywords._fields}
_KEYWORDS = {x: _DEFAULTS.keys() & inspect.signature(getattr(functional, x)).parameters.keys() for x in __all__}


def _place_of(name: str, x: Tensor, dim: int, group: ProcessGroup | None) -> tuple[Tensor, _Place | None]:
    """Returns the local shard, and its place if a DTensor's mesh tells it."""
    if not isinstance(x, DTensor):
        return x, None
    dim = dim % x.dim()
    mesh, placements = x.device_mesh, x.placements
    sharded_by = [i for i, place in enumerate(placements) if place.is_shard() and mesh.size(i) > 1]
    sharded_by = sharded_by or [i for i, place in enumerate(placements) if place == Shard(dim)][-1:]  # one process
    if len(sharded_by) != 1 or placements[sharded_by[0]] != Shard(dim) or any(p.is_partial() for p in placements):
        raise ValueError(
            f"{name} is a DTensor with placements {placements}; one mesh dimension should shard its dimension {dim}, "
            "and no other. Under FSDP, call this inside the forward of the module that FSDP wraps"
        )
    own_group = mesh.get_group(sharded_by[0])
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own_group):
        raise ValueError(f"group is not the group that shards {name}; leave group out")
    size, ranks = x.shape[dim], mesh.size(sharded_by[0])
    step = -(-size // ranks)
    widths = tuple(max(min(step, size - i * step), 0) for i in range(ranks))
    return x.to_local(), _Place(own_group, widths)


def _exchange(like: Tensor, names: str, widths: list[int], vocab_size: int | None, group_name: str) -> Tensor:
    """Asks all ranks for their widths, on every call: a process cannot know that another one's have changed. Returns
    `_own_classes` as a tensor, which compiled code reads when it runs."""
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else "cpu"
    mine = torch.tensor(widths, device=device)
    every = mine.new_empty(dist.get_world_size(group), len(widths))
    dist.all_gather(list(every.unbind()), mine, group=group)
    places = [_Place(group, tuple(column)) for column in zip(*every.tolist(), strict=True)]
    return torch.tensor(_own_classes(names.split(", "), places, vocab_size))


_exchange_op: Any = torch.library.custom_op(
    f"{NAMESPACE}::sharded_widths",
    _exchange,
    mutates_args=(),
    schema="(Tensor like, str names, SymInt[] widths, SymInt? vocab_size, str group_name) -> Tensor",
)


@_exchange_op.register_fake
def _(like, *_):  # type: ignore[no-untyped-def]
    return like.new_empty(3, dtype=torch.int64, device="cpu")


def _own_classes(names: list[str], places: list[_Place], vocab_size: int | None) -> tuple[int, int, int]:
    """Returns the number of classes on the ranks before, of those here, and of all, as far as they take part."""
    widths, rank = _used(names, places, vocab_size), dist.get_rank(places[0].group)
    if not any(widths):
        raise ValueError("the logits have 0 classes; they should have at least 1")
    return sum(places[0].widths[:rank]), widths[rank], sum(widths)


def _used(names: list[str], places: list[_Place], vocab_size: int | None) -> list[int]:
    """Returns how many classes each rank uses. What it raises, it raises on all ranks."""
    sizes = [sum(place.widths) for place in places]
    if vocab_size is None:
        if len(places) == 2 and places[0].widths != places[1].widths:
            raise ValueError(
                f"{names[0]} has {list(places[0].widths)} classes on the ranks, {names[1]} {list(places[1].widths)}; a "
                "rank should hold the same classes of both: pad the smaller vocabulary, and pass vocab_size"
            )
        return list(places[0].widths)
    check.integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(sizes):
        raise ValueError(
            f"vocab_size is {vocab_size}; it should be between 1 and the {min(sizes)} classes of all shards"
        )
    used = [
        [min(max(vocab_size - sum(place.widths[:i]), 0), width) for i, width in enumerate(place.widths)]
        for place in places
    ]
    if used[0] != used[-1]:
        raise ValueError(
            f"of the first {vocab_size} classes, {names[0]} has {used[0]} on the ranks and {names[1]} {used[1]}; a "
            "rank should hold the same classes of both: pad the smaller vocabulary before it is sharded"
        )
    return used[0]


def _whole(hidden: Tensor, ranks: list[int]) -> Tensor:
    """Returns hidden states that all processes share; of a DTensor, with the gradient that these functions compute."""
    if not isinstance(hidden, DTensor):
        return hidden
    mesh = hidden.device_mesh
    shares = [dist.get_process_group_ranks(mesh.get_group(i)) == ranks for i in range(mesh.ndim)]
    placements = [Replicate() if own else place for own, place in zip(shares, hidden.placements, strict=True)]
    return hidden.redistribute(placements=placements).to_local(grad_placements=placements)


def _shard_of_bias(name: str, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    bias = bias.to_local() if isinstance(bias, DTensor) else bias
    if bias is not None:
        check.shape(name, bias, (weight.shape[0],), "one entry for each row of the weight's shard")
    return bias


def _check_keywords(given: Keywords, rows: tuple[int, ...], device: torch.device) -> None:
    _rows.check_keywords(given._replace(vocab_size=None), rows, 1, device)  # `_own_classes` has checked the classes


# -- the losses ----------------------------------------------------------------------------------------------


def _on_logits(
    name: str, kind: str, student_logits: Tensor, teacher_logits: Tensor, group: ProcessGroup | None, options: Any,
    **own: Any,
) -> Tensor:  # fmt: skip
    given, (student, teacher), shard, classes, _ = _prepared(
        name, options, group, -1, student_logits=student_logits, teacher_logits=teacher_logits
    )
    check.floating(student_logits=student, teacher_logits=teacher)
    check.frozen(teacher_logits=teacher)
    rows = tuple(student.shape[:-1])
    check.shape("teacher_logits", teacher, (*rows, teacher.shape[-1]), "(*, V_r) with the student's *")
    _check_keywords(given, rows, student.device)
    return _logits_loss(name, kind, student, teacher, None, given, shard, classes, own)


def _logits_loss(
    name: str, kind: str, student: Tensor, teacher: Tensor, indices: Tensor | None, given: Keywords,
    shard: _Shard, classes: int, own: dict[str, Any],
) -> Tensor:  # fmt: skip
    backend = pick_backend(given.backend, student.device)
    with no_autocast(student):
        if backend == "reference":
            z = _all_logits(student[..., : shard.width], shard)
            others = (teacher, indices) if indices is not None else (_all_logits(teacher[..., : shard.width], shard),)
            return getattr(reference, name)(z, *others, **_rows.for_reference(given._replace(vocab_size=None), own))
        counted = _rows.counted_rows(given, None if indices is None else teacher)
        count = _rows.divisor(given, counted, student.shape[:-1].numel())
        weights = given.item_weights
        if weights is not None:
            weights, counted = weigh(weights, counted, compute_dtype(student, teacher))
        options = _rows.row_options(kind, given._replace(vocab_size=classes), classes, backend, **own)
        loss = sharded_row_losses(student, teacher, indices, given.labels, counted, shard, options)
        loss = loss if weights is None else loss * weights
        return loss if given.reduction == "none" else _rows.reduced(loss.sum(), count)


def _on_heads(
    name: str, kind: str, student: _Head, teacher: _Head, group: ProcessGroup | None, options: Any, **own: Any
) -> Tensor:
    given, (weight, teacher_weight), shard, classes, ranks = _prepared(
        name, options, group, 0, student_weight=student[1], teacher_weight=teacher[1]
    )
    head = _whole(student[0], ranks), weight, _shard_of_bias("student_bias", student[2], weight)
    other = _whole(teacher[0], ranks), teacher_weight, _shard_of_bias("teacher_bias", teacher[2], teacher_weight)
    check.floating(
        student=head[0], student_weight=head[1], teacher=other[0], teacher_weight=other[1],
        **check.given(student_bias=head[2], teacher_bias=other[2]),
    )  # fmt: skip
    check.frozen(teacher=other[0], teacher_weight=other[1], teacher_bias=other[2])
    rows, _ = _check_head("student", head)
    _check_head("teacher", other)
    check.shape("teacher", other[0], (*rows, other[0].shape[-1]), "(*, d_t) with the student's leading dimensions")
    _check_keywords(given, rows, weight.device)
    return _head_loss(name, kind, head, other, None, given, shard, classes, own)


def _head_loss(
    name: str, kind: str, student: _Head, teacher: _Head, indices: Tensor | None, given: Keywords,
    shard: _Shard, classes: int, own: dict[str, Any],
) -> Tensor:  # fmt: skip
    backend = pick_backend(given.backend, student[0].device)
    hidden, weight, bias = _operands("student", student)
    teacher = teacher if indices is not None else _operands("teacher", teacher)
    with no_autocast(hidden):
        if backend == "reference":
            z = _all_head_logits(hidden, weight, bias, shard)
            others = (teacher[0], indices) if indices is not None else (_all_head_logits(*teacher, shard),)
            definition = getattr(reference, name.removeprefix("linear_"))
            return definition(z, *others, **_rows.for_reference(given._replace(vocab_size=None), own))
        rows = hidden.shape[:-1]
        counted = _rows.counted_rows(given, None if indices is None else teacher[0])
        options = _rows.row_options(kind, given._replace(vocab_size=classes), classes, backend, **own)
        per_row = given.reduction == "none"
        loss = sharded_linear_row_losses(
            *_flat_rows((hidden, weight, bias), teacher, indices, given.labels, counted),
            item_weights=None if given.item_weights is None else given.item_weights.reshape(-1),
            per_row=per_row, shard=shard, options=options,
        )  # fmt: skip
        return loss.view(rows) if per_row else _rows.reduced(loss, _rows.divisor(given, counted, rows.numel()))


# -- the whole logits, for the definitions -------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """Makes (*, V) of shards (*, V_r). All processes have the same gradient in (*, V), and take their own part."""

    @staticmethod
    def forward(ctx, x, shard):  # type: ignore[no-untyped-def]
        ctx.shard = shard
        group = shard.processes()
        widths: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(widths, x.shape[-1], group=group)
        wide = x.new_zeros(*x.shape[:-1], max(widths))
        wide[..., : x.shape[-1]] = x
        parts = [torch.empty_like(wide) for _ in widths]
        dist.all_gather(parts, wide, group=group)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient[..., ctx.shard.first : ctx.shard.first + ctx.shard.width], None


class _Shared(torch.autograd.Function):
    """Returns x, which all processes share, and sums their gradients."""

    @staticmethod
    def forward(ctx, x, shard):  # type: ignore[no-untyped-def]
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.shard.processes())
        return gradient, None


def _all_logits(x: Tensor, shard: _Shard) -> Tensor:
    return _Gathered.apply(x, shard)


def _all_head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: _Shard) -> Tensor:
    dtype = compute_dtype(hidden, weight)
    z = _Shared.apply(hidden.to(dtype), shard) @ weight[: shard.width].to(dtype).mT
    return _all_logits(z if bias is None else z + bias[: shard.width].to(dtype), shard)
