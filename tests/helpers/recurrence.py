"""Relevance of recurrent modules restated: Arras et al. 2017 step by step, and a forward pass with detached gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-15
"""Arras' stabiliser, so small that it only keeps 0 / 0 away."""

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


def cell(module: nn.RNNBase, layer: int, direction: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(W, U, b_ih, b_hh, projection) of one direction of one layer, zeros for absent biases."""
    suffix = f"_l{layer}" + "_reverse" * direction
    w, u = getattr(module, f"weight_ih{suffix}"), getattr(module, f"weight_hh{suffix}")
    none = torch.zeros(w.shape[0]).double()
    biases = [getattr(module, f"bias_{side}{suffix}", none) for side in ("ih", "hh")]
    return w, u, biases[0], biases[1], getattr(module, f"weight_hr{suffix}", None)


def squashed(p: Tensor, kind: str) -> Tensor:
    """tanh or ReLU as a constant factor times its argument: the identity rule."""
    if kind == "rnn_relu":
        return p * (p > 0).double()
    zero = p == 0
    return p * torch.where(zero, 1, torch.tanh(p) / torch.where(zero, 1, p)).detach()


def frozen_step(kind: str, weights: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One time step in which every gate is detached."""
    w, u, b_ih, b_hh, projection = weights
    given, recurrent = x @ w.T + b_ih, h @ u.T + b_hh
    if kind == "lstm":
        i, f, p, o = (given + recurrent).chunk(4, -1)
        i, f, o = (gate.sigmoid().detach() for gate in (i, f, o))
        c = f * c + i * squashed(p, kind)
        h = o * squashed(c, kind)
        return (h if projection is None else h @ projection.T), c
    if kind == "gru":
        (r, z, n), (r_h, z_h, n_h) = given.chunk(3, -1), recurrent.chunk(3, -1)
        r, z = (r + r_h).sigmoid().detach(), (z + z_h).sigmoid().detach()
        return (1 - z) * squashed(n + r * n_h, kind) + z * h, c
    return squashed(given + recurrent, kind), c


def frozen(kind: str, module: nn.RNNBase, x: Tensor, states: list[Tensor]) -> Any:
    """What the module returns, computed with detached gates; its gradient is the relevance coefficient."""
    time, directions = int(module.batch_first and x.dim() == 3), 2 if module.bidirectional else 1
    xs, ends = x.unbind(time), []
    for layer in range(module.num_layers):
        sides = []
        for direction in range(directions):
            weights, index = cell(module, layer, direction), layer * directions + direction
            h, c, made = states[0][index], states[-1][index], []
            for one in xs[::-1] if direction else xs:
                h, c = frozen_step(kind, weights, one, h, c)
                made.append(h)
            ends.append((h, c))
            sides.append(made[::-1] if direction else made)
        xs = tuple(torch.cat(at, -1) for at in zip(*sides, strict=True))
    h_n, c_n = (torch.stack(side) for side in zip(*ends, strict=True))
    return torch.stack(xs, time), (h_n, c_n) if kind == "lstm" else h_n


def start(module: nn.RNNBase, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Random initial states for a call, or zeros."""
    batch = () if x.dim() == 2 else (x.shape[0] if module.batch_first else x.shape[1],)
    cells = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    return [scale * torch.randn(cells, *batch, size).double() for size in sizes]


def stabilised(z: Tensor) -> Tensor:
    return z + EPSILON * torch.where(z >= 0, 1.0, -1.0)


def lrp_linear(hin: Tensor, weight: Tensor, hout: Tensor, r_out: Tensor) -> Tensor:
    """Arras' messages R_{i<-j} = w_ji h_i / stab(h_j) R_j, summed over j; biases keep what they add."""
    messages = weight * hin.unsqueeze(1) / stabilised(hout).unsqueeze(2) * r_out.unsqueeze(2)
    return messages.sum(1)


def arras_lstm(weights: Any, xs: list[Tensor], rs: list[Tensor]) -> list[Tensor]:
    """R_x of every step of one LSTM direction from R of its outputs (Arras et al. 2017, sections 3.1 and 3.2)."""
    w, u, b_ih, b_hh, _ = weights
    size = u.shape[1]
    h, c, steps = torch.zeros(len(xs[0]), size).double(), torch.zeros(len(xs[0]), size).double(), []
    for x in xs:
        i, f, p, o = (x @ w.T + h @ u.T + b_ih + b_hh).chunk(4, -1)
        kept, new = f.sigmoid() * c, i.sigmoid() * p.tanh()
        steps.append((x, h, p, kept, new, kept + new))
        c = kept + new
        h = o.sigmoid() * c.tanh()
    identity, found = torch.eye(size).double(), []
    r_h = r_c = torch.zeros_like(h)
    for (x, before, p, kept, new, c), r in zip(steps[::-1], rs[::-1], strict=True):
        r_c = r_c + r_h + r
        r_g = lrp_linear(new, identity, c, r_c)
        found.append(lrp_linear(x, w[2 * size : 3 * size], p, r_g))
        r_h = lrp_linear(before, u[2 * size : 3 * size], p, r_g)
        r_c = lrp_linear(kept, identity, c, r_c)
    return found[::-1]


def arras_gru(weights: Any, xs: list[Tensor], rs: list[Tensor]) -> list[Tensor]:
    """The same for a GRU: the signal takes all at z, 1 - z and r."""
    w, u, b_ih, b_hh, _ = weights
    size = u.shape[1]
    h, steps = torch.zeros(len(xs[0]), size).double(), []
    for x in xs:
        given, recurrent = (x @ w.T + b_ih).chunk(3, -1), (h @ u.T + b_hh).chunk(3, -1)
        r, z = (given[0] + recurrent[0]).sigmoid(), (given[1] + recurrent[1]).sigmoid()
        p = given[2] + r * recurrent[2]
        steps.append((x, h, r, z, p))
        h = (1 - z) * p.tanh() + z * h
    identity, found = torch.eye(size).double(), []
    r_h = torch.zeros_like(h)
    for (x, before, r, z, p), relevance in zip(steps[::-1], rs[::-1], strict=True):
        arriving, after = relevance + r_h, (1 - z) * p.tanh() + z * before
        r_n = lrp_linear((1 - z) * p.tanh(), identity, after, arriving)
        found.append(lrp_linear(x, w[2 * size :], p, r_n))
        r_h = lrp_linear(z * before, identity, after, arriving)
        r_h = r_h + lrp_linear(before, r.unsqueeze(2) * u[2 * size :], p, r_n)
    return found[::-1]


def arras_rnn(weights: Any, xs: list[Tensor], rs: list[Tensor], nonlinearity: Any = torch.tanh) -> list[Tensor]:
    """The same for a plain RNN: R passes the nonlinearity unchanged."""
    w, u, b_ih, b_hh, _ = weights
    h, steps = torch.zeros(len(xs[0]), u.shape[1]).double(), []
    for x in xs:
        p = x @ w.T + h @ u.T + b_ih + b_hh
        steps.append((x, h, p))
        h = nonlinearity(p)
    found = []
    r_h = torch.zeros_like(h)
    for (x, before, p), r in zip(steps[::-1], rs[::-1], strict=True):
        arriving = r_h + r
        found.append(lrp_linear(x, w, p, arriving))
        r_h = lrp_linear(before, u, p, arriving)
    return found[::-1]


ARRAS: dict[str, Callable[..., list[Tensor]]] = {
    "lstm": arras_lstm,
    "gru": arras_gru,
    "rnn_tanh": arras_rnn,
    "rnn_relu": lambda *args: arras_rnn(*args, nonlinearity=torch.relu),
}


def arras(kind: str, module: nn.RNNBase, x: Tensor, relevance: Tensor) -> Tensor:
    """R at the input (T, B, F) of a whole module, from R at its output."""
    inputs, directions = [x], 2 if module.bidirectional else 1
    states = start(module, x, 0.0)
    for layers in range(1, module.num_layers):
        first = type(module)(**{**options_of(module), "num_layers": layers}).double()
        first.load_state_dict({key: module.state_dict()[key] for key in first.state_dict()})
        inputs.append(frozen(kind, first, x, [state[: layers * directions] for state in states])[0].detach())
    for layer in reversed(range(module.num_layers)):
        found = torch.zeros_like(inputs[layer])
        for direction in range(directions):
            rs, xs = list(relevance.chunk(directions, -1)[direction]), list(inputs[layer])
            order = slice(None, None, -1 if direction else 1)
            found = found + torch.stack(ARRAS[kind](cell(module, layer, direction), xs[order], rs[order])[order])
        relevance = found
    return relevance


def options_of(module: nn.RNNBase) -> dict[str, Any]:
    names = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional")
    extra = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    return {**{name: getattr(module, name) for name in names}, **extra}
