"""causal_lm_loss with PEFT's adapters, against float64 on full logits of the same PEFT model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _causal import OPTIONS, WIDE, assert_right, chats, gradients, language_model, padded, right_sum
from torch import nn

from fastdistill.integrations import causal_lm_loss
from fastdistill.train.heads import head_of

peft = pytest.importorskip("peft")
BATCH = padded(chats())


def check(student: Any, bound: float = 1e-4) -> None:
    """Compares the loss and the gradient of every trained parameter."""
    teacher = language_model(**WIDE).eval()
    right, right_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    student.zero_grad()
    loss = causal_lm_loss(student, teacher, BATCH, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [BATCH])
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right), bound)


def linear(student: Any) -> nn.Linear | None:
    return head_of(student, {"input_ids": BATCH["input_ids"]}).linear


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options})


LORA: dict[str, dict[str, Any]] = {
    "inside": {"target_modules": "all-linear"},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", LORA)
def test_lora(kind: str, tied: bool) -> None:
    if tied and kind == "head-saved":
        pytest.skip("a copy of the head is not tied to the embeddings")
    student = peft.get_peft_model(language_model(tie_word_embeddings=tied), lora(**LORA[kind]))
    assert (linear(student) is None) == (kind == "on-the-head" or (kind == "tokens" and tied))
    check(student)


OTHERS: dict[str, Any] = {
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_weights=False),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "llama-adapter": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters(kind: str) -> None:
    torch.manual_seed(0)
    student = peft.get_peft_model(language_model(), OTHERS[kind]())
    assert linear(student) is not None
    check(student)


def test_virtual_tokens_and_positions_are_refused() -> None:
    student = peft.get_peft_model(language_model(), OTHERS["prompt tuning"]())
    packed = {**BATCH, "position_ids": torch.arange(12).expand(4, 12)}
    with pytest.raises(ValueError, match=r"^batch has position_ids, and the model is a PEFT model with virtual tokens"):
        causal_lm_loss(student, language_model(**WIDE).eval(), packed)
    packed = {**BATCH, "cu_seq_lens_q": torch.tensor([0, 12])}
    with pytest.raises(ValueError, match=r"^batch has cu_seq_lens_q, and the model is a PEFT model with virtual"):
        causal_lm_loss(student, language_model(**WIDE).eval(), packed)


def test_adapters_that_change_between_calls() -> None:
    """The head that counts is that of the active adapter, at each call."""
    student = peft.get_peft_model(language_model(), lora(target_modules=["q_proj"]))
    check(student)
    student.add_adapter("saved", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    student.set_adapter("saved")
    with torch.no_grad():
        student.base_model.model.lm_head.modules_to_save["saved"].weight.mul_(1.5)
    check(student)
    with student.disable_adapter():
        assert linear(student) is student.base_model.model.lm_head.original_module
    student.add_adapter("on the head", lora(target_modules=["q_proj"], r=4))
    student.set_adapter("on the head")
    check(student)
    student.set_adapter("saved")
    check(student)


def test_a_lora_put_on_the_head_after_the_first_call() -> None:
    model = language_model()
    check(model)
    student = peft.get_peft_model(model, lora(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="builds the whole logits"):
        check(student)


def test_merged() -> None:
    student = peft.get_peft_model(language_model(), lora(target_modules=["q_proj", "lm_head"])).merge_and_unload()
    student.requires_grad_(True)
    assert linear(student) is not None
    check(student)


def test_the_base_as_teacher_of_its_adapters() -> None:
    """It is refused, and the advice of the error works."""
    base = language_model()
    copied = copy.deepcopy(base).eval()
    student = peft.get_peft_model(base, lora(target_modules=["q_proj"]))
    with student.disable_adapter(), pytest.raises(ValueError, match=r"copy\.deepcopy made beforehand \(before peft"):
        causal_lm_loss(student, student, BATCH)
    loss = causal_lm_loss(student, copied, BATCH)
    loss.backward()
    assert loss > 0
    assert gradients(student)
