"""assign_rules: the composite gives every live op its rule; what it cannot cover is refused in one error."""

from __future__ import annotations

from torch import fx

from lrp_compiler.passes.errors import UncoveredOpsError, user_source
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import classify, op_name
from lrp_compiler.passes.program import Program, facts, forward_nodes, learn, module_path
from lrp_compiler.passes.rules.base import Composite


def assign_rules(program: Program, composite: Composite) -> Program:
    """Give each live op a rule and mark where relevance can flow: to sources, through ops whose rule receives.

    In graph order, since what an op is (linear or bilinear) depends on which operands relevance can flow to.
    Raises UncoveredOpsError listing every live op that no line of the composite matches.
    """
    program = program.fork(composite=composite)
    nodes = program.nodes_by_name()
    sources = {name for found in program.sources.values() for name in found}
    inside = _inside_patterns(program, composite)
    uncovered: list[fx.Node] = []
    for node in forward_nodes(program):
        if not facts(node).live or node.name in inside:
            continue
        if node.name in sources:
            learn(node, flows=True)
            continue
        op = Operation(node, nodes)
        if not op.flowing:
            continue
        rule = composite.rule_for(op)
        if rule is None:
            uncovered.append(node)
            learn(node, flows=True)
            continue
        learn(node, rule=rule, flows=bool(rule.receivers(op)))
    if uncovered:
        _refuse(uncovered, composite)
    return program


def _inside_patterns(program: Program, composite: Composite) -> set[str]:
    """The nodes that recognised groups have swallowed, which nothing outside the group reads.

    A composite without patterns sees every op by itself.
    """
    members: set[str] = set()
    for node in forward_nodes(program):
        pattern = facts(node).pattern
        if pattern is not None and not composite.patterns:
            learn(node, pattern=None)
        elif pattern is not None:
            members.update(pattern.members)
    return members


def _refuse(uncovered: list[fx.Node], composite: Composite) -> None:
    rows = []
    for node in uncovered:
        why = "" if classify(node) is not None else " (not in the op table)"
        place = module_path(node) or "(the model itself)"
        rows.append(f"  {op_name(node)}{why} as {node.name} in {place}: {user_source(node) or 'unknown line'}")
    example = str(uncovered[0].target)
    example = f"torch.ops.{example}" if example.startswith("aten.") else example
    raise UncoveredOpsError(count=len(rows), composite=composite.name, table="\n".join(rows), example=example)
