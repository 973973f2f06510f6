"""backend="inductor": the same relevance by torch.compile, and what is left to the eager code, with the reason.

What does not depend on the code that inductor writes runs through torch.compile's "aot_eager", which needs no C++
compiler and little time; what inductor itself makes is compared on a few small models.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import zoo
from accuracy import assert_as_accurate, error, upcast
from torch import Tensor, nn
from training import together

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.passes.backend import Choice, choose_backend
from lrp_compiler.passes.compiled_function import CompiledFunction
from lrp_compiler.passes.program import COMPILING
from lrp_compiler.report import Report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def by_aot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile up to the graphs that inductor would get, which then run as they are."""
    lookup = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda *given, **_: lookup("aot_eager")(*given))
    yield
    torch._dynamo.reset()


def dense(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).eval()


class Scan(nn.Module):
    """Mamba's recurrence of one layer: the state decays as the input says."""

    def __init__(self, width: int = 4, states: int = 3) -> None:
        super().__init__()
        self.steps, self.reads = nn.Linear(width, width), nn.Linear(width, states)
        self.decay, self.head = nn.Parameter(-torch.rand(width, states)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps, reads = nn.functional.softplus(self.steps(x)), self.reads(x)
        state, outputs = x.new_zeros(x.shape[0], x.shape[2], reads.shape[2]), []
        for t in range(x.shape[1]):
            step = steps[:, t, :, None]
            state = torch.exp(step * self.decay) * state + step * reads[:, t, None] * x[:, t, :, None]
            outputs.append((state * reads[:, t, None]).sum(-1))
        return self.head(torch.stack(outputs, 1).mean(1))


def both(model: nn.Module, composite: str = "auto") -> tuple[LRPModule, LRPModule]:
    """The model explained by (inductor, eager code)."""
    return compile_for_lrp(model, composite, backend="inductor"), compile_for_lrp(model, composite, backend="eager")


def asked(explained: LRPModule, args: Any, kwargs: Any, target: Any) -> list[Tensor]:
    """Output and relevance, and relevance again by a second question on the same tape."""
    with torch.no_grad():
        output, tape = explained.run(*args, **kwargs)
        output = getattr(output, "logits", output)
        found = tape.relevance(target), tape.relevance(target)
    return [output, *map(flat, found)]


def flat(relevance: Any) -> Tensor:
    return torch.cat([one.flatten() for one in relevance.values()]) if isinstance(relevance, dict) else relevance


def compiled(explained: LRPModule, *args: Any, **kwargs: Any) -> list[str]:
    """The passes that were compiled for a kind of call, in the order of requests."""
    return [name for name, _ in explained.report(*args, **kwargs).backend.seconds]


def case_of(name: str, *, double: bool = False) -> zoo.Case:
    """A case of the zoo, or the scan."""
    if name != "scan":
        return zoo.build(name, double=double)
    torch.manual_seed(0)
    case = zoo.Case(Scan().eval(), (torch.randn(2, 5, 4),), target=1)
    return zoo.Case(case.model.double(), upcast(case.args), target=1) if double else case


QUICK = ("vit", "vgg", "scan")
SLOW = ("resnet", "llama", "gpt2", "bert", "lstm")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_relevance_is_as_accurate_as_eager(name: str) -> None:
    """Twice eager's own error against float64 at most, for the output as for relevance."""
    case, exact = case_of(name), case_of(name, double=True)
    expected = asked(compile_for_lrp(exact.model, backend="eager"), exact.args, exact.kwargs, exact.target)
    inductor, eager = both(case.model)
    found = asked(inductor, case.args, case.kwargs, case.target)
    for made, plain, right in zip(found, asked(eager, case.args, case.kwargs, case.target), expected, strict=True):
        assert_as_accurate(made, plain, right, 2.0)
    report = inductor.report(*case.args, **case.kwargs)
    assert report.backend.name == "inductor" and not report.backend.refusals
    assert sorted(name for name, seconds in report.backend.seconds if seconds > 0) == ["forward", "relevance"]


CACHED = """
import torch
from torch import nn
from torch._dynamo.utils import counters
from lrp_compiler import compile_for_lrp

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
with torch.no_grad():
    compile_for_lrp(model, "epsilon", backend="inductor").run(torch.randn(2, 6))[1].relevance(1)
found = {**counters["inductor"], **counters["aot_autograd"]}
print(found.get("fxgraph_cache_hit", 0), found.get("fxgraph_cache_miss", 0))
"""


@pytest.mark.slow
def test_another_process_finds_what_inductor_made(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CACHED]

    def hits_and_misses() -> list[int]:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
        return [int(count) for count in done.stdout.split()]

    assert hits_and_misses() == [0, 2]
    assert hits_and_misses() == [2, 0]


def test_open_sizes_compile_once_more(by_aot: None) -> None:
    """The first shape as it is, and one more compilation of both passes for all others."""
    inductor, eager = both(dense())
    for batch in (2, 3, 5, 7, 11):
        x = torch.randn(batch, 6)
        assert error(inductor.attribute(x, 1), eager.attribute(x, 1).double()) < 1e-6
    assert compiled(inductor, x) == ["forward", "relevance"]
    assert len(inductor.compilations) == 2


def test_gradients_are_those_of_the_model(by_aot: None) -> None:
    """Passes that record gradients keep the model's bits; relevance is compiled as it is without gradients."""
    model, x = dense(), torch.randn(4, 6, requires_grad=True)
    explained = compile_for_lrp(model, "epsilon", backend="inductor")
    expected, (given,) = model(x), torch.autograd.grad(model(x).square().sum(), x)
    output, tape = explained.run(x)
    relevance = tape.relevance(1)
    (found,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    assert torch.equal(output, expected) and torch.equal(found, given) and not relevance.requires_grad
    assert compiled(explained, x) == ["relevance"]
    with torch.no_grad():
        assert error(explained.run(x)[1].relevance(1), relevance.double()) < 1e-6
    assert sorted(compiled(explained, x)) == ["forward", "relevance"]
    differentiable = tape.relevance(1, create_graph=True)
    assert differentiable.requires_grad and torch.autograd.grad(differentiable.square().sum(), x)[0].abs().sum() > 0


def test_targets_at_once_run_the_eager_code(by_aot: None) -> None:
    inductor, eager = both(dense())
    x = torch.randn(4, 6)
    found, expected = (one.run(x)[1].relevance_of_each([0, 1, 2]) for one in (inductor, eager))
    assert torch.equal(found, expected) and compiled(inductor, x) == []
    assert "several targets at once" in str(inductor.report(x))


def test_threads_share_what_is_compiled(by_aot: None) -> None:
    """Inputs of several shapes, so that threads run while others compile."""
    inductor, eager = both(dense())
    inputs = [torch.randn(2 + i % 3, 6) for i in range(6)]
    expected = [eager.attribute(x, 1) for x in inputs]
    works = [lambda x=x: [inductor.attribute(x, 1) for _ in range(3)] for x in inputs]  # type: ignore[misc]
    for found, right in zip(together(works), expected, strict=True):
        assert all(error(one, right.double()) < 1e-6 for one in found)


@contextlib.contextmanager
def traced_elsewhere(lock: AbstractContextManager[object], until: threading.Event) -> Iterator[None]:
    """While a thread that holds ``lock`` traces with torch.fx, which takes it ``until`` it is let go on."""
    begun = threading.Event()

    def traced(x: Any) -> Any:
        begun.set()
        assert until.wait(timeout=60)
        return x

    def trace() -> None:
        with lock:
            torch.fx.symbolic_trace(traced)

    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace)
        try:
            assert begun.wait(timeout=60)
            yield
        finally:
            until.set()
            tracing.result()


def test_the_eager_code_runs_while_another_thread_traces(by_aot: None) -> None:
    inductor, eager = both(dense())
    x = torch.randn(4, 6)
    inductor.attribute(x, 1)
    with traced_elsewhere(contextlib.nullcontext(), threading.Event()):
        assert torch.equal(inductor.attribute(x, 1), eager.attribute(x, 1))


def doubling() -> CompiledFunction:
    return CompiledFunction(lambda x: (x * 2,), "inductor", dynamic=False, graphs=False)


def test_nothing_is_compiled_while_another_thread_traces(by_aot: None) -> None:
    double, x = doubling(), torch.ones(3)
    with traced_elsewhere(contextlib.nullcontext(), threading.Event()):
        assert double([x]) is None
    assert not double.seconds and not double.refusals
    made = double([x])
    assert made is not None and made[0].tolist() == [2.0] * 3 and len(double.seconds) == 1


def test_compiled_code_waits_for_threads_that_compile(by_aot: None) -> None:
    """So that its results do not depend on what other threads do."""
    double, x, end = doubling(), torch.ones(3), threading.Event()
    double([x])
    with traced_elsewhere(COMPILING, end), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(double, [x])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        end.set()
        made = waiting.result(timeout=60)
    assert made is not None and made[0].tolist() == [2.0] * 3


class Views(nn.Module):
    """Outputs that are views of the input, of each other, and one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x).relu()
        return y.sum(1), x.view(-1), y, y, y.view(-1)


def test_outputs_share_memory_as_the_models_do(by_aot: None) -> None:
    """What the user writes to one output shows in the others, and in no relevance."""
    model, x = Views(), torch.randn(3, 6)
    inductor, eager = both(model, "epsilon")
    with torch.no_grad():
        outputs, tape = inductor.run(x)
        expected = model(x)
    shares = [[a.data_ptr() == b.data_ptr() for b in (x, *found)] for found in (outputs, expected) for a in found]
    assert shares[:5] == shares[5:] and all(map(torch.equal, outputs, expected))
    seed = torch.ones(3)
    assert error(tape.relevance(seed), eager.run(x)[1].relevance(seed).double()) < 1e-6
    assert torch.equal(seed, torch.ones(3))


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(Chooses(), "torch.cond", id="torch.cond"),
        pytest.param(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).train(), "random numbers", id="dropout"),
    ],
)
def test_the_report_says_what_inductor_is_not_given(model: nn.Module, reason: str) -> None:
    x = torch.randn(4, 6)
    report = compile_for_lrp(model, "gradient", backend="inductor").report(x)
    assert report.backend.name == "eager" and not report.backend.goes_through_compiler
    assert f"backend   eager (inductor was asked for, but {report.backend.reason[28:]}" in str(report)
    assert reason in report.backend.reason


@pytest.mark.parametrize("is_training", [True, False])
def test_recurrences_draw_numbers_where_they_drop_out(is_training: bool) -> None:
    model = nn.LSTM(3, 4, 2, dropout=0.5).train(is_training)
    assert compile_for_lrp(model).compiler.call(model, (torch.randn(5, 2, 3),), {}).is_random == is_training


def test_what_does_not_compile_runs_as_it_is(by_aot: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own reason in the report; other errors than those of compiling are the caller's."""

    def refusing(module: Any, inputs: Any, **options: Any) -> Any:
        raise NotImplementedError("no lowering of this op")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: refusing)
    inductor, eager = both(dense())
    x = torch.randn(4, 6)
    assert torch.equal(inductor.attribute(x, 1), eager.attribute(x, 1))
    report = inductor.report(x)
    assert len(report.backend.refusals) == 2 and "no lowering of this op" in str(report)


@pytest.mark.parametrize(("backend", "words"), [("auto", "auto: values are on cpu"), ("eager", "asked for")])
def test_every_report_says_what_runs(backend: str, words: str) -> None:
    report: Report = compile_for_lrp(dense(), backend=backend).report(torch.randn(2, 6))
    assert (report.backend.name, report.backend.seconds) == ("eager", ())
    assert f"  backend   eager ({words}" in str(report)
    assert report.to_dict()["backend"]["reason"].startswith(words)


def test_plain_calls_keep_the_models_bits() -> None:
    model, x = dense(), torch.randn(4, 6)
    assert torch.equal(compile_for_lrp(model, backend="inductor")(x), model(x))


@pytest.mark.parametrize("compiler", ["inductor", "cudagraphs"])
def test_cuda_graphs_are_asked_of_the_compiler(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are copies, since the next replay writes over them, and weights are read where they lie."""
    given: list[Any] = []
    memory = torch.zeros(3)

    def replaying(module: Any, inputs: Any, **options: Any) -> Any:
        given.append(options)
        return lambda *values: (torch.mul(values[0], 2, out=memory),)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: given.append(name) or replaying)
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    double = CompiledFunction(lambda x, w: (x * 2 * w,), compiler, dynamic=False, graphs=True)
    first, second = double([torch.ones(3), weight]), double([torch.full((3,), 2.0), weight])
    assert given[-2:] == [compiler, {"config_patches": {"triton.cudagraphs": True}} if compiler == "inductor" else {}]
    assert first is not None and second is not None
    assert first[0].tolist() == [2.0] * 3 and second[0].tolist() == [4.0] * 3
    assert weight._dynamo_static_input_type == "unguarded"  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["cpu", "meta"])
def test_inductor_compiles_for_devices_that_it_has(value: str) -> None:
    with torch.device(value):
        program = compile_for_lrp(dense(), "epsilon").stages(torch.randn(2, 6))[-1].program
    choice = choose_backend(program, "inductor")
    assert choice == (
        Choice("inductor", "asked for")
        if value == "cpu"
        else Choice("eager", "inductor was asked for, but these values are on meta")
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["auto", "eager", "inductor", "triton"])
def test_cuda_graphs_give_the_same_relevance(backend: str) -> None:
    model, inputs = dense().cuda(), [torch.randn(4, 6, device="cuda") for _ in range(3)]
    graphs = compile_for_lrp(model, backend=backend, cuda_graphs=True)
    found = [graphs.attribute(x, 1) for x in (*inputs, *inputs)]
    plain = compile_for_lrp(model, backend="eager")
    for one, x in zip(found, (*inputs, *inputs), strict=True):
        assert error(one, plain.attribute(x, 1).double()) < 1e-5
