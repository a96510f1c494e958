"""What a kernel asks of tensors before it sees a pointer: who else must see the call, and what may be written where."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secant._checks import fail, shaped


def is_plain(*tensors: Tensor) -> bool:
    """Tell whether these are tensors with memory of their own kind, not a subclass that stands for something else."""
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def is_batched(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
    """Tell whether one of these is a tensor with which torch.autograd batches gradients.

    Those of is_grads_batched, vectorize=True and check_batched_grad are older than torch.func, no subclass, and have no
    address.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return (
        batched(a) or (b is not None and batched(b)) or (c is not None and batched(c)) or (d is not None and batched(d))
    )


def is_watched(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> bool:
    """Tell whether autograd, forward AD or a functorch transform has to see the call."""
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
    """Tell whether anything stands between these tensors and a kernel: `is_watched` or `is_batched`."""
    return is_watched(a, b, c, d) or is_batched(a, b, c, d)


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Tell whether the memory spans of two tensors intersect (conservative: interleaved views count as overlapping).

    There are no addresses to compare behind a tensor subclass, nor while compiling.
    """
    if not is_plain(a, b) or a.device != b.device or a.numel() == 0 or b.numel() == 0:
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
    """Tell whether no two elements of a tensor share an address."""
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
    if any(stride == 0 for stride, _ in dims) or not is_plain(x):
        return False
    # Strides that interlace, such as (2, 3), decide nothing by themselves.
    places = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        places = places[..., None] + stride * torch.arange(size)
    return places.unique().numel() == places.numel()


def written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote to these: what was saved for a backward pass is no longer what it was.

    Of what a compiler traces with, the schema of the registered op says so.
    """
    if is_plain(*tensors):
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
