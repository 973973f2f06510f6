"""Which ops of a forward pass draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrp_compiler.passes.branches import forward_nodes_everywhere
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Program


def draws_numbers(program: Program) -> bool:
    """Whether the model's own forward pass draws random numbers."""
    return any(draws(node) for node in forward_nodes_everywhere(program))


def draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers; attention and recurrences, which can drop values out, may drop none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]

    def given(name: str) -> Any:
        place = names.index(name)
        return node.args[place] if place < len(node.args) else node.kwargs.get(name, 0)

    if "attention" in op_name(node) and "dropout_p" in names:
        return bool(given("dropout_p") != 0.0)
    if "dropout" in names and "train" in names:
        return bool(given("train")) and given("dropout") != 0.0
    return True
