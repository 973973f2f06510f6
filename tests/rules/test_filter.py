"""The top-k relevance filter."""

from __future__ import annotations

import pytest
import torch
from catalogue import agreement
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp, composites, errors
from lrp_compiler.rules import Plain, TopRelevance

FLOAT64 = 1e-10


def top(relevance: Tensor, count: int) -> Tensor:
    """The ``count`` largest entries of every sample, by sorting."""
    kept = torch.zeros_like(relevance)
    for sample, row in enumerate(relevance.flatten(1)):
        for place in sorted(range(len(row)), key=lambda i: -float(row[i]))[:count]:
            kept[sample].view(-1)[place] = row[place]
    return kept


def test_every_linear_map_keeps_the_largest_relevance() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    conv, dense = model[0], model[3]
    assert isinstance(conv, nn.Conv2d) and isinstance(dense, nn.Linear)
    hidden = model[:3](x).detach()
    c = torch.eye(4, dtype=x.dtype)[1].expand(3, 4) @ dense.weight.detach()
    kept = top(hidden * c, 12)
    c = torch.where(kept != 0, c, 0).view(3, 3, 4, 4) * (conv(x) > 0)
    expected = top(x * torch.nn.functional.conv_transpose2d(c, conv.weight.detach()), 18)
    explained = compile_for_lrp(model, composites.keep_top(composites.epsilon(), 0.25))
    assert agreement(explained, x, explained.attribute(x, 1), expected.detach(), "sorting") <= FLOAT64
    explained.run(x)[1].ledger(1).check()


def test_first_layers_keep_their_rule() -> None:
    """A line for the first layer stays a line for the first layer only, and relevance-typed rules are filtered too."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    explained = compile_for_lrp(model, composites.keep_top(composites.epsilon_plus_flat(), 0.5))
    rules = [rule for _, rule in explained.report(x).rules]
    assert sum("flat" in rule for rule in rules) == 1
    plain = compile_for_lrp(model, composites.epsilon_plus_flat()).run(x)[1]
    assert torch.equal((explained.attribute(x, 0) != 0).sum(1), torch.tensor([3, 3]))
    assert plain.relevance(0).count_nonzero() == 12
    explained.run(x)[1].ledger(0).check()


def test_all_of_it_is_the_rule_itself() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 6)
    found = compile_for_lrp(model, composites.keep_top(composites.epsilon(), 1.0)).attribute(x, 0)
    assert torch.equal(found, compile_for_lrp(model, "epsilon").attribute(x, 0))


def test_fractions_are_checked() -> None:
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(errors.RuleParameterError, match="fraction"):
            TopRelevance(Plain(), fraction)


def test_the_filter_is_not_linear_in_the_seed() -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    tape = compile_for_lrp(model, composites.keep_top(composites.epsilon(), 0.5)).run(x)[1]
    with pytest.raises(errors.NotLinearError, match="not linear"):
        tape.linearised()
