"""LRPModule: the drop-in module that explains itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from lrp_compiler.baselines import Baseline, Baselines, by_input_name, named_inputs, reference_inputs
from lrp_compiler.captured_call import BoundCall
from lrp_compiler.captures import Captures, Compilation
from lrp_compiler.compiled import Compiler, ExplainedCall
from lrp_compiler.coverage import Coverage, measure_coverage
from lrp_compiler.forward_pass import output_of
from lrp_compiler.forward_requests import default_request, one_row, prepared_for_rows
from lrp_compiler.measured_error import measured_error
from lrp_compiler.options import Options
from lrp_compiler.passes.errors import ArgumentError, HookError, LRPError, UnknownInputError
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.request import Request
from lrp_compiler.passes.rules.base import Composite
from lrp_compiler.passes.transforms import is_transforming
from lrp_compiler.questions import Asked, How
from lrp_compiler.repeated import RepeatedAttributions
from lrp_compiler.report import Report, make_report, measured_conservation
from lrp_compiler.seeds import Predicted, Target, reads_output
from lrp_compiler.sites import Names, name_list
from lrp_compiler.tape import Tape
from lrp_compiler.weightless import require_values


class LRPModule(nn.Module):
    """A model's drop-in: same outputs, parameters, state and submodules, and relevance for any of its values.

    It shares the original's parameters, buffers and children, so training either trains both. Each kind of call
    (shapes, dtypes, training flags, autocast) is compiled at its first use; modules with the same ``captures`` trace it
    once.

    While modules of the original have hooks of the user's, and under torch.compile and transforms of torch.func, a call
    runs the original itself, and with it the hooks; ``run`` and what builds on it refuse hooks (HookError), and to be
    compiled under a transform (TransformError). Hooks on parameters always run.
    """

    _model: nn.Module
    _composite: str | Composite
    _options: Options
    _compiler: Compiler
    _repeated: RepeatedAttributions

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite = "auto",
        options: Options | None = None,
        captures: Captures | None = None,
    ) -> None:
        super().__init__()
        # Into __dict__, so that the original does not become a child and its state keeps its names.
        self.__dict__["_model"] = model
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["_composite"] = composite
        self.__dict__["_options"] = options or Options()
        self.__dict__["_compiler"] = Compiler(composite, self._options, captures)
        self.__dict__["_repeated"] = RepeatedAttributions(self._compiler.captures.weights)

    @property
    def training(self) -> bool:
        """The original's training flag."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in self.__dict__:
            self._model.training = mode

    @property
    def compiler(self) -> Compiler:
        """What compiles this module's calls and keeps them."""
        return self._compiler

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """Every tracing of the model so far: for which shapes, in which form and why."""
        return tuple(self._compiler.captures.history)

    @property
    def options(self) -> Options:
        """The options it was compiled with."""
        return self._options

    @property
    def original(self) -> nn.Module:
        """The module this one explains."""
        return self._model

    def with_options(self, options: Options, model: nn.Module | None = None) -> LRPModule:
        """The same composite under other options, for this model or a copy of it."""
        if model is None:
            return LRPModule(self._model, self._composite, options, self._compiler.captures)
        return LRPModule(model, self._composite, options)

    def train(self, mode: bool = True) -> LRPModule:
        self._model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LRPModule:
        self._model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LRPModule:
        return LRPModule(copy.deepcopy(self._model, memo), self._composite, self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return (LRPModule, (self._model, self._composite, self._options))

    def extra_repr(self) -> str:
        name = self._composite if isinstance(self._composite, str) else self._composite.name
        return f"{type(self._model).__name__} explained by {name!r}"

    # Its own, since torch puts another one into nn.Module while any thread traces.
    __call__: Callable[..., Any] = nn.Module.__call__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, of the same type and bitwise equal, differentiable as ever."""
        if is_transforming() or (torch.compiler.is_compiling() and _is_traced()):
            return self._model(*args, **kwargs)
        kwargs = dict(sorted(kwargs.items()))
        try:
            call = self._compiler.bound(self._model, args, kwargs)
        except HookError:
            return self._model(*args, **kwargs)
        return output_of(call)

    def run(
        self,
        *args: Any,
        at: Names = None,
        wrt: str | list[str] | tuple[str, ...] | None = None,
        baselines: Baselines = None,
        outputs: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Tape]:
        """One forward pass of ``model(*args, **kwargs)``, kept: ``(output, tape)``.

        ``at`` names the sites that will be asked for (others work too, at the price of a second forward pass);
        ``wrt`` names the attributed inputs, None meaning every float input and every token input.

        Without ``outputs`` the first is None, and the pass runs with the first question, for the rows alone that this
        one needs: cheaper where a target is one token or class. A second question runs all of it.

        ``baselines`` are the inputs of the reference run that ``deep_lift`` explains the difference from: a number or
        a tensor that broadcasts to the attributed input, or a dict of those by input name; None is zeros. Token ids
        need ids. Inputs that are neither attributed nor named keep their value. The reference run repeats this run's
        random numbers and updates no buffers. Raises BaselineError, and NoValuesError for meta and fake tensors.
        """
        call = self._compiler.bound(self._model, args, dict(sorted(kwargs.items())))
        tape = self._opened(call, at, wrt, baselines, keeps_outputs=outputs)
        return (tape.record() if outputs else None), tape

    def _opened(
        self,
        call: BoundCall,
        at: Names,
        wrt: Names,
        baselines: Baselines,
        *,
        keeps_outputs: bool = True,
        once: bool = False,
    ) -> Tape:
        """The tape of one call before its forward pass; one for ``once`` gives values up while it answers."""

        def usual(call: BoundCall, explained: ExplainedCall) -> Request:
            request = default_request(explained, at, self._options)
            if not keeps_outputs:
                return one_row(explained.program, request)
            return prepared_for_rows(self._compiler, explained, request)

        call, explained, request = self._prepared(call, wrt, named_inputs(baselines), usual)
        whole = request if keeps_outputs else default_request(explained, at, self._options)
        return self._tape(call, explained, whole, baselines, once)

    def _tape(
        self, call: BoundCall, explained: ExplainedCall, request: Request, baselines: Baselines, once: bool
    ) -> Tape:
        inputs = call.inputs()
        # Behind the call's own stand the tensors of rules.
        inputs += [spec.constant for spec in explained.program.inputs[len(inputs) :]]
        if not call.has_values:
            require_values(explained.program, inputs)
        reference = reference_inputs(explained.program, inputs, baselines)
        tape = Tape(self._model, self._compiler, explained, request, once)
        tape.open(inputs, reference)
        return tape

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baseline | tuple[Baseline, ...] = None,
        forward_kwargs: dict[str, Any] | None = None,
        output: str | None = None,
        per_dimension: bool = False,
        return_convergence_delta: bool = False,
        create_graph: bool = False,
    ) -> Any:
        """Relevance of ``inputs`` for ``target``, with Captum's signature and result layout.

        Calls ``model(*inputs, *additional_forward_args, **forward_kwargs)`` and attributes ``inputs`` alone. A
        tensor gives a tensor, a tuple a tuple, each of its input's shape; token ids give (batch, tokens), or with
        ``per_dimension`` (batch, tokens, dim). ``return_convergence_delta`` adds, per sample, the seeded output
        minus the sum of all attributions; with ``deep_lift`` the seeded output's difference from that of the
        reference run on ``baselines`` (one for each of ``inputs``, as in ``run``). With ``create_graph`` results can
        be differentiated, see ``Tape``. Raises what ``run`` and ``Tape.relevance`` raise.
        """
        single = isinstance(inputs, Tensor)
        given: tuple[Any, ...] = (inputs,) if isinstance(inputs, Tensor) else _attributable(inputs)
        count = 1 if single else len(pytree.tree_leaves(given))
        extra = additional_forward_args
        more = () if extra is None else tuple(extra) if isinstance(extra, (tuple, list)) else (extra,)
        args, kwargs = (*given, *more), dict(sorted((forward_kwargs or {}).items()))
        with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
            call = self._compiler.bound(self._model, args, kwargs)
            once = not (return_convergence_delta or create_graph or self._options.verify != "off")
            how = How(output, per_dimension, create_graph)
            if once and not reads_output(target):
                attributions = self._attributed(call, count, baselines, target, how)
            else:
                names = call.captured.arguments[:count]
                tape = self._opened(call, None, names, by_input_name(baselines, names), once=once)
                tape.record()
                found = tape.answered(tape.asked(target, names, tape.readout, how))
                attributions = tuple(found[name] for name in names)
            result = attributions[0] if single else attributions
            if not return_convergence_delta:
                return result
            seeded = tape.seeded_output(target, output, create_graph=create_graph)
            return result, seeded - sum(a.flatten(1).sum(1) for a in attributions)

    def _attributed(self, call: BoundCall, count: int, baselines: Any, target: Target, how: How) -> tuple[Tensor, ...]:
        """Relevance of the first arguments for a target that does not look at outputs, which then need not be made."""
        repeated = self._repeated.answer(call, (count, how), target) if baselines is None else None
        if repeated is not None:
            return repeated
        names = call.captured.arguments[:count]
        references = by_input_name(baselines, names)
        asked: list[tuple[Tape, Asked]] = []

        def ask(call: BoundCall, explained: ExplainedCall) -> Request:
            whole = default_request(explained, None, self._options)
            tape = self._tape(call, explained, whole, references, once=True)
            asked.append((tape, tape.asked(target, names, tape.readout, how)))
            return asked[-1][1].question.request

        call, explained, _ = self._prepared(call, names, named_inputs(references), ask)
        tape, question = asked.pop()
        self._repeated.learn(call, (count, how), explained, question, names)
        found = tape.answered(question)
        return tuple(found[name] for name in names)

    def report(
        self, *args: Any, wrt: Names = None, target: Target = None, measure_error: bool = False, **kwargs: Any
    ) -> Report:
        """What the compiler made of this kind of call: coverage, rules, promises, buffers, timings, sites.

        Buffers and memory are those of ``attribute`` for one class or token, where only what that needs is computed.
        How far relevance is conserved is measured for ``target``, and for a composite that does not claim to conserve
        also without one, at each sample's largest output; with ``measure_error``, so is the error of relevance against
        a copy of the model in float64 (``MeasuredError``). A model on the meta device or of fake tensors is compiled
        as any other, so that a full-size network needs no memory; nothing is measured of it.
        """
        call, explained, request = self._usual(args, kwargs, wrt)
        stages, executable = self._compiler.emitted(explained, request)
        attribution = self._compiler.emitted(explained, one_row(explained.program, request))[1]
        assert explained.program.composite is not None
        conservation = None
        asked = target is not None or not explained.program.composite.conserves
        if asked and call.has_values:
            with torch.no_grad():
                _, tape = self.run(*args, wrt=wrt, **kwargs)
            conservation = measured_conservation(tape.ledger(Predicted() if target is None else target))
        name = type(self._model).__name__
        ran = self._compiler.executables(call.captured)
        made = make_report(name, stages, executable, attribution, explained, conservation, self.compilations, ran)
        return replace(made, error=measured_error(self, args, kwargs, wrt, target)) if measure_error else made

    def coverage(self, *args: Any, wrt: Names = None, **kwargs: Any) -> Coverage:
        """What becomes of every op of this kind of call, also of one that cannot be explained.

        Ops without a rule and whatever else is refused are rows of the result. Raises UnknownInputError, and what
        the model itself raises.
        """
        stages: tuple[Stage, ...] = ()
        name = type(self._model).__name__
        attributed = _as_names(wrt)
        try:
            call = self._compiler.call(self._model, args, dict(sorted(kwargs.items())))
            stages = call.stages
            stages = self._compiler.explain_partly(call, attributed)
            if stages[-1].program.uncovered:
                return measure_coverage(name, stages)
            explained = self._compiler.explain(call, attributed)
            stages, executable = self._compiler.emitted(explained, default_request(explained, None, self._options))
        except UnknownInputError:
            raise
        except LRPError as error:
            return measure_coverage(name, stages, [error])
        return measure_coverage(name, stages, codegen=executable.milliseconds)

    def stages(self, *args: Any, wrt: Names = None, **kwargs: Any) -> tuple[Stage, ...]:
        """Every pass's output for this kind of call; ``str(stage)`` is a Python program."""
        return self._compiler.emitted(*self._usual(args, kwargs, wrt)[1:])[0]

    def _prepared(
        self,
        call: BoundCall,
        wrt: Names,
        varied: tuple[str, ...],
        ask: Callable[[BoundCall, ExplainedCall], Request],
    ) -> tuple[BoundCall, ExplainedCall, Request]:
        """The compiled form of a call and the request that ``ask`` makes of it, with code that holds for its sizes."""
        attributed = _as_names(wrt)
        while True:
            captured = call.captured
            try:
                explained = self._compiler.explain(captured, attributed, varied)
                request = ask(call, explained)
                self._compiler.emitted(explained, request)
            except Exception as error:
                if not captured.is_symbolic:
                    raise
                # A rule that cannot do with open sizes gets a graph of this call's own.
                self._compiler.captures.close(captured, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            else:
                # Generating code may have asked more of the sizes; the call is then captured for its own.
                if captured.bound(call.given) is not None:
                    return call, explained, request
            call = self._compiler.bound(call.given.model, call.given.args, call.given.kwargs)

    def _usual(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: Names
    ) -> tuple[BoundCall, ExplainedCall, Request]:
        """The compiled form of a call and what ``run`` prepares for."""
        call = self._compiler.bound(self._model, args, dict(sorted(kwargs.items())))
        return self._prepared(call, wrt, (), lambda _, explained: default_request(explained, None, self._options))

    def explained_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: Names = None, varied: tuple[str, ...] = ()
    ) -> ExplainedCall:
        """The compiled form of ``model(*args, **kwargs)`` with rules for the inputs ``wrt``.

        The inputs ``varied`` may have other values in a reference run.
        """
        call = self._compiler.call(self._model, args, kwargs)
        return self._compiler.explain(call, _as_names(wrt), varied)


def _is_traced() -> bool:
    """Whether this thread runs under torch.compile or torch.export; torch's flag alone says that some thread does."""
    return torch.compiler.is_dynamo_compiling() or detect_fake_mode() is not None


def _as_names(names: Names) -> tuple[str, ...] | None:
    return None if names is None else tuple(name_list(names, "wrt"))


def _attributable(inputs: Any) -> tuple[Any, ...]:
    """The inputs that ``attribute`` takes as a tuple; raises ArgumentError."""
    leaves = pytree.tree_leaves(inputs) if isinstance(inputs, (tuple, list)) else []
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        cause = "it is a tensor, or a tuple of at least one"
        raise ArgumentError(function="lrp_compiler.LRPModule.attribute", name="inputs", value=inputs, cause=cause)
    return tuple(inputs)
