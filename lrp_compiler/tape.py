"""The tape: one forward pass, kept, from which relevance can be read at any site for any target."""

from __future__ import annotations

import difflib
import fnmatch
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.attention_sites import attention_sites
from lrp_compiler.compiled import Compiler, ExplainedCall, live_value, output_names, rebuild_output
from lrp_compiler.ledger import Ledger, ledger_from_results
from lrp_compiler.linearised import Linearised
from lrp_compiler.passes.codegen import Executable
from lrp_compiler.passes.errors import OptionValueError, OutputError, StaleTapeError, UnknownSiteError
from lrp_compiler.passes.program import Constant, InputKind, Mutation, Program, Reading, Request, Result, facts
from lrp_compiler.passes.reference import reference_relevance
from lrp_compiler.passes.rules.base import EdgeKind
from lrp_compiler.seeds import Target, seeds_for
from lrp_compiler.sites import SiteRef, is_glob, resolve_sites

Names = str | list[str] | tuple[str, ...] | None
Sinks = dict[str, dict[str, Tensor]]
Masks = dict[str, Tensor]


class Tape:
    """The values one forward pass left for relevance.

    Made by ``LRPModule.run``. Values a later question needs and the pass did not keep are recomputed from its inputs
    with the same random numbers; parameters that changed since raise StaleTapeError. The reference run of composites
    that need one is made once, when first asked for.
    """

    def __init__(self, model: nn.Module, compiler: Compiler, call: ExplainedCall, request: Request) -> None:
        self._model = model
        self._compiler = compiler
        self._call = call
        self._request = request
        self._inputs: dict[str, Any] = {}
        self._saved: dict[str, Tensor] = {}
        self._reference_inputs: dict[str, Tensor] = {}
        self._references: dict[str, Tensor] = {}
        self._reference_leaves: list[Tensor] = []
        self._versions: dict[str, int | None] = {}
        self._leaves: list[Tensor] = []
        self._rng: Tensor | None = None

    @property
    def program(self) -> Program:
        """The compiled program behind this tape."""
        return self._call.program

    def record(self, inputs: list[Any], reference: dict[str, Tensor]) -> list[Any]:
        """Run the forward pass on the graph's inputs; returns the output leaves that are tensors.

        ``reference`` holds the inputs that differ in the reference run, by node name.
        """
        self._reference_inputs = reference
        executable = self._compiler.emitted(self._call, self._request)[1]
        self._inputs = _protected(self.program, inputs)
        self._rng = torch.get_rng_state() if self._call.is_random else None
        self._leaves, mutated, self._saved = _run_forward(executable, inputs)
        write_back(self.program.mutations, dict(zip(self._names(), inputs, strict=True)), mutated)
        self._versions = {name: _version(value) for name, value in self._inputs.items()}
        return self._leaves

    def _names(self) -> list[str]:
        return [spec.node for spec in self.program.inputs]

    def relevance(
        self,
        target: Target = None,
        at: Names = None,
        *,
        output: str | None = None,
        per_dimension: bool = False,
        through: Masks | None = None,
    ) -> Any:
        """Relevance at sites, for a target at an output.

        ``at`` is an input, a submodule path or an op name (or a list or glob of those); None means every attributed
        input. One name gives a tensor of the site's shape; a list, a glob or several inputs give a dict. Token
        inputs give (batch, tokens), summed over the embedding dimension in float32 or wider, or with
        ``per_dimension`` (batch, tokens, dim). Composite ``gradient`` gives gradients instead; with ``deep_lift``
        relevance is a share of how the target differs from the reference run.

        ``through`` maps sites to masks that broadcast to their shape: only what passes the masked-in channels, heads,
        tokens or neurons is handed on (Concept Relevance Propagation, Achtibat et al. 2023).

        Raises TargetError, UnknownSiteError, SiteWithoutRelevanceError, OutputError, StaleTapeError.
        """
        composite = self.program.composite
        readout: EdgeKind = composite.readout if composite is not None else "relevance"
        return self._at_sites(target, at, output, readout, per_dimension, through)

    def relevance_of_each(
        self, targets: list[Target], at: Names = None, *, output: str | None = None, per_dimension: bool = False
    ) -> Any:
        """``relevance`` for several targets in one pass: results gain a leading dimension, one entry per target.

        The relevance pass is mapped over the seeds (torch.vmap); the forward pass is shared as ever.
        """
        if self._compiler.options.reference:
            each = [self.relevance(target, at, output=output, per_dimension=per_dimension) for target in targets]
            return pytree.tree_map(lambda *found: torch.stack(found), *each)
        composite = self.program.composite
        readout: EdgeKind = composite.readout if composite is not None else "relevance"
        return self._at_sites(_Several(tuple(targets)), at, output, readout, per_dimension)

    def coefficients(self, target: Target = None, at: Names = None, *, output: str | None = None) -> Any:
        """The coefficients c (R = a * c) at sites; arguments and result as in ``relevance``, never summed."""
        if self._compiler.options.reference:
            raise OptionValueError(name="reference", value=True, cause="a relevance-space pass has no coefficients")
        return self._at_sites(target, at, output, "coefficient", True)

    def coefficients_from(self, starts: dict[str, Tensor], at: Names, *, blocked: tuple[str, ...] = ()) -> Any:
        """The coefficients that seeds at inner sites send to earlier ones, past none of the sites ``blocked``.

        ``starts`` maps sites to coefficients of their shape; result as in ``coefficients``. Raises
        SiteWithoutRelevanceError for a site that no path leads back to.
        """
        seeds = {node: value for name, value in starts.items() for node in self._nodes_at([name])}
        refs = resolve_sites(self.program, self._names_of(at))
        nodes: tuple[tuple[str, Reading], ...] = tuple((node, "coefficient") for ref in refs for node in ref.nodes)
        request = Request((), nodes, starts=tuple(seeds), blocked=self._nodes_at(list(blocked)))
        self._check_fresh()
        executable = self._compiler.emitted(self._call, request)[1]
        values = {result.site: value for result, value in self._run(executable, dict(enumerate(seeds.values())), {})}
        found = {ref.label: _gather(ref, values, "coefficient", True) for ref in refs}
        return next(iter(found.values())) if isinstance(at, str) and not is_glob(at) else found

    def _nodes_at(self, names: list[str]) -> tuple[str, ...]:
        return tuple(node for ref in resolve_sites(self.program, names) for node in ref.nodes)

    def activations(self, at: Names = None) -> Any:
        """The forward values at sites; result as in ``relevance``, token inputs giving their embeddings."""
        chosen = self._call.chosen_output(self._compiler.options.output)
        nothing = torch.zeros_like(self._outputs()[chosen])
        return self._at_sites(nothing, at, None, "activation", True)

    def attention_maps(self, target: Target = None, *, output: str | None = None) -> dict[str, Tensor]:
        """Relevance at every attention map, fused or not: path of its module -> (batch, heads, queries, keys).

        A model that merges batch and heads gives (batch * heads, queries, keys). Raises SiteWithoutRelevanceError where
        the composite holds maps constant, as CP-LRP does.
        """
        found = attention_sites(self.program)
        nodes = tuple((site.map, site.reading) for site in found.values())
        values = {result.site: value for result, value in self._ask(target, output, nodes)[0]}
        return {label: values[site.map] for label, site in found.items()}

    def heads(self, target: Target = None, *, output: str | None = None) -> dict[str, Tensor]:
        """Relevance of every attention head, its features summed: path of its module -> (batch, heads, queries)."""
        found = attention_sites(self.program)
        nodes: tuple[tuple[str, Reading], ...] = tuple((site.output, "relevance") for site in found.values())
        values = {result.site: value for result, value in self._ask(target, output, nodes)[0]}
        return {label: values[site.output].sum(-1) for label, site in found.items()}

    def parameters(self, target: Target = None, names: Names = None, *, output: str | None = None) -> dict[str, Tensor]:
        """Relevance of weights and biases: parameter name -> tensor of its shape, summed over the batch and all uses.

        ``names`` are parameter names or globs, None meaning all. A weight's relevance is the relevance of the values it
        multiplies seen from the other side, not more of it, and costs a second product per layer. Raises
        UnknownSiteError, and OptionValueError for a parameter under a rule that has none (of first layers, of folded
        batch norm).
        """
        nodes = self._parameter_nodes()
        distinct = [name for name, _ in self._model.named_parameters() if name in nodes]
        wanted = distinct if names is None else _matching(nodes, names)
        sites: tuple[tuple[str, Reading], ...] = tuple((node, "parameter") for name in wanted for node in nodes[name])
        values = {result.site: value for result, value in self._ask(target, output, tuple(dict.fromkeys(sites)))[0]}
        return {name: torch.stack([values[node] for node in nodes[name]]).sum(0) for name in wanted}

    def _parameter_nodes(self) -> dict[str, tuple[str, ...]]:
        """Every parameter name of the call -> its graph inputs; tied names have all of each other's."""
        found: dict[int, list[str]] = {}
        for spec in self.program.inputs:
            if spec.kind is InputKind.PARAMETER:
                found.setdefault(id(live_value(self._model, spec)), []).append(spec.node)
        named = self._model.named_parameters(remove_duplicate=False)
        return {name: tuple(found[id(value)]) for name, value in named if id(value) in found}

    def linearised(self, at: Names = None, *, output: str | None = None) -> Linearised:
        """The linear map from the values at ``at`` (as in ``relevance``) to one output: rows, columns, offset.

        Raises OptionValueError for a composite with a rule that is not linear in the seed.
        """
        for node in self.program.graph.nodes:
            rule = facts(node).rule
            if rule is not None and not rule.linear_in_seed:
                cause = f"the rule '{rule}' of {node.name} is not linear in the seed"
                raise OptionValueError(name="composite", value=getattr(self.program.composite, "name", ""), cause=cause)
        refs = resolve_sites(self.program, self._names_of(at))
        chosen = self._call.chosen_output(output if output is not None else self._compiler.options.output)
        nodes: tuple[tuple[str, Reading], ...] = tuple((node, "coefficient") for ref in refs for node in ref.nodes)
        executable = self._compiler.emitted(self._call, Request((chosen,), tuple(dict.fromkeys(nodes))))[1]
        self._check_fresh()

        def pullback(seed: Tensor) -> dict[str, Tensor]:
            values = {
                result.site: value for result, value in self._run(executable, {chosen: seed}, {}, differentiable=True)
            }
            return {ref.label: _gather(ref, values, "coefficient", True) for ref in refs}

        def seed_of(target: Target) -> Tensor:
            return self._seeds(target, output)[chosen]

        activations = self.activations([ref.label for ref in refs])
        return Linearised(pullback, self._outputs()[chosen].detach(), activations, seed_of)

    def values(self, nodes: tuple[str, ...]) -> dict[str, Tensor]:
        """The forward values of graph nodes, parameters among them, by node name."""
        self._check_fresh()
        request = Request((), tuple((node, "activation") for node in nodes))
        executable = self._compiler.emitted(self._call, request)[1]
        return {result.site: value for result, value in self._run(executable, {}, {})}

    def sinks(self, target: Target = None, *, output: str | None = None) -> Sinks:
        """What left the graph on purpose: op -> kind -> relevance tensor (bias, constant, softmax, mask, epsilon)."""
        results, _ = self._ask(target, output, (), sinks=True)
        found: Sinks = {}
        for result, value in results:
            if result.kind == "sink":
                found.setdefault(result.site, {})[result.detail] = value
        return found

    def ledger(self, target: Target = None, *, output: str | None = None) -> Ledger:
        """Relevance in, out and sunk, op by op, in float64 sums."""
        results, seeds = self._ask(target, output, (), sinks=True, ledger=True)
        leaves = self._amounts()
        total = sum(float((seed.double() * leaves[index].detach().double()).sum()) for index, seed in seeds.items())
        dtype = next(iter(seeds.values())).dtype
        return ledger_from_results(self.program, results, total, dtype)

    def seeded_output(self, target: Target = None, output: str | None = None) -> Tensor:
        """Per sample, the sum of seed times output: what relevance at inputs and sinks adds up to.

        With a reference run, of seed times the output's difference from that run's.
        """
        leaves = self._amounts()
        return sum(  # type: ignore[return-value]
            (seed * leaves[index]).reshape(seed.shape[0] if seed.dim() else 1, math.prod(seed.shape[1:])).sum(1)
            for index, seed in self._seeds(target, output).items()
        )

    def _at_sites(
        self,
        target: Target,
        at: Names,
        output: str | None,
        kind: Reading,
        per_dimension: bool,
        through: Masks | None = None,
    ) -> Any:
        refs = resolve_sites(self.program, self._names_of(at))
        nodes = tuple(dict.fromkeys((node, kind) for ref in refs for node in ref.nodes))
        results, _ = self._ask(target, output, nodes, masks=self._masks(through or {}))
        values = {result.site: value for result, value in results}
        found = {ref.label: _gather(ref, values, kind, per_dimension) for ref in refs}
        single = (at is None and len(found) == 1) or (isinstance(at, str) and not is_glob(at))
        return next(iter(found.values())) if single else found

    def _names_of(self, at: Names) -> list[str]:
        return list(self.program.attributed) if at is None else [at] if isinstance(at, str) else list(at)

    def _masks(self, through: Masks) -> Masks:
        """The masks by node name, in the shape and dtype of their sites; raises UnknownSiteError, OptionValueError."""
        nodes = self.program.nodes_by_name()
        found: Masks = {}
        for name, mask in through.items():
            for node in (node for ref in resolve_sites(self.program, [name]) for node in ref.nodes):
                fake = nodes[node].meta["val"]
                try:
                    found[node] = mask.to(device=fake.device, dtype=fake.dtype).expand(fake.shape)
                except RuntimeError:
                    cause = f"a mask of shape {tuple(mask.shape)} does not broadcast to {tuple(fake.shape)}"
                    raise OptionValueError(name="through", value=name, cause=cause) from None
        return found

    def _outputs(self) -> dict[int, Tensor]:
        """The output leaves that are tensors, by leaf index."""
        indices = [index for index, leaf in enumerate(self.program.outputs) if not isinstance(leaf, Constant)]
        return dict(zip(indices, self._leaves, strict=True))

    def _amounts(self) -> dict[int, Tensor]:
        """What is explained of each output leaf: its value, or the difference from its value in the reference run."""
        leaves = self._outputs()
        composite = self.program.composite
        if composite is None or not composite.against_reference:
            return leaves
        self._check_fresh()
        if not self._reference_leaves:
            self._run_reference(self._compiler.emitted(self._call, self._request)[1])
        pairs = zip(leaves.items(), self._reference_leaves, strict=True)
        # Only floats are explained; of token ids and masks among the outputs there is no difference to take.
        return {index: leaf - other for (index, leaf), other in pairs if leaf.is_floating_point()}

    def _seeds(self, target: Target, output: str | None) -> dict[int, Tensor]:
        name = output if output is not None else self._compiler.options.output
        chosen = self._call.chosen_output(name)
        leaves = self._outputs()
        explainable = {i: leaves[i].detach() for i in sorted(self._call.explainable_outputs().values())}

        def rebuild(replaced: dict[int, Tensor]) -> Any:
            return rebuild_output(self.program, list({**leaves, **replaced}.values()))

        if isinstance(target, _Several):
            return target.stacked([seeds_for(explainable, chosen, one, rebuild) for one in target.targets])
        seeds = seeds_for(explainable, chosen, target, rebuild)
        if not seeds:
            known = ", ".join(output_names(self.program)[index] for index in explainable)
            raise OutputError(name="(callable)", cause="the target depends on none of its outputs", known=known)
        return dict(sorted(seeds.items()))

    def _ask(
        self,
        target: Target,
        output: str | None,
        sites: tuple[tuple[str, Reading], ...],
        *,
        sinks: bool = False,
        ledger: bool = False,
        masks: Masks | None = None,
    ) -> tuple[list[tuple[Result, Tensor]], dict[int, Tensor]]:
        """Compile and run the relevance pass for one question."""
        self._check_fresh()
        seeds = self._seeds(target, output)
        masks = masks or {}
        if masks and (self._compiler.options.reference or self._compiler.options.verify != "off"):
            raise OptionValueError(name="through", value=list(masks), cause="not with reference=True or verify")
        if self._compiler.options.reference:
            return self._ask_reference(seeds, sites, sinks or ledger), seeds
        request = Request(tuple(seeds), sites, sinks, ledger, tuple(masks))
        executable = self._compiler.emitted(self._call, request)[1]
        results = self._run(executable, seeds, masks, mapped=isinstance(target, _Several))
        if self._compiler.options.verify == "ledger" and not ledger:
            for one in target.targets if isinstance(target, _Several) else [target]:
                self.ledger(one, output=output).check()
        return results, seeds

    def _run(
        self,
        executable: Executable,
        seeds: dict[int, Tensor],
        masks: Masks,
        *,
        mapped: bool = False,
        differentiable: bool = False,
    ) -> list[tuple[Result, Tensor]]:
        """Run a relevance graph on this tape's values; ``differentiable`` lets the seeds record gradients."""
        self._complete(executable)
        values = [self._inputs[name] for name in executable.free] + [self._saved[name] for name in executable.saved]
        values += [self._references[name] for name in executable.reference]
        if differentiable:
            values = [value.detach() if isinstance(value, Tensor) else value for value in values]
        with torch.set_grad_enabled(differentiable):
            code = executable.differentiable if differentiable else executable.relevance
            results = _relevance(code, values, list(seeds.values()), list(masks.values()), mapped=mapped)
        return list(zip(executable.program.results, results, strict=True))

    def _ask_reference(
        self, seeds: dict[int, Tensor], sites: tuple[tuple[str, Reading], ...], accounts: bool
    ) -> list[tuple[Result, Tensor]]:
        if accounts:
            raise OptionValueError(name="reference", value=True, cause="the reference interpreter keeps no ledger")
        with self._random_numbers():
            values = reference_relevance(self.program, list(self._inputs.values()), seeds, [n for n, _ in sites])
        return [(Result(kind, name), values[name]) for name, kind in sites]

    def _complete(self, executable: Executable) -> None:
        """Recompute what this question needs and the forward pass did not keep."""
        if not all(name in self._references for name in executable.reference):
            self._run_reference(executable)
        if all(name in self._saved for name in executable.saved):
            return
        with torch.no_grad(), self._random_numbers():
            _, _, saved = _run_forward(executable, list(self._inputs.values()))
        self._saved.update(saved)

    def _run_reference(self, executable: Executable) -> None:
        """The same forward code on the baselines; what it would change in place stays as it is."""
        inputs = {**self._inputs, **self._reference_inputs}
        with torch.no_grad(), self._random_numbers():
            self._reference_leaves, _, recorded = _run_forward(executable, list(inputs.values()))
        self._references.update({**self._reference_inputs, **recorded})

    def _random_numbers(self) -> _ReplayedRNG:
        """A context in which the CPU generator repeats what the forward pass drew."""
        return _ReplayedRNG(self._rng)

    def _check_fresh(self) -> None:
        for spec in self.program.inputs:
            value = self._inputs[spec.node]
            if self._versions[spec.node] != _version(value):
                what = "the input" if spec.kind is InputKind.USER else f"the {spec.kind.value}"
                raise StaleTapeError(name=f"{what} {spec.target}")


@dataclass(frozen=True)
class _Several:
    """Targets to be explained side by side."""

    targets: tuple[Target, ...]

    def stacked(self, seeds: list[dict[int, Tensor]]) -> dict[int, Tensor]:
        """One seed per output with the targets along a new first dimension; absent seeds are zero."""
        known = {index: seed for found in seeds for index, seed in found.items()}
        return {
            index: torch.stack([found.get(index, torch.zeros_like(known[index])) for found in seeds])
            for index in sorted(known)
        }


def _relevance(
    code: Callable[..., Any] | None, values: list[Tensor], seeds: list[Tensor], masks: list[Tensor], *, mapped: bool
) -> Any:
    """The results of a relevance graph; ``mapped`` seeds carry one more dimension in front, and so do results."""
    assert code is not None
    if not mapped:
        return code(*values, *seeds, *masks)
    in_dims = (*(None for _ in values), *(0 for _ in seeds), *(None for _ in masks))
    with warnings.catch_warnings():
        # Ops without a batching rule (CPU flash attention) run once per target; the result is the same.
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        return torch.vmap(code, in_dims=in_dims)(*values, *seeds, *masks)


class _ReplayedRNG:
    """Restore a generator state for the duration; None leaves the generator alone."""

    def __init__(self, state: Tensor | None) -> None:
        self._state = state
        self._outer: Tensor | None = None

    def __enter__(self) -> None:
        if self._state is not None:
            self._outer = torch.get_rng_state()
            torch.set_rng_state(self._state)

    def __exit__(self, *exception: object) -> None:
        if self._outer is not None:
            torch.set_rng_state(self._outer)


def _run_forward(executable: Executable, inputs: list[Any]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """(output leaves, mutated values, recorded values) of one forward pass."""
    program = executable.program
    values = executable.forward(*inputs)
    outputs = sum(not isinstance(leaf, Constant) for leaf in program.outputs)
    mutated = outputs + len(program.mutations)
    recorded = dict(zip(executable.recorded, values[mutated:], strict=True))
    return list(values[:outputs]), list(values[outputs:mutated]), recorded


def write_back(mutations: tuple[Mutation, ...], inputs: dict[str, Any], values: list[Tensor]) -> None:
    """Give inputs that the model changes in place (running statistics, say) their new values."""
    with torch.no_grad():
        for mutation, value in zip(mutations, values, strict=True):
            inputs[mutation.input].copy_(value)


def _protected(program: Program, inputs: list[Any]) -> dict[str, Any]:
    """The inputs by name; those the model overwrites are cloned, so that the tape keeps what was read."""
    overwritten = {mutation.input for mutation in program.mutations}
    named = zip((spec.node for spec in program.inputs), inputs, strict=True)
    return {name: value.detach().clone() if name in overwritten else value for name, value in named}


def _version(value: Any) -> int | None:
    """A tensor's count of in-place changes; None where torch keeps none (inference tensors, numbers)."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


def _matching(known: dict[str, tuple[str, ...]], names: str | list[str] | tuple[str, ...]) -> list[str]:
    """The names that ``names`` (exact or glob) stand for; raises UnknownSiteError."""
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        matches = fnmatch.filter(known, name)
        if not matches:
            close = difflib.get_close_matches(name, known, n=3)
            raise UnknownSiteError(name=name, closest=f"Parameters alike: {', '.join(close) or ', '.join(known)}.")
        found.update(dict.fromkeys(matches))
    return list(found)


def _gather(ref: SiteRef, values: dict[str, Tensor], kind: Reading, per_dimension: bool) -> Tensor:
    """The value of one site; embeddings of one token input add up, their hidden dimension summed if asked."""
    parts = [values[name] for name in ref.nodes]
    if ref.is_tokens and not per_dimension and kind == "relevance":
        parts = [part.sum(-1, dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
