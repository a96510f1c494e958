"""Hessian, GGN and Fisher as linear operators over flat vectors, and what can be learned from their products."""

from secant.curvature._algebra import Damped
from secant.curvature._estimators import Diagonal, Estimate
from secant.curvature._index import Submatrix
from secant.curvature._inverse import Inverse, inverse
from secant.curvature._operator import LinearOperator
from secant.curvature._point import EvaluatedPoint
from secant.curvature._spectrum import SpectralDensity
from secant.curvature.fisher import EmpiricalFisher, Fisher
from secant.curvature.ggn import GGN
from secant.curvature.hessian import Hessian
from secant.curvature.jacobian import Jacobian, per_sample_gradients
from secant.curvature.kfac import EKFAC, KFAC, BlockOperator, KroneckerFactors
from secant.solvers.lanczos import Eigenpairs

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "BlockOperator",
    "Damped",
    "Diagonal",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "EvaluatedPoint",
    "Fisher",
    "Hessian",
    "Inverse",
    "Jacobian",
    "KroneckerFactors",
    "LinearOperator",
    "SpectralDensity",
    "Submatrix",
    "inverse",
    "per_sample_gradients",
]
