"""Inputs of a test on the device under test, as they lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def place(x: Any, device: str | torch.device) -> Any:
    """Tensors on the device, strides kept, of which some may be 0; anything else as it is."""
    if not isinstance(x, Tensor) or x.device == torch.device(device):
        return x
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]  # every element once
    there = torch.empty_strided(once.shape, x.stride(), dtype=x.dtype, device=device)
    return there.copy_(once).expand(x.shape)
