"""The report: what the compiler made of one kind of call, as data with a readable text."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lrp_compiler.backend_report import BackendReport, backend_report
from lrp_compiler.captures import Compilation
from lrp_compiler.compiled import ExplainedCall
from lrp_compiler.coverage import (
    ConversionRow,
    Coverage,
    NodeRow,
    OpRow,
    aligned,
    indented,
    measure_coverage,
    op_table,
    timings,
)
from lrp_compiler.kernel_report import HEAD as KERNEL_HEAD
from lrp_compiler.kernel_report import KernelRow, kernel_rows, kernel_summary
from lrp_compiler.ledger import Ledger
from lrp_compiler.measured_error import MeasuredError
from lrp_compiler.passes.branches import (
    forward_nodes_everywhere,
    relevance_nodes_everywhere,
    with_programs_inside,
)
from lrp_compiler.passes.buffers import Buffer, MemoryPlan
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.demand import demands
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.program import Program, facts
from lrp_compiler.sites import site_table


@dataclass(frozen=True)
class Lowered:
    """What became of promises of one kind: how many buffers, and their bytes."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """Coverage, rules, promises, buffers and timings of one kind of call; ``str()`` is a readable page.

    ``coverage`` holds what becomes of every op and node; ``rules`` counts ops per (op, rule), ``patterns`` recognised
    groups of ops per kind; ``promises`` the forward values that relevance reads; ``buffers`` where each is kept, and
    ``memory`` what that and the rest of a call takes; ``demanded`` counts the values beyond those that autograd keeps
    which propagating relevance itself would ask for (``passes/demand.py``), ``still_demanded`` those of them that
    propagating coefficients reads as well; ``delta`` and ``rho`` are the paper's measures of the former: the sum of the
    distances to the nodes that can give the values, and their number per op of the graph;
    ``specialised`` the inputs whose values the code holds, so that others compile anew; ``compilations`` every tracing
    of the model so far, in which form and why; ``sites`` every name that ``at=`` takes; ``conserves`` whether the
    composite claims that inputs and named sinks make up the output, ``conservation`` what was measured; ``backend``
    what runs the code and why; ``precision`` what relevance is computed in, ``error`` what that was measured to lose;
    ``prepared`` what is kept of weights from call to call.
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
    memory: MemoryPlan
    demanded: int
    still_demanded: int
    delta: int
    rho: float
    specialised: tuple[str, ...]
    compilations: tuple[Compilation, ...]
    coverage: Coverage
    kernels: tuple[KernelRow, ...]
    backend: BackendReport
    sites: tuple[str, ...]
    conserves: bool
    conservation: Conservation | None = None
    precision: str = "the model's dtype"
    error: MeasuredError | None = None
    prepared: Lowered = Lowered(0, 0)

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
    def vanished(self) -> int:
        """How many of the values that relevance itself would ask for coefficients do without."""
        return self.demanded - self.still_demanded

    @property
    def lowered(self) -> dict[str, Lowered]:
        """Per kind of buffer, how many there are and the bytes they take."""
        found: dict[str, Lowered] = {}
        for buffer in self.buffers:
            known = found.get(buffer.kind, Lowered(0, 0))
            found[buffer.kind] = Lowered(known.count + 1, known.bytes + buffer.bytes)
        return found

    @property
    def saved_bytes(self) -> int:
        """Bytes of forward values kept for relevance alone."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.kind not in ("recomputed", "prepared"))

    def buffer_table(self) -> str:
        """One line per buffer that takes memory: kind, bytes, producer, readers, lifetime in ops, shared memory."""
        rows = [("buffer", "kind", "bytes", "dtype", "made by", "read for", "ops", "slot")]
        for one in sorted((one for one in self.buffers if one.bytes), key=lambda one: one.first_write):
            lifetime, slot = f"{one.first_write}-{one.last_read}", "" if one.slot is None else str(one.slot)
            read = ", ".join(one.readers)
            rows.append((one.name, one.kind, f"{one.bytes:,}", one.dtype, one.producer, read, lifetime, slot))
        return aligned(rows)

    def kernel_table(self) -> str:
        """One line per op that relevance flows through: the kernels its relevance runs, or why torch computes it."""
        return aligned([KERNEL_HEAD, *(row.cells() for row in self.kernels)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        data["rules"] = [{"op": op, "rule": rule, "count": n} for (op, rule), n in self.rules.items()]
        return data

    def __str__(self) -> str:
        inputs = ", ".join(
            name if nodes == (name,) else f"{name} (at {', '.join(nodes)})" for name, nodes in self.inputs.items()
        )
        lines = [
            f"{self.model} explained by {self.composite}" + (f" ({self.reason})" if self.reason else ""),
            f"  inputs    {inputs}",
            f"  output    {self.explained_output} (of {', '.join(self.outputs)})",
            f"  ops       {self.forward_ops} forward, {self.coverage.fractions()}; {self.relevance_ops} relevance ops",
            f"  promises  {self.promises}: {self._lowered()}; {len(self.conversions)} edge conversions",
            f"  vanished  {self.vanished} of {self.demanded} that relevance itself would make"
            f" (delta {self.delta}, rho {self.rho:.3f})",
            f"  memory    {self.memory.peak:,} B at most, above parameters and inputs;"
            f" a tape keeps {self.memory.left:,} B",
            f"  passes    {timings(self.milliseconds)}",
            *self.backend.lines(),
            f"  kernels   {kernel_summary(self.kernels)}",
            "  precision " + self._precision(),
            *(
                [f"  weights   {self.prepared.count} made of them are kept ({self.prepared.bytes:,} B)"]
                if self.prepared.count
                else []
            ),
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

    def _lowered(self) -> str:
        """The kinds of buffers, those with memory of their own first."""
        kinds = ("saved", "compressed", "recomputed", "reference", "view", "prepared", "free")
        lowered = self.lowered
        words = {"reference": "of the reference run", "view": "views"}
        found = ((words.get(kind, kind), lowered[kind]) for kind in kinds if kind in lowered)
        return ", ".join(f"{one.count} {word}" + (f" ({one.bytes:,} B)" if one.bytes else "") for word, one in found)

    def _precision(self) -> str:
        if self.error is None:
            return f"relevance in {self.precision}"
        own = f"{self.error.own:.2g} in the model's own dtype"
        return f"relevance in {self.precision}; off float64's by {self.error.relative:.2g} of its norm ({own})"

    def _conservation(self) -> str:
        claim = "yes: inputs and named sinks make up the output" if self.conserves else "not claimed by this composite"
        measured = self.conservation
        if measured is None:
            return claim
        sinks = ", ".join(f"{kind} {value:.4g}" for kind, value in measured.sinks.items()) or "none"
        inputs = f"output {measured.seed:.4g}, inputs {measured.inputs:.4g}"
        return f"{claim}; {inputs}, sinks {sinks}, missing {measured.gap:.2g}"


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


def recognised(program: Program) -> dict[str, int]:
    """How often each kind of pattern and structure was recognised in a program whose ops have rules."""
    nodes = list(forward_nodes_everywhere(program))
    live = [node for node in nodes if facts(node).live and node.op == "call_function"]
    patterns = [pattern.kind for node in live if (pattern := facts(node).pattern) is not None]
    return dict(Counter([*patterns, *(one.kind for node in nodes for one in facts(node).structures)]))


def make_report(
    model: str,
    stages: tuple[Stage, ...],
    executable: Executable,
    attribution: Executable,
    explained: ExplainedCall,
    conservation: Conservation | None,
    compilations: tuple[Compilation, ...],
    executables: tuple[Executable, ...],
) -> Report:
    """Collect the report from the stages of one request, its code, and that of an attribution for one class.

    ``executables`` is all code that was made for the call so far.
    """
    program = explained.program
    live = [node for node in forward_nodes_everywhere(program) if facts(node).live and node.op == "call_function"]
    flowing = [node for node in live if facts(node).flows and facts(node).rule is not None]
    names = explained.explainable_outputs
    (chosen,) = executable.program.seeds
    composite = program.composite
    assert composite is not None
    demanded = [demand for one in with_programs_inside(program) for demand in demands(one)]
    forward_ops = sum(node.op == "call_function" for node in forward_nodes_everywhere(program))
    assert attribution.program.memory is not None
    prepared = (*attribution.program.prepared_forward, *attribution.program.prepared_relevance)
    read = {(reader, buffer.name) for buffer in executable.program.buffers for reader in buffer.readers}
    return Report(
        model=model,
        composite=composite.name,
        reason=composite.reason,
        inputs=dict(program.sources),
        outputs=tuple(names),
        explained_output=next(name for name, index in names.items() if index == chosen),
        forward_ops=forward_ops,
        live_ops=len(live),
        relevance_ops=sum(node.op == "call_function" for node in relevance_nodes_everywhere(executable.program)),
        rules=dict(sorted(Counter((op_name(node), str(facts(node).rule)) for node in flowing).items())),
        stopped=dict(Counter(op_name(node) for node in live if facts(node).rule is not None and not facts(node).flows)),
        patterns=recognised(program),
        buffers=attribution.program.buffers,
        memory=attribution.program.memory,
        demanded=len(demanded),
        still_demanded=sum((demand.op, demand.value) in read for demand in demanded),
        delta=sum(demand.steps for demand in demanded),
        rho=len(demanded) / max(1, forward_ops),
        specialised=tuple(spec.target for spec in program.inputs if spec.node in {pin.input for pin in program.pins}),
        compilations=compilations,
        coverage=measure_coverage(model, stages, codegen=executable.milliseconds),
        kernels=kernel_rows(executable.program, explained.settings.backend),
        backend=backend_report(executable, executables),
        sites=tuple(site_table(program)),
        conserves=composite.conserves,
        conservation=conservation,
        precision=str(explained.settings.precision or "the model's dtype"),
        prepared=Lowered(len(prepared), sum(one.bytes for one in prepared)),
    )
