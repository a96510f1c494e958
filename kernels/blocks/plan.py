"""Which CUDA kernel a call of the `blocks` family launches, with what grid, shared memory and parameters.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests. Every call is one launch, chosen by n alone:

* "t", n <= 8 (eigenvalues: 6): a thread a matrix;
* "w", n <= 32: a thread a row, several matrices a warp where they fit;
* "b", n <= 64: the same with two warps a matrix.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from secant.kernels._cuda_driver import Driver, Launch
from torch import Tensor

#: struct Blocks of cuda.cu.
BLOCKS = struct.Struct("6Q3qd8i")

#: Storage dtype -> (type of the arithmetic in a kernel's name, its bytes, Blocks::type).
TYPES = {
    torch.float32: ("f32", 4, 0),
    torch.float64: ("f64", 8, 0),
    torch.bfloat16: ("f32", 4, 1),
    torch.float16: ("f32", 4, 2),
}
C_TYPES = {"f32": "float", "f64": "double"}

#: Largest n of one thread a matrix.
THREAD_N = {"inv_spd": 8, "inv_lu": 8, "solve_spd": 8, "solve_lu": 8, "eigen": 6}
#: Registers a row of the other kernels; each serves all n up to it that the one before does not.
WIDTHS = {
    "inv_spd": (12, 16, 20, 24, 28, 32, 40, 48, 56, 64),
    "inv_lu": (12, 16, 24, 32, 48, 64),
    "solve_spd": (16, 24, 32, 48, 64),
    "solve_lu": (16, 24, 32, 48, 64),
    "eigen": (8, 12, 16, 24, 32, 48, 64),
}
WARP_N = 32
TEAMS = 4  # warps of a block that share nothing, for "t" and "w"
COLUMNS = 8  # right-hand sides at a time
SWEEPS = 30  # cap; Jacobi takes 5 to 10
NONE, ADD, SCALE, MAX = 0, 1, 2, 3
EIGH, ABS_INV, INV_ROOT = 0, 1, 2


class Plan(NamedTuple):
    """The launch of a call but for its grid."""

    kernel: str
    threads: int
    shared: int
    matrices: int  # of a block
    team_bytes: int


def kernels() -> list[str]:
    """Return the names of all kernels that a plan may ask for."""
    names = []
    for op, widths in WIDTHS.items():
        sizes = [f"t{n}" for n in range(1, THREAD_N[op] + 1)]
        sizes += [f"{'w' if width <= WARP_N else 'b'}{width}" for width in widths]
        names += [f"blocks_{op}_{size}_{tag}" for size in sizes for tag in C_TYPES]
    return names


def _round_up(elements: int, size: int) -> int:
    """To 16 bytes, in elements."""
    vec = 16 // size
    return -(-elements // vec) * vec


def _padded(width: int, size: int) -> int:
    """`Padded` of cuda.cu."""
    vec = 16 // size
    return (width // vec | 1) * vec


@functools.cache
def plan(op: str, tag: str, n: int, size: int, columns: int) -> Plan:
    """Plan a call; `columns`: min(right-hand sides, COLUMNS); the shared memory is laid out in cuda.cu."""
    if n <= THREAD_N[op]:
        bytes_ = size * _round_up(32 * (n * n | 1), size)
        return Plan(f"blocks_{op}_t{n}_{tag}", 32 * TEAMS, TEAMS * bytes_, 32 * TEAMS, bytes_)
    width = next(w for w in WIDTHS[op] if w >= n)
    warps = 1 if n <= WARP_N else 2
    spd = op.endswith("_spd")
    lanes = n if spd else max(8, 1 << (width - 1).bit_length())
    matrices = 32 // lanes if warps == 1 else 1
    padded, ld = _padded(width, size), n | 1
    if op == "inv_spd":
        elements = _round_up(matrices * n * ld, size) + matrices * 3 * width
    elif op == "inv_lu":
        elements = matrices * (_round_up(n * max(ld, padded), size) + 2 * warps * width)
    elif op == "eigen":
        square = _round_up(width * max(width + 2, padded), size)
        elements = matrices * (square + _round_up(n * ld, size) + 4 * width)
    else:
        factors = _round_up(n * max(ld, padded), size) + (2 * warps + 1) * width
        elements = matrices * factors + _round_up(matrices * (n * n + n * (columns | 1)), size)
    bytes_ = size * _round_up(elements, size) + (0 if warps == 1 else 80)  # candidates, board
    if warps == 2:
        return Plan(f"blocks_{op}_b{width}_{tag}", 64, bytes_, 1, bytes_)
    return Plan(f"blocks_{op}_w{width}_{tag}", 32 * TEAMS, TEAMS * bytes_, TEAMS * matrices, bytes_)


class Launcher:
    """The five functions of the contract (see `reference.py`) on a driver."""

    def __init__(self, driver: Driver, sweeps: int = SWEEPS) -> None:
        self.driver, self.sweeps = driver, sweeps

    def _launch(
        self,
        op: str,
        a: Tensor,
        out: Tensor,
        info: Tensor,
        *,
        b: Tensor | None = None,
        values: Tensor | None = None,
        shift: float | Tensor | None = None,
        mode: int = NONE,
        function: int = EIGH,
        p: int = 1,
    ) -> None:
        batch, n, _ = a.shape
        tag, size, type_ = TYPES[a.dtype]
        k = 1 if b is None else b.shape[-1]
        chosen = plan(op, tag, n, size, min(k, COLUMNS))
        if isinstance(shift, Tensor):
            given, pointer = math.nan, shift.data_ptr()
        else:
            given, pointer = 0.0 if shift is None else shift, 0
        parameters = BLOCKS.pack(
            a.data_ptr(),
            0 if b is None else b.data_ptr(),
            out.data_ptr(),
            0 if values is None else values.data_ptr(),
            info.data_ptr(),
            pointer,
            batch,
            a.stride(0),
            0 if b is None else b.stride(0),
            given,
            n,
            k,
            type_,
            mode,
            function,
            p,
            self.sweeps,
            chosen.team_bytes,
        )
        index = a.device.index or 0
        item = Launch(chosen.kernel, -(-batch // chosen.matrices), 1, chosen.threads, chosen.shared)
        self.driver.launch(item, index, self.driver.stream(index), parameters)

    def inv(
        self, a: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping)^-1: see `reference.inv`."""
        self._launch("inv_spd" if spd else "inv_lu", a, out, info, shift=damping, mode=_mode(damping, scaled))

    def solve(
        self, a: Tensor, b: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping)^-1 b: see `reference.solve`."""
        op = "solve_spd" if spd else "solve_lu"
        self._launch(op, a, out, info, b=b, shift=damping, mode=_mode(damping, scaled))

    def eigh(self, a: Tensor, values: Tensor, vectors: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
        """Compute A V = V diag(values): see `reference.eigh`."""
        self._launch("eigen", a, vectors, info, values=values)

    def abs_inv(self, a: Tensor, floor: float | Tensor, out: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
        """out = V diag(1 / max(|w|, floor)) V^T: see `reference.abs_inv`."""
        self._launch("eigen", a, out, info, shift=floor, function=ABS_INV)

    def inv_root(
        self,
        a: Tensor,
        p: int,
        damping: float | Tensor | None,
        scaled: bool,
        out: Tensor,
        info: Tensor,
        clamped: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        """out = (A + damping)^(-1/p): see `reference.inv_root`."""
        mode = MAX if clamped else _mode(damping, scaled)
        self._launch("eigen", a, out, info, shift=damping, mode=mode, function=INV_ROOT, p=p)


def _mode(damping: float | Tensor | None, scaled: bool) -> int:
    return NONE if damping is None else (SCALE if scaled else ADD)
