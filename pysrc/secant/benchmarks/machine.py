"""What the numbers were measured on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

import secant
from secant import defaults
from secant.benchmarks.timing import Timed, clock_for, interleaved
from secant.kernels._cpu_support import extension as _cpu

#: Far larger than any cache, so that memory is what is measured.
CPU_BYTES, GPU_BYTES = 1 << 28, 1 << 30
#: Level and bytes of a cache that is below every real one but for its size.
CPU_CACHE = (0, 32 << 20)


class Bandwidth(NamedTuple):
    """Bytes per second that a device's memory gave, and how that was measured."""

    bytes_per_second: float
    method: str


def bandwidth(device: torch.device, *, nbytes: int | None = None) -> Bandwidth:
    """Measure what memory gives: best reading rate of all threads on a CPU, rate of a copy (in and out) on a GPU.

    Args:
        device: whose memory.
        nbytes: size of the buffer; None: far larger than the caches.
    """
    if device.type == "cuda":
        return _copy_bandwidth(device, nbytes or GPU_BYTES)
    buffer = torch.ones((nbytes or CPU_BYTES) // 4)
    size = buffer.numel() * 4
    if _cpu is not None:
        return Bandwidth(_cpu.read_bandwidth(buffer.data_ptr(), size, 10), "read by all threads")
    best = interleaved({"read": Timed([buffer.sum])}, clock_for(device), seconds=0.5)["read"].best
    return Bandwidth(size / best, "read by torch.sum")


def _copy_bandwidth(device: torch.device, nbytes: int) -> Bandwidth:
    source = torch.ones(nbytes // 8, device=device)
    target = torch.empty_like(source)
    best = interleaved({"copy": Timed([lambda: target.copy_(source)])}, clock_for(device), seconds=0.5)["copy"].best
    return Bandwidth(8 * source.numel() / best, "copy, counting reads and writes")


def rates(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """Measure what bounds a kernel here: bytes per second of the memory, operations of matrix products by dtype.

    Args:
        device: where. small: products that take no time, to see that it runs.
    """
    n = 256 if small else 4096 if device.type == "cuda" else 1536
    x = torch.ones((1 << 28 if device.type == "cuda" else 1 << 26) >> (6 if small else 0), device=device)
    read = interleaved({"read": Timed([x.sum])}, clock_for(device), seconds=0.3)["read"].best
    found = {
        "bandwidth": bandwidth(device, nbytes=1 << 22 if small else None).bytes_per_second,
        "read_by_sum": 4 * x.numel() / read,
    }
    for dtype in (torch.float32, torch.float64, torch.bfloat16)[: 3 if device.type == "cuda" else 2]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = interleaved({"mm": Timed([functools.partial(torch.matmul, a, b)])}, clock_for(device), seconds=0.3)
        found[f"matmul_{str(dtype).removeprefix('torch.')}"] = 2 * n**3 / best["mm"].best
    return found


def read(times: int, *tensors: torch.Tensor) -> None:
    """Read each tensor so many times with every thread: the memory limit of what must, as a contender on a CPU."""
    for x in tensors:
        _cpu.read_bandwidth(x.data_ptr(), x.numel() * x.element_size(), times)


def can_read() -> bool:
    """Say whether `read` works here."""
    return _cpu is not None


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that can be allocated, or None when the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    except (OSError, IndexError):
        return None


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache of a GPU; 0 for a CPU, where all find inputs in cache alike."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def last_level_cache() -> int:
    """Return the bytes of the last-level cache of the CPU, 32 MB where the system does not say."""
    found = [CPU_CACHE]
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
            found.append((int(level), int(size.removesuffix("K")) << 10))
    return max(found)[1]


def table_in_force() -> str:
    """Name the entry of `secant.defaults.PROCESSORS` that is in force here, and the processor at hand."""
    return f"{defaults.processor().name} ({_cpu_name()})"


def _cpu_name() -> str:
    try:
        return re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, threads, versions and, for a GPU, its name and size, as plain data."""
    about: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "choices": table_in_force(),
        "instruction_set": _cpu.build_config()["isa"] if _cpu is not None else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "secant": secant.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return about


def summary(about: dict[str, Any]) -> str:
    """Return the processor, threads and versions of `describe` in one line."""
    threads = "" if "gpu" in about else f"{about['threads']} threads, "
    return f"{about.get('gpu', about['cpu'])}, {threads}torch {about['torch']}, secant {about['secant']}"
