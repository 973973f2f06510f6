"""The gate of the comparison: where two providers follow the same rules, they must give the same relevance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from providers import bars, captum_lrp, lxt_efficient, ours, zennit_composites
from torch import Tensor, nn


@dataclass(frozen=True)
class Agreement:
    """Two providers of the same relevance.

    One that ``folds`` batch norms into convolutions rounds the forward pass otherwise than the other.
    """

    found: str
    expected: str
    folds: bool = False


def agreements() -> tuple[Agreement, ...]:
    """Every pair with the same rules; of DynamicLRP nobody else has the rules."""
    given = [name for name, _ in ours.COMPOSITES]
    return (
        Agreement(ours.name_of("input_x_gradient"), bars.INPUT_X_GRADIENT),
        *(Agreement(ours.name_of(name) + ours.WITH_OUTPUTS, ours.name_of(name)) for name in given),
        *(Agreement(ours.name_of(name) + ours.PREPARED, ours.name_of(name)) for name in ours.KEEPING),
        *(Agreement(ours.name_of(name), lxt_efficient.name_of(name)) for name in lxt_efficient.ATTENTION),
        *(
            Agreement(ours.name_of(name), zennit_composites.name_of(name), folds=True)
            for name in zennit_composites.COMPOSITES
        ),
        Agreement(ours.name_of("epsilon"), captum_lrp.EPSILON),
    )


@dataclass(frozen=True)
class Rounding:
    """What two correct implementations may differ by, as a share of the relevance.

    A product of n terms rounds like sqrt(n) steps (Higham & Mary 2019); ``smooth`` adds that up over all layers,
    forward and back. Folding changes the forward pass by as much, and with it the side of zero that so large a share
    of the units is on; across a kink a unit's coefficient changes as a whole, and independent changes add in
    quadrature: ``kinked`` is the square root of the share.
    """

    smooth: float
    kinked: float

    def of(self, agreement: Agreement) -> float:
        """What a pair may differ by."""
        return self.kinked if agreement.folds else self.smooth


def rounding(model: nn.Module, relevance_dtype: torch.dtype = torch.float32) -> Rounding:
    """The allowance for a model of float32, from the sizes of its weights.

    With relevance in a lower dtype each edge is rounded to it, once a layer, products being summed in float32.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in embeddings]
    terms = [max(weight[0].numel(), weight.shape[0]) for weight in weights]
    smooth = torch.finfo(torch.float32).eps * sum(math.sqrt(count) for count in terms)
    kinked = math.sqrt(smooth) if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else smooth
    if relevance_dtype is not torch.float32:
        edges = torch.finfo(relevance_dtype).eps / 2 * math.sqrt(len(terms))
        smooth, kinked = smooth + edges, kinked + edges
    return Rounding(smooth, kinked)


@dataclass(frozen=True)
class Verdict:
    """How far one pair is apart, and how far it may be."""

    agreement: Agreement
    difference: float
    allowed: float

    @property
    def is_red(self) -> bool:
        return not self.difference <= self.allowed

    def __str__(self) -> str:
        sign = "differs from" if self.is_red else "agrees with"
        pair = f"{self.agreement.found} {sign} {self.agreement.expected}"
        return f"{pair}: {self.difference:.1e} of its norm, {self.allowed:.1e} allowed"


def difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, in units of the norm of what is expected; infinite for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def verdicts(relevances: Mapping[str, Tensor], allowed: Rounding) -> list[Verdict]:
    """Every pair of which both sides are there."""
    return [
        Verdict(pair, difference(relevances[pair.found], relevances[pair.expected]), allowed.of(pair))
        for pair in agreements()
        if pair.found in relevances and pair.expected in relevances
    ]
