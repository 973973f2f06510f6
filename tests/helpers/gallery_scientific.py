"""Networks of the gallery from scientific computing and geometry, defined here from their papers."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from gallery import Call, Entry
from torch import Tensor, nn

# --- operators on functions ---------------------------------------------------------------------------------


class SpectralConv1d(nn.Module):
    """A complex matrix per low frequency, the others cut (Li et al., 2021)."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        kept = torch.zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.cfloat)
        kept[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], self.weight)
        return torch.fft.irfft(kept, n=x.shape[-1])


class SpectralConv2d(nn.Module):
    """As in one dimension; low frequencies of the first axis lie at both of its ends."""

    def __init__(self, channels: int, modes: tuple[int, int]) -> None:
        super().__init__()
        self.modes = modes
        self.low = nn.Parameter(torch.randn(channels, channels, *modes, dtype=torch.cfloat) / channels)
        self.high = nn.Parameter(torch.randn(channels, channels, *modes, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.modes
        spectrum = torch.fft.rfft2(x)
        kept = torch.zeros(*x.shape[:-1], x.shape[-1] // 2 + 1, dtype=torch.cfloat)
        low, high = spectrum[:, :, :rows, :columns], spectrum[:, :, -rows:, :columns]
        kept[:, :, :rows, :columns] = torch.einsum("bixy,ioxy->boxy", low, self.low)
        kept[:, :, -rows:, :columns] = torch.einsum("bixy,ioxy->boxy", high, self.high)
        return torch.fft.irfft2(kept, s=x.shape[-2:])


class FourierOperator(nn.Module):
    """Lift with the grid's coordinates appended, spectral plus pointwise layers, project."""

    def __init__(self, dims: int, channels: int = 6) -> None:
        super().__init__()
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        self.lift = nn.Linear(1 + dims, channels)
        spectral = [SpectralConv1d(channels, 3) if dims == 1 else SpectralConv2d(channels, (2, 3)) for _ in range(2)]
        self.spectral = nn.ModuleList(spectral)
        self.pointwise = nn.ModuleList(conv(channels, channels, 1) for _ in range(2))
        self.hidden, self.project = nn.Linear(channels, 12), nn.Linear(12, 1)

    def forward(self, field: Tensor) -> Tensor:
        axes = [torch.linspace(0, 1, size) for size in field.shape[1:-1]]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).expand(*field.shape[:-1], len(axes))
        x = self.lift(torch.cat([field, grid], -1)).movedim(-1, 1)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(F.gelu(self.hidden(x.movedim(1, -1))))


def fourier_operator_1d() -> Call:
    return Call(FourierOperator(1), (torch.randn(2, 16, 1),))


def fourier_operator_2d() -> Call:
    return Call(FourierOperator(2), (torch.randn(2, 8, 9, 1),))


class DeepONet(nn.Module):
    """A branch net reads a function at sensors, a trunk net the query points; their product sums (Lu et al., 2021)."""

    def __init__(self, sensors: int = 10, width: int = 12) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(sensors, width), nn.ReLU(), nn.Linear(width, width))
        self.trunk = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, function: Tensor, points: Tensor) -> Tensor:
        return torch.einsum("bk,bpk->bp", self.branch(function), self.trunk(points)) + self.bias


def deeponet() -> Call:
    return Call(DeepONet(), (torch.randn(2, 10), torch.randn(2, 7, 2)))


class ComplexNetwork(nn.Module):
    """Complex dense layers on a signal's spectrum with an activation on sizes, modReLU (Trabelsi et al., 2018)."""

    def __init__(self, size: int = 8, width: int = 6) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.randn(width, size, dtype=torch.cfloat) / size)
        self.outward = nn.Parameter(torch.randn(4, width, dtype=torch.cfloat) / width)
        self.threshold = nn.Parameter(torch.zeros(width))

    def forward(self, signal: Tensor) -> Tensor:
        z = F.linear(torch.fft.fft(signal), self.inward)
        size = z.abs()
        z = z / (size + 1e-6) * torch.relu(size + self.threshold)
        return F.linear(z, self.outward).abs()


def complex_network() -> Call:
    return Call(ComplexNetwork(), (torch.randn(2, 8),))


class SpectrogramClassifier(nn.Module):
    """A log power spectrogram under a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.conv, self.head = nn.Conv1d(9, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, 16, 8, window=self.window, return_complex=True)
        bands = torch.log1p(spectrum.abs().square())
        return self.head(torch.relu(self.conv(bands)).mean(-1))


def spectrogram_classifier() -> Call:
    return Call(SpectrogramClassifier(), (torch.randn(2, 64),))


# --- functions of coordinates -------------------------------------------------------------------------------


class SineLayer(nn.Module):
    """sin(w0 (W x + b)) (Sitzmann et al., 2020)."""

    def __init__(self, size: int, out: int, w0: float) -> None:
        super().__init__()
        self.linear, self.w0 = nn.Linear(size, out), w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * self.linear(x))


def siren() -> Call:
    layers = (SineLayer(2, 16, 30.0), SineLayer(16, 16, 1.0), nn.Linear(16, 3))
    return Call(nn.Sequential(*layers), (torch.rand(2, 9, 2) * 2 - 1,))


class SplineLayer(nn.Module):
    """A spline per input and output plus a SiLU base (Liu et al., 2024); bases by the recursion of Cox and de Boor."""

    def __init__(self, size: int, out: int, intervals: int = 4, order: int = 3) -> None:
        super().__init__()
        self.order = order
        step = 2 / intervals
        knots = torch.arange(-order, intervals + order + 1) * step - 1
        self.register_buffer("knots", knots.expand(size, -1).contiguous())
        self.base = nn.Parameter(torch.randn(out, size))
        self.spline = nn.Parameter(torch.randn(out, size, intervals + order))

    def bases(self, x: Tensor) -> Tensor:
        x, knots = x.unsqueeze(-1), self.knots
        found = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            rising = (x - knots[:, : -(k + 1)]) / (knots[:, k:-1] - knots[:, : -(k + 1)])
            falling = (knots[:, k + 1 :] - x) / (knots[:, k + 1 :] - knots[:, 1:-k])
            found = rising * found[:, :, :-1] + falling * found[:, :, 1:]
        return found

    def forward(self, x: Tensor) -> Tensor:
        spline = F.linear(self.bases(x).flatten(1), self.spline.flatten(1))
        return F.linear(F.silu(x), self.base) + spline


def kan() -> Call:
    return Call(nn.Sequential(SplineLayer(4, 6), SplineLayer(6, 3)), (torch.rand(2, 4) * 1.8 - 0.9,))


# --- flows --------------------------------------------------------------------------------------------------


class AffineCoupling(nn.Module):
    """Half of the variables scale and shift the other half (Dinh et al., 2017)."""

    def __init__(self, mask: Tensor, hidden: int = 12) -> None:
        super().__init__()
        size = mask.numel()
        self.register_buffer("mask", mask)
        self.scale = nn.Sequential(nn.Linear(size, hidden), nn.LeakyReLU(), nn.Linear(hidden, size), nn.Tanh())
        self.shift = nn.Sequential(nn.Linear(size, hidden), nn.LeakyReLU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x * self.mask
        s, t = self.scale(kept) * (1 - self.mask), self.shift(kept) * (1 - self.mask)
        return kept + (1 - self.mask) * (x * torch.exp(s) + t), s.sum(-1)


class RealNVP(nn.Module):
    """Couplings with alternating masks; returns the latent variables and the log-determinant."""

    def __init__(self, size: int = 6, couplings: int = 3) -> None:
        super().__init__()
        even = (torch.arange(size) % 2).float()
        self.couplings = nn.ModuleList(AffineCoupling(even if i % 2 else 1 - even) for i in range(couplings))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for coupling in self.couplings:
            x, part = coupling(x)
            log_det = log_det + part
        return x, log_det


def real_nvp() -> Call:
    return Call(RealNVP(), (torch.randn(2, 6),))


class VectorField(nn.Module):
    """dx/dt as a small network of state and time."""

    def __init__(self, size: int, hidden: int = 12) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(size + 1, hidden), nn.Linear(hidden, size)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outward(torch.tanh(self.inward(torch.cat([x, t.expand(x.shape[0], 1)], 1))))


class NeuralODE(nn.Module):
    """A vector field integrated by classical Runge-Kutta steps (Chen et al., 2018), then a readout."""

    def __init__(self, size: int = 4, steps: int = 6) -> None:
        super().__init__()
        self.field, self.head = VectorField(size), nn.Linear(size, 3)
        self.register_buffer("times", torch.linspace(0, 1, steps + 1))

    def forward(self, x: Tensor) -> Tensor:
        for start, end in itertools.pairwise(self.times):
            h = end - start
            k1 = self.field(start, x)
            k2 = self.field(start + h / 2, x + h / 2 * k1)
            k3 = self.field(start + h / 2, x + h / 2 * k2)
            k4 = self.field(end, x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


def neural_ode() -> Call:
    return Call(NeuralODE(), (torch.randn(2, 4),))


# --- graphs -------------------------------------------------------------------------------------------------


def graph(nodes: int = 7) -> tuple[Tensor, Tensor]:
    """Node features and edges (source row, target row) both ways along a ring with a chord."""
    ring = torch.arange(nodes)
    source = torch.cat([ring, torch.tensor([0])])
    target = torch.cat([(ring + 1) % nodes, torch.tensor([3])])
    return torch.randn(nodes, 5), torch.stack([torch.cat([source, target]), torch.cat([target, source])])


class IsomorphismLayer(nn.Module):
    """An MLP of (1 + eps) x and the sum over neighbours (Xu et al., 2019)."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(size, out), nn.ReLU(), nn.Linear(out, out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        received = torch.zeros_like(x).index_add_(0, target, x[source])
        return self.mlp((1 + self.eps) * x + received)


class ConvolutionLayer(nn.Module):
    """Neighbours weighted by the degrees of both ends (Kipf and Welling, 2017)."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(size, out, bias=False), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = x.new_zeros(x.shape[0]).scatter_add(0, target, x.new_ones(target.shape[0]))
        weight = (degree[source] * degree[target]).rsqrt()
        messages = self.linear(x)[source] * weight.unsqueeze(-1)
        places = target.unsqueeze(-1).expand_as(messages)
        return x.new_zeros(x.shape[0], messages.shape[1]).scatter_add_(0, places, messages) + self.bias


class GraphClassifier(nn.Module):
    """Message passing, then sum, mean and maximum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = IsomorphismLayer(5, 8), ConvolutionLayer(8, 8)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, edges: Tensor, member: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x, edges)), edges))
        places, empty = member.unsqueeze(-1).expand_as(x), x.new_zeros(2, x.shape[1])
        kinds = ("sum", "mean", "amax")
        pooled = [empty.scatter_reduce(0, places, x, kind, include_self=False) for kind in kinds]
        return self.head(torch.cat(pooled, -1))


def graph_classifier() -> Call:
    return Call(GraphClassifier(), (*graph(), torch.tensor([0, 0, 0, 0, 1, 1, 1])))


class AttentionLayer(nn.Module):
    """Edge weights by a softmax over the edges of each target node (Velickovic et al., 2018)."""

    def __init__(self, size: int, out: int, heads: int = 2) -> None:
        super().__init__()
        self.linear, self.heads = nn.Linear(size, heads * out, bias=False), heads
        self.source, self.target = nn.Parameter(torch.randn(heads, out)), nn.Parameter(torch.randn(heads, out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        z = self.linear(x).unflatten(-1, (self.heads, -1))
        scores = F.leaky_relu((z * self.source).sum(-1)[source] + (z * self.target).sum(-1)[target], 0.2)
        places = target.unsqueeze(-1).expand_as(scores)
        shape = (x.shape[0], self.heads)
        highest = scores.new_zeros(shape).scatter_reduce(0, places, scores.detach(), "amax", include_self=False)
        weights = torch.exp(scores - highest[target])
        total = scores.new_zeros(shape).index_add(0, target, weights)
        attention = weights / (total[target] + 1e-16)
        received = torch.zeros_like(z).index_add_(0, target, attention.unsqueeze(-1) * z[source])
        return received.flatten(1)


class GraphAttention(nn.Module):
    """Two attention layers; classifies nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = AttentionLayer(5, 4), AttentionLayer(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(F.elu(self.second(F.elu(self.first(x, edges)), edges)))


def graph_attention() -> Call:
    return Call(GraphAttention(), graph())


ENTRIES = {
    "fourier_operator_1d": Entry(fourier_operator_1d, (5, 0), ("field",)),
    "fourier_operator_2d": Entry(fourier_operator_2d, (5, 2, 0), ("field",)),
    "complex_network": Entry(complex_network, 1, ("signal",)),
    "spectrogram_classifier": Entry(spectrogram_classifier, 1, ("wave",)),
    "deeponet": Entry(deeponet, 3, ("function", "points")),
    "siren": Entry(siren, (4, 1), ("input",)),
    "kan": Entry(kan, 1, ("input",)),
    "real_nvp": Entry(real_nvp, 2, ("x",)),
    "neural_ode": Entry(neural_ode, 1, ("x",)),
    "graph_classifier": Entry(graph_classifier, 1, ("x",), batched=False, because="nodes exchange messages"),
    "graph_attention": Entry(graph_attention, 1, ("x",), batched=False, because="nodes exchange messages"),
}
