"""On a real GPU: the CUDA backends by LAPACK's ratios for every n, in graphs, on other streams, never synchronising."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.blocks import reference

from block_matrices import (
    HALF,
    REAL,
    THRESHOLD,
    bad_general,
    bad_spd,
    bad_symmetric,
    eigen_ratio,
    general_families,
    generator,
    inverse_ratio,
    orthogonality_ratio,
    permutations,
    poisoned,
    random_general,
    random_spd,
    random_symmetric,
    run_abs_inv,
    run_eigh,
    run_inv,
    run_inv_root,
    run_solve,
    solve_ratio,
    spd_families,
    symmetric_families,
)
from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda", 0)
SIZES = range(1, 65)
#: One n of each mapping: a thread a matrix, three and two matrices a warp, one, two warps a matrix.
MAPPINGS = [3, 10, 14, 29, 37, 64]


def on_device(families: dict[str, torch.Tensor]) -> torch.Tensor:
    """All blocks of all families, in one batch."""
    return torch.cat(list(families.values())).to(DEVICE)


def right_sides(a: torch.Tensor, k: int) -> torch.Tensor:
    return torch.randn(len(a), a.shape[1], k, generator=generator("b", k), dtype=F64).to(a)


@pytest.mark.parametrize("n", SIZES)
def test_inverse_and_solve(backend, n):
    for dtype in REAL:
        for spd, families in ((True, spd_families), (False, general_families)):
            a = on_device(families(n, dtype))
            x, info = run_inv(backend, a, spd=spd)
            assert not info.any()
            assert inverse_ratio(a, x) < THRESHOLD
            if spd:
                assert torch.equal(x, x.mT)
            for k in (1, 3, 19):
                b = right_sides(a, k)
                x, info = run_solve(backend, a, b, spd=spd)
                assert not info.any()
                assert solve_ratio(a, x, b) < THRESHOLD


@pytest.mark.parametrize("n", SIZES)
def test_eigenvalues(backend, n):
    for dtype in REAL:
        a = on_device(symmetric_families(n, dtype))
        w, v, info = run_eigh(backend, a.tril() + torch.full_like(a, torch.nan).triu(1))
        assert not info.any()
        assert (w.diff(dim=-1) >= 0).all()
        assert orthogonality_ratio(v) < THRESHOLD
        assert eigen_ratio(a, w, v) < THRESHOLD


@pytest.mark.parametrize("n", SIZES)
def test_functions_of_eigenvalues(backend, n):
    """Against float64. With |f| <= F and condition 20 the function moves by a few n eps 20 F."""
    for dtype in REAL:
        a, positive = (f(n, dtype, 3, 20.0).to(DEVICE) for f in (random_symmetric, random_spd))
        for got, expected in (
            (run_abs_inv(backend, a, 0.1), run_abs_inv(reference, a.double(), 0.1)),
            *(
                (
                    run_inv_root(backend, positive, p, 0.5, True),
                    run_inv_root(reference, positive.double(), p, 0.5, True),
                )
                for p in (1, 2, 4)
            ),
        ):
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[0], got[0].mT)
            largest = torch.linalg.matrix_norm(expected[0], 2).max()
            assert (got[0] - expected[0]).abs().max() <= 64 * n * torch.finfo(dtype).eps * largest


CALLS = {
    "inv, spd": lambda backend, a: run_inv(backend, a),
    "inv, general": lambda backend, a: run_inv(backend, a, spd=False),
    "solve, spd": lambda backend, a: run_solve(backend, a, a[:, :, :1].clone()),
    "solve, general": lambda backend, a: run_solve(backend, a, torch.cat([a, a], -1), spd=False),
    "eigh": run_eigh,
    "abs_inv": lambda backend, a: run_abs_inv(backend, a, 1e-3),
    "inv_root": lambda backend, a: run_inv_root(backend, a, 2),
}


@pytest.mark.parametrize("n", SIZES)
def test_half_precision_is_float32_rounded_once(backend, n):
    for dtype in HALF:
        a = random_spd(n, dtype, 3, 10.0).to(DEVICE)
        for call in CALLS.values():
            for x, y in zip(call(backend, a), call(backend, a.float()), strict=True):
                assert torch.equal(x, y.to(x.dtype))


def test_every_half_precision_number(backend):
    for dtype in HALF:
        b = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1, 1).to(DEVICE)
        x, _ = run_solve(backend, torch.ones_like(b), b, spd=False)
        assert torch.equal(x.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("n", MAPPINGS)
@pytest.mark.parametrize("name", CALLS)
def test_bad_blocks_spoil_themselves_alone(backend, name, n):
    call = CALLS[name]
    bad = (bad_spd if "spd" in name else bad_general if "general" in name else bad_symmetric)(n, F32)
    good = (random_general if "general" in name else random_spd)(n, F32, 1).to(DEVICE)
    alone = call(backend, good)
    mixed = torch.stack([x for case in bad for x in (case.block.to(DEVICE), good[0])])
    results = call(backend, mixed)
    assert results[-1][::2].tolist() == [case.info for case in bad]
    assert not results[-1][1::2].any()
    for got, expected in zip(results[:-1], alone[:-1], strict=True):
        assert got[::2].isnan().all()
        assert all(torch.equal(x, expected[0]) for x in got[1::2])


@pytest.mark.parametrize("n", [1, 3, 8, 10, 16, 33])
@pytest.mark.parametrize("name", CALLS)
def test_large_batches(backend, name, n):
    """Five different blocks again and again: the same bits everywhere."""
    few = random_spd(n, F32, 5).to(DEVICE)
    for batch in (65_535, 65_536, 65_537):
        which = torch.arange(batch, device=DEVICE) % 5
        for got, expected in zip(CALLS[name](backend, few[which]), CALLS[name](backend, few), strict=True):
            assert torch.equal(got, expected[which])


@pytest.mark.parametrize("n", [3, 16])
def test_more_than_2_to_the_31_elements(backend, n):
    batch = 2**31 // (n * n) + 1000
    if torch.cuda.mem_get_info(DEVICE)[0] < 3 * batch * (n * n * 2 + 4):
        pytest.skip("not enough memory on the device")
    few = random_spd(n, BF16, 4, 10.0).to(DEVICE)
    a = torch.empty(batch, n, n, dtype=BF16, device=DEVICE)
    for i in range(4):
        a[i::4] = few[i]
    x, info = run_inv(backend, a)
    assert not info.any()
    expected = run_inv(backend, few)[0]
    for i in range(4):
        part = x[i::4]
        assert torch.equal(part[-300:], expected[i].expand_as(part[-300:]))
        assert torch.equal(part[:300], expected[i].expand_as(part[:300]))
        assert int((part[:, -1, -1] != expected[i, -1, -1]).sum()) == 0


@pytest.mark.parametrize("n", MAPPINGS)
def test_damping_strides_and_in_place(backend, n):
    a = random_spd(n, F32, 70).to(DEVICE)
    amount = torch.linspace(0.1, 2.0, 70, device=DEVICE)
    for damping in (0.25, amount):
        for scaled in (False, True):
            d = a.clone()
            diagonal = d.diagonal(dim1=1, dim2=2)
            each = damping[:, None] if isinstance(damping, torch.Tensor) else damping
            diagonal.mul_(1 + each) if scaled else diagonal.add_(each)
            for spd in (True, False):
                got, expected = run_inv(backend, a, damping, scaled, spd), run_inv(backend, d, spd=spd)
                torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    apart = torch.full((70, 2, n, n), torch.nan, device=DEVICE)
    apart[:, 1] = a
    expected = run_inv(backend, a)[0]
    assert torch.equal(run_inv(backend, apart[:, 1])[0], expected)
    assert torch.equal(run_inv(backend, a[:1].expand(70, n, n))[0], expected[:1].expand(70, n, n))
    info = poisoned(70, dtype=torch.int32, device=DEVICE)
    out = a.clone()
    backend.inv(out, None, False, True, out, info)
    assert torch.equal(out, expected)
    for k in (1, 12):
        b = right_sides(a, k)
        expected, out = run_solve(backend, a, b)[0], b.clone()
        backend.solve(a, out, None, False, True, out, info)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("n", SIZES)
def test_exact_results(backend, n):
    p = permutations(n, F32).to(DEVICE)
    assert torch.equal(run_inv(backend, p, spd=False)[0], p.mT)
    for size in (1e-30, 1e-8, 3.0, 1e30):
        a = torch.eye(n, device=DEVICE)[None] * size
        x, info = run_inv(backend, a)
        exact = 1 / a[0, 0, 0].double()
        assert not info.any()
        assert (x[0].diagonal() - exact).abs().max() <= 4 * torch.finfo(F32).eps / 2 * exact
    d = torch.logspace(-20, 18, n, dtype=F64, device=DEVICE)
    x, info = run_inv(backend, torch.diag(d).float()[None])
    assert not info.any()
    torch.testing.assert_close(x[0].diagonal().double(), 1 / d, rtol=4 * torch.finfo(F32).eps, atol=0)


@pytest.mark.parametrize("n", MAPPINGS)
@pytest.mark.parametrize("name", CALLS)
def test_graph_replay(backend, name, n):
    """Captured once, replayed on other data, a bad block among it."""
    a = random_spd(n, F32, 300).to(DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CALLS[name](backend, a)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = CALLS[name](backend, a)
    a.copy_(random_spd(n, F32, 300, 7.0, "arithmetic"))
    a[100] = torch.nan
    graph.replay()
    for x, y in zip(results, CALLS[name](backend, a), strict=True):
        assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))
    assert results[-1][100] != 0


@pytest.mark.parametrize("n", MAPPINGS)
@pytest.mark.parametrize("name", CALLS)
def test_no_synchronisation_and_another_stream(backend, name, n):
    a = random_spd(n, F32, 300).to(DEVICE)
    expected = CALLS[name](backend, a)
    late = torch.zeros_like(a)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with watched(DEVICE), torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late.copy_(a)  # a kernel on another stream would find zeros
        results = CALLS[name](backend, late)
    torch.cuda.current_stream().wait_stream(side)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)
