"""The compiled module is the model: outputs, types, state, gradients, training behaviour."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler import LRPModule, compile_for_lrp

NAMES = list(zoo.BUILDERS)


def same(first: Any, second: Any) -> bool:
    """Bitwise equality of two output trees, their classes included."""
    left, left_spec = pytree.tree_flatten(first)
    right, right_spec = pytree.tree_flatten(second)
    equal = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True))
    return type(first) is type(second) and left_spec == right_spec and equal


@pytest.mark.parametrize("name", NAMES)
def test_eval_outputs_are_bitwise_equal(name: str) -> None:
    """With gradients recorded and without, which is one tracing for most models."""
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = case()
            assert same(explained(*case.args, **case.kwargs), expected), grad
            output, _ = explained.run(*case.args, **case.kwargs)
            assert same(output, expected), grad


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_original_parameters(name: str) -> None:
    case = zoo.build(name)
    explained = compile_for_lrp(case.model)
    expected = parameter_gradients(case.model, case())
    found = parameter_gradients(case.model, explained(*case.args, **case.kwargs))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6 * value.abs().max().item())


def parameter_gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """The gradient of the sum of squared float outputs for each parameter that gets one."""
    model.zero_grad()
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum(leaf.square().sum() for leaf in leaves).backward()  # type: ignore[union-attr]
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_training_steps_leave_the_state_eager_leaves(name: str) -> None:
    """Dropout draws the same masks, BatchNorm keeps the same statistics, Adam reaches the same weights."""
    eager, ours = zoo.build(name), zoo.build(name)
    train(eager.model, eager.model, eager)
    train(compile_for_lrp(ours.model), ours.model, ours)
    for key, value in eager.model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[key]), key


def train(called: nn.Module, model: nn.Module, case: zoo.Case) -> None:
    """Three Adam steps from a fixed seed."""
    called.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    torch.manual_seed(5)
    for _ in range(3):
        output = called(*case.args, **case.kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        optimizer.zero_grad()
        leaves[0].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_relevance_in_training_mode_matches_the_reference(name: str) -> None:
    """Dropout masks and batch statistics are those of the recorded forward, also where values are recomputed."""
    case = zoo.build(name, double=True)
    case.model.train()
    found = {}
    for reference in (False, True):
        torch.manual_seed(3)
        _, tape = compile_for_lrp(case.model, "attnlrp", reference=reference).run(*case.args, **case.kwargs)
        site = "blocks.1" if name == "vit" else "3" if name == "resnet" else "bert.encoder.layer.0"
        found[reference] = tape.relevance(case.target), tape.relevance(case.target, at=site)
    for ours, theirs in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * theirs.abs().max().item())


def test_reading_relevance_leaves_statistics_and_random_numbers_alone() -> None:
    case = zoo.build("resnet")
    case.model.train()
    explained = compile_for_lrp(case.model)
    _, tape = explained.run(*case.args)
    before, state = copy.deepcopy(case.model.state_dict()), torch.get_rng_state()
    tape.relevance(case.target, at="3.conv1")
    tape.ledger(case.target)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


def make() -> tuple[nn.Module, LRPModule, Tensor]:
    """A small network with statistics and dropout, its drop-in, and a batch."""
    case = zoo.build("resnet")
    return case.model, compile_for_lrp(case.model), case.args[0]


def test_state_dict_and_modules_are_shared() -> None:
    model, explained, _ = make()
    assert list(explained.state_dict()) == list(model.state_dict())
    assert [n for n, _ in explained.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in explained.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(a is b for a, b in zip(explained.parameters(), model.parameters(), strict=True))
    changed = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    explained.load_state_dict(changed)
    assert all(not value.any() for value in model.state_dict().values())


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "optimizer step": lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    "in-place write": lambda m: m.get_parameter("6.weight").data.mul_(2),
    "swapped parameter": lambda m: setattr(m[6], "weight", nn.Parameter(m[6].weight.detach() * 3)),
    "swapped module": lambda m: m.__setitem__(6, nn.Linear(8, 5)),
    "reset_parameters": lambda m: m[0].reset_parameters(),
    "train": lambda m: m.train(),
    "partial eval": lambda m: m.train() and m[1].eval(),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_the_model_show_at_once(change: str) -> None:
    model, explained, x = make()
    explained(x)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    CHANGES[change](model)
    x = x.to(next(model.parameters()).dtype)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = twin(x)
    torch.manual_seed(1)
    assert torch.equal(explained(x), expected)
    if change == "double":
        assert explained.attribute(x, 1).dtype == torch.float64


def test_train_eval_and_to_reach_the_model() -> None:
    model, explained, _ = make()
    assert explained.train() is explained and model.training and explained.training
    assert explained.eval() is explained and not model.training and not explained.training
    assert explained.double() is explained
    assert next(model.parameters()).dtype == torch.float64
    assert explained.to(torch.float32) is explained
    assert next(model.parameters()).dtype == torch.float32


def test_copies_are_independent_and_pickle_survives() -> None:
    model, explained, x = make()
    expected = explained.attribute(x, 1)
    twin = copy.deepcopy(explained)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    assert torch.equal(twin.attribute(x, 1), expected)
    assert not torch.equal(explained.attribute(x, 1), expected)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again.attribute(x, 1), expected)


def test_attributes_of_the_model_are_reachable() -> None:
    case = zoo.build("bert")
    explained = compile_for_lrp(case.model)
    assert explained.config is case.model.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = explained.no_such_thing


def test_one_tensor_passed_twice_does_not_tie_the_inputs() -> None:
    """A call with the same tensor object for two arguments compiles to code that also fits two tensors."""
    case = zoo.build("t5")
    shared = zoo.ids(2, 5)
    explained = compile_for_lrp(case.model)
    explained(input_ids=shared, decoder_input_ids=shared)
    other = {"input_ids": zoo.ids(2, 5), "decoder_input_ids": zoo.ids(2, 5)}
    assert same(explained(**other), case.model(**other))


def test_a_model_that_overwrites_its_input_still_does() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).sum(1)

    x = torch.randn(2, 3)
    original, expected = x.clone(), x * 2
    out, tape = compile_for_lrp(Overwrites()).run(x)
    assert torch.equal(x, expected) and torch.equal(out, expected.sum(1))
    assert torch.equal(tape.relevance(), original * 2)


def test_gradient_and_relevance_of_one_forward_do_not_disturb_each_other() -> None:
    model, explained, x = make()
    gradients, relevances = [], []
    for relevance_first in (True, False):
        out, tape = explained.run(x)
        if relevance_first:
            relevances.append(tape.relevance(1))
        model.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if not relevance_first:
            relevances.append(tape.relevance(1))
    assert torch.equal(*relevances)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_inference_mode_works() -> None:
    _, explained, x = make()
    expected = explained.attribute(x, 1)
    with torch.inference_mode():
        assert torch.equal(explained.attribute(x.clone(), 1), expected)
