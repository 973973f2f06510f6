"""torch.compile of an explained module compiles the model itself; relevance stays there for the asking."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from training import cleared, gradients, identical, loss_of

from lrp_compiler import compile_for_lrp


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("resnet", "aot_eager"),
        ("bert", "eager"),
        pytest.param("resnet", "eager", marks=pytest.mark.slow),
        pytest.param("bert", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_the_model(name: str, backend: str) -> None:
    torch.compiler.reset()
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    compiled = torch.compile(explained, backend=backend, fullgraph=True)
    expected, found = case(), compiled(*case.args, **case.kwargs)
    assert identical(found, expected)
    loss_of(expected).backward()
    wanted = gradients(case.model)
    cleared(case.model)
    loss_of(found).backward()
    for key, value in gradients(case.model).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6 * wanted[key].abs().max().item())
    assert not explained.compilations
    assert torch.equal(
        compiled.run(*case.args)[1].relevance(case.target), explained.run(*case.args)[1].relevance(case.target)
    )


@pytest.mark.slow
# Torch's own, where inductor is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_agrees_to_its_rounding() -> None:
    torch.compiler.reset()
    case = zoo.build("resnet")
    compiled = torch.compile(compile_for_lrp(case.model))
    torch.testing.assert_close(compiled(*case.args), case(), rtol=1e-4, atol=1e-5)


def test_export_of_an_explained_module_is_that_of_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)
    exported = torch.export.export(compile_for_lrp(model), (x,), strict=False)
    assert torch.equal(exported.module()(x), model(x))
