"""torch.optim.Optimizer classes, one file each."""

from secant.optim.lbfgs import LBFGS

__all__ = ["LBFGS"]
