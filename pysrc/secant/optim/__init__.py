"""torch.optim.Optimizer classes, one file each."""

from secant.optim.lbfgs import LBFGS
from secant.optim.levenberg_marquardt import LevenbergMarquardt
from secant.optim.natural_gradient import NaturalGradient

__all__ = ["LBFGS", "LevenbergMarquardt", "NaturalGradient"]
