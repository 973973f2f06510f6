"""Tensors that rules bring along (bounds, patterns) become constant inputs of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lrp_compiler.passes.operation import Operation
from lrp_compiler.passes.program import FACTS, Facts, InputKind, InputSpec, Program, facts, tensor_of


def tensor_name(op: str, key: str) -> str:
    """The graph input that holds the tensor ``key`` of the rule of op ``op``."""
    return f"{op}_{key}"


def supply_rule_tensors(program: Program) -> Program:
    """Give every tensor of every assigned rule a placeholder, in its op's dtype and on its device.

    Changes the graph of ``program`` in place (the caller owns it); raises what ``Rule.tensors`` raises.
    """
    nodes = program.nodes_by_name()
    added = []
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in program.graph.nodes if facts(node).rule is not None]:
        rule = facts(node).rule
        assert rule is not None
        for key, tensor in rule.tensors(Operation(node, nodes)).items():
            given = tensor.detach().to(tensor_of(node))
            last = _placeholder(program, last, tensor_name(node.name, key), given)
            added.append(InputSpec(last.name, InputKind.CONSTANT, f"{rule.name}.{key}", given))
    return program.having(inputs=(*program.inputs, *added)) if added else program


def _placeholder(program: Program, after: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    with program.graph.inserting_after(after):
        made = program.graph.placeholder(name)
    assert made.name == name, f"{name} is taken"
    with program.fake_mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    made.meta = {"val": fake, FACTS: Facts()}
    return made
