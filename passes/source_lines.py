"""The lines of the user's program that nodes were traced from."""

from __future__ import annotations

from torch import fx

NOT_THE_USERS = ("/torch/", '"<eval_with_key>')
"""What marks a line of a stack trace as torch's own, or as written by torch."""


def user_source(node: fx.Node) -> str | None:
    """The innermost line of the user's program that made ``node``, as ``file:line code``."""
    return user_source_of_trace(node.meta.get("stack_trace") or "")


def user_source_of_trace(stack_trace: str) -> str | None:
    """The last ``File "...", line N`` entry of a stack trace that is the user's."""
    lines = stack_trace.splitlines()
    found = None
    for number, line in enumerate(lines):
        text = line.strip()
        if text.startswith('File "') and not any(place in text for place in NOT_THE_USERS):
            path, rest = text[len('File "') :].split('", line ', 1)
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            found = f"{path}:{rest.split(',')[0]} {code}".rstrip()
    return found
