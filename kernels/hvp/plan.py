"""Which CUDA kernels a call of the `hvp` family launches, with what grid, shared memory, workspace and parameters.

One planner serves three drivers of the same source, `cuda.cu`: ahead-of-time (`cuda.py`), NVRTC (`nvrtc.py`) and the
CPU stand-in of the tests.

The functions of X take two launches, `hvp_tile` and `hvp_finish`, where a block can hold a row of X, its part of V and
the sums (`SHAPES`: K columns of V, 256 E columns of X). Otherwise slabs of columns make `hvp_tile` run twice, with
`hvp_between` in the middle. The grid is what the multiprocessors hold at once, so that the sums of all blocks are few.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from secant.kernels._cuda_driver import Device, Driver, Launch
from secant.kernels.hvp import LOSSES
from torch import Tensor

#: struct OfX, CrossEntropy, Product and Gram of cuda.cu.
OF_X = struct.Struct("11Q6q2d20i")
CROSS_ENTROPY = struct.Struct("4Q4q4i")
PRODUCT = struct.Struct("9Q14q2i")
GRAM = struct.Struct("3Q7q4i")

#: Storage dtype -> (kernels' tag, type of the arithmetic, bytes of a stored number and of one in arithmetic, type).
TYPES = {
    torch.float32: ("f32", "f32", 4, 4, 0),
    torch.float64: ("f64", "f64", 8, 8, 0),
    torch.bfloat16: ("f16", "f32", 2, 4, 1),
    torch.float16: ("f16", "f32", 2, 4, 2),
}
#: Tag -> (type of the arithmetic, type of storage) in C++.
C_TYPES = {"f32": ("float", "float"), "f64": ("double", "double"), "f16": ("float", "u16")}

BLOCK, WARPS = 256, 8
#: Columns of V in a block -> columns of X a thread; for float64 up to 32 sums a thread.
SHAPES = {1: (1, 4, 16, 64), 4: (1, 4, 16), 8: (1, 4), 16: (1, 4)}
MOST_SUMS = {4: 64, 8: 32}
#: Sums of a thread up to which two blocks fit the registers of a multiprocessor.
TWO_BLOCKS = {4: 32, 8: 8}
#: (storage, columns of X a thread) of one vector of which three fit, and are faster, with so much shared memory.
THREE_BLOCKS, ROOMY = {("f32", 1), ("f16", 4)}, 200 << 10
SLAB = 1024
RUN = 256  # rows that are added before the sum goes to float64
STAGE = 96 << 10  # bytes of the tiles on their way to a multiprocessor
WORKSPACE = 64 << 20  # most bytes of sums, and of X V
RESERVED = 1024  # bytes of shared memory that the system keeps for each block
VALUE_BLOCKS = 4  # of hvp_between, a multiprocessor
GLM, GLM_VALUE, SOFTMAX, SOFTMAX_VALUE = range(4)
#: Threads of a row of logits where it is longer than a multiprocessor can keep; a shorter one has half of them, so that
#: one row is read while another is written. And what of a product a block computes: rows, columns, terms at a time.
ROW_THREADS = {4: 1024, 8: 512}
TILES = {4: (128, 64), 8: (64, 64)}
TERMS, FEWEST_TERMS = 8, 512


class Shape(NamedTuple):
    """How blocks share a function of X; see struct OfX of cuda.cu."""

    k: int
    e: int
    flat: bool
    rows: int
    width: int
    pitch: int
    stage: int
    lanes: int
    shares: int
    slices: int
    slabs: int
    groups: int
    blocks: int  # of a multiprocessor
    shared: int


class Plan(NamedTuple):
    """A shape, and the rows that it takes: of a block, and those whose X V are in memory at a time."""

    shape: Shape
    splits: int
    chunk: int


def kernels() -> list[str]:
    """Return the names of all kernels that a plan may ask for."""
    names = [
        f"hvp_{kind}_{tag}"
        for kind in ("between", "finish", "product", "sum", "gram", "gram_sum")
        for tag in ("f32", "f64")
    ]
    for tag in C_TYPES:
        names.append(f"hvp_cross_entropy_{tag}")
        names += [f"hvp_tile_{k}x{e}_{tag}" for k, widths in SHAPES.items() for e in widths if fits(k, e, tag)]
    return names


def fits(k: int, e: int, tag: str) -> bool:
    """Tell whether a kernel of this shape exists."""
    return k * e <= MOST_SUMS[8 if tag == "f64" else 4]


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def _power(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _shape(
    device: Device, tag: str, stored: int, size: int, d: int, length: int, k: int, width: int, groups: int, flat: bool
) -> Shape | None:
    """Choose the shape with K = k columns of V and slabs of `width` columns, None where it does not fit."""
    width = min(width, length)
    found = [e for e in SHAPES[k] if fits(k, e, tag) and width <= BLOCK * e]
    if not found:
        return None
    e, vec, slots = found[0], 16 // stored, 16 // size
    flat = flat and width >= d
    slices = BLOCK // _power(width) if width <= BLOCK else 1
    lanes = min(32, _power(-(-width // 4)))
    shares = min(WARPS, _power(width // 64 + 1) // 2) if lanes == 32 else 1
    pitch = d if flat else _up(width + vec - 1, vec)
    fixed = size * (_up(width * k, slots) + _up(k, slots)) + 8 * WARPS
    blocks = 2 if k * e <= TWO_BLOCKS[size] else 1
    if k == 1 and (tag, e) in THREE_BLOCKS and device.shared >= ROOMY:
        blocks = 3

    def bytes_of(rows: int) -> tuple[int, int]:
        stage = _up(rows * d + vec, vec) if flat else rows * pitch
        sums = max(shares * rows, BLOCK if slices > 1 else 0)
        return fixed + size * _up(sums * k, slots) + 2 * stage * stored, stage

    if blocks == 3 and bytes_of(1)[0] > device.shared // blocks - RESERVED:
        blocks = 2
    budget = device.shared // blocks - RESERVED
    if bytes_of(1)[0] > budget:
        blocks, budget = 1, device.shared
    rows = min(BLOCK, max(1, STAGE // (blocks * pitch * stored)))
    while rows > 1 and bytes_of(rows)[0] > budget:
        rows -= 1
    rows = rows // 8 * 8 or rows
    shared, stage = bytes_of(rows)
    if shared > budget:
        return None
    return Shape(
        k, e, flat, rows, width, pitch, stage, lanes, shares, slices, -(-length // width), groups, blocks, shared
    )


@functools.cache
def plan_of_x(
    device: Device, tag: str, stored: int, size: int, n: int, d: int, length: int, k: int, coupled: bool, flat: bool
) -> Plan:
    """Plan a function of X (n, d) and V (length, k); `flat`: the rows of X are one behind the other."""
    most = next((x for x in SHAPES if x >= k), 16)
    groups = -(-k // most)
    shape = None
    for columns in sorted((x for x in SHAPES if x <= most), reverse=True):
        reads = -(-k // columns)
        if (reads > 1 and coupled) or reads > 2 * groups:
            break
        shape = _shape(device, tag, stored, size, d, length, columns, length, reads, flat)
        if shape is not None and shape.slabs == 1:
            break
        shape = None
    if shape is None:
        if not fits(most, SLAB // BLOCK, tag):
            most = 8
        shape = _shape(device, tag, stored, size, d, length, most, SLAB, -(-k // most), flat)
        assert shape is not None
    apart = shape.slabs > 1 or (coupled and shape.groups > 1)
    chunk = min(n, max(shape.rows, WORKSPACE // (shape.slabs * k * size))) if apart else n
    splits = max(
        1,
        min(
            device.multiprocessors * shape.blocks // (shape.slabs * shape.groups),
            -(-chunk // shape.rows),
            WORKSPACE // (8 * k * length),
        ),
    )
    return Plan(shape, -(-chunk // _each(chunk, splits, shape.rows)), chunk)


def _each(n: int, splits: int, rows: int) -> int:
    """Rows of a block: whole tiles."""
    return _up(-(-n // splits), rows)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Launcher:
    """The functions of the contract (see `reference.py`) on a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._devices: dict[int, Device] = {}

    def _device(self, index: int) -> Device:
        found = self._devices.get(index)
        if found is None:
            found = self._devices[index] = self.driver.device(index)
        return found

    def _of_x(
        self,
        op: int,
        x: Tensor,
        v: Tensor,
        l2: float,
        out: Tensor,
        *,
        loss: str = "squared",
        delta: float = 1.0,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        target: Tensor | None = None,
        probs: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        n, d = x.shape
        length, k = v.shape if v.dim() == 2 else (len(v), 1)
        tag, arithmetic, stored, size, type_ = TYPES[x.dtype]
        index = x.device.index or 0
        device, stream = self._device(index), self.driver.stream(index)
        stride = d if n == 1 else x.stride(0)
        coupled = op >= SOFTMAX
        shape, splits, chunk = plan_of_x(device, tag, stored, size, n, d, length, k, coupled, stride == d)
        slabs, groups = shape.slabs, shape.groups
        apart = slabs > 1 or (coupled and groups > 1)
        blocks = min(VALUE_BLOCKS * device.multiprocessors, -(-chunk * k // BLOCK))
        chunks = range(0, n, chunk)
        each_parts = blocks if apart else splits
        doubles = functools.partial(torch.empty, dtype=torch.float64, device=x.device)
        partial = doubles(splits * k * length)
        values = None if value is None else doubles(len(chunks) * each_parts)
        z = v.new_empty(slabs * chunk * k) if apart else None
        pointers = [_pointer(t) for t in (x, v, weight, sample_weight, target, probs, z, partial, values, out, value)]
        # A value in float64 for each block; where the last chunk is shorter, blocks without rows write zero.
        run = max(1, RUN // -(-shape.rows // shape.slices))

        def launch(
            kernel: str, grid: int, shared: int, first: int, last: int, dots: int, gather: int, parts: int = 0
        ) -> None:
            each = _each(last - first, splits, shape.rows)
            parameters = OF_X.pack(
                *pointers,
                stride,
                first,
                last,
                d,
                length,
                each,
                l2,
                delta,
                k,
                type_,
                op,
                LOSSES.index(loss),
                dots,
                gather,
                first > 0,
                shape.rows,
                run,
                shape.slices,
                shape.flat,
                shape.width,
                shape.pitch,
                shape.stage,
                shape.lanes,
                shape.shares,
                slabs,
                groups,
                splits,
                parts,
            )
            self.driver.launch(Launch(kernel, grid, 1, BLOCK, shared), index, stream, parameters)

        tile = f"hvp_tile_{shape.k}x{shape.e}_{tag}"
        for number, first in enumerate(chunks):
            last = min(n, first + chunk)
            grid = -(-(last - first) // _each(last - first, splits, shape.rows)) * slabs * groups
            if not apart:
                launch(tile, grid, shape.shared, first, last, 1, 1)
                continue
            launch(tile, grid, shape.shared, first, last, 1, 0)
            if values is not None:
                pointers[8] = values.data_ptr() + 8 * number * blocks
            launch(f"hvp_between_{arithmetic}", blocks, 8 * WARPS, first, last, 0, 0)
            launch(tile, grid, shape.shared, first, last, 0, 1)
        pointers[8] = _pointer(values)
        grid = -(-length * k // 32) + (value is not None)
        launch(f"hvp_finish_{arithmetic}", grid, 8 * BLOCK, 0, n, 0, 0, len(chunks) * each_parts)

    def glm_hvp(self, x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor) -> None:
        """out = X^T (weight * (X v)) + l2 v: see `reference.glm_hvp`."""
        self._of_x(GLM, x, v, l2, out, weight=weight)

    def glm_value_grad(
        self,
        x: Tensor,
        target: Tensor,
        coef: Tensor,
        loss: str,
        delta: float,
        sample_weight: Tensor | None,
        l2: float,
        value: Tensor,
        grad: Tensor,
        weight: Tensor,
    ) -> None:
        """Value, gradient and second derivatives of a sum of losses: see `reference.glm_value_grad`."""
        rows: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "target": target}
        self._of_x(GLM_VALUE, x, coef, l2, grad, loss=loss, delta=delta, value=value, **rows)

    def softmax_hvp(
        self, x: Tensor, v: Tensor, probs: Tensor, sample_weight: Tensor | None, l2: float, out: Tensor
    ) -> None:
        """out = X^T R + l2 V: see `reference.softmax_hvp`."""
        self._of_x(SOFTMAX, x, v, l2, out, probs=probs, sample_weight=sample_weight)

    def softmax_value_grad(
        self,
        x: Tensor,
        target: Tensor,
        coef: Tensor,
        sample_weight: Tensor | None,
        l2: float,
        value: Tensor,
        grad: Tensor,
        probs: Tensor,
    ) -> None:
        """Value, gradient and probabilities of the multinomial loss: see `reference.softmax_value_grad`."""
        rows: dict[str, Any] = {"sample_weight": sample_weight, "target": target, "probs": probs}
        self._of_x(SOFTMAX_VALUE, x, coef, l2, grad, value=value, **rows)

    def cross_entropy_hvp(self, logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor) -> None:
        """out = p * (u - p.u), row by row: see `reference.cross_entropy_hvp`."""
        rows, vocabulary = logits.shape
        tag, _, stored, size, type_ = TYPES[logits.dtype]
        index = logits.device.index or 0
        device = self._device(index)
        strides = (logits.stride(0), u.stride(0))
        pointers = (logits.data_ptr(), u.data_ptr(), _pointer(lse), out.data_ptr())
        wide = ((vocabulary | strides[0] | strides[1]) * stored | pointers[0] | pointers[1] | pointers[3]) % 16 == 0
        each = 16 // stored if wide else 1
        pieces = -(-vocabulary // each)
        most = ROW_THREADS[size] // (2 if 2 * vocabulary * stored <= device.shared else 1)
        threads = min(most, max(64, _up(-(-pieces // 4), 32)))
        turns = -(-pieces // threads)
        base, turn = 32 * 8, 2 * threads * each * stored
        # As many blocks as the threads of a multiprocessor allow; a long row has one to itself.
        budget = device.shared // max(1, ROW_THREADS[size] // threads) - RESERVED
        resident = min(turns, max(0, (budget - base) // turn))
        parameters = CROSS_ENTROPY.pack(*pointers, rows, vocabulary, *strides, type_, wide, resident, 0)
        item = Launch(f"hvp_cross_entropy_{tag}", min(rows, 2**31 - 1), 1, threads, base + resident * turn)
        self.driver.launch(item, index, self.driver.stream(index), parameters)

    def paired_matmul(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        e: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        p: Tensor | None,
        q: Tensor | None,
        out: Tensor,
    ) -> None:
        """out = scale * (a b + c e + bias) + p * q: see `reference.paired_matmul`."""
        m, n = out.shape
        k1, k2 = a.shape[1], 0 if c is None else c.shape[1]
        tag, _, _, size, _ = TYPES[out.dtype]
        index = out.device.index or 0
        device, stream = self._device(index), self.driver.stream(index)
        tile_m, tile_n = TILES[size]
        tiles_n = -(-n // tile_n)
        tiles = -(-m // tile_m) * tiles_n
        most = min(2 * device.multiprocessors // tiles, max(k1, k2) // FEWEST_TERMS, WORKSPACE // (m * n * size))
        parts = max(1, most)
        each = [_up(-(-k // parts), TERMS) for k in (k1, k2)]
        work = out if parts == 1 else out.new_empty(parts * m * n)
        last = [_pointer(t) for t in (bias, scale, p, q)]
        strides = [s for t in (a, b, c, e) for s in ((0, 0) if t is None else t.stride())]
        numbers = (m, n, k1, k2, *each, *strides, tiles_n, parts)
        factors = [_pointer(t) for t in (a, b, c, e)]
        shared = size * TERMS * (tile_m + tile_n + 2 * 16 // size)
        item = Launch(f"hvp_product_{tag}", tiles, parts, BLOCK, shared)
        self.driver.launch(item, index, stream, PRODUCT.pack(*factors, *last, work.data_ptr(), *numbers))
        if parts > 1:
            grid = min(-(-m * n // BLOCK), 8 * device.multiprocessors)
            parameters = PRODUCT.pack(work.data_ptr(), 0, 0, 0, *last, out.data_ptr(), *numbers)
            self.driver.launch(Launch(f"hvp_sum_{tag}", grid, 1, BLOCK, 0), index, stream, parameters)

    def gram(self, x: Tensor, weight: Tensor | None, accumulate: bool, out: Tensor) -> None:
        """out = X^T diag(weight) X, one triangle mirrored: see `reference.gram`."""
        m, n = x.shape
        tag, _, _, size, _ = TYPES[out.dtype]
        index = out.device.index or 0
        device, stream = self._device(index), self.driver.stream(index)
        y = x if weight is None else x * weight[:, None]
        tile_m, tile_n = TILES[size]
        side = -(-n // tile_m)
        tiles = side * (side + 1) // 2 * (tile_m // tile_n)
        parts = max(1, min(2 * device.multiprocessors // tiles, m // FEWEST_TERMS, WORKSPACE // (n * n * size)))
        each = _up(-(-m // parts), TERMS)
        work = out if parts == 1 else out.new_empty(parts * n * n)
        numbers = (m, n, each, *x.stride(), *y.stride(), side, parts, accumulate, 0)
        shared = size * TERMS * (tile_m + tile_n + 2 * 16 // size)
        item = Launch(f"hvp_gram_{tag}", tiles, parts, BLOCK, shared)
        self.driver.launch(item, index, stream, GRAM.pack(x.data_ptr(), y.data_ptr(), work.data_ptr(), *numbers))
        if parts > 1:
            grid = min(-(-n * n // BLOCK), 8 * device.multiprocessors)
            parameters = GRAM.pack(work.data_ptr(), 0, out.data_ptr(), *numbers)
            self.driver.launch(Launch(f"hvp_gram_sum_{tag}", grid, 1, BLOCK, 0), index, stream, parameters)
