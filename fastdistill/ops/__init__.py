"""One file an op: its registration with torch.library, its autograd formula, its portable implementation."""
