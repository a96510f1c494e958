"""On a real GPU: every GPU backend with the bits of the reference on the CPU, in graphs, never synchronising."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.search.contract import ENDED, FLAGS, RUNNING, STATUS, Search

import search_cases as search
from search_cases import F32, F64
from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = torch.device("cuda", 0)
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
def test_a_call_is_that_of_the_reference(backend, dtype, seed):
    rule = search.RULE._replace(ftol=0.1 * (seed % 2))
    search.advance(backend, 20_000, 10, dtype, seed=seed, rule=rule, device=DEVICE)
    search.begin(backend, 20_000, 10, dtype, seed=seed, rule=rule, first=seed % 2 == 0, device=DEVICE)


def test_steps_are_those_of_the_generator(backend):
    search.steps_of_the_generator(backend, search.SETTINGS[::3], device=DEVICE)
    search.random_lines(backend, device=DEVICE)


def test_every_size_and_row(backend):
    search.sizes(backend, device=DEVICE)
    search.some_rows(backend, device=DEVICE)
    search.limits(backend, device=DEVICE)
    search.long_slopes(backend, device=DEVICE)
    search.neighbours(backend, device=DEVICE)


@DTYPES
def test_graph_of_a_round(backend, dtype):
    """Captured once, replayed from the state of the start, with the bits of a call; nothing synchronises."""
    given, (value, grad) = search.a_state(500, 10, dtype, 0)
    value, grad = value.to(DEVICE), grad.to(DEVICE)
    slope, g_max = -torch.ones(500, dtype=F64, device=DEVICE), torch.ones(500, dtype=F64, device=DEVICE)

    def call(state):
        backend.advance(state, value, grad, None, search.RULE)
        backend.begin(state, slope, g_max, None, None, search.RULE)

    def placed():
        return Search(*(x.to(DEVICE, copy=True) for x in given))

    want, state = placed(), placed()
    call(placed())  # compiles and plans
    torch.cuda.synchronize()
    with watched(DEVICE):
        call(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(state)
    for _ in range(2):
        for x, old in zip(state, given, strict=True):
            x.copy_(old)
        graph.replay()
        for name, x, y in zip(Search._fields, state, want, strict=True):
            search.assert_same(x.cpu(), y.cpu(), None, name)
    assert bool(((want.counts[FLAGS] & ENDED) == 0).all())
    assert bool((want.counts[STATUS] == RUNNING).any())
