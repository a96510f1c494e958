"""On a real GPU: every GPU backend within the bounds of the reference, in graphs, never synchronising."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.precond.contract import APPLY, GRAMS

import precond_cases as precond
from precond_cases import BF16, F16, F32, F64, RULES
from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
TYPES = [(F32, F32), (F32, BF16), (F64, F64), (BF16, F32), (BF16, BF16), (F16, F32)]


@ALL
@pytest.mark.parametrize(("dtype", "storage"), TYPES, ids=str)
def test_a_step_is_that_of_the_reference(backend, rule, dtype, storage):
    precond.compare(backend, dtype, storage, rule, device=DEVICE)
    precond.compare(backend, dtype, storage, rule, device=DEVICE, order="columns")


@pytest.mark.parametrize("name", ["adam", "soap"])
def test_many_tensors(backend, name):
    """More than a launch takes, of every size to 64."""
    shapes = [((m, (7 * m) % 64 + 1), 1, 1, "lr") for m in range(1, 65)] + [
        ((1000, 700), 16, 11, "lr"),
        ((9000,), 1, 5, ""),
    ]
    precond.compare(backend, F32, F32, RULES[name], device=DEVICE, shapes=shapes)


@ALL
def test_hostile_input(backend, rule):
    precond.bad_tiles(backend, F32, rule, device=DEVICE)
    precond.bad_steps(backend, device=DEVICE)
    precond.two_phases(backend, F32, rule, device=DEVICE)
    precond.zeros(backend, F32, rule, device=DEVICE)
    precond.without_eps(backend, F32, rule, device=DEVICE)
    precond.fixed_length(backend, device=DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_newton_schulz(backend, dtype):
    for batch, m, n in ((1, 1, 1), (300, 5, 9), (2, 9, 5), (40, 64, 64), (2, 33, 17), (3, 16, 70), (2, 300, 200)):
        precond.newton_schulz(backend, batch, m, n, dtype, device=DEVICE)
    precond.odd_matrices(backend, device=DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_newton_inv_root(backend, dtype):
    for p in (1, 2, 4):
        for batch, n, rank in ((1, 1, 1), (300, 5, 5), (2, 9, 3), (40, 32, 40), (4, 64, 20), (2, 100, 100)):
            precond.newton_inv_root(backend, batch, n, rank, p, dtype, device=DEVICE)
    precond.odd_roots(backend, device=DEVICE)


@pytest.mark.parametrize("name", ["adam", "soap"])
def test_graph_of_a_step(backend, name):
    """Captured once, replayed from the state of the start, with the bits of a call; nothing synchronises."""
    shapes = [((97, 64), 2, 1, "lr"), ((300,), 1, 1, ""), ((64, 64), 1, 1, "lr")]
    given, layout = precond.tensors(F32, F32, RULES[name], shapes=shapes)

    def placed():
        return type(given)(*([x.to(DEVICE, copy=True) for x in members] for members in given))

    lr, skipped = torch.tensor(0.01, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)

    def call(tensors):
        backend.step(tensors, layout, lr, RULES[name], GRAMS | APPLY, skipped)

    start, want, state = placed(), placed(), placed()
    call(placed())  # compiles and plans
    torch.cuda.synchronize()
    with watched(DEVICE):
        call(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state)
    for _ in range(2):
        for members, olds in zip(state, start, strict=True):
            for x, old in zip(members, olds, strict=True):
                x.copy_(old)
        graph.replay()
        for members, others in zip(state, want, strict=True):
            assert all(map(torch.equal, members, others))
    assert skipped == 0
