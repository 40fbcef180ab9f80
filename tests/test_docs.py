"""Checks the code of README.md and docs/: what can run alone runs, and the rest fits the library's signatures.

test_examples.py compares the blocks that examples/ has too, and test_readme.py runs the README's Trainer.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastdistill

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
EXAMPLE = re.compile(r"<!-- examples/\w+\.py \w+ -->\n\Z")  # before a block
# What `...` stands for in a command.
REQUIRED = {
    "general": "--teacher T --student S --corpus C --output O",
    "task": "--teacher T --student S --task SST-2 --output O",
    "lm": "--teacher T --student S --dataset D --output O",
}


def blocks(language: str, page: Path | None = None) -> list[Any]:
    """Returns the blocks of a language, on one page or on all, named by page and line; without those of examples/."""
    found = []
    for path in [page] if page else PAGES:
        text = path.read_text()
        for match in FENCED.finditer(text):
            name = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
            if match[1] == language and not EXAMPLE.search(text[: match.start()]):
                found.append(pytest.param(textwrap.dedent(match[2]), id=name))
    return found


def test_no_block_escapes() -> None:
    """Each fence is closed, its language is known, and test_examples.py reads the pages that show examples/."""
    for path in PAGES:
        text = path.read_text()
        fences = re.findall(r"^ *```(\w*)", text, re.M)
        assert len(fences) == 2 * len(FENCED.findall(text)), path
        assert set(fences) <= {"", "bibtex", "diff", "json", "python", "sh", "text", "yaml"}, path
        if path.name not in ("in_your_trainer.md", "objectives.md"):
            assert not re.search("^ *<!-- examples/", text, re.M), path


# -- Python ------------------------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """A variable that holds an instance of a class."""

    kind: type


def resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """Returns the object that an expression names, an Instance for the call of a class, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        return owner and getattr(owner.kind if isinstance(owner, Instance) else owner, node.attr)
    if isinstance(node, ast.Call):
        called = resolved(node.func, names)
        return Instance(called) if isinstance(called, type) else None
    return None


def check_calls(code: str) -> int:
    """Imports what a block imports, binds its calls to the signatures, and returns the number of bound calls.

    Raises what a reader would see: SyntaxError, ImportError, AttributeError or TypeError. Names that earlier text
    introduced are left out, except the public names of the library.
    """
    train = import_module("fastdistill.train")
    names: dict[str, Any] = {name: getattr(train, name) for name in train.__all__} | {"fastdistill": fastdistill}
    bound = 0
    tree = ast.parse(code)
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), "block", "exec"), names)
            elif isinstance(node, ast.Call) and callable(called := resolved(node.func, names)):
                first = [None] if isinstance(node.func, ast.Attribute) and is_method(node.func, names) else []
                bind(called, first, node)
                bound += 1
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = resolved(statement.value, names)
    return bound


def is_method(node: ast.Attribute, names: dict[str, Any]) -> bool:
    return isinstance(resolved(node.value, names), Instance)


def bind(called: Any, first: list[None], node: ast.Call) -> None:
    try:
        signature = inspect.signature(called)
    except ValueError:  # a builtin has none
        return
    keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
    is_whole = all(keyword.arg for keyword in node.keywords) and not any(
        isinstance(argument, ast.Starred) for argument in node.args
    )
    (signature.bind if is_whole else signature.bind_partial)(*first, *[None] * len(node.args), **keywords)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_fits_the_library(code: str) -> None:
    pytest.importorskip("transformers")
    if "from peft" in code:
        pytest.importorskip("peft")
    bound = check_calls(code)
    assert bound or "fastdistill" not in code or "class " in code


@pytest.mark.parametrize(
    "code, error",
    [
        ("fastdistill.kl_div(a, b, temprature=2.0)", TypeError),
        ("loss = fastdistill.kl_div(a)", TypeError),
        ("from fastdistill.train import GeneralStages", ImportError),
        ("fastdistill.train.capture.captures(model)", AttributeError),
        ("stage = GeneralStage(corpus=[])\nstage.run(a, b)", TypeError),
        ("GeneralStage(corpora=[]).run(a, b, c, d)", TypeError),
        ("GeneralStage(corpus=[]).runs(a, b, c, d)", AttributeError),
        ("f(", SyntaxError),
    ],
)
def test_a_wrong_block_is_found(code: str, error: type[Exception]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(error):
        check_calls(code)


@pytest.mark.parametrize("code", [block for block in blocks("python") if block.values[0].startswith("import torch\n")])
def test_a_block_that_imports_torch_runs(code: str) -> None:
    names: dict[str, Any] = {}
    exec(code, names)
    gradients = [x.grad for x in names.values() if isinstance(x, torch.Tensor) and x.is_leaf and x.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_term_of_contributing() -> None:
    """The class runs as it stands and gives the mean of 1 - cosine; the line it changes is that of the source."""
    pytest.importorskip("transformers")
    from transformers import BertConfig

    from fastdistill.train import ObjectiveOptions, terms

    page = ROOT / "docs" / "contributing.md"
    ((code,),) = [block.values for block in blocks("python", page)]
    names = dict(vars(terms))
    exec(code, names)
    configs = [BertConfig(hidden_size=width, num_attention_heads=2, num_hidden_layers=2) for width in (8, 12)]
    options = ObjectiveOptions(projection="per_layer")
    term = names["Cosine"](terms.Setup(options, *configs, (0, 1, 2), torch.nn.ModuleDict()))
    student, teacher = ([torch.randn(2, 5, width) for _ in range(3)] for width in (8, 12))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    states = [terms.States(dict(enumerate(hidden)), {}, None) for hidden in (student, teacher)]
    found = term.loss(terms.Batch(*states, mask=mask))
    expected = torch.zeros(())
    for i in (1, 2):
        x, y = term.projections[i](student[i])[mask], teacher[i][mask]
        expected += (1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
    torch.testing.assert_close(found, expected)

    ((change,),) = [block.values for block in blocks("diff", page)]
    before, after = change.splitlines()
    assert before[1:] in Path(terms.__file__).read_text().splitlines()
    assert before.startswith("-")
    assert after.startswith("+")
    ast.parse(f"{{{after[1:]}}}")


# -- the command line --------------------------------------------------------------------------------------------


def commands(code: str) -> list[list[str]]:
    """Returns the words of each command of a block, with `$task` filled in."""
    lines = code.replace("\\\n", " ").replace("$task", "MRPC").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("code", blocks("sh"))
def test_a_command_parses(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files that the page names. Flags of bench/ are looked up in its source, to import nothing heavy."""
    pytest.importorskip("transformers")
    from fastdistill.cli import parse

    monkeypatch.chdir(tmp_path)
    (config,) = [block.values[0] for block in blocks("yaml")]
    Path("general.yaml").write_text(config)
    code = re.sub(r"<<'END'.*?^END$", "", code, flags=re.M | re.S)
    for words in commands(code):
        if "fastdistill.cli" in words or words[0] == "fastdistill":
            start = words.index("fastdistill.cli" if "fastdistill.cli" in words else "fastdistill") + 1
            if "lm" in words and not find_spec("trl"):
                pytest.skip("trl is not installed")
            command, given = words[start], [word for word in words[start + 1 :] if word != "..."]
            rest = REQUIRED[command].split() if "..." in words else []
            assert parse([command, *rest, *given])[0] == command
        elif "-m" in words:
            module = words[words.index("-m") + 1]
            assert find_spec(module), module
            if module.startswith("bench."):
                source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
                assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        elif words[:2] == ["pip", "install"]:
            extras = [extra for found in re.findall(r"\[(.*?)\]", words[-1]) for extra in found.split(",")]
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        else:
            assert words[0] in ("cat", "do", "done", "echo", "first=$(scontrol", "for", "sed"), words


@pytest.mark.parametrize("code", blocks("json"))
def test_json_parses(code: str) -> None:
    json.loads(code)


# -- links -------------------------------------------------------------------------------------------------------


def test_links_of_the_repository() -> None:
    """`make docs` checks the links between pages of docs/. These are the others: the README's, and out of docs/."""
    for path in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCED.sub("", path.read_text())):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name}: {link}"
