"""A generated function as torch.compile makes it, at the first call of each kind, and its own code where it cannot."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrp_compiler.passes.errors import CppCompilerError
from lrp_compiler.passes.program import COMPILING

Results = tuple[Any, ...]

TRACED = "FX to symbolically trace"
"""What torch says of calls to compiled code while torch.fx traces anything in this process, in whichever thread."""


class CompiledFunction:
    """``function``, of tensors and sizes, compiled by a backend of torch.compile at the first call of each kind.

    ``seconds`` has an entry for every compilation: what the call took that asked for it. ``refusals`` are the reasons
    why a kind of call was left to the code that was compiled from. Inductor keeps on disk what it makes
    (TORCHINDUCTOR_CACHE_DIR), so that another process compiles the same code sooner.
    """

    def __init__(
        self, function: Callable[..., Results], compiler: Literal["inductor", "cudagraphs"], dynamic: bool, graphs: bool
    ) -> None:
        self.seconds: list[float] = []
        self.refusals: list[str] = []
        self._source = function
        self._compiler = compiler
        self._dynamic = dynamic
        self._graphs = graphs
        self._lowerings = 0
        self._is_compiled: dict[int, bool] = {}

    def __call__(self, arguments: Sequence[Any]) -> Results | None:
        """The results; None where the function itself has to run.

        That is where gradients are recorded, where it does not compile, and while others than compilers of this library
        trace with torch.fx. Raises CppCompilerError.
        """
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            return None
        with torch.no_grad():
            given = [_without_history(value) for value in arguments]
            # A hash, since the kinds of calls with open sizes are as many as their sizes.
            kind = hash((torch.is_inference_mode_enabled(), *map(_kind, given)))
            if kind not in self._is_compiled:
                with COMPILING:
                    return self._first(kind, given)
            return self._called(given) if self._is_compiled[kind] else None

    def _called(self, arguments: list[Any]) -> Results | None:
        """The results; None where torch.fx traces in a thread that does not wait for others here."""
        for lock in (contextlib.nullcontext(), COMPILING):
            try:
                with lock:
                    return self._owned(self._compiled(*arguments))
            except RuntimeError as error:
                # Torch has run nothing then; while it is one of ours that compiles, its lock tells when that is over.
                if TRACED not in str(error):
                    raise
        return None

    def _first(self, kind: int, arguments: list[Any]) -> Results | None:
        """The first call of a kind, which may find the code of another to serve it."""
        start, lowerings = time.perf_counter(), self._lowerings
        if self._graphs:
            _mark_weights(arguments)
        try:
            results = self._called(arguments)
        except importlib.import_module("torch._dynamo.exc").TorchDynamoException as error:
            _check_compiler(error)
            self.refusals.append(_first_line(list(_causes(error))[-1]))
            self._is_compiled[kind] = False
            return None
        if results is None:
            return None
        if self._lowerings > lowerings:
            self.seconds.append(time.perf_counter() - start)
        self._is_compiled[kind] = True
        return results

    @cached_property
    def _compiled(self) -> Callable[..., Results]:
        # Not even sizes of the captured call are open to torch.compile where the program has none.
        return torch.compile(self._source, fullgraph=True, dynamic=self._dynamic, backend=self._lowered)

    def _lowered(self, module: Any, inputs: Any) -> Any:
        """What torch.compile calls with each graph that it makes."""
        self._lowerings += 1
        backend = importlib.import_module("torch._dynamo").lookup_backend(self._compiler)
        if self._compiler == "cudagraphs":
            return backend(module, inputs)
        return backend(module, inputs, config_patches={"triton.cudagraphs": self._graphs})

    def _owned(self, results: Results) -> Results:
        """Results that the next replay of a CUDA graph does not write over."""
        if not self._graphs:
            return results
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in results)


def _without_history(value: Any) -> Any:
    """The same value to compiled code, whether the forward pass recorded gradients or not."""
    is_recorded = isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)
    return value.detach() if is_recorded else value


def _kind(value: Any) -> Any:
    """What compiled code is specialised to; the rest is the same in all calls of a program."""
    if isinstance(value, nn.Parameter):
        return value.requires_grad
    return (value.shape, value.stride()) if isinstance(value, Tensor) else value


def _mark_weights(arguments: list[Any]) -> None:
    """Have CUDA graphs read parameters where they are, as they need no copy of what stays in its place."""
    mark = importlib.import_module("torch._dynamo").mark_static_address
    for value in arguments:
        if isinstance(value, nn.Parameter):
            mark(value, guard=False)


def _check_compiler(error: BaseException) -> None:
    """Raise CppCompilerError where ``error`` comes of a C++ compiler that is missing or does not work."""
    known = importlib.import_module("torch._inductor.exc")
    for cause in _causes(error):
        if isinstance(cause, (known.InvalidCxxCompiler, known.CppCompileError)):
            raise CppCompilerError(cause=_first_line(cause)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
