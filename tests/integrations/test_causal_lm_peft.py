"""causal_lm_loss with PEFT's adapters, against float64 on full logits of the same PEFT model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from _causal import OPTIONS, WIDE, assert_right, chats, gradients, language_model, padded, right_sum

from fastdistill.integrations import causal_lm_loss

LORA: dict[str, dict[str, Any]] = {
    "inside": {"target_modules": "all-linear"},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", LORA)
def test_lora(kind: str, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    if tied and kind == "head-saved":
        pytest.skip("a copy of the head is not tied to the embeddings")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **LORA[kind])
    student = peft.get_peft_model(language_model(tie_word_embeddings=tied), config)
    teacher = language_model(**WIDE).eval()
    right, right_teacher, batch = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), padded(chats())
    loss = causal_lm_loss(student, teacher, batch, **OPTIONS)
    loss.backward()
    total, count = right_sum(right, right_teacher, [batch])
    (total / count).backward()
    assert_right(loss, gradients(student), total / count, gradients(right))
