"""fuse: what rules emit becomes calls of kernels, as accurate as the ops they replace; reasons where it does not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import zoo
from accuracy import assert_as_accurate
from torch import Tensor, fx, nn

from lrp_compiler import LRPModule, compile_for_lrp, composites, rules
from lrp_compiler.composites import composite_named
from lrp_compiler.errors import OptionValueError
from lrp_compiler.passes.fusing.attention import attention_form
from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.pipeline import Stage
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.rules.base import Composite, on

pytestmark = pytest.mark.usefixtures("interpreted")


class Groups(nn.Module):
    """A convolution, group norm, pooling with overlapping windows, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 4)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.pool(self.norm(self.conv(x))).mean((2, 3)))
        return made


class Signed(nn.Module):
    """Convolutions, one with a batch norm to fold and one in groups, and a linear layer, all of signed inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 6, 3, groups=2), nn.Linear(6 * 9, 5)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))).flatten(1))
        return made


class Spelled(nn.Module):
    """Attention spelled in products, its softmax over another dimension than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.key(x) @ self.query(x).transpose(-2, -1)).softmax(-2)
        return (weights.transpose(-2, -1) @ self.value(x)).mean(1)


def images(model: Callable[[], nn.Module], size: int) -> Callable[[], zoo.Case]:
    """A case of a model of images."""

    def build() -> zoo.Case:
        torch.manual_seed(0)
        return zoo.Case(model().eval(), (torch.randn(2, 3, size, size),), target=1)

    return build


def spelled() -> zoo.Case:
    torch.manual_seed(0)
    return zoo.Case(Spelled().eval(), (torch.randn(2, 5, 8),), target=1)


def signed_by(rule: rules.Rule) -> Composite:
    """Epsilon with a sign-split rule on linear maps."""
    return composite_named("epsilon").override((on(OpClass.LINEAR), rule))


SIGN_SPLIT = {f"signsplit_{kind}_{way}": n for kind, n in (("conv2d", 2), ("linear", 1)) for way in ("fwd", "bwd")}


@dataclass(frozen=True)
class Fused:
    """A case, what explains it, and the kernels that its relevance has to run, with how often."""

    build: Callable[[], zoo.Case]
    composite: str | Composite
    kernels: dict[str, int]


LLAMA = {"norm_bwd": 5, "gated_mlp_bwd": 2, "rope_bwd": 4, "attention_lrp_bwd": 2, "embedding_relevance": 1}
EPSILON = {"epsilon_conv2d_bwd": 2, "epsilon_linear_bwd": 1}

FUSED: dict[str, Fused] = {
    "llama": Fused(lambda: zoo.build("llama"), "attnlrp", LLAMA),
    "llama, CP": Fused(lambda: zoo.build("llama"), "cp_lrp", {"attention_lrp_bwd": 2, "norm_bwd": 5}),
    "gpt2": Fused(lambda: zoo.build("gpt2"), "attnlrp", {"norm_bwd": 5, "attention_lrp_bwd": 2}),
    "vit": Fused(lambda: zoo.build("vit"), "attnlrp", {"norm_bwd": 5, "attention_lrp_bwd": 2}),
    "group norm and pooling": Fused(images(Groups, 8), "epsilon", {"norm_bwd": 1, "maxpool_bwd": 1}),
    "alpha-beta": Fused(images(Signed, 9), signed_by(rules.AlphaBeta(alpha=2, beta=1)), SIGN_SPLIT),
    "z+": Fused(images(Signed, 9), signed_by(rules.ZPlus()), SIGN_SPLIT),
    "gamma": Fused(images(Signed, 9), signed_by(rules.Gamma(gamma=0.25)), SIGN_SPLIT),
    "epsilon": Fused(images(Signed, 9), signed_by(rules.Epsilon(epsilon=1e-2)), EPSILON),
    "softmax": Fused(spelled, "attnlrp", {"softmax_bwd": 1}),
    "top": Fused(images(Groups, 8), composites.keep_top(composite_named("attnlrp"), 0.25), {"topk_filter": 2}),
}


def relevance(case: zoo.Case, explained: LRPModule) -> Tensor:
    """Relevance of the input."""
    _, tape = explained.run(*case.args, **case.kwargs)
    found: Tensor = tape.relevance(case.target)
    return found


def in_double(name: str, case: zoo.Case) -> zoo.Case:
    """The same case in float64 throughout."""
    if name.split(",")[0] in zoo.BUILDERS:
        return zoo.build(name.split(",")[0], double=True)
    return zoo.Case(copy.deepcopy(case.model).double(), tuple(value.double() for value in case.args), {}, case.target)


OTHER_USES = ("llama, CP", "gpt2", "z+")
"""No kernel that the other cases do not run."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in OTHER_USES else ()) for n in FUSED])
def test_kernels_take_the_place_of_what_rules_emit(name: str) -> None:
    """Against the same model in float64 relevance loses at most twice what it loses by ATen ops."""
    fused = FUSED[name]
    case = fused.build()
    by_kernels = compile_for_lrp(case.model, fused.composite, backend="triton")
    report = by_kernels.report(*case.args, **case.kwargs)
    used = Counter(kernel for row in report.kernels for kernel in row.kernels)
    assert {kernel: used[kernel] for kernel in fused.kernels} == fused.kernels, report.kernel_table()
    by_ops = compile_for_lrp(by_kernels, fused.composite, backend="eager")
    found, eager = (relevance(case, explained) for explained in (by_kernels, by_ops))
    double = in_double(name, case)
    exact = relevance(double, compile_for_lrp(double.model, fused.composite, backend="eager"))
    assert_as_accurate(found, eager, exact.double(), 2.0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama", "alpha-beta"])
def test_fused_relevance_can_be_differentiated_and_mapped(name: str) -> None:
    """With create_graph the references run, whose derivatives torch knows; several targets map over the kernels."""
    case, composite = FUSED[name].build(), FUSED[name].composite
    grads = []
    for backend in ("triton", "eager"):
        explained = compile_for_lrp(case.model, composite, backend=backend)
        _, tape = explained.run(*case.args, **case.kwargs)
        relevance = tape.relevance(case.target, create_graph=True)
        weights = [parameter for parameter in case.model.parameters() if parameter.dim() > 1][-2:]
        grads.append(torch.autograd.grad(relevance.square().sum(), weights))
        each = tape.relevance_of_each([case.target, case.target])
        torch.testing.assert_close(each[0], each[1])
        torch.testing.assert_close(each[0], relevance.detach())
    torch.testing.assert_close(grads[0], grads[1])


def calls(stages: tuple[Stage, ...], name: str) -> list[fx.Node]:
    """The calls of an op of the dialect in the last stage."""
    graph = stages[-1].program.relevance_graph
    assert graph is not None
    return [node for node in graph.nodes if str(node.target) == f"lrp.{name}.default"]


def test_kernels_take_in_their_neighbours() -> None:
    """AttnLRP's shares, keys that serve two heads each, the weight and the residual sum of a norm, R = a c."""
    case = zoo.build("llama")
    stages = compile_for_lrp(case.model, "attnlrp", backend="triton").stages(**case.kwargs)
    for node in calls(stages, "attention_lrp_bwd"):
        assert node.args[-3:] == (0.25, 0.25, 0.5)
        assert [tensor_of(node.args[place]).shape[1] for place in (1, 2, 3)] == [4, 2, 2]
    norms = calls(stages, "norm_bwd")
    assert all(node.args[1] is not None for node in norms)
    assert sum(node.args[3] is not None for node in norms) == 4
    signed = FUSED["alpha-beta"].build()
    stages = compile_for_lrp(signed.model, FUSED["alpha-beta"].composite, backend="triton").stages(*signed.args)
    assert [node.args[-1] for node in calls(stages, "signsplit_conv2d_bwd")] == [False, True]


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "bias"])
@pytest.mark.parametrize("leaves", [(0, 1, 2), (2,), (0, 2)])
def test_attention_as_it_stands_on_cuda(mask: str, leaves: tuple[int, ...]) -> None:
    """There the op stays whole, and no log-sum-exp is kept: its derivative by torch in float64 is the measure."""
    query, c = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    key, value = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    given = {"bool": torch.rand(2, 1, 7, 9) < 0.7, "bias": torch.randn(4, 7, 9)}.get(mask)
    if given is not None and given.dtype == torch.bool:
        given[..., 0] = True
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    options = {"scale": 0.3, "enable_gqa": True}
    args = (query, key, value, given, 0.0, mask == "causal")
    found = attention_form(sdpa, args, options, leaves, [c], [None])
    wide = [one.double().requires_grad_() for one in args[:3]]
    extra = given.double() if mask == "bias" and given is not None else given
    output = sdpa(*wide, extra, *args[4:], **options)
    expected = torch.autograd.grad(output, [wide[leaf] for leaf in leaves], c.double())
    for one, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)


def test_every_op_has_a_kernel_or_a_reason() -> None:
    case = zoo.build("llama")
    explained = compile_for_lrp(case.model, "attnlrp")
    for backend in ("triton", "auto", "eager"):
        report = compile_for_lrp(explained, "attnlrp", backend=backend).report(**case.kwargs)
        assert report.kernels
        assert all(bool(row.kernels) != bool(row.reason) for row in report.kernels), report.kernel_table()
        assert ("norm_bwd" in str(report)) == (backend == "triton")
    assert "backend='eager'" in str(report)


def test_values_that_sinks_read_are_not_computed_twice() -> None:
    """The ledger reads u, which a sign-split kernel would not store: the ops stay."""
    case = FUSED["alpha-beta"].build()
    explained = compile_for_lrp(case.model, FUSED["alpha-beta"].composite, backend="triton")
    _, tape = explained.run(*case.args)
    tape.ledger(case.target).check()


@pytest.mark.thorough
def test_kernels_do_what_ops_do_when_sizes_are_open() -> None:
    """From the second sequence length on one graph serves all: kernels take sizes as they come."""
    case = zoo.build("gpt2")
    fused, eager = (compile_for_lrp(case.model, "attnlrp", backend=backend) for backend in ("triton", "eager"))
    for length in (5, 6, 9):
        tokens = torch.randint(0, 40, (1, length))
        found, expected = (one.attribute(tokens, target=zoo.Token(-1, 3)) for one in (fused, eager))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert len(fused.compilations) == 2


def test_without_a_device_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(OptionValueError, match="TRITON_INTERPRET=1"):
        compile_for_lrp(nn.Linear(3, 2), "epsilon", backend="triton").attribute(torch.randn(1, 3), target=0)
