"""An update in its three parts, whole or with the elements spread over shards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from secant.kernels.lbfgs import reference
from secant.kernels.lbfgs.contract import EXTRAS, Pair, State
from torch import Tensor

import lbfgs_oracle as oracle

F64 = torch.float64
CPU = torch.device("cpu")
MAX = 6  # the place of max |g_i| among the sums that concern no slot


def a_state(batch: int, m: int, n: int, storage: torch.dtype) -> State:
    rings = [torch.zeros(batch, m, n, dtype=storage) for _ in range(2)]
    grams = [torch.zeros(batch, m, m, dtype=F64) for _ in range(2)]
    counters = [torch.zeros(batch, dtype=torch.int32) for _ in range(2)]
    return State(*rings, *grams, *counters, torch.zeros(batch, 8, dtype=F64))


def copied(state: State, columns: slice = slice(None), device: torch.device = CPU) -> State:
    rings = [x[..., columns].clone(memory_format=torch.contiguous_format).to(device) for x in (state.s, state.y)]
    return State(*rings, *(x.clone().to(device) for x in state[2:]))


def filled(batch: int, m: int, n: int, dtype: torch.dtype, pairs: int, storage: torch.dtype | None = None) -> State:
    draw = torch.Generator().manual_seed(5)
    state = a_state(batch, m, n, dtype if storage is None else storage)
    for k in range(pairs):
        s = torch.randn(batch, n, dtype=F64, generator=draw)
        sign = torch.ones(batch, 1, dtype=F64)
        sign[0] = -1.0 if k == 1 else 1.0  # one that the gate refuses
        pair = Pair(s.to(dtype), (sign * s * torch.linspace(1, 9, n, dtype=F64)).to(dtype), None, 1.0)
        reference.update(state, pair, None, 1e-7, None, None)
    return state


def in_parts(
    backend: Any, shards: list[State], pairs: list[Pair | None], grads: list[Tensor | None], outs: Any, prevs: Any
) -> Tensor:
    """Sums added over the shards (the largest entry is a maximum), everybody solves, each combines its own.

    Returns the sums of each shard.
    """
    batch, m, _ = shards[0].s.shape
    new: dict[str, Any] = {"dtype": F64, "device": shards[0].s.device}
    sums = torch.full((len(shards), batch, 4 * m + EXTRAS), math.nan, **new)
    for one, state, pair, grad in zip(sums, shards, pairs, grads, strict=True):
        backend.dots(state, pair, grad, one)
    total = sums.sum(0)
    total[:, 4 * m + MAX] = sums[:, :, 4 * m + MAX].amax(0)
    for state, pair, grad, out, prev in zip(shards, pairs, grads, outs, prevs, strict=True):
        coefs = torch.full((batch, 2 * m + 2), math.nan, **new)
        backend.solve(state, total.clone(), coefs, 1e-7, pair is not None, grad is not None)
        backend.combine(state, pair, grad, coefs, out, prev)
    return sums


def check_sums(got: Tensor, state: State, pair: Pair | None, grad: Tensor | None) -> None:
    """Against the reference: a sum of n products in another order errs by 2 n u |x| |y| at most, a maximum not at all.

    What there is no pair or no gradient for is 0 to the bit, and so is what an empty slot has.
    """
    batch, m, n = state.s.shape
    want = torch.full_like(got, math.nan)
    reference.dots(state, pair, grad, want)
    rows = torch.stack((state.s, state.y), -2).double().norm(dim=-1)  # (B, m, 2)
    s, y, g = (want[:, 4 * m + k].sqrt() for k in (1, 2, 5))
    slots = torch.cat((rows * g[:, None, None], rows * y[:, None, None]), -1).reshape(batch, -1)
    limit = torch.cat((slots, torch.stack((s * y, s * s, y * y, s * g, y * g, g * g, 0 * g, 0 * g), -1)), -1)
    assert ((got - want).abs() <= 2 * n * torch.finfo(F64).eps * limit).all()


def check(
    backend: Any,
    dtype: torch.dtype,
    storage: torch.dtype,
    *,
    kind: str = "both",
    cuts: tuple[int, ...] = (),
    batch: int = 1,
    m: int = 4,
    n: int = 701,
    pairs: int = 5,
    refused: bool = False,
    device: torch.device = CPU,
) -> None:
    """An update of a history spread over the shards between `cuts`, against the reference of the whole.

    `kind`: "pair", "direction" or "both". The error of the direction is bounded in `oracle.bound`.
    """
    whole = filled(batch, m, n, dtype, pairs, storage)
    draw = torch.Generator().manual_seed(6)
    g, prev = (torch.randn(batch, n, dtype=F64, generator=draw).to(dtype) for _ in range(2))
    s = (g - prev) * torch.linspace(1, 2, n, dtype=dtype) * (-1 if refused else 1)
    t: float | Tensor = 0.7 if batch == 1 else torch.linspace(0.5, 1.5, batch, dtype=F64)

    def pair_of(c: slice, device: torch.device = CPU) -> Pair | None:
        on = (x[:, c].contiguous().to(device) for x in (s, g, prev))
        return None if kind == "direction" else Pair(*on, t.to(device) if isinstance(t, Tensor) else t)

    def grad_of(c: slice, device: torch.device = CPU) -> Tensor | None:
        return None if kind == "pair" else g[:, c].contiguous().to(device)

    columns = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, n))]
    shards = [copied(whole, c, device) for c in columns]
    grads = [grad_of(c, device) for c in columns]
    outs, prevs = ([None if x is None else torch.full_like(x, math.nan) for x in grads] for _ in range(2))
    sums = in_parts(backend, shards, [pair_of(c, device) for c in columns], grads, outs, prevs)
    for one, c in zip(sums.cpu(), columns, strict=True):
        check_sums(one, copied(whole, c), pair_of(c), grad_of(c))

    everything = slice(0, n)
    want_out = None if kind == "pair" else torch.empty(batch, n, dtype=F64)
    reference.update(whole, pair_of(everything), grad_of(everything), 1e-7, want_out, None)
    accepted = 0.0 if refused or kind == "direction" else 1.0
    assert whole.stats[:, 6].tolist() == [accepted] * batch
    names = oracle.new_state(1, 1, 1, F64)
    want = dict(zip(names, whole, strict=True))
    rings = [torch.cat([x[k].cpu() for x in shards], -1) for k in (0, 1)]
    size = None if want_out is None else oracle.bound(g, *oracle.ordered(want), F64) * g.double().norm(dim=-1) * n
    for shard in shards:
        oracle.check_state(dict(zip(names, (*rings, *(x.cpu() for x in shard[2:])), strict=True)), want)
        oracle.check_stats(shard.stats.cpu(), whole.stats, n, size)
    if want_out is not None:
        oracle.check_direction(torch.cat(outs, -1).cpu(), g, *oracle.ordered(want))
        assert torch.equal(torch.cat(prevs, -1).cpu(), g)


def check_nan_gradient(backend: Any, n: int, cut: int, device: torch.device = CPU) -> None:
    """A NaN that one shard of two has is in the largest entry of all, and in no slot's sum with a pair."""
    whole = filled(1, 3, n, torch.float32, 4)
    g = torch.randn(1, n, generator=torch.Generator().manual_seed(7))
    g[0, cut + 1] = math.nan
    columns = [slice(0, cut), slice(cut, n)]
    shards, grads = [copied(whole, c, device) for c in columns], [g[:, c].contiguous().to(device) for c in columns]
    outs = [torch.empty_like(x) for x in grads]
    sums = in_parts(backend, shards, [None, None], grads, outs, [None, None])
    largest = sums[:, 0, 4 * 3 + MAX].cpu()
    assert largest[0] == g[:, :cut].abs().max()
    assert largest[1].isnan()
    for shard in shards:
        assert shard.stats[0, 1:3].isnan().all()
        assert (shard.stats[0, 3:7] == 0).all()
    assert not bool(torch.cat(outs, -1).isfinite().any())


def check_slots_that_hold_anything(backend: Any, n: int, device: torch.device = CPU) -> None:
    """Empty slots, the first among them, may hold NaN: the direction is that of the pairs that there are."""
    first = filled(2, 4, n, torch.float32, 3)  # of the first problem the gate has refused one
    rows = [x.roll(1, 1) for x in (first.s, first.y)]
    whole = State(*rows, *(x.roll((1, 1), (1, 2)) for x in (first.sy, first.yy)), (first.head + 1) % 4, *first[5:])
    for ring in rows:
        ring[:, 0] = ring[0, 3] = math.nan
    state, g = copied(whole, device=device), torch.randn(2, n, generator=torch.Generator().manual_seed(8))
    out = torch.full_like(g, math.nan).to(device)
    in_parts(backend, [state], [None], [g.to(device)], [out], [None])
    for b, end in ((0, 3), (1, 4)):
        one = slice(b, b + 1)
        oracle.check_direction(out[one].cpu(), g[one], whole.s[one, 1:end], whole.y[one, 1:end])
