"""Epsilon-LRP on convolutional networks against zennit 0.5.1 (Anders et al. 2021).

Zennit hooks modules and works on relevances; we rewrite the graph and work on coefficients. Both stabilise z
to z + epsilon sign(z) with sign(0) = +1, so with the same epsilon they are the same function.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from peers import (
    zennit_attribution,
    zennit_canonizers,
    zennit_composites,
    zennit_layer,
    zennit_rules,
    zennit_types,
)
from torch import Tensor, nn
from zennit_networks import CLASSES, FunctionalBlock, cnn, resnet, sequence_net, smooth_mlp

from lrp_compiler import compile_for_lrp, composites

EPSILON = 1e-6
"""Zennit's own default; given to both sides."""

AGAINST_ZERO = 1e-30
"""Zennit's stabiliser where we have none (sums, averages, the limit epsilon -> 0): it only keeps 0/0 away."""

FLOAT32 = 1e-5
"""Zennit divides by activations layer by layer, so float32 leaves about eps * |a / z|; 5e-7 measured here."""

FLOAT64 = 1e-10
"""The same rule with the same epsilon: only float64 rounding is left, 3e-12 measured."""

TOLERANCES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def zennit_epsilon(
    model: nn.Module, x: Tensor, target: int, epsilon: float = EPSILON, *, canonical: bool = True
) -> Tensor:
    """Zennit's relevance of x: Epsilon on layers with weights, Norm on sums and averages, Pass on the rest.

    ``canonical`` folds batch norms into the convolutions before them, as zennit recommends.
    """
    layer_map = [
        (zennit_types.Activation, zennit_rules.Pass()),
        (zennit_types.BatchNorm, zennit_rules.Pass()),
        (zennit_types.AvgPool, zennit_rules.Norm(stabilizer=AGAINST_ZERO)),
        (zennit_layer.Sum, zennit_rules.Norm(stabilizer=AGAINST_ZERO)),
        (zennit_types.Linear, zennit_rules.Epsilon(epsilon=epsilon)),
    ]
    canonizers = [zennit_canonizers.SequentialMergeBatchNorm()] if canonical else []
    composite = zennit_composites.LayerMapComposite(layer_map, canonizers=canonizers)

    def seed(output: Tensor) -> Tensor:
        return output.detach() * torch.eye(CLASSES, dtype=output.dtype)[target]

    with zennit_attribution.Gradient(model, composite, attr_output=seed) as attributor:
        _, relevance = attributor(x.clone().requires_grad_())
    return relevance.detach()


def ours(model: nn.Module, x: Tensor, target: int, epsilon: float = EPSILON) -> Tensor:
    """Our relevance of x with this epsilon, zero meaning its limit."""
    return compile_for_lrp(model, composites.epsilon(epsilon)).attribute(x, target)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (2, 3, 16, 16)),
    "sequence_net": (sequence_net, (2, 3, 17)),
    "smooth_mlp": (smooth_mlp, (3, 10)),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_epsilon_is_zennits(name: str, dtype: torch.dtype) -> None:
    make, shape = NETWORKS[name]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    for target in range(CLASSES):
        explained, expected = compile_for_lrp(model, composites.epsilon(EPSILON)), zennit_epsilon(model, x, target)
        assert agreement(explained, x, explained.attribute(x, target), expected, "zennit") <= TOLERANCES[dtype]


def test_the_limit_epsilon_to_zero_is_close_to_zennits_epsilon() -> None:
    """LRP-0 drops the stabiliser: the difference is at most epsilon / |z| a layer, to first order."""
    model, x = cnn().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    limit = compile_for_lrp(model, "epsilon").attribute(x, 1)
    stabilised = zennit_epsilon(model, x, 1)
    smallest = min(float(layer_output.abs().min()) for layer_output in weighted_outputs(model, x))
    depth = sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model)
    assert 0 < relative_error(stabilised, limit) <= 2 * depth * EPSILON / smallest


def weighted_outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The outputs of the layers with weights."""
    found = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            found.append(x.detach())
    return found


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_residual_networks_with_batch_norm_are_zennits(dtype: torch.dtype) -> None:
    """With batch norms folded, zennit's epsilon stabilises the convolution after its norm, ours before it.

    So the limit epsilon -> 0 is what both agree on; a real epsilon differs by epsilon / |z|.
    """
    model, x = resnet().to(dtype), torch.randn(2, 3, 12, 12, dtype=dtype)
    for target in range(CLASSES):
        expected = zennit_epsilon(model, x, target, AGAINST_ZERO)
        assert relative_error(ours(model, x, target, 0.0), expected) <= TOLERANCES[dtype]


def test_functional_sum_is_the_module_sum_for_us() -> None:
    """The graph knows the add however it is spelled."""
    modules = resnet().double()
    functional = resnet(FunctionalBlock).double()
    functional.load_state_dict(modules.state_dict())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert relative_error(ours(functional, x, 0), ours(modules, x, 0)) <= FLOAT64


def test_zennit_doubles_relevance_at_functional_sums() -> None:
    """Zennit sees modules only: ``+`` keeps its plain gradient, which copies relevance to both branches.

    Two linear layers without biases, added, show it: zennit returns twice the output's relevance, we once.
    """

    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Linear(CLASSES, CLASSES, bias=False, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    model, x = TwoBranches(), torch.randn(1, CLASSES, dtype=torch.float64)
    given = model(x)[0, 2].detach()
    # Each side loses epsilon / |z| of its share and no more.
    assert torch.isclose(zennit_epsilon(model, x, 2).sum(), 2 * given, rtol=1e-4)
    assert torch.isclose(ours(model, x, 2).sum(), given, rtol=1e-4)


def test_zennit_without_canonizer_passes_through_batch_norm() -> None:
    """Unfolded, zennit hands batch norm's relevance on unchanged (Pass), so its shift keeps no share of it.

    We treat it as the affine map it is, which is what folding it into the convolution gives.
    """
    model, x = resnet().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    folded = zennit_epsilon(model, x, 0, AGAINST_ZERO)
    assert relative_error(ours(model, x, 0, 0.0), folded) <= FLOAT64
    assert relative_error(zennit_epsilon(model, x, 0, AGAINST_ZERO, canonical=False), folded) > 0.1
