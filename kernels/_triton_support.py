"""What the `triton` backends of every family share: where they run, and numbers of half precision.

bfloat16 is widened right after each load and rounded by integer arithmetic: Triton's interpreter has no bfloat16
arithmetic and truncates where the hardware rounds to nearest even.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl


def interpreted(kernel: Any) -> bool:
    """Tell whether a kernel runs in Triton's interpreter: TRITON_INTERPRET=1 was set when it was defined."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def available(interpreting: bool) -> str | None:
    """Return None when kernels can run here, interpreted or not, else the reason why they cannot."""
    if interpreting or torch.cuda.is_available():
        return None
    return "no CUDA device is present and TRITON_INTERPRET=1 is not set"


def supports(device: torch.device, interpreting: bool) -> str | None:
    """Return None when kernels run on this device, interpreted or not, else the reason why they do not."""
    if device.type == "cuda" or (device.type == "cpu" and interpreting):
        return None
    return f"Triton kernels run on CUDA devices, and on the CPU with TRITON_INTERPRET=1 only, not on {device}"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches within go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def widened(x, C: tl.constexpr):
    """X in the arithmetic type."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(C)


@triton.jit
def load(ptr, mask, C: tl.constexpr):
    """Load masked entries (0 elsewhere) in the arithmetic type."""
    return widened(tl.load(ptr, mask=mask, other=0), C)


@triton.jit
def rounded_to_bfloat16(x):
    """Round a float32 x to nearest even, in float32."""
    bits = x.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, even.to(tl.float32, bitcast=True), x)


@triton.jit
def store(ptr, x, mask):
    """Store, rounding to nearest even."""
    if ptr.dtype.element_ty == tl.bfloat16:
        x = rounded_to_bfloat16(x.to(tl.float32))
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
