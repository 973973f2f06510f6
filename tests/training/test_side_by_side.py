"""One forward pass for gradients and relevance: in any order, both exact, and nothing kept that is no longer needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from training import cleared, gradients, identical, loss_of

from lrp_compiler import compile_for_lrp, errors

ORDERS = ["relevance gradient", "gradient relevance", "relevance gradient relevance", "gradient gradient relevance"]


@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "llama", "t5", "lstm"])
def test_gradients_and_relevance_of_one_forward_in_any_order(name: str) -> None:
    """Gradients have eager's bits; relevance those of a run without backward, and without gradients in all but T5.

    With a mask that is trained eager runs another attention kernel where gradients are recorded.
    """
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    loss_of(case()).backward()
    wanted = gradients(case.model)
    with torch.no_grad():
        without = explained.run(*case.args, **case.kwargs)[1].relevance(case.target)
    expected = explained.run(*case.args, **case.kwargs)[1].relevance(case.target)
    assert name == "t5" or identical(expected, without)
    torch.testing.assert_close(expected, without, rtol=1e-4, atol=1e-6)
    for order in ORDERS:
        output, tape = explained.run(*case.args, **case.kwargs)
        loss = loss_of(output)
        for step in order.split():
            if step == "relevance":
                assert identical(tape.relevance(case.target), expected), order
                continue
            cleared(case.model)
            loss.backward(retain_graph=order.count("gradient") > 1)
            assert identical(gradients(case.model), wanted), order
    cleared(case.model)
    tape.relevance(case.target)
    assert not gradients(case.model)


def test_a_step_makes_the_tape_stale_and_clearing_gradients_does_not() -> None:
    case = zoo.build("resnet")
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    output, tape = compile_for_lrp(case.model).run(*case.args)
    loss_of(output).backward()
    expected = tape.relevance(2)
    optimizer.zero_grad()
    assert torch.equal(tape.relevance(2), expected)
    loss_of(case()).backward()
    optimizer.step()
    with pytest.raises(errors.StaleTapeError):
        tape.relevance(2)


MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_run_and_relevance_in_any_two_grad_modes(name: str) -> None:
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    expected = None
    for recorded in MODES.values():
        for asked in MODES.values():
            with recorded():
                _, tape = explained.run(*case.args)
                if recorded is torch.inference_mode and name == "resnet":
                    _, tape = explained.run(case.args[0].clone())
            with asked():
                found = tape.relevance(case.target)
                tape.ledger(case.target).check()
            expected = found if expected is None else expected
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_nothing_outlives_the_tape() -> None:
    """Neither output nor autograd graph, once both are let go; relevance has no history of its own."""
    case = zoo.build("bert")
    explained = compile_for_lrp(case.model)
    gc.collect()
    output, tape = explained.run(*case.args)
    relevance = tape.relevance(1)
    assert relevance.grad_fn is None
    watched = [weakref.ref(output.logits), weakref.ref(tape)]
    loss_of(output).backward()
    del output, tape
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
