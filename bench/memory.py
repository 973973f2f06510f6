"""What relevance takes of memory: peak above weights and inputs of ours and of eager input x gradient, in one run.

    python bench/memory.py [--out FOLDER] [--repeats N]

Checks first that every memory setting gives the same relevance; a red check prints nothing else. Peaks are what torch's
allocator hands out (lrp_compiler.memory.allocated_peak), beside them what the plan predicts. Random weights, float32,
batch 1. Times are medians of interleaved calls, for what a setting costs.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from harness import command, in_turns, machine, markdown, of_this_machine, show, write, write_csv
from torch import Tensor
from workloads import Workload, encoder, gpt2, input_x_gradient, resnet, roberta, vit

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.memory import allocated_peak

WORKLOADS = (vit, roberta, gpt2, resnet)
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, memory_budget=0.75": {"memory_budget": 0.75},
    "ours, memory_budget=0.5": {"memory_budget": 0.5},
    "ours, memory_budget=0.2": {"memory_budget": 0.2},
    "ours, memory_budget=0": {"memory_budget": 0.0},
}
DEPTHS = (4, 8, 16, 32, 64)
EAGER, FROZEN = "eager input x gradient", "the same, frozen parameters"


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
    settings = {**SETTINGS, f"ours, recompute=['{work.layers}']": {"recompute": [work.layers]}}
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
        EAGER: partial(input_x_gradient, work),
        FROZEN: partial(with_frozen_parameters, work),
        **{name: partial(explained.attribute, work.x, work.target) for name, explained in settings.items()},
    }
    taken = in_turns(calls, repeats)
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
            rows.append(Row(work.name, name, peak, explained.report(work.x).memory.peak, math.nan))
    return rows


HEADER = ("model", "provider", "peak MB", "predicted MB", "/ input x gradient", "/ frozen", "ms")


def lines_of(rows: list[Row]) -> list[list[str]]:
    """The table of providers, their peaks beside those of both bars."""
    peaks = {(row.model, row.provider): row.peak for row in rows}
    lines = []
    for row in rows:
        plan = "" if row.predicted is None else f"{row.predicted / 1e6:.1f}"
        ratios = [f"{row.peak / peaks[row.model, bar]:.2f}" for bar in (EAGER, FROZEN)]
        lines.append([row.model, row.provider, f"{row.peak / 1e6:.1f}", plan, *ratios, f"{row.milliseconds:.0f}"])
    return lines


DEPTH_HEADER = ("layers", "kept MB peak", "predicted", "memory_budget=0 MB peak", "predicted")


def depth_lines_of(rows: list[Row]) -> list[list[str]]:
    """The table of depths, both settings of one in a line."""
    lines = []
    for full, least in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{value / 1e6:.2f}" for row in (full, least) for value in (row.peak, row.predicted or 0)]
        lines.append([full.model.split()[0], *cells])
    return lines


TEXT = """# Memory of relevance, AttnLRP against input x gradient

`python bench/memory.py --repeats {repeats}` on {machine}.

Random weights, float32, batch 1. Peak is what torch's allocator hands out above weights and inputs, forward and
relevance together; predicted is what the plan says before the call, working memory inside ops left out except that of
convolutions and packing.

{providers}

## Depth

Encoder layers of width 64 on 256 tokens.

{depths}
"""


def main() -> None:
    """Measure, print, and write results if asked to."""
    parser = command(
        __doc__, "also write memory.csv and memory.md into a folder of this machine's in here", of_this_machine
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    rows = [row for make in WORKLOADS for row in measure(make(), options.repeats)]
    depths = depth_rows()
    where = machine(transformers=transformers.__version__)
    show(where, HEADER, lines_of(rows))
    show("Depth", DEPTH_HEADER, depth_lines_of(depths))
    if options.out:
        tables = {
            "providers": markdown(HEADER, lines_of(rows)),
            "depths": markdown(DEPTH_HEADER, depth_lines_of(depths)),
        }
        write(options.out / "memory.md", TEXT.format(repeats=options.repeats, machine=where, **tables))
        header = ("model", "provider", "peak_bytes", "predicted_bytes", "median_ms")
        write_csv(options.out / "memory.csv", header, map(astuple, [*rows, *depths]))


if __name__ == "__main__":
    main()
