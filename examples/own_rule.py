"""The README's rule example: an op that has no rule, and the rule that covers it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, errors, register_rule


class Bessel(nn.Module):
    """A linear layer and a Bessel function as activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1e(self.layer(x))


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """A model and its arguments, as ``lrp-compiler coverage own_rule:build`` asks for them."""
    torch.manual_seed(0)
    return Bessel(), (torch.randn(2, 4),)


def main() -> None:
    """Show the refusal, register a rule, explain."""
    model, (x,) = build()
    try:
        compile_for_lrp(model).attribute(x, target=1)
    except errors.UncoveredOpsError as refusal:
        print(refusal)

    @register_rule(torch.ops.aten.special_i1e)
    def identity(c: Tensor, out: Tensor, value: Tensor) -> Tensor:
        """R_x = R_y: the coefficient times f(x) / x, which tends to 1/2 at zero."""
        return c * torch.where(value == 0, 0.5, out / value)

    _, tape = compile_for_lrp(model, verify="ledger").run(x)
    print(tape.relevance(target=1))
    print(str(tape.ledger(target=1)).splitlines()[-2])


if __name__ == "__main__":
    main()
