"""Relevance maps per second: many targets of one input in one call of ours, against calling peers again and again.

    python bench/throughput.py [--out FOLDER] [--models vit gpt2] [--maps 32] [--batch 1 4] [--chunk 8] [--peers "LXT*"]

Targets are classes, or tokens spread over the positions. Every map of ours must first equal the attribution of its
target alone, and input x gradient autograd's, both to float32 rounding; a red check times nothing of that model and the
command fails. Then all take turns: ours in every form and eager input x gradient in this process, peers (see
bench/providers) in processes of their own. Milliseconds are those of one map of one sample, medians with p20 and p80.
Random weights, float32, CPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from harness import command, machine, markdown, measured_in_turns, of_this_machine, show, spread, write, write_csv
from peer_comparison import Case, Comparison, applying
from peer_worker import milliseconds
from providers.bars import INPUT_X_GRADIENT
from providers.registry import PROVIDERS
from torch import Tensor
from workloads import ENTRIES, Entry, Workload, explained_logits, input_x_gradient

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.memory import allocated_peak

MODELS = ("vit", "resnet50", "gpt2", "llama")
COMPOSITES = {"convolutional": ("attnlrp", "epsilon_plus")}
"""Those that peers have, too; elsewhere attnlrp alone."""
CPU = torch.device("cpu")
ROUNDING = 1e-4
"""Relative difference of two orders of summation in float32."""
Target = int | tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One way to get maps of one model: milliseconds are per map, the peak is that of one call."""

    model: str
    batch: int
    provider: str
    maps_per_call: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    maps_per_second: float
    x_input_x_gradient: float
    peak_mb: float | None


@dataclass(frozen=True)
class Call:
    """Something that makes ``maps`` relevance maps of each sample."""

    run: Callable[[], object]
    maps: int = 1


def targets_of(work: Workload, maps: int) -> list[Target]:
    """As many classes, or the same token at positions spread evenly; fewer where there are not so many."""
    if isinstance(work.target, int):
        with torch.no_grad():
            return list(range(min(maps, work.model(work.x[:1]).shape[1])))
    tokens = work.x.shape[1]
    positions = torch.linspace(0, tokens - 1, min(maps, tokens)).round().int().tolist()
    return [(position, *work.target[1:]) for position in positions]


def many(module: LRPModule, work: Workload, targets: list[Target], chunk: int | None) -> Tensor:
    """One forward pass and the relevance of each target: (targets, batch, ...)."""
    with torch.no_grad():
        _, tape = module.run(work.x)
        found: Tensor = tape.relevance_of_each(targets, chunk=chunk)
    return found


def one_by_one(module: LRPModule, work: Workload, targets: list[Target]) -> list[Tensor]:
    """One forward pass, then a relevance pass for each target."""
    with torch.no_grad():
        _, tape = module.run(work.x)
        return [tape.relevance(target) for target in targets]


def with_one_forward(work: Workload, targets: list[Target]) -> list[Tensor]:
    """Input x gradient with the graph of one forward pass kept for all targets."""
    leaf = work.x.clone().requires_grad_()
    output = work.model(leaf)
    scalars = [explained_logits(output, target).sum() for target in targets]
    return [torch.autograd.grad(scalar, leaf, retain_graph=True)[0] * work.x for scalar in scalars]


def agrees(work: Workload, modules: dict[str, LRPModule], targets: list[Target], sizes: list[int | None]) -> bool:
    """Whether maps made together equal those made alone, and those of input x gradient autograd's."""

    def near(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).norm() <= ROUNDING * expected.norm())

    for module, chunk in itertools.product(modules.values(), sizes):
        for found, target in zip(many(module, work, targets, chunk), targets, strict=True):
            if not near(found, module.attribute(work.x, target)):
                return False
    gradients = many(compile_for_lrp(work.model, "input_x_gradient"), work, targets[:2], None)
    pairs = zip(gradients, targets[:2], strict=True)
    return all(near(found, input_x_gradient(replace(work, target=target))) for found, target in pairs)


def own_calls(
    work: Workload, modules: dict[str, LRPModule], targets: list[Target], sizes: list[int | None]
) -> dict[str, Call]:
    """Ours in every form, and autograd."""
    turn: Iterator[Target] = itertools.cycle(targets)
    calls = {
        INPUT_X_GRADIENT: Call(lambda: input_x_gradient(replace(work, target=next(turn)))),
        f"{INPUT_X_GRADIENT}, one forward": Call(partial(with_one_forward, work, targets), len(targets)),
    }
    for name, module in modules.items():
        calls[f"ours, {name}, call by call"] = Call(partial(alone, module, work, turn))
        calls[f"ours, {name}, one by one"] = Call(partial(one_by_one, module, work, targets), len(targets))
        for chunk in sizes:
            form = "all at once" if chunk is None else f"chunks of {chunk}"
            calls[f"ours, {name}, {form}"] = Call(partial(many, module, work, targets, chunk), len(targets))
    return calls


def alone(module: LRPModule, work: Workload, turn: Iterator[Target]) -> Tensor:
    """The attribution of the next target."""
    found: Tensor = module.attribute(work.x, next(turn))
    return found


def compare(entry: Entry, batch: int, options: argparse.Namespace) -> list[Row] | None:
    """Check and measure one model; None where the check is red."""
    work = entry.seeded(batch, CPU)
    targets, sizes = targets_of(work, options.maps), [None, *options.chunk]
    modules = {name: compile_for_lrp(work.model, name) for name in COMPOSITES.get(entry.kind, ("attnlrp",))}
    if not agrees(work, modules, targets, sizes):
        return None
    own = own_calls(work, modules, targets, sizes)
    case = Case(entry, batch, "cpu", torch.get_num_threads(), "fp32", None, options.patience)
    chosen = [name for name in PROVIDERS if any(fnmatch.fnmatch(name, glob) for glob in options.peers)]
    with tempfile.TemporaryDirectory() as folder, Comparison(case, Path(folder)) as comparison:
        peers = [provider.name for provider in applying(case, chosen)[0] if provider.name in chosen]
        peers = [name for name in peers if comparison.start(name)]
        calls: dict[str, Callable[[], float]] = {name: partial(per_map, call) for name, call in own.items()}
        calls |= {name: partial(comparison.call, name) for name in peers}
        taken = measured_in_turns(calls, options.repeats, options.seconds)
        for name, cause in comparison.failures.items():
            print(f"{name} failed on {work.name}: {cause}")
            taken.pop(name, None)
    return rows_of(work, batch, own, taken)


def per_map(call: Call) -> float:
    """Milliseconds of a call, for each of its maps."""
    return milliseconds(call.run, CPU)[0] / call.maps


def rows_of(work: Workload, batch: int, own: dict[str, Call], taken: dict[str, list[float]]) -> list[Row]:
    """A line per provider; of calls in this process also the peak."""
    bar = spread(taken[INPUT_X_GRADIENT])[0]
    rows = []
    for name, values in taken.items():
        median, low, high = (value / batch for value in spread(values))
        peak = allocated_peak(own[name].run) / 1e6 if name in own else None
        maps = own[name].maps if name in own else 1
        figures = (median, low, high, 1e3 / median, median * batch / bar, peak)
        rows.append(Row(work.name, batch, name, maps, *figures))
    return rows


HEADER = ("provider", "maps a call", "ms a map", "p20", "p80", "maps/s", "x input x gradient", "peak MB")


def cells(row: Row) -> list[str]:
    """One line of a table."""
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    times = [f"{value:.1f}" for value in (row.median_ms, row.p20_ms, row.p80_ms)]
    ratios = [f"{value:.2f}" for value in (row.maps_per_second, row.x_input_x_gradient)]
    return [row.provider, str(row.maps_per_call), *times, *ratios, peak]


TEXT = """# Relevance maps per second

`{command}` on {machine}.

Random weights, float32. Many targets of one input: "all at once" is one call of `tape.relevance_of_each`, which maps
the relevance pass over as many targets as its default chunk holds; "one by one" asks the same tape for each; "call by
call" runs the forward pass again for each, as peers do. Every map equalled that of its target alone before anything was
timed. Milliseconds and maps are per sample; the ratio is to eager input x gradient called again and again.

{tables}
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command(
        __doc__, "write throughput.csv and throughput.md into a folder of this machine's in here", of_this_machine
    )
    parser.add_argument("--models", nargs="+", choices=ENTRIES, default=list(MODELS))
    parser.add_argument("--maps", type=int, default=32, help="targets of each input")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--chunk", type=int, nargs="*", default=[], help="further chunk sizes, beside the default")
    parser.add_argument("--peers", nargs="*", default=["LXT*", "zennit*"], help="names or globs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="what slow ones may take of each model's run")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a peer counts as stuck")
    return parser.parse_args()


def write_all(folder: Path, where: str, tables: list[str], rows: list[Row]) -> None:
    """What there is so far as tables and as a file for spreadsheets."""
    asked = shlex.join(["python", "bench/throughput.py", *sys.argv[1:]])
    write(folder / "throughput.md", TEXT.format(command=asked, machine=where, tables="\n\n".join(tables)))
    names = ("machine", *(field.name for field in fields(Row)))
    write_csv(folder / "throughput.csv", names, ((where, *astuple(row)) for row in rows))


def main() -> None:
    """Check, measure, print, and write files if asked to."""
    options, where = parse(), machine(transformers=transformers.__version__)
    transformers.utils.logging.set_verbosity_error()
    tables, rows, red = [], [], []
    for batch, key in itertools.product(options.batch, options.models):
        found = compare(ENTRIES[key], batch, options)
        if found is None:
            red.append(f"{key}, batch {batch}: maps made together differ from those made alone; nothing was timed")
            continue
        rows += found
        title = f"{found[0].model}, batch {batch}"
        show(f"{title}, {where}", HEADER, map(cells, found))
        tables.append(f"## {title}\n\n{markdown(HEADER, map(cells, found))}")
        if options.out:
            write_all(options.out, where, tables, rows)
    sys.exit("\n".join(red) or 0)


if __name__ == "__main__":
    main()
