"""The command line: ``lrp-compiler coverage module:factory`` says what of a model can be explained, and how."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrp_compiler.api import compile_for_lrp
from lrp_compiler.passes.errors import FactoryNotFoundError, FactoryResultError, LRPError

COVERED, UNCOVERED, USAGE = 0, 1, 2
"""Exit codes."""

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 when all ops are covered, 1 when some are not, 2 when the question was wrong."""
    arguments = _parser().parse_args(argv)
    try:
        with _importable(arguments.path):
            return _coverage(arguments)
    except LRPError as error:
        print(error, file=sys.stderr)
    except Exception:
        # The factory's or the model's own error: it has to be told apart from ops that are not covered.
        traceback.print_exc()
    return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrp-compiler", description="Explain neural networks by relevance.")
    commands = parser.add_subparsers(required=True, metavar="command")
    coverage = commands.add_parser(
        "coverage",
        help="say which ops of a model have a rule",
        description="Trace one call of a model and list every op: its rule, the edges it hands on, the forward values"
        " it reads; ops without a rule with the line that made them.",
        epilog="Exit code: 0 when every op on the path of relevance is covered, 1 when not, 2 for a wrong question.",
    )
    coverage.add_argument(
        "factory",
        metavar="module:factory",
        help="a function without arguments that returns (model, args), (model, args, kwargs) or an object with those"
        " attributes; args is a tuple, kwargs a dict",
    )
    coverage.add_argument("--composite", default="auto", help="name of a composite (default: %(default)s)")
    coverage.add_argument("--wrt", action="append", metavar="NAME", help="an attributed input; may be given repeatedly")
    coverage.add_argument("--nodes", action="store_true", help="print one line per node, too")
    coverage.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    coverage.add_argument(
        "--path", type=Path, default=Path(), metavar="DIR", help="where to import the module from (default: here)"
    )
    return parser


def _coverage(arguments: argparse.Namespace) -> int:
    """Print the coverage of the factory's call."""
    model, args, kwargs = load_call(arguments.factory)
    found = compile_for_lrp(model, arguments.composite).coverage(*args, wrt=arguments.wrt, **kwargs)
    print(found)
    if arguments.nodes:
        print(found.table())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return COVERED if found.complete else UNCOVERED


def load_call(spec: str) -> Call:
    """The model and arguments that the factory ``module:name`` returns.

    Raises FactoryNotFoundError, FactoryResultError, and what the module and the factory themselves raise.
    """
    made = _factory(spec)()
    parts = made if isinstance(made, (tuple, list)) else _attributes(made)
    if not 2 <= len(parts) <= 3:
        raise FactoryResultError(factory=spec, cause=f"it returned {_described(made)}")
    model, args, kwargs = (*parts, {})[:3]
    if not isinstance(model, nn.Module):
        raise FactoryResultError(factory=spec, cause=f"the model is {_described(model)}")
    if not isinstance(args, (tuple, list)):
        raise FactoryResultError(factory=spec, cause=f"args is {_described(args)}")
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise FactoryResultError(factory=spec, cause=f"kwargs is {_described(kwargs)}")
    return model, tuple(args), kwargs


def _factory(spec: str) -> Callable[[], Any]:
    """The function that ``module:name`` stands for."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise FactoryNotFoundError(spec=spec, cause="it is not of the form module:factory")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Another module that this one imports may be the missing one; that is the module's own error.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise FactoryNotFoundError(spec=spec, cause=f"there is no module '{error.name}'") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise FactoryNotFoundError(spec=spec, cause=f"there is no '{part}' in '{module}'")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryNotFoundError(spec=spec, cause=f"it is {_described(found)}, not a function")
    return found  # type: ignore[no-any-return]


def _attributes(made: Any) -> tuple[Any, ...]:
    """(model, args, kwargs) of an object that has them."""
    if not hasattr(made, "model") or not hasattr(made, "args"):
        return ()
    return made.model, made.args, getattr(made, "kwargs", {})


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}: ({', '.join(type(item).__name__ for item in value)})"
    return f"an object of type {type(value).__name__}"


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules in ``folder`` be imported."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
