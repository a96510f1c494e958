"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand. One module a pair of types of the steps,
and one a type of the iterations, keep the first call short.
"""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.precond.plan import NAMES, Launcher

_C_TYPES = {"f32": "float", "f64": "double", "bf16": "bf16", "f16": "f16"}

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in NAMES:
        return f"tensors of float32, float64, bfloat16 and float16, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def module_of(kernel: str) -> str:
    """Return "f32_bf16" of "precond_tile_f32_bf16", and "newton_f32" of "precond_newton_schulz_f32"."""
    parts = kernel.split("_")
    return f"newton_{parts[-1]}" if parts[1] == "newton" else "_".join(parts[-2:])


def source(module: str) -> str:
    """Return the text that NVRTC compiles for a pair of types, or for "newton_f32": it includes nothing."""
    first, second = module.split("_")
    steps = iterations = ""
    if first == "newton":
        iterations = f"X({second}, {_C_TYPES[second]})"
    else:
        steps = f"X({module}, {_C_TYPES[first]}, {_C_TYPES[second]})"
    chosen = f"#define SECANT_PRECOND_STEPS(X) {steps}\n#define SECANT_PRECOND_ITERATIONS(X) {iterations}\n"
    return _cuda_driver.source("precond", chosen)


_launcher = Launcher(_cuda_driver.RunTime(module_of, source))
step = _launcher.step
newton_schulz = _launcher.newton_schulz
newton_inv_root = _launcher.newton_inv_root
