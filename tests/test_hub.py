"""Checks that the losses load as a kernel of the Hugging Face hub, beside the installed package."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hub import PARTS, lay_out
from test_imports import LOSSES

# The copy loads first, and so shows that it needs no installed package.
LOAD = {
    "kernels": """
from kernels import get_local_kernel
copy = get_local_kernel(folder)
""",
    # What kernels does, without it.
    "importlib": """
import importlib.util, json
variant = folder / "build" / "torch-universal"
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
copy = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)
""",
}

COMPARE = """
from importlib import import_module
from importlib.util import find_spec
for path in sorted(Path(copy.__file__).parent.rglob("*.py")):
    module = ".".join((copy.__name__, *path.relative_to(Path(copy.__file__).parent).with_suffix("").parts))
    if ".kernels" not in module or find_spec("triton"):
        import_module(module.removesuffix(".__init__"))
assert "fastdistill" not in sys.modules, "the copy imports the installed package"
assert copy.cuda.SOURCES == Path(copy.__file__).parent / "csrc"

import fastdistill, fastdistill.distributed, fastdistill.ops.attention_short, torch
ops = [name.split("::") for name in torch._library.custom_ops.OPDEFS]
own = {name for space, name in ops if space == "fastdistill"}
assert len(own) > 5
assert own == {name for space, name in ops if space == copy.__name__}

torch.manual_seed(0)
student, teacher = torch.randn(6, 11, requires_grad=True), torch.randn(6, 11)
double = student.double()
wanted = torch.nn.functional.kl_div(
    (double / 2).log_softmax(1), (teacher.double() / 2).log_softmax(1), log_target=True, reduction="batchmean")
(wanted_gradient,) = torch.autograd.grad(wanted, student)

def check(loss):
    value = loss(student, teacher, temperature=2.0, backend="torch")
    torch.testing.assert_close(value.double(), wanted)
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], wanted_gradient)

for library in (copy, fastdistill):
    spaces = set()
    def graph(module, inputs):
        spaces.update(str(node.target).split(".")[0] for node in module.graph.nodes if node.op == "call_function")
        return module
    check(library.kl_div)
    check(torch.compile(library.kl_div, backend=graph, fullgraph=True))
    assert library.__name__ in spaces, spaces
"""


def test_the_kernel_is_the_losses() -> None:
    assert {Path(name).stem for name in PARTS} - {"__init__", "py"} == LOSSES


@pytest.mark.parametrize("loader", LOAD)
def test_a_hub_kernel_works_beside_the_package(loader: str, tmp_path: Path) -> None:
    if loader == "kernels":
        try:
            version("kernels")  # not find_spec, which finds the folder of the repository
        except PackageNotFoundError:
            pytest.skip("kernels, which loads kernels of the Hugging Face hub, is not installed")
    lay_out(tmp_path)
    code = f"import sys\nfrom pathlib import Path\nfolder = Path({str(tmp_path)!r})\n{LOAD[loader]}{COMPARE}"
    # -I: else a PYTHONPATH with the repository would show its folder `kernels` for the package.
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
