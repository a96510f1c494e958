"""The options of `LBFGS`: which there are, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from secant import _checks
from secant.ops.lbfgs import MAX_HISTORY, STORAGE

TOLERANCES = ("tolerance_grad", "tolerance_change", "tolerance_grad_rel", "tolerance_change_rel")
#: The options that decide which buffers there are.
LAYOUT = ("history_size", "history_dtype", "curvature_tol", "line_search_fn", "maximize")
RATE = "a finite number >= 0, or a tensor of one"
#: All that the groups have in common; a group has its lr besides.
SHARED = (*LAYOUT, *TOLERANCES, "max_iter", "max_eval", "on_error")


def is_integer(x: object, low: int) -> bool:
    """Whether `x` is an integer, not a bool, of at least `low`."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= low


def is_number(x: object, low: float, high: float = math.inf) -> bool:
    """Whether `x` is a real number, not a bool, with low <= x < high, and a finite one in double precision."""
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    try:
        return low <= float(x) < high
    except OverflowError:
        return False


def rate(x: object) -> float:
    """A learning rate, which is a finite number >= 0 or a real tensor of one, as a number; NaN if it is none."""
    if isinstance(x, Tensor):
        one = x.numel() == 1 and not x.is_meta and x.dtype.is_signed and not x.is_complex()
        x = x.item() if one else math.nan
    return float(x) if isinstance(x, Real) and is_number(x, 0.0) else math.nan


def check_options(op: str, options: dict[str, Any]) -> None:
    """Raise a ValueError that names the first option which is not what it may be."""

    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise _checks.fail(op, name, expected, repr(options[name]))

    searching = options["line_search_fn"] is not None
    check("lr", not math.isnan(rate(options["lr"])), RATE)
    check("line_search_fn", _is_one_of(options["line_search_fn"], (None, "strong_wolfe")), "None or 'strong_wolfe'")
    check("max_iter", is_integer(options["max_iter"], 1), "an integer >= 1")
    check(
        "max_eval",
        options["max_eval"] is None or is_integer(options["max_eval"], 1 + searching),
        "None or an integer >= " + ("2 (a line search needs one trial)" if searching else "1"),
    )
    for name in TOLERANCES:
        check(name, is_number(options[name], 0.0), "a finite number >= 0")
    size = options["history_size"]
    check("history_size", is_integer(size, 1) and size <= MAX_HISTORY, f"an integer, 1 to {MAX_HISTORY}")
    check("maximize", isinstance(options["maximize"], bool), "True or False")
    check(
        "history_dtype",
        _is_one_of(options["history_dtype"], (None, *STORAGE)),
        "None, torch.float32, torch.float64 or torch.bfloat16",
    )
    tol = options["curvature_tol"]
    check("curvature_tol", tol is None or is_number(tol, 0.0, 1.0), "None or a number in [0, 1)")
    check("on_error", _is_one_of(options["on_error"], ("raise", "backtrack")), "'raise' or 'backtrack'")


def check_groups(op: str, groups: Sequence[dict[str, Any]]) -> None:
    """Raise unless every group is valid and they differ in lr only."""
    for group in groups:
        check_options(op, group)
        for name in SHARED:
            if group[name] != groups[0][name]:
                expected = f"{groups[0][name]!r} in every group (only lr may differ)"
                raise _checks.fail(op, name, expected, repr(group[name]))


def _is_one_of(x: object, choices: tuple[Any, ...]) -> bool:
    """Whether `x` is one of the choices; an array, which equals none of them as a whole, is not."""
    return any(x is choice or (isinstance(x, str) and x == choice) for choice in choices)
