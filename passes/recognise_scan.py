"""Unrolled linear recurrences h_t = a_t h_{t-1} + b_t, y_t = r_t(h_t): one scan where the readouts are stacked.

The decay a, the factors of b beside the signal, and what the readout multiplies states by are held constant (MambaLRP,
RULES.md 1.8). Which factor of b = Delta B u is the signal u: the one that shares nothing with a = exp(Delta A) and does
not vary along the state dimension, over which the readout sums. Where that leaves two (B and u with a single state),
the loop is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from lrp_compiler.passes.dataflow import RESHAPES, Flow, factors, kin, stripped
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import Pattern, facts, first_argument, learn, tensor_of
from lrp_compiler.passes.recurrence import Slice, Step, find_steps, read_at, same, sliced, start_of, unread_outside
from lrp_compiler.passes.straight_line import OverTime, StraightLine, straight_line

aten = torch.ops.aten
Products = tuple[tuple[fx.Node, fx.Node], ...]
"""Products from the outermost inwards, each with the factor that relevance follows."""

READOUT = aten_names("matmul bmm mm mv mul sum select slice") | RESHAPES


@dataclass(frozen=True)
class ScanForm:
    """How a scan reads its inputs: the signal, the decay, the other factor if it ``writes``, the readout's values.

    ``signal`` is how b is sliced; ``decay_line`` takes a slice to a_t, ``readout`` takes (h_t, slices) to y_t, of
    states of shape ``state`` and type ``dtype``. Readouts are stacked (``stacked``) or concatenated along ``dim``.
    """

    steps: int
    state: tuple[int, ...]
    dtype: torch.dtype
    signal: OverTime
    decay: OverTime
    decay_line: StraightLine
    reads: tuple[OverTime, ...]
    readout: StraightLine
    stacked: bool
    dim: int
    writes: bool = False


@dataclass(frozen=True)
class Readout:
    """What one step does with its state: all its ops, those on the state's path, and what else they read."""

    state: fx.Node
    path: tuple[fx.Node, ...]
    reads: tuple[Slice, ...]
    line: StraightLine


@dataclass(frozen=True)
class Signal:
    """Where relevance leaves a scan: ``node``, the other factor if it is multiplied inside, products still to go."""

    node: fx.Node
    other: fx.Node | None
    products: Products


def recognise_scans(flow: Flow) -> None:
    """Mark the stacked readouts of each unrolled linear recurrence as one scan."""
    steps = find_steps(flow.program.graph)
    if steps:
        recogniser = _Recogniser(flow, steps)
        for node in flow.nodes:
            if node.target in (aten.stack.default, aten.cat.default):
                recogniser.visit(node)


class _Recogniser:
    """Tries to read stacked values as the readouts of recurrences."""

    def __init__(self, flow: Flow, steps: dict[fx.Node, Step]) -> None:
        self.steps = steps
        self.places, self.data, self.outputs = flow.places, flow.data, flow.returned

    def visit(self, root: fx.Node) -> None:
        """Mark ``root`` if its parts are the readouts of every state in order."""
        readouts = self.readouts(root)
        if not readouts:
            return
        chain = [self.steps[readout.state] for readout in readouts]
        form = self.form(root, readouts, chain)
        if form is None:
            return
        added, decay = chain[-1].added.base, chain[-1].decay
        assert decay is not None
        inside = self.inside(readouts, chain)
        signal = self.signal(added, decay.base, form, readouts[0])
        if signal is None:
            return
        swallowed = inside | ({added} if signal.node is not added else set())
        # A product marked as the scan's has no other rule for what else would read it.
        if not unread_outside(swallowed | ({added} if signal.products else set()), root, self.outputs):
            return
        for product, followed in signal.products:
            learn(product, pattern=Pattern("state_product", (followed.name,)))
        writes = [] if signal.other is None else [signal.other]
        inputs = [signal.node, decay.base, *writes, *(read.base for read in readouts[0].reads)]
        members = tuple(sorted(node.name for node in swallowed))
        form = replace(form, writes=bool(writes))
        learn(root, pattern=Pattern("scan", tuple(node.name for node in inputs), (), members, form))

    def readouts(self, root: fx.Node) -> list[Readout]:
        """What each stacked value does with its state; empty unless all do the same with the states in order."""
        parts = root.args[0]
        assert isinstance(parts, (list, tuple))
        found: list[Readout] = []
        for index, part in enumerate(parts):
            readout = self.readout(part, index) if isinstance(part, fx.Node) else None
            if readout is None or self.steps[readout.state].index != index:
                return []
            follows = not found or self.steps[readout.state].before is found[-1].state
            if not follows or (found and not _alike(found[0], readout)):
                return []
            found.append(readout)
        return found

    def readout(self, part: fx.Node, index: int) -> Readout | None:
        """The ops from a state to ``part``; None where there is no one state or it is not read linearly."""
        state = self.state_above(part)
        if state is None:
            return None
        loop = self.places[start_of(state, self.steps)]
        path: list[fx.Node] = []
        reads: list[Slice] = []
        current = part
        while current is not state:
            on_state = [operand for operand in current.all_input_nodes if self.depends(operand, state)]
            if len(on_state) != 1 or not _is_linear(current, on_state[0]):
                return None
            reads += [read_at(operand, index) for operand in current.all_input_nodes if operand is not on_state[0]]
            path.append(current)
            current = on_state[0]
        if any(self.places[read.base] >= loop for read in reads):
            return None
        nodes = sorted({*path, *(node for read in reads for node in read.moved)}, key=self.places.__getitem__)
        line = straight_line([state, *(read.value for read in reads)], nodes)
        return Readout(state, tuple(path), tuple(reads), line)

    def state_above(self, part: fx.Node) -> fx.Node | None:
        """The only state that ``part`` is read from."""
        waiting, seen, states = [part], set[fx.Node](), set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node in self.steps:
                states.add(node)
            elif node not in seen and node.op == "call_function" and op_name(node) in READOUT:
                seen.add(node)
                waiting += node.all_input_nodes
        return next(iter(states)) if len(states) == 1 else None

    def depends(self, node: fx.Node, state: fx.Node) -> bool:
        """Whether ``node`` is computed from ``state`` by ops of readouts."""
        if node is state:
            return True
        if self.places[node] < self.places[state] or op_name(node) not in READOUT:
            return False
        return any(self.depends(operand, state) for operand in node.all_input_nodes)

    def form(self, root: fx.Node, readouts: list[Readout], chain: list[Step]) -> ScanForm | None:
        """The scan's form, if every step has the same one and the slices cover time in full."""
        decays = [step.decay for step in chain if step.decay is not None]
        added = chain[-1].added
        if not decays or not all(same(decay, decays[0]) for decay in decays):
            return None
        lines = {straight_line([decay.value], list(decay.moved)) for decay in decays}
        sizes = [
            tensor_of(s.base).shape[s.way.dim] for s in (decays[0], added, *readouts[0].reads) if s.way.dim is not None
        ]
        states = {(tuple(tensor_of(readout.state).shape), tensor_of(readout.state).dtype) for readout in readouts}
        state_rank = tensor_of(added.base).dim() - (not added.way.keep)
        dim = int(str((*root.args, 0)[1])) % tensor_of(root).dim()
        stacked = root.target is aten.stack.default
        if len(lines) != 1 or len(states) != 1 or any(size != len(chain) for size in sizes):
            return None
        ((shape, dtype),) = states
        if len(shape) != state_rank or (not stacked and tensor_of(root).shape[dim] != len(chain)):
            return None
        ways = tuple(read.way for read in readouts[0].reads)
        line = readouts[0].line
        return ScanForm(len(chain), shape, dtype, added.way, decays[0].way, lines.pop(), ways, line, stacked, dim)

    def inside(self, readouts: list[Readout], chain: list[Step]) -> set[fx.Node]:
        """The nodes of the loop that hold states, addends and readouts."""
        found: set[fx.Node] = set()
        for readout, step in zip(readouts, chain, strict=True):
            found |= {readout.state, *readout.path, step.added.value}
            found |= {step.product} if step.product is not None else set()
        base = chain[0].added.base
        return found | {user for user in base.users if user.target is aten.unbind.int or sliced(user) is not None}

    def signal(self, added: fx.Node, decay: fx.Node, form: ScanForm, readout: Readout) -> Signal | None:
        """The factor of ``added`` that relevance follows; None where more than one could be it."""
        shared = kin(decay, self.data)
        leaves = _leaves(added, self.data)
        candidates = [leaf for leaf in leaves if stripped(leaf.node) not in shared]
        if any(leaf.products for leaf in candidates):
            candidates = _constant_along_state(candidates, form, readout)
        products = _products_above(candidates, leaves)
        if products is None or not _read_once(products):
            return None
        if products and form.signal.dim is not None and products[0][0] is added:
            followed = products[0][1]
            other = next(factor for factor in factors(added) or () if factor is not followed)
            shape = tensor_of(followed).shape
            if len(shape) == tensor_of(added).dim() and shape[form.signal.dim] == form.steps:
                return Signal(followed, other, products[1:])
        return Signal(added, None, products)


def _is_linear(node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``node``, an op of a readout, reads ``operand`` once."""
    return op_name(node) in READOUT and not (factors(node) is not None and node.args[0] is node.args[1] is operand)


def _alike(first: Readout, other: Readout) -> bool:
    """Whether two steps read their states by the same ops and the same tensors."""
    pairs = zip(first.reads, other.reads, strict=True) if len(first.reads) == len(other.reads) else [(None, None)]
    return first.line == other.line and all(a is not None and b is not None and same(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Leaf:
    """One factor of a product of many: its extents along the product, and the products above it.

    Once movement lies between (``moved``) dimensions no longer line up, and extents are those of the moved product.
    """

    node: fx.Node
    extents: tuple[int, ...]
    products: Products = ()
    moved: bool = False


def _leaves(node: fx.Node, data: set[fx.Node]) -> list[Leaf]:
    """The factors of ``node`` that depend on data, through nested products and movement."""
    waiting = [Leaf(node, tuple(tensor_of(node).shape))]
    found: list[Leaf] = []
    while waiting:
        leaf = waiting.pop()
        product = stripped(leaf.node)
        pair = factors(product) if product.target is aten.mul.Tensor and facts(product).pattern is None else None
        if pair is None:
            found.append(leaf)
            continue
        moved = leaf.moved or product is not leaf.node
        for factor in pair:
            shape = tuple(tensor_of(factor).shape)
            extents = leaf.extents if moved else (1,) * (len(leaf.extents) - len(shape)) + shape
            if factor in data:
                waiting.append(Leaf(factor, extents, (*leaf.products, (product, factor)), moved))
    return found


def _products_above(candidates: list[Leaf], leaves: list[Leaf]) -> Products | None:
    """The products above the outermost value that is made of ``candidates`` alone, all of them.

    None where there is no such value, or where it is the whole product and has more than one factor.
    """

    def holds_others(products: Products) -> bool:
        return any(leaf.products[: len(products)] == products and leaf not in candidates for leaf in leaves)

    if not candidates:
        return None
    common = candidates[0].products
    while any(leaf.products[: len(common)] != common for leaf in candidates):
        common = common[:-1]
    if holds_others(common):
        return None
    while common and not holds_others(common[:-1]):
        common = common[:-1]
    return None if not common and len(candidates) > 1 else common


def _read_once(products: Products) -> bool:
    """Whether each product inside the outermost is read by the one around it alone."""
    for (_, followed), (inner, _) in pairwise(products):
        node = followed
        while len(node.users) == 1 and node is not inner:
            node = first_argument(node)
        if len(node.users) != 1:
            return False
    return True


def _constant_along_state(leaves: list[Leaf], form: ScanForm, readout: Readout) -> list[Leaf]:
    """The factors of b that do not vary along the dimensions the readout sums over (all, where it sums over none)."""
    if 0 in form.state:
        # Nothing flows in an empty batch, and no probe tells the factors apart.
        return leaves[:1]
    state = torch.zeros(form.state, dtype=form.dtype, requires_grad=True)
    reads = [torch.ones(fake.shape, dtype=fake.dtype) for fake in (tensor_of(read.value) for read in readout.reads)]
    with torch.enable_grad():
        (support,) = torch.autograd.grad(form.readout(state, *reads).flatten()[0], state)
    summed = [dim for dim, indices in enumerate(support.nonzero().T) if len(indices.unique()) > 1]
    time = len(form.state) if form.signal.dim is None or form.signal.keep else form.signal.dim
    dims = [dim + (dim >= time) for dim in summed]
    return [leaf for leaf in leaves if all(leaf.extents[dim] == 1 for dim in dims)]
