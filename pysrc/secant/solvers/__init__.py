"""Line searches, Newton's method and what it is made of: the inner solvers of fits and optimizers."""

from secant.solvers.box import BoxIterate, BoxResult, lbfgs_b
from secant.solvers.cg import CGResult, cg, steihaug
from secant.solvers.cubic import CubicStep, cubic
from secant.solvers.damping import NielsenDamping
from secant.solvers.forcing import ForcingTerm
from secant.solvers.krylov import KrylovModel
from secant.solvers.line_search import LineSearch, LineSearchResult, Trial, cubic_minimizer, run, strong_wolfe
from secant.solvers.newton import Direction, NewtonResult, newton
from secant.solvers.nystrom import Nystrom, nystrom
from secant.solvers.trust_region import TrustRegionStep, more_sorensen

__all__ = [
    "BoxIterate",
    "BoxResult",
    "CGResult",
    "CubicStep",
    "Direction",
    "ForcingTerm",
    "KrylovModel",
    "LineSearch",
    "LineSearchResult",
    "NewtonResult",
    "NielsenDamping",
    "Nystrom",
    "Trial",
    "TrustRegionStep",
    "cg",
    "cubic",
    "cubic_minimizer",
    "lbfgs_b",
    "more_sorensen",
    "newton",
    "nystrom",
    "run",
    "steihaug",
    "strong_wolfe",
]
