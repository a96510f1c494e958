"""The public functions over the kernels, one module per family: checks, allocation, dispatch, autograd."""

from secant.ops.lbfgs import two_loop

__all__ = ["two_loop"]
