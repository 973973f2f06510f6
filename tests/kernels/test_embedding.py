"""embedding_relevance and token_relevance where the tests of all kernels do not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from restated_picking import embedding_relevance, token_relevance

from lrp_compiler.kernels.dialect.embedding import EMBEDDING_RELEVANCE, TOKEN_RELEVANCE, leading_dims
from lrp_compiler.kernels.launch import Config
from lrp_compiler.kernels.spec import KernelSpec


def _planned(spec: KernelSpec, config: Config, *arguments: object) -> torch.Tensor:
    out, launches = spec.plan(*arguments, config=config)
    for launch in launches:
        launch.run()
    assert isinstance(out, torch.Tensor)
    return out.cpu().double()


@pytest.mark.parametrize("config", EMBEDDING_RELEVANCE.configs, ids=str)
def test_every_tile_sums_the_same(config: Config, device: torch.device) -> None:
    # Whole numbers, whose sums are exact.
    x, c = (torch.randint(-9, 9, (3, 11, 4100), device=device).half() for _ in range(2))
    assert torch.equal(
        _planned(EMBEDDING_RELEVANCE, config, x, c), embedding_relevance(x.cpu().double(), c.cpu().double())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_pass_the_range_and_precision_of_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[300.0, -300.0, 1 + 2**-7], [257.0, 1.0, -1.0]], device=device).to(dtype)
    found = EMBEDDING_RELEVANCE.launch(x, x).cpu()
    assert torch.equal(found, x.cpu().float().square().sum(-1))


def test_dimensions_that_lie_evenly_in_both_are_walked_as_one() -> None:
    x = torch.empty(2, 3, 1, 5, 7)
    assert leading_dims(x, x) == ((30, 7, 7),)
    assert leading_dims(x, x.transpose(0, 1).contiguous().transpose(0, 1)) == ((2, 105, 35), (3, 35, 70), (5, 7, 7))
    assert leading_dims(x[:1, :1], x[:1, :1]) == ((5, 7, 7),)


def test_rows_may_lie_beyond_the_32_bits_of_an_index(device: torch.device) -> None:
    """Pages that nobody touches take no memory."""
    far = 2**30 + 8
    x = torch.empty(2 * far + 3, dtype=torch.float16, device=device).as_strided((3, 3), (far, 1))
    x.copy_(torch.arange(9, device=device).view(3, 3))
    assert EMBEDDING_RELEVANCE.launch(x, x).tolist() == [5, 50, 149]


@pytest.mark.parametrize("config", TOKEN_RELEVANCE.configs, ids=str)
@pytest.mark.parametrize("length", [63, 64, 65, 256, 257, 600])
def test_a_run_of_any_length_is_added_up(config: Config, length: int, device: torch.device) -> None:
    ids = torch.cat([torch.ones(length), torch.tensor([0.0, 3.0])]).long()
    relevance = torch.arange(length + 2, dtype=torch.float32)
    found = _planned(TOKEN_RELEVANCE, config, relevance.to(device), ids.to(device), 5)
    assert torch.equal(found, token_relevance(relevance.double(), ids, 5))


@hypothesis_settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=12))
def test_tokens_get_what_their_places_have(ids: list[int]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    relevance = torch.arange(1.0, len(ids) + 1)
    places = torch.tensor(ids, dtype=torch.int64)
    found = TOKEN_RELEVANCE.launch(relevance.to(device), places.to(device), 7).cpu().double()
    assert torch.equal(found, token_relevance(relevance.double(), places, 7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion of the device ends the process")
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_id_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    arguments = torch.ones(3), torch.tensor([0, wrong, 1]), 4
    with pytest.raises(RuntimeError, match=r"an id is not in \[0, 4\)"):
        TOKEN_RELEVANCE.launch(*arguments)
    with pytest.raises(IndexError):
        TOKEN_RELEVANCE.reference(*arguments)
