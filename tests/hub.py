"""Lays the losses out as a kernel of the Hugging Face hub: `make hub` writes dist/hub.

    python tests/hub.py FOLDER

The package `kernels` loads FOLDER/build/torch-universal as a package whose name is the id in metadata.json. The id has
a hash of the files, so that two versions load side by side.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdistill"

# The losses, which import one another relatively. tests/test_imports.py holds that they need nothing else.
PARTS = (
    "__init__.py", "_checks.py", "cuda.py", "distributed.py", "losses.py", "py.typed", "reference.py",
    "csrc", "functional", "kernels", "ops",
)  # fmt: skip


def lay_out(folder: Path) -> Path:
    """Writes the kernel to `folder`, in place of an earlier one, and returns the package's folder inside."""
    variant = folder / "build" / "torch-universal"
    shutil.rmtree(variant, ignore_errors=True)
    variant.mkdir(parents=True)
    for name in PARTS:
        if (PACKAGE / name).is_dir():
            # A binary would be of one platform; cuda.py builds csrc on first use.
            shutil.copytree(PACKAGE / name, variant / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(PACKAGE / name, variant)
    shutil.copy(ROOT / "LICENSE", folder)
    files = sorted(path for path in variant.rglob("*") if path.is_file())
    texts = [part for path in files for part in (str(path.relative_to(variant)).encode(), path.read_bytes())]
    metadata = {
        "id": f"_fastdistill_{hashlib.sha256(b'|'.join(texts)).hexdigest()[:12]}",
        "name": "fastdistill",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/hub.py FOLDER")
    print(lay_out(Path(sys.argv[1])))
