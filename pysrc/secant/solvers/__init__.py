"""Line searches and the other inner solvers of the optimizers."""

from secant.solvers.cg import CGResult, cg, steihaug
from secant.solvers.line_search import Step, Trial, cubic_minimizer, strong_wolfe

__all__ = ["CGResult", "Step", "Trial", "cg", "cubic_minimizer", "steihaug", "strong_wolfe"]
