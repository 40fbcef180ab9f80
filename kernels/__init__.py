"""GPU kernels and their launchers: tensors in, tensors out. No autograd and no operator registration."""
