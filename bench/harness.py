"""What the benchmarks share: calls that take turns, the machine they ran on, tables and the options of a command."""

from __future__ import annotations

import argparse
import contextlib
import csv
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, after one to compile and warm up; they take turns, so that drift hits all alike."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def machine(**versions: str) -> str:
    """What the numbers were measured on: processor, threads, torch, and what else is named."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    software = {"torch": torch.__version__, **versions}
    return ", ".join([cpu, f"{torch.get_num_threads()} threads", *(f"{name} {v}" for name, v in software.items())])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows as a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as a table of the terminal."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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


def command(description: str | None, out: str) -> argparse.ArgumentParser:
    """The parser of a benchmark's command line, with ``--out`` for what ``out`` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=out)
    return parser
