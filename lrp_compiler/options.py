"""The options of compile_for_lrp: name, default and one line of help each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lrp_compiler.passes.errors import OptionValueError, UnknownOptionError
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


def parse_options(given: dict[str, Any]) -> Options:
    """Options from keyword arguments; raises UnknownOptionError and OptionValueError."""
    known = {option.name for option in fields(Options)}
    for name in given:
        if name not in known:
            raise UnknownOptionError(name=name, known=options_help())
    if "rules" in given:
        given = {**given, "rules": {target_name(op): fn for op, fn in given["rules"].items()}}
    options = Options(**given)
    if options.verify not in ("off", "ledger"):
        raise OptionValueError(name="verify", value=options.verify, cause="it is 'off' or 'ledger'")
    if options.reference and options.verify != "off":
        raise OptionValueError(name="reference", value=True, cause="the reference interpreter keeps no ledger")
    return options


def options_help() -> str:
    """One phrase per option."""
    return "; ".join(f"{option.name} ({option.metadata['help']})" for option in fields(Options))
