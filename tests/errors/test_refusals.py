"""Around a refusal: what the model raises itself, what is printed and left behind, what is refused whole."""

from __future__ import annotations

import pytest
import torch
import zoo
from mistakes import Branches, Broken, X, mlp

from lrp_compiler import Composite, compile_for_lrp, errors
from lrp_compiler.rules import OpClass, Plain, on


def test_what_the_model_raises_is_its_own() -> None:
    """Not a refusal of ours, and looking for it leaves no trace."""
    model, state = Broken(), torch.get_rng_state()
    with pytest.raises(KeyError, match="mine"):
        compile_for_lrp(model)(X)
    assert model.count == 0 and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'"):
        compile_for_lrp(mlp()).run(inputs=X)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compile_for_lrp(mlp())(torch.ones(2, 5))


def test_failed_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.CaptureError):
        compile_for_lrp(Branches())(X)
    assert capfd.readouterr() == ("", "")


def test_sites_without_relevance_say_why() -> None:
    case = zoo.build("gpt2")
    _, tape = compile_for_lrp(case.model, "cp_lrp").run(**case.kwargs)
    with pytest.raises(errors.SiteWithoutRelevanceError, match="inside the recognised gelu_tanh"):
        tape.relevance(case.target, at="tanh")

    _, tape = compile_for_lrp(zoo.TwoHeads()).run(X)
    with pytest.raises(errors.SiteWithoutRelevanceError, match="no path leads from it"):
        tape.relevance(0, at="b")


def test_a_composite_that_leaves_an_op_out_is_refused_whole() -> None:
    """A hole in a composite is never filled with the gradient."""
    hole = Composite("hole", ((on(OpClass.LINEAR), Plain()),))
    with pytest.raises(errors.UncoveredOpsError, match="aten::relu as relu in 1"):
        compile_for_lrp(mlp(), hole).attribute(X, 0)
