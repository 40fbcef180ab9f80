"""The losses inside other people's trainers. Each module imports the packages of its trainer, and nobody else does."""

from fastdistill.train.causal_lm import CausalLMLoss, causal_lm_loss

__all__ = ["CausalLMLoss", "causal_lm_loss"]
