"""Transformers of the size of published ones from plain torch modules, for machines with torch and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a transformer: layers, width, heads, heads that keys and values have, width of the MLP, and what it reads."""

    layers: int
    width: int
    heads: int
    shared_heads: int
    hidden: int
    tokens: int
    batch: int
    outputs: int


VIT_B_16 = Sizes(12, 768, 12, 12, 3072, 196, 32, 1000)
"""Dosovitskiy et al. 2021, table 1, at 224 px."""

LLAMA_1B = Sizes(16, 2048, 32, 8, 8192, 2048, 1, 32000)
"""The layers of Llama 3.2 1B's model card; the vocabulary is Llama 2's, which leaves more to the layers."""


class Attention(nn.Module):
    """Self-attention; with ``rotary`` causal, its queries and keys turned by their positions."""

    def __init__(self, sizes: Sizes, rotary: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.size = sizes.heads, sizes.shared_heads, sizes.width // sizes.heads
        self.query = nn.Linear(sizes.width, sizes.width, bias=not rotary)
        self.key = nn.Linear(sizes.width, self.shared * self.size, bias=not rotary)
        self.value = nn.Linear(sizes.width, self.shared * self.size, bias=not rotary)
        self.out = nn.Linear(sizes.width, sizes.width, bias=not rotary)
        self.rotary = rotary
        angles = torch.outer(torch.arange(sizes.tokens), 500_000.0 ** (-torch.arange(0, self.size, 2) / self.size))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query = self.query(x).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        key = self.key(x).view(batch, tokens, self.shared, self.size).transpose(1, 2)
        value = self.value(x).view(batch, tokens, self.shared, self.size).transpose(1, 2)
        if self.rotary:
            query, key = self.turned(query), self.turned(key)
            key, value = (one.repeat_interleave(self.heads // self.shared, 1) for one in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.rotary)
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return found

    def turned(self, x: Tensor) -> Tensor:
        """Rotary position embedding, half-split as in Llama."""
        one, other = x.chunk(2, -1)
        return x * self.cos + torch.cat([-other, one], -1) * self.sin


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(sizes.width, sizes.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what it read."""

    def __init__(self, sizes: Sizes, llama: bool) -> None:
        super().__init__()
        self.first, self.second = (
            nn.RMSNorm(sizes.width, eps=1e-5) if llama else nn.LayerNorm(sizes.width) for _ in range(2)
        )
        self.attention = Attention(sizes, rotary=llama)
        plain = (nn.Linear(sizes.width, sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, sizes.width))
        self.mlp = GatedMLP(sizes) if llama else nn.Sequential(*plain)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        found: Tensor = x + self.mlp(self.second(x))
        return found


class VisionTransformer(nn.Module):
    """Images -> logits of the class token, as ViT."""

    def __init__(self, sizes: Sizes, patch: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, sizes.width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, sizes.width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, sizes.tokens + 1, sizes.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(sizes, llama=False) for _ in range(sizes.layers)))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.outputs)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class Llama(nn.Module):
    """Embeddings of tokens -> logits after the last, as Llama."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(sizes, llama=True) for _ in range(sizes.layers)))
        self.norm, self.head = nn.RMSNorm(sizes.width, eps=1e-5), nn.Linear(sizes.width, sizes.outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, -1])
        return logits
