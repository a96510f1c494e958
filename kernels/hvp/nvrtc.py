"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand. A module is one shape of `hvp_tile`, or the
small kernels of one type: a first call compiles two of them, and CuPy keeps the result in its cache on disk.
"""

from __future__ import annotations

import re

import torch
from secant.kernels import _cuda_driver
from secant.kernels.hvp.plan import C_TYPES, TYPES, Launcher

available = _cuda_driver.run_time_available


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when X (or logits) of this device and dtype are supported, else the reason why they are not."""
    if device.type == "cuda" and dtype not in TYPES:
        return f"X of float32, float64, bfloat16 and float16, not {dtype}"
    return _cuda_driver.run_time_supports(device)


def source(module: str) -> str:
    """Return the text that NVRTC compiles for a module "tile_4x16_f32", "cross_entropy_f16" or "rest_f64"."""
    found = re.fullmatch(r"(tile|cross_entropy|rest)(?:_(\d+)x(\d+))?_(\w+)", module)
    assert found
    kind, k, e, tag = found.groups()
    c, t = C_TYPES[tag]
    chosen = {"tile": f"X({k}, {e}, {tag}, {c}, {t})", "cross_entropy": f"X({tag}, {c}, {t})", "rest": f"X({tag}, {c})"}
    lists = {"tile": "TILES", "cross_entropy": "CROSS_ENTROPY", "rest": "REST"}
    lines = [f"#define SECANT_HVP_{name}(X) {chosen[x] if x == kind else ''}\n" for x, name in lists.items()]
    return _cuda_driver.source("hvp", "".join(lines))


def _module(kernel: str) -> str:
    name = kernel.removeprefix("hvp_")
    return name if name.startswith(("tile", "cross")) else f"rest_{name.rpartition('_')[2]}"


_launcher = Launcher(_cuda_driver.RunTime(_module, source))
glm_hvp = _launcher.glm_hvp
glm_value_grad = _launcher.glm_value_grad
softmax_hvp = _launcher.softmax_hvp
softmax_value_grad = _launcher.softmax_value_grad
cross_entropy_hvp = _launcher.cross_entropy_hvp
paired_matmul = _launcher.paired_matmul
gram = _launcher.gram
