"""What relevance costs, ours beside every peer: time, memory, first call and conservation, in one command.

    python bench/peers.py [--out FOLDER] [--models vit gpt2] [--providers "ours*" "LXT*"] [--batch 1 8] [--repeats N]

A process per provider loads the model with the same seed; where rules are the same, providers must agree before
anything is timed (a red gate times nothing of that model, and the command fails). Then they take turns, call by call,
with the same number of threads, and ratios are taken within one run. Where memory runs short, providers take turns in
groups, each with both bars in it. On CPU, and on a GPU where there is one. Random weights, float32.

zennit, LXT and Captum come with the extra [bench] (see CONTRIBUTING.md); one that is missing is named and left out. The
published engine of DynamicLRP is compared where ``--dynamic-lrp`` points at a checkout.

With ``--out``, results go to FOLDER/<machine>/: peers.csv, the tables in peers.md, peers.png; of batch size 8 to
peers-batch-8 of each, and with ``--dtype bf16``, which has ours compute relevance in bfloat16 and leaves everybody else
as it is, to peers-bf16. What these files know of models that are not asked for stays in them.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import DTYPES, command, machine, machine_folder, show
from peer_comparison import BARS, Case, Comparison, applying
from peer_report import HEADER, Section, cells, rows_of, stem, title_of, write_all
from providers.registry import PROVIDERS
from workloads import COMPARED, ENTRIES

VERSIONED = ("transformers", "zennit", "lxt", "captum")


def compare(case: Case, options: argparse.Namespace, origin: str = "") -> tuple[bool, Section]:
    """Check and measure one model; not green when the gate is red, or a bar or ours failed."""
    providers, obstacles = applying(case, options.providers)
    with tempfile.TemporaryDirectory() as folder, Comparison(case, Path(folder)) as comparison:
        found = comparison.check(providers)
        section = Section(title_of(comparison.name, case.batch, case.device), origin)
        for verdict in found:
            print(f"{section.title}: {verdict}", flush=True)
        is_green = not any(verdict.is_red for verdict in found) and all(bar in comparison.workers for bar in BARS)
        runs = comparison.measure(options.repeats, options.seconds) if is_green else []
        failures = comparison.failures
    section.gate = list(map(str, found))
    section.left_out = [*obstacles, *(f"{name}: {cause}" for name, cause in failures.items())]
    for run in runs:
        # Both bars run with every group; the table shows them once.
        known = {row.provider for row in section.rows}
        rows = rows_of(case.device, comparison.name, case.batch, run)
        section.rows += [row for row in rows if row.provider not in known]
    if not is_green:
        print(f"{section.title}: the gate is red; nothing was timed", flush=True)
    return is_green and not any(PROVIDERS[name].own for name in failures), section


def software(device: str) -> str:
    """The machine and the versions of what was compared."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return machine(torch.device(device), **found)


def every_device(options: argparse.Namespace) -> bool:
    """Compare everything on every device."""
    # The workers' number, which the machine's line tells.
    torch.set_num_threads(options.threads)
    green = [every_model(device, batch, options) for device in options.device for batch in options.batch]
    return all(green)


def every_model(device: str, batch: int, options: argparse.Namespace) -> bool:
    """Compare the models at one batch size, and write down what there is after each."""
    found: list[Section] = []
    where, is_green = software(device), True
    origin = f"`{shlex.join(['python', 'bench/peers.py', *sys.argv[1:]])}` on {where}."
    for key in options.models:
        entry, limits = ENTRIES[key], (options.threads, options.dtype, options.dynamic_lrp, options.patience)
        is_fine, section = compare(Case(entry, batch, device, *limits), options, origin)
        is_green = is_fine and is_green
        for line in section.left_out:
            print(f"left out of {section.title}: {line}", flush=True)
        if not section.rows:
            continue
        found.append(section)
        show(f"{section.title}, {where}", HEADER, map(cells, section.rows))
        if options.out:
            folder = options.out / machine_folder(device, options.threads)
            write_all(folder, stem(batch, options.dtype), where, found, options.dtype)
    return is_green


def matching(patterns: Sequence[str]) -> list[str]:
    """The providers that globs choose; exits where one chooses nothing."""
    for pattern in patterns:
        if not fnmatch.filter(PROVIDERS, pattern):
            sys.exit(f"no provider is called {pattern!r}; there are: {'; '.join(PROVIDERS)}")
    return [name for name in PROVIDERS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, "write peers.csv, peers.md and peers.png into a folder of this machine's in here")
    parser.add_argument("--models", nargs="+", choices=ENTRIES, default=[entry.key for entry in COMPARED])
    parser.add_argument("--providers", nargs="+", default=["*"], help="names or globs; both bars always run")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--seconds", type=float, default=8, help="what slow providers may take of each model's run, but for three calls"
    )
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a worker counts as stuck")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", nargs="+", default=devices, choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of ours' relevance; models are float32")
    parser.add_argument("--dynamic-lrp", type=Path, help="a checkout of github.com/keeinlev/dynamicLRP")
    options = parser.parse_args()
    options.providers = matching(options.providers)
    return options


def main() -> None:
    """Compare, print, and write files if asked to; the exit status says whether the gate was green."""
    sys.exit(0 if every_device(parse()) else 1)


if __name__ == "__main__":
    main()
