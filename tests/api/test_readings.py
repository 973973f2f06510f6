"""Relevance at attention heads and maps, and of weights and biases."""

from __future__ import annotations

import pytest
import torch
import zoo
from accuracy import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites, errors
from lrp_compiler.rules import AlphaBeta, Gamma, OpClass, Rule, ZPlus, on

FLOAT64 = 1e-10


class Attending(nn.Module):
    """Two heads, causal, written out or fused."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(6, 18), nn.Linear(6, 4), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
            mixed = F.dropout(torch.softmax(q @ k.mT / 3**0.5 + mask, -1), 0.1, self.training) @ v
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("composite", "share"), [("attnlrp", 0.5), ("input_x_gradient", 1.0)])
def test_maps_and_heads(fused: bool, composite: str, share: float) -> None:
    model, x = Attending(fused).double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    tape = compile_for_lrp(model, composite).run(x)[1]
    q, k, v = model.qkv(x).detach().unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    weights = torch.softmax((q @ k.mT / 3**0.5).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf), -1)
    mixed = weights @ v
    c = (model.out.weight.detach()[1] / 5).expand(2, 5, 6).unflatten(-1, (2, 3)).transpose(1, 2)
    (heads,) = tape.heads(1).values()
    (maps,) = tape.attention_maps(1).values()
    assert relative_error(heads, (mixed * c).sum(-1)) <= FLOAT64
    assert relative_error(maps, share * weights * (c @ v.mT)) <= FLOAT64
    assert relative_error(maps.sum(-1), share * heads) <= FLOAT64


def test_maps_of_architectures_are_named_by_module() -> None:
    for name in ("bert", "llama", "vit", "gpt2"):
        case = zoo.build(name, double=True)
        with torch.no_grad():
            tape = compile_for_lrp(case.model, "attnlrp").run(*case.args, **case.kwargs)[1]
        maps, heads = tape.attention_maps(case.target), tape.heads(case.target)
        assert maps.keys() == heads.keys() and all("layer" in path or "block" in path or "h." in path for path in maps)
        for path, found in maps.items():
            assert relative_error(found.sum(-1), 0.5 * heads[path]) <= FLOAT64


@pytest.mark.parametrize("fused", [True, False])
def test_constant_maps_are_refused(fused: bool) -> None:
    tape = compile_for_lrp(Attending(fused).eval(), "cp_lrp").run(torch.randn(2, 5, 6))[1]
    assert tape.heads(1)
    with pytest.raises(errors.SiteWithoutRelevanceError, match=r"constant|stops it"):
        tape.attention_maps(1)


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "bert", "llama", "gpt2", "t5"])
def test_parameters_times_gradient(name: str) -> None:
    """Under the gradient of every op, a parameter's relevance is the parameter times its gradient, whatever it is."""
    case = zoo.build(name, double=True)
    _, tape = compile_for_lrp(case.model, "input_x_gradient").run(*case.args, **case.kwargs)
    found = tape.parameters(case.target)
    assert set(found) <= {name for name, _ in case.model.named_parameters(remove_duplicate=False)}
    seeded = tape.seeded_output(case.target).sum()
    wanted = {name: case.model.get_parameter(name) for name in found}
    gradients = torch.autograd.grad(seeded, list(wanted.values()), allow_unused=True)
    expected = {
        name: torch.zeros_like(parameter) if gradient is None else (parameter * gradient).detach()
        for (name, parameter), gradient in zip(wanted.items(), gradients, strict=True)
    }
    scale = max(float(product.abs().max()) for product in expected.values())
    for path, product in expected.items():
        assert float((found[path] - product).abs().max()) <= 1e-9 * scale, path


def restated(rule: Rule, x: Tensor, layer: nn.Linear, r: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of weight and bias from the matrix of contributions, one output of one sample at a time."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    on_weight, on_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for n, value in enumerate(x):
        for j, w in enumerate(weight):
            parts, z = value * w, value @ w + bias[j]
            up, down = parts.clamp(min=0), parts.clamp(max=0)
            if isinstance(rule, Gamma):
                side = up if z > 0 else down
                b = bias[j] + rule.gamma * (bias[j].clamp(min=0) if z > 0 else bias[j].clamp(max=0))
                shares = parts + rule.gamma * side
                total = shares.sum() + b
                shares = shares / (total + 1e-6 * torch.sign(total))
            else:
                alpha, beta = (rule.alpha, rule.beta) if isinstance(rule, AlphaBeta) else (1.0, 0.0)
                p, m = up.sum() + bias[j].clamp(min=0), down.sum() + bias[j].clamp(max=0)
                shares = alpha * up / (p + 1e-6) - beta * down / (m - 1e-6)
            on_weight[j] += shares * r[n, j]
            on_bias[j] += r[n, j] * (1 - shares.sum())
    return on_weight, on_bias


@pytest.mark.parametrize("rule", [Gamma(gamma=0.4), ZPlus(), AlphaBeta()], ids=str)
def test_parameters_of_sign_split_rules(rule: Rule) -> None:
    layer, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64)
    seed = torch.randn(3, 4, dtype=torch.float64)
    composite = composites.epsilon().override((on(OpClass.LINEAR), rule))
    found = compile_for_lrp(layer, composite).run(x)[1].parameters(seed)
    weight, bias = restated(rule, x, layer, (layer(x) * seed).detach())
    assert relative_error(found["weight"], weight) <= FLOAT64
    assert relative_error(found["bias"], bias) <= 1e-8


def test_parameters_share_a_layers_relevance() -> None:
    """Weights and biases of a layer together hold what its output does."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        tape = compile_for_lrp(model, "epsilon").run(x)[1]
    found = tape.parameters(1)
    assert float(found["3.weight"].sum() + found["3.bias"].sum()) == pytest.approx(float(tape.seeded_output(1).sum()))
    hidden = float(tape.relevance(1, at="0").sum())
    assert float(found["0.weight"].sum() + found["0.bias"].sum()) == pytest.approx(hidden)
    assert set(tape.parameters(1, "0.*")) == {"0.weight", "0.bias"}


def test_tied_weights_add_up_their_uses() -> None:
    layer = nn.Linear(4, 4, bias=False)
    model, x = nn.Sequential(layer, nn.ReLU(), layer).double(), torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        tape = compile_for_lrp(model, "epsilon").run(x)[1]
    (found,) = tape.parameters(0).values()
    hidden = torch.relu(x @ layer.weight.T).detach()
    c = torch.eye(4, dtype=x.dtype)[0].expand(2, 4)
    second = layer.weight * (c.T @ hidden)
    first = layer.weight * (((c @ layer.weight) * (hidden > 0)).T @ x)
    assert relative_error(found, (first + second).detach()) <= FLOAT64


def test_parameters_without_relevance_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    tape = compile_for_lrp(model, "epsilon_plus_flat").run(x)[1]
    assert set(tape.parameters(0, "2.*")) == {"2.weight", "2.bias"}
    with pytest.raises(errors.ParameterRelevanceError, match=r"'flat' of linear .* no relevance for the parameters"):
        tape.parameters(0)
    with pytest.raises(errors.UnknownSiteError, match=r"Parameters alike"):
        tape.parameters(0, "1.weight")


def test_the_interpreter_reads_relevance_and_values_alone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double(), torch.randn(2, 4).double()
    with torch.no_grad():
        tape = compile_for_lrp(model, "epsilon", reference=True).run(x)[1]
        assert torch.equal(tape.activations("0"), model[0](x))
    with pytest.raises(errors.ReferenceModeError, match=r"gives relevance at values, not parameter"):
        tape.parameters(0)


@pytest.mark.parametrize("name", ["relp", "linear_interpreter"])
def test_the_interpreter_refuses_what_carries_coefficients(name: str) -> None:
    """Gradients beside LRP rules, and rows of W, are no relevance."""
    model, x = Attending(False).double().eval(), torch.randn(2, 5, 6).double()
    with pytest.raises(errors.ReferenceModeError, match=r"carries relevance alone"):
        compile_for_lrp(model, name, reference=True).attribute(x, 0)
