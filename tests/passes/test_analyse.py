"""Which inputs relevance is read at when nobody says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp


class Masked(nn.Module):
    """A linear map of an input that a float mask of zeros and ones is applied to."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.apply_mask = apply
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.linear(self.apply_mask(x, mask))
        return out


X = torch.linspace(-1, 2, 8).reshape(2, 4)
MASK = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])

BY_CONDITION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "compared": lambda x, mask: torch.where(mask > 0.5, x, 0.0),
    "cast to bool": lambda x, mask: x.masked_fill(~mask.bool(), 0.0),
    "counted": lambda x, mask: x[:, : mask.shape[1]] * mask.detach(),
    "chosen by index": lambda x, mask: x.gather(1, mask.long()),
}


@pytest.mark.parametrize("name", BY_CONDITION)
def test_an_input_read_by_conditions_alone_is_left_out(name: str) -> None:
    explained = compile_for_lrp(Masked(BY_CONDITION[name]), "epsilon")
    assert set(explained.report(X, MASK).inputs) == {"x"}
    assert isinstance(explained.run(X, MASK)[1].relevance(1), Tensor)
    asked = explained.run(X, MASK, wrt=["x", "mask"])[1].relevance(1)
    assert torch.equal(asked["mask"], torch.zeros_like(MASK)) and asked["x"].count_nonzero()


def test_an_input_that_is_multiplied_stays() -> None:
    explained = compile_for_lrp(Masked(torch.mul), "attnlrp")
    assert set(explained.report(X, MASK).inputs) == {"x", "mask"}
