"""What everybody is held against: the plain forward pass and eager input x gradient."""

from __future__ import annotations

import torch
from providers.base import Prepared, Provider, Setting, everywhere, of_input_alone
from torch import Tensor
from workloads import input_x_gradient

PLAIN, INPUT_X_GRADIENT = "plain forward", "eager input x gradient"


def plain_forward(setting: Setting) -> Prepared:
    """The model without autograd."""
    work = setting.work

    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = work.model(work.x)
        return output

    return Prepared(call)


def eager(setting: Setting) -> Prepared:
    """Autograd with frozen parameters."""
    return of_input_alone(setting.work, lambda: input_x_gradient(setting.work).detach())


PROVIDERS = (
    Provider(PLAIN, everywhere, plain_forward, own=True),
    Provider(INPUT_X_GRADIENT, everywhere, eager, own=True),
)
