"""The plan of buffers: predicted peaks against what the allocator hands out, budgets, lifetimes, and no leaks."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lrp_compiler import LRPModule, compile_for_lrp
from lrp_compiler.errors import OptionValueError, RecomputeError
from lrp_compiler.memory import allocated_peak
from lrp_compiler.options import Options

BUDGETS = (1.0, 0.5, 0.2, 0.0)


class OfEmbeddings(nn.Module):
    """A language model as embeddings -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).logits


def vit() -> tuple[nn.Module, Tensor]:
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=128,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config), torch.randn(2, 3, 128, 128)


def gpt2() -> tuple[nn.Module, Tensor]:
    config = transformers.GPT2Config(
        n_embd=192, n_layer=6, n_head=3, vocab_size=500, bos_token_id=1, eos_token_id=2, n_positions=128
    )
    return OfEmbeddings(transformers.GPT2LMHeadModel(config)), torch.randn(2, 128, 192)


def llama() -> tuple[nn.Module, Tensor]:
    config = transformers.LlamaConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
        vocab_size=500,
    )
    return OfEmbeddings(transformers.LlamaForCausalLM(config)), torch.randn(1, 256, 192)


def vgg() -> tuple[nn.Module, Tensor]:
    """Convolutions of stride 1: what oneDNN takes for strided ones nobody can tell beforehand."""
    layers: list[nn.Module] = []
    for made, of in ((32, 3), (32, 32), (64, 32), (64, 64)):
        layers += [nn.Conv2d(of, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if made == of else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(2, 3, 96, 96)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"vit": vit, "gpt2": gpt2, "llama": llama, "vgg": vgg}


def target_of(name: str) -> Any:
    return (-1, 3) if name in ("gpt2", "llama") else 3


@cache
def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.eval(), x


@cache
def compiled(name: str, composite: str, budget: float) -> LRPModule:
    """Traced once per model, compiled once per setting."""
    captures = compiled(name, composite, BUDGETS[0]).compiler.captures if budget != BUDGETS[0] else None
    return LRPModule(build(name)[0], composite, Options(memory_budget=budget), captures)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        pytest.param(name, budget, marks=() if name == "vit" or budget in (1.0, 0.2) else pytest.mark.slow)
        for name in MODELS
        for budget in BUDGETS
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(name: str, budget: float) -> None:
    x, explained = build(name)[1], compiled(name, "attnlrp", budget)
    explained.attribute(x, target_of(name))
    measured = allocated_peak(lambda: explained.attribute(x, target_of(name)))
    assert explained.report(x).memory.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one_on_cuda(name: str, budget: float) -> None:
    model, x = copy.deepcopy(build(name))
    model, x = model.cuda(), x.cuda()
    explained = compile_for_lrp(model, "attnlrp", memory_budget=budget)
    explained.attribute(x, target_of(name))
    measured = allocated_peak(lambda: explained.attribute(x, target_of(name)), "cuda")
    assert explained.report(x).memory.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        *((name, "attnlrp") for name in ("vit", "vgg")),
        ("vgg", "deep_lift"),
        *(pytest.param(name, "attnlrp", marks=pytest.mark.slow) for name in ("gpt2", "llama")),
        pytest.param("vgg", "epsilon_plus", marks=pytest.mark.slow),
        pytest.param("llama", "deep_lift", marks=pytest.mark.slow),
    ],
)
def test_budgets_change_memory_and_not_relevance(name: str, composite: str) -> None:
    x = build(name)[1]
    plans, found = [], []
    for budget in BUDGETS:
        explained = compiled(name, composite, budget)
        found.append(explained.attribute(x, target_of(name)))
        plans.append(explained.report(x))
    assert all(torch.equal(one, found[0]) for one in found[1:])
    kept = [plan.saved_bytes for plan in plans]
    assert kept == sorted(kept, reverse=True)
    if composite == "attnlrp" and name != "vgg":
        assert plans[2].saved_bytes < 0.4 * plans[0].saved_bytes
        counts = [plan.lowered["recomputed"].count if "recomputed" in plan.lowered else 0 for plan in plans]
        assert counts[2] > counts[0]


FULL_SIZE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vit": lambda: (transformers.ViTForImageClassification(transformers.ViTConfig()), torch.randn(1, 3, 224, 224)),
    "gpt2": lambda: (OfEmbeddings(transformers.GPT2LMHeadModel(transformers.GPT2Config())), torch.randn(1, 128, 768)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "share"), [(1.0, 0.6), (0.2, 0.3)])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_takes_its_share_of_input_x_gradient(name: str, budget: float, share: float) -> None:
    """Twelve layers of width 768, parameters as they are loaded."""
    torch.manual_seed(0)
    model, x = FULL_SIZE[name]()
    model.eval()

    def input_x_gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        logit = model(leaf)[:, -1, 3] if name == "gpt2" else model(leaf).logits[:, 1]
        return torch.autograd.grad(logit.sum(), leaf)[0] * x

    explained = compile_for_lrp(model, "attnlrp", memory_budget=budget)
    target = (-1, 3) if name == "gpt2" else 1
    explained.attribute(x, target)
    eager = allocated_peak(input_x_gradient)
    assert allocated_peak(lambda: explained.attribute(x, target)) <= share * eager


def encoder(depth: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(stack, nn.Flatten(), nn.Linear(64 * 128, 3)).eval(), torch.randn(1, 128, 64)


@pytest.mark.thorough
def test_least_memory_grows_as_the_square_root_of_the_depth() -> None:
    peaks: dict[float, list[int]] = {1.0: [], 0.0: []}
    for budget, found in peaks.items():
        for depth in (8, 32):
            model, x = encoder(depth)
            explained = compile_for_lrp(model, "attnlrp", memory_budget=budget)
            explained.attribute(x, 1)
            found.append(allocated_peak(lambda explained=explained, x=x: explained.attribute(x, 1)))  # type: ignore[misc]
    assert math.log(peaks[1.0][1] / peaks[1.0][0], 4) > 0.8
    assert math.log(peaks[0.0][1] / peaks[0.0][0], 4) < 0.65


def test_chosen_modules_keep_nothing_inside() -> None:
    model, x = encoder(4)
    explained = compile_for_lrp(model, "attnlrp", recompute=["0.layers.*"])
    expected = compile_for_lrp(model, "attnlrp")
    assert torch.equal(explained.attribute(x, 1), expected.attribute(x, 1))
    report = explained.report(x)
    inside = [one for one in report.buffers if one.kind in ("saved", "compressed") and "in 0.layers." in one.producer]
    # The sum that ends a layer is handed on; behind the last one nothing reads it but a linear map.
    assert len(inside) == 3 and all(one.producer.startswith("aten::add ") for one in inside)
    assert report.saved_bytes < expected.report(x).saved_bytes / 4


def test_bad_memory_settings_are_refused() -> None:
    model, x = encoder(1)
    for budget in (-0.1, 1.5, "half", True):
        with pytest.raises(OptionValueError, match="memory_budget"):
            compile_for_lrp(model, "attnlrp", memory_budget=budget)
    with pytest.raises(OptionValueError, match="recompute"):
        compile_for_lrp(model, "attnlrp", recompute=[3])
    with pytest.raises(RecomputeError, match=r"encoder\.\*"):
        compile_for_lrp(model, "attnlrp", recompute=["encoder.*"]).attribute(x, 1)


def test_buffers_say_who_makes_and_reads_them_and_when() -> None:
    model, x = build("vit")
    report = compile_for_lrp(model, "attnlrp", memory_budget=0.2).report(x)
    with_memory = [one for one in report.buffers if one.bytes]
    assert with_memory and all(one.producer and one.first_write < one.last_read for one in with_memory)
    assert all(one.slot is not None for one in with_memory)
    by_slot: dict[int | None, list[tuple[int, int]]] = {}
    for one in with_memory:
        by_slot.setdefault(one.slot, []).append((one.first_write, one.last_read))
    for lifetimes in by_slot.values():
        lifetimes.sort()
        assert all(before[1] < after[0] for before, after in itertools.pairwise(lifetimes))
    assert any(len(lifetimes) > 1 for lifetimes in by_slot.values())
    assert all(one.name in report.buffer_table() for one in with_memory)


def test_nothing_leaks_in_a_thousand_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
    explained = compile_for_lrp(model, "epsilon_plus")
    x = torch.randn(64, 16)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    def calls(count: int) -> None:
        for turn in range(count):
            explained.attribute(x, turn % 4)
            _, tape = explained.run(x)
            tape.relevance(turn % 4)

    calls(5)
    before, compilations = tensors(), explained.compilations
    calls(1000)
    assert tensors() <= before
    assert explained.compilations == compilations
    model.eval()
    # Seeds of all four targets are kept from their first call on.
    calls(4)
    # A tape lives until the next one takes its name.
    first = allocated_peak(lambda: calls(2))
    assert allocated_peak(lambda: calls(20)) == first
