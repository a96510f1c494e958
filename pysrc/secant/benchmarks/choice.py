"""Which backends a benchmark times, and how each is chosen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch

import secant
from secant import backends


def serving(family: str, device: torch.device, dtype: torch.dtype, op: str, size: int) -> list[str]:
    """The backends that can serve a call, the one that `auto` takes first; op, size: see `secant.defaults.Default`."""
    loaded = ((name, backends.load(family, name)) for name in backends.preferences(family, device, op, size))
    return [name for name, x in loaded if not isinstance(x, str) and x.supports(device, dtype) is None]


def around(name: str, names: Sequence[str]) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What chooses one of `names`, as `serving` gives them.

    What `auto` serves is timed as a user calls it. An explicit choice is entered outside the time.
    """
    auto = name == names[0] and secant.current_backend() == "auto"
    return contextlib.nullcontext if auto else functools.partial(secant.use_backend, name)
