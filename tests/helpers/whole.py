"""The joint graph in one go, every promise kept whole: the oracle for what becomes of promises; and chosen prices."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.captures import Captures
from lrp_compiler.compiled import Compiler, ExplainedCall
from lrp_compiler.options import Options
from lrp_compiler.passes.branches import Conditional, ConditionalRelevance, operand_names, rule_tensors
from lrp_compiler.passes.budget import MemoryGoal
from lrp_compiler.passes.buffers import Buffer
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.emitter import promise, reference_promise
from lrp_compiler.passes.insert_relevance import insert_relevance
from lrp_compiler.passes.lower_promises import lower_promises
from lrp_compiler.passes.pipeline import EMIT, Stage, generate, run
from lrp_compiler.passes.prices import Prices
from lrp_compiler.passes.program import Constant, Program, facts, output_node
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.passes.sizes import Size, Sizes
from lrp_compiler.passes.specialise import specialise

FREE_CALLS = Prices(call=0.0)
"""Calls cost nothing, so that what they cost does not hide what tiny values take."""
KEEP_NOTHING = Prices(kept_byte=1e9, call=0.0, flop=0.0)
"""Whatever can be computed again is."""


class PricedCompiler(Compiler):
    """A compiler that lowers promises at prices of its own; what comes before is made once for all prices."""

    def __init__(self, composite: str | Composite, prices: Prices, captures: Captures | None = None) -> None:
        super().__init__(composite, Options(), captures)
        self.prices = prices
        self.priceless: dict[tuple[int, Request], tuple[ExplainedCall, tuple[Stage, ...]]] = {}
        self.made: dict[tuple[int, Request, Prices], tuple[tuple[Stage, ...], Executable]] = {}

    def at(self, prices: Prices) -> PricedCompiler:
        """The same at other prices."""
        other = copy.copy(self)
        other.prices = prices
        return other

    def emitted(self, explained: ExplainedCall, request: Request) -> tuple[tuple[Stage, ...], Executable]:
        key = (id(explained), request)
        before = EMIT.index(lower_promises)
        if key not in self.priceless:
            history = explained.stages
            for one in EMIT[:before]:
                history = run(one, history, *((request,) if one in (specialise, insert_relevance) else ()))
            self.priceless[key] = (explained, history)
        if (*key, self.prices) not in self.made:
            history = run(lower_promises, self.priceless[key][1], MemoryGoal(prices=self.prices))
            for one in EMIT[before + 1 :]:
                history = run(one, history)
            self.made[*key, self.prices] = (history, generate(history[-1].program))
        return self.made[*key, self.prices]


def priced(model: nn.Module, composite: str | Composite, prices: Prices, captures: Captures | None = None) -> LRPModule:
    """``compile_for_lrp`` with promises lowered at ``prices``; modules with the same ``captures`` trace it once."""
    explained = compile_for_lrp(model, composite)
    explained.__dict__["_compiler"] = PricedCompiler(composite, prices, captures)
    return explained


def table(explained: LRPModule, *args: Any, **kwargs: Any) -> dict[str, Buffer]:
    """The buffers of a call's default question, by the value they hold."""
    return {buffer.name: buffer for buffer in explained.stages(*args, **kwargs)[-1].program.buffers}


def joint(history: tuple[Stage, ...]) -> Program:
    """The program before anything is done about its promises."""
    return next(stage.program for stage in history if stage.name == "simplify")


@dataclass
class Whole:
    """A joint program run on plain tensors, node by node: a promise is the value itself, a branch is entered."""

    program: Program
    sizes: Sizes
    reference: Mapping[fx.Node, Any] = field(default_factory=dict)
    states: dict[fx.Node, Tensor] = field(default_factory=dict)

    def results(self, inputs: Mapping[str, Any], seeds: tuple[Tensor, ...]) -> list[Tensor]:
        """The results of the joint graph, for its inputs by name and the seeds (then masks) in order."""
        values = self.values(inputs, seeds)
        returned = output_node(self.program.graph).args[0]
        assert isinstance(returned, tuple)
        return [values[node] for node in returned[len(returned) - len(self.program.results) :]]

    def values(self, inputs: Mapping[str, Any], seeds: tuple[Tensor, ...] | None) -> dict[fx.Node, Any]:
        """The value of every node; without seeds of the forward pass alone."""
        values: dict[fx.Node, Any] = {}
        supplied = iter(seeds or ())
        for node in self.program.graph.nodes:
            if node.op == "output" or (seeds is None and facts(node).part != "forward"):
                continue
            if node.op == "placeholder":
                values[node] = inputs[node.name] if node.name in inputs else next(supplied)
            else:
                values[node] = self.value(node, values)
        return values

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.target is promise:
            return values[node.args[0]]
        if node.target is reference_promise:
            return self.reference[node.args[0]]
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: self.plain(leaf, values))
        if isinstance(node.target, Conditional):
            self.states[node] = torch.get_rng_state()
            return self.taken(node.target.branches, args[0]).outputs(args[1:])
        if isinstance(node.target, ConditionalRelevance):
            forward = next(n for n in self.program.graph.nodes if n.name == facts(node).origin)
            operands = tuple(values[operand] for operand in forward.args[1:])
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.states[forward])
                branch = self.taken(node.target.branches, args[0])
                return branch.results(branch.named(operands), args[1:])
        return node.target(*args, **kwargs)

    def plain(self, leaf: Any, values: dict[fx.Node, Any]) -> Any:
        if isinstance(leaf, Size):
            return self.sizes.value(leaf.expression)
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    def taken(self, branches: tuple[Program, ...], predicate: Any) -> Whole:
        return Whole(branches[0 if predicate else 1], self.sizes)

    def named(self, operands: tuple[Any, ...]) -> dict[str, Any]:
        """The inputs of a branch by name: its operands, and what its rules bring along."""
        return {**dict(zip(operand_names(self.program), operands, strict=True)), **rule_tensors(self.program)}

    def outputs(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a branch returns for its operands."""
        values = {node.name: value for node, value in self.values(self.named(operands), None).items()}
        return tuple(leaf.value if isinstance(leaf, Constant) else values[leaf] for leaf in self.program.outputs)


def whole_results(
    program: Program, sizes: Sizes, inputs: list[Any], seeds: tuple[Tensor, ...], reference: Mapping[str, Any]
) -> list[Tensor]:
    """The results of a joint program for graph inputs and seeds, ``reference`` naming what differs in its other run.

    Draws its random numbers from torch's generator, in the order of the forward pass.
    """
    named = dict(zip((spec.node for spec in program.inputs), inputs, strict=True))
    with torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            other = Whole(program, sizes).values({**named, **reference}, None) if reference else {}
        return Whole(program, sizes, other).results(named, seeds)
