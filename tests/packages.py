"""Builds the sdist and, from it, the wheel, and tries the wheel in clean environments: `make packages`.

    python tests/packages.py python3.10=2.10.0 python3.13

Each argument is an interpreter, and the version of torch to install there; without one it is the newest. Triton, which
torch brings along on Linux, is taken out again: the losses need torch and numpy alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRIAL = """
import sys
from importlib.metadata import version
from importlib.util import find_spec
import torch
import fastdistill
assert not find_spec("triton") and not find_spec("rich") and not find_spec("transformers")
assert fastdistill.__version__ == version("fastdistill")
torch.manual_seed(0)
student, weight, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.randn(5, 11)
for backend in ("torch", "reference"):
    loss = fastdistill.kl_div(student @ weight.T, teacher, temperature=2.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    wanted = torch.nn.functional.kl_div(
        (student @ weight.T / 2).log_softmax(1), (teacher / 2).log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, student)[0])
module = fastdistill.LinearMSELoss(8, 11)
module(student, teacher).backward()
assert student.grad is not None and module.projection.weight.grad is not None
q = torch.randn(2, 2, 6, 4, requires_grad=True)
fastdistill.AttentionKLLoss()(q, q, q.detach(), q.detach()).backward()
assert fastdistill.__file__.startswith(sys.prefix), fastdistill.__file__
print("fastdistill", fastdistill.__version__, "torch", torch.__version__, "Python", sys.version.split()[0])
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:6]))} failed with {done.returncode}\n{done.stdout}")
    return done.stdout


def build(out: Path) -> Path:
    """Returns the wheel, built from the sdist beside it."""
    run(sys.executable, "-m", "build", "-o", out, ROOT)
    (wheel,) = out.glob("*.whl")
    return wheel


def attempt(wheel: Path, interpreter: str, torch: str, folder: Path) -> str:
    """Installs the wheel in a new environment, calls losses and the command there, and returns what ran."""
    run(interpreter, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel, f"torch=={torch}" if torch else "torch")
    run(python, "-m", "pip", "uninstall", "-q", "-y", "triton")
    found = run(python, "-I", "-c", TRIAL, cwd=folder)
    version = run(folder / "bin" / "fastdistill", "--version", cwd=folder).split()[-1]
    assert f"fastdistill {version} " in found
    assert "torch" in run(folder / "bin" / "fastdistill", "info", cwd=folder)
    run(folder / "bin" / "fastdistill", "--help", cwd=folder)
    return found.strip()


def main(specifications: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder) / "dist")
        for i, specification in enumerate(specifications):
            interpreter, _, torch = specification.partition("=")
            print(attempt(wheel, interpreter, torch, Path(folder) / str(i)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
