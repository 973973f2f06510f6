"""Transforms of torch.func around a compiled model: its outputs, its relevance, and nothing of them left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.errors import TransformError


class Shifted(nn.Module):
    """Adds to what the weights alone decide, which compiled code overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.shift * 0.5) + x


def dense() -> nn.Module:
    """Gates, norms and a temporary made of weights."""
    return nn.Sequential(
        *(nn.Linear(4, 6), Shifted(), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 8), nn.SiLU(), nn.Softmax(-1)),
        nn.Linear(8, 3),
    )


def convolutional() -> nn.Module:
    """Masks kept as bits, and a pool."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 32, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 3)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "convolutional": convolutional}
TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "vmap": lambda f, x: vmap(f)(x),
    "grad": lambda f, x: grad(lambda one: f(one).square().sum())(x[0]),
    "jacrev": lambda f, x: jacrev(f)(x[0]),
    "jvp": lambda f, x: jvp(f, (x[0],), (x[1],))[1],
    "vmap of grad": lambda f, x: vmap(grad(lambda one: f(one).square().sum()))(x),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model in float64, and batches of two samples."""
    torch.manual_seed(0)
    return MODELS[name]().double().eval(), torch.randn(5, 2, 4, dtype=torch.float64)


# Torch writes forward-mode formulas in its own deprecated script.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_transform_as_the_models_do(name: str, transform: str, has_run: bool) -> None:
    model, x = made(name)
    explained = compile_for_lrp(model, "gradient")
    if has_run:
        explained(x[0])
    run = TRANSFORMED[transform]
    torch.testing.assert_close(run(explained, x), run(model, x), rtol=0, atol=0)
    # What was asked for under a transform first does not stand in the way of what is asked for later.
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(explained.attribute(x[0], 1), expected)


def ready(model: nn.Module, x: Tensor, composite: str) -> LRPModule:
    """The compiled model after a call like those that are transformed; a second one takes the short way."""
    explained = compile_for_lrp(model, composite)
    explained.attribute(x, 1)
    explained.attribute(x, 1)
    return explained


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon", "gradient"])
@pytest.mark.parametrize("name", MODELS)
def test_attributions_of_stacked_batches(name: str, composite: str) -> None:
    model, x = made(name)
    explained = ready(model, x[0], composite)
    expected = torch.stack([explained.attribute(one, 1) for one in x])
    torch.testing.assert_close(vmap(lambda one: explained.attribute(one, 1))(x), expected)
    torch.testing.assert_close(vmap(lambda one: explained.run(one)[1].relevance(1))(x), expected)
    torch.testing.assert_close(explained.attribute(x[0], 1), expected[0])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_attributions(name: str) -> None:
    model, x = made(name)
    explained = ready(model, x[0], "attnlrp")

    def loss(one: Tensor) -> Tensor:
        return explained.attribute(one, 1, create_graph=True).pow(3).sum()

    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x[0]), expected)


class Explaining(nn.Module):
    """A model whose loss is on its own explanation."""

    def __init__(self, explained: LRPModule) -> None:
        super().__init__()
        self.explained = explained

    def forward(self, x: Tensor) -> Tensor:
        return self.explained.attribute(x, 1, create_graph=True).pow(3).sum()


@pytest.mark.parametrize("name", MODELS)
def test_functional_training_with_explanations(name: str) -> None:
    model, x = made(name)
    whole = Explaining(ready(model, x[0], "attnlrp"))
    weights = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    found = grad(lambda given: functional_call(whole, given, (x[0],)))(weights)
    expected = torch.autograd.grad(whole(x[0]), list(whole.parameters()), allow_unused=True)
    for (label, _), gradient in zip(whole.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[label], torch.zeros_like(found[label]) if gradient is None else gradient)


def test_a_first_call_under_a_transform_is_refused() -> None:
    """Where it would have to be compiled; the next one is not any worse for it."""
    model, x = made("dense")
    explained = compile_for_lrp(model)
    with pytest.raises(TransformError, match="first time"):
        vmap(lambda one: explained.attribute(one, 1))(x)
    assert explained.attribute(x[0], 1).shape == x[0].shape
