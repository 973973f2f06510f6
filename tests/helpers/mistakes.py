"""Models and rules that each make one mistake, and the plain model on which calls make theirs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrp_compiler import seeds
from lrp_compiler.passes.rules.base import Edges, Sinks
from lrp_compiler.passes.site import Site
from lrp_compiler.rules import Plain

X = torch.ones(2, 3)
"""What most of them are given."""


# --- models -------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """The plain model: nothing is wrong with it."""
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(x.numpy() + 1)


class Counts(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return ids.float().mean(1)


class Uncovered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.special.i0e(self.inner(x))
        return torch.erfinv(torch.tanh(x))


class Hypernetwork(nn.Module):
    """A GRU whose weights are computed from its input."""

    def forward(self, x: Tensor) -> Tensor:
        weights = [x.mean((0, 1)).expand(6, 3), x.mean((0, 1))[:2].expand(6, 2)]
        return torch.gru(x, x.new_zeros(1, 2, 2), weights, False, 1, 0.0, False, False, True)[0].sum((1, 2))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return self.cell(packed)[1][0][0]


class Resizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.unsqueeze_(0)
        y.add_(1)
        return y


class Holder:
    """A result that torch knows no way into."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Wraps(nn.Module):
    def forward(self, x: Tensor) -> Holder:
        return Holder(x * 2)


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.cell(x)[0]


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(torch.sum)(x)


class Constant(nn.Module):
    def forward(self) -> int:
        return 3


CALLS = itertools.count()


@torch.library.custom_op("lrp_tests::disturbs", mutates_args=())
def disturbs(x: Tensor) -> Tensor:
    """Draws more random numbers at every call, as another thread might do meanwhile."""
    torch.rand(next(CALLS))
    return x.clone()


@disturbs.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Disturbed(nn.Module):
    """Drops out while the generator is used from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return disturbs(self.drop(self.linear(x)))


class Broken(nn.Module):
    """Fails by itself, after it has counted in a buffer and drawn random numbers."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        torch.rand(2)
        raise KeyError("mine")


# --- seeds and rules ----------------------------------------------------------------------------------------


class Misshapen(seeds.Seed):
    def seed(self, output: Tensor) -> Tensor:
        return output[:, :1]


def leaky(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """A rule that loses half of the relevance."""
    return c * 0.5


def misshapen(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return c.sum(0)


@dataclass(frozen=True)
class SettlingSinks(Plain):
    """Its sinks are for one batch size."""

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return {"batch": site.scale(edge, int(edge.meta["val"].shape[0]))}


@torch.library.custom_op("lrp_tests::halved", mutates_args=())
def half_of(c: Tensor) -> Tensor:
    """An op that torch cannot differentiate."""
    return c / 2


@half_of.register_fake
def _(c: Tensor) -> Tensor:
    return torch.empty_like(c)


def halved(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    made: Tensor = torch.ops.lrp_tests.halved.default(c)
    return made


def branching(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return c if x.sum() > 0 else -c


def constant(c: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return c * torch.tensor(2.0)
