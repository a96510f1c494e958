"""What was measured to be best: the backend that `auto` takes, and the ways of a CPU's kernels, each with its run.

`python bench/gpu.py --propose-defaults result.json` proposes the entries of a device from a run of `make gpu`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple

#: Stands for the ops of a family that have no entry of their own.
ANY = "*"


class Default(NamedTuple):
    """The backend to take for an op, unless it cannot serve the call.

    device: type of the tensors' device. op: a function of the family's contract (`kernels/<family>/reference.py`), or
    `ANY`. largest: size up to which the entry holds, None for every size; the size of a call is the length of the last
    dimension of its first operand: n of a direction, rows of a block, columns of X, logits. source: the run, or why.
    """

    device: str
    family: str
    op: str
    largest: int | None
    backend: str
    source: str


#: Until a GPU has run `make gpu`.
UNMEASURED = (
    "not measured, by reasoning: compiled ahead of time, so that the first call waits for no compiler, and launched "
    "through the shortest path; triton comes with torch; nvrtc is the source of cuda, compiled at the first call"
)

#: Of an op the entries by rising `largest`, the last one with None; each device and family has one of `ANY`.
TABLE = (
    Default("cpu", "lbfgs", ANY, None, "cpu", "bench/results/cpu-xeon-2core.json"),
    Default("cpu", "blocks", ANY, None, "cpu", "bench/results/cpu-xeon-2core-blocks.json"),
    Default("cpu", "hvp", ANY, None, "cpu", "bench/results/cpu-xeon-2core-hvp.json"),
    Default("cuda", "lbfgs", ANY, None, "cuda", UNMEASURED),
    Default("cuda", "blocks", ANY, None, "cuda", UNMEASURED),
    Default("cuda", "hvp", ANY, None, "cuda", UNMEASURED),
)


def entries(device: str, family: str) -> dict[str, list[Default]]:
    """The entries of a family on a type of device, by op, each op's in the order of the table."""
    found: dict[str, list[Default]] = {}
    for entry in TABLE:
        if (entry.device, entry.family) == (device, family):
            found.setdefault(entry.op, []).append(entry)
    return found


def find(device: str, family: str, op: str, size: int) -> Default | None:
    """The entry for a call, None on a device that the table does not know."""
    by_op = entries(device, family)
    held = by_op.get(op) or by_op.get(ANY, [])
    return next((entry for entry in held if entry.largest is None or size <= entry.largest), None)


class Processor(NamedTuple):
    """How the CPU kernels go on a family of processors. Nothing is timed when they run: bits must repeat.

    name: of the entry. vendor: "intel", "amd", "arm" or `ANY`. panel_bytes: histories of more bytes go through
    `two_loop` by panels of 16 pairs, which read them half as often and compute more; None: always one pair a pass.
    source: the run, or why.
    """

    name: str
    vendor: str
    panel_bytes: int | None
    source: str


#: The first that fits holds.
PROCESSORS = (
    Processor("intel", "intel", 8 << 20, "bench/results/cpu-xeon-2core.json: 10 to 20 GB/s for two cores"),
    Processor(
        "amd",
        "amd",
        None,
        "bench/results/cpu-epyc-2core.json: at 57 GB/s for two cores one pair a pass was the fastest from 1e5 to 1e7",
    ),
    Processor(
        "other",
        ANY,
        8 << 20,
        "not measured, by reasoning: what saves reads of memory is the smaller risk where nothing is known",
    ),
)


def processor_of(vendor: str) -> Processor:
    """The entry for the processors of a vendor."""
    return next(x for x in PROCESSORS if x.vendor in (vendor, ANY))


@cache
def processor() -> Processor:
    """The entry for the processor at hand."""
    try:
        extension = importlib.import_module("secant._cpu")
    except ImportError:
        return processor_of(ANY)
    return processor_of(extension.build_config()["vendor"])
