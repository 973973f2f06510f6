"""linear_attention_transpose: coefficients through y_t = C_t^T h_t, h_t = a_t h_{t-1} + B_t u_t^T, one a per head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.kernels.launch import cdiv
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    contiguous_like,
    known_dtypes,
    same_device,
)

CHUNK = 64
"""Steps that the eager reference takes at once."""


def linear_attention_transpose(c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None) -> Tensor:
    """c_u[t] = sum over s >= t of (C_s . B_t) exp(sum over t < r <= s of log a_r) c[s], in chunks of time.

    ``c`` and the result (B, H, T, P), ``write`` (B) and ``read`` (C) (B, G, T, N) in the dtype of ``c``, where H / G
    heads one after the other read a group; ``log_decay`` (B, H, T) in float32 or the dtype of ``c``, finite, or None
    where nothing decays. Decays between two steps are taken as the difference of running sums over a chunk (Dao and Gu
    2024, section 6; Katharopoulos et al. 2020 without decay).
    """
    if not c.numel():
        return contiguous_like(c)
    steps, groups = c.shape[2], write.shape[1]
    given, writes, reads = (_in_chunks(value) for value in (c, write, read))
    sums = _running_sums(c, log_decay)
    total = sums[..., -1:]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=c.device).triu()
    between = (sums.unsqueeze(-2) - sums.unsqueeze(-1)).masked_fill(~later, -torch.inf).exp().to(c.dtype)
    scores = (writes @ reads.mT).unsqueeze(2) * _grouped(between, groups)
    direct = scores.flatten(1, 2) @ given
    decayed = _grouped(given * sums.exp().unsqueeze(-1).to(c.dtype), groups)
    gathered = torch.einsum("bgksn,bghksp->bghknp", reads, decayed)
    states = _grouped(_carried(gathered.flatten(1, 2), total).to(c.dtype), groups)
    beyond = torch.einsum("bgktn,bghknp->bghktp", writes, states).flatten(1, 2)
    made = direct + beyond * (total - sums).exp().unsqueeze(-1).to(c.dtype)
    return made.flatten(2, 3)[:, :, :steps].contiguous()


def _in_chunks(value: Tensor) -> Tensor:
    """(B, H, T, ...) as (B, H, K, CHUNK, ...), the last chunk filled up with zeros."""
    chunks = cdiv(value.shape[2], CHUNK)
    filled = F.pad(value, [0, 0] * (value.dim() - 3) + [0, chunks * CHUNK - value.shape[2]])
    return filled.reshape(*value.shape[:2], chunks, CHUNK, *value.shape[3:])


def _grouped(value: Tensor, groups: int) -> Tensor:
    """(B, H, ...) as (B, G, H / G, ...)."""
    return value.reshape(value.shape[0], groups, value.shape[1] // groups, *value.shape[2:])


def _running_sums(c: Tensor, log_decay: Tensor | None) -> Tensor:
    """log a summed up within each chunk, in float32 or wider."""
    wide = torch.promote_types(c.dtype, torch.float32)
    decays = c.new_zeros(c.shape[:3], dtype=wide) if log_decay is None else log_decay.to(wide)
    return _in_chunks(decays).cumsum(-1)


def _carried(gathered: Tensor, total: Tensor) -> Tensor:
    """What reaches each chunk (B, H, K, N, P) from all later ones, given what each one gathers."""
    carried = torch.zeros_like(gathered[:, :, 0], dtype=total.dtype)
    parts: list[Tensor] = []
    for chunk in reversed(range(gathered.shape[2])):
        parts.append(carried)
        carried = gathered[:, :, chunk] + total[:, :, chunk].exp().unsqueeze(-1) * carried
    return torch.stack(parts[::-1], 2)


def _fake(c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None) -> Tensor:
    return contiguous_like(c)


def _supports(c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None) -> Supported:
    batch, heads, steps, _ = c.shape
    grouped = write.shape == read.shape and write.shape[::2] == (batch, steps) and heads % max(write.shape[1], 1) == 0
    decays = log_decay is None or (log_decay.dtype in (c.dtype, torch.float32) and log_decay.shape == c.shape[:3])
    return all_supported(
        (
            same_device(c, write, read, log_decay),
            known_dtypes(c, write, read),
            grouped or Refusal(f"{tuple(write.shape)} and {tuple(read.shape)} are no groups of {tuple(c.shape)}"),
            decays or Refusal("its decays are not one number in float32 or its own dtype per head and step"),
        )
    )


def _arguments(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int, int], groups: int, states: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, steps, _ = sizes
    c = torch.randn(sizes, device=device).to(dtype)
    write, read = (torch.randn(batch, groups, steps, states, device=device).to(dtype) for _ in range(2))
    return c, write, read, -torch.rand(batch, heads, steps, device=device)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, write, read, decay = _arguments(dtype, device, (1, 4, 35, 19), 2, 21)
    yield Sample("groups of heads", (c, write, read, decay))
    yield Sample("nothing decays", (c, write, read, None))
    yield Sample("decays in the dtype of the rest", (c[:, 1:3], write, read, decay[:, 1:3].to(dtype)))
    yield Sample("one step", (c[:, :, :1], write[:, :, :1], read[:, :, :1], decay[:, :, :1]))
    yield Sample("no step", (c[:, :, :0], write[:, :, :0], read[:, :, :0], decay[:, :, :0]))
    yield Sample("no state", (c, write[..., :0], read[..., :0], decay))
    yield Sample("no head", (c[:, :0], write, read, decay[:, :0]))
    yield Sample("several chunks", _arguments(dtype, device, (1, 1, 140, 70), 1, 80))
    c, write, read, decay = _arguments(dtype, device, (20, 1, 2, 5), 1, 40)
    strided = (c.permute(1, 2, 0, 3), write.permute(1, 2, 0, 3)[..., ::2], read.permute(1, 2, 0, 3)[..., 20:])
    yield Sample("heads before time, in part", (*strided, decay.permute(1, 2, 0)))
    c, write, read, decay = _arguments(dtype, device, (1, 3, 17, 40), 3, 18)
    one, turned = c[:, :1].expand(-1, 3, -1, -1), read.mT.contiguous().mT
    yield Sample("one output for all heads, states before time", (one, write, turned, decay))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("float64", _arguments(torch.float64, device, (1, 2, 3, 4), 1, 2))
    yield Sample("groups that heads are no multiple of", _arguments(dtype, device, (1, 3, 3, 4), 2, 2))
    c, write, read, decay = _arguments(dtype, device, (1, 2, 3, 4), 1, 2)
    yield Sample("a decay per state", (c, write, read, decay.unsqueeze(-1).expand(-1, -1, -1, 2)))
    yield Sample("fewer reads than writes", (c, write, read[..., :1], decay))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("1x24x2048x64, 128 states (Mamba-2 130M)", _arguments(dtype, device, (1, 24, 2048, 64), 1, 128))
    yield Sample("2x80x4096x64, 128 states (Mamba-2 2.7B)", _arguments(dtype, device, (2, 80, 4096, 64), 1, 128))
    c, write, read, _ = _arguments(dtype, device, (4, 16, 4096, 64), 16, 64)
    yield Sample("4x16x4096x64 (linear attention)", (c, write, read, None))


def _flops(c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None) -> int:
    """Per step and head: a state gathered and one read, and half a chunk of scores and their products."""
    width, states = c.shape[-1], write.shape[-1]
    return c.numel() // max(width, 1) * (4 * width * states + CHUNK * (width + states))


LINEAR_ATTENTION_TRANSPOSE = KernelSpec(
    name="linear_attention_transpose",
    summary="sum over s >= t of (C_s . B_t) a_{t+1} ... a_s c_s: the transpose of SSD and of causal linear attention",
    source="Jafari et al. 2024 (MambaLRP); Dao and Gu 2024, section 6; RULES.md 1.8",
    reference=linear_attention_transpose,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
