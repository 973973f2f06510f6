"""Random numbers of training: drawn as eager draws them in every layout, and repeated although threads share them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import THREADS, together

from lrp_compiler import compile_for_lrp

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda h: h,
    "transposed": lambda h: h.transpose(1, 2),
    "channels last": lambda h: h.unflatten(1, (2, -1)).contiguous(memory_format=torch.channels_last),
    "strided": lambda h: h[:, ::2],
    "expanded": lambda h: h[:, :1].expand(-1, 5, -1),
}


class DropsOut(nn.Module):
    """Dropout of a hidden value in some layout."""

    def __init__(self, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layout, self.drop = nn.Linear(7, 6), layout, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layout(self.first(x))).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_draws_as_eager_does(layout: str, dtype: torch.dtype) -> None:
    """Bitwise, forward and run alike, and the generator goes on from the same state."""
    model = DropsOut(LAYOUTS[layout]).to(dtype).train()
    explained = compile_for_lrp(model, "epsilon")
    x = torch.randn(3, 8, 7, dtype=dtype)
    for call in (explained, lambda x: explained.run(x)[0]):
        torch.manual_seed(1)
        expected, following = model(x), torch.rand(3)
        torch.manual_seed(1)
        assert torch.equal(call(x), expected)
        assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_threads_that_drop_out_read_their_own_masks(budget: float) -> None:
    """What a tape computes again or reads of a mask is of the same draw as the output it gave, in every thread."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Dropout(0.4), nn.Linear(512, 512), nn.Dropout(0.4), nn.Linear(512, 4))
    explained = compile_for_lrp(model.double().train(), "epsilon", memory_budget=budget)
    x = torch.randn(64, 64, dtype=torch.double)

    def work() -> bool:
        right = True
        for _ in range(10):
            output, tape = explained.run(x)
            tape.ledger(1).check()
            hidden = tape.activations("3")
            right &= torch.equal(F.linear(hidden, model[4].weight, model[4].bias), output)
            explained(x)
        return right

    assert all(together([work] * THREADS))
