"""Which CUDA kernel a `search` call launches, and what the GPU backends share.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests. A call is one launch of as many threads as the problems have `lanes`.
"""

from __future__ import annotations

import struct

import torch
from secant.kernels._cuda_driver import Driver, Launch
from secant.kernels.search.contract import Rule, Search
from torch import Tensor

NAMES = {torch.float32: "f32", torch.float64: "f64"}

BLOCK = 128  # threads
#: Variables up to which a problem has so many threads: 4 read a sector of 32 bytes in float64, and what one thread of
#: a problem does for all is done for 8 problems at once.
LANES = ((16, 4), (64, 8))

# struct SearchCall.
_CALL = struct.Struct("14Q9q6d2i")


def kernels() -> list[str]:
    """Return the names of all kernels of `cuda.cu`."""
    return [f"search_{kind}_{tag}" for kind in ("advance", "begin") for tag in NAMES.values()]


def lanes_of(n: int) -> int:
    """Threads that share the vectors of a problem."""
    return next((lanes for most, lanes in LANES if n <= most), 32)


def _scalars(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


class Launcher:
    """The functions of `contract.Backend` on a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def _launch(
        self,
        kind: str,
        search: Search,
        rows: Tensor | None,
        brought: tuple[int, int],
        scalars: tuple[tuple[int, int], ...],
        rule: Rule,
    ) -> None:
        x = search.x
        (batch, n), index = x.shape, x.device.index or 0
        count = batch if rows is None else len(rows)
        if count == 0:
            return
        addresses, strides = zip(*scalars, strict=True)
        lanes = lanes_of(n)
        packed = _CALL.pack(
            *(y.data_ptr() for y in search), 0 if rows is None else rows.data_ptr(), *brought, *addresses,
            batch, n, count, *strides, rule.max_trials, rule.max_iter, rule.max_nfev,
            rule.c1, rule.c2, rule.tolerance, rule.eps, rule.gtol, rule.ftol, lanes, 0,
        )  # fmt: skip
        item = Launch(f"search_{kind}_{NAMES[x.dtype]}", -(-count * lanes // BLOCK), 1, BLOCK, 0)
        self.driver.launch(item, index, self.driver.stream(index), packed)

    def advance(self, search: Search, value: Tensor, grad: Tensor, rows: Tensor | None, rule: Rule) -> None:
        """Take what the trials brought: see `reference.advance`."""
        self._launch("advance", search, rows, (value.data_ptr(), grad.data_ptr()), ((0, 0),) * 3, rule)

    def begin(
        self, search: Search, slope: Tensor, g_max: Tensor, t: Tensor | None, rows: Tensor | None, rule: Rule
    ) -> None:
        """Test the problems that stepped, and begin the next searches: see `reference.begin`."""
        self._launch("begin", search, rows, (0, 0), tuple(map(_scalars, (slope, g_max, t))), rule)
