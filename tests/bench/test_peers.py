"""bench/peers.py on a tiny model: its workers' protocol, its gate, and ratios from one run."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
PARTS = ("peer_comparison", "peer_gate", "peer_process", "peer_report", "peer_worker", "workloads")
CPU = torch.device("cpu")

ECHO = """
import json, sys
print(json.dumps({"value": "ready"}), flush=True)
for line in sys.stdin:
    if line.strip() == "die":
        sys.exit("out of memory")
    if line.strip() == "sleep":
        import time; time.sleep(60)
    answer = {"error": "ValueError: no"} if line.strip() == "fail" else {"value": line.split()}
    print(json.dumps(answer), flush=True)
"""
"""A worker that answers with the question."""


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules; its folder is last on the path, as it is when the benchmark runs."""
    sys.path.append(str(BENCH))
    try:
        found = {name: importlib.import_module(name) for name in PARTS}
        # By its path: a helper of the tests has the same name.
        spec = importlib.util.spec_from_file_location("bench_peers", BENCH / "peers.py")
        assert spec is not None and spec.loader is not None
        command = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = command
        spec.loader.exec_module(command)
        yield SimpleNamespace(**found, peers=command, PROVIDERS=importlib.import_module("providers.registry").PROVIDERS)
    finally:
        sys.path.remove(str(BENCH))


def setting(bench: SimpleNamespace, batch: int = 2) -> Any:
    """The tiny network, built from the seed that all workers use."""
    entry = bench.workloads.ENTRIES["tiny"]
    base = importlib.import_module("providers.base")
    return base.Setting(entry, entry.seeded(batch, CPU))


def gradient_times_input(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of logit 3, one sample after the other."""
    rows = []
    for sample in x:
        leaf = sample[None].clone().requires_grad_()
        model(leaf)[0, 3].backward()
        assert leaf.grad is not None
        rows.append(leaf.grad[0] * sample)
    return torch.stack(rows)


class InProcess:
    """A worker that is no process: its command line is read, its questions go through the protocol."""

    bench: SimpleNamespace

    def __init__(self, command: list[str], log: Path, patience: float) -> None:
        name, batch = (command[command.index(option) + 1] for option in ("--provider", "--batch"))
        made = setting(self.bench, int(batch))
        self.session = self.bench.peer_worker.Session(self.bench.PROVIDERS[name], made)
        self.greeting = made.work.name

    def ask(self, question: str) -> Any:
        answers = io.StringIO()
        self.bench.peer_worker.serve(self.session, [question], answers)
        answer = json.loads(answers.getvalue())
        if "error" in answer:
            raise self.bench.peer_process.WorkerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def compare(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compare providers on the tiny network with workers in this process: (whether it is green, section)."""
    monkeypatch.setattr(InProcess, "bench", bench, raising=False)
    monkeypatch.setattr(bench.peer_comparison, "Worker", InProcess)

    def run(*names: str) -> tuple[bool, Any]:
        case = bench.peer_comparison.Case(bench.workloads.ENTRIES["tiny"], 2, "cpu", 1, "fp32", None, 60.0)
        options = argparse.Namespace(providers=bench.peers.matching(names), repeats=4, seconds=60.0)
        return bench.peers.compare(case, options)

    return run


def test_a_session_answers_by_lines(bench: SimpleNamespace, tmp_path: Path) -> None:
    made, path, answers = setting(bench), tmp_path / "relevance.pt", io.StringIO()
    questions = ["first", f"relevance {path}", "go", "conservation", "peak", "rounding", "nonsense", "quit", "go"]
    session = bench.peer_worker.Session(bench.PROVIDERS["eager input x gradient"], made)
    bench.peer_worker.serve(session, questions, answers)
    *lines, nonsense = map(json.loads, answers.getvalue().splitlines())
    first, saved, again, conservation, peak, rounding = (line["value"] for line in lines)
    assert saved is True and first > 0 and again > 0 and peak > 0
    assert nonsense["error"].startswith("AttributeError")
    expected = gradient_times_input(made.work.model, made.work.x)
    torch.testing.assert_close(torch.load(path), expected)
    given = made.work.model(made.work.x)[:, 3].sum()
    assert conservation == pytest.approx(float(abs(expected.sum() - given) / abs(given)), rel=1e-3)
    # A 3 x 3 convolution of 3 channels, and a dense layer that reads 64 values.
    assert rounding == pytest.approx([2.0**-23 * (math.sqrt(27) + 8)] * 2)


def test_a_worker_is_asked_and_its_end_has_a_reason(bench: SimpleNamespace, tmp_path: Path) -> None:
    process = bench.peer_process
    worker = process.Worker([sys.executable, "-c", ECHO], tmp_path / "log", 60.0)
    assert worker.greeting == "ready"
    assert worker.ask("relevance here") == ["relevance", "here"]
    with pytest.raises(process.WorkerError, match="ValueError: no"):
        worker.ask("fail")
    with pytest.raises(process.WorkerError, match="no answer to 'die', exit status 1: out of memory"):
        worker.ask("die")
    worker.close()


def test_a_worker_that_is_stuck_is_ended(bench: SimpleNamespace, tmp_path: Path) -> None:
    worker = bench.peer_process.Worker([sys.executable, "-c", ECHO], tmp_path / "log", 60.0)
    assert worker.greeting == "ready"
    worker._patience = 0.2
    with pytest.raises(bench.peer_process.WorkerError, match="no answer to 'sleep' within 0 s"):
        worker.ask("sleep")
    worker.close()


@pytest.mark.skipif(importlib.util.find_spec("zennit") is None, reason="zennit is not installed")
def test_providers_that_agree_are_timed(compare: Any) -> None:
    is_green, report = compare("ours, epsilon", "ours, epsilon, with outputs", "zennit, epsilon", "ours, input_x*")
    assert is_green and len(report.gate) == 3, report.gate
    timed = {row.provider: row for row in report.rows}
    assert list(timed)[:2] == ["plain forward", "eager input x gradient"]
    # What is only compared is not timed.
    assert set(list(timed)[2:]) == {"ours, epsilon", "ours, epsilon, with outputs", "zennit, epsilon"}
    ours, bar = timed["ours, epsilon"], timed["eager input x gradient"]
    assert ours.x_input_x_gradient == ours.median_ms / bar.median_ms and ours.calls == 4
    assert ours.conservation <= 1e-6 < bar.conservation
    assert timed["plain forward"].conservation is None


@pytest.mark.parametrize("wrong", [1.0001, math.nan, math.inf])
def test_the_gate_is_red_when_a_provider_is_wrong(
    bench: SimpleNamespace, compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, wrong: float
) -> None:
    name = "ours, input_x_gradient"
    provider = bench.PROVIDERS[name]

    def prepare(made: Any) -> Any:
        right = provider.prepare(made)
        return replace(right, relevance=lambda result: wrong * right.relevance(result))

    monkeypatch.setitem(bench.PROVIDERS, name, replace(provider, prepare=prepare))
    is_green, report = compare(name)
    assert not is_green and not report.rows
    printed = capsys.readouterr().out
    assert "ours, input_x_gradient differs from eager input x gradient" in printed
    assert "the gate is red; nothing was timed" in printed


def test_ours_failing_fails_and_a_peer_failing_is_told(
    bench: SimpleNamespace, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(made: Any) -> Any:
        raise ValueError("not here")

    for name in ("Captum, epsilon", "ours, epsilon"):
        monkeypatch.setitem(bench.PROVIDERS, name, replace(bench.PROVIDERS[name], prepare=prepare, packages=()))
    is_green, report = compare("Captum, epsilon")
    assert is_green and report.left_out == ["Captum, epsilon: ValueError: not here"]
    is_green, report = compare("ours, epsilon")
    assert not is_green and len(report.rows) == 2


def test_what_is_missing_is_named(bench: SimpleNamespace, compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zennit = bench.PROVIDERS["zennit, epsilon"]
    monkeypatch.setitem(bench.PROVIDERS, zennit.name, replace(zennit, packages=("surely_not_installed",)))
    is_green, report = compare("zennit, epsilon")
    assert is_green and report.left_out == [
        "zennit, epsilon: surely_not_installed not installed; make bench installs it"
    ]


def test_providers_for_which_there_is_no_memory_run_in_groups(
    bench: SimpleNamespace, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.peer_comparison, "memory_is_free", lambda: False)
    names = ["another", "and another"]
    for name in names:
        monkeypatch.setitem(bench.PROVIDERS, name, replace(bench.PROVIDERS["eager input x gradient"], name=name))
    is_green, report = compare(*names)
    assert is_green and {row.provider for row in report.rows} == {"plain forward", "eager input x gradient", *names}


def test_ratios_are_to_the_bars_of_the_same_run(bench: SimpleNamespace, tmp_path: Path) -> None:
    report = bench.peer_report
    run = [
        report.Measured("plain forward", (9.0, 10.0, 11.0), 30.0, 2_000_000),
        report.Measured("eager input x gradient", (19.0, 20.0, 24.0), 40.0, 5_000_000, 6_000_000, 0.5),
        report.Measured("ours, attnlrp", (12.0, 13.0, 17.0), 900.0, 3_000_000, 4_000_000, 1e-7),
    ]
    rows = report.rows_of("cpu", "net", 8, run)
    assert [row.x_forward for row in rows] == [1.0, 2.0, 1.3]
    assert [row.x_input_x_gradient for row in rows] == [0.5, 1.0, 0.65]
    assert [row.peak_x_input_x_gradient for row in rows] == [0.4, 1.0, 0.6]
    section = report.Section("net, batch 8, cpu", "`command` on a machine.", rows, ["they agree"], ["X: not installed"])
    text = report.text_of([str(section)], "fp32")
    assert "| ours, attnlrp | 13.0 | 12.4 | 15.4 | 1.30 | 0.65 | 3 | 0.60 | 4 | 900 | 1.0e-07 |" in text
    assert "## net, batch 8, cpu" in text and "* they agree" in text and "* X: not installed" in text
    report.write_all(tmp_path, "peers", "a machine", [section], "fp32")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "peers.md").read_text(encoding="utf-8") == text
    with (tmp_path / "peers.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["x_input_x_gradient"]) for row in written] == [0.5, 1.0, 0.65]


def test_what_is_known_of_other_models_stays(bench: SimpleNamespace, tmp_path: Path) -> None:
    report = bench.peer_report

    def section(model: str, ours: float, gate: str) -> Any:
        calls = {"plain forward": 10.0, "eager input x gradient": 20.0, "ours, attnlrp": ours}
        run = [report.Measured(name, (taken,), 1.0) for name, taken in calls.items()]
        return report.Section(f"{model}, batch 1, cpu", "", report.rows_of("cpu", model, 1, run), [gate])

    report.write_all(tmp_path, "peers", "old", [section("A", 18.0, "a agrees"), section("B", 16.0, "b agrees")], "fp32")
    report.write_all(tmp_path, "peers", "new", [section("C", 14.0, "c agrees"), section("A", 12.0, "a too")], "fp32")
    known = report.rows_in(tmp_path / "peers.csv")
    ours = [(where, row.model, row.median_ms) for where, row in known if row.provider == "ours, attnlrp"]
    assert ours == [("old", "B", 16.0), ("new", "C", 14.0), ("new", "A", 12.0)]
    assert known[0][1].conservation is None and known[0][1].calls == 1
    text = (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("* ")] == ["* b agrees", "* c agrees", "* a too"]
    assert list(report.sections_in(tmp_path / "peers.md")) == [f"{name}, batch 1, cpu" for name in "BCA"]


@pytest.mark.parametrize(
    ("folder", "cause"),
    [
        ("", "no checkout of DynamicLRP"),
        ("class LRPEngine:\n    def __init__(self, use_gamma=False): ...\n", "create_checkpoint"),
    ],
)
def test_another_checkout_is_refused(bench: SimpleNamespace, tmp_path: Path, folder: str, cause: str) -> None:
    dynamic = importlib.import_module("providers.dynamic_lrp")
    if folder:
        package = tmp_path / "src" / "lrp_engine"
        package.mkdir(parents=True)
        (package / "lrp.py").write_text(folder, encoding="utf-8")
        (package / "__init__.py").write_text("from .lrp import *", encoding="utf-8")
    before = list(sys.path)
    try:
        with pytest.raises(ValueError, match=cause):
            dynamic.library_of(tmp_path)
    finally:
        sys.path[:] = before
        for name in [name for name in sys.modules if name.startswith("lrp_engine")]:
            del sys.modules[name]


@pytest.mark.slow
def test_the_command_runs(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    asked = [sys.executable, str(BENCH / "peers.py"), "--models", "tiny", "--batch", "1", "--repeats", "3"]
    options = ["--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--providers", "ours, epsilon"]
    done = subprocess.run([*asked, *options], check=False, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-1-cores")
    assert len((folder / "peers.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert "## tiny CNN, batch 1, cpu" in (folder / "peers.md").read_text(encoding="utf-8")


def test_every_machine_batch_size_and_dtype_has_files_of_its_own(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "processor", lambda: "Intel(R) Xeon(R) Platinum 8488C")
    assert harness.machine_folder("cpu", 2) == "intel-xeon-platinum-8488c-2-cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert harness.machine_folder("cuda") == "nvidia-h100-80gb-hbm3"
    names = [
        importlib.import_module("peer_report").stem(batch, dtype)
        for batch, dtype in ((1, "fp32"), (8, "fp32"), (1, "bf16"), (8, "bf16"))
    ]
    assert names == ["peers", "peers-batch-8", "peers-bf16", "peers-batch-8-bf16"]


@pytest.mark.parametrize(("steals", "calls"), [([0.0], 1), ([9.0, 0.0], 2), ([9.0, 9.0, 0.001], 3), ([9.0] * 9, 5)])
def test_a_call_is_timed_anew_while_others_have_the_processors(
    steals: list[float], calls: int, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times at most."""
    harness = importlib.import_module("harness")
    before = harness.stolen()
    assert 0 <= before <= harness.stolen()
    made, gone = 0, 0.0

    def call() -> float:
        nonlocal made, gone
        time.sleep(0.05)
        gone += steals[made]
        made += 1
        return float(made)

    monkeypatch.setattr(harness, "stolen", lambda: gone)
    assert harness.undisturbed(call) == made == calls
