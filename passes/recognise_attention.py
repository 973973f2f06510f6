"""What attention is made of: biases by position that scores are added, and heads that share keys and values."""

from __future__ import annotations

import torch
from torch import fx

from lrp_compiler.passes.dataflow import RESHAPES, Flow, float_operands, is_movement, stripped
from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import InputKind, Structure, carries_float, facts, is_float, learn, tensor_of

aten = torch.ops.aten
QUERY, KEY, VALUE, MASK = 0, 1, 2, 3
MASKS = aten_names("masked_fill where")
SCORED = frozenset({OpClass.MOVEMENT, OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.ACTIVATION, OpClass.ADD})
"""What lies between scores and their softmax: scales, caps, masks and biases."""


def recognise_attention(flow: Flow) -> None:
    """Mark position biases and grouped heads, of whole attention ops and of spelled ones."""
    searched: set[fx.Node] = set()
    for node in flow.nodes:
        entry = classify(node) if node.op == "call_function" else None
        if entry is None:
            continue
        if entry.op_class is OpClass.ATTENTION:
            _mark_whole(flow, node)
        elif entry.op_class is OpClass.SOFTMAX and node in flow.signals:
            for score in _scores(flow, node, searched):
                _mark_score(flow, score)


def _mark_whole(flow: Flow, node: fx.Node) -> None:
    query, key = node.args[QUERY], node.args[KEY]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    given = node.args[MASK] if op_name(node) == "aten::scaled_dot_product_attention" and len(node.args) > MASK else None
    mask = node.kwargs.get("attn_mask", given)
    if isinstance(mask, fx.Node) and _is_positional(flow, mask):
        _add(node, Structure("position_bias", (("bias", mask.name),)))
    shared = _shared_heads(flow, key, query)
    if shared is not None:
        _add(node, Structure("grouped_heads", (("key", shared.name),)))


def _scores(flow: Flow, softmax: fx.Node, searched: set[fx.Node]) -> list[fx.Node]:
    """The sums and products of queries and keys from which attention scores come; none where there is no product."""
    found: list[fx.Node] = []
    waiting = [value for value in softmax.args[:1] if isinstance(value, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node in searched or node not in flow.signals or node.op != "call_function":
            continue
        searched.add(node)
        entry = classify(node)
        signals = [operand for operand in node.all_input_nodes if operand in flow.signals]
        if entry is not None and entry.op_class is OpClass.LINEAR and len(signals) > 1:
            found.append(node)
        elif entry is not None and entry.op_class in SCORED:
            found += [node] if entry.op_class is OpClass.ADD else []
            waiting += signals
    products = any(op_name(node) not in ("aten::add", "aten::sub") for node in found)
    return found if products else []


def _mark_score(flow: Flow, node: fx.Node) -> None:
    """A sum of scores and a bias, or a product of queries and keys that may have shared heads."""
    if op_name(node) in ("aten::add", "aten::sub", "aten::baddbmm"):
        terms = node.args[:1] if op_name(node) == "aten::baddbmm" else node.args
        for term in terms:
            if isinstance(term, fx.Node) and term not in flow.signals and _is_positional(flow, term):
                _add(node, Structure("position_bias", (("bias", term.name),)))
    if op_name(node) in ("aten::matmul", "aten::bmm", "aten::baddbmm"):
        query, key = node.args[-2:]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        shared = _shared_heads(flow, key, query)
        if shared is not None:
            _add(node, Structure("grouped_heads", (("key", shared.name),)))


def _add(node: fx.Node, structure: Structure) -> None:
    learn(node, structures=(*facts(node).structures, structure))


def _is_positional(flow: Flow, bias: fx.Node) -> bool:
    """Whether an additive term is more than a mask: learned, slopes times distances, or a table with one part per head.

    Masks and biases may have been added up or merged before; only movement, sums and masking lie between.
    """
    waiting, seen = [bias], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node in flow.signals or not carries_float(node):
            continue
        seen.add(node)
        if node in flow.learned or _slopes(flow, node) or _is_table(flow, node):
            return True
        entry = classify(node) if node.op == "call_function" else None
        if entry is not None and (is_movement(node) or entry.op_class is OpClass.ADD or op_name(node) in MASKS):
            waiting += float_operands(node)
    return False


def _slopes(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` multiplies one constant per head by distances, which vary along other dimensions."""
    if op_name(node) != "aten::mul":
        return False
    factors = [factor for factor in node.args if isinstance(factor, fx.Node)]
    if len(factors) != 2:
        return False
    rank = tensor_of(node).dim()
    varying = []
    for factor in factors:
        shape = tensor_of(factor).shape
        varying.append({rank - len(shape) + dim for dim, size in enumerate(shape) if size > 1})
    one_per_head = any(
        len(dims) == 1 and is_float(factor.meta["val"]) and factor not in flow.data
        for factor, dims in zip(factors, varying, strict=True)
    )
    return one_per_head and not varying[0] & varying[1] and all(varying)


def _is_table(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` is a stored tensor (..., heads, queries, keys)."""
    shape = tensor_of(node).shape
    return flow.kind(node) in (InputKind.BUFFER, InputKind.CONSTANT) and len(shape) >= 3 and shape[-3] > 1


def _shared_heads(flow: Flow, key: fx.Node, query: fx.Node) -> fx.Node | None:
    """The keys before their heads were repeated for the heads of the queries; themselves where the op shares them."""
    heads = tensor_of(query).shape[-3] if tensor_of(query).dim() > 3 else None
    if heads is None:
        return None
    if tensor_of(key).dim() > 3 and tensor_of(key).shape[-3] < heads:
        return key
    node, repeats = key, False
    while op_name(node) in RESHAPES | {"aten::repeat"} and isinstance(node.args[0], fx.Node):
        repeats = repeats or tensor_of(node).numel() > tensor_of(node.args[0]).numel()
        node = node.args[0]
        shape = tensor_of(node).shape
        # Queries that are repeated over a batch of one repeat no heads.
        if repeats and len(shape) == 4 and shape[-3] < heads and heads % shape[-3] == 0:
            return stripped(node) if len(tensor_of(stripped(node)).shape) == 4 else node
    return None
