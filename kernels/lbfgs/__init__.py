"""The `lbfgs` family: quasi-Newton directions from limited-memory pairs.

Each module named below implements the same functions, those of `contract.Backend`, whose meaning is written down in
`reference.py`. `BACKENDS` is the table that `secant.backends` reads: name of the backend -> module of this package that
implements it. A new implementation is one file and one line here.
"""

BACKENDS = {
    "cuda": "secant.kernels.lbfgs.cuda",
    "triton": "secant.kernels.lbfgs.triton",
    "nvrtc": "secant.kernels.lbfgs.nvrtc",
    "cpu": "secant.kernels.lbfgs.cpu",
    "reference": "secant.kernels.lbfgs.reference",
}
