"""What relevance costs: forward + relevance of ours against eager input x gradient, in one run.

    python bench/cost.py [--out FOLDER] [--repeats N]

Checks first that both sides compute what they should (ours with composite input_x_gradient must equal autograd's);
a red check prints no timing. Providers take turns, so that drift hits both; medians with p20 and p80 and the ratio to
a plain forward of the same run are reported. Random weights, float32, batch 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp


@dataclass
class Workload:
    """A classifier of float inputs."""

    name: str
    model: nn.Module
    x: Tensor
    target: int = 3


class Logits(nn.Module):
    """A Hugging Face model as tensor -> logits."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.argument: x}).logits
        return logits


def vit() -> Workload:
    """ViT-B/16 at 224 px."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    return Workload("ViT-B/16", Logits(model, "pixel_values"), torch.randn(1, 3, 224, 224))


def bert() -> Workload:
    """BERT-base from embeddings of 128 tokens."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=10))
    return Workload("BERT-base, 128 tokens", Logits(model, "inputs_embeds"), torch.randn(1, 128, 768))


def resnet() -> Workload:
    """ResNet-50 at 224 px."""
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    return Workload("ResNet-50", Logits(model, "pixel_values"), torch.randn(1, 3, 224, 224))


WORKLOADS = (vit, bert, resnet)


def input_x_gradient(work: Workload) -> Tensor:
    """The bar: autograd's gradient of the logit with frozen parameters, times the input."""
    leaf = work.x.clone().requires_grad_()
    work.model(leaf)[:, work.target].sum().backward()
    assert leaf.grad is not None
    return leaf.detach() * leaf.grad


def providers(work: Workload) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    ours: dict[str, LRPModule] = {
        name: compile_for_lrp(work.model, name) for name in ("attnlrp", "cp_lrp", "input_x_gradient")
    }

    def plain() -> object:
        with torch.no_grad():
            return work.model(work.x)

    timed: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "eager input x gradient": lambda: input_x_gradient(work),
    }
    for name, explained in ours.items():
        timed[f"ours, {name}"] = lambda explained=explained: explained.attribute(work.x, work.target)  # type: ignore[misc]
    return timed


def agrees(work: Workload) -> bool:
    """Whether ours computes autograd's input x gradient, to float32 rounding."""
    expected = input_x_gradient(work)
    found = compile_for_lrp(work.model, "input_x_gradient").attribute(work.x, work.target)
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def measure(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call, providers interleaved, after one call each to compile and warm up."""
    for call in timed.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def rows(work: Workload, repeats: int) -> list[dict[str, str]]:
    """One line per provider: median, p20, p80, ratio to the plain forward and to input x gradient."""
    taken = measure(providers(work), repeats)
    median = {name: statistics.median(values) for name, values in taken.items()}
    lines = []
    for name, values in taken.items():
        low, *_, high = statistics.quantiles(values, n=5)
        lines.append(
            {
                "model": work.name,
                "provider": name,
                "median ms": f"{median[name]:.0f}",
                "p20": f"{low:.0f}",
                "p80": f"{high:.0f}",
                "x forward": f"{median[name] / median['plain forward']:.2f}",
                "x input x gradient": f"{median[name] / median['eager input x gradient']:.2f}",
            }
        )
    return lines


def machine() -> str:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, batch 1"


def write(lines: list[dict[str, str]], folder: Path) -> None:
    """``cost.csv`` and ``cost.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cost.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["machine", *lines[0]])
        writer.writeheader()
        writer.writerows({"machine": machine(), **line} for line in lines)
    table = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    (folder / "cost.md").write_text(f"{text}\n\n{machine()}\n", encoding="utf-8")


def main() -> None:
    """Check, measure, print, and write files if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write cost.csv and cost.md into this folder")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    lines: list[dict[str, str]] = []
    for make in WORKLOADS:
        work = make()
        work.model.eval().requires_grad_(False)
        if not agrees(work):
            sys.exit(f"{work.name}: ours disagrees with autograd; nothing was timed")
        lines += rows(work, options.repeats)
    table = Table(*lines[0], title=machine())
    for line in lines:
        table.add_row(*line.values())
    Console().print(table)
    if options.out:
        write(lines, options.out)


if __name__ == "__main__":
    main()
