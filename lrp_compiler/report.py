"""The report: what the compiler made of one kind of call, as data with a readable text."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lrp_compiler.captures import Compilation
from lrp_compiler.compiled import ExplainedCall
from lrp_compiler.coverage import (
    ConversionRow,
    Coverage,
    NodeRow,
    OpRow,
    indented,
    measure_coverage,
    op_table,
    timings,
)
from lrp_compiler.ledger import Ledger
from lrp_compiler.passes.branches import (
    forward_nodes_everywhere,
    relevance_nodes_everywhere,
    with_programs_inside,
)
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.demand import demands
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.program import Buffer, BufferKind, facts
from lrp_compiler.sites import site_table


@dataclass(frozen=True)
class Report:
    """Coverage, rules, promises, buffers and timings of one kind of call; ``str()`` is a readable page.

    ``coverage`` holds what becomes of every op and node; ``rules`` counts ops per (op, rule), ``patterns`` recognised
    groups of ops per kind; ``promises`` the forward values that relevance reads; ``buffers`` where each is kept;
    ``demanded`` the values beyond those that autograd keeps which propagating relevance itself would ask for
    (``passes/demand.py``), ``still_demanded`` those of them that propagating coefficients reads as well;
    ``specialised`` the inputs whose values the code holds, so that others compile anew; ``compilations`` every tracing
    of the model so far, in which form and why; ``sites`` every name that ``at=`` takes; ``conserves`` whether the
    composite claims that inputs and named sinks make up the output, ``conservation`` what was measured.
    """

    model: str
    composite: str
    reason: str
    inputs: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    explained_output: str
    forward_ops: int
    live_ops: int
    relevance_ops: int
    rules: dict[tuple[str, str], int]
    stopped: dict[str, int]
    patterns: dict[str, int]
    buffers: tuple[Buffer, ...]
    demanded: int
    still_demanded: int
    specialised: tuple[str, ...]
    compilations: tuple[Compilation, ...]
    coverage: Coverage
    sites: tuple[str, ...]
    conserves: bool
    conservation: Conservation | None = None

    @property
    def ops(self) -> tuple[OpRow, ...]:
        """Per op: counts, rules, edge kinds, promises."""
        return self.coverage.ops

    @property
    def nodes(self) -> tuple[NodeRow, ...]:
        """Per node: status, rule, edges, promises, module and source line; ``table()`` prints them."""
        return self.coverage.nodes

    @property
    def conversions(self) -> tuple[ConversionRow, ...]:
        """Where edges change their kind."""
        return self.coverage.conversions

    @property
    def milliseconds(self) -> dict[str, float]:
        """How long each pass and codegen took."""
        return self.coverage.milliseconds

    def table(self) -> str:
        """One line per node."""
        return self.coverage.table()

    @property
    def promises(self) -> int:
        """How many forward values the relevance pass reads."""
        return len(self.buffers)

    @property
    def saved_bytes(self) -> int:
        """Bytes of forward values kept for relevance alone."""
        return sum(buffer.bytes for buffer in self.buffers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data["rules"] = [{"op": op, "rule": rule, "count": n} for (op, rule), n in self.rules.items()]
        return data

    def __str__(self) -> str:
        kinds = Counter(buffer.kind for buffer in self.buffers)
        inputs = ", ".join(
            name if nodes == (name,) else f"{name} (at {', '.join(nodes)})" for name, nodes in self.inputs.items()
        )
        lines = [
            f"{self.model} explained by {self.composite}" + (f" ({self.reason})" if self.reason else ""),
            f"  inputs    {inputs}",
            f"  output    {self.explained_output} (of {', '.join(self.outputs)})",
            f"  ops       {self.forward_ops} forward, {self.coverage.fractions()}; {self.relevance_ops} relevance ops",
            f"  promises  {self.promises}: {kinds['saved']} saved ({self.saved_bytes:,} B), {kinds['view']} views,"
            f" {kinds['free']} free{_of_reference(kinds)}; {len(self.conversions)} edge conversions",
            f"  passes    {timings(self.milliseconds)}",
            "  rules",
            indented(op_table(self.ops)),
            "  conserves " + self._conservation(),
        ]
        if len(self.compilations) > 1:
            lines += ["  traced", *(f"    {compilation}" for compilation in self.compilations)]
        if self.specialised:
            lines.append(f"  constants values of {', '.join(self.specialised)}: others are compiled anew")
        if self.stopped:
            lines.append("  stopped   " + ", ".join(f"{op} x {count}" for op, count in self.stopped.items()))
        if self.patterns:
            lines.append("  patterns  " + ", ".join(f"{kind} x {count}" for kind, count in self.patterns.items()))
        return "\n".join(lines)

    def _conservation(self) -> str:
        claim = "yes: inputs and named sinks make up the output" if self.conserves else "not claimed by this composite"
        measured = self.conservation
        if measured is None:
            return claim
        sinks = ", ".join(f"{kind} {value:.4g}" for kind, value in measured.sinks.items()) or "none"
        inputs = f"output {measured.seed:.4g}, inputs {measured.inputs:.4g}"
        return f"{claim}; {inputs}, sinks {sinks}, missing {measured.gap:.2g}"


def _of_reference(kinds: Counter[BufferKind]) -> str:
    """How many values are of the reference run, if there is one."""
    return f", {kinds['reference']} of the reference run" if kinds["reference"] else ""


@dataclass(frozen=True)
class Conservation:
    """One relevance pass in sums over the batch: ``seed`` at the output, at the inputs, in each kind of sink."""

    seed: float
    inputs: float
    sinks: dict[str, float]

    @property
    def gap(self) -> float:
        """What neither inputs nor sinks hold."""
        return self.seed - self.inputs - sum(self.sinks.values())


def measured_conservation(ledger: Ledger) -> Conservation:
    """The totals of a ledger."""
    return Conservation(ledger.seed, ledger.inputs, ledger.sink_totals())


def make_report(
    model: str,
    stages: tuple[Stage, ...],
    executable: Executable,
    explained: ExplainedCall,
    conservation: Conservation | None,
    compilations: tuple[Compilation, ...],
) -> Report:
    """Collect the report from the stages of one request."""
    program = explained.program
    live = [node for node in forward_nodes_everywhere(program) if facts(node).live and node.op == "call_function"]
    patterns = [pattern.kind for node in live if (pattern := facts(node).pattern) is not None]
    structures = [one.kind for node in forward_nodes_everywhere(program) for one in facts(node).structures]
    flowing = [node for node in live if facts(node).flows and facts(node).rule is not None]
    names = explained.explainable_outputs()
    (chosen,) = executable.program.seeds
    composite = program.composite
    assert composite is not None
    demanded = [(demand.op, demand.value) for one in with_programs_inside(program) for demand in demands(one)]
    read = {(reader, buffer.name) for buffer in executable.program.buffers for reader in buffer.readers}
    return Report(
        model=model,
        composite=composite.name,
        reason=composite.reason,
        inputs=dict(program.sources),
        outputs=tuple(names),
        explained_output=next(name for name, index in names.items() if index == chosen),
        forward_ops=sum(node.op == "call_function" for node in forward_nodes_everywhere(program)),
        live_ops=len(live),
        relevance_ops=sum(node.op == "call_function" for node in relevance_nodes_everywhere(executable.program)),
        rules=dict(sorted(Counter((op_name(node), str(facts(node).rule)) for node in flowing).items())),
        stopped=dict(Counter(op_name(node) for node in live if facts(node).rule is not None and not facts(node).flows)),
        patterns=dict(Counter([*patterns, *structures])),
        buffers=executable.program.buffers,
        demanded=len(demanded),
        still_demanded=sum(pair in read for pair in demanded),
        specialised=tuple(spec.target for spec in program.inputs if spec.node in {pin.input for pin in program.pins}),
        compilations=compilations,
        coverage=measure_coverage(model, stages, codegen=executable.milliseconds),
        sites=tuple(site_table(program)),
        conserves=composite.conserves,
        conservation=conservation,
    )
