"""Hooks on the original's modules: a call runs them as ever, an explanation refuses those a graph would lose."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils import prune
from training import identical, loss_of

from lrp_compiler import LRPModule, compile_for_lrp, errors

Calls = list[str]


def made() -> tuple[nn.Module, LRPModule, Tensor]:
    case = zoo.build("resnet")
    return case.model, compile_for_lrp(case.model), case.args[0]


KINDS: dict[str, Callable[[nn.Module, Calls], Any]] = {
    "forward hook": lambda m, calls: m.register_forward_hook(lambda *_: calls.append("hook")),
    "forward hook with kwargs": lambda m, calls: m.register_forward_hook(
        lambda *_: calls.append("hook"), with_kwargs=True
    ),
    "forward pre-hook": lambda m, calls: m.register_forward_pre_hook(lambda *_: calls.append("hook")),
    "backward hook": lambda m, calls: m.register_full_backward_hook(lambda *_: calls.append("hook")),
    "backward pre-hook": lambda m, calls: m.register_full_backward_pre_hook(lambda *_: calls.append("hook")),
    "global forward hook": lambda m, calls: nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append("hook") if module is m else None
    ),
}


@pytest.mark.parametrize("path", ["", "3.conv1"], ids=["the model", "a submodule"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_run_hooks_and_explanations_refuse_them(kind: str, path: str) -> None:
    """Those registered after the first call, too; once removed, all is as before."""
    model, explained, x = made()
    expected = explained(x)
    relevance = explained.attribute(x, 2)
    calls: Calls = []
    handle = KINDS[kind](model.get_submodule(path), calls)
    try:
        for _ in range(2):
            output = explained(x.clone().requires_grad_())
            loss_of(output).backward()
        assert identical(output, expected) and calls == ["hook", "hook"]
        for ask in (lambda: explained.run(x), lambda: explained.attribute(x, 2), lambda: explained.report(x)):
            with pytest.raises(errors.HookError, match=kind.removesuffix(" with kwargs")):
                ask()
    finally:
        handle.remove()
    assert torch.equal(explained.attribute(x, 2), relevance) and len(explained.compilations) == 1


def test_a_hook_that_changes_the_output_changes_ours() -> None:
    model, explained, x = made()
    explained(x)
    model[6].register_forward_hook(lambda module, args, output: output * 2)
    assert identical(explained(x), model(x))


def test_hooks_on_the_explained_module_itself_run() -> None:
    _, explained, x = made()
    calls: Calls = []
    explained.register_forward_hook(lambda *_: calls.append("hook"))
    explained(x)
    explained(x)
    assert calls == ["hook", "hook"]
    assert explained.attribute(x, 2).shape == x.shape


def test_hooks_on_parameters_see_every_gradient() -> None:
    model, explained, x = made()
    weight = model.get_parameter("6.weight")
    seen: list[Tensor] = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    output, tape = explained.run(x)
    tape.relevance(2)
    loss_of(output).backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], weight.grad)  # type: ignore[arg-type]


def weight_norm(layer: nn.Module) -> Any:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


RECOMPUTING: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "parametrization": nn.utils.parametrizations.weight_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.fixture(params=RECOMPUTING)
def recomputing(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    RECOMPUTING[request.param](model[0])
    yield model


def test_weights_that_torch_recomputes_in_hooks_are_kept(recomputing: nn.Module) -> None:
    x, explained = torch.randn(4, 5), compile_for_lrp(recomputing, "gradient")
    assert identical(explained(x), recomputing(x))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(recomputing(x)[:, 1].sum(), x)
    torch.testing.assert_close(explained.attribute(x.detach(), 1), expected)


def test_hooks_in_a_dict_that_took_the_place_of_another_are_seen() -> None:
    """Some libraries remove hooks by giving a module a new dict of them."""
    model, explained, x = made()
    explained(x)
    module = next(child for child in model.modules() if child is not model)
    module._forward_hooks = OrderedDict()
    explained(x)
    module.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(explained(x), model(x))
    with pytest.raises(errors.HookError):
        explained.run(x)


def test_what_is_set_on_modules_beside_the_model_changes_nothing() -> None:
    model, explained, x = made()
    expected = explained(x)
    for step in range(3):
        next(iter(model.children())).steps = step
        assert torch.equal(explained(x), expected)
    assert len(explained.compilations) == 1
