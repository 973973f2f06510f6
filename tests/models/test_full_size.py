"""The committed tables of full-size models say what a fresh run says of the cheapest two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "bench" / "results" / "coverage.md"
THE_15 = (
    "VGG16",
    "ResNet-50",
    "ViT-b-16",
    "EfficientNetv2-medium",
    "SigLIP-2-So400m-base14-384",
    "Wav2Vec2-xls-r-300m",
    "whisper-small",
    "GPT-2",
    "RoBERTa-large",
    "Llama3.2-1B",
    "Gemma-3-270m-it",
    "Qwen3-0.6B",
    "Flan-T5-large",
    "DePlot",
    "Mamba-130m",
)
"""The models of arXiv 2512.07010, table 5."""


def coverage(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table by model; each a dict by column."""
    lines = text.split("\n\n## Uncovered")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_committed_table_covers_all_15_models() -> None:
    rows = coverage(COMMITTED.read_text(encoding="utf-8"))
    assert tuple(rows) == THE_15
    for row in rows.values():
        covered, total = row["ours: live ops covered"].split("/")
        unique, unique_total = row["ours: unique live ops"].split("/")
        assert covered == total and unique == unique_total and int(total.replace(",", "")) > 0


@pytest.mark.thorough
def test_a_fresh_run_of_the_cheapest_two_agrees(tmp_path: Path) -> None:
    """In a process of its own, as the command is run: bench/ lies on no test's path."""
    names, out = ["VGG16", "ResNet-50"], tmp_path / "coverage.md"
    command = [sys.executable, str(ROOT / "bench" / "coverage.py"), "--out", str(out), "--only", *names]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh, committed = coverage(out.read_text(encoding="utf-8")), coverage(COMMITTED.read_text(encoding="utf-8"))
    assert fresh == {name: committed[name] for name in names}
