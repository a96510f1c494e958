"""The checks that every public function makes before a kernel sees a pointer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real

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
        if x.is_nested:
            return f"a nested tensor, {x.dtype}, on {x.device}"
        return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
    return f"{type(x).__name__} {show(x)}"


def show(x: object) -> str:
    """`repr` of anything, in a length that a message can bear."""
    try:
        text = repr(x)
    except ValueError:  # Python does not write out integers of more than 4300 digits
        return "of more digits than Python writes"
    return text if len(text) <= 80 else text[:60] + "..."


def number(
    op: str,
    name: str,
    value: object,
    expected: str = "a finite number",
    accept: Callable[[float], bool] = math.isfinite,
) -> float:
    """Return `value` as a float: a real number, neither bool nor tensor, that `accept` takes."""
    if isinstance(value, (float, int, Real)) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:
            raise fail(op, name, expected, describe(value)) from None
        if accept(x):
            return x
    raise fail(op, name, expected, describe(value))


def positive(op: str, name: str, value: object, expected: str = "a finite number > 0") -> float:
    """Return `value` as a float in (0, inf)."""
    return number(op, name, value, expected, lambda x: 0.0 < x < math.inf)


def nonnegative(op: str, name: str, value: object, expected: str = "a finite number >= 0") -> float:
    """Return `value` as a float in [0, inf)."""
    return number(op, name, value, expected, lambda x: 0.0 <= x < math.inf)


def integer(op: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int of [low, high]; a bool is none."""
    if isinstance(value, (int, Integral)) and not isinstance(value, bool):
        if value > 2**63 - 1:  # type: ignore[operator]
            raise fail(op, name, "an integer of at most 63 bits", show(value))
        if low <= value and (high is None or value <= high):  # type: ignore[operator]
            return int(value)
    raise fail(op, name, f"an integer, {low}{f' to {high}' if high is not None else ' or more'}", show(value))


def tensor(
    op: str, name: str, x: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> Tensor:
    """Check that `x` is a strided tensor of an allowed dtype, on `device` when that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise fail(op, name, "a dense (strided) tensor", "a nested tensor")
    if x.layout is not torch.strided:
        raise fail(op, name, "a dense (strided) tensor", f"layout {x.layout}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        kind = " (complex is not supported: pass torch.view_as_real)" if x.dtype.is_complex else ""
        raise TypeError(f"{op}: {name}: expected dtype {allowed}, got {x.dtype}{kind}")
    if device is not None and x.device != device:
        raise fail(op, name, f"device {device}, like the first argument", x.device)
    if x.is_meta:
        raise fail(op, name, "a tensor with memory (for shapes alone, use FakeTensorMode)", "device meta")
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


def is_batched(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
    """Whether one of these is a tensor with which torch.autograd batches gradients.

    Those of is_grads_batched, vectorize=True and check_batched_grad are older than torch.func, no subclass, and have no
    address. They are not seen while compiling.
    """
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    return (
        batched(a) or (b is not None and batched(b)) or (c is not None and batched(c)) or (d is not None and batched(d))
    )


def is_watched(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
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


def is_transformed(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
    """Whether anything stands between these tensors and a kernel: `is_watched` or `is_batched`."""
    return is_watched(a, b, c, d) or is_batched(a, b, c, d)


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


def output(
    op: str,
    out: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    inputs: Mapping[str, Tensor | None],
    same: str = "",
    name: str = "out",
) -> None:
    """Check an argument that is written, by the rules of torch's own `out=`, but that it is never resized.

    It fits, is no leaf that autograd watches, has an address of its own for each element, and overlaps no input; the
    one named `same` it may be itself. Inputs of None are passed over.
    """
    shaped(op, name, out, shape, dtype, device)
    if out.requires_grad and torch.is_grad_enabled():
        raise fail(op, name, "a tensor that does not require grad (or torch.no_grad())", "requires_grad=True")
    if not has_own_addresses(out):
        raise fail(op, name, "an address of its own for each element", f"strides {out.stride()}")
    for other, x in inputs.items():
        if x is None or (x is out and other == same) or not overlaps(out, x):
            continue
        if other != same:
            raise fail(op, name, f"no overlap with {other}", "overlapping memory")
        if out.data_ptr() != x.data_ptr() or out.stride() != x.stride() or out.shape != x.shape:
            raise fail(op, name, f"{other} itself or no overlap with it", "partly overlapping memory")


def has_own_addresses(x: Tensor) -> bool:
    """Whether no two elements of a tensor share an address."""
    if x.is_contiguous():
        return True
    reach = 0
    dims = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    for stride, size in dims:
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return True
    if any(stride == 0 for stride, _ in dims) or torch.compiler.is_compiling():
        return False
    # Strides that interlace, such as (2, 3), decide nothing by themselves.
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places[..., None] + stride * torch.arange(size)
    return places.unique().numel() == places.numel()


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote to these: what was saved for a backward pass is no longer what it was.

    While compiling, the schema of the registered op says so.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
