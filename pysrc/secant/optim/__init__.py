"""torch.optim.Optimizer classes, one file each."""

from secant.optim.bfgs import BFGS
from secant.optim.lbfgs import LBFGS

__all__ = ["BFGS", "LBFGS"]
