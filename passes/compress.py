"""compress: what relevance reads of a forward value, where that is less than the value, gets a small form.

A mask takes a byte or a bit per element, a pooling's winner a byte, a dropout mask a bit or the state of the random
number generator; an argument that is read for its shape alone takes nothing. ``lower_promises`` decides what is kept:
where a value is at hand anyway, or its small form takes longer than it is worth, that is left out again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrp_compiler.kernels.pooling import Geometry
from lrp_compiler.kernels.randomness import bernoulli_again, bytes_of_state, checksum_of_generator, generator_state
from lrp_compiler.passes.deferral import GENERATOR_READERS, REPLAY, drop_dead_nodes, either, fixed_nodes
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.optable import aten_names, schema_name
from lrp_compiler.passes.packing import BY_BYTES, DRAWN, MASK, NOT_ZERO, PACKERS, POSITIVE, SIGN, WINNERS, Packing
from lrp_compiler.passes.program import (
    FACTS,
    Facts,
    Program,
    facts,
    first_argument,
    forward_nodes,
    tensor_of,
    value_of,
)
from lrp_compiler.passes.sizes import with_literals

aten = torch.ops.aten
SIGNS = (aten.sign.default, aten.sgn.default)
POOLS = {"aten::max_pool2d_with_indices": 2, "aten::max_pool3d_with_indices": 3}


SHAPE_ONLY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        aten_names("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full"), (0,)
    ),
    **dict.fromkeys(
        aten_names(
            "avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"
            " reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward"
            " replication_pad2d_backward replication_pad3d_backward max_pool2d_with_indices_backward"
            " max_pool3d_with_indices_backward"
        ),
        (1,),
    ),
}
"""Op -> the places of arguments that it reads shape and dtype of, and no value."""


def compress(program: Program) -> Program:
    """Put small forms of masks, winners and shapes between the forward values and the relevance ops that read them."""
    program = program.fork()
    _Compressor(program).run()
    # Generator states are read by no op until a draw has to be repeated.
    drop_dead_nodes(program.graph, kept=GENERATOR_READERS)
    return program


class _Compressor:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.fixed = fixed_nodes(self.graph)
        self.known: dict[tuple[fx.Node, Packing], fx.Node] = {}

    def run(self) -> None:
        for node in list(forward_nodes(self.program)):
            if node.target is aten.bernoulli.p:
                self.make_repeatable(node)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and facts(node).part in ("relevance", "promise"):
                self.drop_values(node)
                self.pack(node)

    def drop_values(self, node: fx.Node) -> None:
        """Put a zero, expanded, in place of what is read for its shape alone."""
        places = SHAPE_ONLY.get(schema_name(node.target), ())
        # The backward of a convolution reads its input for the gradient of the weight alone.
        if node.target is aten.convolution_backward.default and node.args[-1] == [True, False, False]:
            places = (1,)
        for place in places:
            operand = node.args[place] if place < len(node.args) else None
            if isinstance(operand, fx.Node) and operand in self.fixed:
                node.update_arg(place, self.zero_like(operand, node))

    def zero_like(self, operand: fx.Node, reader: fx.Node) -> fx.Node:
        value = tensor_of(operand)
        with self.graph.inserting_before(reader):
            zero = self.graph.call_function(aten.zeros.default, ([],), {"dtype": value.dtype, "device": value.device})
            made = self.graph.call_function(aten.expand.default, (zero, with_literals(list(value.shape))))
        with self.program.fake_mode:
            zero.meta["val"] = torch.zeros([], dtype=value.dtype, device=value.device)
            made.meta["val"] = torch.empty_strided(
                value.shape, [0] * value.dim(), dtype=value.dtype, device=value.device
            )
        for one in (zero, made):
            one.meta[FACTS] = Facts(part="relevance", origin=facts(reader).origin)
            self.fixed.add(one)
        return made

    def pack(self, node: fx.Node) -> None:
        """Give a mask, a sign, winners, or what a ReLU's derivative reads a packed form."""
        if schema_name(node.target) == "aten::threshold_backward" and node.args[2] == 0 and node.args[1] in self.fixed:
            value = node.args[1]
            assert isinstance(value, fx.Node)
            form = NOT_ZERO if facts(_promised(value)).non_negative else POSITIVE
            node.update_arg(1, self.packed(value, value, form, (tensor_of(value).dtype,)))
        elif node in self.fixed and isinstance(value_of(node), torch.Tensor):
            self.pack_value(node)

    def pack_value(self, node: fx.Node) -> None:
        """Have the readers of a mask, of a sign or of winners read either that or its packed form."""
        readers = [user for user in node.users if user.target not in PACKERS]
        if tensor_of(node).dtype is torch.bool:
            readers = [user for user in readers if not (user in self.fixed and _is_mask(user))]
            form: tuple[fx.Node, Packing, tuple[Any, ...]] = (node, MASK, ())
        elif node.target in SIGNS and not tensor_of(node).is_complex():
            form = (first_argument(node), SIGN, (tensor_of(node).dtype,))
        elif node.target is promise and (drawn := _drawn(first_argument(node))) is not None:
            form = (self.promised(drawn[0], node), DRAWN, (tensor_of(node).dtype, drawn[1]))
        elif node.target is promise and (winners := pooled(first_argument(node))) is not None:
            form = (node, WINNERS, winners)
        else:
            return
        for reader in readers:
            reader.replace_input_with(node, self.packed(node, *form))

    def promised(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """A promise of a forward value, in front of ``at``."""
        with self.graph.inserting_before(at):
            made = self.graph.call_function(promise, (value,))
        made.meta = {"val": value_of(value), FACTS: Facts(part="promise", origin=value.name)}
        self.fixed.add(made)
        return made

    def packed(self, direct: fx.Node, source: fx.Node, packing: Packing, extra: tuple[Any, ...]) -> fx.Node:
        """Either ``direct`` or the same unpacked from what is packed of ``source``, written right behind it."""
        if (direct, packing) not in self.known:
            value = tensor_of(direct)
            to_pack, to_unpack = packing.arguments(with_literals(list(value.shape)), extra)
            small = self.behind(direct, packing.packs, (source, *to_pack))
            with self.program.fake_mode:
                small.meta["val"] = packing.packed_like(value)
            read = self.packed(small, small, MASK, ()) if packing in BY_BYTES else small
            unpacked = self.behind(read, packing.unpacks, (read, *to_unpack))
            with self.program.fake_mode:
                unpacked.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            self.known[direct, packing] = self.behind(unpacked, either, (direct, unpacked))
            self.known[direct, packing].meta["val"] = value
        return self.known[direct, packing]

    def behind(self, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """A new relevance op right behind ``node``."""
        with self.graph.inserting_after(node):
            made = self.graph.call_function(target, args)
        made.meta[FACTS] = Facts(part="relevance", origin=facts(node).origin)
        self.fixed.add(made)
        return made

    def make_repeatable(self, node: fx.Node) -> None:
        """Note the generator's state in front of a draw and its checksum behind, so that it can be made once more."""
        value = tensor_of(node)
        with self.program.fake_mode:
            noted = torch.empty(bytes_of_state(value.device), dtype=torch.uint8), torch.empty((), dtype=torch.int64)
        with self.graph.inserting_before(node):
            state = self.graph.create_node(
                "call_function", generator_state, (value.device,), name=f"generator_state_of_{node.name}"
            )
        with self.graph.inserting_after(node):
            checksum = self.graph.create_node(
                "call_function", checksum_of_generator, (value.device,), name=f"generator_checksum_of_{node.name}"
            )
        for reader, found in zip((state, checksum), noted, strict=True):
            reader.meta = {"val": found, FACTS: Facts()}
        layout = with_literals((list(value.shape), list(value.stride())))
        arguments = (node.args[1], *layout, value.dtype, value.device)
        node.meta[REPLAY] = (bernoulli_again, (state.name, checksum.name), arguments)


def _promised(value: fx.Node) -> fx.Node:
    """The forward value that a promise stands for, any other node itself."""
    return first_argument(value) if value.target is promise else value


def _is_mask(node: fx.Node) -> bool:
    """Whether ``node`` is one tensor of truth values."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _drawn(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(the draw of zeros and ones, divisor) of which ``node`` is the quotient, as in dropout on CPU; else None."""
    if node.target is aten.bernoulli.p:
        return node, 1.0
    if node.target is aten.div.Scalar and first_argument(node).target is aten.bernoulli.p:
        return first_argument(node), node.args[1]  # type: ignore[return-value]
    return None


def pooled(node: fx.Node) -> tuple[list[Any], Geometry] | None:
    """Input sizes and geometry of the max pooling whose winners ``node`` holds, if a window fits a byte; else None."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool = first_argument(node)
    dims = POOLS.get(schema_name(pool.target), 0)
    if not dims:
        return None
    kernel, *given = (_spread(pool.args[at] if at < len(pool.args) else [], dims) for at in range(1, 5))
    stride, padding, dilation = given[0] or kernel, given[1] or (0,) * dims, given[2] or (1,) * dims
    sizes = with_literals(list(tensor_of(first_argument(pool)).shape[-dims:]))
    return (sizes, (kernel, stride, padding, dilation)) if math.prod(kernel) <= 256 else None


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    """One number per spatial dimension; none where there is no value."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * dims if len(numbers) == 1 else numbers
