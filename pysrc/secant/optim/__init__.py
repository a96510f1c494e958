"""torch.optim.Optimizer classes, one file each."""

from secant.optim.lbfgs import LBFGS
from secant.optim.levenberg_marquardt import LevenbergMarquardt

__all__ = ["LBFGS", "LevenbergMarquardt"]
