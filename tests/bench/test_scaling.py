"""Compares the scaling model with known parameter counts, PyTorch's count of operations, and allocated memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import cost, scaling
from bench.scaling import BERT_BASE, LLAMA_1B, LLAMA_8B, TINYBERT_4, TINYBERT_6, Model


@pytest.mark.parametrize(
    ("model", "published"),
    [(BERT_BASE, 109.5e6), (TINYBERT_4, 14.35e6), (TINYBERT_6, 67.0e6), (LLAMA_8B, 8.03e9), (LLAMA_1B, 1.236e9)],
    ids=lambda x: x.name if isinstance(x, Model) else "",
)
def test_parameters_are_those_published(model: Model, published: float) -> None:
    assert model.parameters == pytest.approx(published, rel=1e-3)


def test_parameters_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    llama = Model("", 3, 32, 4, 56, 100, llama=True, key_heads=2)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56,
        vocab_size=100, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        assert llama.parameters == sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
        assert TINYBERT_4.parameters == sum(p.numel() for p in scaling.bert(TINYBERT_4).parameters())


def test_operations_are_those_of_a_bert_model() -> None:
    pytest.importorskip("transformers")
    model = Model("", 2, 32, 4, 56, 100)
    bert, ids = scaling.bert(model, "eager"), torch.randint(0, 100, (3, 16))
    with FlopCounterMode(display=False) as forward:
        bert(ids)
    assert forward.get_total_flops() == model.flops(3, 16)
    with FlopCounterMode(display=False) as both:
        bert(ids).pooler_output.sum().backward()
    assert both.get_total_flops() == 3 * model.flops(3, 16)


def test_activations_are_those_of_the_paper() -> None:
    """Equation 2 of arXiv 2205.05198 has 34 bytes per token and unit of width, and 5 per head and pair of tokens."""
    sums = 4 * BERT_BASE.heads
    assert BERT_BASE.layer_activations(512) - sums == 34 * 768
    assert BERT_BASE.layer_activations(512, stored=True) == 34 * 768 + 5 * 12 * 512


@pytest.mark.parametrize(("attention", "stored"), [("sdpa", False), ("eager", True)])
def test_activations_are_those_autograd_saves(attention: str, stored: bool) -> None:
    """On a CPU dropout keeps a float mask. The formula leaves out the statistics of LayerNorms and the pooler."""
    pytest.importorskip("transformers")
    model = Model("", 4, 64, 4, 256, 100)
    bert, ids = scaling.bert(model, attention), torch.randint(0, 100, (4, 32))
    found = scaling.saved_bytes(lambda: bert(ids).last_hidden_state, bert.parameters())
    assert 4 * 32 * model.activations(32, stored=stored, size=4, mask=4) == pytest.approx(found, rel=0.06)


def test_count_tracks_bytes_operations_and_releases() -> None:
    x = torch.zeros(1000, device="meta")
    with scaling.Count() as count:
        out = (x + 1) * (x + 2)
    assert count.peak() == 3 * 4000
    assert count.peak(without=[out]) == 2 * 4000
    assert sum(s.memory for s in count.steps) == 4000 * (2 + 2 + 3)
    with scaling.Count() as count:
        x.view(10, 100) @ x.view(100, 10).T.T
    assert [(s.memory, s.flops) for s in count.steps] == [(4000 + 4000 + 400, 2 * 10 * 100 * 10)]


def test_our_memory_is_linear_in_the_length_and_the_usual_quadratic() -> None:
    lengths = (512, 1024, 2048)
    ours = [scaling.our_inner_memory(TINYBERT_4, BERT_BASE, 4, n) for n in lengths]
    usual = [scaling.usual_inner(TINYBERT_4, BERT_BASE, 4, n)[1] for n in lengths]
    assert ours[2] < 2 * ours[1] < 4 * ours[0]
    assert usual[2] > 3.7 * usual[1] > 3.7**2 * 0.9 * usual[0]
    scores = 2 * 4 * 12 * 2048**2
    assert usual[2] > 2 * 4 * scores  # both sides of four layers
    assert ours[2] < scores


def test_memory_of_the_head_is_that_of_the_docs() -> None:
    """Our head takes 2.0 GiB at 8192 tokens (docs/kernels.md); the usual one grows by logits and log-probabilities."""
    assert scaling.our_head_memory(LLAMA_1B, 8192) / 2**30 == pytest.approx(2.0, abs=0.03)
    small = Model("", 1, 8, 1, 8, 10000, llama=True)
    few, more = (scaling.usual(*scaling.usual_head("kl_div", small, small, n))[1] for n in (100, 200))
    assert more - few >= 100 * 10000 * (2 + 2 + 4 + 4)
    assert scaling.our_head_memory(LLAMA_1B, 4096) - scaling.our_head_memory(LLAMA_1B, 2048) == 2048 * 4 * 2048


@pytest.mark.parametrize("kind", ["kl_div", "jsd"])
def test_counted_memory_is_what_is_allocated(kind: str) -> None:
    sizes = Model("", 1, 8, 1, 8, 10000, llama=True), Model("", 1, 16, 1, 8, 10000, llama=True), 64
    counted = scaling.forward_peak(scaling.usual_head(kind, *sizes)[0])
    allocated = scaling.measured_peak(scaling.usual_head(kind, *sizes, "cpu")[0])
    assert counted == pytest.approx(allocated, rel=0.01)


def test_gathers_take_the_time_of_links_and_network() -> None:
    nbytes = 1e9
    assert scaling.gather_seconds(nbytes, 1, "H200") == 0
    assert scaling.gather_seconds(nbytes, 8, "H200") == pytest.approx(7 / 8 * nbytes / 450e9)
    across = scaling.gather_seconds(nbytes, 16, "H200") - scaling.gather_seconds(nbytes, 8, "H200")
    assert across == pytest.approx(nbytes / 8 / 2 / 50e9)


@pytest.mark.parametrize("card", cost.CARDS)
def test_every_card_has_memory_and_links_and_prints(card: str) -> None:
    assert {card} <= scaling.MEMORY.keys() & scaling.LINK.keys()
    tables = [*scaling.llama_tables(cost.CARDS[card], 0.4)]
    assert len(tables) == 5
    assert all("nan" not in text and "inf" not in text for text in tables)


def test_more_tokens_fit_without_logits() -> None:
    def most(head, recompute: bool = False) -> int:
        return scaling.most_tokens(4096, head, scaling.MEMORY["H200"], recompute)

    usual = most(lambda n: 3e6 * n)
    ours = most(lambda n: scaling.our_head_memory(LLAMA_1B, n))
    assert 0 < usual < ours < most(lambda n: 0)
    assert most(lambda n: scaling.our_head_memory(LLAMA_1B, n), True) > 5 * ours
    assert most(lambda n: 1e18) == 0


def test_constants_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton", reason="the kernels need it")
    from fastdistill.kernels import attention_mse, linear_mse

    assert scaling.SUMMED == attention_mse.SUMMED
    assert scaling.RESIDUAL == linear_mse.CHUNK_BYTES


def test_a_sharded_vocabulary_moves_what_the_processes_send() -> None:
    """tests/_shards.py counts 8 numbers a row and, for JSD, two more; the hidden states' gradient is all-reduced."""
    tokens = 1024
    hidden = 2 * 4 * scaling.LLAMA_1B.width * tokens
    assert scaling.vocabulary_parallel("kl_div", 8, tokens) == hidden + 8 * 8 * 4 * tokens
    assert scaling.vocabulary_parallel("jsd", 8, tokens) == hidden + 8 * 8 * 4 * tokens + 2 * 2 * 4 * tokens
    assert scaling.gathered_logits(tokens) == hidden + 2 * 2 * 128256 * tokens
