"""Entries of `secant.defaults` that follow from a run of `make gpu`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpu_results import family_data
from gpu_run import FAMILIES

if TYPE_CHECKING:
    from secant.defaults import Default

#: What `auto` may take.
BACKENDS = ("cuda", "triton", "nvrtc", "cpu")
#: How much faster, in geometric mean, another backend has to be to take the place of the one in the table.
MARGIN = 1.05
Times = dict[str, dict[tuple[Any, ...], float]]


def _times(rows: Sequence[dict[str, Any]]) -> Times:
    """Collect backend -> case -> seconds, of the rows that backends measured."""
    keys = ("op", "assume", "n", "m", "d", "k", "batch", "dtype", "storage", "note")
    found: Times = {}
    for row in rows:
        if row["kind"] == "backend" and row["by"] in BACKENDS and row["median"]:
            found.setdefault(row["by"], {})[tuple(row.get(key) for key in keys)] = row["median"]
    return found


def _best(times: Times, held: str) -> str:
    """Choose the backend of a family: the one that is held, unless another is `MARGIN` faster on the cases of both."""
    best, gain = held, MARGIN
    for name, own in times.items():
        shared = own.keys() & times.get(held, {}).keys()
        ratio = math.exp(sum(math.log(times[held][x] / own[x]) for x in shared) / len(shared)) if shared else 0.0
        if held not in times and len(own) == max(map(len, times.values())):
            return name  # what is held was not measured, or was wrong
        if name != held and ratio >= gain:
            best, gain = name, ratio
    return best


def propose(result: dict[str, Any], source: str) -> list[Default]:
    """Propose entries of `secant.defaults` for the device of a run, from its times.

    A family keeps its backend unless another is faster in geometric mean over the cases that both have.

    Raises:
        ValueError: the run is a rehearsal, or did not test what it measured, or tests failed.
    """
    from secant import defaults

    device, tests = result["device"], result["tests"]
    if result["quick"] or (device == "cuda" and not result["machine"].get("gpu")):
        raise ValueError("a rehearsal measures nothing: expected the result.json of a run on a GPU")
    if not tests or tests["failed"]:
        raise ValueError(f"no defaults from a run whose tests failed or did not run: {tests and tests['failed'][:3]}")
    found = []
    for family in FAMILIES:
        data = family_data(result, family)
        if data is None:
            continue
        held = defaults.find(device, family)
        assert held is not None
        times = _times(data["rows"])
        best = _best(times, held.backend) if times else held.backend
        found.append(defaults.Default(device, family, best, source))
    return found
