"""Line searches, Newton's method and what it is made of: the inner solvers of fits and optimizers."""

from secant.solvers.box import BoxIterate, BoxResult, lbfgs_b
from secant.solvers.cg import CGResult, cg, steihaug
from secant.solvers.damping import NielsenDamping
from secant.solvers.forcing import ForcingTerm
from secant.solvers.line_search import LineSearch, LineSearchResult, Trial, cubic_minimizer, run, strong_wolfe
from secant.solvers.newton import Direction, NewtonResult, newton

__all__ = [
    "BoxIterate",
    "BoxResult",
    "CGResult",
    "Direction",
    "ForcingTerm",
    "LineSearch",
    "LineSearchResult",
    "NewtonResult",
    "NielsenDamping",
    "Trial",
    "cg",
    "cubic_minimizer",
    "lbfgs_b",
    "newton",
    "run",
    "steihaug",
    "strong_wolfe",
]
