"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand. One module a kernel: the first call of a
size compiles that size alone, and CuPy keeps the result in its cache on disk.
"""

from __future__ import annotations

import re

import torch
from secant.kernels import _cuda_driver
from secant.kernels.blocks.plan import C_TYPES, TYPES, Launcher

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when blocks of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in TYPES:
        return f"blocks of float32, float64, bfloat16 and float16, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def source(kernel: str) -> str:
    """Return the text that NVRTC compiles for a kernel such as "blocks_inv_spd_t3_f32": it includes nothing."""
    found = re.fullmatch(r"blocks_(\w+)_([twb])(\d+)_(\w+)", kernel)
    assert found
    op, kind, width, tag = found.groups()
    chosen = f"#define SECANT_BLOCKS_KERNELS(X) X({op}, {kind}, {width}, {tag}, {C_TYPES[tag]})\n"
    return _cuda_driver.source("blocks", chosen)


def _module(kernel: str) -> str:
    return kernel


_launcher = Launcher(_cuda_driver.RunTime(_module, source))
inv = _launcher.inv
solve = _launcher.solve
eigh = _launcher.eigh
abs_inv = _launcher.abs_inv
inv_root = _launcher.inv_root
