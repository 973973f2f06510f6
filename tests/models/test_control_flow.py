"""torch.cond: the branch that is taken is explained as if the model had no other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp, composites
from lrp_compiler.errors import NotLinearError, UncoveredOpsError, UnknownSiteError

# torch's own, when torch.cond runs eagerly on a tensor that a gradient passes through.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
FLOAT64 = 1e-12
"""Relative difference of the same formulas in another order of operations, some hundred roundings."""
CONSERVING = 1e-10


class Parts(nn.Module):
    """The weights of both branches, and what every model here does before and after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 5)
        self.other, self.norm, self.head = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(5))

    def feed_forward(self, h: Tensor) -> Tensor:
        """Linear maps, a gate and a constant: sinks of bias and of constants."""
        return self.down(torch.relu(self.up(h))) + self.shift

    def normalised(self, h: Tensor) -> Tensor:
        """A norm, a product of two values and dropout."""
        return self.dropout(self.norm(h) * torch.tanh(self.other(h)))

    def squashed(self, h: Tensor) -> Tensor:
        """An op whose relevance has no coefficient at zero, right behind the operand."""
        return torch.sigmoid(h) * self.shift

    def ends(self, x: Tensor, h: Tensor, made: Tensor) -> Tensor:
        return self.head(made + h)


class Switch(Parts):
    """The branch depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.ends(x, h, torch.cond(x.sum() > 0, self.feed_forward, self.normalised, (h,)))


class SwitchPlain(Parts):
    """What ``Switch`` computes for one answer of its predicate."""

    def __init__(self, taken: bool) -> None:
        super().__init__()
        self.taken = taken

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.ends(x, h, self.feed_forward(h) if self.taken else self.normalised(h))


class Squash(Parts):
    """One branch hands on coefficients, the other relevance."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.ends(x, h, torch.cond(x.sum() > 0, self.feed_forward, self.squashed, (h,)))


class SquashPlain(SwitchPlain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.ends(x, h, self.feed_forward(h) if self.taken else self.squashed(h))


class Leading(Parts):
    """Both branches start with the model's first linear map."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.cond(x.sum() > 0, lambda v: torch.relu(self.first(v)), lambda v: self.first(v).tanh(), (x,))
        return self.head(made)


class LeadingPlain(SwitchPlain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.relu(h) if self.taken else h.tanh())


class Nested(Parts):
    """A branch inside a branch, several operands and outputs, and outputs that are no floats."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x)

        def inner(h: Tensor) -> Tensor:
            return torch.cond(h.max() > 100, self.normalised, self.feed_forward, (h,))

        def outer(h: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return inner(h) * k, h.argmax(), k.exp()

        def flat(h: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.other(h), h.argmin(), k + h.sum(0)

        made, where, more = torch.cond(x.sum() > 0, outer, flat, (h, self.shift))
        return self.ends(x, h, made * 2), where, more


class NestedPlain(SwitchPlain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x)
        if self.taken:
            made, where, more = self.feed_forward(h) * self.shift, h.argmax(), self.shift.exp()
        else:
            made, where, more = self.other(h), h.argmin(), self.shift + h.sum(0)
        return self.ends(x, h, made * 2), where, more


MODELS: dict[str, tuple[type[Parts], type[SwitchPlain]]] = {
    "switch": (Switch, SwitchPlain),
    "squash": (Squash, SquashPlain),
    "leading": (Leading, LeadingPlain),
    "nested": (Nested, NestedPlain),
}
NAMES = ("attnlrp", "cp_lrp", "epsilon_plus_flat", "dynamiclrp", "input_x_gradient", "gradient", "linear_interpreter")


def built(name: str) -> tuple[nn.Module, dict[bool, nn.Module]]:
    """A model in float64 and eval mode, and for each answer the same without torch.cond."""
    model, plain = MODELS[name]
    return model().double().eval(), {taken: plain(taken).double().eval() for taken in (True, False)}


@cache
def traced(name: str) -> tuple[LRPModule, dict[bool, LRPModule]]:
    """The same explained; composites share what was traced."""
    torch.manual_seed(0)
    model, plain = built(name)
    return compile_for_lrp(model, "gradient"), {taken: compile_for_lrp(one, "gradient") for taken, one in plain.items()}


@cache
def explained_by(name: str, composite: str, **options: Any) -> tuple[LRPModule, dict[bool, LRPModule]]:
    """The same under a composite; what is compiled for it serves every test that does not change it."""
    model, plain = traced(name)
    each = {taken: compile_for_lrp(one, composite, **options) for taken, one in plain.items()}
    return compile_for_lrp(model, composite, **options), each


def inputs(taken: bool, samples: int = 3) -> Tensor:
    """A batch whose sum is positive or negative, as asked."""
    torch.manual_seed(1)
    x = torch.randn(samples, 4).double()
    return x - x.mean() + (0.2 if taken else -0.2)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def leaves(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=FLOAT64, atol=FLOAT64 * other.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_eagers_from_one_capture(name: str) -> None:
    model, plain = built(name)
    explained = compile_for_lrp(model)
    for taken in (True, False, True):
        x = inputs(taken)
        for ours, cond, theirs in zip(*(leaves(m(x)) for m in (explained, model, plain[taken])), strict=True):
            assert torch.equal(ours, cond) and torch.equal(ours, theirs)
    assert explained.compiler.captures.kept == 1


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("composite", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_that_of_the_branch_alone(name: str, composite: str, taken: bool) -> None:
    model, plain = explained_by(name, composite)
    x = inputs(taken)
    with torch.no_grad():
        tape, alone = model.run(x)[1], plain[taken].run(x)[1]
        assert_same(tape.relevance(1), alone.relevance(1))
        ledger = tape.ledger(1)
    if composite in ("attnlrp", "cp_lrp", "dynamiclrp", "input_x_gradient"):
        ledger.check(CONSERVING)
        assert ledger.gap == pytest.approx(0, abs=CONSERVING * ledger.rows[0].magnitude)
        sinks, others = ledger.sink_totals(), alone.ledger(1).sink_totals()
        for kind in sinks.keys() | others.keys():
            # A sink that only the other branch has is there, and empty.
            assert sinks.get(kind, 0) == pytest.approx(others.get(kind, 0), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_interpreter_agrees(name: str, taken: bool) -> None:
    x = inputs(taken)
    for composite in ("attnlrp", "input_x_gradient"):
        interpreted, plain = explained_by(name, composite, reference=True)
        with torch.no_grad():
            fast = explained_by(name, composite)[0].run(x)[1].relevance(0)
            slow = interpreted.run(x)[1].relevance(0)
            alone = plain[taken].run(x)[1].relevance(0)
        assert_same(slow, alone)
        if name != "squash":
            # Where relevance becomes coefficients, the compiled path divides by a stabilised value.
            torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_several_targets_at_once(name: str, taken: bool) -> None:
    tape = explained_by(name, "attnlrp")[0].run(inputs(taken))[1]
    together = tape.relevance_of_each([0, 2])
    for target, found in zip((0, 2), together, strict=True):
        assert_same(found.detach(), tape.relevance(target).detach())


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_training_gives_eagers_gradients(name: str, taken: bool) -> None:
    model, plain = built(name)
    explained, x = compile_for_lrp(model), inputs(taken)
    grads = []
    # Eager torch 2.13 fails to differentiate branches with outputs that are no floats.
    for module, run in (
        (model, explained),
        (plain[taken], plain[taken]),
        (model, explained if name == "nested" else model),
    ):
        module.zero_grad()
        first(run(x)).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
    ours, alone, eager = grads
    assert ours.keys() == eager.keys() and ours.keys() >= alone.keys() and "first.weight" in ours
    for key, grad in ours.items():
        # Like eager's, parameters that only the other branch reads have a gradient, of zero.
        assert_same(grad, alone[key] if key in alone else torch.zeros_like(grad))
        assert_same(grad, eager[key])


def test_dropout_in_a_branch_is_drawn_once() -> None:
    model = Switch().double().train()
    explained, x = compile_for_lrp(model, "attnlrp"), inputs(False)
    torch.manual_seed(3)
    eager = model(x)
    torch.manual_seed(3)
    out, tape = explained.run(x)
    assert torch.equal(out, eager)
    ledger = tape.ledger(1)
    ledger.check(CONSERVING)
    # The masks of the recomputed branch are those of the first pass, so both readings are of one network.
    assert ledger.inputs == pytest.approx(tape.relevance(1).sum().item(), rel=1e-10)


def test_the_other_branch_is_not_run() -> None:
    class Infinite(Parts):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(torch.cond(x.sum() > 0, lambda h: h * 2, lambda h: (h / 0).log() * h, (h,)))

    model = Infinite().double()
    ran: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    explained = compile_for_lrp(model, "attnlrp")
    tape = explained.run(inputs(True))[1]
    tape.relevance(0)
    with Watch():
        found = explained.run(inputs(True))[1].relevance(0)
    assert torch.isfinite(found).all() and "aten::addmm" in ran and "aten::log" not in ran


def test_a_batch_differs_from_its_samples_by_the_predicate_alone() -> None:
    class PerSample(Parts):
        def forward(self, x: Tensor, flag: Tensor) -> Tensor:
            h = self.first(x)
            return self.ends(x, h, torch.cond(flag, self.feed_forward, self.normalised, (h,)))

    explained, x = compile_for_lrp(PerSample().double().eval(), "attnlrp"), inputs(True)
    for flag in (torch.tensor(True), torch.tensor(False)):
        together = explained.run(x, flag)[1].relevance(1)
        for sample in range(len(x)):
            assert_same(
                explained.run(x[sample : sample + 1], flag)[1].relevance(1)[0].detach(), together[sample].detach()
            )


def test_python_predicates_choose_the_branch_that_is_captured() -> None:
    class Flagged(Parts):
        def forward(self, x: Tensor, flag: bool) -> Tensor:
            h = self.first(x)
            return self.ends(x, h, torch.cond(flag, self.feed_forward, self.normalised, (h,)))

    explained, x = compile_for_lrp(Flagged().double().eval(), "attnlrp"), inputs(True)
    for flag in (True, False):
        found = explained.run(x, flag)[1].relevance(1)
        plain = compile_for_lrp(SwitchPlain(flag).double().eval(), "attnlrp").run(x)[1].relevance(1)
        assert_same(found.detach(), plain.detach())


def test_the_linear_map_is_that_of_the_branch() -> None:
    x = inputs(True)
    model, plain = built("switch")
    grads = []
    for module in (model, plain[True]):
        lin = compile_for_lrp(module, "linear_interpreter").run(x)[1].linearised()
        (row,) = lin.row(1).values()
        column = lin.apply({"x": torch.ones_like(x)})
        grads.append((row, column, lin.offset))
    for one, other in zip(*grads, strict=True):
        assert_same(one.detach(), other.detach())


@pytest.mark.parametrize("taken", [True, False])
def test_relevance_of_parameters_inside(taken: bool) -> None:
    model, plain = built("switch")
    found = compile_for_lrp(model, "epsilon").run(inputs(taken))[1].parameters(1)
    alone = compile_for_lrp(plain[taken], "epsilon").run(inputs(taken))[1].parameters(1)
    assert found.keys() >= alone.keys()
    for name, value in found.items():
        assert_same(value.detach(), alone[name].detach() if name in alone else torch.zeros_like(value))


def test_bounds_reach_first_layers_inside() -> None:
    box = composites.epsilon_gamma_box(torch.full((1, 2, 5, 5), -3.0), torch.full((1, 2, 5, 5), 3.0))

    class Images(nn.Module):
        def __init__(self, taken: bool | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.taken, self.conv, self.head = taken, nn.Conv2d(2, 3, 3), nn.Linear(27, 2)

        def forward(self, x: Tensor) -> Tensor:
            paths: list[Callable[[Tensor], Tensor]] = [lambda v: self.conv(v).relu(), lambda v: self.conv(v) * 2]
            made = torch.cond(x.sum() > 0, *paths, (x,)) if self.taken is None else paths[0 if self.taken else 1](x)
            return self.head(made.flatten(1))

    x = torch.randn(2, 2, 5, 5).double()
    for taken in (True, False):
        batch = x - x.mean() + (0.1 if taken else -0.1)
        pair = [compile_for_lrp(Images(t).double(), box).run(batch)[1].relevance(0) for t in (None, taken)]
        assert_same(pair[0].detach(), pair[1].detach())


def test_the_report_covers_both_branches() -> None:
    explained, x = compile_for_lrp(built("switch")[0], "attnlrp"), inputs(True)
    report = explained.report(x)
    assert report.rules["aten::linear", "plain"] == 5 and report.rules["aten::relu", "identity"] == 1
    assert ("aten::native_layer_norm", "layer_norm") in report.rules
    assert ("higher_order::cond", "of its branches") in report.rules
    linear = next(row for row in report.ops if row.op == "aten::linear")
    assert linear.nodes == linear.covered == 5 and report.coverage.complete
    text = str(explained.stages(x)[-1])
    assert "    def cond_when_true(" in text and "    def cond_relevance_when_false(" in text


def test_modules_with_branches_are_copied_and_pickled() -> None:
    explained, x = compile_for_lrp(built("switch")[0], "attnlrp"), inputs(False)
    expected = explained.run(x)[1].relevance(1)
    for other in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert isinstance(other, LRPModule)
        assert torch.equal(other.run(x)[1].relevance(1), expected)


def test_what_cannot_be_explained_is_said() -> None:
    class Strange(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: torch.special.i0e(v), lambda v: v.sin(), (x,))

    x = inputs(True)
    with pytest.raises(UncoveredOpsError, match=r"special_i0e.*test_control_flow.py") as caught:
        compile_for_lrp(Strange().double(), "attnlrp").run(x)
    assert "return torch.cond(" in str(caught.value)
    with pytest.raises(UncoveredOpsError, match=r"higher_order::cond .no exact rule for differences"):
        compile_for_lrp(built("switch")[0], "deep_lift").run(x)
    tape = compile_for_lrp(built("switch")[0], "attnlrp").run(x)[1]
    with pytest.raises(UnknownSiteError, match=r"inside a branch of torch\.cond"):
        tape.relevance(0, at="relu")
    with pytest.raises(NotLinearError, match="not linear in the seed"):
        compile_for_lrp(built("switch")[0], "deconvnet").run(x)[1].linearised()
