"""What the benchmarks share: calls that take turns, the machine they ran on, tables and the options of a command."""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = str(Path(__file__).resolve().parent)
if HERE in sys.path:
    # Behind installed packages: transformers and others import a "kernels" and a "coverage" that are not ours.
    sys.path.append(sys.path.pop(sys.path.index(HERE)))


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, after one to compile and warm up; they take turns, so that drift hits all alike."""

    def milliseconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return measured_in_turns({name: partial(milliseconds, call) for name, call in calls.items()}, repeats)


STOLEN = 0.05
"""The share of the processors that a hypervisor may give to others while a call is timed."""
AGAIN = 4
"""How often a call is timed anew where it gave more."""


def stolen() -> float:
    """Seconds of all processors that a hypervisor has given to others so far; 0 where that is not told."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[8]) / os.sysconf(
            "SC_CLK_TCK"
        )
    return 0.0


def undisturbed(call: Callable[[], float]) -> float:
    """What a call says of itself, asked anew when others had the processors meanwhile."""
    for _ in range(1 + AGAIN):
        before, start = stolen(), time.perf_counter()
        said = call()
        if stolen() - before <= STOLEN * (time.perf_counter() - start) * (os.cpu_count() or 1):
            break
    return said


LEAST = 3
"""Calls of which a median still says something."""


def measured_in_turns(
    calls: Mapping[str, Callable[[], float]], repeats: int, seconds: float = math.inf, *, is_warm: bool = False
) -> dict[str, list[float]]:
    """The same of calls that say themselves how many milliseconds they took; all have run before where it ``is_warm``.

    What is taken down was ``undisturbed``, where that could be had. One that has taken ``seconds`` sits the later
    rounds out, but not the first three.
    """
    for call in () if is_warm else calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(repeats):
        for name, call in calls.items():
            if done < LEAST or sum(taken[name]) < seconds * 1e3:
                taken[name].append(undisturbed(call))
    return taken


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
"""Those that kernels take, by the names that command lines and tables use."""


def short(dtype: torch.dtype) -> str:
    """The name in DTYPES."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def processor() -> str:
    """The name of the CPU."""
    found = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), found)
    return found


def machine_folder(device: str = "cpu", threads: int | None = None) -> str:
    """The name of the folder for results of this machine: of its GPU, or of its processor and the threads in use."""
    if device != "cpu":
        return as_folder(torch.cuda.get_device_name())
    cores = torch.get_num_threads() if threads is None else threads
    return as_folder(f"{re.sub(r'[(](R|TM)[)]', '', processor())} {cores} cores")


def as_folder(name: str) -> str:
    """A device's name in letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def of_this_machine(folder: str) -> Path:
    """This machine's folder in a folder of results."""
    return Path(folder) / machine_folder()


def machine(device: torch.device | None = None, **versions: str) -> str:
    """What the numbers were measured on: ``device`` if it is a GPU, else processor and threads; software beside it."""
    threads = f"{torch.get_num_threads()} threads"
    where = [torch.cuda.get_device_name(device)] if device and device.type == "cuda" else [processor(), threads]
    software = {"torch": torch.__version__, **versions}
    return ", ".join([*where, *(f"{name} {version}" for name, version in software.items())])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows as a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as a table of the terminal."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    # Into a file or a pipe rich would cut every cell to fit 80 columns.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def write(path: Path, text: str) -> None:
    """The text as a file in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The rows as a file for spreadsheets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def publish(stem: str, header: Sequence[str], rows: Sequence[Sequence[str]], folder: Path | None) -> None:
    """Show rows measured in float32 at batch 1, and write them to ``stem``.md and .csv if there is a folder."""
    where = f"{machine()}, float32, batch 1"
    show(where, header, rows)
    if folder:
        write(folder / f"{stem}.md", f"{markdown(header, rows)}\n\n{where}\n")
        write_csv(folder / f"{stem}.csv", ("machine", *header), ([where, *row] for row in rows))


def command(description: str | None, out: str = "", kind: Callable[[str], Path] = Path) -> argparse.ArgumentParser:
    """The parser of a benchmark's command line, with ``--out`` for what ``out`` says, read by ``kind``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out:
        parser.add_argument("--out", type=kind, help=out)
    return parser
