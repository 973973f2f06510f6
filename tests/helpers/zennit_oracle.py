"""zennit's nine named composites as oracles, and ours beside them."""

from __future__ import annotations

from typing import Any

import torch
from peers import (
    zennit_attribution,
    zennit_canonizers,
    zennit_composites,
    zennit_layer,
    zennit_rules,
    zennit_types,
)
from torch import Tensor, nn
from zennit_networks import CLASSES

from lrp_compiler import LRPModule, compile_for_lrp, composites

LOW, HIGH = -3.0, 3.0

AGAINST_ZERO = 1e-30
"""Zennit's stabiliser at sums and averages, where we divide by nothing."""

NAMES = [
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "excitation_backprop",
    "deconvnet",
    "guided_backprop",
    "beta_smooth",
]


GRADIENT_LIKE = ("deconvnet", "guided_backprop", "beta_smooth")


def zennit_composite(x: Tensor, name: str) -> Any:
    """zennit's composite of this name, exact at sums and averages, batch norms folded."""
    exact = zennit_rules.Norm(stabilizer=AGAINST_ZERO)
    kwargs: dict[str, Any] = {
        "layer_map": [(zennit_types.AvgPool, exact), (zennit_layer.Sum, exact)],
        "canonizers": [zennit_canonizers.SequentialMergeBatchNorm()],
    }
    if name == "epsilon_gamma_box":
        kwargs |= {"low": torch.full_like(x, LOW), "high": torch.full_like(x, HIGH)}
    if name in GRADIENT_LIKE:
        del kwargs["layer_map"]
    return zennit_composites.COMPOSITES[name](**kwargs)


def zennit_relevance(model: nn.Module, x: Tensor, name: str, target: int) -> Tensor:
    """What zennit's composite of this name attributes to ``x``."""

    def seed(output: Tensor) -> Tensor:
        one_hot = torch.eye(CLASSES, dtype=output.dtype)[target]
        return one_hot.expand_as(output) if name in GRADIENT_LIKE else output.detach() * one_hot

    with zennit_attribution.Gradient(model, zennit_composite(x, name), attr_output=seed) as attributor:
        _, relevance = attributor(x.clone().requires_grad_())
    return relevance.detach()


def ours(model: nn.Module, name: str) -> LRPModule:
    composite = composites.epsilon_gamma_box(LOW, HIGH) if name == "epsilon_gamma_box" else name
    return compile_for_lrp(model, composite)
