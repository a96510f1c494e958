"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h, against the reference in float64.

Devices here are small on purpose (three multiprocessors, little shared memory), so that short vectors take every path:
the planner is the one that serves a GPU, and each test asserts the path it means to take.
"""

from __future__ import annotations

import faulthandler
import os
import re
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from secant.kernels import _cuda_driver
from secant.kernels.lbfgs import plan, reference
from secant.kernels.lbfgs.contract import Pair
from torch import Tensor

import lbfgs_parts as parts
from lbfgs_update import call_update
from reruns import under_address_sanitizer

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
    """`steps` fused steps, each from the reference's state, with `out` aliasing s and `prev_out` aliasing y_prev."""
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
        call_update(reference.update, *ref.tensors, g_new, d, g_new, g, t, 1e-7, ref_d, ref_prev)
        out, prev, gn = offset(d, shift), offset(g, shift), offset(g_new, shift)
        call_update(launch.update, *got.tensors, gn, out, gn, prev, t, 1e-7, out, prev)
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


@pytest.mark.parametrize("shift", [0, 1])
def test_unaligned_and_odd(launcher, shift):
    """Vectors off a 16-byte boundary, rows of odd length: element by element, with a tail."""
    run_steps(
        launcher, Case(SMALL, 1, 3075, 2, "update_block", 2, forced=False), F32, F32, steps=3, seed=3, shift=shift
    )


def test_history_of_256(launcher):
    """The largest history; row access in the coefficient solve, nothing staged."""
    case = Case(SMALL, 1, 2060, 256, "update_block", 2, forced=False)
    torch.manual_seed(4)
    state, h = State(1, case.n, 256, F32), hessian(case.n)
    s = torch.randn(1, 256, case.n)
    y = (h * s).float()
    sy, yy = s.double() @ y.double().mT, y.double() @ y.double().mT
    for tensor, value in zip(state.tensors, (s, y, sy.triu(), yy), strict=False):
        tensor.copy_(value)
    state.tensors[5].fill_(256)
    g = torch.randn(1, case.n)
    launch = launcher(case.device, 4, cooperative=False)
    ref, got = state.clone(), state.clone()
    ref_d, out = torch.empty(1, case.n, dtype=F64), torch.full((1, case.n), torch.nan)
    s_new = torch.randn(1, case.n)
    args = (g, s_new, (h * s_new).float(), None, 0.5, 0.0)
    call_update(reference.update, *ref.tensors, *args, ref_d, None)
    call_update(launch.update, *got.tensors, *args, out, None)
    check_state(got, ref)
    size = magnitude(ref, g)
    check_direction(out, ref_d, size, 256)
    check_stats(got, ref, size, 256, F32)


MODES = {
    "flat": (Case(SMALL, 1, 4200, 4, "update_block", 1, True, True, True), 0),
    "two launches": (Case(SMALL, 1, 4200, 4, "update_block", 2, forced=False), 1),
    "block": (Case(SMALL, 4, 520, 4, "update_block", 1), 0),
    "warp": (Case(SMALL, 5, 100, 4, "update_warp", 1), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_append_and_direction_apart(launcher, name):
    """Append only and direction only, from an empty ring to one that has turned over, equal the reference."""
    case, _ = MODES[name]
    torch.manual_seed(5)
    batch, n, m = case.batch, case.n, case.m
    h, state = hessian(n), State(batch, n, m, F32)
    launch = launcher(case.device, 5, cooperative=case.forced)
    for _ in range(m + 2):
        g = torch.randn(batch, n)
        ref, got = state.clone(), state.clone()
        ref_d, out = torch.empty(batch, n, dtype=F64), torch.full((batch, n), torch.nan)
        call_update(reference.update, *ref.tensors, g, None, None, None, 1.0, 0.0, ref_d, None)
        call_update(launch.update, *got.tensors, g, None, None, None, 1.0, 0.0, out, None)
        check_state(got, ref)
        size = magnitude(ref, g)
        check_direction(out, ref_d, size, m)
        check_stats(got, ref, size, m, F32)
        s = torch.randn(batch, n)
        y = (h * s).float()
        ref, got = state.clone(), state.clone()
        call_update(reference.update, *ref.tensors, None, s, y, None, 0.25, 1e-7, None, None)
        call_update(launch.update, *got.tensors, None, s, y, None, 0.25, 1e-7, None, None)
        check_state(got, ref)
        torch.testing.assert_close(got.tensors[6], ref.tensors[6], rtol=1e-11, atol=0)
        state = ref


@pytest.mark.parametrize("name", MODES)
def test_rejected_pairs(launcher, name):
    """Negative, zero, NaN and infinite pairs change nothing, and the direction is that of the pairs held before."""
    case, _ = MODES[name]
    torch.manual_seed(6)
    batch, n, m = case.batch, case.n, case.m
    h, state = hessian(n), State(batch, n, m, F32)
    for _ in range(m + 1):
        s = torch.randn(batch, n)
        call_update(reference.update, *state.tensors, None, s, (h * s).float(), None, 1.0, 0.0, None, None)
    launch = launcher(case.device, 6, cooperative=case.forced)
    s = torch.randn(batch, n)
    nan, inf = s.clone(), s.clone()
    nan[:, n // 2], inf[:, n - 1] = torch.nan, torch.inf
    for y in (-s, 0 * s, nan, inf):
        g = torch.randn(batch, n)
        ref, got = state.clone(), state.clone()
        ref_d, out, prev = torch.empty(batch, n, dtype=F64), s.clone(), torch.full_like(g, torch.nan)
        call_update(reference.update, *ref.tensors, g, s, y, None, 1.0, 1e-7, ref_d, None)
        call_update(launch.update, *got.tensors, g, out, y, None, 1.0, 1e-7, out, prev)
        assert (ref.tensors[6][:, 6] == 0).all()
        for a, b in zip(got.tensors[:6], state.tensors[:6], strict=True):
            assert torch.equal(a, b)
        check_direction(out, ref_d, magnitude(ref, g), m)
        assert torch.equal(prev, g)
        torch.testing.assert_close(got.tensors[6][:, 3:7], ref.tensors[6][:, 3:7], rtol=1e-11, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODES)
def test_nan_gradient(launcher, name):
    """A NaN in the gradient shows in |g|_inf and in d, and a batch keeps it to its problem."""
    case, _ = MODES[name]
    torch.manual_seed(7)
    batch, n, m = case.batch, case.n, case.m
    h, state = hessian(n), State(batch, n, m, F32)
    for _ in range(2):
        s = torch.randn(batch, n)
        call_update(reference.update, *state.tensors, None, s, (h * s).float(), None, 1.0, 0.0, None, None)
    g = torch.randn(batch, n)
    g[0, n // 3] = torch.nan
    out = torch.zeros(batch, n)
    call_update(
        launcher(case.device, 7, cooperative=case.forced).update,
        *state.tensors,
        g,
        None,
        None,
        None,
        1.0,
        0.0,
        out,
        None,
    )
    assert state.tensors[6][0, 2].isnan()
    assert out[0].isnan().all()
    assert state.tensors[6][1:, :3].isfinite().all()
    assert out[1:].isfinite().all()


TWO_LOOPS = {
    "panels, one": (Case(SMALL, 1, 4200, 10, "panel", 3), False),
    "panels, three, odd": (Case(SMALL, 1, 3077, 37, "panel", 7), False),
    "panels, batch": (Case(plan.Device(4, 100_000), 2, 3077, 18, "panel", 5), True),
    "block": (Case(SMALL, 4, 600, 4, "two_loop_block", 1, resident=True), False),
    "block, from global memory": (Case(plan.Device(3, 12_000), 1, 1500, 5, "two_loop_block", 1, resident=True), True),
    "block, q in out": (Case(plan.Device(3, 6_000), 1, 1500, 5, "two_loop_block", 1), False),
    "warp": (Case(SMALL, 9, 70, 5, "two_loop_warp", 1, resident=True), False),
    "warp, strides": (Case(SMALL, 5, 64, 3, "two_loop_warp", 1, resident=True), True),
    "m > n": (Case(SMALL, 1, 5, 30, "two_loop_block", 1, resident=True), False),
    "n = 1": (Case(SMALL, 1, 1, 3, "two_loop_block", 1, resident=True), False),
}


def pairs(batch: int, n: int, m: int, storage: torch.dtype, strided: bool) -> tuple[Tensor, Tensor]:
    h = hessian(n)
    s = torch.randn(batch, m, n, dtype=F64)
    s, y = s.to(storage), (h * s).to(storage)
    if strided:  # rows and problems apart, the last dimension contiguous
        wide = torch.full((m, batch, 2, n + 3), torch.nan, dtype=storage)
        view = wide.permute(2, 1, 0, 3)[..., 1 : n + 1]
        view[0], view[1] = s, y
        return view[0], view[1]
    return s, y


def two_loop_size(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """`magnitude` for pairs oldest first."""
    batch, m, n = s.shape
    state = State(batch, n, m, F64)
    state.tensors[0], state.tensors[1] = s.double(), y.double()
    state.tensors[2], state.tensors[3] = s.double() @ y.double().mT, y.double() @ y.double().mT
    return magnitude(state, g)


def run_two_loop(
    make: Any,
    case: Case,
    strided: bool,
    dtype: torch.dtype,
    storage: torch.dtype,
    gamma: float | None,
    seed: int,
    broken: tuple[int, ...] = (),
) -> None:
    torch.manual_seed(seed)
    s, y = pairs(case.batch, case.n, case.m, storage, strided)
    for k, i in enumerate(broken):
        (s if k % 2 else y)[:, i, case.n // 2] = (torch.nan, torch.inf, -1e9)[k % 3]
        if k % 3 == 2:
            y[:, i] = -s[:, i]
    g = torch.randn(case.batch, case.n, dtype=F64).to(dtype)
    ref, out = torch.empty(case.batch, case.n, dtype=F64), torch.full((case.batch, case.n), torch.nan, dtype=dtype)
    reference.two_loop(g, s, y, gamma, ref)
    launch = make(case.device, seed)
    launch.two_loop(g, s, y, gamma, out)
    keep = [i for i in range(case.m) if i not in broken]
    size = two_loop_size(g, s[:, keep], y[:, keep]) * max(1.0, gamma or 0.0)
    # Between panels, and where q lives in `out`, q is rounded to T: once a sweep at most.
    check_direction(out, ref, size, case.m, roundings=2)
    inplace = g.clone()
    launch.two_loop(inplace, s, y, gamma, inplace)
    assert torch.equal(inplace, out)
    log = launch.driver.log
    assert len(log) == 2 * case.launches
    assert all(item.kernel.startswith(f"lbfgs_{case.kernel}") for item in log)


@pytest.mark.parametrize("name", TWO_LOOPS)
def test_two_loop(launcher, name):
    case, strided = TWO_LOOPS[name]
    run_two_loop(launcher, case, strided, F32, F32, None, 8)


@pytest.mark.parametrize("name", ["panels, one", "panels, three, odd", "block", "block, q in out", "warp"])
def test_two_loop_broken_pairs(launcher, name):
    """NaN, Inf and negative curvature: the pair is ignored, the newest and the oldest one included; gamma given."""
    case, strided = TWO_LOOPS[name]
    run_two_loop(launcher, case, strided, F32, F32, None, 9, broken=(case.m - 1, 1, 2))
    run_two_loop(launcher, case, strided, F32, F32, 0.3, 10, broken=(0, case.m - 2))


@pytest.mark.parametrize(("dtype", "storage"), PAIRS)
@pytest.mark.parametrize("name", ["panels, one", "block", "warp"])
def test_two_loop_dtypes(launcher, name, dtype, storage):
    case, strided = TWO_LOOPS[name]
    run_two_loop(launcher, case, strided, dtype, storage, None, 11)


@pytest.mark.parametrize("name", ["panels, one", "block", "warp", "block, q in out"])
def test_two_loop_without_a_valid_pair(launcher, name):
    case, _ = TWO_LOOPS[name]
    torch.manual_seed(12)
    s = torch.randn(case.batch, case.m, case.n)
    g, out = torch.randn(case.batch, case.n), torch.full((case.batch, case.n), torch.nan)
    launcher(case.device, 12).two_loop(g, s, -s, None, out)
    assert torch.equal(out, -g)
    launcher(case.device, 12).two_loop(g, s, -s, 2.0, out)
    assert torch.equal(out, -2 * g)


def test_no_pairs(launcher):
    g, out = torch.randn(2, 5), torch.empty(2, 5)
    launcher(SMALL).two_loop(g, torch.empty(2, 0, 5), torch.empty(2, 0, 5), 3.0, out)
    assert torch.equal(out, -3 * g)


@pytest.mark.parametrize("name", ["fused, part of it", "two launches", "block", "warp"])
def test_order_of_threads_changes_nothing(launcher, name):
    """Bitwise the same whatever order the threads and blocks run in: every sum has a fixed order."""
    case = UPDATES[name]
    torch.manual_seed(13)
    state, h = State(case.batch, case.n, case.m, F32), hessian(case.n)
    s, g = torch.randn(case.batch, case.n), torch.randn(case.batch, case.n)
    results = []
    for seed in range(4):
        got, out = state.clone(), torch.empty(case.batch, case.n)
        launch = launcher(case.device, seed, cooperative=case.forced)
        for _ in range(2):
            call_update(launch.update, *got.tensors, g, s, (h * s).float(), None, 1.0, 0.0, out, None)
        results.append([*got.tensors, out])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_capture_takes_plain_launches(launcher):
    """Under capture: no cooperative launch, and a workspace of its own for every call."""
    case = UPDATES["fused, history in shared memory"]
    launch = launcher(case.device)
    launch.driver.graph = True
    state, g, out = State(1, case.n, case.m, F32), torch.randn(1, case.n), torch.empty(1, case.n)
    call_update(launch.update, *state.tensors, g, None, None, None, 1.0, 0.0, out, None)
    assert torch.equal(out, -g)
    assert [item.phase for item in launch.driver.log] == [plan.FIRST, plan.SECOND]
    assert not launch._workspaces


PARTS = {  # how parts.check is called, and whether several blocks share a problem, for each shard
    "several blocks": ({"n": 3333}, [True]),
    "a block a problem": ({"batch": 4, "cuts": (100, 101)}, [False] * 3),
    "uneven shards": ({"n": 4600, "cuts": (1100, 1101), "kind": "direction"}, [False, False, True]),
    "several problems": ({"batch": 2, "n": 3334, "kind": "pair"}, [True]),
    "refused": ({"n": 4608, "cuts": (2304,), "refused": True}, [True, True]),
    "refused, pairs alone": ({"batch": 3, "refused": True, "kind": "pair"}, [False]),
    "empty history": ({"n": 701, "cuts": (1,), "kind": "direction", "pairs": 0}, [False, False]),
    "Gram matrices from global memory": ({"m": 40, "n": 60, "cuts": (21,), "pairs": 42}, [False, False]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(launcher, name):
    given, spread = PARTS[name]
    launch = launcher(SMALL, 8)
    parts.check(launch, F32, F32, **given)
    check_launches(launch, spread)


def check_launches(launch: plan.Launcher, spread: list[bool]) -> None:
    """One each, of the kernel for blocks; to solve takes one block a problem."""
    log = launch.driver.log
    first, later = log[: len(spread)], log[len(spread) :]
    assert [item.phase for item in log] == [plan.FIRST] * len(spread) + [plan.SOLVE, plan.SECOND] * len(spread)
    assert {item.kernel.split("_f")[0] for item in log} == {"lbfgs_update_block"}
    for item, several, solve, combine in zip(first, spread, later[::2], later[1::2], strict=True):
        assert combine == item._replace(phase=plan.SECOND)
        assert several == (item._replace(phase=plan.SOLVE) != solve)


@pytest.mark.parametrize(("dtype", "storage"), PAIRS[1:])
def test_parts_dtypes(launcher, dtype, storage):
    """Shards of several blocks and of one; rows that are 16 bytes apart and rows that are not."""
    parts.check(launcher(SMALL, 9), dtype, storage, m=2, n=8304, cuts=(8200,))


def test_parts_of_a_gradient_with_nan(launcher):
    parts.check_nan_gradient(launcher(SMALL, 10), 4000, 700)


def test_parts_of_slots_that_hold_anything(launcher):
    parts.check_slots_that_hold_anything(launcher(SMALL, 11), 2600)


def test_one_update_is_the_same_bits_in_parts(launcher):
    """The same blocks add the same numbers in the same order, whether one launch solves or another."""
    whole = parts.filled(1, 4, 3100, F32, 6)
    apart = parts.copied(whole)
    g = torch.randn(1, 3100, generator=torch.Generator().manual_seed(1))
    out, prev, out2, prev2 = (torch.empty(1, 3100) for _ in range(4))
    pair = Pair(0.1 * g, g, None, 0.7)
    launcher(SMALL, 12, cooperative=False).update(whole, pair, g, 1e-7, out, prev)
    parts.in_parts(launcher(SMALL, 13), [apart], [pair], [g], [out2], [prev2])
    for got, want in zip((*apart, out2, prev2), (*whole, out, prev), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("Update", (plan.UpdateCall, plan.UpdatePlan)),
        ("TwoLoop", (plan.TwoLoopCall, plan.TwoLoopPlan)),
        ("DenseUpdate", (plan.DenseCall, plan.DensePlan)),
    ],
)
def test_members_of_the_structs(name, members):
    """The planner packs what cuda.cu reads: the same names and types in the same order."""
    text = _cuda_driver.device_code("lbfgs")
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL).group(1))
    types = {"u64": plan.Pointer, "i64": plan.Long, "double": plan.Double, "int": plan.Int}
    groups = re.findall(r"(\w+) ([^;]+);", body)
    declared = [(member.strip(), types[kind]) for kind, found in groups for member in found.split(",")]
    assert declared == [x for group in members for x in get_type_hints(group, include_extras=True).items()]


def detected(make: Any, case: Case, strided: bool | None, seed: int) -> bool:
    """Whether a run of the (mutated) kernels differs from the reference, is stopped by the stand-in, or crashes.

    In a child process, because a mutant may write anywhere; one thread there, as OpenMP does not survive a fork.
    """
    child = os.fork()
    if child == 0:
        found = 1
        try:
            faulthandler.disable()  # a crash is an answer here, not news
            torch.set_num_threads(1)
            if strided is None:
                run_steps(make, case, F32, F32, steps=3, seed=seed)
            else:
                run_two_loop(make, case, strided, F32, F32, None, seed)
            found = 0
        finally:
            os._exit(found)
    return os.waitpid(child, 0)[1] != 0


MUTATIONS = {
    "none, update": ("update", "fused, part of it", "", ""),
    "none, two_loop": ("two_loop", "block", "", ""),
    "sums of the warps": (
        "update",
        "fused, part of it",
        "  const int width = 4 * m + kExtras;\n  G::sync();",
        "  const int width = 4 * m + kExtras;",
    ),
    "reader and writer of head": (
        "update",
        "block",
        "  G::sync();  // every thread has read head",
        "  // every thread has read head",
    ),
    "wait for the solving block": ("update", "fused, part of it", "wait_while_equal(meet.turn, turn);", "(void)turn;"),
    "whether this block is the last": (
        "update",
        "two launches",
        "  __syncthreads();\n  return *flag;",
        "  return *flag;",
    ),
    "copies that have not arrived": (
        "update",
        "fused, history in shared memory",
        "if (c == w.plain) copy_async_wait();",
        "",
    ),
    "last coefficient": (
        "update",
        "warp",
        "      if (lane == 0) coef[2 + i] = delta;\n      __syncwarp();",
        "      if (lane == 0) coef[2 + i] = delta;",
    ),
    "q of a chunk": ("two_loop", "panels, one", "    __syncthreads();  // one is enough", "    // one is enough"),
    "sums of a step": (
        "two_loop",
        "block",
        "board[rank / 32 * 4 + rank % 32] = mine;\n  G::sync();",
        "board[rank / 32 * 4 + rank % 32] = mine;",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(build_standin, standin_driver, name):
    """One barrier or wait less, and every one of three orders of threads shows it; with all of them, none does."""
    op, case, old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert not old or text.count(old) == 1
        return text.replace(old, new) if old else text

    library = build_standin("lbfgs", TABLE, edit, ONE_PAIR)

    def make(device: plan.Device, seed: int, **kw: Any) -> plan.Launcher:
        return plan.Launcher(standin_driver(library, device, seed), **kw)

    chosen, strided = (UPDATES[case], None) if op == "update" else TWO_LOOPS[case]
    assert [detected(make, chosen, strided, seed) for seed in range(3)] == [bool(old)] * 3


@pytest.mark.slow
def test_address_sanitizer():
    names = [f"test_update[{name}]" for name in UPDATES if name not in ("two launches", "warp, from global memory")]
    names += [f"test_two_loop[{name}]" for name in TWO_LOOPS] + ["test_unaligned_and_odd"]
    names += ["test_parts", "test_parts_of_slots_that_hold_anything"]
    under_address_sanitizer(__file__, names)
