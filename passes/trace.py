"""Tracing plain torch functions into ATen nodes of a graph, once per signature."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.errors import RuleTraceError
from lrp_compiler.passes.program import FACTS, Facts, value_of
from lrp_compiler.passes.sizes import as_literal, is_size, size_key, with_literals, with_numbers

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

EMISSION = "lrp_emission"
"""Where an emitted node keeps its Emission and the node of the traced graph that it is a copy of."""

ARGUMENT = object()
"""Stands among an Emission's arguments for what the traced graph takes as a placeholder."""


@dataclass(frozen=True, eq=False)
class Emission:
    """One call of a traced function: its arguments, ARGUMENT in place of nodes, and the graph it became.

    What a node computes stays what this says, whatever passes do to the nodes in front of it.
    """

    function: Callable[..., Any]
    arguments: Any
    traced: fx.GraphModule


Emitted = Any
"""A node, None, or a tree of those: what a traced function returned."""


SCALARS = (torch.SymFloat, torch.SymInt, torch.SymBool)
"""The fake values of nodes that hold python numbers (what ``.item()`` gives and python makes of it)."""


def holds_number(node: fx.Node) -> bool:
    """Whether ``node`` holds a python number that is known only when the model runs."""
    return isinstance(node.meta.get("val"), SCALARS)


def signature(value: object) -> object:
    """What of a fake value decides how it traces: sizes, strides, dtype, device, pending conjugation and negation.

    Of a number its type alone.
    """
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(size_key, (*value.shape, *value.stride())))
        return (sizes, value.dtype, value.device, value.is_conj(), value.is_neg())
    return type(value) if isinstance(value, SCALARS) else value


@dataclass
class Emitter:
    """Appends traced functions to ``graph`` before its output; one per pass run over one graph.

    ``stamp`` is given to every node it makes, so that each names the op it came from; ``traces`` remembers what was
    traced before.
    """

    graph: fx.Graph
    fake_mode: FakeTensorMode
    before: fx.Node
    traces: dict[object, fx.GraphModule]
    stamp: Facts = field(default_factory=Facts)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        autograd: bool = False,
        rewire: bool = False,
        opened: Any = None,
    ) -> Emitted:
        """Emit ``fn(*args)``; nodes among ``args`` stand for tensors, all else is constant.

        ``fn`` is plain torch code and must be a module-level function (its identity is the cache key). With
        ``autograd`` it may call torch.func.vjp or jvp inside; without, composite ops stay whole, except calls of
        ``opened``, which are replaced by the ops they make. With ``rewire`` the function returns (result, values,
        others): wherever one of the values is used, the other one at its place is used instead.
        """
        leaves, tree = pytree.tree_flatten(with_numbers(args))
        nodes = [leaf for leaf in leaves if is_argument(leaf)]
        traced = self._trace(fn, leaves, tree, nodes, autograd, rewire, opened)
        arguments = [ARGUMENT if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return self.inline(traced, nodes, Emission(fn, pytree.tree_unflatten(arguments, tree), traced))

    def inline(self, traced: fx.GraphModule, nodes: list[Any], emission: Emission) -> Emitted:
        """Copy the nodes of ``traced`` here, with ``nodes`` (or sizes) in place of its placeholders."""
        values: dict[fx.Node, Any] = {}
        supplied = iter(nodes)
        result: Emitted = None
        with self.graph.inserting_before(self.before):
            for node in traced.graph.nodes:
                if node.op == "placeholder":
                    given = next(supplied)
                    values[node] = self.given(given) if node.users else None
                elif node.op == "output":
                    result = pytree.tree_map(lambda leaf: values.get(leaf, leaf), node.args[0])
                elif node.op == "get_attr":
                    raise RuleTraceError(op=self.stamp.origin, cause="its code makes a tensor out of constants")
                elif is_size(node.meta.get("val")):
                    values[node] = as_literal(node.meta["val"])
                else:
                    values[node] = self._copy(node, values)
                    values[node].meta[EMISSION] = (emission, node)
        return result

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit one call of an ATen op, its fake value computed from its arguments."""
        args, kwargs = fx.map_arg((args, kwargs), self.resolve)
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, *with_literals((args, kwargs)))
        fake_args, fake_kwargs = fx.map_arg(with_numbers((args, kwargs)), value_of)
        with self.fake_mode, torch.no_grad():
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        self._mark(node)
        return node

    def given(self, value: Any) -> Any:
        """What emitted code reads in place of an argument: a node, or a size."""
        return self.resolve(value) if isinstance(value, fx.Node) else as_literal(value)

    def region(self, target: Callable[..., Any], args: tuple[fx.Node, ...], value: Any) -> fx.Node:
        """Emit one call of a region, whose fake value is known."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, tuple(self.resolve(arg) for arg in args))
        node.meta["val"] = value
        self._mark(node)
        return node

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node that stands for ``node`` where emitted code reads it."""
        return node

    def _copy(self, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
        copied = self.graph.node_copy(node, lambda old: values[old])
        copied.meta = {"val": node.meta["val"]}
        self._mark(copied)
        return copied

    def _mark(self, node: fx.Node) -> None:
        node.meta.update(self.provenance)
        node.meta[FACTS] = self.stamp

    def _trace(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        tree: Any,
        nodes: list[Any],
        autograd: bool,
        rewire: bool,
        opened: Any,
    ) -> fx.GraphModule:
        fakes = [value_of(node) if isinstance(node, fx.Node) else node for node in nodes]
        frozen = tuple(signature(value_of(leaf)) if isinstance(leaf, fx.Node) else _static(leaf) for leaf in leaves)
        key = (fn, frozen, tree, autograd, rewire, opened)
        if key not in self.traces:
            placed = _placer(fn, leaves, tree)
            self.traces[key] = trace(placed, fakes, self.fake_mode, autograd=autograd, rewire=rewire, opened=opened)
        return self.traces[key]


def _static(leaf: Any) -> object:
    """A hashable key for a constant argument that tells 1 from 1.0 and True."""
    return (type(leaf), size_key(leaf))


def is_argument(leaf: Any) -> bool:
    """Whether a traced function takes ``leaf`` as an argument: nodes, and sizes that differ from call to call."""
    return isinstance(leaf, fx.Node) or is_size(leaf)


def _placer(fn: Callable[..., Any], leaves: list[Any], tree: Any) -> Callable[..., Any]:
    """``fn`` as a function of its tensor arguments alone."""

    def placed(*tensors: Any) -> Any:
        supplied = iter(tensors)
        filled = [next(supplied) if is_argument(leaf) else leaf for leaf in leaves]
        return fn(*pytree.tree_unflatten(filled, tree))

    return placed


def trace(
    fn: Callable[..., Any],
    fakes: list[Any],
    fake_mode: FakeTensorMode,
    *,
    autograd: bool = False,
    rewire: bool = False,
    opened: Any = None,
) -> fx.GraphModule:
    """Trace ``fn`` over tensors like ``fakes`` to ATen nodes; dead nodes are removed."""
    with fake_mode, torch.no_grad():
        fresh_ones = [fresh(fake) for fake in fakes]
        table = {opened: opened.decompose} if opened is not None else None
        traced = make_fx(fn, decomposition_table=table, pre_dispatch=not autograd)(*fresh_ones)
        if any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in traced.graph.nodes):
            traced = make_fx(torch.func.functionalize(fn, remove="mutations"))(*fresh_ones)
    if rewire:
        _rewire(traced.graph)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if node.target is operator.getitem and "val" not in node.meta:
            node.meta["val"] = value_of(node.args[0])[node.args[1]]
    return traced


def fresh(fake: Any) -> Any:
    """A tensor like ``fake`` that nothing knows, with what is pending on it at run time; a size or number is itself."""
    if not isinstance(fake, torch.Tensor):
        return fake
    made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    made = made.conj() if fake.is_conj() else made
    return torch._neg_view(made) if fake.is_neg() else made


def _rewire(graph: fx.Graph) -> None:
    """Put the known values in place of the recomputed ones that the traced function returned beside its result."""
    output = next(iter(reversed(graph.nodes)))
    result, recomputed, known = output.args[0]
    for old, new in zip(recomputed, known, strict=True):
        if isinstance(old, fx.Node) and isinstance(new, fx.Node) and old.op != "placeholder":
            old.replace_all_uses_with(new)
    output.args = (result,)
