"""capture: a module and one call of it -> an ATen-level graph whose parameters are looked up live by name."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import ConstantArgument
from torch.export.graph_signature import InputKind as ExportKind
from torch.utils import _pytree as pytree

from lrp_compiler.passes.data_dependence import refusal
from lrp_compiler.passes.eager_failure import eager_failure
from lrp_compiler.passes.errors import CaptureError, LRPError, NoTensorsError, RecurrentError
from lrp_compiler.passes.program import TRACING, Constant, InputKind, InputSpec, Program, learn
from lrp_compiler.passes.source_lines import user_source_of_trace

KINDS = {
    ExportKind.PARAMETER: InputKind.PARAMETER,
    ExportKind.BUFFER: InputKind.BUFFER,
    ExportKind.CONSTANT_TENSOR: InputKind.CONSTANT,
    ExportKind.USER_INPUT: InputKind.USER,
}


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: frozenset[tuple[int, int]] = frozenset()
) -> Program:
    """Trace one call of ``model`` with torch.export (non-strict, training IR).

    ``dynamic`` holds pairs (argument leaf, dimension) whose size may differ from call to call.

    Raises CaptureError, with the user's source line, when the call cannot be traced; DataDependentError when that is
    because python decides by a tensor's value, RecurrentError when it is because of a packed sequence. What fails
    without tracing, too, raises the model's own error, or UnsupportedArgumentError or UnsupportedOutputError for what
    cannot pass in or out.
    """
    args, kwargs = _distinct(args, kwargs)
    static_branches = contextlib.nullcontext() if dynamic else _with_static_branches(model)
    with TRACING, _quiet(), _traceable_configs(model), _without_attention_fastpath(), static_branches:
        try:
            shapes = _dynamic(args, kwargs, dynamic)
            exported = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
        except Exception as error:
            refused = _refusal(error, type(model).__name__)
            if refused is None and (own := eager_failure(model, args, kwargs)) is not None:
                raise own from None
            raise (refused or _untraceable(error, type(model).__name__)) from error
    graph_module = exported.graph_module
    inputs = tuple(_input_spec(spec, exported.constants) for spec in exported.graph_signature.input_specs)
    placeholders = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    for node, spec in zip(placeholders, inputs, strict=True):
        learn(node, origin=spec.target)
    return Program(
        graph=graph_module.graph,
        root=graph_module,
        fake_mode=_fake_mode(graph_module.graph, type(model).__name__),
        inputs=inputs,
        outputs=_outputs(exported),
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
    )


def _refusal(error: Exception, name: str) -> LRPError | None:
    """What a failed trace says of the model ``name``, where it is one of the known things."""
    if (module := _reader_of_packed_sequence(error)) is not None:
        return RecurrentError(
            op=module,
            cause="the sizes of a packed sequence depend on its values",
            remedy="Pass samples one by one, or padded batches to modules that read forward only.",
            source=_blame(error),
        )
    return refusal(name, error, _blame(error))


def _untraceable(error: Exception, name: str) -> CaptureError:
    """The refusal of a model ``name`` that runs and cannot be traced, with the first line of torch's message."""
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return CaptureError(model=name, cause=f"{type(error).__name__}: {cause[0]}", source=_blame(error))


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with every tensor an object of its own: one passed twice would get one placeholder."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    seen: set[int] = set()
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in seen:
                leaves[index] = leaf.detach().clone(memory_format=torch.preserve_format)
            seen.add(id(leaf))
    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, tree)
    return distinct


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: frozenset[tuple[int, int]]) -> Any:
    """What torch.export is to leave open: it may still settle on a size that the forward depends on."""
    if not dynamic:
        return None
    leaves = pytree.tree_leaves((args, kwargs))
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in {leaf for leaf, _ in dynamic}:
        shapes[leaves[leaf]] = {dim: torch.export.Dim.AUTO for at, dim in dynamic if at == leaf}
    return shapes


def _input_spec(spec: Any, constants: dict[str, Any]) -> InputSpec:
    kind = KINDS.get(spec.kind)
    if kind is None:
        raise CaptureError(model="the model", cause=f"input {spec.arg.name} of kind {spec.kind.name} is not supported")
    constant = constants[spec.target] if kind is InputKind.CONSTANT else None
    return InputSpec(node=spec.arg.name, kind=kind, target=spec.target or spec.arg.name, constant=constant)


def _outputs(exported: Any) -> tuple[str | Constant, ...]:
    leaves: list[str | Constant] = []
    for spec in exported.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(Constant(spec.arg.value))
        else:
            leaves.append(spec.arg.name)
    return tuple(leaves)


def _fake_mode(graph: fx.Graph, model: str) -> Any:
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            mode = getattr(leaf, "fake_mode", None)
            if mode is not None:
                return mode
    raise NoTensorsError(model=model)


def _blame(error: BaseException) -> str | None:
    """The user's line that could not be traced: from the error's own stack, else from the traceback."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f'File "{trace.tb_frame.f_code.co_filename}", line {trace.tb_lineno}, in x')
        trace = trace.tb_next
    inside = [frame for frame in frames if "/torch/" not in frame and "lrp_compiler/passes/" not in frame]
    return _with_code(user_source_of_trace("\n".join(inside))) if inside else None


def _reader_of_packed_sequence(error: BaseException) -> str | None:
    """The recurrent module that failed to trace on a packed sequence, if that is what failed."""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.RNNBase) and trace.tb_frame.f_locals.get("batch_sizes") is not None:
            return type(module).__name__
        trace = trace.tb_next
    return None


def _with_code(place: str | None) -> str | None:
    """``file:line`` with the text of that line."""
    if place is None:
        return None
    path, _, line = place.split(" ")[0].rpartition(":")
    with contextlib.suppress(OSError, IndexError), open(path, encoding="utf-8") as file:
        return f"{path}:{line} {file.read().splitlines()[int(line) - 1].strip()}"
    return place


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing the graph of a failed trace; its error is reported by ours."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


TRACEABLE: dict[str, dict[Any, Any]] = {
    # Decoders return a cache object that is no tree of tensors; an explanation needs none.
    "use_cache": {True: False},
    # A loop over the experts that were chosen depends on values; products by groups are the same without it.
    "_experts_implementation_internal": {"eager": "grouped_mm", None: "grouped_mm"},
}
"""Settings of a Hugging Face config -> what to trace with in place of some of their values."""


@contextlib.contextmanager
def _traceable_configs(model: nn.Module) -> Iterator[None]:
    """Change settings that keep a model from being traced, for the time being."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (config, setting, value)
        for config in configs.values()
        for setting, others in TRACEABLE.items()
        if isinstance(value := getattr(config, setting, ...), (bool, str, NoneType)) and value in others
    ]
    for config, setting, value in before:
        setattr(config, setting, TRACEABLE[setting][value])
    try:
        yield
    finally:
        for config, setting, value in before:
            setattr(config, setting, value)


@contextlib.contextmanager
def _with_static_branches(model: nn.Module) -> Iterator[None]:
    """Inside torch.export torch.cond takes sizes for variables, and then refuses convolutions without padding."""

    def keep_sizes(*_: Any) -> None:
        # Export puts its own settings in place before it calls the model, and the user's back afterwards.
        torch._dynamo.config.assume_static_by_default = True

    handle = model.register_forward_pre_hook(keep_sizes)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _without_attention_fastpath() -> Iterator[None]:
    """The fused encoder-layer path hides its ops from the trace."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
