"""What picks, gathers and scatters restated: max pooling window by window, tokens as one-hot rows, sorted samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def maxpool_bwd(
    c: Tensor,
    offsets: Tensor,
    input_size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Winner take all (Bach et al. 2015), window by window: its coefficient is added where its winner stands."""
    images, channels, rows, columns = c.shape
    made = torch.zeros(images, channels, *input_size, dtype=torch.float64).tolist()
    given, winners = c.tolist(), offsets.tolist()
    for image in range(images):
        for channel in range(channels):
            for row in range(rows):
                for column in range(columns):
                    down, right = divmod(winners[image][channel][row][column], kernel[1])
                    at = row * stride[0] - padding[0] + down * dilation[0]
                    along = column * stride[1] - padding[1] + right * dilation[1]
                    made[image][channel][at][along] += given[image][channel][row][column]
    return torch.tensor(made, dtype=torch.float64).reshape(images, channels, *input_size)


def embedding_relevance(x: Tensor, c: Tensor) -> Tensor:
    """R_t = sum_d x_td c_td (relevance a c, summed over the embedding): the diagonal of the matrix product x c^T."""
    shape = (math.prod(x.shape[:-1]), x.shape[-1])
    rows, given = x.reshape(shape), c.reshape(shape)
    return (rows @ given.T).diagonal().reshape(x.shape[:-1])


def token_relevance(relevance: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """The transpose of the one-hot matrix (tokens, vocabulary), times the relevance of the tokens."""
    one_hot = ids.unsqueeze(1) == torch.arange(vocabulary)
    return one_hot.double().T @ relevance


def topk_filter(edge: Tensor, relevance: Tensor, fraction: float) -> Tensor:
    """Per sample the edge at the round(fraction * n) largest relevances, one at least; of equal ones the first."""
    if not edge.numel():
        return edge.clone()
    samples = relevance.shape[0] if relevance.dim() else 1
    made = torch.zeros(samples, edge.numel() // samples, dtype=torch.float64)
    for row, (values, handed) in enumerate(zip(relevance.reshape(samples, -1), edge.reshape(samples, -1), strict=True)):
        # As torch does, nan counts as the largest.
        size = [math.inf if math.isnan(value) else value for value in values.tolist()]
        nan = values.isnan().tolist()
        places = sorted(range(len(size)), key=lambda place: (not nan[place], -size[place], place))
        for place in places[: max(1, round(fraction * len(size)))]:
            made[row, place] = handed[place]
    return made.reshape(edge.shape)


RESTATED_PICKING: dict[str, Callable[..., Any]] = {
    "maxpool_bwd": maxpool_bwd,
    "embedding_relevance": embedding_relevance,
    "token_relevance": token_relevance,
    "topk_filter": topk_filter,
}
