"""The public functions. Each checks its arguments, picks a backend and calls one op.

All of them share these rules:

- The student comes first, the teacher second. `*` is any number of leading dimensions, the same in every tensor of a
  call.
- Losses are computed in float32 (float64 for float64 inputs) whatever the dtype of the inputs, and are returned in it.
  Gradients have the dtype of the tensor they belong to. The teacher's side gets none.
- `mask` is bool, True = counts. Masked-out entries are ignored, even if they are NaN.
- `reduction`: "sum"; "mean" = sum / number of counted items, or / `num_items` where that is given, as gradient
  accumulation and data parallelism need it; "none" = per item. `num_items` is an int, a float or a 0-d tensor, which is
  never synchronised. If no item counts, the loss and the gradients are 0.
- Under `torch.autocast` the operands of a projection are cast as `nn.Linear` casts them; losses stay float32.
- Bad arguments raise ValueError or TypeError before any work. Differentiating twice raises RuntimeError, except with
  `backend="reference"`.
- `backend`: "auto" takes the best one that can run here. These can be forced, and raise where they cannot run:
  "reference" (eager definitions), "torch" (portable, memory-lean), "triton" (fused kernels, on NVIDIA and AMD GPUs),
  and for the losses on logits "cuda" (csrc/, on NVIDIA GPUs from sm_90 on; "auto" does not take it yet).
"""

from typing import TYPE_CHECKING

from . import attention, hidden, linear_logits, logits
from ._dispatch import pick_backend as pick_backend
from ._explain import explain_backends as explain_backends
from .attention import *  # noqa: F403
from .hidden import *  # noqa: F403
from .linear_logits import *  # noqa: F403
from .logits import *  # noqa: F403

if not TYPE_CHECKING:  # a type checker reads no list but a literal one; it takes the names from the imports above
    __all__ = [*attention.__all__, *hidden.__all__, *linear_logits.__all__, *logits.__all__]
