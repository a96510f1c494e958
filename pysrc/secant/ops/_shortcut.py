"""The way of plain CPU tensors: gate and kernel in one C call, where the backend has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secant import backends
from secant.ops import _gate


class Shortcut:
    """A function of this name in the backend that serves CPU tensors."""

    def __init__(self, family: str, name: str) -> None:
        self.family, self.name = family, name
        self._found: dict[str, Any] = {}

    def __call__(self) -> Any:
        """Return the function, or None without it."""
        backend = backends.current_backend()
        try:
            return self._found[backend]
        except KeyError:
            try:
                module = backends.resolve(self.family, torch.device("cpu"), torch.float32)
            except backends.BackendError:
                module = None  # the call itself will say why
            return self._found.setdefault(backend, getattr(module, self.name, None))


def takes(x: Tensor, y: Tensor, z: Tensor) -> bool:
    """Tell whether these are tensors that a shortcut may look at, and nothing else has to.

    A tensor without an address, such as an older batching one, it finds out itself.
    """
    return type(x) is type(y) is type(z) is Tensor and not (
        x.is_neg() or y.is_neg() or z.is_neg() or _gate.is_watched(x, y, z)
    )
