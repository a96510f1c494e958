"""L-BFGS on many problems at once, each with its own pairs, line search, end and failure.

In each round every problem that goes on makes one trial of its line search; all are evaluated in one call. Problems
whose search has ended take the step, offer its pair to their history and begin the next; for the others the pair is
zero, which no history accepts, and their direction is computed again to the same bits. So a round is the same work for
all, whatever each is doing. What has stopped is not evaluated any more, and is taken out once it is a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.ops.history import LBFGSHistory
from secant.result import Status
from secant.solvers.batched_search import BatchedStrongWolfe

#: Problems of which fewer go on than this share are taken out of the state, too.
_FULL = 0.75
_RUNNING = -1

#: (x (b, n), places among all (b,)) -> f (b,) and its gradients (b, n), without a graph.
BatchedFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class BatchedMinimum(NamedTuple):
    """Holds where all problems have ended: x, grad (B, n), value (B,) float64, status, nit, nfev (B,) int32."""

    x: Tensor
    value: Tensor
    grad: Tensor
    status: Tensor
    nit: Tensor
    nfev: Tensor


class _Running(NamedTuple):
    """What is known of the problems in the state; of a line search, also the best trial but for the last."""

    problem: Tensor  # its place among all
    x: Tensor
    value: Tensor
    g: Tensor  # contiguous: written by the history
    d: Tensor
    t_kept: Tensor
    value_kept: Tensor
    g_kept: Tensor
    status: Tensor
    nit: Tensor
    nfev: Tensor

    def take(self, places: Tensor) -> _Running:
        return _Running(*(x.index_select(0, places) for x in self))


def batched_lbfgs(
    evaluate: BatchedFunction,
    x0: Tensor,
    *,
    history_size: int = 20,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by L-BFGS with a strong Wolfe search for each.

    Args:
        evaluate: all that go on at once; rows must not depend on each other. A value or slope that is not finite makes
            the search of its own problem step back.
        x0: (B, n), float32 or float64.
        history_size: pairs. gtol: on the largest component of a gradient. ftol: see `secant.minimize`.
        max_iter, max_nfev: of each problem; evaluations are counted after each search.
        tell: is told how many have stopped, where that has changed.

    Returns:
        `BatchedMinimum`. Each problem ends where it would have ended in any other batch, bit for bit, if `evaluate`
        gives its rows the same bits in both.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization, Math. Program. 45 (1989).
    """
    b, n = x0.shape
    device, eps = x0.device, torch.finfo(x0.dtype).eps
    every = torch.arange(b, device=device)
    value, g = evaluate(x0, every)
    value, counts = value.double(), torch.zeros(b, dtype=torch.int32, device=device)
    usable = value.isfinite() & g.isfinite().all(-1)
    status = torch.where(usable, _RUNNING, int(Status.NOT_FINITE))
    status = torch.where(usable & (g.abs().amax(-1) <= gtol), int(Status.CONVERGED), status).to(torch.int32)
    g = torch.where(usable[:, None], g, 0.0).contiguous()
    now = _Running(
        every, x0.clone(), value, g, -g, torch.zeros_like(value), value, g.clone(), status, counts, counts + 1
    )
    whole = BatchedMinimum(x0.clone(), value.clone(), g.clone(), status.clone(), counts.clone(), counts + 1)
    history = LBFGSHistory(n, history_size, batch=b, dtype=x0.dtype, device=device)
    search = BatchedStrongWolfe(b, device)
    first = (1.0 / g.double().abs().sum(-1)).clamp_max(1.0)
    slope = -g.double().square().sum(-1)
    search.begin(status == _RUNNING, value, slope, first, g.double().abs().amax(-1), eps * value.abs())

    told, places = 0, (now.status == _RUNNING).nonzero()[:, 0]
    while True:
        if len(places) < len(now.problem):
            stopped = (now.status != _RUNNING).nonzero()[:, 0]
            which = now.problem[stopped]
            for target, part in zip(whole, (now.x, now.value, now.g, now.status, now.nit, now.nfev), strict=True):
                target[which] = part[stopped]
            ended = b - len(places)
            if tell is not None and ended > told:
                told = ended
                tell(told)
            if len(places) == 0:
                return whole
            if len(places) < _FULL * len(now.problem):
                now, history = now.take(places), history.take(places)
                search.take(places)
                places = torch.arange(len(places), device=device)

        t = search.t
        trial = now.x + t.to(x0.dtype)[:, None] * now.d
        if len(places) == len(now.problem):
            new_value, new_g = evaluate(trial, now.problem)
            new_value = new_value.double()
        else:
            some_values, some_g = evaluate(trial[places], now.problem[places])
            new_value = torch.full_like(now.value, torch.nan).index_copy_(0, places, some_values.double())
            new_g = now.g.index_copy(0, places, some_g)
        running = now.status == _RUNNING
        outcome = search.advance(new_value, (new_g * now.d).sum(-1).double())
        nfev = now.nfev + running

        keeps = outcome.keeps_new
        t_kept = torch.where(keeps, t, now.t_kept)
        value_kept = torch.where(keeps, new_value, now.value_kept)
        g_kept = torch.where(keeps[:, None], new_g, now.g_kept)
        done = outcome.done & running
        if not bool(done.any()):
            now = now._replace(t_kept=t_kept, value_kept=value_kept, g_kept=g_kept, nfev=nfev)
            continue
        new, back = outcome.takes_new, outcome.takes_start
        t = torch.where(new, t, torch.where(back, 0.0, t_kept))
        t = torch.where(done, t, 0.0)
        moved = t > 0.0
        x = torch.where(moved[:, None], now.x + t.to(x0.dtype)[:, None] * now.d, now.x)
        value = torch.where(moved, torch.where(new, new_value, value_kept), now.value)
        g = torch.where(moved[:, None], torch.where(new[:, None], new_g, g_kept), now.g)
        nit = now.nit + moved
        stats = history.step(g, now.g, now.d, t)  # now.g becomes g, and now.d the next direction

        size = torch.maximum(torch.maximum(value.abs(), now.value.abs()), torch.ones_like(value))
        status = torch.where(done & (nfev >= max_nfev), int(Status.MAX_EVAL), now.status)
        status = torch.where(done & (nit >= max_iter), int(Status.MAX_ITER), status)
        status = torch.where(done & ~(stats.gd < 0.0), int(Status.NO_DESCENT), status)
        status = torch.where(done & ~moved, int(Status.STALLED), status)
        if ftol > 0.0:
            little = moved & ((value - now.value).abs() <= ftol * size)
            status = torch.where(little, int(Status.SMALL_CHANGE), status)
        status = torch.where(moved & (stats.g_max <= gtol), int(Status.CONVERGED), status).to(torch.int32)
        going = done & (status == _RUNNING)
        ones = torch.ones_like(value)
        search.begin(going, value, stats.gd, ones, now.d.abs().amax(-1).double(), eps * value.abs())
        now = _Running(
            now.problem, x, value, now.g, now.d, torch.where(going, 0.0, t_kept), torch.where(going, value, value_kept),
            torch.where(going[:, None], g, g_kept), status, nit, nfev,
        )  # fmt: skip
        places = (status == _RUNNING).nonzero()[:, 0]
