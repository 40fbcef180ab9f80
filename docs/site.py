"""What mkdocs.yml adds to the build of the site: a hook for links, and the docstrings made at import time."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from typing import Any

import griffe

KINDS = {kind: griffe.ParameterKind[kind.name.lower()] for kind in inspect._ParameterKind}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to files outside docs/ into plain text: the site does not have these files."""
    if "/" in page.file.src_uri:
        return markdown
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


class MadeAtImport(griffe.Extension):
    """Reads docstrings and signatures that the source text does not spell out.

    `fastdistill.functional._docs` fills in what the functions share, `fastdistill.losses` derives its constructors, and
    `fastdistill.train.options` gives a dataclass its defaults and their explanation by `option(default, help)`.
    """

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        made = attr.value
        if isinstance(made, griffe.ExprCall) and str(made.function) == "option":
            attr.value, explanation = made.arguments[:2]
            if isinstance(explanation, str):
                attr.docstring = griffe.Docstring(ast.literal_eval(explanation), parent=attr)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring and any(str(decorator.value) == "documented" for decorator in func.decorators):
            func.docstring.value = inspect.getdoc(getattr(import_module(func.module.path), func.name)) or ""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        loss = getattr(import_module("fastdistill.losses"), cls.name, None)  # None: a class of type checkers alone
        if cls.module.path != "fastdistill.losses" or cls.name.startswith("_") or loss is None:
            return
        for name, signature in ("__init__", inspect.signature(loss)), ("forward", inspect.signature(loss.forward)):
            if name not in cls.members:
                parameters = griffe.Parameters(*map(_parameter, signature.parameters.values()))
                cls.set_member(name, griffe.Function(name, parameters=parameters))


def _parameter(p: inspect.Parameter) -> griffe.Parameter:
    default = None if p.default is p.empty else repr(p.default)
    return griffe.Parameter(p.name, kind=KINDS[p.kind], default=default)
