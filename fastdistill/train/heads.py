"""Finds how a causal language model makes its logits, and puts a loss in the place of its head's forward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

__all__ = [
    "Head", "body", "evaluating", "head_of", "is_peft", "is_sharded", "refuse_virtual_tokens",
    "replaced", "takes_virtual_tokens", "unwrapped",
]  # fmt: skip

SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")  # factors or divisors in configs


class Head(NamedTuple):
    """How a model makes its logits: `cap * tanh(scale * (x @ W.T + b) / cap)`. `linear` is None if in another way."""

    linear: nn.Linear | None = None
    scale: float = 1.0
    softcap: float | None = None


def wrappers(model: Any) -> Iterator[Any]:
    """Yields the model, then what each wrapper holds: DDP, FSDP1 and DeepSpeed (`module`), torch.compile (`_orig_mod`),
    PEFT. The transformers model comes last."""
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "the model is in nn.DataParallel, whose copies would all use one head; it should be one model a "
                "process: start the script with torchrun or accelerate launch"
            )
        yield model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
            continue
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(
                f"the model is a {type(model).__name__}; it should be a transformers model, wrapped or not"
            )
        model = inner
    yield model


def unwrapped(model: nn.Module) -> PreTrainedModel:
    return [*wrappers(model)][-1]


def is_peft(model: Any) -> bool:
    """Tells whether PEFT wraps a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def body(model: nn.Module) -> PreTrainedModel:
    """Returns the model without its head, of a PEFT model too, whose adapters are within.

    Raises ValueError for virtual tokens, which are not.
    """
    refuse_virtual_tokens(model)
    return unwrapped(model).base_model


def takes_virtual_tokens(model: nn.Module) -> bool:
    """Tells whether PEFT puts trained tokens or keys before each row: prompt tuning, prefix tuning, P-tuning."""
    adapters = (getattr(wrapper, "active_peft_config", None) for wrapper in wrappers(model))
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)


def refuse_virtual_tokens(model: Any) -> None:
    """Raises ValueError for a PEFT model whose rows have virtual tokens (prompt tuning, prefix tuning, P-tuning)."""
    if any(
        getattr(adapter, "is_prompt_learning", False)
        for adapter in (getattr(model, "peft_config", None) or {}).values()
    ):
        raise ValueError(
            f"the model is a {type(model).__name__} with virtual tokens, whose states have other positions than the "
            "batch's tokens; use an adapter without them, such as LoRA"
        )


def is_sharded(model: nn.Module) -> bool:
    """Tells whether FSDP frees the memory of the head's whole weight after its forward. ZeRO-3 only lets go of it."""
    return any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in model.modules())


def head_of(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Head:
    """Returns how the model makes its logits. The first call for a head runs the model, in eval mode.

    Args:
        inputs: what the model runs on; None: four tokens.
    """
    base = unwrapped(model)
    linear = linear_head(base)
    if linear is not None:
        asked = (weakref.ref(linear), *named_transforms(base))
        if base not in TRANSFORMS or TRANSFORMS[base][0] != asked:
            TRANSFORMS[base] = asked, transform_seen(model, base, linear, inputs)
        transform = TRANSFORMS[base][1]
        if transform is not None:
            return Head(linear, *transform)
    if base not in WARNED:
        WARNED.add(base)
        head: Any = base.get_output_embeddings()
        name = f"{type(head).__module__.partition('.')[0]}'s {type(head).__name__}"
        reason = f"its head, {name}, is more than a product with a plain weight"
        if linear is not None:
            reason = "its logits are not the product of its head, scaled and softcapped as its config says"
        warnings.warn(
            f"causal_lm_loss builds the whole logits of {type(base).__name__}, which takes memory: {reason}",
            stacklevel=3,
        )
    return Head()


Transform = tuple[float, float | None]  # scale, softcap

# Model -> (what the verdict depends on, the verdict). The keys are weak and the values do not refer to them.
TRANSFORMS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Transform | None]] = weakref.WeakKeyDictionary()
WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the nn.Linear whose forward makes the logits; None if something else does (a LoRA, 8 bits)."""
    head: Any = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)  # PEFT's copies of a module that is trained whole
    if isinstance(saved, nn.ModuleDict):
        active = [] if head.disable_adapters else [name for name in head.active_adapters if name in saved]
        head = saved[active[0]] if active else head.original_module
    if isinstance(head, FullyShardedDataParallel):
        head = head.module
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    if type(head.weight.data) not in (Tensor, DTensor):  # torchao's quantised weights are tensors of other classes
        return None
    if "_old_forward" in vars(head) or "forward" not in vars(head):
        return head  # accelerate's forward calls the old one
    # transformers shards the head over processes in a forward of its own; every other change is unknown.
    return head if vars(head)["forward"].__qualname__.startswith("TensorParallelLayer.") else None


def named_transforms(model: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Returns the scales and softcaps that the config names, for `transform_seen` to try."""
    config = model.config.get_text_config()
    named = [value for value in (getattr(config, name, None) for name in SCALES) if isinstance(value, float | int)]
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [factor for value in named if value for factor in (float(value), 1 / value)]
    return (1.0, *scales), (float(softcap), None) if softcap else (None,)


@torch.no_grad()
def transform_seen(
    model: Any, base: PreTrainedModel, linear: nn.Linear, inputs: Mapping[str, Any] | None
) -> Transform | None:
    """Returns the scale and softcap that lie between the head and the model's logits, None if something else does.

    The model runs once with a head that returns chosen values.
    """

    def chosen(x: Tensor, module: nn.Linear) -> tuple[Tensor, Tensor]:
        classes = module.weight.shape[0]
        values = torch.linspace(-100, 100, classes, device=x.device)[None, None]  # (1, 1, V)
        if isinstance(x, DTensor):  # under torch's tensor parallelism the head returns a shard
            values = distribute_tensor(values, x.device_mesh, [Shard(2)] * x.device_mesh.ndim)
        return values, values

    if inputs is None:
        inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long, device=next(base.parameters()).device)}
    with evaluating(base), replaced(linear, chosen) as seen, torch.compiler.set_stance("force_eager"):
        logits = model(**inputs).logits
    if len(seen) != 1:
        return None
    given = seen[0]
    logits = logits.to_local() if isinstance(logits, DTensor) else logits
    if isinstance(given, DTensor):
        local, full = given.to_local(), given.full_tensor()
        given = local if local.shape == logits.shape else full
    if logits.shape != given.shape:
        return None
    tolerance = max(1e-4, 2 * torch.finfo(logits.dtype).eps)  # a wrapper may cast the output
    scales, softcaps = named_transforms(base)
    for softcap in softcaps:
        for scale in scales:
            expected = given * scale
            if softcap:
                expected = torch.tanh(expected / softcap) * softcap
            if torch.allclose(expected, logits.float(), rtol=tolerance, atol=1e-6):
                return scale, softcap
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches a model to eval mode within the block, which keeps dropout, random state and statistics as they are.

    bitsandbytes would repack its 4-bit weights for good in eval mode on a CPU, so its modules stay as they are.
    """
    training = [m for m in model.modules() if m.training and not type(m).__module__.startswith("bitsandbytes")]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def replaced(linear: nn.Linear, function: Callable[[Tensor, nn.Linear], tuple[Tensor, Any]]) -> Iterator[list[Any]]:
    """Replaces the module's forward by `function` within the block; yields the list of the second things it returns.

    accelerate keeps the forward of modules that it loads or moves in `_old_forward`, and calls it in its own.
    """
    seen: list[Any] = []
    name = "_old_forward" if "_old_forward" in vars(linear) else "forward"

    def forward(x: Tensor) -> Tensor:
        output, found = function(x, linear)
        seen.append(found)
        return output

    before = vars(linear).get(name)
    setattr(linear, name, forward)
    try:
        yield seen
    finally:
        if before is None:
            delattr(linear, name)
        else:
            setattr(linear, name, before)
