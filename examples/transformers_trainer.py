"""Distils a causal language model in transformers' Trainer: python examples/transformers_trainer.py"""

from datasets import Dataset
from tiny import language_models, texts
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from fastdistill.integrations.transformers import CausalLMDistillationMixin

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
student = AutoModelForCausalLM.from_pretrained(STUDENT)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
rows = Dataset.from_dict(tokenizer(texts()))
args = TrainingArguments("output", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # labels: the tokens, -100 on padding


# [distil]
class Distiller(CausalLMDistillationMixin, Trainer):
    pass


how = {"divergence": "kl", "alpha": 0.5, "temperature": 2.0, "t_squared": True}
trainer = Distiller(student, args, train_dataset=rows, data_collator=collator, teacher=teacher, distillation=how)
trainer.train()
# [end]
