"""One file an op: its registration with torch.library, its autograd formula, its portable implementation.

The Triton kernels are imported as `fastdistill.kernels`. In the repository they stand in `kernels/` at the top; the
top-level name `kernels` belongs to another distribution, which transformers imports.
"""
