"""The `nvrtc` backend: `cuda.cu` compiled at run time by NVRTC through CuPy, launched by `plan.py`.

It serves where `secant._cuda` was not built, or not for the device at hand: CuPy compiles for exactly that device and
keeps the result in its cache on disk. One module a (vector, storage) pair of types keeps the first call short.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from secant.kernels.lbfgs.plan import Device, Launch, Launcher

_C_TYPES = {"f32": "float", "f64": "double", "bf16": "u16"}
_HERE = Path(__file__).resolve().parent


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install secant[cupy])"
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch has no CUDA support"
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported: {error}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"cupy finds no CUDA device: {error}"
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"vectors of float32 and float64, not {dtype}"
    return None


def source(pair: str) -> str:
    """The text that NVRTC compiles for a pair of types such as "f32_bf16": it includes nothing."""
    vector, storage = pair.split("_")
    chosen = f"#define SECANT_LBFGS_PAIRS(X) X({pair}, {_C_TYPES[vector]}, {_C_TYPES[storage]})\n"
    portable = (_HERE.parent / "cuda_portable.cuh").read_text().replace("#pragma once\n", "")
    return portable + chosen + (_HERE / "cuda.cu").read_text()


@functools.cache
def _module(pair: str, cooperative: bool) -> Any:
    import cupy

    # CuPy launches every kernel of a module with cooperative groups enabled cooperatively: hence two modules.
    return cupy.RawModule(
        code=source(pair), options=("--std=c++17",), backend="nvrtc", enable_cooperative_groups=cooperative
    )


@functools.cache
def _kernel(name: str, cooperative: bool, index: int) -> Any:
    import cupy

    with cupy.cuda.Device(index):
        return _module("_".join(name.split("_")[-2:]), cooperative).get_function(name)


@functools.cache
def _stream(handle: int, index: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and newer, which deprecates ExternalStream

        class Handle:
            def __cuda_stream__(self) -> tuple[int, int]:
                return 0, handle

        return cupy.cuda.Stream.from_external(Handle())
    return cupy.cuda.ExternalStream(handle, index)


class RunTime:
    """The driver of `plan.Launcher` on CuPy."""

    capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self) -> None:
        self._shared: dict[tuple[str, bool, int], int] = {}  # dynamic shared memory that a kernel has been allowed

    def device(self, index: int) -> Device:
        """Properties of a device."""
        import cupy

        found = cupy.cuda.Device(index).attributes
        return Device(found["MultiProcessorCount"], found["MaxSharedMemoryPerBlockOptin"])

    def stream(self, index: int) -> int:
        """Handle of the current stream of a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Launch a kernel with one struct as its parameter."""
        import cupy
        import numpy as np

        key = (item.kernel, item.cooperative, index)
        kernel = _kernel(*key)
        # An array of one element is passed by value: here one element of all the bytes.
        struct = np.frombuffer(parameters, dtype=np.dtype((np.void, len(parameters))))
        with cupy.cuda.Device(index), _stream(stream, index):
            if item.shared > self._shared.get(key, 48 * 1024):
                kernel.max_dynamic_shared_size_bytes = self._shared[key] = item.shared
            kernel((item.grid_x, item.grid_y), (item.threads,), (struct,), shared_mem=item.shared)


_launcher = Launcher(RunTime())
update = _launcher.update
two_loop = _launcher.two_loop
