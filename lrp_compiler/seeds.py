"""From what the user wants explained to the coefficient seed at the model's output.

A seed is the coefficient c of the output, of the output's shape: relevance starts as output * c. One-hot at a
logit, relevance at inputs and sinks sums to that logit. Of a complex output relevance starts as Re(conj(c) output),
so that a seed of 1 explains the real part and a seed of 1j the imaginary part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.entries import Entries, SparseSeed, on_rows, rows_of
from lrp_compiler.passes.errors import TargetError

Index = int | Tensor | Sequence[int]
"""One index for every sample, or one per sample."""

MAKERS = ("entries", "seed")
"""The methods of a Seed that say what it is."""

Target = Any
"""None, int, tuple, list, Tensor, Seed, or a callable of the model's output."""


class Seed:
    """A target that makes its own seed for an output.

    One that asks for no more of the output than shape, dtype and device says so by ``reads_output = False``, so that
    the output need not be held.
    """

    reads_output: ClassVar[bool] = True

    def seed(self, output: Tensor) -> Tensor:
        """The coefficients at ``output``, of its shape, dtype and device; raises TargetError."""
        entries = self.entries(output)
        if entries is None:
            raise NotImplementedError
        return entries.dense(output.shape)

    def entries(self, output: Tensor) -> Entries | None:
        """The entries of ``output`` that the seed is at, where they are few: relevance then costs less."""
        return None


@dataclass(frozen=True)
class Several:
    """Targets to be explained side by side."""

    targets: tuple[Target, ...]

    def stacked(self, seeds: list[dict[int, Tensor]]) -> dict[int, Tensor]:
        """One seed per output with the targets along a new first dimension; absent seeds are zero."""
        known = {index: seed for found in seeds for index, seed in found.items()}
        return {
            index: torch.stack([found.get(index, torch.zeros_like(known[index])) for found in seeds])
            for index in sorted(known)
        }


@dataclass(frozen=True)
class Contrast(Seed):
    """One class against another: e_index - e_against; ``index`` and ``against`` as any class target."""

    reads_output: ClassVar[bool] = False

    index: Any
    against: Any

    def entries(self, output: Tensor) -> Entries | None:
        index, against = entries_of(output, self.index), entries_of(output, self.against)
        return index + -against if index and against else None

    def seed(self, output: Tensor) -> Tensor:
        return one_hot(output, self.index) - one_hot(output, self.against)


@dataclass(frozen=True)
class Token(Seed):
    """Entry ``index`` of the vocabulary at ``position`` of a (batch, positions, vocabulary) output.

    Either is one number for every sample or one per sample; -1 is the last position.
    """

    reads_output: ClassVar[bool] = False

    position: Index
    index: Index

    def entries(self, output: Tensor) -> Entries:
        if output.dim() != 3:
            raise TargetError(
                target=self, shape=tuple(output.shape), cause="Token needs (batch, positions, vocabulary)"
            )
        places = (_per_sample(self.position, output, 1, self), _per_sample(self.index, output, 2, self))
        return Entries.single(places, output)


@dataclass(frozen=True)
class MeanContrast(Seed):
    """One entry against the mean of all N: e_index - 1/N over the last dimension (LXT's advice for GPT-2)."""

    reads_output: ClassVar[bool] = False

    index: Any

    def seed(self, output: Tensor) -> Tensor:
        hot = one_hot(output, self.index)
        return hot - hot.sum(-1, keepdim=True) / output.shape[-1]


@dataclass(frozen=True)
class LogProbability(Seed):
    """The log-softmax of one entry, to first order: e_index - softmax(output) over the last dimension."""

    index: Any

    def seed(self, output: Tensor) -> Tensor:
        hot = one_hot(output, self.index)
        return hot - hot.sum(-1, keepdim=True) * output.softmax(-1)


@dataclass(frozen=True)
class Predicted(Seed):
    """The largest entry of every sample's output, by magnitude if it is complex."""

    def entries(self, output: Tensor) -> Entries | None:
        if output.dim() < 2 or output.numel() == 0:
            return None
        rows = output.flatten(1)
        largest = (rows.abs() if rows.is_complex() else rows).argmax(1)
        return Entries.single(torch.unravel_index(largest, output.shape[1:]), output)

    def seed(self, output: Tensor) -> Tensor:
        entries = self.entries(output)
        return torch.ones_like(output) if entries is None else entries.dense(output.shape)


@dataclass(frozen=True)
class TopK(Seed):
    """The sum of the ``k`` largest entries of a (batch, classes) output."""

    k: int

    def entries(self, output: Tensor) -> Entries:
        if output.dim() != 2 or not isinstance(self.k, int) or not 0 < self.k <= output.shape[1]:
            raise TargetError(target=self, shape=tuple(output.shape), cause="TopK needs (batch, at least k classes)")
        largest = output.topk(self.k, 1).indices
        return Entries((largest,), torch.ones_like(largest, dtype=output.dtype))


@dataclass(frozen=True)
class Span:
    """A span of a question-answering model: start logit at ``start`` plus end logit at ``end``, per sample.

    Called with the model's output, which has ``start_logits`` and ``end_logits`` of shape (batch, tokens).
    """

    start: Index
    end: Index

    def __call__(self, output: Any) -> Tensor:
        if not hasattr(output, "start_logits") or not hasattr(output, "end_logits"):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TargetError(target=self, shape=shape, cause="Span needs an output with start_logits and end_logits")
        parts = [(output.start_logits, self.start), (output.end_logits, self.end)]
        return sum(((logits * one_hot(logits.detach(), index)).sum(-1) for logits, index in parts), torch.zeros(()))


def reads_output(target: Target) -> bool:
    """Whether the seed of a target depends on the values of the output, not on its shape alone."""
    if isinstance(target, Several):
        return any(reads_output(one) for one in target.targets)
    if isinstance(target, Seed):
        return target.reads_output
    return callable(target) and not isinstance(target, Tensor)


def seeds_for(
    outputs: dict[int, Tensor],
    chosen: int,
    target: Target,
    rebuild: Callable[[dict[int, Tensor]], Any],
    create_graph: bool = False,
) -> dict[int, Tensor]:
    """The seed of each explained output leaf.

    ``outputs`` are the explainable leaves by index, ``chosen`` the one that targets index; ``rebuild`` makes the
    model's output from replaced leaves, for callables. With ``create_graph`` a seed that is computed from outputs can
    be differentiated with respect to them.
    """
    if not create_graph:
        outputs = {index: output.detach() for index, output in outputs.items()}
    if callable(target) and not isinstance(target, (Seed, Tensor)):
        return _seeds_of_callable(outputs, target, rebuild, create_graph)
    return {chosen: seed_for(outputs[chosen], target)}


def seed_for(output: Tensor, target: Target) -> Tensor:
    """The seed of one output for any target that is not a callable; raises TargetError."""
    if isinstance(target, Seed):
        made = target.seed(output)
        if not isinstance(made, Tensor) or made.shape != output.shape:
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise TargetError(target=target, shape=tuple(output.shape), cause=f"its seed is of {got}")
        return made
    if isinstance(target, Tensor) and (target.is_floating_point() or target.is_complex()):
        shape = tuple(target.shape)
        if target.shape != output.shape:
            cause = "a seed tensor has the shape of the output"
            raise TargetError(target=f"of shape {shape}", shape=tuple(output.shape), cause=cause)
        if target.is_complex() and not output.is_complex():
            cause = "a complex seed is for a complex output"
            raise TargetError(target=f"of shape {shape}", shape=tuple(output.shape), cause=cause)
        return target.to(output)
    return one_hot(output, target)


def one_hot(output: Tensor, target: Target) -> Tensor:
    """1 at the target's entry of every sample, 0 elsewhere; 1 throughout where a sample has one number."""
    entries = entries_of(output, target)
    return torch.ones_like(output) if entries is None else entries.dense(output.shape)


def entries_of(output: Tensor, target: Target) -> Entries | None:
    """The entry of every sample that a class target names; None for no target, of an output of one number a sample."""
    shape = tuple(output.shape)
    if target is None:
        if output.numel() != (shape[0] if shape else 1):
            raise TargetError(target=None, shape=shape, cause="without a target the output must be one number a sample")
        return None
    if output.dim() < 2:
        raise TargetError(target=target, shape=shape, cause="the output has no class dimension; leave target out")
    if isinstance(target, list) and target and isinstance(target[0], tuple):
        if len({len(indices) if isinstance(indices, tuple) else 0 for indices in target}) != 1:
            raise TargetError(target=target, shape=shape, cause="its tuples differ in length")
        columns: list[Any] = [list(column) for column in zip(*target, strict=True)]
    elif isinstance(target, tuple):
        columns = list(target)
    else:
        columns = [target]
    if len(columns) != output.dim() - 1:
        raise TargetError(
            target=target,
            shape=shape,
            cause=f"it gives {len(columns)} index(es), the output has {output.dim() - 1} dimension(s) after the batch",
        )
    return Entries.single([_per_sample(column, output, dim + 1, target) for dim, column in enumerate(columns)], output)


def sparse_seeds(output: Tensor, targets: Sequence[Target], share: int) -> list[SparseSeed] | None:
    """The seeds of targets on some rows of an output, all on as many; None where that leaves nothing out.

    Of what is not a class target or one of its kin the dense seed is looked at, if it is a tensor given for one target.
    """
    found: list[Entries] = []
    for target in targets:
        if isinstance(target, Tensor) and (target.is_floating_point() or target.is_complex()):
            seed = None if target.requires_grad or len(targets) > 1 else rows_of(seed_for(output, target), share)
            return [seed] if seed else None
        if callable(target) and not isinstance(target, (Seed, Tensor)):
            return None
        entries = _own_entries(target, output) if isinstance(target, Seed) else entries_of(output, target)
        if entries is None:
            return None
        found.append(entries)
    return on_rows(found, output.shape, share)


def _own_entries(target: Seed, output: Tensor) -> Entries | None:
    """The entries of a seed, unless a subclass has changed what the seed is and not said where."""
    defines = {name: next(at for at, kind in enumerate(type(target).__mro__) if name in vars(kind)) for name in MAKERS}
    return target.entries(output) if defines["entries"] <= defines["seed"] else None


def _per_sample(index: Any, output: Tensor, dim: int, target: Target) -> Tensor:
    """``index`` as one number per sample, checked against the size of ``dim``."""
    batch, size = output.shape[0], output.shape[dim]
    shape = tuple(output.shape)
    if isinstance(index, Tensor) and (index.dtype.is_floating_point or index.dtype == torch.bool):
        raise TargetError(target=target, shape=shape, cause=f"an index tensor of dtype {index.dtype}")
    try:
        places = torch.as_tensor(index, device=output.device)
    except (TypeError, ValueError, RuntimeError):
        raise TargetError(target=target, shape=shape, cause=f"{index!r} is not an index") from None
    if places.dtype.is_floating_point or places.dtype == torch.bool:
        raise TargetError(target=target, shape=shape, cause=f"{index!r} is not an index")
    if places.dim() > 1 or (places.dim() == 1 and places.numel() not in (1, batch)):
        raise TargetError(target=target, shape=shape, cause=f"{tuple(places.shape)} indices for {batch} sample(s)")
    if places.numel() and not places.is_meta and bool(((places < -size) | (places >= size)).any()):
        raise TargetError(target=target, shape=shape, cause=f"dimension {dim} has {size} entries")
    return places.reshape(-1).expand(batch)


def _seeds_of_callable(
    outputs: dict[int, Tensor],
    target: Callable[[Any], Any],
    rebuild: Callable[[dict[int, Tensor]], Any],
    create_graph: bool,
) -> dict[int, Tensor]:
    """d target / d output: the seed under which relevance explains the callable's value to first order."""
    leaves = {
        # An output with a history is one of its own views, so that one output's derivative is not another's too.
        index: output.view_as(output) if output.requires_grad else output.detach().clone().requires_grad_()
        for index, output in outputs.items()
    }
    shapes = tuple(tuple(output.shape) for output in outputs.values())
    with torch.inference_mode(False), torch.enable_grad():
        value = target(rebuild(dict(leaves)))
        total = sum((leaf.sum() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), torch.zeros(()))
        if not total.requires_grad:
            raise TargetError(target=target, shape=shapes, cause="it does not depend on a floating-point output")
        if total.is_complex():
            raise TargetError(target=target, shape=shapes, cause="what it returns is complex; take its real part, say")
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, create_graph=create_graph)
    return {index: grad for index, grad in zip(leaves, grads, strict=True) if grad is not None}
