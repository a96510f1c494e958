"""The `cuda` backend: `cuda.cu` compiled ahead of time into `secant._cuda`, launched by `plan.py`."""

from __future__ import annotations

import functools

import torch
from secant.kernels.lbfgs.plan import Device, Launch, Launcher

try:
    from secant import _cuda
except ImportError as error:
    _cuda = None
    _why = f"secant was built without CUDA ({error})"
else:
    _why = ""


def available() -> str | None:
    """Return None when this backend can run here, else the reason why it cannot."""
    if _cuda is None:
        return _why
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch has no CUDA support"
    return None


@functools.cache
def _reason(index: int) -> str | None:
    found: str | None = _cuda.reason(index)
    return None if found is None else f"the kernels of secant._cuda do not run on cuda:{index}: {found}"


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None when vectors of this device and dtype are supported, else the reason why they are not."""
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"vectors of float32 and float64, not {dtype}"
    return _reason(torch.cuda.current_device() if device.index is None else device.index)


class AheadOfTime:
    """The driver of `plan.Launcher` on `secant._cuda`."""

    capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self) -> None:
        self._index: dict[str, int] = _cuda.kernels()

    def device(self, index: int) -> Device:
        """Properties of a device."""
        found = _cuda.device_properties(index)
        return Device(found["multiprocessors"], found["shared"])

    def stream(self, index: int) -> int:
        """Handle of the current stream of a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Launch a kernel with one struct as its parameter."""
        _cuda.launch(
            self._index[item.kernel],
            item.grid_x,
            item.grid_y,
            item.threads,
            item.shared,
            item.cooperative,
            index,
            stream,
            parameters,
        )


if _cuda is not None:
    _launcher = Launcher(AheadOfTime())
    update = _launcher.update
    two_loop = _launcher.two_loop
