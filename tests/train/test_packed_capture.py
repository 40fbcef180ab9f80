"""Tests that packed rows and sliding windows reach the attention losses as what they are, without a mask of L x L."""

from __future__ import annotations

from typing import Any

import _tiny
import pytest
import torch
from _oracle import error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening, Gemma3TextConfig, Gemma3TextModel, PreTrainedModel

from fastdistill.train.capture import LayerAttention, States, capturable, capture
from fastdistill.train.checks import check_packed
from fastdistill.train.objective import Objective

LENGTHS = (9, 3, 12, 1, 6)
# Windows are shorter than the longest sequence. Layers 2 and 3 of ModernBERT are local; so are 1 and 3 of Gemma 3.
WINDOWS = {
    "bert": {}, "llama": {}, "mistral": {1: (3, 0), 2: (3, 0), 3: (3, 0)},
    "gemma3": {1: (4, 0), 3: (4, 0)}, "modernbert": {2: (2, 2), 3: (2, 2)},
}  # fmt: skip
FAMILIES = tuple(WINDOWS)


def model(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    if family != "gemma3":
        made = _tiny.model(family, **options)
    else:
        config = Gemma3TextConfig(
            vocab_size=60, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, sliding_window=5, initializer_range=0.3, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], **options,
        )  # fmt: skip
        made = Gemma3TextModel(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, 60, (length,), generator=generator) for length in LENGTHS]


def packed(kind: str = "position_ids") -> dict[str, Any]:
    """Returns the sequences as one row, made by transformers' collator."""
    both = {"return_position_ids": kind != "cu_seq_lens", "return_flash_attn_kwargs": kind != "position_ids"}
    batch = DataCollatorWithFlattening(**both)([{"input_ids": x.tolist()} for x in sequences()])
    return {name: x for name, x in batch.items() if name != "labels"}


def is_allowed(layer: int, family: str, length: int) -> Tensor:  # (L, L)
    """Returns the dense mask of one sequence, by the definition."""
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    left, right = WINDOWS[family].get(layer, (length, length))
    allowed = (ahead >= -left) & (ahead <= right)
    return allowed if family in ("bert", "modernbert") else allowed & (ahead <= 0)


def scores(layer: LayerAttention) -> Tensor:  # (H, L, L) float64
    query, key = layer.query[0].double(), layer.key[0].double()
    return query @ key.repeat_interleave(len(query) // len(key), 0).mT * layer.scale


def truth(student: PreTrainedModel, teacher: PreTrainedModel, family: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Computes both losses from each sequence alone, in float64, over dense masks: sums over their items."""
    squares = kl = torch.zeros((), dtype=torch.float64)
    pairs = queries = 0
    for row in rows:
        with capturable(student, teacher):
            ours, theirs = (capture(x, {"input_ids": row[None]}, attention=[2, 3]) for x in (student, teacher))
        for i in (2, 3):
            allowed = is_allowed(i, family, len(row))
            a, b = scores(ours.attention[i]), scores(theirs.attention[i])
            if i == 2:
                squares = squares + ((a - b).square() * allowed).sum()
                pairs += a.shape[0] * int(allowed.sum())
            else:
                p, q = (x.masked_fill(~allowed, -1e300).log_softmax(-1) for x in (b, a))
                kl = kl + (p.exp() * (p - q) * allowed).sum()
                queries += a.shape[0] * len(row)
    return {"attention": squares / pairs, "relation": kl / queries}


def losses(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Computes MSE between layers 2 and KL between layers 3, as the terms of two methods do."""
    tinybert = Objective(student.config, teacher.config, terms=("attention",), layer_map=[None, None, 2, None])
    minilm = Objective(student.config, teacher.config, method="minilm", terms=("attention",))
    with capturable(student, teacher):
        states = capture(student, batch, attention=[2, 3])
        with torch.no_grad():
            target = capture(teacher, batch, attention=[2, 3])
    mask = batch.get("attention_mask")
    return {
        "attention": tinybert(states, target, mask=mask)["attention"],
        "relation": minilm(states, target, mask=mask)["attention"],
    }


def gradients(loss: Tensor, of: PreTrainedModel) -> Tensor:
    found = torch.autograd.grad(loss, list(of.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([x.flatten().double() for x in found if x is not None])


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_has_the_loss_of_its_sequences(family: str, kind: str) -> None:
    student, teacher = model(family), model(family, seed=1)
    found, expected = losses(student, teacher, packed(kind)), truth(student, teacher, family, sequences())
    for name, loss in expected.items():
        assert error(found[name], loss) < 1e-5, name
        assert error(gradients(found[name], student), gradients(loss, student)) < 1e-5, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_in_a_window_have_the_loss_of_each_alone(family: str, side: str) -> None:
    student, teacher, batch = model(family), model(family, seed=1), _tiny.batch(padded=side)
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found, expected = losses(student, teacher, batch), truth(student, teacher, family, rows)
    for name, loss in expected.items():
        assert error(found[name], loss) < 1e-5, name
        assert error(gradients(found[name], student), gradients(loss, student)) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_pairs_reaches_the_losses(family: str) -> None:
    with capturable(made := model(family)), torch.no_grad():
        row = capture(made, packed(), attention=[1, 2, 3])
        rows = capture(made, _tiny.batch(), attention=[1, 2, 3])
    for states, is_packed in ((row, True), (rows, False)):
        for i, layer in states.attention.items():
            assert layer.attn_mask is None
            assert layer.window == WINDOWS[family].get(i)
            assert layer.is_causal is (family not in ("bert", "modernbert"))
            assert (layer.cu_seqlens is not None) is is_packed
    assert row.attention[1].cu_seqlens.tolist() == [0, 9, 12, 24, 25, 31]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_has_the_states_of_each_sequence_alone(family: str) -> None:
    with capturable(made := model(family)), torch.no_grad():
        row = capture(made, packed(), hidden=[3], attention=[1]).hidden[3]
        alone = [capture(made, {"input_ids": x[None]}, hidden=[3]).hidden[3] for x in sequences()]
    assert error(row, torch.cat(alone, 1)) < 1e-5


class Largest(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("family", ["mistral", "modernbert", "bert"])
def test_no_tensor_of_a_packed_row_has_its_length_twice(family: str) -> None:
    count, length = 64, 16
    batch = {
        "input_ids": torch.arange(count * length)[None] % 60,
        "position_ids": torch.arange(count * length) % length,
    }
    batch["position_ids"] = batch["position_ids"][None]
    student = model(family).train()
    if family == "mistral":  # transformers' own mask, so the measure can see one
        with Largest() as plain:
            student(**batch, use_cache=False)
        assert plain.numel >= (count * length) ** 2
    with capturable(student), Largest() as lean:
        states = capture(student, batch, attention=[3])
        states.attention[3].query.sum().backward()
    assert lean.numel <= 100 * count * length  # (B, L, 2 * intermediate) is the largest tensor


def test_both_sides_must_read_the_same_sequences() -> None:
    student, teacher, batch = model("llama"), model("llama", seed=1), packed()
    objective = Objective(student.config, teacher.config, method="minilm", terms=("attention",))

    def states(of: PreTrainedModel, batch: dict[str, Any]) -> States:
        with capturable(of), torch.no_grad():
            return capture(of, batch, attention=[3])

    for other in ({"input_ids": batch["input_ids"]}, {**batch, "position_ids": torch.arange(31)[None] % 7}):
        with pytest.raises(ValueError, match=r"the student reads the row as 5 packed sequences, the teacher as [15]"):
            objective(states(student, batch), states(teacher, other))


def test_lengths_that_contradict_positions_are_refused() -> None:
    batch = {**packed("both"), "position_ids": torch.arange(31)[None]}
    with capturable(made := model("llama")), pytest.raises(ValueError, match="cu_seq_lens_q ends 5 sequences"):
        capture(made, batch, attention=[1])


def test_several_packed_rows_keep_their_mask() -> None:
    batch = {name: x.expand(2, -1) for name, x in packed().items()}
    with capturable(made := model("llama")), torch.no_grad():
        layer = capture(made, batch, attention=[1]).attention[1]
    assert layer.cu_seqlens is None
    assert layer.attn_mask is not None
    blocks = [torch.ones(length, length).tril() for length in LENGTHS]
    assert torch.equal(layer.attn_mask[1, 0], torch.block_diag(*blocks).bool())


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_several_packed_rows_of_a_bidirectional_model_are_refused(family: str) -> None:
    """transformers reads each row as one sequence; `packed` alone is taken apart."""
    rows = {name: x.expand(2, -1) for name, x in packed().items()}
    with capturable(made := model(family)), torch.no_grad():
        for positions in (rows["position_ids"], packed()["position_ids"]):
            with pytest.raises(ValueError, match=r"2 packed rows.*reads the sequences of each as one; pack all"):
                capture(made, {**rows, "position_ids": positions}, attention=[1])
        padded = _tiny.batch(padded="left")
        mask = padded["attention_mask"]
        for filler in (0, 1):  # positions of padding are no sequence
            positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
            capture(made, {**padded, "position_ids": positions}, attention=[1])


def test_masks_that_are_more_than_packing_and_windows() -> None:
    with capturable(made := model("llama")), torch.no_grad():
        made.config.sliding_window = 4  # Llama's attention is told of none
        with pytest.raises(ValueError, match="LlamaAttention has a sliding window that only its mask would say"):
            capture(made, packed(), attention=[1])
        made.config.sliding_window, made.config.attention_chunk_size = None, 4
        layer = capture(made, packed(), attention=[1]).attention[1]
    assert layer.cu_seqlens is None
    assert layer.attn_mask is not None


def test_the_trainer_packs_bidirectional_models_whose_positions_count_from_zero() -> None:
    for family in ("bert", "modernbert", "distilbert"):
        with capturable(made := model(family)):
            check_packed(made, packed())
    with pytest.raises(ValueError, match="BertModel, which is bidirectional, reads the sequences of a row as one"):
        check_packed(model("bert"), packed())
    rows = {name: x.expand(2, -1) for name, x in packed().items()}
    with capturable(made := model("bert")), pytest.raises(ValueError, match="all sequences of a batch into one row"):
        check_packed(made, rows)
    with capturable(made := model("roberta")), pytest.raises(ValueError, match=r"RobertaModel.*not count.* from 0"):
        check_packed(made, packed())
