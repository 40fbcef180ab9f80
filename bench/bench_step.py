"""Measures whole training steps: teacher forward, student forward and backward, AdamW; random weights, no padding."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

import fastdistill
from bench import eager, measure
from fastdistill.train.capture import capturable, capture
from fastdistill.train.objective import Objective

GPU = measure.DEVICE.type == "cuda"
TOKENS = 16384 if GPU else 1024  # of a step, unless one sequence is longer
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CHECKED = 2048  # tokens of the longest sequence compared with float64


def _kept_scores(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, scores=None, **kwargs):
    """Computes attention as TinyBERT's code does: it keeps the scores before the softmax for the loss."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    of_layer = query @ key.mT * scaling  # (B, H, L, L)
    if scores is not None:
        scores.append(of_layer)
    return (of_layer.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("kept_scores", _kept_scores)
AttentionMaskInterface.register("kept_scores", eager_mask)


def _usual_losses(student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, batch: dict) -> Tensor:
    student_scores: list[Tensor] = []
    teacher_scores: list[Tensor] = []
    with torch.no_grad():
        teacher_out = teacher(**batch, output_hidden_states=True, scores=teacher_scores)
    student_out = student(**batch, output_hidden_states=True, scores=student_scores)
    loss = torch.zeros((), device=measure.DEVICE)
    for i, target in objective.hidden.items():
        projected = objective.projections["shared"](student_out.hidden_states[i])
        loss = loss + F.mse_loss(projected, teacher_out.hidden_states[target])
    for i, target in objective.attention.items():
        loss = loss + F.mse_loss(student_scores[i - 1], teacher_scores[target - 1])
    return loss


def _our_losses(student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, batch: dict) -> Tensor:
    with torch.no_grad():
        targets = capture(
            teacher, batch, hidden=set(objective.hidden.values()), attention=set(objective.attention.values())
        )
    states = capture(student, batch, hidden=tuple(objective.hidden), attention=tuple(objective.attention))
    return torch.stack(list(objective(states, targets).values())).sum()


@pytest.mark.parametrize("length", [128, 512, *(pytest.param(n, marks=pytest.mark.full) for n in (2048, 8192))])
def bench_tinybert_general_step(measured, length):
    batch = max(TOKENS // length, 1)
    torch.manual_seed(0)
    teacher_config = BertConfig(max_position_embeddings=length, **DROPOUT)
    student_config = BertConfig(
        hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200,
        max_position_embeddings=length, **DROPOUT,
    )  # fmt: skip
    teacher = BertModel(teacher_config, add_pooling_layer=False).to(measure.DEVICE, measure.DTYPE).eval()
    student = BertModel(student_config, add_pooling_layer=False).to(measure.DEVICE, measure.DTYPE)
    objective = Objective(student_config, teacher_config).to(measure.DEVICE, measure.DTYPE)
    inputs = {"input_ids": torch.randint(1000, 30000, (batch, length), device=measure.DEVICE)}

    usual_student, usual_teacher, usual_objective = (copy.deepcopy(x) for x in (student, teacher, objective))
    for model in (usual_student, usual_teacher):
        model.set_attn_implementation("kept_scores")
    our_step = _step(_our_losses, student, teacher, objective, inputs)
    usual_step = _step(_usual_losses, usual_student, usual_teacher, usual_objective, inputs)

    def ours() -> list[Tensor]:
        with capturable(student, teacher):
            return our_step()

    case = measure.Case(
        "TinyBERT general step", {"batch": batch, "length": length, "tokens": batch * length},
        f"{batch} x {length} tokens, BERT-base to 4 layers of 312", list,
        lambda: _exact(_usual_losses, usual_student, usual_teacher, usual_objective, inputs, length),
    )  # fmt: skip
    # Kept: scores of 12 teacher layers, scores and softmax of 4 student layers, and a few of their gradients.
    scores = batch * 12 * length**2 * measure.DTYPE.itemsize
    measured(
        case,
        [
            measure.Implementation("fastdistill", ours),
            measure.Implementation("usual", usual_step, memory=24 * scores),
        ],
        measure.STEP,
    )


def _our_head(student: PreTrainedModel, teacher: PreTrainedModel, objective: None, batch: dict) -> Tensor:
    with torch.no_grad():
        target = teacher.model(**batch).last_hidden_state
    hidden = student.model(**batch).last_hidden_state
    return fastdistill.linear_kl_div(hidden, student.lm_head.weight, target, teacher.lm_head.weight)


def _usual_head(student: PreTrainedModel, teacher: PreTrainedModel, objective: None, batch: dict) -> Tensor:
    with torch.no_grad():
        target = teacher(**batch).logits
    return eager.kl_div(student(**batch).logits.flatten(0, 1), target.flatten(0, 1))


LLAMA = {"vocab_size": 128256, "head_dim": 64, "use_cache": False}
# On a GPU: Llama 3.1 8B to 3.2 1B. On a CPU: the same vocabulary, with bodies of two narrow layers.
TEACHER = LlamaConfig(
    **LLAMA | {"head_dim": 128}, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336,
) if GPU else LlamaConfig(
    **LLAMA, hidden_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1024
)  # fmt: skip
STUDENT = LlamaConfig(
    **LLAMA, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=8192, tie_word_embeddings=True,
) if GPU else LlamaConfig(
    **LLAMA, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
    tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "batch,length", [(2, 4096), pytest.param(1, 8192, marks=pytest.mark.full)] if GPU else [
        (1, 512), pytest.param(2, 512, marks=pytest.mark.full)
    ],
)  # fmt: skip
def bench_causal_lm_step(measured, batch, length):
    torch.manual_seed(0)
    with torch.device(measure.DEVICE):
        teacher, student = (LlamaForCausalLM._from_config(config, dtype=measure.DTYPE) for config in (TEACHER, STUDENT))
    teacher.eval().requires_grad_(False)
    inputs = {"input_ids": torch.randint(1000, 30000, (batch, length), device=measure.DEVICE)}
    usual_student = copy.deepcopy(student)
    tokens = batch * length
    case = measure.Case(
        "causal LM step", {"batch": batch, "length": length, "tokens": tokens},
        f"{batch} x {length} tokens, {TEACHER.hidden_size} to {STUDENT.hidden_size} wide, V 128256", list,
        lambda: _exact(_usual_head, student, teacher, None, inputs, tokens),
        memory=0 if GPU else 8 * tokens * 128256 * 8,
    )  # fmt: skip
    measured(
        case,
        [
            measure.Implementation("fastdistill", _step(_our_head, student, teacher, None, inputs)),
            measure.Implementation(
                "usual", _step(_usual_head, usual_student, teacher, None, inputs), memory=7 * tokens * 128256 * 4
            ),
        ],
        measure.STEP,
    )


def _step(losses, student: PreTrainedModel, teacher: PreTrainedModel, objective, batch: dict):
    """Returns a training step, a function that returns the loss and the gradients."""
    parameters = [*student.parameters(), *(objective.parameters() if objective is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)  # so small that the weights hardly change between measurements

    def step() -> list[Tensor]:
        loss = losses(student, teacher, objective, batch)
        loss.backward()
        optimizer.step()
        gradients = [x.grad for x in parameters if x.grad is not None]
        optimizer.zero_grad()
        return [loss.detach(), *gradients]

    return step


def _exact(losses, student, teacher, objective, batch, length) -> list[Tensor]:
    """Returns loss and gradients, computed the usual way in float64; nothing if that would take too long."""
    if length > CHECKED or teacher.num_parameters() > 1e9:
        return []
    student, teacher, objective = (
        copy.deepcopy(x).double() if x is not None else None for x in (student, teacher, objective)
    )
    parameters = [*student.parameters(), *(objective.parameters() if objective is not None else ())]
    loss = losses(student, teacher, objective, batch)
    loss.backward()
    return [loss.detach(), *(x.grad for x in parameters if x.grad is not None)]
