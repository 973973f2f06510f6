"""codegen: partitioned graphs -> two flat python functions over ATen calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from lrp_compiler.passes.backend import PLAINLY, Choice
from lrp_compiler.passes.branches import (
    Conditional,
    ConditionalRelevance,
    kept_names,
    operand_names,
    read_names,
    rule_tensors,
)
from lrp_compiler.passes.buffers import free_values, recorded_values, reference_values, saved_values
from lrp_compiler.passes.compiled_function import CompiledFunction
from lrp_compiler.passes.differentiable import check_differentiable, keep_derivatives, overwrite_nothing, write_plainly
from lrp_compiler.passes.program import Cast, Constant, Program, copy_graph, is_float, value_of
from lrp_compiler.passes.sizes import Size, Sizes, is_settled
from lrp_compiler.passes.transforms import without_transforms


@dataclass(frozen=True)
class Code:
    """A compiled graph; ``sizes`` are the expressions that it takes in front of its other arguments.

    Where it ``takes_list``, ``function`` has one argument, the list of all others. ``compiled`` is what torch.compile
    makes of it, in the place of ``function`` for the calls that it takes.
    """

    function: Callable[..., tuple[Any, ...]]
    sizes: tuple[Any, ...]

    takes_list: bool = False
    compiled: CompiledFunction | None = None

    @property
    def uncompiled(self) -> Code:
        """The same by ``function`` alone, which may also run under transforms of torch.func."""
        return self if self.compiled is None else replace(self, compiled=None)

    def __call__(self, sizes: Sizes, *values: Any) -> tuple[Any, ...]:
        """Run it for a call with these sizes."""
        if self.takes_list:
            return self.consume(sizes, list(values))
        arguments = (*sizes.of(self.sizes), *values)
        made = None if self.compiled is None else self.compiled(arguments)
        return self.function(*arguments) if made is None else made

    def consume(self, sizes: Sizes, values: list[Any]) -> tuple[Any, ...]:
        """Run it on a list that it empties, so that every value is given up behind its last reader."""
        values[:0] = sizes.of(self.sizes)
        made = None if self.compiled is None else self.compiled(values)
        if made is None:
            return self.function(values)
        values.clear()
        return made


@dataclass(frozen=True)
class Executable:
    """Compiled code: ``forward(sizes, *inputs) -> outputs, mutated values, recorded values`` and, when relevance was
    requested, ``relevance(sizes, *free, *saved, *reference, *casts, *seeds) -> results``. Both take what was
    prepared of weights, behind the inputs and behind the casts.

    ``free``, ``saved`` and ``reference`` name those arguments, the last by the node whose value in the reference run
    it is, and ``casts`` tell what the next hold; ``recorded`` names what the forward pass returns for them.
    ``milliseconds`` is what making it took, and ``choice`` which backend runs it.
    """

    program: Program
    forward: Code
    relevance: Code | None
    free: tuple[str, ...]
    saved: tuple[str, ...]
    reference: tuple[str, ...]
    recorded: tuple[str, ...]
    casts: tuple[Cast, ...] = ()
    milliseconds: float = 0.0
    choice: Choice = PLAINLY

    @cached_property
    def differentiable(self) -> Code:
        """``relevance`` in ops that torch can differentiate again; raises NotDifferentiableError."""
        if self.plain is not self:
            return self.plain.differentiable
        assert self.program.relevance_graph is not None
        with without_transforms():
            check_differentiable(self.program)
            return _compiled(self.program.relevance_graph, "differentiable_relevance", differentiable=True)

    @cached_property
    def plain(self) -> Executable:
        """The same on weights as they are: for derivatives with respect to these, and under torch.func."""
        with without_transforms():
            return self if self.program.plain is None else codegen(self.program.plain, self.choice)

    @cached_property
    def transformable(self) -> Executable:
        """The same in ops that torch.func can transform: nothing is overwritten, and no compiler's code is run."""
        program, plain = self.plain.program, self.plain
        assert program.relevance_graph is not None
        with without_transforms():
            forward = _compiled(program.graph, "transformable_forward", functional=True)
            relevance = _compiled(program.relevance_graph, "transformable_relevance", differentiable=True)
        return replace(plain, forward=forward, relevance=relevance)


def codegen(program: Program, choice: Choice = PLAINLY) -> Executable:
    """Generate both halves as flat functions, and have torch.compile take them where the backend goes through it."""
    relevance = program.relevance_graph
    return Executable(
        program=program,
        forward=_for_backend(program.graph, _compiled(program.graph, "forward"), choice),
        relevance=None
        if relevance is None
        else _for_backend(relevance, _compiled(relevance, "relevance", takes_list=True), choice),
        free=tuple(free_values(program)),
        saved=tuple(saved_values(program)),
        reference=tuple(reference_values(program)),
        recorded=tuple(recorded_values(program)),
        casts=program.casts,
        choice=choice,
    )


def _for_backend(graph: fx.Graph, code: Code, choice: Choice) -> Code:
    """``code``, made of ``graph``, with what the choice's compiler makes of it."""
    if choice.compiler is None:
        return code
    graph = copy_graph(graph)
    # Compilers decide themselves what shares memory.
    overwrite_nothing(graph)
    is_open = any(not is_settled(size) for value in _inputs(graph) for size in value.shape)
    assert _taking_sizes(graph) == code.sizes
    flat = fx.GraphModule(torch.nn.Module(), graph).forward
    return replace(code, compiled=CompiledFunction(flat, choice.compiler, is_open, choice.cuda_graphs))


def _inputs(graph: fx.Graph) -> list[Tensor]:
    """The fake tensors that stand for the arguments."""
    values = (value_of(node) for node in graph.nodes if node.op == "placeholder")
    return [value for value in values if isinstance(value, Tensor)]


def _taking_sizes(graph: fx.Graph) -> tuple[Any, ...]:
    """Give the graph a further argument, in front, for each size among its literals; returns what those sizes are."""
    first = next(iter(graph.nodes))
    arguments: dict[Any, fx.Node] = {}

    def argument(value: Any) -> Any:
        if not isinstance(value, Size):
            return value
        if value.expression not in arguments:
            with graph.inserting_before(first):
                arguments[value.expression] = graph.placeholder(f"size_{len(arguments)}")
        return arguments[value.expression]

    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, argument), map_aggregate(node.kwargs, argument)
    return tuple(arguments)


def _compiled(
    graph: fx.Graph,
    name: str,
    *,
    differentiable: bool = False,
    functional: bool = False,
    takes_list: bool = False,
) -> Code:
    graph = copy_graph(graph)
    write_plainly(graph) if differentiable else keep_derivatives(graph)
    if functional:
        overwrite_nothing(graph)
    for node in graph.nodes:
        if isinstance(node.target, Conditional):
            node.target = _forward_taken(node.target.branches)
        elif isinstance(node.target, ConditionalRelevance):
            node.target = _relevance_taken(node.target.branches, differentiable)
    sizes = _taking_sizes(graph)
    if takes_list:
        _take_list(graph)
    return Code(fx.GraphModule(torch.nn.Module(), graph, class_name=name).forward, sizes, takes_list)


def _take_list(graph: fx.Graph) -> None:
    """Have the graph take its arguments as one list and empty it: nobody else then holds on to a value."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(next(iter(graph.nodes))):
        values = graph.placeholder("values")
    last = values
    for node in reversed(inputs):
        with graph.inserting_after(last):
            last = graph.call_method("pop", (values,))
        node.replace_all_uses_with(last)
        graph.erase_node(node)


def _forward_taken(branches: tuple[Program, ...]) -> Callable[..., tuple[Any, ...]]:
    """Code that runs one branch of a torch.cond: its outputs, then what each branch keeps for relevance."""
    codes = [_compiled(branch.graph, "forward").function for branch in branches]
    tensors = [tuple(rule_tensors(branch).values()) for branch in branches]
    kept = [len(kept_names(branch)) for branch in branches]
    unread = [_unread(branch) for branch in branches]

    def cond(predicate: Any, *operands: Any) -> tuple[Any, ...]:
        side = 0 if predicate else 1
        values = iter(codes[side](*operands, *tensors[side]))
        outputs = [leaf.value if isinstance(leaf, Constant) else next(values) for leaf in branches[side].outputs]
        outputs = _with_zero_gradients(outputs, [operands[place] for place in unread[side]])
        nothing = [None] * kept[1 - side]
        return (*outputs, *values, *nothing) if side == 0 else (*outputs, *nothing, *values)

    return cond


def _unread(branch: Program) -> list[int]:
    """The positions of the operands that only another branch reads."""
    nodes = branch.nodes_by_name()
    return [place for place, name in enumerate(operand_names(branch)) if not nodes[name].users]


class _ZeroGradients(torch.autograd.Function):
    """The identity, with gradients of zero for further tensors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        # Not a view to autograd, so that the output can be changed in place as ever.
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (*grads, *(torch.zeros_like(other) for other in ctx.saved_tensors))


def _with_zero_gradients(outputs: list[Any], others: list[Any]) -> list[Any]:
    """The outputs of a branch; torch.cond gives what only the other branch reads a gradient of zero, not of None."""
    trained = [other for other in others if other.requires_grad]
    first = next((place for place, value in enumerate(outputs) if is_float(value)), None)
    if not trained or first is None or not torch.is_grad_enabled():
        return outputs
    return [*outputs[:first], _ZeroGradients.apply(outputs[first], *trained), *outputs[first + 1 :]]  # type: ignore[no-untyped-call]


def _relevance_taken(branches: tuple[Program, ...], differentiable: bool) -> Callable[..., tuple[Any, ...]]:
    """Code that runs the relevance of the branch that was taken."""
    codes = []
    for branch in branches:
        assert branch.relevance_graph is not None
        codes.append(_compiled(branch.relevance_graph, "relevance", differentiable=differentiable).function)
    tensors = [rule_tensors(branch) for branch in branches]
    free = [free_values(branch) for branch in branches]
    reads = [len(read_names(branch)) for branch in branches]

    def cond_relevance(predicate: Any, *values: Any) -> tuple[Any, ...]:
        side = 0 if predicate else 1
        start = side * reads[0]
        read = iter(values[start : start + reads[side]])
        known = tensors[side]
        inputs = [known[name] if name in known else next(read) for name in free[side]]
        return codes[side](*inputs, *read, *values[sum(reads) :])

    return cond_relevance
