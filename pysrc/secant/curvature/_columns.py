"""Several vectors at once: where that pays, how many, and one after the other where it does not work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from secant.curvature import _errors, _graph

#: In which graphs several vectors are multiplied at once: in all; in those without convolutions, whose backward for
#: several gradients at once takes longer than one after the other; in none.
Together = Literal["always", "without convolutions", "never"]

#: Vectors multiplied at once, and bytes that their intermediate values may take.
_MOST, _BYTES = 32, 2**27


class Product(NamedTuple):
    """A product with rows.

    kind: of which the first that is made at once is compared with one made alone. together: where several pay.
    one: writes the product of a vector. several: writes those of the rows of (k, n).
    """

    kind: str
    together: Together
    one: Callable[[Tensor, Tensor], None]
    several: Callable[[Tensor, Tensor], None]


class Columns:
    """Keeps what an operator knows of products with several vectors.

    Args:
        op: the operator, for messages.

    Attributes:
        said: "together", or why one after the other; None before the first.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.said: str | None = None
        self._values, self._convolves = 0, False
        self._compared: set[str] = set()

    def note(self, found: _graph.Survey) -> None:
        """Remember how large a graph of the operator is, and whether there are convolutions in it."""
        self._values, self._convolves = max(self._values, found.numel), self._convolves or found.convolves

    def multiply(self, product: Product, vectors: Tensor, out: Tensor, mode: str, eps: float) -> None:
        """Write the products of all rows.

        Args:
            mode: of the operator, for messages. eps: of the coarsest precision that the closure computes in.
        """
        if len(vectors) == 1:
            product.one(vectors[0], out[0])
        elif not self._at_once(product, vectors, out, mode, eps):
            for vector, row in zip(vectors.unbind(), out.unbind(), strict=True):
                product.one(vector, row)

    def _at_once(self, product: Product, vectors: Tensor, out: Tensor, mode: str, eps: float) -> bool:
        """Write the products of several rows at a time; return False, and keep in mind why, where that is not done."""
        if self.said not in (None, "together"):
            return False
        if product.together == "never":
            self.said = f"one after the other: as fast in mode '{mode}'"
            return False
        if product.together == "without convolutions" and self._convolves:
            self.said = f"one after the other: as fast in mode '{mode}' with convolutions"
            return False
        # Values of the forward pass, their gradients, and the tangents of both.
        width = min(_MOST, _BYTES // max(1, 4 * self._values * vectors.itemsize))
        if width < 2:
            return False
        try:
            with _batching():
                for some, rows in zip(vectors.split(width), out.split(width), strict=True):
                    product.several(some, rows)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            self.said = f"one after the other: {_errors.reason(self.op, mode, error, ())}"
            return False
        if product.kind not in self._compared:
            alone = torch.empty_like(out[0])
            product.one(vectors[0], alone)
            if not bool(torch.isfinite(alone).all()):  # says nothing; the next time again
                return True
            if not agree(out[0], alone, eps):
                self.said = f"one after the other: {self.op}: mode '{mode}': the first disagrees with its product alone"
                return False
            self._compared.add(product.kind)
        self.said = "together"
        return True


def agree(a: Tensor, b: Tensor, eps: float) -> bool:
    """Return whether two results are equal to half the digits: more than rounding, less than a missing term."""
    return bool((a - b).norm(dtype=torch.float64) <= eps**0.5 * b.norm(dtype=torch.float64))


@contextlib.contextmanager
def _batching() -> Iterator[None]:
    """Have torch raise where it would go through the vectors one by one itself, slowly and with a warning."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
