"""Which CUDA kernels an `lbfgs` call launches, with what grid, shared memory, workspace and parameters.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests. A driver says what the device has and launches a kernel by name with one packed struct.

How a call is mapped:

* many problems: a warp each (short vectors) or a block each, in one launch, history in shared memory where it fits;
* few problems: all multiprocessors work on each. `update`: one cooperative launch whose blocks keep their part of the
  history in shared memory between the passes, when at least half of it fits; else, and always while a CUDA graph is
  being captured, two plain launches. `two_loop`: 16 pairs a launch, 2 ceil(m / 16) + 1 launches (see README.md);
* `dots`, `solve` and `combine`: one plain launch each, of a block a problem or of all multiprocessors on each;
* `dense_update`: three plain launches of all multiprocessors, or one of one block where H is a few tiles.

The thresholds follow from counting bytes and launches; they have not been measured yet.
"""

from __future__ import annotations

import math
import struct
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from secant.kernels._cuda_driver import Device, Driver, Launch
from secant.kernels.lbfgs.contract import EXTRAS, Dense, Pair, State
from torch import Tensor

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}

# Members of the structs of cuda.cu, by what `struct` calls their types.
Pointer = Annotated[int, "Q"]
Long = Annotated[int, "q"]
Double = Annotated[float, "d"]
Int = Annotated[int, "i"]


class UpdateCall(NamedTuple):
    """The members of struct Update that differ from call to call, in their order."""

    s_ring: Pointer
    y_ring: Pointer
    sy: Pointer
    yy: Pointer
    head: Pointer
    count: Pointer  # type: ignore[assignment]  # of the pairs, not of equal members
    stats: Pointer
    grad: Pointer
    s: Pointer
    y: Pointer
    y_prev: Pointer
    out: Pointer
    prev_out: Pointer
    t: Pointer
    work: Pointer
    dots: Pointer
    coefs: Pointer
    step: Double
    tol: Double
    wide: Int
    t_stride: Int
    pair: Int
    direction: Int


class UpdatePlan(NamedTuple):
    """The other members of struct Update."""

    batch: Long
    n: Long
    work_stride: Long
    phases: Int
    m: Int
    resident: Int
    spread: Int
    group_bytes: Int
    unused: Int = 0


class TwoLoopCall(NamedTuple):
    """The members of struct TwoLoop that differ from call to call, in their order."""

    grad: Pointer
    s: Pointer
    y: Pointer
    out: Pointer
    work: Pointer
    s_row: Long
    s_batch: Long
    y_row: Long
    y_batch: Long
    gamma: Double
    wide: Int
    unused: Int = 0


class TwoLoopPlan(NamedTuple):
    """The other members of struct TwoLoop."""

    batch: Long
    n: Long
    work_stride: Long
    m: Int
    resident: Int
    group_bytes: Int
    step: Int


class DenseCall(NamedTuple):
    """The members of struct DenseUpdate that differ from call to call, in their order."""

    h: Pointer
    pair: Pointer
    coefs: Pointer
    count: Pointer  # type: ignore[assignment]  # of the pairs, not of equal members
    stats: Pointer
    grad: Pointer
    s: Pointer
    y: Pointer
    y_prev: Pointer
    out: Pointer
    prev_out: Pointer
    t: Pointer
    work: Pointer
    step: Double
    tol: Double
    rule: Int
    unused: Int


class DensePlan(NamedTuple):
    """The other members of struct DenseUpdate."""

    n: Long
    tiles: Long
    vectors: Long
    rows: Long
    columns: Long
    rows_apart: Long
    blocks: Int
    phases: Int


def layout(members: type[Any]) -> struct.Struct:
    """Pack members in their order; whole multiples of 8 bytes, those of 8 in front, so that there are no holes."""
    hints = get_type_hints(members, include_extras=True)
    found = struct.Struct("".join(hints[name].__metadata__[0] for name in members._fields))
    assert found.size % 8 == 0
    return found


_UPDATE_CALL, _UPDATE_PLAN = layout(UpdateCall), layout(UpdatePlan)
_TWO_LOOP_CALL, _TWO_LOOP_PLAN = layout(TwoLoopCall), layout(TwoLoopPlan)
_DENSE_CALL, _DENSE_PLAN = layout(DenseCall), layout(DensePlan)

BLOCK = 256  # threads of a block
OCCUPANCY = 2  # blocks of a multiprocessor, by __launch_bounds__
STAGED = 32  # largest m whose Gram matrices are solved from shared memory
PANEL, TILE, TILES = 16, 24, 10
MEETINGS = 256  # problems whose blocks may meet in one launch
FIRST, SECOND, SOLVE = 1, 2, 4  # what a launch does of an update: kFirst, kSecond, kSolve
SIDE, GROUP = 64, 32  # rows and columns of a tile of a dense matrix; elements of a vector whose sums meet in a block
DECISIONS, DENSE_SUMS = 8, 11  # kDecisions, kDenseSums
FEW_TILES = 3  # as many are done by one block in less time than two more launches take
WARP_N = 512  # longest vector of a warp: 16 elements a lane
RESERVED = 1024  # bytes of shared memory that the system keeps for each block


class Plan(NamedTuple):
    """The launches of a call, and what of their structs is the same in every call."""

    launches: tuple[Launch, ...]
    work: int  # doubles of workspace, 0 for none
    resident: int
    packed: tuple[bytes, ...]  # UpdatePlan, TwoLoopPlan or DensePlan of each launch


def _chunk(size: int, threads: int) -> int:
    """Elements that a group handles at a time: 16 bytes of storage a thread, at least 4 elements."""
    return max(4, 16 // size) * threads


def _round16(x: int) -> int:
    return -(-x // 16) * 16


def scratch_bytes(m: int, warps: int) -> int:
    """Shared memory of a group in an update, without the history: `Scratch` of cuda.cu."""
    doubles = warps * (4 * m + EXTRAS) + 6 * m + 2 * m + 2 + (2 * m * m if m <= STAGED else 0)
    return 8 * doubles + _round16(4 * m)


def _update_plan(
    launches: tuple[Launch, ...],
    batch: int,
    n: int,
    m: int,
    *,
    resident: int = 0,
    group_bytes: int = 0,
    blocks: int = 0,
) -> Plan:
    """Plan of an update or a part of it; `blocks` that share a problem, 0 for a group a problem.

    They need counters and, for each problem, room for coefficients and for the sums of each.
    """
    stride = 2 * m + 2 + (4 * m + EXTRAS) * blocks if blocks else 0
    shared = {"work_stride": stride, "resident": resident, "group_bytes": group_bytes, "spread": bool(blocks)}
    packed = tuple(_UPDATE_PLAN.pack(*UpdatePlan(batch, n, phases=item.phase, m=m, **shared)) for item in launches)
    return Plan(launches, 2 * MEETINGS + batch * stride if blocks else 0, resident, packed)


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
        return _update_plan((item,), batch, n, m, resident=resident, group_bytes=group)
    kernel, base, row = f"lbfgs_update_block_{pair}", scratch_bytes(m, BLOCK // 32), 2 * m * chunk * size
    if _block_each(device, batch, chunks):
        budget = device.shared // OCCUPANCY - RESERVED if batch > sms else device.shared
        resident = max(0, min(chunks, (budget - base) // row)) if direct else 0
        grid = min(batch, sms * OCCUPANCY)
        item = Launch(kernel, grid, 1, BLOCK, base + resident * row, False, FIRST | SECOND)
        return _update_plan((item,), batch, n, m, resident=resident)
    blocks = max(1, min(chunks, sms // batch))
    resident = max(0, min(-(-chunks // blocks), (device.shared - base) // row)) if direct else 0
    if cooperative is None:
        cooperative = 2 * resident * blocks >= chunks
    if not cooperative:
        blocks, resident = max(1, min(chunks, sms * OCCUPANCY // batch)), 0
    shared = base + resident * row
    phases = (FIRST | SECOND,) if cooperative else (FIRST, SECOND)
    items = tuple(Launch(kernel, blocks, batch, BLOCK, shared, cooperative, phase) for phase in phases)
    return _update_plan(items, batch, n, m, resident=resident, blocks=blocks)


def _block_each(device: Device, batch: int, chunks: int) -> bool:
    """Tell whether each problem gets one block: there are many problems, or too little in one for several."""
    return batch >= device.multiprocessors or batch > MEETINGS or chunks <= 2


def plan_part(device: Device, pair: str, batch: int, n: int, m: int, size: int, phase: int) -> Plan:
    """Plan of one part of an update: FIRST for `dots`, SOLVE, or SECOND for `combine`.

    Blocks only, as what is spread over processes is long; nothing is kept in shared memory, as each part reads once.
    """
    sms, chunks = device.multiprocessors, -(-n // _chunk(size, BLOCK))
    kernel, shared = f"lbfgs_update_block_{pair}", scratch_bytes(m, BLOCK // 32)
    if phase == SOLVE or _block_each(device, batch, chunks):
        item = Launch(kernel, min(batch, sms * OCCUPANCY), 1, BLOCK, shared, False, phase)
        return _update_plan((item,), batch, n, m)
    blocks = max(1, min(chunks, sms * OCCUPANCY // batch))
    plan = _update_plan((Launch(kernel, blocks, batch, BLOCK, shared, False, phase),), batch, n, m, blocks=blocks)
    return plan if phase == FIRST else plan._replace(work=0)  # who combines meets nobody


def plan_two_loop(device: Device, pair: str, batch: int, n: int, m: int, size: int, vector_size: int) -> Plan:
    """Plan of a two_loop with m >= 1 pairs."""
    sms, chunk = device.multiprocessors, _chunk(size, BLOCK)
    chunks = -(-n // chunk)

    def plan(launches: list[Launch], stride: int = 0, resident: int = 0, group_bytes: int = 0) -> Plan:
        numbers = {"work_stride": stride, "resident": resident, "group_bytes": group_bytes}
        packed = (_TWO_LOOP_PLAN.pack(*TwoLoopPlan(batch, n, m=m, step=item.phase, **numbers)) for item in launches)
        return Plan(tuple(launches), 2 * MEETINGS + batch * stride if stride else 0, resident, tuple(packed))

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
        return plan([item], resident=resident, group_bytes=each)
    if _block_each(device, batch, chunks):
        budget = device.shared // OCCUPANCY - RESERVED if batch > sms else device.shared
        resident, bytes_ = group(chunk, BLOCK // 32, budget)
        grid = min(batch, sms * OCCUPANCY)
        item = Launch(f"lbfgs_two_loop_block_{pair}", grid, 1, BLOCK, bytes_, False, 0)
        return plan([item], resident=resident)
    panels = -(-m // PANEL)
    blocks = max(1, min(chunks, sms * OCCUPANCY // batch))
    stride = 2 + 3 * m + panels * PANEL * PANEL + TILES * TILE * blocks
    dots = 8 * (TILES * TILE + PANEL * (PANEL + 2)) + 16 + 2 * chunk * vector_size
    line = 8 * BLOCK // 32 * PANEL + 16
    items = [Launch(f"lbfgs_panel_dots_{pair}", blocks, batch, BLOCK, dots, False, p) for p in range(panels)]
    items += [Launch(f"lbfgs_panel_line_{pair}", blocks, batch, BLOCK, line, False, p) for p in range(panels + 1)]
    return plan(items, stride)


def plan_dense(device: Device, name: str, n: int, size: int) -> Plan:
    """Plan of a dense update; `name` and `size` in bytes of its type."""
    panels, most = -(-n // SIDE), device.multiprocessors * OCCUPANCY
    tiles = panels * (panels + 1) // 2
    alone = tiles <= FEW_TILES
    blocks, groups = (1, 1) if alone else (min(tiles, most), min(-(-n // GROUP), most))
    phases = (FIRST | SOLVE | SECOND,) if alone else (FIRST, SOLVE, SECOND)
    grids = (blocks, groups, min(-(-n // BLOCK), most))
    # A tile's sums along its columns, of every warp and two vectors, for two tiles in turn; and 4 numbers a row.
    shared = (2 * 2 * BLOCK // 32 + 4) * SIDE * size
    kernel = f"lbfgs_dense_{name}"
    items = tuple(Launch(kernel, grid, 1, BLOCK, shared, False, p) for grid, p in zip(grids, phases, strict=False))
    vectors, rows_apart = 2 * MEETINGS + DECISIONS + DENSE_SUMS * groups, (panels + blocks) * SIDE
    rows = vectors + 2 * n
    columns = rows + 2 * rows_apart
    places = (n, tiles, vectors, rows, columns, rows_apart)
    packed = tuple(_DENSE_PLAN.pack(*DensePlan(*places, blocks, item.phase)) for item in items)
    return Plan(items, columns + 2 * tiles * SIDE * size // 8, 0, packed)


class Launcher:
    """The functions of `contract.Backend` on a driver."""

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
        if out is None:
            grad = prev_out = None
        self._run(FIRST | SECOND, state, pair, grad, tol, out, prev_out, None, None)

    def dots(self, state: State, pair: Pair | None, grad: Tensor | None, out: Tensor) -> None:
        """Sum products over the elements at hand: see `reference.dots`."""
        self._run(FIRST, state, pair, grad, 0.0, None, None, out, None)

    def solve(self, state: State, dots: Tensor, coefs: Tensor, tol: float, pair: bool, direction: bool) -> None:
        """Compute coefficients from sums: see `reference.solve`."""
        self._run(SOLVE, state, None, None, tol, None, None, dots, coefs, pair, direction)

    def combine(
        self,
        state: State,
        pair: Pair | None,
        grad: Tensor | None,
        coefs: Tensor,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Write an accepted pair and the direction: see `reference.combine`."""
        self._run(SECOND, state, pair, grad, 0.0, out, prev_out, None, coefs)

    def _run(
        self,
        phases: int,
        state: State,
        pair: Pair | None,
        grad: Tensor | None,
        tol: float,
        out: Tensor | None,
        prev_out: Tensor | None,
        dots: Tensor | None,
        coefs: Tensor | None,
        has_pair: bool | None = None,
        direction: bool | None = None,
    ) -> None:
        """Launch an update or a part of it; `has_pair` and `direction` where the tensors do not say so."""
        s_ring = state.s
        s, y, y_prev, t = (None, None, None, 1.0) if pair is None else pair
        if s is not None:
            vector = s.dtype
        elif grad is not None:
            vector = grad.dtype
        else:  # of no meaning to a solve
            vector = torch.float64 if s_ring.dtype is torch.float64 else torch.float32
        batch, m, n = s_ring.shape
        index = s_ring.device.index or 0
        cooperative = self.cooperative
        if cooperative is None and self.driver.capturing():
            cooperative = False
        key = (phases, index, vector, s_ring.dtype, batch, n, m, cooperative, out is not None)
        plan = self._plans.get(key)
        if plan is None:
            device, size = self.driver.device(index), s_ring.element_size()
            names = f"{NAMES[vector]}_{NAMES[s_ring.dtype]}"
            if phases == FIRST | SECOND:
                plan = plan_update(device, names, batch, n, m, size, cooperative, out is not None)
            else:
                plan = plan_part(device, names, batch, n, m, size, phases)
            self._plans[key] = plan
        stream = self.driver.stream(index)
        work = self._workspace(s_ring, stream, plan.work) if plan.work else None
        tensors = (*state, grad, s, y, y_prev, out, prev_out)
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        bits = n * s_ring.element_size() | pointers[0] | pointers[1]
        for pointer in pointers[7:]:
            bits |= pointer
        step, t_pointer, t_stride = t, 0, 0
        if isinstance(t, Tensor):
            step, t_pointer, t_stride = 0.0, t.data_ptr(), int(t.numel() > 1)
        # As UpdateCall has them: by keyword they would cost 2 us more.
        call = _UPDATE_CALL.pack(
            *pointers,
            t_pointer,
            0 if work is None else work.data_ptr(),
            0 if dots is None else dots.data_ptr(),
            0 if coefs is None else coefs.data_ptr(),
            step,
            tol,
            bits % 16 == 0,
            t_stride,
            pair is not None if has_pair is None else has_pair,
            grad is not None if direction is None else direction,
        )
        for item, rest in zip(plan.launches, plan.packed, strict=True):
            self.driver.launch(item, index, stream, call + rest)

    def dense_update(
        self,
        state: Dense,
        pair: Pair | None,
        grad: Tensor | None,
        tol: float,
        rule: int,
        out: Tensor | None,
        prev_out: Tensor | None,
    ) -> None:
        """Update a dense inverse Hessian and compute the direction: see `reference.dense_update`."""
        s, y, y_prev, t = (None, None, None, 1.0) if pair is None else pair
        if out is None or grad is None:
            grad = out = prev_out = None
        h, n = state.h, state.pair.shape[-1]
        index = h.device.index or 0
        key = ("dense", index, h.dtype, n)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_dense(self.driver.device(index), NAMES[h.dtype], n, h.element_size())
        stream = self.driver.stream(index)
        step, t_pointer = (0.0, t.data_ptr()) if isinstance(t, Tensor) else (t, 0)
        tensors = (*state, grad, s, y, y_prev, out, prev_out)
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        work = self._workspace(h, stream, plan.work)
        call = _DENSE_CALL.pack(*pointers, t_pointer, work.data_ptr(), step, tol, rule, 0)
        for item, rest in zip(plan.launches, plan.packed, strict=True):
            self.driver.launch(item, index, stream, call + rest)

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
        scale = math.nan if gamma is None else gamma
        call = _TWO_LOOP_CALL.pack(*pointers, 0 if work is None else work.data_ptr(), *strides, scale, wide, 0)
        for item, rest in zip(plan.launches, plan.packed, strict=True):
            self.driver.launch(item, index, stream, call + rest)
