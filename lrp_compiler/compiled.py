"""Explained calls: rules and code for one composite, built once per kind of call and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.captured_call import BoundCall, CapturedCall
from lrp_compiler.captures import Captures
from lrp_compiler.composites import AUTO, choose_composite, composite_named
from lrp_compiler.known_seeds import KnownSeeds
from lrp_compiler.options import Options
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.draws import draws_numbers
from lrp_compiler.passes.errors import OutputError, ReferenceModeError
from lrp_compiler.passes.pipeline import Stage, emit, explain
from lrp_compiler.passes.program import Constant, Program, facts, is_float, value_of
from lrp_compiler.passes.request import Reading, Request
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.passes.settings import Settings
from lrp_compiler.passes.sizes import Size, SizeBinder, Sizes, value_of_sizes
from lrp_compiler.passes.specialise import can_specialise
from lrp_compiler.passes.transforms import without_transforms
from lrp_compiler.registry import with_rules
from lrp_compiler.sites import SiteRef, readings_of, resolve_sites, site_table

Readings = tuple[tuple[str, Reading], ...]


@dataclass
class ExplainedCall:
    """One kind of call with its composite and attributed inputs; code is made per request.

    ``binder``, the captured call's, tells the sizes of a call; ``prepared`` is what forward_requests made of requests,
    ``seeds`` are those that were asked for, ``known_readings`` what ``readings`` has found.
    """

    stages: tuple[Stage, ...]
    binder: SizeBinder
    settings: Settings
    executables: dict[Request, tuple[tuple[Stage, ...], Executable]] = field(default_factory=dict)
    specialised: dict[Request, bool] = field(default_factory=dict)
    prepared: dict[Request, Request] = field(default_factory=dict)
    seeds: KnownSeeds = field(default_factory=KnownSeeds)
    known_readings: dict[Any, tuple[dict[SiteRef, Readings], Readings]] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        return self.stages[-1].program

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The graph inputs by name."""
        return tuple(spec.node for spec in self.program.inputs)

    @cached_property
    def is_random(self) -> bool:
        """Whether the forward pass draws random numbers."""
        return draws_numbers(self.program)

    def can_specialise(self, request: Request) -> bool:
        """Whether rows may be left out for a request; found out once, as every call asks."""
        if request not in self.specialised:
            self.specialised[request] = can_specialise(self.program, request)
        return self.specialised[request]

    @cached_property
    def output_values(self) -> dict[int, Any]:
        """The fake value of every output leaf that is a node, by leaf index."""
        nodes = self.program.nodes_by_name()
        leaves = enumerate(self.program.outputs)
        return {index: value_of(nodes[leaf]) for index, leaf in leaves if not isinstance(leaf, Constant)}

    def output_like(self, index: int, sizes: Sizes) -> Tensor:
        """What is of the shape, dtype and device of an output leaf, and takes no memory to speak of."""
        fake = self.output_values[index]
        return torch.zeros((), dtype=fake.dtype, device=fake.device).expand(value_of_sizes(fake.shape, sizes))

    @cached_property
    def source_readings(self) -> Readings:
        """What is read for the attributed inputs, each node once."""
        program = self.program
        kind: Reading = program.composite.readout if program.composite is not None else "relevance"
        refs = resolve_sites(program, list(program.sources))
        return tuple(dict.fromkeys(reading for ref in refs for reading in readings_of(ref, kind)))

    def emitted(self, request: Request) -> tuple[tuple[Stage, ...], Executable]:
        """All stages and the code for ``request``, made at its first use."""
        if request not in self.executables:
            self.executables[request] = emit(self.stages, request, self.settings)
        return self.executables[request]

    @cached_property
    def sites(self) -> dict[str, SiteRef]:
        """Every site of the call by label."""
        return site_table(self.program)

    def readings(self, names: tuple[str, ...], kind: Reading, whole: bool) -> tuple[dict[SiteRef, Readings], Readings]:
        """What is read for each site that ``names`` stand for, and each reading once; ``whole``, nothing is summed.

        Found out once, as loops ask for the same. Raises UnknownSiteError.
        """
        key = (names, kind, whole)
        if key not in self.known_readings:
            refs = resolve_sites(self.program, list(names), self.sites)
            of = {ref: tuple((node, kind) for node in ref.nodes) if whole else readings_of(ref, kind) for ref in refs}
            self.known_readings[key] = of, tuple(dict.fromkeys(one for found in of.values() for one in found))
        return self.known_readings[key]

    @cached_property
    def explainable_outputs(self) -> dict[str, int]:
        """The outputs that relevance can start from: name -> leaf index."""
        program = self.program
        nodes = program.nodes_by_name()
        found = {}
        for index, (name, leaf) in enumerate(zip(output_names(program), program.outputs, strict=True)):
            if not isinstance(leaf, Constant) and facts(nodes[leaf]).flows and is_float(nodes[leaf].meta["val"]):
                found[name] = index
        return found

    def chosen_output(self, name: str | None) -> int:
        """The output to explain: the one asked for, else ``logits``, else the first; raises OutputError."""
        outputs = self.explainable_outputs
        known = ", ".join(outputs) or "none"
        if name is not None:
            if name not in outputs:
                raise OutputError(name=name, cause="it does not depend on an attributed input", known=known)
            return outputs[name]
        if not outputs:
            raise OutputError(name="(any)", cause="no output depends on an attributed input", known=known)
        return next((index for found, index in outputs.items() if "logits" in found), next(iter(outputs.values())))


class Compiler:
    """Compiles captured calls for one composite, and keeps what it compiled; safe to share between threads."""

    def __init__(self, composite: str | Composite, options: Options, captures: Captures | None = None) -> None:
        self.composite = composite_named(composite) if isinstance(composite, str) and composite != AUTO else composite
        self.options = options
        self.captures = captures or Captures()
        if isinstance(self.composite, Composite) and self.composite.against_reference and options.reference:
            cause = f"the interpreter has no formulas for the differences that '{self.composite.name}' explains"
            raise ReferenceModeError(cause=cause)
        # What was made of a captured call goes when that goes.
        self._explained: WeakKeyDictionary[CapturedCall, dict[Any, ExplainedCall]] = WeakKeyDictionary()
        self._lock = self.captures.lock

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
        """This kind of call, captured."""
        return self.bound(model, args, kwargs).captured

    def bound(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundCall:
        """This call with its program; ops that the user has rules for are kept whole."""
        # The interpreter runs the graph as it is, on plain numbers.
        dynamic = self.options.dynamic and not self.options.reference
        return self.captures.bound(model, args, kwargs, frozenset(self.options.rules), dynamic)

    def explain(
        self, call: CapturedCall, attributed: tuple[str, ...] | None, varied: tuple[str, ...] = ()
    ) -> ExplainedCall:
        """``call`` with rules assigned for these attributed inputs (None: every input that can be).

        ``varied`` names the inputs that a reference run changes beside them.
        """
        inputs = (attributed, tuple(name for name in varied if name not in (attributed or ())))
        with self._lock, without_autocast(), without_transforms():
            known = self._explained.setdefault(call, {})
            if inputs not in known:
                stages = explain(call.stages, *inputs, self._choose)
                known[inputs] = ExplainedCall(stages, call.binder, self.options.settings)
            return known[inputs]

    def explain_partly(self, call: CapturedCall, attributed: tuple[str, ...] | None) -> tuple[Stage, ...]:
        """The stages of ``explain`` up to a program that lists its ops without a rule; not kept."""
        with self._lock, without_autocast(), without_transforms():
            return explain(call.stages, attributed, (), self._choose, partial=True)

    def emitted(self, explained: ExplainedCall, request: Request) -> tuple[tuple[Stage, ...], Executable]:
        """Stages and code for one request."""
        with self._lock, without_autocast(), without_transforms():
            return explained.emitted(request)

    def executables(self, call: CapturedCall) -> tuple[Executable, ...]:
        """All code that was made for a captured call so far."""
        with self._lock:
            known = self._explained.get(call, {}).values()
            return tuple(made for explained in known for _, made in explained.executables.values())

    def _choose(self, program: Program) -> Composite:
        chosen = choose_composite(program) if isinstance(self.composite, str) else self.composite
        return with_rules(chosen, self.options.rules)


def output_names(program: Program) -> list[str]:
    """A name per output leaf: its path in the output tree (``logits``, ``0``, ``hidden.1``), or ``output``."""
    leaves = pytree.tree_unflatten(list(range(program.out_spec.num_leaves)), program.out_spec)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    cleaned = [
        name.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".") for name in names
    ]
    return [name or "output" for name in cleaned]


def rebuild_output(program: Program, leaves: list[Any], sizes: Sizes) -> Any:
    """The model's output from its tensor leaves, in order."""
    if len(leaves) == 1 and program.out_spec.is_leaf():
        return leaves[0]
    supplied = iter(leaves)
    filled = [_number(leaf.value, sizes) if isinstance(leaf, Constant) else next(supplied) for leaf in program.outputs]
    return pytree.tree_unflatten(filled, program.out_spec)


def _number(value: Any, sizes: Sizes) -> Any:
    """An output leaf that is no tensor: a size has the value it has in this call."""
    return sizes.value(value.expression) if isinstance(value, Size) else value
