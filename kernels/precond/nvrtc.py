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


_modules = _cuda_driver.TypedModules("precond", "newton", _C_TYPES, "SECANT_PRECOND_STEPS", "SECANT_PRECOND_ITERATIONS")
module_of, source = _modules.of, _modules.source

_launcher = Launcher(_cuda_driver.RunTime(module_of, source))
step = _launcher.step
newton_schulz = _launcher.newton_schulz
newton_inv_root = _launcher.newton_inv_root
