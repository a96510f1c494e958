"""The `precond` family: steps whose preconditioners belong to tiles of many tensors, and orthogonalisation.

Each module named below implements the functions whose contract is written down in `reference.py`. `BACKENDS` is the
table that `secant.backends` reads: name of the backend -> module of this package that implements it. A new
implementation is one file and one line here.
"""

BACKENDS = {
    "cuda": "secant.kernels.precond.cuda",
    "triton": "secant.kernels.precond.triton",
    "nvrtc": "secant.kernels.precond.nvrtc",
    "cpu": "secant.kernels.precond.cpu",
    "reference": "secant.kernels.precond.reference",
}
