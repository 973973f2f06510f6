"""bench/throughput.py and bench/scaling.py at tiny sizes: their checks, their ratios and what they write."""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmarks' modules; their folder is last on the path, as it is when they run."""
    sys.path.append(str(BENCH))
    try:
        yield SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("throughput", "scaling", "workloads")}
        )
    finally:
        sys.path.remove(str(BENCH))


def without_profiler(call: Any, device: Any = "cpu") -> int:
    """A peak that needs no profiler."""
    call()
    return 2_000_000


def test_targets_are_classes_or_spread_positions(bench: SimpleNamespace) -> None:
    work = bench.workloads.ENTRIES["tiny"].seeded(1, torch.device("cpu"))
    assert bench.throughput.targets_of(work, 4) == [0, 1, 2, 3]
    assert len(bench.throughput.targets_of(work, 40)) == 10
    tokens = bench.workloads.Workload("", work.model, torch.zeros(1, 9, 2), "*", (-1, 5))
    assert bench.throughput.targets_of(tokens, 3) == [(0, 5), (4, 5), (8, 5)]


def test_throughput_is_per_map_and_sample(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(maps=4, chunk=[3], peers=[], repeats=3, seconds=1.0, patience=60.0)
    entry = bench.workloads.ENTRIES["tiny"]
    monkeypatch.setattr(bench.throughput, "milliseconds", lambda call, device: (call(), (12.0, None))[1])
    monkeypatch.setattr(bench.throughput, "allocated_peak", without_profiler)
    rows = {row.provider: row for row in bench.throughput.compare(entry, 2, options)}
    whole, alone = rows["ours, attnlrp, all at once"], rows["ours, attnlrp, call by call"]
    assert (whole.maps_per_call, whole.median_ms, whole.peak_mb) == (4, 12 / 4 / 2, 2.0)
    assert (alone.maps_per_call, alone.median_ms, alone.maps_per_second) == (1, 12 / 2, 1e3 / 6)
    assert whole.x_input_x_gradient == 0.25 and "ours, epsilon_plus, chunks of 3" in rows


def test_maps_that_differ_are_not_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(maps=2, chunk=[], peers=[], repeats=3, seconds=1.0, patience=60.0)
    monkeypatch.setattr(bench.throughput, "many", lambda module, work, targets, chunk: torch.ones(2, *work.x.shape))
    assert bench.throughput.compare(bench.workloads.ENTRIES["tiny"], 1, options) is None


def test_scaling_writes_a_curve_per_provider(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = bench.scaling
    monkeypatch.setattr(scaling, "allocated_peak", without_profiler)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--axes", "width", "--width", "64", "128", "--repeats", "1"])
    options = scaling.parse()
    assert options.tokens == list(scaling.AXES["tokens"])
    monkeypatch.setattr(scaling.Size, "__init__", small(scaling.Size))
    found = [point for value in options.width for point in scaling.points("width", value, options)]
    assert [point.provider for point in found] == [scaling.PLAIN, scaling.EAGER, scaling.OURS] * 2
    assert found[3].parameters > 2 * found[0].parameters and all(point.median_ms > 0 for point in found)
    scaling.write_all(tmp_path, found, "a machine")
    with (tmp_path / "scaling.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["peak_mb"]) for line in lines] == [2.0] * 6
    assert "| parameters | ours, attnlrp |" in (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def small(size: Any) -> Any:
    """The initialiser of a size whose model is small unless told otherwise."""
    made = size.__init__

    def initialise(self: Any, **given: int) -> None:
        made(self, **{"tokens": 8, "depth": 1, "width": 64, **given})

    return initialise


def test_a_power_law_is_found_again(bench: SimpleNamespace) -> None:
    scaling = bench.scaling
    points = [
        scaling.Point("tokens", n, 1, name, n**1.5, 0.0, 0.0, 3.0 * n)
        for n in (4, 8, 16, 32)
        for name in scaling.COLOURS
    ]
    assert scaling.exponents(points) == [["tokens", name, "1.50", "1.00"] for name in scaling.COLOURS]
