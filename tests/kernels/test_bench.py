"""The microbenchmark of kernels: a wrong kernel gets no time, and what it prints of a right one is as by hand."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrp_compiler.kernels.registry import DIALECT
from lrp_compiler.kernels.spec import KernelSpec, Work

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of bench/, which is gone afterwards: its kernels.py has another package's name."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


@pytest.fixture
def as_on_a_gpu(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs on the CPU: times are the host's, kernels are interpreted, inductor is eager."""
    for name in ("ceilings", "kernel_cases", "kernel_report"):
        monkeypatch.setattr(bench(name), "is_gpu", lambda device: True)
    monkeypatch.setattr(
        bench("kernel_cases"), "times", lambda calls, repeats, _: bench("harness").in_turns(calls, repeats)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    properties = SimpleNamespace(total_memory=2**30, L2_cache_size=2**10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def _case(bench: Callable[[str], ModuleType], **changes: Any) -> Any:
    first = bench("kernel_cases").cases("samples", [DIALECT[0].name], [torch.float32])[0]
    return replace(first, spec=replace(DIALECT[0], **changes))


def test_right_kernels_pass(bench: Callable[[str], ModuleType], device: torch.device) -> None:
    for case in bench("kernel_cases").cases("samples", [DIALECT[0].name], [torch.bfloat16, torch.float32]):
        assert bench("kernel_cases").failures(case, device) == {}


def _off(tensor: Tensor) -> Tensor:
    return tensor * 1.01


def _unwritten(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


@pytest.mark.parametrize(("broken", "words"), [(_off, "allowed"), (_unwritten, "error inf"), (Tensor.double, "dtype")])
def test_wrong_kernels_are_not_timed(
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    broken: Callable[[Tensor], Tensor],
    words: str,
) -> None:
    run = KernelSpec.run
    monkeypatch.setattr(KernelSpec, "run", lambda self, arguments, config=None: broken(run(self, arguments, config)))
    case = _case(bench)
    assert words in bench("kernel_cases").failures(case, device)["default"]
    kernels = bench("kernels")
    monkeypatch.setattr(kernels, "is_gpu", lambda device: True)
    monkeypatch.setattr(kernels, "measure", lambda *arguments: None)
    monkeypatch.setattr(kernels, "timings", lambda *arguments: pytest.fail("it was timed"))
    run_of_one = kernels.Run(_options(device))
    run_of_one.time([case])
    assert run_of_one.wrong == 1 and not run_of_one.timings and "WRONG, not timed" in run_of_one.left_out[0]


def _options(device: torch.device) -> argparse.Namespace:
    return argparse.Namespace(
        device=device, dtypes=[torch.float32], seconds=60.0, repeats=1, no_inductor=True, out=None, csv=None
    )


def test_a_case_that_fails_leaves_the_others(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, cases = bench("kernels"), bench("kernel_cases")
    monkeypatch.setattr(kernels, "measure", lambda *arguments: bench("ceilings").Ceilings(1e9, {torch.float32: 1e9}))

    def broken(*arguments: Any) -> None:
        raise RuntimeError("a launch failed\nmore")

    run = kernels.Run(_options(CPU))
    run.time([_case(bench, reference=broken), _case(bench)])
    assert run.wrong == 1 and len(run.timings) == 1
    assert run.left_out[0].endswith("not timed: RuntimeError: a launch failed")
    assert cases.checked(_case(bench, reference=broken), CPU) == {"kernel": "RuntimeError: a launch failed"}


def test_what_the_kernel_refuses_is_not_timed(bench: Callable[[str], ModuleType], device: torch.device) -> None:
    for index, _ in enumerate(DIALECT[0].refused(torch.float32, torch.device("meta"))):
        reason = bench("kernel_cases").failures(replace(_case(bench), kind="refused", index=index), device)["kernel"]
        assert reason.startswith("refused: ")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_every_provider_takes_its_turn(bench: Callable[[str], ModuleType], device: torch.device) -> None:
    """Torch's own op is the bar where there is one, cuBLAS where operations are the bound and there is none."""
    cases = bench("kernel_cases")
    always = {cases.KERNEL, cases.EAGER, cases.INDUCTOR}
    expected = {
        ("memory", None): always,
        ("compute", None): always | {cases.CUBLAS},
        ("compute", DIALECT[0].reference): always | {cases.STOCK},
        ("memory", lambda *arguments: None): always,
    }
    for (bound, stock), providers in expected.items():
        made = cases.timings(_case(bench, bound=bound, stock=stock), device, repeats=2, inductor=True)
        assert {timing.provider for timing in made} == providers
        assert all(len(timing.microseconds) == 2 and min(timing.microseconds) > 0 for timing in made)
    made = cases.timings(_case(bench), device, repeats=1, inductor=False)
    assert {timing.provider for timing in made} == {cases.KERNEL, cases.EAGER}
    assert [timing.way for timing in made if timing.provider == cases.KERNEL] == ["default"]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_inputs_outgrow_the_cache(bench: Callable[[str], ModuleType]) -> None:
    """At least three times the cache of 1 KB, at most sixteen sets, at most an eighth of the memory of 1 GB."""
    rotation = bench("kernel_cases")._rotation
    assert [rotation(Work(size, 1), CPU) for size in (1000, 4000, 1, 2**27, 2**30)] == [4, 1, 16, 1, 1]


def test_targets_by_hand(bench: Callable[[str], ModuleType]) -> None:
    """A copy at 1 GB/s, products at 1 TFLOP/s: a megabyte is 1,000 µs, of which 85 % are asked."""
    cases, report = bench("kernel_cases"), bench("kernel_report")
    ceilings = bench("ceilings").Ceilings(1e9, {torch.float32: 1e12})

    def target(microseconds: float, bound: str, work: Work, **bars: tuple[float, Work]) -> str:
        case = _case(bench, bound=bound)
        made = {name: cases.Timing(case, name, "", done, (taken,)) for name, (taken, done) in bars.items()}
        found: str = report.target(cases.Timing(case, cases.KERNEL, "", work, (microseconds,)), made, ceilings)
        return found

    megabyte, product = Work(10**6, 0), Work(0, 10**9)
    assert target(1100, "memory", megabyte) == "met: 91% of copy, 85% asked"
    assert target(1200, "memory", megabyte) == "missed: 83% of copy, 85% asked"
    twice = (1900.0, Work(0, 2 * 10**9))
    assert target(1000, "compute", product, **{cases.CUBLAS: twice}).startswith("met: 95% of torch.mm")
    assert target(1200, "compute", product, **{cases.CUBLAS: twice}).startswith("missed: 79% of torch.mm")
    both = {cases.CUBLAS: twice, cases.STOCK: (900.0, product)}
    assert target(1000, "compute", product, **both) == "met: 90% of torch's own, 90% asked"
    assert target(1100, "compute", product, **both) == "missed: 82% of torch's own, 90% asked"
    assert ceilings.floor(Work(10**6, 3 * 10**9), torch.float32) == pytest.approx(3e-3)


def test_the_first_workload_of_every_op_comes_first(bench: Callable[[str], ModuleType]) -> None:
    """A run whose time is up has seen every op."""
    made = bench("kernel_cases").cases("workloads", (), [torch.bfloat16, torch.float32])
    first = [case.spec.name for case in made if case.dtype is torch.bfloat16][: len(DIALECT)]
    assert first == [spec.name for spec in DIALECT if torch.bfloat16 in spec.dtypes]
    assert len(set(made)) == len(made)


def _python(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "TRITON_INTERPRET")}
    asked = [sys.executable, *command]
    return subprocess.run(asked, check=False, capture_output=True, text=True, env={**environ, **variables})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "roofline.png"
    options = ["--op", DIALECT[0].name, "--repeats", "1", "--out", str(tmp_path), "--plot", str(picture)]
    done = _python(str(BENCH / "kernels.py"), *options)
    assert done.returncode == 0, done.stderr
    assert "no GPU: kernels are not timed" in done.stdout
    written = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "no GPU: kernels are not timed" in written and "| eager |" in written and "| kernel" not in written
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.md", "kernels.csv", "machine.json", picture.name}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_make_gpu_needs_a_gpu() -> None:
    done = _python(str(BENCH / "gpu.py"))
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
