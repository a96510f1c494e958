"""L-BFGS on many problems at once, each with its own pairs, line search, end and failure.

In each round every problem that goes on makes one trial of its line search; all are evaluated in one call. Problems
whose search has ended take the step, offer its pair to their history and begin the next; for the others the pair is
zero, which no history accepts, and their direction is computed again to the same bits. So a round is the same work for
all, whatever each is doing, in three launches beside the evaluation, and no value is read back. Every few rounds the
host looks which go on: what has stopped is not evaluated any more, and is taken out once it is a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secant.ops.history import LBFGSHistory
from secant.ops.search import BatchedSearch

#: Problems of which fewer go on than this share are taken out of the state, too.
_FULL = 0.75
#: Rounds between two looks of the host at a device other than itself.
_ROUNDS = 8

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


def few(places: Tensor, all_of: Tensor) -> bool:
    """Tell whether so few go on that the rest is worth taking out."""
    return len(places) < _FULL * len(all_of)


def batched_lbfgs(
    evaluate: BatchedFunction,
    x0: Tensor,
    *,
    history_size: int = 20,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    max_iter: int = 15_000,
    max_nfev: int = 15_000,
    check_every: int | None = None,
    tell: Callable[[int], object] | None = None,
) -> BatchedMinimum:
    """Minimize B functions of n variables by L-BFGS with a strong Wolfe search for each.

    Args:
        evaluate: all that go on at once; rows must not depend on each other. A value or slope that is not finite makes
            the search of its own problem step back.
        x0: (B, n), float32 or float64.
        history_size: pairs. gtol: on the largest component of a gradient. ftol: see `secant.minimize`.
        max_iter, max_nfev: of each problem; evaluations are counted after each search.
        check_every: rounds after which the host looks which problems go on; those that stop in between are evaluated
            till then, for nothing. None: 1 on a CPU, 8 on a device for which the host would have to wait.
        tell: is told how many have stopped, where that has changed.

    Returns:
        `BatchedMinimum`. Each problem ends where it would have ended in any other batch, bit for bit, if `evaluate`
        gives its rows the same bits in both.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization, Math. Program. 45 (1989).
    """
    b, n = x0.shape
    device = x0.device
    value, g = evaluate(x0, torch.arange(b, device=device))
    search = BatchedSearch(x0, value, g, gtol=gtol, ftol=ftol, max_iter=max_iter, max_nfev=max_nfev)
    history = LBFGSHistory(n, history_size, batch=b, dtype=x0.dtype, device=device)
    previous = search.g.clone()  # of the history: what g was before the step
    problem = torch.arange(b, device=device)
    whole = BatchedMinimum(*(torch.empty_like(y) for y in _ends(search)))
    rounds = check_every or (1 if device.type == "cpu" else _ROUNDS)
    told = 0
    while True:
        places = (search.status < 0).nonzero()[:, 0]
        ended = b - len(places)
        if tell is not None and ended > told:
            told = ended
            tell(told)
        if few(places, problem):
            for target, part in zip(whole, _ends(search), strict=True):
                target[problem] = part
            if len(places) == 0:
                return whole
            search, history, previous = search.take(places), history.take(places), previous[places]
            problem = problem[places]
        all_go_on = len(problem) == b - ended
        rows, which = (None, problem) if all_go_on else (places, problem[places])
        for _ in range(rounds):
            # A function may keep what it is given.
            trial = search.trial.clone() if rows is None else search.trial[rows]
            search.advance(*evaluate(trial, which), rows)
            stats = history.step(search.g, previous, search.d, search.step)  # previous becomes g, and d the next one
            search.begin(stats.gd, stats.g_max, rows=rows)


def _ends(search: BatchedSearch) -> BatchedMinimum:
    return BatchedMinimum(search.x, search.value, search.g, search.status, search.nit, search.nfev)
