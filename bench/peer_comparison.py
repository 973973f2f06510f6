"""One model, batch size and device: providers are started, checked against each other and timed in turns."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from harness import HERE, measured_in_turns
from peer_gate import Rounding, Verdict, verdicts
from peer_process import Worker, WorkerError
from peer_report import Measured
from providers.bars import INPUT_X_GRADIENT, PLAIN
from providers.base import Provider
from providers.registry import PROVIDERS
from torch import Tensor
from workloads import Entry

BARS = (PLAIN, INPUT_X_GRADIENT)

SETTLED = 0.02
"""Seconds between calls: the threads of the last worker spin for some milliseconds after its last loop."""

LOADING = 2
"""Workers that load side by side, each of which takes one core for most of that time."""

RESERVE = 0.4
"""The share of memory left free for the one call that runs; workers beyond it wait for their turn."""


@dataclass(frozen=True)
class Case:
    """What is compared on, and how its workers are called."""

    entry: Entry
    batch: int
    device: str
    threads: int
    dtype: str
    dynamic_lrp: Path | None
    patience: float

    def command(self, provider: str) -> list[str]:
        """The command line of a provider's worker."""
        options = {"model": self.entry.key, "provider": provider, "batch": self.batch, "device": self.device}
        options |= {"threads": self.threads, "dtype": self.dtype}
        if self.dynamic_lrp is not None:
            options["dynamic-lrp"] = self.dynamic_lrp
        pairs = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, str(Path(HERE) / "peer_worker.py"), *pairs]


def memory_is_free() -> bool:
    """Whether one more worker may stay; where Linux does not say, it may."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return True
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["MemAvailable"] > RESERVE * sizes["MemTotal"]


@dataclass
class Comparison:
    """The workers of one case; closing it ends them all."""

    case: Case
    folder: Path
    name: str = ""
    workers: dict[str, Worker] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    relevances: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Comparison:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.workers):
            self.end(name)

    def start(self, name: str) -> bool:
        """Start a provider's worker and warm it up; False, and the reason in ``failures``, where it cannot."""
        self.load([name])
        try:
            first = self.workers[name].ask("first")
        except WorkerError as error:
            self.failures[name] = str(error)
            self.end(name)
            return False
        self.first.setdefault(name, first)
        return True

    def load(self, names: Sequence[str]) -> None:
        """Have the workers of providers load their models, side by side, and wait until all have."""
        for name in names:
            if name not in self.workers:
                log = self.folder / f"{name.replace(' ', '-')}.txt"
                self.workers[name] = Worker(self.case.command(name), log, self.case.patience)
        for name in names:
            # One that ended says why when it is asked.
            with contextlib.suppress(WorkerError):
                self.name = self.workers[name].greeting

    def end(self, name: str) -> None:
        """End a worker, if there is one."""
        if name in self.workers:
            self.workers.pop(name).close()

    def check(self, providers: Sequence[Provider]) -> list[Verdict]:
        """Start every provider and compare what they give; those that there is no memory for wait."""
        for place, provider in enumerate(providers):
            if place % LOADING == 0:
                # Nothing loads while the first call of another is timed.
                self.load([one.name for one in providers[place : place + LOADING]])
            if not self.start(provider.name):
                continue
            self.read_relevance(provider.name)
            if not provider.timed or provider.name in self.failures:
                self.end(provider.name)
            elif provider.name not in BARS and not memory_is_free():
                self.end(provider.name)
                self.waiting.append(provider.name)
        if PLAIN not in self.workers:
            return []
        return verdicts(self.relevances, Rounding(*self.workers[PLAIN].ask("rounding")))

    def read_relevance(self, name: str) -> None:
        """Have a worker write down its relevance, and read it."""
        path = self.folder / "relevance.pt"
        try:
            if self.workers[name].ask(f"relevance {path}"):
                self.relevances[name] = torch.load(path)
        except WorkerError as error:
            self.failures[name] = str(error)

    def measure(self, repeats: int, seconds: float) -> list[list[Measured]]:
        """Runs of workers that took turns, each with both bars in it."""
        runs = [self.run(repeats, seconds)]
        while self.waiting:
            for name in set(self.workers) - set(BARS):
                self.end(name)
            while self.waiting and (memory_is_free() or set(self.workers) == set(BARS)):
                self.start(self.waiting.pop(0))
            runs.append(self.run(repeats, seconds))
        return runs

    def run(self, repeats: int, seconds: float) -> list[Measured]:
        """Call the workers that are there in turns, then ask each what one call takes of memory."""
        calls = {name: partial(self.call, name) for name in self.workers}
        taken = measured_in_turns(calls, repeats, seconds, is_warm=True)
        lasting = {name: values for name, values in taken.items() if name not in self.failures}
        measured = []
        for name, values in lasting.items():
            # The profiler behind "peak" stays in memory, so it comes last.
            said = {question: self.asked(name, question) for question in ("resident", "conservation", "peak")}
            measured.append(Measured(name, tuple(values), self.first[name], **said))
        return measured

    def call(self, name: str) -> float:
        """Milliseconds of one call; of a worker that failed, none are asked for any more."""
        if name in self.failures:
            return math.nan
        time.sleep(SETTLED)
        try:
            taken: float = self.workers[name].ask("go")
        except WorkerError as error:
            self.failures[name] = str(error)
            return math.nan
        return taken

    def asked(self, name: str, question: str) -> float | None:
        """An answer that the table can do without."""
        try:
            answer: float | None = self.workers[name].ask(question)
        except WorkerError:
            return None
        return answer


def applying(case: Case, names: Sequence[str]) -> tuple[list[Provider], list[str]]:
    """The providers among ``names`` that can run here, bars first, and a line for each that cannot."""
    chosen = [PROVIDERS[name] for name in PROVIDERS if name in {*BARS, *names} and PROVIDERS[name].applies(case.entry)]
    obstacles = {provider.name: provider.obstacle(case.dynamic_lrp) for provider in chosen}
    lines = [f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    return [provider for provider in chosen if not obstacles[provider.name]], lines
