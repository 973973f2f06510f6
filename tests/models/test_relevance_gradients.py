"""Relevance with create_graph on whole models: derivatives by parameters and inputs, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from accuracy import relative_error
from differentiable import Explanation, assert_differentiable, relevance_for
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp, errors
from lrp_compiler.captures import Captures
from lrp_compiler.seeds import LogProbability

FLOAT64 = 1e-10


@pytest.mark.parametrize(
    "name", ["resnet", "vit", "bert", "gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow), "lstm"]
)
def test_models(name: str) -> None:
    """Without z+, whose denominators come close to zero in dense transformers."""
    case, captures = zoo.build(name, double=True), Captures()
    for composite in ("attnlrp", "input_x_gradient"):
        question = relevance_for(case.target)
        explanation = Explanation(case.model, composite, question, case.kwargs, captures)
        assert_differentiable(explanation, *case.args, tolerance=1e-4)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_networks_with_sign_splits(name: str) -> None:
    case = zoo.build(name, double=True)
    assert_differentiable(Explanation(case.model, "epsilon_plus", relevance_for(case.target)), *case.args)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_input_x_gradient_is_double_backpropagation(name: str) -> None:
    """An oracle that shares nothing with the compiler: x times torch's own gradient, differentiated again."""
    case = zoo.build(name, double=True)
    x = case.args[0].requires_grad_()
    wanted = [x, *case.model.parameters()]

    def derivatives(relevance: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        loss = (relevance * torch.randn(relevance.shape, dtype=relevance.dtype)).square().sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(case.model(x)[:, case.target].sum(), x, create_graph=True)
        expected = derivatives(x * gradient)
    explained = compile_for_lrp(case.model, "input_x_gradient")
    found = derivatives(explained.attribute(x, case.target, create_graph=True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * float(other.abs().max()) + 1e-12)


def small() -> tuple[nn.Module, Tensor]:
    """A model with dropout, in training mode, in float64."""
    layers = (nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.3), nn.LayerNorm(6), nn.Linear(6, 3))
    return nn.Sequential(*layers).double(), torch.randn(3, 4, dtype=torch.float64)


QUESTIONS: dict[str, Any] = {
    "another site": lambda tape, on: tape.relevance(1, at="3", create_graph=on),
    "several sites": lambda tape, on: tape.relevance(1, at=["0", "input"], create_graph=on),
    "coefficients": lambda tape, on: tape.coefficients(1, at="0", create_graph=on),
    "activations": lambda tape, on: tape.activations("1", create_graph=on),
    "parameters": lambda tape, on: tape.parameters(1, create_graph=on),
    "masked": lambda tape, on: tape.relevance(1, through={"0": torch.arange(6) % 2}, create_graph=on),
    "several targets": lambda tape, on: tape.relevance_of_each([0, 2], create_graph=on),
    "probability": lambda tape, on: tape.relevance(LogProbability(1), create_graph=on),
    "callable": lambda tape, on: tape.relevance(lambda out: out[:, 0].square() * out[:, 2], create_graph=on),
    "after another": lambda tape, on: (tape.relevance(1, at="3"), tape.relevance(1, at="3", create_graph=on))[1],
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions(name: str) -> None:
    """Whatever the tape is asked, with values that the forward pass kept or that are computed anew, dropout repeated.

    Seeds computed from outputs are functions of the parameters too.
    """
    model, x = small()
    assert_differentiable(Explanation(model, "attnlrp", QUESTIONS[name]), x)


def test_attention_questions() -> None:
    case = zoo.build("vit", double=True)
    for question in (
        lambda tape, on: tape.heads(case.target, create_graph=on),
        lambda tape, on: tape.attention_maps(case.target, create_graph=on),
    ):
        assert_differentiable(Explanation(case.model, "attnlrp", question), *case.args)


def test_relevance_and_loss_train_in_one_step() -> None:
    """The gradient of a loss with a penalty is that of both, taken apart."""
    model, x = small()
    explained = compile_for_lrp(model.eval(), "attnlrp")

    def gradients(*, loss: float, penalty: float) -> list[Tensor]:
        out, tape = explained.run(x)
        relevance = tape.relevance(1, create_graph=True)
        total = loss * out.logsumexp(1).sum() + penalty * relevance.square().sum()
        return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True))

    parts = zip(gradients(loss=1, penalty=0), gradients(loss=0, penalty=1), strict=True)
    for both, (one, other) in zip(gradients(loss=1, penalty=1), parts, strict=True):
        assert relative_error(both, one + other) <= FLOAT64


def test_attribute_gives_the_same() -> None:
    model, x = small()
    explained = compile_for_lrp(model.eval(), "attnlrp")
    found, delta = explained.attribute(x, 1, create_graph=True, return_convergence_delta=True)
    expected, expected_delta = explained.attribute(x, 1, return_convergence_delta=True)
    assert found.requires_grad and delta.requires_grad and not expected.requires_grad
    assert relative_error(found.detach(), expected) <= FLOAT64
    assert relative_error(delta.detach(), expected_delta) <= FLOAT64


def test_other_answers_have_no_history() -> None:
    model, x = small()
    _, tape = compile_for_lrp(model, "attnlrp").run(x.requires_grad_())
    assert not tape.relevance(1).requires_grad
    assert tape.relevance(1, create_graph=True).requires_grad
    assert not tape.relevance(1, at="0").requires_grad


def test_without_gradients_it_is_refused() -> None:
    """Not answered by relevance that is a constant to autograd."""
    model, x = small()
    explained = compile_for_lrp(model, "attnlrp")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            _, tape = explained.run(x)
        with pytest.raises(errors.NoHistoryError, match="the forward pass ran with gradients disabled"):
            tape.relevance(1, create_graph=True)
    _, tape = explained.run(x)
    with torch.no_grad(), pytest.raises(errors.NoHistoryError, match="gradients are disabled here"):
        tape.relevance(1, create_graph=True)
    _, tape = LRPModule(model, "attnlrp").run(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(errors.StaleTapeError, match=r"the parameter 0\.weight"):
        tape.relevance(1, create_graph=True)


@torch.library.custom_op("lrp_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An op without a derivative."""
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def undifferentiable_rule(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """Twice the coefficient, by an op that torch cannot differentiate."""
    made: Tensor = torch.ops.lrp_tests.doubled.default(c * x)
    return made


def test_ops_without_a_derivative_are_refused() -> None:
    """By name, when asked and not when differentiated; relevance itself is given as ever."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    explained = compile_for_lrp(model, rules={torch.ops.aten.relu: undifferentiable_rule})
    _, tape = explained.run(torch.randn(2, 3))
    assert torch.isfinite(tape.relevance(0)).all()
    with pytest.raises(errors.NotDifferentiableError, match=r"lrp_tests::doubled at relu has no derivative"):
        tape.relevance(0, create_graph=True)


def test_training_by_relevance_works_in_open_sizes() -> None:
    """One traced graph for several batch sizes, each with the derivative of a model traced for it alone."""
    model, _ = small()
    model.eval()
    explained = compile_for_lrp(model, "attnlrp")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, dtype=torch.float64)
        alone = compile_for_lrp(copy.deepcopy(model), "attnlrp", dynamic=False)
        found, expected = (
            torch.autograd.grad(
                one.attribute(x, 1, create_graph=True).square().sum(),
                list(one.parameters()),
                allow_unused=True,
                materialize_grads=True,
            )
            for one in (explained, alone)
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    assert explained.compilations[-1].form == "symbolic"
