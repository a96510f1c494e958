"""The `search` family: line searches, steps and convergence of many problems at once.

Each module named below implements the functions whose contract is written down in `reference.py`. `BACKENDS` is the
table that `secant.backends` reads: name of the backend -> module of this package that implements it. A new
implementation is one file and one line here.
"""

BACKENDS = {
    "cuda": "secant.kernels.search.cuda",
    "triton": "secant.kernels.search.triton",
    "nvrtc": "secant.kernels.search.nvrtc",
    "cpu": "secant.kernels.search.cpu",
    "reference": "secant.kernels.search.reference",
}
