"""Distils a causal language model in Lightning: python examples/lightning_module.py"""

import lightning
import torch
from tiny import language_models, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fastdistill.integrations import causal_lm_loss

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"


# [distil]
class Distiller(lightning.LightningModule):
    def __init__(self, student, teacher, learning_rate=1e-4):
        super().__init__()
        self.student, self.learning_rate = student, learning_rate
        self.frozen = [teacher.eval()]  # in a list, so that it is neither trained nor saved

    def on_fit_start(self):
        self.frozen[0].to(self.device)

    def training_step(self, batch):
        counted = (batch["labels"][:, 1:] != -100).sum()
        num_items = self.all_gather(counted).float().mean()  # DDP averages the gradients of the processes
        return causal_lm_loss(self.student, self.frozen[0], batch, alpha=0.5, num_items=num_items)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), self.learning_rate)


# [end]


if __name__ == "__main__":
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in (STUDENT, TEACHER))
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
    loader = torch.utils.data.DataLoader(rows(tokenizer), batch_size=4, collate_fn=collator)
    trainer = lightning.Trainer(max_steps=2, logger=False, enable_checkpointing=False)
    trainer.fit(Distiller(student.train(), teacher), loader)
