"""Attributions that are asked for again come out as at the first time, whatever has changed in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrp_compiler import compile_for_lrp
from lrp_compiler.errors import NoValuesError, TargetError
from lrp_compiler.tape import Tape

BATCH, WIDTH, CLASSES, TOKENS = 3, 8, 32, 5


class Pair(nn.Module):
    """Two inputs, of which one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.left(x)) * scale + self.right(y).tanh()


class Words(nn.Module):
    """Token ids to one row of logits a token; the embeddings are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.words(ids))) + self.words(ids.flip(1)))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, CLASSES)).eval()


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anew(model: nn.Module, *given: Any, **options: Any) -> Any:
    return compile_for_lrp(model, "attnlrp").attribute(*given, **options)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes that were made: attributions that are repeated need none."""
    made: list[Tape] = []
    first = Tape.__init__

    def noting(tape: Tape, *args: Any, **kwargs: Any) -> None:
        made.append(tape)
        first(tape, *args, **kwargs)

    monkeypatch.setattr(Tape, "__init__", noting)
    return made


TARGETS: list[Any] = [2, torch.tensor([5, 0, 1]), [1, 2, 3], torch.eye(CLASSES)[[4, 4, 4]]]


@pytest.mark.parametrize("target", TARGETS, ids=["number", "tensor", "list", "seed"])
def test_targets(target: Any, tapes: list[Tape]) -> None:
    torch.manual_seed(0)
    model = perceptron()
    explained = compile_for_lrp(model, "attnlrp")
    explained.attribute(sample(BATCH, WIDTH), target)
    known = len(tapes)
    for seed in range(3):
        x = sample(BATCH, WIDTH, seed=seed)
        found = explained.attribute(x, target)
        assert len(tapes) == known
        assert torch.equal(found, anew(model, x, target))
        known = len(tapes)
        found.zero_()


def input_x_gradient(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """What autograd finds, times the input."""
    x = x.clone().requires_grad_()
    output = model(x)
    seed = target if isinstance(target, Tensor) and target.dim() == 2 else output.detach() * 0
    if seed is not target:
        seed[range(BATCH), target] = 1.0
    return x.detach() * torch.autograd.grad(output, x, seed)[0]


@pytest.mark.parametrize("target", TARGETS, ids=["number", "tensor", "list", "seed"])
def test_agrees_with_autograd(target: Any, tapes: list[Tape]) -> None:
    torch.manual_seed(0)
    model = perceptron().double()
    target = target.double() if isinstance(target, Tensor) and target.is_floating_point() else target
    explained = compile_for_lrp(model, "input_x_gradient")
    for call in range(4):
        x = sample(BATCH, WIDTH, seed=call).double()
        if call == 2:
            with torch.no_grad():
                model[0].weight.mul_(1.5)
        torch.testing.assert_close(explained.attribute(x, target), input_x_gradient(model, x, target))
        assert len(tapes) == 1


@pytest.mark.parametrize("target", [(-1, 2), (0, 1), torch.tensor([[1, 2], [4, 3]])[:, 0]])
def test_token_ids(target: Any) -> None:
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(11, (2, TOKENS))
    explained = compile_for_lrp(model, "attnlrp")
    if isinstance(target, Tensor):
        target = (target, 2)
    for options in ({}, {"per_dimension": True}):
        for _ in range(3):
            ids = (ids + 1) % 11
            assert torch.equal(explained.attribute(ids, target, **options), anew(model, ids, target, **options))


def test_several_inputs_and_further_arguments(tapes: list[Tape]) -> None:
    torch.manual_seed(0)
    model, x, y = Pair(), sample(BATCH, WIDTH), sample(BATCH, WIDTH, seed=1)
    explained = compile_for_lrp(model, "attnlrp")
    calls: list[Callable[[Any], Any]] = [
        lambda of: of.attribute((x, y), 1),
        lambda of: of.attribute(x, 1, y),
        lambda of: of.attribute(x, 1, (y, 2.0)),
        lambda of: of.attribute((x,), 1, forward_kwargs={"y": y, "scale": 3.0}),
    ]
    for call in calls:
        first = call(explained)
        made = len(tapes)
        second = call(explained)
        assert len(tapes) == made
        expected = call(compile_for_lrp(model, "attnlrp"))
        for found in (first, second):
            assert type(found) is type(expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sizes_dtypes_and_modes_change() -> None:
    torch.manual_seed(0)
    model = perceptron()
    explained = compile_for_lrp(model, "attnlrp")
    for batch in (2, 3, 2, 4, 3, 3, 4):
        x = sample(batch, WIDTH)
        torch.testing.assert_close(explained.attribute(x, 1), anew(model, x, 1))
        with torch.inference_mode():
            assert explained.attribute(x, 1).is_inference()
        assert not explained.attribute(x, 1).is_inference()
        assert torch.equal(explained.attribute(sample(WIDTH, batch).t(), 1), anew(model, sample(WIDTH, batch).t(), 1))
    model.double()
    for _ in range(2):
        x = sample(2, WIDTH).double()
        assert torch.equal(explained.attribute(x, 1), anew(model, x, 1))


def test_open_sizes_are_repeated_too(tapes: list[Tape]) -> None:
    torch.manual_seed(0)
    explained = compile_for_lrp(perceptron(), "attnlrp")
    for batch in (2, 3, 4):
        explained.attribute(sample(batch, WIDTH), 1)
    known = len(tapes)
    for batch in (5, 6, 5, 3):
        found = explained.attribute(sample(batch, WIDTH), 1)
        assert len(tapes) == known
        torch.testing.assert_close(found, anew(explained.original, sample(batch, WIDTH), 1))
        known = len(tapes)


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[index, union-attr, operator]


def change_data(model: nn.Module) -> None:
    model[0].weight.data = sample(16, WIDTH, seed=7)  # type: ignore[index, union-attr]


def replace_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(sample(16, WIDTH, seed=8))  # type: ignore[index, union-attr]


def replace_module(model: nn.Module) -> None:
    model[1] = nn.Tanh()  # type: ignore[operator]


def tie(model: nn.Module) -> None:
    model[2].weight = model[0].bias  # type: ignore[index, union-attr]


@pytest.mark.parametrize("options", [{}, {"prepare_weights": True}, {"relevance_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("change", [change_in_place, change_data, replace_parameter, replace_module, tie])
def test_the_model_changes(change: Callable[[nn.Module], None], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = perceptron(), sample(BATCH, WIDTH)
    explained = compile_for_lrp(model, "attnlrp", **options)
    for _ in range(3):
        explained.attribute(x, 1)
    before = explained.attribute(x, 1)
    change(model)
    for _ in range(2):
        found = explained.attribute(x, 1)
        assert not torch.equal(found, before)
        assert torch.equal(found, compile_for_lrp(model, "attnlrp", **options).attribute(x, 1))


def test_what_needs_a_tape_gets_one(tapes: list[Tape]) -> None:
    """Random numbers, values changed in place, reference runs, and seeds that read outputs."""
    x = sample(BATCH, WIDTH)
    random = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Dropout(0.5))
    changing = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    calls: list[Callable[[], Any]] = []
    for model, composite in ((random, "attnlrp"), (changing, "attnlrp"), (perceptron(), "deep_lift")):
        explained = compile_for_lrp(model, composite)
        calls.append(lambda explained=explained: explained.attribute(x, 1))  # type: ignore[misc]
    explained = compile_for_lrp(perceptron(), "attnlrp")
    calls.append(lambda: explained.attribute(x, lambda output: output[:, 1].square()))
    calls.append(lambda: explained.attribute(x, 1, return_convergence_delta=True))
    for call in calls:
        for count in range(1, 4):
            tapes.clear()
            call()
            assert tapes, count


def test_running_statistics_are_updated_every_time() -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    explained = compile_for_lrp(model, "attnlrp")
    for count in range(1, 4):
        explained.attribute(sample(BATCH, WIDTH), 1)
        assert model[0].num_batches_tracked == count


def test_refusals_stay() -> None:
    explained = compile_for_lrp(perceptron(), "attnlrp")
    x = sample(BATCH, WIDTH)
    for _ in range(2):
        explained.attribute(x, 1)
    for wrong in (CLASSES, -CLASSES - 1, True, 1.5, torch.tensor([0, 1])):
        with pytest.raises(TargetError):
            explained.attribute(x, wrong)
    with pytest.raises(NoValuesError):
        explained.attribute(FakeTensorMode().from_tensor(x), 1)
