"""Families of cases: a file each, which has the cases, the peers and the bars, and no machinery.

A new family is a file with a `FAMILY` here and its name in `NAMES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from secant.benchmarks.case import Bar, Case, Row, Wanted, everything
from secant.benchmarks.measure import measure
from secant.benchmarks.report import Table, rows_table

NAMES = ("lbfgs", "blocks", "hvp", "precond", "curvature", "residuals", "newton", "batched", "training")
#: Those that take an hour, and run only where they are asked for by name.
LONG = ("training",)


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


class Choice(NamedTuple):
    """What a call wants of a family with many runs.

    tasks, optimizers: by name; none: all of them. starts: of each task; 0: as the family has it. runs: the file in
    which finished runs are kept. allows: asked before each run, by its label, whether there is time. advance: told
    which share of a group is done, and the label of the run.
    """

    tasks: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    starts: int = 0
    runs: Path | None = None
    allows: Callable[[str], bool] = lambda label: True
    advance: Callable[[float, str], None] = lambda share, label: None


def one_table(title: str, rows: Sequence[Row], bandwidth: float | None, bars: Sequence[Bar] = ()) -> list[Table]:
    """Show all rows in one table."""
    return [rows_table(title, rows, bandwidth, bars)]


class Family(NamedTuple):
    """What the command asks of a family.

    title: of its table. seconds: of timing for each group. bars: of (rows, device, bandwidth), what was to be reached
    and what these rows have. measure: makes the rows of a group. choose: makes the family of a choice, where it has
    many runs. tables: of (title, rows, bandwidth, bars).
    """

    title: str
    seconds: float
    groups: Groups
    bars: Callable[[Sequence[Row], torch.device, float], list[Bar]]
    measure: Measure = measure
    choose: Callable[[Choice], Family] | None = None
    tables: Callable[[str, Sequence[Row], float | None, Sequence[Bar]], list[Table]] = one_table


def load(name: str) -> Family:
    """Import the family of this name."""
    family: Family = importlib.import_module(f"secant.benchmarks.families.{name}").FAMILY
    return family
