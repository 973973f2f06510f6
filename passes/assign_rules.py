"""assign_rules: the composite gives every live op its rule; what it cannot cover is refused in one error."""

from __future__ import annotations

import torch
from torch import fx

from lrp_compiler.passes.branches import (
    SIDES,
    Conditional,
    is_dead_end,
    operand_names,
    operands_of,
    outputs_of,
    within,
)
from lrp_compiler.passes.operation import FOLDED, Operation
from lrp_compiler.passes.optable import classify, op_name
from lrp_compiler.passes.program import Pattern, Program, facts, first_argument, forward_nodes, learn, module_path
from lrp_compiler.passes.rule_tensors import supply_rule_tensors
from lrp_compiler.passes.rules.base import Chosen, Composite, Rule
from lrp_compiler.passes.rules.branches import OfBranches
from lrp_compiler.passes.source_lines import user_source
from lrp_compiler.passes.uncovered import UncoveredOp, UncoveredOpsError


def assign_rules(program: Program, composite: Composite, partial: bool = False) -> Program:
    """Give each live op a rule and mark where relevance can flow: to sources, through ops whose rule receives.

    In graph order, since what an op is (linear or bilinear) depends on which operands relevance can flow to.
    Raises UncoveredOpsError listing every live op that no line of the composite matches; a ``partial`` assignment
    lists them in ``uncovered`` instead.
    """
    chosen = Chosen()
    assigned, uncovered = _assign(program, composite, chosen)
    if any(matcher.last for matcher, _ in composite.lines):
        # Which op is the last to match is known once all have been looked at.
        assigned, uncovered = _assign(program, composite, Chosen(last=chosen.seen))
    rows = tuple(_row(node, composite) for node in uncovered)
    if rows and not partial:
        raise UncoveredOpsError(rows=rows, composite=composite.name, example=_example(uncovered[0]))
    return _with_tensors(assigned.having(uncovered=rows))


def _with_tensors(program: Program) -> Program:
    """The tensors of all rules as graph inputs, those of rules inside a branch as the branch's."""
    return supply_rule_tensors(within(program, _with_tensors))


def _assign(program: Program, composite: Composite, chosen: Chosen) -> tuple[Program, list[fx.Node]]:
    """A copy of the program with rules, and the live ops that have none."""
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
        if isinstance(node.target, Conditional):
            uncovered += _assign_branches(node, composite, chosen)
            continue
        rule = facts(node).rule if op.is_folded else composite.rule_for(op, chosen)
        if rule is None or (rule.real_only and op.is_complex):
            uncovered.append(node)
            learn(node, rule=rule, flows=True)
            continue
        if rule.folds_batch_norm and not op.is_folded and fold_batch_norm(node, rule, inside):
            continue
        learn(node, rule=rule, flows=bool(rule.receivers(op)) and not is_dead_end(node))
    return program, uncovered


def _assign_branches(node: fx.Node, composite: Composite, chosen: Chosen) -> list[fx.Node]:
    """Give the ops of both branches their rules; returns those that have none."""
    assert isinstance(node.target, Conditional)
    if composite.against_reference:
        # The reference run may take the other branch.
        learn(node, flows=True)
        return [node]
    made, uncovered, views = [], [], []
    for side, branch in zip(SIDES, node.target.branches, strict=True):
        names = zip(operand_names(branch), operands_of(node), strict=True)
        flowing = [name for name, operand in names if name in branch.sources and facts(operand).flows]
        views.append(chosen.inside(f"{node.name}.{side}."))
        sources = {name: (name,) for name in flowing}
        assigned, missing = _assign(branch.having(sources=sources), composite, views[-1])
        made.append(assigned)
        uncovered += missing
    chosen.leave(views)
    node.target = Conditional(tuple(made))
    outputs = [output for branch in made for output in outputs_of(branch) if output is not None]
    learn(node, rule=OfBranches(), flows=any(facts(output).flows for output in outputs))
    return uncovered


def _inside_patterns(program: Program, composite: Composite) -> set[str]:
    """The nodes that recognised groups have swallowed, which nothing outside the group reads.

    A composite without patterns sees every op by itself.
    """
    members: set[str] = set()
    for node in forward_nodes(program):
        pattern = facts(node).pattern
        if pattern is None:
            continue
        if composite.patterns and (pattern.exact_differences or not composite.against_reference):
            members.update(pattern.members)
        else:
            learn(node, pattern=None)
    return members


def fold_batch_norm(node: fx.Node, rule: Rule, inside: set[str]) -> bool:
    """Make a linear op and the eval-mode batch norm that alone reads it one op under ``rule``.

    Found by dataflow, whatever modules they come from. Transposed convolutions are left as they are: their output
    channels do not lead in the weight.
    """
    (norm,) = list(node.users) if len(node.users) == 1 else [None]
    if norm is None or norm.target is not torch.ops.aten.native_batch_norm.default or norm.args[5]:
        return False
    readers = [user for user in norm.users if user.args[1] == 0]
    if len(readers) != 1 or "transpose" in op_name(node) or norm.args[0] is not node:
        return False
    inside.update({node.name, norm.name})
    pattern = Pattern(FOLDED, (first_argument(node).name,), (node.name, norm.name), (node.name, norm.name))
    learn(readers[0], pattern=pattern, rule=rule)
    return True


def _row(node: fx.Node, composite: Composite) -> UncoveredOp:
    why = "" if classify(node) is not None else "not in the op table"
    if not why and composite.against_reference:
        why = "no exact rule for differences from a reference run"
    if (rule := facts(node).rule) is not None:
        why = f"complex, while the rule '{rule}' is for real numbers"
    return UncoveredOp(op_name(node), node.name, module_path(node), user_source(node), why)


def _example(node: fx.Node) -> str:
    """How a user would name the op of ``node``."""
    name = str(node.target)
    return f"torch.ops.{name}" if name.startswith("aten.") else name
