"""`python -m secant info`: what is installed, how it was built, and what can run here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

import secant
from secant import backends
from secant.benchmarks import machine
from secant.benchmarks.report import Table
from secant.cli.console import show


def _module_config(name: str) -> dict[str, Any]:
    """Return what an extension module says of its build, or why there is none."""
    try:
        return dict(importlib.import_module(name).build_config())
    except ImportError as error:
        return {"unavailable": str(error)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cupy_version() -> str:
    """Ask the module: CuPy is distributed under a name per CUDA version."""
    if importlib.util.find_spec("cupy") is None:
        return "not installed"
    try:
        return importlib.import_module("cupy").__version__
    except Exception as error:  # CuPy raises what its CUDA libraries raise
        return f"cannot be imported: {error}"


def mapped_openmp() -> list[str] | None:
    """List the OpenMP runtimes in this process: one, or threads are started twice. None: the system does not say."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return sorted(set(re.findall(r"\S*/lib(?:g|i|)omp\d*[^/\s]*\.so[^\s]*", maps)))


def collect() -> dict[str, Any]:
    """Collect everything that `info` shows, as plain data."""
    return {
        "version": secant.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cupy": _cupy_version(),
        },
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "openmp_runtimes": mapped_openmp(),
        "build": {"secant._cpu": _module_config("secant._cpu"), "secant._cuda": _module_config("secant._cuda")},
        "choices_in_force": machine.table_in_force(),
        "backend_in_force": secant.current_backend(),
        "backends": [
            {"family": family, "backend": name, "available": reason is None, "reason": reason}
            for family, name, reason in backends.table()
        ],
    }


#: What the keys of build_config are called in the table.
LABELS = {
    "isas": "instruction sets, built",
    "isas_usable": "instruction sets, usable here",
    "isa": "instruction set, chosen",
    "openmp": "OpenMP version",
}


def _flat(about: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("secant", about["version"]), ("python", f"{about['python']}, {about['system']}")]
    rows += list(about["packages"].items())
    rows += [("CUDA device", about["cuda_device"] or "none"), ("threads", str(about["threads"]))]
    rows.append(("table of choices in force", about["choices_in_force"]))
    runtimes = about["openmp_runtimes"]
    rows.append(("OpenMP runtime", "unknown" if runtimes is None else ", ".join(runtimes) or "none is mapped"))
    for module, config in about["build"].items():
        for key, value in config.items():
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((f"{module}: {LABELS.get(key, key.replace('_', ' '))}", text))
    return rows


def run(*, as_json: bool) -> int:
    """Print it; the exit status."""
    about = collect()
    if as_json:
        print(json.dumps(about, indent=2))
        return 0
    show(Table("secant", ("", ""), _flat(about)))
    rows = [
        (b["family"], b["backend"], "yes" if b["available"] else "no", b["reason"] or "") for b in about["backends"]
    ]
    note = f"backend in force: {about['backend_in_force']} (secant.use_backend, SECANT_BACKEND)"
    show(Table("Backends", ("op family", "backend", "here", "why not"), rows, (note,)))
    return 0
