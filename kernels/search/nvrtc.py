"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand. One module a type keeps the first call
short.
"""

from __future__ import annotations

import torch
from secant.kernels import _cuda_driver
from secant.kernels.search.plan import NAMES, Launcher

_C_TYPES = {"f32": "float", "f64": "double"}

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when tensors of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in NAMES:
        return f"points of float32 and float64, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def module_of(kernel: str) -> str:
    """Return "f32" of "search_advance_f32"."""
    return kernel.rpartition("_")[2]


def source(module: str) -> str:
    """Return the text that NVRTC compiles for a type of points: it includes nothing."""
    return _cuda_driver.source("search", f"#define SECANT_SEARCH_TYPES(X) X({module}, {_C_TYPES[module]})\n")


_launcher = Launcher(_cuda_driver.RunTime(module_of, source))
advance = _launcher.advance
begin = _launcher.begin
