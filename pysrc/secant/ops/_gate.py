"""The checks that every public function makes before a kernel sees a pointer."""

from __future__ import annotations

import torch
from torch import Tensor

REAL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)


def fail(op: str, name: str, expected: str, got: object) -> ValueError:
    """The one form of an argument error: op, argument, what was expected, what came."""
    return ValueError(f"{op}: {name}: expected {expected}, got {got}")


def describe(x: object) -> str:
    """Shape, dtype and device of a tensor, or the type of anything else."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
    return f"{type(x).__name__} {x!r}"


def tensor(
    op: str, name: str, x: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> Tensor:
    """Check that `x` is a strided tensor of an allowed dtype, on `device` when that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise fail(op, name, "a dense (strided) tensor", f"layout {x.layout}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        kind = " (complex is not supported: pass torch.view_as_real)" if x.dtype.is_complex else ""
        raise TypeError(f"{op}: {name}: expected dtype {allowed}, got {x.dtype}{kind}")
    if device is not None and x.device != device:
        raise fail(op, name, f"device {device}, like the first argument", x.device)
    return x


def shaped(op: str, name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Check that `x` is a dense tensor of exactly this shape, dtype and device."""
    x = tensor(op, name, x, (dtype,), device)
    if x.shape != shape:
        raise fail(op, name, f"shape {shape}", f"shape {tuple(x.shape)}")
    return x


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors with memory of their own kind, not a subclass that stands for something else."""
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def is_transformed(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
    """Whether autograd, forward AD or a functorch transform has to see the call."""
    return (
        (
            (
                a.requires_grad
                or (b is not None and b.requires_grad)
                or (c is not None and c.requires_grad)
                or (d is not None and d.requires_grad)
            )
            and torch.is_grad_enabled()
        )
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether the memory spans of two tensors intersect (conservative: interleaved views count as overlapping).

    There are no addresses to compare while compiling.
    """
    if torch.compiler.is_compiling() or a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    a0, b0 = a.data_ptr(), b.data_ptr()
    return a0 < b0 + span(b) and b0 < a0 + span(a)


def span(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    if x.is_contiguous():
        return x.nbytes
    return (1 + sum((n - 1) * st for n, st in zip(x.shape, x.stride(), strict=True))) * x.element_size()
