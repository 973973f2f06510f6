"""Norms in any spelling: a value times or over a function of its own mean square, alone or after centring.

One sweep in graph order keeps, of every value computed from a mean or a mean square alone, how it scales with what the
mean is taken of: a norm is a value times one of degree -1, or over one of degree 1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.dataflow import CASTS, Flow, kept_shape, multiple, number, stripped, summands, uncast
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import InputKind, Pattern, Structure, first_argument, is_float, learn, tensor_of
from lrp_compiler.passes.sizes import hints, settle

aten = torch.ops.aten
LARGEST_EPSILON = 0.1
"""More than this beside a mean square is part of a function such as softsign."""

LAYOUTS = CASTS | aten_names("view reshape _unsafe_view flatten unflatten squeeze unsqueeze")
EXPANSIONS = aten_names("expand expand_as")
EXPONENTS = {"aten::rsqrt": -0.5, "aten::sqrt": 0.5, "aten::reciprocal": -1.0}


@dataclass(frozen=True)
class NormForm:
    """A norm over ``dims`` of x, or of x - mean(x) if ``centred``: times its scale, or over one that ``divides``."""

    dims: tuple[int, ...]
    divides: bool
    centred: bool


@dataclass(frozen=True)
class Statistic:
    """A function of means over ``dims`` of ``of``: of its square (of its deviation's, if ``centred``) or of itself.

    s(t x) = t^degree s(x) up to epsilons. ``shape`` is what it had before it was expanded. ``exact`` says that it is
    (mean square + epsilon) to a power, ``gain`` that constants of more than one element multiply it.
    """

    of: fx.Node
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    degree: float
    factor: float = 1.0
    exact: bool = True
    centred: bool = False
    is_mean: bool = False
    gain: bool = False
    members: tuple[fx.Node, ...] = ()


def recognise_norms(flow: Flow) -> None:
    """Mark RMSNorm and layer norm patterns, and norms of parameters as weight_norm."""
    sweep = _Sweep(flow)
    for node in flow.nodes:
        if node.op == "call_function":
            sweep.visit(node)


class _Sweep:
    """What is known so far: squares, centred values and statistics by node."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.squares: dict[fx.Node, fx.Node] = {}
        self.centred: dict[fx.Node, Statistic] = {}
        self.statistics: dict[fx.Node, Statistic] = {}

    def visit(self, node: fx.Node) -> None:
        """Learn what ``node`` is; mark it where it is a norm."""
        squared = _squared(node)
        if squared is not None:
            self.squares[node] = squared
        found = self.base(node) or self.step(node)
        if found is not None:
            self.statistics[node] = replace(found, members=(*found.members, node))
        elif node.target is aten._weight_norm_interface.default:
            learn(node, structures=(_weight_norm(node, node.args[0], node.args[1]),))
        elif (mean := self.subtracted(node)) is not None:
            self.centred[node] = replace(mean, members=(*mean.members, node))
        else:
            self.close(node)

    def base(self, node: fx.Node) -> Statistic | None:
        """A mean, sum, variance, deviation or Euclidean norm over some dimensions."""
        call, name = node, op_name(node)
        if node.target is operator.getitem and op_name(call := first_argument(node)) in PAIRS:
            name = PAIRS[op_name(call)] if node.args[1] == 0 else "aten::mean"
        made = BASES.get(name)
        of = call.args[0] if call.args else None
        if made is None or not isinstance(of, fx.Node) or not is_float(of.meta.get("val")):
            return None
        dims = _dims(call, tensor_of(of).dim())
        size = math.prod(hints(tensor_of(of).shape[dim] for dim in dims))
        found = made(self, call, of, Statistic(of, dims, tuple(tensor_of(node).shape), 1.0, float(size)))
        if not dims or found is None:
            return None
        return found if call is node else replace(found, members=(*found.members, call))

    def step(self, node: fx.Node) -> Statistic | None:
        """What a function of one statistic makes of it."""
        known = [operand for operand in node.all_input_nodes if operand in self.statistics]
        if len(known) != 1:
            return None
        before, name = self.statistics[known[0]], op_name(node)
        if name in EXPANSIONS:
            return before if node.args[0] is known[0] else None
        if name in LAYOUTS:
            same = _nontrivial(tuple(tensor_of(node).shape)) == _nontrivial(before.shape)
            return replace(before, shape=tuple(tensor_of(node).shape)) if same and node.args[0] is known[0] else None
        if name in EXPONENTS or name == "aten::pow":
            return None if before.is_mean else _raised(before, node)
        scaled = multiple(node)
        if scaled is not None:
            return _scaled(before, scaled[1])
        return None if before.is_mean else self.padded(before, node, known[0])

    def padded(self, before: Statistic, node: fx.Node, at: fx.Node) -> Statistic | None:
        """A statistic with an epsilon, or with constants that multiply it."""
        name, terms = op_name(node), summands(node)
        if terms is not None or name in ("aten::clamp_min", "aten::clamp"):
            given = [*node.args, *node.kwargs.values()]
            numbers = [found for value in given if value is not at and (found := number(value)) is not None]
            small = len(numbers) == len(given) - 1 == 1 and 0 <= numbers[0] <= LARGEST_EPSILON
            exact = before.exact and before.degree == 2 and terms is not None
            return replace(before, exact=exact) if small and before.degree > 0 else None
        if name not in ("aten::mul", "aten::div") or len(node.args) != 2 or node.kwargs:
            return None
        (other,) = [value for value in node.args if value is not at] or [at]
        if not isinstance(other, fx.Node) or other in self.flow.data or self.is_itself(other, before):
            return None
        if self.weight_in(other, before) is not None:
            return None
        inverted = name == "aten::div" and node.args[1] is at
        return replace(before, degree=-before.degree if inverted else before.degree, gain=True, exact=False)

    def is_itself(self, value: fx.Node, statistic: Statistic) -> bool:
        """Whether ``statistic`` is one of ``value``, which it would normalise."""
        return stripped(value) is stripped(statistic.of)

    def subtracted(self, node: fx.Node) -> Statistic | None:
        """The mean that ``node`` subtracts from the value it is a mean of."""
        if op_name(node) != "aten::sub" or len(node.args) != 2 or node.kwargs:
            return None
        value, subtracted = node.args
        mean = self.statistics.get(subtracted) if isinstance(subtracted, fx.Node) else None
        if mean is None or not mean.is_mean or not isinstance(value, fx.Node):
            return None
        is_its_own = uncast(value) is uncast(mean.of) and _aligned(mean, value)
        return mean if is_its_own and math.isclose(mean.factor, 1.0) else None

    def close(self, node: fx.Node) -> None:
        """Mark ``node`` if it is a value times or over a statistic of itself."""
        name = op_name(node)
        if name not in ("aten::mul", "aten::div") or len(node.args) != 2 or node.kwargs:
            return
        pairs = [node.args] if name == "aten::div" else [node.args, node.args[::-1]]
        for value, scale in pairs:
            statistic = self.statistics.get(scale) if isinstance(scale, fx.Node) else None
            if statistic is None or not isinstance(value, fx.Node) or statistic.is_mean:
                continue
            if statistic.degree != (1 if name == "aten::div" else -1):
                continue
            weight = self.weight_in(value, statistic)
            if weight is not None:
                learn(node, structures=(_weight_norm(node, weight, scale),))
            elif self.normalises(value, statistic):
                self.mark(node, value, self.flow.named[str(scale)], statistic)
            return

    def weight_in(self, value: fx.Node, statistic: Statistic) -> fx.Node | None:
        """The parameter that a norm is one of: ``value`` as it is stored, or times constants."""
        candidates = [value, *(value.all_input_nodes if op_name(value) == "aten::mul" else [])]
        for weight in candidates:
            stored = self.flow.kind(stripped(weight)) is InputKind.PARAMETER and value not in self.flow.data
            if stored and not statistic.centred and self.is_itself(weight, statistic):
                return weight
        return None

    def normalises(self, value: fx.Node, statistic: Statistic) -> bool:
        """Whether ``value`` and a statistic of it make a norm over dimensions of each sample."""
        if statistic.gain or value not in self.flow.data:
            return False
        centring, other = self.centring(value, statistic), self.centring(statistic.of, statistic)
        fits = uncast(statistic.of) in self.without_constants(value) or (
            centring is not None and other is not None and uncast(centring.of) is uncast(other.of)
        )
        if statistic.centred:
            of_source = centring is not None and uncast(centring.of) is uncast(statistic.of)
            fits = of_source or (fits and centring is not None)
        # Statistics over the first of several dimensions are of a batch.
        per_sample = 0 not in statistic.dims or tensor_of(value).dim() == 1
        return fits and per_sample and _aligned(statistic, value)

    def centring(self, value: fx.Node, statistic: Statistic) -> Statistic | None:
        """The mean subtracted in ``value``, taken over the dimensions of ``statistic``."""
        means = [self.centred[form] for form in self.without_constants(value) if form in self.centred]
        return next((mean for mean in means if mean.dims == statistic.dims), None)

    def without_constants(self, value: fx.Node) -> list[fx.Node]:
        """``value`` before it was cast, and before it was multiplied by each constant such as the norm's weight."""
        forms = [uncast(value)]
        while op_name(forms[-1]) == "aten::mul" and forms[-1] not in self.squares and not forms[-1].kwargs:
            varying = [factor for factor in forms[-1].all_input_nodes if factor in self.flow.data]
            if len(varying) != 1 or tensor_of(varying[0]).shape != tensor_of(value).shape:
                break
            forms.append(uncast(varying[0]))
        return forms

    def mark(self, node: fx.Node, value: fx.Node, scale: fx.Node, statistic: Statistic) -> None:
        divides = op_name(node) == "aten::div"
        centring, other = self.centring(value, statistic), self.centring(statistic.of, statistic)
        kind, source, members = "rms_norm", value, self.flow.inside(node, statistic.members)
        if centring is not None:
            centrings = (*centring.members, *(() if other is None else other.members))
            within = self.flow.inside(node, (*statistic.members, *centrings))
            # Where others read the centred value, centring stays an op of its own.
            if value.name in within and uncast(value) is value:
                kind, source, members = "layer_norm", value.args[0], within  # type: ignore[assignment]
        form = NormForm(statistic.dims, divides, kind == "layer_norm")
        of_itself = kind == "layer_norm" or uncast(value) is uncast(statistic.of)
        exact = of_itself and statistic.exact and math.isclose(statistic.factor, 1.0)
        # How many values a statistic is over was read off the captured call.
        settle([tensor_of(statistic.of).shape[dim] for dim in statistic.dims])
        settle([self.flow.named[name].args for name in members])
        pattern = Pattern(kind, (source.name,), (scale.name,), members, form, exact_differences=exact)
        learn(node, pattern=pattern)


def _squared(node: fx.Node) -> fx.Node | None:
    """x of x^2, real."""
    name, args = op_name(node), node.args
    twice = name == "aten::mul" and len(args) == 2 and args[0] is args[1]
    power = name == "aten::pow" and number(args[1]) == 2
    if not (twice or power or name == "aten::square") or not isinstance(args[0], fx.Node):
        return None
    value = args[0].meta.get("val")
    return args[0] if is_float(value) and not tensor_of(args[0]).is_complex() else None


def _dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The dimensions that a reduction runs over; empty for all, whose statistic belongs to no sample."""
    place = 2 if op_name(node) in EUCLIDEAN else 1
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
    if isinstance(given, int):
        given = [given]
    return tuple(sorted(int(dim) % rank for dim in given)) if isinstance(given, (list, tuple)) and rank else ()


EUCLIDEAN = aten_names("linalg_vector_norm norm")


def _of_sum(sweep: _Sweep, node: fx.Node, of: fx.Node, total: Statistic) -> Statistic:
    """A sum of squares, or of values."""
    squared = sweep.squares.get(of)
    if squared is None:
        return replace(total, is_mean=True)
    return replace(total, of=squared, degree=2.0, members=(of,))


def _of_mean(sweep: _Sweep, node: fx.Node, of: fx.Node, total: Statistic) -> Statistic:
    """A mean of squares, or of values."""
    return replace(_of_sum(sweep, node, of, total), factor=1.0)


def _of_spread(sweep: _Sweep, node: fx.Node, of: fx.Node, total: Statistic) -> Statistic:
    """A variance or standard deviation."""
    unbiased: Any = node.args[2] if node.target in (aten.var.dim, aten.std.dim) and len(node.args) > 2 else 1
    correction: Any = node.kwargs.get("correction", unbiased)
    freedom = total.factor - (1 if correction is None else int(correction))
    degree = 2.0 if op_name(node) in ("aten::var", "aten::var_mean") else 1.0
    return replace(total, degree=degree, factor=total.factor / freedom if freedom > 0 else 1.0, centred=True)


def _of_norm(sweep: _Sweep, node: fx.Node, of: fx.Node, total: Statistic) -> Statistic | None:
    """A Euclidean norm."""
    return total if len(node.args) < 2 or number(node.args[1]) == 2 else None


BASES: dict[str, Callable[..., Statistic | None]] = {
    "aten::mean": _of_mean,
    "aten::sum": _of_sum,
    "aten::var": _of_spread,
    "aten::std": _of_spread,
    **dict.fromkeys(EUCLIDEAN, _of_norm),
}
PAIRS = {"aten::var_mean": "aten::var", "aten::std_mean": "aten::std"}
"""Ops that return a spread, then the mean."""


def _raised(before: Statistic, node: fx.Node) -> Statistic | None:
    """A statistic to a power."""
    power = EXPONENTS.get(op_name(node)) or (number(node.args[1]) if len(node.args) == 2 else None)
    if not power:
        return None
    exact = before.exact and (before.degree, abs(power)) in ((2, 0.5), (1, 1))
    return replace(before, degree=before.degree * power, exact=exact)


def _scaled(before: Statistic, factor: float) -> Statistic | None:
    """A statistic times a positive number."""
    if factor <= 0:
        return None
    return replace(before, factor=before.factor * factor ** (2 / before.degree if not before.is_mean else 1))


def _nontrivial(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _aligned(statistic: Statistic, value: fx.Node) -> bool:
    """Whether each element of ``value`` meets the statistic of its own group."""
    expected = kept_shape(value, statistic.dims)
    return (1,) * (len(expected) - len(statistic.shape)) + statistic.shape == expected


def _weight_norm(node: fx.Node, value: Any, scale: Any) -> Structure:
    return Structure("weight_norm", (("weight", value.name), ("scale", scale.name)))
