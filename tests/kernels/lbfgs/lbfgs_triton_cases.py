"""Cases that `test_lbfgs_triton.py` runs in a process of their own: see `triton_runner.py`."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lbfgs_update import call_update

sys.path.append(str(Path(__file__).resolve().parents[1]))

from secant.kernels.lbfgs import reference
from secant.kernels.lbfgs.contract import Pair

import lbfgs_dense as dense
import lbfgs_oracle as oracle
import lbfgs_parts as parts
import placed
import triton_runner
from triton_runner import Cases, arguments

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DTYPES = [(t, r) for t in oracle.VECTORS for r in oracle.RINGS]
#: The two regimes, told apart by n alone, at sizes that an interpreter can bear.
REGIMES = ("one", "many")

CASES = Cases()
case = CASES.case

device = torch.device("cpu")


@contextlib.contextmanager
def kernels(regime: str) -> Iterator[ModuleType]:
    """The backend in one regime, with tiles small enough that short vectors have several."""
    from secant.kernels.lbfgs import triton as backend

    small = {"_ONE_PROGRAM": 4096 if regime == "one" else 0, "_COMBINE_TILE": 256, "_COMBINE_UNROLL": 2}
    with triton_runner.watched(device), mock.patch.multiple(backend, **small):
        yield backend


#: Tensors on the device under test.
place = functools.partial(placed.place, device=device)


def call(regime: str, state: dict[str, Tensor], *args: Any) -> list[Any]:
    """Run `update` on the device under test; `state` is updated, and the other arguments come back as it left them.

    Arguments that are one tensor stay one tensor.
    """
    on = {k: place(v) for k, v in state.items()}
    found: dict[int, Any] = {}
    moved = [found.setdefault(id(a), place(a)) for a in args]
    with kernels(regime) as backend:
        call_update(backend.update, *on.values(), *moved)
    for k, v in on.items():
        state[k].copy_(v)
    return [a.cpu() if isinstance(a, Tensor) else a for a in moved]


def two_loop(regime: str, grad: Tensor, s: Tensor, y: Tensor, gamma: float | None = None) -> Tensor:
    """Run `two_loop` on the device under test into an output poisoned with NaN; a flat problem may come as such."""
    g, s, y = place(grad), place(s), place(y)
    out = torch.full_like(g, math.nan)
    with kernels(regime) as backend:
        backend.two_loop(g, s, y, gamma, out)
    return out.cpu()


def filled(batch: int, m: int, n: int, ring: torch.dtype, count: int, vectors: torch.dtype = F64) -> dict[str, Tensor]:
    """A history to which the reference has appended `count` pairs."""
    state = oracle.new_state(batch, m, n, ring)
    s, y = oracle.pairs(max(count, 1), n, batch, vectors, seed=1)
    for k in range(count):
        call_update(reference.update, *state.values(), None, s[:, k], y[:, k], None, 1.0, 1e-12, None, None)
    return state


def step(
    regime: str, state: dict[str, Tensor], vectors: torch.dtype, t: float | Tensor = 0.7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The fused call of an optimizer, in place, against the reference on the same state; updates `state`."""
    batch, _, n = state["s_ring"].shape
    g0, g1 = oracle.vector(n, batch, vectors, 3 * seed + 1), oracle.vector(n, batch, vectors, 3 * seed + 2)
    tt = t[:, None].double() if isinstance(t, Tensor) else t
    d = ((g1.double() - g0.double()) / (0.5 + oracle.vector(n, batch, F64, 9).abs()) / tt).to(vectors)
    want = oracle.copy(state)
    wd, wp = d.clone(), g0.clone()
    call_update(reference.update, *want.values(), g1, wd, g1, wp, t, 1e-7, wd, wp)
    _, gd, _, gp = call(regime, state, g1, d, g1, g0, t, 1e-7, d, g0)[:4]
    oracle.check_state(state, want)
    s, y = oracle.ordered(want)
    size = oracle.bound(g1, s, y, F64) * g1.double().norm(dim=-1) * max(n, 8)
    oracle.check_stats(state["stats"], want["stats"], n, size)
    oracle.check_direction(gd, g1, s, y)
    assert torch.equal(gp, g1), "the previous gradient is to become a copy of the gradient"
    return gd, want["stats"]


# ------------------------------------------------------------------------------------------------------------- update


@case(*((r, t, q) for r in REGIMES for t, q in DTYPES))
def fused_step(regime, vectors, ring):
    state = filled(1, 4, 301, ring, 6, vectors)
    _, stats = step(regime, state, vectors)
    assert stats[0, 6] == 1.0


@case(
    *((r, m, n) for r in REGIMES for m, n in [(1, 1), (3, 1), (1, 33), (7, 2), (5, 128), (2, 701), (17, 129), (33, 65)])
)
def shapes(regime, m, n):
    state = filled(1, m, n, F32, m - 1, F32)
    step(regime, state, F32, seed=1)


@case(*((r,) for r in REGIMES))
def every_offset_and_filling(regime):
    m = 3
    state = oracle.new_state(1, m, 37, F32)
    for k in range(2 * m + 1):
        _, stats = step(regime, state, F32, seed=k)
        assert stats[0, 6] == 1.0
        assert state["count"].item() == min(k + 1, m)
        assert state["head"].item() == (k + 1) % m


@case(*((r,) for r in REGIMES))
def batches_and_step_tensors(regime):
    for t in (0.3, torch.tensor([0.3], dtype=F64), torch.tensor([0.2, 0.9, 1.7], dtype=F64)):
        state = filled(3, 2, 41, BF16, 3, F32)
        step(regime, state, F32, t=t)


@case(*((r,) for r in REGIMES))
def problems_of_a_batch_reject_on_their_own(regime):
    n = 29
    state = filled(3, 3, n, F32, 4, F32)
    s, y = (x[:, 0].clone() for x in oracle.pairs(1, n, 3, seed=5))
    y[1] = -y[1]
    want = oracle.copy(state)
    call_update(reference.update, *want.values(), None, s, y, None, 1.0, 1e-7, None, None)
    before = oracle.copy(state)
    call(regime, state, None, s, y, None, 1.0, 1e-7, None, None)
    oracle.check_state(state, want)
    assert state["stats"][:, 6].tolist() == [1.0, 0.0, 1.0]
    for name in before:
        if name != "stats":
            assert torch.equal(state[name][1], before[name][1]), name


@case(*((r, q) for r in REGIMES for q in (F32, BF16)))
def append_only(regime, ring):
    n = 83
    state = filled(1, 3, n, ring, 2, F32)
    s, y = (x[:, 0] for x in oracle.pairs(1, n, 1, F32, seed=5))
    for y_prev in (None, oracle.vector(n)):
        want = oracle.copy(state)
        args = (None, s, y if y_prev is None else y + y_prev, y_prev, 1.5, 1e-7, None, None)
        call_update(reference.update, *want.values(), *args)
        call(regime, state, *args)
        oracle.check_state(state, want)
        oracle.check_stats(state["stats"], want["stats"], n)
        assert state["stats"][0, 6] == 1.0
        assert torch.all(state["stats"][0, [0, 1, 2, 7]] == 0)


@case(*((r, c) for r in REGIMES for c in (0, 2, 5)))
def direction_only(regime, count):
    n = 97
    state = filled(1, 4, n, F32, count, F32)
    want, before = oracle.copy(state), oracle.copy(state)
    g = oracle.vector(n)
    expected = torch.empty_like(g)
    call_update(reference.update, *want.values(), g, None, None, None, 1.0, 1e-7, expected, None)
    prev = torch.full_like(g, math.nan)
    got = call(regime, state, g, None, None, None, 1.0, 1e-7, torch.full_like(g, math.nan), prev)
    oracle.check_direction(got[6], g, *oracle.ordered(before))
    assert torch.equal(got[7], g)
    oracle.check_stats(state["stats"], want["stats"], n)
    for name in before:
        if name != "stats":
            assert torch.equal(state[name], before[name]), name
    in_place = call(regime, state, g, None, None, None, 1.0, 1e-7, g, None)[6]
    assert torch.equal(in_place, got[6])


@case(*((r,) for r in REGIMES))
def out_apart_from_inputs(regime):
    n = 301
    state = filled(1, 3, n, F32, 3, F32)
    g, p, s = oracle.vector(n, seed=1), oracle.vector(n, seed=2), oracle.vector(n, seed=3)
    y = p + 0.5 * s
    want = oracle.copy(state)
    expected, nan = torch.empty_like(g), torch.full_like(g, math.nan)
    call_update(reference.update, *want.values(), g, s, y, p, 1.0, 1e-7, expected, torch.empty_like(g))
    got = call(regime, state, g, s, y, p, 1.0, 1e-7, nan, nan.clone())
    oracle.check_state(state, want)
    oracle.check_direction(got[6], g, *oracle.ordered(want))
    assert torch.equal(got[7], g)
    assert torch.equal(got[1], s)
    assert torch.equal(got[3], p)


def _spoilt() -> dict[str, tuple[Callable[[Tensor, Tensor], Any], float]]:
    return {
        "negative": (lambda s, y: y.neg_(), 1e-7),
        "zero": (lambda s, y: s.zero_(), 1e-7),
        "nan in s": (lambda s, y: s[:, 3].fill_(math.nan), 1e-7),
        "nan in y": (lambda s, y: y[:, -1].fill_(math.nan), 1e-7),
        "inf in y": (lambda s, y: y[:, 0].fill_(math.inf), 1e-7),
        "below the gate": (lambda s, y: None, 0.999),
    }


@case(*((r, name, q) for r in REGIMES for name, q in zip(_spoilt(), (F32, BF16) * 3, strict=True)))
def rejected_pair_changes_nothing(regime, name, ring):
    n = 45
    spoil, tol = _spoilt()[name]
    state = filled(1, 3, n, ring, 4, F32)
    s, y = (x[:, 0].clone() for x in oracle.pairs(1, n, 1, F32, seed=5))
    spoil(s, y)
    before = oracle.copy(state)
    g = oracle.vector(n)
    got = call(regime, state, g, s, y, None, 1.0, tol, torch.full_like(g, math.nan), None)
    assert state["stats"][0, 6] == 0.0
    for key in before:
        if key != "stats":
            assert torch.equal(state[key], before[key]), key
    oracle.check_direction(got[6], g, *oracle.ordered(before))


@case(*((r,) for r in REGIMES))
def empty_slots_may_hold_nan(regime):
    n = 45
    state = filled(1, 4, n, F32, 2, F32)
    state["s_ring"][:, 2:], state["y_ring"][:, 2:] = math.nan, math.nan
    g = oracle.vector(n)
    got = call(regime, state, g, None, None, None, 1.0, 1e-7, torch.full_like(g, math.nan), None)
    oracle.check_direction(got[6], g, state["s_ring"][:, :2], state["y_ring"][:, :2])
    s, y = (x[:, 0] for x in oracle.pairs(1, n, 1, F32, seed=5))
    got = call(regime, state, g, s, y, None, 1.0, 1e-7, torch.full_like(g, math.nan), None)
    assert state["stats"][0, 6] == 1.0
    oracle.check_direction(got[6], g, state["s_ring"][:, :3], state["y_ring"][:, :3])


@case(*((r,) for r in REGIMES))
def nan_and_infinite_gradients(regime):
    n = 45
    for bad, position in ((math.nan, 0), (math.nan, n - 1), (math.inf, 7)):
        state = filled(1, 2, n, F32, 2, F32)
        before = oracle.copy(state)
        g = oracle.vector(n)
        g[0, position] = bad
        d, previous = oracle.vector(n, seed=4), oracle.vector(n, seed=5)
        got = call(regime, state, g, d, g, previous, 1.0, 1e-7, d, previous)
        assert not torch.isfinite(got[6]).any(), "d is a multiple of g.s in every entry"
        top = state["stats"][0, 2].item()
        assert math.isnan(top) if math.isnan(bad) else top == math.inf
        assert state["stats"][0, 6] == 0.0
        for key in before:
            if key != "stats":
                assert torch.equal(state[key], before[key]), key


@case(*((r,) for r in REGIMES))
def float64_keeps_t_and_tol_in_float64(regime):
    # 0.1 is no float32: a step or a tolerance that went through float32 would show in the ring and in the gate.
    state = oracle.new_state(1, 2, 3, F64)
    s, y = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64), torch.tensor([[2.0, 1.0, 0.5]], dtype=F64)
    call(regime, state, None, s, y, None, 0.1, 1e-7, None, None)
    assert torch.equal(state["s_ring"][0, 0], (s * 0.1)[0])
    cosine = ((s * y).sum() / (s.norm() * y.norm())).item()
    for tol, accepted in ((cosine * (1 + 1e-10), 0.0), (cosine * (1 - 1e-10), 1.0)):
        call(regime, state, None, s, y, None, 1.0, tol, None, None)
        assert state["stats"][0, 6] == accepted


@case()
def results_repeat_bit_for_bit():
    for regime in REGIMES:
        outs = []
        for _ in range(2):
            state = filled(1, 5, 700, F32, 6, F32)
            d, _ = step(regime, state, F32)
            outs.append((d, state))
        assert torch.equal(outs[0][0], outs[1][0])
        assert all(torch.equal(outs[0][1][k], outs[1][1][k]) for k in outs[0][1])


@case(*((r,) for r in REGIMES), slow=True)
def update_with_256_pairs(regime):
    state = filled(1, 256, 40, F32, 255, F32)
    step(regime, state, F32)


# --------------------------------------------------------------------------------------------------------- its parts

PARTS = {  # how parts.check is called
    "whole": {"n": 301},
    "uneven shards": {"n": 301, "cuts": (100, 101), "batch": 2},
    "pair": {"n": 150, "cuts": (31,), "kind": "pair"},
    "direction": {"n": 150, "cuts": (31,), "kind": "direction", "batch": 3},
    "refused": {"n": 77, "refused": True, "cuts": (40,)},
    "empty history": {"n": 77, "kind": "direction", "pairs": 0},
    "more pairs than a tile": {"n": 70, "m": 17, "pairs": 19},
}


@case(*((name,) for name in PARTS))
def update_in_parts(name):
    with kernels("many") as backend:
        parts.check(backend, F32, F32, **PARTS[name], device=device)


@case(*DTYPES[1:])
def update_in_parts_of_dtypes(vectors, ring):
    with kernels("many") as backend:
        parts.check(backend, vectors, ring, m=2, n=150, cuts=(50,), device=device)


@case()
def parts_of_gradients_and_slots_that_hold_anything():
    with kernels("many") as backend:
        parts.check_nan_gradient(backend, 200, 70, device)
        parts.check_slots_that_hold_anything(backend, 90, device)


@case()
def one_update_is_the_same_bits_in_parts():
    whole = parts.filled(1, 4, 701, F32, 6)
    apart, whole = parts.copied(whole, device=device), parts.copied(whole, device=device)
    g = place(oracle.vector(701))
    pair = Pair(0.1 * g, g, None, 0.7)
    outs = [torch.full_like(g, math.nan) for _ in range(4)]
    with kernels("many") as backend:
        backend.update(whole, pair, g, 1e-7, *outs[:2])
        parts.in_parts(backend, [apart], [pair], [g], outs[2:3], outs[3:])
    for got, want in zip((*apart, *outs[2:]), (*whole, *outs[:2]), strict=True):
        assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------------------ two_loop


@case(*((r, t, q) for r in REGIMES for t, q in DTYPES))
def two_loop_dtypes(regime, vectors, ring):
    s, y = oracle.pairs(5, 301, 1, ring)
    g = oracle.vector(301, 1, vectors)
    oracle.check_direction(two_loop(regime, g, s, y), g, s, y)


@case(
    *((r, m, n) for r in REGIMES for m, n in [(1, 1), (3, 1), (1, 257), (7, 2), (2, 128), (16, 70), (17, 33), (33, 65)])
)
def two_loop_shapes(regime, m, n):
    s, y = oracle.pairs(m, n, 1, F32)
    g = oracle.vector(n)
    oracle.check_direction(two_loop(regime, g, s, y), g, s, y)


@case(*((r,) for r in REGIMES))
def two_loop_strides_and_batches(regime):
    batch, m, n = 3, 2, 37
    s, y = oracle.pairs(m, n, batch, F32)
    g = oracle.vector(n, batch)
    wide = torch.full((m, batch, n + 5), math.nan)
    wide[:, :, :n] = s.transpose(0, 1)
    strided = wide.transpose(0, 1)[..., :n]
    assert strided.stride(-1) == 1
    assert not strided.is_contiguous()
    reversed_rows = torch.full((batch, 2 * m, n), math.nan)
    reversed_rows[:, ::2] = y
    want = two_loop(regime, g, s, y)
    oracle.check_direction(want, g, s, y)
    assert torch.equal(two_loop(regime, g, strided, reversed_rows[:, ::2]), want)
    shared = s[:1].expand(batch, m, n)
    oracle.check_direction(two_loop(regime, g, shared, shared * 2), g, shared, shared * 2)


@case(*((r,) for r in REGIMES))
def two_loop_of_a_flat_problem(regime):
    s, y = oracle.pairs(3, 60)
    g = oracle.vector(60)
    assert torch.equal(two_loop(regime, g[0], s[0], y[0]), two_loop(regime, g, s, y)[0])


@case(*((r,) for r in REGIMES))
def two_loop_gamma(regime):
    s, y = oracle.pairs(18, 21, 1, F64)
    g = oracle.vector(21, 1, F64)
    got, want = two_loop(regime, g, s, y, 0.3), oracle.exact(g, s, y, 0.3)
    limit = oracle.bound(g, s, y, F64) * max(1.0, 0.3 / 0.5)  # gamma is 1 / (an average of eigenvalues >= 0.5) there
    assert (got - want).norm() <= limit.max() * 2
    assert (want - oracle.exact(g, s, y)).norm() > 1e-2


@case(*((r, i) for r in REGIMES for i in (0, 9, 17)))
def two_loop_ignores_a_spoilt_pair(regime, i):
    m, n = 18, 23
    g = oracle.vector(n)
    keep = [j for j in range(m) if j != i]
    for spoil in (
        lambda s, y: y[:, i].neg_(),
        lambda s, y: s[:, i, 2].fill_(math.nan),
        lambda s, y: y[:, i, 0].fill_(math.inf),
    ):
        s, y = oracle.pairs(m, n)
        spoil(s, y)
        oracle.check_direction(two_loop(regime, g, s, y), g, s[:, keep], y[:, keep])


@case(*((r,) for r in REGIMES))
def two_loop_with_no_valid_pair(regime):
    for m in (3, 18):
        s = torch.full((1, m, 20), math.nan)
        g = oracle.vector(20)
        assert torch.equal(two_loop(regime, g, s, s), -g)
        assert torch.equal(two_loop(regime, g, s, s, 0.5), -0.5 * g)


@case(*((r,) for r in REGIMES))
def two_loop_in_place(regime):
    for m in (2, 17):
        s, y = oracle.pairs(m, 300)
        g = oracle.vector(300)
        want = two_loop(regime, g, s, y)
        d = place(g.clone())
        with kernels(regime) as backend:
            backend.two_loop(d, place(s), place(y), None, d)
        assert torch.equal(d.cpu(), want)


@case(*((r,) for r in REGIMES), slow=True)
def two_loop_with_256_pairs(regime):
    s, y = oracle.pairs(256, 40)
    g = oracle.vector(40)
    oracle.check_direction(two_loop(regime, g, s, y), g, s, y)


@case()
def public_functions_reach_the_backend():
    import secant

    s, y = (x[0] for x in oracle.pairs(3, 19))
    g = oracle.vector(19)[0]
    with secant.use_backend("triton"):
        d = secant.ops.two_loop(place(g), place(s), place(y)).cpu()
        history = secant.LBFGSHistory(19, 3, device=device)
        for k in range(3):
            assert history.append(place(s[k]), place(y[k])).item() == 1.0
        e = history.direction(place(g)).cpu()
    oracle.check_direction(d[None], g[None], s[None], y[None])
    oracle.check_direction(e[None], g[None], s[None], y[None])


# ---------------------------------------------------------------------------------------------------------------- GPU


@case(*((r,) for r in REGIMES), gpu=True)
def captured_in_a_graph(regime):
    n = 1000
    start = filled(1, 4, n, F32, 5, F32)
    states = [{k: place(v) for k, v in start.items()} for _ in range(2)]
    g = place(oracle.vector(n))
    with kernels(regime) as backend:

        def run(state: dict[str, Tensor], d: Tensor, previous: Tensor) -> None:
            call_update(backend.update, *state.values(), g, d, g, previous, 1.0, 1e-7, d, previous)

        eager = [place(oracle.vector(n, seed=k)) for k in (1, 2)]
        run(states[0], *eager)
        replayed = [place(oracle.vector(n, seed=k)) for k in (1, 2)]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph):
            run(states[1], *replayed)
        graph.replay()
    for a, b in zip((*states[0].values(), *eager), (*states[1].values(), *replayed), strict=True):
        assert torch.equal(a, b)


@case(gpu=True, slow=True)
def more_than_two_to_the_31_elements():
    from secant.kernels.lbfgs import triton as backend

    n, m = 2**30, 3
    state = {k: place(v) for k, v in oracle.new_state(1, m, 1, BF16).items()}
    state["s_ring"] = torch.zeros(1, m, n, dtype=BF16, device=device)
    state["y_ring"] = torch.zeros(1, m, n, dtype=BF16, device=device)
    state["head"].fill_(m - 1)
    s = torch.randn(1, n, device=device).bfloat16().float()
    g = 2 * s
    call_update(backend.update, *state.values(), g, s, g, None, 1.0, 1e-7, d := torch.empty_like(g), None)
    assert state["stats"][0, 6].item() == 1.0
    assert torch.equal(state["s_ring"][0, m - 1].float(), s[0])
    # H y = s: three terms, each rounded, of size |s|, 2 |s| / 2 and |s|.
    assert ((d + s).abs() <= 8 * torch.finfo(F32).eps * s.abs()).all()


@contextlib.contextmanager
def small_tiles() -> Iterator[ModuleType]:
    """The dense update with tiles small enough that a triangle of few rows has several."""
    from secant.kernels.lbfgs import triton_dense

    small = {"_TILE": 16, "_TILE_WARPS": 1, "_BLOCK": 32, "_REDUCE_ROWS": 2} if device.type == "cpu" else {}
    # Of nothing to change, `patch.multiple` makes an error.
    with (
        triton_runner.watched(device),
        mock.patch.multiple(triton_dense, **small) if small else contextlib.nullcontext(),
    ):
        yield triton_dense


def dense_call(*args: Any) -> None:
    with small_tiles() as backend:
        backend.dense_update(*args)


@case((1, F64, "ssbroyden"), (17, F32, "bfgs"), (33, F64, "ssbfgs"), (40, F32, "ssbroyden"), (49, F64, "ssbroyden"))
def dense_update(n: int, dtype: torch.dtype, rule: str) -> None:
    dense.check_run(dense_call, n, dtype, rule, device)


@case((F32,), (F64,))
def dense_update_of_a_spoilt_matrix(dtype: torch.dtype) -> None:
    dense.check_spoilt(dense_call, dtype, device)


@case((F32,), (F64,))
def dense_update_refuses_a_pair(dtype: torch.dtype) -> None:
    dense.check_refused(dense_call, dtype, device)


@case(*((dtype, rule) for dtype in (F32, F64) for rule in dense.RULES))
def dense_update_of_scales_far_from_one(dtype: torch.dtype, rule: str) -> None:
    dense.check_scales(dense_call, dtype, rule, device)


@case((1500, F32, "ssbroyden"), (2049, F64, "ssbroyden"), gpu=True)
def dense_update_of_many_rows(n: int, dtype: torch.dtype, rule: str) -> None:
    dense.check_run(dense_call, n, dtype, rule, device)


if __name__ == "__main__":
    device, names = arguments()
    CASES.run(device, names)
