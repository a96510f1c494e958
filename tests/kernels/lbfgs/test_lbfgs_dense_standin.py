"""cuda_dense.cu, run on the CPU by csrc/standin/cuda_on_cpu.h, against the reference in float64.

The device has three multiprocessors, so that six blocks share the tiles of a triangle and none has a whole row of them.
"""

from __future__ import annotations

import faulthandler
import os
from typing import Any

import pytest
import torch
from secant.kernels.lbfgs import plan
from secant.kernels.lbfgs.contract import RULES, Pair
from torch.utils._python_dispatch import TorchDispatchMode

import lbfgs_dense as dense
from reruns import under_address_sanitizer

F32, F64 = torch.float32, torch.float64
TABLE = """
#define SECANT_ROW(TAG, T) SECANT_LBFGS_DENSE_TABLE(SECANT_STANDIN_ROW, TAG)
#define SECANT_STANDIN_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
static const secant_standin::Kernel kKernels[] = {SECANT_LBFGS_DENSE(SECANT_ROW)};
SECANT_STANDIN_EXPORT(kKernels)
"""
NO_PAIRS = "#define SECANT_LBFGS_PAIRS(X)"
SMALL = plan.Device(multiprocessors=3, shared=100_000)
dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("lbfgs", TABLE, before=NO_PAIRS)


@pytest.fixture
def launcher(library, standin_driver):
    return lambda seed=0: plan.Launcher(standin_driver(library, SMALL, seed))


@pytest.fixture(params=[plan.FEW_TILES, 0], ids=["one launch", "three launches"])
def launches(request, monkeypatch):
    """Launches of a call of few tiles."""
    monkeypatch.setattr(plan, "FEW_TILES", request.param)
    return 1 if request.param else 3


@dtypes
@pytest.mark.parametrize("n", [1, 3, 63, 65, 128, 129, 192, 259, 450])
def test_it_follows_the_reference(launcher, n, dtype):
    """One tile and more, with tails and without; 36 tiles of n = 450 among 6 blocks."""
    on = launcher(seed=n)
    dense.check_run(on.dense_update, n, dtype, RULES[n % 3])
    assert len(on.driver.log) == (1 if n <= 128 else 3) * 9
    grids = [item.grid_x for item in on.driver.log[:3]]
    if n > 128:
        assert grids == [6, min(6, -(-n // 32)), -(-n // 256)]


@dtypes
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(launcher, launches, rule, dtype):
    on = launcher(seed=1)
    dense.check_run(on.dense_update, 100, dtype, rule)
    assert len(on.driver.log) == launches * 9


@dtypes
def test_a_spoilt_matrix_gives_way(launcher, launches, dtype):
    dense.check_spoilt(launcher().dense_update, dtype)


@dtypes
def test_pairs_that_are_refused(launcher, launches, dtype):
    dense.check_refused(launcher().dense_update, dtype)


@dtypes
@pytest.mark.parametrize("rule", RULES)
def test_scales_far_from_one(launcher, rule, dtype):
    dense.check_scales(launcher().dense_update, dtype, rule)


def a_call(n: int, dtype: torch.dtype, t: Any = 0.5) -> tuple[Any, ...]:
    """Arguments of a call that updates, multiplies and decides, from H = I + s s^T / 2 - s w^T / 4 ..."""
    draw = torch.Generator().manual_seed(n)
    state = dense.a_state(n, dtype)
    state.h.copy_(torch.randn(len(state.h), dtype=F64, generator=draw) / n)
    state.h[torch.arange(n) * (torch.arange(n) + 3) // 2] = 2
    state.pair.copy_(torch.randn(2, n, dtype=F64, generator=draw))
    state.coefs.copy_(torch.tensor([0.75, 0.5 / n, -0.25 / n, 0.125 / n, 0.0], dtype=F64))
    s, g, p = (torch.randn(n, dtype=F64, generator=draw).to(dtype) for _ in range(3))
    g = p + s + g / 8
    return state, Pair(s, g, p, t), g, 1e-7, 2, s, p


@dtypes
def test_a_long_vector(launcher, dtype):
    """1,003 rows, so that blocks have whole rows of tiles, too; the order of threads changes no bit."""
    found = []
    for seed in range(2):
        state, pair, g, tol, rule, _, _ = a_call(1003, dtype)
        dense.check_call(launcher(seed).dense_update, dense.copied(state), pair, g, rule, tol, dense.CPU)
        args = a_call(1003, dtype)
        launcher(seed).dense_update(*args)
        assert args[0].stats[6] == 1
        found.append((*args[0], *args[1][:3]))
    assert all(map(torch.equal, *found))


class Forbidding(TorchDispatchMode):
    """Raises where a number of a tensor goes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph", [False, True])
def test_nothing_is_read_back_and_a_workspace_is_reused(launcher, graph):
    """Also while a graph is captured, which has a workspace of its own; t is on the device."""
    on = launcher()
    on.driver.graph = graph
    want, got = (a_call(200, F32, t=torch.tensor([0.5], dtype=F64)) for _ in range(2))
    launcher().dense_update(*want)
    with Forbidding():
        on.dense_update(*got)
    on.dense_update(*a_call(150, F32))  # what this leaves in the workspace means nothing to the next
    got = a_call(200, F32, t=0.5)
    on.dense_update(*got)
    for x, y in zip((*want[0], *want[1][:3]), (*got[0], *got[1][:3]), strict=True):
        assert torch.equal(x, y)
    assert len(on._workspaces) == (0 if graph else 1)


MUTATIONS = {
    "none": ("", ""),
    "rows of a tile": ("      along = 0.0;\n      __syncthreads();", "      along = 0.0;"),
    "sums along columns": ("    __syncthreads();  // one a tile", "    // one a tile"),
    "two boards in turn": ("int(tile & 1) * (2 * kWarps * kSide)", "0"),
    "sums of the warps": ("    __syncthreads();\n    if (warp == 0 && i < a.n)", "    if (warp == 0 && i < a.n)"),
    "the next group": ("    __syncthreads();  // the next group", "    // the next group"),
    "sums for all": ("  __syncthreads();\n  bool last = true;", "  bool last = true;"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(build_standin, standin_driver, name):
    """One barrier less, and one of six orders of threads shows it; with all of them, none does."""
    old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert not old or text.count(old) == 1
        return text.replace(old, new) if old else text

    library = build_standin("lbfgs", TABLE, edit, NO_PAIRS)

    def detected(seed: int) -> bool:
        child = os.fork()
        if child == 0:
            found = 1
            try:
                faulthandler.disable()  # a crash is an answer here, not news
                torch.set_num_threads(1)
                on = plan.Launcher(standin_driver(library, plan.Device(1, 100_000), seed))
                dense.check_run(on.dense_update, 300, F32, "ssbroyden")
                found = 0
            finally:
                os._exit(found)
        return os.waitpid(child, 0)[1] != 0

    assert any(detected(seed) for seed in range(6)) == bool(old)


@pytest.mark.slow
def test_address_sanitizer():
    names = [
        f"test_it_follows_the_reference[{n}-{dtype}]" for n, dtype in ((1, F64), (65, F32), (192, F64), (259, F32))
    ]
    under_address_sanitizer(__file__, [*names, "test_a_spoilt_matrix_gives_way"])
