"""Relevance as a function of inputs and parameters, its derivatives compared with differences by gradcheck.

The finite differences are those of relevance without ``create_graph``, so that a derivative that is right for another
function than the one users see fails too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrp_compiler import Composite, LRPModule, Tape
from lrp_compiler.captures import Captures

Question = Callable[[Tape, bool], Any]
"""From a tape and ``create_graph`` to relevance, a tensor or a dict of tensors."""


class Explanation(nn.Module):
    """What a question about ``model(*inputs, **kwargs)`` is answered with, all results in one vector."""

    explained: LRPModule

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite,
        question: Question,
        kwargs: dict[str, Any] | None = None,
        captures: Captures | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        # Not a child: its parameters are the model's, which may appear under one name only.
        self.__dict__["explained"] = LRPModule(model, composite, captures=captures)
        self.question, self.kwargs = question, kwargs or {}
        self.create_graph = True

    def forward(self, *inputs: Tensor) -> Tensor:
        # Dropout draws the same numbers at every evaluation.
        torch.manual_seed(0)
        with torch.set_grad_enabled(True):
            _, tape = self.explained.run(*inputs, **self.kwargs)
        found = self.question(tape, self.create_graph)
        parts = list(found.values()) if isinstance(found, dict) else [found]
        return torch.cat([part.flatten() for part in parts])


def relevance_for(target: Any, **options: Any) -> Question:
    """The question for relevance at the inputs."""
    return lambda tape, create_graph: tape.relevance(target, create_graph=create_graph, **options)


class _Compared(torch.autograd.Function):
    """Values of one function, derivatives of another."""

    @staticmethod
    def forward(ctx: Any, plain: Tensor, recorded: Tensor) -> Tensor:
        return plain.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def assert_differentiable(
    explanation: Explanation, *inputs: Tensor, rounding: float = 1e-10, eps: float = 1e-6, tolerance: float = 1e-5
) -> None:
    """Derivatives by all parameters and float inputs are those of finite differences, along random directions.

    ``rounding`` bounds how far relevance with and without ``create_graph`` may differ, relative to its largest
    entry; ``tolerance`` how far derivatives may, relative to themselves (and to 1).
    """
    # Traced with parameters in place; what gradcheck puts there are tensors.
    explanation(*inputs)
    parameters = {name: p.detach() for name, p in explanation.named_parameters()}
    floats = [x for x in inputs if x.is_floating_point()]
    shapes = [value.shape for value in (*floats, *parameters.values())]

    def answer(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = iter([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        filled = tuple(next(values) if x.is_floating_point() else x for x in inputs)
        named = dict(zip(parameters, values, strict=True))
        explanation.create_graph = False
        plain = functional_call(explanation, named, filled)
        explanation.create_graph = True
        recorded = functional_call(explanation, named, filled)
        assert not plain.requires_grad
        scale = float(plain.abs().max())
        assert scale > 0 and float((recorded.detach() - plain).abs().max()) <= rounding * scale
        return _Compared.apply(plain, recorded)  # type: ignore[no-untyped-call,no-any-return]

    # All at once: in its fast mode gradcheck moves along one random direction, whatever the number of values.
    flat = torch.cat([value.flatten() for value in (*floats, *parameters.values())]).requires_grad_()
    assert torch.autograd.gradcheck(answer, (flat,), eps=eps, atol=tolerance, rtol=tolerance, fast_mode=True)
