"""Which CUDA kernels a `precond` call launches, and what the GPU backends share.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests. A tile of at most 64 x 64, or one without sides, is a block; as many tensors as the
parameters of a kernel have room for, 24, go in one launch, so that no table of pointers has to be copied to the device.
Tensors with larger tiles are stepped by `reference.py`, whose products are those of cuBLAS, and matrices with a side
beyond 64 are iterated by torch's products.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from secant.kernels._cuda_driver import Driver, Launch
from secant.kernels.precond import reference
from secant.kernels.precond.contract import APPLY, FIXED_RMS, GROWTH, SQUARINGS, Rule, Tensors, eps_of
from torch import Tensor

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}

BLOCK, SIDE = 256, 64  # threads; kEach * kApart, the largest side of what is multiplied
TENSORS = 24  # of a launch
MOST_BLOCKS = 2**31 - 1

# struct PrecondTensor; PrecondStep without its tensors; NewtonSchulz; NewtonRoot.
_TENSOR = struct.Struct("9Q5qd2i")
_STEP = struct.Struct("2Q7d8i")
_ITERATION = struct.Struct("2Q4d4q2i")
_ROOT = struct.Struct("3Q3d6i")


def kernels() -> list[str]:
    """Return the names of all kernels of `cuda.cu`."""
    steps = [
        f"{s}_{q}" for s, c in (("f32", "f32"), ("f64", "f64"), ("bf16", "f32"), ("f16", "f32")) for q in (c, "bf16")
    ]
    named = [f"precond_{kind}_{tag}" for kind in ("tile", "entries") for tag in steps]
    return named + [f"precond_newton_{kind}_{tag}" for kind in ("schulz", "root") for tag in NAMES.values()]


def large_newton_schulz(x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
    """Iterate matrices (B, m, n) by products of torch in the dtype of the arithmetic: see `reference`."""
    y = x if x.dtype is torch.float64 else x.float()
    tall = x.shape[1] > x.shape[2]
    y = y.mT if tall else y
    norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=torch.float64)
    y = y / norm.clamp(min=eps).to(y.dtype)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    out.copy_(y.mT if tall else y)


def large_newton_inv_root(
    a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor
) -> None:
    """Iterate matrices (B, n, n) by products of torch in the dtype of the arithmetic: see `reference`."""
    x, code = reference.coupled(a if a.dtype is torch.float64 else a.float(), p, damping, steps, tolerance)
    out.copy_(x)
    info.copy_(code)


class _Part(NamedTuple):
    """A tensor of a launch: its place in the lists, its tiles, and the largest side of one."""

    k: int
    tiles: int
    side: int


def shared_bytes(side: int, size: int) -> int:
    """Shared memory for three squares, their rows an odd number of words apart, and for 8 bytes a warp."""
    return (3 * side * (side | 1) + 1) // 2 * 2 * size + 8 * BLOCK // 32


def scalar(x: float | Tensor, device: torch.device) -> tuple[float, int]:
    """Return (value, 0) of a number or of a tensor elsewhere, which is the host, or (0, address)."""
    if not isinstance(x, Tensor):
        return x, 0
    return (0.0, x.data_ptr()) if x.device == device else (x.item(), 0)


class Launcher:
    """The functions of `contract.Backend` on a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._shared: dict[int, int] = {}

    def _room(self, index: int) -> int:
        """Bytes of shared memory that a block may have."""
        if index not in self._shared:
            self._shared[index] = self.driver.device(index).shared
        return self._shared[index]

    def step(
        self, tensors: Tensors, layout: Tensor, lr: float | Tensor, rule: Rule, phases: int, skipped: Tensor
    ) -> None:
        """Step tensors tile by tile: see `reference.step`."""
        first = tensors.params[0]
        index, size = first.device.index or 0, 8 if first.dtype is torch.float64 else 4
        places = layout.tolist()
        parts: dict[str, list[_Part]] = {"tile": [], "entries": []}
        for k, (rows, columns, down, across, _, _) in enumerate(places):
            sides = any(x.numel() for x in (tensors.left_root[k], tensors.right_root[k]))
            side = max(-(-rows // down), -(-columns // across)) if sides else 1
            if side > SIDE or shared_bytes(side, size) > self._room(index):
                one = Tensors(*([members[k]] for members in tensors))
                reference.step(one, layout[k : k + 1], lr, rule, phases, skipped)
            elif sides or phases & APPLY:
                parts["tile" if sides else "entries"].append(_Part(k, down * across, side))
        rate, address = scalar(lr, first.device)
        wide = isinstance(lr, Tensor) and lr.dtype is torch.float64
        eps = eps_of(rule, first.dtype)
        numbers = (rate, rule.beta1, rule.beta2, rule.beta_gram, eps, rule.weight_decay, FIXED_RMS)
        stream = self.driver.stream(index)
        for kind, members in parts.items():
            for start in range(0, len(members), TENSORS):
                some = members[start : start + TENSORS]
                side = max(part.side for part in some)
                switches = (
                    wide,
                    rule.graft,
                    kind == "tile" and rule.rotate,
                    rule.maximize,
                    phases,
                    len(some),
                    side,
                    side | 1,
                )
                head = _STEP.pack(address, skipped.data_ptr(), *numbers, *switches)
                rows_of, blocks = [], 0
                for part in some:
                    rows_of.append(self._row(tensors, part.k, places[part.k], blocks))
                    blocks += part.tiles
                assert blocks <= MOST_BLOCKS
                packed = (head + b"".join(rows_of)).ljust(_STEP.size + TENSORS * _TENSOR.size, b"\0")
                shared = shared_bytes(side if kind == "tile" else 0, size)
                name = f"precond_{kind}_{NAMES[first.dtype]}_{NAMES[tensors.exp_avg[0].dtype]}"
                self.driver.launch(Launch(name, blocks, 1, BLOCK, shared), index, stream, packed)

    @staticmethod
    def _row(tensors: Tensors, k: int, place: list[int], first: int) -> bytes:
        """Pack one struct PrecondTensor."""
        *members, count = (x[k] for x in tensors)
        t, address = scalar(count, members[0].device)
        rows, columns, down, across, row_stride, column_stride = place
        pointers = (x.data_ptr() if x.numel() else 0 for x in members)
        return _TENSOR.pack(*pointers, address, rows, columns, row_stride, column_stride, first, t, down, across)

    def newton_schulz(self, x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
        """Iterate X <- a X + (b A + c A^2) X with A = X X^T: see `reference.newton_schulz`."""
        batch, m, n = x.shape
        index, size = x.device.index or 0, 8 if x.dtype is torch.float64 else 4
        sides = sorted((m, n))
        shared = shared_bytes(sides[1], size)
        if max(m, n) > SIDE or shared > self._room(index):
            large_newton_schulz(x, steps, a, b, c, eps, out)
            return
        strides = (n, 1) if m <= n else (1, n)
        packed = _ITERATION.pack(x.data_ptr(), out.data_ptr(), a, b, c, eps, *sides, *strides, steps, sides[1] | 1)
        item = Launch(f"precond_newton_schulz_{NAMES[x.dtype]}", batch, 1, BLOCK, shared)
        self.driver.launch(item, index, self.driver.stream(index), packed)

    def newton_inv_root(
        self, a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping |A| I)^(-1/p) by the coupled Newton iteration: see `reference.newton_inv_root`."""
        batch, n, _ = a.shape
        index, shared = a.device.index or 0, shared_bytes(n, 8 if a.dtype is torch.float64 else 4)
        if n > SIDE or shared > self._room(index):
            large_newton_inv_root(a, p, damping, steps, tolerance, out, info)
            return
        pointers = a.data_ptr(), out.data_ptr(), info.data_ptr()
        packed = _ROOT.pack(*pointers, damping, tolerance, GROWTH, n, p, steps, SQUARINGS, n | 1, 0)
        item = Launch(f"precond_newton_root_{NAMES[a.dtype]}", batch, 1, BLOCK, shared)
        self.driver.launch(item, index, self.driver.stream(index), packed)
