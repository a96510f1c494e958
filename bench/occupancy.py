"""Registers, shared memory and occupancy of the CUDA kernels that the benchmark's cases launch.

    python bench/occupancy.py [cuda]     the tables as JSON, on the last line; of this GPU, or of an H100 by counting
    python bench/occupancy.py run        each of these kernels once on this GPU, for a profiler to watch

What a multiprocessor holds at a time follows from limits that NVIDIA documents: CUDA C++ Programming Guide, technical
specifications per compute capability, and `cuda_occupancy.h` of the toolkit for the units of allocation. On a GPU the
driver is asked as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from secant.kernels._cuda_driver import Device, Launch
from secant.kernels.blocks import plan as blocks_plan
from secant.kernels.hvp import plan as hvp_plan
from secant.kernels.lbfgs import plan as lbfgs_plan
from secant.kernels.precond import plan as precond_plan
from secant.kernels.search import plan as search_plan

from secant.benchmarks.families import batched, blocks, hvp, lbfgs, load, precond

ROOT = Path(__file__).resolve().parents[1]

#: Of every architecture from 8.0 on: registers of a multiprocessor, its partitions, and of what registers (a warp) and
#: bytes (a block) are multiples; bytes that the system keeps for each block; most registers and threads.
REGISTERS, PARTITIONS, REGISTER_UNIT, SHARED_UNIT, RESERVED = 65536, 4, 256, 128, 1024
MOST_REGISTERS, MOST_THREADS, WARP = 255, 1024, 32


class Architecture(NamedTuple):
    """Limits of a multiprocessor: resident warps and blocks, bytes of shared memory, and those of a block at most."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 << 10, 163 << 10),
    "sm_86": Architecture(48, 16, 100 << 10, 99 << 10),
    "sm_89": Architecture(48, 24, 100 << 10, 99 << 10),
    "sm_90": Architecture(64, 32, 228 << 10, 227 << 10),
    "sm_100": Architecture(64, 32, 228 << 10, 227 << 10),
    "sm_120": Architecture(48, 24, 100 << 10, 99 << 10),
    "sm_121": Architecture(48, 24, 100 << 10, 99 << 10),
}
#: What the tables are of where there is no GPU: an H100.
H100, H100_DEVICE = "sm_90", Device(132, 227 << 10)


class Occupancy(NamedTuple):
    """Blocks that a multiprocessor holds, its warps in use over those it can have, and what sets the limit."""

    blocks: int
    share: float
    limit: str


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def occupancy(architecture: Architecture, registers: int, shared: int, threads: int) -> Occupancy:
    """Count what a multiprocessor holds of a kernel.

    Args:
        architecture: of `ARCHITECTURES`. registers: of a thread. shared: bytes of a block, static and dynamic.
        threads: of a block.
    """
    warps = -(-threads // WARP)
    of_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    # A launch is checked as if a block's warps were spread over all partitions evenly.
    fits = registers <= MOST_REGISTERS and of_warp * _up(warps, PARTITIONS) <= REGISTERS
    by = {
        "blocks": architecture.blocks,
        "warps": architecture.warps // warps,
        "registers": REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps if fits else 0,
        "shared memory": architecture.shared // _up(shared + RESERVED, SHARED_UNIT),
    }
    if shared > architecture.block_shared:
        by["shared memory"] = 0
    if threads > MOST_THREADS:
        by["warps"] = 0
    limit = min(by, key=lambda name: by[name])
    return Occupancy(by[limit], by[limit] * warps / architecture.warps, limit)


class Recorder:
    """A driver that writes launches down: no GPU and no data are needed to know them."""

    def __init__(self, device: Device) -> None:
        self.found: list[Launch] = []
        self._device = device

    def device(self, index: int) -> Device:
        """Return the device that was given."""
        return self._device

    def stream(self, index: int) -> int:
        """Return the default stream."""
        return 0

    def capturing(self) -> bool:
        """Say no."""
        return False

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Write it down."""
        self.found.append(item)


def _lbfgs_launches(case: lbfgs.Case, device: Device) -> list[Launch]:
    pair = f"{lbfgs_plan.NAMES[case.dtype]}_{lbfgs_plan.NAMES[case.storage]}"
    size, batch = case.storage.itemsize, max(case.batch, 1)
    if case.op == "two_loop":
        return list(lbfgs_plan.plan_two_loop(device, pair, batch, case.n, case.m, size, case.dtype.itemsize).launches)
    return list(lbfgs_plan.plan_update(device, pair, batch, case.n, case.m, size, None, True).launches)


def _blocks_launches(case: blocks.Case, device: Device) -> list[Launch]:
    tag, size, _ = blocks_plan.TYPES[case.dtype]
    kind = {"spd": "_spd", "general": "_lu", "symmetric": ""}[case.assume]
    op = "eigen" if case.op == "block_eigh" else case.function + kind
    chosen = blocks_plan.plan(op, tag, case.n, size, 1)
    return [Launch(chosen.kernel, -(-case.batch // chosen.matrices), 1, chosen.threads, chosen.shared)]


def _hvp_launches(case: hvp.Case, device: Device) -> list[Launch]:
    driver = Recorder(device)
    launcher = hvp_plan.Launcher(driver)

    def meta(*shape: int, dtype: torch.dtype = case.compute) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, v, rows = meta(case.n, case.d, dtype=case.dtype), meta(case.d, case.k), meta(case.n)
    if case.op == "glm_hvp":
        launcher.glm_hvp(x, v, rows, 0.0, v)
    elif case.op == "glm_value_grad":
        value = meta(dtype=torch.float64)
        launcher.glm_value_grad(x, rows, v[:, 0], "logistic", 1.0, None, 0.0, value, v[:, 0], rows)
    elif case.op == "softmax_hvp":
        launcher.softmax_hvp(x, v, meta(case.n, case.k), None, 0.0, v)
    elif case.op == "gram":
        launcher.gram(x, None, False, meta(case.d, case.d))
    else:
        launcher.cross_entropy_hvp(x, x, rows, x)
    return driver.found


def _precond_launches(case: precond.Case, device: Device) -> list[Launch]:
    driver = Recorder(device)
    launcher = precond_plan.Launcher(driver)
    x = torch.empty(case.batch, case.m, case.n, dtype=case.dtype, device="meta")
    if case.op == "newton_schulz":
        launcher.newton_schulz(x, 5, 1.0, 1.0, 1.0, 0.0, x)
    elif case.op == "newton_inv_root":
        launcher.newton_inv_root(x, case.p, 0.0, 5, 0.0, x, x[:, 0, 0])
    else:
        name, side = precond_plan.NAMES[case.dtype], max(case.m, case.n)
        blocks_of, shared = min(case.batch, precond_plan.TENSORS), precond_plan.shared_bytes(side, case.dtype.itemsize)
        return [Launch(f"precond_tile_{name}_{name}", blocks_of, 1, precond_plan.BLOCK, shared)]
    return driver.found


def _search_launches(case: batched.Rounds, device: Device) -> list[Launch]:
    blocks_of = -(-case.count * search_plan.lanes_of(case.n) // search_plan.BLOCK)
    return [Launch(f"search_{kind}_f64", blocks_of, 1, search_plan.BLOCK, 0) for kind in ("advance", "begin")]


class Measured(NamedTuple):
    """Of a family: its benchmark, the kind of its cases, what they launch, and the contender whose kernels they are."""

    benchmark: str
    kind: type[Any]
    launches: Callable[[Any, Device], list[Launch]]
    contender: str = "cuda"


MEASURED = {
    "lbfgs": Measured("lbfgs", lbfgs.Case, _lbfgs_launches),
    "blocks": Measured("blocks", blocks.Case, _blocks_launches),
    "hvp": Measured("hvp", hvp.Case, _hvp_launches),
    "precond": Measured("precond", precond.Case, _precond_launches),
    "search": Measured("batched", batched.Rounds, _search_launches, "secant"),
}
FAMILIES = tuple(MEASURED)


def cases(family: str) -> list[Any]:
    """List what the benchmark of a family measures of its kernels on a GPU and serves by a kernel of its own."""
    of, device = MEASURED[family], torch.device("cuda")
    found = [case for group in load(of.benchmark).groups(device) for case in group if isinstance(case, of.kind)]
    return [case for case in found if of.launches(case, H100_DEVICE)]


def launches(family: str, device: Device) -> Iterator[tuple[Any, Launch]]:
    """Yield (case, launch) of every launch of every case of a family."""
    for case in cases(family):
        for item in MEASURED[family].launches(case, device):
            yield case, item


Resources = dict[str, tuple[int, int]]


def recorded(family: str, architecture: str) -> Resources:
    """Read kernel -> registers and static shared memory, of the committed table, of the nearest older architecture."""
    kernels = json.loads((ROOT / "kernels" / family / "resources.json").read_text())["kernels"]
    number = int(architecture.removeprefix("sm_"))
    nearest = max((name for name in kernels if int(name[3:]) <= number), key=lambda name: int(name[3:]))
    return {name: (found["registers"], found["shared"]) for name, found in kernels[nearest].items()}


def parse_cuobjdump(text: str, architecture: str) -> Resources:
    """Read kernel -> registers and static shared memory from `cuobjdump -res-usage`, for one architecture."""
    found: Resources = {}
    for part in re.split(r"(?m)^Fatbin elf code:", text):
        arch = re.search(r"arch = (sm_\d+)", part)
        if arch is None or arch.group(1) != architecture:
            continue
        # From 9.0 on the tool counts what the system keeps for each block.
        kept = RESERVED if int(architecture.removeprefix("sm_")) >= 90 else 0
        for name, registers, shared in re.findall(r"Function (\w+):\s*REG:(\d+) .*?SHARED:(\d+)", part):
            found[name] = int(registers), max(0, int(shared) - kept)
    return found


def compiled(architecture: str) -> Resources:
    """Read the same of `secant._cuda` as it was built here; empty without it or without cuobjdump."""
    places = ["cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    tool = next((found for place in places if (found := shutil.which(place)) is not None), None)
    try:
        module = importlib.import_module("secant._cuda")
    except ImportError:
        return {}
    if tool is None or module.__file__ is None:
        return {}
    done = subprocess.run([tool, "-res-usage", module.__file__], capture_output=True, text=True, timeout=60)
    found = parse_cuobjdump(done.stdout + done.stderr, architecture)
    return found or parse_cuobjdump(done.stdout + done.stderr, architecture[:-1] + "0")  # of the same major version


def rows(family: str, architecture: str, device: Device, built: Resources, index: int | None) -> list[dict[str, Any]]:
    """Make a row for each kernel, block size and shared memory; `index`: of the GPU that the driver is asked about."""
    table = recorded(family, architecture) | {name: x for name, x in built.items() if name.startswith(f"{family}_")}
    used: dict[tuple[str, int, int], list[str]] = {}
    for case, item in launches(family, device):
        names = used.setdefault((item.kernel, item.threads, item.shared), [])
        if case.label not in names:
            names.append(case.label)
    found = []
    for (kernel, threads, shared), names in used.items():
        registers, static = table[kernel]
        limits = ARCHITECTURES.get(architecture)
        counted = None if limits is None else occupancy(limits, registers, static + shared, threads)
        found.append(
            {
                "kernel": kernel,
                "cases": names,
                "threads": threads,
                "registers": registers,
                "static": static,
                "dynamic": shared,
                "blocks": None if counted is None else counted.blocks,
                "occupancy": None if counted is None else counted.share,
                "limit": None if counted is None else counted.limit,
                "driver_blocks": None if index is None else _asked(kernel, threads, shared, index),
            }
        )
    return found


def _asked(kernel: str, threads: int, shared: int, index: int) -> int | None:
    """Ask the driver for resident blocks; None where `secant._cuda` cannot run."""
    try:
        module: Any = importlib.import_module("secant._cuda")
        return int(module.occupancy(module.kernels()[kernel], threads, shared, index))
    except (ImportError, RuntimeError, KeyError):
        return None


def tables(on_gpu: bool) -> dict[str, Any]:
    """Return the rows of every family, and what they are of."""
    architecture, device, index, built = H100, H100_DEVICE, None, Resources()
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        architecture, index = f"sm_{properties.major}{properties.minor}", 0
        device = Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)
        built = compiled(architecture)
    return {
        "architecture": architecture,
        "registers": "cuobjdump of secant._cuda" if built else "the committed tables of ptxas",
        "families": {family: rows(family, architecture, device, built, index) for family in FAMILIES},
    }


def run() -> None:
    """Call every case on the `cuda` backend once, one per kernel, largest first."""
    import secant

    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    limits = Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)
    for family in FAMILIES:
        seen: set[str] = set()
        for case, item in launches(family, limits):
            if item.kernel in seen:
                continue
            seen.update(x.kernel for other, x in launches(family, limits) if other == case)
            problem = case.problem(device)
            with secant.use_backend("cuda"):
                [one] = case.contenders(problem, lambda case, name, of=MEASURED[family]: name == of.contender)
                one.timed.calls[0]()
            del problem
            torch.cuda.empty_cache()
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    else:
        print(json.dumps(tables(sys.argv[1:] == ["cuda"])))
