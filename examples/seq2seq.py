"""Distils an encoder-decoder in transformers' Seq2SeqTrainer: python examples/seq2seq.py [bart | t5]"""

import sys

import torch
from tiny import encoder_decoders, pairs
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from fastdistill import kl_div

FAMILY = sys.argv[1] if len(sys.argv) > 1 else "t5"
STUDENT, TEACHER = encoder_decoders(FAMILY)  # replace by names or folders: "google-t5/t5-small", "google-t5/t5-base"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
student = AutoModelForSeq2SeqLM.from_pretrained(STUDENT)
teacher = AutoModelForSeq2SeqLM.from_pretrained(TEACHER).eval()
args = Seq2SeqTrainingArguments("output", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
                                report_to=[], save_strategy="no")  # fmt: skip
collator = DataCollatorForSeq2Seq(tokenizer, model=student)  # pads labels with -100, and shifts them for the decoder
rows = pairs(tokenizer)


# [distil]
class Distiller(Seq2SeqTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")  # with them both models would compute a loss of their own
        with torch.no_grad():
            target = teacher(**inputs).logits  # (B, decoder positions, V)
        outputs = model(**inputs)
        if num_items_in_batch is not None:  # the labels of the whole step; the gradients of the processes are averaged
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        how = {"alpha": 0.5, "temperature": 2.0, "t_squared": True}
        loss = kl_div(outputs.logits, target, labels=labels, num_items=num_items_in_batch, **how)
        return (loss, outputs) if return_outputs else loss


trainer = Distiller(student, args, train_dataset=rows, data_collator=collator)
trainer.model_accepts_loss_kwargs = True  # Trainer then counts the labels of a step, other than -100
teacher.to(args.device)
trainer.train()
# [end]
