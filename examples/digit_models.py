"""Two small digit classifiers, trained from scratch: a residual CNN and a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIDE = 8
CLASSES = 10
BATCH = 64


@dataclass(frozen=True)
class Digits:
    """8x8 digits in [0, 1], (images, 1, 8, 8), with labels (images,), split once and for all.

    Models see ``pixels - mean``, so an input of 0 is the average training pixel: neither ink nor paper.
    """

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean training image, (1, 8, 8)."""
        return self.train_pixels.mean(0)

    @property
    def test_inputs(self) -> Tensor:
        """The held-out images as the models see them."""
        return self.test_pixels - self.mean


def load_data() -> Digits:
    """scikit-learn's digits, a quarter of every class held out."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=found.target, random_state=0)
    return Digits(pixels[train], labels[train], pixels[test], labels[test])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input: (batch, channels, height, width) stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(hidden)))


class ResidualCNN(nn.Module):
    """Stem, block, stride, block, average pooling: (batch, 1, 8, 8) to (batch, 10) logits."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = ResidualBlock(width)
        self.shrink = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.block2 = ResidualBlock(2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block2(self.shrink(self.block1(self.stem(x))))
        return self.head(hidden.mean((2, 3)))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and GELU MLP, each with a residual: (batch, tokens, dim) stays."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def attention(self, x: Tensor) -> Tensor:
        """Multi-head self-attention of normalised tokens."""
        batch, tokens, dim = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """2x2 patches, a class token and learned positions: (batch, 1, 8, 8) to (batch, 10) logits."""

    def __init__(self, dim: int = 64, depth: int = 3, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIDE // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def progress_bars(console: Console) -> Progress:
    """Progress bars that show the time taken, which is what remains readable in a log file."""
    columns = TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def shifted(pixels: Tensor) -> Tensor:
    """Every image moved by at most one pixel each way, at random; what moves in is paper (0)."""
    windows = F.pad(pixels, (1, 1, 1, 1)).unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    down, right = torch.randint(3, (2, len(pixels)))
    return windows[torch.arange(len(pixels)), :, down, right]


def train(model: nn.Module, data: Digits, epochs: int, progress: Progress, rate: float = 3e-3) -> nn.Module:
    """Train ``model`` in place (AdamW, one learning-rate cycle, random shifts); returned in eval mode."""
    steps = len(data.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    mean = data.mean
    model.train()
    for _ in progress.track(range(epochs), description=f"training {type(model).__name__}"):
        for batch in torch.randperm(len(data.train_labels))[: steps * BATCH].split(BATCH):
            logits = model(shifted(data.train_pixels[batch]) - mean)
            loss = F.cross_entropy(logits, data.train_labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of held-out images that ``model`` classifies correctly."""
    return (model(data.test_inputs).argmax(1) == data.test_labels).double().mean().item()


def trained_models(data: Digits, console: Console) -> dict[str, nn.Module]:
    """Both classifiers by name, trained from fixed seeds.

    On one thread: models this small gain nothing from more, and results do not depend on the number of cores.
    """
    torch.set_num_threads(1)
    with progress_bars(console) as progress:
        torch.manual_seed(0)
        cnn = train(ResidualCNN(), data, epochs=15, progress=progress)
        torch.manual_seed(0)
        vit = train(VisionTransformer(), data, epochs=50, progress=progress, rate=2e-3)
    return {"CNN": cnn, "ViT": vit}


def main() -> None:
    """Train both models and print their test accuracy."""
    console, data = Console(), load_data()
    for name, model in trained_models(data, console).items():
        console.print(f"{name}: {accuracy(model, data):.1%} of {len(data.test_labels)} held-out digits")


if __name__ == "__main__":
    main()
