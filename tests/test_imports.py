"""Checks that imports go to lower layers, form no circle, and need nothing but the wing's extra installed."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = re.compile(r"^(\w+) = \[(.*?)^\]|^(\w+) = \[(.*?)\]", re.M | re.S)

# Lower layers first. A module imports from its own layer or from a lower one.
LAYERS = (
    ("csrc", "cuda", "kernels", "_checks", "reference"),
    ("ops",),
    ("functional",),
    ("losses", "distributed"),
    ("train",),
    ("integrations", "recipes"),
    ("cli",),
)
LOSSES = {name for layer in LAYERS[:4] for name in layer}


def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    found = {}
    for folder, package in ((ROOT / "fastdistill", "fastdistill"), (ROOT / "kernels", "fastdistill.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Yields the dotted names that a module imports, also inside functions, but not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{source}.{alias.name}" for alias in node.names)
        else:
            yield from imports_of(node, package)


def own_imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yields each import of this package's modules, also under TYPE_CHECKING, and whether it is relative."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if relative or any(name.split(".")[0] == "fastdistill" for name in names):
            yield ast.unparse(node), relative


def own(name: str) -> str | None:
    """Returns the module of this package that an imported name is or comes from."""
    while name.startswith("fastdistill"):
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = {name: sorted(set(imports_of(tree, package_of(name)))) for name, tree in TREES.items()}
GRAPH = {name: {own(found) for found in imported} - {None, name} for name, imported in IMPORTS.items()}


def layer(module: str) -> int:
    part = (module.split(".") + [""])[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


def inner(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leaves out the package itself, whose `__init__` re-exports the losses and is imported for its version."""
    return {name: {to for to in found if to != "fastdistill"} for name, found in graph.items() if name != "fastdistill"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_form_no_circle() -> None:
    assert circle(inner(GRAPH)) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("module", sorted(inner(GRAPH)))
def test_modules_import_only_lower_layers(module: str) -> None:
    upward = sorted(to for to in inner(GRAPH)[module] if layer(to) > layer(module))
    assert not upward, f"{module} imports {upward}"


def test_the_package_imports_only_losses() -> None:
    assert {to.split(".")[1] for to in GRAPH["fastdistill"]} <= LOSSES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_losses_are_imported_relatively_among_themselves(module: str) -> None:
    """A hub kernel is a copy of the losses under another name; the rest is no part of it, and imports absolutely."""
    inside = module == "fastdistill" or module.split(".")[1] in LOSSES
    assert not [text for text, relative in own_imports(TREES[module]) if relative != inside]


def test_a_wrong_import_is_found() -> None:
    source = "import torch, fastdistill.cuda\nif TYPE_CHECKING:\n    from fastdistill import losses\n"
    assert [relative for _, relative in own_imports(ast.parse(source))] == [False, False]
    assert list(own_imports(ast.parse("from . import cuda\nfrom fastdistillery import x"))) == [
        ("from . import cuda", True)
    ]
    assert list(imports_of(ast.parse("from ..a import b\nfrom . import c"), "fastdistill.ops")) == [
        "fastdistill.a.b", "fastdistill.ops.c"
    ]  # fmt: skip


def extras() -> dict[str, set[str]]:
    """Returns the distributions of each extra and, under "", of the base install."""
    project = (ROOT / "pyproject.toml").read_text()
    table = project[project.index("[project.optional-dependencies]") : project.index("[project.scripts]")]
    found = {m[1] or m[3]: set(re.findall(r'"([\w-]+)', m[2] or m[4])) for m in EXTRAS.finditer(table)}
    base = re.search(r"^dependencies = \[(.*)\]", project, re.M)
    assert base is not None
    return {**found, "": set(re.findall(r'"([\w-]+)', base[1]))}


DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "sentence_transformers": "sentence-transformers"}
# What `fastdistill lm` imports.
LM = ("fastdistill.cli", *(f"fastdistill.recipes.lm{part}" for part in ("", "_on_policy", "_rows", "_trainers")))
ADAPTERS = ("fastdistill.train.adapters",)  # imports PEFT for a model that PEFT made
# Installed with another distribution of the extra.
BROUGHT = {"pyarrow": "datasets", "pyyaml": "transformers", "jinja2": "torch"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_wing_needs_only_its_extra(module: str) -> None:
    wing = (module.split(".") + [""])[1]
    allowed = set(extras()[""])
    if wing == "kernels":
        allowed |= extras()["triton"]
    elif wing not in LOSSES and module != "fastdistill":
        allowed |= (
            extras()["train"]
            | (extras()["lm"] if module in LM else set())
            | ({"peft"} if module in ADAPTERS else set())
        )
    if wing == "integrations":  # an adapter may import the trainer that it is named after
        adapted = module.rpartition(".")[2]
        allowed |= extras()["integrations"] & {DISTRIBUTIONS.get(adapted, adapted)}
    outside = {found.split(".")[0] for found in IMPORTS[module]} - set(sys.stdlib_module_names) - {"fastdistill"}
    needed = {DISTRIBUTIONS.get(name, name) for name in outside}
    assert {BROUGHT.get(name, name) for name in needed} <= allowed
