"""What each process of the distributed test runs: spawned processes import it by name."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lrp_compiler import LRPModule

PROCESSES = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch_of(rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))


def train(rank: int, folder: str, pickled: LRPModule) -> None:
    """Two steps of a process; saves its gradients, relevance and state."""
    torch.set_num_threads(1)
    # What is sent lies in memory that both processes share.
    mine = copy.deepcopy(pickled)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        distributed.barrier()
        found: dict[str, Any] = {}
        for kind in ("eager", "explained"):
            model = network() if kind == "eager" else mine
            parallel = DistributedDataParallel(model)
            optimizer = torch.optim.Adam(parallel.parameters(), 1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                parallel(batch_of(rank)).square().sum().backward()
                optimizer.step()
            found[kind] = [p.grad.clone() for p in parallel.parameters()], dict(parallel.state_dict())
        found["relevance"] = parallel.module.attribute(batch_of(rank), 1)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()
