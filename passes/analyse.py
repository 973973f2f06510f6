"""analyse: where relevance can be read (sources), which nodes depend on that (live), which cannot be negative."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from lrp_compiler.passes.branches import Conditional, operand_names, operands_of, outputs_of, read_output
from lrp_compiler.passes.data_dependence import refuse_sizes
from lrp_compiler.passes.errors import NoAttributableInputError, UnknownInputError
from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import (
    Constant,
    InputKind,
    Program,
    carries_float,
    facts,
    is_complex,
    is_float,
    learn,
)
from lrp_compiler.passes.trace import holds_number

RECTIFIERS = aten_names("relu relu6 abs sigmoid hardsigmoid softplus exp square softmax _softmax sqrt")
SIGN_KEEPERS = aten_names(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t expand repeat "
    "clone contiguous to _to_copy slice select index index_select gather cat stack split split_with_sizes "
    "chunk unbind flip roll max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d sum mean amax amin upsample_nearest1d upsample_nearest2d upsample_bilinear2d add "
    "mul maximum relu"
)
ARITHMETIC = aten_names("add mul")
OF_SHAPE_ALONE = aten_names(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full"
    " new_empty_strided"
)


def analyse(program: Program, attributed: tuple[str, ...] | None = None, varied: tuple[str, ...] = ()) -> Program:
    """Find the sources of the inputs named in ``attributed`` (None: every input that has any) and mark live nodes.

    A float input is its own source; an integer input's sources are the outputs of the embeddings it indexes. Unless it
    is asked for by name, an input is left out when it reaches the outputs through comparisons and integers alone, as a
    mask of zeros and ones does.
    ``varied`` names further inputs that a reference run changes, beside the attributed ones.
    Raises UnknownInputError for a name that is no input, NoAttributableInputError when nothing has a source,
    DataDependentError where a live value has no fixed size.
    """
    program = program.fork()
    nodes = program.nodes_by_name()
    users = {spec.target: nodes[spec.node] for spec in program.inputs if spec.kind is InputKind.USER}
    tensors = {name: node for name, node in users.items() if isinstance(node.meta.get("val"), torch.Tensor)}
    for name in (*(attributed or ()), *varied):
        if name not in tensors:
            raise UnknownInputError(name=name, known=", ".join(tensors) or "no tensor inputs")
    sources = {name: _sources(tensors[name]) for name in (tensors if attributed is None else attributed)}
    missing = [name for name, found in sources.items() if not found]
    if attributed and missing:
        raise NoAttributableInputError(cause=f"'{missing[0]}' is {_describe(tensors[missing[0]])}")
    sources = {name: found for name, found in sources.items() if found}
    if attributed is None:
        reaching = _reaching(program)
        sources = {name: found for name, found in sources.items() if reaching.intersection(found)} or sources
    if not sources:
        described = ", ".join(f"'{name}' is {_describe(tensors[name])}" for name in tensors)
        raise NoAttributableInputError(cause=described or "the model takes no tensors")
    _mark_live(program, {name for found in sources.values() for name in found})
    refuse_sizes(program)
    _mark_non_negative(program, set())
    changed = tuple(dict.fromkeys((*sources, *varied)))
    _mark_varying(program, {tensors[name] for name in changed})
    return program.having(sources=sources, attributed=tuple(sources), varied=changed)


def _mark_non_negative(program: Program, known: set[fx.Node]) -> None:
    """Mark values no element of which can be negative: rectified ones, and what keeps the sign of those.

    ``known`` holds the graph inputs of which that is known.
    """
    for node in program.graph.nodes:
        if node.op != "call_function" or is_complex(node):
            continue
        if isinstance(node.target, Conditional):
            _mark_branches_non_negative(node, known)
            continue
        if (outputs := read_output(node)) and all(facts(output).non_negative for output in outputs):
            known.add(node)
            learn(node, non_negative=True)
            continue
        name = op_name(node)
        floats = [operand for operand in node.all_input_nodes if carries_float(operand)]
        numbers = [arg for arg in node.args if isinstance(arg, (int, float))] if name in ARITHMETIC else []
        keeps = name in SIGN_KEEPERS or node.target is operator.getitem
        numbers.append(node.kwargs.get("alpha", 1))
        kept = keeps and floats and all(operand in known for operand in floats) and all(n >= 0 for n in numbers)
        # A number known only when the model runs may have either sign.
        kept = kept and not any(holds_number(operand) for operand in node.all_input_nodes)
        if name in RECTIFIERS or kept:
            known.add(node)
            learn(node, non_negative=True)


def _mark_branches_non_negative(node: fx.Node, known: set[fx.Node]) -> None:
    assert isinstance(node.target, Conditional)
    for branch in node.target.branches:
        inputs = [branch.nodes_by_name()[name] for name in operand_names(branch)]
        kept = {inner for inner, operand in zip(inputs, operands_of(node), strict=True) if operand in known}
        for inner in kept:
            learn(inner, non_negative=True)
        _mark_non_negative(branch, kept)


def _describe(node: fx.Node) -> str:
    return f"of type {node.meta['val'].dtype} and indexes no embedding"


def _sources(node: fx.Node) -> tuple[str, ...]:
    """Where the relevance of a user input is read."""
    if is_float(node.meta["val"]):
        return (node.name,)
    if node.meta["val"].dtype == torch.bool:
        return ()
    return tuple(embedding.name for embedding in _embeddings(node, set()))


def _embeddings(index: fx.Node, seen: set[fx.Node]) -> Iterable[fx.Node]:
    """The embeddings that ``index`` reaches unchanged but for its shape and type."""
    for user in index.users:
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        if op_name(user) == "aten::embedding" and user.args[1] is index:
            yield user
        elif _keeps_index(user, index):
            yield from _embeddings(user, seen)


def _keeps_index(user: fx.Node, index: fx.Node) -> bool:
    entry = classify(user)
    moves = entry is not None and entry.op_class in (OpClass.MOVEMENT, OpClass.TUPLE)
    data_first = bool(user.args) and (user.args[0] is index or isinstance(user.args[0], (list, tuple)))
    return moves and data_first and not carries_float(user)


def _reaching(program: Program) -> set[str]:
    """The nodes whose floats some output is computed from."""
    nodes = program.nodes_by_name()
    waiting = [nodes[leaf] for leaf in program.outputs if not isinstance(leaf, Constant)]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in found and carries_float(node):
            found.add(node.name)
            waiting += [] if _blocks(node) else node.all_input_nodes
    return found


def _blocks(node: fx.Node) -> bool:
    """Whether an op passes no relevance on, whatever it reads."""
    entry = classify(node) if node.op == "call_function" else None
    return entry is not None and entry.op_class is OpClass.NON_RELEVANCE


def _mark_live(program: Program, sources: set[str]) -> None:
    """A node is live when it is a source or computes floats from a live node."""
    live: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        derived = not _blocks(node) and carries_float(node) and any(arg in live for arg in node.all_input_nodes)
        if isinstance(node.target, Conditional):
            derived = _mark_branches_live(node, live)
        elif outputs := read_output(node):
            derived = any(facts(output).live for output in outputs)
        if node.name in sources or derived:
            live.add(node)
            learn(node, live=True)


def _mark_branches_live(node: fx.Node, live: set[fx.Node]) -> bool:
    """Analyse the branches of a Conditional; whether an output of one of them is live."""

    def analysed(branch: Program) -> Program:
        names = operand_names(branch)
        inner = tuple(
            name for name, arg in zip(names, operands_of(node), strict=True) if arg in live and carries_float(arg)
        )
        branch = branch.fork(sources={name: (name,) for name in inner}, attributed=inner)
        _mark_live(branch, set(inner))
        return branch

    assert isinstance(node.target, Conditional)
    node.target = node.target.mapped(analysed)
    outputs = [output for branch in node.target.branches for output in outputs_of(branch)]
    return any(output is not None and facts(output).live for output in outputs)


def _mark_varying(program: Program, changed: set[fx.Node]) -> None:
    """Mark what may differ in the reference run: all that is computed from the values of ``changed`` inputs."""
    varying = set(changed)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        # The reference run repeats the random numbers, and these ops take of their arguments the shapes alone.
        by_shape = op_name(node) in OF_SHAPE_ALONE or node.target is torch.ops.aten.bernoulli.p
        by_shape = by_shape and not any(holds_number(argument) for argument in node.all_input_nodes)
        if node in varying or (not by_shape and any(argument in varying for argument in node.all_input_nodes)):
            varying.add(node)
            learn(node, varies=True)
