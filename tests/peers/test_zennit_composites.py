"""zennit's nine named composites against ours, in float64 (zennit 0.5.1)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from pairs import covering
from peers import (
    zennit_attribution,
    zennit_composites,
    zennit_core,
    zennit_rules,
    zennit_types,
)
from torch import Tensor, nn
from zennit_networks import CLASSES, cnn, resnet, sequence_net, volume_net
from zennit_oracle import AGAINST_ZERO, HIGH, LOW, NAMES, ours, zennit_composite, zennit_relevance

from lrp_compiler import compile_for_lrp, composites, errors

FLOAT64 = 1e-9
"""Same rules, same stabilisers: rounding only, amplified where positive and negative parts cancel."""


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (2, 3, 16, 16)),
    "resnet": (resnet, (2, 3, 12, 12)),
    "sequence_net": (sequence_net, (2, 3, 17)),
    "volume_net": (volume_net, (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize(("name", "network"), covering(NAMES, ["resnet", "cnn", "sequence_net", "volume_net"]))
def test_named_composites_are_zennits(name: str, network: str) -> None:
    make, shape = NETWORKS[network]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64).clamp(LOW, HIGH)
    explained = ours(model, name)
    for target in (0, CLASSES - 1):
        expected = zennit_relevance(model, x, name, target)
        assert agreement(explained, x, explained.attribute(x, target), expected, "zennit") <= FLOAT64


@pytest.mark.parametrize("network", ["cnn", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_zennit_composites_are_accepted_as_they_are(name: str, network: str) -> None:
    """The object itself, translated module by module, its parameters read from its hooks."""
    make, shape = NETWORKS[network]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64).clamp(LOW, HIGH)
    found = compile_for_lrp(model, zennit_composite(x, name)).attribute(x, 1)
    assert relative_error(found, zennit_relevance(model, x, name, 1)) <= FLOAT64


def test_parameters_of_zennit_hooks_are_taken_over() -> None:
    """Names, types and single modules mixed, with parameters that are nobody's defaults."""
    layer_map = [
        (zennit_types.Activation, zennit_rules.Pass()),
        (zennit_types.AvgPool, zennit_rules.Norm(stabilizer=AGAINST_ZERO)),
        (nn.Conv2d, zennit_rules.Gamma(gamma=0.7, stabilizer=1e-5)),
        (nn.Linear, zennit_rules.AlphaBeta(alpha=1.5, beta=0.5, stabilizer=1e-4)),
    ]
    names = [(["0"], zennit_rules.WSquare()), (["9"], zennit_rules.Epsilon(epsilon=0.3))]
    composite = zennit_composites.MixedComposite(
        [zennit_composites.NameMapComposite(names), zennit_composites.LayerMapComposite(layer_map)]
    )
    model, x = cnn().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def seed(output: Tensor) -> Tensor:
        return output.detach() * torch.eye(CLASSES, dtype=output.dtype)[2]

    with zennit_attribution.Gradient(model, composite, attr_output=seed) as attributor:
        _, expected = attributor(x.clone().requires_grad_())
    explained = compile_for_lrp(model, composite)
    assert relative_error(explained.attribute(x, 2), expected.detach()) <= FLOAT64
    assert {"gamma(0.7)", "alpha_beta(1.5, 0.5)", "w_square", "epsilon(0.3)"} <= {
        rule for _, rule in explained.report(x).rules
    }


def test_bounds_per_channel_are_zennits() -> None:
    """As for images normalised channel by channel; given to us as numbers and inside zennit's composite."""
    low, high = (-2.1, -2.0, -1.8), (2.2, 2.4, 2.6)
    model, x = cnn().double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    pixels = [torch.tensor(b, dtype=x.dtype).view(1, 3, 1, 1).expand_as(x) for b in (low, high)]
    exact = [(zennit_types.AvgPool, zennit_rules.Norm(stabilizer=AGAINST_ZERO))]
    composite = zennit_composites.EpsilonGammaBox(*pixels, layer_map=exact)

    def seed(output: Tensor) -> Tensor:
        return output.detach() * torch.eye(CLASSES, dtype=output.dtype)[0]

    with zennit_attribution.Gradient(model, composite, attr_output=seed) as attributor:
        _, expected = attributor(x.clone().requires_grad_())
    for ours_too in (composites.epsilon_gamma_box(low, high), composite):
        assert relative_error(compile_for_lrp(model, ours_too).attribute(x, 0), expected.detach()) <= FLOAT64


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 3, 16, 16), (3, 1, 1), ()])
def test_bounds_as_tensors_are_zennits(shape: tuple[int, ...]) -> None:
    """Another bound for every pixel, for every sample, for every channel, for all."""
    low, high = -1 - torch.rand(shape, dtype=torch.float64), 1 + torch.rand(shape, dtype=torch.float64)
    model, x = cnn().double(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    pixels = [bound.expand_as(x) for bound in (low, high)]
    exact = [(zennit_types.AvgPool, zennit_rules.Norm(stabilizer=AGAINST_ZERO))]

    def seed(output: Tensor) -> Tensor:
        return output.detach() * torch.eye(CLASSES, dtype=output.dtype)[0]

    with zennit_attribution.Gradient(
        model, zennit_composites.EpsilonGammaBox(*pixels, layer_map=exact), attr_output=seed
    ) as attributor:
        _, expected = attributor(x.clone().requires_grad_())
    explained = compile_for_lrp(model, composites.epsilon_gamma_box(low, high))
    assert relative_error(explained.attribute(x, 0), expected.detach()) <= FLOAT64


def test_bounds_that_do_not_fit_are_refused() -> None:
    explained = compile_for_lrp(cnn(), composites.epsilon_gamma_box(torch.zeros(3), 1.0))
    with pytest.raises(errors.RuleParameterError, match=r"ZBox.low.*\(3,\).*input of conv2d.*\(1, 3, 16, 16\)"):
        explained.attribute(torch.rand(1, 3, 16, 16), 0)


def test_hooks_without_a_rule_are_refused() -> None:
    class Own(zennit_core.Hook):
        """A hook of a user's."""

    composite = zennit_composites.LayerMapComposite([(nn.Linear, Own())])
    with pytest.raises(errors.CompositeError, match="the zennit hook of '9' has no rule of ours"):
        compile_for_lrp(cnn(), composite)
    clips = zennit_rules.Epsilon(epsilon=zennit_core.Stabilizer(epsilon=0.1, clip=True))
    with pytest.raises(errors.CompositeError, match="clips or scales"):
        compile_for_lrp(cnn(), zennit_composites.LayerMapComposite([(nn.Linear, clips)]))


@pytest.mark.parametrize("name", NAMES[:6])
def test_the_ledger_of_sign_split_composites_closes(name: str) -> None:
    model, x = resnet().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    _, tape = compile_for_lrp(model, name).run(x)
    ledger = tape.ledger(1)
    assert max(row.relative_gap for row in ledger.rows) <= FLOAT64
    ledger.check()


def test_folded_parameters_are_live() -> None:
    """An update of a batch norm or a convolution shows in the next relevance."""
    model, x = resnet().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    explained = compile_for_lrp(model, "epsilon_plus")
    explained.attribute(x, 1)
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(-1.5)
        model.get_parameter("3.conv1.weight").add_(0.1)
        model.get_buffer("3.bn2.running_mean").add_(0.3)
    assert relative_error(explained.attribute(x, 1), zennit_relevance(model, x, "epsilon_plus", 1)) <= FLOAT64
