"""An update with its arguments one behind the other, as the schema of the registered op has them."""

from __future__ import annotations

from typing import Any

from secant.ops.history import flat_to_contract


def call_update(function: Any, *args: Any, **extra: Any) -> None:
    """Call `update` of a backend: 7 tensors of the state, grad, s, y, y_prev, t, tol, out, prev_out."""
    function(*flat_to_contract(*args), **extra)
