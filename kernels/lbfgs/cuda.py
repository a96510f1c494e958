"""The `cuda` backend: `cuda*.cu` compiled ahead of time into `secant._cuda`, launched by `plan.py`."""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.lbfgs.plan import Launcher

available = _cuda_driver.ahead_of_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in (torch.float32, torch.float64):
        return f"vectors of float32 and float64, not {dtype}"
    return _cuda_driver.ahead_of_time_supports(device)


_launcher = Launcher(_cuda_driver.AheadOfTime())
update = _launcher.update
two_loop = _launcher.two_loop
dots, solve, combine = _launcher.dots, _launcher.solve, _launcher.combine
dense_update = _launcher.dense_update
