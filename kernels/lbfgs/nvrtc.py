"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand: CuPy compiles for exactly that device and
keeps the result in its cache on disk. One module a (vector, storage) pair of types keeps the first call short.
"""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.lbfgs.contract import Dense, Pair
from secant.kernels.lbfgs.plan import Launcher
from torch import Tensor

_C_TYPES = {"f32": "float", "f64": "double", "bf16": "u16"}

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in (torch.float32, torch.float64):
        return f"vectors of float32 and float64, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def pair_of(kernel: str) -> str:
    """Return the pair of types in a kernel's name: "f32_bf16" of "lbfgs_update_warp_f32_bf16"."""
    return "_".join(kernel.split("_")[-2:])


def source(pair: str) -> str:
    """Return the text that NVRTC compiles for a pair of types such as "f32_bf16": it includes nothing."""
    vector, storage = pair.split("_")
    chosen = f"#define SECANT_LBFGS_PAIRS(X) X({pair}, {_C_TYPES[vector]}, {_C_TYPES[storage]})\n"
    return _cuda_driver.source("lbfgs", chosen)


_launcher = Launcher(_cuda_driver.RunTime(pair_of, source))
update = _launcher.update
two_loop = _launcher.two_loop
dots, solve, combine = _launcher.dots, _launcher.solve, _launcher.combine


def dense_update(
    state: Dense,
    pair: Pair | None,
    grad: Tensor | None,
    tol: float,
    rule: int,
    out: Tensor | None,
    prev_out: Tensor | None,
) -> None:
    """See `reference.dense_update`; `cuda.cu` has no kernels for it, those of Triton serve."""
    from secant.kernels.lbfgs.triton_dense import dense_update

    dense_update(state, pair, grad, tol, rule, out, prev_out)
