"""Coverage as data: statuses, edges, promises, conversions and what is refused, of calls known by heart."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, errors
from lrp_compiler.coverage import EdgeRow, PromiseRow
from lrp_compiler.rules import Stop

X = torch.ones(2, 3)


class Mixed(nn.Module):
    """One node of each kind: constants, a conversion, an op that a rule stops and one that is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.arange(3) + 1.0
        gate = torch.sigmoid(self.layer(x) * scale)
        return gate + torch.erf(x.tanh())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.special.i1e(self.table(ids)).sum(1)


def test_every_node_has_a_status() -> None:
    found = compile_for_lrp(Mixed(), rules={torch.ops.aten.erf: Stop()}).report(X)
    nodes = {node.name: node for node in found.nodes}
    assert {name: node.status for name, node in nodes.items()} == {
        "arange": "constant",
        "add": "constant",
        "linear": "covered",
        "mul": "covered",
        "sigmoid": "covered",
        "tanh": "covered",
        "erf": "stopped",
        "add_1": "covered",
    }
    assert nodes["linear"].edges == (EdgeRow(0, "x", "coefficient"),)
    assert PromiseRow("operand 1", "p_layer_weight") in nodes["linear"].promises
    assert [(edge.node, edge.kind) for edge in nodes["sigmoid"].edges] == [("mul", "relevance")]
    assert [edge.node for edge in nodes["add_1"].edges] == ["sigmoid"] and not nodes["erf"].edges
    assert nodes["mul"].source is not None and "gate = torch.sigmoid" in nodes["mul"].source
    coverage = found.coverage
    assert (coverage.covered_nodes, coverage.live_nodes) == (6, 6) and coverage.complete
    assert {str(one): one.place for one in coverage.conversions}["sigmoid -> relevance"].startswith(
        "(the model itself): "
    )
    assert "codegen" in found.milliseconds and sum(op.nodes for op in found.ops) == len(found.nodes)
    assert all(name in found.table() for name in nodes)


def test_uncovered_rows_are_those_of_the_error() -> None:
    explained = compile_for_lrp(Tokens())
    ids = torch.tensor([[1, 2]])
    found = explained.coverage(ids)
    with pytest.raises(errors.UncoveredOpsError) as caught:
        explained.attribute(ids, 0)
    assert found.uncovered == caught.value.rows and not found.complete
    assert {node.name: node.status for node in found.nodes} == {
        "embedding": "source",
        "special_i1e": "uncovered",
        "sum_1": "covered",
    }
    assert "2/3 (66 %)" in str(found) and "special_i1e" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["uncovered"][0]["op"] == "aten::special_i1e"


def test_a_refusal_is_a_row() -> None:
    found = compile_for_lrp(nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5))).coverage(torch.ones(5, 2, 3))
    (failure,) = found.failures
    assert failure.id == errors.RecurrentError.id and "model.eval()" in failure.remedy
    assert "capture" in found.milliseconds and f"[{failure.id}]" in str(found)


def test_a_wrong_question_is_an_error() -> None:
    with pytest.raises(errors.UnknownInputError):
        compile_for_lrp(nn.Linear(3, 2)).coverage(X, wrt="image")
