"""What the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def group_of(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Return the `Group(key)` of the module by key; only the last one is kept, as an input may fill the memory."""
    held: dict[Any, Any] = {}

    def get(key: Any) -> Any:
        if key not in held:
            held.clear()
            held[key] = request.module.Group(key)
        return held[key]

    return get


@pytest.fixture(scope="session")
def to_the_end() -> Callable[[Callable[[], object], torch.device], Callable[[], object]]:
    """Makes of (call, device) a call that returns when the device has done its work."""

    def wrap(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
        def run() -> None:
            call()
            torch.cuda.synchronize(device)

        return run if device.type == "cuda" else call

    return wrap
