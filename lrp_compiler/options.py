"""The options of compile_for_lrp: name, default and one line of help each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lrp_compiler.passes.backend import BACKENDS, Backend
from lrp_compiler.passes.budget import MemoryGoal
from lrp_compiler.passes.errors import OptionValueError, UnknownOptionError
from lrp_compiler.passes.precision import GivenPrecision, precision_of
from lrp_compiler.passes.rules.base import Rule
from lrp_compiler.passes.settings import Settings
from lrp_compiler.registry import GivenRule, target_name


@dataclass(frozen=True)
class Options:
    """What a user may set beside the composite."""

    output: str | None = field(default=None, metadata={"help": "name of the output to explain, when there are several"})
    rules: Mapping[str, GivenRule] = field(
        default_factory=dict,
        metadata={"help": "{op: rule function or Rule} for this module alone, over registered rules"},
    )
    verify: Literal["off", "ledger"] = field(
        default="off",
        metadata={"help": "'ledger' checks every relevance pass op by op and names the op that breaks it"},
    )
    reference: bool = field(
        default=False,
        metadata={"help": "run the slow relevance-space interpreter of the same composite instead"},
    )
    dynamic: bool = field(
        default=True,
        metadata={"help": "False traces every distinct shape for itself; True leaves sizes open from the second on"},
    )
    memory_budget: float = field(
        default=1.0,
        metadata={
            "help": "share in [0, 1] of the memory that values kept for relevance take by default: below 1 some are"
            " computed again, 0 is the least that can be reached"
        },
    )
    recompute: tuple[str, ...] = field(
        default=(),
        metadata={"help": "globs of module paths whose inner values are computed again instead of kept"},
    )

    backend: Backend = field(
        default="auto",
        metadata={
            "help": "'eager' keeps ATen ops, 'triton' fuses them into kernels of the dialect, 'auto' does so on CUDA;"
            " 'inductor' has torch.compile make both passes at their first call, which takes a while and rounds"
            " otherwise, outputs too"
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "True records the kernels of each kind of call, on CUDA alone, and replays them as one"},
    )

    relevance_dtype: GivenPrecision = field(
        default=None,
        metadata={
            "help": "dtype of the relevance pass: torch.bfloat16 (weights are kept a second time, rounded), 'high' for"
            " float32 or wider, None for the model's; outputs keep every bit"
        },
    )

    prepare_weights: bool = field(
        default=False,
        metadata={
            "help": "True keeps what weights alone decide (W + gamma W+, the layout that CPU products read) from call"
            " to call until they change: faster, at the price of one to two copies of each weight"
        },
    )

    @property
    def settings(self) -> Settings:
        """What the passes behind a request are told; raises OptionValueError."""
        goal = MemoryGoal(self.memory_budget, self.recompute)
        return Settings(goal, self.backend, self.cuda_graphs, precision_of(self.relevance_dtype), self.prepare_weights)


def parse_options(given: dict[str, Any]) -> Options:
    """Options from keyword arguments; raises UnknownOptionError and OptionValueError."""
    known = {option.name for option in fields(Options)}
    for name in given:
        if name not in known:
            raise UnknownOptionError(name=name, known=options_help())
    if "rules" in given:
        _check_rules(given["rules"])
        given = {**given, "rules": {target_name(op): fn for op, fn in given["rules"].items()}}
    if "recompute" in given:
        given = {**given, "recompute": _globs(given["recompute"])}
    options = Options(**given)
    if options.verify not in ("off", "ledger"):
        raise OptionValueError(name="verify", value=options.verify, cause="it is 'off' or 'ledger'")
    if not isinstance(options.reference, bool):
        raise OptionValueError(name="reference", value=options.reference, cause="it is True or False")
    if options.output is not None and not isinstance(options.output, str):
        raise OptionValueError(name="output", value=options.output, cause="it is the name of an output")
    budget = options.memory_budget
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1:
        raise OptionValueError(name="memory_budget", value=budget, cause="it is a number from 0 to 1")
    if options.backend not in BACKENDS:
        raise OptionValueError(name="backend", value=options.backend, cause=f"it is one of {', '.join(BACKENDS)}")
    if options.settings.precision is not None and options.reference:
        cause = "the reference interpreter computes in the model's dtype"
        raise OptionValueError(name="relevance_dtype", value=options.relevance_dtype, cause=cause)
    if not isinstance(options.cuda_graphs, bool):
        raise OptionValueError(name="cuda_graphs", value=options.cuda_graphs, cause="it is True or False")
    if not isinstance(options.prepare_weights, bool):
        raise OptionValueError(name="prepare_weights", value=options.prepare_weights, cause="it is True or False")
    if options.prepare_weights and (options.backend == "inductor" or options.cuda_graphs or options.reference):
        cause = "torch.compile, CUDA graphs and the reference interpreter read weights as they are"
        raise OptionValueError(name="prepare_weights", value=True, cause=cause)
    if options.reference and options.verify != "off":
        raise OptionValueError(name="reference", value=True, cause="the reference interpreter keeps no ledger")
    return options


def _globs(given: Any) -> tuple[str, ...]:
    """``recompute`` is a glob or several; raises OptionValueError."""
    globs = (given,) if isinstance(given, str) else given
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) and glob for glob in globs):
        raise OptionValueError(name="recompute", value=given, cause="it is a list of globs of module paths")
    return tuple(globs)


def _check_rules(rules: Any) -> None:
    """``rules`` is {op: function or Rule}; raises OptionValueError."""
    if not isinstance(rules, Mapping):
        raise OptionValueError(name="rules", value=rules, cause="it is a dict from ops to functions or Rules")
    for op, rule in rules.items():
        if not isinstance(rule, Rule) and (isinstance(rule, type) or not callable(rule)):
            raise OptionValueError(name="rules", value={op: rule}, cause="a rule is a function or a Rule object")


def options_help() -> str:
    """One phrase per option."""
    return "; ".join(f"{option.name} ({option.metadata['help']})" for option in fields(Options))
