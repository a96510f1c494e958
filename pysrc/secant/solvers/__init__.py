"""Line searches and the other inner solvers of the optimizers."""

from secant.solvers.line_search import Step, Trial, cubic_minimizer, strong_wolfe

__all__ = ["Step", "Trial", "cubic_minimizer", "strong_wolfe"]
