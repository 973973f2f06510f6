"""Attention against its chain of rules in relevance space. The papers are named in matrix_form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functions import Op
from matrix_form import TOLERANCE, Tensors, check
from matrix_form_attention import AttentionCase, FusedAttention, OpenAttention, attention_restatement
from torch import Tensor

from lrp_compiler import compile_for_lrp

pytestmark = pytest.mark.usefixtures("float64")

ATTENTIONS = {
    "mha": AttentionCase(),
    "one_token": AttentionCase(queries=1, keys=1),
    "cross": AttentionCase(queries=3, keys=5),
    "scaled": AttentionCase(scale=0.7),
    "gqa": AttentionCase(heads=4, shared_heads=2),
    "mqa_causal": AttentionCase(heads=3, shared_heads=1, mask="causal"),
    "causal": AttentionCase(mask="causal"),
    "bool_mask": AttentionCase(mask="bool"),
    "float_mask": AttentionCase(mask="float"),
    "gqa_bool_mask": AttentionCase(heads=4, shared_heads=2, mask="bool"),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("spelling", [FusedAttention, OpenAttention])
@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_its_chain_of_rules(
    name: str, composite: str, spelling: type[FusedAttention] | type[OpenAttention], reference: bool
) -> None:
    case = ATTENTIONS[name]
    mask = case.mask_tensor()
    restatement = attention_restatement(case, mask, value_only=composite == "cp_lrp")
    check(spelling(case, mask), case.inputs(), restatement, composite, reference)


def test_self_attention_adds_up_its_three_roles() -> None:
    """Fan-out: relevance of a value with several users is the sum over them."""
    case = AttentionCase()
    fused = FusedAttention(case, None)

    def restatement(inputs: Tensors, relevance: Tensor) -> Tensors:
        return (sum(attention_restatement(case, None)(inputs * 3, relevance)),)

    check(Op(lambda x: fused(x, x, x)), (torch.randn(2, 2, 4, 3),), restatement)


@pytest.mark.parametrize("fn", [torch.addmm, torch.baddbmm])
def test_an_infinite_mask_added_to_a_product_takes_nothing(fn: Callable[..., Tensor]) -> None:
    """As nn.MultiheadAttention adds its mask: a masked score has relevance zero, not zero times -inf."""
    leading = (2,) if fn is torch.baddbmm else ()
    mask = torch.zeros(*leading, 3, 4)
    mask[..., 1:] = -torch.inf
    model = Op(lambda q, k, m: fn(m, q, k).softmax(-1), mask)
    output, tape = compile_for_lrp(model, "attnlrp").run(torch.randn(*leading, 3, 5), torch.randn(*leading, 5, 4))
    ledger = tape.ledger(torch.randn_like(output))
    assert all(row.relative_gap <= TOLERANCE for row in ledger.rows)
