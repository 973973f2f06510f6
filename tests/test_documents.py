"""What the documents show is run: the README's code, the examples, the figures it quotes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrp_compiler.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs() -> None:
    """All blocks in order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), namespace)
    finally:
        REGISTRY.remove(torch.ops.aten.special_i1e)


def test_the_readme_quotes_the_measured_costs() -> None:
    assert (ROOT / "bench/results/cpu-2-cores/cost.md").read_text(encoding="utf-8").strip() in README


@pytest.mark.parametrize("name", ["own_rule", "report"])
def test_the_readme_shows_what_the_examples_print(name: str) -> None:
    """Line by line, but for paths and milliseconds."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    lines = [line.rstrip() for line in printed.splitlines() if " ms: " not in line and "tensor" not in line]
    shown = lines[:3] if name == "own_rule" else lines
    for line in shown:
        assert line.replace(f"{ROOT}/", "") in README


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], check=True, cwd=tmp_path)
    assert (tmp_path / "demo" / "digits.png").stat().st_size > 10_000
