"""The `cuda` backend: `cuda.cu` compiled ahead of time into `secant._cuda`, launched by `plan.py`."""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.hvp.plan import TYPES, Launcher

available = _cuda_driver.ahead_of_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when X (or logits) of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in TYPES:
        return f"X of float32, float64, bfloat16 and float16, not {dtype}"
    return _cuda_driver.ahead_of_time_supports(device)


_launcher = Launcher(_cuda_driver.AheadOfTime())
glm_hvp = _launcher.glm_hvp
glm_value_grad = _launcher.glm_value_grad
softmax_hvp = _launcher.softmax_hvp
softmax_value_grad = _launcher.softmax_value_grad
cross_entropy_hvp = _launcher.cross_entropy_hvp
paired_matmul = _launcher.paired_matmul
gram = _launcher.gram
