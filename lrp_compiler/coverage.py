"""Coverage: what becomes of every op and every node of a call, whether the whole of it can be explained or not."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import fx

from lrp_compiler.passes.branches import programs_below
from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.errors import LRPError
from lrp_compiler.passes.insert_relevance import insert_relevance
from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.optable import classify, op_name
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.program import Program, facts, first_argument, forward_nodes, model_op, module_path
from lrp_compiler.passes.rules.base import EdgeKind
from lrp_compiler.passes.source_lines import user_source
from lrp_compiler.passes.uncovered import UncoveredOp

Status = Literal["covered", "source", "part", "stopped", "unreached", "uncovered", "constant"]
"""What relevance does at a node: a rule hands it on; it is read there (an embedding of tokens); the node is part of a
recognised group that has one rule; a rule ends it there; every path from the output is stopped before; no rule is
known; the node does not depend on an attributed input."""


@dataclass(frozen=True)
class EdgeRow:
    """One operand that a rule hands an edge to: its argument position or keyword, its node, the edge's kind."""

    operand: int | str
    node: str
    kind: EdgeKind


@dataclass(frozen=True)
class PromiseRow:
    """A forward value that an op's relevance reads: its node, and its role: ``output``, ``operand 1`` or ``other``."""

    role: str
    node: str


@dataclass(frozen=True)
class NodeRow:
    """One op of the forward graph: where its relevance goes and which forward values it reads for that."""

    name: str
    op: str
    op_class: str
    module: str
    source: str | None
    status: Status
    rule: str
    edges: tuple[EdgeRow, ...]
    promises: tuple[PromiseRow, ...]

    @property
    def live(self) -> bool:
        """Whether the node depends on an attributed input."""
        return self.status != "constant"


@dataclass(frozen=True)
class OpRow:
    """All nodes of one op: how many, live, covered; counts of the live ones' rules, statuses, promises by role.

    A node counts as covered when it is live and nothing about it is unknown.
    """

    op: str
    op_class: str
    nodes: int
    live: int
    covered: int
    rules: dict[str, int]
    statuses: dict[Status, int]
    edges: tuple[EdgeKind, ...]
    promises: dict[str, int]


@dataclass(frozen=True)
class ConversionRow:
    """Where an edge changes its kind, at the output of ``node``: its module and the user's source line."""

    node: str
    to: EdgeKind
    module: str
    source: str | None

    @property
    def place(self) -> str:
        """The module and, where the model's own code made the value, the line."""
        return (self.module or "(the model itself)") + (f": {self.source}" if self.source else "")

    def __str__(self) -> str:
        return f"{self.node} -> {self.to}"


@dataclass(frozen=True)
class Failure:
    """A refusal that ends the compilation: its id, cause, the user's source line and the remedy."""

    id: str
    cause: str
    source: str | None
    remedy: str

    def __str__(self) -> str:
        place = f"\n    at: {self.source}" if self.source else ""
        return f"[{self.id}] {self.cause}{place}\n    remedy: {self.remedy}"


@dataclass(frozen=True)
class Coverage:
    """Every node of a call and what relevance does there; ``str()`` is a table of ops, ``table()`` one of nodes.

    ``uncovered`` lists the ops without a rule, ``failures`` what else kept the call from being compiled. Promises and
    conversions are known only where there is neither. ``milliseconds`` holds the passes that ran, and codegen.
    """

    model: str
    composite: str
    reason: str
    nodes: tuple[NodeRow, ...]
    ops: tuple[OpRow, ...]
    uncovered: tuple[UncoveredOp, ...]
    failures: tuple[Failure, ...]
    conversions: tuple[ConversionRow, ...]
    milliseconds: dict[str, float]

    @property
    def complete(self) -> bool:
        """Whether the call can be explained."""
        return not self.uncovered and not self.failures

    @property
    def live_nodes(self) -> int:
        """How many nodes depend on an attributed input."""
        return sum(op.live for op in self.ops)

    @property
    def covered_nodes(self) -> int:
        """How many of those are covered."""
        return sum(op.covered for op in self.ops)

    @property
    def live_ops(self) -> int:
        """How many kinds of op have a live node."""
        return sum(op.live > 0 for op in self.ops)

    @property
    def covered_ops(self) -> int:
        """How many of those have no uncovered node."""
        return sum(op.live == op.covered > 0 for op in self.ops)

    def fractions(self) -> str:
        """Covered nodes and kinds of op among the live ones."""
        nodes = _fraction(self.covered_nodes, self.live_nodes)
        return f"live nodes covered {nodes}, by kind of op {_fraction(self.covered_ops, self.live_ops)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        totals = {name: getattr(self, name) for name in ("live_nodes", "covered_nodes", "live_ops", "covered_ops")}
        return {**asdict(self), "complete": self.complete, **totals}

    def table(self) -> str:
        """One line per node."""
        head = ("node", "op", "status", "rule", "edges", "promises", "module", "source")
        return aligned([head, *map(_cells, self.nodes)])

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.composite or 'no composite'}" + (f" ({self.reason})" if self.reason else "")]
        if self.nodes:
            lines += [f"  {self.fractions()}", indented(op_table(self.ops, every=True))]
        if self.conversions:
            lines.append(f"  {len(self.conversions)} edge conversions")
            lines += [f"    {row} in {row.place}" for row in self.conversions]
        if self.uncovered:
            lines += ["  uncovered", *(f"    {row}" for row in self.uncovered)]
        lines += [f"  not compiled: {failure}" for failure in self.failures]
        if self.milliseconds:
            lines.append(f"  {timings(self.milliseconds)}")
        return "\n".join(lines)


def measure_coverage(
    model: str, stages: tuple[Stage, ...], failures: Sequence[LRPError] = (), codegen: float | None = None
) -> Coverage:
    """The coverage that the stages of one call show, however far they got; ``codegen`` is the time it took."""
    rows: tuple[NodeRow, ...] = ()
    conversions: tuple[ConversionRow, ...] = ()
    explained = next((stage.program for stage in stages if stage.name == "assign_rules"), None)
    if explained is not None:
        # Later passes share equal ops between nodes, and with them their promises.
        demanded = next((_demands(stage.program) for stage in stages if stage.name == insert_relevance.__name__), {})
        uncovered = {row.node for row in explained.uncovered}
        inside = [row for one in programs_below(explained) for row in _node_rows(one, uncovered, {})]
        rows = (*_node_rows(explained, uncovered, demanded), *inside)
        conversions = tuple(_conversion_rows(explained, stages[-1].program))
    composite = explained.composite if explained is not None else None
    times = {stage.name: stage.milliseconds for stage in stages}
    return Coverage(
        model=model,
        composite=composite.name if composite is not None else "",
        reason=composite.reason if composite is not None else "",
        nodes=rows,
        ops=tuple(_op_rows(rows)),
        uncovered=explained.uncovered if explained is not None else (),
        failures=tuple(Failure(error.id, error.cause, error.source, error.remedy) for error in failures),
        conversions=conversions,
        milliseconds=times if codegen is None else {**times, "codegen": codegen},
    )


def _node_rows(program: Program, uncovered: set[str], demanded: dict[str, tuple[PromiseRow, ...]]) -> list[NodeRow]:
    """A row for every call of one forward graph, in order; promises are told of the outermost."""
    nodes = program.nodes_by_name()
    calls = [node for node in forward_nodes(program) if node.op == "call_function"]
    status = _statuses(program, calls, uncovered)
    rows = []
    for node in calls:
        rule = facts(node).rule if status[node] in ("covered", "stopped") else None
        op = Operation(node, nodes)
        edges = rule.receivers(op) if rule is not None else ()
        entry = op.entry if status[node] == "covered" else classify(node)
        rows.append(
            NodeRow(
                name=node.name,
                op=op_name(node),
                op_class=entry.op_class.value if entry is not None else "",
                module=module_path(node),
                source=user_source(node),
                status=status[node],
                rule=str(rule or ""),
                edges=tuple(EdgeRow(edge.argument, edge.node.name, rule.kind) for edge in edges if rule is not None),
                promises=demanded.get(node.name, ()),
            )
        )
    return rows


def _statuses(program: Program, calls: list[fx.Node], uncovered: set[str]) -> dict[fx.Node, Status]:
    sources = {name for found in program.sources.values() for name in found}
    inside = {name for node in calls if (group := facts(node).pattern) is not None for name in group.members}

    def status(node: fx.Node) -> Status:
        known = facts(node)
        if not known.live:
            return "constant"
        if node.name in sources:
            return "source"
        if node.name in uncovered:
            return "uncovered"
        if node.name in inside:
            return "part"
        if known.rule is None:
            return "unreached"
        return "covered" if known.flows else "stopped"

    return {node: status(node) for node in calls}


def _demands(program: Program) -> dict[str, tuple[PromiseRow, ...]]:
    """Per op, the forward values that its relevance reads, in the order of their promises."""
    nodes = program.nodes_by_name()
    found: dict[str, dict[fx.Node, None]] = {}
    for node in program.graph.nodes:
        if node.target in PROMISES:
            for user in node.users:
                found.setdefault(facts(user).origin, {})[first_argument(node)] = None
    operations = {name: Operation(nodes[name], nodes) for name in found}
    return {
        name: tuple(PromiseRow(_role(operations[name], value), value.name) for value in values)
        for name, values in found.items()
    }


def _role(op: Operation, node: fx.Node) -> str:
    """What a forward value, perhaps on fewer rows, is to an op."""
    if node.target is operator.getitem and model_op(first_argument(node)) == op.name:
        return f"output {node.args[1]}"
    name = model_op(node)
    if name == op.name:
        return "output"
    return next((f"operand {operand.argument}" for operand in op.operands if operand.node.name == name), "other")


def _conversion_rows(explained: Program, emitted: Program) -> list[ConversionRow]:
    nodes = explained.nodes_by_name()
    return [
        ConversionRow(one.node, one.to, module_path(nodes[one.node]), user_source(nodes[one.node]))
        for one in emitted.conversions
    ]


def _op_rows(nodes: tuple[NodeRow, ...]) -> list[OpRow]:
    """The nodes summed up by op, in the order of their names."""
    rows = []
    for op, op_class in sorted({(node.op, node.op_class) for node in nodes}):
        alike = [node for node in nodes if (node.op, node.op_class) == (op, op_class)]
        live = [node for node in alike if node.live]
        roles = Counter(promise.role for node in live for promise in node.promises)
        rows.append(
            OpRow(
                op=op,
                op_class=op_class,
                nodes=len(alike),
                live=len(live),
                covered=sum(node.status != "uncovered" for node in live),
                rules=dict(sorted(Counter(node.rule for node in live if node.rule).items())),
                statuses=dict(sorted(Counter(node.status for node in live).items())),
                edges=tuple(sorted({edge.kind for node in live for edge in node.edges})),
                promises=dict(sorted(roles.items())),
            )
        )
    return rows


def op_table(ops: Sequence[OpRow], *, every: bool = False) -> str:
    """One line per op that has live nodes; with ``every`` one for each op, counts and the roles of promises."""
    head = ("op", "class", *(("nodes", "live", "covered") if every else ("live",)), "rules", "edges", "promises")
    lines = [head]
    for row in ops:
        counts = (row.nodes, row.live, row.covered) if every else (row.live,)
        if every or row.live:
            others = {f"({status})": n for status, n in row.statuses.items() if status not in ("covered", "stopped")}
            rules = {**row.rules, **others} if row.live else {"(constant)": row.live}
            promises = ", ".join(f"{role} x {n}" for role, n in row.promises.items())
            demand = promises if every else str(sum(row.promises.values()) or "")
            shown = ", ".join(rule if n == row.live else f"{rule} x {n}" for rule, n in rules.items())
            lines.append((row.op, row.op_class, *map(str, counts), shown, ", ".join(row.edges), demand))
    return aligned(lines)


def timings(milliseconds: Mapping[str, float]) -> str:
    """The total and each pass's share."""
    each = ", ".join(f"{name} {ms:.0f}" for name, ms in milliseconds.items())
    return f"{sum(milliseconds.values()):.0f} ms: {each}"


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def indented(text: str) -> str:
    """``text`` under a line of the page."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _cells(node: NodeRow) -> tuple[str, ...]:
    edges = ", ".join(f"{edge.kind} to {edge.node}" for edge in node.edges)
    promises = ", ".join(f"{promise.role} {promise.node}" for promise in node.promises)
    return (node.name, node.op, node.status, node.rule, edges, promises, node.module, node.source or "")


def _fraction(part: int, whole: int) -> str:
    """``3/4 (75 %)``, rounded down: only all of them are 100 %."""
    return f"{part}/{whole} ({100 * part // whole if whole else 100} %)"
