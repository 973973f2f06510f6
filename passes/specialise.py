"""specialise: rows that carry no relevance are not computed, and where outputs are not asked for, nor are dead rows.

A seed at a few rows of an output, a model that reads one row of a value (a class token): what the op in front of that
computes for other rows no relevance comes from. Demand is followed from the seeded outputs to the inputs, rows are
pushed through every op that treats them apart from each other and that nobody reads whole, and those ops are written
once more, on fewer rows. Relevance then takes the small ones. It is the same sum without the terms that are zero.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.branches import programs_inside
from lrp_compiler.passes.cut_ops import called_on_rows
from lrp_compiler.passes.cuts import WHOLE, Cut, Cuts, Picked, shape_of, take
from lrp_compiler.passes.program import (
    FACTS,
    Constant,
    Facts,
    InputKind,
    InputSpec,
    Pattern,
    Program,
    Structure,
    facts,
    first_argument,
    forward_nodes,
    output_node,
    return_values,
    tensor_of,
)
from lrp_compiler.passes.reach import leaves_of, reach, window_of
from lrp_compiler.passes.recognise_norms import NormForm
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.rules.base import is_by_row
from lrp_compiler.passes.rules.plain import Plain
from lrp_compiler.passes.sizes import hints
from lrp_compiler.passes.trace import Emitter

ROWS_PER_ROW_APART = 2
"""Of so many rows at most one is worth computing apart: where outputs are asked for it is computed twice."""

TRANSPARENT = frozenset({"rms_norm", "layer_norm", "gelu_tanh", "softcap"})
"""Kinds of pattern that may be written again op by op, since each of their ops treats rows apart."""


def specialise(program: Program, request: Request) -> Program:
    """The forward graph with small ops for what relevance needs of few rows, which the picks of ``request`` start.

    With ``request.keeps_outputs`` the model's own ops stay beside them; without, they go where nothing else reads
    them, and the program returns no outputs. Requests for sinks, ledgers, masks, inner seeds and parameters are about
    the whole graph, which stays as it is, and so it does under composites that explain differences.
    """
    if can_specialise(program, request):
        return _Specialiser(program.fork(), request).run()
    return program


def can_specialise(program: Program, request: Request) -> bool:
    """Whether rows may be left out for a request."""
    inner = request.through or request.starts or request.edges or request.blocked
    against = program.composite is not None and program.composite.against_reference
    branches = any(True for _ in programs_inside(program))
    whole = any(kind in ("parameter", "attention_map") for _, kind in request.sites)
    return not (request.sinks or request.ledger or inner or against or branches or whole)


def _without_outputs(program: Program, request: Request) -> Program:
    """The program without its outputs; seeds still start where they were."""
    seeded = {index: str(program.outputs[index]) for index in request.outputs} | program.seeded
    return program.having(outputs=tuple(map(_left_out, program.outputs)), seeded=seeded)


def _left_out(leaf: str | Constant) -> Constant:
    return leaf if isinstance(leaf, Constant) else Constant(None)


class _Specialiser:
    """Demand from the outputs backwards, then the graph forwards."""

    def __init__(self, program: Program, request: Request) -> None:
        self.program = program
        self.request = request
        self.nodes = program.nodes_by_name()
        self.emitter = Emitter(program.graph, program.fake_mode, output_node(program.graph), program.traces)
        sources = {name for found in program.sources.values() for name in found}
        self.barred = sources | {name for name, _ in request.sites}
        self.wanted: dict[fx.Node, Cuts] = {}
        self.kept: dict[fx.Node, Cuts] = {}
        self.small: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Cuts], fx.Node] = {}
        self.read: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def run(self) -> Program:
        roots = {self.nodes[str(self.program.outputs[index])]: index for index in self.request.outputs}
        picks = self.pick(roots)
        order = list(forward_nodes(self.program))
        if not self.request.keeps_outputs:
            for mutation in self.program.mutations:
                self.want(self.nodes[mutation.value], WHOLE)
        for node, index in roots.items():
            self.want(node, frozenset(cut for cut, output in picks.items() if output == index))
        for node in reversed(order):
            if node in self.wanted:
                self.push(node)
        for node in order:
            if node in self.kept:
                self.rewrite(node)
        self.emitter.before = output_node(self.program.graph)
        seeded = {
            index: self.fitting(node, frozenset(cut for cut, output in picks.items() if output == index)).name
            for node, index in roots.items()
        }
        self.program = self.program.having(seeded=seeded)
        if not self.request.keeps_outputs:
            self.program = _without_outputs(self.program, self.request)
        return_values(self.program)
        return self.program

    def pick(self, roots: dict[fx.Node, int]) -> dict[Cut, int]:
        """A graph input for the rows of each dimension of an output that seeds start from."""
        found: dict[Cut, int] = {}
        kind = InputKind.LATE_ROWS if self.request.keeps_outputs else InputKind.ROWS
        for pick in self.request.picks:
            node = next(node for node, index in roots.items() if index == pick.output)
            last = [other for other in self.program.graph.nodes if other.op == "placeholder"][-1]
            with self.program.graph.inserting_after(last):
                made = self.program.graph.placeholder(f"rows_{pick.output}_{pick.dim}")
            with self.program.fake_mode:
                numbers = torch.empty((pick.count,), dtype=torch.int64, device=tensor_of(node).device)
            made.meta = {"val": numbers, FACTS: Facts()}
            self.nodes[made.name] = made
            spec = InputSpec(made.name, kind, made.name)
            self.program = self.program.having(inputs=(*self.program.inputs, spec))
            found[Cut(pick.dim, Picked(made.name, pick.count), shape_of(node)[pick.dim])] = pick.output
        return found

    def want(self, node: fx.Node, cuts: Cuts) -> None:
        """Note that a reader needs these rows of ``node``: it is needed where no reader needs more."""
        self.wanted[node] = self.wanted.get(node, cuts) & cuts

    def push(self, node: fx.Node) -> None:
        """Hand on to the operands of ``node`` what is wanted of it."""
        kept = self.kept[node] = self.that_can_be_kept(node)
        for operand, needed in self.needs(node).items():
            self.want(operand, needed)
        pattern = facts(node).pattern
        for name in (*pattern.inputs, *pattern.saved) if pattern is not None and not kept else ():
            self.want(self.nodes[name], WHOLE)

    def that_can_be_kept(self, node: fx.Node) -> Cuts:
        """Of the rows wanted of ``node`` those that it can be computed for, along each dimension of an operand once."""
        found: dict[Cut, set[tuple[int, int]]] = {}
        for cut in sorted(self.wanted[node], key=lambda cut: cut.dim):
            reached = reach(node, cut) if self.may_cut(node, cut) else None
            if reached is None:
                continue
            places = {(place, one.dim) for place, one in reached.items()}
            if all(places.isdisjoint(others) for others in found.values()):
                found[cut] = places
        return frozenset(found)

    def may_cut(self, node: fx.Node, cut: Cut) -> bool:
        """Whether ``node`` may be computed for some rows alone, as far as rules and patterns go."""
        known = facts(node)
        if node.op != "call_function" or node.name in self.barred:
            return False
        if known.pattern is not None and not _is_cut_by_row(known.pattern, cut):
            return False
        return known.rule is None or (known.rule.kind == "coefficient" and is_by_row(known.rule))

    def needs(self, node: fx.Node) -> dict[fx.Node, Cuts]:
        """The rows of each operand that ``node`` reads, given those that are kept of itself."""
        found: dict[fx.Node, Cuts] = {}
        for place, leaf in enumerate(leaves_of(node)):
            if isinstance(leaf, fx.Node):
                needed = self.reached(node, place)
                found[leaf] = found.get(leaf, needed) & needed
        return found

    def reached(self, node: fx.Node, place: int) -> Cuts:
        """The rows that ``node`` reads of the operand at ``place`` of its leaves."""
        found = {(reach(node, cut) or {}).get(place) for cut in self.kept[node]}
        shown = self.window(node)
        return frozenset(cut for cut in (*found, shown) if cut is not None)

    def window(self, node: fx.Node) -> Cut | None:
        """The few rows that a selection on the way of relevance shows of its operand."""
        found = window_of(node) if facts(node).flows and node.name not in self.barred else None
        return found if found is not None and is_few(found) else None

    def rewrite(self, node: fx.Node) -> None:
        """Write ``node`` once more where it, or what it selects from, is needed in part."""
        self.emitter.before = node
        if node.target is operator.getitem:
            # Of several outputs none can be cut where another is needed whole; this one's readers take their rows.
            self.kept[node] &= self.kept[first_argument(node)]
        leaves, tree = pytree.tree_flatten((node.args, node.kwargs))
        operands: list[Any] = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, fx.Node):
                operands.append(leaf)
                continue
            # A selection can make do with more than what it shows.
            needed = self.reached(node, place) - ({self.window(node)} - self.kept.get(leaf, WHOLE))
            operands.append(self.fitting(leaf, needed))
            self.read[node, leaf] = operands[-1]
        if not self.kept[node] and operands == leaves:
            return
        self.emitter.stamp = replace(facts(node), pattern=None, structures=(), rows_of=node.name)
        self.emitter.provenance = {key: value for key, value in node.meta.items() if key not in ("val", FACTS)}
        args, kwargs = pytree.tree_unflatten(operands, tree)
        shown, source = self.window(node), leaves[0]
        left = shown if isinstance(source, fx.Node) and shown in self.kept.get(source, WHOLE) else None
        self.stand_in(node, called_on_rows(self.emitter, node, args, kwargs, self.kept[node], self.nodes, left))

    def stand_in(self, node: fx.Node, made: fx.Node) -> None:
        """Let ``made`` do what ``node`` did for relevance."""
        if self.kept[node]:
            self.small[node] = named(made, node, self.kept[node])
            self.nodes[made.name] = made
            known = replace(facts(node), pattern=self.pattern_of(node), structures=self.structures_of(node))
            made.meta[FACTS] = replace(known, rows_of=node.name)
        elif self.request.keeps_outputs:
            # The same value by fewer rows: relevance goes on from there.
            named(made, node, self.reached(node, 0))
            self.nodes[made.name] = made
            node.meta[FACTS] = replace(facts(node), explained_by=made.name)
        else:
            node.replace_all_uses_with(made)
            made.meta[FACTS] = facts(node)
            self.program.graph.erase_node(node)
            made.name = node.name
            self.nodes[made.name] = self.small[node] = made

    def fitting(self, node: fx.Node, cuts: Cuts) -> fx.Node:
        """``node`` with the rows ``cuts`` alone: as it was made, less what is left to be taken of it."""
        made = self.small.get(node, node)
        missing = cuts - self.kept.get(node, WHOLE)
        if not missing:
            return made
        if (node, cuts) not in self.taken:
            self.emitter.stamp = replace(
                facts(node), rule=Plain() if facts(node).flows else None, pattern=None, structures=()
            )
            for cut in sorted(missing, key=lambda cut: cut.dim):
                made = take(self.emitter, made, cut, self.nodes)
            self.taken[node, cuts] = named(made, node, cuts, "taken")
            self.nodes[made.name] = made
        return self.taken[node, cuts]

    def pattern_of(self, node: fx.Node) -> Pattern | None:
        """The pattern that ends at ``node``, among the small ops."""
        pattern = facts(node).pattern
        if pattern is None:
            return None
        return replace(
            pattern,
            inputs=tuple(self.as_read(name, node).name for name in pattern.inputs),
            saved=tuple(self.as_read(name, node).name for name in pattern.saved),
            members=tuple(map(self.renamed, pattern.members)),
        )

    def as_read(self, name: str, end: fx.Node) -> fx.Node:
        """What the ops of the pattern that ends at ``end`` read in place of one of the values it is known by.

        An op that cannot be cut reads all of a value of which the others, and so the pattern, read rows.
        """
        node, inside, found = self.nodes[name], [end], [self.small.get(self.nodes[name], self.nodes[name])]
        while inside:
            member = inside.pop()
            found += [self.read[member, node]] if (member, node) in self.read else []
            inside += [other for other in member.all_input_nodes if facts(other).live and not facts(other).flows]
        return min(found, key=lambda read: math.prod(hints(tensor_of(read).shape)))

    def structures_of(self, node: fx.Node) -> tuple[Structure, ...]:
        """What is known of groups of ops that end at ``node``, among the small ops."""
        return tuple(
            replace(
                known,
                roles=tuple((role, self.renamed(name)) for role, name in known.roles),
                members=tuple(map(self.renamed, known.members)),
            )
            for known in facts(node).structures
        )

    def renamed(self, name: str) -> str:
        """The name of the small op that was written for a node, or its own."""
        return self.small.get(self.nodes[name], self.nodes[name]).name


def _is_cut_by_row(pattern: Pattern, cut: Cut) -> bool:
    """Whether a pattern may be written again for some rows; a norm is one over whole dimensions."""
    normalised = pattern.form.dims if isinstance(pattern.form, NormForm) else ()
    return pattern.kind in TRANSPARENT and cut.dim not in normalised


def is_few(cut: Cut) -> bool:
    """Whether a cut leaves so few rows that they are worth computing apart; an open size is two or more."""
    return not cut.size.is_number or cut.rows.count * ROWS_PER_ROW_APART <= int(cut.size)


def named(made: fx.Node, node: fx.Node, cuts: Cuts, how: str = "at") -> fx.Node:
    """``made`` by a name that says which rows of ``node`` it holds: tapes keep values by name."""
    rows = "_".join(f"{cut.dim}_{cut.rows}" for cut in sorted(cuts, key=lambda cut: cut.dim))
    made._rename(f"{node.name}_{how}_{rows}")
    return made
