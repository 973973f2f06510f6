"""Two processes train an explained module under DistributedDataParallel: eager's gradients, and relevance."""

from __future__ import annotations

from pathlib import Path

import torch
from data_parallel import PROCESSES, batch_of, network, train
from torch import multiprocessing

from lrp_compiler import compile_for_lrp


def test_two_processes_train_as_eager_does(tmp_path: Path) -> None:
    """The explained module is sent to the spawned processes."""
    explained = compile_for_lrp(network(), "epsilon")
    context = multiprocessing.start_processes(
        train, (str(tmp_path), explained), nprocs=PROCESSES, join=False, start_method="spawn"
    )
    assert context is not None
    while not context.join(timeout=120):
        pass
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for rank, found in enumerate(results):
        (eager, state), (ours, own) = found["eager"], found["explained"]
        assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        assert list(state) == list(own) and all(torch.equal(state[key], own[key]) for key in state)
        assert all(torch.equal(a, b) for a, b in zip(ours, results[0]["explained"][0], strict=True))
        plain = network()
        plain.load_state_dict({key.removeprefix("module."): value for key, value in own.items()})
        assert torch.equal(compile_for_lrp(plain, "epsilon").attribute(batch_of(rank), 1), found["relevance"])
