"""The ledger: per op, the relevance it was given, what it handed on and what left the graph in named sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_compiler.passes.errors import LedgerError, NonFiniteError
from lrp_compiler.passes.program import Program
from lrp_compiler.passes.request import Result

ROUNDING_STEPS = 4096
"""Rounding errors of one op, in units of eps times its total magnitude, that still count as closed."""


@dataclass(frozen=True)
class LedgerRow:
    """One op: relevance ``given`` at its output, ``taken`` by each operand, ``sinks`` by name; sums over all elements.

    ``gap`` is what is missing, ``magnitude`` the largest sum of absolute values among those three, which it should be
    judged against.
    """

    op: str
    rule: str
    given: float
    taken: dict[str, float]
    sinks: dict[str, float]
    magnitude: float

    @property
    def gap(self) -> float:
        return self.given - sum(self.taken.values()) - sum(self.sinks.values())

    @property
    def relative_gap(self) -> float:
        return abs(self.gap) / self.magnitude if self.magnitude else 0.0


@dataclass(frozen=True)
class Ledger:
    """All rows in the order relevance visits them, and the three totals: seed = inputs + sinks."""

    rows: tuple[LedgerRow, ...]
    seed: float
    inputs: float
    dtype: torch.dtype
    conserves: bool

    @property
    def sinks(self) -> float:
        return sum(sum(row.sinks.values()) for row in self.rows)

    @property
    def gap(self) -> float:
        return self.seed - self.inputs - self.sinks

    def sink_totals(self) -> dict[str, float]:
        """The sum of each kind of sink."""
        totals: dict[str, float] = {}
        for row in self.rows:
            for kind, value in row.sinks.items():
                totals[kind] = totals.get(kind, 0.0) + value
        return totals

    def check(self, tolerance: float | None = None) -> None:
        """Raise LedgerError naming the first op whose gap exceeds ``tolerance`` (relative to its magnitude).

        NonFiniteError where relevance is nan or inf.
        """
        allowed = ROUNDING_STEPS * torch.finfo(self.dtype).eps if tolerance is None else tolerance
        for row in self.rows:
            if not math.isfinite(row.given):
                raise NonFiniteError(op=row.op, given=row.given)
            if not row.relative_gap <= allowed:
                taken = sum(row.taken.values()) + sum(row.sinks.values())
                raise LedgerError(op=row.op, rule=row.rule, given=row.given, taken=taken, gap=row.gap)

    def __str__(self) -> str:
        lines = [f"{'op':<36} {'rule':<20} {'given':>12} {'handed on':>12} {'sinks':>12} {'gap':>10}"]
        for row in self.rows:
            taken, sunk = sum(row.taken.values()), sum(row.sinks.values())
            lines.append(
                f"{row.op:<36} {row.rule:<20} {row.given:>12.5g} {taken:>12.5g} {sunk:>12.5g} {row.gap:>10.2g}"
            )
        sinks = ", ".join(f"{kind} {value:.5g}" for kind, value in self.sink_totals().items()) or "none"
        lines.append(f"seed {self.seed:.6g} = inputs {self.inputs:.6g} + sinks {self.sinks:.6g} ({sinks})")
        lines.append(f"gap {self.gap:.3g}")
        return "\n".join(lines)


def ledger_from_results(
    program: Program, results: list[tuple[Result, Tensor]], seed: float, dtype: torch.dtype
) -> Ledger:
    """Assemble the rows from the labelled results of a relevance graph that was asked for a ledger."""
    given: dict[str, list[float]] = {}
    rules: dict[str, str] = {}
    taken: dict[str, dict[str, float]] = {}
    sinks: dict[str, dict[str, float]] = {}
    magnitude: dict[str, float] = {}
    sources = {name for found in program.sources.values() for name in found}
    inputs = 0.0
    for result, value in results:
        if result.kind == "given":
            given.setdefault(result.site, []).append(value[0].item())
            rules[result.site] = result.detail
        elif result.kind == "taken":
            row = taken.setdefault(result.site, {})
            row[result.detail] = row.get(result.detail, 0.0) + value[0].item()
            inputs += value[0].item() if result.detail in sources else 0.0
        elif result.kind == "sink":
            sinks.setdefault(result.site, {})[result.detail] = value.double().sum().item()
        size = value.double().abs().sum() if result.kind == "sink" else value[1]
        magnitude[result.site] = max(magnitude.get(result.site, 0.0), size.item())
    rows = tuple(
        LedgerRow(op, rules[op], sum(values), taken.get(op, {}), sinks.get(op, {}), magnitude[op])
        for op, values in given.items()
    )
    composite = program.composite
    return Ledger(rows, seed, inputs, dtype, conserves=composite is not None and composite.conserves)
