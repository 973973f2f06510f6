"""Two processes train an explained module under DistributedDataParallel: eager's gradients, and relevance."""

from __future__ import annotations

import copy
import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lrp_compiler import LRPModule, compile_for_lrp

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


def test_two_processes_train_as_eager_does(tmp_path: Path) -> None:
    """The explained module is sent to the spawned processes, which import this file by its path."""
    explained = compile_for_lrp(network(), "epsilon")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        context = multiprocessing.start_processes(
            train, (str(tmp_path), explained), nprocs=PROCESSES, join=False, start_method="spawn"
        )
        assert context is not None
        while not context.join(timeout=120):
            pass
    finally:
        sys.path.pop(0)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for rank, found in enumerate(results):
        (eager, state), (ours, own) = found["eager"], found["explained"]
        assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        assert list(state) == list(own) and all(torch.equal(state[key], own[key]) for key in state)
        assert all(torch.equal(a, b) for a, b in zip(ours, results[0]["explained"][0], strict=True))
        plain = network()
        plain.load_state_dict({key.removeprefix("module."): value for key, value in own.items()})
        assert torch.equal(compile_for_lrp(plain, "epsilon").attribute(batch_of(rank), 1), found["relevance"])
