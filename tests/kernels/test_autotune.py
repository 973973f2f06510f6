"""Which of several ways to run a call is chosen: measured once per kind of call, on a GPU alone, by threads in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lrp_compiler.kernels import autotune
from lrp_compiler.kernels.autotune import Autotuner, UnfitError, call_key, device_times, measures
from lrp_compiler.kernels.registry import DIALECT
from lrp_compiler.kernels.spec import KernelSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Stopwatch:
    """A timer that knows beforehand how long everything takes, and counts how often it is asked."""

    def __init__(self, **milliseconds: list[float]) -> None:
        self.milliseconds, self.asked = milliseconds, 0

    def __call__(
        self, calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
    ) -> dict[str, list[float]]:
        self.asked += 1
        time.sleep(0.01)
        return {name: self.milliseconds[name] for name in calls}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that no graph is captured on."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("LRP_AUTOTUNE", raising=False)


def nothing() -> None:
    return None


def unfit() -> None:
    raise UnfitError("cannot do this")


@pytest.mark.usefixtures("on_a_gpu")
def test_the_least_median_wins_and_is_remembered() -> None:
    timer = Stopwatch(first=[2.0, 2.0, 2.0], second=[1.0, 9.0, 1.0])
    tuner = Autotuner(timer=timer)
    ways = {"first": nothing, "second": nothing}
    assert [tuner.fastest("key", ways, GPU) for _ in range(3)] == ["second"] * 3
    assert timer.asked == 1
    tuner.fastest("another key", ways, GPU)
    tuner.fastest("key", ways, torch.device("cuda", 1))
    assert timer.asked == 3
    assert Autotuner(timer=Stopwatch(first=[1.0], second=[2.0])).fastest("key", ways, GPU) == "first"


@pytest.mark.usefixtures("on_a_gpu")
def test_other_candidates_are_another_question() -> None:
    tuner = Autotuner(timer=Stopwatch(first=[3.0], second=[2.0], third=[1.0]))
    assert tuner.fastest("key", {"first": nothing, "second": nothing}, GPU) == "second"
    assert tuner.fastest("key", {"first": nothing, "third": nothing}, GPU) == "third"


@pytest.mark.usefixtures("on_a_gpu")
def test_threads_wait_for_one_measurement() -> None:
    timer = Stopwatch(first=[2.0], second=[1.0])
    tuner = Autotuner(timer=timer)
    barrier = threading.Barrier(8)

    def ask(_: int) -> str:
        barrier.wait()
        return tuner.fastest("key", {"first": nothing, "second": nothing}, GPU)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"second"}
    assert timer.asked == 1


@pytest.mark.usefixtures("on_a_gpu")
def test_the_first_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU, when told so, where bits must not change, during a capture, and where there is no choice."""
    timer = Stopwatch(first=[2.0], second=[1.0])
    ways = {"first": unfit, "second": unfit}
    tuner = Autotuner(timer=timer)
    assert measures(GPU) and not measures(CPU)
    assert tuner.fastest("key", ways, CPU) == "first"
    assert tuner.fastest("key", {"first": unfit}, GPU) == "first"
    with monkeypatch.context() as patched:
        patched.setenv("LRP_AUTOTUNE", "0")
        assert tuner.fastest("key", ways, GPU) == "first"
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tuner.fastest("key", ways, GPU) == "first"
    torch.use_deterministic_algorithms(True)
    try:
        assert tuner.fastest("key", ways, GPU) == "first"
    finally:
        torch.use_deterministic_algorithms(False)
    assert timer.asked == 0
    ways = {"first": nothing, "second": nothing}
    assert tuner.fastest("key", ways, GPU) == "second", "nothing was remembered"


@pytest.mark.usefixtures("on_a_gpu")
def test_what_does_not_fit_is_left_out() -> None:
    class OutOfResources(Exception):
        """As Triton calls it."""

    def too_large() -> None:
        raise OutOfResources

    timer = Stopwatch(first=[1.0], second=[2.0], third=[3.0])
    tuner = Autotuner(timer=timer)
    assert tuner.fastest("one", {"first": unfit, "second": nothing, "third": nothing}, GPU) == "second"
    assert tuner.fastest("two", {"first": too_large, "second": unfit, "third": nothing}, GPU) == "third"
    assert timer.asked == 1, "one that is left needs no measurement"
    with pytest.raises(UnfitError, match="cannot do this"):
        tuner.fastest("three", {"first": too_large, "second": unfit}, GPU)

    def broken() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        tuner.fastest("four", {"first": nothing, "second": broken}, GPU)


def test_a_key_tells_calls_apart_by_metadata() -> None:
    x = torch.zeros(4, 6)
    same = [(x, None, 2, [1, 2]), (torch.ones(4, 6), None, 2, [1, 2]), (torch.ones(4, 8)[:, :6], None, 2, [1, 2])]
    assert len({call_key(call) for call in same}) == 1
    other = [
        (torch.zeros(6, 4).t(), None, 2, [1, 2]),
        (x[:1].expand(4, 6), None, 2, [1, 2]),
        (x.bfloat16(), None, 2, [1, 2]),
        (x, x, 2, [1, 2]),
        (x, None, 3, [1, 2]),
        (x, None, 2, [1, 3]),
    ]
    assert len({call_key(call) for call in [same[0], *other]}) == len(other) + 1


def _with_ways(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[KernelSpec, list[Any]]:
    """A spec of two configurations that notes which one is run, instead of running it."""
    ran: list[Any] = []
    monkeypatch.setattr(KernelSpec, "configs", ("small", "large"))
    monkeypatch.setattr(KernelSpec, "run", lambda self, arguments, config=None: ran.append(config))
    return replace(DIALECT[0], **changes), ran


@pytest.mark.usefixtures("on_a_gpu")
def test_a_launch_runs_the_way_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "measures", lambda device: True)
    times = {"default": [3.0], "small": [2.0], "large": [1.0], "stock": [0.5]}
    x = torch.ones(2)
    spec, ran = _with_ways(monkeypatch, tuner=Autotuner(timer=Stopwatch(**times)))
    assert list(spec.ways(x)) == ["default", "small", "large"]
    spec.launch(x)
    assert ran[-1] == "large" and spec.way(x) == "large"
    spec, ran = _with_ways(monkeypatch, tuner=Autotuner(timer=Stopwatch(**times)), stock=lambda x: x + 1)
    assert torch.equal(spec.launch(x), x + 1) and spec.way(x) == "stock"
    spec, ran = _with_ways(monkeypatch, tuner=Autotuner(timer=Stopwatch(**times)), stock=lambda x: None)
    spec.launch(x)
    assert ran[-1] == "large" and spec.way(x) == "large"


def test_a_launch_off_a_gpu_runs_what_its_plan_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, ran = _with_ways(monkeypatch, stock=lambda x: x)
    spec.launch(torch.ones(2))
    assert ran == [None]


@pytest.mark.parametrize("spec", DIALECT, ids=lambda spec: spec.name)
def test_configurations_have_names_of_their_own(spec: KernelSpec) -> None:
    names = [str(config) for config in spec.configs]
    assert len(set(names)) == len(names) and not {"default", "stock"} & set(names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_are_those_of_the_device() -> None:
    """A product of eight times the operations takes longer, and is not the faster one."""
    small, large = (torch.randn(size, size, device="cuda") for size in (2048, 4096))
    calls = {"large": lambda: large @ large, "small": lambda: small @ small}
    taken = device_times(calls, 5, small.device)
    assert all(0 < one < other for one, other in zip(taken["small"], taken["large"], strict=True))
    assert Autotuner().fastest("key", calls, small.device) == "small"
