"""Running the code of a forward pass, with what was prepared of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrp_compiler.captured_call import BoundCall
from lrp_compiler.compiled import rebuild_output
from lrp_compiler.passes.cast_explicitly import without_autocast
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.preparation import Preparation
from lrp_compiler.passes.program import Cast, Constant, Mutation
from lrp_compiler.passes.sizes import Sizes
from lrp_compiler.prepared_weights import PreparedWeights
from lrp_compiler.random_numbers import DRAWING


def output_of(call: BoundCall) -> Any:
    """The model's own output; what the model changes in place is changed."""
    executable = call.captured.forward
    program, inputs = executable.program, call.inputs()
    with without_autocast():
        if call.captured.is_random:
            with DRAWING:
                values = executable.forward(call.sizes, *inputs)
        else:
            values = executable.forward(call.sizes, *inputs)
    outputs = len(values) - len(program.mutations)
    if program.mutations:
        names = [spec.node for spec in program.inputs]
        write_back(program.mutations, dict(zip(names, inputs, strict=True)), list(values[outputs:]))
    return rebuild_output(program, list(values[:outputs]), call.sizes)


def run_forward(
    executable: Executable, inputs: list[Any], sizes: Sizes, weights: PreparedWeights
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """(output leaves, mutated values, recorded values) of one forward pass."""
    if torch.is_grad_enabled():
        executable = executable.plain
    program = executable.program
    with without_autocast():
        values = forward_values(executable, inputs, sizes, weights)
    outputs = sum(not isinstance(leaf, Constant) for leaf in program.outputs)
    mutated = outputs + len(program.mutations)
    recorded = dict(zip(executable.recorded, values[mutated:], strict=True))
    return list(values[:outputs]), list(values[outputs:mutated]), recorded


def forward_values(
    executable: Executable, inputs: list[Any], sizes: Sizes, weights: PreparedWeights
) -> tuple[Tensor, ...]:
    """What the code of a forward pass returns: output leaves, mutated values, recorded values."""
    program = executable.program
    if program.prepared_forward:
        named = dict(zip((spec.node for spec in program.inputs), inputs, strict=True))
        inputs = [*inputs, *prepared_values(program.prepared_forward, named, weights)]
    return executable.forward(sizes, *inputs)


def cast_values(asked: tuple[Cast, ...], inputs: dict[str, Any], weights: PreparedWeights) -> list[Tensor]:
    """The parameters among the inputs of a graph that relevance reads in another dtype, without history."""
    return [weights.cast(inputs[cast.of], cast.dtype) for cast in asked]


def prepared_values(asked: tuple[Preparation, ...], inputs: dict[str, Any], weights: PreparedWeights) -> list[Tensor]:
    """What was prepared of the weights among the inputs of a graph."""
    return [weights.prepared(one, tuple(inputs[name] for name in one.of)) for one in asked]


def write_back(mutations: tuple[Mutation, ...], inputs: dict[str, Any], values: list[Tensor]) -> None:
    """Give inputs that the model changes in place (running statistics, say) their new values."""
    with torch.no_grad():
        for mutation, value in zip(mutations, values, strict=True):
            inputs[mutation.input].copy_(value)
