"""Knowledge-distillation losses for PyTorch that stay low on memory, and a trainer for TinyBERT's two-stage recipe.

The losses (functions and modules) are here and need only torch and numpy. They are imported on first use, so that
`import fastdistill` alone does not import torch. The trainer is `fastdistill.train`, with the extra
`fastdistill[train]`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import functional as functional
    from . import losses as losses
    from . import reference as reference
    from .functional import *  # noqa: F403
    from .losses import *  # noqa: F403

__version__ = "0.1.0"

_MODULES = ("distributed", "functional", "losses", "reference")


def _attribute(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    # Other submodules are left to the import statement: importing fastdistill.cli must not import torch.
    if name == "__all__" or not (name.startswith("_") or find_spec(f"{__name__}.{name}")):
        from . import functional, losses

        public = {name: getattr(module, name) for module in (functional, losses) for name in module.__all__}
        globals().update(public, __all__=sorted(public))
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # type checkers read the imports above, and so find a misspelt name
    __getattr__ = _attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *_attribute("__all__"), *_MODULES})
