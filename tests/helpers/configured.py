"""One call of a kernel under a configuration of the test's choice, against its restatement and eager torch."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import assert_as_accurate, upcast
from restatements import RESTATED
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.launch import Config
from lrp_compiler.kernels.spec import KernelSpec

FAR = 2**30
"""Elements between two rows: 32 bits hold this stride, but not its product with the number of the third row."""


def launched(spec: KernelSpec, config: Config | None, arguments: tuple[Any, ...]) -> Any:
    """The results of the kernel under ``config``."""
    results, launches = spec.plan(*arguments, config=config)
    for one in launches:
        one.run()
    return results


def assert_accurate_under(spec: KernelSpec, config: Config | None, arguments: tuple[Any, ...]) -> None:
    """At most ``tolerance`` times eager's error against float64."""
    found = pytree.tree_leaves(launched(spec, config, arguments))
    eager = pytree.tree_leaves(spec.reference(*arguments))
    exact = pytree.tree_leaves(RESTATED[spec.name](*pytree.tree_map_only(Tensor, Tensor.cpu, upcast(arguments))))
    for one, reference, truth in zip(found, eager, exact, strict=True):
        if one.is_floating_point():
            assert_as_accurate(one.cpu(), reference.cpu(), truth.double(), spec.tolerance)
        else:
            assert torch.equal(one.cpu(), truth.to(one.dtype))


def far_rows(value: Tensor) -> Tensor:
    """The same three rows, the last of which begins 2^31 elements behind the first; only their pages are touched."""
    rows, columns = value.shape
    buffer = torch.empty((rows - 1) * FAR + columns, dtype=value.dtype, device=value.device)
    return buffer.as_strided((rows, columns), (FAR, 1)).copy_(value)
