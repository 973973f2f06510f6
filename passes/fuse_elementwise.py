"""fuse_elementwise: pointwise relevance ops that follow each other become one kernel, which reads every operand once.

Behind lower_promises, since what is kept small or computed again decides which ops follow each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrp_compiler.kernels.dialect.elementwise import ELEMENTWISE_CHAIN
from lrp_compiler.kernels.pointwise import DTYPES
from lrp_compiler.kernels.spec import FLOATS, NotSupportedError
from lrp_compiler.passes.backend import Backend, takes_kernels
from lrp_compiler.passes.fusing.replacement import Replacement
from lrp_compiler.passes.kernel_use import KernelUse
from lrp_compiler.passes.program import Program, facts, value_of
from lrp_compiler.passes.sizes import Size, size_key

aten = torch.ops.aten

INSTRUCTIONS: dict[Any, str] = {
    aten.mul.Tensor: "mul",
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.abs.default: "abs",
    aten.sign.default: "sign",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.erf.default: "erf",
    aten.erfc.default: "erfc",
    aten.relu.default: "relu",
    aten.clamp_min.default: "clamp_min",
    aten.clamp_max.default: "clamp_max",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.threshold_backward.default: "threshold_backward",
    aten.where.self: "where",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.logical_and.default: "logical_and",
    aten.logical_or.default: "logical_or",
    aten.logical_not.default: "logical_not",
    aten.bitwise_and.Tensor: "logical_and",
    aten.bitwise_or.Tensor: "logical_or",
    aten.bitwise_not.default: "logical_not",
    **{
        getattr(getattr(aten, name), kind): name
        for name in ("gt", "ge", "lt", "le", "eq", "ne")
        for kind in ("Tensor", "Scalar")
    },
}
"""Pointwise op -> the instruction of the dialect that computes it of the same arguments."""

MASKS_ONLY = frozenset({aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default})
MOST_INPUTS = 8
"""More operands than this would need more registers for addresses than the chain saves in traffic."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def fuse_elementwise(program: Program, backend: Backend = "auto") -> Program:
    """The same relevance with chains of pointwise ops in one kernel each."""
    if not takes_kernels(program.graph, backend):
        return program
    program = program.fork()
    held = {buffer.holder for buffer in program.buffers}
    taken: set[fx.Node] = set()
    uses: list[KernelUse] = []
    for root in reversed(list(program.graph.nodes)):
        if root in taken or not _is_link(root) or not _gives_numbers(root):
            continue
        chain = _chain(root, held, taken)
        if len(chain) > 1:
            taken |= chain
            uses += _fused(program, root, chain)
    program.graph.eliminate_dead_code()
    return program.having(kernels=(*program.kernels, *uses))


def _chain(root: fx.Node, held: set[str], taken: set[fx.Node]) -> set[fx.Node]:
    """``root`` and the links in front of it of its shape that nothing else reads."""
    chain, waiting = {root}, list(root.all_input_nodes)
    shape = _shape(root)
    while waiting:
        node = waiting.pop()
        fits = node not in chain and node not in taken and _is_link(node) and _shape(node) == shape
        if fits and node.name not in held and chain.issuperset(node.users):
            chain.add(node)
            waiting += node.all_input_nodes
    return chain


def _is_link(node: fx.Node) -> bool:
    """Whether a relevance op can be an instruction of a chain."""
    if node.op != "call_function" or facts(node).part != "relevance" or not isinstance(value_of(node), Tensor):
        return False
    if _cast(node) is not None:
        return True
    if node.target not in INSTRUCTIONS or node.kwargs:
        return False
    plain = all(
        isinstance(argument, (fx.Node, int, float)) and not isinstance(argument, Size) for argument in node.args
    )
    return plain and (node.target not in MASKS_ONLY or value_of(node).dtype is torch.bool)


def _cast(node: fx.Node) -> torch.dtype | None:
    """The dtype that ``node`` does nothing but round to."""
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        dtype: Any = node.args[1]
        return dtype if dtype in FLOATS else None
    return None


def _gives_numbers(node: fx.Node) -> bool:
    return value_of(node).dtype in FLOATS


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = value_of(node)
    return tuple(map(size_key, value.shape)) if isinstance(value, Tensor) else ()


def _fused(program: Program, root: fx.Node, chain: set[fx.Node]) -> list[KernelUse]:
    """Put the kernel in the place of a chain; what became of each op whose relevance it computes."""
    order = [node for node in program.graph.nodes if node in chain]
    inputs = list(dict.fromkeys(operand for node in order for operand in node.all_input_nodes if operand not in chain))
    origins = list(dict.fromkeys(facts(node).origin for node in order))
    name = f"chain of {len(order)} pointwise ops"
    try:
        if len(inputs) > MOST_INPUTS:
            raise NotSupportedError(f"a chain of pointwise ops reads {len(inputs)} operands, more than {MOST_INPUTS}")
        text = _program(order, inputs, value_of(root).dtype)
        kernels = Replacement(chain_form, (inputs, text), (root,), frozenset(chain)).apply(program)
    except NotSupportedError as refused:
        return [KernelUse(origin, name, (), str(refused)) for origin in origins]
    return [KernelUse(origin, name, kernels) for origin in origins]


def _program(order: list[fx.Node], inputs: list[fx.Node], dtype: torch.dtype) -> str:
    """The chain in the language of kernels/pointwise.py; the last op gives the result."""
    registers = {node: place for place, node in enumerate([*inputs, *order])}

    def operand(argument: Any) -> str:
        return str(registers[argument]) if isinstance(argument, fx.Node) else repr(float(argument))

    lines = []
    for node in order:
        rounded = _cast(node)
        if rounded is not None:
            lines.append(f"cast {operand(node.args[0])} {NAMES[rounded]}")
        else:
            lines.append(" ".join([INSTRUCTIONS[node.target], *map(operand, node.args)]))
    return "\n".join([*lines, f"out {registers[order[-1]]} {NAMES[dtype]}"])


def chain_form(inputs: list[Tensor], program: str) -> Tensor:
    """The one result of a pointwise program."""
    made: list[Tensor] = ELEMENTWISE_CHAIN(inputs, program)
    return made[0]
