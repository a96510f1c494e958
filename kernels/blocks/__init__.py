"""The `blocks` family: inverses, solves, eigenvalues and matrix functions of many small matrices, n = 1..64.

Each module named below implements the same five functions, `inv`, `solve`, `eigh`, `abs_inv` and `inv_root`, whose
contract is written down in `reference.py`. `BACKENDS` is the table that `secant.backends` reads: name of the backend ->
module of this package that implements it. A new implementation is one file and one line here.
"""

BACKENDS = {
    "cuda": "secant.kernels.blocks.cuda",
    "triton": "secant.kernels.blocks.triton",
    "nvrtc": "secant.kernels.blocks.nvrtc",
    "cpu": "secant.kernels.blocks.cpu",
    "reference": "secant.kernels.blocks.reference",
}
