"""State and copies: what is saved is the model's own, and never code."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools

import torch
import zoo
from torch import nn
from training import adam_steps, differing

from lrp_compiler import compile_for_lrp


def test_state_round_trips_through_a_file_of_weights_alone() -> None:
    """Into the original's class and into another explained module; strictly, and by assignment."""
    case, other = zoo.build("resnet"), zoo.build("resnet", seed=1)
    explained = compile_for_lrp(case.model)
    expected = explained.attribute(case.args[0], 1)
    file = io.BytesIO()
    torch.save(explained.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    target = compile_for_lrp(other.model)
    assert not torch.equal(target.attribute(case.args[0], 1), expected)
    target.load_state_dict(state, strict=True)
    assert torch.equal(target.attribute(case.args[0], 1), expected)
    plain = zoo.build("resnet", seed=2).model
    plain.load_state_dict(state)
    assert torch.equal(plain(*case.args), case())
    target.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(target.attribute(case.args[0], 1), expected)
    assert all(a is b for a, b in zip(target.parameters(), other.model.parameters(), strict=True))


def test_copies_have_parameters_and_compilations_of_their_own() -> None:
    """Tied weights stay tied, training the copy leaves the original alone."""
    case = zoo.build("gpt2")
    explained = compile_for_lrp(case.model)
    explained(**case.kwargs)
    twin = copy.deepcopy(explained)
    assert not twin.compilations and twin.lm_head.weight is twin.transformer.wte.weight
    before = copy.deepcopy(case.model.state_dict())
    adam_steps(twin.original, lambda: twin(**case.kwargs), 1)
    assert not differing(case.model.state_dict(), before)
    assert differing(twin.state_dict(), before)
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_a_pickled_module_holds_the_model_and_settings_and_no_code() -> None:
    """The classes it names are the model's, torch's, and two of ours; nothing that was compiled is among them."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    explained = compile_for_lrp(model, "epsilon")
    small = pickle.dumps(compile_for_lrp(model, "epsilon"))
    expected = explained.attribute(x, 1)
    data = pickle.dumps(explained)
    assert len(data) == len(small)
    words = [argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    ours = {word for word in words if word.startswith("lrp_compiler")}
    assert not any(word in {"torch.fx", "types", "builtins", "marshal"} for word in words)
    assert not any(word.startswith("torch.fx") for word in words)
    assert not any("codegen" in word or "captures" in word or "compiled" in word for word in ours)
    again = pickle.loads(data)
    assert not again.compilations and torch.equal(again.attribute(x, 1), expected)
