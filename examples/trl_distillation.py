"""Distils on the student's own completions in TRL's DistillationTrainer: python examples/trl_distillation.py"""

from datasets import Dataset
from tiny import chats, language_models
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from fastdistill.integrations.trl import DistillationMixin

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
prompts = Dataset.from_list(chats()).select_columns("prompt")
args = DistillationConfig(
    "output", beta=1.0, max_completion_length=8, per_device_train_batch_size=4, max_steps=2, report_to=[],
    save_strategy="no", bf16=False,
)  # fmt: skip


# [distil]
class Distiller(DistillationMixin, DistillationTrainer):
    pass


trainer = Distiller(STUDENT, TEACHER, args, train_dataset=prompts, processing_class=tokenizer)
trainer.train()
# [end]
