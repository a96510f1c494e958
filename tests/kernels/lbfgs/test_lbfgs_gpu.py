"""On a real GPU: every GPU backend against the float64 reference, in graphs, on other streams, never synchronising."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.lbfgs import reference
from secant.kernels.lbfgs.contract import EXTRAS, RULES, Dense, Pair, State

import lbfgs_dense as dense
import lbfgs_parts as parts
from lbfgs_update import call_update
from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DEVICE = torch.device("cuda", 0)
SHAPES = [  # (batch, n, m): a block, blocks that meet, more than shared memory holds, a block or warp each, extremes
    (1, 1000, 10),
    (1, 100_000, 10),
    (1, 1_000_003, 20),
    (1, 1_000_000, 60),
    (4, 50_000, 5),
    (300, 3000, 7),
    (70_000, 64, 10),
    (5000, 33, 40),
    (1, 1, 3),
    (1, 40_000, 256),
]


class Problem:
    """State after `pairs` accepted pairs of a diagonal Hessian between 1 and 3, and operands of the next step."""

    def __init__(self, batch: int, n: int, m: int, dtype: torch.dtype, storage: torch.dtype, pairs: int = 3) -> None:
        torch.manual_seed(n + m)
        new = {"device": DEVICE}
        self.h = 1 + 2 * torch.rand(n, dtype=F64, **new)
        self.state = [
            torch.zeros(batch, m, n, dtype=storage, **new),
            torch.zeros(batch, m, n, dtype=storage, **new),
            torch.zeros(batch, m, m, dtype=F64, **new),
            torch.zeros(batch, m, m, dtype=F64, **new),
            torch.zeros(batch, dtype=torch.int32, **new),
            torch.zeros(batch, dtype=torch.int32, **new),
            torch.full((batch, 8), torch.nan, dtype=F64, **new),
        ]
        for _ in range(pairs):
            s = torch.randn(batch, n, dtype=dtype, **new)
            call_update(reference.update, *self.state, None, s, (self.h * s).to(dtype), None, 1.0, 0.0, None, None)
        self.s = torch.randn(batch, n, dtype=dtype, **new)
        self.prev = torch.randn(batch, n, dtype=dtype, **new)
        self.grad = (self.prev.double() + 0.5 * self.h * self.s.double()).to(dtype)
        self.t = torch.full((batch,), 0.5, dtype=F64, **new)

    def reference(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        state = [x.clone() for x in self.state]
        d = torch.full(self.grad.shape, torch.nan, dtype=F64, device=DEVICE)
        prev = torch.empty_like(self.prev)
        call_update(reference.update, *state, self.grad, self.s, self.grad, self.prev, self.t, 1e-7, d, prev)
        return state, d


def check(d: torch.Tensor, ref: torch.Tensor, m: int) -> None:
    """At condition 3 the 2 m + 1 terms of d add up to less than 16 |d|; each term and each product takes a rounding."""
    eps = torch.finfo(d.dtype).eps
    error = torch.linalg.vector_norm(d.double() - ref, dim=-1) / torch.linalg.vector_norm(ref, dim=-1)
    assert (error <= 16 * (2 * m + 4) * eps + 1e-11).all(), error.max()


def check_state(got: list[torch.Tensor], ref: list[torch.Tensor]) -> None:
    for k in (0, 1, 4, 5):
        assert torch.equal(got[k], ref[k])
    n = got[0].shape[-1]
    s, y = (torch.linalg.vector_norm(x, dim=-1, dtype=F64) for x in ref[:2])
    for k, left in ((2, s), (3, y)):
        bound = 2 * n * torch.finfo(F64).eps * left[:, :, None] * y[:, None, :]
        assert ((got[k] - ref[k]).abs() <= bound).all()
    assert torch.equal(got[6][:, 6], ref[6][:, 6])
    torch.testing.assert_close(got[6][:, 1:6], ref[6][:, 1:6], rtol=1e-11, atol=0)


@pytest.mark.parametrize("storage", [F32, F64, BF16])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(backend, shape, dtype, storage):
    p = Problem(*shape, dtype, storage)
    ref, ref_d = p.reference()
    out, prev = p.s.clone(), p.prev.clone()
    call_update(backend.update, *p.state, p.grad, out, p.grad, prev, p.t, 1e-7, out, prev)
    check_state(p.state, ref)
    check(out, ref_d, shape[2])
    assert torch.equal(prev, p.grad)


@pytest.mark.parametrize("storage", [F32, F64, BF16])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[5:9], ids=str)
def test_two_loop(backend, shape, dtype, storage):
    batch, n, m = shape
    torch.manual_seed(n)
    h = 1 + 2 * torch.rand(n, dtype=F64, device=DEVICE)
    s = torch.randn(batch, m, n, dtype=F64, device=DEVICE)
    s, y = s.to(storage), (h * s).to(storage)
    if m > 1:
        y[:, m // 2, n // 2] = torch.nan  # a pair to be ignored
    g = torch.randn(batch, n, dtype=dtype, device=DEVICE)
    out = torch.full_like(g, torch.nan)
    ref = torch.empty(batch, n, dtype=F64, device=DEVICE)
    reference.two_loop(g, s, y, None, ref)
    backend.two_loop(g, s, y, None, out)
    check(out, ref, 2 * m)


@pytest.mark.parametrize("shape", [(1, 100_000, 10), (1, 2_000_000, 20), (2000, 64, 10)], ids=str)
def test_graph_replay(backend, shape):
    """Captured once, replayed on other data: the ring goes on turning."""
    p = Problem(*shape, F32, F32)
    out, prev = p.s.clone(), p.prev.clone()
    start = [x.clone() for x in p.state]

    def step() -> None:
        call_update(backend.update, *p.state, p.grad, out, p.grad, prev, p.t, 1e-7, out, prev)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles and plans
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x, y in zip(p.state, start, strict=True):
        x.copy_(y)
    for _ in range(3):
        d = torch.randn_like(out)
        out.copy_(d)
        p.s.copy_(d)
        p.prev.copy_(p.grad)
        prev.copy_(p.grad)
        p.grad.copy_((prev.double() + 0.5 * p.h * d.double()).float())
        ref, ref_d = p.reference()
        graph.replay()
        check_state(p.state, ref)
        check(out, ref_d, shape[2])


@pytest.mark.parametrize("shape", [(1, 100_000, 10), (2000, 64, 10)], ids=str)
def test_no_synchronisation_and_another_stream(backend, shape):
    p = Problem(*shape, F32, F32)
    ref, ref_d = p.reference()
    out, prev = p.s.clone(), p.prev.clone()
    warm, warm_out = Problem(*shape, F32, F32), p.s.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_update(
            backend.update, *warm.state, warm.grad, warm_out, warm.grad, warm.prev, warm.t, 1e-7, warm_out, warm.prev
        )
    torch.cuda.synchronize()
    with watched(DEVICE), torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what the default stream does next must not be waited for, nor wait
        call_update(backend.update, *p.state, p.grad, out, p.grad, prev, p.t, 1e-7, out, prev)
    torch.cuda.current_stream().wait_stream(side)
    check_state(p.state, ref)
    check(out, ref_d, shape[2])


@pytest.mark.parametrize(("dtype", "storage"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("kind", ["both", "pair", "direction"])
def test_update_in_parts(backend, kind, dtype, storage):
    """Shards of many blocks, of a few and of one, flat and in a batch."""
    for given in ({"n": 100_001, "cuts": (60_000, 60_007)}, {"n": 1500, "batch": 200, "cuts": (1000,)}):
        parts.check(backend, dtype, storage, kind=kind, device=DEVICE, **given)


def test_update_in_parts_refused_empty_and_with_nan(backend):
    parts.check(backend, F32, F32, n=50_000, cuts=(20_000,), refused=True, device=DEVICE)
    parts.check(backend, F32, F32, n=50_000, cuts=(20_000,), pairs=0, kind="direction", device=DEVICE)
    parts.check_nan_gradient(backend, 40_000, 7000, DEVICE)
    parts.check_slots_that_hold_anything(backend, 26_000, DEVICE)


def test_graph_of_the_parts(backend):
    """Captured once, replayed from the state of the start, with the bits of a call; nothing synchronises."""
    start = parts.copied(parts.filled(1, 4, 100_000, F32, 3), device=DEVICE)
    g, d = (torch.randn(1, 100_000, device=DEVICE) for _ in range(2))
    pair = Pair(d, g, None, 0.5)

    def call(state: State, out: torch.Tensor, prev: torch.Tensor) -> None:
        sums = torch.empty(1, 4 * 4 + EXTRAS, dtype=F64, device=DEVICE)
        coefs = torch.empty(1, 2 * 4 + 2, dtype=F64, device=DEVICE)
        backend.dots(state, pair, g, sums)
        backend.solve(state, sums, coefs, 0.0, True, True)
        backend.combine(state, pair, g, coefs, out, prev)

    want, state = parts.copied(start, device=DEVICE), parts.copied(start, device=DEVICE)
    outs = [torch.empty_like(g) for _ in range(4)]
    call(want, *outs[:2])  # compiles and plans
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state, *outs[2:])
    for _ in range(2):
        for x, y in zip(state, start, strict=True):
            x.copy_(y)
        graph.replay()
        for x, y in zip((*state, *outs[2:]), (*want, *outs[:2]), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 65, 128, 1000, 2049])
def test_dense_update(backend, n, dtype, rule):
    dense.check_run(backend.dense_update, n, dtype, rule, DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_dense_update_of_hostile_input(backend, dtype):
    dense.check_spoilt(backend.dense_update, dtype, DEVICE)
    dense.check_refused(backend.dense_update, dtype, DEVICE)
    for rule in RULES:
        dense.check_scales(backend.dense_update, dtype, rule, DEVICE)


@pytest.mark.parametrize("n", [100, 3000])
def test_graph_of_dense_updates(backend, n):
    """Captured once, replayed from the state of the start, with the bits of a call; nothing synchronises."""
    start = dense.a_state(n, F32, DEVICE)
    step = torch.full((1,), 0.5, dtype=F64, device=DEVICE)
    given = [torch.randn(n, device=DEVICE) for _ in range(3)]
    given[1] = given[0] / 2 + given[2]  # y' = s / 2

    def call(state: Dense, s: torch.Tensor, g: torch.Tensor, prev: torch.Tensor) -> None:
        backend.dense_update(state, Pair(s, g, prev, step), g, 1e-7, 2, s, prev)
        backend.dense_update(state, None, g, 1e-7, 2, s, None)

    want, state = dense.copied(start), dense.copied(start)
    outs, held = [x.clone() for x in given], [x.clone() for x in given]
    call(dense.copied(start), *(x.clone() for x in given))  # compiles and plans
    torch.cuda.synchronize()
    with watched(DEVICE):
        call(want, *outs)
    assert want.stats[1] > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state, *held)
    for _ in range(2):
        for x, y in zip((*state, *held), (*start, *given), strict=True):
            x.copy_(y)
        graph.replay()
        for x, y in zip((*state, *held), (*want, *outs), strict=True):
            assert torch.equal(x, y)


def test_repeats_bit_for_bit(backend):
    p = Problem(1, 300_000, 10, F32, F32)
    results = []
    for _ in range(3):
        state = [x.clone() for x in p.state]
        out, prev = p.s.clone(), p.prev.clone()
        call_update(backend.update, *state, p.grad, out, p.grad, prev, p.t, 1e-7, out, prev)
        results.append([*state, out])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
