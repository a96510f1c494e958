"""What the `cpu` backends of every family share: the extension module, and how it gets at tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from secant import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was never built, or a SECANT_ISA that this machine has not
    _cpu = None
    _reason = f"the extension module secant._cpu cannot be imported: {error}"

#: The extension module, None when it cannot be imported.
extension: Any = _cpu


def available() -> str | None:
    """Return None when the extension is built, else why it cannot be imported."""
    return None if extension is not None else _reason


def address(x: Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if x is None else x.data_ptr()


def _exchanges() -> bool:
    """Hand torch's DLPack table (2.10 and later) to the extension, which then reads a tensor in one C call."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return extension is not None and table is not None and extension.use_dlpack(table)


_reads_tensors = _exchanges()


def shortcut(name: str) -> Any:
    """Return a function that takes tensors, checks them and computes, in one C call; None without the extension.

    It returns False, having done nothing, unless the arguments are right and need no conversion. Tensors are of the
    very class torch.Tensor and not negated.
    """
    return getattr(extension, name) if _reads_tensors else None
