"""What every backend of the `precond` family offers, as types; the meaning is written down in `reference.py`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: What `step` does: update the Gram averages; all the rest. Both in one call read the gradient once.
GRAMS, APPLY = 1, 2

#: Whose length a step takes, by the number under which kernels know them.
GRAFTS = ("none", "adam", "sgd", "rms")
NONE, ADAM, SGD, RMS = range(4)

#: Root mean square of the entries of a step that is grafted to "rms".
FIXED_RMS = 0.2

#: Squarings of a matrix, by which `newton_inv_root` learns how large its largest eigenvalue is.
SQUARINGS = 5

#: How much farther from I than the step before a step may be before `newton_inv_root` gives the matrix up.
GROWTH = 1.2

#: Columns of a layout.
LAYOUT = ("rows", "columns", "down", "across", "row_stride", "column_stride")


class Tensors(NamedTuple):
    """K tensors that step together, and their states: K entries in each list. An absent one has no elements."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]
    left_root: list[Tensor]
    right_root: list[Tensor]
    step: list[Tensor]


class Rule(NamedTuple):
    """The numbers of a step. `graft` is a place in `GRAFTS`; `rotate` tells SOAP from Shampoo."""

    beta1: float
    beta2: float
    beta_gram: float
    eps: float
    weight_decay: float
    graft: int
    rotate: bool
    maximize: bool


def eps_of(rule: Rule, dtype: torch.dtype) -> float:
    """Return the eps that a step of this dtype adds: none is less than the smallest normal number of the arithmetic."""
    return max(rule.eps, torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).tiny)


class Backend(Protocol):
    """The functions of a backend."""

    def step(
        self, tensors: Tensors, layout: Tensor, lr: float | Tensor, rule: Rule, phases: int, skipped: Tensor
    ) -> None:
        """Update Gram averages and momenta, precondition, graft, and write the parameters back, tile by tile."""

    def newton_schulz(self, x: Tensor, steps: int, a: float, b: float, c: float, eps: float, out: Tensor) -> None:
        """Iterate X <- a X + (b A + c A^2) X with A = X X^T, from x / |x|_F."""

    def newton_inv_root(
        self, a: Tensor, p: int, damping: float, steps: int, tolerance: float, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping |A| I)^(-1/p) by the coupled Newton iteration; see the module for |A| and `info`."""
