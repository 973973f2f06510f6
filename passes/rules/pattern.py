"""PatternNet and PatternAttribution: linear maps carried back by learned signal directions (Kindermans et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lrp_compiler.passes.errors import PatternError
from lrp_compiler.passes.linear_map import LinearMap, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.program import facts, tensor_of
from lrp_compiler.passes.rules.base import EdgeKind, Edges, Rule
from lrp_compiler.passes.site import Site


def signal_transpose(lin: LinearMap, operands: Any, shape: list[int], direction: Tensor, r: Tensor) -> Tensor:
    """R_x = D^T R at ``shape`` for a linear map whose weight is replaced by ``direction``."""
    # The transpose takes its input for the shape only.
    return lin.transpose(operands, r.new_zeros(1).expand(shape), direction, r)


def weighted(lin: LinearMap, operands: Any, fold: list[Any], pattern: Tensor) -> Tensor:
    """W * A."""
    return lin.parts(operands, fold)[1] * pattern


@dataclass(frozen=True)
class PatternSite(Rule):
    """Marks the linear maps that have patterns, with the batch norm folded into them; estimates need no more."""

    name: ClassVar[str] = "pattern_site"
    kind: ClassVar[EdgeKind] = "relevance"
    folds_batch_norm: ClassVar[bool] = True
    real_only: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing_factors


@dataclass(frozen=True, eq=False)
class PatternRule(PatternSite):
    """What both methods share; ``patterns`` holds, per weight name, a tensor of the weight's shape (fit_patterns)."""

    patterns: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def tensors(self, op: Operation) -> dict[str, Tensor]:
        name, weight = weight_name(op), tensor_of(weight_of(op).node)
        if name not in self.patterns:
            raise PatternError(op=str(op), weight=name, cause="there is none")
        pattern = self.patterns[name]
        if pattern.shape != weight.shape:
            cause = f"it is of shape {tuple(pattern.shape)}, the weight of {tuple(weight.shape)}"
            raise PatternError(op=str(op), weight=name, cause=cause)
        return {"pattern": pattern}

    def propagate(self, site: Site, edge: Any) -> Edges:
        (receiver,) = self.receivers(site.op)
        arguments = linear_map(site.op), _without_input(site.op), list(tensor_of(receiver.node).shape)
        direction = self.direction(site)
        return {receiver: site.emit(signal_transpose, *arguments, direction, edge, autograd=True)}

    def direction(self, site: Site) -> Any:
        """The node of what takes the weight's place."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PatternNet(PatternRule):
    """R_x = A^T R: the signal in the input that an output responds to."""

    name: ClassVar[str] = "pattern_net"

    def direction(self, site: Site) -> Any:
        return site.tensor("pattern")


@dataclass(frozen=True, eq=False)
class PatternAttribution(PatternRule):
    """R_x = (W * A)^T R: each input's share in the signal; conserves R, since w^T a = 1 for every output."""

    name: ClassVar[str] = "pattern_attribution"

    def direction(self, site: Site) -> Any:
        op = site.op
        return site.emit(weighted, linear_map(op), [list(op.args), dict(op.kwargs)], op.fold(), site.tensor("pattern"))


@dataclass(frozen=True)
class OnRelevance(Rule):
    """Another rule, applied to relevance in place of coefficients, as pattern methods treat all but linear maps."""

    rule: Rule
    kind: ClassVar[EdgeKind] = "relevance"
    real_only: ClassVar[bool] = True

    @property
    def linear_in_seed(self) -> bool:  # type: ignore[override]
        return self.rule.linear_in_seed

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return self.rule.receivers(op)

    def propagate(self, site: Site, edge: Any) -> Edges:
        return self.rule.propagate(site, edge)

    def __str__(self) -> str:
        return f"{self.rule} on relevance"


def weight_of(op: Operation) -> Operand:
    """The constant factor of a linear op."""
    (x,) = op.flowing_factors
    assert op.entry is not None
    return next(o for o in op.operands if o.argument in op.entry.factors and o.argument != x.argument)


def weight_name(op: Operation) -> str:
    """The name of the weight among the model's parameters; of a computed weight, the op that makes it."""
    node = weight_of(op).node
    return facts(node).origin or node.name


def _without_input(op: Operation) -> Any:
    """The call's (args, kwargs) with nothing in place of the input, so that its value is not kept."""
    (x,) = op.flowing_factors
    args = [None if position == x.argument else value for position, value in enumerate(op.args)]
    return [args, {key: None if key == x.argument else value for key, value in op.kwargs.items()}]
