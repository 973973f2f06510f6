"""All providers, in the order of the table."""

from __future__ import annotations

from providers import bars, captum_lrp, dynamic_lrp, lxt_efficient, ours, zennit_composites
from providers.base import Provider

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for family in (bars, ours, lxt_efficient, zennit_composites, captum_lrp, dynamic_lrp)
    for provider in family.PROVIDERS
}
"""By name."""
