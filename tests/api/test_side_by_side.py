"""Many targets of one input: a chunk at a time, of the size that the plan says fits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from lrp_compiler import Tape, compile_for_lrp, side_by_side
from lrp_compiler.memory import allocated_peak


def tape(rows: int = 32, classes: int = 128) -> Tape:
    """A dense network on a batch, without autograd."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, classes)).eval()
    with torch.no_grad():
        return compile_for_lrp(model, "attnlrp").run(torch.randn(rows, 64))[1]


def test_targets_beyond_a_chunk_take_no_more_memory() -> None:
    kept, one_map = tape(), 32 * 64 * 4

    def peak(targets: int, chunk: int) -> int:
        kept.relevance_of_each([0], chunk=1)
        return allocated_peak(lambda: kept.relevance_of_each(list(range(targets)), chunk=chunk))

    # The parts of the result are held until they are put together.
    assert peak(64, 8) <= peak(8, 8) + 2 * 64 * one_map
    assert peak(64, 64) > peak(64, 8) + 64 * one_map


def test_a_chunk_is_what_the_plan_says_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tape()
    mapped: list[int] = []
    vmap = torch.vmap

    def counting(code: Any, in_dims: Any, **options: Any) -> Any:
        def run(*values: Any) -> Any:
            mapped.append(next(v.shape[0] for v, dim in zip(values, in_dims, strict=True) if dim == 0))
            return vmap(code, in_dims=in_dims, **options)(*values)

        return run

    monkeypatch.setattr(torch, "vmap", counting)
    expected = kept.relevance_of_each([0, 1, 2])
    monkeypatch.setattr(side_by_side, "MOST_BYTES", 0)
    found = kept.relevance_of_each([0, 1, 2])
    assert mapped == [3, 1, 1, 1]
    torch.testing.assert_close(found, expected)


def test_attention_that_torch_maps_one_by_one_is_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch writes such warnings past python, to the process's own stderr; outside of our calls it still does."""
    case, shared = zoo.shared("vit")
    _, kept = shared.run(*case.args, **case.kwargs)
    kept.relevance_of_each([0, 1])
    assert "batching rule" not in capfd.readouterr().err
    query = torch.randn(2, 1, 2, 4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.vmap(lambda q: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0])(query)
    assert "batching rule" in capfd.readouterr().err


class Restrided(nn.Module):
    """A user's own look at memory, overlapping, whose derivative writes into a storage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().as_strided((x.shape[0], 4, 4), (8, 1, 2)).flatten(1)


@pytest.mark.parametrize(
    ("x", "body"),
    [
        (torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last), [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)]),
        (torch.randn(2, 3, 9, 8), [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((1, 1))]),
        (torch.randn(2, 3, 9, 8).to(memory_format=torch.channels_last), [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2)]),
        (torch.randn(2, 8), [nn.Linear(8, 16), nn.ReLU(), Restrided()]),
    ],
    ids=["channels_last", "contiguous", "channels_last, larger", "strides"],
)
def test_what_torch_does_to_strides_is_mapped_all_the_same(x: torch.Tensor, body: list[nn.Module]) -> None:
    """The derivative of what changes strides writes into a storage, which torch.vmap refuses."""
    model = nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(x)
    _, kept = compile_for_lrp(model.requires_grad_(False), "gradient").run(x)
    leaf = x.clone().requires_grad_()
    expected = [torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0] for target in range(3)]
    torch.testing.assert_close(kept.relevance_of_each([0, 1, 2]), torch.stack(expected), rtol=1e-4, atol=1e-6)
