"""Timings of kernels as tables, files and a picture: beside the roofline, beside eager, against their targets."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from ceilings import Ceilings, is_gpu
from harness import machine, markdown, short, spread, write, write_csv
from kernel_cases import CUBLAS, EAGER, KERNEL, STOCK, Case, Timing
from matplotlib.figure import Figure

HEADER = ("op", "workload", "dtype", "provider", "µs", "p20", "p80", "rate", "roofline", "x eager", "target")
COLUMNS = ("op", "workload", "dtype", "provider", "way", "median_us", "p20_us", "p80_us", "bytes", "flops", "roofline")

OF_COPY, OF_CUBLAS, OF_STOCK = 0.85, 0.8, 0.9
"""The targets on an H100: shares of a copy's bytes, of cuBLAS's operations and of torch's own op's speed."""


def seconds(timing: Timing) -> float:
    """The median."""
    return statistics.median(timing.microseconds) / 1e6


def target(timing: Timing, others: dict[str, Timing], ceilings: Ceilings) -> str:
    """Whether a kernel met its target, and what it reached; nothing for other providers."""
    if timing.provider != KERNEL:
        return ""
    taken = seconds(timing)
    if timing.case.spec.bound == "memory":
        reached, least, bar = timing.work.bytes / taken / ceilings.copy, OF_COPY, "copy"
    else:
        bar, least = (STOCK, OF_STOCK) if STOCK in others else (CUBLAS, OF_CUBLAS)
        reached = timing.work.flops / taken * seconds(others[bar]) / others[bar].work.flops
    return f"{'met' if reached >= least else 'missed'}: {reached:.0%} of {bar}, {least:.0%} asked"


def rows(timings: Iterable[Timing], ceilings: Ceilings) -> list[list[str]]:
    """One line per case and provider, as HEADER names them."""
    lines = []
    for case, made in by_case(timings).items():
        eager = seconds(made[EAGER])
        for name, timing in made.items():
            taken, case_cells = seconds(timing), [case.spec.name, case.label, short(case.dtype)]
            shown = f"{name} ({timing.way})" if timing.way else name
            figures = [f"{value:.1f}" for value in spread(timing.microseconds)]
            floor = ceilings.floor(timing.work, case.dtype) / taken
            compared = [f"{floor:.0%}", f"{eager / taken:.2f}", target(timing, made, ceilings)]
            lines.append([*case_cells, shown, *figures, rate(timing), *compared])
    return lines


def rate(timing: Timing) -> str:
    """Bytes per second of what memory bounds, else operations per second."""
    if timing.case.spec.bound == "memory":
        return f"{timing.work.bytes / seconds(timing) / 1e9:.1f} GB/s"
    return f"{timing.work.flops / seconds(timing) / 1e12:.2f} TFLOP/s"


def by_case(timings: Iterable[Timing]) -> dict[Case, dict[str, Timing]]:
    """Case -> provider -> its timing."""
    found: dict[Case, dict[str, Timing]] = {}
    for timing in timings:
        found.setdefault(timing.case, {})[timing.provider] = timing
    return found


def facts(device: torch.device, ceilings: Ceilings) -> dict[str, object]:
    """The machine, the software and the ceilings, for a line of JSON."""
    return {
        "device": machine(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "copy_bytes_per_second": ceilings.copy,
        "product_flops_per_second": {short(dtype): value for dtype, value in ceilings.product.items()},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


CHECKED = "Each kernel was compared with its reference in float64 on the same numbers before it was timed."

TEXT = """# Kernels of the relevance dialect, measured

`python bench/kernels.py --repeats {repeats}` on {machine}.

{checked} Medians with p20 and p80; providers take turns, and every call finds its inputs outside the cache where sets
of inputs suffice for that. Bytes and operations are those a call cannot do without; the roofline is the share of the
least time that the measured ceilings allow for them.

{ceilings}

{timings}

{notes}
"""


def write_all(
    folder: Path, timings: Sequence[Timing], ceilings: Ceilings, device: torch.device, texts: dict[str, str]
) -> None:
    """kernels.md, kernels.csv and machine.json in ``folder``; ``texts`` fills in what else TEXT shows."""
    texts = {**texts, "checked": CHECKED if is_gpu(device) else "No kernel was run."}
    write(folder / "kernels.md", TEXT.format(timings=markdown(HEADER, rows(timings, ceilings)), **texts))
    write(folder / "machine.json", json.dumps(facts(device, ceilings)) + "\n")
    write_csv(folder / "kernels.csv", COLUMNS, (record(timing, ceilings) for timing in timings))


def record(timing: Timing, ceilings: Ceilings) -> list[object]:
    """One line of a CSV file, as COLUMNS names them."""
    case, work = timing.case, timing.work
    share = ceilings.floor(work, case.dtype) / seconds(timing)
    names = [case.spec.name, case.label, short(case.dtype), timing.provider, timing.way]
    return [*names, *spread(timing.microseconds), work.bytes, work.flops, share]


def plot(path: Path, timings: Sequence[Timing], ceilings: Ceilings, title: str) -> None:
    """The roofline: operations per second over operations per byte, kernels filled and eager hollow."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    shown = [timing for timing in timings if timing.provider in (KERNEL, EAGER) and timing.work.flops]
    intensities = [timing.work.flops / max(timing.work.bytes, 1) for timing in shown]
    ends = min(intensities) / 2, max([*intensities, *(top / ceilings.copy for top in ceilings.product.values())]) * 2
    for dtype, top in ceilings.product.items():
        bend = top / ceilings.copy
        line = [(x, min(x * ceilings.copy, top)) for x in (ends[0], bend, ends[1])]
        axes.plot(*zip(*line, strict=True), linewidth=1, label=f"measured ceilings, {short(dtype)}")
    colours = {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(t.case.spec.name for t in shown))}
    for timing, intensity in zip(shown, intensities, strict=True):
        name, made = timing.case.spec.name, timing.work.flops / seconds(timing)
        fill = colours[name] if timing.provider == KERNEL else "none"
        axes.scatter(intensity, made, s=24, facecolors=fill, edgecolors=colours[name])
    for name, colour in colours.items():
        axes.scatter([], [], s=24, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(f"{title}\nkernels filled, eager hollow")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
