"""Which implementations exist here, why the others do not, and which one serves a call.

`auto` takes what the table in `secant.defaults` says, or, where that is not available or does not support the device
and dtype, the first backend of `ORDER` that does. It looks once per (family, device, dtype). An explicit choice, by
`use_backend` or the environment variable SECANT_BACKEND, that cannot be met raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import inspect
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from secant import defaults
from secant._errors import BackendError, SecantWarning
from secant.kernels import FAMILIES

#: What `auto` tries, in this order, when the backend of the table cannot serve.
ORDER = ("cuda", "triton", "nvrtc", "cpu", "reference")

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("secant_backend", default=None)
_default = os.environ.get("SECANT_BACKEND") or "auto"  # set to nothing is not set
_auto: dict[tuple[str, torch.device, torch.dtype], ModuleType] = {}
_modules: dict[tuple[str, str], ModuleType | str] = {}


def _check_name(name: str, origin: str) -> str:
    if name != "auto" and name not in ORDER:
        raise ValueError(f"{origin}: expected one of {('auto', *ORDER)}, got {name!r}")
    return name


_check_name(_default, "SECANT_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block by one backend.

    Args:
        name: "auto", "cuda", "triton", "nvrtc", "cpu" or "reference".

    Raises:
        ValueError: for another name. A backend that cannot serve a call inside the block raises
            `secant.BackendError` at that call, with the reason.

    Example:
        >>> with secant.use_backend("reference"):
        ...     secant.ops.block_inv(torch.tensor([[4.0]]))
        (tensor([[0.2500]]), tensor(0, dtype=torch.int32))
    """
    token = _chosen.set(_check_name(name, "use_backend(name)"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """Return the name of the backend in force: the innermost `use_backend`, else SECANT_BACKEND, else "auto"."""
    return _chosen.get() or _default


def load(family: str, name: str) -> ModuleType | str:
    """Return the module that implements `family` on backend `name`, or the reason why there is none here."""
    key = (family, name)
    if key not in _modules:
        path = FAMILIES[family].get(name)
        found: ModuleType | str
        if path is None:
            found = f"the {family} family has no {name} implementation"
        else:
            try:
                found = importlib.import_module(path)
            except ImportError as error:
                found = f"cannot import {error.name or path}: {error}"
            else:
                found = found.available() or found
        if isinstance(found, ModuleType):
            _check_contract(family, name, found)
            if hasattr(found, "tune"):
                found.tune(defaults.processor())
        _modules[key] = found
    return _modules[key]


def _check_contract(family: str, name: str, module: ModuleType) -> None:
    """Raise a TypeError unless the module has the functions of its family's contract, with these parameters."""
    contract = importlib.import_module(f"secant.kernels.{family}.contract").Backend
    for method, declared in vars(contract).items():
        if method.startswith("_"):
            continue
        given = getattr(module, method, None)
        wanted = list(inspect.signature(declared).parameters)[1:]
        parameters = [] if given is None else list(inspect.signature(given).parameters.values())
        if [p.name for p in parameters[: len(wanted)]] != wanted or any(
            p.default is p.empty for p in parameters[len(wanted) :]
        ):
            got = "none" if given is None else f"({', '.join(p.name for p in parameters)})"
            raise TypeError(f"{module.__name__}: expected a function {method}({', '.join(wanted)}), got {got}")


def preferences(family: str, device: torch.device) -> list[str]:
    """Name the backends in the order in which `auto` tries them (see `secant.defaults.Default`)."""
    entry = defaults.find(device.type, family)
    first = [] if entry is None else [entry.backend]
    return [*first, *(name for name in ORDER if name not in first)]


def resolve(family: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the implementation that serves `family` for vectors of this device and dtype.

    Raises:
        BackendError: when the explicitly chosen backend is not available or does not support them.
    """
    name = _chosen.get() or _default
    if name != "auto":
        module = load(family, name)
        reason = module if isinstance(module, str) else module.supports(device, dtype)
        if reason is not None:
            raise BackendError(f"backend {name!r} was chosen for secant.{family} and cannot serve it: {reason}")
        assert isinstance(module, ModuleType)
        return module
    key = (family, device, dtype)
    if key not in _auto:
        _auto[key] = _first_that_serves(family, device, dtype)
    return _auto[key]


def _first_that_serves(family: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    reasons: list[str] = []
    # What comes behind is not imported: on a CPU nothing that was made for GPUs is (Triton takes 0.4 s).
    for name in preferences(family, device):
        module = load(family, name)
        reason = module if isinstance(module, str) else module.supports(device, dtype)
        if reason is None:
            assert isinstance(module, ModuleType)
            if reasons and name == "reference":
                warnings.warn(
                    f"secant.{family} falls back to the reference implementation for {dtype} on {device}: "
                    + "; ".join(reasons),
                    SecantWarning,
                    stacklevel=4,
                )
            return module
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend serves secant.{family} for {dtype} on {device}: {'; '.join(reasons)}")


def table() -> list[tuple[str, str, str | None]]:
    """Rows (family, backend, reason): reason is None for a backend that is available here."""
    rows = []
    for family in FAMILIES:
        for name in ORDER:
            module = load(family, name)
            rows.append((family, name, module if isinstance(module, str) else None))
    return rows
