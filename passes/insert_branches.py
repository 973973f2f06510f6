"""The relevance of a torch.cond: that of either branch as a program of its own, of which a call runs the one taken."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lrp_compiler.passes.branches import Conditional, ConditionalRelevance, operand_names
from lrp_compiler.passes.emitter import RelevanceEmitter
from lrp_compiler.passes.program import Facts, Program, first_argument, output_node, tensor_of, value_of
from lrp_compiler.passes.request import Request, Result
from lrp_compiler.passes.rules.base import EdgeKind
from lrp_compiler.passes.site import Site

Insert = Callable[[Program, Request], Program]
Key = tuple[str, int | str]
"""A result of both branches: an edge's kind and the operand's position, or 'sink' and the kind of sink."""


@dataclass(frozen=True)
class BranchRelevance:
    """What a torch.cond hands on: (operand's position, edge, its kind), and sinks summed within each kind."""

    edges: tuple[tuple[int, fx.Node, EdgeKind], ...]
    sinks: dict[str, fx.Node]


def insert_branches(
    site: Site, edges: list[fx.Node | None], wanted: set[int], request: Request, insert: Insert
) -> BranchRelevance:
    """Emit one call that runs the relevance of the branch taken, for the edges of the outputs (None: nothing arrived).

    ``wanted`` holds the positions of the operands that edges are wanted of. An edge arrives as coefficients, as
    relevance or as both, as in the branch; zeros where only the other branch gives it.
    """
    target = site.node.target
    assert isinstance(target, Conditional)
    seeded = tuple(index for index, edge in enumerate(edges) if edge is not None)
    joint = [_with_relevance(branch, seeded, wanted, request, insert) for branch in target.branches]
    keys = sorted({key for branch in joint for key in _found(branch)}, key=str)
    branches = tuple(_completed(branch, site.node, keys) for branch in joint)
    values = tuple(value_of(node) for node in _returned(branches[0]))
    seeds = [edge for edge in edges if edge is not None]
    call = site.emitter.region(ConditionalRelevance(branches), (first_argument(site.node), *seeds), values)
    made = {key: site.emitter.call(operator.getitem, call, index) for index, key in enumerate(keys)}
    return BranchRelevance(
        edges=tuple((int(place), node, kind) for (kind, place), node in made.items() if kind != "sink"),  # type: ignore[misc]
        sinks={str(kind): node for (what, kind), node in made.items() if what == "sink"},
    )


def _with_relevance(
    branch: Program, seeded: tuple[int, ...], wanted: set[int], request: Request, insert: Insert
) -> Program:
    """A branch with relevance from the seeded outputs to the wanted operands."""
    names = operand_names(branch)
    edges = tuple(name for index, name in enumerate(names) if index in wanted)
    return insert(branch, Request(seeded, (), sinks=request.sinks or request.ledger, edges=edges))


def _found(branch: Program) -> Iterator[Key]:
    """The key of each result of a branch."""
    positions = {name: index for index, name in enumerate(operand_names(branch))}
    for result in branch.results:
        yield ("sink", result.detail) if result.kind == "sink" else (result.kind, positions[result.site])


def _returned(branch: Program) -> tuple[fx.Node, ...]:
    """The nodes that hold a branch's results."""
    returned = output_node(branch.graph).args[0]
    assert isinstance(returned, tuple)
    return returned[len(returned) - len(branch.results) :]  # type: ignore[return-value]


def _completed(branch: Program, node: fx.Node, keys: list[Key]) -> Program:
    """``branch`` with one result per key: zeros where it has none, sinks of a kind as the sum over all elements."""
    output = output_node(branch.graph)
    stamp = Facts(part="relevance", origin=node.name)
    emitter = RelevanceEmitter(branch.graph, branch.fake_mode, output, branch.traces, stamp)
    found: dict[Key, list[fx.Node]] = {}
    for key, made in zip(_found(branch), _returned(branch), strict=True):
        found.setdefault(key, []).append(made)
    nodes = branch.nodes_by_name()
    names = operand_names(branch)
    results, returned = [], []
    for kind, place in keys:
        if kind == "sink":
            returned.append(_sum(emitter, found.get((kind, place), []), tensor_of(nodes[names[0]])))
            results.append(Result("sink", node.name, str(place)))
        else:
            name = names[int(place)]
            arrived = found.get((kind, place))
            returned.append(arrived[0] if arrived else _zeros(emitter, tensor_of(nodes[name])))
            results.append(Result(kind, name))  # type: ignore[arg-type]
    kept = output.args[0][: len(output.args[0]) - len(branch.results)]  # type: ignore[index, arg-type]
    output.args = ((*kept, *returned),)  # type: ignore[misc]
    return branch.having(results=tuple(results))


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum over all elements of all ``parts``, in float64."""
    return torch.stack([part.double().sum() for part in parts]).sum()


def _sum(emitter: RelevanceEmitter, parts: list[fx.Node], like: Tensor) -> fx.Node:
    if parts:
        return emitter(sum_of, parts)  # type: ignore[no-any-return]
    return emitter.call(torch.ops.aten.full.default, [], 0.0, dtype=torch.float64, device=like.device)


def _zeros(emitter: RelevanceEmitter, like: Tensor) -> fx.Node:
    return emitter.call(torch.ops.aten.full.default, list(like.shape), 0, dtype=like.dtype, device=like.device)
