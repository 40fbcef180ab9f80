"""Distils a causal language model in a bare loop, on one process or on many, under DDP or FSDP2:

python examples/bare_loop.py
torchrun --nproc-per-node 2 examples/bare_loop.py ddp
torchrun --nproc-per-node 2 examples/bare_loop.py fsdp2
"""

import os
import sys

import torch
import torch.distributed as dist
from tiny import language_models, rows
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fastdistill.integrations import causal_lm_loss

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
student = AutoModelForCausalLM.from_pretrained(STUDENT).train().to(device)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER).eval().to(device)
if processes > 1:
    if not dist.is_initialized():
        dist.init_process_group()
    if sys.argv[1:] == ["fsdp2"]:
        for group in (*student.model.layers, student):
            fully_shard(group)
    else:
        student = DistributedDataParallel(student)
optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
loader = torch.utils.data.DataLoader(rows(tokenizer)[rank::processes], batch_size=4, collate_fn=collator)

# [distil]
for batch in loader:
    batch = batch.to(device)
    num_items = (batch["labels"][:, 1:] != -100).sum()
    if processes > 1:
        dist.all_reduce(num_items)
    loss = causal_lm_loss(student, teacher, batch, alpha=0.5, num_items=num_items / processes)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
# [end]
