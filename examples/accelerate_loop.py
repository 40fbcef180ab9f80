"""Distils a causal language model in a loop of your own: accelerate launch examples/accelerate_loop.py"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from tiny import language_models, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fastdistill.integrations import causal_lm_loss

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"
ACCUMULATE = 2

accelerator = Accelerator()
student = AutoModelForCausalLM.from_pretrained(STUDENT).train()
teacher = AutoModelForCausalLM.from_pretrained(TEACHER).eval().to(accelerator.device)
optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
loader = torch.utils.data.DataLoader(rows(tokenizer), batch_size=4, collate_fn=collator)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)

# [distil]
window = []  # the micro-batches of one step of the optimizer, whose tokens are counted first
for batch in loader:
    window.append(batch)
    if len(window) < ACCUMULATE:
        continue
    counted = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    num_items = accelerator.gather(counted).sum() / accelerator.num_processes
    for i, batch in enumerate(window):
        with accelerator.no_sync(student) if i + 1 < ACCUMULATE else nullcontext():
            loss = causal_lm_loss(student, teacher, batch, alpha=0.5, num_items=num_items)
            accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    window = []
# [end]
