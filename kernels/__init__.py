"""Kernel families: one folder each, every implementation of the same mathematics side by side."""

from secant.kernels.blocks import BACKENDS as _BLOCKS
from secant.kernels.hvp import BACKENDS as _HVP
from secant.kernels.lbfgs import BACKENDS as _LBFGS
from secant.kernels.precond import BACKENDS as _PRECOND
from secant.kernels.search import BACKENDS as _SEARCH

#: Family -> backend -> module path.
FAMILIES: dict[str, dict[str, str]] = {
    "lbfgs": _LBFGS,
    "blocks": _BLOCKS,
    "hvp": _HVP,
    "precond": _PRECOND,
    "search": _SEARCH,
}
