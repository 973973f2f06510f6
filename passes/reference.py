"""The reference: a slow, obvious relevance-space interpreter of an explained program (``reference=True``).

It shares nothing with the compiled path but the graph and the choice of rules: no coefficients, no promises, every
forward value kept, every rule as its paper writes it, with division by the output. Values that are exactly zero hand
on nothing, so it needs no epsilon; run it in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrp_compiler.passes.branches import (
    Conditional,
    forward_nodes_everywhere,
    operand_names,
    operands_of,
    outputs_of,
    rule_tensors,
)
from lrp_compiler.passes.errors import ReferenceModeError
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import Constant, Program, facts, first_argument, forward_nodes, is_float
from lrp_compiler.passes.recognise_norms import NormForm
from lrp_compiler.passes.reference_attention import attention
from lrp_compiler.passes.reference_linear import LINEAR_FORMULAS, maybe, quotient, times
from lrp_compiler.passes.reference_recurrent import recurrent
from lrp_compiler.passes.rules.attention import Attention, AttentionValueOnly
from lrp_compiler.passes.rules.base import Rule
from lrp_compiler.passes.rules.branches import OfBranches
from lrp_compiler.passes.rules.elementwise import Identity, IdentityRelevance
from lrp_compiler.passes.rules.gradient import Gradient
from lrp_compiler.passes.rules.norm import BatchNorm, LayerNorm, RMSNorm, SoftmaxGradient
from lrp_compiler.passes.rules.plain import Epsilon, Plain
from lrp_compiler.passes.rules.product import Numerator, Uniform
from lrp_compiler.passes.rules.recurrent import Recurrent
from lrp_compiler.passes.rules.routing import ConstantRouter
from lrp_compiler.passes.rules.scan import SelectiveScan, SignalTakesAll

Relevances = dict[Operand, Tensor]


def reference_relevance(
    program: Program, inputs: list[Any], seeds: dict[int, Tensor], sites: list[str]
) -> dict[str, Tensor]:
    """Relevance at the nodes named in ``sites``, for coefficient seeds at output leaves; zeros where none arrives."""
    values = _forward(program, inputs)
    nodes = program.nodes_by_name()
    arriving: dict[Any, Tensor] = {}
    gradients = _follows_gradients(program)
    for index, seed in seeds.items():
        node = nodes[str(program.outputs[index])]
        _add(arriving, node, seed if gradients else times(values[node], seed))
    _walk_back(program, values, arriving)
    found = {name: arriving.get(nodes[name], torch.zeros_like(values[nodes[name]])) for name in sites}
    if gradients and program.composite is not None and program.composite.readout == "coefficient":
        return found
    found = {name: times(values[nodes[name]], value) if gradients else value for name, value in found.items()}
    return {name: value.real + value.imag if value.is_complex() else value for name, value in found.items()}


def _walk_back(program: Program, values: dict[fx.Node, Any], arriving: dict[Any, Tensor]) -> None:
    """Hand what ``arriving`` holds at outputs back to the sources, op by op."""
    nodes = program.nodes_by_name()
    sources = {name for found in program.sources.values() for name in found}
    for node in reversed(list(forward_nodes(program))):
        rule = facts(node).rule
        if node.name in sources or rule is None or not facts(node).flows:
            continue
        op = Operation(node, nodes)
        outputs = _outputs_of(node, values, arriving)
        if outputs is None:
            continue
        if node.target is operator.getitem and not op.is_folded:
            _add(arriving, (node.args[0], node.args[1]), outputs[0])
            continue
        if isinstance(node.target, Conditional):
            _walk_back_taken(node, values, arriving)
            continue
        for operand, relevance in _propagate(rule, op, outputs, values).items():
            _add(arriving, operand.node, relevance)


def _walk_back_taken(node: fx.Node, values: dict[fx.Node, Any], arriving: dict[Any, Tensor]) -> None:
    """Walk back through the branch of a torch.cond that was taken."""
    branch = _taken(node, values)
    inside: dict[Any, Tensor] = {}
    for index, output in enumerate(outputs_of(branch)):
        if output is not None and (node, index) in arriving:
            _add(inside, output, arriving[node, index])
    _walk_back(branch, values, inside)
    nodes = branch.nodes_by_name()
    for name, operand in zip(operand_names(branch), operands_of(node), strict=True):
        if name in branch.sources and nodes[name] in inside:
            _add(arriving, operand, inside[nodes[name]])


def _taken(node: fx.Node, values: dict[fx.Node, Any]) -> Program:
    """The branch of a torch.cond that its predicate chooses."""
    assert isinstance(node.target, Conditional)
    first, second = node.target.branches
    return first if values[first_argument(node)] else second


def _follows_gradients(program: Program) -> bool:
    """Whether every rule is the gradient, so that coefficients are carried in place of relevance.

    Raises ReferenceModeError for gradients beside other rules, and for results that are coefficients of other rules.
    """
    rules = {type(facts(node).rule) for node in forward_nodes_everywhere(program) if facts(node).rule is not None}
    rules -= {OfBranches}
    if rules == {Gradient}:
        return True
    readout = program.composite.readout if program.composite is not None else "relevance"
    if Gradient in rules or readout == "coefficient":
        cause = "the interpreter carries relevance alone, not the coefficients this composite has or returns"
        raise ReferenceModeError(cause=cause)
    return False


def _forward(program: Program, inputs: list[Any]) -> dict[fx.Node, Any]:
    """Every value of the forward graph, those inside the branches that are taken among them."""
    values: dict[fx.Node, Any] = {}
    supplied = iter(inputs)
    with torch.no_grad():
        for node in forward_nodes(program):
            if node.op == "placeholder":
                values[node] = next(supplied)
            elif isinstance(node.target, Conditional):
                values.update(_forward_taken(node, values))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _forward_taken(node: fx.Node, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Every value inside the branch of a torch.cond that is taken, and the outputs as the value of ``node``."""
    branch = _taken(node, values)
    operands = [values[operand] for operand in operands_of(node)]
    inside = _forward(branch, [*operands, *rule_tensors(branch).values()])
    nodes = branch.nodes_by_name()
    outputs = [leaf.value if isinstance(leaf, Constant) else inside[nodes[leaf]] for leaf in branch.outputs]
    return {**inside, node: tuple(outputs)}


def _add(arriving: dict[Any, Tensor], key: Any, relevance: Tensor) -> None:
    arriving[key] = arriving[key] + relevance if key in arriving else relevance


def _outputs_of(node: fx.Node, values: dict[fx.Node, Any], arriving: dict[Any, Tensor]) -> list[Tensor] | None:
    """The relevance at each float output of a node; None where none arrived."""
    if isinstance(values[node], Tensor):
        return [arriving[node]] if node in arriving else None
    outputs = list(values[node])
    if not any((node, index) in arriving for index in range(len(outputs))):
        return None
    return [
        arriving.get((node, index), torch.zeros_like(value)) for index, value in enumerate(outputs) if is_float(value)
    ]


def _propagate(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    formula = FORMULAS.get(type(rule))
    if formula is None or (op.is_complex and formula in (_pass, _softmax)):
        kind = " of complex values" if formula is not None else ""
        raise ReferenceModeError(cause=f"the reference has no formula for rule '{rule}'{kind}")
    return formula(rule, op, outputs, values)


def _call(
    op: Operation, values: dict[fx.Node, Any], operands: tuple[Operand, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh leaves for ``operands`` and the op's float outputs computed from them."""
    flat, tree = pytree.tree_flatten((op.args, op.kwargs))
    flat = [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in flat]
    leaves = [values[operand.node].detach().clone().requires_grad_() for operand in operands]
    for operand, leaf in zip(operands, leaves, strict=True):
        flat[operand.leaf] = leaf
    args, kwargs = pytree.tree_unflatten(flat, tree)
    results = pytree.tree_leaves(op.node.target(*args, **kwargs))  # type: ignore[operator]
    return leaves, [result for result in results if is_float(result)]


def _vjp(
    op: Operation, cotangents: list[Tensor], values: dict[fx.Node, Any], operands: tuple[Operand, ...]
) -> list[Tensor]:
    with torch.enable_grad():
        leaves, results = _call(op, values, operands)
        pairs = [(z, c) for z, c in zip(results, cotangents, strict=True) if z.requires_grad]
        grads = torch.autograd.grad([z for z, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def _float_results(op: Operation, values: dict[fx.Node, Any]) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values[op.node]) if is_float(value)]


def _plain(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_x = x * VJP(R / z)."""
    operands = rule.receivers(op)
    ratios = [quotient(r, z) for r, z in zip(outputs, _float_results(op, values), strict=True)]
    return _times_input(operands, _vjp(op, ratios, values, operands), values)


def _times_input(operands: tuple[Operand, ...], grads: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    return {o: torch.where(g == 0, 0, times(values[o.node], g)) for o, g in zip(operands, grads, strict=True)}


def _epsilon(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_x = x * W^T (R / (z + eps sign(z)))."""
    assert isinstance(rule, Epsilon)
    z = values[op.node]
    operands = rule.receivers(op)
    ratio = quotient(outputs[0], z) * (z / (z + rule.epsilon * torch.where(z == 0, 1, torch.sgn(z))))
    return _times_input(operands, _vjp(op, [ratio], values, operands), values)


def _uniform(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """The plain rule, split evenly over the factors that relevance flows to."""
    factors = op.flowing_factors
    plain = _plain(rule, op, outputs, values)
    return {o: r / len(factors) if o in factors else r for o, r in plain.items()}


def _pass(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_x = R_y."""
    return dict.fromkeys(rule.receivers(op), outputs[0])


def _identity(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_x = R_y; of complex x both parts of R_y together, by the coefficient c y / x turned back by its angle."""
    (operand,) = rule.receivers(op)
    if not op.is_complex:
        return {operand: outputs[0]}
    x, y = values[operand.node], values[op.node]
    c, gate = quotient(outputs[0], y), y / torch.where(x == 0, 1, x)
    return {operand: times(x, c * (gate.conj() if y.is_complex() else torch.sgn(x)))}


def _numerator(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_y summed to the numerator's shape; complex numbers are turned as they are divided."""
    if op.is_complex:
        return _plain(rule, op, outputs, values)
    return {o: outputs[0].sum_to_size(values[o.node].shape) for o in rule.receivers(op)}


def _layer_norm(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """The ratio rule on y = (x - mean(x)) * constant * w + b."""
    (operand,) = rule.receivers(op)
    if op.pattern is not None:
        return {operand: _spelled_layer_norm(op, outputs[0], values[operand.node], values)}
    grouped = op_name(op.node) == "aten::native_group_norm"
    x = values[operand.node].detach().clone().requires_grad_()
    y = values[op.node][0]
    with torch.enable_grad():
        if grouped:
            groups, eps = op.args[6], op.args[7]
            split = x.reshape(x.shape[0], groups, -1)
            normalised = _centred(split, [-1], eps).reshape(x.shape)
            shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
            weight = maybe(op.args[1], values)
            scaled = normalised if weight is None else normalised * weight.view(shape)
        else:
            dims, weight = list(range(-len(op.args[1]), 0)), maybe(op.args[2], values)
            normalised = _centred(x, dims, op.args[4])
            scaled = normalised if weight is None else normalised * weight
        (grad,) = torch.autograd.grad(scaled, x, quotient(outputs[0], y))
    return {operand: x.detach() * grad}


def _spelled_layer_norm(op: Operation, relevance: Tensor, x: Tensor, values: dict[fx.Node, Any]) -> Tensor:
    """x * (R / u - mean(R / u)) of u = x - mean(x), which the norm's own weight does not change."""
    assert op.pattern is not None and isinstance(op.pattern.form, NormForm)
    dims = op.pattern.form.dims
    ratio = quotient(relevance, x - x.mean(dims, keepdim=True))
    return x * (ratio - ratio.mean(dims, keepdim=True))


def _centred(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """(x - mean) / std with the deviation held constant."""
    variance = x.detach().var(dims, unbiased=False, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) / torch.sqrt(variance + eps)


def _batch_norm(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_x = x * (w / std) * R / y per channel."""
    (operand,) = rule.receivers(op)
    x, weight = values[operand.node], maybe(op.args[1], values)
    _, _, _, _, variance, training, _, eps = op.args
    dims = [dim for dim in range(x.dim()) if dim != 1]
    spread = x.var(dims, unbiased=False) if training else values[variance]
    scale = (1 if weight is None else weight) / torch.sqrt(spread + eps)
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    return {operand: x * scale.view(shape) * quotient(outputs[0], values[op.node][0])}


def _softmax(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """AttnLRP Prop. 3.1: R_x = x (R - s sum(R)); for log-softmax the ratio rule."""
    (operand,) = rule.receivers(op)
    if "log_softmax" in op_name(op.node):
        return _plain(rule, op, outputs, values)
    x, s, dim = values[operand.node], values[op.node], op.args[1]
    share = outputs[0] - s * outputs[0].sum(dim, keepdim=True)
    return {operand: torch.where(torch.isinf(x), 0, x * share)}


def _scan(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """R_u = u * VJP(R / y) of the loop as it stands, where all it reads but the signal is a constant."""
    assert op.pattern is not None
    swallowed = {*op.pattern.members, op.name}
    (operand,) = rule.receivers(op)
    leaf = values[operand.node].detach().clone().requires_grad_()
    loop: dict[fx.Node, Any] = {operand.node: leaf}
    with torch.enable_grad():
        for node in op.node.graph.nodes:
            if node.name in swallowed:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: loop[n] if n in loop else values[n])
                loop[node] = node.target(*args, **kwargs)
        (grad,) = torch.autograd.grad(loop[op.node], leaf, quotient(outputs[0], values[op.node]))
    return _times_input((operand,), [grad], values)


def _gradient(rule: Rule, op: Operation, outputs: list[Tensor], values: dict[fx.Node, Any]) -> Relevances:
    """The ordinary derivative."""
    operands = rule.receivers(op)
    return dict(zip(operands, _vjp(op, outputs, values, operands), strict=True))


FORMULAS: dict[type[Rule], Callable[[Rule, Operation, list[Tensor], dict[fx.Node, Any]], Relevances]] = {
    Plain: _plain,
    Epsilon: _epsilon,
    Uniform: _uniform,
    Identity: _identity,
    IdentityRelevance: _pass,
    Numerator: _numerator,
    LayerNorm: _layer_norm,
    RMSNorm: _pass,
    BatchNorm: _batch_norm,
    SoftmaxGradient: _softmax,
    Attention: attention,
    AttentionValueOnly: attention,
    Gradient: _gradient,
    Recurrent: recurrent,
    ConstantRouter: _plain,
    SelectiveScan: _scan,
    SignalTakesAll: _plain,
    **LINEAR_FORMULAS,
}
"""Rule -> its formula in relevance space."""
