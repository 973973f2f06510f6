"""deep_lift against captum.attr.DeepLift in float64, and against restatements where Captum is wrong or refuses.

Captum hooks modules: it refuses a module that is used twice, takes the plain gradient at functional activations and
where one hooked module directly follows another (networks here put a copy between them), normalises softmax over the
whole batch, and unpools overlapping windows by overwriting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from peers import captum
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites
from lrp_compiler.rules import NormalisedRescale, OpClass, on

FLOAT64 = 1e-9
"""Both sides divide differences of activations: eps |y / (x - x0)| summed over a few layers."""

CLASSES = 4


def captums(model: nn.Module, inputs: Any, baselines: Any, target: Any, **options: Any) -> Any:
    """Captum's attributions, without the warning that it sets hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captum.DeepLift(model).attribute(inputs, baselines, target=target, **options)


class CNN(nn.Module):
    """Strided convolutions with biases, batch normalisation, both poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU()
        self.average, self.head = nn.AvgPool2d(2), nn.Linear(24, CLASSES)
        nn.init.normal_(self.norm1.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm1.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.norm1(self.conv1(x))).clone())
        return self.head(self.average(self.relu2(self.conv2(x))).flatten(1))


class Residual(nn.Module):
    """Functional adds and two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.act1, self.act2 = nn.ReLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.stem(x))
        return self.head(x + self.act2(self.inner(x)) - 0.5 * x)


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    layers = (nn.Linear(6, 10), activation(), nn.Linear(10, 8), activation(), nn.Linear(8, CLASSES))
    return nn.Sequential(*layers)


def max_pool_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.MaxPool1d(2), Copy(), nn.Sigmoid(), nn.Flatten(), nn.Linear(10, CLASSES)
    )


ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind.__name__: (lambda kind=kind: mlp(kind), (6,)) for kind in ACTIVATIONS},
    "CNN": (CNN, (2, 16, 16)),
    "MaxPool1d": (max_pool_1d, (2, 6)),
    "Residual": (Residual, (6,)),
}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_attributions_are_captums(name: str, batch: int) -> None:
    make, shape = NETWORKS[name]
    model, x = make().double().eval(), torch.randn(batch, *shape).double()
    target = torch.arange(batch) % CLASSES
    explained = compile_for_lrp(model, "deep_lift", verify="ledger")
    for baseline in (None, 0.3, torch.randn(1, *shape).double(), torch.randn(batch, *shape).double()):
        expected, their_delta = captums(model, x, baseline, target, return_convergence_delta=True)
        found, delta = explained.attribute(x, target, baselines=baseline, return_convergence_delta=True)
        assert agreement(explained, x, found, expected, "Captum") <= FLOAT64
        assert delta.abs().max() <= FLOAT64 and their_delta.abs().max() <= FLOAT64


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 5), nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.act = nn.Sigmoid()

    def forward(self, a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
        return self.head(self.act(self.left(a) + self.right(b) + offset))


@pytest.mark.parametrize("batch", [1, 5])
def test_several_inputs_each_with_its_baseline(batch: int) -> None:
    model, offset = TwoInputs().double(), torch.randn(batch, 1).double()
    inputs = (torch.randn(batch, 3).double(), torch.randn(batch, 4).double())
    for baselines in (None, (0.5, torch.randn(1, 4).double()), tuple(torch.randn_like(x) for x in inputs)):
        expected = captums(model, inputs, baselines, 2, additional_forward_args=offset)
        found = compile_for_lrp(model, "deep_lift").attribute(inputs, 2, offset, baselines=baselines)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) <= FLOAT64


def softmax_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES), nn.Softmax(1)).double()


def test_captums_softmax_by_its_rule() -> None:
    """Captum subtracts a mean over classes and samples: for one sample it is NormalisedRescale."""
    model, x, baseline = softmax_network(), torch.randn(5, 6).double(), torch.randn(1, 6).double()
    as_captum = composites.deep_lift().override((on(OpClass.SOFTMAX), NormalisedRescale()))
    found = compile_for_lrp(model, as_captum, verify="ledger").attribute(x, 1, baselines=baseline)
    alone = torch.cat([captums(model, one[None], baseline, 1) for one in x])
    assert relative_error(found, alone) <= FLOAT64
    assert relative_error(captums(model, x, baseline.expand_as(x), 1), alone) > 1e-3


def test_softmax_conserves_where_captums_does_not() -> None:
    model, x, baseline = softmax_network(), torch.randn(5, 6).double(), torch.randn(5, 6).double()
    _, their_delta = captums(model, x, baseline, 1, return_convergence_delta=True)
    explained = compile_for_lrp(model, "deep_lift", verify="ledger")
    _, delta = explained.attribute(x, 1, baselines=baseline, return_convergence_delta=True)
    assert their_delta.abs().max() > 1e-3 and delta.abs().max() <= FLOAT64


def slope(y: Tensor, y0: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """The rescale rule's quotient."""
    return (y - y0) / (x - x0)


class Reused(nn.Module):
    """One linear layer and one ReLU, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.relu(self.layer(self.relu(x))))


class Functional(nn.Module):
    """The same without modules."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(F.relu(x))))


def test_reused_modules_and_functional_activations() -> None:
    model, x, x0 = Reused().double(), torch.randn(5, 6).double(), torch.randn(5, 6).double()
    weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
    runs = []
    for value in (x, x0):
        first = value.clamp(min=0) @ weight.T + bias
        runs.append((value, value.clamp(min=0), first, first.clamp(min=0)))
    (x_, a, h, b), (x0_, a0, h0, b0) = runs
    hidden = weight[2] * slope(b, b0, h, h0)
    expected = (x - x0) * (hidden @ weight) * slope(a, a0, x_, x0_)
    for ours in (model, Functional(model.layer)):
        found = compile_for_lrp(ours, "deep_lift").attribute(x, 2, baselines=x0)
        assert relative_error(found, expected) <= FLOAT64
    with pytest.raises(RuntimeError, match="used more than once"):
        captums(model, x, x0, 2)
    assert relative_error(captums(Functional(model.layer), x, x0, 2), expected) > 1e-3


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def test_activations_that_follow_each_other() -> None:
    """Captum's first module reads the second one's gradient before it is rescaled; a copy between them helps."""
    first, last, x = nn.Linear(6, 8).double(), nn.Linear(8, CLASSES).double(), torch.randn(5, 6).double()
    adjacent = nn.Sequential(first, nn.Sigmoid(), nn.Tanh(), last)
    apart = nn.Sequential(first, nn.Sigmoid(), Copy(), nn.Tanh(), last)
    expected, delta = captums(apart, x, None, 1, return_convergence_delta=True)
    found = compile_for_lrp(adjacent, "deep_lift").attribute(x, 1)
    assert relative_error(found, expected) <= FLOAT64 and delta.abs().max() <= FLOAT64
    _, their_delta = captums(adjacent, x, None, 1, return_convergence_delta=True)
    assert their_delta.abs().max() > 1e-4


def test_overlapping_windows_add_up() -> None:
    """A window's change goes to the winner of the run with the larger maximum; Captum keeps one window per winner."""
    pool = nn.Sequential(nn.MaxPool2d(3, 1), nn.Flatten(), nn.Linear(16, CLASSES, bias=False)).double()
    x, x0 = torch.randn(2, 1, 6, 6).double(), torch.randn(2, 1, 6, 6).double()
    seed = pool[2].weight.detach()[3].view(4, 4)
    expected = torch.zeros_like(x)
    for sample in range(2):
        for row in range(4):
            for column in range(4):
                here = x[sample, 0, row : row + 3, column : column + 3]
                there = x0[sample, 0, row : row + 3, column : column + 3]
                winner = divmod(int((here if here.max() >= there.max() else there).argmax()), 3)
                change = seed[row, column] * (here.max() - there.max())
                expected[sample, 0, row + winner[0], column + winner[1]] += change
    found, delta = compile_for_lrp(pool, "deep_lift").attribute(x, 3, baselines=x0, return_convergence_delta=True)
    assert relative_error(found, expected) <= FLOAT64 and delta.abs().max() <= FLOAT64
    assert relative_error(captums(pool, x, x0, 3), expected) > 1e-3
