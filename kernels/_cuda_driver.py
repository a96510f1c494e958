"""What the `cuda` and `nvrtc` backends of every family share: two drivers that launch a kernel of `cuda.cu` by name.

A family's `plan.py` decides what to launch and packs the one struct that each kernel takes; a driver knows how:
`AheadOfTime` through `secant._cuda`, `RunTime` through NVRTC and CuPy. The tests have a third one, on the CPU.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

try:
    from secant import _cuda  # type: ignore[attr-defined]
except ImportError as error:
    _cuda = None
    _why = f"secant was built without CUDA ({error})"
else:
    _why = ""

KERNELS = Path(__file__).resolve().parent


class Device(NamedTuple):
    """What a planner needs to know of a device."""

    multiprocessors: int
    shared: int  # bytes of dynamic shared memory that a block may have (opt-in limit)


class Launch(NamedTuple):
    """One kernel launch, all but its parameters."""

    kernel: str
    grid_x: int
    grid_y: int
    threads: int
    shared: int
    cooperative: bool = False
    phase: int = 0  # which part of a call this is, for families that need several


class Driver(Protocol):
    """Runs kernels of a cuda.cu."""

    def device(self, index: int) -> Device:
        """Properties of a device."""

    def stream(self, index: int) -> int:
        """Handle of the current stream of a device."""

    def capturing(self) -> bool:
        """Tell whether the current stream is being captured into a graph."""

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Launch a kernel with one struct as its parameter."""


def _no_device() -> str | None:
    if torch.cuda.is_available():
        return None
    return "no CUDA device" if torch.version.cuda else "this torch has no CUDA support"


def ahead_of_time_available() -> str | None:
    """Return None when `AheadOfTime` can run here, else the reason why it cannot."""
    return _why if _cuda is None else _no_device()


@functools.cache
def _ahead_of_time_reason(index: int) -> str | None:
    found: str | None = _cuda.reason(index)
    return None if found is None else f"the kernels of secant._cuda do not run on cuda:{index}: {found}"


def ahead_of_time_supports(device: torch.device) -> str | None:
    """Return None when `AheadOfTime` has kernels for this device, else the reason why it has not."""
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device}"
    return _ahead_of_time_reason(torch.cuda.current_device() if device.index is None else device.index)


def run_time_available() -> str | None:
    """Return None when `RunTime` can run here, else the reason why it cannot."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install secant[cupy])"
    reason = _no_device()
    if reason is not None:
        return reason
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported: {error}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"cupy finds no CUDA device: {error}"
    return None


def run_time_supports(device: torch.device) -> str | None:
    """Return None when `RunTime` can compile for this device, else the reason why it cannot."""
    return None if device.type == "cuda" else f"runs on CUDA devices, not on {device}"


def device_code(family: str) -> str:
    """Return the text of a family's cuda*.cu, cuda.cu first: they include nothing."""
    return "".join(path.read_text() for path in sorted((KERNELS / family).glob("cuda*.cu")))


def source(family: str, definitions: str) -> str:
    """Return the text that NVRTC compiles: it includes nothing; `definitions` choose which kernels it has."""
    portable = (KERNELS / "cuda_portable.cuh").read_text().replace("#pragma once\n", "")
    return portable + definitions + device_code(family)


class TypedModules:
    """The modules of a family whose kernels end in a pair of types, but for those of one kind, which end in one type.

    "lbfgs_update_warp_f32_bf16" is in the module "f32_bf16", "lbfgs_dense_f32" in "dense_f32": small ones keep the
    first call short.

    Args:
        family: of kernels. kind: how the names of the latter begin, behind the family's. c_types: type of C by its name
            in a kernel's. pairs, singles: the lists in the family's cuda*.cu that choose either.
    """

    def __init__(self, family: str, kind: str, c_types: Mapping[str, str], pairs: str, singles: str) -> None:
        self._family, self._kind, self._c_types = family, kind, c_types
        self._pairs, self._singles = pairs, singles

    def of(self, kernel: str) -> str:
        """Return the name of the module of a kernel."""
        _, kind, *rest = kernel.split("_")
        return f"{kind}_{rest[-1]}" if kind == self._kind else "_".join(rest[-2:])

    def source(self, module: str) -> str:
        """Return the text that NVRTC compiles for a module: it includes nothing."""
        first, second = module.split("_")
        single = f"X({second}, {self._c_types[second]})" if first == self._kind else ""
        pair = "" if single else f"X({module}, {self._c_types[first]}, {self._c_types[second]})"
        chosen = f"#define {self._pairs}(X) {pair}\n#define {self._singles}(X) {single}\n"
        return source(self._family, chosen)


class AheadOfTime:
    """The driver on `secant._cuda`."""

    capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self) -> None:
        self._index: dict[str, int] = {} if _cuda is None else _cuda.kernels()

    def device(self, index: int) -> Device:
        """Properties of a device."""
        found = _cuda.device_properties(index)
        return Device(found["multiprocessors"], found["shared"])

    def stream(self, index: int) -> int:
        """Handle of the current stream of a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Launch a kernel with one struct as its parameter."""
        _cuda.launch(
            self._index[item.kernel],
            item.grid_x,
            item.grid_y,
            item.threads,
            item.shared,
            item.cooperative,
            index,
            stream,
            parameters,
        )


@functools.cache
def _stream(handle: int, index: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 and newer, which deprecates ExternalStream

        class Handle:
            def __cuda_stream__(self) -> tuple[int, int]:
                return 0, handle

        return cupy.cuda.Stream.from_external(Handle())
    return cupy.cuda.ExternalStream(handle, index)


#: Of NVRTC. CuPy's own way to a module, `RawModule(code=...)`, adds -ftz=true behind what it is given, by which a
#: number below 2^-126 is zero; what it compiles for us, and loads from a file, is IEEE's arithmetic.
NVRTC_OPTIONS = ("--std=c++17", "-ftz=false", "-default-device")


def _image(text: str, architecture: int) -> bytes:
    """Compile to machine code, or to PTX for a GPU that is newer than the compiler."""
    from cupy.cuda import nvrtc

    known = [x for x in nvrtc.getSupportedArchs() if x <= architecture]
    kind = "sm" if architecture in known else "compute"
    program = nvrtc.createProgram(text, "secant.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*NVRTC_OPTIONS, f"-arch={kind}_{max(known)}"))
        image = nvrtc.getCUBIN(program) if kind == "sm" else nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
    return image.encode() if isinstance(image, str) else bytes(image)


def compile_at_run_time(text: str, architecture: str) -> Path:
    """Compile by NVRTC for an architecture such as "90", or find it in the folder where CuPy keeps what it compiles."""
    import cupy

    found = (text, architecture, *NVRTC_OPTIONS, cupy.__version__, str(cupy.cuda.nvrtc.getVersion()))
    digest = hashlib.sha256("\0".join(found).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"secant_{digest}.cubin"
    if not path.exists():
        image = _image(text, int(architecture))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:  # whole or not there, whoever else compiles
            file.write(image)
        os.replace(file.name, path)
    return path


class RunTime:
    """The driver on NVRTC through CuPy; what was compiled is kept on disk.

    `module` names the module that a kernel belongs to, `text` gives a module's source: families keep modules small, so
    that the first call is short.
    """

    capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self, module: Callable[[str], str], text: Callable[[str], str]) -> None:
        self._module_of, self._text = module, text
        self._modules: dict[tuple[str, bool, str], Any] = {}
        self._kernels: dict[tuple[str, bool, int], Any] = {}
        self._shared: dict[tuple[str, bool, int], int] = {}  # dynamic shared memory that a kernel has been allowed

    def device(self, index: int) -> Device:
        """Properties of a device."""
        import cupy

        found = cupy.cuda.Device(index).attributes
        return Device(found["MultiProcessorCount"], found["MaxSharedMemoryPerBlockOptin"])

    def stream(self, index: int) -> int:
        """Handle of the current stream of a device."""
        return torch._C._cuda_getCurrentRawStream(index)

    def _kernel(self, name: str, cooperative: bool, index: int) -> Any:
        import cupy

        found = self._kernels.get((name, cooperative, index))
        if found is not None:
            return found
        # CuPy launches every kernel of a module with cooperative groups enabled cooperatively: hence two modules.
        with cupy.cuda.Device(index) as device:
            key = (self._module_of(name), cooperative, device.compute_capability)
            if key not in self._modules:
                path = compile_at_run_time(self._text(key[0]), device.compute_capability)
                self._modules[key] = cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative)
            found = self._kernels[name, cooperative, index] = self._modules[key].get_function(name)
        return found

    def launch(self, item: Launch, index: int, stream: int, parameters: bytes) -> None:
        """Launch a kernel with one struct as its parameter."""
        import cupy
        import numpy as np

        key = (item.kernel, item.cooperative, index)
        kernel = self._kernel(*key)
        # An array of one element is passed by value: here one element of all the bytes.
        struct = np.frombuffer(parameters, dtype=np.dtype((np.void, len(parameters))))
        with cupy.cuda.Device(index), _stream(stream, index):
            if item.shared > self._shared.get(key, 48 * 1024):
                kernel.max_dynamic_shared_size_bytes = self._shared[key] = item.shared
            kernel((item.grid_x, item.grid_y), (item.threads,), (struct,), shared_mem=item.shared)
