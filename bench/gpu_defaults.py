"""Entries of `secant.defaults` that follow from a run of `make gpu`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpu_results import family_data
from gpu_run import FAMILIES

if TYPE_CHECKING:
    from secant.defaults import Default

#: Op of a benchmark -> functions of the contract that it stands for; eigenvectors and their functions are one kernel.
FUNCTIONS = {
    "direction": ("update",),
    "step": ("update",),
    "block_inv": ("inv",),
    "block_solve": ("solve",),
    "block_eigh": ("eigh", "abs_inv", "inv_root"),
}
#: What `auto` may take.
BACKENDS = ("cuda", "triton", "nvrtc", "cpu")
#: How much faster, in geometric mean, another backend has to be to take the place of the one in the table.
MARGIN = 1.05
Times = dict[str, dict[tuple[Any, ...], float]]


def _times(family: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, Times]]:
    """Collect function -> size -> backend -> case -> seconds, of the rows that backends measured."""
    keys = ("op", "assume", "n", "m", "d", "k", "batch", "dtype", "storage", "note")
    found: dict[str, dict[int, Times]] = {}
    for row in rows:
        if row["kind"] != "backend" or row["by"] not in BACKENDS or not row["median"]:
            continue
        case = tuple(row.get(key) for key in keys)
        for function in FUNCTIONS.get(row["op"], (row["op"],)):
            of_size = found.setdefault(function, {}).setdefault(row["d" if family == "hvp" else "n"], {})
            of_size.setdefault(row["by"], {})[case] = row["median"]
    return found


def _best(times: Times, held: str) -> str:
    """Choose the backend at a size: the one that is held, unless another is `MARGIN` faster on the cases of both."""
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

    A size that lies between two measured ones goes with the nearer, on a logarithmic scale. An op that was not measured
    keeps what the table has for any.

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
        [rest] = defaults.entries(device, family)[defaults.ANY]
        found.append(rest)
        for function, by_size in _times(family, data["rows"]).items():
            chosen: list[tuple[int, str]] = []  # the largest size of each run of sizes with one backend
            for size, times in sorted(by_size.items()):
                held = defaults.find(device, family, function, size)
                assert held is not None
                best = _best(times, held.backend)
                if chosen and chosen[-1][1] == best:
                    chosen[-1] = (size, best)
                    continue
                if chosen:
                    chosen[-1] = (math.isqrt(chosen[-1][0] * size), chosen[-1][1])
                chosen.append((size, best))
            *bounded, (_, last) = chosen
            limits: list[tuple[int | None, str]] = [*bounded, (None, last)]
            found += [defaults.Default(device, family, function, *limit, source) for limit in limits]
    return found
