"""The backends of a family on a GPU, and its CUDA sources on the CPU.

The latter are built with csrc/standin/cuda_on_cpu.h, behind a driver for the family's planner.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from secant.kernels import _cuda_driver

from secant import backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["cuda", "nvrtc", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Each backend for GPUs of the family that the folder of the test is named after, where it can run."""
    module = backends.load(request.path.parent.name, request.param)
    if isinstance(module, str):
        pytest.skip(module)
    reason = module.supports(torch.device("cuda", 0), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return module


class Standin:
    """A driver for `secant.kernels.*.plan.Launcher`: launches run on the CPU, with CUDA threads as fibers.

    `log` holds what was launched; `seed` shuffles the order in which threads run.
    """

    def __init__(self, library: Path, device: Any, seed: int = 0) -> None:
        self._launch = ctypes.CDLL(str(library)).secant_standin_launch
        self._launch.restype = ctypes.c_char_p
        self._device, self.seed, self.log = device, seed, []
        self.graph = False

    def device(self, index: int) -> Any:
        return self._device

    def stream(self, index: int) -> int:
        return 0

    def capturing(self) -> bool:
        return self.graph

    def launch(self, item: Any, index: int, stream: int, parameters: bytes) -> None:
        self.log.append(item)
        error = self._launch(
            item.kernel.encode(),
            item.grid_x,
            item.grid_y,
            item.threads,
            ctypes.c_size_t(item.shared),
            int(item.cooperative),
            ctypes.c_uint64(self.seed),
            parameters,
        )
        if error:
            raise RuntimeError(error.decode())


def _compile(directory: Path, source: str, flags: Sequence[str], name: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the stand-in needs g++ and ucontext (Linux)")
    code, out = directory / f"{name}.cpp", directory / name
    code.write_text(source)
    base = [
        compiler,
        "-std=c++17",
        "-O0",
        "-U_FORTIFY_SOURCE",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
    ]
    base += os.environ.get("SECANT_STANDIN_FLAGS", "").split()
    done = subprocess.run([*base, *flags, str(code), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def build_standin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(family, tables, edit=None, flags=...) -> shared library of that family's cuda*.cu.

    `tables` is C++ behind the source, which ends in SECANT_STANDIN_EXPORT; `edit` maps the source to another text.
    """
    directory = tmp_path_factory.mktemp("standin")
    counter = iter(range(10**6))

    def build(
        family: str,
        tables: str,
        edit: Callable[[str], str] | None = None,
        before: str = "",
        flags: Sequence[str] = ("-shared", "-fPIC"),
    ) -> Path:
        text = _cuda_driver.device_code(family)
        source = directory / f"{family}_{next(counter)}.inc"
        source.write_text(edit(text) if edit else text)
        code = f'#include "{ROOT / "csrc/standin/cuda_on_cpu.h"}"\n{before}\n#include "{source}"\n{tables}\n'
        return _compile(directory, code, flags, source.stem)

    return build


@pytest.fixture(scope="session")
def standin_driver() -> type[Standin]:
    """The driver class: standin_driver(library, device, seed)."""
    return Standin
