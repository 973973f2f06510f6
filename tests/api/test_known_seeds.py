"""Seeds that are kept from call to call are those that would be made, and nobody's changes reach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lrp_compiler import compile_for_lrp
from lrp_compiler.errors import TargetError
from lrp_compiler.known_seeds import KEPT, KnownSeeds
from lrp_compiler.seeds import sparse_seeds

OUTPUT = torch.zeros(2, 9, 32)


def parts(found: Any) -> list[Any]:
    return [(one.values.tolist(), {dim: rows.tolist() for dim, rows in one.rows.items()}) for one in found]


@pytest.mark.parametrize("target", [(3, 1), (-1, 31), (0, -32)])
def test_a_known_seed_is_the_one_that_would_be_made(target: Any) -> None:
    known = KnownSeeds()
    for dtype in (torch.float32, torch.float64):
        output = OUTPUT.to(dtype)
        for _ in range(2):
            found, made = known.of(output, (target,), 2), sparse_seeds(output, (target,), 2)
            assert found is not None and made is not None and parts(found) == parts(made)
            assert found[0].values.dtype == dtype
            found[0].values.zero_()
    found, made = known.of(OUTPUT[:, :4], (target,), 2), sparse_seeds(OUTPUT[:, :4], (target,), 2)
    assert found is not None and made is not None and parts(found) == parts(made)


def test_true_is_not_one() -> None:
    """They are equal as keys of a dict; only one is an index."""
    known = KnownSeeds()
    assert known.of(torch.zeros(2, 32), (1,), 2) is not None
    with pytest.raises(TargetError):
        known.of(torch.zeros(2, 32), (True,), 2)


def test_more_seeds_than_are_kept() -> None:
    known, output = KnownSeeds(), torch.zeros(1, 4 * KEPT)
    for _ in range(2):
        for target in range(2 * KEPT):
            found, made = known.of(output, (target,), 2), sparse_seeds(output, (target,), 2)
            assert found is not None and made is not None and parts(found) == parts(made)
    assert len(known._found) <= KEPT


def test_a_seed_that_a_caller_gets_and_changes_is_made_again() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 64)), torch.randn(2, 4)
    module = compile_for_lrp(model, "epsilon")
    expected = module.attribute(x, 7)
    for _ in range(2):
        _, tape = module.run(x)
        assert torch.equal(tape.relevance(7), expected)
        tape.coefficients(7, at="2").zero_()
    with torch.inference_mode():
        assert torch.equal(module.attribute(x, 7), expected)
    leaf = x.clone().requires_grad_()
    assert module.attribute(leaf, 7, create_graph=True).requires_grad
