"""What the documents show is run: the README's code, the examples, the figures it quotes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import catalogue
import pytest
import torch

from lrp_compiler import rules
from lrp_compiler.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "passes/rules/README.md"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs() -> None:
    """All blocks in order, in one namespace, as a reader would type them."""
    namespace: dict[str, object] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), namespace)
    finally:
        REGISTRY.remove(torch.ops.aten.special_i1e)


@pytest.mark.parametrize(
    ("section", "results"), [("Cost", "peers.md"), ("Memory", "memory.md"), ("Precision", "precision.md")]
)
def test_the_readme_quotes_what_was_measured(section: str, results: str) -> None:
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    named = re.search(rf"\(bench/results/[^/]+/{results}\)", text)
    assert named, f"the section does not link to {results}"
    measured = (ROOT / named[0].strip("()")).read_text(encoding="utf-8").splitlines()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 8 and set(rows) <= set(measured)


@pytest.mark.parametrize("name", ["own_rule", "report"])
def test_the_readme_shows_what_the_examples_print(name: str) -> None:
    """Line by line, but for paths and milliseconds."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    lines = [line.rstrip() for line in printed.splitlines() if " ms: " not in line and "tensor" not in line]
    shown = lines[:3] if name == "own_rule" else lines
    for line in shown:
        assert line.replace(f"{ROOT}/", "") in README


def test_the_readme_shows_what_the_command_line_prints() -> None:
    command = [sys.executable, "-m", "lrp_compiler", "coverage", "own_rule:build", "--path", "examples"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    shown = [line for line in done.stdout.splitlines() if " ms: " not in line]
    assert "\n".join(shown).replace(f"{ROOT}/", "") in README


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], check=True, cwd=tmp_path)
    assert (tmp_path / "demo" / "digits.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_penalised_relevance_makes_right_for_the_right_reasons() -> None:
    """What the example prints: an artefact costs half of the accuracy, and a penalty on its relevance gives it back."""
    command = [sys.executable, str(ROOT / "examples" / "right_for_the_right_reasons.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    rows = [[float(number) for number in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines()]
    plain, penalised, clean = [row for row in rows if len(row) == 4]
    assert min(plain[0], penalised[0]) >= 95
    # The bounds leave room for other rounding on other machines, which training amplifies.
    assert max(plain[1:3]) <= 70 and min(penalised[1:3]) >= clean[1] - 4 and clean[1] >= 95
    assert plain[3] >= 30 and penalised[3] <= 5


def test_the_table_of_kernels_is_current() -> None:
    """`make kernel-table` writes it from the registry."""
    # Scripts of bench/ import each other, which safe paths keep them from.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(ROOT / "bench/kernel_table.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
    assert printed == (ROOT / "kernels/dialect/TABLE.md").read_text(encoding="utf-8")


def test_every_rule_is_in_the_catalogue() -> None:
    """`make catalogue` writes it; what the tests before this one have seen of a rule stands there too."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in CATALOGUE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "rule":
            rows[cells[0], cells[1]] = cells[2:]
    shown = {rule for rule, _ in rows}
    public = [kind for kind in vars(rules).values() if isinstance(kind, type) and issubclass(kind, rules.Rule)]
    # Bases have no name of their own, and what stops relevance has nothing to compare.
    missing = {kind.name for kind in public if kind is not rules.Stop} - {rules.Rule.name} - shown
    assert not missing
    for key, row in catalogue.ROWS.items():
        edges, promises, oracles, error = rows[key]
        assert edges == row.edges and row.oracles <= set(oracles.split(", "))
        assert row.promises <= set(promises.split(", ")), key
        # Errors are those of the run that wrote the table; another draws other numbers, within the tests' bound.
        assert float(error) <= 1e-9 and row.error <= 1e-9, key
