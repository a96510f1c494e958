"""The line search of `line_search`, for many problems at once: each in its own phase, with its own numbers.

It is the same search, as a machine of states that are tensors (B,): what `strong_wolfe` keeps in its local names is
kept here, and what it decides by `if` is chosen by masks. The tests hold it to the steps of that generator.

References:
    Those of `line_search`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secant.solvers.line_search import _MAX_BLIND_TRIALS


class Points(NamedTuple):
    """Trials, one for each problem: t, phi(t), phi'(t), all float64 (B,)."""

    t: Tensor
    value: Tensor
    slope: Tensor

    def where(self, mask: Tensor, other: Points) -> Points:
        """Take these where the mask is set, else the others."""
        return Points(*(torch.where(mask, x, y) for x, y in zip(self, other, strict=True)))

    def take(self, places: Tensor) -> Points:
        """Take some of the problems."""
        return Points(*(x.index_select(0, places) for x in self))


class Outcome(NamedTuple):
    """What a trial has brought, (B,) each.

    done: the search has ended. takes_new, takes_start: it ended with this trial, or with the start; else with what was
    kept. keeps_new: this trial is the one that may be returned later, in place of what was kept.
    """

    done: Tensor
    takes_new: Tensor
    takes_start: Tensor
    keeps_new: Tensor


class BatchedStrongWolfe:
    """Searches along B lines at once; see `strong_wolfe`, whose steps it takes.

    Args:
        start: (0, phi(0), phi'(0)). size: (B,), largest component of each direction. noise: (B,), >= 0.
        c1, c2, tolerance, max_evaluations: as there.

    Attributes:
        t: (B,), what each search wants tried next; set by `begin` and `advance`.
    """

    def __init__(
        self,
        batch: int,
        device: torch.device,
        *,
        c1: float = 1e-4,
        c2: float = 0.9,
        tolerance: float = 1e-9,
        max_evaluations: int = 25,
    ) -> None:
        self.c1, self.c2, self.tolerance, self.limit = c1, c2, tolerance, max_evaluations
        zeros = torch.zeros(batch, dtype=torch.float64, device=device)
        nothing = Points(zeros, zeros, zeros)
        self.start = self.last = self.low = self.high = nothing
        self.size = self.noise = self.fraction = self.t = zeros
        self.zooms = self.near_end = self.low_is_first = zeros.bool()
        self.used = self.blind = zeros.int()

    def take(self, places: Tensor) -> None:
        """Go on with some of the problems."""
        for name in ("start", "last", "low", "high"):
            setattr(self, name, getattr(self, name).take(places))
        for name in ("size", "noise", "fraction", "t", "zooms", "near_end", "low_is_first", "used", "blind"):
            setattr(self, name, getattr(self, name).index_select(0, places))

    def begin(self, which: Tensor, value: Tensor, slope: Tensor, t: Tensor, size: Tensor, noise: Tensor) -> None:
        """Begin anew where the mask `which` is set, with a first trial at t."""
        start = Points(torch.zeros_like(value), value, slope)
        self.start = start.where(which, self.start)
        self.last = start.where(which, self.last)
        self.size, self.noise = torch.where(which, size, self.size), torch.where(which, noise, self.noise)
        self.t = torch.where(which, t, self.t)
        self.used = torch.where(which, 0, self.used)
        self.zooms = self.zooms & ~which

    def advance(self, value: Tensor, slope: Tensor) -> Outcome:
        """Take the values and slopes at t, and move t on where a search goes on."""
        finite = value.isfinite() & slope.isfinite()
        new = Points(self.t, torch.where(finite, value, torch.inf), torch.where(finite, slope, torch.nan))
        start, last, noise = self.start, self.last, self.noise
        self.used = self.used + 1
        noisy, spent = noise > 0.0, self.used >= self.limit
        fine = (new.value <= start.value + noise) & (new.slope <= (2.0 * self.c1 - 1.0) * start.slope)
        decreases = (new.value <= start.value + self.c1 * new.t * start.slope) | (noisy & fine)
        is_flat = new.slope.abs() <= -self.c2 * start.slope

        # Algorithm 3.5: lengthen the step until a bracket or an acceptable point appears.
        brackets = ~self.zooms
        rises = ~decreases | ((self.used > 2) & (new.value >= last.value + noise))
        meets = brackets & ~spent & ~rises & is_flat
        enters = brackets & ~spent & ~meets & (rises | (new.slope >= 0.0))
        grows = brackets & ~spent & ~meets & ~enters
        same_start = noisy & (new.value == start.value) & (new.slope == start.slope)
        lower = (new.value < start.value + noise) & ~same_start
        ran_out = brackets & spent
        same_last = noisy & (new.value == last.value) & (new.slope == last.slope)
        longer = self._minimizer(last, new, new.t + 0.01 * (new.t - last.t), 10.0 * new.t)
        longer = torch.where(same_last, 10.0 * new.t, longer)

        # Algorithm 3.6: shrink the bracket. Which end is low is a matter of values alone, but a tie goes to the first.
        zooms, low, high = self.zooms, self.low, self.high
        stands = zooms & noisy & (new.value == low.value) & (new.slope == low.slope)
        worse = zooms & ~stands & (~decreases | (new.value >= low.value + noise))
        found = zooms & ~stands & ~worse & is_flat
        better = zooms & ~stands & ~worse & ~found
        turns = better & (new.slope * (high.t - low.t) >= 0.0)
        # `worse`: the new trial takes the place of the high end, and may be the low one from then on.
        swaps = worse & torch.where(self.low_is_first, new.value < low.value, new.value <= low.value)
        next_high = low.where(turns | swaps, new.where(worse, high))
        next_low = new.where(better | swaps, low)
        first = self.low_is_first ^ swaps
        # Entering: the ends are (last, new).
        first_lower = last.value <= new.value
        next_low = last.where(enters & first_lower, new.where(enters, next_low))
        next_high = new.where(enters & first_lower, last.where(enters, next_high))
        self.low_is_first = torch.where(enters, first_lower, first)
        self.fraction = torch.where(enters | better, 1.0, self.fraction)
        self.near_end = self.near_end & ~enters
        self.blind = torch.where(enters, 0, self.blind)
        self.low, self.high, self.last = next_low, next_high, new.where(grows, last)
        self.zooms = zooms | enters

        going = enters | worse | better
        t, ends = self._shrunk(going)
        ends = stands | ends | (going & (self.used >= self.limit))
        gained = (next_low.value < start.value) | (next_low.slope.abs() < -start.slope) | ~noisy
        self.t = torch.where(grows, longer, torch.where(going & ~ends, t, self.t))

        takes_new = meets | found | (ran_out & lower)
        takes_start = (ran_out & ~lower) | (ends & ~gained)
        # An end may be this very trial.
        keeps_new = grows | better | swaps | (enters & ~first_lower)
        return Outcome(takes_new | takes_start | ends, takes_new, takes_start, keeps_new)

    def _minimizer(self, a: Points, b: Points, least: Tensor, most: Tensor) -> Tensor:
        """Minimize the cubic, or, where the values are equal, follow the secant through the slopes."""
        cubic = cubic_minimizers(a, b, least, most)
        equal = (self.noise > 0.0) & ((a.value - b.value).abs() <= self.noise)
        secant = b.t - b.slope * (b.t - a.t) / (b.slope - a.slope)
        secant = torch.minimum(torch.maximum(secant, least), most)
        return torch.where(equal, torch.where(a.slope != b.slope, secant, most), cubic)

    def _shrunk(self, going: Tensor) -> tuple[Tensor, Tensor]:
        """Return where to look in each bracket, and whether there is no use in it."""
        low, high = self.low, self.high
        left, right = torch.minimum(low.t, high.t), torch.maximum(low.t, high.t)
        narrow = ((right - left) * self.size < self.tolerance) | (right == left)
        infinite = high.value == torch.inf
        self.fraction = torch.where(going & ~narrow & infinite, 0.5 * self.fraction, self.fraction)
        first = low.where(self.low_is_first, high)
        second = high.where(self.low_is_first, low)
        t = self._minimizer(first, second, left, right)
        # Trials may come within a tenth of the width of an end once, and are then put a tenth away from it.
        margin = 0.1 * (right - left)
        inside = torch.minimum(right - t, t - left) >= margin
        once = ~inside & ~self.near_end & (left < t) & (t < right)
        moved = torch.where(right - t < t - left, right - margin, left + margin)
        t = torch.where(inside | once, t, moved)
        self.near_end = torch.where(going & ~narrow & ~infinite, once, self.near_end)
        t = torch.where(infinite, low.t + self.fraction * (high.t - low.t), t)
        blind = going & ~narrow & (-t * self.start.slope <= self.noise)
        self.blind = self.blind + blind
        return t, going & (narrow | (self.blind > _MAX_BLIND_TRIALS))


def cubic_minimizers(a: Points, b: Points, low: Tensor, high: Tensor) -> Tensor:
    """Minimize the cubic through the values and slopes of two points of each problem; see `cubic_minimizer`."""
    ordered = a.t <= b.t
    a, b = a.where(ordered, b), b.where(ordered, a)
    width = b.t - a.t
    d1 = a.slope + b.slope + 3.0 * (a.value - b.value) / width
    square = d1 * d1 - a.slope * b.slope
    d2 = square.clamp_min(0.0).sqrt()
    numerator, denominator = b.slope + d2 - d1, b.slope - a.slope + 2.0 * d2
    straight = torch.where(numerator == 0.0, torch.nan, -torch.copysign(torch.full_like(width, torch.inf), numerator))
    t = torch.where(denominator != 0.0, b.t - width * (numerator / denominator), straight)
    t = torch.where((square >= 0.0) & (width != 0.0), t, torch.nan)
    return torch.where(t.isnan(), 0.5 * (low + high), torch.minimum(torch.maximum(t, low), high))
