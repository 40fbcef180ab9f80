"""Losses for SentenceTransformerTrainer, as plain modules; docs/in_your_trainer.md shows how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MSELoss
from torch import Tensor, nn

from fastdistill.functional import attention_mse, linear_mse

__all__ = ["EmbeddingMSELoss", "TokenSimilarityLoss"]


class EmbeddingMSELoss(MSELoss):
    """Computes the mean squared error between sentence embeddings and the teacher's, which the label column holds.

    It takes the arguments, columns and labels of sentence_transformers' MSELoss and has its value. With
    `projection_dim` the student's embeddings are projected to the teacher's width; the projection is `.projection`, and
    `save_projection` saves it. Its gradient is averaged over processes: DDP does so for the model alone.

    Raises:
        ValueError: the widths differ and there is no projection to the teacher's, and what MSELoss raises.
    """

    _is_equal = False  # whether the processes have the same projection

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], teacher_embeddings: list[Tensor]) -> Tensor:
        weight, bias = None, None
        if self.projection is not None:
            self._make_equal(self.projection)
            weight, bias = (_Averaged.apply(p) for p in (self.projection.weight, self.projection.bias))
        losses = []
        for student, teacher in zip(embeddings, teacher_embeddings, strict=True):
            projected, width = student.shape[-1] if weight is None else weight.shape[0], teacher.shape[-1]
            if projected != width:
                raise ValueError(
                    f"the labels have width {width}, and the student's embeddings, projected or not, {projected}; they "
                    f"should be equal: pass projection_dim={width}"
                )
            losses.append(linear_mse(student, weight, teacher.to(student.device), bias))
        return torch.stack(losses).mean()

    def _make_equal(self, projection: nn.Linear) -> None:
        if not self._is_equal and _processes() > 1:
            for p in projection.parameters():
                dist.broadcast(p.data, 0)
        self._is_equal = True


class TokenSimilarityLoss(nn.Module):
    """Computes the mean squared difference between the token similarities of the student and of a frozen teacher.

    The similarity of two tokens of one text is the dot product of their embeddings: `|| H_s H_s^T - H_t H_t^T ||^2` of
    similarity-preserving distillation (arXiv 1907.09682), over the pairs of tokens that are not padding, in time linear
    in their number. It compares any two widths without a projection. Labels are ignored.

    Args:
        model: the student.
        teacher: a model with the same tokenizer; it is frozen and put into eval mode.

    Raises:
        ValueError: the teacher is the student, or has another vocabulary; features of a flattened batch.
    """

    def __init__(self, model: SentenceTransformer, teacher: SentenceTransformer) -> None:
        super().__init__()
        if teacher is model:
            raise ValueError("teacher is the student itself; it should be another model or a deep copy of it")
        if model.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise ValueError(
                "teacher has another vocabulary than the student; tokens can be compared one by one only if it has the "
                "same: use EmbeddingMSELoss, which compares whole texts"
            )
        self.model = model
        self.teacher = teacher.requires_grad_(False).eval()

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        return torch.stack([self._column(features) for features in sentence_features]).mean()

    def _column(self, features: dict[str, Any]) -> Tensor:
        if "cu_seq_lens_q" in features:
            raise ValueError(
                "the texts of a batch are flattened into one row (cu_seq_lens_q); they should be padded: set "
                "model[0].unpad_inputs = False"
            )
        with torch.no_grad():
            teacher = self.teacher(dict(features))["token_embeddings"][:, None]  # (B, 1, L, d_t), one head
        student = self.model(dict(features))["token_embeddings"][:, None]  # (B, 1, L, d_s)
        mask = features["attention_mask"].bool()  # (B, L)
        return attention_mse(
            student, student, teacher, teacher, student_scale=1.0, teacher_scale=1.0, key_mask=mask, query_mask=mask
        )


class _Averaged(torch.autograd.Function):
    """Returns its input; averages the gradient over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if _processes() > 1:
            gradient = gradient.contiguous() / _processes()
            dist.all_reduce(gradient)
        return gradient


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
