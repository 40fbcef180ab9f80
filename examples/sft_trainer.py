"""Distils a chat model in TRL's SFTTrainer, on completions only: python examples/sft_trainer.py"""

from datasets import Dataset
from tiny import chats, language_models
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fastdistill.integrations.transformers import CausalLMDistillationMixin

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
student = AutoModelForCausalLM.from_pretrained(STUDENT)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
rows = Dataset.from_list(chats())  # {"prompt": [...], "completion": [...]}
args = SFTConfig("output", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no", bf16=False)


# [distil]
class Distiller(CausalLMDistillationMixin, SFTTrainer):
    pass


how = {"divergence": "kl", "alpha": 0.5, "temperature": 2.0}
trainer = Distiller(student, args, train_dataset=rows, processing_class=tokenizer, teacher=teacher, distillation=how)
trainer.train()
# [end]
