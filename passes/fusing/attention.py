"""Attention's relevance pass in one kernel, instead of the backward of torch's fused attention and its scalings."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lrp_compiler.kernels.dialect.attention import ATTENTION_LRP_BWD
from lrp_compiler.kernels.dialect.attention_map import ATTENTION_LRP_MAP
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.fusing.replacement import Replacement, replacement_of
from lrp_compiler.passes.matching import Match
from lrp_compiler.passes.optable import schema_name

SDPA = "aten::scaled_dot_product_attention"
FLASH_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


def attention(match: Match) -> Replacement | None:
    """Torch's own derivative of a fused attention op becomes attention_lrp_bwd with shares of one."""
    name = schema_name(match.emission.arguments[0])
    if name not in (SDPA, FLASH_ON_CPU):
        return None
    return replacement_of(match, attention_form)


def attention_form(
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: tuple[int, ...],
    cotangents: list[Tensor | None],
    outputs: list[Tensor | None],
) -> list[Tensor]:
    """The edges of the operands at ``leaves``, as pullback gives them first; fused attention keeps its log-sum-exp."""
    query, key, value, *rest = args
    is_flash = schema_name(target) == FLASH_ON_CPU
    mask = kwargs.get("attn_mask") if is_flash else _at(rest, kwargs, 0, "attn_mask", None)
    dropout = _at(rest, kwargs, 0 if is_flash else 1, "dropout_p", 0.0)
    is_causal = _at(rest, kwargs, 1 if is_flash else 2, "is_causal", False)
    scale = _at(rest, kwargs, 5 if is_flash else 3, "scale", None)
    if dropout:
        raise NotSupportedError("the kernel draws no dropout inside attention")
    if cotangents[0] is None or any(leaf > 2 for leaf in leaves):
        raise NotSupportedError("only the output's coefficient goes to query, key and value in one kernel")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    known = [*outputs, None, None][:2]
    shares = [float(leaf in leaves) for leaf in range(3)]
    made = ATTENTION_LRP_BWD(
        cotangents[0], query, key, value, *known, mask, None, is_causal, factor, 0, 0.0, *shares
    )  # fmt: skip
    return [made[leaf] for leaf in leaves]


def attention_map_form(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    share: float,
) -> Tensor:
    """As attention_map_relevance."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    made: Tensor = ATTENTION_LRP_MAP(c, query, key, value, None, mask, None, is_causal, factor, 0, 0.0, share)
    return made


def _at(rest: list[Any], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    """An argument of an attention op behind its first three."""
    return rest[place] if len(rest) > place else kwargs.get(name, default)
