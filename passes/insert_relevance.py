"""insert_relevance: walk the forward graph backwards and write each op's rule behind it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.difference import difference
from lrp_compiler.kernels.linear import (
    conjugate,
    masked_product,
    relevance_of,
    stabilise,
    summed_over_dimensions,
    token_relevance,
)
from lrp_compiler.kernels.totals import total, total_of
from lrp_compiler.passes.branches import Conditional
from lrp_compiler.passes.emitter import RelevanceEmitter
from lrp_compiler.passes.errors import RuleResultError, SiteWithoutRelevanceError
from lrp_compiler.passes.insert_branches import insert_branches
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import OpClass, classify
from lrp_compiler.passes.program import (
    FACTS,
    Constant,
    Conversion,
    Facts,
    Program,
    facts,
    forward_nodes,
    model_op,
    output_node,
    tensor_of,
    value_of,
)
from lrp_compiler.passes.readings import nodes_from, parameter_edges, read_map
from lrp_compiler.passes.request import Reading, Request, Result
from lrp_compiler.passes.rules.base import EdgeKind, Rule
from lrp_compiler.passes.site import Site, output_of
from lrp_compiler.passes.sum_edges import beside_each_other

aten = torch.ops.aten
CONVERSION_EPSILON = 1e-6


def insert_relevance(program: Program, request: Request) -> Program:
    """The joint graph: the forward ops, then the relevance ops that turn seeds into the requested results.

    Relevance ops read forward values through ``promise`` nodes only. Raises SiteWithoutRelevanceError when a
    requested site is not between the sources and the seeded outputs.
    """
    return _Inserter(program.fork(seeds=request.outputs, kept=request.kept), request).run()


def on_relevance(c: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """R = a c, real also where values are complex."""
    return relevance_of(c, value)


def to_coefficient(relevance: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """c = R / stab(a): lossy where a is zero."""
    return relevance / conjugate(stabilise(value, CONVERSION_EPSILON))


def conversion_loss(relevance: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """R - a c for c = R / stab(a): the stabiliser's share."""
    return relevance - relevance_of(to_coefficient(relevance, value), value)


Pending = dict[fx.Node, list[tuple[fx.Node, EdgeKind]]]


class _Inserter:
    """The reverse walk: edges wait at their node until every consumer has been visited."""

    def __init__(self, program: Program, request: Request) -> None:
        self.program = program
        self.request = request
        self.nodes = program.nodes_by_name()
        self.emitter = RelevanceEmitter(program.graph, program.fake_mode, output_node(program.graph), program.traces)
        self.takes_differences = program.composite is not None and program.composite.against_reference
        self.pending: Pending = {}
        self.tuples: dict[fx.Node, dict[int, list[tuple[fx.Node, EdgeKind]]]] = {}
        self.results: list[tuple[Result, fx.Node]] = []
        self.conversions: list[Conversion] = []
        self.lost: dict[fx.Node, fx.Node] = {}
        self.masks: dict[str, fx.Node] = {}
        self.sources = {name for found in program.sources.values() for name in found}
        self.wanted: dict[str, list[Reading]] = {}
        self.maps = {name for name, kind in request.sites if kind == "attention_map"}
        self.parameters = [name for name, kind in request.sites if kind == "parameter"]
        self.from_parameters = nodes_from(self.program, {*self.parameters, *request.edges} - self.sources)
        for name, kind in request.sites:
            if kind == "activation":
                self.results.append((Result(kind, name), self.emitter.resolve(self.nodes[name])))
            elif kind in ("relevance", "token_relevance", "coefficient"):
                self.wanted.setdefault(name, []).append(kind)

    def run(self) -> Program:
        self.plant_seeds()
        for node in reversed(list(forward_nodes(self.program))):
            self.visit(node)
        for name in self.masks:
            if self.nodes[name] not in self.pending:
                raise SiteWithoutRelevanceError(name=name, cause=self.why_unreached(self.nodes[name]))
        reached = {result.site for result, _ in self.results if result.kind != "activation"}
        for name in [name for name in self.wanted if name not in reached]:
            self.unreached(self.nodes[name])
        for name in self.parameters:
            self.results.append((Result("parameter", name), self.parameter_relevance(self.nodes[name])))
        kept = [self.nodes[leaf] for leaf in self.program.outputs if not isinstance(leaf, Constant)]
        kept += [self.nodes[mutation.value] for mutation in self.program.mutations]
        output = output_node(self.program.graph)
        output.args = ((*kept, *(node for _, node in self.results)),)
        self.program.graph.eliminate_dead_code()
        return self.program.having(
            results=tuple(result for result, _ in self.results), conversions=tuple(self.conversions)
        )

    def plant_seeds(self) -> None:
        """Make the placeholders of seeds and masks, behind the graph's own."""
        for index in self.request.outputs:
            leaf = self.program.seeded.get(index, self.program.outputs[index])
            assert isinstance(leaf, str)
            seed = self.seed_like(f"seed_{index}", leaf)
            self.add_edge(self.nodes[leaf], seed, "coefficient")
            self.enter_constant(self.nodes[leaf], seed)
        for name in self.request.starts:
            self.add_edge(self.nodes[name], self.seed_like(f"start_{name}", name), "coefficient")
        for name in self.request.through:
            self.masks[name] = self.seed_like(f"mask_{name}", name)

    def enter_constant(self, node: fx.Node, seed: fx.Node) -> None:
        """An output that relevance flows to in the other branch of a torch.cond only is a constant in this one."""
        if (self.request.sinks or self.request.ledger) and not facts(node).flows:
            self.emitter.stamp = Facts(part="relevance", origin=node.name)
            self.results.append((Result("sink", node.name, "constant"), self.emitter(masked_product, seed, node)))

    def seed_like(self, name: str, node: str) -> fx.Node:
        """A new last placeholder in the shape of a node's value."""
        last = [found for found in self.program.graph.nodes if found.op == "placeholder"][-1]
        with self.program.graph.inserting_after(last):
            made = self.program.graph.placeholder(name)
        made.meta = {"val": tensor_of(self.nodes[node]), FACTS: Facts(part="seed", origin=node)}
        return made

    def add_edge(self, node: fx.Node, edge: fx.Node, kind: EdgeKind) -> None:
        self.pending.setdefault(node, []).append((edge, kind))

    def visit(self, node: fx.Node) -> None:
        """Collect the edges of one forward node, read results off, and hand them to its operands."""
        self.emitter.stamp = Facts(part="relevance", origin=model_op(node))
        self.emitter.provenance = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
        if node not in self.pending and node not in self.tuples:
            return
        if node.name in self.masks:
            mask = self.masks[node.name]
            edges = self.pending[node]
            self.pending[node] = [(self.emitter.call(aten.mul.Tensor, edge, mask), kind) for edge, kind in edges]
        if node.name in self.wanted:
            self.read_out(node)
        if node.name in self.request.edges:
            self.results += [(Result(kind, node.name), edge) for edge, kind in self.by_kind(node)]
        if node.name in self.request.blocked:
            return
        if node.name in self.sources or node in self.from_parameters:
            if node.op == "call_function" and self.parameters:
                self.pass_to_parameters(node)
            return
        known = facts(node)
        if known.explained_by:
            self.pending.setdefault(self.nodes[known.explained_by], []).extend(self.pending[node])
        elif known.rule is not None and known.flows:
            self.apply(known.rule, node)

    def apply(self, rule: Rule, node: fx.Node) -> None:
        """Hand the edges of a node to its operands by its rule, and note what the request asks of that."""
        entry = classify(node)
        if entry is not None and entry.op_class is OpClass.TUPLE:
            self.hand_to_tuple(node)
            return
        site = Site(Operation(node, self.nodes), self.emitter, is_seeded=node.name in self.request.starts)
        edge = self.incoming(node, rule.kind)
        if isinstance(node.target, Conditional):
            self.visit_branches(site, rule, edge)
            return
        if node.name in self.maps:
            self.results.append((Result("attention_map", node.name), read_map(site, rule, edge)))
        for operand, part in parameter_edges(site, rule, edge, self.from_parameters).items():
            self.add_edge(operand.node, part, "coefficient")
        made = rule.propagate(site, edge)
        self.check(site, rule, made)
        if self.request.ledger:
            self.enter_ledger(site, rule, edge, made)
        if self.request.sinks or self.request.ledger:
            self.enter_sinks(site, rule, edge, made)
        for operand, part in made.items():
            self.add_edge(operand.node, part, rule.kind)

    def visit_branches(self, site: Site, rule: Rule, edges: list[fx.Node | None]) -> None:
        """Hand the edges of a torch.cond's outputs to its operands, by the rules inside its branches."""
        operands = {
            int(operand.argument) - 1: operand
            for operand in site.op.operands
            if operand.argument != 0 and (facts(operand.node).flows or operand.node in self.from_parameters)
        }
        made = insert_branches(site, edges, set(operands), self.request, insert_relevance)
        for place, part, kind in made.edges:
            self.add_edge(operands[place].node, part, kind)
        if self.request.ledger:
            self.enter_given(site, rule, edges)
            for place, part, kind in made.edges:
                if facts(operands[place].node).flows:
                    name = operands[place].node.name
                    self.add_total(Result("taken", site.op.name, name), part, operands[place].node, kind)
        if self.request.sinks or self.request.ledger:
            self.enter_losses(site, edges)
            self.results += [(Result("sink", site.op.name, kind), sink) for kind, sink in made.sinks.items()]

    def pass_to_parameters(self, node: fx.Node) -> None:
        """Carry an edge on through values that are computed from parameters alone, or into an embedding's table."""
        if node.target is operator.getitem:
            self.hand_to_tuple(node)
            return
        site = Site(Operation(node, self.nodes), self.emitter)
        edge = self.incoming(node, "coefficient")
        for operand, part in parameter_edges(site, None, edge, self.from_parameters).items():
            self.add_edge(operand.node, part, "coefficient")

    def hand_to_tuple(self, node: fx.Node) -> None:
        """Keep the edges of one output of an op that has several until the op itself is visited."""
        self.tuples.setdefault(node.args[0], {}).setdefault(node.args[1], []).extend(self.pending[node])  # type: ignore[arg-type]

    def parameter_relevance(self, node: fx.Node) -> fx.Node:
        """W * c of a parameter; zeros where no op that the seeds reach reads it."""
        if node not in self.pending:
            return self.zeros(node, "parameter")
        self.emitter.stamp = Facts(part="relevance", origin=node.name)
        edge = self.merged(node, self.pending[node], "coefficient")
        return self.emitter(masked_product, edge, node)  # type: ignore[no-any-return]

    def incoming(self, node: fx.Node, kind: EdgeKind) -> Any:
        """The merged edge of a node; for a multi-output op a list with one per output."""
        if node not in self.tuples:
            return self.merged(node, self.pending[node], kind)
        outputs = self.tuples[node]
        return [
            self.merged(output_of(self.program.graph, node, index), outputs[index], kind) if index in outputs else None
            for index in range(len(value_of(node)))
        ]

    def merged(self, node: fx.Node, edges: list[tuple[fx.Node, EdgeKind]], kind: EdgeKind) -> fx.Node:
        """The sum of the edges at ``node``, as ``kind``."""
        alike: dict[EdgeKind, fx.Node] = {}
        for edge, its_kind in beside_each_other(self.emitter, edges):
            known = alike.get(its_kind)
            alike[its_kind] = edge if known is None else self.emitter.call(aten.add.Tensor, known, edge)
        parts = [part if k == kind else self.converted(node, part, kind) for k, part in alike.items()]
        return parts[0] if len(parts) == 1 else self.emitter.call(aten.add.Tensor, *parts)

    def converted(self, node: fx.Node, edge: fx.Node, kind: EdgeKind) -> fx.Node:
        """An edge of the other kind: exact towards relevance, stabilised towards coefficients."""
        self.conversions.append(Conversion(model_op(node), kind))
        if kind == "relevance":
            return self.emitter(on_relevance, edge, self.amount(node))  # type: ignore[no-any-return]
        if self.request.sinks or self.request.ledger:
            self.lost[node] = self.emitter(conversion_loss, edge, self.amount(node))
        return self.emitter(to_coefficient, edge, self.amount(node))  # type: ignore[no-any-return]

    def amount(self, node: fx.Node) -> fx.Node:
        """What relevance at ``node`` is a share of: its value, or how that differs from the reference run's."""
        if not self.takes_differences:
            return node
        return self.emitter(difference, node, self.emitter.reference(node))  # type: ignore[no-any-return]

    def read_out(self, node: fx.Node) -> None:
        for kind in self.wanted[node.name]:
            if kind == "coefficient":
                made = self.merged(node, self.pending[node], "coefficient")
            elif kind == "token_relevance":
                made = self.token_relevance(node)
            else:
                # A masked score inside the model may be -inf; what the user feeds in is finite.
                product = on_relevance if node.name in self.sources else masked_product
                parts = [
                    edge if its_kind == "relevance" else self.emitter(product, edge, self.amount(node))
                    for edge, its_kind in self.by_kind(node)
                ]
                made = parts[0] if len(parts) == 1 else self.emitter.call(aten.add.Tensor, *parts)
            self.results.append((Result(kind, node.name), made))

    def token_relevance(self, node: fx.Node) -> fx.Node:
        """Relevance at embeddings, one number per token."""
        parts = [
            self.emitter(summed_over_dimensions, edge)
            if kind == "relevance"
            else self.emitter(token_relevance, edge, self.amount(node))
            for edge, kind in self.by_kind(node)
        ]
        return parts[0] if len(parts) == 1 else self.emitter.call(aten.add.Tensor, *parts)

    def by_kind(self, node: fx.Node) -> list[tuple[fx.Node, EdgeKind]]:
        """The edges at ``node`` summed within each kind, kept for later readers."""
        edges = self.pending[node]
        kinds = list(dict.fromkeys(kind for _, kind in edges))
        self.pending[node] = [
            (self.merged(node, [pair for pair in edges if pair[1] == kind], kind), kind) for kind in kinds
        ]
        return self.pending[node]

    def unreached(self, node: fx.Node) -> None:
        """A source the seeded outputs do not depend on gets zeros; another site is refused."""
        if node.name not in self.sources:
            raise SiteWithoutRelevanceError(name=node.name, cause=self.why_unreached(node))
        for kind in self.wanted[node.name]:
            self.results.append((Result(kind, node.name), self.zeros(node, kind)))

    def zeros(self, node: fx.Node, kind: Reading) -> fx.Node:
        """Zeros of the shape of a node's value; relevance of complex values is real."""
        self.emitter.stamp = Facts(part="relevance", origin=node.name)
        fake = tensor_of(node)
        dtype = fake.dtype if kind == "coefficient" else fake.real.dtype
        shape = list(fake.shape)
        if kind == "token_relevance":
            shape, dtype = shape[:-1], torch.promote_types(dtype, torch.float32)
        return self.emitter.call(aten.full.default, shape, 0, dtype=dtype, device=fake.device)

    def why_unreached(self, node: fx.Node) -> str:
        for other in forward_nodes(self.program):
            pattern = facts(other).pattern
            if pattern is not None and node.name in pattern.members:
                return f"it lies inside the recognised {pattern.kind} that ends at {other.name}"
        if not facts(node).live:
            return "it does not depend on an attributed input"
        if not facts(node).flows:
            return f"the rule '{facts(node).rule}' stops it"
        return "no path leads from it to the explained output, or a rule on the way stops relevance"

    def check(self, site: Site, rule: Rule, edges: dict[Operand, fx.Node]) -> None:
        """Each edge has the shape of the operand it goes to."""
        for operand, made in edges.items():
            expected, got = tensor_of(operand.node).shape, tensor_of(made).shape
            if expected != got:
                raise RuleResultError(
                    rule=str(rule),
                    op=str(site.op),
                    got=f"shape {tuple(got)}",
                    expected=f"shape {tuple(expected)}",
                )

    def enter_ledger(self, site: Site, rule: Rule, edge: Any, edges: dict[Operand, fx.Node]) -> None:
        """What the op is given and what it passes on, as float64 sums."""
        self.enter_given(site, rule, edge)
        for operand, made in edges.items():
            self.add_total(Result("taken", site.op.name, operand.node.name), made, operand.node, rule.kind)

    def enter_given(self, site: Site, rule: Rule, edge: Any) -> None:
        """What the op is given at its outputs."""
        outputs = edge if isinstance(edge, list) else [edge]
        for index, part in enumerate(outputs):
            if part is not None:
                value = site.output(index) if isinstance(edge, list) else site.node
                self.add_total(Result("given", site.op.name, str(rule)), part, value, rule.kind)
                if value in self.lost:
                    self.results.append(
                        (Result("given", site.op.name, str(rule)), self.emitter(total, self.lost[value]))
                    )

    def add_total(self, result: Result, edge: fx.Node, value: fx.Node, kind: EdgeKind) -> None:
        amounts = (edge,) if kind == "relevance" else (edge, self.amount(value))
        made = self.emitter(total if kind == "relevance" else total_of, *amounts)
        self.results.append((result, made))

    def enter_sinks(self, site: Site, rule: Rule, edge: Any, edges: dict[Operand, fx.Node]) -> None:
        self.enter_losses(site, edge)
        for kind, made in rule.sinks(site, edge, edges).items():
            self.results.append((Result("sink", site.op.name, kind), made))

    def enter_losses(self, site: Site, edge: Any) -> None:
        """What converting the edges of the op's outputs lost."""
        values = site.float_outputs().values() if isinstance(edge, list) else [site.node]
        for number, value in enumerate(value for value in values if value in self.lost):
            kind = f"conversion_{number}" if number else "conversion"
            self.results.append((Result("sink", site.op.name, kind), self.lost[value]))
