"""functionalise: in-place ops -> functional ones; inputs the model changes are listed as mutations.

torch's own functionalization would also take composite ops apart (linear, attention), which the rules need whole.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.branches import Branches
from lrp_compiler.passes.canonicalise import bound
from lrp_compiler.passes.errors import UnsupportedMutationError
from lrp_compiler.passes.program import Constant, Mutation, Program, return_values, value_of
from lrp_compiler.passes.sizes import with_literals, with_numbers
from lrp_compiler.passes.source_lines import user_source

aten = torch.ops.aten
PERMUTING = frozenset({"aten::transpose", "aten::permute", "aten::t", "aten::movedim", "aten::swapaxes"})
SCATTERS = {
    "aten::select": aten.select_scatter.default,
    "aten::slice": aten.slice_scatter.default,
    "aten::diagonal": aten.diagonal_scatter.default,
}
RESHAPING = frozenset({"aten::transpose_", "aten::t_", "aten::squeeze_", "aten::unsqueeze_", "aten::swapaxes_"})
"""Ops that change in place how a tensor is seen, and none of its values."""

INVERSES = {
    "aten::view_as_real": aten.view_as_complex.default,
    "aten::view_as_complex": aten.view_as_real.default,
}


def functionalise(program: Program) -> Program:
    """The same computation without in-place ops; what happens to graph inputs becomes ``mutations``."""
    if not any(_writes(node) for node in program.graph.nodes):
        return program
    return _Functionaliser(program).run()


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _undetached(value: fx.Node) -> fx.Node:
    """What holds the same numbers: detaching in place, as exported tensor constants are, is nothing to write back."""
    while value.target is aten.detach.default:
        value = value.args[0]  # type: ignore[assignment]
    return value


def _is_laid_out(tensor: torch.Tensor, layout: torch.memory_format) -> bool:
    return (layout is torch.contiguous_format or tensor.dim() == 4) and tensor.is_contiguous(memory_format=layout)


class _Functionaliser:
    """Rebuilds the graph in order, knowing for each old node which new node holds its value now."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.now: dict[fx.Node, Any] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, int] = {}
        self.seen: dict[fx.Node, int] = {}
        self.reshaped: set[fx.Node] = set()

    def run(self) -> Program:
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        old = self.program.nodes_by_name()
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.value))
            elif _writes(node):
                self.write(node)
            else:
                self.copy(node)
        written = [(node.name, self.value(node)) for node in placeholders]
        mutations = tuple(Mutation(name, value.name) for name, value in written if _undetached(value).name != name)
        outputs = tuple(
            leaf if isinstance(leaf, Constant) else self.value(old[leaf]).name for leaf in self.program.outputs
        )
        program = self.program.having(graph=self.graph, mutations=mutations, outputs=outputs)
        return_values(program)
        return program

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose storage ``node`` shares."""
        while node in self.parent:
            node = self.parent[node]
        return node

    def value(self, node: fx.Node) -> Any:
        """The new node with the current value of ``node``; views of written storage are taken afresh."""
        if _writes(node):
            return self.value(self.parent[node])
        current = self.writes.get(self.root(node), 0)
        if self.seen[node] < current:
            self.now[node] = self.graph.node_copy(node, self.value)
            self.seen[node] = current
        return self.now[node]

    def copy(self, node: fx.Node) -> None:
        if node.op == "call_function" and (base := self.shares_storage_with(node)) is not None:
            self.parent[node] = base
        self.now[node] = self.graph.node_copy(node, self.value)
        self.seen[node] = self.writes.get(self.root(node), 0)

    def shares_storage_with(self, node: fx.Node) -> fx.Node | None:
        """The argument whose storage the result of ``node`` is a view of, found by running it on fakes."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.target is operator.getitem and first in self.parent:
            return first
        base = first.meta.get("val")
        if not isinstance(base, torch.Tensor) or not pytree.tree_any(_is_tensor, node.meta.get("val")):
            return None
        if isinstance(node.target, Branches):
            # torch.cond itself refuses branches that return views of their operands.
            return None
        with self.program.fake_mode, torch.no_grad():
            args, kwargs = fx.map_arg(with_numbers((node.args, node.kwargs)), value_of)
            results = pytree.tree_leaves(node.target(*args, **kwargs))  # type: ignore[operator]
        storage = base.untyped_storage()._cdata
        shares = any(isinstance(r, torch.Tensor) and r.untyped_storage()._cdata == storage for r in results)
        return first if shares else None

    def write(self, node: fx.Node) -> None:
        """Replace an in-place call by its functional form and write the result through to the base."""
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if node.target._schema.name in RESHAPING:  # type: ignore[union-attr]
            self.reshape(node, target)
            return
        if self.root(target) in self.reshaped:
            self.refuse(node, "it writes to a tensor after its shape was changed in place")
        result = self.functional(node, target)
        root = self.root(target)
        # A write stands for what it wrote to, so that a value written a thousand times has one parent, not a thousand.
        self.parent[node] = self.parent[target] if _writes(target) else target
        child, value = target, result
        while child is not root:
            parent = self.parent[child]
            if not _writes(child):
                value = self.write_through(node, child, self.value(parent), value)
            child = parent
        count = self.writes.get(root, 0) + 1
        self.writes[root] = count
        self.now[root], self.now[target] = value, result
        self.seen[root] = self.seen[target] = count

    def reshape(self, node: fx.Node, target: fx.Node) -> None:
        """Let ``target`` be seen as ``node`` leaves it from here on."""
        self.parent[node] = target
        root = self.root(target)
        if root.op == "placeholder":
            self.refuse(node, "it changes the shape of an input, parameter or buffer")
        self.reshaped.add(root)
        name = str(node.target._schema.name).removeprefix("aten::").removesuffix("_")  # type: ignore[union-attr]
        overload = node.target._schema.overload_name or next(iter(getattr(aten, name).overloads()))  # type: ignore[union-attr]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        while _writes(target):
            target = self.parent[target]
        self.now[target] = self.emit(node, getattr(getattr(aten, name), overload), args, kwargs)

    def functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The functional call in place of ``node``, of the shape and dtype of what it overwrites."""
        schema = node.target._schema  # type: ignore[union-attr]
        kept = value_of(target)
        if schema.name == "aten::copy_":
            source = self.value(node.args[1])  # type: ignore[arg-type]
            return self.like(source, kept, node)
        name = schema.name.removeprefix("aten::").removesuffix("_")
        overload = getattr(getattr(aten, name, None), schema.overload_name or "default", None)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        if name == "bernoulli" and schema.overload_name == "float":
            # In place, p may be left out; the functional variant demands it.
            overload, args = aten.bernoulli.p, (args[0], *(args[1:] or (0.5,)))
        if overload is None or overload._schema.is_mutable:
            self.refuse(node, "torch has no functional variant of it")
        made = self.emit(node, overload, args, kwargs)
        if value_of(made).shape != kept.shape:
            self.refuse(node, "it changes the shape of its tensor")
        return self.like(made, kept, node)

    def like(self, value: fx.Node, kept: torch.Tensor, node: fx.Node) -> fx.Node:
        """``value`` cast, expanded and laid out to the dtype, shape and strides of ``kept``."""
        if value_of(value).dtype != kept.dtype:
            value = self.emit(node, aten.to.dtype, (value, kept.dtype), {})
        if value_of(value).shape != kept.shape:
            value = self.emit(node, aten.expand.default, (value, list(kept.shape)), {})
        for layout in (torch.contiguous_format, torch.channels_last):
            # Kernels may round differently on other strides.
            if _is_laid_out(kept, layout) and not _is_laid_out(value_of(value), layout):
                return self.emit(node, aten.contiguous.default, (value,), {"memory_format": layout})
        return value

    def write_through(self, node: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The value of a view's base after the view was set to ``value``."""
        if view.target is operator.getitem:
            return self.refuse(node, f"it writes to one piece of {view.args[0]}")
        name = view.target._schema.name  # type: ignore[union-attr]
        whole, part = value_of(parent), value_of(value)
        if name in SCATTERS and whole.is_complex():
            return self.write_complex_part(node, view, parent, value)
        if name in SCATTERS:
            return self.emit(node, SCATTERS[name], (parent, value, *view.args[1:]), dict(view.kwargs))
        if name in INVERSES:
            return self.emit(node, INVERSES[name], (value,), {})
        if name in PERMUTING:
            return self.permute_back(node, view, value, whole)
        if whole.numel() == part.numel() and whole.dtype == part.dtype:
            return self.emit(node, aten.reshape.default, (value, list(whole.shape)), {})
        return self.refuse(node, f"it writes through {name}")

    def write_complex_part(self, node: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """As a write to pairs of real numbers: autograd knows no scatter of complex ones."""
        options = bound(view)
        dims = {key: size % value_of(parent).dim() for key, size in options.items() if key.startswith("dim")}
        scatter = SCATTERS[view.target._schema.name]  # type: ignore[union-attr]
        whole, part = (self.emit(node, aten.view_as_real.default, (self.plain(node, v),), {}) for v in (parent, value))
        if scatter is aten.diagonal_scatter.default:
            # What is written comes last, after the pairs.
            part = self.emit(node, aten.transpose.int, (part, -1, -2), {})
        arguments = {**options, **dims, "self": whole, "src": part}
        names = [argument.name for argument in scatter._schema.arguments]
        pairs = self.emit(node, scatter, tuple(arguments[name] for name in names), {})
        return self.emit(node, aten.view_as_complex.default, (pairs,), {})

    def plain(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """``value`` with a pending conjugation carried out, without which it has no view of pairs."""
        return self.emit(node, aten.resolve_conj.default, (value,), {}) if value_of(value).is_conj() else value

    def permute_back(self, node: fx.Node, view: fx.Node, value: fx.Node, whole: torch.Tensor) -> fx.Node:
        labels = [size + 2 for size in range(whole.dim())]
        moved = view.target(torch.empty(labels, device="meta"), *view.args[1:], **view.kwargs)  # type: ignore[operator]
        inverse = [list(moved.shape).index(label) for label in labels]
        return self.emit(node, aten.permute.default, (value, inverse), {})

    def emit(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new call that carries the provenance of ``node``."""
        new = self.graph.call_function(target, *with_literals((args, kwargs)))
        new.meta = {key: node.meta[key] for key in node.meta if key != "val"}
        with self.program.fake_mode, torch.no_grad():
            fake_args, fake_kwargs = fx.map_arg(with_numbers((args, kwargs)), value_of)
            new.meta["val"] = target(*fake_args, **fake_kwargs)
        return new

    def refuse(self, node: fx.Node, cause: str) -> fx.Node:
        name = str(node.target._schema.name).removeprefix("aten::").removesuffix("_")  # type: ignore[union-attr]
        raise UnsupportedMutationError(op=f"{name}_", name=name, cause=cause, source=user_source(node))
