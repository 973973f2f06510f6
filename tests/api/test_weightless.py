"""Models without values, on the meta device or of fake tensors, are compiled and reported as any other."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from lrp_compiler import Report, compile_for_lrp
from lrp_compiler.errors import NoValuesError


class Attending(nn.Module):
    """A norm, attention that eager runs as one kernel, and a masked product with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(self.norm(x)).unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1)
        logits: Tensor = self.head((mixed * self.scale + x).mean(1))
        return logits


def classifier() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def calls() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    return {
        "attending": (Attending().eval(), (torch.randn(2, 5, 8),)),
        "bert": (classifier().eval(), (torch.randint(0, 50, (2, 6)),)),
    }


def facts(report: Report) -> dict[str, Any]:
    """All of a report but how long it took."""
    found = report.to_dict()
    del found["coverage"]["milliseconds"], found["compilations"]
    return found


@pytest.mark.parametrize("name", ["attending", "bert"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_fake_model_is_reported_like_the_real_one(name: str, inside: bool) -> None:
    model, args = calls()[name]
    expected = compile_for_lrp(model, "attnlrp").report(*args)
    mode = FakeTensorMode()
    with mode, no_init_weights():
        fake, fake_args = calls()[name]
    assert all(isinstance(parameter, FakeTensor) for parameter in fake.parameters())
    with mode if inside else contextlib.nullcontext():
        found = compile_for_lrp(fake, "attnlrp").report(*fake_args)
    assert facts(found) == facts(expected)


def test_a_meta_model_is_reported() -> None:
    """On a device of no kind, attention stays the one op that the model calls."""
    with torch.device("meta"):
        model, args = calls()["attending"]
    report = compile_for_lrp(model, "attnlrp").report(*args)
    assert report.inputs == {"x": ("x",)}
    assert report.rules["aten::scaled_dot_product_attention", "attention"] == 1
    assert report.rules["aten::linear", "plain"] == 2


@pytest.mark.parametrize("composite", ["attnlrp", "guided_backprop"])
def test_nothing_is_measured_of_a_model_without_values(composite: str) -> None:
    model, args = calls()["attending"]
    model, args = model.to("meta"), tuple(arg.to("meta") for arg in args)
    explained = compile_for_lrp(model, composite)
    assert explained.report(*args, target=0).conservation is None
    with pytest.raises(NoValuesError, match=r"'norm\.weight'"):
        explained.run(*args)


def test_loading_weights_gives_relevance() -> None:
    """The drop-in of a meta model explains it as soon as it has values."""
    real, args = calls()["attending"]
    with torch.device("meta"):
        explained = compile_for_lrp(calls()["attending"][0], "attnlrp")
    explained.report(args[0].to("meta"))
    explained.to_empty(device="cpu")
    explained.load_state_dict(real.state_dict())
    expected = compile_for_lrp(real, "attnlrp").attribute(*args, 0)
    torch.testing.assert_close(explained.attribute(*args, 0), expected, rtol=0, atol=0)


def test_a_model_that_drops_out_is_reported_without_values() -> None:
    """Draws are noted for their repetition without asking a generator, which the meta device has none of."""

    def planned(device: str) -> object:
        model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 4)).to(device).train()
        return compile_for_lrp(model, "epsilon", memory_budget=0.0).report(torch.ones(3, 5, device=device)).memory

    assert planned("meta") == planned("cpu")
