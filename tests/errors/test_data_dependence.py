"""Python that decides by a tensor's value, and regions that relevance cannot enter: the line, and what to write."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from lrp_compiler import compile_for_lrp, errors


class ByIf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if (
            x.mean() > 0  # the condition may stand on a line of its own
        ):
            return x * 2
        return x


class ByChoice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 and x.max() < 9 else x


class ByWhile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() < 10:
            x = x * 2
        return x


class ByBool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        positive = bool(x.max())
        return x * positive


class ByInt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().sum())
        return x.sum() + x.new_zeros(count).sum()


class ByFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.max())


class ByMaths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / math.sqrt(x.square().sum().item())


class ByMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * min(x.max().item(), 3.0)


class ByRange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.argmax().item()):
            x = x * 2
        return x


class ByAssert(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.max() < 100
        return x


class ByMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum()


class ByNonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten()
        return flat[flat.nonzero()].sum()


class BySlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.argmax().item()].sum()


class ByUnique(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.masked_select(x, x > 0).sum()


CASES: list[tuple[type[nn.Module], str, str]] = [
    (ByIf, "if (", "torch.cond(predicate, true_fn, false_fn, operands)"),
    (ByChoice, "return x * 2 if x.sum() > 0", "torch.where"),
    (ByWhile, "while x.sum() < 10:", "fixed number of steps"),
    (ByBool, "positive = bool(x.max())", "Keep it a tensor"),
    (ByInt, "count = int(x.abs().sum())", "python int argument"),
    (ByFloat, "return x * float(x.max())", ".item() in place of float()"),
    (ByMaths, "return x / math.sqrt(", "torch.sym_sqrt"),
    (ByMin, "return x * min(", "torch.minimum"),
    (ByRange, "for _ in range(x.argmax().item()):", "number of steps as a python int"),
    (ByAssert, "assert x.max() < 100", "torch._assert_async"),
    (ByMask, "return x[x > 0].sum()", "torch.where(mask, x, 0)"),
    (ByNonzero, "return flat[flat.nonzero()].sum()", "compute with the mask itself"),
    (BySlice, "return x[:, : x.argmax().item()].sum()", "python int argument"),
    (ByUnique, "return torch.masked_select(x, x > 0).sum()", "torch.where(mask, x, 0)"),
]


@pytest.mark.parametrize(("model", "line", "remedy"), CASES, ids=[model.__name__ for model, _, _ in CASES])
def test_the_line_and_the_remedy_are_named(model: type[nn.Module], line: str, remedy: str) -> None:
    with pytest.raises(errors.DataDependentError) as caught:
        compile_for_lrp(model(), "epsilon").run(torch.ones(2, 3))
    text = str(caught.value)
    assert text.startswith("[LRP023]") and isinstance(caught.value, errors.CaptureError)
    (place,) = [part for part in text.splitlines() if part.startswith("  at: ")]
    path, _, code = place.removeprefix("  at: ").partition(" ")
    assert path.rpartition(":")[0] == __file__ and code.startswith(line)
    assert remedy in text.splitlines()[-1]


def test_sizes_that_relevance_does_not_meet_are_no_matter() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, (x > 0).nonzero()

    x = torch.randn(2, 3)
    (doubled, found), tape = compile_for_lrp(Counts(), "epsilon").run(x)
    assert torch.equal(doubled, x * 2) and torch.equal(found, (x > 0).nonzero())
    torch.testing.assert_close(tape.relevance(0)[:, 0], 2 * x[:, 0])


def looped(x: Tensor) -> Tensor:
    return while_loop(lambda v: v.sum() < 10, lambda v: (v * 2,), (x,))[0]


REGIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "while_loop": looped,
    "map": lambda x: torch_map(lambda row: row * 2, x),
    "scan": lambda x: scan(lambda carry, row: (carry + row, carry * row), x[0], x)[1],
    "vmap": lambda x: torch.vmap(lambda row: row * row.sum())(x),
}


@pytest.mark.parametrize("region", REGIONS)
def test_other_regions_are_named(region: str) -> None:
    class Entering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return REGIONS[region](x)

    with pytest.raises(errors.RegionError) as caught:
        compile_for_lrp(Entering(), "epsilon").run(torch.ones(2, 3))
    text = str(caught.value)
    assert f"[LRP024] the region {region} cannot be explained" in text
    assert f"{__file__}:" in text and "return REGIONS[region](x)" in text and "hint: " in text
