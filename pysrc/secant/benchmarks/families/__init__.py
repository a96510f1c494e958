"""Families of cases: a file each, which has the cases, the peers and the bars, and no machinery.

A new family is a file with a `FAMILY` here and its name in `NAMES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from secant.benchmarks.case import Bar, Case, Row, Wanted, everything
from secant.benchmarks.measure import measure

NAMES = ("lbfgs", "blocks", "hvp", "curvature", "residuals", "newton")


class Groups(Protocol):
    """Cases of a device, those of a group timed in turns on one input."""

    def __call__(self, device: torch.device, *, quick: bool = False, full: bool = False) -> list[Sequence[Case]]:
        """List them; `quick`: small ones that take no time, to see that they run; `full`: all there are."""


class Measure(Protocol):
    """Makes the rows of cases that share an input, as `measure` does, which is the default."""

    def __call__(
        self, cases: Sequence[Any], device: torch.device, *, seconds: float, wanted: Wanted = everything
    ) -> list[Row]:
        """Return a row for each case and contender."""


class Family(NamedTuple):
    """What the command asks of a family.

    title: of its table. seconds: of timing for each group. bars: of (rows, device, bandwidth), what was to be reached
    and what these rows have. measure: makes the rows of a group.
    """

    title: str
    seconds: float
    groups: Groups
    bars: Callable[[Sequence[Row], torch.device, float], list[Bar]]
    measure: Measure = measure


def load(name: str) -> Family:
    """Import the family of this name."""
    family: Family = importlib.import_module(f"secant.benchmarks.families.{name}").FAMILY
    return family
