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
ENTRIES = {name: entry for family in FAMILIES for name, entry in family.ENTRIES.items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_is_a_drop_in(name: str) -> None:
    gallery.check_drop_in(ENTRIES[name])


@pytest.mark.parametrize("name", ENTRIES)
def test_relevance_is_covered_and_conserved(name: str) -> None:
    gallery.check_relevance(ENTRIES[name])


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.batched])
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    gallery.check_batch(ENTRIES[name])


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.mask])
def test_padding_gets_exactly_nothing(name: str) -> None:
    gallery.check_padding(ENTRIES[name])
