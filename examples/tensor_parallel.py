"""Distils with both vocabularies sharded over two processes (tensor parallelism), and with FSDP2 over the others:

torchrun --nproc-per-node 4 examples/tensor_parallel.py
"""

import os

import torch
import torch.distributed as dist
from tiny import language_models, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers.distributed import DistributedConfig

from fastdistill.integrations import causal_lm_loss

STUDENT, TEACHER = language_models()  # replace by names or folders: "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"

processes = int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
parallel = {}
if processes > 1:
    parallel["distributed_config"] = DistributedConfig(tp_size=2, tp_plan="auto", fsdp_size=processes // 2)
student = AutoModelForCausalLM.from_pretrained(STUDENT, **parallel).train().to(device)
teacher = AutoModelForCausalLM.from_pretrained(TEACHER, **parallel).eval().to(device)
optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
collator = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
copies, copy = max(processes // 2, 1), int(os.environ.get("RANK", 0)) // 2  # two neighbours share their rows
loader = torch.utils.data.DataLoader(rows(tokenizer)[copy::copies], batch_size=4, collate_fn=collator)

# [distil]
for batch in loader:
    batch = batch.to(device)
    num_items = (batch["labels"][:, 1:] != -100).sum()
    if processes > 1:
        dist.all_reduce(num_items)  # counts each row twice
        num_items = num_items / 2
    loss = causal_lm_loss(student, teacher, batch, alpha=0.5, num_items=num_items / copies)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
# [end]
