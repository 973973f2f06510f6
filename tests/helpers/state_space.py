"""State-space models for tests, and MambaLRP (Jafari et al. 2024) restated as autograd with detached factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def silu(x: Tensor) -> Tensor:
    """SiLU by the identity rule: x times a constant gate."""
    return x * torch.sigmoid(x).detach()


def half(left: Tensor, right: Tensor) -> Tensor:
    """A product whose relevance is shared evenly."""
    product = left * right
    return product / 2 + (product / 2).detach()


def rms_norm(x: Tensor, weight: Tensor, eps: float, group: int | None = None) -> Tensor:
    """RMSNorm with a constant denominator, over groups of ``group`` features."""
    grouped = x.unflatten(-1, (-1, group or x.shape[-1]))
    scale = torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps).detach()
    return weight * (grouped * scale).flatten(-2)


def frozen_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_t = C_t h_t, h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t with all but u constant.

    ``u`` and ``delta`` (B, T, D), ``a`` (D, N), ``b`` and ``c`` (B, T, N) or, per channel, (B, T, D, N).
    """
    delta, a, b, c = (value.detach() for value in (delta, a, b, c))
    b, c = (value if value.dim() == 4 else value.unsqueeze(2) for value in (b, c))
    state = u.new_zeros(u.shape[0], u.shape[2], a.shape[-1])
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = torch.exp(step * a) * state + step * b[:, t] * u[:, t, :, None]
        outputs.append((state * c[:, t]).sum(-1))
    return torch.stack(outputs, 1)


def explained_by_autograd(restated: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> Tensor:
    """Input times the gradient of a restated model."""
    leaf = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(restated(leaf), leaf, seed)
    return x * grad


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(u, delta, A, B, C) of a scan."""


def as_hugging_face(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Channels before time, matmul readout."""
    u, delta = u.mT, delta.mT
    decay = torch.exp(a[None, :, None, :] * delta[:, :, :, None])
    added = delta[:, :, :, None] * b[:, None, :, :] * u[:, :, :, None]
    state = torch.zeros(u.shape[0], u.shape[1], a.shape[-1], dtype=u.dtype)
    outputs = []
    for index in range(u.shape[2]):
        state = decay[:, :, index] * state + added[:, :, index]
        outputs.append(torch.matmul(state, c[:, index, :].unsqueeze(-1))[:, :, 0])
    return torch.stack(outputs, -1).mT


def as_mamba_minimal(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """einsum everywhere."""
    decay = torch.exp(torch.einsum("bld,dn->bldn", delta, a))
    added = torch.einsum("bld,bln,bld->bldn", delta, b, u)
    state = torch.zeros((u.shape[0], u.shape[2], a.shape[-1]), dtype=u.dtype)
    outputs = []
    for index in range(u.shape[1]):
        state = decay[:, index] * state + added[:, index]
        outputs.append(torch.einsum("bdn,bn->bd", state, c[:, index, :]))
    return torch.stack(outputs, dim=1)


def as_sums(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Operands swapped, Delta u before B, unbound over time, a sum of products as readout."""
    decay = torch.exp(delta.unsqueeze(-1) * a).unbind(1)
    added = (b.unsqueeze(2) * (u * delta).unsqueeze(-1)).unbind(1)
    state = u.new_zeros(u.shape[0], u.shape[2], a.shape[-1])
    outputs = []
    for index, read in enumerate(c.unbind(1)):
        state = added[index] + state * decay[index]
        outputs.append((read.unsqueeze(1) * state).sum(-1))
    return torch.stack(outputs, 1)


def as_kept_slices(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Slices that keep their dimension, readouts concatenated."""
    decay = torch.exp(delta.unsqueeze(-1) * a)
    added = (delta.unsqueeze(-1) * b.unsqueeze(2)) * u.unsqueeze(-1)
    state = torch.zeros_like(added[:, :1])
    outputs = []
    for t in range(u.shape[1]):
        state = decay[:, t : t + 1] * state + added[:, t : t + 1]
        outputs.append((state * c[:, t : t + 1].unsqueeze(2)).sum(-1))
    return torch.cat(outputs, 1)


def from_first_addend(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """No zero state: the first state is the first addend."""
    decay = torch.exp(delta.unsqueeze(-1) * a)
    added = u.unsqueeze(-1) * (delta.unsqueeze(-1) * b.unsqueeze(2))
    state = added[:, 0]
    outputs = [(state @ c[:, 0].unsqueeze(-1)).squeeze(-1)]
    for t in range(1, u.shape[1]):
        state = state * decay[:, t] + added[:, t]
        outputs.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1)


SPELLINGS: list[Callable[..., Tensor]] = [
    as_hugging_face,
    as_mamba_minimal,
    as_sums,
    as_kept_slices,
    from_first_addend,
]


def segment_sums(x: Tensor) -> Tensor:
    """Sums over segments, from the minimal listing of the Mamba-2 paper (Dao and Gu 2024)."""
    length = x.size(-1)
    total = torch.cumsum(x, dim=-1)
    sums = total[..., :, None] - total[..., None, :]
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~mask, -torch.inf)


def minimal_ssd(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, block: int) -> Tensor:
    """The minimal SSD listing: ``x`` (B, T, H, P), ``decay`` (B, T, H), ``b`` and ``c`` (B, T, H, N)."""
    x, decay, b, c = (value.unflatten(1, (-1, block)) for value in (x, decay, b, c))
    decay = decay.permute(0, 3, 1, 2)
    running = torch.cumsum(decay, dim=-1)
    within = torch.exp(segment_sums(decay))
    diagonal = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, within, x)
    to_end = torch.exp(running[:, :, :, -1:] - running)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(segment_sums(F.pad(running[:, :, :, -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    off = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states, torch.exp(running))
    return (diagonal + off).flatten(1, 2)


class MambaBlock(nn.Module):
    """A residual Mamba block (norm, gated branch, causal convolution, selective scan) on (B, T, width)."""

    def __init__(self, scan: Callable[..., Tensor], width: int = 3, inner: int = 4, states: int = 3) -> None:
        super().__init__()
        self.scan, self.inner, self.states = scan, inner, states
        self.norm = nn.Parameter(torch.rand(width) + 0.5)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj = nn.Linear(inner, inner + 2 * states, bias=False)
        self.dt_bias = nn.Parameter(torch.randn(inner))
        self.a_log = nn.Parameter(torch.rand(inner, states))
        self.d = nn.Parameter(torch.randn(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        u, gate = self.in_proj(normed).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        delta, b, c = self.x_proj(u).split([self.inner, self.states, self.states], -1)
        y = self.scan(u, F.softplus(delta + self.dt_bias), -torch.exp(self.a_log), b, c) + u * self.d
        return x + self.out_proj(y * F.silu(gate))

    def restated(self, x: Tensor) -> Tensor:
        """The block as MambaLRP sees it."""
        u, gate = self.in_proj(rms_norm(x, self.norm, 1e-5)).chunk(2, -1)
        u = silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        delta, b, c = self.x_proj(u).split([self.inner, self.states, self.states], -1)
        y = frozen_scan(u, F.softplus(delta + self.dt_bias), -torch.exp(self.a_log), b, c) + u * self.d
        return x + self.out_proj(half(y, silu(gate)))


def restated_mamba(model: Any, embeddings: Tensor) -> Tensor:
    """Logits of Hugging Face's MambaForCausalLM as MambaLRP sees it, from its parameters."""
    hidden = embeddings
    for layer in model.backbone.layers:
        mixer = layer.mixer
        x = rms_norm(hidden, layer.norm.weight, layer.norm.variance_epsilon)
        u, gate = mixer.in_proj(x).chunk(2, -1)
        u = silu(mixer.conv1d(u.mT)[..., : x.shape[1]].mT)
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        step, b, c = mixer.x_proj(u).split(sizes, -1)
        y = frozen_scan(u, F.softplus(mixer.dt_proj(step)), -torch.exp(mixer.A_log), b, c) + u * mixer.D
        hidden = hidden + mixer.out_proj(half(y, silu(gate)))
    final = model.backbone.norm_f
    return model.lm_head(rms_norm(hidden, final.weight, final.variance_epsilon))


def restated_mamba2(model: Any, embeddings: Tensor) -> Tensor:
    """Logits of Hugging Face's Mamba2ForCausalLM as MambaLRP sees it; the recurrence instead of its chunks."""
    hidden = embeddings
    for layer in model.backbone.layers:
        mixer = layer.mixer
        x = rms_norm(hidden, layer.norm.weight, layer.norm.variance_epsilon)
        gate, u, step = mixer.in_proj(x).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
        u = silu(mixer.conv1d(u.mT)[..., : x.shape[1]].mT)
        states = mixer.n_groups * mixer.ssm_state_size
        u, b, c = u.split([mixer.intermediate_size, states, states], -1)
        per_channel = mixer.intermediate_size // mixer.n_groups
        b, c = (v.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(per_channel, 2) for v in (b, c))
        delta, a, d = (
            v.repeat_interleave(mixer.head_dim, -1)
            for v in (F.softplus(step + mixer.dt_bias), -torch.exp(mixer.A_log), mixer.D)
        )
        y = frozen_scan(u, delta, a[:, None].expand(-1, mixer.ssm_state_size), b, c) + u * d
        gated = half(y, silu(gate))
        hidden = hidden + mixer.out_proj(rms_norm(gated, mixer.norm.weight, mixer.norm.variance_epsilon, per_channel))
    final = model.backbone.norm_f
    return model.lm_head(rms_norm(hidden, final.weight, final.variance_epsilon))
