"""Whatever changes of a model between two calls, the second sees it: its output is the model's own, bit for bit."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations, prune
from training import identical

from lrp_compiler import LRPModule, compile_for_lrp, errors
from lrp_compiler.captures import Captures
from lrp_compiler.live_model import LiveModel


class Block(nn.Module):
    """Two layers of one shape, a buffer, a parameter that may be None and a list of layers that may grow."""

    shift: Tensor
    scale: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.drop = nn.Dropout(0.5)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Identity())
        self.register_buffer("shift", torch.randn(4))
        self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tail(self.second(self.drop(torch.relu(self.first(x)))) + self.shift)
        return hidden if self.scale is None else hidden * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def step(block: Block) -> None:
    block.first.weight.grad = torch.randn(4, 4)
    torch.optim.SGD(block.parameters(), 0.5).step()


def set_data(block: Block) -> None:
    block.first.weight.data = torch.randn(4, 4)


def swap_weights(block: Block) -> None:
    """The same parameters at each other's places."""
    block.first.weight, block.second.weight = block.second.weight, block.first.weight


def swap_names(block: Block) -> None:
    """The same modules under each other's names."""
    block.first, block.tail[0] = block.tail[0], block.first


def tie(block: Block) -> None:
    block.second.weight = block.first.weight


def replace_children(block: Block) -> None:
    """As deleting from a Sequential does."""
    block.tail._modules = OrderedDict({"0": nn.Tanh()})


def replace_parameters(block: Block) -> None:
    block.second._parameters = {"weight": parameter(4, 4), "bias": None}


def replace_buffers(block: Block) -> None:
    block._buffers = {"shift": torch.randn(4)}


CHANGES: dict[str, Callable[[Block], Any]] = {
    "optimizer step": step,
    "in place": lambda block: nn.init.ones_(block.first.weight),
    "data": set_data,
    "new parameter": lambda block: setattr(block.first, "weight", parameter(4, 4)),
    "new buffer": lambda block: setattr(block, "shift", torch.randn(4)),
    "parameter that was None": lambda block: setattr(block, "scale", parameter(4)),
    "parameter that is None now": lambda block: setattr(block.first, "bias", None),
    "weights swapped": swap_weights,
    "tied": tie,
    "modules swapped": swap_names,
    "module replaced": lambda block: setattr(block, "first", nn.Linear(4, 4)),
    "module of another kind": lambda block: block.tail.__setitem__(1, nn.ReLU()),
    "module added": lambda block: block.tail.append(nn.Linear(4, 4)),
    "module deleted": lambda block: block.tail.__delitem__(1),
    "dict of children replaced": replace_children,
    "dict of parameters replaced": replace_parameters,
    "dict of buffers replaced": replace_buffers,
    "wider inside": lambda block: (
        setattr(block, "first", nn.Linear(4, 6)),
        setattr(block, "second", nn.Linear(6, 4)),
    ),
    "loaded": lambda block: block.load_state_dict(Block().state_dict()),
    "loaded by assignment": lambda block: block.load_state_dict(Block().state_dict(), assign=True),
    "parametrized": lambda block: parametrizations.spectral_norm(block.first),
    "hook": lambda block: block.first.register_forward_hook(lambda module, args, output: output * 2),
    "dict of hooks replaced": lambda block: (
        setattr(block.first, "_forward_hooks", OrderedDict()),
        block.first.register_forward_hook(lambda module, args, output: output * 3),
    ),
}
"""Changes of a part of a model; each leaves another output."""


def warm(model: nn.Module, x: Tensor) -> LRPModule:
    explained = compile_for_lrp(model, "gradient")
    for _ in range(2):
        explained(x)
    return explained


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_sees(change: str, context: Callable[[], Any]) -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    with context():
        explained = warm(model, x)
        before = explained(x)
    CHANGES[change](model.blocks[1])  # type: ignore[arg-type]
    with context():
        after, expected = explained(x), model(x)
        assert identical(after, expected) and not torch.equal(after, before)
        assert identical(explained(x), expected)


@pytest.mark.parametrize("change", ["data", "new parameter", "modules swapped", "dict of children replaced", "tied"])
def test_the_next_explanation_sees(change: str) -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    explained = warm(model, x)
    explained.attribute(x, 1)
    CHANGES[change](model.blocks[1])  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(explained.attribute(x, 1), expected)


def test_a_hook_that_comes_later_is_refused_by_explanations_until_it_goes() -> None:
    """Also behind one that can be traced, and where the dict of hooks was emptied by hand."""
    model, x = Net().eval(), torch.randn(3, 4)
    prune.l1_unstructured(model.blocks[0].first, "weight", 0.5)
    explained = warm(model, x)
    for module in model.modules():
        module._forward_hooks = OrderedDict()
        handle = module.register_forward_hook(lambda *_: None)
        with pytest.raises(errors.HookError):
            explained.run(x)
        handle.remove()
        explained.run(x)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("_parameters", "new parameter"),
        ("_buffers", "new buffer"),
        ("_modules", "module replaced"),
        ("_forward_hooks", "hook"),
    ],
)
def test_what_is_kept_in_mappings_that_are_no_dicts_is_seen(kind: str, change: str) -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    for module in model.modules():
        vars(module)[kind] = UserDict(vars(module)[kind])
    explained = warm(model, x)
    before = explained(x)
    CHANGES[change](model.blocks[1])  # type: ignore[arg-type]
    expected = model(x)
    assert identical(explained(x), expected) and not torch.equal(expected, before)


class ByHand:
    """A hook written into a module's dict, past torch's functions."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks = module._forward_hooks
        self._hooks[-1] = lambda *_: None

    def remove(self) -> None:
        del self._hooks[-1]


REGISTRATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "by hand": ByHand,
    "every forward": lambda _: torch_modules.register_module_forward_hook(lambda *_: None),
    "every forward pre": lambda _: torch_modules.register_module_forward_pre_hook(lambda *_: None),
    "every backward": lambda _: torch_modules.register_module_full_backward_hook(lambda *_: None),
    "every backward pre": lambda _: torch_modules.register_module_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", REGISTRATIONS)
def test_any_kind_of_hook_is_seen_by_a_loop(kind: str) -> None:
    """And refused, until it goes."""
    model, x = Net().eval(), torch.randn(3, 4)
    explained = warm(model, x)
    for _ in range(3):
        explained.attribute(x, 1)
    handle = REGISTRATIONS[kind](model.blocks[1].tail[1])  # type: ignore[index]
    try:
        for _ in range(3):
            with pytest.raises(errors.HookError):
                explained.attribute(x, 1)
    finally:
        handle.remove()
    explained.attribute(x, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_that_change_dtype_in_place_are_seen(dtype: torch.dtype) -> None:
    """There and back again; ``_apply`` assigns to ``data`` of the same parameters."""
    model, x = Net().eval(), torch.randn(3, 4)
    explained = warm(model, x)
    weight = model.blocks[0].first.weight  # type: ignore[union-attr]
    for wanted in (dtype, torch.float32, dtype):
        model.to(wanted)
        assert model.blocks[0].first.weight is weight  # type: ignore[union-attr]
        output = explained(x.to(wanted))
        assert output.dtype == wanted and identical(output, model(x.to(wanted)))


def test_training_flags_of_single_modules_are_seen() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    explained = warm(model, x)
    expected = explained(x)
    for mode in (True, False):
        model.blocks[1].drop.train(mode)  # type: ignore[union-attr]
        torch.manual_seed(1)
        output = explained(x)
        torch.manual_seed(1)
        assert identical(output, model(x)) and torch.equal(output, expected) is not mode


def test_gradients_go_where_they_are_asked_for_now() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    explained = warm(model, x)
    for frozen in (True, False):
        model.blocks[0].requires_grad_(not frozen)
        model.zero_grad()
        explained(x).sum().backward()
        asked = {name for name, value in model.named_parameters() if value.requires_grad}
        assert {name for name, value in model.named_parameters() if value.grad is not None} == asked


def test_what_is_read_of_a_model_tells_all_states_apart() -> None:
    """The state, under every way to run code: the same as long as nothing changes, another one for every change."""

    def read(known: LiveModel, model: nn.Module) -> Any:
        states = [known.read(model).state]
        for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
            with context():
                states.append(known.read(model).state)
        assert len(set(states)) == 1 and all(state is states[0] for state in states)
        return states[0]

    known, model = LiveModel(), Net()
    seen = [read(known, model)]
    weight = model.blocks[0].first.weight  # type: ignore[union-attr]
    changes: list[Callable[[], Any]] = [
        lambda: weight.requires_grad_(False),
        lambda: setattr(weight, "data", weight.data.double()),
        lambda: setattr(weight, "data", weight.data[:2]),
        lambda: setattr(weight, "data", weight.data.reshape(4, 2)),
        lambda: setattr(weight, "data", weight.data.reshape(8)),
        lambda: model.to_empty(device="meta"),
        lambda: model.blocks[1].drop.eval(),  # type: ignore[union-attr]
        lambda: setattr(model.blocks[1].second, "weight", model.blocks[1].first.weight),  # type: ignore[union-attr]
        lambda: model.blocks[1].second.register_buffer("more", None),  # type: ignore[union-attr]
        lambda: setattr(model.blocks[1].second, "more", torch.zeros(1)),  # type: ignore[union-attr]
        lambda: model.blocks.append(Block()),
    ]
    for change in changes:
        change()
        state = read(known, model)
        fresh = LiveModel().read(model).state
        assert state == fresh and hash(state) == hash(fresh)
        seen.append(state)
    # A buffer that is None is none.
    assert len(set(seen)) == len(changes)


def test_a_model_that_computes_its_flags_is_read_anew_every_time() -> None:
    """An explained module inside of another has no flag of its own."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model, x = nn.Sequential(compile_for_lrp(inner, "gradient"), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    known = LiveModel()
    before = known.read(model).state
    inner.train()
    assert known.read(model).state != before
    inner.eval()
    assert known.read(model).state == before
    assert identical(compile_for_lrp(copy.deepcopy(model), "gradient")(x), model(x))


def functions_run(call: Callable[[], Any]) -> int:
    """How many python functions ``call`` runs outside of generated code."""
    count, depth = 0, 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal count, depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith("<eval_with_key>"):
            depth += 1 if event == "call" else -1
        elif event == "call" and not depth:
            count += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_reading_a_model_runs_no_python_for_each_module() -> None:
    """As many functions for forty blocks as for two."""
    counts = []
    for depth in (2, 40):
        model = nn.Sequential(*(Block() for _ in range(depth))).eval()
        known = LiveModel()
        for _ in range(2):
            known.read(model)
        counts.append(functions_run(lambda known=known, model=model: known.read(model)))  # type: ignore[misc]
    assert counts[0] == counts[1] < 60


def test_finding_a_program_and_its_inputs_runs_no_python_for_each_module() -> None:
    """As many functions for eight blocks as for two, once the call is known."""
    counts = []
    for depth in (2, 8):
        model, x = nn.Sequential(*(Block() for _ in range(depth))).eval(), torch.randn(3, 4)
        captures = warm(model, x).compiler.captures

        def find(captures: Captures = captures, given: Any = (model, (x,), {})) -> list[Any]:
            return captures.bound(*given, frozenset(), True).inputs()

        assert all(a is b for a, b in zip(find(), find(), strict=True))
        counts.append(functions_run(find))
    assert counts[0] == counts[1] < 160


def test_calls_run_no_python_for_each_module() -> None:
    """As many functions for eight blocks as for two, and of an explanation few for each parameter."""
    counts, questions = [], []
    for depth in (2, 8):
        model, x = nn.Sequential(*(Block() for _ in range(depth))).eval(), torch.randn(3, 4)
        explained = warm(model, x)
        explained.attribute(x, 1)
        with torch.no_grad():
            counts.append(functions_run(lambda explained=explained, x=x: explained(x)))  # type: ignore[misc]
            questions.append(functions_run(lambda explained=explained, x=x: explained.attribute(x, 1)))  # type: ignore[misc]
    assert counts[0] == counts[1] < 200
    assert questions[1] - questions[0] < 3 * 6 * len([*Block().parameters(), *Block().buffers()])
