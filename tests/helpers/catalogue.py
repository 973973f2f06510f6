"""What the tests have shown of every rule: rows of passes/rules/README.md, collected while they run.

A test that compares relevance in float64 with an oracle says so by ``agreement``; ``make catalogue`` writes the table.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from accuracy import relative_error
from torch import Tensor, fx

from lrp_compiler import LRPModule
from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program, facts, first_argument, forward_nodes
from lrp_compiler.rules import Rule

HEADER = """# Rules, and what was shown of them

Written by `make catalogue` while the tests run; not by hand. One row per rule and op that a test compared, in float64,
with an oracle that shares no code with the compiler: a restatement written in that test from the paper, or a peer.

* **edges**: what the rule takes and gives, coefficients c (R = a c) or relevance R.
* **promises**: the forward values it reads: nothing, `input` (also the other factor of a product), `output`, `saved`
  (statistics and indices that the op returns beside its output) or `inside` (values inside a recognised group).
  Parameters are read where they are.
* **error**: the largest seen, relative to the largest relevance, rounded up to a power of ten.

| rule | op | edges | promises | oracles | error |
|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """What is known of a rule at an op."""

    edges: str
    promises: set[str] = field(default_factory=set)
    oracles: set[str] = field(default_factory=set)
    error: float = 0.0

    def text(self, rule: str, op: str) -> str:
        """The row in Markdown."""
        promises = ", ".join(sorted(self.promises)) or "nothing"
        return (
            f"| {rule} | `{op}` | {self.edges} | {promises} | {', '.join(sorted(self.oracles))} | {bound(self.error)} |"
        )


def bound(error: float) -> str:
    """An error as the power of ten above it, not below a few roundings of float64."""
    return f"1e{max(-15, math.ceil(math.log10(error)))}" if error > 0 else "0"


ROWS: dict[tuple[str, str], Row] = {}


def agreement(explained: LRPModule, args: Any, found: Tensor, expected: Tensor, oracle: str, **kwargs: Any) -> float:
    """The relative error of ``found``, noted for every rule that ``explained`` used in the call."""
    error = relative_error(found, expected)
    if found.dtype == torch.float64 and not explained.options.reference:
        note(explained, args if isinstance(args, tuple) else (args,), kwargs, oracle, error)
    return error


def note(explained: LRPModule, args: tuple[Any, ...], kwargs: dict[str, Any], oracle: str, error: float) -> None:
    """Add one comparison to the rows of the rules it used."""
    stages = explained.stages(*args, **kwargs)
    program = next(stage.program for stage in stages if stage.name == "simplify")
    readers: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        for user in node.users if node.target in PROMISES else ():
            readers.setdefault(facts(user).origin, set()).add(first_argument(node).name)
    nodes = program.nodes_by_name()
    for node in forward_nodes(program):
        reads_tuple = node.target is operator.getitem and facts(node).pattern is None
        rule = facts(node).rule
        if rule is None or not facts(node).flows or reads_tuple:
            continue
        row = ROWS.setdefault((rule_name(rule), op_name(node)), Row("R" if rule.kind == "relevance" else "c"))
        row.promises |= {role for name in readers.get(node.name, ()) if (role := _role(program, node, nodes[name]))}
        row.oracles.add(oracle)
        row.error = max(row.error, error)


def rule_name(rule: Rule) -> str:
    """The rule without its parameters."""
    return str(rule) if rule.name == "rule" else rule.name


def _role(program: Program, node: fx.Node, value: fx.Node) -> str:
    """What a promised value is to the op that reads it; '' for a parameter."""
    op = Operation(node, program.nodes_by_name())
    if value is node:
        return "output"
    if value.target is operator.getitem and value.args[0] in (node, op.call):
        return "output" if value.args[1] == 0 else "saved"
    if value.op == "placeholder" and not facts(value).live:
        return ""
    return "input" if any(operand.node is value for operand in op.operands) else "inside"


def table() -> str:
    """The whole document."""
    return HEADER + "\n".join(row.text(*key) for key, row in sorted(ROWS.items())) + "\n"
