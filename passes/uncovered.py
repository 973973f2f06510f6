"""Ops without a rule, and the refusal that lists them."""

from __future__ import annotations

from dataclasses import dataclass

from lrp_compiler.passes.errors import LRPError


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


class UncoveredOpsError(LRPError):
    """``rows`` holds what the message lists."""

    id = "LRP003"
    template = "{count} operation(s) on the path of relevance have no rule in composite '{composite}':\n{table}"
    hint = (
        "Give each one a rule: @lrp_compiler.register_rule({example}) on a function"
        " (c, out, *args) -> coefficients of the inputs, or pass rules={{op: function}} to compile_for_lrp."
    )

    def __init__(self, *, rows: tuple[UncoveredOp, ...], composite: str, example: str) -> None:
        self.rows = rows
        table = "\n".join(f"  {row}" for row in rows)
        super().__init__(count=len(rows), composite=composite, table=table, example=example)
