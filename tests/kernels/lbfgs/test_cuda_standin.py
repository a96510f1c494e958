"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h, against the reference in float64.

Devices here are small on purpose (three multiprocessors, little shared memory), so that short vectors take every path: the
planner is the one that serves a GPU, and each test asserts the path it means to take.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from secant.kernels.lbfgs import plan, reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PAIRS = [(t, h) for t in (F32, F64) for h in (F32, F64, BF16)]
TABLE = """
#define SECANT_ROW(TAG, T, H) SECANT_LBFGS_TABLE(SECANT_STANDIN_ROW, TAG)
#define SECANT_STANDIN_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
static const secant_standin::Kernel kKernels[] = {SECANT_LBFGS_PAIRS(SECANT_ROW)};
SECANT_STANDIN_EXPORT(kKernels)
"""
ONE_PAIR = "#define SECANT_LBFGS_PAIRS(X) X(f32_f32, float, float)"
SMALL = plan.Device(multiprocessors=3, shared=100_000)
NARROW = plan.Device(multiprocessors=3, shared=48_000)


class Case(NamedTuple):
    """A way through the planner: device, batch, length, history, and what must come out."""

    device: plan.Device
    batch: int
    n: int
    m: int
    kernel: str
    launches: int
    cooperative: bool = False
    resident: bool = False
    forced: bool | None = None


UPDATES = {
    "fused, history in shared memory": Case(SMALL, 1, 2500, 2, "update_block", 1, True, True),
    "fused, part of it": Case(NARROW, 1, 8200, 1, "update_block", 1, True, True),
    "fused, several problems": Case(plan.Device(8, 100_000), 2, 6200, 3, "update_block", 1, True, True, True),
    "fused, nothing fits": Case(plan.Device(3, 20_000), 1, 4100, 3, "update_block", 1, True, False, True),
    "two launches": Case(SMALL, 1, 6200, 5, "update_block", 2, forced=False),
    "two launches, several problems": Case(plan.Device(4, 100_000), 3, 6147, 3, "update_block", 2, forced=False),
    "block": Case(SMALL, 7, 1030, 4, "update_block", 1, resident=True),
    "block, one problem": Case(SMALL, 1, 600, 5, "update_block", 1, resident=True),
    "block, m > n": Case(SMALL, 1, 6, 40, "update_block", 1),
    "warp": Case(SMALL, 9, 70, 5, "update_warp", 1, resident=True),
    "warp, aligned": Case(SMALL, 9, 64, 3, "update_warp", 1, resident=True),
    "warp, m > n": Case(plan.Device(3, 200_000), 5, 3, 7, "update_warp", 1, resident=True),
    "warp, from global memory": Case(SMALL, 5, 200, 40, "update_warp", 1),
    "n = 1": Case(SMALL, 1, 1, 3, "update_block", 1, resident=True),
    "n = 1, batch": Case(SMALL, 5, 1, 3, "update_warp", 1, resident=True),
}


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("lbfgs", TABLE)


@pytest.fixture
def launcher(library, standin_driver):
    return lambda device, seed=0, **kw: plan.Launcher(standin_driver(library, device, seed), **kw)


class State:
    """Rings, Gram matrices, counters and stats of an update, with NaN where nothing has been written yet."""

    def __init__(self, batch: int, n: int, m: int, storage: torch.dtype) -> None:
        self.tensors = [
            torch.zeros(batch, m, n, dtype=storage),
            torch.zeros(batch, m, n, dtype=storage),
            torch.zeros(batch, m, m, dtype=F64),
            torch.zeros(batch, m, m, dtype=F64),
            torch.zeros(batch, dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int32),
            torch.full((batch, 8), torch.nan, dtype=F64),
        ]

    def clone(self) -> State:
        copy = State.__new__(State)
        copy.tensors = [x.clone() for x in self.tensors]
        return copy


def hessian(n: int) -> Tensor:
    """Diagonal, between 1 and 3: cos(s, y) >= 0.86, so that the recursion amplifies rounding little."""
    return 1.0 + 2.0 * torch.rand(n, dtype=F64)


def magnitude(state: State, g: Tensor) -> Tensor:
    """|gamma g| + sum of |coefficient x row| in float64, (B,): what the terms of d sum to without cancellation.

    The coefficients come from the recursion on the Gram matrices written as two triangular solves.
    """
    s_ring, y_ring, sy, yy, head = state.tensors[:5]
    result = []
    for b in range(g.shape[0]):
        m = sy.shape[-1]
        order = [(int(head[b]) + k) % m for k in range(m)]
        order = [i for i in order if 0 < sy[b, i, i] < torch.inf and torch.isfinite(yy[b, i, i])]
        s, y, gb = s_ring[b, order].double(), y_ring[b, order].double(), g[b].double()
        if not order:
            result.append(gb.abs().square().sum().sqrt())
            continue
        r = torch.triu(s @ y.T)
        d = torch.diagonal(r)
        gamma = d[-1] / (y[-1] @ y[-1])
        alpha = torch.linalg.solve_triangular(r, -(s @ gb)[:, None], upper=True)
        z = gamma * (-(y @ gb)[:, None] - y @ y.T @ alpha)
        delta = torch.linalg.solve_triangular(r.T, d[:, None] * alpha - z, upper=False)
        total = gamma * gb.abs() + gamma * (alpha.abs() * y.abs()).sum(0) + (delta.abs() * s.abs()).sum(0)
        result.append(total.square().sum().sqrt())
    return torch.stack(result)


def check_direction(d: Tensor, ref: Tensor, size: Tensor, m: int, roundings: int = 1) -> None:
    """|d - ref| <= ((2 m + 4) eps_T + 1e-11) size: one rounding for each of the 2 m + 1 terms and of the results.

    1e-11 allows the float64 coefficients 1e5 roundings, dots of up to 8,200 terms times the recursion's amplification.
    """
    eps = torch.finfo(d.dtype).eps
    error = torch.linalg.vector_norm(d.double() - ref, dim=-1)
    assert (error <= ((2 * m + 4) * eps * roundings + 1e-11) * size).all(), (error / size / eps).max()


def check_state(got: State, ref: State) -> None:
    for name, a, b in zip(("s", "y"), got.tensors[:2], ref.tensors[:2], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name}: not the same bits"
    n = got.tensors[0].shape[-1]
    s, y = got.tensors[0].double(), got.tensors[1].double()
    s, y = (torch.linalg.vector_norm(x, dim=-1) for x in (s, y))
    tolerance = 2 * n * torch.finfo(F64).eps  # a sum of n products in float64, in two orders
    for k, left in ((2, s), (3, y)):
        bound = tolerance * left[:, :, None] * y[:, None, :]
        assert ((got.tensors[k] - ref.tensors[k]).abs() <= bound).all()
    assert torch.equal(got.tensors[4], ref.tensors[4])
    assert torch.equal(got.tensors[5], ref.tensors[5])


def check_stats(got: State, ref: State, size: Tensor, m: int, dtype: torch.dtype) -> None:
    a, b = got.tensors[6], ref.tensors[6]
    eps = torch.finfo(dtype).eps
    # g.d comes from coefficients and dots; the reference sums d in float64.
    assert ((a[:, 0] - b[:, 0]).abs() <= 1e-10 * size * b[:, 1]).all()
    torch.testing.assert_close(a[:, 1:6], b[:, 1:6], rtol=1e-11, atol=float(eps) * 0)
    assert torch.equal(a[:, 2], b[:, 2])  # a maximum is exact
    assert torch.equal(a[:, 6], b[:, 6])
    torch.testing.assert_close(a[:, 7], b[:, 7], rtol=1e-11, atol=0)


def offset(x: Tensor, elements: int) -> Tensor:
    """The same values `elements` further from an aligned address."""
    buffer = torch.empty(x.numel() + elements, dtype=x.dtype)
    view = buffer[elements:].view(x.shape)
    return view.copy_(x)


def run_steps(
    make: Any, case: Case, dtype: torch.dtype, storage: torch.dtype, *, steps: int, seed: int, shift: int = 0
) -> None:
    """`steps` fused steps; each starts from the reference's state, with `out` aliasing s and `prev_out` aliasing y_prev."""
    torch.manual_seed(seed)
    batch, n, m = case.batch, case.n, case.m
    h = hessian(n)
    launch = make(case.device, seed, cooperative=case.forced)
    state = State(batch, n, m, storage)
    x = torch.randn(batch, n, dtype=F64)
    g = (h * x).to(dtype)
    d = -g
    for k in range(steps):
        t = torch.rand(batch, dtype=F64) + 0.5 if k % 2 else 0.7
        x = x + (t[:, None] if isinstance(t, Tensor) else t) * torch.randn(batch, n, dtype=F64)
        d = ((x - torch.randn(batch, n, dtype=F64)) * 0.3).to(dtype)
        g_new = (g.double() + h * d.double() * (t[:, None] if isinstance(t, Tensor) else t)).to(dtype)
        ref, got = state.clone(), state.clone()
        ref_d, ref_prev = torch.empty(batch, n, dtype=F64), torch.empty_like(g)
        reference.update(*ref.tensors, g_new, d, g_new, g, t, 1e-7, ref_d, ref_prev)
        out, prev, gn = offset(d, shift), offset(g, shift), offset(g_new, shift)
        launch.update(*got.tensors, gn, out, gn, prev, t, 1e-7, out, prev)
        check_state(got, ref)
        size = magnitude(ref, g_new)
        check_direction(out, ref_d, size, m)
        check_stats(got, ref, size, m, dtype)
        assert torch.equal(prev, g_new)
        assert torch.equal(ref.tensors[6][:, 6], torch.ones(batch, dtype=F64)), "the pairs of this test pass the gate"
        state, g = ref, g_new
    log = launch.driver.log
    assert {item.kernel.split("_f")[0] for item in log} == {f"lbfgs_{case.kernel}"}
    assert len(log) == steps * case.launches
    assert all(item.cooperative == case.cooperative for item in log)
    if dtype is storage is F32:
        assert (next(iter(launch._plans.values())).resident > 0) == case.resident


@pytest.mark.parametrize("name", UPDATES)
def test_update(launcher, name):
    """Every path, ring filled and overwritten."""
    case = UPDATES[name]
    run_steps(launcher, case, F32, F32, steps=min(case.m, 6) + 2, seed=1)


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
@pytest.mark.parametrize("name", ["fused", "two launches", "block", "warp"])
def test_update_dtypes(launcher, name, dtype, storage):
    case = UPDATES[name] if name != "fused" else Case(SMALL, 1, 4104, 1, "update_block", 1, True, True, True)
    run_steps(launcher, case, dtype, storage, steps=2, seed=2)
