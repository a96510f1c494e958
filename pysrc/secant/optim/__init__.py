"""torch.optim.Optimizer classes, one file each."""

from secant.optim.adahessian import AdaHessian
from secant.optim.batched_lbfgs import BatchedLBFGS
from secant.optim.bfgs import BFGS
from secant.optim.block_adam import BlockAdam
from secant.optim.cubic_newton import CubicNewton
from secant.optim.kfac import KFAC
from secant.optim.lbfgs import LBFGS
from secant.optim.levenberg_marquardt import LevenbergMarquardt
from secant.optim.muon import Muon
from secant.optim.natural_gradient import NaturalGradient
from secant.optim.newton import Newton
from secant.optim.newton_cg import NewtonCG
from secant.optim.saddle_free import SaddleFreeNewton
from secant.optim.shampoo import Shampoo
from secant.optim.soap import SOAP
from secant.optim.sophia import Sophia
from secant.optim.stochastic_lbfgs import StochasticLBFGS
from secant.optim.trust_region import TrustRegion

__all__ = [
    "BFGS",
    "KFAC",
    "LBFGS",
    "SOAP",
    "AdaHessian",
    "BatchedLBFGS",
    "BlockAdam",
    "CubicNewton",
    "LevenbergMarquardt",
    "Muon",
    "NaturalGradient",
    "Newton",
    "NewtonCG",
    "SaddleFreeNewton",
    "Shampoo",
    "Sophia",
    "StochasticLBFGS",
    "TrustRegion",
]
