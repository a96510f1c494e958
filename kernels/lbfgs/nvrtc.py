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


_modules = _cuda_driver.TypedModules("lbfgs", "dense", _C_TYPES, "SECANT_LBFGS_PAIRS", "SECANT_LBFGS_DENSE")
module_of, source = _modules.of, _modules.source

_launcher = Launcher(_cuda_driver.RunTime(module_of, source))
update = _launcher.update
two_loop = _launcher.two_loop
dots, solve, combine = _launcher.dots, _launcher.solve, _launcher.combine
dense_update = _launcher.dense_update
