"""What relevance-space propagation would ask for, against counts by hand and DynamicLRP's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrp_compiler import Report, compile_for_lrp
from lrp_compiler.passes.demand import Demand, demands


class Counted(nn.Module):
    """Every kind of op that asks for values, once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(14, 3, bias=False)
        self.register_buffer("mask", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, -1)
        c, _ = torch.relu(x).split(3, -1)
        total = a * 2 + b.flip(-1)
        joined = torch.cat([total, x, torch.tanh(b)], -1)
        scores = self.second(joined) + 1.0 + self.mask
        return scores.softmax(-1).sum(-1) + c.sigmoid().mean(-1)


EXPECTED = (
    # The last addition asks for both terms; neither the sum nor the mean can give its own.
    ("add_3", "sum_1", 0),
    ("add_3", "mean", 0),
    ("mean", "sigmoid", 0),
    ("sum_1", "softmax", 0),
    # Through the mask and the number to the linear op, which has no bias to share with.
    ("softmax", "add_2", 2),
    ("cat", "add", 0),
    ("cat", "x", 0),
    ("cat", "tanh", 0),
    # Through the product with 2, and through the flip; both arrive at the chunk, which then has to ask as well.
    ("add", "mul", 2),
    ("add", "flip", 2),
    ("chunk", "linear", 0),
    ("linear", "linear", 0),
    ("linear", "first.bias", 0),
)


def counted() -> tuple[Report, tuple[Demand, ...]]:
    explained = compile_for_lrp(Counted().eval(), "attnlrp")
    x = torch.randn(2, 6)
    return explained.report(x), demands(explained.explained_call((x,), {}).program)


def test_demands_are_those_counted_by_hand() -> None:
    """The split that no search reaches asks for nothing; the other one does."""
    report, found = counted()
    bias = next(name for name in (demand.value for demand in found) if "bias" in name)
    expected = [(op, bias if value == "first.bias" else value, between) for op, value, between in EXPECTED]
    assert sorted((d.op, d.value, len(d.between)) for d in found) == sorted(expected)
    assert report.demanded == len(expected)


def test_a_composite_that_reads_terms_still_demands_them() -> None:
    """A stabiliser on every linear op reads what it divides by; where there is none, no term is read."""
    x = torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    plain, stabilised = (compile_for_lrp(model, name).report(x) for name in ("attnlrp", "epsilon_plus"))
    assert (plain.demanded, plain.still_demanded) == (4, 0)
    assert (stabilised.demanded, stabilised.still_demanded) == (4, 2)


def test_vgg16_demands_what_dynamic_lrp_counts_for_it() -> None:
    """Table 4 of arXiv 2512.07010: 32 promises, no internal nodes, path lengths that sum to 32."""
    channels = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
    layers: list[nn.Module] = []
    before = 3
    for width in (size // 32 for size in channels):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        before = width or before
    head = [nn.Linear(before, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).eval()
    found = demands(compile_for_lrp(model, "attnlrp").explained_call((torch.randn(1, 3, 32, 32),), {}).program)
    assert (len(found), sum(len(d.between) for d in found), sum(d.steps for d in found)) == (32, 0, 32)
