"""The gallery: tiny random models of every architecture this library promises, and what each has to show.

A family file (gallery_text.py, ...) holds builders; an Entry says what is known of one architecture. No check here
knows any model: what differs between them stands in the entry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lrp_compiler import LRPModule, Tape, compile_for_lrp

COMPOSITES = ("attnlrp", "auto")
"""What every architecture is explained with; batches and padding are looked at under the first."""

SIGN_SPLIT = "epsilon_plus"
FLOAT64 = 1e-10
"""Relative gap that a ledger may have in float64: some 10^5 roundings of 1e-16 each."""


@dataclass
class Call:
    """One call ``model(*args, **kwargs)`` of a batch."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Entry:
    """One architecture: how it is built, and what is special about it.

    ``build`` makes a call with a batch of two or more. ``target`` is what to explain; ``sources`` the inputs that must
    be found to carry relevance. ``mask`` names the keyword argument with ones for real tokens and zeros for padding,
    ``tokens`` the input it masks. ``batched`` is False where the samples of a batch are not separate (a graph's nodes,
    say), with the reason in ``because``. ``unbatched`` names keyword arguments that are shared by all samples.
    ``rounding`` says why outputs equal eager's to rounding only, '' demanding the same bits; ``fused`` why they do
    where eager records no gradients.
    """

    build: Callable[[], Call]
    target: Any
    sources: tuple[str, ...]
    mask: str | None = None
    tokens: str = "input_ids"
    batched: bool = True
    because: str = ""
    unbatched: tuple[str, ...] = ()
    rounding: str = ""
    fused: str = ""


class InDouble(TorchFunctionMode):
    """Whatever asks for float32 gets float64: Hugging Face computes norms, softmax and rotary in float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_widened(argument) for argument in args)
        kwargs = {name: _widened(argument) for name, argument in (kwargs or {}).items()}
        if func is torch.tensor and isinstance(args[0], float):
            kwargs = {"dtype": torch.float64, **kwargs}
        return func(*args, **kwargs)


DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _widened(leaf: Any) -> Any:
    return DOUBLE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def made(entry: Entry, *, double: bool = False) -> Call:
    """The call of an entry in eval mode, every parameter and running statistic random."""
    torch.manual_seed(0)
    call = entry.build()
    call.model.eval()
    with torch.no_grad():
        for parameter in call.model.parameters():
            if parameter.is_complex():
                continue
            if parameter.dim() <= 1:
                nn.init.normal_(parameter, 0.5, 0.3)
            else:
                nn.init.normal_(parameter, 0.0, 0.6 * parameter[0].numel() ** -0.5)
    for module in call.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        # A cache is no tree of tensors, and an explained call needs none: it returns None in its place.
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    if double:
        call.model.double()
        for parameter in call.model.parameters():
            # Module.double leaves complex parameters alone.
            parameter.data = _double(parameter.data)
        call.args, call.kwargs = pytree.tree_map(_double, (call.args, call.kwargs))
    return call


def _double(leaf: Any) -> Any:
    return leaf.to(DOUBLE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, Tensor) else leaf


@contextlib.contextmanager
def precision(double: bool) -> Iterator[None]:
    """Compute in float64 throughout, or leave everything as it is."""
    with InDouble() if double else contextlib.nullcontext():
        yield


def relevance(tape: Tape, target: Any) -> dict[str, Tensor]:
    """Relevance per attributed input."""
    found = tape.relevance(target)
    return found if isinstance(found, dict) else {"input": found}


def check_outputs(entry: Entry) -> None:
    """In float32: the model's outputs, with and without gradients recorded, and nothing at padding."""
    call = made(entry)
    explained = compile_for_lrp(call.model, COMPOSITES[0])
    _check_drop_in(entry, call, explained)
    if entry.mask is not None:
        _check_padding(entry, call, explained)


def check_sign_split(entry: Entry) -> None:
    """Under a composite that splits signs: covered and conserved in float64, nothing at padding in float32."""
    call = made(entry, double=True)
    with precision(True):
        _check_ledger(entry, call, compile_for_lrp(call.model, SIGN_SPLIT))
    if entry.mask is not None:
        call = made(entry)
        _check_padding(entry, call, compile_for_lrp(call.model, SIGN_SPLIT))


def _check_drop_in(entry: Entry, call: Call, explained: LRPModule) -> None:
    """Outputs of the same type and the same bits as eager's."""
    for context in (torch.no_grad(), contextlib.nullcontext()):
        with context:
            ours, theirs = explained(*call.args, **call.kwargs), call()
        assert type(ours) is type(theirs)
        for one, other in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            if not isinstance(other, Tensor):
                assert one == other
            elif entry.rounding or (entry.fused and isinstance(context, torch.no_grad)):
                torch.testing.assert_close(one, other)
            else:
                assert one.dtype == other.dtype and torch.equal(one, other)


def check_relevance(entry: Entry) -> None:
    """In float64: covered and conserved, and a batch is its samples one by one."""
    call = made(entry, double=True)
    explained = compile_for_lrp(call.model, COMPOSITES[0])
    with precision(True):
        _check_ledgers(entry, call, explained)
        if entry.batched:
            with torch.no_grad():
                _check_batch(entry, call, explained)


def _check_ledgers(entry: Entry, call: Call, explained: LRPModule) -> None:
    """All live ops covered, sources found, relevance finite, ledgers closed op by op."""
    report = explained.report(*call.args, **call.kwargs)
    assert set(report.inputs) == set(entry.sources), report.inputs
    _check_ledger(entry, call, explained)
    chosen = compile_for_lrp(explained, COMPOSITES[1])
    program = chosen.explained_call(call.args, dict(sorted(call.kwargs.items()))).program
    assert program.composite is not None
    if program.composite.name != COMPOSITES[0]:
        _check_ledger(entry, call, chosen)


def _check_ledger(entry: Entry, call: Call, explained: LRPModule) -> None:
    tape = explained.run(*call.args, **call.kwargs)[1]
    assert set(tape.program.attributed) == set(entry.sources), tape.program.attributed
    found = relevance(tape, entry.target)
    for name, value in found.items():
        assert torch.isfinite(value).all(), (explained, name)
    assert any(value.count_nonzero() for value in found.values()), explained
    ledger = tape.ledger(entry.target)
    assert ledger.rows and ledger.seed != 0
    for row in ledger.rows:
        assert row.relative_gap <= FLOAT64, (explained, row)


def _check_batch(entry: Entry, call: Call, explained: LRPModule) -> None:
    """A batch is its samples one by one."""
    together = relevance(explained.run(*call.args, **call.kwargs)[1], entry.target)
    for sample in range(2):
        one = _sample(entry, call, sample)
        alone = relevance(explained.run(*one.args, **one.kwargs)[1], _target_of(entry.target, sample))
        for name, value in alone.items():
            scale = together[name].abs().max().item()
            torch.testing.assert_close(value[0], together[name][sample], rtol=1e-9, atol=1e-11 * scale)


def _sample(entry: Entry, call: Call, sample: int) -> Call:
    def cut(leaf: Any) -> Any:
        return leaf[sample : sample + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    kwargs = {k: v if k in entry.unbatched else pytree.tree_map(cut, v) for k, v in call.kwargs.items()}
    return replace(call, args=pytree.tree_map(cut, call.args), kwargs=kwargs)


def _target_of(target: Any, sample: int) -> Any:
    return target[sample : sample + 1] if isinstance(target, Tensor) else target


def _check_padding(entry: Entry, call: Call, explained: LRPModule) -> None:
    """Padding tokens get exactly nothing, others something."""
    assert entry.mask is not None
    mask = call.kwargs[entry.mask].bool()
    assert not mask.all()
    found = explained.run(*call.args, **call.kwargs)[1].relevance(entry.target)
    at_tokens = found[entry.tokens] if isinstance(found, dict) else found
    assert torch.isfinite(at_tokens).all()
    padded = at_tokens.flatten(mask.dim()).abs().sum(-1) if at_tokens.dim() > mask.dim() else at_tokens
    assert (padded[~mask] == 0).all() and (padded[mask] != 0).any()
