"""secant: second-order information made cheap for PyTorch.

The name is the secant equation, B s = y. `secant.ops` holds the functions over the fused kernels, `secant.optim` the
optimizers over them, `secant.curvature` Hessians as operators, `secant.solvers` line searches, conjugate gradients and
what else optimizers are made of, `secant.glm` generalised linear models; `secant.minimize` and `secant.least_squares`
are one entry to the optimizers in scipy's shape.
"""

import torch as _torch  # noqa: F401  (first: the extension binds to the OpenMP runtime that torch loads)

from secant import curvature, glm, ops, optim, solvers
from secant._errors import BackendError, SecantWarning, SingularWarning
from secant._fits import CurveFit, curve_fit
from secant._version import __version__
from secant.backends import current_backend, use_backend
from secant.minimize import least_squares, minimize
from secant.ops.history import LBFGSHistory
from secant.ops.inverse_hessian import InverseHessian
from secant.result import Iteration, OptimizeResult, Status

__all__ = [
    "BackendError",
    "CurveFit",
    "InverseHessian",
    "Iteration",
    "LBFGSHistory",
    "OptimizeResult",
    "SecantWarning",
    "SingularWarning",
    "Status",
    "__version__",
    "current_backend",
    "curvature",
    "curve_fit",
    "glm",
    "least_squares",
    "minimize",
    "ops",
    "optim",
    "solvers",
    "use_backend",
]
