"""Weights prepared once: the relevance of weights as they are, whatever happens to these between calls."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lrp_compiler import compile_for_lrp
from lrp_compiler.errors import OptionValueError
from lrp_compiler.kernels.packed_products import packs
from lrp_compiler.passes.optable import schema_name
from lrp_compiler.passes.program import InputKind, Program
from lrp_compiler.passes.storage import base_of, shown
from lrp_compiler.prepared_weights import LAYOUTS

PACKED = "mkl::_mkl_linear"
WIDE = 256
needs_packing = pytest.mark.skipif(not packs(torch.empty(WIDE, WIDE), 8), reason="this build of torch packs no weights")


class Transposed(nn.Module):
    """x W + b with W (in, out), as GPT-2 spells its layers."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(given, made) * given**-0.5), nn.Parameter(torch.randn(made))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def wide() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDE, WIDE), nn.ReLU(), Transposed(WIDE, 2 * WIDE), nn.ReLU(), nn.Linear(2 * WIDE, 3))
    return nn.Sequential(*layers)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(128, 3)).eval()


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(weight_norm(nn.Linear(WIDE, WIDE)), nn.ReLU(), nn.Linear(WIDE, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "wide": (wide, (8, WIDE)),
    "convolutions": (convolutions, (2, 3, 8, 8)),
    "weight norm": (normed, (8, WIDE)),
}
COMPOSITES = ("attnlrp", "epsilon_plus", "epsilon_gamma_box", "input_x_gradient")


def program_of(module: Any, *args: Any) -> Program:
    """What runs for a class alone."""
    module.attribute(*args, 1)
    (*_, made) = module.compiler.executables(module.compiler.call(module.__dict__["_model"], args, {}))
    program: Program = made.program
    return program


def loss(found: Tensor, expected: Tensor) -> float:
    """The norm of the error over that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", MODELS)
def test_no_more_is_lost_than_with_weights_as_they_are(name: str, composite: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    exact = compile_for_lrp(make().double(), composite).attribute(x.double(), 1)
    plainly = loss(compile_for_lrp(model, composite).attribute(x, 1), exact)
    module = compile_for_lrp(model, composite, prepare_weights=True)
    for _ in range(2):
        assert loss(module.attribute(x, 1), exact) <= 2 * plainly + torch.finfo(torch.float32).eps
    output, tape = module.run(x)
    assert torch.equal(output, model(x))
    assert loss(tape.relevance(1), exact) <= 2 * plainly + torch.finfo(torch.float32).eps


def targets(graph: Any) -> list[str]:
    return [schema_name(node.target) for node in graph.nodes if node.op == "call_function"]


def test_what_rules_make_of_weights_is_made_once() -> None:
    program = program_of(
        compile_for_lrp(convolutions(), "epsilon_gamma_box", prepare_weights=True), torch.randn(2, 3, 8, 8)
    )
    assert program.relevance_graph is not None and program.plain is not None
    assert {name for one in program.prepared_relevance for name in one.of} >= {
        "p_0_weight",
        "p_3_weight",
        "b_1_running_var",
    }
    weights = {spec.node for spec in program.inputs if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)}
    steady = weights | {one.name for one in program.prepared_relevance}
    for node in program.relevance_graph.nodes:
        operands = [base_of(operand).name for operand in node.all_input_nodes]
        assert shown(node) is not None or not operands or not steady.issuperset(operands)


@needs_packing
def test_products_read_packed_weights() -> None:
    """Wide ones of several rows; the forward pass does where its outputs, which keep every bit, are not asked for."""
    model, x = wide(), torch.randn(8, WIDE)
    module = compile_for_lrp(model, "attnlrp", prepare_weights=True)
    program = program_of(module, x)
    assert targets(program.graph).count(PACKED) == 2 and targets(program.relevance_graph).count(PACKED) == 2
    program = module.stages(x)[-1].program
    assert targets(program.graph).count(PACKED) == 0 and targets(program.relevance_graph).count(PACKED) == 2
    one_row = program_of(compile_for_lrp(model, "attnlrp", prepare_weights=True), x[:1])
    assert PACKED not in targets(one_row.graph) + targets(one_row.relevance_graph)


def test_the_report_says_what_is_kept() -> None:
    x = torch.randn(2, 3, 8, 8)
    report = compile_for_lrp(convolutions(), "epsilon_gamma_box", prepare_weights=True).report(x)
    assert report.prepared.count >= 4 and report.prepared.bytes > 2 * 4 * 8 * 8 * 9
    assert f"{report.prepared.bytes:,} B" in str(report)
    assert "kept" not in str(compile_for_lrp(convolutions(), "epsilon_gamma_box").report(x))


@needs_packing
def test_open_sizes_read_weights_as_they_are() -> None:
    model = wide()
    module = compile_for_lrp(model, "attnlrp", prepare_weights=True)
    for rows in (8, 9, 10):
        x = torch.randn(rows, WIDE)
        torch.testing.assert_close(module.attribute(x, 1), compile_for_lrp(model, "attnlrp").attribute(x, 1))
    assert PACKED not in targets(program_of(module, x).graph)


@needs_packing
def test_layouts_for_many_numbers_of_rows_do_not_add_up() -> None:
    model = wide()
    module = compile_for_lrp(model, "attnlrp", prepare_weights=True, dynamic=False)
    for rows in range(8, 13):
        module.attribute(torch.randn(rows, WIDE), 1)
    kept = module.compiler.captures.weights._kept[model[0].weight]
    assert len(kept) == 2 and all(len(layouts) == LAYOUTS for layouts in kept.values())


@needs_packing
def test_one_weight_packed_for_two_numbers_of_rows() -> None:
    """As the last block of a transformer has it, where few tokens are live behind the products that all need."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.linear(torch.relu(self.linear(x)).mean(1))))

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(8, 4, WIDE)
    module = compile_for_lrp(model, "attnlrp", prepare_weights=True)
    exact = compile_for_lrp(Shared().double(), "attnlrp")
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    for _ in range(2):
        assert loss(module.attribute(x, 1), exact.attribute(x.double(), 1)) <= 8 * torch.finfo(torch.float32).eps
    assert {one.packed_for for one in program_of(module, x).prepared_forward} == {8, 32}


def changed_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def other_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def other_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def loaded(model: nn.Module) -> None:
    model.load_state_dict(
        {name: value * 1.5 for name, value in model.state_dict().items() if value.is_floating_point()}
    )


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("change", [changed_in_place, other_memory, other_parameters, loaded, trained])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_changed_are_prepared_anew(name: str, change: Callable[[nn.Module], None]) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    module = compile_for_lrp(model, "epsilon_plus", prepare_weights=True)
    before = module.attribute(x, 1)
    change(model)
    found = module.attribute(x, 1)
    torch.testing.assert_close(found, compile_for_lrp(model, "epsilon_plus").attribute(x, 1))
    assert not torch.allclose(found, before)


def test_nothing_is_made_twice_or_outlives_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutions(), torch.randn(2, 3, 8, 8)
    module = compile_for_lrp(model, "epsilon_gamma_box", prepare_weights=True)
    module.attribute(x, 1)
    weights = module.compiler.captures.weights
    before = len(weights)
    assert before > 0
    with monkeypatch.context() as patch:
        patch.setattr("lrp_compiler.passes.preparation.Preparation.make", None)
        module.attribute(x, 2)
    del model, module
    gc.collect()
    assert len(weights) == 0


def test_buffers_that_the_model_changes_are_read_as_they_are() -> None:
    """Batch norm in training updates its statistics at every call."""
    expected, model = convolutions().train(), convolutions().train()
    module = compile_for_lrp(model, "gradient", prepare_weights=True)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(expected(x)[:, 1].sum(), x)
        torch.testing.assert_close(module.attribute(x, 1), gradient)
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class GivingItsWeight(nn.Module):
    """A model that returns something that its weight alone decides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.linear.weight.abs()
        return F.linear(x, weight), weight


def test_what_callers_get_is_theirs() -> None:
    torch.manual_seed(0)
    model, x = GivingItsWeight(), torch.randn(2, 4)
    module = compile_for_lrp(model, "gradient", prepare_weights=True)
    with torch.no_grad():
        for _ in range(2):
            (_, weight), tape = module.run(x)
            assert torch.equal(tape.coefficients(1), model.linear.weight.abs()[1].expand(2, 4))
            assert torch.equal(weight, model.linear.weight.abs())
            weight.zero_()


def test_derivatives_with_respect_to_weights_see_these() -> None:
    make, shape = MODELS["wide"]
    model, x = make(), torch.randn(shape)
    found, expected = (
        torch.autograd.grad(
            compile_for_lrp(model, "epsilon_plus", **options).attribute(x, 1, create_graph=True).square().sum(),
            list(model.parameters()),
        )
        for options in ({"prepare_weights": True}, {})
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_maps_of_the_tape_see_weights_as_they_are() -> None:
    model, x = wide(), torch.randn(8, WIDE)
    direction = torch.randn(8, WIDE)
    found, expected = (
        compile_for_lrp(model, "epsilon_plus", prepare_weights=wanted)
        .run(x)[1]
        .linearised()
        .apply({"input": direction})
        for wanted in (True, False)
    )
    torch.testing.assert_close(found, expected)


def test_several_targets_at_once() -> None:
    model, x = wide(), torch.randn(8, WIDE)
    found = compile_for_lrp(model, "epsilon_plus", prepare_weights=True).run(x)[1].relevance_of_each([0, 1, 2])
    expected = compile_for_lrp(model, "epsilon_plus").run(x)[1].relevance_of_each([0, 1, 2])
    torch.testing.assert_close(found, expected)


def test_rounded_weights_are_prepared_as_well() -> None:
    model, x = wide(), torch.randn(8, WIDE)
    both = {"relevance_dtype": torch.bfloat16}
    found = compile_for_lrp(model, "epsilon_plus", prepare_weights=True, **both).attribute(x, 1)
    assert torch.equal(found, compile_for_lrp(model, "epsilon_plus", **both).attribute(x, 1))


def test_inference_tensors_are_prepared_at_every_call() -> None:
    with torch.inference_mode():
        model, x = wide(), torch.randn(8, WIDE)
        module = compile_for_lrp(model, "epsilon_plus", prepare_weights=True)
        for factor in (1.0, 2.0):
            model[0].weight.mul_(factor)
            torch.testing.assert_close(module.attribute(x, 1), compile_for_lrp(model, "epsilon_plus").attribute(x, 1))


@pytest.mark.parametrize("other", [{"backend": "inductor"}, {"cuda_graphs": True}, {"reference": True}])
def test_what_cannot_read_prepared_weights_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(OptionValueError, match="prepare_weights"):
        compile_for_lrp(nn.Linear(2, 2), prepare_weights=True, **other)
    with pytest.raises(OptionValueError, match="True or False"):
        compile_for_lrp(nn.Linear(2, 2), prepare_weights="yes")
