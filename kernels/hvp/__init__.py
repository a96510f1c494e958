"""The `hvp` family: products with Hessians that are never formed.

Each module named below implements the functions whose contract is written down in `reference.py`. `BACKENDS` is the
table that `secant.backends` reads: name of the backend -> module of this package that implements it. A new
implementation is one file and one line here.
"""

BACKENDS = {
    "cuda": "secant.kernels.hvp.cuda",
    "triton": "secant.kernels.hvp.triton",
    "nvrtc": "secant.kernels.hvp.nvrtc",
    "cpu": "secant.kernels.hvp.cpu",
    "reference": "secant.kernels.hvp.reference",
}

#: Those of `glm_value_grad`; the kernels know them by their places here.
LOSSES = ("squared", "logistic", "poisson", "huber", "gamma", "tweedie")
