"""pin: integers that the model reads out of its inputs and uses as sizes or places -> constants of the graph.

Shapes in a graph are fixed, so it holds for one set of such integers. The inputs they were read from are kept with the
values they had; a call with other values has to be captured anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lrp_compiler.passes.data_dependence import SIZE, is_unsized
from lrp_compiler.passes.errors import CaptureError, DataDependentError
from lrp_compiler.passes.program import Constant, InputKind, InputSpec, Pin, Program, graph_inputs, is_float, value_of
from lrp_compiler.passes.source_lines import user_source

READERS = frozenset({torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default})


def pin(program: Program, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The graph for the integers that this call's inputs hold, which become ``program.pins``.

    Raises DataDependentError for integers that depend on anything but integer inputs.
    """
    if not _shaping_reads(program.graph):
        return program
    program = program.fork()
    values = dict(zip((spec.node for spec in program.inputs), graph_inputs(program, model, args, kwargs), strict=True))
    wanted, written = _shaping_reads(program.graph), _written(program.graph)
    found: dict[str, Any] = dict(values)
    read: set[str] = set()
    for node in wanted:
        for ancestor in _ancestors(node):
            _check_source(node, ancestor, written)
            read.add(ancestor.name)
            if ancestor.name not in found:
                found[ancestor.name] = _computed(ancestor, found)
    numbers = _folded(program, {node: found[node.name] for node in wanted})
    pins = [Pin(spec.node, values[spec.node].clone()) for spec in program.inputs if _is_pinned(spec, read)]
    outputs = tuple(leaf if isinstance(leaf, Constant) else numbers.get(leaf, leaf) for leaf in program.outputs)
    return program.having(pins=tuple(pins), outputs=outputs)


def _is_pinned(spec: InputSpec, read: set[str]) -> bool:
    return spec.node in read and spec.kind is not InputKind.CONSTANT


def _shaping_reads(graph: fx.Graph) -> list[fx.Node]:
    """The reads of integers that reach an op where it wants a size or a place, in graph order."""
    waiting = [node for user in graph.nodes for node in _integer_arguments(user)]
    reached: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [other for other in node.all_input_nodes if isinstance(value_of(other), torch.SymInt)]
    return [node for node in graph.nodes if node in reached and node.target in READERS]


def _integer_arguments(user: fx.Node) -> Iterator[fx.Node]:
    """The symbolic integers among the arguments of an ATen op that are not just numbers to compute with."""
    schema = getattr(user.target, "_schema", None)
    shapes = _has_unknown_shape(user)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if shapes or "int" in str(argument.type):
            given = user.args[position] if position < len(user.args) else user.kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(given):
                if isinstance(leaf, fx.Node) and isinstance(value_of(leaf), torch.SymInt):
                    yield leaf


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it is computed from, in graph order."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return sorted(found)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Every value whose storage an in-place op may change: what it is given, and what that may be a view of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            current: Any = node
            while isinstance(current, fx.Node):
                found.add(current)
                current = current.args[0] if current.args else None
    return found


def _check_source(read: fx.Node, ancestor: fx.Node, written: set[fx.Node]) -> None:
    """Refuse what is not a function of the integer inputs of a call."""
    cause = ""
    if ancestor.op == "placeholder" and is_float(value_of(ancestor)):
        cause = f"it depends on the floats of '{ancestor.name}'"
    elif ancestor in written:
        cause = f"it depends on {ancestor.name}, which is changed in place"
    elif torch.Tag.nondeterministic_seeded in getattr(ancestor.target, "tags", ()):
        cause = "it is random"
    if cause:
        cause = f"a size that {read.name} reads is known only when the model runs: {cause}"
        raise DataDependentError(model="the model", cause=cause, remedy=SIZE, source=user_source(read))


def _computed(node: fx.Node, found: dict[str, Any]) -> Any:
    """The value of ``node`` in this call, from those of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: found[argument.name])
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _folded(program: Program, numbers: dict[fx.Node, Any]) -> dict[str, Constant]:
    """Put numbers in place of the nodes that read them, and work out anew what depends on them.

    Returns all nodes that have become numbers, by name.
    """
    numbers = dict(numbers)
    renewed: set[fx.Node] = set(numbers)
    for node in program.graph.nodes:
        if node in numbers or renewed.isdisjoint(node.all_input_nodes):
            continue
        renewed.add(node)
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda given: numbers.get(given, given))
        if node.op != "output":
            node.meta["val"] = _fake_result(program, node)
            if isinstance(node.meta["val"], (int, float)):
                numbers[node] = node.meta["val"]
    program.graph.eliminate_dead_code()
    return {node.name: Constant(number) for node, number in numbers.items()}


def _fake_result(program: Program, node: fx.Node) -> Any:
    """What ``node`` returns on fake values; raises CaptureError where the numbers do not fit it."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    try:
        with program.fake_mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, ValueError, IndexError) as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CaptureError(model="the model", cause=cause, source=user_source(node)) from error


def _has_unknown_shape(node: fx.Node) -> bool:
    """Whether the shape of what ``node`` returns depends on data."""
    return any(is_unsized(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")))
