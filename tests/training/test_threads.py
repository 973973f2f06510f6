"""One compiled module called by eight threads at once: every result is the one a single thread gets."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from training import THREADS, identical, together

from lrp_compiler import LRPModule, compile_for_lrp

PARTS = {"bert": ("attention", "intermediate", "output.dense"), "llama": ("self_attn", "mlp", "mlp.up_proj")}


def asked(explained: LRPModule, x: torch.Tensor, target: int) -> list[Any]:
    """Everything a caller may want of one input."""
    output, tape = explained.run(x)
    both = tape.relevance_of_each([target, 0])
    found = tape.relevance(target), tape.relevance(target, at="3.conv1"), tape.sinks(target)
    return [explained(x), output, both, found, explained.attribute(x, target)]


@pytest.mark.parametrize("warm", [False, True], ids=["first calls", "later calls"])
def test_eight_threads_get_what_one_gets(warm: bool) -> None:
    """Inputs of several shapes, so that threads run while others compile; of one image size, which bits depend on."""
    model = zoo.build("resnet").model
    inputs = [torch.randn(2 + i % 4, 3, 12, 12) for i in range(THREADS)]
    alone = compile_for_lrp(model)
    expected = [asked(alone, x, i % 5) for i, x in enumerate(inputs)]
    shared = alone if warm else compile_for_lrp(model)

    def work(i: int) -> Callable[[], Any]:
        return lambda: [asked(shared, inputs[i], i % 5) for _ in range(3)]

    for i, rounds in enumerate(together([work(i) for i in range(THREADS)])):
        assert all(identical(found, expected[i]) for found in rounds), i


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_threads_share_one_tape(name: str) -> None:
    """Questions that make the tape compute the forward pass again, too."""
    case = zoo.build(name)
    _, tape = compile_for_lrp(case.model).run(*case.args, **case.kwargs)
    _, other = compile_for_lrp(case.model).run(*case.args, **case.kwargs)
    inner = "bert.encoder" if name == "bert" else "model"
    layers = [f"{inner}.{'layer' if name == 'bert' else 'layers'}.{i}" for i in range(2)]
    sites = [*layers, *(f"{layer}.{part}" for layer in layers for part in PARTS[name])]
    expected = [other.relevance(case.target, at=site) for site in sites]
    found = together([lambda site=site: tape.relevance(case.target, at=site) for site in sites])  # type: ignore[misc]
    assert identical(found, expected)


def test_threads_that_compile_leave_each_others_parameters_alone() -> None:
    """While one call is traced the model holds stand-ins for its parameters; no other call may read those."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(20)))
    ready, tracing = compile_for_lrp(model), compile_for_lrp(model, dynamic=False)
    x = torch.randn(2, 6)
    expected, relevance = ready(x).detach(), ready.attribute(x, 1)
    done = threading.Event()

    def trace() -> None:
        try:
            for batch in range(3, 6):
                tracing(torch.randn(batch, 6))
        finally:
            done.set()

    def call() -> bool:
        same = True
        for _ in range(100):
            if done.is_set():
                break
            same &= torch.equal(ready(x), expected) and torch.equal(ready.attribute(x, 1), relevance)
        return same

    assert all(together([trace, *[call] * 3])[1:])


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    """They belong to the process, and explaining several targets at once sets them for a while."""
    case = zoo.build("bert")
    _, tape = compile_for_lrp(case.model).run(*case.args)
    expected = tape.relevance_of_each([0, 1])
    filters = list(warnings.filters)
    found = together([lambda: [tape.relevance_of_each([0, 1]) for _ in range(20)]] * THREADS)
    assert all(torch.equal(one, expected) for rounds in found for one in rounds)
    assert list(warnings.filters) == filters
