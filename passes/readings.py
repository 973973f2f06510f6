"""What can be read while the reverse walk passes an op, beside relevance at values: attention maps and parameters."""

from __future__ import annotations

from typing import Any

from torch import fx

from lrp_compiler.passes.errors import SiteWithoutRelevanceError
from lrp_compiler.passes.program import Program, carries_float, facts, forward_nodes
from lrp_compiler.passes.rules.attention import map_relevance
from lrp_compiler.passes.rules.base import Edges, Rule
from lrp_compiler.passes.site import Site


def read_map(site: Site, rule: Rule, edge: Any) -> fx.Node:
    """Relevance at the map of an attention op; raises SiteWithoutRelevanceError when the rule holds it constant."""
    share = rule.map_share(site.op)
    if share == 0:
        raise SiteWithoutRelevanceError(name=f"the map of {site.op}", cause=f"the rule '{rule}' holds it constant")
    return map_relevance(site, edge, share)


def nodes_from(program: Program, parameters: set[str]) -> set[fx.Node]:
    """The parameters by these names and the values that are computed from them without any attributed input."""
    found: set[fx.Node] = set()
    for node in forward_nodes(program):
        derived = any(argument in found for argument in node.all_input_nodes) and carries_float(node)
        if node.name in parameters or (derived and not facts(node).live):
            found.add(node)
    return found


def parameter_edges(site: Site, rule: Rule | None, edge: Any, wanted: set[fx.Node]) -> Edges:
    """The edges of an op towards parameters: by its rule where relevance flows, else by its derivative."""
    operands = tuple(operand for operand in site.op.operands if operand.node in wanted)
    if not operands:
        return {}
    return site.vjp(edge, operands) if rule is None else rule.parameter_edges(site, edge, operands)
