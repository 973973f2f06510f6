"""Networks of the gallery whose modules share, make or reuse weights, or that speak python's own structures."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from gallery import Call, Entry
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH, CLASSES = 12, 5


class TiedAutoencoder(nn.Module):
    """One matrix encodes, its transpose decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, WIDTH))
        self.bias1, self.bias2 = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.sigmoid(F.linear(x, self.weight, self.bias1))
        return F.linear(code, self.weight.t(), self.bias2), code


def tied_autoencoder() -> Call:
    return Call(TiedAutoencoder(), (torch.randn(2, WIDTH),))


class TiedLanguageModel(nn.Module):
    """The embedding's table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.dense = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 40, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.gelu(self.dense(self.words(ids))).cumsum(1))


def tied_language_model() -> Call:
    return Call(TiedLanguageModel(), (torch.randint(0, 40, (2, 5)),))


class Reused(nn.Module):
    """One layer and one norm applied over and over, in a different order each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(3):
            x = x + self.drop(F.silu(self.layer(self.norm(x)))) / (step + 1)
        return self.head(self.layer(x))


def reused_modules() -> Call:
    return Call(Reused(), (torch.randn(2, WIDTH),))


class Nested(nn.Module):
    """Takes and returns dicts, lists, tuples, None and scalars, one in another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, batch: dict[str, Any], scales: tuple[float, int], *, extras: list[Any], flag: bool) -> Any:
        left = self.left(batch["views"][0]) * scales[0]
        right = self.right(batch["views"][1]) if flag else left
        for extra in extras:
            right = right if extra is None else right + extra["shift"]
        logits = self.head(torch.relu(left + right))
        return {
            "logits": logits,
            "parts": [left, (right, None)],
            "scales": scales,
            "name": "nested",
            "again": logits,
            "given": batch["views"][0],
            "best": logits.argmax(-1),
        }


def nested_structures() -> Call:
    batch = {"views": [torch.randn(2, WIDTH), torch.randn(2, WIDTH)], "ignored": None}
    kwargs = {"extras": [None, {"shift": torch.randn(2, WIDTH)}], "flag": True}
    return Call(Nested(), (batch, (0.5, 3)), kwargs)


def reparametrised(weight: Any, spectral: Any) -> nn.Sequential:
    """A convolutional and a dense layer under weight norm and under spectral norm."""
    layers = [nn.Conv1d(2, 6, 3), nn.Conv1d(6, 6, 3), nn.Linear(6, WIDTH), nn.Linear(WIDTH, CLASSES)]
    conv1, conv2, dense1, dense2 = (norm(layer) for norm, layer in zip([weight, spectral] * 2, layers, strict=True))
    pooled = (nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(conv1, nn.ReLU(), conv2, nn.ELU(), *pooled, dense1, nn.Tanh(), dense2)


def quietly(norm: Any) -> Any:
    """A norm that torch keeps for old models only, and says so."""

    def applied(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            normed: nn.Module = norm(layer)
        return normed

    return applied


def weight_hooks() -> Call:
    model = reparametrised(quietly(nn.utils.weight_norm), quietly(nn.utils.spectral_norm))
    return Call(model, (torch.randn(2, 2, 9),))


def weight_parametrizations() -> Call:
    model = reparametrised(parametrizations.weight_norm, parametrizations.spectral_norm)
    return Call(model, (torch.randn(2, 2, 9),))


class LowRank(nn.Module):
    """A frozen dense layer with a trained low-rank update (Hu et al., 2022)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.scaling = copy.deepcopy(base).requires_grad_(False), 4.0 / rank
        self.down, self.up = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling


def low_rank_adapters() -> Call:
    adapted = [LowRank(nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    model = nn.Sequential(adapted[0], nn.GELU(), adapted[1], nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))
    return Call(model, (torch.randn(2, WIDTH),))


ENTRIES = {
    "tied_autoencoder": Entry(tied_autoencoder, 2, ("x",)),
    "tied_language_model": Entry(tied_language_model, (4, 7), ("ids",)),
    "reused_modules": Entry(reused_modules, 2, ("x",)),
    "nested_structures": Entry(nested_structures, 2, ("batch_views_0", "batch_views_1", "extras_1_shift")),
    "weight_hooks": Entry(weight_hooks, 2, ("input",)),
    "weight_parametrizations": Entry(weight_parametrizations, 2, ("input",)),
    "low_rank_adapters": Entry(low_rank_adapters, 2, ("input",)),
}
