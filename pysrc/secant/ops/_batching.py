"""Gradients that torch.autograd batches by itself: is_grads_batched, vectorize=True, check_batched_grad.

Those batches are made of tensors that are older than torch.func: a kernel finds no address behind them, and the
batching rule of an autograd function is not asked. Here it is: the batch dimension becomes one of the tensor's own, the
function's rule `vmap` runs on it, and the results are wrapped again. Several levels become one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from secant.ops import _gate


class _Info(NamedTuple):
    """What a batching rule is told (see torch.autograd.Function.vmap)."""

    batch_size: int
    randomness: str = "error"


def _unwrapped(x: Tensor, level: int) -> Tensor | None:
    """`x` with its batch dimension of this level in front, None where it has none."""
    # A tensor without this level is expanded to whatever size is asked for.
    a, b = (torch._remove_batch_dim(x, level, size, 0) for size in (2, 3))
    return a if len(a) == len(b) else None


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply`, by the function's rule `vmap` where an argument is an older batching tensor."""
    if not any(isinstance(x, Tensor) and _gate.is_batched(x) for x in args):
        return function.apply(*args)
    top = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    sizes: dict[int, int] = {}  # by level, outermost first
    plain, levels = list(args), [set[int]() for _ in args]
    for level in range(top, 0, -1):
        for i, x in enumerate(plain):
            if isinstance(x, Tensor) and _gate.is_batched(x) and (inner := _unwrapped(x, level)) is not None:
                plain[i] = inner
                levels[i].add(level)
                sizes = {level: len(inner)} | sizes
    batch = tuple(sizes.values())
    for i, x in enumerate(plain):
        if levels[i]:
            own = [size if level in levels[i] else 1 for level, size in sizes.items()]
            rest = x.shape[len(levels[i]) :]
            plain[i] = x.reshape(*own, *rest).expand(*batch, *rest).reshape(-1, *rest)
    dims = tuple(0 if found else None for found in levels)
    results, places = function.vmap(_Info(math.prod(batch)), dims, *plain)

    def wrapped(x: Tensor, place: int) -> Tensor:
        # These batches take views only where the batch is the outermost dimension in memory.
        x = x.movedim(place, 0).contiguous()
        x = x.view(*batch, *x.shape[1:])
        for level in sizes:
            x = torch._add_batch_dim(x, 0, level)
        return x

    if isinstance(results, Tensor):
        return wrapped(results, places)
    return tuple(wrapped(x, place) for x, place in zip(results, places, strict=True))
