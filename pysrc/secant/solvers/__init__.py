"""Line searches and the other inner solvers of the optimizers."""

from secant.solvers.cg import CGResult, cg, steihaug
from secant.solvers.line_search import LineSearchResult, Trial, cubic_minimizer, run, strong_wolfe

__all__ = ["CGResult", "LineSearchResult", "Trial", "cg", "cubic_minimizer", "run", "steihaug", "strong_wolfe"]
