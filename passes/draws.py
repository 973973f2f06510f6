"""Which ops of a forward pass draw random numbers."""

from __future__ import annotations

import torch
from torch import fx

from lrp_compiler.passes.branches import forward_nodes_everywhere
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program


def draws_numbers(program: Program) -> bool:
    """Whether the model's own forward pass draws random numbers."""
    return any(draws(node) for node in forward_nodes_everywhere(program))


def draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers; attention, which can drop weights out, may be told to drop none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "attention" not in op_name(node) or "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool((node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", 0.0)) != 0.0)
