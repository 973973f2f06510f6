"""Breaking a stage's invariant is caught by the verifier, and it says which stage and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lrp_compiler import compile_for_lrp, errors
from lrp_compiler.passes.pipeline import PIPELINE, Stage, run
from lrp_compiler.passes.program import Program, facts, learn, output_node
from lrp_compiler.passes.verify import LEGAL, verify

aten = torch.ops.aten


def stages() -> dict[str, Stage]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return {stage.name: stage for stage in compile_for_lrp(model, "attnlrp").stages(torch.randn(2, 3))}


def first(program: Program, part: str) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.op == "call_function" and facts(n).part == part)


def drop_value(program: Program) -> Program:
    del first(program, "forward").meta["val"]
    return program


def add_in_place_op(program: Program) -> Program:
    node = next(n for n in program.graph.nodes if n.target is aten.relu.default)
    node.target = aten.relu_.default
    return program


def add_sub_graph(program: Program) -> Program:
    with program.graph.inserting_before(output_node(program.graph)):
        node = program.graph.get_attr("body")
    node.meta["val"] = None
    return program


def forget_output(program: Program) -> Program:
    return program.having(outputs=("gone",))


def forget_source(program: Program) -> Program:
    return program.having(sources={})


def forget_rule(program: Program) -> Program:
    learn(next(n for n in program.graph.nodes if n.target is aten.relu.default), rule=None)
    return program


def read_without_promise(program: Program) -> Program:
    promised = first(program, "promise")
    promised.replace_all_uses_with(promised.args[0])  # type: ignore[arg-type]
    return program


def reverse_order(program: Program) -> Program:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    nodes[-1].append(nodes[0])
    return program


def forget_buffers(program: Program) -> Program:
    return program.having(buffers=())


def keep_relevance_in_forward(program: Program) -> Program:
    learn(first(program, "forward"), part="relevance")
    return program


BREAKS: list[tuple[str, Callable[[Program], Program], str]] = [
    ("capture", drop_value, "has no fake value"),
    ("clean", add_sub_graph, "is a get_attr"),
    ("decompose", drop_value, "has no fake value"),
    ("functionalise", add_in_place_op, "writes to an argument"),
    ("canonicalise", forget_output, "the output gone is gone"),
    ("recognise", reverse_order, "used before it has been defined"),
    ("analyse", forget_source, "nothing is attributed"),
    ("assign_rules", forget_rule, "which has no rule"),
    ("insert_relevance", read_without_promise, "without a promise"),
    ("simplify", add_in_place_op, "writes to an argument"),
    ("lower_promises", forget_buffers, "no buffer is planned"),
    ("partition", keep_relevance_in_forward, "the forward graph holds the relevance node"),
]


@pytest.mark.parametrize(("stage", "damage", "cause"), BREAKS, ids=[stage for stage, _, _ in BREAKS])
def test_a_broken_invariant_is_caught(stage: str, damage: Callable[[Program], Program], cause: str) -> None:
    program = stages()[stage].program
    verify(program, stage)
    with pytest.raises(errors.VerifierError, match=cause) as caught:
        verify(damage(program), stage)
    assert f"after pass '{stage}'" in str(caught.value)


def test_the_runner_verifies_what_a_pass_returns() -> None:
    history = (stages()["canonicalise"],)

    def recognise(program: Program) -> Program:
        return add_in_place_op(program.fork())

    with pytest.raises(errors.VerifierError, match="after pass 'recognise'"):
        run(recognise, history)


def test_every_pass_has_its_table() -> None:
    assert [one.__name__ for one in PIPELINE] == list(LEGAL) == list(stages())
