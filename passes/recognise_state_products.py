"""State-space models in chunks (SSD, Mamba-2) and linear attention: which factor of each product carries the signal.

Chunked state-space models multiply a signal u Delta by decays exp(running sums of Delta A), by B and by C, and have no
loop over time; every product of the signal on its way to the last decay is marked ``state_product``. In linear
attention phi(q) (phi(k)^T v) the signal is v; both products are marked ``linear_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lrp_compiler.passes.dataflow import (
    CONTRACTIONS,
    RESHAPES,
    Flow,
    factors,
    float_operands,
    is_movement,
    kin,
    stripped,
)
from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import Pattern, facts, learn, tensor_of
from lrp_compiler.passes.sizes import at_hints, hints

aten = torch.ops.aten
SUMS = aten_names("cumsum sum")


def recognise_state_products(flow: Flow) -> None:
    """Mark the products of chunked state-space models, then those of linear attention."""
    data, nodes = flow.data, flow.nodes
    for decays, shared in _decays(nodes, data):
        for anchor in nodes:
            signal = _scaled_by(anchor, shared, decays, data)
            if signal is not None:
                _mark_state_space(nodes, anchor, signal, decays, data)
    for node in nodes:
        if factors(node) is not None and facts(node).pattern is None:
            _mark_linear_attention(node, data)


def _mark(product: fx.Node, followed: fx.Node, kind: str) -> None:
    if facts(product).pattern is None:
        learn(product, pattern=Pattern(kind, (followed.name,)))


def _decays(nodes: list[fx.Node], data: set[fx.Node]) -> list[tuple[set[fx.Node], set[fx.Node]]]:
    """(the decays exp(running sums), what they are computed from elementwise), one pair per state-space model."""
    groups: list[tuple[set[fx.Node], set[fx.Node]]] = []
    for node in nodes:
        if node.target is not aten.exp.default or node not in data:
            continue
        related = kin(node, data)
        if not any(op_name(relative) == "aten::cumsum" for relative in related):
            continue
        known = [group for group in groups if group[1] & related]
        groups = [group for group in groups if group not in known]
        groups.append(({node}.union(*(group[0] for group in known)), related.union(*(group[1] for group in known))))
    return groups


def _scaled_by(node: fx.Node, shared: set[fx.Node], decays: set[fx.Node], data: set[fx.Node]) -> fx.Node | None:
    """The factor that ``node`` scales by Delta (one of ``shared``); None where it does no such thing."""
    pair = factors(node)
    if pair is None or node in shared or not all(factor in data for factor in pair):
        return None
    for step, other in (pair, pair[::-1]):
        is_step = stripped(step) in shared and stripped(step) not in decays
        if is_step and stripped(other) not in shared:
            return other
    return None


@dataclass
class _Spread:
    """How a signal spreads: what carries it, the products it meets, the weights that decays have entered.

    ``first`` holds the carriers that have met no weight yet.
    """

    carriers: set[fx.Node]
    first: set[fx.Node]
    weights: set[fx.Node]
    met: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    entered: set[fx.Node] = field(default_factory=set)


def _mark_state_space(
    nodes: list[fx.Node], anchor: fx.Node, signal: fx.Node, decays: set[fx.Node], data: set[fx.Node]
) -> None:
    """Mark every product of the signal from ``anchor`` = Delta u to the last with a decay or with B or C."""
    spread = _Spread({anchor}, {anchor}, set(decays))
    for node in nodes[nodes.index(anchor) + 1 :]:
        if node.op == "call_function" and not _spread_to(node, spread, data):
            return
    closing = {
        product
        for product, (_, weight) in spread.met.items()
        if weight in spread.weights or stripped(weight) in spread.entered
    }
    needed = _leading_to(nodes, closing, spread.carriers)
    starts = [p for p, (followed, _) in spread.met.items() if p in needed and followed in spread.first]
    if not starts or any(spread.met[product][1] not in spread.weights for product in starts):
        return
    _mark(anchor, signal, "state_product")
    for product in needed & spread.met.keys():
        _mark(product, spread.met[product][0], "state_product")


def _spread_to(node: fx.Node, spread: _Spread, data: set[fx.Node]) -> bool:
    """Let carriers and weights spread to ``node``; False where the signal meets itself."""
    pair = factors(node)
    if pair is not None:
        carrying = [factor for factor in pair if factor in spread.carriers]
        if len(carrying) == 2:
            return False
        if carrying:
            (followed,) = carrying
            weight = pair[1] if followed is pair[0] else pair[0]
            spread.carriers.add(node)
            if weight in data:
                spread.met[node] = (followed, weight)
            elif followed in spread.first:
                spread.first.add(node)
        elif any(factor in spread.weights for factor in pair):
            spread.weights.add(node)
            spread.entered |= _entered(node, spread.weights, data)
        return True
    operands = float_operands(node)
    entry = classify(node)
    passes = is_movement(node) or op_name(node) in SUMS or (entry is not None and entry.op_class is OpClass.ADD)
    if passes and any(operand in spread.carriers for operand in operands):
        spread.carriers.add(node)
        if not any(operand in spread.carriers - spread.first for operand in operands):
            spread.first.add(node)
    elif is_movement(node) and any(operand in spread.weights for operand in operands):
        spread.weights.add(node)
    return True


def _entered(product: fx.Node, weights: set[fx.Node], data: set[fx.Node]) -> set[fx.Node]:
    """The values (B, C) that a product with a decay turns into weights, down through products of their own."""
    found: set[fx.Node] = set()
    waiting = [factor for factor in factors(product) or () if factor not in weights]
    while waiting:
        node = stripped(waiting.pop())
        pair = factors(node)
        if pair is not None:
            waiting += pair
        elif node in data:
            found.add(node)
    return found


def _leading_to(nodes: list[fx.Node], closing: set[fx.Node], carriers: set[fx.Node]) -> set[fx.Node]:
    """``closing`` and the carriers from which it is reached."""
    needed = set(closing)
    for node in reversed(nodes):
        if node in carriers and any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _mark_linear_attention(outer: fx.Node, data: set[fx.Node]) -> None:
    """Mark ``outer`` = q s and the product s = k^T v (or its running sum) that it reads."""
    pair = factors(outer)
    assert pair is not None
    for side, state in enumerate(pair):
        path = _path_to_product(state, data)
        if path is None or pair[1 - side] not in data:
            continue
        inner, *moved = path
        is_causal = any(op_name(node) == "aten::cumsum" for node in moved)
        dims = _summed_dims(outer, side)
        # (q k^T) v is a product of three values as well; there the state would be on the left.
        if not dims or not (is_causal or (side == 1 and outer.target in CONTRACTIONS)):
            continue
        key = _summed_factor(inner, moved, dims)
        if key is not None:
            value = (factors(inner) or ())[1 - key]
            _mark(inner, value, "linear_attention")
            _mark(outer, state, "linear_attention")
            return


def _path_to_product(state: fx.Node, data: set[fx.Node]) -> list[fx.Node] | None:
    """[a product of two data, the movement and running sums from it to ``state``]."""
    path: list[fx.Node] = [state]
    while op_name(path[0]) in RESHAPES | {"aten::cumsum"} and isinstance(path[0].args[0], fx.Node):
        path.insert(0, path[0].args[0])
    pair = factors(path[0])
    alone = pair is not None and all(factor in data for factor in pair) and pair[0] is not pair[1]
    return path if alone and facts(path[0]).pattern is None else None


def _summed_dims(outer: fx.Node, side: int) -> tuple[int, ...]:
    """The dimensions of factor ``side`` that a product sums over, itself or in the sum that follows."""
    rank = tensor_of(outer).dim()
    if outer.target in CONTRACTIONS:
        factor = outer.args[side]
        assert isinstance(factor, fx.Node)
        return (tensor_of(factor).dim() - 1 - side,) if tensor_of(factor).dim() > 1 else ()
    (user,) = outer.users if len(outer.users) == 1 else (None,)
    if user is None or user.target is not aten.sum.dim_IntList or not isinstance(user.args[1], (list, tuple)):
        return ()
    return tuple(int(str(dim)) % rank for dim in user.args[1])


def _summed_factor(inner: fx.Node, moved: list[fx.Node], dims: tuple[int, ...]) -> int | None:
    """Which factor of ``inner`` alone varies along ``dims`` of the end of ``moved``: labels are moved to see it."""
    varying: list[int] = []
    for side in (0, 1):
        own = _own_dims(inner, side)
        labels = _moved(_labels(hints(tensor_of(inner).shape), own), moved) if own else None
        if labels is None or labels.numel() == 0:
            return None
        start = labels
        for dim in dims:
            start = start.narrow(dim, 0, 1)
        if not torch.equal(start.expand_as(labels), labels):
            varying.append(side)
    return varying[0] if len(varying) == 1 else None


def _labels(shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """A tensor of ``shape`` that numbers its places along ``dims``."""
    labels = torch.zeros(shape, dtype=torch.int64)
    for dim in dims:
        along = [-1 if other == dim else 1 for other in range(len(shape))]
        labels = labels * shape[dim] + torch.arange(shape[dim]).view(along)
    return labels


def _moved(labels: Tensor, nodes: list[fx.Node]) -> Tensor | None:
    """``labels`` after the movement among ``nodes`` (running sums leave places as they are)."""
    for node in nodes:
        if any(isinstance(argument, fx.Node) for argument in node.args[1:]) or not callable(node.target):
            return None
        if op_name(node) != "aten::cumsum":
            labels = node.target(labels, *at_hints(node.args[1:]), **at_hints(node.kwargs))
    return labels


def _own_dims(product: fx.Node, side: int) -> tuple[int, ...]:
    """The dimensions of a product along which only factor ``side`` varies."""
    rank = tensor_of(product).dim()
    if product.target in CONTRACTIONS:
        return (rank - 2 + side,) if rank > 1 else ()
    shapes = []
    for factor in factors(product) or ():
        shape = tuple(tensor_of(factor).shape)
        shapes.append((1,) * (rank - len(shape)) + shape)
    return tuple(dim for dim in range(rank) if shapes[side][dim] > 1 and shapes[1 - side][dim] == 1)
