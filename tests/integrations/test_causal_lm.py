"""causal_lm_loss against float64 on full logits: model families, inputs, options, heads, refusals."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers
from _causal import (
    ALPHA,
    CLASSES,
    FAMILIES,
    OPTIONS,
    TEMPERATURE,
    WIDE,
    assert_right,
    chats,
    check,
    divergence,
    gradients,
    language_model,
    one_by_one,
    padded,
    right_sum,
)  # fmt: skip
from torch import Tensor, nn

from fastdistill.integrations import causal_lm_loss
from fastdistill.train import causal_lm
from fastdistill.train.checks import check_shared
from fastdistill.train.heads import head_of

PROBE = {"input_ids": torch.ones(1, 2, dtype=torch.long)}

# -- families, inputs, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_logits(family: str, tied: bool) -> None:
    student = language_model(family, tie_word_embeddings=tied)
    teacher = language_model(family, **WIDE).eval()
    assert head_of(student, PROBE).linear is not None
    check(student, teacher, padded(chats()), one_by_one(chats()))


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama"])
def test_left_padding(family: str) -> None:
    check(language_model(family), language_model(family, **WIDE).eval(), padded(chats(), "left"), one_by_one(chats()))


def test_left_padding_where_a_wrapper_replaced_the_forward() -> None:
    """accelerate gives the model a forward of its own, from whose signature no argument can be read."""
    student = language_model("GPT2")
    forward = student.forward
    student.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    loss = causal_lm_loss(student, language_model("GPT2", **WIDE).eval(), padded(chats(), "left"))
    right = causal_lm_loss(language_model("GPT2"), language_model("GPT2", **WIDE).eval(), padded(chats()))
    assert abs(loss - right) < 1e-5 * right


def test_a_pair_is_checked_once_and_another_teacher_again(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = language_model("Llama"), language_model("Llama").eval()
    shared = copy.deepcopy(teacher)
    shared.get_input_embeddings().weight = student.get_input_embeddings().weight
    visits: list[Any] = []
    monkeypatch.setattr(causal_lm, "check_shared", lambda s, t: (visits.append(t), check_shared(s, t)))
    for _ in range(2):
        causal_lm_loss(student, teacher, padded(chats()))
        assert visits == [teacher]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^teacher shares"):
            causal_lm_loss(student, shared, padded(chats()))
    with pytest.raises(ValueError, match=r"^teacher is in training mode"):
        causal_lm_loss(student, teacher.train(), padded(chats()))


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "kl", "reverse": True},
        {"divergence": "kl", "skew": 0.3},
        {"divergence": "kl", "skew": 0.3, "reverse": True},
        {"divergence": "jsd", "beta": 0.3},
        {"divergence": "tvd"},
        {"divergence": "soft_cross_entropy"},
    ],
    ids=str,
)
def test_divergences(options: dict[str, Any]) -> None:
    check(language_model(), language_model(**WIDE).eval(), padded(chats()), **options)


@pytest.mark.parametrize("family", ["Llama", "odd"])
def test_item_weights(family: str) -> None:
    """The weight at `i` belongs to the loss whose target is the label at `i`."""
    student = odd(language_model()) if family == "odd" else language_model()
    weights = torch.rand(4, 12, generator=torch.Generator().manual_seed(4)) * (torch.arange(12) % 3 > 0)
    check(student, language_model(**WIDE).eval(), padded(chats()), item_weights=weights)


def test_a_mixture_of_experts_adds_its_balance() -> None:
    """The auxiliary loss of the model, with its coefficient, as the model adds it to a loss of its own."""
    options = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    student, teacher = (language_model("Mixtral", **options, **how) for how in ({}, WIDE))
    student.set_experts_implementation("eager")
    teacher.set_experts_implementation("eager")
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher.eval()).double()
    batch = padded(chats())
    loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [batch])
    balance = right(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    expected = total / count + 0.5 * balance
    expected.backward()
    assert_right(loss, gradients(student), expected, gradients(right))


def test_the_balance_of_micro_batches_is_their_mean() -> None:
    """With num_items the auxiliary loss of a micro-batch weighs as many positions as count in it."""
    options = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    student, teacher = language_model("Mixtral", **options), language_model(**WIDE).eval()
    student.set_experts_implementation("eager")
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in chats(2)])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in chats(2)])[None],
        "labels": torch.cat([row["labels"] for row in chats(2)])[None],
    }
    batches = [padded(chats(3, seed=8)), packed]
    number = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = causal_lm_loss(student, teacher, batch, num_items=number, **OPTIONS)
        part.backward()
        loss += part.detach()
    expected = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total, count = right_sum(right, right_teacher, [batch])
        balance = right(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False).aux_loss
        expected = expected + (total + count * 0.5 * balance) / number
    expected.backward()
    assert_right(loss, gradients(student), expected, gradients(right))


@pytest.mark.parametrize("kind", ["position_ids", "flash_attn_kwargs", "seq_idx"])
def test_packed_rows(kind: str) -> None:
    """transformers' collator says in one of three ways where the sequences begin."""
    rows = chats()
    options = {"return_position_ids": False, f"return_{kind}": True}
    collator = transformers.DataCollatorWithFlattening(**options)
    packed = dict(collator([{name: row[name].tolist() for name in ("input_ids", "labels")} for row in rows]))
    check(language_model(), language_model(**WIDE).eval(), packed, one_by_one(rows))


def test_without_labels_every_token_with_a_successor_counts() -> None:
    student, teacher = language_model(), language_model(**WIDE).eval()
    batch = padded(chats())
    labelled = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    del batch["labels"]
    assert torch.equal(causal_lm_loss(student, teacher, batch), causal_lm_loss(student, teacher, labelled))
    packed = {"input_ids": torch.arange(3, 9)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    starts = {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)}  # says the same as position_ids
    numbers = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)}  # and so does this
    apart = [{"input_ids": torch.arange(3, 6)[None]}, {"input_ids": torch.arange(6, 9)[None]}]
    mean = sum(causal_lm_loss(student, teacher, row) for row in apart) / 2
    ids = {"input_ids": packed["input_ids"]}
    for batch in (packed, {**ids, **starts}, {**ids, **numbers}, {**packed, "labels": None}):
        assert torch.allclose(causal_lm_loss(student, teacher, batch), mean, rtol=1e-5)


def test_nothing_counts() -> None:
    student, batch = language_model(), padded(chats())
    loss = causal_lm_loss(
        student, language_model(**WIDE).eval(), {**batch, "labels": torch.full_like(batch["labels"], -100)}
    )
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in student.parameters())


def test_vocabularies_padded_to_two_sizes() -> None:
    student, teacher = language_model(vocab_size=CLASSES + 7), language_model(vocab_size=CLASSES + 3, **WIDE).eval()
    batch = padded(chats())
    loss = causal_lm_loss(student, teacher, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    log_s, log_t = (
        model(**inputs).logits[:, :-1][counted].double()[:, : CLASSES + 3].log_softmax(-1)
        for model in (student, teacher)
    )
    assert abs(loss - divergence(log_s, log_t, "kl").mean()) < 1e-5 * loss


def cached(teacher: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with 6 classes a row; some rows have fewer, and one that would count has none."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs, indices = teacher(**inputs).logits.detach().log_softmax(-1).topk(6)
    logprobs[:, ::2, 4:] = -torch.inf
    logprobs[0, 8] = -torch.inf
    assert batch["labels"][0, 9] != -100
    return {**batch, "topk_logprobs": logprobs, "topk_indices": indices}


def right_cached(student: Any, batch: dict[str, Tensor], kind: str, weights: Tensor) -> tuple[Tensor, int]:
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, i in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        listed = batch["topk_logprobs"][b, i].isfinite()
        if not listed.any():
            continue
        classes = batch["topk_indices"][b, i][listed]
        log_t = (batch["topk_logprobs"][b, i][listed].double() / TEMPERATURE).log_softmax(-1)
        if kind == "reverse":  # both sides have the listed classes alone
            log_s = (logits[b, i][classes] / TEMPERATURE).log_softmax(-1)
            soft = (log_s.exp() * (log_s - log_t)).sum()
        else:
            log_s = (logits[b, i] / TEMPERATURE).log_softmax(-1)[classes]
            soft = (log_t.exp() * ((log_t if kind == "kl" else 0) - log_s)).sum()
        hard = nn.functional.cross_entropy(logits[b, i], batch["labels"][b, i + 1])
        total = total + weights[b, i + 1] * (ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard)
        count += 1
    return total, count


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy", "reverse"])
@pytest.mark.parametrize("num_items", [None, 7, 7.5, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_cached_teacher(kind: str, num_items: Any, weighted: bool) -> None:
    student, teacher = language_model(), language_model(**WIDE).eval()
    right, batch = copy.deepcopy(student).double(), cached(teacher, padded(chats()))
    weights = torch.rand(4, 12, generator=torch.Generator().manual_seed(4)) if weighted else torch.ones(4, 12)
    options = {"divergence": "kl", "reverse": True} if kind == "reverse" else {"divergence": kind}
    options |= {"item_weights": weights} if weighted else {}
    loss = causal_lm_loss(student, None, batch, num_items=num_items, **OPTIONS, **options)
    loss.backward()
    total, count = right_cached(right, batch, kind, weights)
    expected = total / (count if num_items is None else num_items)
    expected.backward()
    assert_right(loss, gradients(student), expected, gradients(right))


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy", "reverse"])
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=str)
def test_a_cached_teacher_where_nothing_counts(kind: str, num_items: Any) -> None:
    options = {"divergence": "kl", "reverse": True} if kind == "reverse" else {"divergence": kind}
    student, batch = language_model(), cached(language_model(**WIDE).eval(), padded(chats()))
    for nothing in (
        {"labels": torch.full_like(batch["labels"], -100)},
        {"topk_logprobs": torch.full_like(batch["topk_logprobs"], -torch.inf)},
    ):
        loss = causal_lm_loss(student, None, {**batch, **nothing}, num_items=num_items, **OPTIONS, **options)
        loss.backward()
        assert loss.item() == 0
        assert all(not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "jsd"}, r"^divergence is 'jsd'; a cached teacher has 'kl' and 'soft_cross_entropy'"),
        ({"divergence": "tvd"}, r"^divergence is 'tvd'; a cached teacher has 'kl' and 'soft_cross_entropy'"),
        ({"skew": 0.1}, r"^skew is 0\.1; a cached teacher has none: pass a teacher, or leave skew at 0\.0"),
    ],
    ids=str,
)
def test_what_a_cached_teacher_does_not_have(options: dict[str, Any], message: str) -> None:
    batch = {**padded(chats()), "topk_logprobs": torch.zeros(4, 12, 1), "topk_indices": torch.zeros(4, 12, 1).long()}
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(language_model(), None, batch, **options)


def test_parts() -> None:
    student, teacher, batch = language_model(), language_model(**WIDE).eval(), padded(chats())
    parts = causal_lm_loss(student, teacher, batch, return_parts=True, **OPTIONS)
    assert torch.equal(parts.loss, causal_lm_loss(student, teacher, batch, **OPTIONS))
    mixed = ALPHA * TEMPERATURE**2 * parts.soft + (1 - ALPHA) * parts.hard
    assert abs(parts.loss - mixed) < 1e-5 * mixed
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_s = student(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
    assert abs(parts.entropy + (log_s.exp() * log_s).sum(-1).mean()) < 1e-5 * parts.entropy
    assert parts.loss.requires_grad
    assert not any(x.requires_grad for x in parts[1:])


# -- heads that are more than a product --------------------------------------------------------------------------


class OddHead(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.sin(x).sum(-1, keepdim=True) * torch.arange(CLASSES) / CLASSES


def odd(model: Any) -> Any:
    model.lm_head = OddHead(model.lm_head)
    return model


@pytest.mark.parametrize("odd_teacher", [False, True])
def test_an_unknown_head_takes_the_logits(odd_teacher: bool) -> None:
    teacher = language_model(**WIDE).eval()
    check(odd(language_model()), odd(teacher) if odd_teacher else teacher, padded(chats()))


def test_an_unknown_transform_of_the_logits_is_seen() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * torch.linspace(0.5, 1.5, output.logits.shape[-1])
            return output

    plain = language_model()
    student = Shifted(plain.config)
    student.load_state_dict(plain.state_dict())
    assert head_of(student, PROBE).linear is None
    check(student, language_model(**WIDE).eval(), padded(chats()))


class Scaled(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.lm_head_multiplier
        return output


def like(model: Any, kind: Any) -> Any:
    other = kind(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("value", [0.3, 5.0])
def test_a_scale_of_another_name(value: float) -> None:
    student = like(language_model(lm_head_multiplier=value), Scaled)
    assert head_of(student, PROBE).scale == value
    check(student, language_model(**WIDE).eval(), padded(chats()))


def test_a_softcap_that_the_model_does_not_apply() -> None:
    """Small logits look alike with and without it, so that the head is judged on large ones."""
    student = language_model(final_logit_softcapping=30.0, initializer_range=0.02)
    assert head_of(student, PROBE).softcap is None
    check(student, language_model(**WIDE).eval(), padded(chats()))


def test_a_look_at_the_head_changes_nothing() -> None:
    student = language_model(attention_dropout=0.5).train()
    student.model.norm.eval()
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    head_of(student, PROBE)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in student.modules()]
    assert "forward" not in vars(student.lm_head)
    seen: list[Any] = []
    student.model.register_forward_hook(lambda *_: seen.append(1))
    head_of(student, PROBE)
    assert not seen  # the second look remembers the first


def test_a_head_that_changes_after_the_first_call() -> None:
    student, teacher = language_model("Cohere"), language_model(**WIDE).eval()
    check(student, teacher, padded(chats()))
    student.logit_scale = student.config.logit_scale = 0.5
    student.zero_grad()
    check(student, teacher, padded(chats()))
    student.resize_token_embeddings(CLASSES + 3, mean_resizing=False)
    student.zero_grad()
    check(student, teacher, padded(chats()), vocab_size=CLASSES)
    student.lm_head = nn.Linear(16, CLASSES)
    student.zero_grad()
    check(copy.deepcopy(student), teacher, padded(chats()))
    check(odd(student), teacher, padded(chats()))


def test_a_model_is_not_kept_alive() -> None:
    student = language_model()
    causal_lm_loss(student, language_model(**WIDE).eval(), padded(chats()))
    gone = weakref.ref(student)
    del student
    gc.collect()
    assert gone() is None


def test_whole_logits_are_announced_once() -> None:
    student, teacher, batch = odd(language_model()), language_model(**WIDE).eval(), padded(chats())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            causal_lm_loss(student, teacher, batch)
    found = [str(x.message) for x in caught if "causal_lm_loss" in str(x.message)]
    assert len(found) == 1
    assert "builds the whole logits of LlamaForCausalLM" in found[0]
    assert "OddHead" in found[0]


# -- refused -----------------------------------------------------------------------------------------------------


def encoder_decoder() -> Any:
    config = transformers.T5Config(vocab_size=CLASSES, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def looking_ahead(kind: str) -> Any:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, kind)(getattr(transformers, kind).config_class(vocab_size=CLASSES, **small)).eval()


def sharing(student: Any) -> Any:
    teacher = language_model(layers=1).eval()
    if isinstance(student, transformers.LlamaForCausalLM):
        teacher.model.embed_tokens = student.model.embed_tokens
    return teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, r"^divergence is 'js'; it should be one of 'kl', 'jsd', 'tvd', 'soft_cross_entropy'"),
        ({"teacher": "student"}, r"^teacher is the student itself"),
        ({"teacher": "training"}, r"^teacher is in training mode.*teacher\.eval\(\)"),
        ({"teacher": None}, r"^teacher is None and batch has the columns.*topk_logprobs"),
        ({"student": nn.Linear(2, 2)}, r"^the model is a Linear; it should be a transformers model"),
        ({"student": nn.DataParallel(language_model())}, r"^the model is in nn\.DataParallel.*torchrun"),
        ({"student": encoder_decoder()}, r"^student is a T5ForConditionalGeneration, an encoder-decoder"),
        ({"student": "BertForMaskedLM"}, r"^student is a BertForMaskedLM, whose tokens attend those"),
        ({"student": "BertLMHeadModel"}, r"^student is a BertLMHeadModel.*is_decoder=True"),
        ({"student": "DebertaV2ForMaskedLM"}, r"^student is a DebertaV2ForMaskedLM.*a causal language"),
        ({"alpha": 1.5}, r"^alpha is 1\.5; it should be between 0 and 1"),
        ({"alpha": float("nan")}, r"^alpha is nan; it should be between 0 and 1"),
        ({"temperature": 0}, r"^temperature is 0; it should be a positive finite number"),
        ({"teacher": "sharing"}, r"^teacher shares model\.embed_tokens\.weight with the student.*copy\.deepcopy"),
        ({"beta": 0.1}, r"^beta is 0\.1 and divergence 'kl'; beta is an option of 'jsd' alone"),
        ({"divergence": "tvd", "reverse": True}, r"^reverse is True and divergence 'tvd'"),
        ({"divergence": "jsd", "skew": 0.1}, r"^skew is 0\.1 and divergence 'jsd'"),
        ({"item_weights": torch.ones(4, 11)}, r"^item_weights has shape \(4, 11\); it should be \(4, 12\)"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    student = change.pop("student", language_model())
    student = looking_ahead(student) if isinstance(student, str) else student
    teachers = {
        "student": student,
        "training": language_model(**WIDE).train(),
        None: None,
        "sharing": sharing(student),
        "": language_model(**WIDE).eval(),
    }
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(student, teachers[change.pop("teacher", "")], padded(chats()), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, 11, dtype=torch.long)}, r"^labels has shape \(4, 11\).*\(4, 12\).*shifted by one"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"^labels has shape \(4,\); it should be \(4, 12\)"),
        ({"input_ids": None}, r"^batch has the columns \['attention_mask', 'labels'\]; it should have input_ids"),
    ],
    ids=str,
)
def test_a_batch_that_is_refused(change: dict[str, Any], message: str) -> None:
    batch = {name: x for name, x in {**padded(chats()), **change}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(language_model(), language_model(**WIDE).eval(), batch, alpha=0.5)


@pytest.mark.parametrize("kind", ["position_ids", "flash_attn_kwargs", "seq_idx"])
def test_a_model_that_reads_packed_rows_as_one_is_refused(kind: str) -> None:
    """With seq_idx too, which only Mamba's layers read."""
    collator = transformers.DataCollatorWithFlattening(**{"return_position_ids": False, f"return_{kind}": True})
    packed = collator([{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}])
    with pytest.raises(ValueError, match="OPTForCausalLM reads the sequences of a row as one; pack no rows"):
        causal_lm_loss(language_model("OPT"), language_model("OPT", **WIDE).eval(), packed)


def test_the_name_of_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^teacher is 'big/model'; it should be a model, as AutoModel.*from_pre"):
        causal_lm_loss(language_model(), "big/model", padded(chats()))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^student is 'small/model'; it should be a model"):
        causal_lm_loss("small/model", language_model(**WIDE).eval(), padded(chats()))  # type: ignore[call-overload]
