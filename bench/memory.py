"""What relevance takes of memory: peak above weights and inputs of ours and of eager input x gradient, in one run.

    python bench/memory.py [--out FOLDER] [--repeats N]

Checks first that every memory setting gives the same relevance; a red check prints nothing else. Peaks are what torch's
allocator hands out (lrp_compiler.memory.allocated_peak), beside them what the plan predicts. Random weights, float32,
batch 1. Times are medians of interleaved calls, for what a setting costs.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.memory import allocated_peak

TARGET = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, memory_budget=0.5": {"memory_budget": 0.5},
    "ours, memory_budget=0.2": {"memory_budget": 0.2},
    "ours, memory_budget=0": {"memory_budget": 0.0},
}
DEPTHS = (4, 8, 16, 32, 64)


@dataclass
class Workload:
    """A model of float inputs whose output ``pick`` chooses what is explained; ``blocks`` matches its layers."""

    name: str
    model: nn.Module
    x: Tensor
    target: Any
    blocks: str


class Logits(nn.Module):
    """A Hugging Face model as tensor -> logits."""

    def __init__(self, model: nn.Module, argument: str, **options: Any) -> None:
        super().__init__()
        self.model, self.argument, self.options = model, argument, options

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.argument: x}, **self.options).logits
        return logits


def vit() -> Workload:
    """ViT-B/16 at 224 px."""
    model = Logits(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), "pixel_values")
    return Workload("ViT-B/16", model.eval(), torch.randn(1, 3, 224, 224), TARGET, "model.vit.layers.*")


def gpt2() -> Workload:
    """GPT-2 of 12 layers from embeddings of 128 tokens, the last token's logit."""
    model = Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config()), "inputs_embeds", use_cache=False)
    x = 0.02 * torch.randn(1, 128, 768)
    return Workload("GPT-2, 128 tokens", model.eval(), x, (-1, TARGET), "model.transformer.h.*")


def resnet() -> Workload:
    """ResNet-50 at 224 px."""
    model = Logits(
        transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)), "pixel_values"
    )
    return Workload(
        "ResNet-50", model.eval(), torch.randn(1, 3, 224, 224), TARGET, "model.resnet.encoder.stages.*.layers.*"
    )


WORKLOADS = (vit, gpt2, resnet)


def encoder(depth: int) -> Workload:
    """A transformer encoder of small width whose layers can be any number."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    model = nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 256, 10)).eval()
    return Workload(f"{depth} layers", model, torch.randn(1, 256, 64), TARGET, "0.layers.*")


def input_x_gradient(work: Workload) -> Tensor:
    """The bar: autograd's gradient of the logit times the input."""
    leaf = work.x.clone().requires_grad_()
    chosen = work.target if isinstance(work.target, tuple) else (work.target,)
    (gradient,) = torch.autograd.grad(work.model(leaf)[(slice(None), *chosen)].sum(), leaf)
    return gradient * work.x


def with_frozen_parameters(work: Workload) -> Tensor:
    """The same where no parameter asks for a gradient, so that autograd keeps less."""
    asked = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        return input_x_gradient(work)
    finally:
        for parameter in asked:
            parameter.requires_grad_()


def compiled(work: Workload) -> dict[str, LRPModule]:
    """Ours in every setting; per-block recomputation is what activation checkpointing does."""
    settings = {**SETTINGS, f"ours, recompute=['{work.blocks}']": {"recompute": [work.blocks]}}
    return {name: compile_for_lrp(work.model, "attnlrp", **options) for name, options in settings.items()}


def agree(work: Workload, settings: dict[str, LRPModule]) -> bool:
    """Whether every setting gives the same relevance, to float32 rounding."""
    first, *others = (explained.attribute(work.x, work.target) for explained in settings.values())
    return all(bool((other - first).norm() <= 1e-5 * first.norm()) for other in others)


@dataclass
class Row:
    """One provider on one model."""

    model: str
    provider: str
    peak: int
    predicted: int | None
    milliseconds: float


def measure(work: Workload, repeats: int) -> list[Row]:
    """Peaks and median times of all providers, which take turns."""
    settings = compiled(work)
    if not agree(work, settings):
        sys.exit(f"{work.name}: the memory settings disagree; nothing is reported.")
    calls: dict[str, Callable[[], object]] = {
        "eager input x gradient": lambda: input_x_gradient(work),
        "the same, frozen parameters": lambda: with_frozen_parameters(work),
        **{
            name: lambda explained=explained: explained.attribute(work.x, work.target)
            for name, explained in settings.items()
        },  # type: ignore[misc]
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    predicted = {name: explained.report(work.x).memory.peak for name, explained in settings.items()}
    return [
        Row(work.name, name, allocated_peak(call), predicted.get(name), statistics.median(taken[name]))
        for name, call in calls.items()
    ]


def depth_rows() -> list[Row]:
    """Peaks over depth: in proportion to it by default, to its square root where memory is least."""
    rows = []
    for depth in DEPTHS:
        work = encoder(depth)
        for name in ("ours", "ours, memory_budget=0"):
            explained = compile_for_lrp(work.model, "attnlrp", **SETTINGS[name])
            explained.attribute(work.x, work.target)
            peak = allocated_peak(partial(explained.attribute, work.x, work.target))
            rows.append(Row(work.name, name, peak, explained.report(work.x).memory.peak, float("nan")))
    return rows


def markdown(rows: list[Row], depths: list[Row], repeats: int) -> str:
    """The tables of both parts."""
    bars = {row.model: row for row in rows if row.provider == "eager input x gradient"}
    frozen = {row.model: row for row in rows if row.provider == "the same, frozen parameters"}
    lines = [
        "# Memory of relevance, AttnLRP against input x gradient",
        "",
        f"`python bench/memory.py --repeats {repeats}` on {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}; "
        "random weights, float32, batch 1. Peak is what torch's allocator hands out above weights and inputs, forward "
        "and relevance together; predicted is what the plan says before the call, working memory inside ops left out.",
        "",
        "| model | provider | peak MB | predicted MB | / input x gradient | / frozen | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plan = "" if row.predicted is None else f"{row.predicted / 1e6:.1f}"
        ratios = f"{row.peak / bars[row.model].peak:.2f} | {row.peak / frozen[row.model].peak:.2f}"
        lines.append(
            f"| {row.model} | {row.provider} | {row.peak / 1e6:.1f} | {plan} | {ratios} | {row.milliseconds:.0f} |"
        )
    lines += ["", "## Depth", "", "Encoder layers of width 64 on 256 tokens.", ""]
    lines += ["| layers | kept MB peak | predicted | memory_budget=0 MB peak | predicted |", "|---|---|---|---|---|"]
    for full, least in zip(depths[::2], depths[1::2], strict=True):
        cells = [f"{value / 1e6:.2f}" for row in (full, least) for value in (row.peak, row.predicted or 0)]
        lines.append(f"| {full.model.split()[0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for memory.md and memory.csv")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    rows = [row for make in WORKLOADS for row in measure(make(), given.repeats)]
    depths = depth_rows()
    table = Table("model", "provider", "peak MB", "ms")
    for row in rows:
        table.add_row(row.model, row.provider, f"{row.peak / 1e6:.1f}", f"{row.milliseconds:.0f}")
    Console().print(table)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "memory.md").write_text(markdown(rows, depths, given.repeats), encoding="utf-8")
        with (given.out / "memory.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "provider", "peak_bytes", "predicted_bytes", "median_ms"])
            writer.writerows([[r.model, r.provider, r.peak, r.predicted, r.milliseconds] for r in [*rows, *depths]])


if __name__ == "__main__":
    main()
