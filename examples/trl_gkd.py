"""Distils by generalised knowledge distillation in TRL's GKDTrainer: python examples/trl_gkd.py"""

from datasets import Dataset
from tiny import chats, language_models
from transformers import AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fastdistill.integrations.trl import GKDMixin

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
rows = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in chats()])
args = GKDConfig(
    "output", beta=0.5, lmbda=0.5, max_new_tokens=8, max_length=64, per_device_train_batch_size=4, max_steps=2,
    report_to=[], save_strategy="no", bf16=False,
)  # fmt: skip


# [distil]
class Distiller(GKDMixin, GKDTrainer):
    pass


trainer = Distiller(STUDENT, TEACHER, args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
# [end]
