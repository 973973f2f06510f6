"""The repository root must stay off sys.path: transformers imports a package called ``kernels`` of its own."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_bare_names_do_not_import_our_folders(name: str) -> None:
    """Run ``pytest``, not ``python -m pytest``: with the root on sys.path a second copy of every module appears."""
    found = importlib.util.find_spec(name)
    assert found is None or "site-packages" in str(found.origin)


def test_subpackages_have_one_name() -> None:
    module = importlib.import_module("lrp_compiler.passes.pipeline")
    assert module.__name__ == "lrp_compiler.passes.pipeline"
    assert "passes.pipeline" not in sys.modules


def test_importing_the_package_imports_no_triton_and_registers_nothing() -> None:
    code = "import sys, lrp_compiler; assert 'triton' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
