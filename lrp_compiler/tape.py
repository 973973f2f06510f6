"""The tape: one forward pass, kept, from which relevance can be read at any site for any target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler.attention_sites import attention_sites
from lrp_compiler.compiled import Compiler, ExplainedCall, rebuild_output
from lrp_compiler.kernels.linear import relevance_of, summed_over_dimensions
from lrp_compiler.kernels.totals import total_of
from lrp_compiler.ledger import Ledger, ledger_from_results
from lrp_compiler.linearised import Linearised
from lrp_compiler.passes.branches import forward_nodes_everywhere
from lrp_compiler.passes.errors import ArgumentError, MaskError, NotLinearError, ReferenceModeError
from lrp_compiler.passes.program import InputKind, Program, facts, live_value
from lrp_compiler.passes.request import Reading, Request
from lrp_compiler.passes.rules.base import EdgeKind
from lrp_compiler.passes.sizes import value_of_sizes
from lrp_compiler.questions import Asked, How, Questions
from lrp_compiler.recording import Question, Recording, Results, Sites
from lrp_compiler.seeds import Several, Target, reads_output
from lrp_compiler.side_by_side import check_targets, chunks
from lrp_compiler.sites import Names, SiteRef, is_glob, matching_names, name_list, resolve_sites, value_at

Sinks = dict[str, dict[str, Tensor]]
Masks = dict[str, Tensor]
RELEVANCE = "lrp_compiler.Tape.relevance"
COEFFICIENTS_FROM = "lrp_compiler.Tape.coefficients_from"


class Tape:
    """The values one forward pass left for relevance.

    Made by ``LRPModule.run``. Values a later question needs and the pass did not keep are recomputed from its inputs
    with the same random numbers; parameters that changed since raise StaleTapeError. The reference run of composites
    that need one is made once, when first asked for.

    With ``create_graph=True`` a result can be differentiated, as torch.autograd.grad's can: by the model's parameters
    and by inputs that require gradients, through what relevance reads of the forward pass, the reference run and seeds
    that are computed from outputs too. One backward pass frees what the model's own output needs for its: add up the
    losses, or retain the graph. Raises NoHistoryError where gradients were or are disabled, and NotDifferentiableError.
    """

    def __init__(
        self, model: nn.Module, compiler: Compiler, call: ExplainedCall, request: Request, once: bool = False
    ) -> None:
        self._model = model
        self._compiler = compiler
        self._call = call
        self._once = once
        self._recording = Recording(compiler, call, request, once)
        self.questions = Questions(compiler, call, self._recording)

    @property
    def program(self) -> Program:
        """The compiled program behind this tape."""
        return self._call.program

    @property
    def readout(self) -> EdgeKind:
        """What the composite's results are: relevance, or coefficients."""
        composite = self.program.composite
        return composite.readout if composite is not None else "relevance"

    def open(self, inputs: list[Any], reference: dict[str, Tensor]) -> None:
        """Take the graph's inputs; ``reference`` holds those that differ in the reference run, by node name."""
        self._recording.open(inputs, reference)

    def record(self) -> Any:
        """Run the forward pass; returns the model's output."""
        return rebuild_output(self.program, self._recording.record(), self._recording.sizes)

    def relevance(
        self,
        target: Target = None,
        at: Names = None,
        *,
        output: str | None = None,
        per_dimension: bool = False,
        through: Masks | None = None,
        create_graph: bool = False,
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
        how = How(output, per_dimension, create_graph)
        return self.answered(self.asked(target, at, self.readout, how, through))

    def relevance_of_each(
        self,
        targets: list[Target],
        at: Names = None,
        *,
        chunk: int | None = None,
        output: str | None = None,
        per_dimension: bool = False,
        create_graph: bool = False,
    ) -> Any:
        """``relevance`` for several targets: results gain a leading dimension, one entry per target.

        The relevance pass is mapped (torch.vmap) over ``chunk`` seeds at a time, by default as many as take 256 MiB by
        the plan; beyond that memory grows by the results alone.
        """
        check_targets(targets, chunk, RELEVANCE + "_of_each")
        how = How(output, per_dimension, create_graph)
        if self._compiler.options.reference:
            each = [self.answered(self.asked(target, at, self.readout, how)) for target in targets]
            return pytree.tree_map(lambda *found: torch.stack(found), *each)

        def asked(part: Sequence[Target]) -> Asked:
            return self.asked(Several(tuple(part)), at, self.readout, how)

        if chunk is None:
            chunk = self._recording.side_by_side(asked(targets[:1]).question.request)
        parts = [self.answered(asked(part)) for part in chunks(targets, chunk)]
        return pytree.tree_map(lambda *found: found[0] if len(found) == 1 else torch.cat(found), *parts)

    def coefficients(
        self, target: Target = None, at: Names = None, *, output: str | None = None, create_graph: bool = False
    ) -> Any:
        """The coefficients c (R = a * c) at sites; arguments and result as in ``relevance``, never summed."""
        if self._compiler.options.reference:
            raise ReferenceModeError(cause="a relevance-space pass has no coefficients")
        return self.answered(self.asked(target, at, "coefficient", How(output, True, create_graph)))

    def coefficients_from(self, starts: dict[str, Tensor], at: Names, *, blocked: tuple[str, ...] = ()) -> Any:
        """The coefficients that seeds at inner sites send to earlier ones, past none of the sites ``blocked``.

        ``starts`` maps sites to coefficients of their shape; result as in ``coefficients``. Raises
        SiteWithoutRelevanceError for a site that no path leads back to.
        """
        seeds = {node: value for name, value in starts.items() for node in self._nodes_at([name])}
        self._check_starts(seeds)
        refs = resolve_sites(self.program, self._names_of(at), self._call.sites)
        nodes: Sites = tuple((node, "coefficient") for ref in refs for node in ref.nodes)
        request = Request((), nodes, starts=tuple(seeds), blocked=self._nodes_at(list(blocked)))
        values = by_site(self._recording.answer(Question(request, dict(seeds))))
        return self._gathered(_by_label(refs, values), at)

    def _check_starts(self, seeds: dict[str, Tensor]) -> None:
        """Seeds at inner sites have the shapes of those; raises ArgumentError."""
        nodes = self.program.nodes_by_name()
        for node, seed in seeds.items():
            shape = tuple(nodes[node].meta["val"].shape)
            given = tuple(seed.shape) if isinstance(seed, Tensor) else type(seed).__name__
            if given != shape:
                cause = f"the value there has shape {shape}"
                raise ArgumentError(function=COEFFICIENTS_FROM, name="starts", value={node: given}, cause=cause)

    def _nodes_at(self, names: list[str]) -> tuple[str, ...]:
        return tuple(node for ref in resolve_sites(self.program, names, self._call.sites) for node in ref.nodes)

    def activations(self, at: Names = None, *, create_graph: bool = False) -> Any:
        """The forward values at sites; result as in ``relevance``, token inputs giving their embeddings."""
        refs = resolve_sites(self.program, self._names_of(at), self._call.sites)
        values = self.values(tuple(dict.fromkeys(node for ref in refs for node in ref.nodes)), create_graph)
        return self._gathered(_by_label(refs, values), at)

    def attention_maps(
        self, target: Target = None, *, output: str | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Relevance at every attention map, fused or not: path of its module -> (batch, heads, queries, keys).

        A model that merges batch and heads gives (batch * heads, queries, keys). Raises SiteWithoutRelevanceError where
        the composite holds maps constant, as CP-LRP does.
        """
        found = attention_sites(self.program)
        nodes = tuple((site.map, site.reading) for site in found.values())
        values = by_site(self._ask(target, output, nodes, create_graph=create_graph)[0])
        return {label: values[site.map] for label, site in found.items()}

    def heads(
        self, target: Target = None, *, output: str | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Relevance of every attention head, its features summed: path of its module -> (batch, heads, queries)."""
        found = attention_sites(self.program)
        nodes: Sites = tuple((site.output, "relevance") for site in found.values())
        values = by_site(self._ask(target, output, nodes, create_graph=create_graph)[0])
        return {label: values[site.output].sum(-1) for label, site in found.items()}

    def parameters(
        self, target: Target = None, names: Names = None, *, output: str | None = None, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Relevance of weights and biases: parameter name -> tensor of its shape, summed over the batch and all uses.

        ``names`` are parameter names or globs, None meaning all. A weight's relevance is the relevance of the values it
        multiplies seen from the other side, not more of it, and costs a second product per layer. Raises
        UnknownSiteError, and ParameterRelevanceError for a parameter under a rule that has none (of first layers, of
        folded batch norm).
        """
        nodes = self._parameter_nodes()
        distinct = [name for name, _ in self._model.named_parameters() if name in nodes]
        wanted = distinct if names is None else matching_names(nodes, names)
        sites: Sites = tuple((node, "parameter") for name in wanted for node in nodes[name])
        values = by_site(self._ask(target, output, tuple(dict.fromkeys(sites)), create_graph=create_graph)[0])
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

        Raises NotLinearError for a composite with a rule that is not linear in the seed.
        """
        for node in forward_nodes_everywhere(self.program):
            rule = facts(node).rule
            if rule is not None and not rule.linear_in_seed:
                composite = getattr(self.program.composite, "name", "")
                raise NotLinearError(composite=composite, rule=rule, node=node.name)
        refs = resolve_sites(self.program, self._names_of(at), self._call.sites)
        chosen = self.questions.chosen(output)
        nodes: Sites = tuple((node, "coefficient") for ref in refs for node in ref.nodes)
        request = Request((chosen,), tuple(dict.fromkeys(nodes)))

        def pullback(seed: Tensor) -> dict[str, Tensor]:
            values = by_site(self._recording.answer(Question(request, {chosen: seed}), differentiable=True))
            return _by_label(refs, values)

        def seed_of(target: Target) -> Tensor:
            return self.questions.seeds(target, output)[chosen]

        activations = self.activations([ref.label for ref in refs])
        return Linearised(pullback, self._recording.outputs()[chosen].detach(), activations, seed_of)

    def values(self, nodes: tuple[str, ...], create_graph: bool = False) -> dict[str, Tensor]:
        """The forward values of graph nodes, parameters among them, by node name."""
        request = Request((), tuple((node, "activation") for node in nodes))
        return by_site(self._recording.answer(Question(request), create_graph=create_graph))

    def sinks(self, target: Target = None, *, output: str | None = None, create_graph: bool = False) -> Sinks:
        """What left the graph on purpose: op -> kind -> relevance tensor (bias, constant, softmax, mask, epsilon)."""
        results, _ = self._ask(target, output, (), sinks=True, create_graph=create_graph)
        found: Sinks = {}
        for result, value in results:
            if result.kind == "sink":
                found.setdefault(result.site, {})[result.detail] = value
        return found

    def ledger(self, target: Target = None, *, output: str | None = None) -> Ledger:
        """Relevance in, out and sunk, op by op, in float64 sums."""
        results, seeds = self._ask(target, output, (), sinks=True, ledger=True)
        leaves = self._recording.amounts()
        total = sum(float(total_of(seed, leaves[index].detach())[0]) for index, seed in seeds.items())
        dtypes = {seed.dtype for seed in seeds.values()}
        if self._call.settings.precision is not None:
            dtypes |= {self._call.settings.precision.of(dtype) for dtype in dtypes}
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return ledger_from_results(self.program, results, total, coarsest)

    def seeded_output(self, target: Target = None, output: str | None = None, *, create_graph: bool = False) -> Tensor:
        """Per sample, the sum of seed times output: what relevance at inputs and sinks adds up to.

        With a reference run, of seed times the output's difference from that run's.
        """
        leaves = self._recording.amounts()
        return sum(  # type: ignore[return-value]
            relevance_of(seed, leaves[index])
            .reshape(seed.shape[0] if seed.dim() else 1, math.prod(seed.shape[1:]))
            .sum(1)
            for index, seed in self.questions.seeds(target, output, create_graph).items()
        )

    def asked(self, target: Target, at: Names, kind: Reading, how: How, through: Masks | None = None) -> Asked:
        """What ``relevance`` or ``coefficients`` will run; raises what they raise for arguments that do not fit."""
        # The interpreter knows values as they are.
        whole = how.per_dimension or self._compiler.options.reference
        readings, nodes = self._call.readings(tuple(self._names_of(at)), kind, whole)
        masks = self._masks(through or {})
        self._check_masks(masks)
        question = self._question(target, how.output, nodes, masks=masks, create_graph=how.create_graph)
        is_summed = self._compiler.options.reference and kind == "relevance" and not how.per_dimension
        return Asked(question, target, at, how, readings, is_summed)

    def answered(self, asked: Asked) -> Any:
        """The result of what was asked."""
        results = self._answer(asked.question, asked.target, asked.how.output, asked.how.create_graph)
        values = {(result.site, result.kind): value for result, value in results}
        found = {ref.label: value_at([values[reading] for reading in read]) for ref, read in asked.readings.items()}
        if asked.is_summed:
            found |= {ref.label: summed_over_dimensions(found[ref.label]) for ref in asked.readings if ref.is_tokens}
        return self._gathered(found, asked.at)

    def _gathered(self, found: dict[str, Tensor], at: Names) -> Any:
        """One tensor for one site asked for by name, else a dict."""
        single = (at is None and len(found) == 1) or (isinstance(at, str) and not is_glob(at))
        return next(iter(found.values())) if single else found

    def _names_of(self, at: Names) -> list[str]:
        return list(self.program.attributed) if at is None else name_list(at, "at")

    def _masks(self, through: Masks) -> Masks:
        """The masks by node name, in the shape and dtype of their sites; raises UnknownSiteError, MaskError."""
        if not isinstance(through, dict):
            raise ArgumentError(
                function=RELEVANCE, name="through", value=through, cause="it is a dict from sites to masks"
            )
        nodes = self.program.nodes_by_name() if through else {}
        found: Masks = {}
        for name, mask in through.items():
            for node in (node for ref in resolve_sites(self.program, [name], self._call.sites) for node in ref.nodes):
                fake = nodes[node].meta["val"]
                shape = value_of_sizes(fake.shape, self._recording.sizes)
                if not isinstance(mask, Tensor):
                    raise MaskError(site=name, cause=f"a mask of type {type(mask).__name__}")
                try:
                    found[node] = mask.to(device=fake.device, dtype=fake.dtype).expand(shape)
                except RuntimeError:
                    cause = f"a mask of shape {tuple(mask.shape)} does not broadcast to {shape}"
                    raise MaskError(site=name, cause=cause) from None
        return found

    def _check_masks(self, masks: Masks) -> None:
        if masks and (self._compiler.options.reference or self._compiler.options.verify != "off"):
            raise MaskError(site=next(iter(masks)), cause="masks are refused with reference=True and with verify")

    def _question(self, target: Target, output: str | None, sites: Sites, **what: Any) -> Question:
        if self._once and not reads_output(target):
            self._recording.give_up_outputs()
        return self.questions.ask(target, output, sites, **what)

    def _answer(self, question: Question, target: Target, output: str | None, create_graph: bool) -> Results:
        """Run the relevance pass for one question."""
        request = question.request
        if self._compiler.options.reference:
            if request.sinks or request.ledger or create_graph:
                cause = "the reference interpreter keeps no ledger and no derivatives"
                raise ReferenceModeError(cause=cause)
            self._recording.check_fresh()
            return self._recording.interpreted(question.seeds, request.sites)
        results = self._recording.answer(question, create_graph=create_graph)
        if self._compiler.options.verify == "ledger" and not request.ledger:
            for one in target.targets if isinstance(target, Several) else [target]:
                self.ledger(one, output=output).check()
        return results

    def _ask(
        self, target: Target, output: str | None, sites: Sites, *, create_graph: bool = False, **what: bool
    ) -> tuple[Results, dict[int, Tensor]]:
        """The results of one question, and its seeds; ``what`` as in ``Questions.ask``."""
        question = self._question(target, output, sites, create_graph=create_graph, **what)
        seeds = dict(question.seeds)
        return self._answer(question, target, output, create_graph), seeds


def by_site(results: Results) -> dict[str, Tensor]:
    """Results of different nodes by node name."""
    return {result.site: value for result, value in results}


def _by_label(refs: list[SiteRef], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of sites from those of their nodes."""
    return {ref.label: value_at([values[name] for name in ref.nodes]) for ref in refs}
