"""One class per refusal: a fixed id, what happened, what to do, and the user's source line."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

NOT_THE_USERS = ("/torch/", '"<eval_with_key>')
"""What marks a line of a stack trace as torch's own, or as written by torch."""


class LRPError(Exception):
    """Base of every refusal; ``str(error)`` holds id, cause, source line and hint.

    Subclasses set ``id``, ``template`` (a format string over the keyword arguments) and ``hint``.
    """

    id: ClassVar[str] = "LRP000"
    template: ClassVar[str] = "{cause}"
    hint: ClassVar[str] = ""

    def __init__(self, *, source: str | None = None, **fields: object) -> None:
        self.fields = fields
        self.source = source
        lines = [f"[{self.id}] {self.template.format(**fields)}"]
        if source:
            lines.append(f"  at: {source}")
        if self.hint:
            lines.append(f"  hint: {self.hint.format(**fields)}")
        super().__init__("\n".join(lines))


class CaptureError(LRPError):
    id = "LRP001"
    template = "{model} could not be traced: {cause}"
    hint = (
        "forward has to consist of tensor operations that torch.export can trace; move numpy, other libraries and"
        " python that looks into tensors out of it."
    )


class UnsupportedMutationError(LRPError):
    id = "LRP002"
    template = "the in-place operation {op} has no functional form here: {cause}"
    hint = "Write the line without the trailing underscore (y = x.{name}(...) instead of x.{name}_(...))."


class UncoveredOpsError(LRPError):
    id = "LRP003"
    template = "{count} operation(s) on the path of relevance have no rule in composite '{composite}':\n{table}"
    hint = (
        "Give each one a rule: @lrp_compiler.register_rule({example}) on a function"
        " (c, out, *args) -> coefficients of the inputs, or pass rules={{op: function}} to compile_for_lrp."
    )


class NoAttributableInputError(LRPError):
    id = "LRP004"
    template = "no input can be attributed: {cause}"
    hint = (
        "Relevance needs a floating-point input, or integer token ids that index an nn.Embedding;"
        " pass floats, or embeddings computed beforehand."
    )


class UnknownInputError(LRPError):
    id = "LRP005"
    template = "there is no input named '{name}'; this call has {known}"
    hint = "Use one of those names, as they stand in forward's signature."


class UnknownSiteError(LRPError):
    id = "LRP006"
    template = "no site matches '{name}'. {closest}"
    hint = "A site is an input name, a submodule path or an op name; explained.report(x).sites lists them all."


class SiteWithoutRelevanceError(LRPError):
    id = "LRP007"
    template = "relevance does not reach '{name}': {cause}"
    hint = "Ask for a site between the attributed inputs and the explained output."


class TargetError(LRPError):
    id = "LRP008"
    template = "target {target} does not fit an output of shape {shape}: {cause}"
    hint = (
        "Pass a class index, a tensor of one index per sample, a tuple indexing the dimensions after the batch,"
        " a seed tensor of the output's shape, a callable output -> scalars, or an object of lrp_compiler.seeds."
    )


class OutputError(LRPError):
    id = "LRP009"
    template = "output '{name}' cannot be explained: {cause}"
    hint = "Name one of the floating-point outputs that depend on the attributed inputs: {known}."


class DeviceMismatchError(LRPError):
    id = "LRP010"
    template = "input '{name}' is on {input_device} but the model is on {model_device}"
    hint = "Move one of them: x.to('{model_device}') or model.to('{input_device}')."


class UnknownOptionError(LRPError):
    id = "LRP011"
    template = "unknown option {name!r}"
    hint = "compile_for_lrp takes {known}."


class UnknownCompositeError(LRPError):
    id = "LRP012"
    template = "unknown composite {name!r}"
    hint = "Composites by name: {known}; or pass a lrp_compiler.Composite."


class StaleTapeError(LRPError):
    id = "LRP013"
    template = "{name} changed after the forward pass that this tape recorded"
    hint = "Ask the tape for relevance before the optimizer steps, or run the forward again."


class LedgerError(LRPError):
    id = "LRP014"
    template = "the ledger does not close at {op}: relevance in {given:.6g}, out {taken:.6g} (gap {gap:.3g})"
    hint = (
        "The rule '{rule}' at this op neither passes on nor accounts for its relevance;"
        " tape.ledger() lists every op. Use float64 inputs to rule out rounding."
    )


class VerifierError(LRPError):
    id = "LRP015"
    template = "illegal program after pass '{stage}': {cause}"
    hint = "This is a bug of lrp_compiler (or of a pass you added); please report it with explained.stages(...)."


class DuplicateRuleError(LRPError):
    id = "LRP016"
    template = "{op} already has a registered rule"
    hint = "Call register_rule(..., replace=True) to replace it, or pass rules={{op: function}} to one compile."


class RuleResultError(LRPError):
    id = "LRP017"
    template = "the rule '{rule}' of {op} returned {got}; expected {expected}"
    hint = "Return one coefficient per tensor input, of that input's shape, or None where nothing flows."


class OptionValueError(LRPError):
    id = "LRP018"
    template = "option {name}={value!r}: {cause}"
    hint = "See help(lrp_compiler.compile_for_lrp)."


class DerivativeError(LRPError):
    id = "LRP019"
    template = "torch's derivative of {op} cannot be traced: {cause}"
    hint = "Give the op a rule of its own: rules={{op: function}} or @lrp_compiler.register_rule."


class PatternError(LRPError):
    id = "LRP020"
    template = "no pattern fits {op}, whose weight is '{weight}': {cause}"
    hint = (
        "Estimate patterns on training data, patterns = lrp_compiler.fit_patterns(model, loader), and pass"
        " composites.pattern_attribution(patterns) or composites.pattern_net(patterns)."
    )


class RecurrentError(LRPError):
    id = "LRP021"
    template = "{op} cannot be explained: {cause}"
    hint = "{remedy}"


class BaselineError(LRPError):
    id = "LRP022"
    template = "baseline of '{name}': {cause}"
    hint = "{remedy}"


class DataDependentError(CaptureError):
    id = "LRP023"
    template = "{model} cannot be explained: {cause}"
    hint = "{remedy}"


class RegionError(CaptureError):
    id = "LRP024"
    template = "the region {region} cannot be explained: relevance enters no region but torch.cond"
    hint = "{remedy}"


def user_source(node: fx.Node) -> str | None:
    """The innermost line of the user's program that made ``node``, as ``file:line code``."""
    return user_source_of_trace(node.meta.get("stack_trace") or "")


def user_source_of_trace(stack_trace: str) -> str | None:
    """The last ``File "...", line N`` entry of a stack trace that is the user's."""
    lines = stack_trace.splitlines()
    found = None
    for number, line in enumerate(lines):
        text = line.strip()
        if text.startswith('File "') and not any(place in text for place in NOT_THE_USERS):
            path, rest = text[len('File "') :].split('", line ', 1)
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            found = f"{path}:{rest.split(',')[0]} {code}".rstrip()
    return found
