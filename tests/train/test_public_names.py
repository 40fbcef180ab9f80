"""Checks the public names of `fastdistill.train` and what importing its options imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastdistill.train


@pytest.mark.parametrize("name", fastdistill.train.__all__)
def test_every_name_is_a_function_or_a_class(name: str) -> None:
    found = getattr(fastdistill.train, name)
    assert callable(found)
    assert found.__name__ == name
    assert found.__module__.startswith("fastdistill.train.")


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match=r"module 'fastdistill\.train' has no attribute 'nothing'"):
        _ = fastdistill.train.nothing


def test_importing_the_options_imports_no_training_library() -> None:
    code = "import sys, fastdistill.train.options; print({'transformers', 'datasets', 'accelerate'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
