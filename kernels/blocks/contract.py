"""What every backend of the `blocks` family offers, as types; the meaning is written down in `reference.py`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """The functions of a backend."""

    def inv(
        self, a: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping)^-1; see the module for `info`."""

    def solve(
        self, a: Tensor, b: Tensor, damping: float | Tensor | None, scaled: bool, spd: bool, out: Tensor, info: Tensor
    ) -> None:
        """out = (A + damping)^-1 b; see the module for `info`."""

    def eigh(self, a: Tensor, values: Tensor, vectors: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
        """Compute A V = V diag(values), values ascending; see the module for `info`."""

    def abs_inv(self, a: Tensor, floor: float | Tensor, out: Tensor, info: Tensor, basis: Tensor | None = None) -> None:
        """out = V diag(1 / max(|w|, floor)) V^T; see the module for `info`."""

    def inv_root(
        self,
        a: Tensor,
        p: int,
        damping: float | Tensor | None,
        scaled: bool,
        out: Tensor,
        info: Tensor,
        clamped: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        """out = (A + damping)^(-1/p), the symmetric positive definite root; see the module for `info`."""
