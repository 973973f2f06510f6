"""A composite as data: which op each kind of line takes."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import Composite, compile_for_lrp, composites
from lrp_compiler.passes.program import facts
from lrp_compiler.rules import Epsilon, Gamma, Matcher, OpClass, Plain, Rule, WSquare, ZPlus, on


class Net(nn.Module):
    """Three layers, the last two behind ReLUs, and a head outside ``body``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def rules_of(*lines: tuple[Matcher, Rule]) -> list[str]:
    """The rule of every linear layer, in order."""
    composite = composites.epsilon().override(*lines)
    stages = compile_for_lrp(Net(), composite).stages(torch.ones(1, 4))
    program = next(stage.program for stage in stages if stage.name == "assign_rules")
    return [str(facts(node).rule) for node in program.graph.nodes if node.name.startswith("linear")]


def test_lines_match_by_what_they_name() -> None:
    assert rules_of((on(target="aten::linear"), ZPlus())) == ["z_plus"] * 4
    assert rules_of((on(path="body.*"), Plain()), (on(OpClass.LINEAR, path="head"), ZPlus())) == ["plain"] * 3 + [
        "z_plus"
    ]
    assert rules_of((on(OpClass.LINEAR, module_type="Sequential"), ZPlus())) == ["z_plus"] * 3 + ["plain"]
    assert rules_of((on(OpClass.LINEAR, non_negative=True), ZPlus())) == ["plain", "z_plus", "plain", "z_plus"]
    assert rules_of((on(OpClass.LINEAR, non_negative=False), ZPlus())) == ["z_plus", "plain", "z_plus", "plain"]
    assert rules_of((on(OpClass.LINEAR, where=lambda op: "head" in str(op.args[1])), ZPlus()))[-1] == "z_plus"


def test_first_and_last_take_one_op() -> None:
    assert rules_of((on(OpClass.LINEAR, first=True), WSquare())) == ["w_square"] + ["plain"] * 3
    assert rules_of((on(OpClass.LINEAR, last=True), Epsilon(epsilon=0.1))) == ["plain"] * 3 + ["epsilon(0.1)"]
    last_inside = on(OpClass.LINEAR, path="body.*", last=True)
    assert rules_of((last_inside, ZPlus())) == ["plain", "plain", "z_plus", "plain"]
    first, rest = on(OpClass.LINEAR, first=True), on(OpClass.LINEAR)
    assert rules_of((first, WSquare()), (on(OpClass.LINEAR, last=True), Epsilon(epsilon=0.1)), (rest, Gamma())) == [
        "w_square",
        "gamma(0.25)",
        "gamma(0.25)",
        "epsilon(0.1)",
    ]


def test_earlier_lines_win_and_one_line_overrides() -> None:
    base = composites.epsilon_plus(0.2)
    changed = base.override((on(OpClass.LINEAR, last=True), Plain()), name="mine")
    assert isinstance(changed, Composite) and changed.name == "mine" and changed.lines[1:] == base.lines
    model, x = Net().double(), torch.randn(16, 4, dtype=torch.float64)
    both = [compile_for_lrp(model, composite).attribute(x, 0) for composite in (base, changed)]
    assert not torch.allclose(*both)


@pytest.mark.parametrize("name", composites.COMPOSITES)
def test_composites_can_be_pickled(name: str) -> None:
    """A module explained by a Composite object goes through pickle like one explained by name."""
    composite = composites.keep_top(composites.COMPOSITES[name](), 0.5)
    model, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    copied = pickle.loads(pickle.dumps(compile_for_lrp(model, composite)))
    if not name.startswith("pattern_"):
        assert torch.equal(copied.attribute(x, 0), compile_for_lrp(model, composite).attribute(x, 0))
