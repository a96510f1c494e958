"""The `nvrtc` backend: `cuda*.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand: CuPy compiles for exactly that device and
keeps the result in its cache on disk. One module a (vector, storage) pair of types, and one a type for dense updates,
keep the first call short.
"""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.lbfgs.plan import Launcher

_C_TYPES = {"f32": "float", "f64": "double", "bf16": "u16"}

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in (torch.float32, torch.float64):
        return f"vectors of float32 and float64, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def module_of(kernel: str) -> str:
    """Return the end of a kernel's name: "f32_bf16" of "lbfgs_update_warp_f32_bf16", or "dense_f32"."""
    return "_".join(kernel.split("_")[-2:])


def source(module: str) -> str:
    """Return the text that NVRTC compiles for "f32_bf16", a pair of types, or "dense_f32": it includes nothing."""
    first, second = module.split("_")
    pair = dense = ""
    if first == "dense":
        dense = f"X({second}, {_C_TYPES[second]})"
    else:
        pair = f"X({module}, {_C_TYPES[first]}, {_C_TYPES[second]})"
    chosen = f"#define SECANT_LBFGS_PAIRS(X) {pair}\n#define SECANT_LBFGS_DENSE(X) {dense}\n"
    return _cuda_driver.source("lbfgs", chosen)


_launcher = Launcher(_cuda_driver.RunTime(module_of, source))
update = _launcher.update
two_loop = _launcher.two_loop
dots, solve, combine = _launcher.dots, _launcher.solve, _launcher.combine
dense_update = _launcher.dense_update
