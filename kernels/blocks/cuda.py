"""The `cuda` backend: `cuda.cu` compiled ahead of time into `secant._cuda`, launched by `plan.py`."""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.blocks.plan import TYPES, Launcher

available = _cuda_driver.ahead_of_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when blocks of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in TYPES:
        return f"blocks of float32, float64, bfloat16 and float16, not {dtype}"
    return _cuda_driver.ahead_of_time_supports(device)


_launcher = Launcher(_cuda_driver.AheadOfTime())
inv = _launcher.inv
solve = _launcher.solve
eigh = _launcher.eigh
abs_inv = _launcher.abs_inv
inv_root = _launcher.inv_root
