"""Which CUDA kernels an `lbfgs` call launches, with what grid, shared memory, workspace and parameters.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests. A driver says what the device has and launches a kernel by name with one packed struct.

How a call is mapped:

* many problems: a warp each (short vectors) or a block each, in one launch, history in shared memory where it fits;
* few problems: all multiprocessors work on each. `update`: one cooperative launch whose blocks keep their part of the
  history in shared memory between the passes, when at least half of it fits; else, and always while a CUDA graph is
  being captured, two plain launches. `two_loop`: 16 pairs a launch, 2 ceil(m / 16) + 1 launches (see README.md).

The thresholds follow from counting bytes and launches; they have not been measured yet.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from secant.kernels._cuda_driver import Device, Driver, Launch
from secant.kernels.lbfgs.contract import Pair, State
from torch import Tensor

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}

#: struct Update and struct TwoLoop of cuda.cu.
UPDATE = struct.Struct("15Q3q2d6i")
TWO_LOOP = struct.Struct("5Q7qd6i")

BLOCK = 256  # threads of a block
OCCUPANCY = 2  # blocks of a multiprocessor, by __launch_bounds__
EXTRAS = 8  # sums that concern no row
STAGED = 32  # largest m whose Gram matrices are solved from shared memory
PANEL, TILE, TILES = 16, 24, 10
MEETINGS = 256  # problems whose blocks may meet in one launch
FIRST, SECOND = 1, 2  # passes
WARP_N = 512  # longest vector of a warp: 16 elements a lane
RESERVED = 1024  # bytes of shared memory that the system keeps for each block


class Plan(NamedTuple):
    """The launches of a call and the numbers of the struct that do not change between calls."""

    launches: tuple[Launch, ...]
    work: int  # doubles of workspace, 0 for none
    work_stride: int  # doubles a problem
    resident: int
    group_bytes: int


def _chunk(size: int, threads: int) -> int:
    """Elements that a group handles at a time: 16 bytes of storage a thread, at least 4 elements."""
    return max(4, 16 // size) * threads


def _round16(x: int) -> int:
    return -(-x // 16) * 16


def scratch_bytes(m: int, warps: int) -> int:
    """Shared memory of a group in an update, without the history: `Scratch` of cuda.cu."""
    doubles = warps * (4 * m + EXTRAS) + 6 * m + 2 * m + 2 + (2 * m * m if m <= STAGED else 0)
    return 8 * doubles + _round16(4 * m)


def plan_update(
    device: Device, pair: str, batch: int, n: int, m: int, size: int, cooperative: bool | None, direct: bool
) -> Plan:
    """Plan of an update; `size`: bytes of a stored number; `cooperative` None: choose by what fits.

    `direct`: there is a direction to compute, so that the history is read twice and worth keeping.
    """
    sms, chunk = device.multiprocessors, _chunk(size, BLOCK)
    chunks = -(-n // chunk)
    if n <= WARP_N and batch > sms:
        narrow = _chunk(size, 32)
        rounds = -(-n // narrow)
        base, history = scratch_bytes(m, 1), rounds * 2 * m * narrow * size
        resident = rounds if direct and base + history <= device.shared // 8 else 0
        group = _round16(base + (history if resident else 0))
        warps = max(1, min(8, device.shared // (2 * group)))
        grid = min(-(-batch // warps), sms * max(1, min(16 // warps, device.shared // (group * warps))))
        item = Launch(f"lbfgs_update_warp_{pair}", grid, 1, 32 * warps, group * warps, False, FIRST | SECOND)
        return Plan((item,), 0, 0, resident, group)
    kernel, base, row = f"lbfgs_update_block_{pair}", scratch_bytes(m, BLOCK // 32), 2 * m * chunk * size
    if batch >= sms or batch > MEETINGS or chunks <= 2:
        budget = device.shared // OCCUPANCY - RESERVED if batch > sms else device.shared
        resident = max(0, min(chunks, (budget - base) // row)) if direct else 0
        grid = min(batch, sms * OCCUPANCY)
        item = Launch(kernel, grid, 1, BLOCK, base + resident * row, False, FIRST | SECOND)
        return Plan((item,), 0, 0, resident, 0)
    blocks = max(1, min(chunks, sms // batch))
    resident = max(0, min(-(-chunks // blocks), (device.shared - base) // row)) if direct else 0
    if cooperative is None:
        cooperative = 2 * resident * blocks >= chunks
    if not cooperative:
        blocks, resident = max(1, min(chunks, sms * OCCUPANCY // batch)), 0
    stride = 2 * m + 2 + (4 * m + EXTRAS) * blocks
    shared = base + resident * row
    phases = (FIRST | SECOND,) if cooperative else (FIRST, SECOND)
    items = tuple(Launch(kernel, blocks, batch, BLOCK, shared, cooperative, phase) for phase in phases)
    return Plan(items, 2 * MEETINGS + batch * stride, stride, resident, 0)


def plan_two_loop(device: Device, pair: str, batch: int, n: int, m: int, size: int, vector_size: int) -> Plan:
    """Plan of a two_loop with m >= 1 pairs."""
    sms, chunk = device.multiprocessors, _chunk(size, BLOCK)
    chunks = -(-n // chunk)

    def group(width: int, warps: int, budget: int) -> tuple[int, int]:
        """(resident, bytes) of a group that handles `width` elements at a time."""
        padded = -(-n // width) * width
        base = 8 * (4 * warps + 2 * m)
        for resident, extra in ((2, padded * (8 + 2 * m * size)), (1, padded * 8)):
            if base + extra <= budget:
                return resident, _round16(base + extra)
        return 0, _round16(base)

    if n <= WARP_N and batch > sms:
        resident, each = group(_chunk(size, 32), 1, device.shared // 8)
        warps = max(1, min(8, device.shared // (2 * each)))
        grid = min(-(-batch // warps), sms * max(1, min(16 // warps, device.shared // (each * warps))))
        item = Launch(f"lbfgs_two_loop_warp_{pair}", grid, 1, 32 * warps, each * warps, False, 0)
        return Plan((item,), 0, 0, resident, each)
    if batch >= sms or batch > MEETINGS or chunks <= 2:
        budget = device.shared // OCCUPANCY - RESERVED if batch > sms else device.shared
        resident, bytes_ = group(chunk, BLOCK // 32, budget)
        grid = min(batch, sms * OCCUPANCY)
        item = Launch(f"lbfgs_two_loop_block_{pair}", grid, 1, BLOCK, bytes_, False, 0)
        return Plan((item,), 0, 0, resident, 0)
    panels = -(-m // PANEL)
    blocks = max(1, min(chunks, sms * OCCUPANCY // batch))
    stride = 2 + 3 * m + panels * PANEL * PANEL + TILES * TILE * blocks
    dots = 8 * (TILES * TILE + PANEL * (PANEL + 2)) + 16 + 2 * chunk * vector_size
    line = 8 * BLOCK // 32 * PANEL + 16
    items = [Launch(f"lbfgs_panel_dots_{pair}", blocks, batch, BLOCK, dots, False, p) for p in range(panels)]
    items += [Launch(f"lbfgs_panel_line_{pair}", blocks, batch, BLOCK, line, False, p) for p in range(panels + 1)]
    return Plan(tuple(items), 2 * MEETINGS + batch * stride, stride, 0, 0)


class Launcher:
    """`update` and `two_loop` of the contract (see `reference.py`) on a driver."""

    def __init__(self, driver: Driver, cooperative: bool | None = None) -> None:
        self.driver, self.cooperative = driver, cooperative
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._workspaces: dict[tuple[int, int], Tensor] = {}

    def _workspace(self, like: Tensor, stream: int, doubles: int) -> Tensor:
        """Zeroed counters and room for sums, one buffer a stream; under capture one a call, owned by the graph."""
        if self.driver.capturing():
            return torch.zeros(doubles, dtype=torch.float64, device=like.device)
        key = (like.device.index or 0, stream)
        held = self._workspaces.get(key)
        if held is None or held.numel() < doubles:
            held = self._workspaces[key] = torch.zeros(doubles, dtype=torch.float64, device=like.device)
        return held

    def update(
        self,
        state: State,
        pair: Pair | None,
        grad: Tensor | None,
        tol: float,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Append a pair and compute a direction: see `reference.update`."""
        s_ring, y_ring, sy, yy, head, count, stats = state
        s, y, y_prev, t = (None, None, None, 1.0) if pair is None else pair
        vector = s if s is not None else grad
        assert vector is not None
        batch, m, n = s_ring.shape
        index = s_ring.device.index or 0
        cooperative = self.cooperative
        if cooperative is None and self.driver.capturing():
            cooperative = False
        key = (index, vector.dtype, s_ring.dtype, batch, n, m, cooperative, out is not None)
        plan = self._plans.get(key)
        if plan is None:
            names = f"{NAMES[vector.dtype]}_{NAMES[s_ring.dtype]}"
            plan = self._plans[key] = plan_update(
                self.driver.device(index), names, batch, n, m, s_ring.element_size(), cooperative, out is not None
            )
        stream = self.driver.stream(index)
        work = self._workspace(s_ring, stream, plan.work) if plan.work else None
        if out is None:
            grad = prev_out = None
        operands = (s_ring, y_ring, grad, s, y, y_prev, out, prev_out)
        pointers = [0 if x is None else x.data_ptr() for x in operands]
        bits = n * s_ring.element_size()
        for pointer in pointers:
            bits |= pointer
        step, t_pointer, t_stride = t, 0, 0
        if isinstance(t, Tensor):
            step, t_pointer, t_stride = 0.0, t.data_ptr(), int(t.numel() > 1)
        p_rings, p_vectors = pointers[:2], pointers[2:]
        p_state = (sy.data_ptr(), yy.data_ptr(), head.data_ptr(), count.data_ptr(), stats.data_ptr())
        p_work = 0 if work is None else work.data_ptr()
        for item in plan.launches:
            parameters = UPDATE.pack(
                *p_rings,
                *p_state,
                *p_vectors,
                t_pointer,
                p_work,
                batch,
                n,
                plan.work_stride,
                step,
                tol,
                m,
                bits % 16 == 0,
                plan.resident,
                t_stride,
                item.phase,
                plan.group_bytes,
            )
            self.driver.launch(item, index, stream, parameters)

    def two_loop(self, grad: Tensor, s: Tensor, y: Tensor, gamma: float | None, out: Tensor) -> None:
        """Compute a direction from pairs oldest first: see `reference.two_loop`."""
        *batches, m, n = s.shape
        batch = batches[0] if batches else 1
        index = grad.device.index or 0
        key = (index, grad.dtype, s.dtype, batch, n, m)
        plan = self._plans.get(key)
        size = s.element_size()
        if plan is None:
            pair = f"{NAMES[grad.dtype]}_{NAMES[s.dtype]}"
            plan = self._plans[key] = plan_two_loop(
                self.driver.device(index), pair, batch, n, m, size, grad.element_size()
            )
        stream = self.driver.stream(index)
        work = self._workspace(grad, stream, plan.work) if plan.work else None
        pointers = (grad.data_ptr(), s.data_ptr(), y.data_ptr(), out.data_ptr())
        strides = (s.stride(-2), s.stride(0), y.stride(-2), y.stride(0))
        aligned = n | strides[0] | strides[1] | strides[2] | strides[3]
        wide = aligned * size % 16 == 0 and (pointers[0] | pointers[1] | pointers[2] | pointers[3]) % 16 == 0
        for item in plan.launches:
            parameters = TWO_LOOP.pack(
                *pointers,
                0 if work is None else work.data_ptr(),
                batch,
                n,
                *strides,
                plan.work_stride,
                math.nan if gamma is None else gamma,
                m,
                wide,
                plan.resident,
                item.phase,
                plan.group_bytes,
                0,
            )
            self.driver.launch(item, index, stream, parameters)
