"""Every promised architecture: drop-in, covered, conserving, batch by sample, deaf to padding."""

from __future__ import annotations

import gallery
import gallery_audio
import gallery_encoders
import gallery_images
import gallery_mixtures
import gallery_networks
import gallery_scientific
import gallery_structure
import gallery_text
import gallery_vision
import pytest

FAMILIES = (
    gallery_text,
    gallery_encoders,
    gallery_mixtures,
    gallery_vision,
    gallery_audio,
    gallery_images,
    gallery_networks,
    gallery_scientific,
    gallery_structure,
)
FIRST = {next(iter(family.ENTRIES)) for family in FAMILIES}
"""One architecture of every family."""

ENTRIES = {name: entry for family in FAMILIES for name, entry in family.ENTRIES.items()}
SLOW = pytest.mark.slow


def test_every_name_stands_for_one_architecture() -> None:
    assert len(ENTRIES) == sum(len(family.ENTRIES) for family in FAMILIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_outputs_are_eagers_and_padding_gets_nothing(name: str) -> None:
    gallery.check_outputs(ENTRIES[name])


@pytest.mark.parametrize("name", ENTRIES)
def test_relevance_is_covered_conserved_and_of_each_sample(name: str) -> None:
    gallery.check_relevance(ENTRIES[name])


@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=SLOW) for name in ENTRIES])
def test_sign_splits_are_covered_conserved_and_deaf_to_padding(name: str) -> None:
    gallery.check_sign_split(ENTRIES[name])
