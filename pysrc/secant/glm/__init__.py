"""Generalised linear models fitted by second-order methods: `fit`."""

from secant.glm.fitting import fit
from secant.glm.result import GLMResult
from secant.result import Iteration

__all__ = ["GLMResult", "Iteration", "fit"]
