"""State-space models: scans and products whose selective factors are held constant (RULES.md 1.8, MambaLRP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.selective_scan import SELECTIVE_SCAN_TRANSPOSE
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.recognise_scan import ScanForm
from lrp_compiler.passes.rules.base import Edges, Rule
from lrp_compiler.passes.site import Site
from lrp_compiler.passes.straight_line import OverTime, over_time


def time_first(value: Tensor, way: OverTime) -> Tensor:
    """``value`` with time in front, a kept dimension of size 1 in its place."""
    assert way.dim is not None
    return (value.unsqueeze(way.dim + 1) if way.keep else value).movedim(way.dim, 0)


def of_rank(value: Tensor, rank: int) -> Tensor:
    """``value`` (T, ...) with dimensions of size 1 behind time, up to ``rank``."""
    return value.reshape(value.shape[0], *([1] * (rank - value.dim())), *value.shape[1:])


def scan_pullback(
    c: Tensor, decay: Tensor, write: Tensor | None, reads: list[Tensor], form: ScanForm, shape: tuple[int, ...]
) -> Tensor:
    """Coefficients of the signal (``shape``) from those of the readouts, everything else held constant."""
    given = c.movedim(form.dim, 0)
    given = given if form.stacked else given.unsqueeze(form.dim + 1)

    def to_state(c_t: Tensor, *slices: Tensor) -> Tensor:
        nothing = c_t.new_zeros(form.state, dtype=form.dtype)
        _, pull, *_ = torch.func.vjp(lambda state: form.readout(state, *slices), nothing)
        (made,) = pull(c_t)
        result: Tensor = made
        return result

    ways = (OverTime(0), *form.reads)
    states = over_time(to_state, ways, [given, *reads], form.steps)
    rank = states.dim()
    decays = of_rank(over_time(form.decay_line, (form.decay,), [decay], form.steps), rank)
    template = time_first(c.new_empty(1).expand(shape), form.signal)
    weights = None if write is None else _weights(write, form, len(shape))
    made: Tensor = SELECTIVE_SCAN_TRANSPOSE.op(states, decays, weights, list(template.shape))
    assert form.signal.dim is not None
    back = made.movedim(0, form.signal.dim)
    return back.squeeze(form.signal.dim + 1) if form.signal.keep else back


def _weights(write: Tensor, form: ScanForm, rank: int) -> Tensor:
    """The factor of the signal at every step: (T, ...) of the state's rank."""
    assert form.signal.dim is not None
    full = write.reshape([1] * (rank - write.dim()) + list(write.shape))
    sizes = [form.steps if dim == form.signal.dim else -1 for dim in range(rank)]
    return time_first(full.expand(sizes), form.signal)


@dataclass(frozen=True)
class SelectiveScan(Rule):
    """lambda_t = C_t c_t + a_{t+1} lambda_{t+1}, c_u = B lambda: all but the signal constant (Jafari et al. 2024)."""

    name: ClassVar[str] = "selective_scan"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument == 0)

    def propagate(self, site: Site, edge: Any) -> Edges:
        pattern = site.op.pattern
        assert pattern is not None and isinstance(pattern.form, ScanForm)
        form, (signal, decay, *rest) = pattern.form, site.op.args
        write, reads = (rest[0], rest[1:]) if form.writes else (None, rest)
        shape = tuple(tensor_of(signal).shape)
        made = site.emit(scan_pullback, edge, decay, write, reads, form, shape, autograd=True)
        return dict.fromkeys(self.receivers(site.op), made)


@dataclass(frozen=True)
class SignalTakesAll(Rule):
    """Everything to the factor that carries the signal; the weight it meets is a constant (P3)."""

    name: ClassVar[str] = "signal_takes_all"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        assert op.pattern is not None
        return tuple(operand for operand in op.flowing if operand.node.name == op.pattern.inputs[0])

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(edge, self.receivers(site.op))
