"""An update in its three parts, whole and with the elements spread over shards, against the update in one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from secant.kernels.lbfgs import cpu, reference
from secant.kernels.lbfgs.contract import Pair
from torch import Tensor

from lbfgs_parts import F64, copied, filled, in_parts


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["both", "pair", "direction"])
@pytest.mark.parametrize("cuts", [[], [300], [100, 101, 1400]], ids=["whole", "halves", "uneven"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_make_an_update(backend, dtype, kind, cuts, batch):
    m, n = 5, 1500
    whole = filled(batch, m, n, dtype, pairs=7)
    draw = torch.Generator().manual_seed(6)
    g, prev, s = (torch.randn(batch, n, dtype=F64, generator=draw).to(dtype) for _ in range(3))
    s[0] = g[0] - prev[0]  # accepted for sure; the others as it happens
    bounds = [0, *cuts, n]
    columns = [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def pair_of(c: slice) -> Pair | None:
        parts = (x[:, c].contiguous() for x in (s, g, prev))
        return None if kind == "direction" else Pair(*parts, 0.5)

    def grad_of(c: slice) -> Tensor | None:
        return None if kind == "pair" else g[:, c].contiguous()

    shards = [copied(whole, c) for c in columns]
    outs = [None if kind == "pair" else torch.full((batch, c.stop - c.start), math.nan, dtype=dtype) for c in columns]
    prevs = [None if x is None else torch.full_like(x, math.nan) for x in outs]
    in_parts(backend, shards, [pair_of(c) for c in columns], [grad_of(c) for c in columns], outs, prevs)

    want_out = None if kind == "pair" else torch.full((batch, n), math.nan, dtype=dtype)
    want_prev = None if want_out is None else torch.full_like(want_out, math.nan)
    everything = slice(0, n)
    reference.update(whole, pair_of(everything), grad_of(everything), 1e-7, want_out, want_prev)

    eps = torch.finfo(dtype).eps
    for state in shards:
        assert torch.equal(state.head, whole.head)
        assert torch.equal(state.count, whole.count)
        for got, want in zip((state.sy, state.yy, state.stats), (whole.sy, whole.yy, whole.stats), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
    for name in ("s", "y"):
        assert torch.equal(torch.cat([getattr(x, name) for x in shards], -1), getattr(whole, name))
    if want_out is not None:
        # Coefficients are alike to rounding in float64; the rows are combined in dtype: m pairs, two rows each.
        rows = torch.cat(outs, -1)
        size = float(want_out.abs().max())
        torch.testing.assert_close(rows, want_out, rtol=0, atol=(4 * m + 4) * eps * size)
        assert torch.equal(torch.cat(prevs, -1), g)


def test_one_update_is_the_same_bits_in_parts():
    """On one thread the sums are the same, so that nothing else can differ."""
    whole = filled(1, 4, 900, torch.float32, pairs=6)
    parts = copied(whole)
    g = torch.randn(1, 900, generator=torch.Generator().manual_seed(1))
    out, prev, out2, prev2 = (torch.empty(1, 900) for _ in range(4))
    pair = Pair(0.1 * g, g, None, 0.7)
    cpu.update(whole, pair, g, 1e-7, out, prev, threads=1)
    in_parts(cpu, [parts], [pair], [g], [out2], [prev2])
    assert torch.equal(out, out2)
    for got, want in zip(parts, whole, strict=True):
        assert torch.equal(got, want)
