"""What the kernels of linear maps and convolutions take in: the activation that makes relevance of a coefficient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from lrp_compiler.passes.emitter import PROMISES
from lrp_compiler.passes.program import Program, tensor_of

aten = torch.ops.aten


def take_in_own_activation(x: int, flag: int) -> Callable[[Program, fx.Node], None]:
    """Of a kernel that reads the activation as argument ``x`` already, and gives relevance where ``flag`` is set."""

    def absorb(program: Program, node: fx.Node) -> None:
        product = _product(node)
        if product is not None and product[1] is node.args[x]:
            node.update_arg(flag, True)
            product[0].replace_all_uses_with(node)

    return absorb


def take_in_activation(x: int) -> Callable[[Program, fx.Node], None]:
    """Of a kernel that multiplies by its argument ``x`` where there is one."""

    def absorb(program: Program, node: fx.Node) -> None:
        product = _product(node)
        if product is None or node.args[x] is not None:
            return
        if not product[1] < node and product[1].target in PROMISES:
            # A promise may be made as early as one likes.
            node.prepend(product[1])
        if product[1] < node:
            node.update_arg(x, product[1])
            product[0].replace_all_uses_with(node)

    return absorb


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product, other factor) where all that reads ``node`` is a product with something of its shape and dtype."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or reader.target is not aten.mul.Tensor or reader.all_input_nodes == [node]:
        return None
    other = next((operand for operand in reader.all_input_nodes if operand is not node), None)
    if other is None or not isinstance(other.meta["val"], torch.Tensor):
        return None
    one, mine = tensor_of(other), tensor_of(node)
    return (reader, other) if (one.shape, one.dtype) == (mine.shape, mine.dtype) else None
