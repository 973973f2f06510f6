"""The public surface: targets, sites, attribute, tape, report, rules of users."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_compiler import Contrast, Tape, Token, compile_for_lrp, composites, errors, register_rule
from lrp_compiler.passes.pipeline import CAPTURE, EMIT, EXPLAIN
from lrp_compiler.registry import REGISTRY
from lrp_compiler.rules import Epsilon, OpClass, Stop, on
from lrp_compiler.seeds import LogProbability, MeanContrast, Span, TopK

aten = torch.ops.aten


def classifier() -> tuple[Tape, Tensor]:
    case = zoo.build("vgg", double=True)
    out, tape = compile_for_lrp(case.model).run(*case.args)
    return tape, out.detach()


def basis(tape: Tape, classes: int = 5) -> Tensor:
    """Relevance of every class for every sample: (classes, batch, ...)."""
    return torch.stack([tape.relevance(index) for index in range(classes)])


TARGETS: dict[str, tuple[Any, Tensor]] = {
    "int": (3, torch.eye(5)[[3, 3]]),
    "negative": (-1, torch.eye(5)[[4, 4]]),
    "tensor": (torch.tensor([3, 1]), torch.eye(5)[[3, 1]]),
    "list": ([3, 1], torch.eye(5)[[3, 1]]),
    "tuple": ((3,), torch.eye(5)[[3, 3]]),
    "tuples": ([(3,), (1,)], torch.eye(5)[[3, 1]]),
    "seed": (torch.arange(10.0).view(2, 5), torch.arange(10.0).view(2, 5)),
    "contrast": (Contrast(3, torch.tensor([1, 2])), torch.eye(5)[[3, 3]] - torch.eye(5)[[1, 2]]),
    "callable": (lambda out: out[:, 3] - 2 * out[:, 0], torch.eye(5)[[3, 3]] - 2 * torch.eye(5)[[0, 0]]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_target_is_its_seed(kind: str) -> None:
    """Rules are linear in the seed: each target equals the combination of one-hot relevances that it stands for."""
    tape, _ = classifier()
    target, weights = TARGETS[kind]
    expected = torch.einsum("bk,kbcxy->bcxy", weights.double(), basis(tape))
    torch.testing.assert_close(tape.relevance(target), expected, rtol=1e-10, atol=1e-12)


SEEDS: dict[str, tuple[Any, Any]] = {
    "mean contrast": (MeanContrast(3), lambda out: torch.eye(5).double()[3] - 0.2 + 0 * out),
    "log-probability": (LogProbability([3, 1]), lambda out: torch.eye(5).double()[[3, 1]] - out.softmax(-1)),
    "top-k": (TopK(2), lambda out: (out >= out.topk(2).values[:, 1:]).double()),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_seeds_by_name(kind: str) -> None:
    tape, out = classifier()
    seed, expected = SEEDS[kind]
    torch.testing.assert_close(tape.relevance(seed), tape.relevance(expected(out)))


def test_a_span_explains_start_and_end() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=50, **sizes)).eval().double()
    _, tape = compile_for_lrp(model).run(torch.randint(0, 50, (2, 6)))
    start = tape.relevance([1, 2], output="start_logits")
    end = tape.relevance(4, output="end_logits")
    torch.testing.assert_close(tape.relevance(Span([1, 2], 4)), start + end)


@pytest.mark.parametrize("options", [{}, {"verify": "ledger"}, {"reference": True}], ids=str)
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_several_targets_share_one_pass(name: str, options: dict[str, Any]) -> None:
    case = zoo.build(name, double=True)
    _, tape = compile_for_lrp(case.model, **options).run(*case.args, **case.kwargs)
    targets = [(0, 3), (2, 5), (1, 1)] if name == "llama" else [0, 1, TopK(2)]
    together = tape.relevance_of_each(targets)
    in_parts = pytree.tree_leaves(tape.relevance_of_each(targets, chunk=2))
    for whole, parts in zip(pytree.tree_leaves(together), in_parts, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    for index, target in enumerate(targets):
        one = tape.relevance(target)
        pairs = [(together[key], one[key]) for key in one] if isinstance(one, dict) else [(together, one)]
        for several, single in pairs:
            torch.testing.assert_close(several[index], single, rtol=1e-9, atol=1e-12)


def test_a_nonlinear_callable_is_seeded_with_its_derivative() -> None:
    tape, out = classifier()
    seed = torch.autograd.functional.jacobian(lambda o: o.log_softmax(-1)[:, 2].sum(), out)
    torch.testing.assert_close(tape.relevance(lambda o: o.log_softmax(-1)[:, 2]), tape.relevance(seed))


def test_tokens_of_a_language_model() -> None:
    case = zoo.build("gpt2", double=True)
    out, tape = compile_for_lrp(case.model).run(**case.kwargs)
    positions, indices = torch.tensor([2, 5]), torch.tensor([11, 12])
    seed = torch.zeros_like(out.logits)
    seed[[0, 1], positions, indices] = 1
    expected = tape.relevance(seed)
    for target in (Token(positions, indices), [(2, 11), (5, 12)], (positions, indices)):
        assert torch.equal(tape.relevance(target), expected)
    assert (expected[0, 3:] == 0).all() and (expected[1, 6:] == 0).all()


def test_attribute_mirrors_its_inputs() -> None:
    class TwoInputs(nn.Module):
        def forward(self, a: Tensor, b: Tensor, scale: float, mask: Tensor) -> Tensor:
            return (a * scale + b.tanh()).masked_fill(mask, 0.0).sum(1)

    a, b, mask = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([[True, False, False]])
    explained = compile_for_lrp(TwoInputs())
    both = explained.attribute((a, b), None, (2.0, mask))
    assert isinstance(both, tuple) and [r.shape for r in both] == [a.shape, b.shape]
    torch.testing.assert_close(both[0], a * 2 * ~mask)
    torch.testing.assert_close(both[1], b.tanh() * ~mask)
    only, delta = explained.attribute(a, None, (b, 2.0, mask), return_convergence_delta=True)
    assert torch.equal(only, both[0])
    torch.testing.assert_close(delta, both[1].sum(1))
    named = explained.attribute(a, None, b, forward_kwargs={"scale": 2.0, "mask": mask})
    assert torch.equal(named, both[0])


def test_sites_by_path_op_name_glob_and_list() -> None:
    case = zoo.build("vit", double=True)
    _, tape = compile_for_lrp(case.model, "cp_lrp").run(*case.args)
    whole = tape.relevance(case.target, at="blocks.0")
    assert whole.shape == (2, 10, 16)
    several = tape.relevance(case.target, at=["input", "blocks.0", "blocks.1.mlp", "linear_3"])
    assert list(several) == ["input", "blocks.0", "blocks.1.mlp", "linear_3"]
    # Which rows are left out, and with that how products round, depends on the sites asked for.
    for found, alone in ((several["blocks.0"], whole), (several["input"], tape.relevance(case.target))):
        assert (found - alone).norm() <= 1e-13 * alone.norm()
    assert list(tape.relevance(case.target, at="blocks.*.norm1")) == ["blocks.0.norm1", "blocks.1.norm1"]
    coefficients = tape.coefficients(case.target, at="blocks.1.mlp")
    activations: list[Tensor] = []
    hook = case.model.blocks[1].mlp.register_forward_hook(lambda m, i, o: activations.append(o))  # type: ignore[index]
    case()
    hook.remove()
    torch.testing.assert_close(activations[0] * coefficients, several["blocks.1.mlp"])


def test_relevance_through_chosen_channels() -> None:
    """Masks are linear: channels apart add up to the whole, and nothing else passes."""
    case = zoo.build("vgg", double=True)
    _, tape = compile_for_lrp(case.model).run(*case.args)
    whole = tape.relevance(3)
    apart = [tape.relevance(3, through={"3": torch.eye(8)[channel].view(8, 1, 1)}) for channel in range(8)]
    torch.testing.assert_close(sum(apart), whole)
    assert not torch.allclose(apart[0], apart[1])
    masked = tape.relevance(3, at=["3", "input"], through={"3": torch.eye(8)[2].view(8, 1, 1)})
    assert (masked["3"][:, [0, 1, *range(3, 8)]] == 0).all() and torch.equal(masked["input"], apart[2])


def test_relevance_through_one_attention_head() -> None:
    """Heads apart add up to all heads at the attention's output."""
    case = zoo.build("vit", double=True)
    _, tape = compile_for_lrp(case.model, "cp_lrp").run(*case.args)
    attention = next(n for n in tape.program.graph.nodes if "flash_attention" in str(n.target))
    site = next(reader.name for reader in attention.users if reader.args[1] == 0)
    heads = [tape.relevance(4, through={site: torch.eye(2)[head].view(2, 1, 1)}) for head in range(2)]
    nothing = tape.relevance(4, through={site: torch.zeros(1)})
    torch.testing.assert_close(heads[0] + heads[1] - nothing, tape.relevance(4))


def test_a_mask_where_no_relevance_passes_is_refused() -> None:
    _, tape = compile_for_lrp(zoo.TwoHeads()).run(torch.ones(1, 3))
    with pytest.raises(errors.SiteWithoutRelevanceError):
        tape.relevance(0, through={"b": torch.ones(2)})


def test_masks_that_do_not_fit_are_refused() -> None:
    case = zoo.build("vgg")
    _, tape = compile_for_lrp(case.model).run(*case.args)
    with pytest.raises(errors.MaskError, match=r"\(7,\) does not broadcast"):
        tape.relevance(3, through={"3": torch.ones(7)})
    with pytest.raises(errors.UnknownSiteError):
        tape.relevance(3, through={"conv": torch.ones(1)})


def test_a_second_call_of_a_module_is_a_site_of_its_own() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model, x = Reused(), torch.randn(2, 3)
    _, tape = compile_for_lrp(model).run(x)
    found = tape.relevance(1, at=["layer", "layer@1"])
    out = model(x)
    torch.testing.assert_close(found["layer@1"], out * torch.eye(3)[1])
    assert not torch.allclose(found["layer"], found["layer@1"])


def test_sites_asked_for_later_cost_a_forward_but_agree() -> None:
    case = zoo.build("bert", double=True)
    explained = compile_for_lrp(case.model)
    site = "bert.encoder.layer.0"
    declared = explained.run(*case.args, at=site)[1].relevance(case.target, at=site)
    asked_later = explained.run(*case.args)[1].relevance(case.target, at=site)
    assert torch.equal(declared, asked_later)


def test_wrt_chooses_what_is_attributed() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1)

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    explained = compile_for_lrp(Product())
    shared = explained.run(a, b)[1].relevance()
    torch.testing.assert_close(shared, {"a": a * b / 2, "b": a * b / 2})
    torch.testing.assert_close(explained.run(a, b, wrt="a")[1].relevance(), a * b)


def test_outputs_are_chosen_by_name() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x * 2, "logits": x * 3}

    x = torch.randn(2, 3)
    explained = compile_for_lrp(Named())
    _, tape = explained.run(x)
    eye = torch.eye(3)[1]
    torch.testing.assert_close(tape.relevance(1), 3 * x * eye)
    torch.testing.assert_close(tape.relevance(1, output="features"), 2 * x * eye)
    by_option = compile_for_lrp(Named(), output="features")
    torch.testing.assert_close(by_option.attribute(x, 1), 2 * x * eye)
    both = tape.relevance(lambda out: out["features"][:, 1] + out["logits"][:, 1])
    torch.testing.assert_close(both, 5 * x * eye)


def test_an_input_the_output_ignores_gets_zeros() -> None:
    class Ignores(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a * 2, b * 3

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    found = compile_for_lrp(Ignores()).run(a, b)[1].relevance(0, output="0")
    assert (found["b"] == 0).all() and found["a"].any()


def test_auto_says_what_it_picked_and_why() -> None:
    cnn, text = zoo.build("vgg"), zoo.build("bert")
    report = compile_for_lrp(cnn.model).report(*cnn.args)
    assert report.composite == "epsilon" and "no attention" in report.reason
    report = compile_for_lrp(text.model).report(*text.args)
    assert report.composite == "attnlrp" and "2 x attention" in report.reason
    assert report.reason in str(report)


def test_the_report_is_data() -> None:
    case = zoo.build("bert")
    report = compile_for_lrp(case.model).report(*case.args)
    json.dumps(report.to_dict())
    assert report.inputs == {"input_ids": ("embedding",)}
    assert report.explained_output == "logits" and "bert.encoder.layer.0" in report.sites
    kept = [b for b in report.buffers if b.kind in ("saved", "compressed")]
    assert report.saved_bytes == sum(b.bytes for b in kept) > 0
    assert sum(report.rules.values()) <= report.live_ops


def test_composites_are_data_that_users_change_in_one_line() -> None:
    case = zoo.build("vgg", double=True)
    changed = composites.attnlrp().override((on(OpClass.LINEAR, path="7"), Epsilon(epsilon=0.1)))
    report = compile_for_lrp(case.model, changed).report(*case.args)
    assert report.rules["aten::linear", "epsilon(0.1)"] == 1 and report.rules["aten::linear", "plain"] == 1
    by_type = composites.attnlrp().override((on(module_type="Conv2d"), Epsilon(epsilon=0.1)))
    assert compile_for_lrp(case.model, by_type).report(*case.args).rules["aten::conv2d", "epsilon(0.1)"] == 2


def test_register_rule_from_user_code() -> None:
    class Sinc(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.sinc(x) * x).sum(1)

    x = torch.randn(2, 3).double()
    with pytest.raises(errors.UncoveredOpsError, match="aten::sinc"):
        compile_for_lrp(Sinc()).attribute(x)

    @register_rule(aten.sinc)
    def stop_at_sinc(c: Tensor, out: Tensor, value: Tensor) -> Tensor:
        return torch.zeros_like(c)

    try:
        explained = compile_for_lrp(Sinc())
        assert explained.report(x).rules["aten::sinc", "stop_at_sinc"] == 1
    finally:
        REGISTRY.remove(aten.sinc)
    torch.testing.assert_close(explained.attribute(x), torch.sinc(x) * x / 2)

    def gate(c: Tensor, out: Tensor, value: Tensor) -> Tensor:
        return c * out / value

    stopped = compile_for_lrp(Sinc(), rules={aten.sinc: Stop()}, verify="ledger")
    torch.testing.assert_close(stopped.attribute(x), torch.sinc(x) * x)

    own = compile_for_lrp(Sinc(), rules={aten.sinc.default: gate}, verify="ledger")
    torch.testing.assert_close(own.attribute(x), torch.sinc(x) * x)


def test_edges_of_relevance_where_no_coefficient_exists() -> None:
    """Identity at sigmoid: R passes unchanged, also where the input is zero and only its relevance is defined."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    x = torch.randn(2, 3).double()
    explained = compile_for_lrp(model, "epsilon")
    _, tape = explained.run(x)
    found = tape.relevance(1, at=["linear", "sigmoid"])
    torch.testing.assert_close(found["linear"], found["sigmoid"])
    conversions = [str(conversion) for conversion in explained.report(x).conversions]
    assert conversions == ["sigmoid -> relevance", "linear -> coefficient"]


def test_integer_and_none_arguments_are_part_of_the_call() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, times: int = 1, extra: Tensor | None = None) -> Tensor:
            out = x * times
            return (out if extra is None else out + extra).sum(1)

    x = torch.randn(2, 3)
    explained = compile_for_lrp(Optional())
    for kwargs in ({}, {"times": 2}, {"times": 3, "extra": torch.ones(2, 3)}, {"extra": None}):
        assert torch.equal(explained(x, **kwargs), Optional()(x, **kwargs))
        _, tape = explained.run(x, wrt="x", **kwargs)
        torch.testing.assert_close(tape.relevance(), x * kwargs.get("times", 1))


def test_new_shapes_and_dtypes_compile_anew() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    explained = compile_for_lrp(model)
    for batch in (1, 3, 0):
        x = torch.randn(batch, 3)
        assert torch.equal(explained(x), model(x))
        assert explained.attribute(x, 1).shape == x.shape
    strided = torch.randn(3, 2).t()
    torch.testing.assert_close(explained.attribute(strided, 1), explained.attribute(strided.contiguous(), 1))


def test_composites_of_one_model_share_its_capture() -> None:
    case = zoo.build("vgg")
    attnlrp = compile_for_lrp(case.model, "attnlrp")
    plus = compile_for_lrp(attnlrp, "epsilon_plus")
    first, second = attnlrp.stages(*case.args), plus.stages(*case.args)
    assert [a is b for a, b in zip(first, second, strict=True)] == [True] * len(CAPTURE) + [False] * len(
        [*EXPLAIN, *EMIT]
    )
    alone = compile_for_lrp(case.model, "epsilon_plus").run(*case.args)[1].relevance(case.target)
    assert torch.equal(plus.run(*case.args)[1].relevance(case.target), alone)
