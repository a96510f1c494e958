"""The public functions over the kernels, one module per family: checks, allocation, dispatch, autograd."""

from secant.ops.blocks import block_abs_inv, block_eigh, block_function, block_inv, block_inv_root, block_solve
from secant.ops.history import LBFGSHistory
from secant.ops.hvp import (
    cross_entropy_hvp,
    glm_hvp,
    glm_value_grad,
    gram,
    paired_matmul,
    softmax_hvp,
    softmax_value_grad,
)
from secant.ops.inverse_hessian import InverseHessian
from secant.ops.lbfgs import two_loop
from secant.ops.precond import Tiles, newton_inv_root, newton_schulz
from secant.ops.search import BatchedSearch

__all__ = [
    "BatchedSearch",
    "InverseHessian",
    "LBFGSHistory",
    "Tiles",
    "block_abs_inv",
    "block_eigh",
    "block_function",
    "block_inv",
    "block_inv_root",
    "block_solve",
    "cross_entropy_hvp",
    "glm_hvp",
    "glm_value_grad",
    "gram",
    "newton_inv_root",
    "newton_schulz",
    "paired_matmul",
    "softmax_hvp",
    "softmax_value_grad",
    "two_loop",
]
