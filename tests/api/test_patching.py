"""Relevance patching against activation patching on a small transformer trained here."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_compiler import compile_for_lrp, composites, errors, patch_edge_effects, patch_effects, true_patch_effects
from lrp_compiler.rules import Gamma, OpClass, on

VOCABULARY, LENGTH, WIDTH, HEADS = 12, 6, 32, 4


class Block(nn.Module):
    """Pre-RMSNorm attention and a gated MLP, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.attention = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.mlp = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0))
        x = x + self.attention(mixed.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        return x + self.mlp(F.silu(self.gate(normed)) * self.up(normed))


class Sum(nn.Module):
    """Predicts, at the last position, the sum of the first two tokens modulo the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))


def answers(tokens: Tensor) -> Tensor:
    return (tokens[:, 0] + tokens[:, 1]) % VOCABULARY


@functools.cache
def trained() -> Sum:
    """The model after 700 steps; it solves the task."""
    torch.manual_seed(0)
    model = Sum()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(700):
        tokens = torch.randint(0, VOCABULARY, (256, LENGTH))
        loss = F.cross_entropy(model(tokens), answers(tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = torch.randint(0, VOCABULARY, (512, LENGTH))
    assert (model(tokens).argmax(1) == answers(tokens)).float().mean() > 0.95
    return model.eval()


SITES = [f"blocks.{depth}.{part}" for depth in range(2) for part in ("attention", "mlp")]


def pair(batch: int = 64) -> tuple[Tensor, Tensor]:
    """Clean tokens, and the same with another first token."""
    clean = torch.randint(0, VOCABULARY, (batch, LENGTH))
    corrupted = clean.clone()
    corrupted[:, 0] = (clean[:, 0] + torch.randint(1, VOCABULARY, (batch,))) % VOCABULARY
    return clean, corrupted


def correlation(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    stacked = [torch.cat([effects[site].flatten() for site in SITES]).double() for effects in (first, second)]
    return torch.corrcoef(torch.stack(stacked))[0, 1].item()


@pytest.mark.thorough
def test_relp_is_closer_to_patching_than_attribution_patching() -> None:
    model = trained()
    clean, corrupted = pair()
    right, wrong = answers(clean), answers(corrupted)

    def metric(logits: Tensor) -> Tensor:
        return (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]

    true = true_patch_effects(model, clean, corrupted, metric, SITES)
    found = {
        name: correlation(true, patch_effects(compile_for_lrp(model, name), clean, corrupted, metric, SITES))
        for name in ("relp", "gradient")
    }
    assert found["relp"] > found["gradient"], found
    assert found["relp"] > 0.5, found


def test_patching_a_linear_model_is_exact() -> None:
    """Where the metric is linear in the site, first order is all there is, in both directions."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x)).sum(1)

    model = Linear().double()
    clean, corrupted = torch.randn(2, 3, 6, 5).double()
    for direction in ("denoise", "noise"):
        explained = compile_for_lrp(model, "relp")
        effects = patch_effects(explained, clean, corrupted, 1, ["inner"], direction=direction)
        true = true_patch_effects(model, clean, corrupted, lambda out: out[:, 1], ["inner"], direction=direction)
        torch.testing.assert_close(effects, true)
        full = patch_effects(explained, clean, corrupted, 1, ["inner"], direction=direction, reduce="none")
        torch.testing.assert_close(full["inner"].sum(-1), effects["inner"])


class Residual(nn.Module):
    """Three branches that read and write one stream, all linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        x = x + self.c(x)
        return self.head(x)


def test_edges_are_paths_through_one_site() -> None:
    """In a linear stream: a reaches the output by b, by c and by itself; b's edge holds what b sends on through c."""
    model = Residual().double()
    clean, corrupted = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    explained = compile_for_lrp(model, "relp")
    found = patch_edge_effects(explained, clean, corrupted, (0, 1), ["a", "b"], ["b", "c"], reduce="none")
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    b, c = model.b.weight.detach(), model.c.weight.detach()
    start = torch.zeros(3, 5, 4, dtype=torch.float64)
    start[:, 0] = model.head.weight.detach()[1]
    at_b = start + start @ c
    change = (clean - corrupted) @ model.a.weight.detach().T
    torch.testing.assert_close(found["a", "b"], change * (at_b @ b))
    torch.testing.assert_close(found["a", "c"], change * (start @ c))
    change_b = (clean - corrupted + change) @ b.T
    torch.testing.assert_close(found["b", "c"], change_b * (start @ c))
    nodes = patch_effects(explained, clean, corrupted, (0, 1), ["a"], reduce="none")["a"]
    torch.testing.assert_close(found["a", "b"] + found["a", "c"] + change * start, nodes)


def test_seeds_inside_are_not_masked_by_what_follows() -> None:
    """Gamma before a ReLU is asked only about open outputs, unless a seed starts at the output itself."""
    layers = [nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)]
    model, x = nn.Sequential(*layers).double(), torch.rand(3, 4, dtype=torch.float64)
    seed = torch.randn(3, 5, dtype=torch.float64)
    composite = composites.epsilon().override((on(OpClass.LINEAR), Gamma()))
    z = model[1](x).detach()
    assert (z < 0).any()
    found = compile_for_lrp(model, composite).run(x)[1].coefficients_from({"1": seed}, "0")
    weight, bias = (parameter.detach() for parameter in layers[1].parameters())
    favoured = torch.where((z > 0)[..., None], weight.clamp(min=0), weight.clamp(max=0))
    raised = weight + 0.25 * favoured
    total = (raised * x[:, None]).sum(-1) + bias + 0.25 * torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
    share = z * seed / (total + 1e-6 * torch.sign(total))
    torch.testing.assert_close(found, (raised * share[..., None]).sum(1), rtol=1e-9, atol=1e-12)


def test_edges_of_a_transformer() -> None:
    """Every later site has an edge from every earlier one, and none the other way."""
    model = trained()
    clean, corrupted = pair(4)
    found = patch_edge_effects(compile_for_lrp(model, "relp"), clean, corrupted, 3, SITES, SITES)
    assert set(found) == {(u, v) for i, u in enumerate(SITES) for v in SITES[i + 1 :]}
    assert all(effect.shape == (4, LENGTH) and effect.isfinite().all() for effect in found.values())


def test_an_unknown_direction_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(errors.ArgumentError, match="'denoise' or 'noise'"):
        patch_effects(compile_for_lrp(model), torch.ones(1, 2), torch.ones(1, 2), 0, ["linear"], direction="both")  # type: ignore[arg-type]


def test_activations_are_the_forward_values() -> None:
    model = trained()
    tokens, _ = pair(3)
    _, tape = compile_for_lrp(model, "attnlrp").run(tokens)
    with torch.no_grad():
        expected = model.blocks[0](model.embedding(tokens) + model.positions)
    found = tape.activations(["blocks.0", "tokens"])
    assert torch.equal(found["blocks.0"], expected)
    assert torch.equal(found["tokens"], model.embedding(tokens))
