"""The option relevance_dtype: weights cast once, the error that a report measures, what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp
from lrp_compiler.errors import ArgumentError, OptionValueError
from lrp_compiler.prepared_weights import PreparedWeights


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def test_weights_are_cast_once_as_long_as_they_do_not_change() -> None:
    model, x = mlp(), torch.randn(2, 16)
    module = compile_for_lrp(model, "gradient", relevance_dtype=torch.bfloat16)
    before = module.attribute(x, 1)
    casts = module.compiler.captures.weights
    assert len(casts) == 1
    first = casts.cast(model[0].weight, torch.bfloat16)
    module.attribute(x, 1)
    assert casts.cast(model[0].weight, torch.bfloat16) is first
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
    assert torch.equal(module.attribute(x, 1), 2 * before)
    assert casts.cast(model[0].weight, torch.bfloat16) is not first


def test_other_memory_behind_a_parameter_is_another_cast() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    casts = PreparedWeights()
    first = casts.cast(weight, torch.bfloat16)
    weight.data = torch.ones(3, 3)
    assert torch.equal(casts.cast(weight, torch.bfloat16), torch.ones(3, 3, dtype=torch.bfloat16))
    assert first is not casts.cast(weight, torch.bfloat16)


def test_casts_go_with_their_parameters() -> None:
    casts = PreparedWeights()
    weight = nn.Parameter(torch.randn(3, 3))
    casts.cast(weight, torch.bfloat16)
    assert len(casts) == 1
    del weight
    gc.collect()
    assert len(casts) == 0


def test_casts_made_in_inference_mode_serve_every_mode() -> None:
    model, x = mlp(), torch.randn(2, 16)
    module = compile_for_lrp(model, "gradient", relevance_dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = module.attribute(x, 1).clone()
    _, tape = module.run(x)
    assert torch.equal(tape.relevance(1), expected)
    (row,) = tape.linearised().row(1).values()
    assert row.shape == x.shape


def test_training_steps_cast_anew() -> None:
    """A loss on relevance, where every step changes the weights: as in float32, to a few roundings."""
    losses = []
    for given in (torch.bfloat16, None):
        model, x = mlp(), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        module = compile_for_lrp(model, "gradient", relevance_dtype=given)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimiser.zero_grad()
            output, tape = module.run(x)
            loss = F.cross_entropy(output, torch.zeros(8, dtype=torch.long))
            loss = loss + tape.relevance(1, create_graph=True).square().mean()
            loss.backward()
            optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_report_measures_the_error_on_request(name: str) -> None:
    case, shared = zoo.shared(name)
    module = compile_for_lrp(shared, "attnlrp", relevance_dtype=torch.bfloat16)
    report = module.report(*case.args, **case.kwargs, target=case.target, measure_error=True)
    assert report.error is not None
    exact, exact_shared = zoo.shared(name, double=True)
    expected = _vector(compile_for_lrp(exact_shared, "attnlrp"), exact)
    for given, found in ((torch.bfloat16, report.error.relative), (None, report.error.own)):
        measured = _vector(compile_for_lrp(shared, "attnlrp", relevance_dtype=given), case)
        assert found == pytest.approx(float((measured - expected).norm() / expected.norm()), rel=1e-2)
    assert "relevance in bfloat16; off float64's by" in str(report)
    assert module.report(*case.args, **case.kwargs).error is None


def _vector(module: Any, case: zoo.Case) -> Tensor:
    found = module.run(*case.args, **case.kwargs)[1].relevance(case.target)
    return torch.cat([one.double().flatten() for one in (found.values() if isinstance(found, dict) else [found])])


def test_the_error_is_measured_at_the_class_that_the_module_predicts() -> None:
    """Two logits that only float64 tells apart: both relevances are of the same class."""
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight[1] = model.weight[0] * (1 + 1e-9)
    x = torch.ones(1, 4) * model.weight[0].sign().float()
    report = compile_for_lrp(model.float(), "gradient").report(x, measure_error=True)
    assert report.error is not None
    assert report.error.relative < 1e-6


def test_what_cannot_be_measured_is_said() -> None:
    x = torch.randn(2, 16)
    with pytest.raises(ArgumentError, match="draws random numbers"):
        compile_for_lrp(nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5))).report(x, measure_error=True)

    class InFloat32(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.randn(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(ArgumentError, match="does not run in float64"):
        compile_for_lrp(InFloat32()).report(x, measure_error=True)


@pytest.mark.parametrize("given", ["low", 16, torch.int8, torch.float8_e5m2, torch.float16, torch.complex64])
def test_other_dtypes_are_refused(given: Any) -> None:
    with pytest.raises(OptionValueError, match=r"'high' or one of torch\.bfloat16"):
        compile_for_lrp(mlp(), relevance_dtype=given)


def test_the_interpreter_has_the_models_dtype() -> None:
    with pytest.raises(OptionValueError, match="interpreter"):
        compile_for_lrp(mlp(), relevance_dtype=torch.bfloat16, reference=True)


def test_modules_of_one_model_share_casts() -> None:
    module, x = compile_for_lrp(mlp()), torch.randn(2, 16)
    for composite in ("gradient", "epsilon"):
        narrow = compile_for_lrp(module, composite, relevance_dtype=torch.bfloat16)
        narrow.attribute(x, 1)
    assert narrow.compiler.captures is module.compiler.captures
    # Of the head the one row of the target is cast, with the call.
    assert len(module.compiler.captures.weights) == 1
