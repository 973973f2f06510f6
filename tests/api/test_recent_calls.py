"""Calls that follow each other: the short way to the last call's program is taken by calls of its kind alone."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.captured_call import RecentCall


class Told(nn.Module):
    """Computes something else for every kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        h = self.linear(x) * (3 if self.training else scale)
        h = h - y if y.dtype == torch.float64 else h * y
        return (h.exp() if x.shape[0] == 2 else h.tanh()).double()


@dataclass(frozen=True)
class Kind:
    """What two calls can differ in."""

    rows: int = 2
    wide: bool = False
    strided: bool = False
    named: bool = False
    scaled: bool = False
    training: bool = False
    autocast: bool = False
    grad: bool = False

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of such a call; always of the same numbers."""
        numbers = torch.arange(4.0 * self.rows) / 8
        x = numbers.view(4, self.rows).t() if self.strided else numbers.view(self.rows, 4)
        y = (numbers - 1).view(self.rows, 4).to(torch.float64 if self.wide else torch.float32)
        scale = {"scale": 2.0} if self.scaled else {}
        return ((x,), {"y": y, **scale}) if self.named else ((x, y), scale)

    @contextlib.contextmanager
    def entered(self, model: nn.Module) -> Any:
        """The model and the settings in force as such a call has them."""
        model.train(self.training)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast), torch.set_grad_enabled(self.grad):
            yield


def expected(model: nn.Module, kind: Kind) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its second column, by torch."""
    (x, *rest), named = kind.arguments()
    x.requires_grad_()
    with kind.entered(model), torch.enable_grad():
        output = model(x, *rest, **named)
        return output.detach(), torch.autograd.grad(output[:, 1].sum(), x)[0]


def found(explained: LRPModule, kind: Kind) -> tuple[Tensor, Tensor]:
    """The same by the compiler."""
    (x, *rest), named = kind.arguments()
    with kind.entered(explained):
        output = explained(x, *rest, **named)
        return output, explained.attribute(x, 1, tuple(rest), forward_kwargs=named)


@given(st.lists(st.builds(Kind, rows=st.sampled_from([2, 3])), min_size=2, max_size=12))
@settings(max_examples=25, deadline=None)
def test_calls_of_changing_kinds(kinds: list[Kind]) -> None:
    model = Told()
    explained = compile_for_lrp(model, "gradient")
    for kind in [kind for kind in kinds for _ in range(2)]:
        output, gradient = expected(model, kind)
        ours, relevance = found(explained, kind)
        assert torch.equal(ours, output)
        torch.testing.assert_close(relevance, gradient, rtol=1e-5, atol=0, check_stride=False)


DIFFERENT = [
    Kind(rows=3),
    Kind(wide=True),
    Kind(strided=True),
    Kind(named=True),
    Kind(scaled=True),
    Kind(training=True),
    Kind(autocast=True),
]


@pytest.mark.parametrize("other", DIFFERENT, ids=str)
def test_another_kind_does_not_go_the_short_way(other: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of the same kind does."""
    model = Told()
    explained = compile_for_lrp(model, "gradient")
    alike: list[bool] = []
    is_like = RecentCall.is_like

    def noted(self: RecentCall, *call: Any) -> bool:
        alike.append(is_like(self, *call))
        return alike[-1]

    monkeypatch.setattr(RecentCall, "is_like", noted)
    for kind in (Kind(), Kind(), other, Kind(), Kind()):
        with kind.entered(model):
            args, named = kind.arguments()
            assert torch.equal(explained(*args, **named), model(*args, **named))
    # Behind numbers among the arguments, and behind autocast, there is no short way.
    assert alike[:2] == [True, False]
    assert alike[-1]


def test_replaced_weights_are_not_kept_alive() -> None:
    """By the last call, behind a call that failed."""
    model = nn.Linear(3, 2)
    explained = compile_for_lrp(model)
    explained(torch.ones(1, 3))
    kept = weakref.ref(model.weight)
    model.weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError):
        explained(torch.ones(1, 4))
    gc.collect()
    assert kept() is None
