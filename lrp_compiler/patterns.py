"""The signal directions that PatternNet and PatternAttribution carry relevance back by, estimated over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrp_compiler.composites import pattern_composite
from lrp_compiler.module import LRPModule
from lrp_compiler.passes.errors import NotAModelError, PatternFitError
from lrp_compiler.passes.linear_map import linear_map
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program, facts, graph_inputs
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.rules.pattern import PatternSite, weight_name
from lrp_compiler.tape import Tape

Estimator = Literal["two_component", "relu_positive", "linear"]
Patterns = dict[str, Tensor]


def fit_patterns(
    model: nn.Module,
    loader: Iterable[Any],
    estimator: Estimator = "two_component",
    *,
    inputs: Callable[[Any], Any] | None = None,
) -> Patterns:
    """Signal directions of every linear map: weight name -> tensor of the weight's shape (a state dict to save).

    One pass over ``loader``, one batched product per layer and batch beside the forward pass, nothing of the data kept;
    sums run in float64. ``inputs`` makes a call's arguments (a tensor, a tuple or a dict) from a batch; by default a
    tensor is itself, of a tuple or list the first entry (leaving labels out), of a dict all entries by keyword.

    With y = w^T x without bias, "linear" is a = cov[x, y] / var[y] over all data. For a layer that a ReLU reads,
    "two_component" (Kindermans et al. 2018, eq. 7) is a = (E+[xy] - E+[x] E[y]) / w^T(the same) with E+ over the
    samples where the ReLU is open, and "relu_positive" (iNNvestigate) is a = (E+[xy] - E+[x] E+[y]) / var+[y]; other
    layers get "linear". Either way w^T a = 1. Batch normalisation that only a layer feeds counts as part of it.
    Raises NotAModelError, and PatternFitError for a model in training mode, an empty loader, an unknown estimator.
    """
    if estimator not in get_args(Estimator):
        remedy = f"Take one of {', '.join(get_args(Estimator))}."
        raise PatternFitError(cause=f"there is no estimator {estimator!r}", remedy=remedy)
    if not isinstance(model, nn.Module):
        raise NotAModelError(kind=f"an object of type {type(model).__name__}", cause="it is not a torch.nn.Module")
    if model.training:
        cause = "the model is in training mode, and patterns belong to the model as it will be explained"
        raise PatternFitError(cause=cause, remedy="Call model.eval() first.")
    explained = LRPModule(model, pattern_composite("estimating patterns", PatternSite()))
    statistics: dict[str, _Statistics] = {}
    for batch in loader:
        _observe(explained, (inputs or first_entry)(batch), estimator, statistics)
    if not statistics:
        cause = "the loader yields no batch, or the model has no layers"
        raise PatternFitError(cause=cause, remedy="Pass an iterable of batches; one that was read before is empty.")
    return {name: found.pattern() for name, found in statistics.items()}


def first_entry(batch: Any) -> Any:
    """What of a batch a model is called with: labels come second."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _observe(explained: LRPModule, given: Any, estimator: Estimator, statistics: dict[str, _Statistics]) -> None:
    """Add one batch to the statistics of every layer."""
    args, kwargs = ((), given) if isinstance(given, dict) else (given if isinstance(given, tuple) else (given,), {})
    call = explained.explained_call(args, kwargs)
    layers = _layers(call.program)
    needed = tuple(dict.fromkeys(node.name for op in layers for node in _read_by(op)))
    tape = Tape(explained.original, explained.compiler, call, Request((), tuple((n, "activation") for n in needed)))
    tape.open(graph_inputs(call.program, explained.original, args, kwargs), {})
    tape.record()
    values = tape.values(needed)
    for op in layers:
        kind: Estimator = estimator if _feeds_relu(op) else "linear"
        found = statistics.setdefault(weight_name(op), _Statistics(kind))
        if found.estimator != kind:
            cause = f"'{weight_name(op)}' is used both with and without a ReLU behind it"
            raise PatternFitError(cause=cause, remedy="Take estimator='linear'.")
        found.add(op, values)


def _layers(program: Program) -> list[Operation]:
    nodes = program.nodes_by_name()
    return [Operation(node, nodes) for node in program.graph.nodes if isinstance(facts(node).rule, PatternSite)]


def _read_by(op: Operation) -> list[fx.Node]:
    """The nodes a layer's statistics are computed from: its arguments and its output."""
    leaves = pytree.tree_leaves([list(op.args), op.kwargs, op.fold()])
    return [*(leaf for leaf in leaves if isinstance(leaf, fx.Node)), op.node]


def _feeds_relu(op: Operation) -> bool:
    return bool(op.node.users) and all(op_name(user) == "aten::relu" for user in op.node.users)


@dataclass
class _Statistics:
    """Running sums of one weight: per output y the samples that count, x and xy in the weight's shape."""

    estimator: Estimator
    rows: Callable[[Tensor], Tensor] = torch.clone
    back: Callable[[Tensor], Tensor] = torch.clone
    weight: Tensor | None = None
    like: Tensor | None = None
    sums: dict[str, Tensor] | None = None

    def add(self, op: Operation, values: dict[str, Tensor]) -> None:
        """Count one batch of one use of the weight."""
        given = fx.map_arg([list(op.args), dict(op.kwargs)], lambda node: values[node.name])
        lin = linear_map(op)
        x, weight, bias = lin.parts(given, fx.map_arg(op.fold(), lambda node: values[node.name]))
        y = values[op.node.name] - bias
        masked = self.estimator != "linear"
        mask = (values[op.node.name] > 0).to(y.dtype) if masked else torch.ones_like(y)
        _, pull, *_ = torch.func.vjp(lambda w: lin(given, x, w), weight)
        (products,) = torch.vmap(pull)(torch.stack([mask, mask * y]))
        self.rows, self.back = _layout(op, weight)
        self.weight, self.like = self.rows(weight.double()), weight
        outputs = y.movedim(_channel_dim(op), 0).flatten(1).double()
        counted = mask.movedim(_channel_dim(op), 0).flatten(1).double()
        batch = {
            "n": counted.sum(1),
            "n_all": torch.full_like(counted[:, 0], counted.shape[1]) if counted.shape[1] else counted.sum(1),
            "x": self.rows(products[0].double()),
            "xy": self.rows(products[1].double()),
            "y": (counted * outputs).sum(1),
            "yy": (counted * outputs**2).sum(1),
            "y_all": outputs.sum(1),
        }
        self.sums = batch if self.sums is None else {key: self.sums[key] + value for key, value in batch.items()}

    def pattern(self) -> Tensor:
        """The signal direction, in the weight's shape and dtype; zero for an output that never was active."""
        assert self.sums is not None and self.weight is not None and self.like is not None
        n = self.sums["n"].clamp(min=1)
        mean_x, mean_xy = self.sums["x"] / n[:, None], self.sums["xy"] / n[:, None]
        mean_y = self.sums["y"] / n
        centre = self.sums["y_all"] / self.sums["n_all"].clamp(min=1) if self.estimator == "two_component" else mean_y
        covariance = mean_xy - mean_x * centre[:, None]
        if self.estimator == "two_component":
            scale = (self.weight * covariance).sum(1)
        else:
            scale = self.sums["yy"] / n - mean_y**2
        found = covariance / torch.where(scale == 0, 1, scale)[:, None]
        return self.back(found).to(self.like)


def _channel_dim(op: Operation) -> int:
    """The dimension of an op's output that counts its output neurons."""
    return 1 if "conv" in op.linear_name else -1


def _layout(op: Operation, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A weight as (outputs, inputs of each), and back."""
    shape = weight.shape
    if "transpose" in op.linear_name:
        groups = int(op.argument(6, "groups", 1))
        split = (groups, shape[0] // groups, *shape[1:])
        order = (groups, shape[1], shape[0] // groups, *shape[2:])
        return (
            lambda w: w.reshape(split).transpose(1, 2).flatten(0, 1).flatten(1),
            lambda rows: rows.reshape(order).transpose(1, 2).reshape(shape),
        )
    if op.linear_name == "aten::linear" or "conv" in op.linear_name:
        return lambda w: w.flatten(1), lambda rows: rows.reshape(shape)
    if len(shape) != 2 or linear_map(op).x > linear_map(op).weight:
        cause = f"{op} has no one weight vector per output"
        raise PatternFitError(cause=cause, remedy="Explain this model with a composite that needs no patterns.")
    return lambda w: w.t(), lambda rows: rows.t()
