"""What the compiler recognises in a model, without code being made for it as a report needs."""

from __future__ import annotations

from typing import Any

from lrp_compiler import LRPModule
from lrp_compiler.report import recognised


def patterns_in(explained: LRPModule, *args: Any, **kwargs: Any) -> dict[str, int]:
    """How often each kind of pattern and structure is recognised in a call, as ``report`` tells it."""
    return recognised(explained.explained_call(args, dict(sorted(kwargs.items()))).program)
