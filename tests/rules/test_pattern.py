"""PatternNet and PatternAttribution against their formulas, written for one layer's unfolded patches at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import relative_error
from catalogue import agreement
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites, errors, fit_patterns

FLOAT64 = 1e-10


def two_component(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Kindermans et al. 2018, eq. 7: x (samples, inputs), y and z (samples) of the neuron with weights w."""
    active = z > 0
    centred = (x[active] * y[active, None]).mean(0) - x[active].mean(0) * y.mean()
    return centred / (w @ centred)


def relu_positive(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """iNNvestigate's ReluPositivePattern."""
    x, y = x[z > 0], y[z > 0]
    return ((x * y[:, None]).mean(0) - x.mean(0) * y.mean()) / ((y**2).mean() - y.mean() ** 2)


def linear(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Covariance of input and output over the output's variance."""
    return ((x - x.mean(0)) * (y - y.mean())[:, None]).mean(0) / y.var(unbiased=False)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "two_component": two_component,
    "relu_positive": relu_positive,
    "linear": linear,
}


def estimated(estimator: str, x: Tensor, layer: nn.Linear | nn.Conv2d, rectified: bool) -> Tensor:
    """The patterns of a layer for all inputs at once, neuron by neuron, convolutions by their patches."""
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    patches = x if isinstance(layer, nn.Linear) else _patches(layer, x)
    found = torch.zeros_like(weight).flatten(1)
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(len(weight), dtype=x.dtype)
    for neuron, w in enumerate(weight.flatten(1)):
        group = neuron // (len(weight) // groups)
        own = patches[:, group * len(w) : (group + 1) * len(w)]
        y = own @ w
        found[neuron] = ESTIMATORS[estimator if rectified else "linear"](own, y, y + bias[neuron], w)
    return found.view_as(weight)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    options: dict[str, Any] = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    return F.unfold(x, layer.kernel_size, **options).transpose(1, 2).flatten(0, 1)


def batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A loader of images and labels, in uneven batches."""
    return [(part, torch.zeros(len(part))) for part in (x[:5], x[5:6], x[6:])]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_of_dense_layers(estimator: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double().eval()
    x = torch.randn(200, 5, dtype=torch.float64)
    patterns = fit_patterns(model, batches(x), estimator)
    hidden = F.relu(model[0](x)).detach()
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    assert relative_error(patterns["0.weight"], estimated(estimator, x, first, True)) <= FLOAT64
    assert relative_error(patterns["2.weight"], estimated(estimator, hidden, last, False)) <= FLOAT64
    for name, weight in (("0.weight", first.weight), ("2.weight", last.weight)):
        assert torch.allclose((patterns[name] * weight).sum(1), torch.ones(len(weight), dtype=x.dtype))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2, "dilation": 2}])
def test_estimates_of_convolutions(estimator: Any, options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, 3, **options)
    model = nn.Sequential(conv, nn.ReLU()).double().eval()
    x = torch.randn(9, 4, 9, 8, dtype=torch.float64)
    found = fit_patterns(model, batches(x), estimator)["0.weight"]
    assert relative_error(found, estimated(estimator, x, conv, True)) <= FLOAT64


@pytest.mark.parametrize("groups", [1, 2])
def test_estimates_of_transposed_convolutions(groups: int) -> None:
    """A kernel of one pixel makes a transposed convolution a dense layer per pixel."""
    deconv = nn.ConvTranspose2d(4, 6, 1, groups=groups)
    model = nn.Sequential(deconv, nn.ReLU()).double().eval()
    dense = nn.Conv2d(4, 6, 1, groups=groups).double()
    per_group = deconv.weight.detach().view(groups, 4 // groups, 6 // groups)
    dense.weight.data = per_group.transpose(1, 2).reshape(dense.weight.shape)
    dense.bias = deconv.bias
    x = torch.randn(9, 4, 5, 5, dtype=torch.float64)
    found = fit_patterns(model, batches(x))["0.weight"].view(groups, 4 // groups, 6 // groups)
    expected = estimated("two_component", x, dense, True).view(groups, 6 // groups, 4 // groups)
    assert relative_error(found, expected.transpose(1, 2)) <= FLOAT64


def test_batch_norm_is_part_of_the_layer() -> None:
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    model = nn.Sequential(conv, norm, nn.ReLU()).double()
    x = torch.randn(9, 3, 7, 7, dtype=torch.float64)
    model(3 * x + 1)
    model.eval()
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = nn.Conv2d(3, 5, 3).double()
    assert conv.bias is not None
    folded.weight.data = conv.weight.detach() * scale.view(-1, 1, 1, 1)
    folded.bias = nn.Parameter((conv.bias - norm.running_mean) * scale + norm.bias)
    found = fit_patterns(model, batches(x))["0.weight"]
    assert relative_error(found, estimated("two_component", x, folded, True)) <= FLOAT64


def convnet() -> tuple[nn.Sequential, Tensor]:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 3)).double().eval(), torch.randn(
        40, 2, 8, 8, dtype=torch.float64
    )


def carried_back(model: nn.Sequential, directions: dict[str, Tensor], x: Tensor, target: int) -> Tensor:
    """The method as published: torch's gradient of the same net with other weights, ReLU masks of the true forward."""
    masks, value, indices = [], x, None
    for layer in model:
        if isinstance(layer, nn.ReLU):
            masks.append(value > 0)
        if isinstance(layer, nn.MaxPool2d):
            value, indices = F.max_pool2d(value, 2, return_indices=True)
        else:
            value = layer(value)
    assert indices is not None
    r = (value * torch.eye(3, dtype=x.dtype)[target]).detach()
    r = (r @ directions["6.weight"]).view(-1, 6, 2, 2) * masks[1]
    r = F.conv_transpose2d(r, directions["3.weight"])
    r = F.max_unpool2d(r, indices, 2) * masks[0]
    return F.conv_transpose2d(r, directions["0.weight"], padding=1)


@pytest.mark.parametrize("name", ["pattern_net", "pattern_attribution"])
def test_methods_are_gradients_with_other_weights(name: str) -> None:
    model, x = convnet()
    patterns = fit_patterns(model, batches(x))
    directions = patterns
    if name == "pattern_attribution":
        directions = {key: model.get_parameter(key).detach() * pattern for key, pattern in patterns.items()}
    explained = compile_for_lrp(model, getattr(composites, name)(patterns))
    found, expected = explained.attribute(x[:3], 1), carried_back(model, directions, x[:3], 1)
    assert agreement(explained, x[:3], found, expected, "gradient with other weights") <= FLOAT64


def test_pattern_attribution_conserves() -> None:
    """w^T a = 1: dense layers without a closed ReLU between hand on all relevance."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double().eval()
    x = torch.randn(50, 5, dtype=torch.float64)
    explained = compile_for_lrp(model, composites.pattern_attribution(fit_patterns(model, [x])))
    assert torch.allclose(explained.attribute(x, 2).sum(1), model(x)[:, 2])


def test_patterns_follow_the_weights_they_belong_to() -> None:
    """They are found by weight name, in any order, cast to the model's type; layers that share a weight share one."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU()).eval()
    patterns = fit_patterns(model, [torch.randn(30, 4)])
    assert list(patterns) == ["0.weight"] or list(patterns) == ["2.weight"]
    explained = compile_for_lrp(model.double(), composites.pattern_net(patterns))
    (pattern,) = patterns.values()
    x = torch.randn(2, 4, dtype=torch.float64)
    first, hidden = layer(x), F.relu(layer(x))
    second = layer(hidden)
    r = (F.relu(second) * torch.eye(4, dtype=x.dtype)[0] * (second > 0)) @ pattern.double()
    assert relative_error(explained.attribute(x, 0), ((r * (first > 0)) @ pattern.double()).detach()) <= FLOAT64


@given(batch=st.integers(0, 3), inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_shapes(batch: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()).double().eval()
    patterns = fit_patterns(model, [torch.randn(20, inputs, dtype=torch.float64)])
    x = torch.randn(batch, inputs, dtype=torch.float64)
    found = compile_for_lrp(model, composites.pattern_net(patterns)).attribute(x, 0)
    expected = (model(x) * torch.eye(outputs, dtype=x.dtype)[0]).detach() @ patterns["0.weight"]
    torch.testing.assert_close(found, expected.detach(), rtol=FLOAT64, atol=0)


def test_missing_and_misshapen_patterns_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    with pytest.raises(errors.PatternError, match=r"weight is '0.weight': there is none.*(.|\n)*fit_patterns"):
        compile_for_lrp(model, "pattern_net").attribute(torch.randn(2, 4), 0)
    wrong = composites.pattern_attribution({"0.weight": torch.ones(4, 3)})
    with pytest.raises(errors.PatternError, match=r"of shape \(4, 3\), the weight of \(3, 4\)"):
        compile_for_lrp(model, wrong).attribute(torch.randn(2, 4), 0)


def test_fitting_refuses_what_it_cannot_estimate() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(errors.PatternFitError, match=r"Call model\.eval"):
        fit_patterns(model, [torch.randn(2, 4)])
    with pytest.raises(errors.PatternFitError, match="yields no batch"):
        fit_patterns(model.eval(), [])
    with pytest.raises(errors.PatternFitError, match="two_component"):
        fit_patterns(model, [torch.randn(2, 4)], "best")  # type: ignore[arg-type]
