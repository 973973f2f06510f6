"""Composites that claim to conserve close their ledgers, op by op and in all; reports say what others miss."""

from __future__ import annotations

import pytest
import torch
import zoo
from pairs import covering

from lrp_compiler import LRPModule, compile_for_lrp, composites, fit_patterns

FLOAT64 = 1e-10
CLAIMING = [name for name, make in composites.COMPOSITES.items() if make().conserves]
OTHERS = [name for name in composites.COMPOSITES if name not in CLAIMING]


def explained_with(name: str, model: str) -> tuple[zoo.Case, LRPModule]:
    if not name.startswith("pattern_"):
        return zoo.explained_by(model, name, double=True)
    case, explained = zoo.shared(model, double=True)
    patterns = fit_patterns(case.model, [case.args[0]])
    return case, compile_for_lrp(explained, getattr(composites, name)(patterns))


@pytest.mark.parametrize(("name", "model"), covering(CLAIMING, ["vgg", "resnet", "vit", "llama"]))
def test_ledgers_close(name: str, model: str) -> None:
    case, explained = explained_with(name, model)
    # Token ids have no natural zero to differ from.
    baselines = {"input_ids": torch.tensor(3)} if (name, model) == ("deep_lift", "llama") else None
    with torch.no_grad():
        tape = explained.run(*case.args, baselines=baselines, **case.kwargs)[1]
        ledger = tape.ledger(case.target)
    ledger.check(FLOAT64)
    magnitude = abs(ledger.seed) + sum(abs(value) for row in ledger.rows for value in row.sinks.values())
    assert abs(ledger.gap) <= FLOAT64 * magnitude


@pytest.mark.parametrize("name", OTHERS)
def test_reports_say_what_is_missing(name: str) -> None:
    case, explained = explained_with(name, "vgg")
    report = explained.report(*case.args, **case.kwargs)
    measured = report.conservation
    assert measured is not None and not report.conserves
    out = case.model(*case.args).detach()
    assert measured.seed == pytest.approx(float(out.amax(1).sum()))
    with torch.no_grad():
        tape = explained.run(*case.args, **case.kwargs)[1]
    seed = torch.zeros_like(out).scatter(1, out.argmax(1, keepdim=True), 1.0)
    found = tape.relevance(seed)
    if report.composite not in ("pattern_net", "pattern_attribution"):
        found = found * case.args[0]
    assert measured.inputs == pytest.approx(float(found.sum()))
    assert abs(measured.gap) > 1e-4 * abs(measured.seed)
    assert f"missing {measured.gap:.2g}" in str(report) and "not claimed" in str(report)


def test_reports_measure_a_target_on_request() -> None:
    case = zoo.build("vgg", double=True)
    explained = compile_for_lrp(case.model, "epsilon")
    assert explained.report(*case.args).conservation is None
    measured = explained.report(*case.args, target=case.target).conservation
    assert measured is not None and "bias" in measured.sinks
    assert abs(measured.gap) <= FLOAT64 * abs(measured.seed)
