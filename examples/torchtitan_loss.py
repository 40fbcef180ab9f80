"""Distils in torchtitan's Trainer. torchtitan needs a GPU; its options go on the command line:

torchrun --nproc-per-node 1 examples/torchtitan_loss.py --model.name tiny --model.flavor student --training.steps 2
"""

import dataclasses

import torch
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
from torchtitan.train import Trainer, main

from fastdistill.integrations.torchtitan import DistillationMixin

VOCABULARY, LENGTH = 256, 16

# Replace these by sizes of your own, or use a spec of torchtitan's: --model.name llama3 --model.flavor 8B
SIZES = {
    "student": TransformerModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY, max_seq_len=LENGTH),
    "teacher": TransformerModelArgs(dim=64, n_layers=3, n_heads=2, vocab_size=VOCABULARY, max_seq_len=LENGTH),
}


class RandomTokens:
    """A data loader of torchtitan: batches of ({"input": tokens}, labels), the labels shifted by one."""

    def __init__(self, dp_rank, job_config, **_):
        self.rows, self.generator = job_config.training.local_batch_size, torch.Generator().manual_seed(dp_rank)

    def __iter__(self):
        while True:
            tokens = torch.randint(VOCABULARY, (self.rows, LENGTH + 1), generator=self.generator)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


# [distil]
class Distiller(DistillationMixin, Trainer):
    distillation = {"divergence": "kl", "alpha": 0.5, "temperature": 2.0}

    def build_teacher(self):
        teacher = Transformer(SIZES["teacher"])
        with torch.no_grad():
            teacher.init_weights()  # or teacher.load_state_dict(torch.load("teacher.pt"))
        return teacher.to(self.device)


# [end]


if __name__ == "__main__":
    spec = get_train_spec("llama3")
    tiny = {"model_args": SIZES, "build_tokenizer_fn": None, "build_dataloader_fn": RandomTokens}
    register_train_spec("tiny", dataclasses.replace(spec, **tiny))
    main(Distiller)
