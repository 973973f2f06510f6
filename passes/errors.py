"""One class per refusal: a fixed id, what happened, what to do, and the user's source line."""

from __future__ import annotations

import reprlib
from typing import ClassVar


class LRPError(Exception):
    """Base of every refusal; ``str(error)`` holds id, ``cause``, ``source`` line and ``remedy``.

    Subclasses set ``id``, ``template`` (a format string over the keyword arguments, the cause) and ``hint`` (one for
    the remedy).
    """

    id: ClassVar[str] = "LRP000"
    template: ClassVar[str] = "{cause}"
    hint: ClassVar[str] = ""

    def __init__(self, *, source: str | None = None, **fields: object) -> None:
        self.fields = fields
        self.source = source
        self.cause = self.template.format(**fields)
        self.remedy = self.hint.format(**fields)
        lines = [f"[{self.id}] {self.cause}"]
        if source:
            lines.append(f"  at: {source}")
        if self.remedy:
            lines.append(f"  hint: {self.remedy}")
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


class SizesError(LRPError):
    id = "LRP025"
    template = "this question's code, generated for other sizes, does not hold for inputs of shape {shapes}"
    hint = "Run the model again on these inputs: the call is then compiled for its own sizes."


class NoValuesError(LRPError):
    id = "LRP026"
    template = "'{name}' has a shape but no values, so there is no relevance to compute"
    hint = (
        "Of models on the meta device or of fake tensors, report(...) and stages(...) can be had; for relevance,"
        " load the weights and give real inputs."
    )


class FactoryNotFoundError(LRPError):
    id = "LRP027"
    template = "'{spec}' names no factory: {cause}"
    hint = (
        "Write module:function, as in package.models:build; modules are looked up in the current directory,"
        " or in the one given with --path."
    )


class FactoryResultError(LRPError):
    id = "LRP028"
    template = "{factory} did not return a model and its arguments: {cause}"
    hint = (
        "Return (model, args) or (model, args, kwargs), or an object with those attributes: model a torch.nn.Module,"
        " args a tuple such as (x,), kwargs a dict from names to values."
    )


class UnsupportedArgumentError(LRPError):
    id = "LRP029"
    template = "argument '{name}' is a {kind}, which cannot be part of a compiled call"
    hint = (
        "Pass tensors, numbers, strings and None, or lists, tuples and dicts of those (torch.from_numpy(array) for an"
        " array); set other settings on the model."
    )


class UnsupportedOutputError(LRPError):
    id = "LRP030"
    template = "{model} returns a {kind}, whose tensors cannot be found"
    hint = (
        "Return tensors, or lists, tuples, dicts and dataclasses of those; a dataclass has to be registered with"
        " torch.export.register_dataclass."
    )


class NotAModelError(LRPError):
    id = "LRP031"
    template = "cannot compile {kind}: {cause}"
    hint = "Pass a torch.nn.Module; a function becomes one as the forward of a module of yours."


class CompositeError(LRPError):
    id = "LRP032"
    template = "{composite} is no composite: {cause}"
    hint = (
        "Pass a name of composites.COMPOSITES, a lrp_compiler.Composite, whose lines are pairs (Matcher, Rule), or a"
        " zennit Composite whose hooks all have a counterpart in lrp_compiler.rules."
    )


class RuleParameterError(LRPError):
    id = "LRP033"
    template = "rule {rule}: {cause}"
    hint = "Give the rule other parameters; help(lrp_compiler.rules) tells what each one takes."


class ReferenceModeError(LRPError):
    id = "LRP034"
    template = "reference=True does not go with this: {cause}"
    hint = "Compile the model without reference=True for this question."


class MaskError(LRPError):
    id = "LRP035"
    template = "through={{{site!r}: ...}}: {cause}"
    hint = "A mask is a tensor that broadcasts to the value at its site: tape.activations({site!r}).shape."


class ParameterRelevanceError(LRPError):
    id = "LRP036"
    template = "the rule '{rule}' of {op} has no relevance for the parameters {names}"
    hint = (
        "Ask for other parameters by name, tape.parameters(target, names), or give this layer another rule with"
        " composite.override."
    )


class NotLinearError(LRPError):
    id = "LRP037"
    template = "composite '{composite}' makes no linear map: the rule '{rule}' of {node} is not linear in the seed"
    hint = "Take a composite without filters on relevance, such as 'linear_interpreter' or 'epsilon'."


class ArgumentError(LRPError):
    id = "LRP038"
    template = "{function}: {name}={value}: {cause}"
    hint = "See help({function})."

    def __init__(self, *, value: object, **fields: object) -> None:
        super().__init__(source=None, value=reprlib.repr(value).replace("\n", " "), **fields)


class PatternFitError(LRPError):
    id = "LRP039"
    template = "patterns cannot be estimated: {cause}"
    hint = "{remedy}"


class NonFiniteError(LRPError):
    id = "LRP040"
    template = "relevance is not finite at {op}: {given}"
    hint = (
        "An input, a weight or a value there is nan or inf; tape.activations('{op}') shows the values, and half"
        " precision may have overflowed."
    )


class RuleTraceError(LRPError):
    id = "LRP041"
    template = "the rule of {op} cannot be traced: {cause}"
    hint = (
        "A rule is traced once for all inputs: choose with torch.where instead of if, and write python numbers, or"
        " torch.full_like, instead of torch.tensor."
    )


class NoTensorsError(LRPError):
    id = "LRP042"
    template = "{model}: neither the call nor the model holds a tensor"
    hint = "Pass the values to be explained as tensors."


class AutocastError(CaptureError):
    id = "LRP043"
    template = "{op} has a rule as a whole, and under autocast parts of it are cast"
    hint = "Put it under torch.autocast('{device}', enabled=False), and cast what it takes by hand."


class HookError(LRPError):
    id = "LRP044"
    template = "{module} has the {kind} {hook}, which a graph would run while it is traced and never again"
    hint = (
        "Remove it (handle.remove()) before explaining: tape.activations(at) and tape.relevance(at=at) read any module."
        " Calling the module, without run or attribute, runs hooks as ever."
    )


class NotDifferentiableError(LRPError):
    id = "LRP045"
    template = "this relevance cannot be differentiated: {op} at {at} has no derivative ({cause})"
    hint = (
        "Ask without create_graph, or give the op at '{at}' another rule with composite.override or rules={{op: ...}}."
    )


class NoHistoryError(LRPError):
    id = "LRP046"
    template = "create_graph=True: {cause}, so relevance has no path to what it depends on"
    hint = "Run the model and ask with gradients enabled, outside of torch.no_grad() and torch.inference_mode()."


class RecomputeError(LRPError):
    id = "LRP047"
    template = "recompute={name!r}: no module of this call has such a path"
    hint = "Modules: {known}."


class RandomNumbersError(LRPError):
    id = "LRP048"
    template = "the random numbers of the forward pass cannot be drawn again: others were drawn in between"
    hint = (
        "Draw none from torch's default generator in other threads while this model runs, or ask for what is needed in"
        " run(at=...) and leave memory_budget at 1, so that nothing is drawn twice."
    )


class CppCompilerError(LRPError):
    id = "LRP049"
    template = "backend='inductor' needs a C++ compiler: {cause}"
    hint = (
        "Install one (apt-get install g++, or xcode-select --install), or name it in the environment variable CXX; or"
        " compile the model without backend='inductor'."
    )


class TransformError(LRPError):
    id = "LRP050"
    template = "{model} is called in this way for the first time under a transform of torch.func (vmap, grad, jvp)"
    hint = (
        "Call attribute or run once on plain tensors like these, outside of the transform. A batch needs no vmap,"
        " several targets have tape.relevance_of_each."
    )
