"""The CPU kernels against the float64 reference, on every path that they have."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from secant.kernels.lbfgs import cpu, reference

import lbfgs_oracle as oracle
from lbfgs_update import call_update

SHAPES = [(1, 1), (3, 1), (1, 7), (2, 33), (5, 17), (10, 1000), (10, 1025), (17, 4099), (40, 513)]


@pytest.mark.parametrize("ring", oracle.RINGS, ids=str)
@pytest.mark.parametrize("vectors", oracle.VECTORS, ids=str)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_two_loop(m, n, batch, vectors, ring):
    s, y = oracle.pairs(m, n, batch, ring)
    grad = oracle.vector(n, batch, vectors)
    for panel in (0, 1, 2, 5, 16):
        for threads in (1, 2):
            out = torch.full_like(grad, math.nan)
            cpu.two_loop(grad, s, y, None, out, panel=panel, threads=threads)
            oracle.check_direction(out, grad, s, y)


def test_two_loop_of_256_pairs():
    s, y = oracle.pairs(256, 700)
    grad = oracle.vector(700)
    for panel in (1, 16):
        out = torch.full_like(grad, math.nan)
        cpu.two_loop(grad, s, y, None, out, panel=panel)
        oracle.check_direction(out, grad, s, y)


def test_two_loop_with_gamma():
    s, y = oracle.pairs(4, 50, 2, torch.float64)
    grad = oracle.vector(50, 2, torch.float64)
    out = torch.full_like(grad, math.nan)
    cpu.two_loop(grad, s, y, 0.3, out)
    torch.testing.assert_close(out, oracle.exact(grad, s, y, 0.3), rtol=1e-12, atol=1e-12)
    assert (out - oracle.exact(grad, s, y)).norm() > 1e-2  # it matters


@pytest.mark.parametrize("panel", [1, 3, 16])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda s, y, i: y[:, i].neg_(), id="negative curvature"),
        pytest.param(lambda s, y, i: y[:, i].zero_(), id="zero"),
        pytest.param(lambda s, y, i: s[:, i, 2].fill_(math.nan), id="nan in s"),
        pytest.param(lambda s, y, i: y[:, i, 0].fill_(math.inf), id="inf in y"),
        pytest.param(lambda s, y, i: s[:, i, -1].fill_(-math.inf), id="inf in s"),
    ],
)
def test_two_loop_ignores_a_spoilt_pair(spoil, panel):
    m, n = 6, 45
    grad = oracle.vector(n)
    for i in range(m):
        s, y = oracle.pairs(m, n)
        spoil(s, y, i)
        keep = [j for j in range(m) if j != i]
        out = torch.full_like(grad, math.nan)
        cpu.two_loop(grad, s, y, None, out, panel=panel)
        oracle.check_direction(out, grad, s[:, keep], y[:, keep])


def test_two_loop_with_no_valid_pair_is_the_gradient():
    s, y = oracle.pairs(3, 20)
    grad = oracle.vector(20)
    for panel in (1, 2, 16):
        out = torch.full_like(grad, math.nan)
        cpu.two_loop(grad, s, -y, None, out, panel=panel)
        assert torch.equal(out, -grad)


def test_two_loop_in_place_and_with_row_strides():
    wide = torch.randn(2, 12, 90, generator=torch.Generator().manual_seed(0))
    s = wide[:, ::2, 3:80]
    y = 1.5 * s
    assert s.stride(-1) == 1
    grad = oracle.vector(77, 2)
    want = grad.clone()
    cpu.two_loop(want, s, y, None, want)
    oracle.check_direction(want, grad, s, y)


@pytest.mark.parametrize("ring", oracle.RINGS, ids=str)
@pytest.mark.parametrize("vectors", oracle.VECTORS, ids=str)
@pytest.mark.parametrize(("m", "n", "batch"), [(1, 1, 1), (3, 17, 1), (4, 3, 5), (10, 1030, 1), (5, 2049, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_update_follows_the_reference_around_the_ring(m, n, batch, vectors, ring, threads):
    """Fused steps from empty to twice around, with pairs that the gate must refuse in between."""
    mine, want = (oracle.new_state(batch, m, n, ring) for _ in range(2))
    hessian = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x = oracle.vector(n, batch, vectors, seed=1)
    grad = (hessian * x).to(vectors)
    direction, previous = -grad, grad.clone()
    tol = torch.finfo(vectors).eps
    for k in range(2 * m + 3):
        t = 0.1 + 0.05 * k
        step = direction * t
        grad = (grad + hessian * step).to(vectors)
        if k % 4 == 3:
            grad[0] = 2 * previous[0] - grad[0]  # y -> -y: the first problem of the batch is refused
        if k == 5:
            grad[-1, 0] = math.nan
        before = oracle.copy(mine)
        outputs = [(direction.clone(), previous.clone()) for _ in range(2)]
        for state, (d, p), update, extra in (
            (mine, outputs[0], cpu.update, {"threads": threads}),
            (want, outputs[1], reference.update, {}),
        ):
            call_update(update, *state.values(), grad, d, grad, p, t, tol, d, p, **extra)
        products = oracle.FLOAT_RUNS if (vectors, ring) == (torch.float32, torch.bfloat16) else 0.0
        oracle.check_state(mine, want, products)
        s, y = oracle.ordered(want)
        good = torch.isfinite(grad).all(-1)
        size = oracle.bound(grad, s, y, torch.float64, products) * grad.double().norm(dim=-1)
        oracle.check_stats(mine["stats"], want["stats"], n)
        assert torch.all(((mine["stats"][:, 0] - want["stats"][:, 0]).abs() <= size) | ~good)
        assert torch.equal(outputs[0][1].nan_to_num(nan=7), grad.nan_to_num(nan=7)), "prev_out"
        d = outputs[0][0]
        oracle.check_direction(d[good], grad[good], s[good], y[good])
        assert not torch.isfinite(d[~good]).all(-1).any()
        refused = mine["stats"][:, 6] == 0
        assert refused[0] == (k % 4 == 3 or (k == 5 and batch == 1)) or refused.any()
        for name in ("s_ring", "y_ring", "sy", "yy", "head", "count"):
            assert torch.equal(mine[name][refused], before[name][refused]), f"{name} changed by a refused pair"
        direction, previous = torch.where(good[:, None], d, -x), grad
        if not good.all():
            grad = previous = torch.where(good[:, None], grad, (hessian * x).to(vectors))
            direction = -grad


def test_append_alone_and_direction_alone():
    m, n = 4, 300
    s, y = oracle.pairs(m, n)
    state, want = (oracle.new_state(1, m, n, torch.float32) for _ in range(2))
    for i in range(m):
        for st, update in ((state, cpu.update), (want, reference.update)):
            call_update(update, *st.values(), None, s[:, i], y[:, i], None, 1.0, 1e-7, None, None)
    oracle.check_state(state, want)
    grad = oracle.vector(n)
    out = torch.full_like(grad, math.nan)
    before = oracle.copy(state)
    call_update(cpu.update, *state.values(), grad, None, None, None, 1.0, 1e-7, out, None)
    oracle.check_direction(out, grad, s, y)
    for name in ("s_ring", "y_ring", "sy", "yy", "head", "count"):
        assert torch.equal(state[name], before[name])
    assert state["stats"][0, 3:7].tolist() == [0, 0, 0, 0]


def test_step_length_as_a_tensor():
    n, batch = 40, 3
    hessian = torch.linspace(0.5, 2, n)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    d, g = oracle.vector(n, batch), oracle.vector(n, batch, seed=3)
    for lengths in (t, t[:1]):
        y = hessian * d * lengths.float()[:, None]
        mine, want = (oracle.new_state(batch, 2, n, torch.float32) for _ in range(2))
        outs = [torch.full_like(g, math.nan) for _ in range(2)]
        for st, out, update in ((mine, outs[0], cpu.update), (want, outs[1], reference.update)):
            call_update(update, *st.values(), g, d, y, None, lengths, 1e-7, out, None)
        oracle.check_state(mine, want)
        assert mine["stats"][:, 6].tolist() == [1, 1, 1]


def test_the_gate_is_relative():
    """A tiny pair enters, a large one that is nearly orthogonal does not."""
    n = 64
    s = oracle.vector(n)
    orthogonal = torch.roll(s, n // 2, -1) * torch.cat([torch.ones(n // 2), -torch.ones(n // 2)])
    for pair, accepted in (((1e-18 * s, 1e-18 * s), 1), ((1e10 * s, 1e10 * orthogonal + 1e-8 * s), 0)):
        state = oracle.new_state(1, 2, n, torch.float32)
        call_update(cpu.update, *state.values(), None, *pair, None, 1.0, 1e-7, None, None)
        assert state["stats"][0, 6] == accepted


def test_bfloat16_rounds_to_nearest_even_like_torch():
    bits = torch.arange(0, 2**16, dtype=torch.int32) * 2**15 + 12345  # a sweep over signs, exponents and ties
    values = torch.cat([bits.view(torch.float32), (bits // 2**16 * 2**16 + 2**15).view(torch.float32)])
    values = values[torch.isfinite(values) & (values.abs() < 1e18) & (values.abs() > 1e-18)][None]
    state = oracle.new_state(1, 1, values.shape[-1], torch.bfloat16)
    call_update(cpu.update, *state.values(), None, values, values, None, 1.0, 0.0, None, None)
    assert state["stats"][0, 6] == 1
    assert torch.equal(state["s_ring"][0, 0], values[0].bfloat16())


def test_the_same_input_gives_the_same_bits():
    s, y = oracle.pairs(10, 50_000)
    grad = oracle.vector(50_000)
    outs = [torch.empty_like(grad) for _ in range(3)]
    for out in outs:
        cpu.two_loop(grad, s, y, None, out, threads=2)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_problem_has_the_same_bits_wherever_it_stands_in_the_batch():
    s, y = oracle.pairs(5, 64, 9)
    grad = oracle.vector(64, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    a, b = torch.empty_like(grad), torch.empty_like(grad)
    cpu.two_loop(grad, s, y, None, a)
    cpu.two_loop(grad[order], s[order], y[order], None, b)
    assert torch.equal(a[order], b)


@pytest.mark.parametrize("ring", oracle.RINGS, ids=str)
@pytest.mark.parametrize("vectors", oracle.VECTORS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 3), (5, 64), (10, 65), (3, 1030), (2, 9000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_its_problems_one_by_one_to_the_bit(m, n, vectors, ring, threads):
    """Steps, directions and pairs alone; pairs refused in one problem at a time put the rings at different offsets."""
    batch = 5
    together = oracle.new_state(batch, m, n, ring)
    apart = [oracle.new_state(1, m, n, ring) for _ in range(batch)]
    s, y = oracle.pairs(m + 4, n, batch, vectors)
    for k in range(m + 4):
        y[k % batch, k] *= -1  # refused
        grad, previous = oracle.vector(n, batch, vectors, seed=k), torch.zeros(batch, n, dtype=vectors)
        pair = (s[:, k].contiguous(), y[:, k].contiguous())
        for given in ((grad, *pair, previous), (grad, None, None, None), (None, *pair, None)):
            outs = [None if given[0] is None else torch.full((b, n), math.nan, dtype=vectors) for b in (batch, batch)]
            call_update(cpu.update, *together.values(), *given, 0.5, 1e-7, outs[0], None, threads=threads)
            for b, state in enumerate(apart):
                one = (None if x is None else x[b : b + 1] for x in (*given, outs[1]))
                *given_one, out = one
                call_update(cpu.update, *state.values(), *given_one, 0.5, 1e-7, out, None, threads=1)
            for name, value in together.items():
                assert torch.equal(value, torch.cat([state[name] for state in apart])), name
            assert outs[0] is None or torch.equal(*outs)
            if given[1] is not None:
                assert together["stats"][:, 6].tolist() == [float(b != k % batch) for b in range(batch)]


@pytest.mark.parametrize("vectors", oracle.VECTORS, ids=str)
def test_the_largest_entry_counts_wherever_it_stands(vectors):
    n = 37
    grad = oracle.vector(n, 1, vectors).clamp(-1, 1)
    state = oracle.new_state(1, 2, n, vectors)
    for i in range(n):
        spiked = grad.clone()
        spiked[0, i] = -100 - i
        call_update(cpu.update, *state.values(), spiked, None, None, None, 1.0, 1e-7, torch.empty_like(grad), None)
        assert state["stats"][0, 2] == 100 + i
        spiked[0, i] = math.nan
        call_update(cpu.update, *state.values(), spiked, None, None, None, 1.0, 1e-7, torch.empty_like(grad), None)
        assert torch.isnan(state["stats"][0, 2])


def test_an_unknown_instruction_set_is_an_error():
    code = "from secant import _cpu"
    env = os.environ | {"SECANT_ISA": "sse9"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.returncode != 0
    assert "SECANT_ISA: expected one of" in out.stderr
    assert "'sse9'" in out.stderr
