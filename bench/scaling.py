"""How the cost of relevance grows with batch, sequence length, depth and parameters of a Llama: time and peak memory.

    python bench/scaling.py [--out FOLDER] [--axes tokens depth] [--tokens 512 8192] [--device cuda] [--billion]

Per point of an axis a plain forward, eager input x gradient (parameters frozen) and AttnLRP of ours (``attribute`` for
the last token) take turns; peaks are what torch's allocator hands out in one call above model and input
(lrp_compiler.memory.allocated_peak), measured alike for all three. At the first point of each axis ours with composite
input_x_gradient must first equal autograd's; a red check prints nothing more. The exponent p fits cost ~ size^p over
the second half of an axis, where fixed costs weigh less. Random weights, float32.

With ``--billion`` one token of a Llama of 1.2 billion parameters in bfloat16 is explained instead (bench/billion.py).
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import billion
import torch
import transformers
from compile_time import exponent
from harness import command, machine, machine_folder, markdown, measured_in_turns, show, spread, write, write_csv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peer_worker import milliseconds
from workloads import Workload, agrees_with_autograd, input_x_gradient, of_tokens

from lrp_compiler import compile_for_lrp
from lrp_compiler.memory import allocated_peak

OURS, EAGER, PLAIN = "ours, attnlrp", "eager input x gradient", "plain forward"
COLOURS = {OURS: "tab:blue", EAGER: "tab:gray", PLAIN: "tab:green"}
HEAD = 64
"""Width of an attention head."""


@dataclass(frozen=True)
class Size:
    """A Llama and its input: batch, tokens, layers and width; the other sizes follow."""

    batch: int = 1
    tokens: int = 256
    depth: int = 4
    width: int = 256

    def workload(self, device: torch.device) -> Workload:
        """The last token's logit, explained at the embeddings."""
        config = transformers.LlamaConfig(
            vocab_size=8000,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // HEAD,
            num_key_value_heads=self.width // HEAD,
            max_position_embeddings=max(2048, self.tokens),
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        work = of_tokens("Llama", model, "model.layers.*", (-1, 3), (self.batch, self.tokens))
        return replace(work, model=work.model.requires_grad_(False).to(device), x=work.x.to(device))


AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16),
    "tokens": (512, 1024, 2048, 4096, 8192),
    "depth": (2, 4, 8, 16, 32),
    "width": (128, 256, 512, 1024, 1536),
}
"""What is varied, one at a time, and over which values; the parameters grow with depth and with width squared."""
ON_CUDA = {"tokens": (512, 2048, 8192, 16384, 32768)}


@dataclass(frozen=True)
class Point:
    """One provider at one size: median milliseconds with their spread, peak in MB."""

    axis: str
    value: int
    parameters: int
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float


def plain(work: Workload) -> torch.Tensor:
    """The model without autograd."""
    with torch.no_grad():
        output: torch.Tensor = work.model(work.x)
    return output


def points(axis: str, value: int, options: argparse.Namespace) -> list[Point]:
    """All three providers at one size; exits where the check is red."""
    work = replace(Size(), **{axis: value}).workload(options.device)
    if value == min(vars(options)[axis]) and not agrees_with_autograd(work):
        sys.exit(f"{axis} {value}: ours disagrees with autograd; nothing more was timed")
    module = compile_for_lrp(work.model, "attnlrp")
    calls: dict[str, Callable[[], object]] = {
        PLAIN: partial(plain, work),
        EAGER: partial(input_x_gradient, work),
        OURS: partial(module.attribute, work.x, work.target),
    }
    timed = {name: partial(time_of, call, options.device) for name, call in calls.items()}
    taken = measured_in_turns(timed, options.repeats, options.seconds)
    parameters = sum(parameter.numel() for parameter in work.model.parameters())
    return [
        Point(axis, value, parameters, name, *spread(taken[name]), allocated_peak(call, options.device) / 1e6)
        for name, call in calls.items()
    ]


def time_of(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    return milliseconds(call, device)[0]


HEADER = ("axis", "value", "parameters", "provider", "median ms", "p20", "p80", "peak MB", "x time", "x memory")


def lines_of(found: Sequence[Point]) -> list[list[str]]:
    """The table: ratios are to input x gradient at the same size."""
    bars = {(point.axis, point.value): point for point in found if point.provider == EAGER}
    lines = []
    for point in found:
        bar = bars[point.axis, point.value]
        times = [f"{ms:.1f}" for ms in (point.median_ms, point.p20_ms, point.p80_ms)]
        ratios = [f"{point.median_ms / bar.median_ms:.2f}", f"{point.peak_mb / bar.peak_mb:.2f}"]
        size = [point.axis, f"{point.value}", f"{point.parameters / 1e6:.1f}M", point.provider]
        lines.append([*size, *times, f"{point.peak_mb:.1f}", *ratios])
    return lines


def exponents(found: Sequence[Point]) -> list[list[str]]:
    """Per axis and provider, how time and memory grow; a width counts by the parameters that come of it."""
    lines = []
    for axis in dict.fromkeys(point.axis for point in found):
        for name in COLOURS:
            curve = [point for point in found if (point.axis, point.provider) == (axis, name)]
            late = curve[(len(curve) - 1) // 2 :]
            if len(late) > 1:
                sizes = [place(point) for point in late]
                fits = [exponent(sizes, [value(point) for point in late]) for value in (time_at, peak_at)]
                lines.append([label(axis), name, *(f"{fit:.2f}" for fit in fits)])
    return lines


def place(point: Point) -> int:
    """Where a point stands on its axis."""
    return point.parameters if point.axis == "width" else point.value


def label(axis: str) -> str:
    """What an axis shows."""
    return "parameters" if axis == "width" else axis


def time_at(point: Point) -> float:
    """Milliseconds."""
    return point.median_ms


def peak_at(point: Point) -> float:
    """Megabytes."""
    return point.peak_mb


def plot(path: Path, found: Sequence[Point]) -> None:
    """A column of curves per axis, time above memory, both scales logarithmic."""
    axes = list(dict.fromkeys(point.axis for point in found))
    page = Figure(figsize=(3.2 * len(axes) + 0.6, 5.6), layout="constrained")
    panels = page.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        for row, (value, unit) in enumerate(((time_at, "ms"), (peak_at, "peak MB"))):
            panel = panels[row, column]
            for name, colour in COLOURS.items():
                curve = [point for point in found if (point.axis, point.provider) == (axis, name)]
                panel.loglog([place(p) for p in curve], [value(p) for p in curve], "o-", color=colour, label=name)
            measured = sorted({place(point) for point in found if point.axis == axis})
            panel.set_xticks(measured, [f"{n / 1e6:.0f}M" if axis == "width" else str(n) for n in measured])
            panel.set_xticks([], minor=True)
            panel.set_xlabel(label(axis), fontsize=8)
            panel.set_ylabel(unit, fontsize=8)
            panel.tick_params(labelsize=7)
    panels[0, 0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(page).print_png(str(path))


TEXT = """# How the cost of relevance grows

`{command}` on {machine}.

A Llama of {size} unless an axis says otherwise.
Random weights, float32. One token's logit is explained at the embeddings; ours is `attribute`, which returns
attributions alone. Peaks are what torch's allocator hands out in one call above model and input; ratios are to eager
input x gradient (parameters frozen) at the same size.

Cost ~ size^p over the second half of each axis:

{exponents}

{table}
"""


def write_all(folder: Path, found: Sequence[Point], where: str) -> None:
    """scaling.csv, scaling.md and scaling.png."""
    base = ", ".join(f"{name} {value}" for name, value in vars(Size()).items())
    table = markdown(HEADER, lines_of(found))
    fits = markdown(("axis", "provider", "p of time", "p of memory"), exponents(found))
    asked = shlex.join(["python", "bench/scaling.py", *sys.argv[1:]])
    write(folder / "scaling.md", TEXT.format(command=asked, machine=where, size=base, exponents=fits, table=table))
    names = ("machine", *(field.name for field in fields(Point)))
    write_csv(folder / "scaling.csv", names, ((where, *astuple(point)) for point in found))
    plot(folder / "scaling.png", found)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, "write scaling.csv, scaling.md and scaling.png into a folder of this machine's in here")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, nargs="+", help=f"values of this axis; by default {AXES[axis]}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="what each may take of a point, but for three calls")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--billion", type=int, nargs="*", metavar="TOKENS", help="by default 128 and 512 tokens")
    options = parser.parse_args()
    if options.out:
        options.out /= machine_folder(options.device.type)
    values = AXES | (ON_CUDA if options.device.type == "cuda" else {})
    for axis, usual in values.items():
        setattr(options, axis, getattr(options, axis) or list(usual))
    return options


def main() -> None:
    """Measure, print, and write files if asked to."""
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    if options.billion is not None:
        billion.run(options.billion or [128, 512], options.device, options.out)
        return
    found: list[Point] = []
    where = machine(options.device, transformers=transformers.__version__)
    for axis in options.axes:
        for value in vars(options)[axis]:
            found += points(axis, value, options)
            print(*(" | ".join(line) for line in lines_of(found[-3:])), sep="\n", flush=True)
        if options.out:
            write_all(options.out, found, where)
    show(where, HEADER, lines_of(found))
    assert not any(math.isnan(point.peak_mb) for point in found)


if __name__ == "__main__":
    main()
