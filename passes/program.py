"""The compiler's intermediate representation: an ATen-level torch.fx graph plus what is known about it."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lrp_compiler.passes.request import Result

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lrp_compiler.passes.buffers import Buffer, MemoryPlan
    from lrp_compiler.passes.kernel_use import KernelUse
    from lrp_compiler.passes.preparation import Preparation
    from lrp_compiler.passes.rules.base import Composite, Rule
    from lrp_compiler.passes.uncovered import UncoveredOp

FACTS = "lrp"

TRACING = threading.RLock()
"""Held while torch.export has put stand-ins in place of a model's parameters, and by whoever reads those live."""
COMPILING = threading.RLock()
"""One thread compiles at a time: torch's tracing keeps state of the whole process."""


class InputKind(enum.Enum):
    """Where the value of a graph input comes from at call time.

    Rows, the numbers of those that seeds start at, are known before the forward pass or, late, behind it.
    """

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    USER = "user"
    ROWS = "rows"
    LATE_ROWS = "late_rows"


@dataclass(frozen=True)
class InputSpec:
    """One placeholder of the captured graph: its node name, kind and live name (or the constant itself)."""

    node: str
    kind: InputKind
    target: str
    constant: torch.Tensor | None = None


@dataclass(frozen=True)
class Pattern:
    """A recognised group of ops that acts as one op: its kind, the nodes it reads and the rest of its data.

    ``form`` is what else the rule of this kind has to know (hashable), ``numbers`` what the op takes beside tensors.
    ``exact_differences`` says whether its rule for differences from a reference run is exact; where it is not, such
    composites see the ops.
    """

    kind: str
    inputs: tuple[str, ...]
    saved: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    form: object = None
    numbers: tuple[tuple[str, float], ...] = ()
    exact_differences: bool = True


@dataclass(frozen=True)
class Structure:
    """A group of ops known for what it is that hides no op from the rules: its kind and which node plays which role.

    Its facts stand at the node that ends it; ``members`` are the others. ``form`` is what else there is to know.
    """

    kind: str
    roles: tuple[tuple[str, str], ...]
    members: tuple[str, ...] = ()
    form: object = None

    def named(self, role: str) -> str:
        """The name of the node in a role; KeyError for none."""
        return dict(self.roles)[role]


@dataclass(frozen=True)
class Facts:
    """What the passes know of a node; kept in ``node.meta['lrp']`` and replaced, never changed.

    ``origin`` names the op that a relevance op belongs to, and of a graph input the live parameter behind it.
    ``explained_by`` names the op that hands relevance on in place of this one: of the same value, but fewer rows;
    ``rows_of`` the op of the model that this one is, or takes from, on fewer rows.

    A value that ``varies`` may be another one in the reference run, the forward pass on baseline inputs.
    """

    part: Literal["forward", "seed", "relevance", "promise", "reference", "cast", "prepared"] = "forward"
    live: bool = False
    flows: bool = False
    varies: bool = False
    non_negative: bool = False
    pattern: Pattern | None = None
    structures: tuple[Structure, ...] = ()
    rule: Rule | None = None
    origin: str = ""
    explained_by: str = ""
    rows_of: str = ""


def model_op(node: fx.Node) -> str:
    """The name of the op of the model that ``node`` is, perhaps on fewer rows."""
    return facts(node).rows_of or node.name


def facts(node: fx.Node) -> Facts:
    """The facts of ``node`` (defaults when no pass has said anything yet)."""
    found = node.meta.get(FACTS)
    return found if isinstance(found, Facts) else Facts()


def learn(node: fx.Node, **news: Any) -> None:
    """Replace some of the facts of ``node``."""
    node.meta[FACTS] = replace(facts(node), **news)


def structure_of(node: fx.Node, kind: str) -> Structure | None:
    """The structure of this kind that ends at ``node``."""
    return next((structure for structure in facts(node).structures if structure.kind == kind), None)


@dataclass(frozen=True)
class Mutation:
    """A graph input that the model changes in place, and the node that holds its value afterwards."""

    input: str
    value: str


@dataclass(frozen=True)
class Pin:
    """A graph input whose values were read out and made part of the graph: it is for calls with these values only."""

    input: str
    value: torch.Tensor


@dataclass(frozen=True)
class Cast:
    """A further input of the relevance graph: the parameter that the graph input ``of`` holds, in another dtype."""

    name: str
    of: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Conversion:
    """Where an edge changes its kind: at the output of ``node``, ``to`` the kind that the node's rule takes."""

    node: str
    to: Literal["coefficient", "relevance"]

    def __str__(self) -> str:
        return f"{self.node} -> {self.to}"


@dataclass(frozen=True)
class Program:
    """A graph on its way through the pipeline; passes return a new one and leave theirs untouched.

    ``sources`` maps each attributed user input to the nodes where its relevance is read: itself, or the embeddings
    it indexes. ``varied`` names the user inputs that have another value in the reference run. ``uncovered`` lists the
    live ops without a rule, where that was asked for; such a program cannot be emitted.
    ``outputs`` holds, per leaf of the model's output tree, a node name or the constant itself; ``seeded`` the node
    where the seed of an output starts, by leaf, if that is another one; ``kept`` the nodes that are recorded beside
    what the relevance graph reads. ``root`` owns the sub-graphs of higher-order ops until ``canonicalise`` has inlined
    them. ``kernels`` says what ``fuse`` made of what a kernel might compute; ``casts`` the parameters that relevance
    reads in a narrower dtype. After ``partition`` ``graph`` is the forward graph and ``relevance_graph`` the other
    half; ``prepare_weights`` gives both further inputs, ``prepared_forward`` and ``prepared_relevance``, and keeps
    the program without them as ``plain``. ``traces`` caches traced functions by signature and is shared by all programs
    that come from one capture.
    """

    graph: fx.Graph
    root: torch.nn.Module
    fake_mode: FakeTensorMode
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str | Constant, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    mutations: tuple[Mutation, ...] = ()
    pins: tuple[Pin, ...] = ()
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributed: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    composite: Composite | None = None
    uncovered: tuple[UncoveredOp, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    results: tuple[Result, ...] = ()
    seeds: tuple[int, ...] = ()
    seeded: dict[int, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    memory: MemoryPlan | None = None
    kernels: tuple[KernelUse, ...] = ()
    casts: tuple[Cast, ...] = ()
    relevance_graph: fx.Graph | None = None
    prepared_forward: tuple[Preparation, ...] = ()
    prepared_relevance: tuple[Preparation, ...] = ()
    plain: Program | None = None
    traces: dict[object, fx.GraphModule] = field(default_factory=dict, compare=False, repr=False)

    def nodes_by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def fork(self, **changes: Any) -> Program:
        """A copy whose graph may be rewritten without touching this program; node names are kept."""
        return replace(self, graph=copy_graph(self.graph), **changes)

    def having(self, **changes: Any) -> Program:
        """This program with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Constant:
    """An output leaf that is not a tensor of the graph (None, a number, a size, a string)."""

    value: Any


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A graph with the same nodes, names and metadata."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for old in source.nodes:
        # Arguments afterwards: create_node looks for symbolic sizes among them, in python.
        new = values[old] = graph.create_node(old.op, old.target, name=old.name, type_expr=old.type)
        if new.name != old.name:
            raise AssertionError(f"copying renamed {old.name} to {new.name}")
        new.args, new.kwargs = map_arg(old.args, values.__getitem__), map_arg(old.kwargs, values.__getitem__)
        new.meta = dict(old.meta)
    return graph


def value_of(node: fx.Node) -> Any:
    """The fake value of ``node``: a FakeTensor, or a tuple of them for multi-output ops."""
    return node.meta["val"]


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a single-output node."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor but {type(value).__name__}")
    return value


def is_float(value: object) -> bool:
    """Whether ``value`` is a tensor that can carry relevance (floating or complex)."""
    return isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def is_complex(node: fx.Node) -> bool:
    """Whether ``node`` holds complex numbers."""
    return any(
        isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(node.meta.get("val"))
    )


def first_argument(node: fx.Node) -> fx.Node:
    """The node that ``node`` takes as its first argument."""
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise TypeError(f"the first argument of {node.name} is {first!r}, not a node")
    return first


def carries_float(node: fx.Node) -> bool:
    """Whether ``node`` holds a float tensor, or a tuple with one."""
    value = node.meta.get("val")
    # Every pass asks this of every operand, and flattening a lone tensor costs ten times the answer.
    return is_float(value) if isinstance(value, torch.Tensor) else any(map(is_float, pytree.tree_leaves(value)))


def live_value(model: torch.nn.Module, spec: InputSpec) -> torch.Tensor:
    """The current value of a parameter, buffer or constant of the graph."""
    if spec.kind is InputKind.CONSTANT:
        assert spec.constant is not None
        return spec.constant
    *path, name = spec.target.split(".")
    for child in path:
        model = model._modules[child]  # type: ignore[assignment]
    # From where a module keeps them: while another thread traces, torch looks into every access of an attribute.
    for kept in (model._parameters, model._buffers):
        if name in kept:
            return kept[name]  # type: ignore[return-value]
    value: torch.Tensor = getattr(model, name)
    return value


def graph_inputs(program: Program, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the graph's placeholders for one call."""
    leaves = iter(pytree.tree_leaves((args, kwargs)))
    with TRACING:
        return [next(leaves) if spec.kind is InputKind.USER else live_value(model, spec) for spec in program.inputs]


def forward_nodes(program: Program) -> Iterator[fx.Node]:
    """The nodes that compute the model itself, in order."""
    for node in program.graph.nodes:
        if node.op != "output" and facts(node).part == "forward":
            yield node


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    return last


def return_values(program: Program) -> None:
    """Make the graph return its output leaves that are tensors, then the mutated values."""
    nodes = program.nodes_by_name()
    names = [leaf for leaf in program.outputs if not isinstance(leaf, Constant)]
    names += [mutation.value for mutation in program.mutations]
    output_node(program.graph).args = (tuple(nodes[name] for name in names),)


def module_path(node: fx.Node) -> str:
    """The path of the innermost submodule whose call made ``node`` ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(list(stack.values())[-1][0])
