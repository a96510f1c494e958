"""What was measured to be best: the backend that `auto` takes, and the ways of a CPU's kernels, each with its run.

`python bench/gpu.py --propose-defaults result.json` proposes the entries of a device from a run of `make gpu`.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple

#: Stands for every vendor.
ANY = "*"


class Default(NamedTuple):
    """The backend to take for a family, unless it cannot serve the call.

    device: type of the tensors' device. source: the run, or why.
    """

    device: str
    family: str
    backend: str
    source: str


#: Until the benchmark of the family has been recorded there, by more than one backend.
UNMEASURED = (
    "not measured, by reasoning: compiled ahead of time, so that the first call waits for no compiler, and launched "
    "through the shortest path; triton comes with torch; nvrtc is the source of cuda, compiled at the first call"
)

#: One entry for each device and family.
TABLE = (
    Default("cpu", "lbfgs", "cpu", "bench/results/cpu-xeon-2core.json"),
    Default("cpu", "blocks", "cpu", "bench/results/cpu-xeon-2core-blocks.json"),
    Default("cpu", "hvp", "cpu", "bench/results/cpu-xeon-2core-hvp.json"),
    Default("cpu", "precond", "cpu", UNMEASURED),
    Default("cpu", "search", "cpu", UNMEASURED),
    Default("cuda", "lbfgs", "cuda", "bench/results/gpu-h200-lbfgs.json"),
    Default("cuda", "blocks", "cuda", "bench/results/gpu-h200-blocks.json"),
    Default("cuda", "hvp", "cuda", "bench/results/gpu-h200-hvp.json"),
    Default("cuda", "precond", "cuda", UNMEASURED),
    Default("cuda", "search", "cuda", UNMEASURED),
)


def find(device: str, family: str) -> Default | None:
    """Return the entry of a family on a type of device, None on a device that the table does not know."""
    return next((entry for entry in TABLE if (entry.device, entry.family) == (device, family)), None)


class Processor(NamedTuple):
    """How the CPU kernels go on a family of processors. Nothing is timed when they run: bits must repeat.

    name: of the entry. vendor: "intel", "amd", "arm" or `ANY`. panel_bytes: histories of more bytes go through
    `two_loop` by panels of 16 pairs, which read them half as often and compute more; None: always one pair a pass.
    block: elements of a row that a direction reads at a time, where vectors are long. source: the run, or why.
    """

    name: str
    vendor: str
    panel_bytes: int | None
    block: int
    source: str


#: The first that fits holds.
PROCESSORS = (
    Processor("intel", "intel", 8 << 20, 1024, "bench/results/cpu-xeon-2core.json: 10 to 20 GB/s for two cores"),
    Processor(
        "amd",
        "amd",
        None,
        16384,
        "bench/results/cpu-epyc-2core.json: at 57 GB/s for two cores one pair a pass was the fastest from 1e5 to 1e7; "
        "a product with 20 rows alone ran at 26 GB/s in bursts of 4 KiB, at 35 in bursts of 64",
    ),
    Processor(
        "other",
        ANY,
        8 << 20,
        1024,
        "not measured, by reasoning: what saves reads of memory is the smaller risk where nothing is known",
    ),
)


def processor_of(vendor: str) -> Processor:
    """Return the entry for the processors of a vendor."""
    return next(x for x in PROCESSORS if x.vendor in (vendor, ANY))


@cache
def processor() -> Processor:
    """Return the entry for the processor at hand."""
    try:
        extension = importlib.import_module("secant._cpu")
    except ImportError:
        return processor_of(ANY)
    return processor_of(extension.build_config()["vendor"])
