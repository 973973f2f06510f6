"""What a refusal says of an op without a rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UncoveredOp:
    """A live op without a rule: its op's name, node, module path, user's source line, and why it has none."""

    op: str
    node: str
    module: str
    source: str | None
    why: str

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        place = self.module or "(the model itself)"
        return f"{self.op}{why} as {self.node} in {place}: {self.source or 'unknown line'}"
