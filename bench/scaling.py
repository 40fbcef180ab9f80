"""`python -m bench.scaling [--card NAME] [--mfu SHARE]` models what a distillation costs, from one card to a cluster.

Nothing is measured. Formulas give the models' parameters, operations and memory; `bench.cost` gives the costs of our
losses; the usual losses of `bench.eager` are counted operation by operation on tensors without data. Everything is for
one step of TOKENS tokens per card. `--check` compares the model with measurements on this CPU. docs/scaling.md lists
the assumptions and the conclusions.
"""

from __future__ import annotations

import argparse
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import inf
from operator import mul
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fastdistill
from bench import cost, eager, measure
from fastdistill.ops.linear_logits import CHUNK, GPU_CHUNK_BYTES

TOKENS = 32768  # per card and step: 256 sequences of 128, the published batch
NODE = 8  # cards that are linked directly
NETWORK = 50e9  # bytes per second from each card to other nodes: 400 Gb/s
MEMORY = {"H200": 141e9, "H100": 80e9, "A100": 80e9, "B200": 180e9, "MI300X": 192e9}  # published
LINK = {"H200": 450e9, "H100": 450e9, "A100": 300e9, "B200": 900e9, "MI300X": 448e9}  # published, one direction
USABLE = 0.9  # share of the memory; the device context and the allocator take the rest
RESIDUAL = 24 << 20  # CHUNK_BYTES of kernels/linear_mse.py
SUMMED = 1024  # SUMMED of kernels/attention_mse.py


# -- models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Holds the sizes of a BERT, or of a Llama, which is causal and gated, has grouped keys and no biases."""

    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    vocabulary: int
    llama: bool = False
    key_heads: int = 0
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_width(self) -> int:
        return (self.key_heads or self.heads) * self.head_dim

    @property
    def matrices(self) -> int:
        """Counts the weights that a layer multiplies with."""
        attention = 2 * self.width * (self.width + self.key_width)
        return attention + (3 if self.llama else 2) * self.width * self.ffn

    @property
    def parameters(self) -> int:
        if self.llama:
            vocabulary = self.vocabulary * self.width * (1 if self.tied else 2)
            return self.layers * (self.matrices + 2 * self.width) + self.width + vocabulary
        biases_and_norms = 9 * self.width + self.ffn
        embeddings = (self.vocabulary + 512 + 2 + 2) * self.width  # words, positions, types, LayerNorm
        return self.layers * (self.matrices + biases_and_norms) + embeddings + self.width * (self.width + 1)

    def flops(self, batch: int, length: int) -> float:
        """Counts the operations of a forward, without the vocabulary product. A backward is twice that."""
        scores = 4 * length * self.width * (0.5 if self.llama else 1)
        pooler = 0 if self.llama else 2 * batch * self.width**2
        return batch * length * self.layers * (2 * self.matrices + scores) + pooler

    def layer_activations(self, length: int, *, stored: bool = False, size: int = 2, mask: int = 1) -> float:
        """Counts the bytes per token that one layer keeps for its backward; `stored` adds the attention matrices.

        BERT follows arXiv 2205.05198: 34 * width per token at ffn = 4 * width, and 5 * heads * length for matrices; a
        dropout keeps `mask` bytes per number. Llama keeps the inputs and outputs of both norms, the rotated queries and
        keys, the values, the output of attention, and four tensors of ffn's width.
        """
        sums = self.heads * 4  # flash attention keeps one float32 per head
        if self.llama:
            return size * (6 * self.width + 2 * self.key_width + 4 * self.ffn) + sums
        attention = self.heads * length * (2 * size + mask) if stored else sums
        return size * (8 * self.width + 2 * self.ffn) + 2 * mask * self.width + attention

    def activations(self, length: int, *, stored: bool = False, size: int = 2, mask: int = 1) -> float:
        embeddings = 0 if self.llama else (size + mask) * self.width
        return embeddings + self.layers * self.layer_activations(length, stored=stored, size=size, mask=mask)


BERT_BASE = Model("BERT-base", 12, 768, 12, 3072, 30522)
TINYBERT_4 = Model("TinyBERT-4", 4, 312, 12, 1200, 30522)
TINYBERT_6 = Model("TinyBERT-6", 6, 768, 12, 3072, 30522)
LLAMA_8B = Model("Llama-3.1-8B", 32, 4096, 32, 14336, 128256, llama=True, key_heads=8, tied=False)
LLAMA_1B = Model("Llama-3.2-1B", 16, 2048, 32, 8192, 128256, llama=True, key_heads=8)

# AdamW in mixed precision: float32 weight, gradient and two moments, and the 16-bit copy that products read.
STATE, COPY = 16, 2


# -- the losses, ours and the usual way --------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts the bytes, the operations and the memory of everything that runs inside.

    On meta tensors this costs nothing. Each operation reads its inputs and writes its outputs once; views are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[cost.Step] = []
        self.changes: list[tuple[int, int]] = []  # (storage, bytes); a release has negative bytes
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        found = {_storage(x) for x in read}
        if all(_storage(x) in found for x in written) and not func._schema.is_mutable:
            return out
        for x in written:
            if _storage(x) not in found:
                self._hold(x)
        flops = flop_registry.get(func.overloadpacket)
        self.steps.append(
            cost.Step(
                str(func.overloadpacket),
                sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in (*read, *written)),
                flops(*args, **kwargs, out_val=out) if flops else 0,
                cost._precision(written[0].dtype) if written else "bits16",
            )
        )
        return out

    def _hold(self, x: Tensor) -> None:
        key, storage = _storage(x), x.untyped_storage()
        if key in self._held:
            return
        nbytes = storage.nbytes()
        self.changes.append((key, nbytes))

        def release(_: object) -> None:
            self.changes.append((key, -nbytes))
            del self._held[key]

        self._held[key] = weakref.ref(storage, release)

    def peak(self, without: Sequence[Tensor] = ()) -> int:
        """Returns the most bytes held at once, optionally without tensors that are still held."""
        # Other storages may have had the same address before: take the last allocation there.
        left_out = {max(i for i, (key, _) in enumerate(self.changes) if key == _storage(x)) for x in without}
        return max(accumulate((n for i, (_, n) in enumerate(self.changes) if i not in left_out), initial=0))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def usual(loss: Callable[[], Tensor], learned: Sequence[Tensor]) -> tuple[cost.Cost, int]:
    """Returns the cost of `loss`, forward and backward, and its memory beyond inputs and gradients."""
    with Count() as count:
        gradients = torch.autograd.grad(loss(), learned)
    total = cost.Step("", sum(s.memory for s in count.steps), sum(s.flops for s in count.steps))
    return cost.Cost("usual", "", total, count.steps), count.peak(without=gradients)


def inner_inputs(
    student: Model, teacher: Model, batch: int, length: int, dtype: torch.dtype, device: str = "meta"
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Returns the inputs of TinyBERT's losses: (states, weight, target, bias) of each hidden state, and (q_s, k_s, q_t,
    k_t) of each layer. The projection is shared and trained.
    """
    weight, bias = (torch.zeros(*s, device=device) for s in ((teacher.width, student.width), (teacher.width,)))
    weight, bias = (x.to(dtype).requires_grad_() for x in (weight, bias))

    def states(model: Model, learns: bool) -> Tensor:
        return torch.randn(batch * length, model.width, device=device).to(dtype).requires_grad_(learns)

    def heads(model: Model, learns: bool) -> Tensor:
        shape = (batch, model.heads, length, model.head_dim)
        return torch.randn(*shape, device=device).to(dtype).requires_grad_(learns)

    hidden = [[states(student, True), weight, states(teacher, False), bias] for _ in range(student.layers + 1)]
    attention = [
        [heads(student, True), heads(student, True), heads(teacher, False), heads(teacher, False)]
        for _ in range(student.layers)
    ]
    return hidden, attention


def inner_loss(hidden: Sequence[Sequence[Tensor]], attention: Sequence[Sequence[Tensor]], ops: ModuleType) -> Tensor:
    losses = [ops.linear_mse(*x) for x in hidden] + [ops.attention_mse(*x) for x in attention]
    return torch.stack([x.float() for x in losses]).sum()


def learned(hidden: Sequence[Sequence[Tensor]], attention: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    tensors = {id(x): x for inputs in (*hidden, *attention) for x in inputs if x.requires_grad}
    return list(tensors.values())


def usual_inner(
    student: Model, teacher: Model, batch: int, length: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[cost.Cost, int]:
    inputs = inner_inputs(student, teacher, batch, length, dtype)
    return usual(lambda: inner_loss(*inputs, eager), learned(*inputs))


def our_inner(
    student: Model, teacher: Model, batch: int, length: int, dtype: torch.dtype = torch.bfloat16
) -> list[cost.Cost]:
    hidden = cost.linear_mse(batch * length, student.width, teacher.width, dtype)
    attention = cost.attention_mse(batch, student.heads, length, student.head_dim, teacher.head_dim, dtype)
    return [hidden] * (student.layers + 1) + [attention] * student.layers


def our_inner_memory(student: Model, teacher: Model, batch: int, length: int, size: int = 2) -> int:
    """Returns the bytes beyond inputs and gradients: those kept from forward to backward, and the largest temporary."""
    number = 4 if size == 2 else 8  # bytes of an entry of a Gram matrix
    both = student.head_dim + teacher.head_dim
    matrices = 2 * batch * student.heads * both * number  # rows of Gq and Gk
    kept = student.layers * matrices * student.head_dim
    copies = size * (student.layers + 1) * batch * length * student.width  # dX, before the incoming gradient scales it
    weights = 4 * (student.layers + 1) * student.width * teacher.width
    residual = min(RESIDUAL, batch * length * teacher.width * size)
    return kept + copies + weights + max(residual, -(-length // SUMMED) * matrices * both)


def usual_head(
    kind: str, student: Model, teacher: Model, tokens: int, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Returns (loss, learned) with 16-bit logits of both sides and float32 log-probabilities."""
    x, w, t, u = (
        torch.zeros(n, m.width, dtype=dtype, device=device) for m in (student, teacher) for n in (tokens, m.vocabulary)
    )
    x, w = x.requires_grad_(), w.requires_grad_()

    # Models return their logits, so these stay alive during the loss.
    return lambda: eager.LOGITS_LOSSES[kind](x @ w.mT, t @ u.mT), [x, w]


def our_head_memory(student: Model, tokens: int) -> float:
    """Returns the bytes of a chunk's float32 logits of both sides, their 16-bit gradient, and float32 dW and dX."""
    rows = min(CHUNK, GPU_CHUNK_BYTES // (student.vocabulary * 4), tokens)
    return rows * student.vocabulary * (4 + 4 + 2) + 4 * student.width * (student.vocabulary + tokens)


# -- many cards --------------------------------------------------------------------------------------------


def gather_seconds(nbytes: float, cards: int, card: str) -> float:
    """Returns the seconds of an all-gather or a reduce-scatter of `nbytes` in all; an all-reduce is both.

    Cards of a node use its links. Between nodes each card moves a share of the node's bytes. Only bandwidth counts, not
    latency or congestion.
    """
    near = min(cards, NODE)
    nodes = -(-cards // NODE)
    return nbytes * (near - 1) / near / LINK[card] + nbytes / near * (nodes - 1) / nodes / NETWORK


def vocabulary_parallel(kind: str, shards: int, tokens: int = TOKENS) -> float:
    """Returns the bytes that `fastdistill.distributed` moves, as an all-gather; an all-reduce counts twice."""
    sums = shards * 8 * 4 * tokens  # float32 maxima and sums of every shard
    more = 2 * 2 * 4 * tokens if kind in ("jsd", "tvd") else 0  # two float32 sums, all-reduced
    return sums + more + 2 * 4 * LLAMA_1B.width * tokens  # and the float32 gradient of the hidden states


def gathered_logits(tokens: int = TOKENS) -> float:
    """The same where every card gathers the 16-bit logits of both sides."""
    return 2 * 2 * LLAMA_1B.vocabulary * tokens + 2 * 4 * LLAMA_1B.width * tokens


# -- tables ------------------------------------------------------------------------------------------------


def table(title: str, head: str, rows: Sequence[Sequence[str | float]]) -> str:
    columns = head.split(" | ")
    lines = [f"### {title}", "", f"| {head} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in rows:
        assert len(row) == len(columns), (head, row)
        lines.append("| " + " | ".join(map(_text, row)) + " |")
    return "\n".join(lines) + "\n"


def _text(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:.3g}" if abs(cell) < 999.5 else f"{cell:.0f}"


WORDS, WORDPIECES, EPOCHS = 3e9, 1.3, 3
GENERAL = WORDS * WORDPIECES * EPOCHS  # tokens of TinyBERT's general distillation
LENGTHS = (128, 512, 2048, 8192)


@dataclass(frozen=True)
class Seconds:
    """Holds the seconds of a step of TOKENS tokens, models at `mfu` of the card's rate and losses at their floors."""

    teacher: float
    student: float
    ours: float
    usual: float

    @property
    def step(self) -> float:
        return self.teacher + self.student + self.ours

    @property
    def usual_step(self) -> float:
        return self.teacher + self.student + self.usual

    @property
    def backward(self) -> float:
        return self.student * 2 / 3


def bert_seconds(student: Model, length: int, card: cost.Card, mfu: float) -> Seconds:
    batch = TOKENS // length
    return Seconds(
        BERT_BASE.flops(batch, length) / (mfu * card.bits16),
        3 * student.flops(batch, length) / (mfu * card.bits16),
        sum(c.floor(card) for c in our_inner(student, BERT_BASE, batch, length)),
        usual_inner(student, BERT_BASE, batch, length)[0].floor(card),
    )


def bert_tables(card: cost.Card, mfu: float) -> Iterator[str]:
    work, times, memory, network = [], [], [], []
    for student in (TINYBERT_4, TINYBERT_6):
        for length in LENGTHS:
            batch, name = TOKENS // length, f"{student.name}, {length}"
            ours = our_inner(student, BERT_BASE, batch, length)
            theirs, extra = usual_inner(student, BERT_BASE, batch, length)
            seconds = bert_seconds(student, length, card, mfu)
            teacher, own = BERT_BASE.flops(batch, length) / TOKENS, student.flops(batch, length) / TOKENS
            loss = sum(c.least.flops for c in ours) / TOKENS
            if length <= 512:  # BERT has 512 positions
                work.append(
                    [
                        name, teacher / 1e6, 3 * own / 1e6, loss / 1e6, theirs.least.flops / TOKENS / 1e6,
                        (teacher + 3 * own + loss) * GENERAL / 1e18,
                        sum(s.memory for c in ours for s in c.steps) / TOKENS / 1e3, theirs.least.memory / TOKENS / 1e3,
                    ]
                )  # fmt: skip
            hours = [
                GENERAL / TOKENS / cards * (seconds.step + _exposed(student, cards, seconds, card)) / 3600
                for cards in (1, 8, 64)
            ]
            times.append(
                [
                    name, seconds.teacher * 1e3, seconds.student * 1e3, seconds.ours * 1e3, seconds.usual * 1e3,
                    f"{seconds.ours / seconds.step:.1%}", f"{seconds.usual / seconds.usual_step:.1%}", *hours,
                    seconds.usual_step / seconds.step,
                ]
            )  # fmt: skip
            fixed = (STATE + COPY) * student.parameters + COPY * BERT_BASE.parameters
            flash, stored = (TOKENS * student.activations(length, stored=s) for s in (False, True))
            states = 2 * TOKENS * BERT_BASE.width * (student.layers + 1)
            heads = 2 * TOKENS * BERT_BASE.width * 2 * student.layers
            own_extra = our_inner_memory(student, BERT_BASE, batch, length)
            # The usual way stores the matrices, but needs no queries and keys of the teacher.
            ours_all, usual_all = fixed + flash + states + heads + own_extra, fixed + stored + states + extra
            memory.append(
                [name, *(x / 2**30 for x in (
                    fixed, flash, stored, states, heads, own_extra, extra, ours_all, usual_all,
                ))]
            )  # fmt: skip
        seconds = bert_seconds(student, 128, card, mfu)
        for cards in (8, 64, 256):
            reduce = 2 * gather_seconds(4 * student.parameters, cards, card.name)
            alone = seconds.step / cards
            split = alone + max(0.0, reduce - seconds.backward / cards)
            network.append(
                [
                    f"{student.name}, {cards}", 4 * student.parameters / 1e6, reduce * 1e3,
                    reduce / seconds.backward * TOKENS, _exposed(student, cards, seconds, card) * 1e3,
                    alone * 1e3, split * 1e3, f"{alone / split:.0%}",
                ]
            )  # fmt: skip
    yield table(
        "TinyBERT: MFLOP and KB per token, EFLOP of the run",
        "student, length | teacher | student | losses, ours | losses, usual | run, ours, EFLOP "
        "| losses, ours, KB | losses, usual, KB",
        work,
    )
    yield table(
        f"TinyBERT: milliseconds of a step of {TOKENS} tokens, hours of the run",
        "student, length | teacher | student | losses, ours | losses, usual | share, ours | share, usual "
        "| 1 card, h | 8 cards, h | 64 cards, h | usual / ours",
        times,
    )
    yield table(
        f"TinyBERT: GiB per card, {TOKENS} tokens",
        "student, length | weights, gradients, AdamW, teacher | activations, flash | activations, matrices stored "
        "| teacher's states | teacher's q, k | losses, ours | losses, usual | all, ours | all, usual",
        memory,
    )
    yield table(
        f"TinyBERT: all-reduce of the gradients, length 128, {TOKENS} tokens per card or in all",
        "student, cards | MB | ms | hidden from tokens per card | not hidden, ms "
        "| in all: compute, ms | in all: step, ms | in all: efficiency",
        network,
    )


def _exposed(student: Model, cards: int, seconds: Seconds, card: cost.Card) -> float:
    """Returns the seconds by which the all-reduce outlasts the backward that it overlaps with."""
    return max(0.0, 2 * gather_seconds(4 * student.parameters, cards, card.name) - seconds.backward)


CORPUS = 100e9
TOP_K, ENTRY = 64, 2 + 4  # a 16-bit log-probability and a 32-bit index


def llama_seconds(kind: str, length: int, card: cost.Card, mfu: float) -> Seconds:
    batch, bf16 = TOKENS // length, torch.bfloat16
    sizes = LLAMA_1B.width, LLAMA_8B.width, LLAMA_1B.vocabulary
    return Seconds(
        LLAMA_8B.flops(batch, length) / (mfu * card.bits16),
        3 * LLAMA_1B.flops(batch, length) / (mfu * card.bits16),
        cost.linear_logits(kind, TOKENS, *sizes, bf16).floor(card),
        usual(*usual_head(kind, LLAMA_1B, LLAMA_8B, TOKENS))[0].floor(card),
    )


def cached_seconds(card: cost.Card) -> float:
    """Returns the seconds of the loss on cached log-probabilities: three products and the student's rows."""
    steps = cost.linear_logits("kl_div", TOKENS, LLAMA_1B.width, LLAMA_8B.width, LLAMA_1B.vocabulary, torch.bfloat16)
    rows = cost.topk(TOKENS, LLAMA_1B.vocabulary, TOP_K, torch.float32)
    products = sum(s.seconds(card) for s in steps.steps if s.name not in ("teacher logits", "rows"))
    return products + rows.floor(card)


def most_tokens(length: int, head: Callable[[int], float], capacity: float, recompute: bool) -> int:
    """Returns the most tokens, in steps of 64, of a step that fits: teacher forward, loss, then backward."""
    layer = LLAMA_1B.layer_activations(length)
    kept = 2 * LLAMA_1B.width * LLAMA_1B.layers if recompute else LLAMA_1B.activations(length)
    free = USABLE * capacity - (STATE + COPY) * LLAMA_1B.parameters - COPY * LLAMA_8B.parameters

    def fits(tokens: int) -> bool:
        forward = tokens * LLAMA_8B.layer_activations(length)
        student = tokens * (kept + 2 * LLAMA_8B.width + 2 * LLAMA_1B.width)
        return max(forward, student + head(tokens), student + tokens * layer * recompute) <= free

    low, high = 0, 1 << 20  # in units of 64 tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


def llama_tables(card: cost.Card, mfu: float) -> Iterator[str]:
    sizes = LLAMA_1B.width, LLAMA_8B.width, LLAMA_1B.vocabulary
    times, memory = [], []
    for kind in ("kl_div", "jsd"):
        for length in (4096, 8192):
            seconds = llama_seconds(kind, length, card, mfu)
            flops = [m.flops(TOKENS // length, length) / TOKENS for m in (LLAMA_8B, LLAMA_1B)]
            loss = cost.linear_logits(kind, TOKENS, *sizes, torch.bfloat16).least.flops / TOKENS
            hours = CORPUS / TOKENS * seconds.step / 3600
            times.append(
                [
                    f"linear_{kind}, {length}", flops[0] / 1e9, 3 * flops[1] / 1e9, loss / 1e9,
                    *(x * 1e3 for x in (seconds.teacher, seconds.student, seconds.ours, seconds.usual)),
                    f"{seconds.ours / seconds.step:.1%}", f"{seconds.usual / seconds.usual_step:.1%}", hours,
                    *(hours / 24 / cards for cards in (8, 64, 512)), seconds.usual_step / seconds.step,
                ]
            )  # fmt: skip
    heads: dict[str, Callable[[int], float]] = {"ours, any": partial(our_head_memory, LLAMA_1B)}
    for kind in ("kl_div", "jsd"):
        few, more = (usual(*usual_head(kind, LLAMA_1B, LLAMA_8B, tokens))[1] for tokens in (64, 128))
        heads[f"usual, {kind}"] = partial(mul, (more - few) / 64)
    for name, head in heads.items():
        memory.append(
            [
                name, (head(TOKENS) - head(TOKENS // 2)) / (TOKENS // 2) / 1e3,
                *(head(tokens) / 2**30 for tokens in (8192, TOKENS)),
                *(float(most_tokens(4096, head, MEMORY[card.name], recompute)) for recompute in (False, True)),
            ]
        )  # fmt: skip
    yield table(
        f"8B to 1.2B: GFLOP per token, milliseconds of a step of {TOKENS} tokens, 100 billion tokens",
        "loss, length | teacher | student | loss | teacher, ms | student, ms | loss, ours, ms | loss, usual, ms "
        "| share, ours | share, usual | card-hours | 8 cards, days | 64 cards, days | 512 cards, days | usual / ours",
        times,
    )
    yield table(
        "8B to 1.2B: memory of the loss beyond inputs and gradients, and the tokens that fit one card, length 4096",
        f"loss | KB per token | GiB at 8192 tokens | GiB at {TOKENS} tokens | tokens that fit | with layers recomputed",
        memory,
    )

    rows = []
    for length in (4096, 8192):
        seconds = llama_seconds("kl_div", length, card, mfu)
        logits = cost.linear_logits("kl_div", TOKENS, *sizes, torch.bfloat16).steps[1]  # the teacher's logits
        saved = LLAMA_8B.flops(TOKENS // length, length) + logits.flops
        runs = seconds.step, seconds.teacher + logits.seconds(card), seconds.student + cached_seconds(card)
        rate, entry = TOKENS / runs[2], TOP_K * ENTRY
        rows.append(
            [
                str(length), float(entry), entry * CORPUS / 1e12, rate, rate * entry / 1e6, 512 * rate * entry / 1e9,
                saved / TOKENS / 1e9, *(x * CORPUS / TOKENS / 3600 for x in runs),
            ]
        )  # fmt: skip
    yield table(
        f"8B to 1.2B: the {TOP_K} likeliest classes of each token from a cache instead of the teacher",
        "length | bytes per token | TB | tokens/s per card | MB/s per card | GB/s of 512 cards | GFLOP saved per token "
        "| card-hours, teacher online | to write the cache | from the cache",
        rows,
    )

    rows = []
    seconds = llama_seconds("kl_div", 4096, card, mfu)
    # The most that is gathered at one time: both vocabulary weights during the loss, which are larger than any layer.
    vocabulary_weights = COPY * LLAMA_1B.vocabulary * (LLAMA_1B.width + LLAMA_8B.width)
    for cards in (1, 8, 64, 512):
        student, teacher = STATE * LLAMA_1B.parameters / cards, COPY * LLAMA_8B.parameters / cards
        if cards == 1:
            student = (STATE + COPY) * LLAMA_1B.parameters
        # The student is gathered for forward and backward and its float32 gradients are scattered; the teacher is
        # gathered once.
        moved = (2 * COPY + 4) * LLAMA_1B.parameters + COPY * LLAMA_8B.parameters
        gather = gather_seconds(moved, cards, card.name)
        rows.append(
            [
                str(cards), student / 2**30, teacher / 2**30, vocabulary_weights * (cards > 1) / 2**30,
                our_head_memory(LLAMA_1B, TOKENS) / 2**30, moved * (cards > 1) / 1e9, gather * 1e3,
                seconds.step * 1e3, gather / seconds.step * TOKENS,
            ]
        )  # fmt: skip
    yield table(
        "8B to 1.2B: both models sharded over the cards, GiB per card and bytes per step, length 4096",
        "cards | student | teacher | gathered | loss, ours | GB moved | ms | step, ms | hidden from tokens per card",
        rows,
    )

    rows = []
    for kind in ("kl_div", "jsd"):
        for shards in (8, 64):
            sent, gathered = vocabulary_parallel(kind, shards), gathered_logits()
            memory = our_head_memory(replace(LLAMA_1B, vocabulary=LLAMA_1B.vocabulary // shards), TOKENS)
            rows.append(
                [
                    f"{kind}, {shards}", sent / 1e6, gathered / 1e6,
                    gather_seconds(sent, shards, card.name) * 1e3, gather_seconds(gathered, shards, card.name) * 1e3,
                    llama_seconds(kind, 4096, card, mfu).ours / shards * 1e3, memory / 2**30,
                ]
            )  # fmt: skip
    yield table(
        "8B to 1.2B: the vocabulary sharded over cards that share their rows, bytes and milliseconds of a step",
        "loss, cards | MB, ours | MB, logits gathered | ms, ours | ms, logits gathered | loss computes, ms "
        "| loss holds, GiB",
        rows,
    )


# -- the check ---------------------------------------------------------------------------------------------


def fastest(run: Callable[[], object], rounds: int = 3) -> float:
    """Returns the seconds of the fastest of a few runs, after a warm-up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def this_cpu() -> cost.Card:
    """Measures the rates of one thread: large products and a large copy."""
    rates = {}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(2048, 2048, dtype=dtype)
        rates[dtype] = 2 * 2048**3 / fastest(lambda a=a: a @ a)
    x = torch.randn(1 << 26)
    y = torch.empty_like(x)
    memory = 2 * x.nbytes / fastest(lambda: y.copy_(x))
    return cost.Card("CPU", "measured", memory, inf, rates[torch.float32], rates[torch.float64], inf, 0)


def saved_bytes(run: Callable[[], object], parameters: Iterator[Tensor]) -> int:
    """Returns the bytes that autograd keeps for the backward, without the parameters."""
    known, sizes = {_storage(p) for p in parameters}, {}

    def pack(x: Tensor) -> Tensor:
        if _storage(x) not in known:
            sizes[_storage(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = run()
    del alive
    return sum(sizes.values())


def forward_peak(loss: Callable[[], Tensor]) -> int:
    """Returns the peak of the forward, which is the inner losses' peak: the backward releases memory as it goes."""
    with Count() as count:
        loss()
    return count.peak()


def measured_peak(loss: Callable[[], Tensor]) -> int:
    return measure.peak_bytes(lambda: [loss()])[0]


def gradients(loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(loss(), inputs)


def bert(model: Model, attention: str = "sdpa"):  # type: ignore[no-untyped-def]
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=model.vocabulary, hidden_size=model.width, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, intermediate_size=model.ffn, attn_implementation=attention,
        attention_probs_dropout_prob=0.1 if attention == "eager" else 0.0,  # the CPU's flash attention has no dropout
    )  # fmt: skip
    return BertModel(config)


def check() -> str:
    """Compares predictions and measurements of BERT-base and TinyBERT-4, on one thread in float32."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    card = this_cpu()
    rows = []

    def compare(what: str, unit: str, scale: float, predicted: float, found: float) -> None:
        rows.append([what, unit, predicted / scale, found / scale, predicted / found])

    teacher, student, stored = bert(BERT_BASE).eval(), bert(TINYBERT_4), bert(TINYBERT_4, "eager")
    for batch, length in ((8, 128), (2, 512)):
        shape, ids = f"{batch} x {length}", torch.randint(0, 30522, (batch, length))
        with torch.no_grad():
            found = fastest(lambda ids=ids: teacher(ids), 2)
        compare(f"teacher forward, {shape}", "ms", 1e-3, BERT_BASE.flops(batch, length) / card.float32, found)
        found = fastest(lambda ids=ids: student(ids).last_hidden_state.sum().backward(), 2)
        compare(f"student step, {shape}", "ms", 1e-3, 3 * TINYBERT_4.flops(batch, length) / card.float32, found)
        for model, matrices in ((student, False), (stored, True)):
            found = saved_bytes(lambda model=model, ids=ids: model(ids).last_hidden_state, model.parameters())
            predicted = batch * length * TINYBERT_4.activations(length, stored=matrices, size=4, mask=4)
            kind = "matrices stored" if matrices else "flash"
            compare(f"student's activations, {kind}, {shape}", "MiB", 2**20, predicted, found)
        sizes = TINYBERT_4, BERT_BASE, batch, length
        inputs = inner_inputs(*sizes, torch.float32, "cpu")
        ours = sum(c.floor(card) for c in our_inner(*sizes, torch.float32)), our_inner_memory(*sizes, 4)
        theirs = (
            usual_inner(*sizes, torch.float32)[0].floor(card),
            forward_peak(partial(inner_loss, *inner_inputs(*sizes, torch.float32, "meta"), eager)),
        )
        for name, ops, (seconds, nbytes) in (("ours", fastdistill, ours), ("usual", eager, theirs)):
            loss = partial(inner_loss, *inputs, ops)
            compare(
                f"losses, {name}, {shape}", "ms", 1e-3, seconds, fastest(partial(gradients, loss, learned(*inputs)))
            )
            compare(f"losses' memory, {name}, {shape}", "MiB", 2**20, nbytes, measured_peak(loss))
    small = replace(LLAMA_1B, width=64), replace(LLAMA_8B, width=128)
    for kind in ("kl_div", "jsd"):
        predicted = forward_peak(usual_head(kind, *small, 64)[0])
        found = measured_peak(usual_head(kind, *small, 64, "cpu")[0])
        compare(f"usual linear_{kind}'s memory, 64 x 128256", "MiB", 2**20, predicted, found)
    rates = f"{card.float32 / 1e9:.0f} GFLOP/s in float32, {card.float64 / 1e9:.0f} in float64, "
    head = "what | unit | predicted | measured | predicted / measured"
    return table(f"Check. This CPU, one thread: {rates}{card.memory / 1e9:.1f} GB/s", head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", default="H200", choices=list(cost.CARDS))
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the card's 16-bit rate that the models reach")
    parser.add_argument("--check", action="store_true", help="compare the model with this CPU instead")
    options = parser.parse_args()
    if options.check:
        print(check())
        return 0
    card = cost.CARDS[options.card]
    print(f"Modelled, not measured. {card.name}, models at {options.mfu:.0%} of {card.bits16 / 1e12:.0f} TFLOP/s.\n")
    for of in (bert_tables, llama_tables):
        for text in of(card, options.mfu):
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
