"""What mkdocs.yml adds to the build of the site: a hook for links, and the docstrings made at import time."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

KINDS = {kind: griffe.ParameterKind[kind.name.lower()] for kind in inspect._ParameterKind}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links to files outside docs/ into plain text: the site does not have these files."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


class MadeAtImport(griffe.Extension):
    """Reads docstrings of functions and signatures of modules that the source text does not spell out.

    `fastdistill.functional._docs` fills in what the functions share, `fastdistill.losses` derives its constructors.
    """

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring and any(str(decorator.value) == "documented" for decorator in func.decorators):
            func.docstring.value = inspect.getdoc(getattr(import_module(func.module.path), func.name)) or ""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.module.path != "fastdistill.losses" or cls.name.startswith("_"):
            return
        loss = getattr(import_module("fastdistill.losses"), cls.name)
        for name, signature in ("__init__", inspect.signature(loss)), ("forward", inspect.signature(loss.forward)):
            if name not in cls.members:
                parameters = griffe.Parameters(*map(_parameter, signature.parameters.values()))
                cls.set_member(name, griffe.Function(name, parameters=parameters))


def _parameter(p: inspect.Parameter) -> griffe.Parameter:
    default = None if p.default is p.empty else repr(p.default)
    return griffe.Parameter(p.name, kind=KINDS[p.kind], default=default)
